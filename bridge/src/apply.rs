//! Replays the queue into the local Postgres.
//!
//! Guarantees:
//! - Data and `terrace.progress` commit together, so whatever dies, what is in
//!   the database and what it says of itself agree, and nothing is applied twice.
//! - A local transaction ends only where a transaction of the top ends, in the
//!   top's commit order: every snapshot shows a prefix of the top's history.
//! - A row that is missing or already there is resolved for the top and counted.
//!   Whatever cannot be applied stalls here, with its reason, and is tried again.
//!
//! Three ways through a batch. What has piled up goes set-wise, folded to its net
//! effect ([`setwise`]); what is little, or cannot be folded, goes in order as one
//! pipeline ([`in_order`]). Either looks only at whether each statement did what it should; if
//! one did not, all is rolled back: what was folded is tried in order, and after that the
//! careful way ([`careful`]) does one transaction and one statement at a time.

mod careful;
mod commit;
mod constrained;
mod fold;
mod in_order;
mod obstacle;
mod plan;
mod quarantine;
mod relation;
mod room;
mod rows;
mod sealed;
mod sequences;
mod setwise;
mod skip;
mod slices;
mod statement;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, PgError, SessionOptions};
use crate::conninfo::ConnInfo;
use crate::durable::{Backend, Noted};
use crate::lsn::{Identity, Lsn};
use crate::queue::{Queue, QueueError, Reader};
use crate::record::Record;
use crate::status::Shared;
use crate::upstream::pinned_settings;
use commit::Batch;
use constrained::Constrained;
use fold::Shape;
use obstacle::Clearing;
use plan::Planner;
pub use relation::other_place;
use slices::Slices;
use statement::Expect;

/// A batch takes no more transactions than this …
const MAX_TRANSACTIONS: usize = 5_000;
/// … or than begin within as many bytes of records.
const MAX_BYTES: usize = 4 << 20;
/// Where those were too many for the locks that the server holds, twice as many are tried after this.
const CROWDED: Duration = Duration::from_secs(60);
/// Progress is written for watermarks alone at most this often.
const WATERMARK_EVERY: Duration = Duration::from_secs(1);

/// Why a transaction with DDL, say, is not taken with others.
const BY_ITSELF: &str = "a transaction that is applied by itself";

/// Why a batch is tried once more, with tables as they are now.
const ALTERED: &str = "a table was altered on this server meanwhile";

/// Values that are stored out of line are compressed anew here, which for wide rows is
/// most of what applying costs; lz4 takes a fraction of it. A choice that an
/// administrator made for this server, or for a column, stands.
pub const COMPRESS_FAST: &str = "SELECT pg_catalog.set_config(name, 'lz4', false) \
     FROM pg_catalog.pg_settings WHERE name = 'default_toast_compression' \
       AND source = 'default' AND 'lz4' = ANY (enumvals)";

/// What a table brings along to be run has the rights of its owner, not of the bridge.
pub const AS_OWNERS: &str = "SELECT terrace.write_as_owners()";

/// Applies for ever, until `cancel`.
pub async fn run(
    shared: Arc<Shared>,
    queue: Queue,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let mut pause = Duration::from_millis(100);
    let thorough = Arc::new(AtomicBool::new(true));
    loop {
        let started = *shared.replayed.borrow();
        let session = async {
            let mut session = Session::open(&shared, &queue, &thorough).await?;
            session.run().await
        };
        let error: anyhow::Error = tokio::select! {
            result = session => match result {
                Ok(never) => match never {},
                Err(error) => error,
            },
            never = room::keep(&shared, &queue) => match never {},
            () = cancel.cancelled() => return Ok(()),
        };
        let problem = format!("{error:#}");
        if let Some(error) = error.downcast_ref::<QueueError>() {
            shared.note_damage(error);
        }
        tracing::warn!(problem, "apply stopped, trying again");
        shared.set_apply_problem(Some(problem));
        if *shared.replayed.borrow() > started {
            pause = Duration::from_millis(100);
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = cancel.cancelled() => return Ok(()),
        }
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

enum Never {}

/// Why a batch did not go the fast way.
enum Failed {
    /// A statement did not do what it should: try the careful way.
    Unexpected(String),
    /// The locks of so many transactions are more than the server holds.
    OutOfLocks(usize),
    /// The connection or the queue failed.
    Fatal(anyhow::Error),
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Failed {
        Failed::Fatal(error)
    }
}

impl From<PgError> for Failed {
    fn from(error: PgError) -> Failed {
        Failed::Fatal(error.into())
    }
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    queue: &'a Queue,
    client: Client,
    /// What `client` is there.
    backend: Arc<Backend>,
    reader: Reader,
    planner: Planner,
    /// Read but not yet begun with.
    ahead: VecDeque<Record>,
    /// Folded already, to be applied next.
    folded: Option<setwise::Pile>,
    /// The last pile that was large enough could be folded.
    folds: bool,
    /// What the local transaction under way has statements of a fold for …
    sent_sets: Vec<Arc<Shape>>,
    /// … and OIDs of tables here that folds have left out.
    sent_apart: Vec<String>,
    /// In the next transaction what is in the way of unique values, and nobody's, makes way.
    clears: Option<Clearing>,
    /// Rows that have been resolved in the local transaction under way.
    conflicts: u64,
    /// Up to here nothing is folded: it has been tried.
    plain_until: Lsn,
    /// Up to here what has piled up has been looked through in vain.
    looked_until: Lsn,
    /// Transactions that are taken together at most, and when that was changed.
    most: (usize, Instant),
    constrained: Constrained,
    /// Transactions that go in order before the next look whether all can go set-wise.
    in_order: usize,
    /// End of the batch that is under way.
    attempted: Lsn,
    committed: Lsn,
    /// When how far it is was last written in this session. Before, what was only shown is not.
    progress_written: Option<Instant>,
    /// Where its row was left, if nothing has gone wrong since.
    place: Option<String>,
    /// OIDs of tables here that have been altered, or may have been.
    altered: Vec<String>,
    /// The batch after this had to be tried once more for that.
    altered_after: Option<Lsn>,
    /// When sequences were put forward, and whether there may be reason to do it again.
    sequences: (Instant, bool),
    /// Sequences have not been looked at with patience since the bridge started.
    thorough: Arc<AtomicBool>,
    /// Who does that.
    looking: JoinSet<()>,
    slices: Slices,
    /// What each unanswered statement should do.
    expected: VecDeque<Expect>,
    unflushed: usize,
}

impl<'a> Session<'a> {
    async fn open(
        shared: &'a Arc<Shared>,
        queue: &'a Queue,
        thorough: &Arc<AtomicBool>,
    ) -> anyhow::Result<Session<'a>> {
        let info = ConnInfo::parse(&shared.config.database.url)?;
        let own = [
            ("session_replication_role", "replica"),
            ("synchronous_commit", "off"),
            // Catalogs are looked at after the table is locked, and as they are then.
            ("default_transaction_isolation", "read committed"),
            // What stands in quotes is a value, in this language (`client/error.rs`).
            ("lc_messages", "C"),
            // Of a large batch a fold's statements look dear enough to be compiled, each time.
            ("jit", "off"),
            // What functions of indexes and constraints have to say comes to nobody.
            ("client_min_messages", "error"),
            // What a statement of the top makes in pg_temp is never found first.
            ("search_path", "pg_catalog, pg_temp"),
        ];
        let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let options = SessionOptions {
            application_name: format!("terrace apply {}", shared.config.node.name),
            gucs: pinned_settings().into_iter().chain(own).collect(),
            ..Default::default()
        };
        let mut client = Client::connect(&info, &options)
            .await
            .with_context(|| format!("connect to the local database at {}", info.endpoint()))?;
        let backend = Arc::new(Backend::of(&mut client).await?);
        set_origin(&mut client).await?;
        client.simple(AS_OWNERS).await?;
        client.lift_transaction_limit().await?;
        client.simple(COMPRESS_FAST).await?;
        let rows = client
            .query("SELECT identity, lsn::text FROM terrace.progress", &[])
            .await?;
        let Some([Some(identity), Some(lsn)]) = rows.first().map(Vec::as_slice) else {
            bail!("terrace.progress is empty");
        };
        let identity: Identity = identity.parse()?;
        if !queue.identity().continues(&identity) {
            bail!(
                "the database holds history {identity}, the queue {}",
                queue.identity()
            );
        }
        let committed: Lsn = lsn.parse()?;
        shared.set_position(committed);
        shared.noted.send_replace(Some(Noted {
            lsn: committed,
            session: Arc::clone(&backend),
        }));
        let planner = Planner::open(&mut client, &shared.config.node.domain).await?;
        Ok(Session {
            shared,
            queue,
            reader: queue.open_reader(committed).await?,
            client,
            backend,
            planner,
            ahead: VecDeque::new(),
            folded: None,
            folds: true,
            sent_sets: Vec::new(),
            sent_apart: Vec::new(),
            clears: None,
            conflicts: 0,
            plain_until: Lsn::ZERO,
            looked_until: Lsn::ZERO,
            most: (MAX_TRANSACTIONS, Instant::now()),
            constrained: Constrained::default(),
            in_order: MAX_TRANSACTIONS,
            attempted: committed,
            committed,
            progress_written: None,
            place: None,
            altered: Vec::new(),
            altered_after: None,
            sequences: (Instant::now(), true),
            thorough: Arc::clone(thorough),
            looking: JoinSet::new(),
            slices: Slices::default(),
            expected: Default::default(),
            unflushed: 0,
        })
    }

    async fn run(&mut self) -> anyhow::Result<Never> {
        loop {
            if self.sequences.1 && self.sequences.0.elapsed() > sequences::UNDER_LOAD {
                self.advance_sequences(false).await?;
            }
            self.renew_statements().await?;
            let (most, since) = self.most;
            if most < MAX_TRANSACTIONS && since.elapsed() > CROWDED {
                self.most = ((most * 2).min(MAX_TRANSACTIONS), Instant::now());
            }
            let applied = match self.set_wise_batch().await {
                Ok(false) => self.fast_batch().await,
                applied => applied,
            };
            match applied {
                // Only what comes before a refused transaction: it still is.
                Ok(false) if self.shared.is_refused() => {}
                Ok(_) => self.shared.set_apply_problem(None),
                Err(Failed::Fatal(error)) => return Err(error),
                Err(Failed::Unexpected(problem)) => self.try_another_way(&problem).await?,
                Err(Failed::OutOfLocks(transactions)) => {
                    let most = (transactions / 4).max(1);
                    self.most = (most, Instant::now());
                    tracing::info!(most, from = %self.committed, "too many locks: fewer at once");
                    self.leave_behind().await?;
                }
            }
        }
    }

    /// What was folded is tried in order: one row that is missing is no matter there. What
    /// did not go in order is done with care.
    async fn try_another_way(&mut self, problem: &str) -> anyhow::Result<()> {
        let until = self.attempted.max(Lsn(self.committed.0 + 1));
        let folded = !self.sent_sets.is_empty() && problem != BY_ITSELF;
        // The statement that failed is still to be answered.
        let refused = match self.expected.front() {
            Some(Expect::Rows(_, shape)) => Some(Arc::clone(shape)),
            _ => None,
        };
        self.leave_behind().await?;
        if problem == ALTERED && self.is_altered_anew() {
            tracing::info!(problem, from = %self.committed, "once more");
            return Ok(());
        }
        if folded && self.plain_until < until {
            if let Some(shape) = refused {
                self.constrained.refused(&shape);
            }
            tracing::info!(problem, from = %self.committed, "applying in order");
            self.plain_until = until;
            return Ok(());
        }
        tracing::info!(problem, from = %self.committed, "applying with care");
        self.careful(until).await?;
        self.shared.set_apply_problem(None);
        Ok(())
    }

    /// Nothing may be unanswered.
    async fn renew_statements(&mut self) -> anyhow::Result<()> {
        if self.planner.wants_statements_anew() {
            self.client.simple("DEALLOCATE ALL").await?;
            self.planner.forget_statements();
        }
        Ok(())
    }

    // ----- reading ----------------------------------------------------------

    async fn next_record(&mut self) -> anyhow::Result<Record> {
        match self.ahead.pop_front() {
            Some(record) => Ok(record),
            None => {
                // Waiting begins between two transactions: none is seen before its end.
                while self.sequences.1 {
                    match timeout(sequences::WHEN_IDLE, self.reader.next()).await {
                        Ok(record) => return Ok(record?),
                        Err(_) => self.advance_sequences(true).await?,
                    }
                }
                Ok(self.reader.next().await?)
            }
        }
    }

    fn peek(&mut self) -> anyhow::Result<Option<&Record>> {
        if self.ahead.is_empty() {
            self.ahead.extend(self.reader.try_next()?);
        }
        Ok(self.ahead.front())
    }

    /// Waits until the upstream shows what is next here.
    async fn wait_for_gate(&mut self, end: Lsn) -> anyhow::Result<()> {
        let mut gate = self.shared.upstream_replayed.subscribe();
        gate.wait_for(|gate| *gate >= end)
            .await
            .context("the upstream link is gone")?;
        Ok(())
    }

    /// Reads a whole transaction's first record; its end tells whether it may be shown.
    /// A record of several parts is preceded by all of them in the queue already.
    fn gate_allows(&self, record: &Record) -> bool {
        record.lsn <= *self.shared.upstream_replayed.borrow()
    }

    /// Starts again after the last commit.
    async fn rewind(&mut self) -> anyhow::Result<()> {
        self.ahead.clear();
        self.conflicts = 0;
        self.place = None;
        self.folded = None;
        self.forget_sent();
        self.attempted = self.committed;
        self.expected.clear();
        self.unflushed = 0;
        self.planner.forget_relations();
        self.planner.forget_statements();
        self.reader = self.queue.open_reader(self.committed).await?;
        Ok(())
    }

    fn forget_sent(&mut self) {
        self.sent_sets.clear();
        self.sent_apart.clear();
    }

    /// Not as a simple query, whose answer would come by itself.
    fn begin(&mut self) -> Result<(), Failed> {
        let begin = self.planner.step("BEGIN".into(), Vec::new(), Expect::Done);
        self.send(&begin)
    }
}

fn unexpected(error: anyhow::Error) -> Failed {
    Failed::Unexpected(format!("{error:#}"))
}

fn fatal(failed: Failed) -> anyhow::Error {
    match failed {
        Failed::Fatal(error) => error,
        Failed::Unexpected(problem) => anyhow::anyhow!(problem),
        Failed::OutOfLocks(_) => anyhow::anyhow!("out of locks"),
    }
}

/// Marks what this session writes, and keeps a second bridge out.
async fn set_origin(client: &mut Client) -> anyhow::Result<()> {
    client
        .simple(
            "SELECT pg_catalog.pg_replication_origin_create('terrace') \
             WHERE pg_catalog.pg_replication_origin_oid('terrace') IS NULL",
        )
        .await
        .context("create the replication origin")?;
    client
        .simple("SELECT pg_catalog.pg_replication_origin_session_setup('terrace')")
        .await
        .context("take the replication origin (is another bridge applying here?)")?;
    Ok(())
}
