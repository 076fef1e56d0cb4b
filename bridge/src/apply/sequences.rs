//! Sequences of synchronised columns are kept ahead of the values that came from the top.
//!
//! Guarantee: when nothing has come for [`WHEN_IDLE`], every such sequence is beyond all that
//! is applied (that of a column without an index, in a table beyond 16 MiB, only what was
//! there when the bridge started); so a server that is cut off for good can be written to.
//! And no data waits for that: not for a lock on a table that it does not concern, nor for a table to be read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{AS_OWNERS, Session};
use crate::client::{Client, PgError, SessionOptions};
use crate::conninfo::ConnInfo;
use crate::status::Shared;
use crate::upstream::pinned_settings;

/// So long nothing comes before they are looked at.
pub(super) const WHEN_IDLE: Duration = Duration::from_secs(1);
/// At the latest after as long under load.
pub(super) const UNDER_LOAD: Duration = Duration::from_secs(10);

const LOCK_NOT_AVAILABLE: &str = "55P03";

/// A table that is locked is left for another time.
const CHEAPLY: &str =
    "BEGIN; SET LOCAL lock_timeout = '20ms'; SELECT terrace.advance_sequences(false); COMMIT";

impl Session<'_> {
    /// What goes wrong with one of them must not stop the data.
    pub(super) async fn advance_sequences(&mut self, idle: bool) -> Result<(), PgError> {
        self.sequences = (Instant::now(), false);
        match self.client.simple(CHEAPLY).await {
            Err(error @ PgError::Db(_)) => {
                self.sequences.1 = error.code() == Some(LOCK_NOT_AVAILABLE);
                tracing::warn!("put sequences forward: {error}");
                self.client.simple("ROLLBACK").await?;
            }
            // NULL: not all of them.
            Ok(rows) => self.sequences.1 = rows.first().is_some_and(|row| row.contains(&None)),
            Err(error) => return Err(error),
        }
        if idle && self.thorough.load(Ordering::Relaxed) {
            self.look_thoroughly();
        }
        Ok(())
    }

    /// Reads whole tables, once, in a session of its own, which is ended when it keeps data waiting (`room.rs`).
    fn look_thoroughly(&mut self) {
        while self.looking.try_join_next().is_some() {}
        if !self.looking.is_empty() {
            return;
        }
        let (shared, thorough) = (Arc::clone(self.shared), Arc::clone(&self.thorough));
        self.looking.spawn(async move {
            match advance_all(&shared).await {
                Ok(()) => thorough.store(false, Ordering::Relaxed),
                Err(error) => tracing::warn!("put sequences forward: {error:#}"),
            }
        });
    }
}

async fn advance_all(shared: &Shared) -> anyhow::Result<()> {
    let info = ConnInfo::parse(&shared.config.database.url)?;
    // As where it is applied.
    let own = [
        ("session_replication_role", "replica"),
        ("synchronous_commit", "off"),
        ("search_path", "pg_catalog, pg_temp"),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let options = SessionOptions {
        application_name: "terrace sequences".into(),
        gucs: pinned_settings().into_iter().chain(own).collect(),
        ..Default::default()
    };
    let mut client = Client::connect(&info, &options).await?;
    client.simple(AS_OWNERS).await?;
    client.lift_transaction_limit().await?;
    let all = "SELECT terrace.advance_sequences(true)";
    client.simple(all).await?;
    Ok(())
}
