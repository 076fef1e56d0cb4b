//! Turns the stream of a PostgreSQL walsender into records.
//!
//! Guarantee: a record sequence Part* Commit holds exactly the messages between
//! one Begin and its Commit, in order; definitions (Relation, Type) stand before
//! the first record that uses them. A transaction that its tag keeps away from
//! this domain leaves nothing but its position.

use bytes::{Bytes, BytesMut};

use crate::lsn::Lsn;
use crate::pgoutput::{self, DecodeError, Message};
use crate::queue::{QueueError, Writer};
use crate::record::{CommitInfo, Kind, Record, commit_record, put_frame};
use crate::wire::empty;

/// A transaction goes on in another record beyond as many bytes of frames.
const PART_BYTES: usize = 256 << 10;
/// Prefix of the message that tags a transaction.
const TAG_PREFIX: &str = "terrace";

/// Why the stream cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// The upstream sent what is not pgoutput.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The upstream sent messages in an order that the protocol does not have.
    #[error("unexpected order of pgoutput messages: {0}")]
    Order(&'static str),
    /// The queue did not take the record.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

struct Open {
    xid: u32,
    tag: Bytes,
}

/// Collects the messages of one session.
pub struct Assembler {
    /// Domain of this node; `None` takes everything (a bridge of the top).
    domain: Option<String>,
    open: Option<Open>,
    /// Of the open transaction, since the last part.
    frames: BytesMut,
}

impl Assembler {
    /// For a new session with the upstream.
    pub fn new(domain: Option<String>) -> Assembler {
        Assembler {
            domain,
            open: None,
            frames: BytesMut::new(),
        }
    }

    /// Whether a transaction has begun that is not committed yet.
    pub fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Takes one message with the LSN of its frame; gives the end and time of
    /// the transaction that it completes.
    pub fn push(
        &mut self,
        lsn: Lsn,
        payload: &Bytes,
        writer: &mut Writer,
    ) -> Result<Option<(Lsn, i64)>, AssembleError> {
        match pgoutput::decode(payload)? {
            Message::Begin { xid, .. } => {
                if self.open.is_some() {
                    return Err(AssembleError::Order("begin inside a transaction"));
                }
                self.open = Some(Open {
                    xid,
                    tag: Bytes::new(),
                });
                self.clear();
                self.add(lsn, payload, writer)?;
            }
            Message::Relation(_) | Message::Type { .. } => {
                // What came before was of the old definition.
                self.end_part(writer)?;
                writer.append(&Record::new(Kind::Schema, Lsn::ZERO, payload))?;
            }
            Message::Origin { .. } => {}
            Message::Logical {
                transactional: false,
                ..
            } => {}
            Message::Logical {
                prefix: TAG_PREFIX,
                content,
                ..
            } => {
                let tag = payload.slice_ref(content);
                self.transaction()?.tag = tag;
                self.add(lsn, payload, writer)?;
            }
            Message::Commit {
                commit_lsn,
                end_lsn,
                commit_time,
            } => {
                self.add(lsn, payload, writer)?;
                self.commit(commit_lsn, end_lsn, commit_time, writer)?;
                return Ok(Some((end_lsn, commit_time)));
            }
            _ => self.add(lsn, payload, writer)?,
        }
        Ok(None)
    }

    /// A row of hundreds of MiB does not come often: its room is given back.
    fn clear(&mut self) {
        empty(&mut self.frames, 4 * PART_BYTES);
    }

    fn transaction(&mut self) -> Result<&mut Open, AssembleError> {
        self.open
            .as_mut()
            .ok_or(AssembleError::Order("change outside a transaction"))
    }

    fn add(&mut self, lsn: Lsn, payload: &[u8], writer: &mut Writer) -> Result<(), AssembleError> {
        self.transaction()?;
        put_frame(&mut self.frames, lsn, payload);
        if self.frames.len() >= PART_BYTES && payload.first() != Some(&b'C') {
            self.end_part(writer)?;
        }
        Ok(())
    }

    fn end_part(&mut self, writer: &mut Writer) -> Result<(), AssembleError> {
        if self.open.is_some() && !self.frames.is_empty() {
            writer.append(&Record::new(Kind::Part, Lsn::ZERO, &self.frames))?;
            self.clear();
        }
        Ok(())
    }

    fn commit(
        &mut self,
        commit_lsn: Lsn,
        end: Lsn,
        commit_time: i64,
        writer: &mut Writer,
    ) -> Result<(), AssembleError> {
        let Some(Open { xid, tag }) = self.open.take() else {
            return Err(AssembleError::Order("commit outside a transaction"));
        };
        if passes(&tag, self.domain.as_deref()) {
            let info = CommitInfo {
                xid,
                commit_lsn,
                commit_time,
                tag,
            };
            writer.append(&commit_record(&info, end, &self.frames))?;
        } else {
            writer.cut_data()?;
            writer.append(&Record::watermark(end, commit_time))?;
        }
        Ok(())
    }
}

/// Whether a transaction with this tag is for `domain`. The top lists every
/// domain that needs it, those on the way included.
pub fn passes(tag: &[u8], domain: Option<&str>) -> bool {
    if tag.is_empty() {
        return true;
    }
    // A tag that does not parse is not ours to interpret: pass it on.
    let Ok(tag) = serde_json::from_slice::<serde_json::Value>(tag) else {
        return true;
    };
    if tag["sync"] == false {
        return false;
    }
    match (tag["domains"].as_array(), domain) {
        (Some(domains), Some(domain)) => domains.iter().any(|name| name == domain),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Identity;
    use crate::queue::Queue;
    use bytes::BufMut;

    fn message(kind: u8, fields: &[u64]) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_u8(kind);
        match kind {
            b'B' => {
                bytes.put_u64(fields[0]);
                bytes.put_i64(0);
                bytes.put_u32(9);
            }
            b'C' => {
                bytes.put_u8(0);
                bytes.put_u64(fields[0]);
                bytes.put_u64(fields[1]);
                bytes.put_i64(0);
            }
            b'I' => {
                bytes.put_u32(1);
                bytes.put_slice(b"N\0\x01t");
                bytes.put_u32(fields[0] as u32);
                bytes.put_bytes(b'x', fields[0] as usize);
            }
            _ => bytes.put_slice(b"\0\0\0\x01\0t\0d\0\0"),
        }
        bytes.freeze()
    }

    fn logical(prefix: &str, content: &str) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_slice(b"M\x01");
        bytes.put_u64(0);
        bytes.put_slice(prefix.as_bytes());
        bytes.put_u8(0);
        bytes.put_u32(content.len() as u32);
        bytes.put_slice(content.as_bytes());
        bytes.freeze()
    }

    fn record(messages: &[Bytes]) -> Vec<(Kind, u64)> {
        let dir = tempfile::TempDir::new().unwrap();
        let identity: Identity = "1/1/terrace/1/app".parse().unwrap();
        let (queue, mut writer) = Queue::create(dir.path(), identity, Lsn(1)).unwrap();
        let mut assembler = Assembler::new(Some("region".into()));
        for message in messages {
            assembler.push(Lsn(5), message, &mut writer).unwrap();
        }
        writer.publish().unwrap();
        let mut reader = queue.reader(Lsn(1)).unwrap();
        std::iter::from_fn(|| reader.try_next().unwrap())
            .map(|r| (r.kind, r.lsn.0))
            .collect()
    }

    #[test]
    fn a_transaction_becomes_one_record_after_its_definitions() {
        let stream = [
            message(b'B', &[90]),
            message(b'R', &[]),
            message(b'I', &[3]),
            logical("terrace", "{}"),
            message(b'C', &[90, 100]),
        ];
        // The definition ends the part that holds the begin.
        assert_eq!(
            record(&stream),
            [(Kind::Part, 0), (Kind::Schema, 0), (Kind::Commit, 100)]
        );
    }

    #[test]
    fn a_large_transaction_is_cut_into_parts() {
        let big = PART_BYTES as u64;
        let stream = [
            message(b'B', &[90]),
            message(b'I', &[big]),
            message(b'I', &[big]),
            message(b'C', &[90, 100]),
        ];
        assert_eq!(
            record(&stream),
            [(Kind::Part, 0), (Kind::Part, 0), (Kind::Commit, 100)]
        );
    }

    #[test]
    fn what_is_not_for_us_leaves_its_position() {
        for tag in ["{\"sync\":false}", "{\"domains\":[\"branch\"]}"] {
            let stream = [
                message(b'B', &[90]),
                message(b'I', &[2 * PART_BYTES as u64]),
                logical("terrace", tag),
                message(b'C', &[90, 100]),
            ];
            assert_eq!(record(&stream), [(Kind::Watermark, 100)], "{tag}");
        }
        assert!(passes(b"{\"domains\":[\"region\"]}", Some("region")));
        assert!(passes(b"{\"domains\":[\"region\"]}", None));
    }
}
