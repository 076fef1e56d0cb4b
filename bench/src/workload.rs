//! What a workload is, and how much of it is done.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::report::Report;
use crate::world::{Shape, Stage};

/// Something that both sides do, one after the other, several times.
pub trait Workload {
    /// As typed on the command line.
    fn name(&self) -> &'static str;
    /// One line for the reader of the output.
    fn about(&self) -> &'static str;
    /// Whether its servers are too large for this machine's memory.
    fn is_large(&self) -> bool {
        false
    }
    /// Boots what it needs, measures, and adds figures.
    fn run(&self, stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()>;
}

/// Sizes of everything: the full run, or one that ends within four minutes on two cores.
pub struct Plan {
    /// The short form.
    pub quick: bool,
    /// pgbench's scale factor: 100,000 accounts each.
    pub scale: u32,
    /// Rounds of the pgbench backlog over one hop; and more of them in which native
    /// subscriptions flush at each commit.
    pub hop_rounds: [usize; 2],
    /// Rounds of the other scripts.
    pub script_rounds: usize,
    /// Further ones of wide rows, with native subscribers that compress as Terrace does.
    pub lz4_rounds: usize,
    /// Rounds of the tree, likewise.
    pub tree_rounds: [usize; 2],
    /// Transactions of the pgbench backlog, one hop and tree.
    pub backlog: [u64; 2],
    /// Rounds of each latency measurement, and seconds of one at the low and at the high rate.
    pub latency: (usize, [u64; 2]),
    /// Rows of 1 KiB in the large transaction, rounds of it over one hop, further ones with native
    /// subscriptions that stream, and what it passes through where memory is looked at.
    pub large_rows: u64,
    pub large_rounds: [usize; 2],
    pub large_shape: Shape,
    /// Short rows in the transaction of many.
    pub many_rows: u64,
    /// Rounds of each.
    pub memory_rounds: usize,
    /// Rounds and seconds of each pgbench run for the tag's cost.
    pub tag: (usize, u64),
    /// Rounds, and seconds of load at the top for each number of followers.
    pub fanout: (usize, u64),
    /// pgbench's scale factor for the initial copy, 15 MB each, and its rounds.
    pub copy_scale: u32,
    pub copy_rounds: usize,
    /// pgbench's scale factor for the comparison.
    pub compare_scale: u32,
    /// Comparisons, with pgbench's rate measured so often before and after each.
    pub compare_rounds: usize,
    pub compare_quiet: usize,
    /// Rounds of each way to lose a master.
    pub failover_rounds: usize,
    /// Rounds, of two servers each, and seconds that they are away.
    pub rejoin: (usize, u64),
}

impl Plan {
    pub fn new(quick: bool) -> Plan {
        if quick {
            Plan {
                quick,
                scale: 2,
                hop_rounds: [1, 0],
                script_rounds: 1,
                lz4_rounds: 0,
                tree_rounds: [1, 0],
                backlog: [20_000, 10_000],
                latency: (1, [2, 1]),
                large_rows: 100 << 10,
                large_rounds: [1, 0],
                large_shape: Shape {
                    region: 1,
                    branch: 1,
                },
                many_rows: 0,
                memory_rounds: 1,
                tag: (2, 1),
                fanout: (1, 2),
                copy_scale: 10,
                copy_rounds: 1,
                compare_scale: 5,
                compare_rounds: 1,
                compare_quiet: 1,
                failover_rounds: 1,
                rejoin: (1, 5),
            }
        } else {
            Plan {
                quick,
                scale: 10,
                hop_rounds: [5, 2],
                script_rounds: 4,
                lz4_rounds: 4,
                tree_rounds: [5, 2],
                backlog: [300_000, 120_000],
                latency: (3, [20, 8]),
                large_rows: 1 << 20,
                large_rounds: [4, 2],
                large_shape: Shape {
                    region: 3,
                    branch: 3,
                },
                many_rows: 10_000_000,
                memory_rounds: 2,
                tag: (15, 5),
                fanout: (3, 15),
                copy_scale: 390,
                copy_rounds: 4,
                compare_scale: 100,
                compare_rounds: 2,
                compare_quiet: 6,
                failover_rounds: 20,
                rejoin: (10, 60),
            }
        }
    }
}

/// Nothing here may take longer, be it a copy or a drain.
const LIMIT: Duration = Duration::from_secs(600);

/// Polls every `pause` until `condition` holds.
pub fn wait(
    what: &str,
    pause: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !condition()? {
        ensure!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Whether everything is done; what is, is not asked again.
pub fn all<T>(
    waiting: &mut Vec<T>,
    mut is_done: impl FnMut(&mut T) -> Result<bool>,
) -> Result<bool> {
    let mut failed = None;
    waiting.retain_mut(|item| match is_done(item) {
        Ok(done) => !done,
        Err(error) => {
            failed.get_or_insert(error);
            true
        }
    });
    failed.map_or(Ok(waiting.is_empty()), Err)
}

/// `items` beginning with another one each round, so that nobody always goes first.
pub fn rotated<T: Copy>(items: &[T], round: usize) -> Vec<T> {
    let first = round % items.len();
    items[first..]
        .iter()
        .chain(&items[..first])
        .copied()
        .collect()
}
