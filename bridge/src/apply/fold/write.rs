//! The statements that bring about what many changes come to: one for all rows of a table, which
//! travel as arrays, or in COPY's format.

use bytes::{BufMut, Bytes, BytesMut};

use super::Shape;
use super::binary::Binary;
use crate::apply::relation::{Equality, is_from_above};
use crate::pgoutput::Datum;

/// One statement, and how many rows it must touch.
pub struct Statement {
    /// Text, the same for the same table and columns.
    pub sql: String,
    /// The rows that it takes.
    pub data: Data,
    /// Rows.
    pub rows: u64,
}

/// Rows on their way into a statement.
pub enum Data {
    /// A column a parameter, each a text array in binary form.
    Arrays(Vec<Bytes>),
    /// What COPY reads, as whole CopyData messages.
    Copy(Bytes),
}

impl Shape {
    pub(super) fn delete(&self, rows: &[&[Datum<'_>]]) -> Option<Statement> {
        self.delete_where(self.same_row(), rows)
    }

    /// Deletes none: a row that is here all the same, whoever wrote it, is to be noticed.
    pub(super) fn miss(&self, rows: &[&[Datum<'_>]]) -> Option<Statement> {
        let delete = self.delete_where(self.same_key(), rows);
        delete.map(|delete| Statement { rows: 0, ..delete })
    }

    fn delete_where(&self, condition: String, rows: &[&[Datum<'_>]]) -> Option<Statement> {
        let sql = || {
            format!(
                "DELETE FROM ONLY {} t USING {} WHERE {condition}",
                self.table,
                self.source(&self.keys),
            )
        };
        statement(sql, rows, |rows| arrays(rows, &self.keys))
    }

    pub(super) fn update(&self, sent: &[bool], rows: &[&[Datum<'_>]]) -> Option<Statement> {
        let wanted = |index: &usize| {
            let column = &self.columns[*index];
            sent[*index] && !column.generated && !self.keys.contains(index)
        };
        let set: Vec<usize> = (0..self.columns.len()).filter(wanted).collect();
        // Of one that only its key is told of it counts that it is there.
        let set = match set.is_empty() {
            true => self.keys.clone(),
            false => set,
        };
        let mut all = self.keys.clone();
        all.extend(set.iter().filter(|index| !self.keys.contains(index)));
        let sql = || {
            let assign = |index: &usize| format!("{} = u.c{index}", self.columns[*index].name);
            let assignments: Vec<String> = set.iter().map(assign).collect();
            format!(
                "UPDATE ONLY {} t SET {} FROM {} WHERE {}",
                self.table,
                assignments.join(", "),
                self.source(&all),
                self.same_row()
            )
        };
        statement(sql, rows, |rows| arrays(rows, &all))
    }

    pub(super) fn insert(&self, rows: &[&[Datum<'_>]]) -> Option<Statement> {
        let written: Vec<usize> = (0..self.columns.len())
            .filter(|index| !self.columns[*index].generated)
            .collect();
        if rows.is_empty() {
            return None;
        }
        let kinds = written
            .iter()
            .map(|index| Binary::of(&self.columns[*index].input));
        let kinds: Option<Vec<Binary>> = kinds.collect();
        let binary = kinds.and_then(|kinds| copy_binary(rows, &written, &kinds));
        let (format, data) = match binary {
            Some(data) => (" (FORMAT binary)", data),
            None => ("", copy_text(rows, &written)),
        };
        let name = |index: &usize| self.columns[*index].name.as_str();
        let names: Vec<&str> = written.iter().map(name).collect();
        let sql = format!(
            "COPY {} ({}) FROM STDIN{format}",
            self.table,
            names.join(", ")
        );
        Some(Statement {
            sql,
            data: Data::Copy(data),
            rows: rows.len() as u64,
        })
    }

    fn same_key(&self) -> String {
        let term = |index: &usize| {
            let column = &self.columns[*index];
            let (name, value) = (format!("t.{}", column.name), format!("u.c{index}"));
            // No row: what cannot be told apart is not touched.
            let equals = |equality: &Equality| equality.of(&name, &value);
            column.equality.as_ref().map_or("false".into(), equals)
        };
        let terms: Vec<String> = self.keys.iter().map(term).collect();
        terms.join(" AND ")
    }

    /// The row as the top has it.
    fn same_row(&self) -> String {
        let key = self.same_key();
        match &self.local_since {
            Some(since) => format!("{key} AND {}", is_from_above(since, "t.")),
            None => key,
        }
    }

    /// The rows as a table `u` of columns `c…` of the right types. Functions in a select list
    /// go in step, and unlike those in FROM without a detour over a tuple store.
    fn source(&self, columns: &[usize]) -> String {
        let (mut casts, mut arrays) = (Vec::new(), Vec::new());
        for (place, index) in columns.iter().enumerate() {
            let value = self.columns[*index].input.read(&format!("c{index}"));
            casts.push(format!("{value} AS c{index}"));
            let place = place + 1;
            arrays.push(format!(
                "pg_catalog.unnest(${place}::pg_catalog.text[]) AS c{index}"
            ));
        }
        format!(
            "(SELECT {} FROM (SELECT {}) AS x) AS u",
            casts.join(", "),
            arrays.join(", ")
        )
    }
}

fn statement(
    sql: impl FnOnce() -> String,
    rows: &[&[Datum<'_>]],
    data: impl FnOnce(&[&[Datum<'_>]]) -> Data,
) -> Option<Statement> {
    (!rows.is_empty()).then(|| Statement {
        sql: sql(),
        data: data(rows),
        rows: rows.len() as u64,
    })
}

fn arrays(rows: &[&[Datum<'_>]], columns: &[usize]) -> Data {
    let array = |column: &usize| text_array(rows, *column);
    Data::Arrays(columns.iter().map(array).collect())
}

/// Rows in COPY's text format.
fn copy_text(rows: &[&[Datum<'_>]], columns: &[usize]) -> Bytes {
    let mut out = Messages::new();
    for row in rows {
        for (place, column) in columns.iter().enumerate() {
            if place > 0 {
                out.bytes.put_u8(b'\t');
            }
            match row[*column] {
                Datum::Text(text) => put_escaped(&mut out.bytes, text),
                Datum::Null | Datum::Unchanged => out.bytes.put_slice(b"\\N"),
            }
        }
        out.bytes.put_u8(b'\n');
        out.row_ends();
    }
    out.finish()
}

/// Rows in COPY's binary format, if that is known of all values.
fn copy_binary(rows: &[&[Datum<'_>]], columns: &[usize], kinds: &[Binary]) -> Option<Bytes> {
    let width = i16::try_from(columns.len()).ok()?;
    let mut out = Messages::new();
    out.bytes.put_slice(b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0");
    for row in rows {
        out.bytes.put_i16(width);
        for (column, kind) in columns.iter().zip(kinds) {
            match row[*column] {
                Datum::Text(text) => kind.put(text, &mut out.bytes)?,
                Datum::Null | Datum::Unchanged => out.bytes.put_i32(-1),
            }
        }
        out.row_ends();
    }
    out.bytes.put_i16(-1);
    Some(out.finish())
}

/// Whole CopyData messages.
struct Messages {
    bytes: BytesMut,
    /// Of the last one.
    start: usize,
}

impl Messages {
    /// A message ends with the row that passes this.
    const LENGTH: usize = 64 << 10;

    fn new() -> Messages {
        let bytes = BytesMut::from(&b"d\0\0\0\0"[..]);
        Messages { bytes, start: 0 }
    }

    fn row_ends(&mut self) {
        if self.bytes.len() - self.start >= Messages::LENGTH {
            self.close();
            self.start = self.bytes.len();
            self.bytes.put_slice(b"d\0\0\0\0");
        }
    }

    fn close(&mut self) {
        let len = (self.bytes.len() - self.start - 1) as u32;
        self.bytes[self.start + 1..self.start + 5].copy_from_slice(&len.to_be_bytes());
    }

    fn finish(mut self) -> Bytes {
        self.close();
        self.bytes.freeze()
    }
}

/// What means something to COPY gets a backslash before it.
fn put_escaped(out: &mut BytesMut, text: &[u8]) {
    let is_special = |byte: &u8| matches!(byte, b'\\' | b'\t' | b'\n' | b'\r');
    // Whole chunks are looked at without a branch, and few hold anything.
    for chunk in text.chunks(32) {
        if !chunk.iter().fold(false, |any, byte| any | is_special(byte)) {
            out.put_slice(chunk);
            continue;
        }
        for byte in chunk {
            if is_special(byte) {
                out.put_u8(b'\\');
            }
            out.put_u8(*byte);
        }
    }
}

/// A column as a `text[]` in its binary form (`array_recv`).
fn text_array(rows: &[&[Datum<'_>]], column: usize) -> Bytes {
    const TEXT_OID: u32 = 25;
    let cells = || rows.iter().map(|row| row[column]);
    let len = |datum| match datum {
        Datum::Text(text) => 4 + text.len(),
        Datum::Null | Datum::Unchanged => 4,
    };
    let mut out = BytesMut::with_capacity(20 + cells().map(len).sum::<usize>());
    out.put_i32(1);
    out.put_i32(1);
    out.put_u32(TEXT_OID);
    out.put_u32(rows.len() as u32);
    out.put_i32(1);
    for cell in cells() {
        match cell {
            Datum::Text(text) => {
                out.put_u32(text.len() as u32);
                out.put_slice(text);
            }
            Datum::Null | Datum::Unchanged => out.put_i32(-1),
        }
    }
    out.freeze()
}
