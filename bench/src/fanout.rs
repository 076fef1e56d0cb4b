//! One relay and many followers, each of which reads all and throws it away.
//!
//! A follower speaks as a bridge of a domain below does and tells its position every
//! second, but has neither queue nor database, so that the relay is what is measured.
//! All run in this process, on the same cores as the relay.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes};
use terrace_bridge::client::quote_ident;
use terrace_bridge::conninfo::ConnInfo;
use terrace_bridge::lsn::Lsn;
use terrace_bridge::record::{HEADER_LEN, body_len};
use terrace_bridge::upstream;
use terrace_tests::{Server, Tree};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::pgbench::{INSERT, SCHEMA, pgbench, processed, script_file};
use crate::proc;
use crate::report::{Better, Figure, Report};
use crate::workload::{Plan, Workload};
use crate::world::{Stage, boot, go_live, plant};

pub struct Fanout;

/// Transactions per second at the top.
const RATE: u32 = 100;
/// Nobody may be further behind at the end of the load.
const LIVE: Duration = Duration::from_secs(2);
/// Connections are made so many at a time.
const AT_ONCE: usize = 20;

impl Workload for Fanout {
    fn name(&self) -> &'static str {
        "fanout"
    }

    fn about(&self) -> &'static str {
        "one relay, 1 to 500 followers at 100 tx/s"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        stage.clear();
        let mut tree = plant()?;
        tree.top.sql(SCHEMA);
        tree.top.sql("SELECT terrace.add_table('bench_insert')");
        boot(&mut tree, &[("region", None, 1)])?;
        go_live(&mut tree)?;
        let runtime = Runtime::new().context("start a runtime")?;
        let alone = load(&tree, plan.fanout_seconds, || Ok(()))?;
        let mut measured = Vec::new();
        for count in [1, 10, 100, 500] {
            let crowd = runtime.block_on(Crowd::gather(&tree, count))?;
            let with = load(&tree, plan.fanout_seconds, || crowd.must_be_live(&tree.top))?;
            let cost = Cost::of(&with, &alone, count);
            println!(
                "    {count} followers: {:.1} us of CPU and {:.0} KiB each (relay in all {:.0} % of a core, {:.1} MiB)",
                cost.micros,
                cost.kib,
                with.cpu / with.seconds * 100.0,
                with.mib
            );
            measured.push((count, cost));
            runtime.block_on(crowd.leave());
        }
        let base = measured[1].1;
        for (count, cost) in &measured[2..] {
            let mut add = |what, unit, value, of_ten| {
                report.add(Figure {
                    workload: format!("fanout: {count} followers"),
                    what,
                    unit,
                    better: Better::Lower,
                    against: "10 followers",
                    terrace: vec![value],
                    baseline: vec![of_ten],
                    paired: false,
                });
            };
            add("CPU each, per tx", "us", cost.micros, base.micros);
            add("memory each", "KiB", cost.kib, base.kib);
        }
        Ok(())
    }
}

/// What the bridge of the region used.
struct Used {
    seconds: f64,
    transactions: f64,
    cpu: f64,
    mib: f64,
}

/// Writes at the top for a while.
fn load(tree: &Tree, seconds: u64, check: impl FnOnce() -> Result<()>) -> Result<Used> {
    let bridge = proc::bridge(&tree.nodes[0].bridge).context("the bridge does not run")?;
    let (time, rate) = (seconds.to_string(), RATE.to_string());
    let script = script_file(&tree.top, INSERT)?.context("a script")?;
    let arguments = ["-n", "-c", "2", "-T", &time, "-R", &rate, "-f", &script];
    let (before, start) = (proc::cpu_seconds(bridge), Instant::now());
    let (transactions, _) = processed(&pgbench(&tree.top, "", &arguments)?)?;
    check()?;
    Ok(Used {
        seconds: start.elapsed().as_secs_f64(),
        transactions,
        cpu: proc::cpu_seconds(bridge) - before,
        mib: proc::memory_mib(bridge, "VmRSS").context("memory of the bridge")?,
    })
}

/// What one follower costs.
#[derive(Clone, Copy)]
struct Cost {
    /// CPU of a transaction, microseconds.
    micros: f64,
    kib: f64,
}

impl Cost {
    fn of(with: &Used, alone: &Used, followers: u32) -> Cost {
        let each = |used: &Used| used.cpu / used.transactions * 1e6;
        Cost {
            micros: (each(with) - each(alone)) / f64::from(followers),
            kib: (with.mib - alone.mib) * 1024.0 / f64::from(followers),
        }
    }
}

/// Followers of one relay.
struct Crowd {
    at: Vec<Arc<AtomicU64>>,
    tasks: JoinSet<Result<()>>,
}

impl Crowd {
    async fn gather(tree: &Tree, count: u32) -> Result<Crowd> {
        let relay = ConnInfo::parse(&tree.nodes[0].bridge.conninfo())?;
        let mut crowd = Crowd {
            at: Vec::new(),
            tasks: JoinSet::new(),
        };
        let names: Vec<String> = (1..=count)
            .map(|n| format!("follower-{count}-{n}"))
            .collect();
        for names in names.chunks(AT_ONCE) {
            let mut connecting = JoinSet::new();
            for name in names {
                let (relay, name) = (relay.clone(), name.clone());
                connecting.spawn(async move { Follower::connect(&relay, &name).await });
            }
            while let Some(follower) = connecting.join_next().await {
                let follower = follower.context("connect")??;
                crowd.at.push(Arc::clone(&follower.at));
                crowd.tasks.spawn(follower.run());
            }
        }
        Ok(crowd)
    }

    /// Waits until everybody has all that the top has.
    fn must_be_live(&self, top: &Server) -> Result<()> {
        let end: Lsn = top
            .value("SELECT pg_current_wal_insert_lsn()")
            .parse()
            .map_err(|_| anyhow::anyhow!("a position of the top"))?;
        let deadline = Instant::now() + LIVE;
        loop {
            let behind = self
                .at
                .iter()
                .filter(|at| at.load(Ordering::Relaxed) < end.0);
            match behind.count() {
                0 => return Ok(()),
                behind if Instant::now() > deadline => {
                    bail!(
                        "{behind} of {} followers are not at live rate",
                        self.at.len()
                    )
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    async fn leave(mut self) {
        self.tasks.shutdown().await;
    }
}

struct Follower {
    client: terrace_bridge::client::Client,
    at: Arc<AtomicU64>,
}

impl Follower {
    async fn connect(relay: &ConnInfo, name: &str) -> Result<Follower> {
        let (mut client, ..) = upstream::connect(relay, name).await?;
        let slot = quote_ident(name);
        let rows = client
            .simple(&format!(
                "CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput"
            ))
            .await?;
        let point = rows.first().and_then(|row| row.get(1)?.clone());
        let point = point.context("CREATE_REPLICATION_SLOT gave no position")?;
        client
            .copy_both(&format!(
                "START_REPLICATION SLOT {slot} LOGICAL {point} (proto_version '1', \
                 publication_names 'terrace', messages 'true', instance '{name}')"
            ))
            .await?;
        Ok(Follower {
            client,
            at: Arc::default(),
        })
    }

    async fn run(mut self) -> Result<()> {
        let mut tick = interval(Duration::from_secs(1));
        loop {
            while let Some(message) = self.client.buffered()? {
                self.take(message.body)?;
            }
            tokio::select! {
                filled = self.client.fill() => filled?,
                _ = tick.tick() => self.tell().await?,
            }
        }
    }

    fn take(&mut self, mut body: Bytes) -> Result<()> {
        if body.try_get_u8()? != b'T' {
            return Ok(());
        }
        while !body.is_empty() {
            let len = HEADER_LEN + body_len(&body)?;
            let lsn = (&body[12..20]).get_u64();
            self.at.fetch_max(lsn, Ordering::Relaxed);
            body.advance(len);
        }
        Ok(())
    }

    async fn tell(&mut self) -> Result<()> {
        let at = Lsn(self.at.load(Ordering::Relaxed));
        upstream::put_status(self.client.buffer(), (at, at, at), false);
        timeout(Duration::from_secs(10), self.client.flush()).await??;
        Ok(())
    }
}
