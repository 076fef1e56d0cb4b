//! Which tables with constraints beside the primary key are folded.
//!
//! A fold that such a constraint refuses is done again in order, all of it. Where unique values go from row to row
//! all the time, doing that in vain must not cost much: the table goes in order for a while, longer each time.
//! Others, also those that were in the same fold, are no less folded for that.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fold::Shape;

/// After a fold was refused, the table that it was refused for goes in order for so long, and up to …
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// … so long where it happens again and again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Tables whose folds have been refused since one went well, by OID.
#[derive(Default)]
pub(super) struct Constrained {
    refused: HashMap<String, Pause>,
}

struct Pause {
    until: Instant,
    length: Duration,
}

impl Constrained {
    /// Those that go in order now.
    pub fn resting(&self) -> HashSet<String> {
        if self.refused.is_empty() {
            return HashSet::new();
        }
        let now = Instant::now();
        let resting = self.refused.iter().filter(|(_, pause)| pause.until > now);
        resting.map(|(oid, _)| oid.clone()).collect()
    }

    /// A statement of a fold for this table was.
    pub fn refused(&mut self, shape: &Shape) {
        if !shape.is_constrained {
            return;
        }
        let before = self.refused.get(&shape.oid);
        let twice = before.map_or(FIRST_PAUSE, |pause| pause.length * 2);
        let length = twice.min(LONGEST_PAUSE);
        let until = Instant::now() + length;
        let pause = Pause { until, length };
        self.refused.insert(shape.oid.clone(), pause);
    }

    /// Folds for these did.
    pub fn went_well(&mut self, shapes: &[Arc<Shape>]) {
        if self.refused.is_empty() {
            return;
        }
        for shape in shapes {
            self.refused.remove(&shape.oid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(oid: &str, is_constrained: bool) -> Arc<Shape> {
        Arc::new(Shape {
            table: oid.into(),
            oid: oid.into(),
            columns: Vec::new(),
            keys: Vec::new(),
            local_since: None,
            is_constrained,
            whole: true,
        })
    }

    #[test]
    fn a_table_whose_fold_is_refused_rests_and_no_other() {
        let mut constrained = Constrained::default();
        constrained.refused(&shape("1", true));
        constrained.refused(&shape("2", false));
        assert_eq!(constrained.resting(), HashSet::from(["1".to_owned()]));
        constrained.went_well(&[shape("3", true)]);
        assert_eq!(constrained.resting().len(), 1);
        constrained.went_well(&[shape("1", true)]);
        assert!(constrained.resting().is_empty());
    }

    #[test]
    fn it_rests_longer_each_time() {
        let mut constrained = Constrained::default();
        let lengths: Vec<u64> = (0..8)
            .map(|_| {
                constrained.refused(&shape("1", true));
                constrained.refused["1"].length.as_secs()
            })
            .collect();
        assert_eq!(lengths, [1, 2, 4, 8, 16, 32, 60, 60]);
    }
}
