//! Work for the top, done in the background.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
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

    /// The same with a pause after each step: for where what is tested is not how fast it goes.
    pub fn paced(
        server: &Server,
        mut step: impl FnMut(&mut Client, i64) -> Result<(), postgres::Error> + Send + 'static,
    ) -> Background {
        Background::start(server, move |client, n| {
            step(client, n)?;
            std::thread::sleep(PACE);
            Ok(())
        })
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

/// Between two steps of a load.
const PACE: Duration = Duration::from_millis(8);

/// Tables for [`count_up`].
pub const STEPS: &str = "
    CREATE TABLE steps (n bigint PRIMARY KEY);
    CREATE TABLE trail (n bigint);
    SELECT terrace.add_table('steps'), terrace.add_table('trail');";

/// A table for [`fill_wide`], whose values stand out of line and are not compressed.
pub const WIDE: &str = "
    CREATE TABLE wide (id int PRIMARY KEY, v text);
    ALTER TABLE wide ALTER v SET STORAGE EXTERNAL; SELECT terrace.add_table('wide');";

/// Rows of 1 MiB that [`fill_wide`] writes in one transaction.
const WIDE_ROWS: i32 = 12;

/// Writes these transactions of 12 MiB each; `0..n` are rows 1 to 12 n.
pub fn fill_wide(top: &Server, transactions: std::ops::Range<i32>) {
    for number in transactions {
        let (from, to) = (number * WIDE_ROWS + 1, (number + 1) * WIDE_ROWS);
        top.sql(&format!(
            "INSERT INTO wide SELECT g, repeat('x', 1 << 20) FROM generate_series({from}, {to}) g"
        ));
    }
}

/// Writes a row to each partition that table `parted`, of columns `a` and `n`, has at the moment; the last
/// character of a partition's name is the value of `a` that it is for.
pub fn fill_partitions(server: &Server) -> Background {
    Background::paced(server, |client, n| {
        let sql = "INSERT INTO parted SELECT a, $1 FROM unnest($2::int[]) a ON CONFLICT DO NOTHING";
        let attached = "SELECT array_agg(right(inhrelid::regclass::text, 1)::int) \
                        FROM pg_inherits WHERE inhparent = 'parted'::regclass";
        let there: Vec<i32> = client.query_one(attached, &[])?.get(0);
        client.execute(sql, &[&n, &there]).map(drop)
    })
}

/// Writes 1, 2, 3 … without a gap, each once, into `steps` (with a key) and `trail` (without),
/// going on from what is there, also when the server is killed in the middle.
pub fn count_up(server: &Server) -> Background {
    let from: i64 = server
        .value("SELECT coalesce(max(n), 0) FROM steps")
        .parse()
        .expect("number");
    Background::paced(server, move |client, n| {
        let step = "WITH s AS (INSERT INTO steps VALUES ($1) ON CONFLICT DO NOTHING RETURNING n) \
                    INSERT INTO trail SELECT n FROM s";
        client.execute(step, &[&(from + n)]).map(drop)
    })
}

/// True when `steps` and `trail` hold 1 … n, each once.
pub const GAPLESS: &str = "SELECT (SELECT count(*) = coalesce(max(n), 0) FROM steps) \
    AND (SELECT count(*) = coalesce(max(n), 0) AND count(*) = count(DISTINCT n) FROM trail) \
    AND (SELECT max(n) FROM steps) IS NOT DISTINCT FROM (SELECT max(n) FROM trail)";

/// Tables for [`transfers`].
pub const ACCOUNTS: &str = "
    CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL, note text);
    INSERT INTO account SELECT g, 1000, NULL FROM generate_series(1, 100) g;
    SELECT terrace.add_table('account');";

const TRANSFER: &str = "
    WITH pair AS (SELECT 1 + (random() * 99)::int AS src, 1 + (random() * 99)::int AS dst)
    UPDATE account SET balance = balance
        + CASE WHEN id = dst AND src <> dst THEN 7 ELSE 0 END
        - CASE WHEN id = src AND src <> dst THEN 7 ELSE 0 END
    FROM pair WHERE id IN (src, dst)";

/// Moves money between accounts: the sum stays as it is.
pub fn transfers(top: &Server) -> Background {
    Background::paced(top, |client, _| client.batch_execute(TRANSFER))
}

/// Reads a server over and over: the sum of all accounts never changes, and the
/// numbers of `steps` and `trail` have no gap, and neither they nor the position that the
/// server says it is at ever go back.
pub struct Observer {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    /// Starts reading.
    pub fn start(server: &Server) -> Observer {
        let (stop, reads) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        let (stopped, counter) = (stop.clone(), reads.clone());
        let (config, name) = (server.config(), server.name.clone());
        let thread = std::thread::spawn(move || {
            let (mut client, mut seen) = (None, (0, 0));
            while !stopped.load(Ordering::Relaxed) {
                if client.is_none() {
                    client = config.connect(postgres::NoTls).ok();
                }
                let sql = "SELECT (SELECT sum(balance)::bigint FROM account), \
                           (SELECT coalesce(max(n), 0) FROM steps), \
                           (SELECT count(*) FROM steps), (SELECT count(*) FROM trail), \
                           (SELECT count(*) FROM terrace.progress), \
                           (SELECT coalesce(max(lsn - '0/0')::bigint, 0) FROM terrace.progress)";
                match client.as_mut().map(|client| client.query_one(sql, &[])) {
                    // The initial copy is under way: no position, nothing promised.
                    Some(Ok(row)) if row.get::<_, i64>(4) == 0 => seen = (0, 0),
                    Some(Ok(row)) => {
                        let sum: Option<i64> = row.get(0);
                        let [last, steps, trail] = [1, 2, 3].map(|i| row.get::<_, i64>(i));
                        assert_eq!(sum, Some(100_000), "sum on {name}");
                        assert_eq!((last, last), (steps, trail), "gap on {name}");
                        let now = (last, row.get::<_, i64>(5));
                        let on = now.0 >= seen.0 && now.1 >= seen.1;
                        assert!(on, "{name} went back from {seen:?} to {now:?}");
                        seen = now;
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    // After a crash the server may know less: it commits asynchronously.
                    _ => (client, seen) = (None, (0, 0)),
                }
                std::thread::sleep(Duration::from_millis(25));
            }
        });
        let thread = Some(thread);
        Observer {
            stop,
            reads,
            thread,
        }
    }

    /// Ends it; what it saw and must not see fails the test. How often it has read.
    pub fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().map(JoinHandle::join);
        if let Some(Err(panic)) = joined {
            std::panic::resume_unwind(panic);
        }
        let reads = self.reads.load(Ordering::Relaxed);
        assert!(reads > 10, "hardly any reads");
        reads
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
