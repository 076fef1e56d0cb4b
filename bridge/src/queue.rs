//! Durable queue between the upstream link and everything that reads from it.
//!
//! Guarantees:
//! - It holds one gapless run of the top's history, from [`Queue::first`] to
//!   [`Queue::end`], as whole committed transactions. Appends that leave a gap
//!   cannot be expressed, appends of what is there already are dropped.
//! - A position given out as durable has been fsynced. A failed fsync is fatal:
//!   what the kernel then holds is unknown, so nothing may be built on it.
//! - A reader sees a transaction when its commit record is written, not before,
//!   and every record is checked against its checksum when it is read.
//! - After a crash only a tail that was never fsynced may be cut. Damage before
//!   that is reported, never skipped (see [`segment::recover`]).
//!
//! Readers may run ahead of the fsync: history is one, so a downstream that got
//! a transaction which we then lose in a power cut merely is ahead of us until
//! the upstream, to which it was never acknowledged, sends it again.

mod disk;
mod places;
mod reader;
mod scan;
mod segment;
mod writer;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::lsn::{Identity, Lsn};
use crate::record::RecordError;

pub use reader::Reader;
pub use segment::inspect;
pub use writer::Writer;

use disk::Disk;
use places::Places;
use segment::Segment;

/// A segment is closed at the first transaction end beyond this.
const SEGMENT_BYTES: u64 = 16 << 20;
/// Between two fsyncs: what is durable is told every 100 ms, and each fsync costs a little.
const SYNC_PAUSE: Duration = Duration::from_millis(20);
const CURSORS_FILE: &str = "cursors.json";

/// What can go wrong with the queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The disk said no; with a full disk it may say yes later.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// Verb and object.
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Bytes that were on disk have changed.
    #[error("queue segment {} is damaged at offset {offset}: {problem}", path.display())]
    Damaged {
        /// The segment file.
        path: PathBuf,
        /// Where the first bad record starts.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The position is older than what is kept.
    #[error("position {wanted} is no longer in the queue, which starts at {first}")]
    Gone {
        /// What was asked for.
        wanted: Lsn,
        /// The oldest position to start from.
        first: Lsn,
    },
    /// The history goes on with another timeline.
    #[error("the history goes on with timeline {0} of the top: connect again")]
    Timeline(u32),
    /// A record came that cannot follow what is there.
    #[error("record refused: {0}")]
    Order(&'static str),
    /// A record from the upstream does not decode.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl QueueError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> QueueError {
        let path = path.to_owned();
        move |source| QueueError::Io {
            action,
            path,
            source,
        }
    }
}

/// Position of a named consumer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Cursor {
    lsn: u64,
    /// Retention passed it by; the consumer must copy anew.
    lost: bool,
    /// Of one session, which does not outlive this process.
    #[serde(skip)]
    temporary: bool,
}

#[derive(Default)]
struct Cursors {
    by_name: BTreeMap<String, Cursor>,
    dirty: bool,
}

struct Inner {
    dir: PathBuf,
    disk: Disk,
    /// Of the segment that is being written; a promoted top raises its timeline.
    identity: Mutex<Identity>,
    /// In order of position; the last one is being written.
    segments: Mutex<Vec<Arc<Segment>>>,
    cursors: Mutex<Cursors>,
    /// Held while the cursors are written to disk.
    saving: Mutex<()>,
    /// Where readers have begun.
    places: Places,
    written: watch::Sender<Lsn>,
    durable: watch::Sender<Lsn>,
}

/// Handle to the queue; clones share it.
#[derive(Clone)]
pub struct Queue {
    inner: Arc<Inner>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn sync_dir(dir: &Path) -> Result<(), QueueError> {
    let file = File::open(dir).map_err(QueueError::io("open", dir))?;
    file.sync_all().map_err(QueueError::io("fsync", dir))
}

impl Queue {
    /// Opens the queue in `dir`, cutting a torn tail. `None` when there is none yet.
    pub fn open(dir: &Path) -> Result<Option<(Queue, Writer)>, QueueError> {
        fs::create_dir_all(dir).map_err(QueueError::io("create", dir))?;
        let paths = segment::list(dir)?;
        let Some((last, sealed)) = paths.split_last() else {
            return Ok(None);
        };
        // Another process may have given the last one its name, and died before that was on disk.
        sync_dir(dir)?;
        let mut segments = Vec::new();
        for path in sealed {
            segments.push(Arc::new(Segment::open(path)?));
        }
        let recovered = segment::recover(last)?;
        let identity = recovered.segment.identity().clone();
        let end = recovered.end;
        segments.push(Arc::new(recovered.segment));
        let queue = Queue::assemble(dir, identity, segments, end)?;
        let writer = Writer::new(queue.clone(), end, recovered.schema);
        Ok(Some((queue, writer)))
    }

    /// Starts an empty queue at `start`, removing whatever was in `dir`.
    pub fn create(
        dir: &Path,
        identity: Identity,
        start: Lsn,
    ) -> Result<(Queue, Writer), QueueError> {
        fs::create_dir_all(dir).map_err(QueueError::io("create", dir))?;
        dir.parent().map_or(Ok(()), sync_dir)?;
        Queue::clear(dir)?;
        let first = Segment::create(dir, &identity, start, &BTreeMap::new())?;
        first.sync()?;
        let queue = Queue::assemble(dir, identity, vec![Arc::new(first)], start)?;
        let writer = Writer::new(queue.clone(), start, BTreeMap::new());
        Ok((queue, writer))
    }

    /// Removes a queue that is open nowhere.
    pub fn clear(dir: &Path) -> Result<(), QueueError> {
        // The newest first: what a crash leaves is a queue still, and an older one.
        for path in segment::list(dir)?.iter().rev() {
            fs::remove_file(path).map_err(QueueError::io("remove", path))?;
        }
        let cursors = dir.join(CURSORS_FILE);
        match fs::remove_file(&cursors) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(QueueError::io("remove", &cursors)(error))
            }
            _ => Ok(()),
        }
    }

    fn assemble(
        dir: &Path,
        identity: Identity,
        segments: Vec<Arc<Segment>>,
        end: Lsn,
    ) -> Result<Queue, QueueError> {
        let by_name = read_cursors(&dir.join(CURSORS_FILE))?;
        Ok(Queue {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                disk: Disk::new(dir),
                identity: Mutex::new(identity),
                segments: Mutex::new(segments),
                cursors: Mutex::new(Cursors {
                    by_name,
                    dirty: false,
                }),
                saving: Mutex::default(),
                places: Places::default(),
                written: watch::Sender::new(end),
                durable: watch::Sender::new(end),
            }),
        })
    }

    /// The history that this queue holds a part of.
    pub fn identity(&self) -> Identity {
        lock(&self.inner.identity).clone()
    }

    /// End of what readers can see.
    pub fn end(&self) -> Lsn {
        *self.inner.written.borrow()
    }

    /// Lowest position that a reader may start from.
    pub fn first(&self) -> Lsn {
        lock(&self.inner.segments)
            .first()
            .map_or(Lsn::ZERO, |segment| segment.start)
    }

    /// Follows [`Queue::end`].
    pub fn written(&self) -> watch::Receiver<Lsn> {
        self.inner.written.subscribe()
    }

    /// Follows the end of what is fsynced.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        self.inner.durable.subscribe()
    }

    /// What is wrong with the disk, if something is: it refuses what is written, or
    /// has not answered for `limit`. It is in order again as soon as it does both.
    pub fn disk_problem(&self, limit: Duration) -> Option<String> {
        self.inner.disk.problem(limit)
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        lock(&self.inner.segments)
            .iter()
            .map(|segment| segment.visible())
            .sum()
    }

    /// Every transaction and watermark above `from`, with the schema it needs first.
    pub fn reader(&self, from: Lsn) -> Result<Reader, QueueError> {
        Reader::open(self.clone(), from)
    }

    /// The same where nothing may wait: a large transaction is gone through to find its end.
    pub async fn open_reader(&self, from: Lsn) -> Result<Reader, QueueError> {
        let queue = self.clone();
        let opened = tokio::task::spawn_blocking(move || queue.reader(from)).await;
        opened.unwrap_or_else(|error| {
            Err(QueueError::io("read", &self.inner.dir)(io::Error::other(
                error,
            )))
        })
    }

    fn segment_for(&self, from: Lsn) -> Result<Arc<Segment>, QueueError> {
        let segments = lock(&self.inner.segments);
        let found = segments.iter().rev().find(|segment| segment.start <= from);
        let first = segments.first().map_or(Lsn::ZERO, |segment| segment.start);
        found.cloned().ok_or(QueueError::Gone {
            wanted: from,
            first,
        })
    }

    fn segment_after(&self, segment: &Arc<Segment>) -> Option<Arc<Segment>> {
        let follows = |next: &&Arc<Segment>| {
            // An empty one may have been put in the place of another.
            let replaces = next.start == segment.start && !Arc::ptr_eq(next, segment);
            next.start > segment.start || replaces
        };
        let segments = lock(&self.inner.segments);
        // Whoever follows asks each time there is nothing to read, and there may be a thousand of them.
        let at = segments.partition_point(|other| other.start < segment.start);
        segments[at..].iter().find(follows).cloned()
    }

    fn active(&self) -> Arc<Segment> {
        let segments = lock(&self.inner.segments);
        // There is always at least the one that open() or create() put there.
        Arc::clone(segments.last().expect("a queue has a segment"))
    }

    /// Fsyncs whatever has been written since the last time and publishes it as
    /// durable; for ever, until an fsync fails, which ends the bridge.
    pub async fn keep_durable(&self) -> QueueError {
        let mut written = self.written();
        loop {
            let end = *written.borrow_and_update();
            let segment = self.active();
            let is_due = segment.dirty() >= writer::DIRTY_BYTES || segment.has_failed();
            if is_due || end > *self.inner.durable.borrow() {
                // The writer fsyncs a segment before it leaves it, so what is
                // below the active one is durable already.
                let queue = self.clone();
                let sync = move || queue.inner.disk.wait(|| segment.sync());
                let synced = tokio::task::spawn_blocking(sync).await;
                match synced {
                    Ok(Ok(())) => self.inner.durable.send_if_modified(|durable| {
                        let further = end > *durable;
                        *durable = end.max(*durable);
                        further
                    }),
                    Ok(Err(error)) => return error,
                    Err(error) => {
                        return QueueError::io("fsync", &self.inner.dir)(io::Error::other(error));
                    }
                };
            }
            tokio::time::sleep(SYNC_PAUSE).await;
            // The sender lives in `self`, so this cannot fail.
            let _ = written.changed().await;
        }
    }

    /// Registers a consumer; false when there is one of that name.
    pub fn create_cursor(&self, name: &str, lsn: Lsn, temporary: bool) -> bool {
        let mut cursors = lock(&self.inner.cursors);
        if cursors.by_name.contains_key(name) {
            return false;
        }
        let cursor = Cursor {
            lsn: lsn.0,
            lost: false,
            temporary,
        };
        cursors.by_name.insert(name.to_owned(), cursor);
        cursors.dirty = true;
        true
    }

    /// Sets a consumer's position; it never goes back.
    pub fn set_cursor(&self, name: &str, lsn: Lsn) {
        let mut cursors = lock(&self.inner.cursors);
        let entry = cursors.by_name.entry(name.to_owned());
        let cursor = entry.or_insert(Cursor {
            lsn: lsn.0,
            lost: false,
            temporary: false,
        });
        cursor.lsn = cursor.lsn.max(lsn.0);
        cursor.lost &= Lsn(cursor.lsn) < self.first();
        cursors.dirty = true;
    }

    /// A consumer that reads from `from` has a place from now on. One that it has already stays where
    /// acknowledgements have brought it: what it has read itself, others of its domain may lack.
    pub fn register_cursor(&self, name: &str, from: Lsn) {
        let known = lock(&self.inner.cursors).by_name.get(name).copied();
        if known.is_none_or(|cursor| cursor.lost) {
            self.set_cursor(name, from.min(self.first()));
        }
    }

    /// Notes how far a consumer has come at another server of the domain, so that
    /// what it may ask for here is kept, and nothing more.
    pub fn learn_cursor(&self, name: &str, lsn: Lsn) {
        let known = lock(&self.inner.cursors).by_name.get(name).copied();
        // One that has gone past us asks for nothing that we have yet.
        if lsn >= self.first() && known.is_none_or(|known| known.lsn < lsn.0) {
            self.set_cursor(name, lsn);
        }
    }

    /// Forgets a consumer. Returns whether it was known.
    pub fn drop_cursor(&self, name: &str) -> bool {
        let mut cursors = lock(&self.inner.cursors);
        cursors.dirty = true;
        cursors.by_name.remove(name).is_some()
    }

    /// Every consumer with its position and whether retention has passed it by.
    pub fn cursors(&self) -> Vec<(String, Lsn, bool)> {
        let cursors = lock(&self.inner.cursors);
        cursors
            .by_name
            .iter()
            .map(|(name, c)| (name.clone(), Lsn(c.lsn), c.lost))
            .collect()
    }

    /// Writes the cursors to disk if they have changed; when it returns, every
    /// change before the call is there.
    pub fn save_cursors(&self) -> Result<(), QueueError> {
        let _saving = lock(&self.inner.saving);
        let by_name: BTreeMap<String, Cursor> = {
            let mut cursors = lock(&self.inner.cursors);
            if !std::mem::take(&mut cursors.dirty) {
                return Ok(());
            }
            let kept = cursors.by_name.iter().filter(|(_, c)| !c.temporary);
            kept.map(|(name, cursor)| (name.clone(), *cursor)).collect()
        };
        let text = serde_json::to_vec(&by_name)
            .map_err(|error| QueueError::io("encode", &self.inner.dir)(io::Error::other(error)))?;
        let (dir, disk) = (&self.inner.dir, &self.inner.disk);
        let saved = disk.wait(|| write_atomically(dir, CURSORS_FILE, &text));
        if saved.is_err() {
            lock(&self.inner.cursors).dirty = true;
        }
        saved
    }

    /// End of what a segment holds, if another one follows it.
    pub fn end_of(&self, path: &Path) -> Option<Lsn> {
        let segments = lock(&self.inner.segments);
        let mut from = segments.iter().skip_while(|segment| segment.path != path);
        from.nth(1).map(|next| next.start)
    }

    /// Removes a damaged segment, and those before it, if the database has replayed all
    /// that is in them, durably: what follows is the queue then. False when it has not.
    pub fn remove_damaged(&self, path: &Path, replayed: Lsn) -> Result<bool, QueueError> {
        let removed: Vec<Arc<Segment>> = {
            let mut segments = lock(&self.inner.segments);
            let Some(at) = segments.iter().position(|segment| segment.path == path) else {
                // It has been removed already.
                return Ok(true);
            };
            match segments.get(at + 1) {
                Some(next) if next.start <= replayed => segments.drain(..=at).collect(),
                _ => return Ok(false),
            }
        };
        for segment in removed {
            let path = &segment.path;
            fs::remove_file(path).map_err(QueueError::io("remove", path))?;
        }
        Ok(true)
    }

    /// Removes old segments that nobody needs: those below `replayed` (durable in
    /// the local Postgres) and every cursor, keeping at least `retain_min` bytes.
    /// Beyond `retain_max` bytes cursors are passed by; their names are returned.
    /// The local Postgres is never passed by.
    pub fn trim(
        &self,
        replayed: Lsn,
        retain_min: u64,
        retain_max: u64,
    ) -> Result<Vec<String>, QueueError> {
        let mut lost = Vec::new();
        loop {
            let total = self.bytes();
            let (oldest, next_start) = {
                let segments = lock(&self.inner.segments);
                let [oldest, next, ..] = &segments[..] else {
                    return Ok(lost);
                };
                (Arc::clone(oldest), next.start)
            };
            if total.saturating_sub(oldest.visible()) < retain_min || replayed < next_start {
                return Ok(lost);
            }
            let mut holders = Vec::new();
            {
                let mut cursors = lock(&self.inner.cursors);
                for (name, cursor) in &mut cursors.by_name {
                    if !cursor.lost && Lsn(cursor.lsn) < next_start {
                        cursor.lost = total > retain_max;
                        // A session's own finds out by itself.
                        holders.push((name.clone(), cursor.temporary));
                    }
                }
                cursors.dirty |= !holders.is_empty();
            }
            if !holders.is_empty() && total <= retain_max {
                return Ok(lost);
            }
            let lasting = holders.into_iter().filter(|(_, temporary)| !temporary);
            lost.extend(lasting.map(|(name, _)| name));
            let mut segments = lock(&self.inner.segments);
            // A damaged one may have been removed meanwhile.
            if segments
                .first()
                .is_none_or(|first| !Arc::ptr_eq(first, &oldest))
            {
                continue;
            }
            segments.remove(0);
            drop(segments);
            fs::remove_file(&oldest.path).map_err(QueueError::io("remove", &oldest.path))?;
        }
    }
}

fn read_cursors(path: &Path) -> Result<BTreeMap<String, Cursor>, QueueError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| QueueError::Damaged {
            path: path.to_owned(),
            offset: 0,
            problem: error.to_string(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(QueueError::io("read", path)(error)),
    }
}

/// Replaces `dir/name` so that a crash leaves the old or the new content.
pub fn write_atomically(dir: &Path, name: &str, content: &[u8]) -> Result<(), QueueError> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}.tmp")));
    let mut file = File::create(&temporary).map_err(QueueError::io("create", &temporary))?;
    file.write_all(content)
        .map_err(QueueError::io("write", &temporary))?;
    file.sync_all()
        .map_err(QueueError::io("fsync", &temporary))?;
    fs::rename(&temporary, &path).map_err(QueueError::io("rename", &temporary))?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests;
