//! The way in order: a pipeline of single statements, one after the other as the top's
//! history goes. Parts of a large transaction that can be folded go set-wise among them.

use std::collections::HashSet;

use anyhow::Context;
use bytes::Bytes;
use postgres_protocol::message::frontend;

use super::plan::{self, Planned};
use super::setwise::{MAX_CELLS, cells};
use super::statement::{Expect, Row, Step};
use super::{BY_ITSELF, Batch, Failed, MAX_BYTES, Session, WATERMARK_EVERY, sealed, unexpected};
use crate::client::{DbError, affected, bind, row};
use crate::record::{Kind, Record};

/// Of a large transaction so many bytes go together: one part is folded while Postgres
/// works on the one before.
const PARTS_BYTES: usize = 4 << 20;
/// A batch has all the locks of its transactions; where those are of thousands of tables they may be
/// more than the server holds (PostgreSQL's out_of_memory, `lock.c`).
const OUT_OF_LOCKS: &str = "53200";
/// Answers are read at the latest when so many bytes of requests are unanswered.
const PIPELINE_BYTES: usize = 64 << 10;
/// A transaction that sends so many notifications is the last of its batch.
const MOST_NOTIFIED: usize = 1_000;

impl Session<'_> {
    /// Whether there was a transaction.
    pub(super) async fn fast_batch(&mut self) -> Result<bool, Failed> {
        let mut batch = Batch::default();
        let mut open = false;
        loop {
            if batch.transactions > 0 || batch.end > self.committed {
                // Something is complete: take only what is there and may be shown.
                let quiet = batch.transactions == 0;
                let full = batch.transactions >= self.in_order.min(self.most.0)
                    || batch.bytes >= MAX_BYTES
                    || batch.notified.len() >= MOST_NOTIFIED
                    || self.planner.routing_changed();
                let gate = *self.shared.upstream_replayed.borrow();
                match self.peek()? {
                    _ if full => break,
                    None => break,
                    // Whatever comes of a transaction, how far it is before it is known.
                    Some(record) if quiet && record.kind != Kind::Watermark => break,
                    Some(record) if record.kind == Kind::Part => break,
                    Some(record) if record.lsn > gate => break,
                    Some(record) if sealed::goes_alone(record) => break,
                    Some(record) if repeats_notify(record, &batch.notified) => break,
                    Some(_) => {}
                }
            }
            let record = self.next_record().await?;
            batch.bytes += record.bytes.len();
            match record.kind {
                Kind::Schema => self.planner.define(&record)?,
                Kind::Mark => {}
                Kind::Watermark => {
                    if !self.gate_allows(&record) {
                        self.wait_for_gate(record.lsn).await?;
                    }
                    batch.end = record.lsn;
                }
                Kind::Part | Kind::Commit => {
                    if record.kind == Kind::Commit && !self.gate_allows(&record) && !open {
                        self.wait_for_gate(record.lsn).await?;
                    }
                    if sealed::goes_alone(&record) {
                        return Err(Failed::Unexpected(BY_ITSELF.into()));
                    }
                    if !open {
                        open = true;
                        self.begin()?;
                    }
                    if record.kind == Kind::Part {
                        let parts = self.parts(record)?;
                        self.changes(&parts, &mut batch).await?;
                    } else {
                        self.changes(std::slice::from_ref(&record), &mut batch)
                            .await?;
                        // A large transaction is sent before it may be shown, but
                        // committed only then.
                        if !self.gate_allows(&record) {
                            self.drain(&mut batch).await?;
                            self.wait_for_gate(record.lsn).await?;
                        }
                        batch.take_in(&record)?;
                        self.attempted = batch.end;
                    }
                }
            }
        }
        self.finish_fast(open, batch).await
    }

    /// A part of a large transaction with those that follow it and are there.
    fn parts(&mut self, first: Record) -> Result<Vec<Record>, Failed> {
        let (mut bytes, mut values) = (first.bytes.len(), cells(&first));
        let mut parts = vec![first];
        while bytes < PARTS_BYTES
            && values < MAX_CELLS
            && let Some(next) = self.peek()?
            && next.kind == Kind::Part
        {
            bytes += next.bytes.len();
            values += cells(next);
            parts.extend(self.ahead.pop_front());
        }
        Ok(parts)
    }

    /// Sends the changes of records that follow each other: set-wise, if that can be done
    /// and is worthwhile.
    pub(super) async fn changes(
        &mut self,
        records: &[Record],
        batch: &mut Batch,
    ) -> Result<(), Failed> {
        if self.planner.wants_statements_anew() {
            self.drain(batch).await?;
            self.renew_statements().await?;
        }
        if let Some(sets) = self.fold(records, batch).await? {
            self.drain(batch).await?;
            let constrained = sets.constrained();
            tracing::debug!(constrained, "a part went set-wise");
            self.send_sets(sets, batch).await?;
            // The answers are not waited for: what comes next is folded meanwhile.
            return Ok(self.client.send_all().await?);
        }
        for record in records {
            self.send_changes(record, batch).await?;
        }
        Ok(())
    }

    async fn send_changes(&mut self, record: &Record, batch: &mut Batch) -> Result<(), Failed> {
        for frame in record.frames() {
            let payload = record.bytes.slice_ref(frame.context("frame")?.payload);
            self.send_change(&payload, batch).await?;
        }
        Ok(())
    }

    /// Sends what a message asks for.
    pub(super) async fn send_change(
        &mut self,
        payload: &Bytes,
        batch: &mut Batch,
    ) -> Result<(), Failed> {
        let steps = match self.planner.plan(payload, true) {
            Ok(Planned::Steps(steps)) => steps,
            Ok(Planned::Nothing) => return Ok(()),
            Ok(Planned::Order(_)) => {
                self.drain(batch).await?;
                return Err(Failed::Unexpected(BY_ITSELF.into()));
            }
            // The catalog must be asked, for which the pipeline must be empty.
            Ok(Planned::Lookup(relid)) => {
                self.drain(batch).await?;
                let looked_up = self.planner.lookup(&mut self.client, relid).await;
                looked_up.map_err(unexpected)?;
                match self.planner.plan(payload, true).map_err(unexpected)? {
                    Planned::Steps(steps) => steps,
                    _ => return Ok(()),
                }
            }
            Err(error) => return Err(Failed::Unexpected(format!("{error:#}"))),
        };
        for step in steps {
            // With as many, nothing is compared with them: this transaction is the last of the batch.
            if let Some(content) = &step.notify
                && batch.notified.len() < MOST_NOTIFIED
            {
                // A part of what was read would keep the block that it is in.
                batch.notified.insert(Bytes::copy_from_slice(content));
            }
            self.send(&step)?;
        }
        if self.unflushed > PIPELINE_BYTES {
            self.drain(batch).await?;
        }
        Ok(())
    }

    pub(super) fn send(&mut self, step: &Step) -> Result<(), Failed> {
        let out = self.client.buffer();
        let before = out.len();
        let encoded = (|| {
            if step.parse {
                frontend::parse(&step.name, &step.sql, [], out)?;
            }
            bind(
                out,
                &step.name,
                step.values.iter().map(|value| value.as_deref()),
            )?;
            frontend::execute("", 0, out)
        })();
        encoded.context("encode a statement")?;
        self.unflushed += self.client.buffer().len() - before;
        self.expected.push_back(step.expect.clone());
        Ok(())
    }

    /// Sends what is buffered and reads every answer that is due.
    pub(super) async fn drain(&mut self, batch: &mut Batch) -> Result<(), Failed> {
        frontend::flush(self.client.buffer());
        self.answers(batch).await
    }

    pub(super) async fn answers(&mut self, batch: &mut Batch) -> Result<(), Failed> {
        self.client.send_all().await?;
        self.unflushed = 0;
        while let Some(expect) = self.expected.front() {
            let message = self.client.message().await?;
            match message.kind {
                b'C' => {
                    let count = affected(&message.body);
                    match expect {
                        Expect::Simple | Expect::Done => {}
                        Expect::One | Expect::Place if count == 1 => {}
                        Expect::One | Expect::Place => {
                            return Err(Failed::Unexpected("a row is missing".into()));
                        }
                        Expect::Rows(rows, _) if count == *rows => {}
                        Expect::Rows(rows, _) => {
                            let text = format!("{count} rows changed in place of {rows}");
                            return Err(Failed::Unexpected(text));
                        }
                        Expect::Delete(change) if count == 0 => {
                            let row = self.planner.row_of(change)?;
                            count_missing(&mut batch.missing_deletes, row);
                        }
                        Expect::Delete(_) => {}
                    }
                    if !matches!(expect, Expect::Simple) {
                        self.expected.pop_front();
                    }
                }
                // A simple query is answered by Z as well.
                b'Z' => {
                    if matches!(expect, Expect::Simple) {
                        self.expected.pop_front();
                    }
                }
                b'D' if matches!(expect, Expect::Place) => {
                    self.take_place(row(message.body)?);
                }
                b'E' => {
                    let error = DbError::parse(&message.body);
                    if error.code == OUT_OF_LOCKS && batch.transactions > 1 {
                        return Err(Failed::OutOfLocks(batch.transactions));
                    }
                    return Err(Failed::Unexpected(error.to_string()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn finish_fast(&mut self, open: bool, batch: Batch) -> Result<bool, Failed> {
        let quiet = batch.transactions == 0;
        let written = self.progress_written.map(|at| at.elapsed());
        if quiet && written.is_some_and(|ago| ago < WATERMARK_EVERY) {
            // Shown at once; written with the next transaction or later.
            self.announce(&batch);
            return Ok(false);
        }
        if !open {
            self.begin()?;
        }
        self.close(&batch)?;
        self.conclude(batch).await?;
        Ok(!quiet)
    }
}

fn count_missing(counts: &mut Vec<(Row, u64)>, row: Row) {
    match counts.iter_mut().find(|(last, _)| last.table == row.table) {
        Some((last, count)) => (*last, *count) = (row, *count + 1),
        None => counts.push((row, 1)),
    }
}

/// Postgres folds equal notifications of one transaction into one.
fn repeats_notify(record: &Record, notified: &HashSet<Bytes>) -> bool {
    !notified.is_empty()
        && record.frames().flatten().any(|frame| {
            plan::notify_content(frame.payload).is_some_and(|content| notified.contains(content))
        })
}
