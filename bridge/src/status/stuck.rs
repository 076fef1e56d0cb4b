//! The transaction that does not go on, and whether it is to be left out.

use std::time::{Duration, Instant};

use super::Shared;
use crate::lsn::Lsn;

/// So long those below wait for a transaction that cannot be applied.
const STUCK_AFTER: Duration = Duration::from_secs(2);

/// A transaction that does not go on.
#[derive(Clone, Copy)]
pub(super) struct Stuck {
    pub(super) end: Lsn,
    /// It is to be left out.
    ordered: bool,
    /// Since when the database refuses it; otherwise it waits for an answer from above.
    refused: Option<Instant>,
}

impl Stuck {
    fn at(end: Lsn) -> Stuck {
        Stuck {
            end,
            ordered: false,
            refused: None,
        }
    }
}

impl Shared {
    /// Notes which transaction does not go on for now.
    pub fn set_stuck(&self, end: Option<Lsn>) {
        let mut inner = self.inner();
        // An order for it stands.
        if inner.stuck.map(|stuck| stuck.end) != end {
            inner.stuck = end.map(Stuck::at);
        }
    }

    /// Notes that the database refuses it.
    pub fn set_refused(&self, end: Lsn) {
        self.set_stuck(Some(end));
        if let Some(stuck) = &mut self.inner().stuck {
            stuck.refused.get_or_insert_with(Instant::now);
        }
    }

    fn refused_since(&self) -> Option<Instant> {
        let stuck = self.inner().stuck?;
        stuck
            .refused
            .filter(|_| stuck.end > *self.replayed.borrow())
    }

    /// Whether the database refuses a transaction.
    pub fn is_refused(&self) -> bool {
        self.refused_since().is_some()
    }

    /// Whether a transaction has been refused for so long that nobody below is to wait for it.
    pub fn is_stuck(&self) -> bool {
        let refused = self.refused_since();
        refused.is_some_and(|since| since.elapsed() > STUCK_AFTER)
    }

    /// Orders that the transaction that cannot be applied is left out, if it ends here.
    pub fn order_skip(&self, lsn: Lsn) -> Result<(), String> {
        match &mut self.inner().stuck {
            Some(stuck) if stuck.end == lsn => {
                stuck.ordered = true;
                Ok(())
            }
            Some(stuck) => Err(format!(
                "the transaction that cannot be applied here ends at {}, not at {lsn}",
                stuck.end
            )),
            None => Err("nothing stands in the way here: no transaction is to be left out".into()),
        }
    }

    /// End of the transaction that is to be left out.
    pub fn skip(&self) -> Option<Lsn> {
        let stuck = self.inner().stuck?;
        stuck.ordered.then_some(stuck.end)
    }
}
