//! The set-wise way: what has piled up is folded ([`super::fold`]) and written with
//! few statements. Taken by itself when there is enough. Changes of a table some of which cannot be
//! folded go in order, all of them and in the same local transaction, after what is folded: nothing
//! but the order of one table's own changes matters to what comes of them, where nobody looks at
//! other tables meanwhile ([`Relation::stands_alone`](super::relation::Relation::stands_alone)).
//! When somebody might, and when a statement did not do what it should, the same records go the way in
//! order. A large transaction is folded in parts, each of which goes its own way: within one
//! local transaction the one after the other comes to the same as all in order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use postgres_protocol::message::frontend;
use tokio::time::sleep;

use super::fold::{Data, Fold, Shape, Statement};
use super::plan::{self, Folded};
use super::sealed::goes_alone;
use super::{Batch, Expect, Failed, MAX_BYTES, Session};
use crate::client::bind_binary;
use crate::lsn::Lsn;
use crate::pgoutput;
use crate::record::{Frame, Kind, Record};

/// Fewer transactions are not waited for: they go in order before the next look.
const FEW: usize = 20;
/// Fewer messages are sooner done in order. A transaction of one change is three.
const WORTHWHILE: usize = 60;

/// So many values of rows are folded together: one that is null is a byte in the stream, and many in memory.
pub(super) const MAX_CELLS: usize = 500_000;
/// A larger row goes by itself: with others it might be more than a message may hold.
const LARGE_ROW: usize = 16 << 20;
/// A backlog gathers for no longer than this …
const GATHERING: Duration = Duration::from_millis(200);
/// … and something must have come when it is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// Whole transactions, with the watermarks between them, and the statements that have their net effect.
pub(super) struct Pile {
    records: Vec<Record>,
    sets: Sets,
}

/// Statements, and what they are made for.
pub(super) struct Sets {
    pub(super) statements: Vec<(Arc<Shape>, Statement)>,
    shapes: Vec<Arc<Shape>>,
    /// Messages of tables that are not folded, in order, and the OIDs of those here.
    left_out: Vec<Bytes>,
    apart: Vec<String>,
}

impl Sets {
    /// Tables of them that have constraints beside the primary key.
    pub(super) fn constrained(&self) -> usize {
        let shapes = self.shapes.iter();
        shapes.filter(|shape| shape.is_constrained).count()
    }
}

/// Whole transactions that are taken together.
#[derive(Default)]
struct Heap {
    records: Vec<Record>,
    bytes: usize,
    cells: usize,
}

impl Heap {
    fn push(&mut self, record: Record) {
        self.bytes += record.bytes.len();
        self.cells += cells(&record);
        self.records.push(record);
    }

    fn is_full(&self, most: usize) -> bool {
        self.records.len() >= most || self.bytes >= MAX_BYTES || self.cells >= MAX_CELLS
    }
}

fn is_worthwhile(records: &[Record]) -> bool {
    let messages = records.iter().flat_map(Record::frames);
    messages.take(WORTHWHILE).count() == WORTHWHILE
}

/// Values of the rows that a record has.
pub(super) fn cells(record: &Record) -> usize {
    let payloads = record.frames().flatten().map(|frame| frame.payload);
    payloads.map(pgoutput::columns).sum()
}

/// What cannot be folded whatever the tables are: what came before it is a pile, and what comes after it.
fn goes_in_order(record: &Record) -> bool {
    let mut frames = record.frames().flatten();
    frames.any(|frame| {
        plan::is_truncate(frame.payload) || plan::notify_content(frame.payload).is_some()
    })
}

/// Changes of these tables.
fn messages_of(records: &[Record], relids: &BTreeSet<u32>) -> Vec<Bytes> {
    if relids.is_empty() {
        return Vec::new();
    }
    let frames = records.iter().flat_map(|record| {
        let frames = record.frames().flatten();
        frames.map(|frame| record.bytes.slice_ref(frame.payload))
    });
    let is_of_these = |payload: &Bytes| {
        let relid = pgoutput::decode(payload).ok().and_then(|m| m.changes());
        relid.is_some_and(|relid| relids.contains(&relid))
    };
    frames.filter(is_of_these).collect()
}

/// What came of folding.
enum Attempt {
    Folded(Sets),
    /// First these relations must be looked up.
    Unknown(BTreeSet<u32>),
    /// It is not worthwhile, or something stands in the way.
    Not,
}

impl Attempt {
    fn sets(self) -> Option<Sets> {
        match self {
            Attempt::Folded(sets) => Some(sets),
            Attempt::Unknown(_) | Attempt::Not => None,
        }
    }
}

impl Session<'_> {
    /// Applies what has piled up, if that can be done set-wise. False when nothing
    /// was done: then the records wait to be taken in order.
    pub(super) async fn set_wise_batch(&mut self) -> Result<bool, Failed> {
        if self.is_plain() || self.committed < self.looked_until {
            return Ok(false);
        }
        let Some(Pile { records, sets }) = self.folded_pile().await? else {
            return Ok(false);
        };
        let mut batch = Batch::default();
        for record in &records {
            match record.kind {
                Kind::Commit => batch.take_in(record)?,
                _ => batch.end = record.lsn,
            }
        }
        let (transactions, constrained) = (batch.transactions, sets.constrained());
        self.attempted = batch.end;
        self.begin()?;
        self.send_sets(sets, &mut batch).await?;
        self.close(&batch)?;
        self.client.send_all().await?;
        // Postgres is at work meanwhile.
        self.fold_ahead()?;
        self.conclude(batch).await?;
        tracing::debug!(transactions, constrained, "applied set-wise");
        Ok(true)
    }

    async fn folded_pile(&mut self) -> Result<Option<Pile>, Failed> {
        if let Some(pile) = self.folded.take() {
            return Ok(Some(pile));
        }
        let mut heap = Heap::default();
        self.pile(&mut heap)?;
        if self.folds {
            self.gather(&mut heap).await?;
        }
        let folded = self.fold(&heap.records, &mut Batch::default()).await?;
        let is_small = !is_worthwhile(&heap.records);
        self.folds = folded.is_some() || self.folds && is_small;
        // What comes next has not been looked at.
        self.in_order = FEW.max(heap.records.len());
        if folded.is_none() {
            self.looked_until = heap.records.last().map_or(Lsn::ZERO, |last| last.lsn);
        }
        let cut_short = self.ahead.front().is_some_and(goes_in_order);
        let pile = self.keep_or_put_back(heap, folded);
        if pile.is_none() && is_small && cut_short {
            let (row, end) = self.row_in_order()?;
            self.in_order = self.in_order.max(row);
            self.looked_until = self.looked_until.max(end);
        }
        Ok(pile)
    }

    /// How many transactions are next before so many that are worthwhile to fold follow upon one that goes
    /// in order, and where the last of them ends.
    fn row_in_order(&mut self) -> Result<(usize, Lsn), Failed> {
        let gate = *self.shared.upstream_replayed.borrow();
        let (mut row, mut transactions, mut bytes, mut since) = ((0, Lsn::ZERO), 0, 0, 0);
        for at in 0.. {
            if at == self.ahead.len() {
                self.ahead
                    .extend(self.reader.try_next().map_err(anyhow::Error::from)?);
            }
            let Some(record) = self.ahead.get(at) else {
                break;
            };
            bytes += record.bytes.len();
            let is_far = record.lsn > gate || bytes > MAX_BYTES;
            if record.kind == Kind::Part || is_far || since >= WORTHWHILE {
                break;
            }
            transactions += usize::from(record.kind == Kind::Commit);
            since += record.frames().count();
            if goes_in_order(record) {
                (row, since) = ((transactions, record.lsn), 0);
            }
        }
        Ok(row)
    }

    /// Lets a backlog gather while more of it comes: the larger a pile, the less each
    /// transaction of it costs. It gets no older by that than by a tenth.
    async fn gather(&mut self, heap: &mut Heap) -> Result<(), Failed> {
        let mut commits = heap.records.iter().rev();
        let Some(last) = commits.find(|record| record.kind == Kind::Commit) else {
            return Ok(());
        };
        let committed = last.commit().context("commit")?.commit_time;
        let behind = self
            .shared
            .top_clock
            .load(Relaxed)
            .saturating_sub(committed);
        let age = Duration::from_micros(behind.max(0).unsigned_abs());
        let (start, limit) = (Instant::now(), GATHERING.min(age / 10));
        while start.elapsed() + LOOK < limit && !heap.is_full(self.most.0) && self.peek()?.is_none()
        {
            let before = heap.records.len();
            sleep(LOOK).await;
            self.pile(heap)?;
            if heap.records.len() == before {
                break;
            }
        }
        Ok(())
    }

    /// Folds the next pile already, if it is full and nothing need be asked for that. What is
    /// not full gathers meanwhile.
    fn fold_ahead(&mut self) -> Result<(), Failed> {
        let mut heap = Heap::default();
        self.pile(&mut heap)?;
        let folded = match heap.is_full(self.most.0) {
            true => self.try_fold(&heap.records).sets(),
            false => None,
        };
        self.folded = self.keep_or_put_back(heap, folded);
        Ok(())
    }

    /// What is not folded is next again, in front of what has been looked at already.
    fn keep_or_put_back(&mut self, heap: Heap, folded: Option<Sets>) -> Option<Pile> {
        let records = heap.records;
        let Some(sets) = folded else {
            for record in records.into_iter().rev() {
                self.ahead.push_front(record);
            }
            return None;
        };
        Some(Pile { records, sets })
    }

    /// Whole small transactions that are there and may be shown, and watermarks.
    fn pile(&mut self, heap: &mut Heap) -> Result<(), Failed> {
        let gate = *self.shared.upstream_replayed.borrow();
        while !heap.is_full(self.most.0) {
            let Some(record) = self.peek()? else { break };
            match record.kind {
                Kind::Commit if goes_alone(record) || goes_in_order(record) => break,
                // What is for others leaves a watermark here.
                Kind::Commit | Kind::Watermark if record.lsn <= gate => {}
                // One that says something new ends the pile, for what is in it came before.
                Kind::Schema => {
                    if !self.planner.knows(&self.ahead[0]) {
                        if !heap.records.is_empty() {
                            break;
                        }
                        self.planner.define(&self.ahead[0])?;
                    }
                    self.ahead.pop_front();
                    continue;
                }
                _ => break,
            }
            if let Some(record) = self.ahead.pop_front() {
                heap.push(record);
            }
        }
        Ok(())
    }

    /// `None` when it is not worthwhile or something stands in the way.
    pub(super) async fn fold(
        &mut self,
        records: &[Record],
        batch: &mut Batch,
    ) -> Result<Option<Sets>, Failed> {
        let mut attempt = self.try_fold(records);
        if let Attempt::Unknown(relids) = attempt {
            // The catalog must be asked, for which the pipeline must be empty.
            self.drain(batch).await?;
            for relid in relids {
                if self.planner.lookup(&mut self.client, relid).await.is_err() {
                    return Ok(None);
                }
            }
            attempt = self.try_fold(records);
        }
        Ok(attempt.sets())
    }

    /// What cannot be read is left to the way in order as well, which says what it is.
    fn try_fold(&mut self, records: &[Record]) -> Attempt {
        if self.is_plain() || !is_worthwhile(records) {
            return Attempt::Not;
        }
        // One way for each, for all of the pile.
        self.planner.resting = self.constrained.resting();
        let (mut fold, mut unknown) = (Fold::default(), BTreeSet::new());
        for frame in records.iter().flat_map(Record::frames) {
            let Ok(Frame { payload, .. }) = frame else {
                return Attempt::Not;
            };
            if payload.len() > LARGE_ROW {
                return Attempt::Not;
            }
            match self.planner.fold_into(&mut fold, payload) {
                Ok(Folded::Added) => {}
                Ok(Folded::Lookup(relid)) => drop(unknown.insert(relid)),
                // What is not known yet may be what is missing.
                Ok(Folded::Not) if !unknown.is_empty() => break,
                Ok(Folded::Not) | Err(_) => return Attempt::Not,
            }
        }
        if !unknown.is_empty() {
            return Attempt::Unknown(unknown);
        }
        let left_out: BTreeSet<u32> = fold.left_out().collect();
        let Some(apart) = self.planner.apart(&fold) else {
            return Attempt::Not;
        };
        if fold.is_empty() && !left_out.is_empty() {
            return Attempt::Not;
        }
        Attempt::Folded(Sets {
            statements: fold.statements(),
            shapes: fold.shapes().collect(),
            left_out: messages_of(records, &left_out),
            apart,
        })
    }

    /// Whether what is next has been folded in vain.
    fn is_plain(&self) -> bool {
        self.committed < self.plain_until
    }

    pub(super) async fn send_sets(&mut self, sets: Sets, batch: &mut Batch) -> Result<(), Failed> {
        self.sent_sets.extend(sets.shapes);
        self.sent_apart.extend(sets.apart);
        // First what costs little, should it be refused.
        for (shape, set) in sets.statements {
            self.send_set(shape, set)?;
        }
        for payload in &sets.left_out {
            self.send_change(payload, batch).await?;
        }
        Ok(())
    }

    fn send_set(&mut self, shape: Arc<Shape>, statement: Statement) -> Result<(), Failed> {
        let (name, parse) = self.planner.statement(&statement.sql);
        let out = self.client.buffer();
        let encoded = (|| {
            if parse {
                frontend::parse(&name, &statement.sql, [], out)?;
            }
            match statement.data {
                Data::Arrays(arrays) => {
                    bind_binary(out, &name, arrays.iter())?;
                    frontend::execute("", 0, out)
                }
                Data::Copy(messages) => {
                    bind_binary(out, &name, std::iter::empty())?;
                    frontend::execute("", 0, out)?;
                    out.extend_from_slice(&messages);
                    frontend::copy_done(out);
                    Ok(())
                }
            }
        })();
        encoded.context("encode a statement")?;
        let expect = Expect::Rows(statement.rows, shape);
        self.expected.push_back(expect);
        Ok(())
    }
}
