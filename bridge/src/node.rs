//! A node's life: opens what is on disk, copies when there is nothing, then
//! follows the master or the parent for ever, while the other tasks work from
//! the queue.
//!
//! Nothing about roles is on disk. After a start, a lost link or a refusal the
//! node looks at its domain again and decides anew ([`crate::domain::choose`]).

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, SessionOptions};
use crate::config::Config;
use crate::conninfo::ConnInfo;
use crate::domain::{Choice, Member, choose};
use crate::handshake::Security;
use crate::lsn::{Identity, Lsn};
use crate::queue::{Queue, Writer};
use crate::status::{Role, Shared, State, cursor_name};
use crate::upstream::{LinkEnd, Target, connect, follow};
use crate::{apply, copy, http, relay, report};

/// Longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// How long a peer may take to tell its status.
const PEER_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the bridge until `cancel`; an error is one that a restart may not mend.
pub async fn run(config: Config, cancel: CancellationToken) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let _lock = lock_data_dir(&config.node.data_dir)?;
    let instance = instance_id(&config.node.data_dir)?;
    let shared = Shared::new(Arc::clone(&config), instance, random_hex()?);
    let relay = &config.relay;
    let security = Security::load(
        relay.auth_file.as_deref(),
        relay.tls_cert.as_deref(),
        relay.tls_key.as_deref(),
        relay.tls_client_ca.as_deref(),
    )?;
    let listener = TcpListener::bind(&relay.listen)
        .await
        .with_context(|| format!("listen on {} ([relay] listen)", relay.listen))?;

    let mut tasks = JoinSet::new();
    tasks.spawn(http::run(Arc::clone(&shared), cancel.clone()));
    tasks.spawn(report::run(Arc::clone(&shared), cancel.clone()));
    let main = serve(
        Arc::clone(&shared),
        listener,
        Arc::new(security),
        cancel.clone(),
    );
    tasks.spawn(main);
    first_end(tasks, &cancel).await
}

/// Waits for the first task to end, stops the others and gives the first error.
async fn first_end(
    mut tasks: JoinSet<anyhow::Result<()>>,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        cancel.cancel();
        let ended = ended
            .context("a task of the bridge panicked")
            .and_then(|inner| inner);
        result = result.and(ended);
    }
    result
}

async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    security: Arc<Security>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let opened = tokio::select! {
        opened = open_or_copy(&shared) => opened?,
        () = cancel.cancelled() => return Ok(()),
    };
    let (queue, writer, pinned) = opened;
    shared.flushed.send_replace(queue.end());
    let mut tasks = JoinSet::new();
    if shared.config.parent.is_some() {
        tasks.spawn(apply::run(
            Arc::clone(&shared),
            queue.clone(),
            cancel.clone(),
        ));
    } else {
        tasks.spawn(mirror_written(
            Arc::clone(&shared),
            queue.clone(),
            cancel.clone(),
        ));
    }
    tasks.spawn(relay::run(
        Arc::clone(&shared),
        queue.clone(),
        security,
        listener,
        cancel.clone(),
    ));
    tasks.spawn(keep_durable(queue.clone(), cancel.clone()));
    tasks.spawn(housekeeping(Arc::clone(&shared), queue, cancel.clone()));
    tasks.spawn(follow_for_ever(shared, writer, pinned, cancel.clone()));
    first_end(tasks, &cancel).await
}

// ----- what is on disk ------------------------------------------------------

fn lock_data_dir(dir: &Path) -> anyhow::Result<File> {
    fs::create_dir_all(dir).with_context(|| format!("create data_dir {}", dir.display()))?;
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!(
                "data_dir {} is in use by another terrace-bridge",
                dir.display()
            )
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock {}", path.display()))
        }
    }
}

fn random_hex() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn instance_id(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("instance");
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        _ => {
            let id = random_hex()?;
            fs::write(&path, &id).with_context(|| format!("write {}", path.display()))?;
            Ok(id)
        }
    }
}

/// A queue, its writer, and a session whose cursor holds the upstream's queue
/// for us until we stream from it.
type Opened = (Queue, Writer, Option<Client>);

async fn open_or_copy(shared: &Arc<Shared>) -> anyhow::Result<Opened> {
    let dir = shared.config.node.data_dir.join("queue");
    let opened = Queue::open(&dir)?;
    if shared.config.parent.is_none() {
        return open_at_top(shared, &dir, opened).await;
    }
    let mut pause = Duration::from_millis(100);
    let mut masterless_since = Instant::now();
    loop {
        let attempt = match local_progress(shared).await {
            Ok(Some((identity, lsn))) => return resume(shared, &dir, opened, identity, lsn),
            Ok(None) => copy_from_domain_or_parent(shared, &mut masterless_since).await,
            Err(error) => Err(error),
        };
        match attempt {
            Ok(Some(copied)) => {
                drop(opened);
                let (queue, writer) = Queue::create(&dir, copied.identity.clone(), copied.lsn)?;
                shared.set_identity(copied.identity, true);
                shared.event(
                    "copied",
                    &format!("initial copy is complete at {}", copied.lsn),
                );
                return Ok((queue, writer, Some(copied.client)));
            }
            Ok(None) => {
                shared.set_link(
                    State::Copying,
                    Some("waiting for a server to copy from".into()),
                );
                pause = Duration::from_millis(300);
            }
            Err(error) => {
                let problem = format!("{error:#}");
                tracing::warn!("{problem}");
                shared.set_link(State::Stalled, Some(problem));
                pause = (pause * 2).min(MAX_PAUSE);
            }
        }
        sleep(pause).await;
    }
}

fn resume(
    shared: &Arc<Shared>,
    dir: &Path,
    opened: Option<(Queue, Writer)>,
    identity: Identity,
    lsn: Lsn,
) -> anyhow::Result<Opened> {
    let (queue, writer) = match opened {
        Some((queue, writer)) if queue.identity() == &identity && queue.first() <= lsn => {
            (queue, writer)
        }
        // No queue, or one that cannot continue what the database holds. The
        // database is the truth about how far we are.
        _ => Queue::create(dir, identity.clone(), lsn)?,
    };
    shared.set_identity(identity, true);
    shared.replayed.send_replace(lsn);
    Ok((queue, writer, None))
}

async fn local_client(shared: &Shared) -> anyhow::Result<Client> {
    let info = ConnInfo::parse(&shared.config.database.url)?;
    let options = SessionOptions {
        application_name: format!("terrace {}", shared.config.node.name),
        ..Default::default()
    };
    Client::connect(&info, &options)
        .await
        .with_context(|| format!("connect to the local database at {}", info.endpoint()))
}

async fn local_progress(shared: &Arc<Shared>) -> anyhow::Result<Option<(Identity, Lsn)>> {
    let mut client = local_client(shared).await?;
    report::prepare_local(shared).await?;
    let rows = client
        .query("SELECT identity, lsn::text FROM terrace.progress", &[])
        .await
        .context("read terrace.progress")?;
    match rows.first().map(Vec::as_slice) {
        Some([Some(identity), Some(lsn)]) => Ok(Some((identity.parse()?, lsn.parse()?))),
        _ => Ok(None),
    }
}

/// A bridge of the top reads the slot of the Postgres beside it; nothing is copied.
async fn open_at_top(
    shared: &Arc<Shared>,
    dir: &Path,
    opened: Option<(Queue, Writer)>,
) -> anyhow::Result<Opened> {
    if let Some((queue, writer)) = opened {
        shared.set_identity(queue.identity().clone(), true);
        return Ok((queue, writer, None));
    }
    let mut pause = Duration::from_millis(100);
    loop {
        match create_slot_at_top(shared).await {
            Ok((identity, lsn)) => {
                let (queue, writer) = Queue::create(dir, identity.clone(), lsn)?;
                shared.set_identity(identity, true);
                return Ok((queue, writer, None));
            }
            Err(error) => {
                tracing::warn!("{error:#}");
                shared.set_link(State::Stalled, Some(format!("{error:#}")));
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

async fn create_slot_at_top(shared: &Arc<Shared>) -> anyhow::Result<(Identity, Lsn)> {
    report::prepare_local(shared).await?;
    let info = ConnInfo::parse(&shared.config.database.url)?;
    let (mut client, identity) = connect(&info, &shared.config.node.name).await?;
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

async fn copy_from_domain_or_parent(
    shared: &Arc<Shared>,
    masterless_since: &mut Instant,
) -> anyhow::Result<Option<copy::CopyResult>> {
    let members = poll_members(shared).await;
    if members.iter().any(|member| member.role == Role::Master) {
        *masterless_since = Instant::now();
    }
    let source = match decide(shared, Lsn::ZERO, &members, masterless_since.elapsed()) {
        Choice::Follow(name) => peer_info(shared, &name)?,
        Choice::Parent => first_parent(shared).await?,
        Choice::Wait => return Ok(None),
    };
    shared.set_link(State::Copying, None);
    match copy::initial_copy(shared, &source).await {
        Ok(result) => Ok(Some(result)),
        Err(error)
            if error
                .downcast_ref::<copy::CopyError>()
                .is_some_and(copy::CopyError::is_busy) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.context(format!("initial copy from {}", source.endpoint()))),
    }
}

// ----- whom to follow -------------------------------------------------------

fn decide(shared: &Shared, flush: Lsn, members: &[Member], masterless: Duration) -> Choice {
    let node = &shared.config.node;
    let own = Member {
        name: node.name.clone(),
        role: shared.role(),
        has_data: shared.has_data(),
        flush,
        priority: node.priority,
    };
    choose(
        &own,
        members,
        masterless,
        shared.config.failover.takeover_after,
    )
}

fn peer_info(shared: &Shared, name: &str) -> anyhow::Result<ConnInfo> {
    let url = shared
        .config
        .peers
        .get(name)
        .with_context(|| format!("unknown peer \"{name}\""))?;
    Ok(ConnInfo::parse(url)?)
}

fn parents(shared: &Shared) -> anyhow::Result<Vec<ConnInfo>> {
    match &shared.config.parent {
        None => Ok(vec![ConnInfo::parse(&shared.config.database.url)?]),
        Some(parent) => parent
            .servers
            .iter()
            .map(|url| Ok(ConnInfo::parse(url)?))
            .collect(),
    }
}

/// The most preferred parent server that answers.
async fn first_parent(shared: &Shared) -> anyhow::Result<ConnInfo> {
    let mut last = None;
    for parent in parents(shared)? {
        match timeout(PEER_TIMEOUT, connect(&parent, &shared.config.node.name)).await {
            Ok(Ok(_)) => return Ok(parent),
            Ok(Err(error)) => last = Some(format!("{}: {error}", parent.endpoint())),
            Err(_) => last = Some(format!("{}: no answer", parent.endpoint())),
        }
    }
    bail!(
        "no parent server is reachable; {}",
        last.unwrap_or_default()
    )
}

async fn poll_members(shared: &Arc<Shared>) -> Vec<Member> {
    let mut polls = JoinSet::new();
    for (name, url) in shared.config.peers.clone() {
        let own = shared.config.node.name.clone();
        polls.spawn(async move {
            let asked = timeout(PEER_TIMEOUT, ask_member(&url, &own)).await;
            match asked {
                Ok(Ok(member)) => Some(member),
                Ok(Err(error)) => {
                    tracing::debug!(peer = %name, "{error:#}");
                    None
                }
                Err(_) => None,
            }
        });
    }
    let mut members: Vec<Member> = polls.join_all().await.into_iter().flatten().collect();
    members.retain(|member| shared.config.peers.contains_key(&member.name));
    members
}

async fn ask_member(url: &str, own: &str) -> anyhow::Result<Member> {
    let (mut client, _) = connect(&ConnInfo::parse(url)?, own).await?;
    let rows = client.simple("SHOW terrace.status").await?;
    let text = rows
        .first()
        .and_then(|row| row.first()?.as_deref())
        .context("no status")?;
    let status: Value = serde_json::from_str(text)?;
    Ok(Member {
        name: status["node"].as_str().context("no node name")?.to_owned(),
        role: serde_json::from_value(status["role"].clone())?,
        has_data: status["has_data"] == true,
        flush: status["flush_lsn"].as_str().unwrap_or_default().parse()?,
        priority: status["priority"].as_i64().unwrap_or_default(),
    })
}

/// The next link to try, or why to wait.
async fn next_target(
    shared: &Arc<Shared>,
    end: Lsn,
    masterless_since: &mut Instant,
    parent_index: usize,
) -> anyhow::Result<Option<Target>> {
    let node = &shared.config.node;
    let members = poll_members(shared).await;
    if members.iter().any(|member| member.role == Role::Master) {
        *masterless_since = Instant::now();
    }
    match decide(shared, end, &members, masterless_since.elapsed()) {
        Choice::Wait => Ok(None),
        Choice::Follow(name) => Ok(Some(Target {
            conninfo: peer_info(shared, &name)?,
            slot: cursor_name(&node.domain, &node.name),
            role: Role::Slave,
            name,
        })),
        Choice::Parent => {
            let parents = parents(shared)?;
            let conninfo = parents[parent_index % parents.len()].clone();
            Ok(Some(Target {
                name: conninfo.endpoint(),
                conninfo,
                slot: shared.config.slot_name(),
                role: Role::Master,
            }))
        }
    }
}

async fn follow_for_ever(
    shared: Arc<Shared>,
    mut writer: Writer,
    mut pinned: Option<Client>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let mut masterless_since = Instant::now();
    let (mut pause, mut parent_index) = (Duration::from_millis(50), 0);
    while !cancel.is_cancelled() {
        let end = *shared.flushed.borrow();
        let target = match next_target(&shared, end, &mut masterless_since, parent_index).await {
            Ok(target) => target,
            Err(error) => {
                shared.set_link(State::Stalled, Some(format!("{error:#}")));
                None
            }
        };
        if let Some(target) = target {
            let started = Instant::now();
            let link_end = {
                // The cursor of the copy must stay until ours is registered.
                let unpin = async {
                    sleep(Duration::from_secs(5)).await;
                    pinned.take();
                    std::future::pending::<()>().await
                };
                tokio::select! {
                    end = follow(&shared, &mut writer, &target, &cancel) => end,
                    () = unpin => unreachable!("waits for ever"),
                }
            };
            shared.set_role(Role::None, None, "");
            if started.elapsed() > Duration::from_secs(2) {
                pause = Duration::from_millis(50);
                masterless_since = Instant::now();
            }
            if !end_of_link(&shared, &target, &link_end) {
                return if let LinkEnd::Shutdown = link_end {
                    Ok(())
                } else {
                    Err(link_end.into())
                };
            }
            if target.role == Role::Master {
                parent_index += 1;
            }
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = cancel.cancelled() => {}
        }
        pause = (pause * 2).min(shared.config.failover.heartbeat.min(MAX_PAUSE));
    }
    Ok(())
}

/// Logs and shows why the link ended. False when the bridge must stop.
fn end_of_link(shared: &Shared, target: &Target, end: &LinkEnd) -> bool {
    let problem = format!("{}: {end}", target.name);
    match end {
        LinkEnd::Shutdown => return false,
        LinkEnd::Busy(_) => {
            tracing::debug!("{problem}");
            shared.set_link(State::Catchup, Some(problem));
            return true;
        }
        LinkEnd::Lost(_) => shared.set_link(State::Down, Some(problem.clone())),
        LinkEnd::Refused(_) | LinkEnd::Queue(_) => {
            shared.set_link(State::Stalled, Some(problem.clone()));
        }
        LinkEnd::Gap { .. } => shared.set_link(State::Gap, Some(problem.clone())),
        LinkEnd::Diverged { .. } => shared.set_link(State::Diverged, Some(problem.clone())),
    }
    tracing::warn!("link ended: {problem}");
    true
}

// ----- around the queue -----------------------------------------------------

async fn keep_durable(queue: Queue, cancel: CancellationToken) -> anyhow::Result<()> {
    tokio::select! {
        error = queue.keep_durable() => Err(error.into()),
        () = cancel.cancelled() => Ok(()),
    }
}

/// The database beside a bridge of the top has what the top has.
async fn mirror_written(
    shared: Arc<Shared>,
    queue: Queue,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let mut written = queue.written();
    loop {
        let end = *written.borrow_and_update();
        shared.replayed.send_replace(end);
        let top_time = shared.top_time();
        shared.set_applied(|applied| applied.top_time = top_time);
        tokio::select! {
            _ = written.changed() => {}
            () = cancel.cancelled() => return Ok(()),
        }
    }
}

/// Follows the durable end, saves cursors, and frees what nobody needs.
async fn housekeeping(
    shared: Arc<Shared>,
    queue: Queue,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let mut durable = queue.durable();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut pending: Option<(Lsn, String)> = None;
    let mut replay_durable = Lsn::ZERO;
    let mut client: Option<Client> = None;
    loop {
        tokio::select! {
            _ = durable.changed() => {
                shared.flushed.send_replace(*durable.borrow_and_update());
                continue;
            }
            _ = tick.tick() => {}
            () = cancel.cancelled() => {
                if let Err(error) = queue.save_cursors() {
                    tracing::warn!("{error}");
                }
                return Ok(());
            }
        }
        // Nothing depends on these but what may be forgotten later, so a full disk
        // is no reason to stop: what was written last stays in force.
        if let Err(error) = queue.save_cursors() {
            tracing::warn!("{error}");
            continue;
        }
        let replayed = *shared.replayed.borrow();
        if shared.config.parent.is_none() {
            replay_durable = replayed;
        } else if let Err(error) =
            advance_replay_durable(&shared, &mut client, &mut pending, &mut replay_durable).await
        {
            tracing::debug!("{error:#}");
            client = None;
        }
        let limits = &shared.config.queue;
        let lost = queue.trim(replay_durable, limits.retain_min, limits.retain_max);
        if let Err(error) = &lost {
            tracing::warn!("{error}");
        }
        for name in lost.unwrap_or_default() {
            shared.event(
                "gap",
                &format!("cursor \"{name}\" lost: the queue exceeds retain_max"),
            );
        }
    }
}

/// `synchronous_commit` is off below, so a replayed transaction is durable only
/// when the local WAL that was written after it is flushed.
async fn advance_replay_durable(
    shared: &Arc<Shared>,
    client: &mut Option<Client>,
    pending: &mut Option<(Lsn, String)>,
    replay_durable: &mut Lsn,
) -> anyhow::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(local_client(shared).await?),
    };
    let replayed = *shared.replayed.borrow();
    let waiting = pending.as_ref().map_or("0/0", |(_, local)| local.as_str());
    let sql = "SELECT pg_catalog.pg_current_wal_insert_lsn()::text, \
               pg_catalog.pg_current_wal_flush_lsn() >= $1::pg_catalog.pg_lsn";
    let rows = client.query(sql, &[Some(waiting)]).await?;
    let Some([Some(local), Some(flushed)]) = rows.first().map(Vec::as_slice) else {
        bail!("no WAL position");
    };
    if flushed == "t"
        && let Some((lsn, _)) = pending.take()
    {
        *replay_durable = lsn;
    }
    if pending.is_none() && replayed > *replay_durable {
        *pending = Some((replayed, local.clone()));
    }
    Ok(())
}
