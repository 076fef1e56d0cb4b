//! The net effect of many transactions on each row, and the few statements that
//! bring it about.
//!
//! Guarantee: after the statements every table holds what it would hold had every
//! change been applied in order, or one of them touches another number of rows
//! than it says, and everything is to be rolled back and applied in order.
//!
//! Why the order may change: a row is known by its primary key, the only unique
//! constraint of a table that is folded ([`Shape`]), so changes of different rows
//! do not meet; a table without a unique constraint is only added to. Of one row
//! only the last state counts. Rows are deleted before
//! others are updated and inserted, so that a key is free when it is taken anew.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::pgoutput::{Datum, Message, OldKind, Tuple};

/// A table that can be changed set-wise.
#[derive(Debug)]
pub struct Shape {
    /// Qualified and quoted.
    pub table: String,
    /// In the order of the stream.
    pub columns: Vec<ShapeColumn>,
}

/// Column of a [`Shape`].
#[derive(Debug)]
pub struct ShapeColumn {
    /// Quoted.
    pub name: String,
    /// As SQL writes it, without modifier.
    pub type_name: String,
    /// Part of the primary key, here and at the top.
    pub key: bool,
    /// Generated here, so that it is not written.
    pub generated: bool,
}

/// The change cannot be folded: a row is not as it must be, or the message is of
/// another kind. What has been folded before it is still whole.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFoldable;

/// One statement: text arrays in binary form, and how many rows it must touch.
pub struct Statement {
    /// Text, the same for the same table and columns.
    pub sql: String,
    /// One array a parameter.
    pub arrays: Vec<Bytes>,
    /// Rows.
    pub rows: u64,
}

#[derive(Clone, Debug)]
enum Cell {
    Null,
    Unchanged,
    Text(Bytes),
}

/// State of a row after the changes so far, against that before the batch.
enum Row {
    /// Was not there.
    Inserted(Vec<Cell>),
    /// Was there, under this key.
    Updated(Vec<Cell>),
    /// Was there and is gone; its key columns.
    Deleted(Vec<Cell>),
    /// Was there, was deleted, and another is there under its key.
    Replaced(Vec<Cell>),
    /// Was not there and is not.
    Gone,
}

struct Table {
    shape: Arc<Shape>,
    rows: Vec<Row>,
    index: HashMap<Vec<u8>, usize>,
}

/// Collects changes.
#[derive(Default)]
pub struct Fold {
    tables: BTreeMap<u32, Table>,
}

impl Fold {
    /// Takes one insert, update or delete of a table.
    pub fn add(
        &mut self,
        relid: u32,
        shape: &Arc<Shape>,
        message: &Message<'_>,
        payload: &Bytes,
    ) -> Result<(), NotFoldable> {
        let table = self.tables.entry(relid).or_insert_with(|| Table {
            shape: Arc::clone(shape),
            rows: Vec::new(),
            index: HashMap::new(),
        });
        match message {
            Message::Insert { new, .. } => table.insert(cells(shape, *new, payload)?),
            Message::Update { old, new, .. } => {
                let mut new = cells(shape, *new, payload)?;
                let old = match old {
                    None => None,
                    Some((OldKind::Key, old)) => Some(cells(shape, *old, payload)?),
                    Some((OldKind::Full, _)) => return Err(NotFoldable),
                };
                table.update(old, &mut new)
            }
            Message::Delete {
                old: (OldKind::Key, old),
                ..
            } => table.delete(cells(shape, *old, payload)?),
            _ => Err(NotFoldable),
        }
    }

    /// Deletes, updates and inserts, table by table.
    pub fn statements(self) -> Vec<Statement> {
        self.tables
            .into_values()
            .flat_map(Table::statements)
            .collect()
    }
}

fn cells(shape: &Shape, tuple: Tuple<'_>, payload: &Bytes) -> Result<Vec<Cell>, NotFoldable> {
    if tuple.len() != shape.columns.len() {
        return Err(NotFoldable);
    }
    let cell = |datum| match datum {
        Datum::Null => Cell::Null,
        Datum::Unchanged => Cell::Unchanged,
        Datum::Text(text) => Cell::Text(payload.slice_ref(text)),
    };
    Ok(tuple.iter().map(cell).collect())
}

/// Fills what the newer state says nothing of from the older one.
fn fill(newer: &mut [Cell], older: &[Cell]) {
    for (new, old) in newer.iter_mut().zip(older) {
        if matches!(new, Cell::Unchanged) {
            *new = old.clone();
        }
    }
}

impl Table {
    fn key(&self, cells: &[Cell]) -> Result<Vec<u8>, NotFoldable> {
        let mut key = Vec::new();
        for (column, cell) in self.shape.columns.iter().zip(cells) {
            match cell {
                _ if !column.key => {}
                Cell::Text(text) => {
                    key.extend_from_slice(&(text.len() as u64).to_be_bytes());
                    key.extend_from_slice(text);
                }
                Cell::Null | Cell::Unchanged => return Err(NotFoldable),
            }
        }
        Ok(key)
    }

    /// Without a key rows can only be added.
    fn is_keyless(&self) -> bool {
        !self.shape.columns.iter().any(|column| column.key)
    }

    fn put(&mut self, key: Vec<u8>, row: Row) {
        self.index.insert(key, self.rows.len());
        self.rows.push(row);
    }

    fn insert(&mut self, new: Vec<Cell>) -> Result<(), NotFoldable> {
        let key = self.key(&new)?;
        if new.iter().any(|cell| matches!(cell, Cell::Unchanged)) {
            return Err(NotFoldable);
        }
        if self.is_keyless() {
            self.rows.push(Row::Inserted(new));
            return Ok(());
        }
        let Some(&at) = self.index.get(&key) else {
            self.put(key, Row::Inserted(new));
            return Ok(());
        };
        self.rows[at] = match self.rows[at] {
            Row::Gone => Row::Inserted(new),
            Row::Deleted(_) => Row::Replaced(new),
            _ => return Err(NotFoldable),
        };
        Ok(())
    }

    fn update(&mut self, old: Option<Vec<Cell>>, new: &mut Vec<Cell>) -> Result<(), NotFoldable> {
        if self.is_keyless() {
            return Err(NotFoldable);
        }
        if let Some(old) = old {
            // An old key is sent when it changes, or when it is stored out of line.
            for (column, (new, old)) in self.shape.columns.iter().zip(new.iter_mut().zip(&old)) {
                if column.key && matches!(new, Cell::Unchanged) {
                    *new = old.clone();
                }
            }
            let (before, after) = (self.key(&old)?, self.key(new)?);
            if before != after {
                return self.move_row(old, &before, std::mem::take(new));
            }
        }
        let key = self.key(new)?;
        let Some(&at) = self.index.get(&key) else {
            self.put(key, Row::Updated(std::mem::take(new)));
            return Ok(());
        };
        match &mut self.rows[at] {
            Row::Inserted(row) | Row::Updated(row) | Row::Replaced(row) => {
                fill(new, row);
                *row = std::mem::take(new);
                Ok(())
            }
            Row::Deleted(_) | Row::Gone => Err(NotFoldable),
        }
    }

    /// Another key is another row, which must be known whole.
    fn move_row(
        &mut self,
        old: Vec<Cell>,
        before: &[u8],
        mut new: Vec<Cell>,
    ) -> Result<(), NotFoldable> {
        if let Some(&at) = self.index.get(before)
            && let Row::Inserted(row) | Row::Updated(row) | Row::Replaced(row) = &self.rows[at]
        {
            fill(&mut new, row);
        }
        if new.iter().any(|cell| matches!(cell, Cell::Unchanged)) {
            return Err(NotFoldable);
        }
        self.delete(old)?;
        self.insert(new)
    }

    fn delete(&mut self, old: Vec<Cell>) -> Result<(), NotFoldable> {
        if self.is_keyless() {
            return Err(NotFoldable);
        }
        let key = self.key(&old)?;
        let Some(&at) = self.index.get(&key) else {
            self.put(key, Row::Deleted(old));
            return Ok(());
        };
        self.rows[at] = match self.rows[at] {
            Row::Inserted(_) => Row::Gone,
            Row::Updated(_) | Row::Replaced(_) => Row::Deleted(old),
            Row::Deleted(_) | Row::Gone => return Err(NotFoldable),
        };
        Ok(())
    }

    fn statements(self) -> Vec<Statement> {
        let Table { shape, rows, .. } = self;
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        let mut changed: BTreeMap<Vec<bool>, Vec<&[Cell]>> = BTreeMap::new();
        for row in &rows {
            match row {
                Row::Gone => {}
                Row::Inserted(cells) => new.push(&cells[..]),
                Row::Deleted(cells) => gone.push(&cells[..]),
                Row::Replaced(cells) => {
                    gone.push(&cells[..]);
                    new.push(&cells[..]);
                }
                Row::Updated(cells) => {
                    let sent = cells.iter().map(|cell| !matches!(cell, Cell::Unchanged));
                    changed.entry(sent.collect()).or_default().push(cells);
                }
            }
        }
        let mut statements = Vec::new();
        statements.extend(shape.delete(&gone));
        for (sent, rows) in changed {
            statements.extend(shape.update(&sent, &rows));
        }
        statements.extend(shape.insert(&new));
        statements
    }
}

impl Shape {
    fn delete(&self, rows: &[&[Cell]]) -> Option<Statement> {
        let keys: Vec<usize> = self.keys().collect();
        let sql = format!(
            "DELETE FROM ONLY {} t USING {} WHERE {}",
            self.table,
            self.source(&keys),
            self.same_key()
        );
        statement(sql, &keys, rows)
    }

    fn update(&self, sent: &[bool], rows: &[&[Cell]]) -> Option<Statement> {
        let wanted = |index: &usize| {
            let column = &self.columns[*index];
            sent[*index] && !column.key && !column.generated
        };
        let set: Vec<usize> = (0..self.columns.len()).filter(wanted).collect();
        if set.is_empty() {
            return None;
        }
        let assign = |index: &usize| format!("{} = u.c{index}", self.columns[*index].name);
        let assignments: Vec<String> = set.iter().map(assign).collect();
        let all: Vec<usize> = self.keys().chain(set).collect();
        let sql = format!(
            "UPDATE ONLY {} t SET {} FROM {} WHERE {}",
            self.table,
            assignments.join(", "),
            self.source(&all),
            self.same_key()
        );
        statement(sql, &all, rows)
    }

    fn insert(&self, rows: &[&[Cell]]) -> Option<Statement> {
        let written: Vec<usize> = (0..self.columns.len())
            .filter(|index| !self.columns[*index].generated)
            .collect();
        let names: Vec<&str> = written
            .iter()
            .map(|index| self.columns[*index].name.as_str())
            .collect();
        let sql = format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT * FROM {}",
            self.table,
            names.join(", "),
            self.source(&written)
        );
        statement(sql, &written, rows)
    }

    fn keys(&self) -> impl Iterator<Item = usize> + use<'_> {
        (0..self.columns.len()).filter(|index| self.columns[*index].key)
    }

    fn same_key(&self) -> String {
        let term = |index: usize| format!("t.{} = u.c{index}", self.columns[index].name);
        let terms: Vec<String> = self.keys().map(term).collect();
        terms.join(" AND ")
    }

    /// The rows as a table `u` of columns `c…` of the right types.
    fn source(&self, columns: &[usize]) -> String {
        let (mut casts, mut arrays, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for (place, index) in columns.iter().enumerate() {
            casts.push(format!(
                "c{index}::{} AS c{index}",
                self.columns[*index].type_name
            ));
            arrays.push(format!(
                "pg_catalog.unnest(${}::pg_catalog.text[])",
                place + 1
            ));
            names.push(format!("c{index}"));
        }
        format!(
            "(SELECT {} FROM ROWS FROM ({}) AS x ({})) AS u",
            casts.join(", "),
            arrays.join(", "),
            names.join(", ")
        )
    }
}

fn statement(sql: String, columns: &[usize], rows: &[&[Cell]]) -> Option<Statement> {
    if rows.is_empty() {
        return None;
    }
    let array = |column: &usize| text_array(rows.iter().map(|row| &row[*column]), rows.len());
    Some(Statement {
        sql,
        arrays: columns.iter().map(array).collect(),
        rows: rows.len() as u64,
    })
}

/// A `text[]` in its binary form (`array_recv`).
fn text_array<'a>(cells: impl Iterator<Item = &'a Cell>, len: usize) -> Bytes {
    const TEXT_OID: u32 = 25;
    let mut out = BytesMut::new();
    out.put_i32(1);
    out.put_i32(1);
    out.put_u32(TEXT_OID);
    out.put_u32(len as u32);
    out.put_i32(1);
    for cell in cells {
        match cell {
            Cell::Text(text) => {
                out.put_u32(text.len() as u32);
                out.put_slice(text);
            }
            Cell::Null | Cell::Unchanged => out.put_i32(-1),
        }
    }
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Arc<Shape> {
        let column = |name: &str, key| ShapeColumn {
            name: name.into(),
            type_name: "integer".into(),
            key,
            generated: false,
        };
        Arc::new(Shape {
            table: "t".into(),
            columns: vec![column("id", true), column("v", false)],
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
        let (shape, mut fold) = (shape(), Fold::default());
        for payload in messages {
            let decoded = crate::pgoutput::decode(payload).unwrap();
            fold.add(7, &shape, &decoded, payload)?;
        }
        let kind = |sql: &str| sql.split(' ').next().unwrap().to_owned();
        Ok(fold
            .statements()
            .iter()
            .map(|s| (kind(&s.sql), s.rows))
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
        assert_eq!(
            fold(&[insert(["1", "a"]), update(["1", "b"])]),
            one("INSERT")
        );
        assert_eq!(
            fold(&[update(["1", "a"]), update(["1", "="])]),
            one("UPDATE")
        );
        assert_eq!(fold(&[update(["1", "a"]), delete("1")]), one("DELETE"));
        assert_eq!(fold(&[insert(["1", "a"]), delete("1")]), Ok(vec![]));
        let replaced = Ok(vec![("DELETE".to_owned(), 1), ("INSERT".to_owned(), 1)]);
        assert_eq!(fold(&[delete("1"), insert(["1", "a"])]), replaced);
        assert_eq!(
            fold(&[moved("1", ["2", "a"]), moved("2", ["1", "b"])]),
            replaced
        );
        // What cannot be, or is not known whole, is left to the way in order.
        assert_eq!(fold(&[delete("1"), update(["1", "a"])]), Err(NotFoldable));
        assert_eq!(
            fold(&[insert(["1", "a"]), insert(["1", "b"])]),
            Err(NotFoldable)
        );
        assert_eq!(fold(&[moved("1", ["2", "="])]), Err(NotFoldable));
        assert_eq!(fold(&[update(["=", "a"])]), Err(NotFoldable));
    }
}
