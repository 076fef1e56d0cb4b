//! Memory while one transaction of many bytes passes through the tree, and one of many rows
//! through a server of each level.
//!
//! The figure is that of the level's largest process. For a bridge the highest resident size since its start counts, program text
//! included. A native apply worker's holds the shared buffers that it touched,
//! so for it the private part alone is sampled, which favours it.

use anyhow::{Result, ensure};

use crate::proc;
use crate::report::{Better, Figure, Report};
use crate::side::{Side, Which, drain, mark, must_be_equal};
use crate::workload::{Plan, Workload};
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
        "one large transaction through the tree, one of many rows through top -> 1 -> 1"
    }

    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
        let (large, many) = (plan.large_rows, plan.many_rows);
        // Rows of 1 KiB stay in line, so all of it is in the WAL.
        let rows = format!("g, repeat(md5(g::text), 32) FROM generate_series(1, {large}) g");
        let shape = plan.large_shape;
        let world = stage.world(shape, plan)?;
        measure(world, shape, report, &format!("{} MiB", large >> 10), &rows)?;
        if many > 0 {
            let rows = format!("{large} + g, 'x' FROM generate_series(1, {many}) g");
            let what = format!("{} million rows", many / 1_000_000);
            measure(stage.world(CHAIN, plan)?, CHAIN, report, &what, &rows)?;
        }
        Ok(())
    }
}

/// One transaction with these rows.
fn measure(
    world: &mut World,
    shape: Shape,
    report: &mut Report,
    what: &str,
    rows: &str,
) -> Result<()> {
    world
        .top()
        .sql(&format!("INSERT INTO bench_large SELECT {rows}"));
    let marker = mark(world.top())?;
    world.tidy()?;
    let top = world.top_pid()?;

    let drained = drain(&mut world.terrace, top, marker, |_| ());
    let terrace_time = world.explain(drained)?.elapsed.as_secs_f64();
    let nodes = world.terrace.tree.nodes.iter();
    let bridges: Vec<f64> = nodes
        .filter_map(|node| proc::memory_mib(proc::bridge(&node.bridge)?, "VmHWM"))
        .collect();
    let servers = shape.region + shape.branch;
    ensure!(bridges.len() == servers, "a bridge has ended");
    world.terrace.pause()?;

    let mut workers = vec![0.0; servers];
    let mut pids = Vec::new();
    let drained = drain(&mut world.native, top, marker, |native| {
        if pids.len() < servers {
            pids = apply_workers(native);
        }
        for (pid, highest) in pids.iter().zip(&mut workers) {
            let now = proc::memory_mib(*pid, "RssAnon").unwrap_or(0.0);
            *highest = now.max(*highest);
        }
    })?;
    let native_time = drained.elapsed.as_secs_f64();
    world.native.pause()?;
    for which in [Which::Terrace, Which::Native] {
        let (top, side): (_, &dyn Side) = match which {
            Which::Terrace => (world.top(), &world.terrace),
            Which::Native => (world.top(), &world.native),
        };
        must_be_equal(side, top, &["bench_large"])?;
    }
    println!(
        "    {what}: bridges {bridges:.0?} MiB in {terrace_time:.1} s, \
             apply workers {workers:.0?} MiB in {native_time:.1} s"
    );
    let mut add = |workload: String, figure, unit, terrace, native| {
        report.add(Figure {
            workload,
            what: figure,
            unit,
            better: Better::Lower,
            against: "native",
            terrace: vec![terrace],
            baseline: vec![native],
            paired: false,
        });
    };
    let highest = |level: &[f64]| level.iter().copied().fold(0.0, f64::max);
    for (domain, level) in [
        ("region", 0..shape.region),
        ("branch", shape.region..servers),
    ] {
        let workload = format!("memory: {domain}, {what}");
        let (bridge, worker) = (highest(&bridges[level.clone()]), highest(&workers[level]));
        add(workload, "peak", "MiB", bridge, worker);
    }
    let workload = format!("memory: all {servers} servers, {what}");
    add(workload, "elapsed", "s", terrace_time, native_time);
    Ok(())
}

/// Process ids of the apply workers, as far as they have started.
fn apply_workers(native: &dyn Side) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_subscription WHERE relid IS NULL";
    let servers = native.servers().into_iter();
    servers
        .filter_map(|server| server.value(sql).parse().ok())
        .collect()
}
