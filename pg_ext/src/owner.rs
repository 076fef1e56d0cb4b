//! Rows are written with the rights of whom their table belongs to.
//!
//! A bridge writes as a superuser. What a table brings along to be run when its rows change
//! (triggers that fire on replicas, expressions of indexes, constraints and defaults, checks of
//! domains) is its owner's code, and an owner may be anyone who may make a table, at the top or
//! here.
//!
//! Guarantee: in a session that called `terrace.write_as_owners()`, to its end, whatever a
//! statement that changes a table's rows evaluates runs as the table's owner, unless that is a
//! superuser, in a security-restricted operation as PostgreSQL's own maintenance of indexes
//! does it; settings that it changes are taken back. Who may change the rows is asked before
//! that: an owner that took a right from itself, or put policies over itself, is not in the way.
//! Values come in as text, and become what they are within the statement.
//!
//! The hooks are of PostgreSQL's way through a statement, in their order: [`on_analysis`],
//! [`on_plan`], [`on_start`] with [`on_permissions`], [`on_run`], [`on_finish`]; COPY and
//! TRUNCATE pass [`on_utility`]. An error ends the transaction or a part of it, which puts
//! user and settings back by itself; the frames of the hooks hold nothing to be dropped.

use std::cell::Cell;
use std::ffi::{c_char, c_int};
use std::ptr::{null, null_mut, replace};

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pg_sys::{self, NodeTag, Oid, ProcessUtilityContext};
use pgrx::prelude::*;

use crate::guard::changed_tables;

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    /// Who is to be when the permissions of the statement that starts have been looked at.
    static STARTS_AS: Cell<Option<Oid>> = const { Cell::new(None) };
    static NEXT_ANALYSIS: Cell<pg_sys::post_parse_analyze_hook_type> = const { Cell::new(None) };
    static NEXT_PLAN: Cell<pg_sys::planner_hook_type> = const { Cell::new(None) };
    static NEXT_START: Cell<pg_sys::ExecutorStart_hook_type> = const { Cell::new(None) };
    static NEXT_PERMISSIONS: Cell<pg_sys::ExecutorCheckPerms_hook_type> = const { Cell::new(None) };
    static NEXT_RUN: Cell<pg_sys::ExecutorRun_hook_type> = const { Cell::new(None) };
    static NEXT_FINISH: Cell<pg_sys::ExecutorFinish_hook_type> = const { Cell::new(None) };
    static NEXT_UTILITY: Cell<pg_sys::ProcessUtility_hook_type> = const { Cell::new(None) };
}

/// From now on, to its end, this session writes rows as the owners of their tables.
#[pg_extern]
fn write_as_owners() {
    if ACTIVE.replace(true) {
        return;
    }
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
        NEXT_UTILITY.set(replace(
            &raw mut pg_sys::ProcessUtility_hook,
            Some(on_utility),
        ));
    }
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
struct Before {
    user: Oid,
    context: c_int,
    /// Of the settings; 0 when nobody else became.
    level: c_int,
}

/// As `owner`, in a restricted operation, if there is one to become.
///
/// # Safety
/// Inside a transaction.
unsafe fn change(owner: Option<Oid>) -> Before {
    let mut before = Before {
        user: pg_sys::InvalidOid,
        context: 0,
        level: 0,
    };
    if let Some(owner) = owner {
        // SAFETY: as said.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut before.user, &mut before.context);
            before.level = pg_sys::NewGUCNestLevel();
            be(owner);
        }
    }
    before
}

/// # Safety
/// Inside a transaction, between [`change`] and [`change_back`].
unsafe fn be(owner: Oid) {
    let restricted = pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION;
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: as said.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(owner, context | restricted as c_int);
    }
}

/// # Safety
/// What [`change`] gave, in the same part of the transaction.
#[pg_guard]
unsafe extern "C-unwind" fn change_back(before: Before) {
    if before.level != 0 {
        // SAFETY: as said.
        unsafe {
            pg_sys::AtEOXact_GUC(false, before.level);
            pg_sys::SetUserIdAndSecContext(before.user, before.context);
        }
    }
}

/// The table, for a look at it.
///
/// # Safety
/// The table is locked by this transaction.
unsafe fn open(table: Oid) -> Option<pgrx::PgRelation> {
    // SAFETY: as said; a relation that is found is closed when it is dropped.
    unsafe {
        let relation = pg_sys::RelationIdGetRelation(table);
        (!relation.is_null()).then(|| pgrx::PgRelation::from_pg_owned(relation))
    }
}

/// Whether a trigger or rule fires in a session that applies.
fn fires(enabled: c_char) -> bool {
    [b'A', b'R'].contains(&(enabled as u8))
}

fn triggers(relation: &pgrx::PgRelation) -> &[pg_sys::Trigger] {
    // SAFETY: an open relation has a list of its triggers or none.
    unsafe {
        relation.trigdesc.as_ref().map_or(&[], |list| {
            std::slice::from_raw_parts(
                list.triggers,
                usize::try_from(list.numtriggers).unwrap_or(0),
            )
        })
    }
}

/// Whom the session has to become before it changes rows of this table.
///
/// # Safety
/// Inside a transaction, which has the table locked.
unsafe fn owner_to_be(table: Oid) -> Option<Oid> {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: as said.
    unsafe {
        let relation = open(table)?;
        let owner = (*relation.rd_rel).relowner;
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let restricted = context & pg_sys::SECURITY_RESTRICTED_OPERATION as c_int != 0;
        // Who is not superuser has nothing to give away.
        let stays = owner == user
            || restricted
            || pg_sys::superuser_arg(owner)
            || !pg_sys::superuser_arg(user);
        (!stays).then_some(owner)
    }
}

/// Of the tables that a plan changes.
///
/// # Safety
/// `query` has a plan, whose tables are locked.
unsafe fn owner_of_plan(query: *mut pg_sys::QueryDesc) -> Option<Oid> {
    // SAFETY: as said.
    unsafe { changed_tables(query).find_map(|table| owner_to_be(table)) }
}

/// The table that a query changes.
///
/// # Safety
/// `query` has been analysed.
unsafe fn changed_table(query: *mut pg_sys::Query) -> Option<Oid> {
    // SAFETY: as said; the index is of the range table, from 1, or 0.
    unsafe {
        let index = usize::try_from((*query).resultRelation)
            .ok()?
            .checked_sub(1)?;
        let entry = (*(*(*query).rtable).elements.add(index)).ptr_value;
        Some((*entry.cast::<pg_sys::RangeTblEntry>()).relid)
    }
}

/// Triggers that are put off to the commit would be fired by the superuser, so PostgreSQL
/// refuses them in a restricted operation. They fire with the statement.
///
/// # Safety
/// Inside a transaction, which has the table locked.
unsafe fn put_nothing_off(table: Oid) {
    // SAFETY: as said.
    let relation = unsafe { open(table) };
    let put_off = |trigger: &pg_sys::Trigger| trigger.tgdeferrable && fires(trigger.tgenabled);
    if relation.is_some_and(|relation| triggers(&relation).iter().any(put_off))
        && let Err(error) = Spi::run("SET CONSTRAINTS ALL IMMEDIATE")
    {
        pgrx::error!("terrace: {error}");
    }
}

/// Rules put statements in place of ours before anybody can tell whose they are.
#[pg_guard]
unsafe extern "C-unwind" fn on_analysis(
    state: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jumble: *mut pg_sys::JumbleState,
) {
    // SAFETY: as PostgreSQL called us; the tables of an analysed query are locked.
    unsafe {
        if let Some(table) = changed_table(query)
            && owner_to_be(table).is_some()
            && let Some(relation) = open(table)
            && has_rules(&relation)
        {
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                format!(
                    "table \"{}\" has rules that fire on replicas, and its owner is no superuser",
                    relation.name()
                ),
                pgrx::function_name!(),
            )
            .set_hint("ALTER TABLE … DISABLE RULE here, or use a trigger in its place.")
            .report(PgLogLevel::ERROR);
        }
        if let Some(next) = NEXT_ANALYSIS.get() {
            pg_sys::ffi::pg_guard_ffi_boundary(|| next(state, query, jumble));
        }
    }
}

fn has_rules(relation: &pgrx::PgRelation) -> bool {
    // SAFETY: an open relation has a list of its rules or none.
    unsafe {
        relation.rd_rules.as_ref().is_some_and(|list| {
            let count = usize::try_from(list.numLocks).unwrap_or(0);
            let rules = std::slice::from_raw_parts(list.rules, count);
            rules.iter().any(|rule| fires((**rule).enabled))
        })
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_plan(query: *mut pg_sys::Query) -> Before {
    // SAFETY: as PostgreSQL called us.
    unsafe { change(changed_table(query).and_then(|table| owner_to_be(table))) }
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
        let owner = owner_of_plan(query);
        let before = change(owner);
        if owner.is_some() {
            // Permissions come first.
            pg_sys::SetUserIdAndSecContext(before.user, before.context);
        }
        STARTS_AS.set(owner);
        before
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
    unsafe { change(owner_of_plan(query)) }
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
        let owner = owner_of_plan(query);
        if owner.is_some() {
            changed_tables(query).for_each(|table| put_nothing_off(table));
        }
        change(owner)
    }
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
        let node = (*statement).utilityStmt;
        let owner = before_utility(node);
        if owner != pg_sys::InvalidOid && (*node).type_ == NodeTag::T_CopyStmt {
            return copy_as(owner, node.cast(), text, completion);
        }
        let before = change((owner != pg_sys::InvalidOid).then_some(owner));
        let run = NEXT_UTILITY.get().unwrap_or(process);
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
        change_back(before);
    }
}

/// Whom to become for this statement, or none.
#[pg_guard]
unsafe extern "C-unwind" fn before_utility(node: *mut pg_sys::Node) -> Oid {
    // SAFETY: a node's tag says what it is.
    let owner = unsafe {
        match (*node).type_ {
            NodeTag::T_CopyStmt => owner_for_copy(&*node.cast()),
            NodeTag::T_TruncateStmt => owner_for_truncate(&*node.cast()),
            _ => None,
        }
    };
    owner.unwrap_or(pg_sys::InvalidOid)
}

/// # Safety
/// Inside a transaction.
unsafe fn locked(name: *mut pg_sys::RangeVar, lock: pg_sys::LOCKMODE) -> Option<Oid> {
    let missing_ok = pg_sys::RVROption::RVR_MISSING_OK;
    // SAFETY: as said; there is no callback.
    let table =
        unsafe { pg_sys::RangeVarGetRelidExtended(name, lock, missing_ok, None, null_mut()) };
    (table != pg_sys::InvalidOid).then_some(table)
}

/// COPY … FROM STDIN alone is ours: the rest is no bridge's.
///
/// # Safety
/// Inside a transaction.
unsafe fn owner_for_copy(copy: &pg_sys::CopyStmt) -> Option<Oid> {
    let from_client = copy.is_from && copy.filename.is_null() && copy.whereClause.is_null();
    if !from_client || copy.relation.is_null() {
        return None;
    }
    // SAFETY: as said.
    unsafe {
        let table = locked(copy.relation, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE)?;
        let owner = owner_to_be(table)?;
        put_nothing_off(table);
        Some(owner)
    }
}

/// Only triggers are anybody's code in a TRUNCATE, and only where there are some the owner
/// needs the right to it. Those of several owners have to do with what the first one may do.
///
/// # Safety
/// Inside a transaction.
unsafe fn owner_for_truncate(truncate: &pg_sys::TruncateStmt) -> Option<Oid> {
    let is_for_truncate = |trigger: &pg_sys::Trigger| {
        trigger.tgtype as u32 & pg_sys::TRIGGER_TYPE_TRUNCATE != 0 && fires(trigger.tgenabled)
    };
    // SAFETY: as said; the parser made the list of names.
    unsafe {
        let names = truncate.relations;
        let mut tables = null_mut();
        for at in 0..names.as_ref().map_or(0, |list| list.length) {
            let name = (*(*names).elements.add(at as usize)).ptr_value.cast();
            if let Some(table) = locked(name, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE) {
                tables = pg_sys::lappend_oid(tables, table);
            }
        }
        // Those that CASCADE takes in too.
        while truncate.behavior == pg_sys::DropBehavior::DROP_CASCADE && !tables.is_null() {
            let more = pg_sys::heap_truncate_find_FKs(tables);
            if more.is_null() {
                break;
            }
            for at in 0..(*more).length {
                let table = (*(*more).elements.add(at as usize)).oid_value;
                pg_sys::LockRelationOid(table, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE);
            }
            tables = pg_sys::list_concat(tables, more);
        }
        (0..tables.as_ref().map_or(0, |list| list.length)).find_map(|at| {
            let table = (*(*tables).elements.add(at as usize)).oid_value;
            let relation = open(table)?;
            let has_code = triggers(&relation).iter().any(is_for_truncate);
            if has_code { owner_to_be(table) } else { None }
        })
    }
}

/// As `DoCopy` of `commands/copy.c` does it after its look at the permissions, which a
/// superuser has.
///
/// # Safety
/// A COPY of this session's client into a table that is locked. Nothing here is to be dropped
/// when an error jumps over it.
unsafe fn copy_as(
    owner: Oid,
    statement: *mut pg_sys::CopyStmt,
    text: *const c_char,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: as said.
    unsafe {
        let lock = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
        let table = pg_sys::table_openrv((*statement).relation, lock);
        let state = pg_sys::make_parsestate(null_mut());
        (*state).p_sourcetext = text;
        pg_sys::addRangeTableEntryForRelation(state, table, lock, null_mut(), false, false);
        let before = change(Some(owner));
        let rows = begin_copy(
            state,
            table,
            null_mut(),
            null(),
            false,
            None,
            (*statement).attlist,
            (*statement).options,
        );
        let count = copy(rows);
        pg_sys::EndCopyFrom(rows);
        change_back(before);
        pg_sys::free_parsestate(state);
        pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
        if let Some(completion) = completion.as_mut() {
            completion.commandTag = pg_sys::CommandTag::CMDTAG_COPY;
            completion.nprocessed = count;
        }
    }
}
