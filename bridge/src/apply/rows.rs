//! Rows that the top has already, which take the place of what is here.
//!
//! They come for a whole table, or in pieces: ranges of its key, each a transaction, all of one state
//! of the table, whose writers wait meanwhile (`pg_ext/src/hold.rs`). What is here in the ranges of
//! this piece makes way for its rows.
//!
//! Guarantee: when the last piece is applied, there is what the top has, also where a value that must be
//! unique has gone from one range to another since this server had it. A row that has it here is of a range
//! that comes later, or the top would have the value twice; so it may go now, and comes again with that
//! range if it is one of the top's. Nothing else is removed: where a constraint of this server alone holds
//! apart what the top has both, it is refused, as it is in the stream. A table at the top with a constraint
//! of which no equality of columns tells what is in the way goes at once (`terrace.goes_in_pieces`); one
//! that was added goes by the places of its rows at the top, and all that is here makes way for the first
//! piece.

use anyhow::bail;
use bytes::Bytes;
use serde::Deserialize;

use super::Session;
use super::relation::{IS_UNIQUE, Input, other_place};
use super::skip::refused;
use crate::client::{PgError, quote_ident, quote_table};

/// A value is there already.
const UNIQUE_VIOLATION: &str = "23505";

/// Content of a `terrace.rows` message (`pg_ext/src/fill.rs`), but for the rows.
#[derive(Debug, Deserialize)]
pub struct Rows {
    table: (String, String),
    columns: Vec<String>,
    /// Condition of the rows that make way first.
    clear: Option<String>,
    /// Condition of the rows that other pieces bring, after this one.
    later: Option<String>,
    /// For these alone.
    domains: Option<Vec<String>>,
    #[serde(skip)]
    message: Bytes,
}

impl Rows {
    pub fn read(message: Bytes) -> serde_json::Result<Rows> {
        let mut rows: Rows = serde_json::from_slice(&message)?;
        rows.message = message;
        Ok(rows)
    }

    fn is_empty(&self) -> bool {
        self.message.ends_with(b"\"rows\":[]}")
    }
}

/// Where rows go.
struct Place {
    /// As SQL names the table.
    table: String,
    /// As it is to be named where rows of others that inherit from it are not meant.
    only: String,
    /// Its columns, of those that come: the name and the value in one of [`ROWS`].
    columns: Vec<(String, String)>,
}

impl Place {
    fn insert(&self) -> String {
        let (names, values): (Vec<_>, Vec<_>) = self.columns.iter().cloned().unzip();
        let names = match names.is_empty() {
            true => String::new(),
            false => format!(" ({}) OVERRIDING SYSTEM VALUE", names.join(", ")),
        };
        format!(
            "INSERT INTO {}{names} SELECT {} FROM {ROWS}",
            self.table,
            values.join(", ")
        )
    }
}

/// SQL: the rows of a message.
const ROWS: &str =
    "pg_catalog.json_array_elements($1::pg_catalog.json -> 'rows') AS sent (terrace_row)";

impl Session<'_> {
    pub(super) async fn take_rows(&mut self, rows: &Rows) -> anyhow::Result<()> {
        let (namespace, name) = &rows.table;
        let domain = &self.shared.config.node.domain;
        if rows
            .domains
            .as_ref()
            .is_some_and(|domains| !domains.contains(domain))
        {
            return Ok(());
        }
        self.planner.refresh_routing(&mut self.client).await?;
        if !self.planner.is_routed(namespace, name) {
            return Ok(());
        }
        let elsewhere = other_place(&mut self.client, namespace, name).await?;
        let is_elsewhere = elsewhere.is_some();
        let table = elsewhere.unwrap_or_else(|| quote_table(namespace, name));
        let Some(place) = self.place_of(rows, table).await? else {
            return Ok(());
        };
        if let Some(condition) = &rows.clear {
            if is_elsewhere {
                let sql = "SELECT terrace.clear_partition($1, $2, $3)";
                let which = [Some(namespace.as_str()), Some(name), Some(condition)];
                self.client.query(sql, &which).await?;
            } else {
                let sql = format!("DELETE FROM {} WHERE {condition}", place.only);
                self.client.simple(&sql).await?;
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        match &rows.later {
            // Another table here has rows of others too, with values that need not be unique there.
            Some(later) if !is_elsewhere => self.insert_with_room(rows, &place, later).await,
            _ => self.with_rows(rows, &place.insert()).await,
        }
    }

    /// `None` where there is no table and no row for it.
    async fn place_of(&mut self, rows: &Rows, table: String) -> anyhow::Result<Option<Place>> {
        let (namespace, name) = &rows.table;
        let known = self
            .client
            .query(
                "SELECT a.attname, pg_catalog.format_type(a.atttypid, -1), c.relkind = 'r' \
                 FROM pg_catalog.pg_class c \
                 LEFT JOIN pg_catalog.pg_attribute a \
                   ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                 WHERE c.oid = pg_catalog.to_regclass($1)",
                &[Some(&table)],
            )
            .await?;
        if known.is_empty() && rows.is_empty() {
            return Ok(None);
        }
        let Some(plain) = known.first().map(|row| row[2].as_deref() == Some("t")) else {
            bail!(
                "table \"{namespace}.{name}\" does not exist on this server; create it here with \
                 the columns that it has at the top"
            );
        };
        let only = if plain { "ONLY " } else { "" };
        let mut place = Place {
            only: format!("{only}{table}"),
            table,
            columns: Vec::new(),
        };
        let wanted = if rows.is_empty() {
            &[][..]
        } else {
            &rows.columns
        };
        for (number, column) in wanted.iter().enumerate() {
            let found = known.iter().find(|row| row[0].as_ref() == Some(column));
            let Some(Some(kind)) = found.map(|row| &row[1]) else {
                bail!("table \"{namespace}.{name}\" has no column \"{column}\" on this server");
            };
            let input = Input {
                type_name: kind.clone(),
                plain: false,
            };
            let value = input.read(&format!("sent.terrace_row ->> {number}"));
            place.columns.push((quote_ident(column), value));
        }
        Ok(Some(place))
    }

    /// Runs a statement that reads [`ROWS`].
    async fn with_rows(&mut self, rows: &Rows, sql: &str) -> anyhow::Result<()> {
        let message = std::str::from_utf8(&rows.message)?;
        self.client.execute(sql, &[Some(message)]).await?;
        Ok(())
    }

    /// Of the rows that come again later those make way that have what must be unique.
    async fn insert_with_room(
        &mut self,
        rows: &Rows,
        place: &Place,
        later: &str,
    ) -> anyhow::Result<()> {
        let insert = place.insert();
        let kept_apart = self.same_values(place).await?;
        if kept_apart.is_empty() {
            return self.with_rows(rows, &insert).await;
        }
        self.client.simple("SAVEPOINT terrace_rows").await?;
        if let Err(error) = self.with_rows(rows, &insert).await {
            if refused(&error).and_then(PgError::code) != Some(UNIQUE_VIOLATION) {
                return Err(error);
            }
            let back = "ROLLBACK TO SAVEPOINT terrace_rows";
            self.client.simple(back).await?;
            for same in kept_apart {
                let sql = format!(
                    "DELETE FROM {} AS own WHERE ({later}) AND EXISTS (SELECT FROM {ROWS} WHERE {same})",
                    place.only
                );
                self.with_rows(rows, &sql).await?;
            }
            self.with_rows(rows, &insert).await?;
        }
        self.client.simple("RELEASE SAVEPOINT terrace_rows").await?;
        Ok(())
    }

    /// For each index that keeps values apart, the condition that row `own` has
    /// those of the one that is sent.
    async fn same_values(&mut self, place: &Place) -> anyhow::Result<Vec<String>> {
        let sql = format!(
            "SELECT pg_catalog.json_agg(pg_catalog.json_build_array(a.attname, \
                 pg_catalog.format('OPERATOR(%I.%s)', n.nspname, o.oprname)))::text \
             FROM pg_catalog.pg_index i \
             CROSS JOIN ROWS FROM (pg_catalog.unnest(i.indkey), pg_catalog.unnest(i.indclass)) k (attnum, class) \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
             JOIN pg_catalog.pg_opclass c ON c.oid = k.class \
             JOIN pg_catalog.pg_amop m ON m.amopfamily = c.opcfamily AND m.amopstrategy = 3 \
               AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype \
             JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr \
             JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace \
             WHERE i.indrelid = pg_catalog.to_regclass($1) AND {IS_UNIQUE} \
             GROUP BY i.indexrelid"
        );
        let indexes = self.client.query(&sql, &[Some(&place.table)]).await?;
        let mut conditions = Vec::new();
        for columns in indexes.iter().filter_map(|row| row[0].as_deref()) {
            let columns: Vec<(String, String)> = serde_json::from_str(columns)?;
            let same = columns.iter().map(|(name, operator)| {
                let name = quote_ident(name);
                let (_, value) = place.columns.iter().find(|(own, _)| *own == name)?;
                Some(format!("own.{name} {operator} {value}"))
            });
            // What does not come from above, nothing here can be in the way of.
            conditions.extend(
                same.collect::<Option<Vec<_>>>()
                    .map(|all| all.join(" AND ")),
            );
        }
        Ok(conditions)
    }
}
