//! Readers of a queue, each at its own pace.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::places::Place;
use super::scan::Scan;
use super::segment::{Schema, Segment, note_schema};
use super::{Queue, QueueError};
use crate::lsn::Lsn;
use crate::record::{Kind, Record};

/// Delivers records in order; see [`Queue::reader`].
pub struct Reader {
    queue: Queue,
    written: watch::Receiver<Lsn>,
    segment: Arc<Segment>,
    scan: Scan,
    /// Definitions due before the next record.
    schema: VecDeque<Record>,
    /// What ends at or below this is passed over.
    from: Lsn,
    /// Nothing above `from` has been come to yet. The queue may end below it: a
    /// downstream can be ahead of a server that it has gone to.
    seeking: bool,
    last_timeline: u32,
}

impl Reader {
    pub(super) fn open(queue: Queue, from: Lsn) -> Result<Reader, QueueError> {
        let segment = queue.segment_for(from)?;
        let mut reader = Reader {
            written: queue.written(),
            scan: Scan::at(segment.head_len),
            segment,
            queue,
            schema: VecDeque::new(),
            from,
            seeking: true,
            last_timeline: u32::MAX,
        };
        reader.find_place()?;
        Ok(reader)
    }

    /// Goes to the first that is wanted, from the last place before it that is known.
    fn find_place(&mut self) -> Result<(), QueueError> {
        let (segment, inner) = (Arc::clone(&self.segment), Arc::clone(&self.queue.inner));
        let _alone = segment.alone();
        let (segment, places) = (Arc::downgrade(&segment), &inner.places);
        let mut schema = Schema::new();
        if let Some(known) = places.before(&segment, self.from) {
            self.scan = Scan::at(known.offset);
            self.seeking = !known.is_of(self.from);
            schema = known.schema;
        }
        if self.seeking {
            let end = self.seek(&mut schema)?;
            places.keep(Place {
                segment,
                from: self.from,
                offset: self.scan.offset,
                schema: schema.clone(),
                end,
            });
        }
        self.schema = schema.into_values().collect();
        Ok(())
    }

    /// Passes over what ends at or below `from`, collecting the definitions. Only the
    /// end of a transaction tells whether the parts before it are to be passed over. Gives the
    /// end of the first that is not, if it is there.
    fn seek(&mut self, schema: &mut Schema) -> Result<Option<Lsn>, QueueError> {
        let limit = self.segment.visible();
        let mut transaction_start = None;
        loop {
            let at = self.scan.offset;
            let Some(record) = self.scan.next(&self.segment, limit)? else {
                return Ok(None);
            };
            match record.kind {
                // Definitions inside a transaction are delivered with it.
                Kind::Schema if transaction_start.is_none() => {
                    note_schema(schema, &record)?;
                }
                Kind::Schema | Kind::Mark => {}
                Kind::Part => {
                    transaction_start.get_or_insert(at);
                }
                Kind::Commit | Kind::Watermark if record.lsn <= self.from => {
                    if let Some(start) = transaction_start.take() {
                        self.collect(start, self.scan.offset, schema)?;
                    }
                }
                Kind::Commit | Kind::Watermark => {
                    self.scan = Scan::at(transaction_start.unwrap_or(at));
                    self.seeking = false;
                    return Ok(Some(record.lsn));
                }
            }
        }
    }

    fn collect(&self, start: u64, end: u64, schema: &mut Schema) -> Result<(), QueueError> {
        let mut scan = Scan::at(start);
        while let Some(record) = scan.next(&self.segment, end)? {
            if record.kind == Kind::Schema {
                note_schema(schema, &record)?;
            }
        }
        Ok(())
    }

    /// The next record, or `None` when nothing more is written yet.
    pub fn try_next(&mut self) -> Result<Option<Record>, QueueError> {
        loop {
            if let Some(record) = self.schema.pop_front() {
                return Ok(Some(record));
            }
            match self.advance(Scan::next)? {
                Some(record) if record.kind == Kind::Mark => {}
                Some(record) => {
                    self.from = self.from.max(record.lsn);
                    return Ok(Some(record));
                }
                None if self.schema.is_empty() => return Ok(None),
                None => {}
            }
        }
    }

    /// Several of the next records as they are on disk, among them marks, and the highest
    /// position up to there. Nothing of it is made anew, or even looked at once more.
    pub fn try_next_bytes(&mut self) -> Result<Option<(Bytes, Lsn)>, QueueError> {
        let next = self.advance(Scan::next_bytes)?;
        if !self.schema.is_empty() {
            let records = self.schema.drain(..).map(|record| record.bytes);
            let mut bytes = BytesMut::new();
            records.for_each(|record| bytes.extend_from_slice(&record));
            return Ok(Some((bytes.freeze(), Lsn::ZERO)));
        }
        if let Some((_, lsn)) = &next {
            self.from = self.from.max(*lsn);
        }
        Ok(next)
    }

    /// What `read` finds at our place; `None` at the queue's end, and when there are
    /// definitions to be delivered first.
    fn advance<T>(
        &mut self,
        read: impl Fn(&mut Scan, &Segment, u64) -> Result<Option<T>, QueueError>,
    ) -> Result<Option<T>, QueueError> {
        while self.schema.is_empty() {
            // Look for the next segment before the end of this one: once there
            // is a next one, this one does not grow.
            let next = self.queue.segment_after(&self.segment);
            if self.seeking {
                let mut schema = Schema::new();
                self.seek(&mut schema)?;
                self.schema = schema.into_values().collect();
                if !self.seeking || !self.schema.is_empty() {
                    continue;
                }
            } else if let Some(found) = read(&mut self.scan, &self.segment, self.segment.visible())?
            {
                return Ok(Some(found));
            }
            match next {
                Some(next) => self.enter(next)?,
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Reads nothing of a later timeline than this: who follows is to ask anew, and learns
    /// of it then. One that begins where the later one does has no place here.
    pub fn up_to_timeline(mut self, timeline: u32) -> Result<Reader, QueueError> {
        self.last_timeline = timeline;
        self.check_timeline(&self.segment)?;
        Ok(self)
    }

    fn check_timeline(&self, segment: &Segment) -> Result<(), QueueError> {
        match segment.identity().timeline {
            timeline if timeline > self.last_timeline => Err(QueueError::Timeline(timeline)),
            _ => Ok(()),
        }
    }

    fn enter(&mut self, next: Arc<Segment>) -> Result<(), QueueError> {
        self.check_timeline(&next)?;
        if next.start > self.from {
            return Err(QueueError::Gone {
                wanted: self.from,
                first: next.start,
            });
        }
        self.scan = Scan::at(next.head_len);
        self.segment = next;
        Ok(())
    }

    /// The next record; waits for it. Nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> Result<Record, QueueError> {
        loop {
            self.written.mark_unchanged();
            if let Some(record) = self.try_next()? {
                return Ok(record);
            }
            // The sender lives in the queue, which lives in `self`.
            let _ = self.written.changed().await;
        }
    }
}
