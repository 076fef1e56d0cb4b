//! What a workload needs from either side, Terrace or native.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use postgres::{Client, Statement};
use terrace_tests::Server;

use crate::proc;
use crate::workload::{all, wait};

/// How often a server is asked whether the marker has arrived.
const POLL: Duration = Duration::from_millis(5);

/// Those that are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Terrace,
    Native,
    /// Where it is installed.
    Pglogical,
}

/// Servers below the top and what moves the data.
pub trait Side {
    /// Moves data from now on.
    fn resume(&mut self) -> Result<()>;
    /// Stops moving data; returns when nothing moves any more.
    fn pause(&mut self) -> Result<()>;
    /// All servers, level by level.
    fn servers(&self) -> Vec<&Server>;
    /// Processes beside the servers.
    fn helpers(&self) -> Vec<i32>;

    /// CPU seconds so far of everything below the top.
    fn cpu_seconds(&self) -> f64 {
        let servers = self.servers();
        let postmasters = servers
            .iter()
            .filter_map(|server| proc::postmaster(server))
            .map(proc::cpu_seconds);
        let helpers = self.helpers().into_iter().map(proc::cpu_seconds);
        postmasters.chain(helpers).sum()
    }
}

/// One drain.
pub struct Drained {
    pub elapsed: Duration,
    /// CPU seconds of all servers and bridges below the top.
    pub cpu_below: f64,
    /// CPU seconds of the top.
    pub cpu_top: f64,
}

/// Puts a mark behind everything committed so far; whoever shows it has everything.
pub fn mark(top: &Server) -> Result<i64> {
    let sql = "UPDATE bench_marker SET n = n + 1 WHERE id = 1 RETURNING n";
    Ok(top.connect().query_one(sql, &[])?.get(0))
}

/// Resumes a paused side, below the server of process `top`, and measures until every server shows `marker`, calling
/// `meanwhile` at each poll; the side runs on.
pub fn drain(
    side: &mut dyn Side,
    top: i32,
    marker: i64,
    mut meanwhile: impl FnMut(&dyn Side),
) -> Result<Drained> {
    let mut waiting = Vec::new();
    for server in side.servers() {
        let mut client = server.connect();
        let ask = client.prepare("SELECT n FROM bench_marker WHERE id = 1")?;
        waiting.push((client, ask));
    }
    let before = (side.cpu_seconds(), proc::cpu_seconds(top));
    let start = Instant::now();
    side.resume()?;
    wait("the backlog arrives", POLL, || {
        let arrived = all(&mut waiting, |(client, ask)| shows(client, ask, marker))?;
        meanwhile(side);
        Ok(arrived)
    })?;
    Ok(Drained {
        elapsed: start.elapsed(),
        cpu_below: side.cpu_seconds() - before.0,
        cpu_top: proc::cpu_seconds(top) - before.1,
    })
}

fn shows(client: &mut Client, ask: &Statement, marker: i64) -> Result<bool> {
    let row = client.query_opt(ask, &[])?;
    Ok(row.is_some_and(|row| row.get::<_, i64>(0) >= marker))
}

/// Fails unless all servers hold the same rows as the top.
pub fn must_be_equal(servers: &[&Server], top: &Server, tables: &[&str]) -> Result<()> {
    for table in tables {
        let wanted = top.checksum(table)?;
        for server in servers {
            let found = server.checksum(table)?;
            let name = &server.name;
            ensure!(found == wanted, "{table}: {name} has {found}, top {wanted}");
        }
    }
    Ok(())
}
