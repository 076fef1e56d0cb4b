//! From commit at the top to visible on a slave of each level, at a low and at a high rate.
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
use crate::side::{Side, Which, drain, mark};
use crate::terrace::Terrace;
use crate::workload::{Plan, Workload, rotated, wait};
use crate::world::{Shape, Stage, World};

pub struct Latency;

/// Rows per second.
const RATES: [u64; 2] = [50, 500];
/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_micros(500);
/// Servers of each level, one of whose slaves is watched.
const WIDTH: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);

/// A side and how it is set.
#[derive(Clone, Copy)]
enum Mode {
    Terrace,
    TerraceAtOnce,
    NativeOff,
    NativeOn,
    Pglogical,
}

const MODES: [Mode; 5] = [
    Mode::Terrace,
    Mode::NativeOff,
    Mode::TerraceAtOnce,
    Mode::NativeOn,
    Mode::Pglogical,
];

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Terrace => "terrace",
            Mode::TerraceAtOnce => "terrace, wait_for_upstream=false",
            Mode::NativeOff => "native, synchronous_commit=off",
            Mode::NativeOn => "native, synchronous_commit=on",
            Mode::Pglogical => "pglogical",
        }
    }

    fn which(self) -> Which {
        match self {
            Mode::Terrace | Mode::TerraceAtOnce => Which::Terrace,
            Mode::NativeOff | Mode::NativeOn => Which::Native,
            Mode::Pglogical => Which::Pglogical,
        }
    }
}

impl Workload for Latency {
    fn name(&self) -> &'static str {
        "latency"
    }

    fn about(&self) -> &'static str {
        "commit to visible on a slave of each level, top -> 3 -> 3"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let shape = Shape {
            region: WIDTH,
            branch: WIDTH,
        };
        let world = stage.world(shape, plan)?;
        let sides = world.sides();
        let there: Vec<usize> = (0..MODES.len())
            .filter(|i| sides.contains(&MODES[*i].which()))
            .collect();
        let (rounds, seconds) = plan.latency;
        for (rate, seconds) in RATES.into_iter().zip(seconds) {
            let load = Load { rate, seconds };
            let mut all: [Samples; MODES.len()] = Default::default();
            for round in 0..rounds {
                for i in rotated(&there, round) {
                    let result = turn(world, MODES[i], load);
                    let levels = world.explain(result)?;
                    tell(MODES[i], load, &levels);
                    all[i].add(&levels);
                }
            }
            figures(report, rate, &all);
        }
        Ok(())
    }
}

/// What is written at the top.
#[derive(Clone, Copy)]
struct Load {
    /// Rows per second, each a transaction.
    rate: u64,
    seconds: u64,
}

impl Load {
    /// Rows at the start of a turn that are not counted: in the first two seconds everybody has just been
    /// started.
    fn warm_up(self) -> usize {
        self.rate as usize * 2
    }
}

/// Latencies of one turn in ms, sorted, of each level.
type Levels = [Vec<f64>; 2];

/// What is told of a level.
const PERCENTILES: [usize; 2] = [50, 99];

/// Percentiles of one way, round by round: of each level, those of [`PERCENTILES`].
#[derive(Default)]
struct Samples([[Vec<f64>; 2]; 2]);

impl Samples {
    fn add(&mut self, levels: &Levels) {
        for (own, sorted) in self.0.iter_mut().zip(levels) {
            for (values, percent) in own.iter_mut().zip(PERCENTILES) {
                values.push(percentile(sorted, percent));
            }
        }
    }
}

fn tell(mode: Mode, load: Load, levels: &Levels) {
    let mut line = format!("    {}/s, {}:", load.rate, mode.name());
    for (level, sorted) in (1..).zip(levels) {
        line += &format!(
            "  level {level}: p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
            percentile(sorted, 50),
            percentile(sorted, 99),
            percentile(sorted, 100)
        );
    }
    println!("{line}");
}

fn figures(report: &mut Report, rate: u64, all: &[Samples; MODES.len()]) {
    let [ordered, off, at_once, on, pglogical] = all;
    for (way, terrace) in [("in order", ordered), ("at once", at_once)] {
        for (against, native) in [
            ("native, sync commit off", off),
            ("native, sync commit on", on),
            ("pglogical", pglogical),
        ] {
            if native.0[0][0].is_empty() {
                continue;
            }
            for (what, level, percent) in [
                ("level 1, p50", 0, 0),
                ("level 1, p99", 0, 1),
                ("level 2, p50", 1, 0),
                ("level 2, p99", 1, 1),
            ] {
                report.add(Figure {
                    workload: format!("latency: {way}, {rate}/s"),
                    what,
                    unit: "ms",
                    better: Better::Lower,
                    against,
                    terrace: terrace.0[level][percent].clone(),
                    baseline: native.0[level][percent].clone(),
                    paired: false,
                });
            }
        }
    }
}

/// One measurement with only one side running.
fn turn(world: &mut World, mode: Mode, load: Load) -> Result<Levels> {
    let files = match mode {
        Mode::TerraceAtOnce => {
            let lines = "[apply]\nwait_for_upstream = false";
            Some(world.terrace.configure(lines)?)
        }
        Mode::Terrace | Mode::Pglogical => None,
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
    let result = match mode.which() {
        Which::Terrace => measure_slaves(&world.terrace, load),
        Which::Native => measure_last(&world.native, world.top(), load),
        Which::Pglogical => {
            let pglogical = world.pglogical.as_ref().context("no pglogical")?;
            measure_last(pglogical, world.top(), load)
        }
    };
    world.side(mode.which()).pause()?;
    if let Some(files) = files {
        world.terrace.restore(&files)?;
    }
    result
}

/// All of a level are alike.
fn measure_last(side: &dyn Side, top: &Server, load: Load) -> Result<Levels> {
    let servers = side.servers();
    measure(top, [servers[WIDTH - 1], servers[2 * WIDTH - 1]], load)
}

/// Who leads is found out anew whenever the bridges start; the slaves must be slaves to the end.
fn measure_slaves(terrace: &Terrace, load: Load) -> Result<Levels> {
    let top = &terrace.tree.top;
    // What was told before the bridges were stopped is shown until they tell anew.
    let now = top.value("SELECT clock_timestamp()");
    let slaves = [slave(terrace, 1, &now)?, slave(terrace, 2, &now)?];
    let levels = measure(top, slaves, load)?;
    for Server { name, .. } in slaves {
        let sql = format!("SELECT role FROM terrace.lag WHERE node = '{name}'");
        ensure!(top.value(&sql) == "slave", "{name} is no slave any more");
    }
    Ok(levels)
}

/// A slave of this level, when all of that have said since that they stream.
fn slave<'a>(terrace: &'a Terrace, level: usize, since: &str) -> Result<&'a Server> {
    let sql = format!(
        "SELECT min(node) FILTER (WHERE role = 'slave') FROM terrace.lag WHERE level = {level} \
         HAVING bool_and(state = 'streaming' AND reply_time > '{since}')"
    );
    let mut name = String::new();
    wait("there is a slave", Duration::from_millis(50), || {
        name = terrace.tree.top.rows(&sql).concat().concat();
        Ok(!name.is_empty())
    })?;
    let mut servers = terrace.servers().into_iter();
    let found = servers.find(|server| server.name == name);
    found.with_context(|| format!("unknown server {name}"))
}

/// Writes at the top, watches the servers, and compares the times.
fn measure(top: &Server, watched: [&Server; 2], load: Load) -> Result<Levels> {
    let mut writer = top.connect();
    let last: i64 = writer
        .query_one("SELECT coalesce(max(id), 0) FROM bench_tick", &[])?
        .get(0);
    let count = usize::try_from(load.seconds * load.rate)? + load.warm_up();
    let end = last + i64::try_from(count)?;
    let insert = writer.prepare("INSERT INTO bench_tick VALUES ($1)")?;
    std::thread::scope(|scope| {
        let watchers = watched.map(|server| scope.spawn(move || watch(server, last, end)));
        let mut committed = Vec::with_capacity(count);
        let start = Instant::now();
        for (id, i) in (last + 1..=end).zip(0u32..) {
            let due = start + Duration::from_secs(1) / u32::try_from(load.rate)? * i;
            sleep(due.saturating_duration_since(Instant::now()));
            writer.execute(&insert, &[&id])?;
            committed.push(Instant::now());
        }
        let mut levels = Levels::default();
        for (sorted, watcher) in levels.iter_mut().zip(watchers) {
            let shown = watcher.join().ok().context("a watcher panicked")??;
            let both = shown.iter().zip(&committed).skip(load.warm_up());
            sorted.extend(both.map(|(shown, committed)| {
                shown.saturating_duration_since(*committed).as_secs_f64() * 1000.0
            }));
            sorted.sort_by(f64::total_cmp);
        }
        Ok(levels)
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
