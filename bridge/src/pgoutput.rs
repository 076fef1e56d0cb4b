//! Decoder of pgoutput messages, protocol 1 (PostgreSQL documentation, chapter
//! "Logical Replication Message Formats"; `proto.c`). It borrows and does no I/O.
//!
//! Guarantee: a message decodes whole or not at all. An unknown kind or a byte
//! left over is an error: a change that is skipped is lost data.

use crate::lsn::Lsn;

/// Why bytes are not a pgoutput message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends early.
    #[error("pgoutput message is cut short")]
    Short,
    /// The first byte names no message of protocol 1.
    #[error("unknown pgoutput message kind 0x{0:02x}")]
    UnknownKind(u8),
    /// A field holds what it must not.
    #[error("malformed pgoutput message: {0}")]
    Malformed(&'static str),
    /// More bytes than the message has.
    #[error("{0} bytes left over after a pgoutput message")]
    TrailingBytes(usize),
}

type Result<T> = std::result::Result<T, DecodeError>;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "field names are those of the protocol's documentation"
)]
pub enum Message<'a> {
    Begin {
        final_lsn: Lsn,
        commit_time: i64,
        xid: u32,
    },
    Commit {
        commit_lsn: Lsn,
        end_lsn: Lsn,
        commit_time: i64,
    },
    Relation(Relation<'a>),
    Type {
        oid: u32,
        namespace: &'a str,
        name: &'a str,
    },
    Origin {
        lsn: Lsn,
        name: &'a str,
    },
    Insert {
        relid: u32,
        new: Tuple<'a>,
    },
    Update {
        relid: u32,
        old: Option<(OldKind, Tuple<'a>)>,
        new: Tuple<'a>,
    },
    Delete {
        relid: u32,
        old: (OldKind, Tuple<'a>),
    },
    Truncate {
        options: u8,
        relids: Vec<u32>,
    },
    Logical {
        transactional: bool,
        lsn: Lsn,
        prefix: &'a str,
        content: &'a [u8],
    },
}

impl Message<'_> {
    /// The table that a row is changed of; none where it is another message.
    pub fn changes(&self) -> Option<u32> {
        match self {
            Message::Insert { relid, .. }
            | Message::Update { relid, .. }
            | Message::Delete { relid, .. } => Some(*relid),
            _ => None,
        }
    }
}

/// Option bit of a truncate: CASCADE was given at the top.
pub const TRUNCATE_CASCADE: u8 = 1;
/// Option bit of a truncate: RESTART IDENTITY was given at the top.
pub const TRUNCATE_RESTART_IDENTITY: u8 = 2;

/// What an old tuple holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldKind {
    /// The columns of the replica identity; the others are null.
    Key,
    /// Every column (REPLICA IDENTITY FULL).
    Full,
}

/// Definition of a table, as of the transaction that follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// OID at the top.
    pub relid: u32,
    /// Schema.
    pub namespace: &'a str,
    /// Name without schema.
    pub name: &'a str,
    /// `pg_class.relreplident`: d, n, f or i.
    pub identity: u8,
    /// The published columns in order.
    pub columns: Vec<Column<'a>>,
}

/// Column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    /// Part of the replica identity.
    pub key: bool,
    /// Name.
    pub name: &'a str,
    /// Type OID at the top.
    pub type_oid: u32,
    /// Type modifier.
    pub typmod: i32,
}

/// One value of a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datum<'a> {
    /// SQL null.
    Null,
    /// A TOAST value that the update did not touch and that was not sent.
    Unchanged,
    /// The type's text form, under the session settings that the upstream link pins.
    Text(&'a [u8]),
}

/// The values of a row; checked when decoded, read on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: usize,
    bytes: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// Number of columns.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is no column.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The values in column order.
    pub fn iter(&self) -> impl Iterator<Item = Datum<'a>> + use<'a> {
        let mut read = Reader(self.bytes);
        // Decoding has walked the tuple already, so this cannot end early.
        (0..self.count).map_while(move |_| read.datum().ok())
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64> {
        self.array().map(i64::from_be_bytes)
    }

    fn lsn(&mut self) -> Result<Lsn> {
        self.array().map(u64::from_be_bytes).map(Lsn)
    }

    fn text(&mut self) -> Result<&'a str> {
        let end = self
            .0
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(DecodeError::Short)?;
        let text = self.take(end)?;
        self.u8()?;
        std::str::from_utf8(text).map_err(|_| DecodeError::Malformed("name is not UTF-8"))
    }

    fn sized(&mut self) -> Result<&'a [u8]> {
        let len = self.u32()?;
        let len = usize::try_from(len).map_err(|_| DecodeError::Malformed("length"))?;
        self.take(len)
    }

    fn datum(&mut self) -> Result<Datum<'a>> {
        match self.u8()? {
            b'n' => Ok(Datum::Null),
            b'u' => Ok(Datum::Unchanged),
            b't' => self.sized().map(Datum::Text),
            _ => Err(DecodeError::Malformed("kind of a column value")),
        }
    }

    fn tuple(&mut self) -> Result<Tuple<'a>> {
        let count = self.u16()?.into();
        let start = self.0;
        for _ in 0..count {
            self.datum()?;
        }
        Ok(Tuple {
            count,
            bytes: &start[..start.len() - self.0.len()],
        })
    }

    fn old(&mut self, kind: u8) -> Result<(OldKind, Tuple<'a>)> {
        let kind = match kind {
            b'K' => OldKind::Key,
            b'O' => OldKind::Full,
            _ => return Err(DecodeError::Malformed("kind of an old row")),
        };
        Ok((kind, self.tuple()?))
    }

    fn new_tuple(&mut self) -> Result<Tuple<'a>> {
        match self.u8()? {
            b'N' => self.tuple(),
            _ => Err(DecodeError::Malformed("kind of a new row")),
        }
    }

    fn relation(&mut self) -> Result<Relation<'a>> {
        let relid = self.u32()?;
        let (namespace, name) = (self.text()?, self.text()?);
        // An empty schema name stands for pg_catalog (logicalrep_read_namespace).
        let namespace = if namespace.is_empty() {
            "pg_catalog"
        } else {
            namespace
        };
        let (identity, count) = (self.u8()?, self.u16()?);
        let columns = (0..count).map(|_| self.column()).collect::<Result<_>>()?;
        Ok(Relation {
            relid,
            namespace,
            name,
            identity,
            columns,
        })
    }

    /// A byte of flags that has one.
    fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Malformed("flags")),
        }
    }

    fn column(&mut self) -> Result<Column<'a>> {
        Ok(Column {
            key: self.flag()?,
            name: self.text()?,
            type_oid: self.u32()?,
            typmod: self.u32()? as i32,
        })
    }

    fn update(&mut self) -> Result<Message<'a>> {
        let relid = self.u32()?;
        let old = match self.0.first() {
            Some(b'N') => None,
            _ => {
                let kind = self.u8()?;
                Some(self.old(kind)?)
            }
        };
        Ok(Message::Update {
            relid,
            old,
            new: self.new_tuple()?,
        })
    }

    fn truncate(&mut self) -> Result<Message<'a>> {
        let (count, options) = (self.u32()?, self.u8()?);
        if options & !(TRUNCATE_CASCADE | TRUNCATE_RESTART_IDENTITY) != 0 {
            return Err(DecodeError::Malformed("options of a truncate"));
        }
        if count == 0 || self.0.len() != count as usize * 4 {
            return Err(DecodeError::Malformed("number of truncated tables"));
        }
        let relids = (0..count).map(|_| self.u32()).collect::<Result<_>>()?;
        Ok(Message::Truncate { options, relids })
    }

    fn message(&mut self) -> Result<Message<'a>> {
        Ok(match self.u8()? {
            b'B' => Message::Begin {
                final_lsn: self.lsn()?,
                commit_time: self.i64()?,
                xid: self.u32()?,
            },
            b'C' => {
                if self.u8()? != 0 {
                    return Err(DecodeError::Malformed("flags of a commit"));
                }
                Message::Commit {
                    commit_lsn: self.lsn()?,
                    end_lsn: self.lsn()?,
                    commit_time: self.i64()?,
                }
            }
            b'R' => Message::Relation(self.relation()?),
            b'Y' => Message::Type {
                oid: self.u32()?,
                namespace: self.text()?,
                name: self.text()?,
            },
            b'O' => Message::Origin {
                lsn: self.lsn()?,
                name: self.text()?,
            },
            b'I' => Message::Insert {
                relid: self.u32()?,
                new: self.new_tuple()?,
            },
            b'U' => self.update()?,
            b'D' => {
                let (relid, kind) = (self.u32()?, self.u8()?);
                Message::Delete {
                    relid,
                    old: self.old(kind)?,
                }
            }
            b'T' => self.truncate()?,
            b'M' => Message::Logical {
                transactional: self.flag()?,
                lsn: self.lsn()?,
                prefix: self.text()?,
                content: self.sized()?,
            },
            kind => return Err(DecodeError::UnknownKind(kind)),
        })
    }
}

/// Columns of the row that an insert, an update or a delete is about; 0 of anything else.
pub fn columns(body: &[u8]) -> usize {
    match body {
        // Kind, relation, kind of the first tuple, its number of columns.
        [b'I' | b'U' | b'D', _, _, _, _, _, high, low, ..] => {
            u16::from_be_bytes([*high, *low]).into()
        }
        _ => 0,
    }
}

/// Decodes one whole message.
pub fn decode(body: &[u8]) -> Result<Message<'_>> {
    let mut reader = Reader(body);
    let message = reader.message()?;
    match reader.0.len() {
        0 => Ok(message),
        left => Err(DecodeError::TrailingBytes(left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text
            .bytes()
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        digits.chunks(2).map(|pair| byte(pair).unwrap()).collect()
    }

    #[test]
    fn update_with_key_and_unchanged_toast() {
        // relid 16385, old key ("1", null), new ("2", unchanged).
        let bytes = hex("55 00004001 4b 0002 74 00000001 31 6e 4e 0002 74 00000001 32 75");
        let Message::Update {
            relid,
            old: Some((OldKind::Key, old)),
            new,
        } = decode(&bytes).unwrap()
        else {
            panic!("not an update with a key");
        };
        assert_eq!(relid, 16385);
        assert_eq!(
            old.iter().collect::<Vec<_>>(),
            [Datum::Text(b"1"), Datum::Null]
        );
        assert_eq!(
            new.iter().collect::<Vec<_>>(),
            [Datum::Text(b"2"), Datum::Unchanged]
        );
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        assert_eq!(decode(b""), Err(DecodeError::Short));
        assert_eq!(decode(b"S1234"), Err(DecodeError::UnknownKind(b'S')));
        assert_eq!(decode(b"M\x01"), Err(DecodeError::Short));
        let mut begin = vec![b'B'];
        begin.extend([0; 21]);
        assert_eq!(decode(&begin), Err(DecodeError::TrailingBytes(1)));
        // A binary value, which the session never asks for.
        assert!(decode(&hex("49 00004001 4e 0001 62 00000001 31")).is_err());
        assert!(decode(&hex("54 ffffffff 00 00000001")).is_err());
        // Flags that mean what we do not know.
        assert!(decode(&hex("54 00000001 00 00000001")).is_ok());
        assert!(decode(&hex("54 00000001 04 00000001")).is_err());
        assert!(decode(&hex("4d 02 0000000000000001 00 00000000")).is_err());
        let commit = [0; 24];
        assert!(decode(&[b"C\0", &commit[..]].concat()).is_ok());
        assert!(decode(&[b"C\x01", &commit[..]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(kind in prop::sample::select(b"BCRYOIUDTM".to_vec()),
                                mut bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            bytes.insert(0, kind);
            if let Ok(Message::Insert { new, .. }) = decode(&bytes) {
                prop_assert_eq!(new.iter().count(), new.len());
            }
        }
    }
}
