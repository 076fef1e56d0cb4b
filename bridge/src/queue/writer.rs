//! The one writer of a queue.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use super::scan::Scan;
use super::segment::{Schema, Segment, note_schema, schema_key};
use super::{Queue, QueueError, SEGMENT_BYTES, lock};
use crate::lsn::{Identity, Lsn};
use crate::record::{Kind, Record};
use crate::wire::empty;

/// Buffered bytes are written at the latest when there are as many.
const BUFFER_BYTES: usize = 1 << 20;

/// When so many bytes are not on disk yet, they go there although no transaction has ended: at its end
/// all of a large one would have to, and the upstream hears nothing from us until that is done.
pub(super) const DIRTY_BYTES: u64 = 8 << 20;
/// With so many of an unfinished transaction the writer waits for the disk, or with fewer where
/// that would take a slow disk more than [`WAIT`] seconds: the upstream hears nothing from us meanwhile.
const MOST_DIRTY_BYTES: u64 = 4 * DIRTY_BYTES;
const LEAST_DIRTY_BYTES: u64 = 1 << 20;
const WAIT: u64 = 2;

/// Appends records. What is appended becomes readable with [`Writer::publish`];
/// after an error everything since the last publish is gone, as after a crash.
pub struct Writer {
    queue: Queue,
    segment: Arc<Segment>,
    /// Of the last appended transaction or watermark.
    end: Lsn,
    schema: Schema,
    /// Definitions of sessions with the upstream before this one that it has not given again. It gives
    /// each before it is used, so the next segment can do without those.
    stale: BTreeSet<(u8, u32)>,
    /// A segment of more bytes is followed by another.
    full: u64,
    /// Not yet in the file; starts at `offset`.
    buffer: BytesMut,
    offset: u64,
    /// End of the last whole transaction, in the file or the buffer.
    whole: u64,
    /// What the schema was before each definition that no transaction follows yet.
    undo: Vec<((u8, u32), Option<Record>)>,
    in_transaction: bool,
    marked: u64,
}

impl Writer {
    pub(super) fn new(queue: Queue, end: Lsn, schema: Schema) -> Writer {
        let segment = queue.active();
        let offset = segment.visible();
        Writer {
            full: full_at(&schema),
            queue,
            segment,
            end,
            schema,
            stale: BTreeSet::new(),
            buffer: BytesMut::new(),
            offset,
            whole: offset,
            undo: Vec::new(),
            in_transaction: false,
            marked: offset,
        }
    }

    /// End of what has been appended.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// The queue that this writes.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// What is appended from now on comes from a new session with an upstream, which defines anew
    /// whatever it uses: tables that are no more are forgotten some time.
    pub fn begin_session(&mut self) {
        self.stale = self.schema.keys().copied().collect();
    }

    /// Appends one record. A transaction or watermark at or below the end is
    /// dropped: it is here already.
    pub fn append(&mut self, record: &Record) -> Result<(), QueueError> {
        match record.kind {
            Kind::Schema => self.append_schema(record)?,
            Kind::Part => {
                self.in_transaction = true;
                self.put(record);
            }
            // What it defined is defined all the same.
            Kind::Commit if record.lsn <= self.end => self.cut_data()?,
            Kind::Commit => self.finish(record)?,
            Kind::Watermark if self.in_transaction => {
                return Err(QueueError::Order("watermark inside a transaction"));
            }
            Kind::Watermark if record.lsn <= self.end => {}
            Kind::Watermark => self.finish(record)?,
            Kind::Mark => return Err(QueueError::Order("a mark is local to its file")),
        }
        if self.buffer.len() >= BUFFER_BYTES {
            self.write()
        } else {
            Ok(())
        }
    }

    fn append_schema(&mut self, record: &Record) -> Result<(), QueueError> {
        let key = schema_key(record)?;
        self.stale.remove(&key);
        let known = self.schema.get(&key);
        if known.is_some_and(|known| known.bytes == record.bytes) {
            return Ok(());
        }
        self.undo.push((key, known.cloned()));
        note_schema(&mut self.schema, record)?;
        self.put(record);
        Ok(())
    }

    fn put(&mut self, record: &Record) {
        self.buffer.put_slice(&record.bytes);
    }

    fn finish(&mut self, record: &Record) -> Result<(), QueueError> {
        self.put(record);
        self.undo.clear();
        self.in_transaction = false;
        self.end = record.lsn;
        self.whole = self.offset + self.buffer.len() as u64;
        if self.whole > self.full {
            self.roll()
        } else {
            Ok(())
        }
    }

    /// Whether records of an unfinished transaction have been appended.
    pub fn in_transaction(&self) -> bool {
        self.in_transaction
    }

    /// Takes back the unfinished transaction, and what it defined.
    pub fn cut(&mut self) -> Result<(), QueueError> {
        for (key, before) in self.undo.drain(..).rev() {
            match before {
                Some(record) => self.schema.insert(key, record),
                None => self.schema.remove(&key),
            };
        }
        self.in_transaction = false;
        if self.whole >= self.offset {
            self.buffer.truncate((self.whole - self.offset) as usize);
            return Ok(());
        }
        self.buffer.clear();
        self.offset = self.whole;
        let disk = &self.queue.inner.disk;
        disk.wait(|| self.segment.truncate(self.whole))
    }

    /// Takes back the unfinished transaction but keeps what it defined: the
    /// upstream will not send the definitions again in this session.
    pub fn cut_data(&mut self) -> Result<(), QueueError> {
        let defined: Vec<Record> = self
            .undo
            .iter()
            .filter_map(|(key, _)| self.schema.get(key).cloned())
            .collect();
        self.cut()?;
        defined
            .iter()
            .try_for_each(|record| self.append_schema(record))
    }

    /// Makes what has been appended, up to the last whole transaction, readable.
    pub fn publish(&mut self) -> Result<(), QueueError> {
        if self.queue.end() == self.end {
            return Ok(());
        }
        self.put_mark();
        self.write()?;
        self.segment.publish(self.whole);
        self.queue.inner.written.send_replace(self.end);
        Ok(())
    }

    /// Says in the file what is known to be on disk, for [`super::segment::recover`].
    fn put_mark(&mut self) {
        let synced = self.segment.synced();
        if synced > self.marked && !self.in_transaction {
            let mark = Record::new(Kind::Mark, Lsn::ZERO, &synced.to_be_bytes());
            self.put(&mark);
            self.whole = self.offset + self.buffer.len() as u64;
            self.marked = synced;
        }
    }

    fn write(&mut self) -> Result<(), QueueError> {
        let disk = &self.queue.inner.disk;
        let written = disk.write(|| self.segment.write_at(&self.buffer, self.offset));
        if written.is_ok() {
            self.offset += self.buffer.len() as u64;
        }
        empty(&mut self.buffer, 4 * BUFFER_BYTES);
        written.inspect_err(|_| self.forget())?;
        self.pass_on_to_disk()
    }

    /// Keeps small what an fsync would have to write.
    fn pass_on_to_disk(&self) -> Result<(), QueueError> {
        let dirty = self.segment.dirty();
        if self.in_transaction && dirty >= most_dirty(self.segment.pace()) {
            return self.sync();
        }
        if dirty >= DIRTY_BYTES {
            self.wake_who_keeps_it_durable();
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), QueueError> {
        let synced = self.queue.inner.disk.wait(|| self.segment.sync());
        // After a failure he ends the bridge.
        synced.inspect_err(|_| self.wake_who_keeps_it_durable())
    }

    fn wake_who_keeps_it_durable(&self) {
        self.queue.inner.written.send_modify(|_| {});
    }

    /// After a failed write: back to what readers can see.
    fn forget(&mut self) {
        let visible = self.segment.visible();
        (self.offset, self.whole) = (visible, visible);
        self.end = self.queue.end();
        self.undo.clear();
        self.in_transaction = false;
        // The rest of the tail is overwritten by the next append, or cut at the next start.
        let disk = &self.queue.inner.disk;
        if let Err(error) = disk.wait(|| self.segment.truncate(visible)) {
            tracing::warn!("{error}");
        }
        match definitions(&self.segment, visible) {
            Ok(schema) => self.schema = schema,
            // Knowing none means that each is written again, which is always right.
            Err(_) => self.schema.clear(),
        }
    }

    /// Goes on with a history that has the same past: what comes is stored under its
    /// identity, in a segment of its own.
    pub fn adopt(&mut self, identity: &Identity) -> Result<(), QueueError> {
        self.cut()?;
        // An empty segment has the name that the next one would get.
        if self.segment.start < self.end {
            self.roll_to(identity)?;
        } else {
            self.segment = Arc::new(self.replace_empty(identity)?);
            if let Some(last) = lock(&self.queue.inner.segments).last_mut() {
                *last = Arc::clone(&self.segment);
            }
            self.wake_who_keeps_it_durable();
        }
        // Not before there is a segment for it: what failed is tried again.
        *lock(&self.queue.inner.identity) = identity.clone();
        Ok(())
    }

    fn replace_empty(&mut self, identity: &Identity) -> Result<Segment, QueueError> {
        let inner = &self.queue.inner;
        let create = || Segment::create(&inner.dir, identity, self.end, &self.schema);
        let segment = inner.disk.write(create)?;
        self.offset = segment.visible();
        (self.whole, self.marked) = (self.offset, self.offset);
        Ok(segment)
    }

    fn roll(&mut self) -> Result<(), QueueError> {
        self.roll_to(&self.queue.identity())
    }

    fn roll_to(&mut self, identity: &Identity) -> Result<(), QueueError> {
        self.publish()?;
        self.sync()?;
        for key in std::mem::take(&mut self.stale) {
            self.schema.remove(&key);
        }
        self.full = full_at(&self.schema);
        let inner = &self.queue.inner;
        let create = || Segment::create(&inner.dir, identity, self.end, &self.schema);
        let next = inner.disk.write(create)?;
        self.segment = Arc::new(next);
        self.offset = self.segment.visible();
        self.whole = self.offset;
        self.marked = self.offset;
        lock(&inner.segments).push(Arc::clone(&self.segment));
        // He ends with one that cannot be.
        self.wake_who_keeps_it_durable();
        Ok(())
    }
}

/// With a disk that takes `pace` bytes a second.
pub(super) fn most_dirty(pace: u64) -> u64 {
    pace.saturating_mul(WAIT)
        .clamp(LEAST_DIRTY_BYTES, MOST_DIRTY_BYTES)
}

/// The definitions that a segment begins with are the smaller part of it, however many there are.
fn full_at(schema: &Schema) -> u64 {
    let defined: usize = schema.values().map(|record| record.bytes.len()).sum();
    SEGMENT_BYTES.max(2 * defined as u64)
}

fn definitions(segment: &Segment, limit: u64) -> Result<Schema, QueueError> {
    let (mut schema, mut scan) = (Schema::new(), Scan::at(segment.head_len));
    while let Some(record) = scan.next(segment, limit)? {
        if record.kind == Kind::Schema {
            note_schema(&mut schema, &record)?;
        }
    }
    Ok(schema)
}
