//! Copies from this server must not stop its data.
//!
//! A copy reads every table in one snapshot and keeps them all from being written anew. A
//! TRUNCATE, or DDL, that comes meanwhile waits for it, and with it everything behind it, on
//! this server and on those below. Guarantee: it waits no longer than twice [`PATIENCE`]; then
//! the copy is ended, and whoever made it begins again.

use std::sync::Arc;
use std::time::Duration;

use super::Never;
use crate::open::local_client;
use crate::queue::Queue;
use crate::status::Shared;
use tokio::time::sleep;

/// Nothing at all is applied for so long, though there is something.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks for ever.
pub(super) async fn keep(shared: &Arc<Shared>, queue: &Queue) -> Never {
    loop {
        let before = *shared.replayed.borrow();
        sleep(PATIENCE).await;
        if *shared.replayed.borrow() > before || queue.end() <= before {
            continue;
        }
        match end_copies(shared).await {
            Ok(0) => {}
            Ok(ended) => {
                let reason = format!("{ended} sessions that copied from here kept data waiting");
                shared.event("copy_ended", &reason);
            }
            Err(error) => tracing::warn!("look for what keeps data waiting: {error:#}"),
        }
    }
}

/// Ends the copies that what applies here waits for; how many sessions.
async fn end_copies(shared: &Arc<Shared>) -> anyhow::Result<usize> {
    let sql = "SELECT pg_catalog.pg_terminate_backend(copy.pid) \
               FROM pg_catalog.pg_stat_activity apply \
               CROSS JOIN LATERAL pg_catalog.unnest(pg_catalog.pg_blocking_pids(apply.pid)) blocker \
               JOIN pg_catalog.pg_stat_activity copy ON copy.pid = blocker \
               WHERE apply.application_name = $1 AND apply.wait_event_type = 'Lock' \
                 AND apply.datname = current_database() \
                 AND copy.application_name = 'terrace copy'";
    let applies = format!("terrace apply {}", shared.config.node.name);
    let mut client = local_client(shared).await?;
    Ok(client.query(sql, &[Some(&applies)]).await?.len())
}
