//! The set-wise way: what has piled up is folded ([`super::fold`]) and written with
//! few statements. Taken by itself when there is enough and all of it can be folded;
//! otherwise the same records go the way in order.

use anyhow::Context;
use postgres_protocol::message::frontend;

use super::fold::{Fold, Statement};
use super::plan::Folded;
use super::sealed::goes_alone;
use super::{Batch, Expect, Failed, MAX_BYTES, MAX_TRANSACTIONS, Session};
use crate::client::bind_binary;
use crate::record::{Kind, Record};

/// Fewer transactions are sooner done in order.
const WORTHWHILE: usize = 20;

impl Session<'_> {
    /// Applies what has piled up, if that can be done set-wise. False when nothing
    /// was done: then the records wait to be taken in order.
    pub(super) async fn set_wise_batch(&mut self) -> Result<bool, Failed> {
        let records = self.pile()?;
        let folded = match records.len() >= WORTHWHILE {
            true => self.fold(&records).await?,
            false => None,
        };
        // What stood in the way may be over soon, or all of it may be of its kind.
        self.in_order = match records.len() < WORTHWHILE {
            true => WORTHWHILE,
            false => MAX_TRANSACTIONS,
        };
        let Some(statements) = folded else {
            // In front of what has been looked at already.
            for record in records.into_iter().rev() {
                self.ahead.push_front(record);
            }
            return Ok(false);
        };
        let mut batch = Batch::default();
        for record in &records {
            batch.take_in(record)?;
        }
        frontend::query("BEGIN", self.client.buffer()).context("BEGIN")?;
        self.expected.push_back(Expect::Simple);
        for statement in statements {
            self.send_set(statement)?;
        }
        self.finish_fast(true, batch).await?;
        tracing::debug!(transactions = records.len(), "applied set-wise");
        Ok(true)
    }

    /// Whole small transactions that are there and may be shown.
    fn pile(&mut self) -> Result<Vec<Record>, Failed> {
        let gate = *self.shared.upstream_replayed.borrow();
        let (mut records, mut bytes) = (Vec::new(), 0);
        while records.len() < MAX_TRANSACTIONS && bytes < MAX_BYTES {
            let Some(record) = self.peek()? else { break };
            match record.kind {
                Kind::Commit if goes_alone(record) => break,
                Kind::Commit if record.lsn <= gate => bytes += record.bytes.len(),
                // One that says something new ends the pile, for what is in it came before.
                Kind::Schema => {
                    if !self.planner.knows(&self.ahead[0]) {
                        if !records.is_empty() {
                            break;
                        }
                        self.planner.define(&self.ahead[0])?;
                    }
                    self.ahead.pop_front();
                    continue;
                }
                _ => break,
            }
            records.extend(self.ahead.pop_front());
        }
        Ok(records)
    }

    /// `None` when something stands in the way.
    async fn fold(&mut self, records: &[Record]) -> Result<Option<Vec<Statement>>, Failed> {
        let mut fold = Fold::default();
        for frame in records.iter().flat_map(Record::frames) {
            let payload = frame.context("frame")?.payload;
            let mut folded = self.planner.fold_into(&mut fold, payload)?;
            if let Folded::Lookup(relid) = folded {
                // The catalog must be asked first; nothing is under way.
                if self.planner.lookup(&mut self.client, relid).await.is_err() {
                    return Ok(None);
                }
                folded = self.planner.fold_into(&mut fold, payload)?;
            }
            if !matches!(folded, Folded::Added) {
                return Ok(None);
            }
        }
        Ok(Some(fold.statements()))
    }

    fn send_set(&mut self, statement: Statement) -> Result<(), Failed> {
        let (name, parse) = self.planner.statement(&statement.sql);
        let out = self.client.buffer();
        let encoded = (|| {
            if parse {
                frontend::parse(&name, &statement.sql, [], out)?;
            }
            bind_binary(out, &name, statement.arrays.iter())?;
            frontend::execute("", 0, out)
        })();
        encoded.context("encode a statement")?;
        self.expected.push_back(Expect::Rows(statement.rows));
        Ok(())
    }
}
