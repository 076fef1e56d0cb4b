//! Whose code a statement would run.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;

use pgrx::PgRelation;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pg_sys::{self, NodeTag, Oid};
use pgrx::prelude::*;

use crate::guard::changed_tables;
use crate::run_bytes;

// catalog/pg_inherits.h; not in pgrx's bindings.
unsafe extern "C-unwind" {
    fn find_all_inheritors(
        parent: Oid,
        lock: pg_sys::LOCKMODE,
        parents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;
}

type Walker = unsafe extern "C-unwind" fn(*mut pg_sys::Node, *mut c_void) -> bool;

// nodes/nodeFuncs.h; pgrx has those of some versions alone.
unsafe extern "C-unwind" {
    #[cfg_attr(feature = "pg15", link_name = "query_tree_walker")]
    #[cfg_attr(not(feature = "pg15"), link_name = "query_tree_walker_impl")]
    fn walk_query(
        query: *mut pg_sys::Query,
        walker: Walker,
        context: *mut c_void,
        flags: c_int,
    ) -> bool;
    #[cfg_attr(feature = "pg15", link_name = "expression_tree_walker")]
    #[cfg_attr(not(feature = "pg15"), link_name = "expression_tree_walker_impl")]
    fn walk_expression(node: *mut pg_sys::Node, walker: Walker, context: *mut c_void) -> bool;
}

/// # Safety
/// A list of numbers of objects, or none; the copy lives by itself.
unsafe fn oids(list: *mut pg_sys::List) -> Vec<Oid> {
    // SAFETY: as said.
    unsafe {
        let count = list.as_ref().map_or(0, |list| list.length);
        (0..count)
            .map(|at| (*(*list).elements.add(at as usize)).oid_value)
            .collect()
    }
}

/// The table, for a look at it.
///
/// # Safety
/// Inside a transaction that has it locked.
unsafe fn open(table: Oid) -> Option<PgRelation> {
    // SAFETY: as said; a relation that is found is closed when it is dropped.
    unsafe {
        let relation = pg_sys::RelationIdGetRelation(table);
        (!relation.is_null()).then(|| PgRelation::from_pg_owned(relation))
    }
}

fn owner(relation: &PgRelation) -> Oid {
    // SAFETY: an open relation has its line of pg_class.
    unsafe { (*relation.rd_rel).relowner }
}

fn kind(relation: &PgRelation) -> u8 {
    // SAFETY: as above.
    unsafe { (*relation.rd_rel).relkind as u8 }
}

/// Whether this one's code must not run with our rights: who is no superuser has none to lend.
fn is_lesser(owner: Oid) -> bool {
    // SAFETY: look-ups inside a transaction.
    unsafe {
        let user = pg_sys::GetUserId();
        owner != user && !pg_sys::superuser_arg(owner) && pg_sys::superuser_arg(user)
    }
}

/// # Safety
/// Inside a transaction.
unsafe fn lesser_owner(table: Oid) -> Option<Oid> {
    // SAFETY: as said.
    let owner = unsafe { open(table) }.map(|relation| owner(&relation))?;
    is_lesser(owner).then_some(owner)
}

/// Whom to become: the owner of what is changed, or else of what is read; for several of those
/// a role that may nothing but read.
///
/// # Safety
/// Inside a transaction.
unsafe fn whom(changed: &[Oid], used: &[Oid]) -> Option<Oid> {
    // SAFETY: as said.
    unsafe {
        if let Some(owner) = changed.iter().find_map(|table| lesser_owner(*table)) {
            return Some(owner);
        }
        let mut owners: Vec<Oid> = used
            .iter()
            .filter_map(|table| lesser_owner(*table))
            .collect();
        owners.sort_unstable_by_key(|owner| owner.to_u32());
        owners.dedup();
        match owners[..] {
            [] => None,
            [owner] => Some(owner),
            _ => Some(pg_sys::get_role_oid(c"terrace_reader".as_ptr(), false)),
        }
    }
}

/// Of a query that is to be planned.
///
/// # Safety
/// As PostgreSQL hands it to the planner.
pub unsafe fn of_query(query: *mut pg_sys::Query) -> Option<Oid> {
    // SAFETY: as said.
    unsafe {
        let changed: Vec<Oid> = changed_table(query).into_iter().collect();
        for table in &changed {
            refuse_others_parts(*table);
        }
        whom(&changed, &used_tables(query))
    }
}

/// Of a plan that is to be run.
///
/// # Safety
/// `query` has a plan.
pub unsafe fn of_plan(query: *mut pg_sys::QueryDesc) -> Option<Oid> {
    // SAFETY: as said.
    unsafe {
        let changed: Vec<Oid> = changed_tables(query).collect();
        whom(&changed, &planned_tables(query))
    }
}

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

/// Tables that a query reads or changes, in its parts too.
///
/// # Safety
/// `query` has been analysed.
unsafe fn used_tables(query: *mut pg_sys::Query) -> Vec<Oid> {
    let mut tables: Vec<Oid> = Vec::new();
    // SAFETY: as said; the walker is given the vector alone.
    unsafe {
        let context = (&raw mut tables).cast();
        pg_sys::ffi::pg_guard_ffi_boundary(|| collect(query.cast(), context));
    }
    tables
}

/// # Safety
/// `context` is a vector of table numbers; `node` is of an analysed query.
unsafe extern "C-unwind" fn collect(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: as said; each node starts with its tag.
    unsafe {
        match node.as_ref().map(|node| node.type_) {
            None => false,
            Some(NodeTag::T_RangeTblEntry) => {
                let entry = &*node.cast::<pg_sys::RangeTblEntry>();
                if entry.rtekind == pg_sys::RTEKind::RTE_RELATION {
                    (*context.cast::<Vec<Oid>>()).push(entry.relid);
                }
                false
            }
            Some(NodeTag::T_Query) => {
                let flags = pg_sys::QTW_EXAMINE_RTES_BEFORE as c_int;
                walk_query(node.cast(), collect, context, flags)
            }
            Some(_) => walk_expression(node, collect, context),
        }
    }
}

/// The same of a plan.
///
/// # Safety
/// `query` has a plan.
unsafe fn planned_tables(query: *mut pg_sys::QueryDesc) -> Vec<Oid> {
    // SAFETY: as said; a plan has the entries of all its parts in one list.
    unsafe {
        let list = (*(*query).plannedstmt).rtable;
        let count = list.as_ref().map_or(0, |list| list.length);
        (0..count)
            .map(|at| (*(*list).elements.add(at as usize)).ptr_value)
            .map(|entry| &*entry.cast::<pg_sys::RangeTblEntry>())
            .filter(|entry| entry.rtekind == pg_sys::RTEKind::RTE_RELATION)
            .map(|entry| entry.relid)
            .collect()
    }
}

fn refuse(problem: String, hint: &'static str) {
    let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
    ErrorReport::new(code, problem, pgrx::function_name!())
        .set_hint(hint)
        .report(PgLogLevel::ERROR);
}

/// Refuses views and the like that are where a table should be, and rules.
///
/// # Safety
/// `query` has been analysed.
pub unsafe fn refuse_replaced(query: *mut pg_sys::Query) {
    // SAFETY: as said.
    unsafe {
        let changed = changed_table(query);
        for table in used_tables(query) {
            let Some(relation) = open(table).filter(|relation| is_lesser(owner(relation))) else {
                continue;
            };
            if b"vf".contains(&kind(&relation)) {
                refuse(
                    format!("\"{}\" is no table on this server", relation.name()),
                    "Put a table back in its place.",
                );
            }
            if changed == Some(table) && has_rules(&relation) {
                refuse(
                    format!(
                        "table \"{}\" has rules that fire on replicas, and its owner is no superuser",
                        relation.name()
                    ),
                    "ALTER TABLE … DISABLE RULE here, or use a trigger in its place.",
                );
            }
        }
    }
}

/// A row finds its partition when nobody can be told apart any more.
///
/// # Safety
/// The table is locked.
unsafe fn refuse_others_parts(table: Oid) {
    // SAFETY: as said.
    unsafe {
        let Some(whole) = open(table).filter(|whole| kind(whole) == b'p') else {
            return;
        };
        let strange = |part: &Oid| lesser_owner(*part).is_some_and(|other| other != owner(&whole));
        if with_heirs(table).iter().any(strange) {
            refuse(
                format!(
                    "a partition of table \"{}\" belongs to somebody else who is no superuser",
                    whole.name()
                ),
                "ALTER TABLE … OWNER TO the owner of the whole.",
            );
        }
    }
}

/// The table and all that inherit from it.
///
/// # Safety
/// The table is locked.
unsafe fn with_heirs(table: Oid) -> Vec<Oid> {
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: as said.
    unsafe {
        let find = || find_all_inheritors(table, lock, null_mut());
        oids(pg_sys::ffi::pg_guard_ffi_boundary(find))
    }
}

/// Whether a trigger or rule fires in a session that applies.
fn fires(enabled: c_char) -> bool {
    [b'A', b'R'].contains(&(enabled as u8))
}

fn triggers(relation: &PgRelation) -> &[pg_sys::Trigger] {
    // SAFETY: an open relation has a list of its triggers or none.
    unsafe {
        relation.trigdesc.as_ref().map_or(&[], |list| {
            let count = usize::try_from(list.numtriggers).unwrap_or(0);
            std::slice::from_raw_parts(list.triggers, count)
        })
    }
}

fn has_rules(relation: &PgRelation) -> bool {
    // SAFETY: an open relation has a list of its rules or none.
    unsafe {
        relation.rd_rules.as_ref().is_some_and(|list| {
            let count = usize::try_from(list.numLocks).unwrap_or(0);
            let rules = std::slice::from_raw_parts(list.rules, count);
            rules.iter().any(|rule| fires((**rule).enabled))
        })
    }
}

/// Triggers that are put off to the commit would be fired by the superuser, so PostgreSQL
/// refuses them in a restricted operation. They fire with the statement, also with one that
/// such a trigger runs.
///
/// # Safety
/// `query` has a plan; `owner` is whom it is to be finished as.
pub unsafe fn put_nothing_off(query: *mut pg_sys::QueryDesc, owner: Option<Oid>) {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: as said.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        if owner.is_some() || context & pg_sys::SECURITY_RESTRICTED_OPERATION as c_int != 0 {
            changed_tables(query).for_each(|table| fire_with_statement(table));
        }
    }
}

/// # Safety
/// The table is locked.
unsafe fn fire_with_statement(table: Oid) {
    // SAFETY: as said.
    unsafe {
        let Some(relation) = open(table) else { return };
        let heirs = match kind(&relation) {
            b'p' => with_heirs(table),
            _ => vec![table],
        };
        let names: Vec<_> = heirs.into_iter().flat_map(|heir| put_off(heir)).collect();
        drop(relation);
        if !names.is_empty() {
            let listed = names.join(&b", "[..]);
            run_bytes(&[b"SET CONSTRAINTS ", &listed[..], b" IMMEDIATE"].concat());
        }
    }
}

/// Names of the table's constraint triggers that would wait for the commit, as SQL has them.
///
/// # Safety
/// The table is locked.
unsafe fn put_off(table: Oid) -> Vec<Vec<u8>> {
    // SAFETY: as said; names are copied.
    unsafe {
        let Some(relation) = open(table) else {
            return Vec::new();
        };
        let waits = |trigger: &&pg_sys::Trigger| trigger.tgdeferrable && fires(trigger.tgenabled);
        let schema = pg_sys::get_namespace_name((*relation.rd_rel).relnamespace);
        let name = |trigger: &pg_sys::Trigger| {
            let name = pg_sys::quote_qualified_identifier(schema, trigger.tgname);
            CStr::from_ptr(name).to_bytes().to_vec()
        };
        triggers(&relation).iter().filter(waits).map(name).collect()
    }
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
pub unsafe fn of_copy(copy: &pg_sys::CopyStmt) -> Option<Oid> {
    let from_client = copy.is_from && copy.filename.is_null() && copy.whereClause.is_null();
    if !from_client || copy.relation.is_null() {
        return None;
    }
    // SAFETY: as said.
    unsafe {
        let table = locked(copy.relation, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE)?;
        refuse_others_parts(table);
        let relation = open(table)?;
        // What is no table is PostgreSQL's to refuse, but for triggers of views.
        if !is_lesser(owner(&relation)) || !b"rpv".contains(&kind(&relation)) {
            return None;
        }
        if kind(&relation) == b'v' {
            refuse(
                format!("\"{}\" is no table on this server", relation.name()),
                "Put a table back in its place.",
            );
        }
        let owner = owner(&relation);
        drop(relation);
        fire_with_statement(table);
        Some(owner)
    }
}

/// Only triggers are anybody's code in a TRUNCATE, and only where there are some the owner
/// needs the right to it. Those of several owners have to do with what the first one may do.
///
/// # Safety
/// Inside a transaction.
pub unsafe fn of_truncate(truncate: &pg_sys::TruncateStmt) -> Option<Oid> {
    let lock = pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE;
    let is_for_truncate = |trigger: &pg_sys::Trigger| {
        trigger.tgtype as u32 & pg_sys::TRIGGER_TYPE_TRUNCATE != 0 && fires(trigger.tgenabled)
    };
    // SAFETY: as said; the parser made the list of names.
    unsafe {
        let names = truncate.relations;
        let mut tables = null_mut();
        for at in 0..names.as_ref().map_or(0, |list| list.length) {
            let name: *mut pg_sys::RangeVar =
                (*(*names).elements.add(at as usize)).ptr_value.cast();
            let Some(table) = locked(name, lock) else {
                continue;
            };
            let named = match (*name).inh {
                true => with_heirs(table),
                false => vec![table],
            };
            for table in named {
                tables = pg_sys::lappend_oid(tables, table);
            }
        }
        // Those that CASCADE takes in too.
        while truncate.behavior == pg_sys::DropBehavior::DROP_CASCADE && !tables.is_null() {
            let more = pg_sys::heap_truncate_find_FKs(tables);
            if more.is_null() {
                break;
            }
            for table in oids(more) {
                pg_sys::LockRelationOid(table, lock);
            }
            tables = pg_sys::list_concat(tables, more);
        }
        oids(tables).into_iter().find_map(|table| {
            let relation = open(table)?;
            let has_code = triggers(&relation).iter().any(is_for_truncate);
            has_code.then(|| lesser_owner(table)).flatten()
        })
    }
}
