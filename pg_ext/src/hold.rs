//! Writers of a table held off by a session over several of its transactions.
//!
//! The lock is the session's (`LockRelationIdForSession` in `lmgr.c`), so what this session locks in
//! each transaction does not queue behind those who wait for it. PostgreSQL gives such a lock back
//! when a transaction fails, and expects whoever took it to do so otherwise.
//!
//! Guarantee: it is gone when the session is, however that ends.

use std::cell::{Cell, RefCell};
use std::ffi::c_int;

use pgrx::prelude::*;

thread_local! {
    static HELD: RefCell<Vec<pg_sys::LockRelId>> = const { RefCell::new(Vec::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

const MODE: pg_sys::LOCKMODE = pg_sys::ShareRowExclusiveLock as pg_sys::LOCKMODE;

/// Takes SHARE ROW EXCLUSIVE on a table to the end of the session, or of a transaction of it that fails.
#[pg_extern]
fn hold_for_session(table: pg_sys::Oid) {
    if !REGISTERED.replace(true) {
        // SAFETY: the callback is a plain function that lives as long as the library.
        unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0)) };
    }
    // SAFETY: the identity lives through the call, which copies it.
    let id = unsafe {
        let mut id = pg_sys::LockRelId {
            relId: table,
            dbId: pg_sys::MyDatabaseId,
        };
        pg_sys::LockRelationIdForSession(&mut id, MODE);
        id
    };
    HELD.with_borrow_mut(|held| held.push(id));
}

/// At the end of a transaction that failed, PostgreSQL has let go of all (`ProcReleaseLocks`).
pub fn forget() {
    HELD.take();
}

/// The transaction goes first, as it does in PostgreSQL's own callback (`ShutdownPostgres`), which
/// comes after this one.
#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
    // SAFETY: the session ends; aborting again comes to nothing.
    unsafe { pg_sys::AbortOutOfAnyTransaction() };
    for mut id in HELD.take() {
        // SAFETY: this session took it, and has not given it back.
        unsafe { pg_sys::UnlockRelationIdForSession(&mut id, MODE) };
    }
}
