//! How fast transactions are applied, and when the rest will be.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::lsn::Lsn;

/// Whoever needs more seconds than this does not catch up.
const NEVER: f64 = 1e9;

/// Rates over the last seconds.
#[derive(Default)]
pub struct RateMeter {
    samples: VecDeque<(Instant, u64, Lsn, Lsn)>,
}

impl RateMeter {
    const WINDOW: Duration = Duration::from_secs(5);

    /// Notes where things stand now.
    pub fn sample(&mut self, transactions: u64, replayed: Lsn, received: Lsn) {
        let now = Instant::now();
        if self
            .samples
            .back()
            .is_some_and(|s| now - s.0 < Duration::from_millis(200))
        {
            return;
        }
        self.samples
            .push_back((now, transactions, replayed, received));
        while self
            .samples
            .front()
            .is_some_and(|s| now - s.0 > Self::WINDOW)
        {
            self.samples.pop_front();
        }
    }

    /// Transactions a second, and seconds until caught up (`None` when it does not).
    pub fn rates(&self) -> (f64, Option<f64>) {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return (0.0, None);
        };
        let seconds = (last.0 - first.0).as_secs_f64();
        if seconds < 0.1 {
            return (0.0, None);
        }
        let gap = |s: &(Instant, u64, Lsn, Lsn)| s.3.0.saturating_sub(s.2.0) as f64;
        let closing = (gap(first) - gap(last)) / seconds;
        let catchup = match gap(last) {
            0.0 => Some(0.0),
            open if closing > 0.0 => Some(open / closing).filter(|seconds| *seconds < NEVER),
            _ => None,
        };
        ((last.1 - first.1) as f64 / seconds, catchup)
    }
}
