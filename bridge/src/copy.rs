//! The initial copy of a server that has no data: schema by pg_dump, rows by
//! parallel COPY, all in one snapshot of one server above or beside it.
//!
//! Guarantee: `terrace.progress` is written last, with the position of the
//! snapshot. A copy that is cut short leaves no progress and starts again; what
//! it left behind is emptied only if its marker says that it was ours.

mod rows;

use std::fs;
use std::sync::Arc;

use anyhow::{Context, bail};

use crate::client::{Client, quote_ident, quote_literal};
use crate::conninfo::ConnInfo;
use crate::lsn::{Identity, Lsn};
use crate::queue::write_atomically;
use crate::schema::{Dump, restore};
use crate::status::Shared;
use crate::timeline;
use crate::upstream::{BRIDGE_PARAMETER, connect, create_snapshot, timeline_history};
use rows::{
    Copying, Table, copy_table, cores, hold, local_session, snapshot_session, synchronised_tables,
};

/// Processes that make an index beside the one that was told to, at most.
const MAX_INDEXERS: usize = 8;
/// So many objects that could not be made are named in an event.
const TOLD: usize = 20;
/// What is here is ours to empty or to drop, one line a thing.
const MARKER: &str = "copy.marker";
/// Tables of the extension that flow.
const TERRACE_TABLES: [&str; 5] = [
    "domain",
    "sync_table",
    "sync_schema",
    "comparison",
    "checksum",
];
/// Line of the marker: the rows are ours to remove …
const ROWS_OURS: &str = "rows are ours\n";
/// … and this copy has made this table …
const MADE: &str = "made ";
/// … or all of them.
const ALL_MADE: &str = "schema is ours";
/// Line of the marker: the domain's own data and slot are of no use any more.
const FROM_PARENT: &str = "from parent\n";

/// Failures that the caller tells apart.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Another server of the domain is copying.
    #[error("another server is copying: {0}")]
    Busy(String),
    /// The slot is not to be dropped.
    #[error(
        "another server of the domain may have what follows {confirmed}, where replication slot \
         \"{slot}\" is, and lead; this one waits for it, to copy from it"
    )]
    Held {
        /// The domain's.
        slot: String,
        /// What it has confirmed.
        confirmed: Lsn,
    },
}

/// A finished copy.
pub struct CopyResult {
    /// History copied from.
    pub identity: Identity,
    /// Position of the snapshot.
    pub lsn: Lsn,
    /// Its temporary cursor holds the source's queue until we stream from it.
    pub client: Client,
}

/// Copies everything that this server is to hold from `source`. Data of the domain that is no use
/// any more leaves its slot behind, which makes room if it is still where it `may_go`.
pub async fn initial_copy(
    shared: &Arc<Shared>,
    source: &ConnInfo,
    may_go: Option<Lsn>,
) -> anyhow::Result<CopyResult> {
    let node = &shared.config.node;
    let (mut holder, identity, _) = connect(source, &node.name).await?;
    let bridge = holder.extension_accepted(BRIDGE_PARAMETER);
    let slot = shared.config.slot_name();
    let mut temporary = format!("terracecopy_{}", node.domain);
    let sibling = shared
        .config
        .peers
        .values()
        .any(|url| ConnInfo::parse(url).is_ok_and(|peer| peer.endpoint() == source.endpoint()));
    // One server of a domain copies from the parent, and becomes master; the
    // others copy from it, so that its queue holds what they need next.
    if sibling {
        temporary = format!("terracecopy_{}.{}", node.domain, node.name);
    }
    if identity.timeline > 1 {
        // The servers below may come from an older one and ask.
        match timeline_history(&mut holder, identity.timeline).await {
            Ok(history) => timeline::save(&node.data_dir, identity.timeline, &history)?,
            Err(error) => tracing::warn!("history of timeline {}: {error}", identity.timeline),
        }
    }
    if !bridge {
        check_slot(shared, &mut holder, &slot, may_go).await?;
    }
    let (lsn, snapshot) = match create_snapshot(&mut holder, &temporary).await {
        Err(error) if error.code() == Some("42710") => {
            return Err(CopyError::Busy(error.to_string()).into());
        }
        made => made.context("create the slot to copy from")?,
    };
    tracing::info!(position = %lsn, source = %source.endpoint(), "initial copy starts");
    let mut reader = snapshot_session(source, &snapshot).await?;
    let mut tables = synchronised_tables(&mut reader, &node.domain).await?;
    hold(&mut reader, &tables).await?;
    let mut local = local_session(shared).await?;
    let prepared = prepare_schema(
        shared,
        source,
        &snapshot,
        &mut reader,
        &mut local,
        &mut tables,
    )
    .await?;
    Copying::new(shared, source, &snapshot, tables)
        .run()
        .await?;
    tracing::info!("all rows are copied");
    if let Some(dump) = &prepared.unfinished {
        local.simple(&index_with_all_cores()).await?;
        let tell = |done, total| {
            shared.set_copy_progress(format!(
                "all rows copied, {done} of {total} indexes and other objects made"
            ));
        };
        let made = restore(&mut local, &dump.after_rows().await?, tell).await;
        tell_left_out(shared, &made.context("create indexes and constraints")?);
    }
    for name in TERRACE_TABLES {
        copy_table(&mut reader, &mut local, Table::whole("terrace", name)).await?;
    }
    local
        .simple("SELECT terrace.detach_unlisted()")
        .await
        .context("let go of tables that are synchronised no more")?;
    if !bridge {
        let marker = format!("{}slot {slot} {lsn}\n", prepared.marker);
        write_atomically(&node.data_dir, MARKER, marker.as_bytes())?;
        let copied = format!(
            "SELECT pg_catalog.pg_copy_logical_replication_slot({}, {}, false)",
            quote_literal(&temporary),
            quote_literal(&slot)
        );
        holder
            .simple(&copied)
            .await
            .context("make the replication slot permanent")?;
    }
    local
        .execute(
            "INSERT INTO terrace.progress (identity, lsn, commit_time) VALUES ($1, $2, now())",
            &[Some(&identity.to_string()), Some(&lsn.to_string())],
        )
        .await
        .context("write terrace.progress")?;
    fs::remove_file(node.data_dir.join(MARKER)).ok();
    Ok(CopyResult {
        identity,
        lsn,
        client: holder,
    })
}

/// An index of a large table is made by several processes of PostgreSQL's; by as many as there are cores,
/// where nobody chose otherwise. Each needs 32 MB to take part (`plan_create_index_workers` in
/// PostgreSQL's `planner.c`).
fn index_with_all_cores() -> String {
    let workers = cores().clamp(2, MAX_INDEXERS);
    let memory = 32 * (workers + 1);
    format!(
        "SELECT pg_catalog.set_config(name, value, false) \
         FROM (VALUES ('max_parallel_maintenance_workers', '{workers}'), \
                      ('maintenance_work_mem', '{memory}MB')) v (name, value) \
         JOIN pg_catalog.pg_settings USING (name) WHERE source = 'default'"
    )
}

/// Takes back the position of the data here, and notes that the rows are ours to
/// empty. What this server's domain holds at the parent stays.
pub async fn discard(shared: &Arc<Shared>, from_parent: bool) -> anyhow::Result<()> {
    let mut marker = ROWS_OURS.to_owned();
    if from_parent {
        marker.push_str(FROM_PARENT);
    }
    write_atomically(&shared.config.node.data_dir, MARKER, marker.as_bytes())?;
    let mut local = local_session(shared).await?;
    local.simple("DELETE FROM terrace.progress").await?;
    Ok(())
}

/// Another server of the domain has turned out to have better data than was there.
pub fn from_anybody(shared: &Shared) -> anyhow::Result<()> {
    let marker = read_marker(shared).replace(FROM_PARENT, "");
    write_atomically(&shared.config.node.data_dir, MARKER, marker.as_bytes())?;
    Ok(())
}

/// Whether the data must come from the parent, whatever the domain holds.
pub fn is_from_parent(shared: &Shared) -> bool {
    read_marker(shared).contains(FROM_PARENT)
}

fn read_marker(shared: &Shared) -> String {
    fs::read_to_string(shared.config.node.data_dir.join(MARKER)).unwrap_or_default()
}

/// At the top's Postgres: an existing slot belongs to a server that has data, or
/// to a copy of ours that died between making the slot and noting its progress.
async fn check_slot(
    shared: &Arc<Shared>,
    client: &mut Client,
    slot: &str,
    may_go: Option<Lsn>,
) -> anyhow::Result<()> {
    let sql = format!(
        "SELECT active::text, confirmed_flush_lsn::text, wal_status FROM pg_catalog.pg_replication_slots \
         WHERE slot_name = {}",
        quote_literal(slot)
    );
    let rows = client.simple(&sql).await?;
    let Some(row) = rows.first() else {
        return Ok(());
    };
    let active = row
        .first()
        .cloned()
        .flatten()
        .is_some_and(|text| text.starts_with('t'));
    let confirmed = row.get(1).cloned().flatten().unwrap_or_default();
    let marker = read_marker(shared);
    if active {
        return Err(CopyError::Busy(format!("slot \"{slot}\" is active")).into());
    }
    let ours = format!("slot {slot} {confirmed}");
    let lost = row.get(2).cloned().flatten().as_deref() == Some("lost");
    if let Ok(confirmed) = confirmed.parse::<Lsn>()
        && marker.contains(FROM_PARENT)
        && !lost
        && may_go != Some(confirmed)
    {
        let slot = slot.to_owned();
        return Err(CopyError::Held { slot, confirmed }.into());
    }
    if marker.contains(FROM_PARENT) || marker.lines().any(|line| line == ours) {
        client
            .simple(&format!("DROP_REPLICATION_SLOT {}", quote_ident(slot)))
            .await?;
        return Ok(());
    }
    bail!(
        "replication slot \"{slot}\" exists but no server of the domain in reach has data; start \
         the server that has, or, if the domain is new, drop the slot at the top with \
         SELECT pg_drop_replication_slot('{slot}')"
    )
}

/// What has been done before the rows come.
struct Prepared {
    /// Says what here is ours.
    marker: String,
    /// Holds the indexes and constraints that are still to be made.
    unfinished: Option<Dump>,
}

/// Makes the tables that are missing here, or empties what our own interrupted
/// copy left.
async fn prepare_schema(
    shared: &Arc<Shared>,
    source: &ConnInfo,
    snapshot: &str,
    reader: &mut Client,
    local: &mut Client,
    tables: &mut [Table],
) -> anyhow::Result<Prepared> {
    let ours = read_marker(shared);
    // Not DELETE: until the lists are here again, nobody else is to write to the tables.
    let empty = TERRACE_TABLES.map(|name| format!("terrace.{name}"));
    let empty = format!("TRUNCATE {}, terrace.partition", empty.join(", "));
    local.simple(&empty).await?;
    // This list says where rows go.
    copy_table(reader, local, Table::whole("terrace", "partition")).await?;
    for table in tables.iter_mut() {
        table.find_place(local).await?;
    }
    let tables = &*tables;
    let mut found = Vec::new();
    for table in tables {
        found.push((table, rows_here(local, table).await?));
    }
    make_room(local, &ours, &found).await?;
    let is_missing = |(_, rows): &Found<'_>| rows.is_none();
    let known = |table: &Table| {
        let made = format!("{MADE}{}", table.qualified());
        ours.lines().any(|line| line == ALL_MADE || line == made)
    };
    let (made, others): (Vec<Found<'_>>, Vec<Found<'_>>) = found
        .iter()
        .cloned()
        .partition(|found| is_missing(found) || known(found.0));
    let [made, mut others] = [made, others].map(|some| {
        let names = some.iter().map(|(table, _)| table.qualified());
        names.collect::<Vec<String>>()
    });
    let mut marker = match (made.is_empty(), others.is_empty()) {
        (false, true) => format!("{ALL_MADE}\n"),
        _ => made.iter().fold(ROWS_OURS.to_owned(), |marker, name| {
            format!("{marker}{MADE}{name}\n")
        }),
    };
    if ours.contains(FROM_PARENT) {
        marker.push_str(FROM_PARENT);
    }
    write_atomically(&shared.config.node.data_dir, MARKER, marker.as_bytes())?;
    others.extend(parts_elsewhere(local).await?);
    let dump = match made.is_empty() {
        true => None,
        false => Some(Dump::take(source, snapshot, reader, &others).await?),
    };
    if let Some(dump) = &dump
        && found.iter().any(is_missing)
    {
        let done = restore(local, &dump.before_rows().await?, |_, _| ()).await;
        tell_left_out(shared, &done.context("create the tables")?);
    }
    // They are made as one transaction: where there is one of them, all are.
    let sql = "SELECT 1 FROM pg_catalog.unnest(pg_catalog.string_to_array($1, E'\\x01')) t \
               WHERE EXISTS (SELECT FROM pg_catalog.pg_index WHERE indrelid = to_regclass(t)) \
                  OR EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = to_regclass(t) \
                             AND NOT tgisinternal AND tgname NOT LIKE 'terrace\\_%')";
    let indexed = local.query(sql, &[Some(&made.join("\u{1}"))]).await?;
    Ok(Prepared {
        marker,
        unfinished: dump.filter(|_| indexed.is_empty()),
    })
}

/// A table of the source, and where its rows are read here, if there is one.
type Found<'a> = (&'a Table, Option<String>);

async fn rows_here(local: &mut Client, table: &Table) -> anyhow::Result<Option<String>> {
    let name = table.here();
    let sql = "SELECT relkind::text FROM pg_catalog.pg_class WHERE oid = to_regclass($1)";
    let rows = local.query(sql, &[Some(&name)]).await?;
    // A table that is partitioned here has no rows but in its partitions.
    Ok(rows.first().map(|row| match row[0].as_deref() {
        Some("p") => name,
        _ => format!("ONLY {name}"),
    }))
}

/// Empties what our own interrupted copy left; what is somebody's is refused.
async fn make_room(local: &mut Client, ours: &str, found: &[Found<'_>]) -> anyhow::Result<()> {
    let present: Vec<&String> = found.iter().filter_map(|(_, rows)| rows.as_ref()).collect();
    if present.is_empty() {
        return Ok(());
    }
    if !ours.is_empty() {
        let names: Vec<&str> = present.iter().map(|rows| rows.as_str()).collect();
        local
            .simple(&format!("TRUNCATE {}", names.join(", ")))
            .await
            .context("empty the tables of an interrupted copy")?;
        return Ok(());
    }
    for (table, rows) in found {
        let Some(rows) = rows else { continue };
        let full = local
            .simple(&format!("SELECT 1 FROM {rows} LIMIT 1"))
            .await?;
        if !full.is_empty() {
            bail!(
                "table {} already has rows on this server; empty it with TRUNCATE to let the \
                 initial copy fill it",
                table.here()
            );
        }
    }
    if let Some((missing, _)) = found.iter().find(|(_, rows)| rows.is_none()) {
        bail!(
            "table {} is missing on this server while others are there; create it as it is at the \
             top, or drop the others to let the initial copy make all",
            missing.qualified()
        );
    }
    Ok(())
}

/// What is partitioned at the top, and in its own way here, with the parts that are partitioned there.
async fn parts_elsewhere(local: &mut Client) -> anyhow::Result<Vec<String>> {
    let sql = "SELECT DISTINCT up FROM terrace.partition p, pg_catalog.unnest(p.ancestors) up \
               WHERE terrace.has_own_layout(p.ancestors[pg_catalog.cardinality(p.ancestors)])";
    let rows = local
        .query(sql, &[])
        .await
        .context("read terrace.partition")?;
    Ok(rows.into_iter().flatten().flatten().collect())
}

/// An event that somebody reads is worth more than a copy that is not made.
fn tell_left_out(shared: &Shared, left_out: &[String]) {
    if left_out.is_empty() {
        return;
    }
    let mut reason = left_out
        .iter()
        .take(TOLD)
        .cloned()
        .collect::<Vec<_>>()
        .join("; ");
    if left_out.len() > TOLD {
        reason += &format!("; and {} more, see the log", left_out.len() - TOLD);
    }
    shared.event("left_out", &reason);
}
