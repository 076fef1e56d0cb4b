//! Work for the top, done in the background.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use postgres::{Client, NoTls};

use crate::server::Server;

/// A background loop; ended and joined when dropped.
pub struct Background {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicI64>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Calls `step` with 1, 2, 3 … until stopped. A step that fails is tried again with the
    /// same number on a new connection, so it must be written to be repeated.
    pub fn start(
        server: &Server,
        mut step: impl FnMut(&mut Client, i64) -> Result<(), postgres::Error> + Send + 'static,
    ) -> Background {
        let config = server.config();
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicI64::new(0));
        let (stopped, counter) = (stop.clone(), count.clone());
        let thread = std::thread::spawn(move || {
            let mut client = None;
            while !stopped.load(Ordering::Relaxed) {
                let next = counter.load(Ordering::Relaxed) + 1;
                if client.is_none() {
                    client = config.connect(NoTls).ok();
                }
                match client.as_mut().map(|client| step(client, next)) {
                    Some(Ok(())) => counter.store(next, Ordering::Relaxed),
                    _ => {
                        client = None;
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        });
        Background {
            stop,
            count,
            thread: Some(thread),
        }
    }

    /// Steps done so far.
    pub fn count(&self) -> i64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until so many more steps are done.
    pub fn go_on(&self, steps: i64) {
        let goal = self.count() + steps;
        crate::wait_until("the load goes on", || self.count() >= goal);
    }

    /// Ends it, and tells how many steps were done. A step that panicked fails the test.
    pub fn stop(mut self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the background load");
        }
        self.count()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tables for [`count_up`].
pub const STEPS: &str = "
    CREATE TABLE steps (n bigint PRIMARY KEY);
    CREATE TABLE trail (n bigint);
    SELECT terrace.add_table('steps'), terrace.add_table('trail');";

/// Writes 1, 2, 3 … without a gap, each once, into `steps` (with a key) and `trail` (without),
/// going on from what is there, also when the server is killed in the middle.
pub fn count_up(server: &Server) -> Background {
    let from: i64 = server
        .value("SELECT coalesce(max(n), 0) FROM steps")
        .parse()
        .expect("number");
    Background::start(server, move |client, n| {
        let step = "WITH s AS (INSERT INTO steps VALUES ($1) ON CONFLICT DO NOTHING RETURNING n) \
                    INSERT INTO trail SELECT n FROM s";
        client.execute(step, &[&(from + n)]).map(drop)
    })
}

/// True when `steps` and `trail` hold 1 … n, each once.
pub const GAPLESS: &str = "SELECT (SELECT count(*) = coalesce(max(n), 0) FROM steps) \
    AND (SELECT count(*) = coalesce(max(n), 0) AND count(*) = count(DISTINCT n) FROM trail) \
    AND (SELECT max(n) FROM steps) IS NOT DISTINCT FROM (SELECT max(n) FROM trail)";
