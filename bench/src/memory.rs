//! Memory while one transaction of many bytes passes through the tree, and one of many rows
//! through a server of each level.
//!
//! The figure is that of the level's largest process. For a bridge the highest resident size since its start counts, program text
//! included. An apply worker's holds the shared buffers that it touched,
//! so for it the private part alone is sampled, which favours native subscriptions and pglogical. The
//! server process through which a bridge applies is in no figure.

use anyhow::{Result, ensure};

use crate::pgbench::large_rows;
use crate::proc;
use crate::report::{Better, Figure, Report};
use crate::side::{Side, Which, drain, mark, must_be_equal};
use crate::workload::{Plan, Workload, rotated};
use crate::world::{Shape, Stage, World};

pub struct Memory;

/// One server of each level.
const CHAIN: Shape = Shape {
    region: 1,
    branch: 1,
};

impl Workload for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn about(&self) -> &'static str {
        "one large transaction through the tree; one of many rows, and one that changes them, through top -> 1 -> 1"
    }

    fn is_large(&self) -> bool {
        true
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let (large, many) = (plan.large_rows, plan.many_rows);
        let insert = |rows: String| format!("INSERT INTO bench_large SELECT {rows}");
        let shape = plan.large_shape;
        // What is only paused, of a workload before, would have the top keep it all.
        stage.clear();
        let world = stage.world(shape, plan)?;
        let bytes = Large::new(format!("{} MiB", large >> 10), insert(large_rows(large)));
        measure(world, shape, plan, report, &mut [bytes])?;
        if many > 0 {
            let what = format!("{} million rows", many / 1_000_000);
            let rows = format!("{large} + g, 'x' FROM generate_series(1, {many}) g");
            let change = "BEGIN; UPDATE bench_large SET body = 'y'; DELETE FROM bench_large WHERE id % 2 = 0; COMMIT";
            let changed = Large::new(
                format!("{what} updated, half of them deleted"),
                change.into(),
            );
            let rows = Large::new(what, insert(rows));
            let world = stage.world(CHAIN, plan)?;
            measure(world, CHAIN, plan, report, &mut [rows, changed])?;
        }
        Ok(())
    }
}

/// A transaction, and how it went.
struct Large {
    what: String,
    sql: String,
    terrace: Vec<Passage>,
    native: Vec<Passage>,
    pglogical: Vec<Passage>,
}

impl Large {
    fn new(what: String, sql: String) -> Large {
        let (terrace, native, pglogical) = (Vec::new(), Vec::new(), Vec::new());
        Large {
            what,
            sql,
            terrace,
            native,
            pglogical,
        }
    }

    /// Once, by each side in its turn.
    fn pass(&mut self, world: &mut World, servers: usize, round: usize) -> Result<()> {
        world.top().sql(&self.sql);
        let marker = mark(world.top())?;
        world.tidy()?;
        let top = world.top_pid()?;
        for which in rotated(&world.sides(), round) {
            let (name, passed) = match which {
                Which::Terrace => ("bridges", &mut self.terrace),
                Which::Native => ("apply workers", &mut self.native),
                Which::Pglogical => ("pglogical", &mut self.pglogical),
            };
            let passage = match which {
                Which::Terrace => {
                    let passage = bridges(world, top, marker, servers);
                    world.explain(passage)?
                }
                Which::Native | Which::Pglogical => {
                    apply_workers(world.side(which), which, top, marker, servers)?
                }
            };
            let (what, Passage { elapsed, peaks }) = (&self.what, &passage);
            println!("    {what}: {name} {peaks:.0?} MiB in {elapsed:.1} s");
            passed.push(passage);
        }
        let beside = world.pglogical.iter().flat_map(Side::servers);
        let below = world.native.servers().into_iter().chain(beside);
        let below: Vec<_> = below.chain(world.terrace.servers()).collect();
        must_be_equal(&below, world.top(), &["bench_large"])
    }
}

/// These transactions, one after the other in each round.
fn measure(
    world: &mut World,
    shape: Shape,
    plan: &Plan,
    report: &mut Report,
    all: &mut [Large],
) -> Result<()> {
    let servers = shape.region + shape.branch;
    for round in 0..plan.memory_rounds {
        for large in &mut *all {
            large.pass(world, servers, round)?;
        }
        world.top().sql("TRUNCATE bench_large");
    }
    for large in all {
        figures(large, shape, report);
    }
    Ok(())
}

fn figures(large: &Large, shape: Shape, report: &mut Report) {
    let Large {
        what,
        terrace,
        native,
        pglogical,
        ..
    } = large;
    let servers = shape.region + shape.branch;
    let mut add = |workload: String, figure, unit, of: &dyn Fn(&Passage) -> f64| {
        for (against, others) in [("native", native), ("pglogical", pglogical)] {
            if others.is_empty() {
                continue;
            }
            report.add(Figure {
                workload: workload.clone(),
                what: figure,
                unit,
                better: Better::Lower,
                against,
                terrace: terrace.iter().map(of).collect(),
                baseline: others.iter().map(of).collect(),
                paired: false,
            });
        }
    };
    for (domain, level) in [
        ("region", 0..shape.region),
        ("branch", shape.region..servers),
    ] {
        let highest = |passage: &Passage| {
            passage.peaks[level.clone()]
                .iter()
                .copied()
                .fold(0.0, f64::max)
        };
        let workload = format!("memory: {domain}, {what}");
        add(workload, "peak", "MiB", &highest);
    }
    let workload = format!("memory: all {servers} servers, {what}");
    add(workload, "elapsed", "s", &|passage| passage.elapsed);
}

/// What a transaction took on its way, and the memory of each process that it went through.
struct Passage {
    elapsed: f64,
    peaks: Vec<f64>,
}

fn bridges(world: &mut World, top: i32, marker: i64, servers: usize) -> Result<Passage> {
    let drained = drain(&mut world.terrace, top, marker, |_| ())?;
    let nodes = world.terrace.tree.nodes.iter();
    let peaks: Vec<f64> = nodes
        .filter_map(|node| proc::memory_mib(proc::bridge(&node.bridge)?, "VmHWM"))
        .collect();
    ensure!(peaks.len() == servers, "a bridge has ended");
    world.terrace.pause()?;
    Ok(Passage {
        elapsed: drained.elapsed.as_secs_f64(),
        peaks,
    })
}

fn apply_workers(
    side: &mut dyn Side,
    which: Which,
    top: i32,
    marker: i64,
    servers: usize,
) -> Result<Passage> {
    let (mut peaks, mut pids) = (vec![0.0; servers], Vec::new());
    let drained = drain(side, top, marker, |side| {
        if pids.len() < servers {
            pids = apply_worker_ids(side, which);
        }
        for (pid, highest) in pids.iter().zip(&mut peaks) {
            let now = proc::memory_mib(*pid, "RssAnon").unwrap_or(0.0);
            *highest = now.max(*highest);
        }
    })?;
    side.pause()?;
    Ok(Passage {
        elapsed: drained.elapsed.as_secs_f64(),
        peaks,
    })
}

/// Process ids of the apply workers, as far as they have started.
fn apply_worker_ids(side: &dyn Side, which: Which) -> Vec<i32> {
    let sql = match which {
        Which::Pglogical => {
            "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'pglogical apply%'"
        }
        _ => "SELECT pid FROM pg_stat_subscription WHERE relid IS NULL",
    };
    let servers = side.servers().into_iter();
    servers
        .filter_map(|server| server.value(sql).parse().ok())
        .collect()
}
