//! Serves the queue to slaves, child domains and stock clients on one port that
//! looks like a Postgres, and passes SQL through to the local one.
//!
//! Guarantees: whatever a client does ends at most its own connection. A bridge
//! is sent what is in the queue as soon as it is there; a stock client only what
//! the local database has replayed, and never a position beyond the last
//! transaction sent whole. SQL runs under a role that may read what is
//! synchronised and report, nothing else.

pub mod grammar;
mod session;
mod splice;
mod stream;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::conninfo::ConnInfo;
use crate::control;
use crate::handshake::{Accepted, Security, accept};
use crate::report::RELAY_ROLE;
use crate::roles::Ordered;
use crate::status::Shared;
use crate::upstream::BRIDGE_PARAMETER;
use crate::wire::{self, Stream};

/// More connections than this wait.
const MAX_CONNECTIONS: usize = 600;

/// What every session of the relay shares.
struct Relay {
    shared: Arc<Shared>,
    orders: mpsc::Sender<Ordered>,
    cancel: CancellationToken,
    /// Cursors in use.
    active: Mutex<HashMap<String, Holder>>,
    sessions: AtomicU32,
}

/// The session that streams from a cursor.
#[derive(Clone)]
struct Holder {
    session: u32,
    application: String,
    /// Of a bridge: which data directory it has.
    instance: Option<String>,
    end: CancellationToken,
}

impl Relay {
    fn local(&self) -> anyhow::Result<ConnInfo> {
        Ok(ConnInfo::parse(&self.shared.config.database.url)?)
    }

    /// The local Postgres under the role that clients get.
    fn restricted(&self) -> anyhow::Result<ConnInfo> {
        Ok(self
            .local()?
            .with_user_password(RELAY_ROLE, &self.shared.relay_password))
    }
}

/// Serves until `cancel`.
pub async fn run(
    shared: Arc<Shared>,
    security: Arc<Security>,
    listener: TcpListener,
    orders: mpsc::Sender<Ordered>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let relay = Arc::new(Relay {
        shared,
        orders,
        cancel: cancel.clone(),
        active: Mutex::default(),
        sessions: AtomicU32::new(1),
    });
    let trusting = Arc::new(Security::trusting()?);
    let control = control::listen(&relay.shared.config.node.data_dir);
    if let Err(error) = &control {
        tracing::warn!("no orders can be given on this machine: {error:#}");
    }
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = accept_tcp(&listener, &places) => accepted,
            // Whoever fills the places keeps nobody of this machine out.
            accepted = accept_control(&control) => accepted.map(|stream| (stream, None)),
            () = cancel.cancelled() => return Ok(()),
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: others will end.
                tracing::warn!("accept on the relay port: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (relay, local) = (Arc::clone(&relay), place.is_none());
        let security = Arc::clone(if local { &trusting } else { &security });
        tokio::spawn(async move {
            if let Err(error) = serve(relay, &security, stream, local).await {
                tracing::debug!("relay session ended: {error:#}");
            }
            drop(place);
        });
    }
}

type Accept = io::Result<(Box<dyn Stream>, Option<OwnedSemaphorePermit>)>;

async fn accept_tcp(listener: &TcpListener, places: &Arc<Semaphore>) -> Accept {
    let place = Arc::clone(places).acquire_owned().await;
    let place = place.map_err(io::Error::other)?;
    let (tcp, peer) = listener.accept().await?;
    wire::tune(&tcp)?;
    tracing::debug!(%peer, "connection");
    Ok((Box::new(tcp), Some(place)))
}

async fn accept_control(listener: &anyhow::Result<UnixListener>) -> io::Result<Box<dyn Stream>> {
    match listener {
        Ok(listener) => Ok(Box::new(listener.accept().await?.0)),
        Err(_) => std::future::pending().await,
    }
}

async fn serve(
    relay: Arc<Relay>,
    security: &Security,
    stream: Box<dyn Stream>,
    local: bool,
) -> anyhow::Result<()> {
    match accept(stream, security).await? {
        Accepted::Cancel(packet) => splice::cancel(&relay.local()?, &packet).await,
        Accepted::Session { framed, parameters } => {
            let wanted = parameters.get("replication").map(String::as_str);
            let plain = matches!(wanted, None | Some("false" | "off" | "no" | "0"));
            if plain && !parameters.contains_key(BRIDGE_PARAMETER) {
                return splice::run(&relay, framed, parameters).await;
            }
            let id = relay.sessions.fetch_add(1, Ordering::Relaxed);
            session::Session::new(relay, framed, parameters, id, local)
                .run()
                .await
        }
    }
}
