//! The record: what the queue stores and what bridges send each other, byte for byte.
//!
//! Guarantee: a record that decodes is the record that the first bridge below
//! the top wrote. Its checksum travels with it, so damage on a disk or in a
//! bridge's memory is found at the next reader and never applied.
//!
//! Layout, big endian: magic u32, kind u8, zero u8 x 3, body length u32,
//! LSN u64, CRC-32C u32 (over the 20 bytes before it and the body), body.
//! The body of a part or commit is a run of frames: payload length u32,
//! LSN u64, payload (one pgoutput message). A commit's body starts with
//! xid u32, commit LSN u64, commit time i64, tag length u16, tag.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::lsn::Lsn;

/// Version of this layout, part of the stream identity.
pub const FORMAT: u32 = 1;
/// Bytes before the body.
pub const HEADER_LEN: usize = 24;
/// Longest body: one row of the largest size that PostgreSQL sends, and some.
pub const MAX_BODY: usize = 0x7fff_0000;

const MAGIC: u32 = 0x5445_5252;
const FRAME_HEADER_LEN: usize = 12;
const COMMIT_HEADER_LEN: usize = 22;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// One Relation or Type message, valid for what follows.
    Schema = 1,
    /// Some frames of a transaction that goes on in the next record.
    Part = 2,
    /// The last (often only) frames of a transaction; `lsn` is its end.
    Commit = 3,
    /// The top was idle up to `lsn`.
    Watermark = 4,
    /// Of one file: all before this offset is on disk. Whoever receives it passes over it.
    Mark = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [
            Kind::Schema,
            Kind::Part,
            Kind::Commit,
            Kind::Watermark,
            Kind::Mark,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The bytes end before the record does.
    #[error("record is cut short")]
    Short,
    /// The header is not one of a record.
    #[error("not a record: {0}")]
    Header(&'static str),
    /// The checksum does not match.
    #[error("record checksum does not match")]
    Checksum,
    /// The body is not of its kind's form.
    #[error("malformed record body: {0}")]
    Body(&'static str),
}

/// One record, whole, with its header.
#[derive(Clone, Debug)]
pub struct Record {
    /// What the body is.
    pub kind: Kind,
    /// End LSN of the transaction, position of the watermark, else zero.
    pub lsn: Lsn,
    /// Header and body.
    pub bytes: Bytes,
}

/// One pgoutput message with the LSN that its sender gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Position in the top's WAL.
    pub lsn: Lsn,
    /// The message: B, I, U, D, T, M or C.
    pub payload: &'a [u8],
}

/// What a commit record tells before its frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitInfo {
    /// Transaction id at the top.
    pub xid: u32,
    /// Start of the commit record at the top.
    pub commit_lsn: Lsn,
    /// Microseconds since 2000-01-01 UTC on the top's clock.
    pub commit_time: i64,
    /// JSON of the transaction's tag, empty without one.
    pub tag: Bytes,
}

impl CommitInfo {
    /// Whether the tag has this member: its name in quotes and a colon, and maybe its value.
    /// Inside a JSON string the quotes would be escaped.
    pub fn tag_says(&self, member: &[u8]) -> bool {
        self.tag
            .windows(member.len())
            .any(|window| window == member)
    }
}

/// Body length of the record that starts with `header`, if it is a header.
pub fn body_len(header: &[u8]) -> Result<usize, RecordError> {
    let mut header = header.get(..HEADER_LEN).ok_or(RecordError::Short)?;
    if header.get_u32() != MAGIC {
        return Err(RecordError::Header("wrong magic"));
    }
    Kind::from_byte(header.get_u8()).ok_or(RecordError::Header("unknown kind"))?;
    header.advance(3);
    let len = header.get_u32() as usize;
    if len > MAX_BODY {
        Err(RecordError::Header("impossible length"))
    } else {
        Ok(len)
    }
}

impl Record {
    /// Builds a record around `body`.
    pub fn new(kind: Kind, lsn: Lsn, body: &[u8]) -> Record {
        Record::of_two(kind, lsn, body, &[])
    }

    /// Builds a record around `head` and `rest`.
    fn of_two(kind: Kind, lsn: Lsn, head: &[u8], rest: &[u8]) -> Record {
        let len = head.len() + rest.len();
        let mut bytes = BytesMut::with_capacity(HEADER_LEN + len);
        bytes.put_u32(MAGIC);
        bytes.put_u8(kind as u8);
        bytes.put_bytes(0, 3);
        bytes.put_u32(len as u32);
        bytes.put_u64(lsn.0);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), head);
        bytes.put_u32(crc32c::crc32c_append(crc, rest));
        bytes.put_slice(head);
        bytes.put_slice(rest);
        Record {
            kind,
            lsn,
            bytes: bytes.freeze(),
        }
    }

    /// A watermark at `lsn`.
    pub fn watermark(lsn: Lsn, top_time: i64) -> Record {
        Record::new(Kind::Watermark, lsn, &top_time.to_be_bytes())
    }

    /// Decodes and verifies the record at the start of `bytes`, and takes it off them.
    pub fn take(bytes: &mut Bytes) -> Result<Record, RecordError> {
        let len = body_len(bytes)?;
        if bytes.len() < HEADER_LEN + len {
            return Err(RecordError::Short);
        }
        let whole = bytes.slice(..HEADER_LEN + len);
        let stated = (&whole[20..24]).get_u32();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&whole[..20]), &whole[HEADER_LEN..]);
        if crc != stated {
            return Err(RecordError::Checksum);
        }
        let kind = Kind::from_byte(whole[4]).ok_or(RecordError::Header("unknown kind"))?;
        let lsn = Lsn((&whole[12..20]).get_u64());
        bytes.advance(whole.len());
        Ok(Record {
            kind,
            lsn,
            bytes: whole,
        })
    }

    /// The body, without the header.
    pub fn body(&self) -> Bytes {
        self.bytes.slice(HEADER_LEN..)
    }

    /// The top's clock at a watermark, microseconds since 2000-01-01 UTC.
    pub fn top_time(&self) -> Result<i64, RecordError> {
        let body = self.body();
        let bytes = body[..]
            .try_into()
            .map_err(|_| RecordError::Body("watermark"))?;
        Ok(i64::from_be_bytes(bytes))
    }

    /// What a commit record says of its transaction.
    pub fn commit(&self) -> Result<CommitInfo, RecordError> {
        self.split_commit().map(|(info, _)| info)
    }

    fn split_commit(&self) -> Result<(CommitInfo, &[u8]), RecordError> {
        let mut body = &self.bytes[HEADER_LEN..];
        if self.kind != Kind::Commit || body.len() < COMMIT_HEADER_LEN {
            return Err(RecordError::Body("commit header"));
        }
        let (xid, commit_lsn) = (body.get_u32(), Lsn(body.get_u64()));
        let (commit_time, tag_len) = (body.get_i64(), body.get_u16() as usize);
        let (tag, rest) = body
            .split_at_checked(tag_len)
            .ok_or(RecordError::Body("tag"))?;
        let info = CommitInfo {
            xid,
            commit_lsn,
            commit_time,
            tag: self.bytes.slice_ref(tag),
        };
        Ok((info, rest))
    }

    /// The frames of a part or commit, in order; other kinds have none.
    pub fn frames(&self) -> Frames<'_> {
        let rest = match self.kind {
            Kind::Part => Ok(&self.bytes[HEADER_LEN..]),
            Kind::Commit => self.split_commit().map(|(_, rest)| rest),
            _ => Ok(&[][..]),
        };
        Frames { rest }
    }
}

/// Iterator over a record's frames; it ends after an error.
pub struct Frames<'a> {
    rest: Result<&'a [u8], RecordError>,
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = match &mut self.rest {
            Ok([]) => return None,
            Ok(rest) => rest,
            Err(error) => {
                let error = error.clone();
                self.rest = Ok(&[]);
                return Some(Err(error));
            }
        };
        let frame = take_frame(rest);
        if frame.is_err() {
            *rest = &[];
        }
        Some(frame)
    }
}

fn take_frame<'a>(rest: &mut &'a [u8]) -> Result<Frame<'a>, RecordError> {
    if rest.len() < FRAME_HEADER_LEN {
        return Err(RecordError::Body("frame header"));
    }
    let (len, lsn) = (rest.get_u32() as usize, Lsn(rest.get_u64()));
    match rest.split_at_checked(len) {
        Some((payload, after)) if len > 0 => {
            *rest = after;
            Ok(Frame { lsn, payload })
        }
        _ => Err(RecordError::Body("frame")),
    }
}

/// Appends one frame to a body under construction.
pub fn put_frame(body: &mut BytesMut, lsn: Lsn, payload: &[u8]) {
    body.put_u32(payload.len() as u32);
    body.put_u64(lsn.0);
    body.put_slice(payload);
}

/// Builds a commit record; `end` is the transaction's end LSN. A tag too long for its
/// field is left out; the extension writes none.
pub fn commit_record(info: &CommitInfo, end: Lsn, frames: &[u8]) -> Record {
    let tag = if info.tag.len() > u16::MAX as usize {
        &[][..]
    } else {
        &info.tag[..]
    };
    let mut head = BytesMut::with_capacity(COMMIT_HEADER_LEN + tag.len());
    head.put_u32(info.xid);
    head.put_u64(info.commit_lsn.0);
    head.put_i64(info.commit_time);
    head.put_u16(tag.len() as u16);
    head.put_slice(tag);
    Record::of_two(Kind::Commit, end, &head, frames)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (CommitInfo, Vec<Frame<'static>>, Record) {
        let info = CommitInfo {
            xid: 731,
            commit_lsn: Lsn(0x500),
            commit_time: -5,
            tag: Bytes::from_static(b"{\"tag\":\"731\"}"),
        };
        let frames: Vec<Frame> = [&b"B1"[..], b"I22", b"C333"]
            .iter()
            .enumerate()
            .map(|(i, p)| Frame {
                lsn: Lsn(0x100 + i as u64),
                payload: p,
            })
            .collect();
        let mut body = BytesMut::new();
        for frame in &frames {
            put_frame(&mut body, frame.lsn, frame.payload);
        }
        let record = commit_record(&info, Lsn(0x530), &body);
        (info, frames, record)
    }

    #[test]
    fn commit_round_trips() {
        let (info, frames, record) = sample();
        let read = Record::take(&mut record.bytes.clone()).unwrap();
        assert_eq!((read.kind, read.lsn), (Kind::Commit, Lsn(0x530)));
        assert_eq!(read.commit().unwrap(), info);
        assert_eq!(
            read.frames().collect::<Result<Vec<_>, _>>().unwrap(),
            frames
        );
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let (_, _, record) = sample();
        for at in 0..record.bytes.len() {
            for bit in 0..8 {
                let mut bytes = record.bytes.to_vec();
                bytes[at] ^= 1 << bit;
                assert!(
                    Record::take(&mut bytes.into()).is_err(),
                    "byte {at} bit {bit}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 1u8..6) {
            let _ = Record::take(&mut Bytes::from(bytes.clone()));
            let record = Record::new(Kind::from_byte(kind).unwrap(), Lsn(9), &bytes);
            let read = Record::take(&mut record.bytes.clone()).unwrap();
            let _ = read.commit();
            let _ = read.top_time();
            for frame in read.frames().take(1000) { let _ = frame; }
        }
    }
}
