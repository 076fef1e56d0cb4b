//! From a change of the stream to the statement that does it here.
//!
//! Tables are found by name and columns by name, so that OIDs, column order and
//! extra columns may differ between servers. Values stay text from end to end;
//! the local server's own types read them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;

use super::fold::{Fold, NotFoldable, Shape, ShapeColumn};
use super::sealed::{SealedOrder, Seals, is_order};
use crate::client::{Client, quote_ident, quote_table};
use crate::pgoutput::{self, Datum, Message, OldKind, TRUNCATE_RESTART_IDENTITY, Tuple};
use crate::record::Record;

/// Prefix of messages that [`terrace.send`] writes.
const SEND_PREFIX: &str = "terrace.send";

/// What a statement's completion must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// A simple query, or the end of a pipeline: ready for the next.
    Simple,
    /// Any number of rows.
    Done,
    /// Exactly one row.
    One,
    /// Exactly as many rows.
    Rows(u64),
    /// One row of this table; none is a conflict that needs no repair.
    Delete(String),
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

/// What is to be done for a message.
pub enum Planned {
    /// These, in order.
    Steps(Vec<Step>),
    /// Nothing on this server.
    Nothing,
    /// First [`Planner::lookup`] this relation, then plan again.
    Lookup(u32),
    /// The extension at the top asks for this, for which the transaction must go by itself.
    Order(SealedOrder),
}

/// What became of a message that is to be folded.
pub enum Folded {
    /// It is in, or asks for nothing on this server.
    Added,
    /// First [`Planner::lookup`] this relation, then fold again.
    Lookup(u32),
    /// It must go in order.
    Not,
}

struct Column {
    name: String,
    key: bool,
    local: Option<LocalColumn>,
}

#[derive(Clone)]
struct LocalColumn {
    generated: bool,
    primary: bool,
    comparable: bool,
    type_name: String,
}

struct Relation {
    definition: Bytes,
    namespace: String,
    name: String,
    /// Where its rows are here, if it is a partition at the top and none here.
    place: Option<String>,
    columns: Vec<Column>,
    looked_up: bool,
    routed: bool,
    /// Rows of tables that inherit from it are not its own.
    only: bool,
    /// `pg_class.relreplident` at the top.
    identity: u8,
    /// How to change it set-wise; known once looked up.
    shape: Option<Arc<Shape>>,
}

impl Relation {
    /// The table here.
    fn qualified(&self) -> String {
        let own = || quote_table(&self.namespace, &self.name);
        self.place.clone().unwrap_or_else(own)
    }

    /// For statements that would touch inheriting tables as well.
    fn rows(&self) -> String {
        let only = if self.only { "ONLY " } else { "" };
        format!("{only}{}", self.qualified())
    }

    /// Its name at the top, for people.
    fn table(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }

    fn has_primary(&self) -> bool {
        self.columns
            .iter()
            .any(|c| c.local.as_ref().is_some_and(|local| local.primary))
    }

    fn writable(&self) -> impl Iterator<Item = (usize, &Column)> {
        self.columns
            .iter()
            .enumerate()
            .filter(|(_, c)| c.local.as_ref().is_some_and(|local| !local.generated))
    }
}

/// Turns messages into steps; knows the relations and the prepared statements.
pub struct Planner {
    domain: String,
    relations: HashMap<u32, Relation>,
    /// Tables that other domains get and this one does not.
    elsewhere: HashSet<(String, String)>,
    routing_changed: bool,
    /// Name of the prepared statement by its text.
    statements: HashMap<String, String>,
    /// Names are not used twice in a session.
    named: u64,
    /// Of the transaction that is planned.
    pub(super) seals: Seals,
    /// Every relation that the message planned last must have looked up.
    unknown: Vec<u32>,
}

fn value(datum: Datum<'_>, payload: &Bytes) -> Option<Bytes> {
    match datum {
        Datum::Text(text) => Some(payload.slice_ref(text)),
        Datum::Null | Datum::Unchanged => None,
    }
}

/// Content of the message if it raises a notification.
pub fn notify_content(payload: &[u8]) -> Option<&[u8]> {
    if payload.first() != Some(&b'M') {
        return None;
    }
    match pgoutput::decode(payload) {
        Ok(Message::Logical {
            prefix: SEND_PREFIX,
            content,
            ..
        }) => Some(content),
        _ => None,
    }
}

impl Planner {
    /// For a fresh session.
    pub async fn open(client: &mut Client, domain: &str) -> anyhow::Result<Planner> {
        let mut planner = Planner {
            domain: domain.to_owned(),
            relations: HashMap::new(),
            elsewhere: HashSet::new(),
            routing_changed: false,
            statements: HashMap::new(),
            named: 0,
            seals: Seals::default(),
            unknown: Vec::new(),
        };
        planner.reload_routing(client).await?;
        Ok(planner)
    }

    /// Forgets the prepared statements: none is known to exist any more.
    pub fn forget_statements(&mut self) {
        self.statements.clear();
    }

    /// Forgets the definitions: the reader starts anew and brings them.
    pub fn forget_relations(&mut self) {
        self.relations.clear();
    }

    /// Whether a change of the routing has been planned since the last reload.
    pub fn routing_changed(&self) -> bool {
        self.routing_changed
    }

    /// Every table is to be looked at again.
    pub fn forget_lookups(&mut self) {
        for relation in self.relations.values_mut() {
            relation.looked_up = false;
            relation.shape = None;
        }
        self.forget_statements();
    }

    /// Whether this domain gets a table.
    pub fn is_routed(&self, namespace: &str, name: &str) -> bool {
        let place = (namespace.to_owned(), name.to_owned());
        !self.elsewhere.contains(&place)
    }

    /// Takes in what the transaction under way has changed of the routing so far; it may
    /// change more before it ends.
    pub async fn refresh_routing(&mut self, client: &mut Client) -> anyhow::Result<()> {
        if self.routing_changed {
            self.reload_routing(client).await?;
            self.routing_changed = true;
        }
        Ok(())
    }

    /// Reads which tables this domain does not get.
    pub async fn reload_routing(&mut self, client: &mut Client) -> anyhow::Result<()> {
        let rows = client
            .query(
                "SELECT nspname, relname FROM terrace.sync_table WHERE NOT $1 = ANY (domains)",
                &[Some(&self.domain)],
            )
            .await
            .context("read terrace.sync_table")?;
        self.elsewhere = rows
            .into_iter()
            .filter_map(|row| match <[_; 2]>::try_from(row) {
                Ok([Some(namespace), Some(name)]) => Some((namespace, name)),
                _ => None,
            })
            .collect();
        for relation in self.relations.values_mut() {
            let place = (relation.namespace.clone(), relation.name.clone());
            let routed = !self.elsewhere.contains(&place);
            relation.looked_up &= relation.routed || !routed;
            relation.routed = routed;
        }
        self.routing_changed = false;
        Ok(())
    }

    /// Takes a schema record in.
    pub fn define(&mut self, record: &Record) -> anyhow::Result<()> {
        let body = record.body();
        let Message::Relation(relation) = pgoutput::decode(&body)? else {
            return Ok(());
        };
        if self.is_defined(relation.relid, &body) {
            return Ok(());
        }
        let relid = relation.relid;
        let columns = relation
            .columns
            .iter()
            .map(|c| Column {
                name: c.name.to_owned(),
                key: c.key,
                local: None,
            })
            .collect();
        let definition = body.clone();
        let known = Relation {
            definition,
            namespace: relation.namespace.to_owned(),
            name: relation.name.to_owned(),
            place: None,
            columns,
            looked_up: false,
            routed: self.is_routed(relation.namespace, relation.name),
            only: false,
            identity: relation.identity,
            shape: None,
        };
        self.relations.insert(relid, known);
        Ok(())
    }

    /// Reads what the table looks like here, and those that came with it in a TRUNCATE.
    pub async fn lookup(&mut self, client: &mut Client, relid: u32) -> anyhow::Result<()> {
        let mut unknown = std::mem::take(&mut self.unknown);
        if !unknown.contains(&relid) {
            unknown = vec![relid];
        }
        self.refresh_routing(client).await?;
        for relid in unknown {
            self.lookup_one(client, relid).await?;
        }
        Ok(())
    }

    async fn lookup_one(&mut self, client: &mut Client, relid: u32) -> anyhow::Result<()> {
        let relation = self
            .relations
            .get_mut(&relid)
            .context("undefined relation")?;
        if !relation.routed {
            relation.looked_up = true;
            return Ok(());
        }
        relation.place = other_place(client, &relation.namespace, &relation.name).await?;
        let sql = "SELECT a.attname, a.attgenerated <> '', \
                 EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary \
                         AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])), \
                 EXISTS (SELECT FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod \
                         WHERE m.amname = 'btree' AND o.opcdefault \
                           AND o.opcnamespace = 'pg_catalog'::regnamespace AND o.opcintype = \
                           CASE WHEN t.typtype = 'e' THEN 'anyenum'::regtype \
                                WHEN t.typtype = 'd' THEN t.typbasetype \
                                WHEN t.typcategory = 'A' THEN 'anyarray'::regtype \
                                WHEN t.typname = 'varchar' THEN 'text'::regtype ELSE t.oid END), \
                 pg_catalog.format_type(a.atttypid, -1), \
                 (SELECT c.relkind = 'r' AND NOT c.relhasrules AND NOT EXISTS \
                      (SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid AND g.tgenabled IN ('R', 'A')) \
                    AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid \
                      AND (i.indisunique OR i.indisexclusion) AND NOT i.indisprimary) \
                  FROM pg_class c WHERE c.oid = a.attrelid), \
                 a.attidentity = 'a', \
                 (SELECT c.relkind = 'r' FROM pg_class c WHERE c.oid = a.attrelid) \
             FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
             WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";
        let rows = client.query(sql, &[Some(&relation.qualified())]).await?;
        if rows.is_empty() {
            bail!(
                "table \"{}\" does not exist on this server; create it here with the columns that \
                 it has at the top",
                relation.table()
            );
        }
        // Such a column can be written to by DEFAULT alone, and here it is the top's
        // value that counts.
        for row in rows.iter().filter(|row| row[6].as_deref() == Some("t")) {
            let column = quote_ident(row[0].as_deref().unwrap_or_default());
            let table = relation.qualified();
            tracing::info!(%table, %column, "identity becomes BY DEFAULT on this server");
            let sql = format!("ALTER TABLE {table} ALTER COLUMN {column} SET GENERATED BY DEFAULT");
            client
                .simple(&sql)
                .await
                .context("make the identity column writable")?;
        }
        relation.only = rows.iter().all(|row| row[7].as_deref() == Some("t"));
        let mut plain = true;
        let locals: HashMap<String, LocalColumn> = rows
            .into_iter()
            .filter_map(|row| {
                let is = |index: usize| row[index].as_deref() == Some("t");
                let local = LocalColumn {
                    generated: is(1),
                    primary: is(2),
                    comparable: is(3),
                    type_name: row[4].clone().unwrap_or_default(),
                };
                plain &= is(5);
                Some((row[0].clone()?, local))
            })
            .collect();
        let table = relation.table();
        for column in &mut relation.columns {
            column.local = locals.get(&column.name).cloned();
            if column.local.is_none() {
                bail!(
                    "table \"{table}\" has no column \"{}\" on this server",
                    column.name
                );
            }
        }
        if let Some(place) = &relation.place
            && relation.identity != b'f'
        {
            let keys = relation.columns.iter().filter(|column| column.key);
            let keys: Vec<&str> = keys.map(|column| column.name.as_str()).collect();
            if !keys.is_empty() {
                must_tell_rows_apart(client, place, &keys, &table).await?;
            }
        }
        relation.looked_up = true;
        // A key column that is not replicated is not in this list.
        let primaries = locals.values().filter(|local| local.primary).count();
        relation.shape = plain
            .then(|| shape(relation, primaries))
            .flatten()
            .map(Arc::new);
        Ok(())
    }

    /// What `payload` asks for on this server.
    pub fn plan(&mut self, payload: &Bytes) -> anyhow::Result<Planned> {
        let message = pgoutput::decode(payload)?;
        let relids = match &message {
            Message::Insert { relid, .. }
            | Message::Update { relid, .. }
            | Message::Delete { relid, .. } => vec![*relid],
            Message::Truncate { relids, .. } => relids.clone(),
            Message::Logical {
                prefix: SEND_PREFIX,
                content,
                ..
            } => {
                return Ok(match notify(payload.slice_ref(content)) {
                    Some(step) => Planned::Steps(vec![step]),
                    None => {
                        // Anybody at the top may write such a message; it is no data.
                        tracing::warn!("a message that is no notification is left out");
                        Planned::Nothing
                    }
                });
            }
            Message::Logical {
                prefix, content, ..
            } => {
                let order = self.seals.open(prefix, payload.slice_ref(content))?;
                return Ok(order.map_or(Planned::Nothing, Planned::Order));
            }
            Message::Begin { .. } => {
                self.seals.clear();
                return Ok(Planned::Nothing);
            }
            _ => return Ok(Planned::Nothing),
        };
        if let Message::Insert { relid, new } = &message
            && let Some(relation) = self.relations.get(relid)
            && relation.namespace == "terrace"
        {
            self.seals.note(&relation.name, *new);
        }
        let mut unknown = Vec::new();
        for relid in &relids {
            let relation = self
                .relations
                .get(relid)
                .context("change of an undefined relation")?;
            if self.is_unknown(relation) {
                unknown.push(*relid);
            }
        }
        if let Some(relid) = unknown.first().copied() {
            self.unknown = unknown;
            return Ok(Planned::Lookup(relid));
        }
        let relation = &self.relations[&relids[0]];
        let list = Some(relation.name.as_str()).filter(|_| relation.namespace == "terrace");
        if matches!(list, Some("sync_table" | "partition")) {
            self.routing_changed |= list == Some("sync_table");
            // Whatever follows in this transaction may go elsewhere.
            let others = self
                .relations
                .values_mut()
                .filter(|r| r.namespace != "terrace");
            others.for_each(|other| other.looked_up = false);
        }
        let relation = &self.relations[&relids[0]];
        // A seal is for this transaction in the stream, not for the table here.
        let sealing = relation.namespace == "terrace" && relation.name == "seal";
        if sealing || !relation.routed && relids.len() == 1 {
            return Ok(Planned::Nothing);
        }
        let mut cleared = Vec::new();
        let (sql, values, expect) = match message {
            Message::Insert { new, .. } => insert(relation, new, payload)?,
            Message::Update { old, new, .. } => update(relation, old, new, payload)?,
            Message::Delete { old, .. } => delete(relation, old, payload)?,
            Message::Truncate { options, relids } => {
                let routed = relids
                    .iter()
                    .filter_map(|relid| self.relations.get(relid))
                    .filter(|relation| relation.routed);
                let (elsewhere, here): (Vec<_>, Vec<_>) =
                    routed.partition(|relation| relation.place.is_some());
                cleared.extend(elsewhere.into_iter().map(clear_partition));
                let tables: Vec<String> = here.into_iter().map(Relation::rows).collect();
                if tables.is_empty() {
                    return Ok(match cleared.is_empty() {
                        true => Planned::Nothing,
                        false => Planned::Steps(cleared),
                    });
                }
                let restart = if options & TRUNCATE_RESTART_IDENTITY != 0 {
                    " RESTART IDENTITY"
                } else {
                    ""
                };
                let sql = format!("TRUNCATE {}{restart}", tables.join(", "));
                (sql, Vec::new(), Expect::Done)
            }
            _ => return Ok(Planned::Nothing),
        };
        if sql.is_empty() {
            return Ok(Planned::Nothing);
        }
        cleared.push(self.step(sql, values, expect));
        Ok(Planned::Steps(cleared))
    }

    /// Whether a schema record says what is known already.
    pub fn knows(&self, record: &Record) -> bool {
        let body = record.body();
        match pgoutput::decode(&body) {
            Ok(Message::Relation(relation)) => self.is_defined(relation.relid, &body),
            decoded => decoded.is_ok(),
        }
    }

    fn is_defined(&self, relid: u32, definition: &Bytes) -> bool {
        let known = self.relations.get(&relid);
        known.is_some_and(|known| known.definition == *definition)
    }

    /// Adds a message to a fold.
    pub fn fold_into<'a>(
        &mut self,
        fold: &mut Fold<'a>,
        payload: &'a [u8],
    ) -> anyhow::Result<Folded> {
        let message = pgoutput::decode(payload)?;
        let relid = match &message {
            Message::Insert { relid, .. }
            | Message::Update { relid, .. }
            | Message::Delete { relid, .. } => *relid,
            Message::Begin { .. } => {
                self.seals.clear();
                return Ok(Folded::Added);
            }
            Message::Commit { .. } => return Ok(Folded::Added),
            Message::Logical { prefix, .. } if *prefix != SEND_PREFIX && !is_order(prefix) => {
                return Ok(Folded::Added);
            }
            _ => return Ok(Folded::Not),
        };
        let relation = self
            .relations
            .get(&relid)
            .context("change of an undefined relation")?;
        Ok(match &relation.shape {
            // What it says of the routing must be seen.
            _ if relation.namespace == "terrace" => Folded::Not,
            _ if self.is_unknown(relation) => Folded::Lookup(relid),
            _ if !relation.routed => Folded::Added,
            None => Folded::Not,
            Some(shape) => match fold.add(relid, shape, &message) {
                Ok(()) => Folded::Added,
                Err(NotFoldable) => Folded::Not,
            },
        })
    }

    /// Whether a table must be looked up first. One that goes elsewhere need not be, unless
    /// this transaction may have changed that.
    fn is_unknown(&self, relation: &Relation) -> bool {
        !relation.looked_up && (relation.routed || self.routing_changed)
    }

    /// Name of the prepared statement of this text, and whether it is to be prepared.
    pub fn statement(&mut self, sql: &str) -> (String, bool) {
        if let Some(name) = self.statements.get(sql) {
            return (name.clone(), false);
        }
        self.named += 1;
        let name = format!("t{}", self.named);
        self.statements.insert(sql.to_owned(), name.clone());
        (name, true)
    }

    fn step(&mut self, sql: String, values: Vec<Option<Bytes>>, expect: Expect) -> Step {
        let (name, parse) = self.statement(&sql);
        Step {
            name,
            sql,
            parse,
            values,
            expect,
            notify: None,
        }
    }

    fn relation_of<'a>(&self, message: &Message<'a>) -> Option<&Relation> {
        match message {
            Message::Insert { relid, .. }
            | Message::Update { relid, .. }
            | Message::Delete { relid, .. } => self.relations.get(relid),
            _ => None,
        }
    }

    /// Names of the columns of the table that a message changes a row of.
    pub(super) fn column_names(&self, message: &Message<'_>) -> Option<Vec<&str>> {
        let columns = &self.relation_of(message)?.columns;
        Some(columns.iter().map(|column| column.name.as_str()).collect())
    }

    /// `schema.table` that the message changes.
    pub fn table_of(&self, payload: &Bytes) -> anyhow::Result<String> {
        let message = pgoutput::decode(payload)?;
        Ok(self
            .relation_of(&message)
            .map(Relation::table)
            .unwrap_or_default())
    }

    /// For an insert, or an update to another key: the statement that removes a row
    /// that has the primary key already, and what PostgreSQL calls such a conflict.
    pub fn clear_way(&self, payload: &Bytes) -> anyhow::Result<Option<(Step, &'static str)>> {
        let message = pgoutput::decode(payload)?;
        let Some(relation) = self.relation_of(&message) else {
            return Ok(None);
        };
        let (new, kind) = match &message {
            Message::Insert { new, .. } => (new, "insert_exists"),
            Message::Update {
                old: Some((_, old)),
                new,
                ..
            } if moves(relation, *old, *new) => (new, "update_exists"),
            _ => return Ok(None),
        };
        if !relation.routed || !relation.has_primary() {
            return Ok(None);
        }
        let mut values = Vec::new();
        let mut clause = primary_clause(relation, *new, payload, &mut values);
        if let Message::Update {
            old: Some((_, old)),
            ..
        } = &message
        {
            // Two texts may be one value: the row itself is in nobody's way.
            let itself = primary_clause(relation, *old, payload, &mut values);
            clause = format!("{clause} AND NOT ({itself})");
        }
        let sql = format!("DELETE FROM {} WHERE {clause}", relation.rows());
        Ok(Some((unnamed(sql, values, Expect::Done), kind)))
    }

    /// For an update whose row is missing: the insert of its new row, if that is whole.
    pub fn insert_instead(&self, payload: &Bytes) -> anyhow::Result<Option<Step>> {
        let message = pgoutput::decode(payload)?;
        let (Message::Update { new, .. }, Some(relation)) = (&message, self.relation_of(&message))
        else {
            return Ok(None);
        };
        if new.iter().any(|datum| datum == Datum::Unchanged) {
            return Ok(None);
        }
        let (sql, values, expect) = insert(relation, *new, payload)?;
        Ok(Some(unnamed(sql, values, expect)))
    }
}

/// Whether an update gives the row another primary key.
fn moves(relation: &Relation, old: Tuple<'_>, new: Tuple<'_>) -> bool {
    let is_primary = |column: &Column| column.local.as_ref().is_some_and(|local| local.primary);
    let columns = relation.columns.iter().zip(old.iter().zip(new.iter()));
    columns
        .filter(|(column, _)| is_primary(column))
        .any(|(_, (old, new))| new != Datum::Unchanged && old != new)
}

/// Only a table whose one unique constraint is the primary key, the same here and at
/// the top, can be changed row by row in any order; one without any can be added to.
fn shape(relation: &Relation, primaries: usize) -> Option<Shape> {
    let (mut columns, mut keys) = (Vec::new(), Vec::new());
    for (index, column) in relation.columns.iter().enumerate() {
        let local = column.local.as_ref()?;
        // With REPLICA IDENTITY FULL every column is key at the top.
        let key = column.key && relation.identity != b'f';
        if key != local.primary || key && (local.generated || !local.comparable) {
            return None;
        }
        keys.extend(key.then_some(index));
        columns.push(ShapeColumn {
            name: quote_ident(&column.name),
            type_name: local.type_name.clone(),
            generated: local.generated,
        });
    }
    let is_written = columns.iter().any(|column| !column.generated);
    (is_written && keys.len() == primaries).then(|| Shape {
        table: relation.qualified(),
        columns,
        keys,
    })
}

/// The table here that holds the rows of a partition of the top, if that is not one of its name.
pub async fn other_place(
    client: &mut Client,
    namespace: &str,
    name: &str,
) -> anyhow::Result<Option<String>> {
    let sql = "SELECT place FROM terrace.place_of($1, $2) place \
               WHERE place <> pg_catalog.format('%I.%I', $1, $2)";
    let rows = client
        .query(sql, &[Some(namespace), Some(name)])
        .await
        .context("look for the table that holds the rows of a partition")?;
    Ok(rows
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().next()?))
}

/// A key of a partition alone may be that of several rows of the whole.
async fn must_tell_rows_apart(
    client: &mut Client,
    place: &str,
    keys: &[&str],
    table: &str,
) -> anyhow::Result<()> {
    let sql = "SELECT 1 FROM pg_catalog.pg_index i \
               WHERE i.indrelid = pg_catalog.to_regclass($1) AND i.indisunique AND i.indisvalid \
                 AND i.indpred IS NULL AND i.indexprs IS NULL \
                 AND NOT EXISTS (SELECT FROM pg_catalog.unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) n \
                     JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = n \
                     WHERE a.attname <> ALL (pg_catalog.string_to_array($2, E'\\x01')))";
    let unique = client
        .query(sql, &[Some(place), Some(&keys.join("\u{1}"))])
        .await?;
    if unique.is_empty() {
        bail!(
            "rows of partition \"{table}\" go to {place} here, which has no unique index on the key that it \
             has at the top, ({}); make one",
            keys.join(", ")
        );
    }
    Ok(())
}

/// TRUNCATE of a partition that is none here.
fn clear_partition(relation: &Relation) -> Step {
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

/// The notification that a message asks for, if Postgres would take it.
fn notify(content: Bytes) -> Option<Step> {
    let message: serde_json::Value = serde_json::from_slice(&content).ok()?;
    let field = |name: &str, lengths: std::ops::RangeInclusive<usize>| {
        let text = message[name].as_str()?;
        let fits = lengths.contains(&text.len()) && !text.contains('\0');
        fits.then(|| Bytes::from(text.to_owned()))
    };
    let values = vec![
        Some(field("channel", 1..=63)?),
        Some(field("payload", 0..=7999)?),
    ];
    let mut step = unnamed(
        "SELECT pg_catalog.pg_notify($1, $2)".into(),
        values,
        Expect::Done,
    );
    step.notify = Some(content);
    Some(step)
}

/// Values of a statement of our own.
pub(super) fn texts<const N: usize>(values: [String; N]) -> Vec<Option<Bytes>> {
    values.map(|text| Some(Bytes::from(text))).to_vec()
}

type Statement = (String, Vec<Option<Bytes>>, Expect);

fn check_width(relation: &Relation, tuple: Tuple<'_>) -> anyhow::Result<()> {
    if tuple.len() != relation.columns.len() {
        bail!(
            "row of table \"{}\" has {} columns",
            relation.table(),
            tuple.len()
        );
    }
    Ok(())
}

fn insert(relation: &Relation, new: Tuple<'_>, payload: &Bytes) -> anyhow::Result<Statement> {
    check_width(relation, new)?;
    let datums: Vec<Datum<'_>> = new.iter().collect();
    let (mut names, mut places, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (index, column) in relation.writable() {
        names.push(quote_ident(&column.name));
        values.push(value(datums[index], payload));
        places.push(format!("${}", values.len()));
    }
    let sql = format!(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})",
        relation.qualified(),
        names.join(", "),
        places.join(", ")
    );
    Ok((sql, values, Expect::Done))
}

fn update(
    relation: &Relation,
    old: Option<(OldKind, Tuple<'_>)>,
    new: Tuple<'_>,
    payload: &Bytes,
) -> anyhow::Result<Statement> {
    check_width(relation, new)?;
    let datums: Vec<Datum<'_>> = new.iter().collect();
    let (mut sets, mut values) = (Vec::new(), Vec::new());
    for (index, column) in relation.writable() {
        if datums[index] != Datum::Unchanged {
            values.push(value(datums[index], payload));
            sets.push(format!("{} = ${}", quote_ident(&column.name), values.len()));
        }
    }
    if sets.is_empty() {
        return Ok((String::new(), values, Expect::Done));
    }
    let (kind, identity) = old.unwrap_or((OldKind::Key, new));
    let clause = row_clause(relation, kind, identity, payload, &mut values)?;
    let sql = format!(
        "UPDATE {} SET {} WHERE {clause}",
        relation.rows(),
        sets.join(", ")
    );
    Ok((sql, values, Expect::One))
}

fn delete(
    relation: &Relation,
    (kind, old): (OldKind, Tuple<'_>),
    payload: &Bytes,
) -> anyhow::Result<Statement> {
    let mut values = Vec::new();
    let clause = row_clause(relation, kind, old, payload, &mut values)?;
    let sql = format!("DELETE FROM {} WHERE {clause}", relation.rows());
    Ok((sql, values, Expect::Delete(relation.table())))
}

/// The condition that holds for exactly the row that `old` describes.
fn row_clause(
    relation: &Relation,
    kind: OldKind,
    old: Tuple<'_>,
    payload: &Bytes,
    values: &mut Vec<Option<Bytes>>,
) -> anyhow::Result<String> {
    check_width(relation, old)?;
    if kind == OldKind::Full {
        if relation.has_primary() {
            return Ok(primary_clause(relation, old, payload, values));
        }
        // Without a key equal rows are alike: any one of them is the one.
        let clause = clause(relation, old, payload, values, |_| true);
        let table = relation.rows();
        // Partitions count their rows each by itself.
        let (place, columns) = match relation.only {
            true => ("ctid", "ctid"),
            false => ("(tableoid, ctid)", "tableoid, ctid"),
        };
        return Ok(format!(
            "{place} = (SELECT {columns} FROM {table} WHERE {clause} LIMIT 1)"
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

fn primary_clause(
    relation: &Relation,
    row: Tuple<'_>,
    payload: &Bytes,
    values: &mut Vec<Option<Bytes>>,
) -> String {
    clause(relation, row, payload, values, |column| {
        column.local.as_ref().is_some_and(|local| local.primary)
    })
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
            Datum::Null => terms.push(format!("{name} IS NULL")),
            // Not sent because not changed: the other columns must do.
            Datum::Unchanged => {}
            Datum::Text(_) => {
                values.push(value(datum, payload));
                let place = values.len();
                let comparable = column.local.as_ref().is_none_or(|local| local.comparable);
                terms.push(if comparable {
                    format!("{name} = ${place}")
                } else {
                    format!("{name}::pg_catalog.text = ${place}::pg_catalog.text")
                });
            }
        }
    }
    terms.join(" AND ")
}
