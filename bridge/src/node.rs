//! A node's life: opens what is on disk, copies when there is nothing, then plays
//! its role for ever, while the other tasks work from the queue.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::durable::Durable;
use crate::handshake::Security;
use crate::lsn::Lsn;
use crate::observe::Observer;
use crate::open::{self, Opened};
use crate::queue::Queue;
use crate::roles::{End, Ordered, Roles};
use crate::status::{OpenQueue, Shared, cursor_name};
use crate::{apply, http, matching, relay, report};

/// Runs the bridge until `cancel`; an error is one that a restart may not mend.
pub async fn run(config: Config, cancel: CancellationToken) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let _lock = lock_data_dir(&config.node.data_dir)?;
    let instance = instance_id(&config.node.data_dir)?;
    let shared = Shared::new(Arc::clone(&config), instance, random_hex()?);
    let settings = &config.relay;
    let security = Security::load(
        settings.auth_file.as_deref(),
        settings.tls_cert.as_deref(),
        settings.tls_key.as_deref(),
        settings.tls_client_ca.as_deref(),
    )?;
    let listener = TcpListener::bind(&settings.listen)
        .await
        .with_context(|| format!("listen on {} ([relay] listen)", settings.listen))?;
    let observer = Observer::new(&config)?;
    let (order, orders) = mpsc::channel(8);

    let mut tasks = JoinSet::new();
    tasks.spawn(http::run(Arc::clone(&shared), cancel.clone()));
    tasks.spawn(report::run(Arc::clone(&shared), cancel.clone()));
    tasks.spawn(Arc::clone(&observer).run(cancel.clone()));
    let relay = relay::run(
        Arc::clone(&shared),
        Arc::new(security),
        listener,
        order,
        cancel.clone(),
    );
    tasks.spawn(relay);
    tasks.spawn(live(shared, observer, orders, cancel.clone()));
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

/// One set of data after the other; mostly there is just one.
async fn live(
    shared: Arc<Shared>,
    observer: Arc<Observer>,
    mut orders: mpsc::Receiver<Ordered>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        let opened = tokio::select! {
            opened = open::open_or_copy(&shared, &observer) => opened?,
            never = refuse_orders(&mut orders) => match never {},
            () = cancel.cancelled() => return Ok(()),
        };
        match serve(&shared, &observer, opened, &mut orders, &cancel).await? {
            End::Shutdown => return Ok(()),
            End::CopyAnew {
                reason,
                from_parent,
            } => {
                shared.event("resync", &reason);
                tokio::select! {
                    () = open::forget(&shared, from_parent) => {}
                    () = cancel.cancelled() => return Ok(()),
                }
            }
            End::Fetch { reason } => {
                shared.event("damaged", &reason);
                open::set_queue_aside(&shared)?;
            }
        }
    }
}

/// What is asked for while there is no data must not be done later, when nobody expects it.
async fn refuse_orders(orders: &mut mpsc::Receiver<Ordered>) -> Infallible {
    while let Some((_, reply)) = orders.recv().await {
        let text = "this server has no data yet: it copies, or waits for that; see its state in terrace.lag";
        reply.send(Err(text.into())).ok();
    }
    std::future::pending().await
}

/// Works with one queue until there is an end to it.
async fn serve(
    shared: &Arc<Shared>,
    observer: &Arc<Observer>,
    opened: Opened,
    orders: &mut mpsc::Receiver<Ordered>,
    cancel: &CancellationToken,
) -> anyhow::Result<End> {
    let Opened {
        queue,
        writer,
        pinned,
        local,
    } = opened;
    let closed = cancel.child_token();
    shared.flushed.send_replace(queue.end());
    // What is known is of another queue, and of other data perhaps.
    shared.noted.send_replace(None);
    shared.replay_durable.send_replace(Lsn::ZERO);
    shared.queue.send_replace(Some(OpenQueue {
        queue: queue.clone(),
        closed: closed.child_token(),
    }));
    let mut tasks = JoinSet::new();
    if shared.config.parent.is_some() {
        tasks.spawn(apply::run(
            Arc::clone(shared),
            queue.clone(),
            closed.clone(),
        ));
    } else {
        tasks.spawn(mirror_written(
            Arc::clone(shared),
            queue.clone(),
            closed.clone(),
        ));
    }
    tasks.spawn(keep_durable(queue.clone(), closed.clone()));
    tasks.spawn(matching::run(
        Arc::clone(shared),
        Arc::clone(observer),
        queue.clone(),
        closed.clone(),
    ));
    tasks.spawn(housekeeping(
        Arc::clone(shared),
        Arc::clone(observer),
        queue,
        Durable::new(local),
        closed.clone(),
    ));
    let roles = Roles::new(Arc::clone(shared), Arc::clone(observer));
    let end = tokio::select! {
        end = roles.run(writer, pinned, orders, &closed) => end,
        // Only a failure ends any of them before they are told to.
        failed = tasks.join_next() => {
            failed.context("no task")?.context("a task of the bridge panicked")??;
            End::Shutdown
        }
    };
    closed.cancel();
    if let Some(open) = shared.queue.send_replace(None) {
        open.closed.cancel();
    }
    first_end(tasks, &closed).await?;
    Ok(end)
}

// ----- the data directory ---------------------------------------------------

fn lock_data_dir(dir: &Path) -> anyhow::Result<File> {
    fs::create_dir_all(dir).with_context(|| format!("create data_dir {}", dir.display()))?;
    // It holds rows of the database: nobody else on this machine is to read them.
    let mode = fs::metadata(dir)?.permissions().mode();
    if mode & 0o077 != 0
        && let Err(error) = fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
    {
        tracing::warn!("others can read data_dir {}: {error}", dir.display());
    }
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

/// What tells the bridge of this directory from all others, from its first start on.
pub fn instance(dir: &Path) -> io::Result<String> {
    fs::read_to_string(dir.join("instance")).map(|text| text.trim().to_owned())
}

fn instance_id(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("instance");
    match instance(dir) {
        Ok(id) if !id.is_empty() => Ok(id),
        _ => {
            let id = random_hex()?;
            fs::write(&path, &id).with_context(|| format!("write {}", path.display()))?;
            Ok(id)
        }
    }
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
        shared.set_position(end);
        let top_time = shared.top_time();
        shared.set_applied(|applied| applied.top_time = top_time);
        tokio::select! {
            _ = written.changed() => {}
            () = cancel.cancelled() => return Ok(()),
        }
    }
}

/// A database that hangs must not keep the queue from being looked after.
async fn within(asking: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    timeout(Duration::from_secs(5), asking)
        .await
        .context("the local database does not answer")?
}

/// Follows the durable end, saves cursors, and frees what nobody needs.
async fn housekeeping(
    shared: Arc<Shared>,
    observer: Arc<Observer>,
    queue: Queue,
    mut local: Durable,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let mut durable = queue.durable();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            // The sender lives in the queue.
            _ = durable.changed() => {
                shared.flushed.send_replace(*durable.borrow_and_update());
                continue;
            }
            _ = tick.tick() => {}
            () = cancel.cancelled() => {
                if let Err(error) = on_disk(&queue, Queue::save_cursors).await? {
                    tracing::warn!("{error}");
                }
                return Ok(());
            }
        }
        for (name, lsn) in observer.child_cursors(&queue.identity()) {
            if shared.is_wanted(&name) {
                queue.learn_cursor(&name, lsn);
            }
        }
        keep_siblings_places(&shared, &observer, &queue);
        // Nothing depends on these but what may be forgotten later: older ones only keep more. So a full
        // disk is no reason to stop, and least of all to forget nothing, which makes room.
        if let Err(error) = on_disk(&queue, Queue::save_cursors).await? {
            tracing::warn!("{error}");
        }
        if shared.config.parent.is_none() {
            let replayed = *shared.replayed.borrow();
            shared.replay_durable.send_replace(replayed);
        } else if let Err(error) = within(local.advance(&shared)).await {
            tracing::debug!("{error:#}");
            local.start_again();
        }
        let replay_durable = *shared.replay_durable.borrow();
        let limits = &shared.config.queue;
        let (min, max) = (limits.retain_min, limits.retain_max);
        let trim = move |queue: &Queue| queue.trim(replay_durable, min, max);
        let lost = on_disk(&queue, trim).await?;
        if let Err(error) = &lost {
            tracing::warn!("{error}");
        }
        // Cursors are passed by; the database here is not.
        let full = queue.bytes() > max;
        shared.set_full(full);
        // A link that is not read does not tell what may be shown here either.
        if full
            && let Some(above) = shared.followed()
            && let Some(shown) = observer.shown(&above, &queue.identity())
        {
            shared.note_shown_above(shown);
        }
        for name in lost.unwrap_or_default() {
            shared.event(
                "gap",
                &format!("cursor \"{name}\" lost: the queue exceeds retain_max"),
            );
        }
    }
}

/// Every server keeps what each other one of its domain needs next, so that whoever
/// leads can serve it; and nothing for one that has left the domain.
fn keep_siblings_places(shared: &Shared, observer: &Observer, queue: &Queue) {
    let domain = &shared.config.node.domain;
    let identity = shared.identity();
    for peer in observer.peers() {
        if let Some(told) = peer.told
            && told.has_data
            && told.identity == identity
        {
            queue.learn_cursor(&cursor_name(domain, &peer.name), told.flush);
        }
    }
    let prefix = cursor_name(domain, "");
    for (name, _, _) in queue.cursors() {
        let node = name.strip_prefix(&prefix);
        if node.is_some_and(|node| !shared.config.peers.contains_key(node)) {
            queue.drop_cursor(&name);
        }
    }
}

/// Does what may wait for the disk where nothing else waits for it.
async fn on_disk<T: Send + 'static>(
    queue: &Queue,
    work: impl FnOnce(&Queue) -> T + Send + 'static,
) -> anyhow::Result<T> {
    let queue = queue.clone();
    let done = tokio::task::spawn_blocking(move || work(&queue)).await;
    done.context("work on the queue's files")
}
