//! The rows of the initial copy: several tables, and parts of a large one, at the same
//! time; what one server's COPY gives goes to the other's as it is.
//!
//! All sessions at the source read in one snapshot. A part of a table is a range of its
//! pages, which PostgreSQL reads without looking at the others.
//!
//! Guarantee: what is copied is what the snapshot shows. An ALTER TABLE that writes a table
//! anew, and TRUNCATE, leave nothing for an older snapshot to see, and no error; a rewrite
//! would also move rows from one part to another. So [`hold`] locks all tables, as pg_dump
//! does, before their parts are told apart, and makes sure that none was written anew
//! between the snapshot and that.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use tokio::task::JoinSet;

use crate::apply::{AS_OWNERS, COMPRESS_FAST, other_place};
use crate::client::{Client, PgError, SessionOptions, quote_literal, quote_table};
use crate::conninfo::ConnInfo;
use crate::status::Shared;
use crate::upstream::{pinned_settings, reading_settings};

/// Less than this is no reason for one more session.
const WORTH_A_SESSION: u64 = 4 << 20;
/// Parts copied at the same time, on a machine with so many cores or fewer …
const WORKERS: usize = 4;
/// … and at most: somebody uses the source.
const MAX_WORKERS: usize = 16;
/// Pages of a part: mostly 32 MiB of a table.
const PART_PAGES: u64 = 4096;
/// Progress is told each time so many bytes have come.
const TELL_BYTES: u64 = 8 << 20;

/// A table at the source.
pub(super) struct Table {
    namespace: String,
    name: String,
    columns: Option<String>,
    filter: Option<String>,
    oid: String,
    /// Of its rows, without those values that are stored out of line.
    pages: u64,
    bytes: u64,
    /// It is a heap whose rows' places we may read.
    divisible: bool,
    /// Where its rows go here, if it is a partition at the source and none here.
    place: Option<String>,
}

/// Some pages of a table, the last one left out if there is one; or all of it.
struct Part {
    table: Arc<Table>,
    pages: Option<(u64, Option<u64>)>,
    /// Its share of the table.
    bytes: u64,
}

impl Table {
    /// One that is copied whole.
    pub fn whole(namespace: &str, name: &str) -> Table {
        Table {
            namespace: namespace.into(),
            name: name.into(),
            columns: None,
            filter: None,
            oid: String::new(),
            pages: 0,
            bytes: 0,
            divisible: false,
            place: None,
        }
    }

    /// Looks where its rows go.
    pub async fn find_place(&mut self, local: &mut Client) -> anyhow::Result<()> {
        self.place = other_place(local, &self.namespace, &self.name).await?;
        Ok(())
    }

    /// The table here, as SQL names it.
    pub fn here(&self) -> String {
        self.place.clone().unwrap_or_else(|| self.qualified())
    }

    pub fn qualified(&self) -> String {
        quote_table(&self.namespace, &self.name)
    }

    fn is_large(&self) -> bool {
        self.divisible && self.pages > PART_PAGES
    }

    fn parts(self) -> Vec<Part> {
        let (pages, bytes) = (self.pages, self.bytes);
        let count = if self.is_large() {
            pages.div_ceil(PART_PAGES)
        } else {
            1
        };
        let table = Arc::new(self);
        let part = |index: u64| {
            let end = (index + 1 < count).then_some((index + 1) * PART_PAGES);
            Part {
                table: Arc::clone(&table),
                pages: (count > 1).then_some((index * PART_PAGES, end)),
                bytes: bytes / count,
            }
        };
        (0..count).map(part).collect()
    }
}

impl Part {
    /// What to read at the source and where to write here.
    fn statements(&self) -> (String, String) {
        let table = self.table.qualified();
        let columns = self.table.columns.clone().unwrap_or_default();
        let list = match columns.is_empty() {
            true => String::new(),
            false => format!(" ({columns})"),
        };
        let columns = if columns.is_empty() { "*" } else { &columns };
        let mut conditions: Vec<String> =
            self.table.filter.iter().map(|f| format!("({f})")).collect();
        if let Some((first, end)) = self.pages {
            conditions.push(format!("ctid >= '({first},0)'"));
            conditions.extend(end.map(|end| format!("ctid < '({end},0)'")));
        }
        let read = match conditions.is_empty() {
            true => format!("COPY {table}{list} TO STDOUT"),
            false => {
                let condition = conditions.join(" AND ");
                format!("COPY (SELECT {columns} FROM ONLY {table} WHERE {condition}) TO STDOUT")
            }
        };
        let here = self.table.here();
        (read, format!("COPY {here}{list} FROM STDIN"))
    }
}

/// The tables that `domain` gets, partitions in place of their parents.
pub(super) async fn synchronised_tables(
    client: &mut Client,
    domain: &str,
) -> anyhow::Result<Vec<Table>> {
    let known = client
        .query(
            "SELECT 1 FROM terrace.domain WHERE name = $1",
            &[Some(domain)],
        )
        .await
        .context("read terrace.domain at the source (is the extension installed there?)")?;
    if known.is_empty() {
        bail!(
            "domain \"{domain}\" does not exist; create it at the top with \
             SELECT terrace.create_domain('{domain}')"
        );
    }
    // A table may be listed twice: by itself and as a partition of another one.
    let rows = client
        .query(
            "WITH listed AS ( \
                 SELECT t.relid, s.filter, s.columns \
                 FROM terrace.sync_table s, \
                      pg_catalog.pg_partition_tree(to_regclass(format('%I.%I', s.nspname, s.relname))) t \
                 WHERE s.domains IS NULL OR $1 = ANY (s.domains) \
                 UNION ALL \
                 SELECT c.oid, s.filter, s.columns \
                 FROM terrace.sync_table s JOIN pg_catalog.pg_namespace n ON n.nspname = s.nspname \
                 JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = s.relname \
                 WHERE NOT c.relispartition AND (s.domains IS NULL OR $1 = ANY (s.domains))) \
             SELECT DISTINCT ON (c.oid) n.nspname, c.relname, \
                    nullif(concat_ws(' AND ', '(' || s.filter || ')', terrace.unsent(c.oid)), ''), \
                    (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) \
                     FROM pg_catalog.pg_attribute a \
                     WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                       AND a.attgenerated = '' \
                       AND (s.columns IS NULL OR a.attname = ANY (s.columns))), \
                    pg_catalog.pg_relation_size(c.oid) / current_setting('block_size')::int, \
                    pg_catalog.pg_table_size(c.oid), \
                    h.amname = 'heap' AND pg_catalog.has_column_privilege(c.oid, 'ctid', 'SELECT'), \
                    c.oid::text \
             FROM listed s JOIN pg_catalog.pg_class c ON c.oid = s.relid AND c.relkind = 'r' \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             LEFT JOIN pg_catalog.pg_am h ON h.oid = c.relam",
            &[Some(domain)],
        )
        .await
        .context("read terrace.sync_table at the source")?;
    let mut tables = Vec::new();
    for row in rows {
        let [
            namespace,
            name,
            filter,
            columns,
            pages,
            bytes,
            divisible,
            oid,
        ] = <[_; 8]>::try_from(row)
            .map_err(|_| anyhow::anyhow!("unexpected columns of terrace.sync_table"))?;
        let number = |text: Option<String>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
        tables.push(Table {
            namespace: namespace.unwrap_or_default(),
            name: name.unwrap_or_default(),
            columns,
            filter,
            oid: oid.unwrap_or_default(),
            pages: number(pages),
            bytes: number(bytes),
            divisible: divisible.as_deref() == Some("t"),
            place: None,
        });
    }
    Ok(tables)
}

/// Keeps `tables` as they are until `reader`, a session in the snapshot, ends.
pub(super) async fn hold(reader: &mut Client, tables: &[Table]) -> anyhow::Result<()> {
    let lock = |table: &Table| format!("SELECT 1 FROM ONLY {} LIMIT 0;", table.qualified());
    let locks: String = tables.iter().map(lock).collect();
    let held = reader.simple(&locks).await;
    held.map_err(about_policies).context("lock the tables")?;
    let oids: Vec<&str> = tables.iter().map(|table| table.oid.as_str()).collect();
    // The column is read in the snapshot, the function tells what is.
    let sql = "SELECT c.oid::pg_catalog.regclass::text FROM pg_catalog.pg_class c \
               WHERE c.oid = ANY (pg_catalog.string_to_array($1, ',')::pg_catalog.oid[]) \
                 AND c.relfilenode IS DISTINCT FROM pg_catalog.pg_relation_filenode(c.oid)";
    let anew = reader.query(sql, &[Some(&oids.join(","))]).await?;
    if let Some(Some(table)) = anew
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().next())
    {
        bail!("table {table} was written anew when the copy began; it begins again");
    }
    Ok(())
}

/// A session at the source that reads in `snapshot`.
pub(super) async fn snapshot_session(source: &ConnInfo, snapshot: &str) -> Result<Client, PgError> {
    let options = SessionOptions {
        application_name: "terrace copy".into(),
        gucs: reading_settings(),
        ..Default::default()
    };
    let mut client = Client::connect(source, &options).await?;
    client.lift_transaction_limit().await?;
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        quote_literal(snapshot)
    );
    client.simple(&sql).await?;
    Ok(client)
}

/// A session here in which nothing fires.
pub(super) async fn local_session(shared: &Arc<Shared>) -> anyhow::Result<Client> {
    let mut gucs = pinned_settings();
    gucs.retain(|(name, _)| name != "wal_sender_timeout");
    gucs.push(("session_replication_role".into(), "replica".into()));
    // What is written here is on disk before the marker goes that says whose the rows are.
    gucs.push(("synchronous_commit".into(), "on".into()));
    let application_name = "terrace copy".into();
    let options = SessionOptions {
        application_name,
        gucs,
        ..Default::default()
    };
    let info = ConnInfo::parse(&shared.config.database.url)?;
    let mut client = Client::connect(&info, &options).await?;
    client.simple(COMPRESS_FAST).await?;
    client.simple(AS_OWNERS).await?;
    client.lift_transaction_limit().await?;
    Ok(client)
}

/// Of this machine.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the workers share.
pub(super) struct Copying {
    shared: Arc<Shared>,
    source: ConnInfo,
    snapshot: String,
    waiting: Mutex<VecDeque<Part>>,
    done: AtomicU64,
    total: u64,
}

impl Copying {
    /// Of `tables`, which are held.
    pub fn new(
        shared: &Arc<Shared>,
        source: &ConnInfo,
        snapshot: &str,
        tables: Vec<Table>,
    ) -> Arc<Copying> {
        let total = tables.iter().map(|table| table.bytes).sum();
        let count = tables.len();
        let mut parts: Vec<Part> = tables.into_iter().flat_map(Table::parts).collect();
        tracing::info!("copies {count} tables in {} parts", parts.len());
        // Large ones first, so that the workers end together.
        parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
        Arc::new(Copying {
            shared: Arc::clone(shared),
            source: source.clone(),
            snapshot: snapshot.to_owned(),
            waiting: Mutex::new(parts.into()),
            done: AtomicU64::new(0),
            total,
        })
    }

    /// Copies all.
    pub async fn run(self: Arc<Copying>) -> anyhow::Result<()> {
        let mut workers = JoinSet::new();
        let useful = usize::try_from(1 + self.total / WORTH_A_SESSION).unwrap_or(MAX_WORKERS);
        for _ in 0..cores().clamp(WORKERS, MAX_WORKERS).min(useful) {
            let copying = Arc::clone(&self);
            workers.spawn(async move { copying.work().await });
        }
        while let Some(result) = workers.join_next().await {
            result.context("copy worker")??;
        }
        Ok(())
    }

    fn next(&self) -> Option<Part> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    }

    async fn work(&self) -> anyhow::Result<()> {
        let mut sessions = None;
        while let Some(part) = self.next() {
            let (reader, local) = match &mut sessions {
                Some(sessions) => sessions,
                none => none.insert((
                    snapshot_session(&self.source, &self.snapshot).await?,
                    local_session(&self.shared).await?,
                )),
            };
            let (mut counted, mut told) = (0, 0);
            // The text of rows is of another size than the rows.
            copy(reader, local, &part, |bytes| {
                let bytes = bytes.min(part.bytes - counted);
                counted += bytes;
                told += bytes;
                self.done.fetch_add(bytes, Ordering::Relaxed);
                if told >= TELL_BYTES {
                    told = 0;
                    self.tell();
                }
            })
            .await?;
            self.done.fetch_add(part.bytes - counted, Ordering::Relaxed);
            self.tell();
        }
        Ok(())
    }

    fn tell(&self) {
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total;
        self.shared
            .set_copy_progress(format!("{done} of about {total} bytes copied"));
    }
}

/// Copies a small table whole.
pub(super) async fn copy_table(
    reader: &mut Client,
    local: &mut Client,
    table: Table,
) -> anyhow::Result<()> {
    for part in table.parts() {
        copy(reader, local, &part, |_| ()).await?;
    }
    Ok(())
}

async fn copy(
    reader: &mut Client,
    local: &mut Client,
    part: &Part,
    mut came: impl FnMut(u64),
) -> anyhow::Result<()> {
    let (read, write) = part.statements();
    let name = part.table.qualified();
    let reading = || format!("read table {name}");
    let writing = || format!("write table {name}");
    reader.copy_out(&read).await.with_context(reading)?;
    local.copy_in(&write).await.with_context(writing)?;
    while let Some(messages) = reader.copy_out_next().await.with_context(reading)? {
        came(messages.len() as u64);
        local.copy_in_send(&messages).await.with_context(writing)?;
    }
    local.copy_in_finish().await.with_context(writing)?;
    Ok(())
}

/// A table with policies is read whole by those alone whom they do not bind.
fn about_policies(error: PgError) -> anyhow::Error {
    // As `check_enable_rls` of PostgreSQL's `rls.c` says it.
    let of_policies = error.code() == Some("42501") && error.to_string().contains("row-level");
    let error = anyhow::Error::new(error);
    match of_policies {
        true => error.context(
            "a table has row-level security; let the role that the URL of the source names see \
             every row there: ALTER ROLE ... BYPASSRLS",
        ),
        false => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(pages: u64) -> Table {
        Table {
            pages,
            bytes: pages * 8192,
            divisible: true,
            columns: Some("a, b".into()),
            ..Table::whole("public", "t")
        }
    }

    #[test]
    fn a_large_table_is_read_in_parts_that_leave_out_nothing() {
        let read = |table: Table| -> Vec<String> {
            table
                .parts()
                .iter()
                .map(|part| part.statements().0)
                .collect()
        };
        let whole = "COPY \"public\".\"t\" (a, b) TO STDOUT";
        assert_eq!(read(table(PART_PAGES)), [whole]);
        let some = |condition: &str| {
            format!("COPY (SELECT a, b FROM ONLY \"public\".\"t\" WHERE {condition}) TO STDOUT")
        };
        let parts = [
            some("ctid >= '(0,0)' AND ctid < '(4096,0)'"),
            some("ctid >= '(4096,0)' AND ctid < '(8192,0)'"),
            some("ctid >= '(8192,0)'"),
        ];
        assert_eq!(read(table(2 * PART_PAGES + 1)), parts);
        let filtered = Table {
            filter: Some("a OR b".into()),
            ..table(1)
        };
        assert_eq!(read(filtered), [some("(a OR b)")]);
    }
}
