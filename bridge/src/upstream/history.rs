//! Whether the upstream tells our history, and our domain is as we know it.

use super::LinkEnd;
use crate::client::{Client, PgError, quote_literal};
use crate::lsn::{Identity, Lsn};
use crate::queue::Writer;
use crate::status::Shared;
use crate::timeline;

/// Rule B: a later timeline of the same history is followed when it branched off at
/// or after our end; else we hold what it never had.
pub(super) async fn adopt_timeline(
    shared: &Shared,
    client: &mut Client,
    theirs: &Identity,
    writer: &mut Writer,
) -> Result<(), LinkEnd> {
    let ours = writer.queue().identity();
    let diverged = || LinkEnd::Diverged {
        theirs: theirs.to_string(),
        ours: ours.to_string(),
    };
    if !theirs.same_origin(&ours) {
        return Err(diverged());
    }
    if theirs.timeline < ours.timeline {
        return Err(LinkEnd::Refused(format!(
            "the upstream is still on timeline {}, this server is on {}: it has been replaced",
            theirs.timeline, ours.timeline
        )));
    }
    let history = timeline_history(client, theirs.timeline).await?;
    // After a power cut the database may have more than the queue.
    let last = writer.end().max(*shared.replayed.borrow());
    match timeline::switch_point(&history, ours.timeline) {
        Some(switch) if last <= switch => {}
        _ => return Err(diverged()),
    }
    let end = writer.end();
    timeline::save(&shared.config.node.data_dir, theirs.timeline, &history)?;
    writer.adopt(theirs)?;
    shared.set_identity(theirs.clone(), true);
    let reason = format!(
        "goes on at {end} with timeline {} of the top",
        theirs.timeline
    );
    shared.event("timeline", &reason);
    Ok(())
}

/// Two standbys that are promoted from one history both begin the same timeline, and
/// mostly not at the same place.
pub(super) async fn same_timeline(
    shared: &Shared,
    client: &mut Client,
    theirs: &Identity,
) -> Result<(), LinkEnd> {
    let dir = &shared.config.node.data_dir;
    let Some(ours) = timeline::load(dir, theirs.timeline) else {
        return Ok(());
    };
    match timeline_history(client, theirs.timeline).await {
        Ok(history) if timeline::same(&history, &ours) => Ok(()),
        Ok(_) => Err(LinkEnd::Diverged {
            theirs: format!("{theirs} (another one of that number)"),
            ours: theirs.to_string(),
        }),
        // A bridge whose data came to it on this timeline may not have it.
        Err(error) if error.code() == Some("58P01") => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// In what is told, and kept, of a top that was set back.
const SET_BACK: &str = "it was set back to an earlier state";

/// A top that was set back to an earlier state, on one timeline, writes another history from there on. Where
/// it has not come beyond our end yet that shows: PostgreSQL sends what it has flushed, and no more.
pub(super) fn not_set_back(
    shared: &Shared,
    their_end: Lsn,
    writer: &Writer,
) -> Result<(), LinkEnd> {
    let last = writer.end().max(*shared.replayed.borrow());
    if last <= their_end {
        return Ok(());
    }
    Err(LinkEnd::SetBack(format!(
        "the upstream ends at {their_end}, before this server's end, which is {last}: {SET_BACK}, \
         and its history is not this server's any more"
    )))
}

/// What was found out is kept in mind: the top comes beyond our end, and a sibling that asked it only
/// then knows nothing of it.
pub(super) fn not_known_as_set_back(shared: &Shared) -> Result<(), LinkEnd> {
    match timeline::divergence(&shared.config.node.data_dir) {
        Some(kept) if kept.contains(SET_BACK) => Err(LinkEnd::SetBack(format!(
            "the top has gone on from where {SET_BACK}: its history is not this server's"
        ))),
        _ => Ok(()),
    }
}

/// A server that its domain's `[peers]` here leave out makes this node's picture of the
/// domain a wrong one: it would depose that server, or miss what it holds.
pub(super) async fn check_members(shared: &Shared, client: &mut Client) -> Result<(), LinkEnd> {
    let node = &shared.config.node;
    let sql = format!(
        "SELECT node FROM terrace.lag WHERE domain = {} AND node <> {} \
         AND reply_time > now() - interval '5 s'",
        quote_literal(&node.domain),
        quote_literal(&node.name)
    );
    // What is not there to be asked says nothing.
    let Ok(rows) = client.simple(&sql).await else {
        return Ok(());
    };
    let names = rows.into_iter().filter_map(|row| row.into_iter().next()?);
    let mut unknown = names.filter(|name| !shared.config.peers.contains_key(name));
    match unknown.next() {
        None => Ok(()),
        Some(name) => Err(LinkEnd::Refused(format!(
            "node \"{name}\" reports as a server of domain \"{}\" and is not in [peers] here; \
             add it, on both, or stop it",
            node.domain
        ))),
    }
}

/// The history file of a timeline as the server has it.
pub async fn timeline_history(client: &mut Client, timeline: u32) -> Result<String, PgError> {
    let rows = client
        .simple(&format!("TIMELINE_HISTORY {timeline}"))
        .await?;
    let content = rows
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().nth(1)?);
    content.ok_or_else(|| PgError::Protocol("TIMELINE_HISTORY gave no content".into()))
}
