//! The careful way: one transaction and one statement at a time, so that a row that
//! is missing or already there can be resolved for the top, and counted.

use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use postgres_protocol::message::frontend;
use tokio::time::timeout;

use super::commit::Moved;
use super::obstacle::{Clearing, Unanswered, is_in_the_way};
use super::plan::Planned;
use super::skip::is_of_the_transaction;
use super::statement::{Expect, Step};
use super::{ALTERED, Batch, Session, fatal};
use crate::client::PgError;
use crate::lsn::Lsn;
use crate::record::Kind;

/// Who waits looks as often whether something else is wanted.
const LOOK: Duration = Duration::from_millis(500);
/// Class of errors that speak of a value (PostgreSQL's `errcodes.txt`) …
const DATA_EXCEPTION: &str = "22";
/// … and what is said when a type has no way to another.
const DATATYPE_MISMATCH: &str = "42804";

impl Session<'_> {
    /// Leaves the failed transaction and the rest of its pipeline behind.
    pub(super) async fn leave_behind(&mut self) -> anyhow::Result<()> {
        frontend::sync(self.client.buffer());
        self.client.flush().await?;
        let due = self
            .expected
            .iter()
            .filter(|e| matches!(e, Expect::Simple))
            .count()
            + 1;
        // However long that takes: what was sent may wait for a lock.
        self.skip_to_ready(due).await?;
        self.client.simple("ROLLBACK").await?;
        self.client.simple("DEALLOCATE ALL").await?;
        self.rewind().await
    }

    /// Applies what the other ways could not, one transaction and one statement at
    /// a time, to the end of the batch that failed.
    pub(super) async fn careful(&mut self, until: Lsn) -> anyhow::Result<()> {
        while self.committed < until {
            if self.skip_if_told().await? {
                self.clears = None;
                continue;
            }
            let Err(error) = self.careful_transaction().await else {
                self.clears = None;
                continue;
            };
            self.client.simple("ROLLBACK").await.ok();
            self.conflicts = 0;
            let clearing = self.clears.take();
            if clearing.is_none() && is_in_the_way(&error) {
                self.clear_at_the_gate(error).await?;
                continue;
            }
            // It can be skipped all the same.
            if let Some(clearing) = clearing.filter(|_| error.is::<Unanswered>()) {
                self.shared.set_stuck(Some(clearing.end));
            }
            return Err(self.name_culprit(error).await);
        }
        // What was planned here was run without being prepared.
        self.planner.forget_statements();
        Ok(())
    }

    /// Once more, and what is in the way and nobody's makes way; the server above is to know all of
    /// the transaction when it is asked.
    async fn clear_at_the_gate(&mut self, error: anyhow::Error) -> anyhow::Result<()> {
        self.rewind().await?;
        let commit = self.read_on().await?;
        self.rewind().await?;
        if !self.gate_allows(&commit) {
            self.shared.set_apply_problem(Some(format!("{error:#}")));
            self.shared.set_stuck(Some(commit.lsn));
        }
        let told_to_skip = || self.shared.skip() == Some(commit.lsn);
        while !told_to_skip() {
            if let Ok(open) = timeout(LOOK, self.wait_for_gate(commit.lsn)).await {
                open?;
                break;
            }
        }
        self.clears = Some(Clearing::new(commit.lsn));
        Ok(())
    }

    async fn skip_to_ready(&mut self, mut due: usize) -> anyhow::Result<()> {
        while due > 0 {
            let message = self.client.message().await?;
            due -= usize::from(message.kind == b'Z');
        }
        Ok(())
    }

    /// Does one transaction; or nothing yet, if a table was altered here meanwhile.
    async fn careful_transaction(&mut self) -> anyhow::Result<()> {
        let mut batch = Batch::default();
        let mut open = false;
        loop {
            let record = self.next_record().await?;
            match record.kind {
                Kind::Schema => self.planner.define(&record)?,
                Kind::Mark => {}
                Kind::Watermark => {
                    self.wait_for_gate(record.lsn).await?;
                    batch.end = record.lsn;
                }
                Kind::Part | Kind::Commit => {
                    if !open {
                        self.client.simple("BEGIN").await?;
                        open = true;
                    }
                    for frame in record.frames() {
                        let frame = frame?;
                        let payload = record.bytes.slice_ref(frame.payload);
                        self.change(&payload, frame.lsn).await?;
                    }
                    if record.kind == Kind::Commit {
                        self.wait_for_gate(record.lsn).await?;
                        batch.take_in(&record)?;
                    }
                }
            }
            if batch.end > Lsn::ZERO {
                break;
            }
        }
        if !open {
            self.client.simple("BEGIN").await?;
        }
        for step in self.closing_steps(&batch) {
            self.run_step(&step).await?;
        }
        if self.look_at_altered().await? && self.is_altered_anew() {
            tracing::info!(problem = ALTERED, from = %self.committed, "once more with care");
            self.client.simple("ROLLBACK").await?;
            self.conflicts = 0;
            return self.rewind().await;
        }
        self.client.simple("COMMIT").await?;
        self.sum_up_slices().await;
        self.note(&batch);
        if self.planner.routing_changed() {
            self.planner.reload_routing(&mut self.client).await?;
        }
        Ok(())
    }

    pub(super) async fn careful_change(&mut self, payload: &Bytes) -> anyhow::Result<()> {
        let planned = match self.planner.plan(payload, false)? {
            Planned::Lookup(relid) => {
                self.planner.lookup(&mut self.client, relid).await?;
                self.planner.plan(payload, false)?
            }
            planned => planned,
        };
        let steps = match planned {
            Planned::Steps(steps) => steps,
            Planned::Order(order) => {
                self.clears.iter_mut().for_each(Clearing::forget_tables);
                return self.obey(&order).await;
            }
            Planned::Nothing | Planned::Lookup(_) => return Ok(()),
        };
        for step in steps {
            let done = self.careful_step(payload, &step).await;
            done.map_err(|error| self.about_table(payload, error))?;
        }
        Ok(())
    }

    /// Says which table a refused row is for, and where to look when a value is refused.
    fn about_table(&self, payload: &Bytes, error: anyhow::Error) -> anyhow::Error {
        let (Some(refused), Ok(row)) = (error.downcast_ref(), self.planner.row_of(payload)) else {
            return error;
        };
        if !is_of_the_transaction(&error) {
            return error;
        }
        let table = row.table;
        let of_value = PgError::class(refused) == Some(DATA_EXCEPTION)
            || refused.code() == Some(DATATYPE_MISMATCH);
        error.context(match of_value {
            true => format!(
                "a column of table \"{table}\" cannot hold its value; give it the type that it has \
                 above"
            ),
            false => format!("table \"{table}\""),
        })
    }

    async fn careful_step(&mut self, payload: &Bytes, step: &Step) -> anyhow::Result<()> {
        self.make_way(payload).await?;
        self.note_local(payload).await?;
        let may_be_kept = self.may_be_kept(payload, step).await?;
        let count = self.run_step(step).await?;
        let is_kept = count == 0 && may_be_kept;
        // Its key was altered here since the table was looked at; it is looked at anew.
        if count > 1 && self.planner.is_told_by_primary(payload)? {
            bail!("the primary key of a table was altered on this server");
        }
        match &step.expect {
            _ if is_kept => {}
            Expect::One if count == 0 => {
                let row = self.planner.row_of(payload)?;
                if let Some(insert) = self.planner.insert_instead(payload)?
                    && self.run_step(&insert).await? == 0
                {
                    // Somebody here does not want it at all.
                    return Ok(());
                }
                self.bump(&row, "update_missing", 1).await.map_err(fatal)?;
            }
            Expect::Delete(change) if count == 0 => {
                let row = self.planner.row_of(change)?;
                self.bump(&row, "delete_missing", 1).await.map_err(fatal)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the row of a change is there, where a trigger or a rule of this server may not want it
    /// changed, so that a change that does nothing was kept from it. It stays there until this transaction ends.
    async fn may_be_kept(&mut self, payload: &Bytes, step: &Step) -> anyhow::Result<bool> {
        let is_of_a_row = matches!(step.expect, Expect::One | Expect::Delete(_));
        if !is_of_a_row || !self.planner.may_keep_row(payload)? {
            return Ok(false);
        }
        match self.planner.find(payload, false)? {
            Some((find, _)) => Ok(self.run_step(&find).await? > 0),
            None => Ok(false),
        }
    }

    /// Counts that a row is changed which a session of this server has changed.
    async fn note_local(&mut self, payload: &Bytes) -> anyhow::Result<()> {
        let Some((find, kind)) = self.planner.find(payload, true)? else {
            return Ok(());
        };
        if self.run_step(&find).await? > 0 {
            let row = self.planner.row_of(payload)?;
            self.bump(&row, kind, 1).await.map_err(fatal)?;
        }
        Ok(())
    }

    /// Existing rows make way for the top's.
    async fn make_way(&mut self, payload: &Bytes) -> anyhow::Result<()> {
        let mut gone = Vec::new();
        if let Some(clear) = self.planner.clear_way(payload)? {
            gone.push(self.run_step(&clear).await?);
        }
        gone.extend(self.remove_obstacles(payload).await?);
        let kind = match gone.iter().filter(|rows| **rows > 0).count() {
            0 => return Ok(()),
            1 => self.planner.conflict(payload)?,
            _ => "multiple_unique_conflicts",
        };
        let row = self.planner.row_of(payload)?;
        let bumped = self.bump(&row, kind, gone.iter().sum()).await;
        bumped.map_err(fatal)
    }

    pub(super) async fn run_step(&mut self, step: &Step) -> anyhow::Result<u64> {
        if step.expect == Expect::Place {
            let rows = self.client.query(&step.sql, &step.texts()?).await?;
            let row = rows.into_iter().next();
            self.take_place(row.ok_or(Moved)?);
            return Ok(1);
        }
        Ok(self.client.execute(&step.sql, &step.texts()?).await?)
    }
}
