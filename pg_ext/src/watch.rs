//! Tables whose definition a session relies on from one transaction to the next.
//!
//! Guarantee: once a session has a table watched, any change of its definition is told by
//! `terrace.take_altered()` at the latest in the first transaction that holds a lock on the table
//! which that change could not have been made under. PostgreSQL sends invalidations before it
//! releases the locks of a commit, and takes those of others in whenever it gets a lock
//! (`LockRelationOid` in `lmgr.c`, `AcceptInvalidationMessages` in `inval.c`). A schema that is given
//! another name, for which no table is locked, is taken for a change of all of them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use pgrx::prelude::*;

thread_local! {
    /// By OID: whether it has been altered, or may have been.
    static WATCHED: RefCell<BTreeMap<u32, bool>> = const { RefCell::new(BTreeMap::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Watches a table from now on. What is looked up after this is watched without a gap.
#[pg_extern]
fn watch(table: pg_sys::Oid) -> pg_sys::Oid {
    if !REGISTERED.replace(true) {
        let nothing = pg_sys::Datum::from(0);
        let schemas = pg_sys::SysCacheIdentifier::NAMESPACEOID as i32;
        // SAFETY: the callbacks are plain functions that live as long as the library; there is room
        // for ten of tables and 64 of others in a session, and these are one of each.
        unsafe {
            pg_sys::CacheRegisterRelcacheCallback(Some(on_invalidation), nothing);
            pg_sys::CacheRegisterSyscacheCallback(schemas, Some(on_schema), nothing);
        }
    }
    // What has not been told of yet stays so: it may be somebody else who knows the table.
    WATCHED.with_borrow_mut(|watched| {
        watched.entry(table.to_u32()).or_insert(false);
    });
    table
}

/// Watched tables that have been altered, or may have been, since they were watched or last told
/// of. NULL when there is none.
#[pg_extern]
fn take_altered() -> Option<Vec<pg_sys::Oid>> {
    let altered: Vec<pg_sys::Oid> = WATCHED.with_borrow_mut(|watched| {
        let altered = watched.iter_mut().filter(|(_, altered)| **altered);
        altered
            .map(|(table, altered)| {
                *altered = false;
                pg_sys::Oid::from(*table)
            })
            .collect()
    });
    (!altered.is_empty()).then_some(altered)
}

/// A schema was made, renamed or dropped: any table may be another.
unsafe extern "C-unwind" fn on_schema(arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    // SAFETY: it is called as that one is.
    unsafe { on_invalidation(arg, pg_sys::InvalidOid) }
}

/// Runs in the midst of PostgreSQL's caches: it only takes note. No OID stands for all tables.
unsafe extern "C-unwind" fn on_invalidation(_arg: pg_sys::Datum, table: pg_sys::Oid) {
    WATCHED.with(|watched| {
        let Ok(mut watched) = watched.try_borrow_mut() else {
            return;
        };
        if table == pg_sys::InvalidOid {
            watched.values_mut().for_each(|altered| *altered = true);
        } else if let Some(altered) = watched.get_mut(&table.to_u32()) {
            *altered = true;
        }
    });
}
