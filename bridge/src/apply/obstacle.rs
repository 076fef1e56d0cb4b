//! Rows that have a value already which must be unique here, and are none of the top's.
//!
//! The primary key is the top's everywhere, so a row that has it makes way at once
//! ([`super::careful`]). Of another unique value that is not known: the constraint may be one of
//! this server alone, and the row that is in the way one of the top's. So a transaction that a
//! unique value stops is gone through once more, and the server above is asked.
//!
//! Guarantee: a row is removed only if the server above, at or beyond the end of that transaction,
//! has no row of its primary key and holds the same columns unique. Where they are unique all the way
//! up, the top cannot have had both rows; where they are not, the lowest server that has the
//! constraint and whose parent has not stalls at the transaction, and those below it are ahead of it.
//! Otherwise the server stalls as before, and a person decides. (A row that a server above put aside
//! or skipped is none that it has.)

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use tokio::time::timeout;

use super::Session;
use super::plan::Planner;
use super::relation::{Column, IS_UNIQUE, KEY_COLUMNS, Relation, listed, unique_by};
use super::skip::refused;
use super::statement::{Expect, Step, Written, others, unnamed};
use crate::client::{Client, PgError, SessionOptions, quote_ident, quote_literal, quote_table};
use crate::lsn::{Identity, Lsn};
use crate::pgoutput;
use crate::upstream::reading_settings;

/// The table may be locked above.
const PATIENCE: &str = "10s";
/// Longer, the transaction here is not kept open.
const LIMIT: Duration = Duration::from_secs(15);

/// A row that may be in the way of a change.
struct Obstacle {
    /// Gives its primary key, if there is one.
    find: String,
    remove: Step,
    /// Asked above: whether there is a row of that key, whether `columns` are unique, and whose
    /// history is known up to where.
    above: String,
    columns: String,
}

/// Whether a row is refused for a value that another one has (unique_violation).
pub(super) fn is_in_the_way(error: &anyhow::Error) -> bool {
    refused(error).and_then(PgError::code) == Some("23505")
}

impl Session<'_> {
    /// Removes what is in the way of this change, of a transaction that ends at `end`, and not known
    /// above; how many rows by each of the constraints.
    pub(super) async fn remove_obstacles(
        &mut self,
        payload: &Bytes,
        end: Lsn,
    ) -> anyhow::Result<Vec<u64>> {
        let Some(table) = self.planner.own_table(payload)? else {
            return Ok(Vec::new());
        };
        let sql = format!(
            "SELECT pg_catalog.to_json(ARRAY(SELECT a.attname {KEY_COLUMNS})) \
             FROM pg_catalog.pg_index i \
             WHERE i.indrelid = pg_catalog.to_regclass($1) AND {IS_UNIQUE} \
               AND i.indimmediate AND NOT i.indisprimary"
        );
        let keys = self.client.query(&sql, &[Some(&table)]).await?;
        let mut gone = Vec::new();
        for key in keys.into_iter().flatten().flatten() {
            let key: Vec<String> = serde_json::from_str(&key)?;
            if let Some(obstacle) = self.planner.obstacle(payload, &key)? {
                gone.push(self.remove_obstacle(obstacle, end).await?);
            }
        }
        Ok(gone)
    }

    async fn remove_obstacle(&mut self, obstacle: Obstacle, end: Lsn) -> anyhow::Result<u64> {
        let values = obstacle.remove.texts()?;
        let found = self.client.query(&obstacle.find, &values).await?;
        // More than one are none that this constraint keeps apart.
        let [row] = found.as_slice() else {
            return Ok(0);
        };
        let mut asked: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
        asked.push(Some(&obstacle.columns));
        match self.is_nobodys(&obstacle.above, &asked, end).await? {
            true => self.run_step(&obstacle.remove).await,
            false => Ok(0),
        }
    }

    /// Asks the server above, which must have come to `end`.
    async fn is_nobodys(
        &self,
        sql: &str,
        asked: &[Option<&str>],
        end: Lsn,
    ) -> anyhow::Result<bool> {
        let above = self
            .shared
            .upstream()
            .context("no server above is in sight")?;
        let mut gucs = reading_settings();
        gucs.push(("statement_timeout".into(), PATIENCE.into()));
        let options = SessionOptions {
            application_name: format!("terrace {}", self.shared.config.node.name),
            gucs,
            ..Default::default()
        };
        let answer = async {
            let mut client = Client::connect(&above, &options).await?;
            client.query(sql, asked).await
        };
        let endpoint = above.endpoint();
        // Whatever is wrong there is not wrong with the row.
        let rows = match timeout(LIMIT, answer).await {
            Ok(Ok(rows)) => rows,
            Ok(Err(error)) => bail!("ask {endpoint} for a row that is in the way: {error}"),
            Err(_) => bail!("ask {endpoint} for a row that is in the way: no answer"),
        };
        let Some([Some(there), Some(unique), position, identity, Some(system)]) =
            rows.first().map(Vec::as_slice)
        else {
            bail!("{endpoint} gave no answer");
        };
        let ours = self.queue.identity();
        // The top has no position of its own: it is ahead of all. Nor has a server that is
        // copied to.
        let has_come = match (position, identity) {
            (Some(position), Some(identity)) => {
                let theirs: Identity = identity.parse()?;
                let same = theirs.continues(&ours) || ours.continues(&theirs);
                same && position.parse::<Lsn>()? >= end
            }
            _ => system.parse::<i64>()?.cast_unsigned() == ours.system_id,
        };
        if !has_come {
            bail!(
                "{endpoint} has not come to {end}, and cannot tell yet whose a row is that is in the way"
            );
        }
        Ok(there == "f" && unique == "t")
    }
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
    fn obstacle(&self, payload: &Bytes, key: &[String]) -> anyhow::Result<Option<Obstacle>> {
        let message = pgoutput::decode(payload)?;
        let Some(relation) = self.relation_of(&message) else {
            return Ok(None);
        };
        let Some(written) = Written::by(&message) else {
            return Ok(None);
        };
        let is_of_key = |column: &Column| key.contains(&column.name);
        // Columns that are of this server alone are not told.
        if relation.columns.iter().filter(|c| is_of_key(c)).count() < key.len() {
            return Ok(None);
        }
        let Some((condition, values)) = others(relation, is_of_key, written, payload)? else {
            return Ok(None);
        };
        let (mut names, mut terms) = (Vec::new(), Vec::new());
        for column in &relation.columns {
            if let Some(local) = column.local.as_ref().filter(|local| local.primary) {
                let name = quote_ident(&column.name);
                terms.push(local.equals(&name, terms.len() + 1));
                names.push(name);
            }
        }
        let last = terms.len() + 1;
        let (names, terms) = (names.join(", "), terms.join(" AND "));
        let rows = relation.rows();
        let sql = format!("DELETE FROM {rows} WHERE {condition}");
        // Above, rows of tables that inherit from it may be its rows.
        let table = quote_table(&relation.namespace, &relation.name);
        let unique = unique_by(&quote_literal(&table), last);
        let width = key.len();
        Ok((!names.is_empty()).then(|| Obstacle {
            find: format!("SELECT {names} FROM {rows} WHERE {condition}"),
            remove: unnamed(sql, values, Expect::Done),
            above: format!(
                "SELECT EXISTS (SELECT FROM {table} WHERE {terms}), \
                     EXISTS ({unique} AND i.indimmediate AND i.indnkeyatts = {width}), \
                     p.lsn, p.identity, c.system_identifier \
                 FROM pg_catalog.pg_control_system() c LEFT JOIN terrace.progress p ON true"
            ),
            columns: listed(key),
        }))
    }
}
