//! Messages that are obeyed: DDL, and rows that take the place of what is here ([`super::rows`]).
//!
//! Guarantee: anybody at the top may write a message, but obeyed is only one that a row of
//! `terrace.seal`, before it in the same transaction, announces by its SHA-256; nobody but
//! the extension writes that table. Such transactions go the careful way, one by one, each
//! as a local transaction of its own: what DDL changes (an enum's new value, say) may be
//! used from the next one on.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use bytes::Bytes;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::Session;
use super::rows::Rows;
use crate::client::quote_ident;
use crate::pgoutput::{Datum, Tuple};
use crate::record::{Kind, Record};

const DDL_PREFIX: &str = "terrace.ddl";
const ROWS_PREFIX: &str = "terrace.rows";
/// In the tag of a transaction that goes by itself.
const ALONE: &[u8] = b"\"alone\":true";
const UNDEFINED_COLUMN: &str = "42703";
/// A table, column, function or type is missing.
const UNDEFINED: [&str; 4] = ["42P01", UNDEFINED_COLUMN, "42883", "42704"];
/// So many bytes of a statement are shown.
const SHOWN: usize = 300;

/// What a sealed message asks for.
#[derive(Debug)]
pub enum SealedOrder {
    /// Run a statement.
    Ddl(Ddl),
    /// Take these rows for what is here.
    Rows(Rows),
}

/// Content of a `terrace.ddl` message (`pg_ext/src/ddl.rs`).
#[derive(Debug, Deserialize)]
pub struct Ddl {
    sql: String,
    role: String,
    superuser: bool,
    settings: BTreeMap<String, String>,
    outside: bool,
    #[serde(default)]
    index: Option<String>,
    about: Vec<(String, String)>,
    /// The table that it makes a partition for, or takes one from.
    #[serde(default)]
    part_of: Option<(String, String)>,
    /// It makes a view.
    #[serde(default)]
    view: bool,
}

impl Ddl {
    /// As much of the statement as people are shown.
    fn shown(&self) -> &str {
        &self.sql[..self.sql.floor_char_boundary(SHOWN)]
    }
}

/// Whether a message of this prefix is obeyed when it is sealed.
pub fn is_order(prefix: &str) -> bool {
    prefix == DDL_PREFIX || prefix == ROWS_PREFIX
}

/// What the transaction under way has said so far.
#[derive(Default)]
pub struct Seals {
    digests: Vec<Vec<u8>>,
    /// Slices of comparisons: which, and its number there.
    pub(super) slices: Vec<(String, String)>,
}

impl Seals {
    /// At the begin of a transaction.
    pub fn clear(&mut self) {
        self.digests.clear();
        self.slices.clear();
    }

    /// Takes in a row that is inserted into a table of the extension.
    pub fn note(&mut self, table: &str, row: Tuple<'_>) {
        let mut texts = row.iter().map_while(|datum| match datum {
            Datum::Text(text) => Some(text),
            _ => None,
        });
        match (table, texts.next(), texts.next()) {
            ("seal", Some(digest), None) => self.digests.extend(hex(digest)),
            ("slice", Some(comparison), Some(number)) => {
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                let slice = (text(comparison), text(number));
                // A change may be planned twice.
                if !self.slices.contains(&slice) {
                    self.slices.push(slice);
                }
            }
            _ => {}
        }
    }

    /// The order in a message. One that nothing announces is nobody's.
    pub fn open(&mut self, prefix: &str, content: Bytes) -> anyhow::Result<Option<SealedOrder>> {
        if !is_order(prefix) {
            return Ok(None);
        }
        let digest = Sha256::new()
            .chain_update(prefix)
            .chain_update(b"\n")
            .chain_update(&content)
            .finalize();
        let announced = self
            .digests
            .iter()
            .position(|known| known[..] == digest[..]);
        // Each seal is for one message.
        if announced
            .map(|place| self.digests.swap_remove(place))
            .is_none()
        {
            tracing::warn!("a message {prefix} that is not the extension's is left out");
            return Ok(None);
        }
        let what = || format!("read a message {prefix}");
        Ok(Some(if prefix == DDL_PREFIX {
            SealedOrder::Ddl(serde_json::from_slice(&content).with_context(what)?)
        } else {
            SealedOrder::Rows(Rows::read(content).with_context(what)?)
        }))
    }
}

/// A bytea in its hexadecimal text form.
fn hex(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.strip_prefix(b"\\x")?.chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// Whether a transaction is to be applied by itself.
pub fn goes_alone(record: &Record) -> bool {
    record.kind == Kind::Commit && record.commit().is_ok_and(|info| info.tag_says(ALONE))
}

impl Session<'_> {
    pub(super) async fn obey(&mut self, order: &SealedOrder) -> anyhow::Result<()> {
        match order {
            SealedOrder::Ddl(ddl) => {
                let ran = self.run_ddl(ddl).await;
                ran.with_context(|| format!("run \"{}\"", ddl.shown()))?;
                // Whatever it was about may look different now.
                self.planner.forget_lookups();
                Ok(())
            }
            SealedOrder::Rows(rows) => self.take_rows(rows).await,
        }
    }

    async fn run_ddl(&mut self, ddl: &Ddl) -> anyhow::Result<()> {
        if self.is_foreign(ddl).await? {
            tracing::info!("left out, as nothing here is changed by it: {}", ddl.sql);
            return Ok(());
        }
        let known = self
            .client
            .query(
                "SELECT rolsuper::text FROM pg_catalog.pg_roles WHERE rolname = $1",
                &[Some(&ddl.role)],
            )
            .await?;
        let role = !known.is_empty();
        if !role && !ddl.superuser {
            bail!(
                "role \"{}\" does not exist on this server; create it, as it is at the top",
                ddl.role
            );
        }
        if !role {
            tracing::warn!(role = %ddl.role, "no such superuser here: it is run as the bridge's");
        }
        let is_super = known
            .first()
            .is_some_and(|row| row[0].as_deref() == Some("true"));
        if is_super && !ddl.superuser {
            bail!(
                "role \"{}\" is a superuser on this server and was none at the top; make it as it \
                 is there, and what it runs here gets no more rights than there",
                ddl.role
            );
        }
        if ddl.outside {
            // The transaction holds nothing else but what the extension notes of it.
            self.client.simple("COMMIT").await?;
            if self.is_made(ddl).await? {
                self.client.simple("BEGIN").await?;
                return Ok(());
            }
        }
        self.set_for(ddl).await?;
        match ddl.outside {
            true => self.run_outside(ddl, role).await?,
            false => self.run_within(ddl, role).await?,
        }
        let mut reset = String::from("RESET check_function_bodies");
        for name in ddl.settings.keys() {
            reset.push_str(&format!("; RESET {}", quote_ident(name)));
        }
        self.client.simple(&reset).await?;
        if ddl.outside {
            self.client.simple("BEGIN").await?;
        }
        Ok(())
    }

    /// In this transaction. What needs something that was never to be here is left out: a view, for
    /// which no row is written, and what is about a column that is not listed.
    async fn run_within(&mut self, ddl: &Ddl, role: bool) -> anyhow::Result<()> {
        self.client.simple("SAVEPOINT terrace_ddl").await?;
        let ran = match role {
            true => {
                let sql = "SELECT terrace.run_as($1, $2)";
                let values = [Some(ddl.role.as_str()), Some(&ddl.sql)];
                self.client.query(sql, &values).await.map(drop)
            }
            false => self.client.simple(&ddl.sql).await.map(drop),
        };
        let Err(error) = ran else {
            self.client.simple("RELEASE SAVEPOINT terrace_ddl").await?;
            return Ok(());
        };
        let code = error.code().unwrap_or_default();
        if !UNDEFINED.contains(&code) {
            return Err(error.into());
        }
        self.client
            .simple("ROLLBACK TO SAVEPOINT terrace_ddl; RELEASE SAVEPOINT terrace_ddl")
            .await?;
        let unlisted = code == UNDEFINED_COLUMN && self.is_about_a_part(ddl).await?;
        if !ddl.view && !unlisted {
            return Err(error.into());
        }
        let reason = format!("\"{}\" needs what is not here: {error}", ddl.shown());
        self.shared.event("left_out", &reason);
        Ok(())
    }

    /// Whether a statement is about a table that is synchronised by some of its columns.
    async fn is_about_a_part(&mut self, ddl: &Ddl) -> anyhow::Result<bool> {
        for (namespace, name) in &ddl.about {
            let sql = "SELECT 1 FROM terrace.sync_table \
                       WHERE nspname = $1 AND relname = $2 AND columns IS NOT NULL";
            let found = self
                .client
                .query(sql, &[Some(namespace), Some(name)])
                .await?;
            if !found.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The settings by which a statement is read. From here to their end the search path is
    /// the role's: this session names nothing but what PostgreSQL or the extension has in a
    /// schema that it says, and no operator.
    async fn set_for(&mut self, ddl: &Ddl) -> anyhow::Result<()> {
        let mut settings = ddl.settings.clone();
        settings.insert("check_function_bodies".into(), "off".into());
        let settings = serde_json::to_string(&settings)?;
        let local = if ddl.outside { "false" } else { "true" };
        self.client
            .query(
                "SELECT pg_catalog.set_config(key, value, $2::pg_catalog.bool) \
                 FROM pg_catalog.json_each_text($1::pg_catalog.json)",
                &[Some(&settings), Some(local)],
            )
            .await?;
        Ok(())
    }

    /// Whether all that a statement changes is missing here, and nothing of it is to be here.
    async fn is_foreign(&mut self, ddl: &Ddl) -> anyhow::Result<bool> {
        if let Some((namespace, name)) = &ddl.part_of {
            // It may be a partition itself, and none here. Of what is not synchronised no layout
            // is known.
            let sql = "SELECT terrace.has_own_layout(root) \
                         AND (EXISTS (SELECT FROM terrace.partition WHERE root = ANY (ancestors)) \
                           OR EXISTS (SELECT FROM terrace.sync_table \
                                      WHERE root = pg_catalog.format('%I.%I', nspname, relname))) \
                       FROM (SELECT coalesce( \
                           (SELECT p.ancestors[pg_catalog.cardinality(p.ancestors)] FROM terrace.partition p \
                            WHERE p.nspname = $1 AND p.relname = $2), \
                           pg_catalog.format('%I.%I', $1::text, $2::text)) AS root) AS whole";
            let rows = self
                .client
                .query(sql, &[Some(namespace), Some(name)])
                .await?;
            if rows.first().and_then(|row| row.first()?.as_deref()) == Some("t") {
                return Ok(true);
            }
        }
        for (namespace, name) in &ddl.about {
            let rows = self
                .client
                .query(
                    "SELECT pg_catalog.to_regclass(pg_catalog.format('%I.%I', $1::text, $2::text)) IS NULL \
                       AND NOT EXISTS (SELECT FROM terrace.sync_table s \
                           WHERE s.nspname = $1 AND s.relname = $2 \
                             AND (s.domains IS NULL OR $3 = ANY (s.domains)))",
                    &[
                        Some(namespace),
                        Some(name),
                        Some(&self.shared.config.node.domain),
                    ],
                )
                .await?;
            if rows.first().and_then(|row| row.first()?.as_deref()) != Some("t") {
                return Ok(false);
            }
        }
        Ok(!ddl.about.is_empty())
    }

    /// Whether the index is there that a statement is to make outside of a transaction: it may
    /// have run already, in whole or in part, when the bridge was killed before it was noted.
    /// What a part of it left behind is dropped.
    async fn is_made(&mut self, ddl: &Ddl) -> anyhow::Result<bool> {
        let Some(index) = &ddl.index else {
            return Ok(false);
        };
        let rows = self
            .client
            .query(
                "SELECT i.indisvalid FROM pg_catalog.pg_index i \
                 WHERE i.indexrelid = pg_catalog.to_regclass($1)",
                &[Some(index)],
            )
            .await?;
        match rows.first().and_then(|row| row.first()?.as_deref()) {
            Some("t") => return Ok(true),
            Some(_) => drop(self.client.simple(&format!("DROP INDEX {index}")).await?),
            None => {}
        }
        Ok(false)
    }

    /// These are of indexes, whose code PostgreSQL runs as their table's owner, without a way back
    /// to this session's role.
    async fn run_outside(&mut self, ddl: &Ddl, role: bool) -> anyhow::Result<()> {
        if role {
            let set = format!("SET ROLE {}", quote_ident(&ddl.role));
            self.client.simple(&set).await?;
        }
        let ran = self.client.simple(&ddl.sql).await;
        self.client.simple("RESET ROLE").await?;
        match ran {
            // Dropped already.
            Err(error) if ddl.index.is_none() && error.code() == Some("42704") => Ok(()),
            ran => Ok(ran.map(drop)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_announced_is_obeyed() {
        let content = Bytes::from_static(
            br#"{"table":["s","t"],"columns":["a"],"clear":null,"domains":null,"rows":[]}"#,
        );
        let mut seals = Seals::default();
        assert!(seals.open(ROWS_PREFIX, content.clone()).unwrap().is_none());
        let sealed = [ROWS_PREFIX.as_bytes(), b"\n", &content[..]].concat();
        seals.digests.push(Sha256::digest(&sealed).to_vec());
        assert!(seals.open(DDL_PREFIX, content.clone()).unwrap().is_none());
        assert!(seals.open(ROWS_PREFIX, content.clone()).unwrap().is_some());
        assert!(seals.open(ROWS_PREFIX, content.clone()).unwrap().is_none());
        assert!(seals.open("other", content.clone()).unwrap().is_none());
        assert!(
            seals
                .open(ROWS_PREFIX, content.slice(1..))
                .unwrap()
                .is_none()
        );
        seals.clear();
        assert!(seals.open(ROWS_PREFIX, content).unwrap().is_none());
    }

    #[test]
    fn a_bytea_is_read() {
        assert_eq!(hex(b"\\x00ff"), Some(vec![0, 255]));
        assert_eq!(hex(b"00ff"), None);
        assert_eq!(hex(b"\\x0"), Some(vec![0]));
        assert_eq!(hex(b"\\x0g"), None);
    }
}
