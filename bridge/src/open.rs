//! What a node starts from: the queue on its disk and the position in its database,
//! or, when there is neither, a copy of another server's data.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::time::sleep;

use crate::client::{Client, SessionOptions};
use crate::conninfo::ConnInfo;
use crate::copy::CopyError;
use crate::domain::{SlotWatch, Source, copy_source, has_in_sight, parent_to_copy_from};
use crate::lsn::{Identity, Lsn};
use crate::observe::Observer;
use crate::queue::{Queue, QueueError, Writer};
use crate::status::{Shared, State, View};
use crate::upstream::connect;
use crate::{copy, report, timeline};

/// Longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Pause while there is nobody to copy from.
const LOOK_AGAIN: Duration = Duration::from_millis(300);

/// What is wrong with a receiving server that names no parent.
pub const RECEIVER: &str = "the database receives changes from above, but [parent] is missing in \
     the configuration; name the servers above: only a bridge beside the top has none";

/// A queue with its writer.
pub struct Opened {
    /// The queue.
    pub queue: Queue,
    /// Its only writer.
    pub writer: Writer,
    /// Holds the upstream's queue for us after an initial copy.
    pub pinned: Option<Client>,
    /// With the Postgres beside the bridge; for who needs one next.
    pub local: Option<Client>,
}

/// Opens what is here, or copies until something is.
pub async fn open_or_copy(
    shared: &Arc<Shared>,
    observer: &Arc<Observer>,
) -> anyhow::Result<Opened> {
    let dir = shared.config.node.data_dir.join("queue");
    let mut opened = match Queue::open(&dir) {
        Err(error @ QueueError::Damaged { .. }) => {
            shared.event("damaged", &error.to_string());
            set_queue_aside(shared)?;
            None
        }
        opened => opened?,
    };
    if shared.config.parent.is_none() {
        return open_at_top(shared, &dir, opened).await;
    }
    let mut patience = Patience::default();
    let mut tries = Tries::new();
    // While there is nobody to copy from, one session looks again and again.
    let mut local = None;
    loop {
        let attempt = match local_progress(shared, &mut local).await {
            Ok(Some((identity, lsn))) => {
                let (queue, writer) = resume(shared, &dir, opened, identity, lsn)?;
                return Ok(Opened {
                    queue,
                    writer,
                    pinned: None,
                    local,
                });
            }
            Ok(None) => {
                shared.set_empty(copy::is_from_parent(shared));
                // Of data that is none any more. Were it still there after a crash at the end of
                // the copy, it would be gone on with.
                if opened.take().is_some() {
                    Queue::clear(&dir)?;
                }
                copy_from_somewhere(shared, observer, &mut tries).await
            }
            Err(error) => Err(error),
        };
        publish_view(shared, observer, false);
        match attempt {
            Ok(Some(copied)) => {
                let (queue, writer) = Queue::create(&dir, copied.identity.clone(), copied.lsn)?;
                shared.set_identity(copied.identity, true);
                let reason = format!("initial copy is complete at {}", copied.lsn);
                shared.event("copied", &reason);
                let pinned = Some(copied.client);
                return Ok(Opened {
                    queue,
                    writer,
                    pinned,
                    local,
                });
            }
            Ok(None) => {
                let reason = "waiting for a server to copy from".into();
                shared.set_link(State::Copying, Some(reason));
                patience.pause = LOOK_AGAIN;
                sleep(LOOK_AGAIN).await;
            }
            Err(error) => {
                local = None;
                patience.after(shared, error).await;
            }
        }
    }
}

/// A queue of which a part cannot be read is kept for whoever wants to know why, and is
/// begun anew where the database stands.
pub fn set_queue_aside(shared: &Shared) -> anyhow::Result<()> {
    let dir = shared.config.node.data_dir.join("queue");
    let aside = shared.config.node.data_dir.join("queue.damaged");
    if aside.exists() {
        fs::remove_dir_all(&aside).with_context(|| format!("remove {}", aside.display()))?;
    }
    fs::rename(&dir, &aside).with_context(|| format!("rename {}", dir.display()))
}

/// Forgets the position of the data here, so that it is copied anew.
pub async fn forget(shared: &Arc<Shared>, from_parent: bool) {
    let mut patience = Patience::default();
    while let Err(error) = copy::discard(shared, from_parent).await {
        let error = error.context("cannot discard the data to copy it anew");
        patience.after(shared, error).await;
    }
    timeline::forget_divergence(&shared.config.node.data_dir);
    shared.set_no_data(from_parent);
}

fn resume(
    shared: &Arc<Shared>,
    dir: &Path,
    opened: Option<(Queue, Writer)>,
    identity: Identity,
    lsn: Lsn,
) -> anyhow::Result<(Queue, Writer)> {
    let (queue, writer) = match opened {
        // The queue may be of a later timeline than what has been applied yet.
        Some((queue, writer)) if queue.identity().continues(&identity) && queue.first() <= lsn => {
            (queue, writer)
        }
        // No queue, or one that cannot continue what the database holds. The
        // database is the truth about how far we are.
        _ => Queue::create(dir, identity.clone(), lsn)?,
    };
    shared.set_identity(queue.identity(), true);
    if let Some(problem) = timeline::divergence(&shared.config.node.data_dir) {
        shared.set_diverged(problem);
    }
    shared.set_position(lsn);
    Ok((queue, writer))
}

/// A session of ours with the Postgres beside the bridge.
pub async fn local_client(shared: &Shared) -> anyhow::Result<Client> {
    let info = ConnInfo::parse(&shared.config.database.url)?;
    let gucs = [
        ("search_path", "pg_catalog"),
        ("default_transaction_read_only", "off"),
        ("idle_session_timeout", "0"),
    ];
    let options = SessionOptions {
        application_name: format!("terrace {}", shared.config.node.name),
        gucs: gucs.map(|(name, value)| (name.into(), value.into())).into(),
        ..Default::default()
    };
    Client::connect(&info, &options)
        .await
        .with_context(|| format!("connect to the local database at {}", info.endpoint()))
}

/// Leaves the session open for the next time.
async fn local_progress(
    shared: &Arc<Shared>,
    session: &mut Option<Client>,
) -> anyhow::Result<Option<(Identity, Lsn)>> {
    let mut client = match session.take() {
        Some(client) => client,
        None => {
            let mut client = local_client(shared).await?;
            report::prepare_local(&mut client, shared).await?;
            client
        }
    };
    let rows = client
        .query("SELECT identity, lsn::text FROM terrace.progress", &[])
        .await
        .context("read terrace.progress")?;
    *session = Some(client);
    match rows.first().map(Vec::as_slice) {
        Some([Some(identity), Some(lsn)]) => Ok(Some((identity.parse()?, lsn.parse()?))),
        _ => Ok(None),
    }
}

/// A bridge of the top reads the slot of the Postgres beside it; nothing is copied. One that
/// received would give out its own changes as the top's.
async fn open_at_top(
    shared: &Arc<Shared>,
    dir: &Path,
    mut opened: Option<(Queue, Writer)>,
) -> anyhow::Result<Opened> {
    let mut patience = Patience::default();
    let (queue, writer) = loop {
        let attempt = match (local_progress(shared, &mut None).await, opened) {
            (Ok(Some(_)), _) => bail!(RECEIVER),
            // Without its Postgres it serves what it has; whose that is shows with the link.
            (_, Some(opened)) => break opened,
            (Ok(None), None) => create_slot_at_top(shared).await,
            (Err(error), None) => Err(error),
        };
        opened = None;
        match attempt {
            Ok((identity, lsn)) => break Queue::create(dir, identity, lsn)?,
            Err(error) => patience.after(shared, error).await,
        }
    };
    shared.set_identity(queue.identity(), true);
    Ok(Opened {
        queue,
        writer,
        pinned: None,
        local: None,
    })
}

/// Between tries of what must succeed.
struct Patience {
    pause: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            pause: Duration::from_millis(100),
        }
    }
}

impl Patience {
    /// Shows what is in the way, and rests longer each time.
    async fn after(&mut self, shared: &Shared, error: anyhow::Error) {
        let problem = format!("{error:#}");
        if shared.set_link(State::Stalled, Some(problem.clone())) {
            tracing::warn!("{problem}");
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }
}

async fn create_slot_at_top(shared: &Arc<Shared>) -> anyhow::Result<(Identity, Lsn)> {
    let info = ConnInfo::parse(&shared.config.database.url)?;
    let (mut client, identity, _) = connect(&info, &shared.config.node.name).await?;
    let slot = shared.config.slot_name();
    let sql = format!("CREATE_REPLICATION_SLOT \"{slot}\" LOGICAL pgoutput (SNAPSHOT 'nothing')");
    let point = match client.simple(&sql).await {
        Ok(rows) => rows.first().and_then(|row| row.get(1)?.clone()),
        // The slot outlived our queue. It sends what follows its confirmed position,
        // so an empty queue that starts there misses nothing; a downstream that needs
        // more is told so when it asks.
        Err(error) if error.code() == Some("42710") => {
            let sql = "SELECT confirmed_flush_lsn FROM pg_catalog.pg_replication_slots \
                       WHERE slot_name = $1 AND plugin = 'pgoutput' \
                         AND database = pg_catalog.current_database()";
            let rows = local_client(shared)
                .await?
                .query(sql, &[Some(&slot)])
                .await?;
            rows.into_iter()
                .next()
                .and_then(|row| row.into_iter().next()?)
        }
        Err(error) => return Err(error).context("create the replication slot"),
    };
    let lsn = point
        .with_context(|| {
            format!("replication slot \"{slot}\" is of another kind or database; drop it")
        })?
        .parse()?;
    Ok((identity, lsn))
}

/// What has been tried to copy from.
struct Tries {
    started: Instant,
    /// Of the domain at the parent; times are since `started`.
    slot: SlotWatch,
    /// The server of the parent domain that failed last.
    failed: Option<usize>,
}

impl Tries {
    fn new() -> Tries {
        Tries {
            started: Instant::now(),
            slot: SlotWatch::new(Duration::ZERO),
            failed: None,
        }
    }
}

async fn copy_from_somewhere(
    shared: &Arc<Shared>,
    observer: &Observer,
    tries: &mut Tries,
) -> anyhow::Result<Option<copy::CopyResult>> {
    publish_view(shared, observer, false);
    let waited = tries.started.elapsed();
    let limit = shared.config.failover.takeover_after;
    let told = shared.told();
    let parents = observer.parents();
    let (source, from_parent) = match copy_source(waited, &told, &observer.peers(), limit) {
        Source::Wait => return Ok(None),
        Source::Peer(name) => (observer.peer_info(&name), None),
        Source::Parent => {
            // Another server of the domain may have what seems to be nowhere.
            if let Some(problem) = observer.problem(&told) {
                bail!(problem);
            }
            let index = parent_to_copy_from(&told, &parents, tries.failed, limit);
            let Some(index) = index else {
                let (troubled, words) = observer.why_not(&parents);
                if troubled {
                    bail!(words.join("; "));
                }
                bail!(
                    "no parent server is ready to be copied from ({})",
                    words.join(", ")
                );
            };
            (observer.parent_info(index), Some(index))
        }
    };
    let source = source.context("an unknown server")?.clone();
    shared.set_link(State::Copying, None);
    publish_view(shared, observer, from_parent.is_some());
    let may_go = tries
        .slot
        .may_go(tries.started.elapsed(), &observer.peers());
    let error = match copy::initial_copy(shared, &source, may_go).await {
        Ok(result) => return Ok(Some(result)),
        Err(error) => error,
    };
    match error.downcast_ref::<CopyError>() {
        Some(CopyError::Busy(_)) => {
            tries.slot.in_use(tries.started.elapsed());
            return Ok(None);
        }
        Some(CopyError::Held { confirmed, .. }) => {
            if tries.slot.found(tries.started.elapsed(), *confirmed) {
                // Others tell once more first.
                return Ok(None);
            }
            if has_in_sight(&observer.peers(), *confirmed) {
                copy::from_anybody(shared)?;
            }
        }
        None => tries.failed = from_parent,
    }
    Err(error.context(format!("initial copy from {}", source.endpoint())))
}

fn publish_view(shared: &Shared, observer: &Observer, copying: bool) {
    let in_sight = observer.parent_in_sight(&observer.parents());
    shared.set_view(View {
        parent_ok: in_sight.is_some(),
        copying,
        report_to: in_sight,
        problem: observer.problem(&shared.told()),
        trouble: observer.trouble(),
        domains: vec![shared.config.node.domain.clone()],
        ..View::default()
    });
}
