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

use crate::native::Native;
use crate::pgbench::{
    CLIENTS, HOT, INSERT, KEYLESS, LARGE, MIXED, Script, TABLES, TINY, TPCB, UNIQUE, WIDE, Work,
    fill,
};
use crate::proc::cpu_seconds;
use crate::report::{Better, Figure, Report};
use crate::side::{Drained, Side, drain, mark, must_be_equal};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{HOP, Shape, Stage, World};

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
            shape: HOP,
            scripts: &[TPCB, INSERT, HOT, WIDE, TINY, UNIQUE, MIXED],
        }
    }

    /// Of one transaction.
    pub fn large() -> Drain {
        Drain {
            name: "large",
            about: "one large transaction over one hop, top -> 1",
            shape: HOP,
            scripts: &[LARGE],
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
    Terrace,
    Native,
    Pglogical,
    /// pg_recvlogical, which throws everything away: the limit of one walsender.
    Decode,
}

impl Turn {
    fn name(self) -> &'static str {
        match self {
            Turn::Terrace => "terrace",
            Turn::Native => "native",
            Turn::Pglogical => "pglogical",
            Turn::Decode => "decode",
        }
    }

    fn run(self, world: &mut World, marker: i64) -> Result<Drained> {
        let top = world.top_pid()?;
        let side: &mut dyn Side = match self {
            Turn::Terrace => &mut world.terrace,
            Turn::Native => &mut world.native,
            Turn::Pglogical => world.pglogical.as_mut().context("no pglogical")?,
            Turn::Decode => return discard(world.top(), top),
        };
        let drained = drain(side, top, marker, |_| ())?;
        side.pause()?;
        Ok(drained)
    }
}

/// What native subscriptions are measured with as well.
#[derive(Clone, Copy)]
enum Setting {
    SyncCommit,
    /// Long values are compressed as Terrace has them compressed.
    Lz4,
    /// Rows are sent in binary form, and while their transaction is still written, which PostgreSQL 15
    /// spools to files of the subscriber.
    Streaming,
}

impl Setting {
    fn name(self) -> &'static str {
        match self {
            Setting::SyncCommit => "native, sync commit on",
            Setting::Lz4 => "native, lz4",
            Setting::Streaming => "native, streaming and binary",
        }
    }

    fn give(self, native: &Native, is_on: bool) {
        match (self, is_on) {
            (Setting::SyncCommit, true) => native.synchronous_commit("on"),
            (Setting::SyncCommit, false) => native.synchronous_commit("off"),
            (Setting::Lz4, true) => native.compression("lz4"),
            (Setting::Lz4, false) => native.compression("pglz"),
            (Setting::Streaming, true) => native.streaming_and_binary("on"),
            (Setting::Streaming, false) => native.streaming_and_binary("off"),
        }
    }
}

/// One turn's results, round by round.
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

/// All results of one script.
#[derive(Default)]
struct Samples {
    terrace: Sample,
    /// As `CREATE SUBSCRIPTION` makes it: `synchronous_commit = off`.
    native: Sample,
    /// With another setting.
    other: Sample,
    /// None where it is not installed.
    pglogical: Sample,
    decode: Sample,
}

impl Workload for Drain {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn is_large(&self) -> bool {
        self.scripts
            .iter()
            .any(|one| matches!(one.work, Work::Large))
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let world = stage.world(self.shape, plan)?;
        for script in self.scripts {
            if plan.quick && script.name == MIXED.name {
                continue;
            }
            let result = self.script(world, plan, *script, report);
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
        let [rounds, other_rounds] = match (self.is_tree(), script.work) {
            (true, _) => plan.tree_rounds,
            (false, Work::TpcB) => plan.hop_rounds,
            (false, Work::Text(_)) if script.name == WIDE.name => {
                [plan.script_rounds, plan.lz4_rounds]
            }
            (false, Work::Text(_)) => [plan.script_rounds, 0],
            (false, Work::Large) => plan.large_rounds,
        };
        let other = match script.work {
            Work::Large => Setting::Streaming,
            Work::Text(_) if script.name == WIDE.name => Setting::Lz4,
            _ => Setting::SyncCommit,
        };
        let size = plan.backlog[usize::from(self.is_tree())];
        let amount = match script.work {
            Work::Large => plan.large_rows,
            // pgbench's clients share the work evenly.
            _ => (size as f64 * script.share) as u64 / CLIENTS * CLIENTS,
        };
        let mut samples = Samples::default();
        let all = rounds + other_rounds;
        // Whose turn is first changes in either.
        let mut firsts = [0, 0];
        for round in 0..all {
            // Spread among the others, as the machine's speed drifts.
            let is_other = (round + 1) * other_rounds / all > round * other_rounds / all;
            let setting = is_other.then_some(other);
            other.give(&world.native, is_other);
            let first = &mut firsts[usize::from(is_other)];
            self.round(world, script, amount, *first, setting, &mut samples)?;
            *first += 1;
        }
        other.give(&world.native, false);
        let tables = match script.work {
            Work::TpcB => &TABLES[..4],
            _ => &[script.table][..],
        };
        for side in [&world.terrace as &dyn Side, &world.native] {
            must_be_equal(&side.servers(), world.top(), tables)?;
            must_be_equal(&side.servers(), world.top(), &[KEYLESS])?;
        }
        if let Some(side) = &world.pglogical {
            must_be_equal(&side.servers(), world.top(), tables)?;
        }
        self.figures(report, script, amount, samples, other);
        Ok(())
    }

    /// One backlog, drained by each in turn.
    fn round(
        &self,
        world: &mut World,
        script: Script,
        amount: u64,
        first: usize,
        setting: Option<Setting>,
        samples: &mut Samples,
    ) -> Result<()> {
        let top = world.top();
        if !self.is_tree() {
            top.sql(CREATE_SLOT);
        }
        fill(top, script, amount)?;
        let marker = mark(top)?;
        world.tidy()?;
        let mut turns = vec![Turn::Terrace, Turn::Native];
        turns.extend((!self.is_tree()).then_some(Turn::Decode));
        turns.extend(world.pglogical.as_ref().map(|_| Turn::Pglogical));
        let unit = match script.work {
            Work::Large => "rows",
            _ => "tx",
        };
        let mut line = format!("    {}, {amount} {unit}:", script.name);
        for turn in rotated(&turns, first) {
            let drained = turn.run(world, marker)?;
            let seconds = drained.elapsed.as_secs_f64();
            line += &format!("  {} {seconds:.2} s", turn.name());
            let sample = match turn {
                Turn::Terrace => &mut samples.terrace,
                Turn::Native if setting.is_some() => &mut samples.other,
                Turn::Native => &mut samples.native,
                Turn::Pglogical => &mut samples.pglogical,
                Turn::Decode => &mut samples.decode,
            };
            sample.add(&drained);
        }
        if !self.is_tree() {
            world.top().sql(DROP_SLOT);
        }
        let note = setting.map_or(String::new(), |other| format!(" ({})", other.name()));
        println!("{line}{note}");
        Ok(())
    }

    fn figures(
        &self,
        report: &mut Report,
        script: Script,
        amount: u64,
        samples: Samples,
        other: Setting,
    ) {
        let mut add = |what, unit, better, against, terrace: &[f64], baseline: &[f64]| {
            if baseline.is_empty() {
                return;
            }
            report.add(Figure {
                workload: format!("{}: {}", self.name, script.name),
                what,
                unit,
                better,
                against,
                terrace: terrace.to_vec(),
                baseline: baseline.to_vec(),
                paired: false,
            });
        };
        let (work, unit) = match script.work {
            Work::Large => (amount as f64 / 1024.0, "MiB/s"),
            _ => (amount as f64, "tx/s"),
        };
        let rate = |sample: &Sample| -> Vec<f64> {
            let seconds = sample.elapsed.iter();
            seconds.map(|s| work / s).collect()
        };
        let own = rate(&samples.terrace);
        for (against, theirs) in [
            ("native", &samples.native),
            (other.name(), &samples.other),
            ("pglogical", &samples.pglogical),
            ("decode limit", &samples.decode),
        ] {
            add("rate", unit, Better::Higher, against, &own, &rate(theirs));
        }
        let (terrace, native) = (&samples.terrace, &samples.native);
        let mut lower = |what, terrace: &[f64], native: &[f64]| {
            add(what, "s", Better::Lower, "native", terrace, native);
        };
        if self.is_tree() {
            lower("elapsed", &terrace.elapsed, &native.elapsed);
        }
        lower("CPU, all", &terrace.cpu, &native.cpu);
        lower("CPU below the top", &terrace.cpu_below, &native.cpu_below);
    }
}

/// Made before the backlog, so that it holds all of it.
const CREATE_SLOT: &str = "SELECT pg_create_logical_replication_slot('discard', 'pgoutput')";
const DROP_SLOT: &str = "SELECT pg_drop_replication_slot('discard')";

/// Until pg_recvlogical has read and thrown away what the slot holds, as Terrace asks for it, but over a
/// Unix socket: the limit is that of the fastest way.
fn discard(top: &Server, pid: i32) -> Result<Drained> {
    let before = cpu_seconds(pid);
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
    let elapsed = start.elapsed();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pg_recvlogical: {said}");
    Ok(Drained {
        elapsed,
        cpu_below: 0.0,
        cpu_top: cpu_seconds(pid) - before,
    })
}
