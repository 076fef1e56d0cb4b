//! Sessions that may look and do nothing else, whatever their role may do.
//!
//! A role may always change itself: its password, its settings, who is a member of it,
//! and give away what was granted to it. No REVOKE and no attribute takes that from it.
//! So a relay calls `terrace.guard_session()` in each session that it passes on, before
//! the client says anything.
//!
//! Guarantee: in such a session, to its end, only commands of [`ALLOWED`] run, also from
//! inside functions and DO blocks, and none of the functions [`REFUSED`]. No row is changed
//! but in the extension's own tables, which only its functions write, whoever owns a
//! function that would. No transaction outlives the session.

use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};

use pgrx::pg_sys::{self, NodeTag, ObjectAccessType};
use pgrx::prelude::*;

// PostgreSQL 17 gave it a fourth argument, and with it another name here.
#[cfg(any(feature = "pg15", feature = "pg16"))]
use pg_sys::{
    F_PG_LOGICAL_EMIT_MESSAGE_BOOL_TEXT_BYTEA as EMIT_BYTES,
    F_PG_LOGICAL_EMIT_MESSAGE_BOOL_TEXT_TEXT as EMIT_TEXT,
};
#[cfg(any(feature = "pg17", feature = "pg18"))]
use pg_sys::{
    F_PG_LOGICAL_EMIT_MESSAGE_BOOL_TEXT_BYTEA_BOOL as EMIT_BYTES,
    F_PG_LOGICAL_EMIT_MESSAGE_BOOL_TEXT_TEXT_BOOL as EMIT_TEXT,
};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    static NEXT_START: Cell<pg_sys::ExecutorStart_hook_type> = const { Cell::new(None) };
    static NEXT_ACCESS: Cell<pg_sys::object_access_hook_type> = const { Cell::new(None) };
}

/// What reading takes, for psql, pg_dump, subscriptions and drivers.
const ALLOWED: &[NodeTag] = &[
    NodeTag::T_VariableSetStmt,
    NodeTag::T_VariableShowStmt,
    NodeTag::T_DiscardStmt,
    NodeTag::T_PrepareStmt,
    NodeTag::T_ExecuteStmt,
    NodeTag::T_DeallocateStmt,
    NodeTag::T_DeclareCursorStmt,
    NodeTag::T_FetchStmt,
    NodeTag::T_ClosePortalStmt,
    NodeTag::T_LockStmt,
    NodeTag::T_ConstraintsSetStmt,
    NodeTag::T_DoStmt,
    NodeTag::T_CallStmt,
    NodeTag::T_ListenStmt,
    NodeTag::T_UnlistenStmt,
];

/// Functions of everybody that leave something behind or speak to others.
const REFUSED: &[u32] = &[
    pg_sys::F_LO_CREAT,
    pg_sys::F_LO_CREATE,
    pg_sys::F_LO_FROM_BYTEA,
    pg_sys::F_LO_PUT,
    pg_sys::F_LOWRITE,
    pg_sys::F_PG_NOTIFY,
    pg_sys::F_PG_CANCEL_BACKEND,
    pg_sys::F_PG_TERMINATE_BACKEND,
    EMIT_TEXT,
    EMIT_BYTES,
];

/// From now on, to its end, this session only looks.
#[pg_extern]
fn guard_session() {
    if GUARDED.replace(true) {
        return;
    }
    // SAFETY: hooks are of this process, which runs one session in one thread; one that
    // was there before is called by ours.
    unsafe {
        NEXT_ACCESS.set(pg_sys::object_access_hook);
        pg_sys::object_access_hook = Some(on_access);
        NEXT_START.set(pg_sys::ExecutorStart_hook);
        pg_sys::ExecutorStart_hook = Some(on_start);
    }
}

/// For functions that write with their owner's rights.
#[pg_extern]
fn refuse_guarded() {
    refuse_if_guarded("change what is synchronised, or compare");
}

/// Raises an error in a guarded session.
pub fn refuse_if_guarded(what: &str) {
    if GUARDED.get() {
        ereport!(
            ERROR,
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("a session through a relay cannot {what}")
        );
    }
}

/// Raises an error if this utility statement does more than a guarded session may.
///
/// # Safety
/// `statement` is a parsed statement.
pub unsafe fn check_utility(statement: *mut pg_sys::Node) {
    // SAFETY: as said.
    if GUARDED.get() && !unsafe { is_allowed(statement) } {
        refuse_if_guarded("do more than read");
    }
}

/// # Safety
/// `statement` is a parsed statement or null.
unsafe fn is_allowed(statement: *mut pg_sys::Node) -> bool {
    // SAFETY: each node starts with its tag, which says what it is.
    unsafe {
        match statement.as_ref().map(|node| node.type_) {
            // EXPLAIN ANALYZE of CREATE TABLE AS would make the table by itself.
            Some(NodeTag::T_ExplainStmt) => {
                let explain = statement.cast::<pg_sys::ExplainStmt>();
                let query = (*explain).query.cast::<pg_sys::Query>();
                let explained = query.as_ref().map(|query| query.utilityStmt);
                explained.is_none_or(|inner| inner.is_null() || is_allowed(inner))
            }
            // A prepared one would hold its locks after the session, for ever.
            Some(NodeTag::T_TransactionStmt) => {
                use pg_sys::TransactionStmtKind::{
                    TRANS_STMT_COMMIT_PREPARED, TRANS_STMT_PREPARE, TRANS_STMT_ROLLBACK_PREPARED,
                };
                let kind = (*statement.cast::<pg_sys::TransactionStmt>()).kind;
                ![
                    TRANS_STMT_PREPARE,
                    TRANS_STMT_COMMIT_PREPARED,
                    TRANS_STMT_ROLLBACK_PREPARED,
                ]
                .contains(&kind)
            }
            Some(NodeTag::T_CopyStmt) => !(*statement.cast::<pg_sys::CopyStmt>()).is_from,
            Some(tag) => ALLOWED.contains(&tag),
            None => false,
        }
    }
}

/// Tables whose rows a query changes, modifying WITH parts included.
///
/// # Safety
/// `query` has a plan, which lives as long as the iterator.
pub(crate) unsafe fn changed_tables(
    query: *mut pg_sys::QueryDesc,
) -> impl Iterator<Item = pg_sys::Oid> {
    // SAFETY: as said; indexes of a plan's result relations are those of its range table, from 1.
    unsafe {
        let plan = (*query).plannedstmt;
        let (results, tables) = ((*plan).resultRelations, (*plan).rtable);
        let count = results.as_ref().map_or(0, |list| list.length);
        (0..count).map(move |at| {
            let index = (*(*results).elements.add(at as usize)).int_value;
            let entry = *(*tables).elements.add(index as usize - 1);
            let entry = entry.ptr_value.cast::<pg_sys::RangeTblEntry>();
            (*entry).relid
        })
    }
}

/// # Safety
/// Inside a transaction.
unsafe fn is_extensions_own(table: pg_sys::Oid) -> bool {
    // SAFETY: as said; a name that is found is copied by PostgreSQL, and lives until the transaction ends.
    unsafe {
        let name = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(table));
        !name.is_null() && CStr::from_ptr(name) == c"terrace"
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_start(query: *mut pg_sys::QueryDesc, flags: c_int) {
    // SAFETY: a query about to start has a plan, whose lists live as long; as PostgreSQL
    // called us, so do we.
    unsafe {
        if changed_tables(query).any(|table| !is_extensions_own(table)) {
            refuse_if_guarded("change rows");
        }
        match NEXT_START.get() {
            Some(next) => pg_sys::ffi::pg_guard_ffi_boundary(|| next(query, flags)),
            None => pg_sys::standard_ExecutorStart(query, flags),
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_access(
    access: ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    part: c_int,
    argument: *mut c_void,
) {
    if access == ObjectAccessType::OAT_FUNCTION_EXECUTE
        && class == pg_sys::ProcedureRelationId
        && REFUSED.contains(&object.to_u32())
    {
        refuse_if_guarded("call this function");
    }
    if let Some(next) = NEXT_ACCESS.get() {
        // SAFETY: as PostgreSQL called us.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| next(access, class, object, part, argument));
        }
    }
}
