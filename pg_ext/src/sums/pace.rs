//! How fast a table is gone over: others work here.

use std::cell::Cell;
use std::ffi::{c_int, c_long};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

/// A condition that is true of every row: for those that a filter leaves out, which the sums
/// do not see.
#[pg_extern]
fn give_way() -> bool {
    pass(1, 0);
    true
}

thread_local! {
    /// Rows and bytes since the time was looked at.
    static PASSED: Cell<(u32, usize)> = const { Cell::new((0, 0)) };
    /// When the session began to work or had its last rest.
    static SINCE: Cell<Option<Moment>> = const { Cell::new(None) };
}

/// Called before the first row. From then on the processor goes to whoever else wants it. There is
/// no way back, so the session should be one that does nothing else. Nobody waits for it long: it
/// holds a lock on a page while it looks at that.
pub(super) fn begin_work() {
    unsafe extern "C" {
        fn nice(increment: c_int) -> c_int;
    }
    if SINCE.replace(Some(Moment::now())).is_none() {
        // SAFETY: of the C library; what it answers is of no interest, nor is a refusal.
        unsafe { nice(10) };
    }
}

/// Called for rows: now and then rests for some times as long as the session has worked
/// since, and far longer where others were in the way, so that it does not take the processor from
/// those who work here. Waiting for the processor is no work: where many wait, all would rest for
/// ever longer.
pub(super) fn pass(count: u32, bytes: usize) {
    /// So many rows or bytes pass before the time is looked at.
    const ROWS: u32 = 64;
    const MANY_BYTES: usize = 256 << 10;
    /// Work before a rest: with less, what a rest itself costs is felt.
    const WORK: Duration = Duration::from_millis(50);
    /// A rest is so many times as long, alone …
    const ALONE: u32 = 3;
    /// … and where work had to wait for a processor for half as long as it had one …
    const IN_COMPANY: u32 = 16;
    /// … but others are hurt more by a snapshot that is held for longer than this.
    const GENTLE: Duration = Duration::from_secs(180);
    const IN_HASTE: u32 = 4;
    const LONGEST: Duration = Duration::from_secs(10);
    let (rows, before) = PASSED.get();
    let passed = (rows + count, before + bytes);
    PASSED.set(passed);
    if passed.0 < ROWS && passed.1 < MANY_BYTES {
        return;
    }
    PASSED.set((0, 0));
    let Some(since) = SINCE.get() else {
        return;
    };
    if since.time.elapsed() < WORK {
        return;
    }
    let now = Moment::now();
    let used = now.used.saturating_sub(since.used);
    let factor = match now.waited.saturating_sub(since.waited) > used / 2 {
        true if held() < GENTLE => IN_COMPANY,
        true => IN_HASTE,
        false => ALONE,
    };
    rest((used * factor).min(LONGEST));
    SINCE.set(Some(Moment::now()));
}

/// Ends early when somebody waits for a table that is held.
fn rest(time: Duration) {
    const LOOK: Duration = Duration::from_secs(1);
    const WAKE: c_int =
        (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as c_int;
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || is_awaited() {
            return;
        }
        let wait = left.min(LOOK).as_millis().max(1) as c_long;
        // SAFETY: the session's own latch, which is set for interrupts.
        unsafe {
            pg_sys::WaitLatch(pg_sys::MyLatch, WAKE, wait, pg_sys::PG_WAIT_EXTENSION);
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
        pgrx::check_for_interrupts!();
    }
}

fn is_awaited() -> bool {
    let sql = "SELECT FROM pg_catalog.pg_locks own JOIN pg_catalog.pg_locks other
                   ON other.relation = own.relation AND other.database = own.database
               WHERE own.pid = pg_catalog.pg_backend_pid() AND own.locktype = 'relation' AND own.granted
                   AND other.locktype = 'relation' AND NOT other.granted
                   AND other.mode = 'AccessExclusiveLock'";
    // Read only, or the transaction would get a number, for which new slots wait.
    Spi::connect(|client| {
        client
            .select(sql, Some(1), &[])
            .is_ok_and(|found| !found.is_empty())
    })
}

/// How long the transaction, and so its snapshot, has been there.
fn held() -> Duration {
    // SAFETY: they read clocks.
    let held =
        unsafe { pg_sys::GetCurrentTimestamp() - pg_sys::GetCurrentTransactionStartTimestamp() };
    Duration::from_micros(held.max(0).unsigned_abs())
}

/// What the session has had until now.
#[derive(Clone, Copy)]
struct Moment {
    time: Instant,
    /// Of a processor.
    used: Duration,
    /// Without one; where the system does not tell, anything else that takes time counts as well.
    waited: Duration,
}

impl Moment {
    fn now() -> Moment {
        unsafe extern "C" {
            fn clock() -> c_long;
        }
        thread_local! {
            static START: Instant = Instant::now();
        }
        let time = Instant::now();
        // SAFETY: of the C library; POSIX has it in microseconds, negative when not known.
        let used = Duration::from_micros(unsafe { clock() }.try_into().unwrap_or(0));
        let other = || {
            START
                .with(|start| time.duration_since(*start))
                .saturating_sub(used)
        };
        Moment {
            time,
            used,
            waited: queued().unwrap_or_else(other),
        }
    }
}

/// The time that the session could have run and had to wait for a processor, as Linux tells it.
fn queued() -> Option<Duration> {
    let told = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    let nanoseconds = told.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}
