//! How fast a table is gone over: others work here.

use std::cell::Cell;
use std::ffi::{c_int, c_long};
use std::time::{Duration, Instant};

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
    /// When the session began to work or had its last rest, and its processor time then.
    static SINCE: Cell<Option<(Instant, Duration)>> = const { Cell::new(None) };
}

/// Called before the first row. From then on the processor goes to whoever else wants it. There is
/// no way back, so the session should be one that does nothing else. Nobody waits for it long: it
/// holds a lock on a page while it looks at that.
pub(super) fn begin_work() {
    unsafe extern "C" {
        fn nice(increment: c_int) -> c_int;
    }
    if SINCE.replace(Some(now())).is_none() {
        // SAFETY: of the C library; what it answers is of no interest, nor is a refusal.
        unsafe { nice(10) };
    }
}

/// Called for rows: now and then rests for some times as long as the session has worked
/// since, and longer where others were in the way, so that it does not take the processor from
/// those who work here. Waiting for the processor is no work: where many wait, all would rest for
/// ever longer.
pub(super) fn pass(count: u32, bytes: usize) {
    /// So many rows or bytes pass before the time is looked at.
    const ROWS: u32 = 64;
    const MANY_BYTES: usize = 256 << 10;
    /// Work before a rest: with less, what a rest itself costs is felt.
    const WORK: Duration = Duration::from_millis(50);
    /// A rest is so many times as long, alone …
    const ALONE: f64 = 3.0;
    /// … and where work took half as long again as it took of a processor.
    const IN_COMPANY: f64 = 4.0;
    let (rows, before) = PASSED.get();
    let passed = (rows + count, before + bytes);
    PASSED.set(passed);
    if passed.0 < ROWS && passed.1 < MANY_BYTES {
        return;
    }
    PASSED.set((0, 0));
    let Some((since, had)) = SINCE.get() else {
        return;
    };
    let work = since.elapsed();
    if work < WORK {
        return;
    }
    let used = processor_time().saturating_sub(had);
    let factor = match work > used * 3 / 2 {
        true => IN_COMPANY,
        false => ALONE,
    };
    rest(used.mul_f64(factor));
    SINCE.set(Some(now()));
}

fn rest(mut time: Duration) {
    const SLICE: Duration = Duration::from_millis(100);
    while !time.is_zero() {
        pgrx::check_for_interrupts!();
        let slice = time.min(SLICE);
        std::thread::sleep(slice);
        time -= slice;
    }
}

fn now() -> (Instant, Duration) {
    (Instant::now(), processor_time())
}

/// Of this process.
fn processor_time() -> Duration {
    unsafe extern "C" {
        fn clock() -> c_long;
    }
    // SAFETY: of the C library; POSIX has it in microseconds, negative when not known.
    Duration::from_micros(unsafe { clock() }.try_into().unwrap_or(0))
}
