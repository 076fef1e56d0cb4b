//! A transaction that cannot be applied is named, and left out when somebody says so.
//!
//! Guarantee: what is left out is the one transaction whose end was named while it stood in
//! the way; an order for any other is refused, and none outlives its transaction.

use super::commit::Moved;
use super::obstacle::Unanswered;
use super::{Batch, Session};
use crate::client::PgError;
use crate::record::{Kind, Record};

impl Session<'_> {
    /// What cannot be applied, for people, with where it ends. Errors that say nothing of
    /// the transaction stay as they are.
    pub(super) async fn name_culprit(&mut self, error: anyhow::Error) -> anyhow::Error {
        if let Some(PgError::Db(refused)) = refused(&error)
            && let Some(hidden) = refused.hidden()
        {
            tracing::warn!("refused: {hidden}");
        }
        if !is_of_the_transaction(&error) || self.rewind().await.is_err() {
            return error;
        }
        let end = match self.read_on().await {
            Ok(record) if record.kind == Kind::Commit => record.lsn,
            _ => return error,
        };
        self.shared.set_refused(end);
        error.context(format!(
            "the transaction that ends at {end} cannot be applied"
        ))
    }

    /// Leaves the next transaction out if that has been ordered. False when it has not, or is not
    /// next: what a sign of life said may have to be said again before.
    pub(super) async fn skip_if_told(&mut self) -> anyhow::Result<bool> {
        let Some(wanted) = self.shared.skip().filter(|lsn| *lsn > self.committed) else {
            return Ok(false);
        };
        let commit = self.read_on().await?;
        if commit.kind != Kind::Commit || commit.lsn != wanted {
            self.rewind().await?;
            return Ok(false);
        }
        let info = commit.commit()?;
        let label: serde_json::Value = serde_json::from_slice(&info.tag).unwrap_or_default();
        let label = label["label"]
            .as_str()
            .map_or(String::new(), |label| format!(" ({label})"));
        let batch = Batch {
            end: commit.lsn,
            last: Some(info),
            ..Batch::default()
        };
        let step = self.progress_step(&batch);
        self.client.simple("BEGIN").await?;
        self.run_step(&step).await?;
        self.client.simple("COMMIT").await?;
        self.note(&batch);
        self.shared.set_stuck(None);
        let reason = format!("the transaction that ends at {wanted}{label} is left out, as asked");
        self.shared.event("skipped", &reason);
        Ok(true)
    }

    /// Reads to the end of the next transaction, taking its definitions in; or the watermark that
    /// comes first.
    pub(super) async fn read_on(&mut self) -> anyhow::Result<Record> {
        loop {
            let record = self.next_record().await?;
            match record.kind {
                Kind::Schema => self.planner.define(&record)?,
                Kind::Commit | Kind::Watermark => return Ok(record),
                Kind::Part | Kind::Mark => {}
            }
        }
    }
}

/// What a server said, or that it said nothing.
pub(super) fn refused(error: &anyhow::Error) -> Option<&PgError> {
    error.chain().find_map(|cause| cause.downcast_ref())
}

/// Not that the connection was lost, the server shuts down, two got in each other's way, another
/// server did not answer, or what is the bridge's own was rewritten.
pub(super) fn is_of_the_transaction(error: &anyhow::Error) -> bool {
    if error.is::<Unanswered>() || error.is::<Moved>() {
        return false;
    }
    let Some(error) = refused(error) else {
        return true;
    };
    let passes = |class| ["08", "40", "53", "57", "58"].contains(&class);
    error.code().is_some() && !error.class().is_some_and(passes)
}
