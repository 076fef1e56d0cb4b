//! What keeps data waiting without an error: a database that does not answer, a lock.
//!
//! Guarantees: when something is due and nothing is applied, the reason is told within
//! [`PATIENCE`] and a probe's time, so that a master makes way for a slave that has no such
//! trouble. And a copy from this server stops no data: it reads every table in one snapshot and
//! keeps them all from being written anew, so a TRUNCATE, or DDL, that comes meanwhile would
//! wait for it, and with it everything behind it, here and below; it is ended, and begins again.
//! A comparison, which does the same to one table, is ended and says so; so is what looks for the highest number of
//! a sequence.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::Never;
use crate::client::Row;
use crate::open::local_client;
use crate::queue::Queue;
use crate::status::Shared;

/// Nothing at all is applied for so long, though something is due.
const PATIENCE: Duration = Duration::from_secs(10);
/// The database is asked so often meanwhile …
const PROBE: Duration = Duration::from_secs(3);
/// … and given so long to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Looks for ever.
pub(super) async fn keep(shared: &Arc<Shared>, queue: &Queue) -> Never {
    let mut waited = Duration::ZERO;
    loop {
        let before = *shared.replayed.borrow();
        sleep(PROBE).await;
        if *shared.replayed.borrow() > before || shared.due(queue.end()) <= before {
            waited = Duration::ZERO;
            continue;
        }
        waited += PROBE;
        match timeout(ANSWER, look(shared, waited >= PATIENCE)).await {
            Err(_) => shared.set_apply_problem(Some("the local database does not answer".into())),
            Ok(Ok(None)) => {}
            Ok(Ok(problem)) => shared.set_apply_problem(problem),
            // A session that fails says so by itself.
            Ok(Err(error)) => tracing::debug!("look for what keeps data waiting: {error:#}"),
        }
    }
}

/// Whether the database answers; and once that has lasted, whose lock the apply waits for.
async fn look(shared: &Arc<Shared>, long: bool) -> anyhow::Result<Option<String>> {
    let mut client = local_client(shared).await?;
    if !long {
        return Ok(None);
    }
    let sql = "SELECT holder.pid::text, coalesce(holder.application_name, ''), \
                      CASE WHEN holder.application_name IN ('terrace copy', 'terrace comparison', 'terrace sequences') \
                           THEN pg_catalog.pg_terminate_backend(holder.pid) END \
               FROM pg_catalog.pg_stat_activity apply \
               CROSS JOIN LATERAL pg_catalog.unnest(pg_catalog.pg_blocking_pids(apply.pid)) blocker \
               JOIN pg_catalog.pg_stat_activity holder ON holder.pid = blocker \
               WHERE apply.application_name = $1::pg_catalog.name::text AND apply.wait_event_type = 'Lock' \
                 AND apply.datname = current_database()";
    let applies = format!("terrace apply {}", shared.config.node.name);
    let holders = client.query(sql, &[Some(&applies)]).await?;
    let is_reader = |row: &Row| row[2].is_some();
    let (readers, others): (Vec<Row>, Vec<Row>) = holders.into_iter().partition(is_reader);
    if !readers.is_empty() {
        let ended = readers.len();
        let reason = format!(
            "{ended} sessions that copied, compared or looked through tables kept data waiting"
        );
        shared.event("copy_ended", &reason);
    }
    Ok(others.first().map(|row| {
        let text = |column: usize| row[column].as_deref().unwrap_or_default();
        let (pid, application) = (text(0), text(1));
        format!(
            "waits for a lock that session {pid} (\"{application}\") holds; end its transaction"
        )
    }))
}
