//! What a workload is, and how much of it is done.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::report::Report;

/// Something that both sides do, one after the other, several times.
pub trait Workload {
    /// As typed on the command line.
    fn name(&self) -> &'static str;
    /// One line for the reader of the output.
    fn about(&self) -> &'static str;
    /// Boots what it needs, measures, and adds figures.
    fn run(&self, plan: &Plan, report: &mut Report) -> Result<()>;
}

/// Sizes of everything: the full run, or one that ends within four minutes on two cores.
pub struct Plan {
    /// The short form.
    pub quick: bool,
    /// pgbench's scale factor: 100,000 accounts each.
    pub scale: u32,
    /// Rounds of each drain of one hop and of the tree.
    pub rounds: [usize; 2],
    /// Transactions of the pgbench backlog, one hop and tree.
    pub backlog: [u64; 2],
    /// Rounds and seconds of each latency measurement.
    pub latency: (usize, u64),
    /// Rows of 1 KiB in the large transaction.
    pub large_rows: u64,
    /// Rounds and seconds of each pgbench run for the tag's cost.
    pub tag: (usize, u64),
}

impl Plan {
    pub fn new(quick: bool) -> Plan {
        if quick {
            Plan {
                quick,
                scale: 2,
                rounds: [3, 2],
                backlog: [20_000, 10_000],
                latency: (2, 3),
                large_rows: 100 << 10,
                tag: (5, 2),
            }
        } else {
            Plan {
                quick,
                scale: 10,
                rounds: [5, 3],
                backlog: [100_000, 40_000],
                latency: (3, 20),
                large_rows: 1 << 20,
                tag: (9, 10),
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

/// `items` beginning with another one each round, so that nobody always goes first.
pub fn rotated<T: Copy>(items: &[T], round: usize) -> Vec<T> {
    let first = round % items.len();
    items[first..]
        .iter()
        .chain(&items[..first])
        .copied()
        .collect()
}
