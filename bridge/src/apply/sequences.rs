//! Sequences of synchronised columns are kept ahead of the values that came from the top.
//!
//! Guarantee: when nothing has come for [`WHEN_IDLE`], every such sequence is beyond all that
//! is applied (that of a column without an index, in a table beyond 16 MiB, only what was
//! there when the bridge started); so a server that is cut off for good can be written to.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Session;
use crate::client::PgError;

/// So long nothing comes before they are looked at.
pub(super) const WHEN_IDLE: Duration = Duration::from_secs(1);
/// At the latest after as long under load.
pub(super) const UNDER_LOAD: Duration = Duration::from_secs(10);

impl Session<'_> {
    /// What goes wrong with one of them must not stop the data.
    pub(super) async fn advance_sequences(&mut self, idle: bool) -> Result<(), PgError> {
        self.sequences = (Instant::now(), false);
        // It may read whole tables: once, and when nothing waits for it.
        let thorough = idle && self.thorough.load(Ordering::Relaxed);
        let sql = format!("SELECT terrace.advance_sequences({thorough})");
        match self.client.simple(&sql).await {
            Err(PgError::Db(error)) => tracing::warn!("put sequences forward: {error}"),
            done => {
                done?;
                self.thorough.fetch_and(!thorough, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
