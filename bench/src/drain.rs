//! How fast a backlog is worked off, over one hop or over the whole tree.
//!
//! Both sides are paused while the top fills up; then each drains the very same
//! WAL alone, from its start to the moment when every server shows a mark that
//! was committed last. Polling for one row by its key costs next to nothing.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use terrace_tests::Server;
use terrace_tests::server::program;

use crate::pgbench::{HOT, INSERT, Script, TABLES, TPCB, WIDE, fill};
use crate::report::{Better, Figure, Report};
use crate::side::{Drained, Which, drain, mark, must_be_equal};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Shape, World};

pub struct Drain {
    name: &'static str,
    about: &'static str,
    shape: Shape,
    scripts: &'static [Script],
}

impl Drain {
    /// From the top to one server.
    pub fn hop() -> Drain {
        Drain {
            name: "drain",
            about: "a backlog over one hop, top -> 1",
            shape: Shape {
                region: 1,
                branch: 0,
            },
            scripts: &[TPCB, INSERT, HOT, WIDE],
        }
    }

    /// Over seven servers.
    pub fn tree() -> Drain {
        Drain {
            name: "tree",
            about: "a backlog over seven servers, top -> 3 -> 3",
            shape: Shape {
                region: 3,
                branch: 3,
            },
            scripts: &[TPCB],
        }
    }

    fn is_tree(&self) -> bool {
        self.shape.branch > 0
    }
}

/// Who works off the backlog.
#[derive(Clone, Copy)]
enum Turn {
    Side(Which),
    /// pg_recvlogical, which throws everything away: the limit of one walsender.
    Decode,
}

#[derive(Default)]
struct Sample {
    elapsed: Vec<f64>,
    cpu: Vec<f64>,
    cpu_below: Vec<f64>,
}

impl Sample {
    fn add(&mut self, drained: &Drained) {
        self.elapsed.push(drained.elapsed.as_secs_f64());
        self.cpu.push(drained.cpu_top + drained.cpu_below);
        self.cpu_below.push(drained.cpu_below);
    }
}

impl Workload for Drain {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn run(&self, plan: &Plan, report: &mut Report) -> Result<()> {
        let mut world = World::boot(self.shape, plan)?;
        for script in self.scripts {
            let result = self.script(&mut world, plan, *script, report);
            world.explain(result)?;
        }
        Ok(())
    }
}

impl Drain {
    fn script(
        &self,
        world: &mut World,
        plan: &Plan,
        script: Script,
        report: &mut Report,
    ) -> Result<()> {
        let size = plan.backlog[usize::from(self.is_tree())];
        // pgbench's clients share the work evenly.
        let transactions = (size as f64 * script.share) as u64 / 8 * 8;
        let turns: &[Turn] = if self.is_tree() {
            &[Turn::Side(Which::Terrace), Turn::Side(Which::Native)]
        } else {
            &[
                Turn::Side(Which::Terrace),
                Turn::Side(Which::Native),
                Turn::Decode,
            ]
        };
        let (mut terrace, mut native, mut decode) =
            (Sample::default(), Sample::default(), Vec::new());
        for round in 0..plan.rounds[usize::from(self.is_tree())] {
            let top = world.top();
            top.sql(CREATE_SLOT);
            fill(top, script, transactions)?;
            let marker = mark(top)?;
            world.checkpoint();
            let mut line = format!("    {}, {transactions} tx:", script.name);
            for turn in rotated(turns, round) {
                let (name, seconds) = match turn {
                    Turn::Decode => {
                        let seconds = discard(world.top())?;
                        decode.push(seconds);
                        ("decode", seconds)
                    }
                    Turn::Side(which) => {
                        let top = world.top_pid()?;
                        let side = world.side(which);
                        let drained = drain(side, top, marker, |_| ())?;
                        side.pause()?;
                        let seconds = drained.elapsed.as_secs_f64();
                        let sample = if which == Which::Terrace {
                            &mut terrace
                        } else {
                            &mut native
                        };
                        sample.add(&drained);
                        (world.side(which).name(), seconds)
                    }
                };
                line += &format!("  {name} {seconds:.2} s");
            }
            println!("{line}");
            world
                .top()
                .sql("SELECT pg_drop_replication_slot('discard')");
        }
        let top = world.top();
        let tables = if script.table == TPCB.table {
            &TABLES[..4]
        } else {
            &[script.table][..]
        };
        must_be_equal(&world.terrace, top, tables)?;
        must_be_equal(&world.native, top, tables)?;
        self.figures(report, script, transactions, terrace, native, decode);
        Ok(())
    }

    fn figures(
        &self,
        report: &mut Report,
        script: Script,
        transactions: u64,
        terrace: Sample,
        native: Sample,
        decode: Vec<f64>,
    ) {
        let workload = format!("{}: {}", self.name, script.name);
        let rate = |seconds: &[f64]| -> Vec<f64> {
            seconds.iter().map(|s| transactions as f64 / s).collect()
        };
        let figure = |what, unit, better, against, terrace, native| Figure {
            workload: workload.clone(),
            what,
            unit,
            better,
            against,
            terrace,
            baseline: native,
            paired: false,
        };
        let own = rate(&terrace.elapsed);
        report.add(figure(
            "rate",
            "tx/s",
            Better::Higher,
            "native",
            own.clone(),
            rate(&native.elapsed),
        ));
        if !decode.is_empty() {
            let limit = rate(&decode);
            report.add(figure(
                "rate",
                "tx/s",
                Better::Higher,
                "decode limit",
                own,
                limit,
            ));
        }
        let mut lower = |what, terrace, native| {
            report.add(figure(what, "s", Better::Lower, "native", terrace, native));
        };
        if self.is_tree() {
            lower("elapsed", terrace.elapsed, native.elapsed);
        }
        lower("CPU, all", terrace.cpu, native.cpu);
        lower("CPU below the top", terrace.cpu_below, native.cpu_below);
    }
}

/// Made before the backlog, so that it holds all of it.
const CREATE_SLOT: &str = "SELECT pg_create_logical_replication_slot('discard', 'pgoutput')";

/// Seconds until pg_recvlogical has read and thrown away what the slot holds.
fn discard(top: &Server) -> Result<f64> {
    let end = top.value("SELECT pg_current_wal_insert_lsn()");
    let start = Instant::now();
    let output = Command::new(program("pg_recvlogical"))
        .arg("-h")
        .arg(top.socket_dir())
        .args(["-p", &top.port.to_string(), "-U", "postgres", "-d", "app"])
        .args(["--start", "--no-loop", "-S", "discard", "-E", &end])
        .args(["-o", "proto_version=1", "-o", "publication_names=terrace"])
        .args(["-o", "messages=true", "-f", "/dev/null"])
        .output()
        .context("run pg_recvlogical")?;
    let seconds = start.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pg_recvlogical: {said}");
    Ok(seconds)
}
