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

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::clock::unix_micros;
use crate::conninfo::ConnInfo;
use crate::control;
use crate::handshake::{Accepted, Security, accept};
use crate::report::RELAY_ROLE;
use crate::roles::Ordered;
use crate::status::Shared;
use crate::upstream::BRIDGE_PARAMETER;
use crate::wire::{self, Stream};

/// More sessions than this are refused.
const MAX_SESSIONS: usize = 600;
/// Connections whose client has not yet shown who it is; for more the oldest ends.
const MAX_STRANGERS: usize = 256;
/// The same from one address: whoever sits there keeps out no others.
const MAX_STRANGERS_PER_ADDRESS: usize = 128;
/// Longest time to tell a client why it is refused.
const FAREWELL: Duration = Duration::from_secs(2);

/// What every session of the relay shares.
struct Relay {
    shared: Arc<Shared>,
    orders: mpsc::Sender<Ordered>,
    cancel: CancellationToken,
    /// Cursors in use.
    active: Mutex<HashMap<String, Holder>>,
    sessions: AtomicU32,
    strangers: Strangers,
    places: Semaphore,
    /// Of sessions that are passed on, as their clients would cancel by.
    keys: Mutex<HashSet<Bytes>>,
}

/// Connections before authentication. Letting one in takes milliseconds, so whoever has
/// waited longest when it gets crowded is the one that says nothing.
#[derive(Default)]
struct Strangers(Mutex<(u64, BTreeMap<u64, Stranger>)>);

struct Stranger {
    address: IpAddr,
    end: CancellationToken,
}

/// Leaves the strangers when dropped.
struct Arrival<'a> {
    strangers: &'a Strangers,
    number: u64,
    end: CancellationToken,
}

impl Strangers {
    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Stranger>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrive(&self, address: IpAddr) -> Arrival<'_> {
        let mut inner = self.lock();
        let (next, list) = &mut *inner;
        let same = || list.iter().filter(|(_, known)| known.address == address);
        let oldest = if same().count() >= MAX_STRANGERS_PER_ADDRESS {
            same().next().map(|(number, _)| *number)
        } else if list.len() >= MAX_STRANGERS {
            list.keys().next().copied()
        } else {
            None
        };
        if let Some(oldest) = oldest.and_then(|number| list.remove(&number)) {
            oldest.end.cancel();
        }
        *next += 1;
        let end = CancellationToken::new();
        let stranger = Stranger {
            address,
            end: end.clone(),
        };
        list.insert(*next, stranger);
        Arrival {
            strangers: self,
            number: *next,
            end,
        }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.strangers.lock().1.remove(&self.number);
    }
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
    fn keys(&self) -> MutexGuard<'_, HashSet<Bytes>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

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

/// Where the numbers of sessions begin: elsewhere in each run and at each relay, so that whoever
/// is to depose one by its number does not hit another one's.
fn first_session(shared: &Shared) -> u32 {
    let run = format!("{} {}", shared.instance, unix_micros());
    crc32c::crc32c(run.as_bytes()) >> 1
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
        orders,
        cancel: cancel.clone(),
        active: Mutex::default(),
        sessions: AtomicU32::new(first_session(&shared)),
        shared,
        strangers: Strangers::default(),
        keys: Mutex::default(),
        places: Semaphore::new(MAX_SESSIONS),
    });
    let (trusting, mut crowded) = (Arc::new(Security::trusting()?), false);
    let control = control::listen(&relay.shared.config.node.data_dir);
    if let Err(error) = &control {
        tracing::warn!("no orders can be given on this machine: {error:#}");
    }
    loop {
        let accepted = tokio::select! {
            accepted = accept_tcp(&listener) => accepted,
            accepted = accept_control(&control) => accepted.map(|stream| (stream, None)),
            () = cancel.cancelled() => return Ok(()),
        };
        let (stream, address) = match accepted {
            Ok(accepted) => {
                crowded = false;
                accepted
            }
            Err(error) => {
                // Out of file descriptors, most likely: others will end.
                if !std::mem::replace(&mut crowded, true) {
                    tracing::warn!("accept on the relay port: {error}");
                }
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let relay = Arc::clone(&relay);
        let security = match address {
            Some(_) => &security,
            None => &trusting,
        };
        let security = Arc::clone(security);
        tokio::spawn(async move {
            if let Err(error) = serve(relay, &security, stream, address).await {
                tracing::debug!("relay session ended: {error:#}");
            }
        });
    }
}

type Accept = io::Result<(Box<dyn Stream>, Option<IpAddr>)>;

async fn accept_tcp(listener: &TcpListener) -> Accept {
    let (tcp, peer) = listener.accept().await?;
    wire::tune(&tcp)?;
    tracing::debug!(%peer, "connection");
    Ok((Box::new(tcp), Some(peer.ip())))
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
    address: Option<IpAddr>,
) -> anyhow::Result<()> {
    let local = address.is_none();
    let arrival = address.map(|address| relay.strangers.arrive(address));
    let accepted = match &arrival {
        None => accept(stream, security).await?,
        Some(arrival) => tokio::select! {
            accepted = accept(stream, security) => accepted?,
            () = arrival.end.cancelled() => bail!("said nothing while others came"),
        },
    };
    match accepted {
        // Nobody has shown who it is, so it goes on counting as a stranger.
        Accepted::Cancel(packet) => {
            let Some(arrival) = &arrival else {
                return Ok(());
            };
            tokio::select! {
                passed = timeout(FAREWELL, splice::cancel(&relay, &packet)) => passed?,
                () = arrival.end.cancelled() => bail!("wanted to cancel while others came"),
            }
        }
        Accepted::Session {
            mut framed,
            parameters,
        } => {
            drop(arrival);
            // Whoever fills the places keeps nobody of this machine out.
            let place = if local {
                None
            } else {
                relay.places.try_acquire().ok()
            };
            if !local && place.is_none() {
                let text = "sorry, too many clients already";
                wire::error_response(framed.out(), "FATAL", "53300", text, "");
                return Ok(timeout(FAREWELL, framed.flush()).await??);
            }
            let wanted = parameters.get("replication").map(String::as_str);
            let plain = matches!(wanted, None | Some("false" | "off" | "no" | "0"));
            if plain && !parameters.contains_key(BRIDGE_PARAMETER) {
                return splice::run(&relay, framed, parameters).await;
            }
            let id = relay.sessions.fetch_add(1, Ordering::Relaxed);
            session::Session::new(Arc::clone(&relay), framed, parameters, id, local)
                .run()
                .await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_nothing_makes_room_for_who_comes() {
        let strangers = Strangers::default();
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let crowd = |address: IpAddr, count: usize| -> Vec<Arrival<'_>> {
            (0..count).map(|_| strangers.arrive(address)).collect()
        };
        let other = strangers.arrive(address(1));
        let mut same = crowd(address(2), MAX_STRANGERS_PER_ADDRESS);
        assert!(same.iter().all(|arrival| !arrival.end.is_cancelled()));
        // Who has made itself known makes room too.
        drop(same.pop());
        same.extend(crowd(address(2), 2));
        let ended = same.iter().map(|arrival| arrival.end.is_cancelled());
        assert_eq!(ended.clone().filter(|ended| *ended).count(), 1);
        assert!(ended.clone().next().unwrap() && !other.end.is_cancelled());
        let more: Vec<Vec<Arrival<'_>>> = (3..6).map(|last| crowd(address(last), 100)).collect();
        assert!(other.end.is_cancelled());
        assert!(more[2].iter().all(|arrival| !arrival.end.is_cancelled()));
        assert_eq!(strangers.lock().1.len(), MAX_STRANGERS);
    }
}
