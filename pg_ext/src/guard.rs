//! Sessions that may look and do nothing else, whatever their role may do.
//!
//! A role may always change itself: its password, its settings, who is a member of it,
//! and give away what was granted to it. No REVOKE and no attribute takes that from it.
//! So a relay calls `terrace.guard_session()` in each session that it passes on, before
//! the client says anything.
//!
//! Guarantee: in such a session, to its end, only commands of [`ALLOWED`] run, also from
//! inside functions and DO blocks, and none of the functions [`REFUSED`].

use std::cell::Cell;
use std::ffi::{c_int, c_void};

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
    static NEXT_ACCESS: Cell<pg_sys::object_access_hook_type> = const { Cell::new(None) };
}

/// What reading takes, for psql, pg_dump, subscriptions and drivers.
const ALLOWED: &[NodeTag] = &[
    NodeTag::T_TransactionStmt,
    NodeTag::T_VariableSetStmt,
    NodeTag::T_VariableShowStmt,
    NodeTag::T_DiscardStmt,
    NodeTag::T_PrepareStmt,
    NodeTag::T_ExecuteStmt,
    NodeTag::T_DeallocateStmt,
    NodeTag::T_DeclareCursorStmt,
    NodeTag::T_FetchStmt,
    NodeTag::T_ClosePortalStmt,
    NodeTag::T_CopyStmt,
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
            Some(tag) => ALLOWED.contains(&tag),
            None => false,
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
