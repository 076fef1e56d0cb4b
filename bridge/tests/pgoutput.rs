//! The decoder against what real servers said, and against whatever can be said.
//!
//! `streams/*.txt` are recorded by `tests/tests/scenarios/streams.rs`, which tells how.

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;
use terrace_bridge::lsn::Lsn;
use terrace_bridge::pgoutput::{Column, Datum, Message, OldKind, Relation, Tuple, columns, decode};

// ----- a message that owns what it holds, and its bytes ------------------------

type Values = Vec<Option<Option<Vec<u8>>>>;

/// [`Message`] with values of its own; `Some(None)` is null, `None` is unchanged.
#[derive(Clone, Debug, PartialEq)]
enum Said {
    Begin(u64, i64, u32),
    Commit(u64, u64, i64),
    Relation(u32, String, String, u8, Vec<(bool, String, u32, i32)>),
    Type(u32, String, String),
    Origin(u64, String),
    Insert(u32, Values),
    Update(u32, Option<(bool, Values)>, Values),
    Delete(u32, (bool, Values)),
    Truncate(u8, Vec<u32>),
    Logical(bool, u64, String, Vec<u8>),
}

fn values(tuple: &Tuple<'_>) -> Values {
    let value = |datum| match datum {
        Datum::Unchanged => None,
        Datum::Null => Some(None),
        Datum::Text(text) => Some(Some(text.to_vec())),
    };
    tuple.iter().map(value).collect()
}

fn old(old: &(OldKind, Tuple<'_>)) -> (bool, Values) {
    (old.0 == OldKind::Full, values(&old.1))
}

fn said(message: &Message<'_>) -> Said {
    match message {
        Message::Begin {
            final_lsn,
            commit_time,
            xid,
        } => Said::Begin(final_lsn.0, *commit_time, *xid),
        Message::Commit {
            commit_lsn,
            end_lsn,
            commit_time,
        } => Said::Commit(commit_lsn.0, end_lsn.0, *commit_time),
        Message::Relation(Relation {
            relid,
            namespace,
            name,
            identity,
            columns,
        }) => {
            let column = |c: &Column<'_>| (c.key, c.name.to_owned(), c.type_oid, c.typmod);
            let columns = columns.iter().map(column).collect();
            Said::Relation(
                *relid,
                (*namespace).into(),
                (*name).into(),
                *identity,
                columns,
            )
        }
        Message::Type {
            oid,
            namespace,
            name,
        } => Said::Type(*oid, (*namespace).into(), (*name).into()),
        Message::Origin { lsn, name } => Said::Origin(lsn.0, (*name).into()),
        Message::Insert { relid, new } => Said::Insert(*relid, values(new)),
        Message::Update {
            relid,
            old: before,
            new,
        } => Said::Update(*relid, before.as_ref().map(old), values(new)),
        Message::Delete { relid, old: before } => Said::Delete(*relid, old(before)),
        Message::Truncate { options, relids } => Said::Truncate(*options, relids.clone()),
        Message::Logical {
            transactional,
            lsn,
            prefix,
            content,
        } => Said::Logical(*transactional, lsn.0, (*prefix).into(), content.to_vec()),
    }
}

/// Writes a message as `proto.c` does.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn put(&mut self, bytes: impl AsRef<[u8]>) -> &mut Writer {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn name(&mut self, name: &str) -> &mut Writer {
        self.put(name).put([0])
    }

    fn sized(&mut self, bytes: &[u8]) -> &mut Writer {
        self.put((bytes.len() as u32).to_be_bytes()).put(bytes)
    }

    fn tuple(&mut self, values: &Values) -> &mut Writer {
        self.put((values.len() as u16).to_be_bytes());
        for value in values {
            match value {
                None => self.put(b"u"),
                Some(None) => self.put(b"n"),
                Some(Some(text)) => self.put(b"t").sized(text),
            };
        }
        self
    }

    fn old(&mut self, (full, values): &(bool, Values)) -> &mut Writer {
        self.put(if *full { b"O" } else { b"K" }).tuple(values)
    }
}

fn encode(said: &Said) -> Vec<u8> {
    let mut out = Writer::default();
    match said {
        Said::Begin(lsn, time, xid) => out
            .put(b"B")
            .put(lsn.to_be_bytes())
            .put(time.to_be_bytes())
            .put(xid.to_be_bytes()),
        Said::Commit(lsn, end, time) => out
            .put(b"C\0")
            .put(lsn.to_be_bytes())
            .put(end.to_be_bytes())
            .put(time.to_be_bytes()),
        Said::Relation(relid, namespace, name, identity, columns) => {
            out.put(b"R").put(relid.to_be_bytes());
            out.name(namespace).name(name).put([*identity]);
            out.put((columns.len() as u16).to_be_bytes());
            for (key, name, oid, typmod) in columns {
                out.put([u8::from(*key)]).name(name);
                out.put(oid.to_be_bytes()).put(typmod.to_be_bytes());
            }
            &mut out
        }
        Said::Type(oid, namespace, name) => out
            .put(b"Y")
            .put(oid.to_be_bytes())
            .name(namespace)
            .name(name),
        Said::Origin(lsn, name) => out.put(b"O").put(lsn.to_be_bytes()).name(name),
        Said::Insert(relid, new) => out.put(b"I").put(relid.to_be_bytes()).put(b"N").tuple(new),
        Said::Update(relid, old, new) => {
            out.put(b"U").put(relid.to_be_bytes());
            if let Some(old) = old {
                out.old(old);
            }
            out.put(b"N").tuple(new)
        }
        Said::Delete(relid, old) => out.put(b"D").put(relid.to_be_bytes()).old(old),
        Said::Truncate(options, relids) => {
            out.put(b"T").put((relids.len() as u32).to_be_bytes());
            out.put([*options]);
            for relid in relids {
                out.put(relid.to_be_bytes());
            }
            &mut out
        }
        Said::Logical(transactional, lsn, prefix, content) => out
            .put([b'M', u8::from(*transactional)])
            .put(lsn.to_be_bytes())
            .name(prefix)
            .sized(content),
    };
    out.0
}

// ----- what real servers said --------------------------------------------------

/// Of each major version that is supported.
const STREAMS: [&str; 4] = [
    include_str!("streams/postgresql-15.txt"),
    include_str!("streams/postgresql-16.txt"),
    include_str!("streams/postgresql-17.txt"),
    include_str!("streams/postgresql-18.txt"),
];

/// The messages of a recorded stream, with the LSN that each came with.
fn recorded(text: &str) -> Vec<(Lsn, Vec<u8>)> {
    let line = |line: &str| {
        let (lsn, hex) = line.split_once(' ').expect("LSN and bytes");
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16);
        let bytes = hex
            .as_bytes()
            .chunks(2)
            .map(|pair| byte(pair).expect("hex"));
        (lsn.parse().expect("an LSN"), bytes.collect())
    };
    let lines = text.lines().filter(|line| !line.is_empty());
    lines
        .filter(|line| !line.starts_with('#'))
        .map(line)
        .collect()
}

/// A stream in words, without what differs between two recordings.
#[derive(Default)]
struct Teller {
    tables: HashMap<u32, String>,
    types: HashMap<u32, String>,
    begun: Option<(u64, i64)>,
}

impl Teller {
    fn table(&self, relid: u32) -> &str {
        self.tables.get(&relid).expect("defined before it is used")
    }

    fn values(values: &Values) -> String {
        let value = |value: &Option<Option<Vec<u8>>>| match value {
            None => "unchanged".to_owned(),
            Some(None) => "null".to_owned(),
            Some(Some(text)) if text.len() > 40 => format!("{} bytes", text.len()),
            Some(Some(text)) => format!("'{}'", String::from_utf8_lossy(text)),
        };
        values.iter().map(value).collect::<Vec<_>>().join(", ")
    }

    fn old((full, values): &(bool, Values)) -> String {
        let kind = if *full { "row" } else { "key" };
        format!("{kind} {}", Teller::values(values))
    }

    fn tell(&mut self, said: &Said) -> String {
        match said {
            Said::Begin(lsn, time, xid) => {
                assert!(*xid > 0 && self.begun.replace((*lsn, *time)).is_none());
                "begin".into()
            }
            Said::Commit(lsn, end, time) => {
                assert_eq!(self.begun.take(), Some((*lsn, *time)), "as the begin said");
                assert!(end > lsn);
                "commit".into()
            }
            Said::Relation(relid, namespace, name, identity, columns) => {
                let table = format!("{namespace}.{name}");
                self.tables.insert(*relid, table.clone());
                let column = |(key, name, oid, typmod): &(bool, String, u32, i32)| {
                    let known = self.types.get(oid).cloned();
                    let of = known.unwrap_or_else(|| oid.to_string());
                    let modifier = match typmod {
                        -1 => String::new(),
                        modifier => format!("({modifier})"),
                    };
                    format!("{}{name} {of}{modifier}", if *key { "*" } else { "" })
                };
                let columns: Vec<String> = columns.iter().map(column).collect();
                let identity = char::from(*identity);
                format!("table {table} {identity}: {}", columns.join(", "))
            }
            Said::Type(oid, namespace, name) => {
                self.types.insert(*oid, name.clone());
                format!("type {namespace}.{name}")
            }
            Said::Origin(lsn, name) => format!("origin {name} {}", Lsn(*lsn)),
            Said::Insert(relid, new) => {
                format!("insert {}: {}", self.table(*relid), Teller::values(new))
            }
            Said::Update(relid, old, new) => {
                let old = old
                    .as_ref()
                    .map_or(String::new(), |old| Teller::old(old) + " -> ");
                let new = Teller::values(new);
                format!("update {}: {old}{new}", self.table(*relid))
            }
            Said::Delete(relid, old) => {
                format!("delete {}: {}", self.table(*relid), Teller::old(old))
            }
            Said::Truncate(options, relids) => {
                let tables: Vec<&str> = relids.iter().map(|relid| self.table(*relid)).collect();
                format!("truncate {options}: {}", tables.join(", "))
            }
            Said::Logical(transactional, _, prefix, content) => {
                let kind = if *transactional { "inside" } else { "outside" };
                let content = content.escape_ascii();
                format!("message {kind} {prefix}: {content}")
            }
        }
    }
}

const TOLD: &str = r#"
begin
type public.mood
table public.item d: *id 23, name 25, price 1700(655366), feels mood, long 25
insert public.item: '1', 'tea', '1.50', 'calm', 2100 bytes
insert public.item: '2', null, null, null, ''
commit
begin
type public.mood
table public.item d: *id 23, name 25, price 1700(655366), feels mood, long 25
update public.item: '1', 'green tea', '1.50', 'calm', unchanged
commit
begin
type public.mood
table public.item d: *id 23, name 25, price 1700(655366), feels mood, long 25
update public.item: key '1', null, null, null, null -> '3', 'green tea', '1.50', 'cross', unchanged
commit
begin
type public.mood
table public.item d: *id 23, name 25, price 1700(655366), feels mood, long 25
delete public.item: key '2', null, null, null, null
commit
begin
table public.whole f: *a 23, *b 25
insert public.whole: '1', 'it's \ "é"'
insert public.whole: null, null
commit
begin
table public.whole f: *a 23, *b 25
update public.whole: row '1', 'it's \ "é"' -> '1', 'new'
commit
begin
table public.whole f: *a 23, *b 25
delete public.whole: row null, null
commit
begin
table Übung.a "b i: *x 23, y 1043(13), z 23
insert Übung.a "b: '1', 'one', '10'
commit
begin
table Übung.a "b i: *x 23, y 1043(13), z 23
update Übung.a "b: '1', 'one', '11'
commit
begin
table Übung.a "b i: *x 23, y 1043(13), z 23
update Übung.a "b: key '1', null, null -> '2', 'one', '11'
commit
begin
table Übung.a "b i: *x 23, y 1043(13), z 23
delete Übung.a "b: key '2', null, null
commit
begin
table public.log n: at 1184, ok 16, bytes 17, list 1007, doc 3802, ratio 701
insert public.log: '2024-02-29 10:00:00.25+00', 't', '\x00ff', '{1,NULL}', '{"a": [1]}', '0.1'
commit
begin
table public.whole f: *a 23, *b 25
insert public.whole: '8', 'kept'
commit
begin
table public.whole f: *a 23, *b 25, *c 23
insert public.whole: '9', 'wider', null
commit
begin
table public.log n: at 1184, ok 16, bytes 17, list 1007, doc 3802, ratio 701
truncate 0: public.log
commit
begin
type public.mood
table public.item d: *id 23, name 25, price 1700(655366), feels mood, long 25
table public.child d: item 23
truncate 1: public.item, public.child
commit
begin
table public.whole f: *a 23, *b 25, *c 23
table public.log n: at 1184, ok 16, bytes 17, list 1007, doc 3802, ratio 701
truncate 2: public.whole, public.log
commit
begin
message inside terrace: {\"tag\": \"7\"}
table public.whole f: *a 23, *b 25, *c 23
insert public.whole: '10', 'tagged', '1'
commit
message outside other: \xc3\xa9\x00\xff
begin
origin elsewhere 1/2
table public.whole f: *a 23, *b 25, *c 23
insert public.whole: '11', 'from elsewhere', '1'
commit
"#;

#[test]
fn what_postgresql_says_is_understood() {
    STREAMS
        .map(recorded)
        .iter()
        .for_each(|stream| understand(stream));
}

/// Every major version tells the same story.
fn understand(stream: &[(Lsn, Vec<u8>)]) {
    let mut teller = Teller::default();
    let mut told = Vec::new();
    for (_, bytes) in stream {
        let said = said(&decode(bytes).expect("a message"));
        assert_eq!(&encode(&said), bytes, "nothing is left out: {said:?}");
        told.push(teller.tell(&said));
    }
    let expected: Vec<&str> = TOLD.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(told, expected);
    let mut kinds: Vec<u8> = stream.iter().map(|(_, bytes)| bytes[0]).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds, b"BCDIMORTUY", "every kind of protocol 1");
}

#[test]
fn positions_of_a_stream_never_go_back() {
    for stream in STREAMS.map(recorded) {
        let mut end = Lsn::ZERO;
        for (lsn, bytes) in &stream {
            if let Message::Commit { end_lsn, .. } = decode(bytes).expect("a message") {
                assert_eq!(*lsn, end_lsn, "a commit comes with its end");
                assert!(end_lsn > end);
                end = end_lsn;
            }
        }
    }
}

#[test]
fn a_recorded_message_that_is_cut_or_goes_on_is_an_error() {
    for (_, bytes) in STREAMS.iter().flat_map(|text| recorded(text)) {
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len} of {bytes:02x?}");
        }
        assert!(decode(&[&bytes[..], b"\0"].concat()).is_err());
    }
}

// ----- whatever can be said ----------------------------------------------------

fn any_values() -> impl Strategy<Value = Values> {
    let text = vec(any::<u8>(), 0..30);
    vec(
        prop_oneof![
            Just(None),
            Just(Some(None)),
            text.prop_map(|t| Some(Some(t)))
        ],
        0..6,
    )
}

fn any_name() -> impl Strategy<Value = String> {
    "[^\0]{1,12}"
}

fn any_old() -> impl Strategy<Value = (bool, Values)> {
    (any::<bool>(), any_values())
}

fn any_message() -> impl Strategy<Value = Said> {
    let column = (any::<bool>(), any_name(), any::<u32>(), any::<i32>());
    prop_oneof![
        any::<(u64, i64, u32)>().prop_map(|(a, b, c)| Said::Begin(a, b, c)),
        any::<(u64, u64, i64)>().prop_map(|(a, b, c)| Said::Commit(a, b, c)),
        (
            any::<u32>(),
            any_name(),
            any_name(),
            any::<u8>(),
            vec(column, 0..5)
        )
            .prop_map(|(a, b, c, d, e)| Said::Relation(a, b, c, d, e)),
        (any::<u32>(), any_name(), any_name()).prop_map(|(a, b, c)| Said::Type(a, b, c)),
        (any::<u64>(), any_name()).prop_map(|(a, b)| Said::Origin(a, b)),
        (any::<u32>(), any_values()).prop_map(|(a, b)| Said::Insert(a, b)),
        (any::<u32>(), proptest::option::of(any_old()), any_values())
            .prop_map(|(a, b, c)| Said::Update(a, b, c)),
        (any::<u32>(), any_old()).prop_map(|(a, b)| Said::Delete(a, b)),
        (0..4u8, vec(any::<u32>(), 1..5)).prop_map(|(a, b)| Said::Truncate(a, b)),
        (
            any::<bool>(),
            any::<u64>(),
            any_name(),
            vec(any::<u8>(), 0..40)
        )
            .prop_map(|(a, b, c, d)| Said::Logical(a, b, c, d)),
    ]
}

proptest! {
    #[test]
    fn what_is_said_is_understood(message in any_message()) {
        let bytes = encode(&message);
        prop_assert_eq!(said(&decode(&bytes).unwrap()), message.clone());
        let row = match message {
            Said::Insert(_, row) | Said::Update(_, None, row) => row.len(),
            Said::Update(_, Some((_, row)), _) | Said::Delete(_, (_, row)) => row.len(),
            _ => 0,
        };
        prop_assert_eq!(columns(&bytes), row);
    }

    #[test]
    fn a_message_that_is_cut_is_an_error(message in any_message()) {
        let bytes = encode(&message);
        for len in 0..bytes.len() {
            prop_assert!(decode(&bytes[..len]).is_err(), "{} bytes of {}", len, bytes.len());
        }
    }

    #[test]
    fn a_message_that_goes_on_is_an_error(message in any_message(), more in vec(any::<u8>(), 1..9)) {
        let bytes = [encode(&message), more].concat();
        prop_assert!(decode(&bytes).is_err());
    }
}
