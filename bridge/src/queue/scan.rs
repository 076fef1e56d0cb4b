//! Reading a segment: whole blocks, each record checked once for all who read there.
//!
//! Guarantee: a record that is given out is what the file holds from its offset on. What
//! has been published never changes, so what was read and checked stays right;
//! [`Segment::truncate`] forgets what lay behind.
//!
//! Readers near each other, such as all that follow the end, share one [`Run`]: it lives
//! as long as one of them stands on it, and costs nothing afterwards.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;

use super::segment::Segment;
use super::{QueueError, lock};
use crate::lsn::Lsn;
use crate::record::{HEADER_LEN, Record, RecordError, body_len};

/// Read at once when scanning.
pub(super) const BLOCK: usize = 256 << 10;
/// So many runs are looked through for one that is there.
const SHARED: usize = 32;

/// Some records that follow each other in a segment.
pub(super) struct Run {
    start: u64,
    /// As they are in the file.
    bytes: Bytes,
    records: Vec<Record>,
    /// Offset of each record.
    offsets: Vec<u64>,
    /// The highest position in them.
    lsn: Lsn,
}

impl Run {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Reads what there is from `offset` to `limit`: a block, or one record that is larger.
    fn read(segment: &Segment, offset: u64, limit: u64) -> Result<Run, QueueError> {
        let damaged = |error| segment.damaged(offset, error);
        let mut block = segment.read(offset, BLOCK, limit)?;
        let needed = HEADER_LEN + body_len(&block).map_err(damaged)?;
        if needed > block.len() {
            if offset + needed as u64 > limit {
                return Err(damaged(RecordError::Short));
            }
            block = segment.read(offset, needed, limit)?;
        }
        let (mut records, mut offsets) = (Vec::new(), Vec::new());
        let (mut rest, mut lsn) = (block.clone(), Lsn::ZERO);
        loop {
            let at = offset + (block.len() - rest.len()) as u64;
            match Record::take(&mut rest) {
                Ok(record) => {
                    lsn = lsn.max(record.lsn);
                    records.push(record);
                    offsets.push(at);
                }
                Err(error) if records.is_empty() => return Err(damaged(error)),
                // Cut by the block's end, or damaged: the next run starts with it and tells.
                Err(_) => {
                    block.truncate((at - offset) as usize);
                    break;
                }
            }
        }
        Ok(Run {
            start: offset,
            bytes: block,
            records,
            offsets,
            lsn,
        })
    }
}

/// The runs that somebody stands on.
#[derive(Default)]
pub(super) struct Shared(Mutex<VecDeque<Weak<Run>>>);

impl Shared {
    /// The run that holds the record at `offset`, and which one of it that is.
    fn find(&self, offset: u64) -> Option<(Arc<Run>, usize)> {
        let runs = lock(&self.0);
        runs.iter().rev().filter_map(Weak::upgrade).find_map(|run| {
            let index = run.offsets.binary_search(&offset).ok()?;
            Some((run, index))
        })
    }

    fn add(&self, run: &Arc<Run>) {
        let mut runs = lock(&self.0);
        runs.retain(|run| run.strong_count() > 0);
        if runs.len() == SHARED {
            runs.pop_front();
        }
        runs.push_back(Arc::downgrade(run));
    }

    /// What lies there may become something else.
    pub fn forget(&self) {
        lock(&self.0).clear();
    }
}

/// Walks the records of a segment.
pub(super) struct Scan {
    /// Offset of the next record.
    pub offset: u64,
    /// Where it is, if it has been read, and which one of the run it is.
    run: Option<Arc<Run>>,
    index: usize,
}

impl Scan {
    pub fn at(offset: u64) -> Scan {
        Scan {
            offset,
            run: None,
            index: 0,
        }
    }

    /// The run with the record at `offset`; `None` at `limit`.
    fn run(&mut self, segment: &Segment, limit: u64) -> Result<Option<Arc<Run>>, QueueError> {
        if self.offset >= limit {
            return Ok(None);
        }
        if let Some(run) = &self.run
            && self.offset < run.end()
        {
            return Ok(Some(Arc::clone(run)));
        }
        let (run, index) = match segment.shared().find(self.offset) {
            Some(found) => found,
            None => {
                let run = Arc::new(Run::read(segment, self.offset, limit)?);
                segment.shared().add(&run);
                (run, 0)
            }
        };
        self.index = index;
        Ok(Some(Arc::clone(self.run.insert(run))))
    }

    /// The record at `offset`, or `None` at `limit`.
    pub fn next(&mut self, segment: &Segment, limit: u64) -> Result<Option<Record>, QueueError> {
        let Some(run) = self.run(segment, limit)? else {
            return Ok(None);
        };
        let record = run.records[self.index].clone();
        self.offset += record.bytes.len() as u64;
        self.index += 1;
        Ok(Some(record))
    }

    /// Several records as they are in the file, marks included, with the highest position up
    /// to there; `None` at `limit`.
    pub fn next_bytes(
        &mut self,
        segment: &Segment,
        limit: u64,
    ) -> Result<Option<(Bytes, Lsn)>, QueueError> {
        let Some(run) = self.run(segment, limit)? else {
            return Ok(None);
        };
        let bytes = run.bytes.slice((self.offset - run.start) as usize..);
        self.offset = run.end();
        Ok(Some((bytes, run.lsn)))
    }
}
