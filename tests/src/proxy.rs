//! A TCP link that can be cut, silently or not, in one direction or both, and slowed.
//!
//! While a link is cut its bytes are held, as TCP itself would send them again,
//! and arrive when it heals; new connections open and stay silent.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How often a waiting direction looks whether it may go on.
const LOOK: Duration = Duration::from_millis(5);
/// Bytes that are read at once …
const CHUNK: usize = 64 << 10;
/// … and how many times those are on their way, before who sends must wait.
const UNDERWAY: usize = 64;

#[derive(Default)]
struct State {
    cut_to_server: AtomicBool,
    cut_to_client: AtomicBool,
    delay_millis: AtomicU64,
    nanos_per_byte: AtomicU64,
    ended: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

/// A link from a port of its own to a server's; ended when dropped.
pub struct Proxy {
    /// Connect here, on 127.0.0.1.
    pub port: u16,
    state: Arc<State>,
}

impl Proxy {
    /// Opens a link to `server` on 127.0.0.1, which need not be up yet.
    pub fn start(server: u16) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").context("bind a proxy")?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.ended.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || join(client, server, &shared));
            }
        });
        Ok(Proxy { port, state })
    }

    /// Nothing passes any more, and nobody is told.
    pub fn cut(&self) {
        self.state.cut_to_server.store(true, Ordering::Relaxed);
        self.state.cut_to_client.store(true, Ordering::Relaxed);
    }

    /// What the server sends is lost; what it is sent arrives.
    pub fn cut_answers(&self) {
        self.state.cut_to_client.store(true, Ordering::Relaxed);
    }

    /// Every byte takes so long.
    pub fn delay(&self, delay: Duration) {
        let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.state.delay_millis.store(millis, Ordering::Relaxed);
    }

    /// So many bytes pass in a second, in each direction.
    pub fn slow(&self, rate: u64) {
        let nanos = 1_000_000_000 / rate;
        self.state.nanos_per_byte.store(nanos, Ordering::Relaxed);
    }

    /// Ends every open connection, as a reset does.
    pub fn reset(&self) {
        for stream in lock(&self.state.open).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// All passes again.
    pub fn heal(&self) {
        self.state.cut_to_server.store(false, Ordering::Relaxed);
        self.state.cut_to_client.store(false, Ordering::Relaxed);
        self.delay(Duration::ZERO);
        self.state.nanos_per_byte.store(0, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        self.reset();
        // Wakes the listener, so that it sees the end.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Serves one connection.
fn join(client: TcpStream, server: u16, state: &Arc<State>) {
    // A connection over a cut link neither opens nor fails.
    wait_while(&state.cut_to_server, state);
    let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else {
        return;
    };
    let streams = [&client, &server].map(TcpStream::try_clone);
    let [Ok(client_in), Ok(server_in)] = streams else {
        return;
    };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
        if let Ok(stream) = stream.try_clone() {
            lock(&state.open).push(stream);
        }
    }
    let up = Arc::clone(state);
    std::thread::spawn(move || pump(client_in, server, &up, |state| &state.cut_to_server));
    pump(server_in, client, state, |state| &state.cut_to_client);
}

fn wait_while(cut: &AtomicBool, state: &State) {
    while cut.load(Ordering::Relaxed) && !state.ended.load(Ordering::Relaxed) {
        std::thread::sleep(LOOK);
    }
}

/// One direction, to its end.
fn pump(mut from: TcpStream, to: TcpStream, state: &Arc<State>, cut: fn(&State) -> &AtomicBool) {
    let (sender, bytes) = sync_channel(UNDERWAY);
    let shared = Arc::clone(state);
    let writer = std::thread::spawn(move || write(to, &bytes, &shared, cut));
    let mut buffer = vec![0; CHUNK];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || !send(&sender, &buffer[..count], state) {
            break;
        }
    }
    drop(sender);
    let _ = writer.join();
}

fn send(sender: &SyncSender<(Instant, Vec<u8>)>, bytes: &[u8], state: &State) -> bool {
    let delay = Duration::from_millis(state.delay_millis.load(Ordering::Relaxed));
    sender
        .send((Instant::now() + delay, bytes.to_vec()))
        .is_ok()
}

fn write(
    mut to: TcpStream,
    bytes: &Receiver<(Instant, Vec<u8>)>,
    state: &State,
    cut: fn(&State) -> &AtomicBool,
) {
    for (due, chunk) in bytes {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        wait_while(cut(state), state);
        if to.write_all(&chunk).is_err() {
            return;
        }
        let each = state.nanos_per_byte.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_nanos(each * chunk.len() as u64));
    }
    // The end of a connection is lost on a cut link like everything else.
    wait_while(cut(state), state);
    let _ = to.shutdown(Shutdown::Write);
}
