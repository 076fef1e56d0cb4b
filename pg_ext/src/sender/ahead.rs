//! A walsender that has much to read reads several records at a time.
//!
//! A walsender asks the kernel before each record of WAL whether its client has said something, and
//! the clock twice. While it works off a backlog that is more than a third of what it does, where
//! records are small. So what decodes a record goes on with those that follow, if they are there
//! already: each is read and decoded as the walsender itself would (`XLogSendLogical` in
//! `walsender.c`), in the same order, by the same functions.
//!
//! Guarantees:
//! - A record is read ahead only where much WAL waits behind it, so that reading it waits for nothing.
//! - The walsender tells of a position when all before it is decoded, as ever: it takes it from the
//!   reader (`sentPtr`); a message that goes out meanwhile tells an earlier one.
//! - After [`AT_ONCE`] records the walsender has its turn: its client is heard, its settings are read
//!   anew, it ends when it is to end.
//! - Nothing else that decodes WAL in such a session is changed: a slot that is made, or moved on,
//!   stops at the record where it is to stop.
//!
//! It works in the table by which PostgreSQL finds what decodes a record (`RmgrTable`, in which
//! extensions register resource managers of their own), in the memory of this process alone.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::ptr::null_mut;

use pg_sys::{LogicalDecodingContext, RmgrIds as Rmgr, WalSndState as State, XLogReaderState};
use pgrx::pg_sys;

/// Records that are read before the client is heard again: some 100 us of work, but where a
/// large transaction ends, which takes as long at any rate.
const AT_ONCE: usize = 64;

/// Of what changes tables, ends transactions, and is a message.
const DECODED: [Rmgr::Type; 4] = [
    Rmgr::RM_XACT_ID,
    Rmgr::RM_HEAP2_ID,
    Rmgr::RM_HEAP_ID,
    Rmgr::RM_LOGICALMSG_ID,
];

/// `replication/decode.h`; not in pgrx's bindings.
#[repr(C)]
struct XLogRecordBuffer {
    origptr: u64,
    endptr: u64,
    record: *mut XLogReaderState,
}

type Decode =
    unsafe extern "C-unwind" fn(*mut LogicalDecodingContext, *mut pg_sys::XLogRecordBuffer);

// Not as pgrx binds them: their errors are to go where the walsender's own go.
unsafe extern "C-unwind" {
    fn XLogReadRecord(reader: *mut XLogReaderState, problem: *mut *mut c_char) -> *mut c_void;
    fn LogicalDecodingProcessRecord(
        context: *mut LogicalDecodingContext,
        reader: *mut XLogReaderState,
    );
}

thread_local! {
    /// What decodes the records of each of [`DECODED`].
    static DECODE: Cell<[Option<Decode>; DECODED.len()]> = const { Cell::new([None; DECODED.len()]) };
    /// A record that was read ahead is being decoded. It stays so after an error, which ends the
    /// stream; what the session streams then is read one by one.
    static IS_AHEAD: Cell<bool> = const { Cell::new(false) };
}

/// From now on, for as long as the process lives. To be called once.
pub fn read_several() {
    let mut found = [None; DECODED.len()];
    for (decode, id) in found.iter_mut().zip(DECODED) {
        // SAFETY: a table of this process that has an entry for each of PostgreSQL's own.
        let manager = unsafe {
            let table = (&raw mut pg_sys::RmgrTable).cast::<pg_sys::RmgrData>();
            &mut *table.add(id as usize)
        };
        *decode = manager.rm_decode.replace(decode_and_go_on);
    }
    DECODE.set(found);
}

// No `pg_guard`: an error of what is called jumps over frames that hold nothing to be dropped.

unsafe extern "C-unwind" fn decode_and_go_on(
    context: *mut LogicalDecodingContext,
    buffer: *mut pg_sys::XLogRecordBuffer,
) {
    // SAFETY: PostgreSQL gives the record that it has read, which has come here by its manager.
    let id = unsafe {
        let reader = (*buffer.cast::<XLogRecordBuffer>()).record;
        Rmgr::Type::from((*(*reader).record).header.xl_rmid)
    };
    let index = DECODED.iter().position(|known| *known == id);
    if let Some(decode) = index.and_then(|index| DECODE.get()[index]) {
        // SAFETY: as PostgreSQL would call it.
        unsafe { decode(context, buffer) };
    }
    // Nobody looks at the record any more (`LogicalDecodingProcessRecord`).
    if !IS_AHEAD.replace(true) {
        // SAFETY: the context is the caller's, who goes on with what comes after.
        unsafe { go_on(context) };
        IS_AHEAD.set(false);
    }
}

unsafe fn go_on(context: *mut LogicalDecodingContext) {
    // SAFETY: of this process, which is a walsender; nobody else writes it.
    let state = unsafe { (*pg_sys::MyWalSnd).state };
    if ![State::WALSNDSTATE_CATCHUP, State::WALSNDSTATE_STREAMING].contains(&state) {
        return;
    }
    // SAFETY: of the context, as long as that.
    let reader = unsafe { (*context).reader };
    for _ in 1..AT_ONCE {
        // SAFETY: the reader stands behind the last record.
        if !super::much_waits_behind(unsafe { (*reader).EndRecPtr }) {
            return;
        }
        let mut problem = null_mut();
        // SAFETY: as the walsender would call them.
        unsafe {
            // It will read the same, and say what is wrong.
            if XLogReadRecord(reader, &mut problem).is_null() {
                return;
            }
            LogicalDecodingProcessRecord(context, reader);
        }
    }
}
