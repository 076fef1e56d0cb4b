//! The hook on utility statements: each passes the guard of its session ([`crate::guard`]), DDL
//! that travels is told ([`crate::ddl`]), and what a table brings along runs as its owner
//! ([`crate::owner`]).

use std::cell::Cell;
use std::ffi::c_char;

use pgrx::pg_sys::{self, ProcessUtilityContext};

use crate::{ddl, owner};

thread_local! {
    static NEXT: Cell<pg_sys::ProcessUtility_hook_type> = const { Cell::new(None) };
}

/// Called once, when the library is loaded.
pub fn init() {
    // SAFETY: hooks are of this process, which runs one session in one thread; one that
    // was there before is called by ours.
    unsafe {
        NEXT.set(pg_sys::ProcessUtility_hook);
        pg_sys::ProcessUtility_hook = Some(on_utility);
    }
}

unsafe extern "C-unwind" {
    // tcop/utility.c; as in pgrx's bindings, but an error of the statement passes by as it is.
    #[link_name = "standard_ProcessUtility"]
    fn process(
        statement: *mut pg_sys::PlannedStmt,
        text: *const c_char,
        read_only: bool,
        context: ProcessUtilityContext::Type,
        parameters: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        destination: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

/// No `pg_guard`: an error of the statement jumps over this frame, which holds nothing that
/// would have to be dropped, and keeps its position and context.
#[allow(clippy::too_many_arguments)]
unsafe extern "C-unwind" fn on_utility(
    statement: *mut pg_sys::PlannedStmt,
    text: *const c_char,
    read_only: bool,
    context: ProcessUtilityContext::Type,
    parameters: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    destination: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: PostgreSQL hands a utility statement in, and takes our call for its own.
    unsafe {
        let told = ddl::before(statement, text, context);
        let node = (*statement).utilityStmt;
        let before = match owner::before_utility(node) {
            owner::Turn::Run(before) => before,
            owner::Turn::Copy(owner) => {
                return owner::copy_as(owner, node.cast(), text, completion);
            }
        };
        let run = NEXT.get().unwrap_or(process);
        run(
            statement,
            text,
            read_only,
            context,
            parameters,
            environment,
            destination,
            completion,
        );
        owner::change_back(before);
        if told != ddl::NOT_TOLD {
            ddl::after(told);
        }
    }
}
