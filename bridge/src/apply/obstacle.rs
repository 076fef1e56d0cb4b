//! Rows that have a value already which must be unique here, and are none of the top's.
//!
//! A row that has the primary key of one of the top's makes way at once ([`super::careful`]), where
//! that key is known to be one at the top. Of another unique value that is not known: the constraint may
//! be one of this server alone, and the row that is in the way one of the top's. So a transaction that a
//! unique value stops is gone through once more, and the server above is asked.
//!
//! Guarantee: a row is removed only if the server above, at or beyond the end of that transaction in the
//! same history, has the same constraint (columns, types, collations, operators) and the same primary
//! key, and no row of that key; or if it is by the primary key itself that it is in the way. Where the
//! constraint was there all the way up, the top cannot have had both rows; where it is not, the lowest server
//! that has it and whose parent has not stalls at the transaction, and those below it are ahead of it.
//! Otherwise the server stalls as before, and a person decides. What is removed is kept in
//! `terrace.quarantine`, for there are things that the server above cannot tell: a row that it put aside,
//! skipped, or lost to somebody's hand is none that it has, and a constraint that was made there after
//! the transaction is one that it has.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::timeout;

use super::Session;
use super::plan::Planner;
use super::relation::{Column, IS_UNIQUE, KEY, Relation};
use super::skip::refused;
use super::statement::{Expect, Step, Written, others, unnamed};
use crate::client::{Client, PgError, SessionOptions, quote_ident, quote_literal, quote_table};
use crate::conninfo::ConnInfo;
use crate::lsn::{Identity, Lsn};
use crate::pgoutput::{self, Message};
use crate::upstream::reading_settings;

/// The table may be locked above.
const PATIENCE: &str = "10s";
/// Longer, the transaction here is not kept open.
const LIMIT: Duration = Duration::from_secs(15);

/// SQL: what makes index `i` the same constraint on another server.
const SIGNATURE: &str = "(SELECT pg_catalog.concat_ws(' ', pg_catalog.string_agg(pg_catalog.concat_ws(' ', \
           pg_catalog.quote_ident(a.attname), pg_catalog.format_type(a.atttypid, a.atttypmod), \
           l.collnamespace::pg_catalog.regnamespace, l.collname, l.collisdeterministic, \
           o.opcnamespace::pg_catalog.regnamespace, o.opcname), ', ' ORDER BY a.attname), i.indnullsnotdistinct) \
     FROM ROWS FROM (pg_catalog.unnest(i.indkey), pg_catalog.unnest(i.indclass), \
                     pg_catalog.unnest(i.indcollation)) WITH ORDINALITY k (attnum, class, coll, n) \
     JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
     JOIN pg_catalog.pg_opclass o ON o.oid = k.class \
     LEFT JOIN pg_catalog.pg_collation l ON l.oid = k.coll \
     WHERE k.n <= i.indnkeyatts)";

/// What a transaction is gone through with once more.
pub(super) struct Clearing {
    /// Where it ends.
    pub end: Lsn,
    /// A session with the server above, once that has been asked.
    above: Option<Client>,
    /// It has not answered.
    silent: bool,
    tables: HashMap<String, Arc<Table>>,
}

impl Clearing {
    pub fn new(end: Lsn) -> Clearing {
        Clearing {
            end,
            above: None,
            silent: false,
            tables: HashMap::new(),
        }
    }

    /// What is known of the tables here may be so no more.
    pub fn forget_tables(&mut self) {
        self.tables.clear();
    }
}

/// A table here.
#[derive(Deserialize)]
struct Table {
    columns: Vec<String>,
    /// The constraints that hold all its rows apart at once.
    keys: Vec<Key>,
}

#[derive(Deserialize)]
struct Key {
    columns: Vec<String>,
    signature: String,
    primary: bool,
}

/// A row that may be in the way of a change.
struct Obstacle<'a> {
    key: &'a Key,
    primary: &'a Key,
    /// The table, by its name and its OID at the top.
    table: String,
    relid: u32,
    /// Gives its primary key, if there is one.
    find: String,
    remove: Step,
    /// Asked above: whether there is a row of that key.
    there: String,
}

/// The server above could not say, which is no fault of the transaction.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unanswered(String);

/// Whether a row is refused for a value that another one has (unique_violation).
pub(super) fn is_in_the_way(error: &anyhow::Error) -> bool {
    refused(error).and_then(PgError::code) == Some("23505")
}

impl Session<'_> {
    /// Removes what is in the way of this change and not known above; how many rows by each of the
    /// constraints. Nothing in a transaction that nothing has stopped yet.
    pub(super) async fn remove_obstacles(&mut self, payload: &Bytes) -> anyhow::Result<Vec<u64>> {
        let Some(mut clearing) = self.clears.take() else {
            return Ok(Vec::new());
        };
        let gone = self.clear(&mut clearing, payload).await;
        self.clears = Some(clearing);
        gone
    }

    async fn clear(
        &mut self,
        clearing: &mut Clearing,
        payload: &Bytes,
    ) -> anyhow::Result<Vec<u64>> {
        let mut gone = Vec::new();
        let Some(name) = self.planner.own_table(payload)? else {
            return Ok(gone);
        };
        let table = match clearing.tables.get(&name) {
            Some(table) => Arc::clone(table),
            None => {
                let table = Arc::new(self.read_table(&name).await?);
                clearing.tables.insert(name, Arc::clone(&table));
                table
            }
        };
        for key in &table.keys {
            if let Some(obstacle) = self.planner.obstacle(payload, &table, key, clearing.end)? {
                gone.push(self.remove_obstacle(clearing, obstacle).await?);
            }
        }
        Ok(gone)
    }

    async fn read_table(&mut self, name: &str) -> anyhow::Result<Table> {
        let sql = format!(
            "SELECT pg_catalog.json_build_object( \
               'columns', ARRAY(SELECT attname FROM pg_catalog.pg_attribute \
                                WHERE attrelid = t.oid AND attnum > 0 AND NOT attisdropped), \
               'keys', ARRAY(SELECT pg_catalog.json_build_object( \
                   'columns', ARRAY(SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = t.oid \
                                    AND attnum = ANY ({KEY})), \
                   'signature', {SIGNATURE}, 'primary', i.indisprimary) \
                 FROM pg_catalog.pg_index i \
                 WHERE i.indrelid = t.oid AND {IS_UNIQUE} AND i.indimmediate)) \
             FROM pg_catalog.to_regclass($1) t (oid)"
        );
        let rows = self.client.query(&sql, &[Some(name)]).await?;
        let text = rows
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next()?);
        Ok(serde_json::from_str(&text.context("no table")?)?)
    }

    async fn remove_obstacle(
        &mut self,
        clearing: &mut Clearing,
        obstacle: Obstacle<'_>,
    ) -> anyhow::Result<u64> {
        let found = self
            .client
            .query(&obstacle.find, &obstacle.remove.texts()?)
            .await?;
        // More than one are none that this constraint keeps apart.
        let [row] = found.as_slice() else {
            return Ok(0);
        };
        let row: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
        if clearing.silent {
            return Ok(0);
        }
        let is_nobodys = match self.ask_above(clearing, &obstacle, &row).await {
            // Whoever wants rows put aside does not want to wait for an answer, row by row.
            Err(error) if self.shared.config.apply.quarantines() => {
                tracing::warn!("{error:#}");
                clearing.silent = true;
                false
            }
            answer => answer?,
        };
        if !is_nobodys {
            return Ok(0);
        }
        let reason = format!(
            "a row of this server alone made way for one of table {}; see terrace.quarantine",
            obstacle.table
        );
        self.shared.event_once("quarantine", &reason);
        self.run_step(&obstacle.remove).await
    }

    /// Whether the row of this primary key is nobody's.
    async fn ask_above(
        &self,
        clearing: &mut Clearing,
        obstacle: &Obstacle<'_>,
        row: &[Option<&str>],
    ) -> anyhow::Result<bool> {
        let unanswered =
            |text: String| Unanswered(format!("ask for a row that is in the way: {text}"));
        let above = self.shared.followed();
        let above = above.ok_or_else(|| unanswered("no server above is followed".into()))?;
        let endpoint = above.endpoint();
        let client = clearing.above.take();
        let answer = async {
            let mut client = match client {
                Some(client) => client,
                None => self.session_above(&above).await?,
            };
            let answer = self
                .question(&mut client, obstacle, row, clearing.end)
                .await?;
            Ok::<_, anyhow::Error>((client, answer))
        };
        let (client, answer) = match timeout(LIMIT, answer).await {
            Ok(Ok(answered)) => answered,
            // Whatever is wrong there is not wrong with the row.
            Ok(Err(error)) => Err(unanswered(format!("{endpoint}: {error:#}")))?,
            Err(_) => Err(unanswered(format!("{endpoint} does not answer")))?,
        };
        clearing.above = Some(client);
        Ok(answer)
    }

    async fn session_above(&self, above: &ConnInfo) -> Result<Client, PgError> {
        let mut gucs = reading_settings();
        gucs.push(("statement_timeout".into(), PATIENCE.into()));
        // Whose operators and tables are meant is not for anybody there to say.
        gucs.push(("search_path".into(), "pg_catalog, pg_temp".into()));
        let options = SessionOptions {
            application_name: format!("terrace {}", self.shared.config.node.name),
            gucs,
            ..Default::default()
        };
        Client::connect(above, &options).await
    }

    async fn question(
        &self,
        client: &mut Client,
        obstacle: &Obstacle<'_>,
        row: &[Option<&str>],
        end: Lsn,
    ) -> anyhow::Result<bool> {
        let Obstacle {
            key,
            primary,
            table,
            ..
        } = obstacle;
        let asked = [Some(table), Some(&key.signature), Some(&primary.signature)];
        let rows = client
            .query(&about_table(), &asked.map(|text| text.map(String::as_str)))
            .await?;
        let [answer] = rows.as_slice() else {
            anyhow::bail!("no answer");
        };
        let is_same = self.is_far_enough(answer, obstacle.relid, end)?;
        let has = |column: usize| answer[column].as_deref() == Some("t");
        if !is_same || !has(1) || !has(2) {
            return Ok(false);
        }
        if key.primary {
            return Ok(true);
        }
        let rows = client.query(&obstacle.there, row).await?;
        Ok(rows.is_empty())
    }

    /// Whether it is the same table there, on a server that must have come to `end`.
    fn is_far_enough(
        &self,
        answer: &[Option<String>],
        relid: u32,
        end: Lsn,
    ) -> anyhow::Result<bool> {
        let [table, _, _, identity, position, system, database, timeline] = answer else {
            anyhow::bail!("no answer");
        };
        let ours = self.queue.identity();
        let is_top = identity.is_none();
        let theirs = match identity {
            Some(identity) => identity.parse()?,
            // The top has no progress; nor has a server that is copied to, which is another one.
            None => Identity {
                system_id: system
                    .as_deref()
                    .unwrap_or_default()
                    .parse::<i64>()?
                    .cast_unsigned(),
                timeline: timeline
                    .as_deref()
                    .map_or(Ok(0), |hex| u32::from_str_radix(hex, 16))?,
                database: database.clone().unwrap_or_default(),
                ..ours.clone()
            },
        };
        let position: Lsn = position.as_deref().map_or(Ok(Lsn::ZERO), str::parse)?;
        if theirs != ours || position < end {
            anyhow::bail!("it has not come to {end}, and cannot tell yet whose the row is");
        }
        let Some(table) = table else {
            return Ok(false);
        };
        Ok(!is_top || table.parse() == Ok(relid))
    }
}

/// About table $1: its OID, whether constraints $2 and $3 are there, whose history is known up to where,
/// and what tells a top from others.
fn about_table() -> String {
    let has = |number: usize| {
        format!(
            "EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND {IS_UNIQUE} \
                     AND i.indimmediate AND {SIGNATURE} = ${number})"
        )
    };
    format!(
        "SELECT c.oid, {}, {}, p.identity, \
                CASE WHEN p.identity IS NOT NULL THEN p.lsn \
                     WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_current_wal_insert_lsn() END, \
                s.system_identifier, pg_catalog.current_database(), \
                CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN \
                    pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8) END \
         FROM pg_catalog.pg_control_system() s LEFT JOIN terrace.progress p ON true \
         LEFT JOIN pg_catalog.pg_class c \
           ON c.oid = pg_catalog.to_regclass($1) AND c.relkind IN ('r', 'p')",
        has(2),
        has(3)
    )
}

impl Planner {
    /// The table that a message changes a row of, if its rows have one of that name here.
    fn own_table(&self, payload: &Bytes) -> anyhow::Result<Option<String>> {
        let message = pgoutput::decode(payload)?;
        let relation = self.relation_of(&message);
        let own = relation.filter(|relation| relation.routed && relation.place.is_none());
        Ok(own.map(Relation::qualified))
    }

    /// The row that has what this change gives to its own in the columns of `key`.
    fn obstacle<'a>(
        &self,
        payload: &Bytes,
        table: &'a Table,
        key: &'a Key,
        end: Lsn,
    ) -> anyhow::Result<Option<Obstacle<'a>>> {
        let message = pgoutput::decode(payload)?;
        let (Message::Insert { relid, .. } | Message::Update { relid, .. }) = message else {
            return Ok(None);
        };
        let Some(relation) = self.relation_of(&message) else {
            return Ok(None);
        };
        let Some(primary) = table.keys.iter().find(|key| key.primary) else {
            return Ok(None);
        };
        // By that it has made way already.
        if key.primary && relation.primary_is_the_tops() {
            return Ok(None);
        }
        let Some(written) = Written::by(&message) else {
            return Ok(None);
        };
        let is_of_key = |column: &Column| key.columns.contains(&column.name);
        // Columns that are of this server alone are not told.
        if relation.columns.iter().filter(|c| is_of_key(c)).count() < key.columns.len() {
            return Ok(None);
        }
        let Some((condition, values)) = others(relation, is_of_key, written, payload)? else {
            return Ok(None);
        };
        let (mut names, mut terms) = (Vec::new(), Vec::new());
        for column in &relation.columns {
            let is_primary = primary.columns.contains(&column.name);
            // What is written in two ways may be one value, of a row that is there.
            if let Some(local) = column
                .local
                .as_ref()
                .filter(|local| is_primary && local.equality.is_some())
            {
                let name = quote_ident(&column.name);
                terms.push(local.equals(&name, terms.len() + 1));
                names.push(name);
            }
        }
        if names.len() < primary.columns.len() {
            return Ok(None);
        }
        let (names, terms) = (names.join(", "), terms.join(" AND "));
        let rows = relation.rows();
        // Above, rows of tables that inherit from it may be its rows.
        let above = quote_table(&relation.namespace, &relation.name);
        Ok(Some(Obstacle {
            key,
            primary,
            relid,
            find: format!("SELECT {names} FROM {rows} WHERE {condition} FOR UPDATE"),
            remove: unnamed(
                keep_and_remove(relation, table, &condition, end),
                values,
                Expect::Done,
            ),
            there: format!("SELECT 1 FROM {above} WHERE {terms} LIMIT 1"),
            table: above,
        }))
    }
}

/// Removes rows, and keeps each in `terrace.quarantine`. No cast to text that somebody may have made.
fn keep_and_remove(relation: &Relation, table: &Table, condition: &str, end: Lsn) -> String {
    let names: Vec<String> = table
        .columns
        .iter()
        .map(|name| quote_literal(name))
        .collect();
    let texts = table.columns.iter().map(|name| {
        let name = quote_ident(name);
        format!(
            "CASE pg_catalog.num_nulls(g.{name}) WHEN 0 THEN pg_catalog.format('%s', g.{name}) END"
        )
    });
    let texts: Vec<String> = texts.collect();
    format!(
        "WITH g AS (DELETE FROM {} WHERE {condition} RETURNING *) \
         INSERT INTO terrace.quarantine (lsn, relation, kind, old, sqlstate, error) \
         SELECT {}, {}, 'LOCAL', pg_catalog.jsonb_object(ARRAY[{}]::text[], ARRAY[{}]::text[]), \
                '23505', 'has a unique value of a row of the top' FROM g",
        relation.rows(),
        quote_literal(&end.to_string()),
        quote_literal(&relation.table()),
        names.join(", "),
        texts.join(", ")
    )
}
