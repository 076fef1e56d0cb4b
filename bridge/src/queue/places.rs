//! Where readers have begun.
//!
//! Guarantee: a reader that begins at a place that was kept gets what it would get from the segment's head on. What
//! comes before a place ends at or below its `from`, and so is passed over by whoever wants more than that; and what
//! has been published never changes.
//!
//! A transaction may be as large as the disk, and only its end tells whether it is to be passed over. Those who
//! stand before it would each go through all of it, after a broken link all at the same time, and begin again
//! before any of them is through. One looks ([`Segment::alone`]); the others find it known.

use std::sync::{Mutex, Weak};

use super::lock;
use super::segment::{Schema, Segment};
use crate::lsn::Lsn;

/// So many are kept: who follows is mostly near the others, and definitions may be many.
const KEPT: usize = 4;

/// Where who wants what is above `from` begins.
#[derive(Clone)]
pub(super) struct Place {
    /// Of what segment.
    pub segment: Weak<Segment>,
    pub from: Lsn,
    pub offset: u64,
    /// Definitions that come before it.
    pub schema: Schema,
    /// End of the transaction there; `None` if there is none yet.
    pub end: Option<Lsn>,
}

impl Place {
    /// Whether it is also that of who wants what is above `from`, which is no less than its own.
    pub fn is_of(&self, from: Lsn) -> bool {
        self.end.is_some_and(|end| from < end)
    }
}

/// The latest last.
#[derive(Default)]
pub(super) struct Places(Mutex<Vec<Place>>);

impl Places {
    /// The last of a segment that is not behind what is wanted.
    pub fn before(&self, segment: &Weak<Segment>, from: Lsn) -> Option<Place> {
        let kept = lock(&self.0);
        let before = kept.iter().filter(|place| place.from <= from);
        let of_segment = before.filter(|place| place.segment.ptr_eq(segment));
        of_segment.max_by_key(|place| place.from).cloned()
    }

    pub fn keep(&self, place: Place) {
        let mut kept = lock(&self.0);
        let is_same =
            |known: &Place| known.segment.ptr_eq(&place.segment) && known.offset == place.offset;
        kept.retain(|known| known.segment.strong_count() > 0 && !is_same(known));
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(place);
    }
}
