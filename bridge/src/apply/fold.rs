//! The net effect of many transactions on each row, and the few statements that
//! bring it about.
//!
//! Guarantee: after the statements the rows of the top are what they would be had every
//! change been applied in order; or one of them fails, or touches another number of rows
//! than it says, and everything is to be rolled back and applied in order.
//!
//! Why the order may change: a row is known by its primary key ([`Shape`]), so changes
//! of different rows meet in other constraints at most, and those do not change what is
//! written, but refuse it; a table without a primary key is only added to. Of one row
//! only the last state counts. Rows are deleted before
//! others are updated and inserted, so that a key, or another value that must be unique, is
//! free when it is taken anew. One that goes from one updated row to another may be refused. A row of
//! this server alone is in nobody's way here if it is in the way of a value that is soon another one.

mod binary;
mod write;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::relation::{Equality, Input};
use crate::pgoutput::{Datum, Message, OldKind, Tuple};
pub use write::{Data, Statement};

/// A table that can be changed set-wise.
#[derive(Debug, PartialEq, Eq)]
pub struct Shape {
    /// Qualified and quoted.
    pub table: String,
    /// Its OID here.
    pub oid: String,
    /// In the order of the stream.
    pub columns: Vec<ShapeColumn>,
    /// Which of them are the primary key, here and at the top.
    pub keys: Vec<usize>,
    /// As [`Relation::local_since`](super::relation::Relation::local_since): such rows are to be noticed.
    pub local_since: Option<String>,
    /// Other constraints than the primary key hold rows apart here.
    pub is_constrained: bool,
    /// No column here is written to but these.
    pub whole: bool,
}

/// Column of a [`Shape`].
#[derive(Debug, PartialEq, Eq)]
pub struct ShapeColumn {
    /// Quoted.
    pub name: String,
    /// How values of it are read.
    pub input: Input,
    /// Generated here, so that it is not written.
    pub generated: bool,
    /// How a row is found by it, of a key.
    pub equality: Option<Equality>,
}

/// The change cannot be folded: a row is not as it must be, or the message is of
/// another kind. What has been folded before it is still whole.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFoldable;

/// State of a row after the changes so far, against that before the batch. Its values
/// stand in [`Table::cells`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Was not there.
    Inserted,
    /// Was there, under this key.
    Updated,
    /// Was there and is gone; the values are its key.
    Deleted,
    /// Was there, was deleted, and another is there under its key.
    Replaced,
    /// Was not there and is not; the values are its key.
    Gone,
}

/// Changes of one table; the values stay where they were read, in the records.
struct Table<'a> {
    shape: Arc<Shape>,
    states: Vec<State>,
    /// As many a row as there are columns.
    cells: Vec<Datum<'a>>,
    /// Rows by the hash of their key.
    index: HashTable<(u64, usize)>,
    hasher: DefaultHashBuilder,
}

/// Collects changes.
#[derive(Default)]
pub struct Fold<'a> {
    tables: BTreeMap<u32, Table<'a>>,
    /// Tables all of whose changes go in order, before or after what is folded.
    left_out: BTreeSet<u32>,
    /// The row at hand.
    new: Vec<Datum<'a>>,
    old: Vec<Datum<'a>>,
}

impl<'a> Fold<'a> {
    /// Takes one insert, update or delete of a table.
    pub fn add(
        &mut self,
        relid: u32,
        shape: &Arc<Shape>,
        message: &Message<'a>,
    ) -> Result<(), NotFoldable> {
        if self.left_out.contains(&relid) {
            return Err(NotFoldable);
        }
        let table = self
            .tables
            .entry(relid)
            .or_insert_with(|| Table::new(shape));
        match message {
            Message::Insert { new, .. } => {
                read_row(shape, *new, &mut self.new)?;
                table.insert(&self.new)
            }
            Message::Update { old, new, .. } => {
                read_row(shape, *new, &mut self.new)?;
                match old {
                    None => table.update(&mut self.new),
                    Some((OldKind::Key, old)) => {
                        read_row(shape, *old, &mut self.old)?;
                        table.update_key(&self.old, &mut self.new)
                    }
                    Some((OldKind::Full, _)) => Err(NotFoldable),
                }
            }
            Message::Delete {
                old: (OldKind::Key, old),
                ..
            } => {
                read_row(shape, *old, &mut self.old)?;
                table.delete(&self.old)
            }
            _ => Err(NotFoldable),
        }
    }

    /// Leaves out all changes of a table: those so far, and those to come.
    pub fn leave_out(&mut self, relid: u32) {
        self.tables.remove(&relid);
        self.left_out.insert(relid);
    }

    /// What has been left out.
    pub fn left_out(&self) -> impl Iterator<Item = u32> {
        self.left_out.iter().copied()
    }

    /// Whether all has been left out.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// What the statements are made for.
    pub fn shapes(&self) -> impl Iterator<Item = Arc<Shape>> {
        self.tables.values().map(|table| Arc::clone(&table.shape))
    }

    /// Deletes, updates and inserts: tables of the top may be one and the same here, and a
    /// row go from one to the other.
    pub fn statements(&self) -> Vec<(Arc<Shape>, Statement)> {
        let of_table = |table: &Table<'_>| {
            let shape = Arc::clone(&table.shape);
            let statements = table.statements().into_iter();
            statements.map(move |(phase, statement)| (phase, Arc::clone(&shape), statement))
        };
        let mut statements: Vec<_> = self.tables.values().flat_map(of_table).collect();
        statements.sort_by_key(|(phase, ..)| *phase);
        let statements = statements.into_iter();
        statements
            .map(|(_, shape, statement)| (shape, statement))
            .collect()
    }
}

fn read_row<'a>(
    shape: &Shape,
    tuple: Tuple<'a>,
    row: &mut Vec<Datum<'a>>,
) -> Result<(), NotFoldable> {
    if tuple.len() != shape.columns.len() {
        return Err(NotFoldable);
    }
    row.clear();
    row.extend(tuple.iter());
    Ok(())
}

/// Fills what the newer state says nothing of from the older one.
fn fill<'a>(newer: &mut [Datum<'a>], older: &[Datum<'a>]) {
    for (new, old) in newer.iter_mut().zip(older) {
        if *new == Datum::Unchanged {
            *new = *old;
        }
    }
}

impl<'a> Table<'a> {
    fn new(shape: &Arc<Shape>) -> Table<'a> {
        Table {
            shape: Arc::clone(shape),
            states: Vec::new(),
            cells: Vec::new(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }

    fn row(&self, at: usize) -> &[Datum<'a>] {
        let width = self.shape.columns.len();
        &self.cells[at * width..(at + 1) * width]
    }

    fn row_mut(&mut self, at: usize) -> &mut [Datum<'a>] {
        let width = self.shape.columns.len();
        &mut self.cells[at * width..(at + 1) * width]
    }

    /// Without a key rows can only be added.
    fn is_keyless(&self) -> bool {
        self.shape.keys.is_empty()
    }

    fn hash(&self, row: &[Datum<'a>]) -> Result<u64, NotFoldable> {
        let mut hasher = self.hasher.build_hasher();
        for column in &self.shape.keys {
            match row[*column] {
                Datum::Text(text) => text.hash(&mut hasher),
                Datum::Null | Datum::Unchanged => return Err(NotFoldable),
            }
        }
        Ok(hasher.finish())
    }

    /// Place of the row with this key, if it has been met, and the key's hash.
    fn find(&self, row: &[Datum<'a>]) -> Result<(Option<usize>, u64), NotFoldable> {
        if self.is_keyless() {
            return Err(NotFoldable);
        }
        let hash = self.hash(row)?;
        let found = self.index.find(hash, |(_, at)| {
            let known = self.row(*at);
            self.shape.keys.iter().all(|key| known[*key] == row[*key])
        });
        Ok((found.map(|(_, at)| *at), hash))
    }

    fn put(&mut self, hash: u64, row: &[Datum<'a>], state: State) {
        let at = self.push(row, state);
        self.index
            .insert_unique(hash, (hash, at), |(hash, _)| *hash);
    }

    fn push(&mut self, row: &[Datum<'a>], state: State) -> usize {
        self.states.push(state);
        self.cells.extend_from_slice(row);
        self.states.len() - 1
    }

    fn insert(&mut self, new: &[Datum<'a>]) -> Result<(), NotFoldable> {
        if new.contains(&Datum::Unchanged) {
            return Err(NotFoldable);
        }
        if self.is_keyless() {
            self.push(new, State::Inserted);
            return Ok(());
        }
        let (found, hash) = self.find(new)?;
        let Some(at) = found else {
            self.put(hash, new, State::Inserted);
            return Ok(());
        };
        self.states[at] = match self.states[at] {
            State::Gone => State::Inserted,
            State::Deleted => State::Replaced,
            State::Inserted | State::Updated | State::Replaced => return Err(NotFoldable),
        };
        self.row_mut(at).copy_from_slice(new);
        Ok(())
    }

    fn update(&mut self, new: &mut [Datum<'a>]) -> Result<(), NotFoldable> {
        let (found, hash) = self.find(new)?;
        let Some(at) = found else {
            self.put(hash, new, State::Updated);
            return Ok(());
        };
        match self.states[at] {
            State::Inserted | State::Updated | State::Replaced => {
                fill(new, self.row(at));
                self.row_mut(at).copy_from_slice(new);
                Ok(())
            }
            State::Deleted | State::Gone => Err(NotFoldable),
        }
    }

    /// An old key is sent when it changes, or when it is stored out of line.
    fn update_key(&mut self, old: &[Datum<'a>], new: &mut [Datum<'a>]) -> Result<(), NotFoldable> {
        for key in &self.shape.keys {
            fill(&mut new[*key..=*key], &old[*key..=*key]);
        }
        if self.shape.keys.iter().all(|key| old[*key] == new[*key]) {
            return self.update(new);
        }
        // Another key is another row, which must be known whole; what the top does not know
        // of stays with the row only in order.
        if !self.shape.whole {
            return Err(NotFoldable);
        }
        if let (Some(at), _) = self.find(old)?
            && matches!(
                self.states[at],
                State::Inserted | State::Updated | State::Replaced
            )
        {
            fill(new, self.row(at));
        }
        if new.contains(&Datum::Unchanged) {
            return Err(NotFoldable);
        }
        self.delete(old)?;
        self.insert(new)
    }

    fn delete(&mut self, old: &[Datum<'a>]) -> Result<(), NotFoldable> {
        let (found, hash) = self.find(old)?;
        let Some(at) = found else {
            self.put(hash, old, State::Deleted);
            return Ok(());
        };
        self.states[at] = match self.states[at] {
            State::Inserted => State::Gone,
            State::Updated | State::Replaced => State::Deleted,
            State::Deleted | State::Gone => return Err(NotFoldable),
        };
        self.row_mut(at).copy_from_slice(old);
        Ok(())
    }

    /// Order in which neighbours in an index of numbers or of words come together.
    fn order(&self, a: &[Datum<'a>], b: &[Datum<'a>]) -> Ordering {
        let size = |datum: Datum<'a>| match datum {
            Datum::Text(text) => (text.len(), text),
            Datum::Null | Datum::Unchanged => (0, &[][..]),
        };
        let keys = self.shape.keys.iter();
        keys.map(|key| size(a[*key]).cmp(&size(b[*key])))
            .find(|order| order.is_ne())
            .unwrap_or(Ordering::Equal)
    }

    fn statements(&self) -> Vec<(Phase, Statement)> {
        let (mut gone, mut new, mut never) = (Vec::new(), Vec::new(), Vec::new());
        let mut changed: BTreeMap<Vec<bool>, Vec<&[Datum<'a>]>> = BTreeMap::new();
        let mut sent = Vec::new();
        for (at, state) in self.states.iter().enumerate() {
            let row = self.row(at);
            match state {
                State::Gone => never.push(row),
                State::Inserted => new.push(row),
                State::Deleted => gone.push(row),
                State::Replaced => {
                    gone.push(row);
                    new.push(row);
                }
                State::Updated => {
                    sent.clear();
                    sent.extend(row.iter().map(|datum| *datum != Datum::Unchanged));
                    match changed.get_mut(&sent) {
                        Some(rows) => rows.push(row),
                        None => drop(changed.insert(sent.clone(), vec![row])),
                    }
                }
            }
        }
        for rows in changed
            .values_mut()
            .chain([&mut gone, &mut new, &mut never])
        {
            // Stable: what has no key keeps the order in which it came.
            rows.sort_by(|a, b| self.order(a, b));
        }
        let mut statements = Vec::new();
        let mut add = |phase, statement: Option<Statement>| {
            statements.extend(statement.map(|statement| (phase, statement)));
        };
        add(Phase::Delete, self.shape.delete(&gone));
        add(Phase::Delete, self.shape.miss(&never));
        for (sent, rows) in changed {
            add(Phase::Update, self.shape.update(&sent, &rows));
        }
        add(Phase::Insert, self.shape.insert(&new));
        statements
    }
}

/// In this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Delete,
    Update,
    Insert,
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};

    use super::*;

    fn shape(whole: bool) -> Arc<Shape> {
        let column = |name: &str| ShapeColumn {
            name: name.into(),
            input: Input {
                type_name: "integer".into(),
                plain: true,
            },
            generated: false,
            equality: None,
        };
        Arc::new(Shape {
            table: "t".into(),
            oid: "1".into(),
            columns: vec![column("id"), column("v")],
            keys: vec![0],
            local_since: None,
            is_constrained: false,
            whole,
        })
    }

    fn message(kind: u8, parts: &[(u8, [&str; 2])]) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(kind);
        out.put_u32(7);
        for (part, values) in parts {
            out.put_u8(*part);
            out.put_u16(2);
            for value in values {
                match *value {
                    "-" => out.put_u8(b'n'),
                    "=" => out.put_u8(b'u'),
                    text => {
                        out.put_u8(b't');
                        out.put_u32(text.len() as u32);
                        out.put_slice(text.as_bytes());
                    }
                }
            }
        }
        out.freeze()
    }

    fn fold(messages: &[Bytes]) -> Result<Vec<(String, u64)>, NotFoldable> {
        fold_on(&shape(true), messages)
    }

    fn fold_on(shape: &Arc<Shape>, messages: &[Bytes]) -> Result<Vec<(String, u64)>, NotFoldable> {
        let mut fold = Fold::default();
        for payload in messages {
            let decoded = crate::pgoutput::decode(payload).unwrap();
            fold.add(7, shape, &decoded)?;
        }
        let kind = |sql: &str| sql.split(' ').next().unwrap().to_owned();
        Ok(fold
            .statements()
            .iter()
            .map(|(_, s)| (kind(&s.sql), s.rows))
            .collect())
    }

    #[test]
    fn the_last_state_of_a_row_counts() {
        let (insert, update) = (
            |v| message(b'I', &[(b'N', v)]),
            |v| message(b'U', &[(b'N', v)]),
        );
        let delete = |id| message(b'D', &[(b'K', [id, "-"])]);
        let moved = |from, to| message(b'U', &[(b'K', [from, "-"]), (b'N', to)]);
        let one = |kind: &str| Ok(vec![(kind.to_owned(), 1)]);
        assert_eq!(fold(&[insert(["1", "a"]), update(["1", "b"])]), one("COPY"));
        assert_eq!(
            fold(&[update(["1", "a"]), update(["1", "="])]),
            one("UPDATE")
        );
        assert_eq!(fold(&[update(["1", "a"]), delete("1")]), one("DELETE"));
        let nothing = Ok(vec![("DELETE".to_owned(), 0)]);
        assert_eq!(fold(&[insert(["1", "a"]), delete("1")]), nothing);
        let replaced = Ok(vec![("DELETE".to_owned(), 1), ("COPY".to_owned(), 1)]);
        assert_eq!(fold(&[delete("1"), insert(["1", "a"])]), replaced);
        let back =
            [("DELETE", 1), ("DELETE", 0), ("COPY", 1)].map(|(kind, n)| (kind.to_owned(), n));
        assert_eq!(
            fold(&[moved("1", ["2", "a"]), moved("2", ["1", "b"])]),
            Ok(back.to_vec())
        );
        // What cannot be, or is not known whole, is left to the way in order.
        assert_eq!(fold(&[delete("1"), update(["1", "a"])]), Err(NotFoldable));
        assert_eq!(
            fold(&[insert(["1", "a"]), insert(["1", "b"])]),
            Err(NotFoldable)
        );
        assert_eq!(fold(&[moved("1", ["2", "="])]), Err(NotFoldable));
        let more_here = fold_on(&shape(false), &[moved("1", ["2", "a"])]);
        assert_eq!(more_here, Err(NotFoldable));
        assert_eq!(fold(&[update(["=", "a"])]), Err(NotFoldable));
    }
}
