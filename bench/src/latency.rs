//! From commit at the top to visible on level 2, at a low rate.
//!
//! All processes share one clock. A row counts from the moment when its
//! commit was acknowledged to the writer, until a session on the server shows
//! it: each watched server is asked by `SELECT max(id)`, a look at the end of
//! an index, and again half a millisecond after each answer. So a number
//! is at most that pause and one answer too high, the same for both sides, and
//! no trigger or notification takes part in what is measured.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use terrace_tests::Server;

use crate::report::{Better, Figure, Report};
use crate::side::{Which, drain, mark};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Shape, Stage, World};

pub struct Latency;

/// Rows per second.
const RATE: u64 = 50;
/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_micros(500);
/// Servers of the last level that are watched: its slaves.
const WATCHED: usize = 2;
const LIMIT: Duration = Duration::from_secs(60);
/// Not counted, at the start of each turn.
const WARM_UP: usize = RATE as usize / 2;

/// A side and how it is set.
#[derive(Clone, Copy)]
enum Mode {
    Terrace,
    TerraceAtOnce,
    NativeOff,
    NativeOn,
}

const MODES: [Mode; 4] = [
    Mode::Terrace,
    Mode::NativeOff,
    Mode::TerraceAtOnce,
    Mode::NativeOn,
];

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Terrace => "terrace",
            Mode::TerraceAtOnce => "terrace, wait_for_upstream=false",
            Mode::NativeOff => "native, synchronous_commit=off",
            Mode::NativeOn => "native, synchronous_commit=on",
        }
    }

    fn which(self) -> Which {
        match self {
            Mode::Terrace | Mode::TerraceAtOnce => Which::Terrace,
            Mode::NativeOff | Mode::NativeOn => Which::Native,
        }
    }
}

impl Workload for Latency {
    fn name(&self) -> &'static str {
        "latency"
    }

    fn about(&self) -> &'static str {
        "commit to visible on slaves of level 2, top -> 3 -> 3, 50 rows/s"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let shape = Shape {
            region: 3,
            branch: 3,
        };
        let world = stage.world(shape, plan)?;
        let (rounds, seconds) = plan.latency;
        let mut p50: [Vec<f64>; 4] = Default::default();
        let mut p99: [Vec<f64>; 4] = Default::default();
        for round in 0..rounds {
            for i in rotated(&[0, 1, 2, 3], round) {
                let result = turn(world, MODES[i], seconds);
                let sorted = world.explain(result)?;
                p50[i].push(percentile(&sorted, 50));
                p99[i].push(percentile(&sorted, 99));
                println!(
                    "    {}: p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms, {} samples",
                    MODES[i].name(),
                    percentile(&sorted, 50),
                    percentile(&sorted, 99),
                    percentile(&sorted, 100),
                    sorted.len()
                );
            }
        }
        for (what, values) in [("p50", p50), ("p99", p99)] {
            let [ordered, off, at_once, on] = values;
            for (workload, terrace) in [
                ("latency: in order", &ordered),
                ("latency: at once", &at_once),
            ] {
                for (against, native) in [
                    ("native, sync commit off", &off),
                    ("native, sync commit on", &on),
                ] {
                    report.add(Figure {
                        workload: workload.into(),
                        what,
                        unit: "ms",
                        better: Better::Lower,
                        against,
                        terrace: terrace.clone(),
                        baseline: native.clone(),
                        paired: false,
                    });
                }
            }
        }
        Ok(())
    }
}

/// One measurement with only one side running; latencies in ms, sorted.
fn turn(world: &mut World, mode: Mode, seconds: u64) -> Result<Vec<f64>> {
    let files = match mode {
        Mode::TerraceAtOnce => {
            let lines = "[apply]\nwait_for_upstream = false";
            Some(world.terrace.configure(lines)?)
        }
        Mode::Terrace => None,
        Mode::NativeOff => {
            world.native.synchronous_commit("off");
            None
        }
        Mode::NativeOn => {
            world.native.synchronous_commit("on");
            None
        }
    };
    let marker = mark(world.top())?;
    let top = world.top_pid()?;
    let side = world.side(mode.which());
    drain(side, top, marker, |_| ())?;
    let result = {
        let side = match mode.which() {
            Which::Terrace => world.terrace.tree.nodes.iter().map(|n| &n.server).collect(),
            Which::Native => crate::side::Side::servers(&world.native),
        };
        let watched: Vec<&Server> = side.into_iter().rev().take(WATCHED).collect();
        measure(world.top(), &watched, seconds)
    };
    world.side(mode.which()).pause()?;
    if let Some(files) = files {
        world.terrace.restore(&files)?;
    }
    result
}

/// Writes at the top, watches the servers, and compares the times.
fn measure(top: &Server, watched: &[&Server], seconds: u64) -> Result<Vec<f64>> {
    let mut writer = top.connect();
    let last: i64 = writer
        .query_one("SELECT coalesce(max(id), 0) FROM bench_tick", &[])?
        .get(0);
    let count = usize::try_from(seconds * RATE)? + WARM_UP;
    let end = last + i64::try_from(count)?;
    let insert = writer.prepare("INSERT INTO bench_tick VALUES ($1)")?;
    std::thread::scope(|scope| {
        let watchers: Vec<_> = watched
            .iter()
            .map(|server| scope.spawn(move || watch(server, last, end)))
            .collect();
        let mut committed = Vec::with_capacity(count);
        let start = Instant::now();
        for (id, i) in (last + 1..=end).zip(0u32..) {
            let due = start + Duration::from_secs(1) / u32::try_from(RATE)? * i;
            sleep(due.saturating_duration_since(Instant::now()));
            writer.execute(&insert, &[&id])?;
            committed.push(Instant::now());
        }
        let mut latencies = Vec::new();
        for watcher in watchers {
            let shown = watcher.join().ok().context("a watcher panicked")??;
            let both = shown.iter().zip(&committed).skip(WARM_UP);
            latencies.extend(both.map(|(shown, committed)| {
                shown.saturating_duration_since(*committed).as_secs_f64() * 1000.0
            }));
        }
        latencies.sort_by(f64::total_cmp);
        Ok(latencies)
    })
}

/// When each row after `last`, up to `end`, was first seen.
fn watch(server: &Server, mut last: i64, end: i64) -> Result<Vec<Instant>> {
    let mut client = server.connect();
    let question = client.prepare("SELECT coalesce(max(id), 0) FROM bench_tick")?;
    let deadline = Instant::now() + LIMIT;
    let mut shown = Vec::new();
    while last < end {
        let seen: i64 = client.query_one(&question, &[])?.get(0);
        let now = Instant::now();
        while last < seen {
            last += 1;
            shown.push(now);
        }
        ensure!(now < deadline, "{} shows only {last} of {end}", server.name);
        sleep(PAUSE);
    }
    Ok(shown)
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().unwrap_or(f64::NAN)
}
