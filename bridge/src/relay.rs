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

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::conninfo::ConnInfo;
use crate::handshake::{Accepted, Security, accept};
use crate::queue::Queue;
use crate::report::RELAY_ROLE;
use crate::status::Shared;

/// More connections than this wait.
const MAX_CONNECTIONS: usize = 600;

/// What every session of the relay shares.
struct Relay {
    shared: Arc<Shared>,
    queue: Queue,
    cancel: CancellationToken,
    /// Cursors in use.
    active: Mutex<HashSet<String>>,
    sessions: AtomicU32,
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
    queue: Queue,
    security: Arc<Security>,
    listener: TcpListener,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let relay = Arc::new(Relay {
        shared,
        queue,
        cancel: cancel.clone(),
        active: Mutex::default(),
        sessions: AtomicU32::new(1),
    });
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await?;
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cancel.cancelled() => return Ok(()),
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: others will end.
                tracing::warn!("accept on the relay port: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (relay, security) = (Arc::clone(&relay), Arc::clone(&security));
        tokio::spawn(async move {
            if let Err(error) = serve(relay, &security, tcp).await {
                tracing::debug!(%peer, "relay session ended: {error:#}");
            }
            drop(place);
        });
    }
}

async fn serve(relay: Arc<Relay>, security: &Security, tcp: TcpStream) -> anyhow::Result<()> {
    match accept(tcp, security).await? {
        Accepted::Cancel(packet) => splice::cancel(&relay.local()?, &packet).await,
        Accepted::Session { framed, parameters } => {
            let wanted = parameters.get("replication").map(String::as_str);
            if matches!(wanted, None | Some("false" | "off" | "no" | "0")) {
                return splice::run(&relay, framed, parameters).await;
            }
            let id = relay.sessions.fetch_add(1, Ordering::Relaxed);
            session::Session::new(relay, framed, parameters, id)
                .run()
                .await
        }
    }
}
