//! What a table brings along to be run runs with the rights of whom the table belongs to.
//!
//! A bridge writes and reads as a superuser, and so do functions of the extension that look at
//! tables of others. What a table brings along to be run (triggers that fire on replicas,
//! expressions and predicates of indexes, constraints and defaults, checks of domains) is its
//! owner's code, and an owner may be anyone who may make a table, at the top or here. Reading
//! is enough for some of it: a plan evaluates what is the same for all rows.
//!
//! Guarantee: in a session that called `terrace.write_as_owners()`, to its end, and in functions
//! that SET `terrace.as_owners`, whatever a statement evaluates runs as the owner of the table
//! that it changes, or else reads, unless that is a superuser, in a security-restricted operation
//! as PostgreSQL's own maintenance of indexes does it; settings that it changes are taken back.
//! Who may change or read the rows is asked before that: an owner that took a right from itself,
//! or put policies over itself, is not in the way. Values come in as text or as PostgreSQL's own
//! types, and become what they are within the statement ([`read_value_wrapper`]): where values
//! are bound nothing can be hooked. What cannot be told apart (views in place of tables, rules,
//! partitions of somebody else) is refused.
//!
//! The hooks are of PostgreSQL's way through a statement, in their order: [`on_analysis`],
//! [`on_plan`], [`on_start`] with [`on_permissions`], [`on_run`], [`on_finish`]; COPY and
//! TRUNCATE pass [`before_utility`]. An error ends the transaction or a part of it, which puts
//! user and settings back by itself; the frames of the hooks hold nothing to be dropped, and
//! what may raise an error through pgrx is guarded.

mod whose;

use std::cell::Cell;
use std::ffi::{c_char, c_int};
use std::ptr::{null, null_mut, replace};

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_sys::{self, NodeTag, Oid};
use pgrx::prelude::*;

/// For functions that look at tables of others.
static AS_OWNERS: GucSetting<bool> = GucSetting::<bool>::new(false);

thread_local! {
    /// For sessions; nothing takes it back.
    static ALWAYS: Cell<bool> = const { Cell::new(false) };
    /// Who is to be when the permissions of the statement that starts have been looked at.
    static STARTS_AS: Cell<Option<Oid>> = const { Cell::new(None) };
    static NEXT_ANALYSIS: Cell<pg_sys::post_parse_analyze_hook_type> = const { Cell::new(None) };
    static NEXT_PLAN: Cell<pg_sys::planner_hook_type> = const { Cell::new(None) };
    static NEXT_START: Cell<pg_sys::ExecutorStart_hook_type> = const { Cell::new(None) };
    static NEXT_PERMISSIONS: Cell<pg_sys::ExecutorCheckPerms_hook_type> = const { Cell::new(None) };
    static NEXT_RUN: Cell<pg_sys::ExecutorRun_hook_type> = const { Cell::new(None) };
    static NEXT_FINISH: Cell<pg_sys::ExecutorFinish_hook_type> = const { Cell::new(None) };
}

/// Called once, when the library is loaded.
pub fn init() {
    GucRegistry::define_bool_guc(
        c"terrace.as_owners",
        c"Whether what tables bring along to be run has their owners' rights.",
        c"For functions of the extension.",
        &AS_OWNERS,
        GucContext::Suset,
        GucFlags::default(),
    );
    // SAFETY: hooks are of this process, which runs one session in one thread; those that
    // were there before are called by ours.
    unsafe {
        NEXT_ANALYSIS.set(replace(
            &raw mut pg_sys::post_parse_analyze_hook,
            Some(on_analysis),
        ));
        NEXT_PLAN.set(replace(&raw mut pg_sys::planner_hook, Some(on_plan)));
        NEXT_START.set(replace(&raw mut pg_sys::ExecutorStart_hook, Some(on_start)));
        NEXT_PERMISSIONS.set(replace(
            &raw mut pg_sys::ExecutorCheckPerms_hook,
            Some(on_permissions),
        ));
        NEXT_RUN.set(replace(&raw mut pg_sys::ExecutorRun_hook, Some(on_run)));
        NEXT_FINISH.set(replace(
            &raw mut pg_sys::ExecutorFinish_hook,
            Some(on_finish),
        ));
    }
}

/// From now on, to its end, this session runs what tables bring along as their owners.
#[pg_extern]
fn write_as_owners() {
    ALWAYS.set(true);
}

fn is_wanted() -> bool {
    ALWAYS.get() || AS_OWNERS.get()
}

// As in pgrx's bindings, but an error passes by as it is, with its position and context.
unsafe extern "C-unwind" {
    #[link_name = "standard_planner"]
    fn plan(
        query: *mut pg_sys::Query,
        text: *const c_char,
        options: c_int,
        parameters: pg_sys::ParamListInfo,
    ) -> *mut pg_sys::PlannedStmt;
    #[link_name = "standard_ExecutorStart"]
    fn start(query: *mut pg_sys::QueryDesc, flags: c_int);
    #[cfg(not(feature = "pg18"))]
    #[link_name = "standard_ExecutorRun"]
    fn run(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
        once: bool,
    );
    #[cfg(feature = "pg18")]
    #[link_name = "standard_ExecutorRun"]
    fn run(query: *mut pg_sys::QueryDesc, direction: pg_sys::ScanDirection::Type, count: u64);
    #[link_name = "standard_ExecutorFinish"]
    fn finish(query: *mut pg_sys::QueryDesc);
    #[link_name = "BeginCopyFrom"]
    fn begin_copy(
        state: *mut pg_sys::ParseState,
        table: pg_sys::Relation,
        condition: *mut pg_sys::Node,
        file: *const c_char,
        is_program: bool,
        source: pg_sys::copy_data_source_cb,
        columns: *mut pg_sys::List,
        options: *mut pg_sys::List,
    ) -> pg_sys::CopyFromState;
    #[link_name = "CopyFrom"]
    fn copy(state: pg_sys::CopyFromState) -> u64;
}

/// Who the session was, to be so again.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Before {
    user: Oid,
    context: c_int,
    /// Of the settings; 0 when nobody else became.
    level: c_int,
}

impl Before {
    const UNCHANGED: Before = Before {
        user: pg_sys::InvalidOid,
        context: 0,
        level: 0,
    };

    /// Notes who the session is, and begins a nesting level of settings.
    ///
    /// # Safety
    /// Inside a transaction.
    unsafe fn note() -> Before {
        let mut before = Before::UNCHANGED;
        // SAFETY: as said.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut before.user, &mut before.context);
            before.level = pg_sys::NewGUCNestLevel();
        }
        before
    }
}

/// As `owner`, in a restricted operation, if there is one to become.
///
/// # Safety
/// Inside a transaction.
unsafe fn change(owner: Option<Oid>) -> Before {
    let Some(owner) = owner else {
        return Before::UNCHANGED;
    };
    // SAFETY: as said.
    unsafe {
        let before = Before::note();
        be(owner);
        before
    }
}

/// # Safety
/// Inside a transaction, between [`Before::note`] and [`change_back`].
unsafe fn be(owner: Oid) {
    let restricted = pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION;
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: as said.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(owner, context | restricted as c_int);
    }
}

/// As it was.
///
/// # Safety
/// What [`change`] or [`before_utility`] gave, in the same part of the transaction.
#[pg_guard]
pub unsafe extern "C-unwind" fn change_back(before: Before) {
    if before.level != 0 {
        // SAFETY: as said.
        unsafe {
            pg_sys::AtEOXact_GUC(false, before.level);
            pg_sys::SetUserIdAndSecContext(before.user, before.context);
        }
    }
}

/// Tells PostgreSQL how [`read_value_wrapper`] is called (`fmgr.h`, PG_FUNCTION_INFO_V1).
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_finfo_read_value_wrapper() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The value that a text stands for, as the type's input function reads it: a cast may be
/// anybody's, and cuts what does not fit. The type is the one that the call gives.
///
/// # Safety
/// Called by PostgreSQL alone.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn read_value_wrapper(
    call: pg_sys::FunctionCallInfo,
) -> pg_sys::Datum {
    // SAFETY: a call of two arguments, the first one a text or NULL.
    unsafe {
        let text = (*call).args.as_slice(2)[0];
        let value = match text.isnull {
            true => null_mut(),
            false => pg_sys::text_to_cstring(
                pg_sys::pg_detoast_datum_packed(text.value.cast_mut_ptr()).cast(),
            ),
        };
        let kind = pg_sys::get_fn_expr_rettype((*call).flinfo);
        let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        pg_sys::getTypeInputInfo(kind, &mut input, &mut parameter);
        // Also of NULL, which a domain may not allow.
        let read = pg_sys::OidInputFunctionCall(input, value, parameter, -1);
        (*call).isnull = text.isnull;
        read
    }
}

/// What stands in place of a table puts statements in place of ours before anybody can tell
/// whose they are.
#[pg_guard]
unsafe extern "C-unwind" fn on_analysis(
    state: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jumble: *mut pg_sys::JumbleState,
) {
    // SAFETY: as PostgreSQL called us.
    unsafe {
        if is_wanted() {
            whose::refuse_replaced(query);
        }
        if let Some(next) = NEXT_ANALYSIS.get() {
            pg_sys::ffi::pg_guard_ffi_boundary(|| next(state, query, jumble));
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_plan(query: *mut pg_sys::Query) -> Before {
    // SAFETY: as PostgreSQL called us.
    unsafe {
        let wanted = is_wanted();
        change(wanted.then(|| whose::of_query(query)).flatten())
    }
}

/// What is the same for all rows is evaluated when the plan is made.
unsafe extern "C-unwind" fn on_plan(
    query: *mut pg_sys::Query,
    text: *const c_char,
    options: c_int,
    parameters: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: as PostgreSQL called us, so do we.
    unsafe {
        let before = before_plan(query);
        let planned = NEXT_PLAN.get().unwrap_or(plan)(query, text, options, parameters);
        change_back(before);
        planned
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_start(query: *mut pg_sys::QueryDesc) -> Before {
    // SAFETY: as PostgreSQL called us.
    unsafe {
        // Permissions come first.
        let owner = owner_of(query);
        STARTS_AS.set(owner);
        owner.map_or(Before::UNCHANGED, |_| Before::note())
    }
}

unsafe extern "C-unwind" fn on_start(query: *mut pg_sys::QueryDesc, flags: c_int) {
    // SAFETY: as PostgreSQL called us, so do we.
    unsafe {
        let before = before_start(query);
        NEXT_START.get().unwrap_or(start)(query, flags);
        change_back(before);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn after_permissions() {
    if let Some(owner) = STARTS_AS.take() {
        // SAFETY: `before_start` opened the level of settings, and `on_start` ends this.
        unsafe { be(owner) };
    }
}

#[cfg(feature = "pg15")]
unsafe extern "C-unwind" fn on_permissions(tables: *mut pg_sys::List, raise: bool) -> bool {
    // SAFETY: as PostgreSQL called us.
    unsafe {
        let granted = NEXT_PERMISSIONS
            .get()
            .is_none_or(|next| next(tables, raise));
        after_permissions();
        granted
    }
}

#[cfg(not(feature = "pg15"))]
unsafe extern "C-unwind" fn on_permissions(
    tables: *mut pg_sys::List,
    wanted: *mut pg_sys::List,
    raise: bool,
) -> bool {
    // SAFETY: as PostgreSQL called us.
    unsafe {
        let granted = NEXT_PERMISSIONS
            .get()
            .is_none_or(|next| next(tables, wanted, raise));
        after_permissions();
        granted
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_run(query: *mut pg_sys::QueryDesc) -> Before {
    // SAFETY: as PostgreSQL called us.
    unsafe { change(owner_of(query)) }
}

#[cfg(not(feature = "pg18"))]
unsafe extern "C-unwind" fn on_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    once: bool,
) {
    // SAFETY: as PostgreSQL called us, so do we.
    unsafe {
        let before = before_run(query);
        NEXT_RUN.get().unwrap_or(run)(query, direction, count, once);
        change_back(before);
    }
}

#[cfg(feature = "pg18")]
unsafe extern "C-unwind" fn on_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
) {
    // SAFETY: as PostgreSQL called us, so do we.
    unsafe {
        let before = before_run(query);
        NEXT_RUN.get().unwrap_or(run)(query, direction, count);
        change_back(before);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_finish(query: *mut pg_sys::QueryDesc) -> Before {
    // SAFETY: as PostgreSQL called us.
    unsafe {
        let owner = owner_of(query);
        if is_wanted() {
            whose::put_nothing_off(query, owner);
        }
        change(owner)
    }
}

/// # Safety
/// `query` has a plan.
unsafe fn owner_of(query: *mut pg_sys::QueryDesc) -> Option<Oid> {
    // SAFETY: as said.
    is_wanted()
        .then(|| unsafe { whose::of_plan(query) })
        .flatten()
}

/// Triggers after the statement.
unsafe extern "C-unwind" fn on_finish(query: *mut pg_sys::QueryDesc) {
    // SAFETY: as PostgreSQL called us, so do we.
    unsafe {
        let before = before_finish(query);
        NEXT_FINISH.get().unwrap_or(finish)(query);
        change_back(before);
    }
}

/// What is done about a utility statement.
#[derive(Clone, Copy)]
#[repr(C)]
pub enum Turn {
    /// It is run, and then this taken back.
    Run(Before),
    /// It is a COPY, to be done as this owner.
    Copy(Oid),
}

/// Becomes whom a TRUNCATE takes, or tells whom a COPY does.
///
/// # Safety
/// As PostgreSQL hands the statement to its hook.
#[pg_guard]
pub unsafe extern "C-unwind" fn before_utility(node: *mut pg_sys::Node) -> Turn {
    // SAFETY: a node's tag says what it is.
    unsafe {
        match (*node).type_ {
            _ if !is_wanted() => Turn::Run(Before::UNCHANGED),
            NodeTag::T_CopyStmt => {
                let owner = whose::of_copy(&*node.cast());
                owner.map_or(Turn::Run(Before::UNCHANGED), Turn::Copy)
            }
            NodeTag::T_TruncateStmt => Turn::Run(change(whose::of_truncate(&*node.cast()))),
            _ => Turn::Run(Before::UNCHANGED),
        }
    }
}

/// A COPY under way.
#[derive(Clone, Copy)]
#[repr(C)]
struct Copying {
    table: pg_sys::Relation,
    state: *mut pg_sys::ParseState,
    before: Before,
}

/// As `DoCopy` of `commands/copy.c` does it after its look at the permissions, which a
/// superuser has.
///
/// # Safety
/// A COPY of this session's client into a table.
#[pg_guard]
unsafe extern "C-unwind" fn before_copy(
    owner: Oid,
    statement: *mut pg_sys::CopyStmt,
    text: *const c_char,
) -> Copying {
    let lock = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: as said.
    unsafe {
        let table = pg_sys::table_openrv((*statement).relation, lock);
        let state = pg_sys::make_parsestate(null_mut());
        (*state).p_sourcetext = text;
        pg_sys::addRangeTableEntryForRelation(state, table, lock, null_mut(), false, false);
        let before = change(Some(owner));
        Copying {
            table,
            state,
            before,
        }
    }
}

/// # Safety
/// What [`before_copy`] gave, when all has been copied.
#[pg_guard]
unsafe extern "C-unwind" fn after_copy(copying: Copying, rows: pg_sys::CopyFromState) {
    // SAFETY: as said.
    unsafe {
        pg_sys::EndCopyFrom(rows);
        change_back(copying.before);
        pg_sys::free_parsestate(copying.state);
        pg_sys::table_close(copying.table, pg_sys::NoLock as pg_sys::LOCKMODE);
    }
}

/// Does a COPY as `owner`.
///
/// # Safety
/// As [`before_copy`]. Nothing here is to be dropped when an error jumps over it.
pub unsafe fn copy_as(
    owner: Oid,
    statement: *mut pg_sys::CopyStmt,
    text: *const c_char,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: as said.
    unsafe {
        let copying = before_copy(owner, statement, text);
        let rows = begin_copy(
            copying.state,
            copying.table,
            null_mut(),
            null(),
            false,
            None,
            (*statement).attlist,
            (*statement).options,
        );
        let count = copy(rows);
        after_copy(copying, rows);
        if let Some(completion) = completion.as_mut() {
            completion.commandTag = pg_sys::CommandTag::CMDTAG_COPY;
            completion.nprocessed = count;
        }
    }
}
