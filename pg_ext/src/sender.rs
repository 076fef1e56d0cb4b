//! A walsender that has much to send sends much at once, and reads several records for it ([`ahead`]).
//!
//! A walsender hands each message of the stream to the kernel by itself, and its receiver is woken
//! for each. Where a backlog is decoded that takes several times as long as the decoding. A bridge
//! asks, in the session that it will stream in, that what is sent be gathered: what goes over the
//! wire stays the same, byte for byte and in the same order, so nothing about positions or
//! keepalives changes.
//!
//! Guarantees:
//! - Changes are held only while much WAL waits to be decoded, and no longer than [`PATIENCE`], or
//!   until [`ENOUGH`] bytes are there. (While a transaction is read of which nothing is published,
//!   nobody asks: what was held before waits for its end, or for the next keepalive.)
//! - The walsender does not go to sleep on them: it asks whether to send before it does, and has not
//!   come further since it asked last.
//! - A keepalive, and the end of the stream, go out at once, with what is before them.
//!
//! It works in the place where PostgreSQL sends (`PqCommMethods` in `libpq/libpq.h`, which parallel
//! workers replace too), not in an output plugin: servers allow those by name
//! (`output_plugin_libraries`).

mod ahead;

use std::cell::Cell;
use std::ffi::{c_char, c_int};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

/// Bytes that are worth a system call.
const ENOUGH: usize = 32 << 10;
/// Longest that a message is held back.
const PATIENCE: Duration = Duration::from_millis(2);
/// So often is asked in vain before one looks at the clock: it is asked for each record and message.
const LOOK: u32 = 8;
/// Bytes of WAL: more than nearly any record has, so that the next one is there as a whole.
const BACKLOG: u64 = 64 << 10;

/// `libpq/libpq.h`; not in pgrx's bindings.
#[repr(C)]
#[derive(Clone, Copy)]
struct CommMethods {
    comm_reset: unsafe extern "C-unwind" fn(),
    flush: unsafe extern "C-unwind" fn() -> c_int,
    flush_if_writable: unsafe extern "C-unwind" fn() -> c_int,
    is_send_pending: unsafe extern "C-unwind" fn() -> bool,
    putmessage: unsafe extern "C-unwind" fn(c_char, *const c_char, usize) -> c_int,
    putmessage_noblock: unsafe extern "C-unwind" fn(c_char, *const c_char, usize),
}

unsafe extern "C" {
    static mut PqCommMethods: *const CommMethods;
}

#[derive(Clone, Copy)]
struct Gathering {
    /// What was there before.
    socket: CommMethods,
    /// Bytes; none when all that was given to PostgreSQL has been offered to the socket.
    bytes: usize,
    /// Since when there are some.
    since: Instant,
    /// How often it was asked whether they are to be sent.
    asked: u32,
    /// Where the walsender was when it was asked last, and how many there were.
    last: (u64, usize),
    /// The WAL was flushed at least so far.
    flushed: u64,
}

thread_local! {
    static GATHERING: Cell<Option<Gathering>> = const { Cell::new(None) };
}

/// From now on, this session gathers what it sends. Nothing happens in one that is no walsender.
#[pg_extern]
fn gather_sends() {
    // SAFETY: a variable of this process.
    if !unsafe { pg_sys::am_walsender } || GATHERING.get().is_some() {
        return;
    }
    // SAFETY: set since the session began, and never to nothing.
    let socket = unsafe { *PqCommMethods };
    GATHERING.set(Some(Gathering {
        socket,
        bytes: 0,
        since: Instant::now(),
        asked: 0,
        last: (0, 0),
        flushed: 0,
    }));
    let methods = CommMethods {
        flush,
        flush_if_writable,
        is_send_pending,
        putmessage_noblock,
        ..socket
    };
    // SAFETY: it lives as long as the process, as do the functions in it.
    unsafe { PqCommMethods = Box::leak(Box::new(methods)) };
    ahead::read_several();
}

/// Our methods are called only when this is there.
fn gathering() -> Gathering {
    GATHERING.get().expect("set before the methods are")
}

/// What was held is no longer; where it goes to.
fn let_go() -> CommMethods {
    let held = gathering();
    GATHERING.set(Some(Gathering { bytes: 0, ..held }));
    held.socket
}

// No `pg_guard`: an error of what is called jumps over frames that hold nothing to be dropped.

unsafe extern "C-unwind" fn flush() -> c_int {
    // SAFETY: as PostgreSQL would call it.
    unsafe { (let_go().flush)() }
}

unsafe extern "C-unwind" fn flush_if_writable() -> c_int {
    if may_wait() {
        return 0;
    }
    // SAFETY: as PostgreSQL would call it.
    unsafe { (let_go().flush_if_writable)() }
}

/// What is held does not keep the walsender from going on. What the socket did not take does, and
/// nothing is held behind it; and so does what is to go out.
unsafe extern "C-unwind" fn is_send_pending() -> bool {
    let held = gathering();
    // SAFETY: as PostgreSQL would call it.
    !(1..ENOUGH).contains(&held.bytes) && unsafe { (held.socket.is_send_pending)() }
}

unsafe extern "C-unwind" fn putmessage_noblock(kind: c_char, message: *const c_char, len: usize) {
    let mut held = gathering();
    if held.bytes == 0 {
        (held.since, held.asked) = (Instant::now(), 0);
    }
    // SAFETY: a message of the stream has a byte that says what it is.
    let data = kind as u8 == b'd' && len > 0 && unsafe { *message as u8 } == b'w';
    // SAFETY: as PostgreSQL would call it.
    let pending = held.bytes == 0 && unsafe { (held.socket.is_send_pending)() };
    if !data {
        held.bytes = ENOUGH;
    } else if !pending {
        held.bytes += len;
    }
    GATHERING.set(Some(held));
    // SAFETY: as PostgreSQL would call it.
    unsafe { (held.socket.putmessage_noblock)(kind, message, len) }
}

fn may_wait() -> bool {
    let mut held = gathering();
    if held.bytes == 0 || held.bytes >= ENOUGH {
        return false;
    }
    // SAFETY: of this process, which is a walsender; nobody else writes it.
    let sent = unsafe { (*pg_sys::MyWalSnd).sentPtr };
    let moves = held.last != (sent, held.bytes);
    held.last = (sent, held.bytes);
    held.asked += 1;
    let waits = moves && much_is_waiting(&mut held, sent);
    GATHERING.set(Some(held));
    // A look at the clock costs as much as all else here.
    waits && (!held.asked.is_multiple_of(LOOK) || held.since.elapsed() < PATIENCE)
}

/// The same behind a record that was read.
fn much_waits_behind(position: u64) -> bool {
    let mut held = gathering();
    let waits = much_is_waiting(&mut held, position);
    GATHERING.set(Some(held));
    waits
}

/// Whether the walsender has more WAL before it than it will look at in one step.
fn much_is_waiting(held: &mut Gathering, sent: u64) -> bool {
    let beyond = sent + BACKLOG;
    if beyond > held.flushed {
        // SAFETY: of this process; the timeline is not asked for.
        held.flushed = match unsafe { pg_sys::RecoveryInProgress() || waits_for_standbys() } {
            true => 0,
            false => unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) },
        };
    }
    beyond <= held.flushed
}

/// A failover slot sends nothing that certain standbys do not have (`synchronized_standby_slots`).
unsafe fn waits_for_standbys() -> bool {
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    // SAFETY: a slot that this process holds stays where it is.
    unsafe {
        let slot = pg_sys::MyReplicationSlot;
        return !slot.is_null() && (*slot).data.failover;
    }
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    false
}
