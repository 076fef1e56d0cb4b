//! One file of the queue: its head, and what a crash may have left of it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::scan::{BLOCK, Scan, Shared};
use super::{QueueError, lock};
use crate::lsn::{Identity, Lsn};
use crate::record::{HEADER_LEN, Kind, Record, RecordError};

const MAGIC: &[u8; 8] = b"TERRSEG1";
const MAX_HEAD: usize = 4096;
/// An fsync of fewer bytes says little of how many a second the disk takes.
const MEASURED: u64 = 1 << 20;
const MARK_LEN: usize = HEADER_LEN + 8;

/// Definitions that a later transaction may refer to, by message kind and OID.
pub(super) type Schema = BTreeMap<(u8, u32), Record>;

/// Takes a schema record in. They are kept for long, so this is a copy: a part of a block that was read
/// would keep all of that.
pub(super) fn note_schema(schema: &mut Schema, record: &Record) -> Result<(), RecordError> {
    let bytes = Bytes::copy_from_slice(&record.bytes);
    let own = Record { bytes, ..*record };
    schema.insert(schema_key(record)?, own);
    Ok(())
}

/// Key of a schema record: the message's kind and the OID that it defines.
pub(super) fn schema_key(record: &Record) -> Result<(u8, u32), RecordError> {
    let mut body = record.body();
    if body.len() < 5 {
        return Err(RecordError::Body("schema message"));
    }
    Ok((body.get_u8(), body.get_u32()))
}

/// An open segment file.
pub(super) struct Segment {
    pub path: PathBuf,
    /// End of the transaction before the first one in this file.
    pub start: Lsn,
    pub head_len: u64,
    identity: Identity,
    file: File,
    /// Readers may read up to here.
    visible: AtomicU64,
    /// Known to be on disk up to here.
    synced: AtomicU64,
    /// Bytes that were written since the last fsync began.
    dirty: AtomicU64,
    /// Bytes a second of the last fsync of many.
    pace: AtomicU64,
    /// An fsync has failed: the next one may succeed and say nothing of what was lost.
    failed: AtomicBool,
    /// Held during an fsync: the system tells of a failure only once.
    syncing: Mutex<()>,
    shared: Shared,
    /// Held while somebody looks for where to begin.
    looking: Mutex<()>,
}

/// The segment files of `dir` in order of position.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, QueueError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(QueueError::io("read", dir))? {
        let path = entry.map_err(QueueError::io("read", dir))?.path();
        if path.extension().is_some_and(|extension| extension == "seg") {
            paths.push(path);
        }
    }
    // The names are numbers of one width.
    paths.sort();
    Ok(paths)
}

fn encode_head(identity: &Identity, start: Lsn) -> BytesMut {
    let text = identity.to_string();
    let mut head = BytesMut::new();
    head.put_slice(MAGIC);
    head.put_u64(start.0);
    head.put_u16(text.len() as u16);
    head.put_slice(text.as_bytes());
    head.put_u32(crc32c::crc32c(&head));
    head
}

fn decode_head(mut bytes: &[u8]) -> Result<(Identity, Lsn, u64), &'static str> {
    let whole = bytes;
    if bytes.len() < MAGIC.len() + 10 || &bytes[..MAGIC.len()] != MAGIC {
        return Err("not a queue segment of this version");
    }
    bytes.advance(MAGIC.len());
    let (start, len) = (Lsn(bytes.get_u64()), bytes.get_u16() as usize);
    if bytes.len() < len + 4 {
        return Err("head is cut short");
    }
    let head_len = whole.len() - bytes.len() + len;
    if crc32c::crc32c(&whole[..head_len]) != (&whole[head_len..]).get_u32() {
        return Err("head checksum does not match");
    }
    let text = std::str::from_utf8(&bytes[..len]).map_err(|_| "identity is not UTF-8")?;
    let identity = text.parse().map_err(|_| "invalid stream identity")?;
    Ok((identity, start, head_len as u64 + 4))
}

impl Segment {
    /// Makes a segment that starts with every definition in `schema`. It appears
    /// under its name only when it is whole and on disk.
    pub fn create(
        dir: &Path,
        identity: &Identity,
        start: Lsn,
        schema: &Schema,
    ) -> Result<Segment, QueueError> {
        let path = dir.join(format!("{:016X}.seg", start.0));
        let temporary = path.with_extension("tmp");
        let mut content = encode_head(identity, start);
        let head_len = content.len() as u64;
        schema
            .values()
            .for_each(|record| content.put_slice(&record.bytes));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(QueueError::io("create", &temporary))?;
        file.write_all_at(&content, 0)
            .map_err(QueueError::io("write", &temporary))?;
        file.sync_all()
            .map_err(QueueError::io("fsync", &temporary))?;
        let directory = File::open(dir).map_err(QueueError::io("open", dir))?;
        fs::rename(&temporary, &path).map_err(QueueError::io("rename", &temporary))?;
        // It is there, perhaps in the place of another: nothing goes on without it, and it is never durable.
        let named = directory.sync_all().map_err(QueueError::io("fsync", dir));
        let named = named.inspect_err(|error| tracing::warn!("{error}"));
        Ok(Segment {
            path,
            start,
            head_len,
            identity: identity.clone(),
            file,
            visible: AtomicU64::new(content.len() as u64),
            synced: AtomicU64::new(content.len() as u64),
            dirty: AtomicU64::new(0),
            pace: AtomicU64::new(u64::MAX),
            failed: AtomicBool::new(named.is_err()),
            syncing: Mutex::default(),
            shared: Shared::default(),
            looking: Mutex::default(),
        })
    }

    /// Opens a segment as it is, wholly visible; records are checked when they are read.
    pub fn open(path: &Path) -> Result<Segment, QueueError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(QueueError::io("open", path))?;
        let len = file.metadata().map_err(QueueError::io("read", path))?.len();
        let mut head = vec![0; (len as usize).min(MAX_HEAD)];
        read_at(&file, path, &mut head, 0)?;
        let (identity, start, head_len) =
            decode_head(&head).map_err(|problem| damaged(path, 0, problem))?;
        Ok(Segment {
            path: path.to_owned(),
            start,
            head_len,
            identity,
            file,
            visible: AtomicU64::new(len),
            synced: AtomicU64::new(len),
            dirty: AtomicU64::new(0),
            pace: AtomicU64::new(u64::MAX),
            failed: AtomicBool::new(false),
            syncing: Mutex::default(),
            shared: Shared::default(),
            looking: Mutex::default(),
        })
    }

    /// One that takes what is written and cannot bring it to disk.
    #[cfg(test)]
    pub fn unsyncable(dir: &Path, identity: &Identity, start: Lsn) -> Segment {
        let segment = Segment::create(dir, identity, start, &Schema::new()).unwrap();
        let null = OpenOptions::new().write(true).open("/dev/null");
        Segment {
            file: null.unwrap(),
            ..segment
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What its readers have read just now.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Nobody else looks for where to begin meanwhile.
    pub fn alone(&self) -> MutexGuard<'_, ()> {
        lock(&self.looking)
    }

    pub fn visible(&self) -> u64 {
        self.visible.load(Ordering::Acquire)
    }

    pub fn synced(&self) -> u64 {
        self.synced.load(Ordering::Acquire)
    }

    /// Lets readers read up to `offset`.
    pub fn publish(&self, offset: u64) {
        self.visible.store(offset, Ordering::Release);
    }

    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), QueueError> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(QueueError::io("write", &self.path))?;
        self.dirty.fetch_add(bytes.len() as u64, Ordering::AcqRel);
        Ok(())
    }

    /// Bytes that were written since the last fsync began.
    pub fn dirty(&self) -> u64 {
        self.dirty.load(Ordering::Acquire)
    }

    pub fn truncate(&self, len: u64) -> Result<(), QueueError> {
        self.shared.forget();
        self.file
            .set_len(len)
            .map_err(QueueError::io("truncate", &self.path))
    }

    /// Makes what is visible now durable. After one failure every call fails.
    pub fn sync(&self) -> Result<(), QueueError> {
        let _alone = lock(&self.syncing);
        let visible = self.visible();
        let bytes = self.dirty.swap(0, Ordering::AcqRel);
        let began = Instant::now();
        let synced = match self.has_failed() {
            true => Err(io::Error::other("an earlier fsync failed")),
            false => self.file.sync_data(),
        };
        if bytes >= MEASURED {
            self.set_pace((bytes as f64 / began.elapsed().as_secs_f64()) as u64);
        }
        if synced.is_ok() {
            self.synced.fetch_max(visible, Ordering::AcqRel);
        } else {
            self.failed.store(true, Ordering::Release);
        }
        synced.map_err(QueueError::io("fsync", &self.path))
    }

    /// Bytes that the disk takes in a second, as far as is known.
    pub fn pace(&self) -> u64 {
        self.pace.load(Ordering::Relaxed)
    }

    pub fn set_pace(&self, pace: u64) {
        self.pace.store(pace, Ordering::Relaxed);
    }

    /// Whether an fsync has failed.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Writes what is there once more, from `offset` to `end`: the page cache may hold
    /// as clean what a failed fsync of an earlier process did not bring to disk.
    fn write_again(&self, mut offset: u64, end: u64) -> Result<(), QueueError> {
        while offset < end {
            let block = self.read(offset, BLOCK, end)?;
            self.write_at(&block, offset)?;
            offset += block.len() as u64;
        }
        Ok(())
    }

    /// Reads `len` bytes, or what there is up to `limit`.
    pub fn read(&self, offset: u64, len: usize, limit: u64) -> Result<Bytes, QueueError> {
        let len = limit.saturating_sub(offset).min(len as u64) as usize;
        let mut bytes = BytesMut::zeroed(len);
        read_at(&self.file, &self.path, &mut bytes, offset)?;
        Ok(bytes.freeze())
    }

    pub fn damaged(&self, offset: u64, problem: impl ToString) -> QueueError {
        damaged(&self.path, offset, problem)
    }
}

fn damaged(path: &Path, offset: u64, problem: impl ToString) -> QueueError {
    QueueError::Damaged {
        path: path.to_owned(),
        offset,
        problem: problem.to_string(),
    }
}

/// Reads as much as there is room for. What is not there any more is as bad as what has changed; a disk
/// that does not answer may have been away for a moment.
fn read_at(file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<(), QueueError> {
    file.read_exact_at(bytes, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(path, offset, "the file is cut short"),
            _ => QueueError::io("read", path)(error),
        })
}

/// The last segment after a crash.
pub(super) struct Recovered {
    pub segment: Segment,
    pub end: Lsn,
    pub schema: Schema,
}

/// Opens the last segment and cuts what a crash left behind its last whole
/// transaction.
///
/// Marks tell a torn tail from damage. Each one says "all before this offset
/// had been fsynced when I was written". A bad record that some later mark
/// covers was once good: that is damage, and an error. One that no mark covers
/// is the tail of a write that never reached the disk, and goes. What no mark covers
/// is written again before it is called durable.
pub(super) fn recover(path: &Path) -> Result<Recovered, QueueError> {
    let segment = Segment::open(path)?;
    let len = segment.visible();
    let mut scan = Scan::at(segment.head_len);
    let (mut end, mut whole) = (segment.start, segment.head_len);
    let mut synced = segment.head_len;
    let (mut schema, mut pending) = (Schema::new(), Vec::new());
    // What create() has put behind the head: so many definitions, up to here.
    let (mut given, mut given_end, mut in_head) = (0, segment.head_len, true);
    loop {
        let at = scan.offset;
        match scan.next(&segment, len) {
            Ok(None) => break,
            Ok(Some(record)) => match record.kind {
                Kind::Schema => {
                    pending.push(record);
                    if in_head {
                        (given, given_end) = (pending.len(), scan.offset);
                    }
                    continue;
                }
                Kind::Commit | Kind::Watermark => {
                    for record in pending.drain(..) {
                        note_schema(&mut schema, &record)?;
                    }
                    (end, whole) = (record.lsn, scan.offset);
                }
                Kind::Mark => synced = record.body().try_get_u64().unwrap_or(synced),
                Kind::Part => {}
            },
            Err(error @ QueueError::Damaged { .. }) => {
                if covered_by_mark(&segment, at, len)? {
                    return Err(error);
                }
                tracing::warn!(path = %path.display(), offset = at, "cut the torn tail");
                break;
            }
            Err(error) => return Err(error),
        }
        in_head = false;
    }
    if whole == segment.head_len {
        // Nothing but those: what comes behind them is of a transaction that is not whole.
        whole = given_end;
        for record in pending.drain(..given) {
            note_schema(&mut schema, &record)?;
        }
    }
    segment.truncate(whole)?;
    segment.write_again(synced, whole)?;
    segment.publish(whole);
    segment.sync()?;
    Ok(Recovered {
        segment,
        end,
        schema,
    })
}

fn covered_by_mark(segment: &Segment, bad: u64, len: u64) -> Result<bool, QueueError> {
    let magic = Record::new(Kind::Mark, Lsn::ZERO, &[0; 8]).bytes.slice(..5);
    let mut offset = bad;
    while offset + MARK_LEN as u64 <= len {
        // Blocks overlap, so that no mark is missed at a border.
        let block = segment.read(offset, BLOCK, len)?;
        for at in 0..=block.len() - MARK_LEN {
            if block[at..].starts_with(&magic)
                && let Ok(record) = Record::take(&mut block.slice(at..at + MARK_LEN))
                && record.body().try_get_u64().is_ok_and(|offset| offset > bad)
            {
                return Ok(true);
            }
        }
        offset += (block.len() - MARK_LEN + 1) as u64;
    }
    Ok(false)
}

/// Reads a whole segment file and returns how many records it holds; for tools
/// and fuzzing.
pub fn inspect(path: &Path) -> Result<usize, QueueError> {
    let segment = Segment::open(path)?;
    let (len, mut scan, mut count) = (segment.visible(), Scan::at(segment.head_len), 0);
    while scan.next(&segment, len)?.is_some() {
        count += 1;
    }
    Ok(count)
}
