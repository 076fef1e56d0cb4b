//! The statements that do a change here, one change each.
//!
//! A row is known by its key, or by all its columns; a value is the text that the top sent.

use std::sync::Arc;

use anyhow::bail;
use bytes::Bytes;

use super::fold::Shape;
use super::relation::{Column, Keeper, Relation};
use crate::client::quote_ident;
use crate::pgoutput::{Datum, Message, OldKind, Tuple};

/// What a statement's completion must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// A simple query, or the end of a pipeline: ready for the next.
    Simple,
    /// Any number of rows.
    Done,
    /// Exactly one row.
    One,
    /// The same, and it tells where `terrace.progress` is now.
    Place,
    /// Of a fold: exactly as many rows, of this table.
    Rows(u64, Arc<Shape>),
    /// One row; none is a conflict that needs no repair. This is the change.
    Delete(Bytes),
}

/// One statement with its values.
#[derive(Debug)]
pub struct Step {
    /// Of the prepared statement.
    pub name: String,
    /// Text, for the first use and for the careful way.
    pub sql: String,
    /// Whether the statement has not been prepared yet.
    pub parse: bool,
    /// Text values.
    pub values: Vec<Option<Bytes>>,
    /// What success looks like.
    pub expect: Expect,
    /// Content of the notification that this raises.
    pub notify: Option<Bytes>,
}

impl Step {
    /// Its values as the protocol's text.
    pub fn texts(&self) -> anyhow::Result<Vec<Option<&str>>> {
        let texts = self.values.iter();
        let texts = texts.map(|value| value.as_deref().map(std::str::from_utf8).transpose());
        Ok(texts.collect::<Result<_, _>>()?)
    }
}

pub(super) fn value(datum: Datum<'_>, payload: &Bytes) -> Option<Bytes> {
    match datum {
        Datum::Text(text) => Some(payload.slice_ref(text)),
        Datum::Null | Datum::Unchanged => None,
    }
}

/// TRUNCATE of a partition that is none here.
pub(super) fn clear_partition(relation: &Relation) -> Step {
    let values = texts([relation.namespace.clone(), relation.name.clone()]);
    unnamed(
        "SELECT terrace.clear_partition($1, $2)".into(),
        values,
        Expect::Done,
    )
}

/// A statement that is not prepared.
pub(super) fn unnamed(sql: String, values: Vec<Option<Bytes>>, expect: Expect) -> Step {
    Step {
        name: String::new(),
        sql,
        parse: true,
        values,
        expect,
        notify: None,
    }
}

/// Values of a statement of our own.
pub(super) fn texts<const N: usize>(values: [String; N]) -> Vec<Option<Bytes>> {
    values.map(|text| Some(Bytes::from(text))).to_vec()
}

fn place(column: &Column, number: usize) -> String {
    let local = column.local.as_ref();
    local.map_or_else(
        || format!("${number}"),
        |local| local.input.parameter(number),
    )
}

/// Its text, its values, and what it must do.
pub(super) type Statement = (String, Vec<Option<Bytes>>, Expect);

fn check_width(relation: &Relation, width: usize) -> anyhow::Result<()> {
    if width != relation.columns.len() {
        bail!("row of table \"{}\" has {width} columns", relation.table());
    }
    Ok(())
}

/// A row, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// `schema.table`.
    pub table: String,
    /// Its key, as PostgreSQL's own messages have it; none of a table without one, whose rows are
    /// shown to nobody.
    pub key: Option<String>,
}

/// The key of a row: the primary one here, else what tells it at the top.
pub(super) fn key(relation: &Relation, row: Tuple<'_>) -> Option<String> {
    /// Longer ones are cut.
    const BYTES: usize = 200;
    let is_key = |column: &Column| match relation.has_primary() {
        true => column.is_primary(),
        false => column.key && relation.identity != b'f',
    };
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for (column, datum) in relation.columns.iter().zip(row.iter()) {
        if is_key(column) {
            names.push(column.name.as_str());
            values.push(match datum {
                Datum::Text(text) => String::from_utf8_lossy(text),
                Datum::Null => "null".into(),
                Datum::Unchanged => "…".into(),
            });
        }
    }
    let mut key = format!("({})=({})", names.join(", "), values.join(", "));
    key.truncate(key.floor_char_boundary(BYTES));
    (!names.is_empty()).then_some(key)
}

/// A row that comes to pass a filter is told as a new one, without those values that are stored out
/// of line and did not change (`pgoutput_row_filter` in PostgreSQL's `pgoutput.c`).
fn missing_value(relation: &Relation, column: &str) -> String {
    let table = relation.qualified();
    format!(
        "a row of {table} that has come to pass the filter arrived without the value of column \
         \"{column}\"; give the table REPLICA IDENTITY FULL at the top, skip this transaction, and \
         send the rows again with terrace-bridge resync --table"
    )
}

pub(super) fn insert(
    relation: &Relation,
    new: &[Datum<'_>],
    payload: &Bytes,
) -> anyhow::Result<Statement> {
    check_width(relation, new.len())?;
    let (mut names, mut places, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (index, column) in relation.writable() {
        if new[index] == Datum::Unchanged {
            bail!(missing_value(relation, &column.name));
        }
        names.push(quote_ident(&column.name));
        values.push(value(new[index], payload));
        places.push(place(column, values.len()));
    }
    if names.is_empty() {
        let sql = format!("INSERT INTO {} DEFAULT VALUES", relation.qualified());
        return Ok((sql, values, Expect::Done));
    }
    let sql = format!(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})",
        relation.qualified(),
        names.join(", "),
        places.join(", ")
    );
    Ok((sql, values, Expect::Done))
}

pub(super) fn update(
    relation: &Relation,
    old: Option<(OldKind, Tuple<'_>)>,
    new: Tuple<'_>,
    payload: &Bytes,
    minds: bool,
) -> anyhow::Result<Statement> {
    check_width(relation, new.len())?;
    let datums: Vec<Datum<'_>> = new.iter().collect();
    let (mut names, mut places, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (index, column) in relation.writable() {
        if datums[index] != Datum::Unchanged {
            values.push(value(datums[index], payload));
            names.push(quote_ident(&column.name));
            places.push(place(column, values.len()));
        }
    }
    if names.is_empty() {
        return Ok((String::new(), values, Expect::Done));
    }
    let (kind, identity) = old.unwrap_or((OldKind::Key, new));
    let clause = row_clause(relation, kind, identity, payload, &mut values)?;
    let clause = minding(clause, minds, relation, kind);
    let sets = names.iter().zip(&places);
    let sets: Vec<String> = sets
        .map(|(name, value)| format!("{name} = {value}"))
        .collect();
    let sql = format!("UPDATE {} SET {}", relation.rows(), sets.join(", "));
    let is_whole = !datums.contains(&Datum::Unchanged) && relation.is_from_above(kind).is_none();
    let instead = is_whole.then(|| {
        format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {}",
            relation.qualified(),
            names.join(", "),
            places.join(", ")
        )
    });
    let sql = changing(&sql, instead, &clause, minds, relation);
    Ok((sql, values, Expect::One))
}

pub(super) fn delete(
    relation: &Relation,
    (kind, old): (OldKind, Tuple<'_>),
    payload: &Bytes,
    minds: bool,
) -> anyhow::Result<Statement> {
    let mut values = Vec::new();
    let clause = row_clause(relation, kind, old, payload, &mut values)?;
    let may_be_there = relation.is_from_above(kind).is_some()
        || relation.keeper != Keeper::Nobody && !is_held(relation);
    let expect = match minds && may_be_there {
        // A row that is not found may be missing, or be a session's of this server, or be kept.
        true => Expect::One,
        false => Expect::Delete(payload.clone()),
    };
    let clause = minding(clause, minds, relation, kind);
    let sql = changing(
        &format!("DELETE FROM {}", relation.rows()),
        None,
        &clause,
        minds,
        relation,
    );
    Ok((sql, values, expect))
}

/// The statement `change` of the rows that `clause` is for. Where a trigger may keep them it tells how
/// many are there, and holds them, so that none that somebody puts in their place is taken for one that was kept.
/// Where none is there, one that it keeps from being inserted `instead` is not missing.
fn changing(
    change: &str,
    instead: Option<String>,
    clause: &str,
    minds: bool,
    relation: &Relation,
) -> String {
    if !(minds && is_held(relation)) {
        return format!("{change} WHERE {clause}");
    }
    let held = format!(
        "WITH there AS MATERIALIZED (SELECT FROM {} WHERE {clause} FOR UPDATE), \
              done AS ({change} WHERE {clause} AND EXISTS (SELECT FROM there))",
        relation.rows()
    );
    match instead {
        None => format!("{held} SELECT FROM there"),
        Some(instead) => format!(
            "{held}, instead AS ({instead} WHERE NOT EXISTS (SELECT FROM there) RETURNING 1) \
             SELECT FROM (SELECT) one WHERE NOT EXISTS (SELECT FROM instead)"
        ),
    }
}

/// A statement that rules make another one cannot stand in WITH; that of a partitioned table is looked
/// at for partitions of somebody else only where it stands alone (`pg_ext/src/owner/whose.rs`).
fn is_held(relation: &Relation) -> bool {
    relation.keeper == Keeper::Triggers && relation.only
}

/// Leaves out a row that a session of this server wrote, so that it is noticed.
fn minding(clause: String, minds: bool, relation: &Relation, kind: OldKind) -> String {
    match relation.is_from_above(kind).filter(|_| minds) {
        Some(from_above) => format!("{clause} AND {from_above}"),
        None => clause,
    }
}

/// Finds the row that `old` describes, and holds it; where only rows are wanted that a session of this server wrote
/// last, `None` if that is not known.
pub(super) fn find(
    relation: &Relation,
    (kind, old): (OldKind, Tuple<'_>),
    payload: &Bytes,
    only_local: bool,
) -> anyhow::Result<Option<Step>> {
    let mut values = Vec::new();
    let mut clause = row_clause(relation, kind, old, payload, &mut values)?;
    if only_local {
        let Some(from_above) = relation.is_from_above(kind) else {
            return Ok(None);
        };
        clause = format!("{clause} AND NOT {from_above}");
    }
    let hold = if only_local { "" } else { " FOR UPDATE" };
    let sql = format!("SELECT FROM {} WHERE {clause}{hold}", relation.rows());
    Ok(Some(unnamed(sql, values, Expect::Done)))
}

/// The condition that holds for exactly the row that `old` describes.
fn row_clause(
    relation: &Relation,
    kind: OldKind,
    old: Tuple<'_>,
    payload: &Bytes,
    values: &mut Vec<Option<Bytes>>,
) -> anyhow::Result<String> {
    check_width(relation, old.len())?;
    if kind == OldKind::Full {
        if relation.has_primary() {
            return Ok(primary_clause(relation, old, payload, values));
        }
        // Without a key equal rows are alike: any one of them is the one. What is generated
        // follows from the rest, and may be generated in another way here.
        let clause = clause(relation, old, payload, values, |column| {
            column.local.as_ref().is_none_or(|local| !local.generated)
        });
        let table = relation.rows();
        let order = likeness(relation, old, payload, values);
        // Partitions count their rows each by itself.
        let (place, columns) = match relation.only {
            true => ("ctid", "ctid"),
            false => ("(tableoid, ctid)", "tableoid, ctid"),
        };
        return Ok(format!(
            "{place} = (SELECT {columns} FROM {table} WHERE {clause}{order} LIMIT 1)"
        ));
    }
    if !relation.columns.iter().any(|column| column.key) {
        bail!(
            "table \"{}\" has no replica identity at the top",
            relation.table()
        );
    }
    Ok(clause(relation, old, payload, values, |column| column.key))
}

/// Puts first, of the rows that are equal to `old`, one that is written in the same way: 1.0 and
/// 1.00 are equal, and so are 0 and -0, or a month and 30 days.
fn likeness(
    relation: &Relation,
    old: Tuple<'_>,
    payload: &Bytes,
    values: &mut Vec<Option<Bytes>>,
) -> String {
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for (column, datum) in relation.columns.iter().zip(old.iter()) {
        let Some(local) = &column.local else { continue };
        let ambiguous = local.equality.is_some() && !local.exact && !local.generated;
        if ambiguous && matches!(datum, Datum::Text(_)) {
            values.push(value(datum, payload));
            here.push(quote_ident(&column.name));
            there.push(local.input.parameter(values.len()));
        }
    }
    if here.is_empty() {
        return String::new();
    }
    // By the stored images.
    format!(
        " ORDER BY pg_catalog.record_image_eq(ROW({}), ROW({})) DESC",
        here.join(", "),
        there.join(", ")
    )
}

/// What an insert or update makes of a row.
#[derive(Clone, Copy)]
pub(super) struct Written<'a> {
    /// None before an insert.
    pub old: Option<(OldKind, Tuple<'a>)>,
    pub new: Tuple<'a>,
}

impl<'a> Written<'a> {
    pub fn by(message: &Message<'a>) -> Option<Written<'a>> {
        match message {
            Message::Insert { new, .. } => Some(Written {
                old: None,
                new: *new,
            }),
            Message::Update { old, new, .. } => Some(Written {
                old: Some(old.unwrap_or((OldKind::Key, *new))),
                new: *new,
            }),
            _ => None,
        }
    }

    /// What PostgreSQL calls it when another row has what is this one's.
    pub fn conflict(&self) -> &'static str {
        match self.old {
            None => "insert_exists",
            Some(_) => "update_exists",
        }
    }
}

/// The condition that holds for other rows that have the new row's values in the columns that
/// are `wanted`; `None` where a value is null, and in nobody's way, or is not told.
pub(super) fn others(
    relation: &Relation,
    wanted: impl Fn(&Column) -> bool,
    Written { old, new }: Written<'_>,
    payload: &Bytes,
) -> anyhow::Result<Option<(String, Vec<Option<Bytes>>)>> {
    check_width(relation, new.len())?;
    let mut columns = relation.columns.iter().zip(new.iter());
    if columns.any(|(column, datum)| wanted(column) && !matches!(datum, Datum::Text(_))) {
        return Ok(None);
    }
    let mut values = Vec::new();
    let mut condition = clause(relation, new, payload, &mut values, wanted);
    if let Some((kind, old)) = old {
        // Two texts may be one value: the row itself is in nobody's way.
        let itself = row_clause(relation, kind, old, payload, &mut values)?;
        condition = format!("{condition} AND ({itself}) IS NOT TRUE");
    }
    Ok(Some((condition, values)))
}

fn primary_clause(
    relation: &Relation,
    row: Tuple<'_>,
    payload: &Bytes,
    values: &mut Vec<Option<Bytes>>,
) -> String {
    clause(relation, row, payload, values, Column::is_primary)
}

fn clause(
    relation: &Relation,
    row: Tuple<'_>,
    payload: &Bytes,
    values: &mut Vec<Option<Bytes>>,
    wanted: impl Fn(&Column) -> bool,
) -> String {
    let mut terms = Vec::new();
    for (column, datum) in relation
        .columns
        .iter()
        .zip(row.iter())
        .filter(|(c, _)| wanted(c))
    {
        let name = quote_ident(&column.name);
        match datum {
            Datum::Null => terms.push(match &column.local {
                Some(local) => local.is_null(&name),
                None => format!("{name} IS NULL"),
            }),
            // Not sent because not changed: the other columns must do.
            Datum::Unchanged => {}
            Datum::Text(_) => {
                values.push(value(datum, payload));
                let number = values.len();
                terms.push(match &column.local {
                    Some(local) => local.equals(&name, number),
                    None => format!("{name}::pg_catalog.text = ${number}::pg_catalog.text"),
                });
            }
        }
    }
    match terms.is_empty() {
        true => "true".into(),
        false => terms.join(" AND "),
    }
}

/// Whether an update gives the row another primary key.
pub(super) fn moves(relation: &Relation, old: Tuple<'_>, new: Tuple<'_>) -> bool {
    let columns = relation.columns.iter().zip(old.iter().zip(new.iter()));
    columns
        .filter(|(column, _)| column.is_primary())
        .any(|(_, (old, new))| new != Datum::Unchanged && old != new)
}
