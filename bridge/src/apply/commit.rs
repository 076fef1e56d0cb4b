//! How a local transaction ends: what it says of itself, and what is said of it.
//!
//! Where the database is in the stream is written in the transaction whose rows bring it there, so
//! the one is never seen without the other.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use postgres_protocol::message::frontend;

use super::statement::{self, Expect, Row, Step};
use super::{ALTERED, Failed, Session, unexpected};
use crate::client::PgError;
use crate::clock::{PG_EPOCH_MICROS, timestamp};
use crate::durable::Noted;
use crate::lsn::Lsn;
use crate::plain::{escape, plain};
use crate::record::{CommitInfo, Record};

/// Digits of a tag, …
const MAX_TAG: usize = 20;
/// … and bytes of a label, which the extension lets pass.
const MAX_LABEL: usize = 1_000;

/// What a batch has done so far.
#[derive(Default)]
pub(super) struct Batch {
    pub transactions: usize,
    pub bytes: usize,
    pub end: Lsn,
    pub last: Option<CommitInfo>,
    /// The last transaction of each label.
    pub labelled: BTreeMap<String, CommitInfo>,
    /// Rows that were not there to be deleted, by table.
    pub missing_deletes: Vec<(Row, u64)>,
    pub notified: HashSet<Bytes>,
}

impl Batch {
    /// Counts a transaction in that is read to its end.
    pub fn take_in(&mut self, commit: &Record) -> anyhow::Result<()> {
        let info = commit.commit().context("commit record")?;
        // Most have none, and need not be parsed to see that.
        if info.tag_says(b"\"label\":")
            && let Some(label) = Tag::of(&info).label
        {
            self.labelled.insert(label, info.clone());
        }
        self.transactions += 1;
        self.end = commit.lsn;
        self.last = Some(info);
        Ok(())
    }
}

/// What a transaction's tag says of it.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Tag {
    tag: Option<String>,
    label: Option<String>,
}

impl Tag {
    /// Anybody at the top may write one to a transaction that changes nothing of ours, with whatever is in it; what
    /// the extension would not write is as good as none.
    fn of(info: &CommitInfo) -> Tag {
        let said: Tag = serde_json::from_slice(&info.tag).unwrap_or_default();
        match said.is_in_order() {
            true => said,
            false => Tag::default(),
        }
    }

    /// A transaction's number, and perhaps a text that a database can hold.
    fn is_in_order(&self) -> bool {
        let is_number = |tag: &String| {
            (1..=MAX_TAG).contains(&tag.len()) && tag.bytes().all(|byte| byte.is_ascii_digit())
        };
        let is_text = |label: &String| label.len() <= MAX_LABEL && !label.contains('\0');
        self.tag.as_ref().is_some_and(is_number) && self.label.as_ref().is_none_or(is_text)
    }
}

/// Only with another transaction is it known where the row is.
#[derive(Debug, thiserror::Error)]
#[error("the row of terrace.progress is not where it was")]
pub(super) struct Moved;

/// What was put off to the end of a transaction may be refused there, and of several that go as one
/// perhaps none.
fn at_commit(error: PgError) -> Failed {
    match error.code() {
        Some(_) => Failed::Unexpected(error.to_string()),
        None => Failed::Fatal(error.into()),
    }
}

impl Session<'_> {
    /// Sends what a local transaction ends with, but for its COMMIT.
    pub(super) fn close(&mut self, batch: &Batch) -> Result<(), Failed> {
        self.attempted = batch.end;
        for step in self.closing_steps(batch) {
            self.send(&step)?;
        }
        frontend::sync(self.client.buffer());
        // The answer to Sync is what ends a simple query.
        self.expected.push_back(Expect::Simple);
        Ok(())
    }

    /// Commits, if everything did what it should.
    pub(super) async fn conclude(&mut self, mut batch: Batch) -> Result<(), Failed> {
        self.answers(&mut batch).await?;
        if self.look_at_altered().await.map_err(unexpected)? {
            return Err(Failed::Unexpected(ALTERED.into()));
        }
        for (row, count) in std::mem::take(&mut batch.missing_deletes) {
            self.bump(&row, "delete_missing", count).await?;
        }
        self.client.simple("COMMIT").await.map_err(at_commit)?;
        self.constrained.went_well(&self.sent_sets);
        self.forget_sent();
        self.note(&batch);
        if self.planner.routing_changed() {
            self.planner.reload_routing(&mut self.client).await?;
        }
        Ok(())
    }

    /// Looks again at tables that may have been altered here while this transaction had no lock on
    /// them yet; now it has. Whether any is another than was known, or than sets were made for.
    pub(super) async fn look_at_altered(&mut self) -> anyhow::Result<bool> {
        let oids = std::mem::take(&mut self.altered);
        if oids.is_empty() {
            return Ok(false);
        }
        let altered = self.planner.look_again(&mut self.client, &oids).await?;
        let (mut sent, mut apart) = (self.sent_sets.iter(), self.sent_apart.iter());
        let outdated = sent.any(|shape| oids.contains(&shape.oid) && !self.planner.has(shape))
            || apart.any(|oid| oids.contains(oid) && !self.planner.stands_alone(oid));
        Ok(altered || outdated)
    }

    /// Whether what is next is to be tried once more as it was, with tables as they are now. Once:
    /// what is altered all the time goes another way.
    pub(super) fn is_altered_anew(&mut self) -> bool {
        self.altered_after.replace(self.committed) != Some(self.committed)
    }

    /// Takes in what [`Session::progress_step`] returned.
    pub(super) fn take_place(&mut self, row: Vec<Option<String>>) {
        let mut row = row.into_iter();
        self.place = row.next().flatten();
        if let Some(altered) = row.next().flatten() {
            let listed = altered.trim_matches(['{', '}']).split(',');
            self.altered.extend(listed.map(str::to_owned));
        }
    }

    /// One row is written over and over: what came before must not be looked through to find it,
    /// for as long as somebody's snapshot keeps that.
    pub(super) fn progress_step(&mut self, batch: &Batch) -> Step {
        let time = batch
            .last
            .as_ref()
            .map_or(self.shared.top_time(), |info| info.commit_time);
        let mut values = statement::texts([
            batch.end.to_string(),
            timestamp(time + PG_EPOCH_MICROS),
            self.queue.identity().to_string(),
        ]);
        let place = self.place.take().map(Bytes::from);
        let known = if place.is_some() {
            " WHERE ctid = $4"
        } else {
            ""
        };
        values.extend(place.map(Some));
        let sql = format!(
            "UPDATE terrace.progress SET lsn = $1, commit_time = $2, identity = $3{known} \
             RETURNING ctid, terrace.take_altered()"
        );
        self.planner.step(sql, values, Expect::Place)
    }

    /// What a local transaction ends with.
    pub(super) fn closing_steps(&mut self, batch: &Batch) -> Vec<Step> {
        let mut steps = vec![self.progress_step(batch)];
        if !batch.labelled.is_empty() {
            steps.push(self.delivery_step(batch));
        }
        steps
    }

    /// Notes in the same transaction when what has a label came.
    fn delivery_step(&self, batch: &Batch) -> Step {
        let delivered = batch.labelled.iter().map(|(label, info)| {
            let committed_at = timestamp(info.commit_time + PG_EPOCH_MICROS);
            let tag = Tag::of(info).tag;
            serde_json::json!({ "tag": tag, "label": label, "committed_at": committed_at })
        });
        let delivered = serde_json::Value::from_iter(delivered).to_string();
        let node = &self.shared.config.node;
        // A database of another encoding may not have all characters: it converts what is escaped by itself, or
        // takes what has none of them.
        let (escaped, plain) = (escape(&delivered), plain(&delivered));
        let values = [node.name.clone(), node.domain.clone(), escaped, plain];
        let sql = "SELECT terrace.note_delivery($1, $2, $3, $4)";
        statement::unnamed(sql.into(), statement::texts(values), Expect::Done)
    }

    pub(super) async fn bump(&mut self, row: &Row, kind: &str, count: u64) -> Result<(), Failed> {
        let count_text = count.to_string();
        self.client
            .query(
                "SELECT terrace.bump_conflict($1, $2, $3, $4)",
                &[
                    Some(&row.table),
                    Some(kind),
                    Some(&count_text),
                    row.key.as_deref(),
                ],
            )
            .await?;
        self.conflicts += count;
        Ok(())
    }

    /// Where the database is by what it says itself.
    pub(super) fn note(&mut self, batch: &Batch) {
        self.progress_written = Some(Instant::now());
        self.shared.noted.send_replace(Some(Noted {
            lsn: batch.end,
            session: Arc::clone(&self.backend),
        }));
        self.announce(batch);
    }

    /// What is shown, and told to others.
    pub(super) fn announce(&mut self, batch: &Batch) {
        self.committed = batch.end;
        self.sequences.1 |= batch.transactions > 0;
        self.shared.replayed.send_replace(batch.end);
        let top_time = self.shared.top_time();
        let conflicts = std::mem::take(&mut self.conflicts);
        self.shared.set_applied(|applied| {
            applied.conflicts += conflicts;
            applied.transactions += batch.transactions as u64;
            match &batch.last {
                None => applied.top_time = top_time,
                Some(info) => {
                    applied.top_time = info.commit_time;
                    let Tag { tag, label } = Tag::of(info);
                    if tag.is_some() {
                        applied.last_tag = tag;
                        applied.last_label = label;
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(tag: &str) -> Option<String> {
        let info = CommitInfo {
            xid: 1,
            commit_lsn: Lsn(1),
            commit_time: 0,
            tag: Bytes::copy_from_slice(tag.as_bytes()),
        };
        Tag::of(&info).label
    }

    #[test]
    fn a_tag_that_the_extension_would_not_write_says_nothing() {
        assert_eq!(label(r#"{"tag":"17","label":"a €"}"#).unwrap(), "a €");
        let long = "9".repeat(30);
        for forged in [
            r#"{"label":"x"}"#.to_owned(),
            r#"{"tag":"","label":"x"}"#.into(),
            r#"{"tag":"1a","label":"x"}"#.into(),
            r#"{"tag":7,"label":"x"}"#.into(),
            r#"{"tag":"1","label":"a\u0000"}"#.into(),
            format!(r#"{{"tag":"{long}","label":"x"}}"#),
            format!(r#"{{"tag":"1","label":"{}"}}"#, "x".repeat(2_000)),
        ] {
            assert_eq!(label(&forged), None, "{forged}");
        }
    }
}
