//! DDL in the stream: `terrace.replicate_ddl` and, with `terrace.ddl = on`, what a session
//! runs itself.
//!
//! Guarantee: a statement that ran at the top stands in the stream where it ran, in its own
//! transaction, with the role, the search path and the settings that its text was read by.
//! What is rolled back leaves nothing. What a statement does within itself (an extension's
//! script, the partitions of a table) is no statement of its own.
//!
//! While a statement that was told runs, `terrace.ddl` is off, at a nesting level of the
//! settings that PostgreSQL takes back by itself when the statement fails.
//!
//! The hook comes with the library. Where that is not preloaded, an event trigger
//! ([`see_ddl`]) loads it and refuses the one statement that came too early: nothing is
//! left out in silence.

mod drop;
mod fills;
mod statement;

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char, c_int, c_void};

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::pg_sys::{self, NodeTag, ObjectType, ProcessUtilityContext};
use pgrx::prelude::*;

use crate::{as_owner, guard, put_json, run_bytes, write_sealed};

/// Prefix of the message that carries a statement.
const PREFIX: &str = "terrace.ddl";

static DDL: GucSetting<bool> = GucSetting::<bool>::new(false);

/// Settings by which the text of a statement is read.
const SETTINGS: [&CStr; 10] = [
    c"search_path",
    c"datestyle",
    c"intervalstyle",
    c"timezone",
    c"standard_conforming_strings",
    c"xmloption",
    c"bytea_output",
    c"extra_float_digits",
    c"array_nulls",
    c"transform_null_equals",
];

/// Of all that a role has, which may be something else on every server.
const OF_ROLES: [NodeTag; 2] = [NodeTag::T_DropOwnedStmt, NodeTag::T_ReassignOwnedStmt];

thread_local! {
    /// The hook has seen a statement of this session.
    static SEEING: Cell<bool> = const { Cell::new(false) };
    /// The statement that travels and is being run; see [`forget`].
    static UNDER_WAY: RefCell<Option<Ddl>> = const { RefCell::new(None) };
}

/// Called once, when the library is loaded.
pub fn init() {
    GucRegistry::define_bool_guc(
        c"terrace.ddl",
        c"Whether DDL of this session is run on the servers below too.",
        c"In the place that it has among the changes of rows.",
        &DDL,
        GucContext::Userset,
        GucFlags::default(),
    );
    // SAFETY: the callback lives as long as the library.
    unsafe { pg_sys::RegisterSubXactCallback(Some(on_part_end), std::ptr::null_mut()) };
}

#[pg_guard]
unsafe extern "C-unwind" fn on_part_end(
    event: pg_sys::SubXactEvent::Type,
    part: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        forget(part);
    }
}

/// `TopSubTransactionId` of `c.h`: the number of the whole transaction.
pub const WHOLE: pg_sys::SubTransactionId = 1;

/// A part of the transaction is rolled back, and with it a statement that began in it: parts
/// within have higher numbers, and one of those may fail while the statement goes on.
pub fn forget(part: pg_sys::SubTransactionId) {
    UNDER_WAY.with_borrow_mut(|ddl| {
        ddl.take_if(|ddl| ddl.part >= part);
    });
}

fn raise(code: PgSqlErrorCode, message: String, hint: &'static str) {
    ErrorReport::new(code, message, pgrx::function_name!())
        .set_hint(hint)
        .report(PgLogLevel::ERROR);
}

/// Refuses a statement that the hook was too late for.
#[pg_extern]
fn see_ddl() {
    if DDL.get() && !SEEING.get() {
        raise(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "terrace.ddl is on, but this session had not loaded terrace".into(),
            "Nothing was done: run the statement again. With terrace in \
             session_preload_libraries it is loaded from the start.",
        );
    }
}

/// Runs one statement here, and after this transaction on the servers below.
#[pg_extern]
fn replicate_ddl(sql: Option<&str>) {
    guard::refuse_if_guarded("run DDL");
    let refuse = |problem: String, hint| {
        raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            problem,
            hint,
        );
    };
    let one = "Call it once for each statement.";
    let Some(Ok(text)) = sql.map(CString::new) else {
        return refuse("terrace.replicate_ddl takes one statement".into(), one);
    };
    if let Err(error) = Spi::run("SELECT terrace.must_be_top()") {
        pgrx::error!("terrace: {error}");
    }
    // SAFETY: the text lives through the call.
    let parse = || unsafe {
        statement::elements::<pg_sys::RawStmt>(pg_sys::raw_parser(
            text.as_ptr(),
            pg_sys::RawParseMode::RAW_PARSE_DEFAULT,
        ))
    };
    let statements = PgTryBuilder::new(parse)
        .catch_when(PgSqlErrorCode::ERRCODE_SYNTAX_ERROR, |caught| {
            if let CaughtError::PostgresError(error) = &caught {
                let code = PgSqlErrorCode::ERRCODE_SYNTAX_ERROR;
                raise(code, error.message().into(), one);
            }
            caught.rethrow()
        })
        .execute();
    let [statement] = statements[..] else {
        let found = format!(
            "terrace.replicate_ddl takes one statement, not {}",
            statements.len()
        );
        return refuse(found, one);
    };
    let run = || {
        if let Err(error) = Spi::run(sql.unwrap_or_default()) {
            pgrx::error!("terrace: {error}");
        }
    };
    // SAFETY: the parser made the list, and a statement in each of its nodes.
    let (nothing, ddl) = unsafe {
        let node = (*statement).stmt;
        let nothing = statement::finds_nothing(node, (*node).type_);
        (nothing, Ddl::of(node, text.to_bytes()))
    };
    if nothing {
        return run();
    }
    let Some(ddl) = ddl else {
        return refuse(
            "this statement cannot be replicated as DDL".into(),
            "Rows travel by themselves; roles, databases, publications, grants and temporary \
             objects are each server's own.",
        );
    };
    if ddl.when == When::Outside {
        return raise(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            "what is done CONCURRENTLY cannot be run by a function".into(),
            "SET terrace.ddl = on and run the statement itself.",
        );
    }
    let told = begin(ddl);
    run();
    end(told);
}

/// Runs a statement as a role that cannot be left: what it calls is that role's code, and
/// the session is a superuser's. For others than superusers it is a restricted operation, as
/// REFRESH MATERIALIZED VIEW is one: nothing can be put off to the commit, when the session is
/// the superuser's again (deferred triggers, cursors that outlive the transaction).
/// Both are in the encoding of the database, whatever that is.
#[pg_extern]
fn run_as(role: &[u8], sql: &[u8]) {
    let Ok(name) = CString::new(role) else {
        pgrx::error!("terrace: no role name");
    };
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: inside a transaction, whose end puts the user back if an error keeps us from it.
    unsafe {
        let role = pg_sys::get_role_oid(name.as_ptr(), false);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let mut local = context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as c_int;
        if !pg_sys::superuser_arg(role) {
            local |= pg_sys::SECURITY_RESTRICTED_OPERATION as c_int;
        }
        pg_sys::SetUserIdAndSecContext(role, local);
    }
    run_bytes(sql);
    // SAFETY: as above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
}

/// Begins a nesting level of the settings in which nothing is told.
fn ddl_off() -> c_int {
    // SAFETY: inside a transaction, whose end takes it back if nobody does.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        pg_sys::set_config_option(
            c"terrace.ddl".as_ptr(),
            c"off".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
        level
    }
}

/// When a statement is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// Before it runs, so before what it brings about.
    Before,
    /// When the table is made, by what it came to be: what it was made from need not be below.
    Made,
    /// When it is done, unless it made something temporary.
    After(*const pg_sys::RangeVar),
    /// When it is done, as it ends its transaction and begins another one.
    Outside,
}

fn put_name(out: &mut String, (schema, name): &statement::Name) {
    out.push('[');
    put_json(out, schema);
    out.push(',');
    put_json(out, name);
    out.push(']');
}

/// A statement that travels.
struct Ddl {
    sql: String,
    when: When,
    role: String,
    superuser: bool,
    /// By which its text is read: members of a JSON object.
    settings: String,
    /// What servers below run in its place, within a transaction.
    within: Option<String>,
    /// The index that it makes outside of a transaction, as SQL names it.
    index: Option<String>,
    /// Where none of these is, and none is to be, it is left out.
    about: Vec<statement::Name>,
    /// The whole of which it makes or takes a partition.
    part_of: Option<statement::Name>,
    /// It makes a view, for which no row is written.
    view: bool,
    /// What is in this table then is told too.
    refill: Option<pg_sys::Oid>,
    /// The part of the transaction that it runs in.
    part: pg_sys::SubTransactionId,
}

impl Ddl {
    /// `None` if it does not travel.
    ///
    /// # Safety
    /// `node` is a parsed statement; `text` is what it was parsed from.
    unsafe fn of(node: *mut pg_sys::Node, text: &[u8]) -> Option<Ddl> {
        // SAFETY: a node's tag says what it is.
        unsafe {
            let tag = node.as_ref()?.type_;
            if !statement::TRAVELS.contains(&tag) {
                return None;
            }
            match statement::stays(node, tag) {
                Ok(true) => return None,
                Ok(false) if statement::finds_nothing(node, tag) => return None,
                Ok(false) => {}
                Err(problem) => raise(
                    PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                    problem.into(),
                    "Temporary objects are each session's own; do it in two statements.",
                ),
            }
            let user = pg_sys::GetUserId();
            let mut ddl = Ddl {
                sql: String::from_utf8_lossy(text).trim().to_owned(),
                when: When::Before,
                role: statement::text(pg_sys::GetUserNameFromId(user, false)),
                superuser: pg_sys::superuser_arg(user),
                settings: settings(),
                within: None,
                index: None,
                about: statement::about(node, tag),
                part_of: statement::part_of(node, tag),
                view: tag == NodeTag::T_ViewStmt,
                refill: None,
                part: pg_sys::GetCurrentSubTransactionId(),
            };
            match tag {
                NodeTag::T_CreateTableAsStmt => {
                    let create = &*node.cast::<pg_sys::CreateTableAsStmt>();
                    match create.objtype {
                        ObjectType::OBJECT_TABLE => ddl.when = When::Made,
                        _ => ddl.view = true,
                    }
                }
                NodeTag::T_ViewStmt => {
                    ddl.when = When::After((*node.cast::<pg_sys::ViewStmt>()).view);
                }
                NodeTag::T_IndexStmt => {
                    let index = &*node.cast::<pg_sys::IndexStmt>();
                    if index.concurrent {
                        ddl.when = When::Outside;
                        ddl.index = statement::index_name(index);
                    }
                    if index.concurrent && index.idxname.is_null() {
                        raise(
                            PgSqlErrorCode::ERRCODE_INVALID_NAME,
                            "CREATE INDEX CONCURRENTLY without a name cannot be replicated".into(),
                            "Name the index, so that it is known when it is there.",
                        );
                    }
                }
                NodeTag::T_DropStmt => {
                    let drop = &*node.cast::<pg_sys::DropStmt>();
                    if drop.concurrent {
                        ddl.when = When::Outside;
                    } else if let Some(sql) = drop::of_several(drop, &ddl.about) {
                        ddl.sql = sql;
                    }
                }
                NodeTag::T_AlterTableStmt => {
                    let alter = &*node.cast::<pg_sys::AlterTableStmt>();
                    if let Some(at_once) = statement::detach_at_once(alter) {
                        ddl.when = When::Outside;
                        ddl.within = Some(at_once);
                    }
                    ddl.refill = fills::fills(alter);
                }
                _ => {}
            }
            Some(ddl)
        }
    }

    /// Writes it into the stream, as a part of this transaction.
    fn tell(&self) {
        let mut message = String::from("{\"sql\":");
        put_json(&mut message, self.within.as_ref().unwrap_or(&self.sql));
        message.push_str(",\"role\":");
        put_json(&mut message, &self.role);
        let (superuser, settings) = (self.superuser, &self.settings);
        let outside = self.when == When::Outside && self.within.is_none();
        message.push_str(&format!(
            ",\"superuser\":{superuser},\"settings\":{{{settings}}},\"outside\":{outside},\"about\":["
        ));
        for (index, name) in self.about.iter().enumerate() {
            if index > 0 {
                message.push(',');
            }
            put_name(&mut message, name);
        }
        message.push(']');
        if let Some(index) = &self.index {
            message.push_str(",\"index\":");
            put_json(&mut message, index);
        }
        if let Some(whole) = &self.part_of {
            message.push_str(",\"part_of\":");
            put_name(&mut message, whole);
        }
        if self.view {
            message.push_str(",\"view\":true");
        }
        message.push('}');
        write_sealed(PREFIX, &message);
    }
}

/// The settings by which this session's statements are read, as members of a JSON object.
fn settings() -> String {
    let mut members = String::new();
    for name in SETTINGS {
        // SAFETY: the settings are PostgreSQL's own, so each has a value; it is copied.
        let value = unsafe { statement::text(pg_sys::GetConfigOption(name.as_ptr(), true, false)) };
        if !members.is_empty() {
            members.push(',');
        }
        put_json(&mut members, &name.to_string_lossy());
        members.push(':');
        put_json(&mut members, &value);
    }
    members
}

/// Before the statement runs; gives what [`end`] takes.
fn begin(ddl: Ddl) -> c_int {
    if ddl.when == When::Before {
        ddl.tell();
    }
    let level = match ddl.when {
        When::Outside => OUTSIDE,
        _ => ddl_off(),
    };
    UNDER_WAY.set(Some(ddl));
    level
}

/// When it has run.
fn end(level: c_int) {
    if level != OUTSIDE {
        // SAFETY: the level that `begin` began.
        unsafe { pg_sys::AtEOXact_GUC(false, level) };
    }
    let Some(ddl) = UNDER_WAY.take() else {
        return;
    };
    let late = match ddl.when {
        When::Outside => true,
        // SAFETY: the statement is being run, so its name is there.
        When::After(made) => !unsafe { statement::is_temporary(made) },
        When::Before | When::Made => false,
    };
    if late {
        ddl.tell();
    }
    if let Some(table) = ddl.refill {
        let refilled =
            as_owner(|| Spi::run_with_args("SELECT terrace.refill($1)", &[table.into()]));
        if let Err(error) = refilled {
            pgrx::error!("terrace: {error}");
        }
    }
}

/// Of the statement under way that makes a table from a query: tells what came of it. Called
/// when the table is there and nothing is in the stream that is about it.
#[pg_extern]
fn tell_made(definition: &str) {
    let ddl = UNDER_WAY.take();
    if let Some(mut ddl) = ddl.filter(|ddl| ddl.when == When::Made) {
        ddl.sql = definition.to_owned();
        ddl.tell();
    }
}

/// Whether DDL of this session is to be told now.
fn is_wanted(context: ProcessUtilityContext::Type) -> bool {
    let own = context == ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL
        || context == ProcessUtilityContext::PROCESS_UTILITY_QUERY;
    // SAFETY: inside a transaction, as all that travels is.
    own && DDL.get() && unsafe { !pg_sys::creating_extension && pg_sys::IsTransactionState() }
}

/// Whether this database is the top's.
fn is_top() -> bool {
    // SAFETY: a look-up by a name that lives through it.
    let installed =
        unsafe { pg_sys::get_extension_oid(c"terrace".as_ptr(), true) } != pg_sys::InvalidOid;
    // Not `get_one`, which gives the transaction an id: some commands must be the first.
    let top = || {
        Spi::connect(|client| {
            let rows = client.select("SELECT terrace.is_top()", Some(1), &[])?;
            rows.first().get_one::<bool>()
        })
    };
    installed && top().is_ok_and(|top| top == Some(true))
}

/// What [`before`] gives for a statement that does not travel …
pub const NOT_TOLD: c_int = -1;
/// … and for one that ends its transaction; else it is a nesting level.
const OUTSIDE: c_int = 0;

/// Looks at a utility statement before it runs; gives what [`after`] takes, or [`NOT_TOLD`].
///
/// # Safety
/// As PostgreSQL hands it to its hook.
#[pg_guard]
pub unsafe extern "C-unwind" fn before(
    statement: *mut pg_sys::PlannedStmt,
    text: *const c_char,
    context: ProcessUtilityContext::Type,
) -> c_int {
    SEEING.set(true);
    // SAFETY: as PostgreSQL called us.
    let ddl = unsafe {
        let node = (*statement).utilityStmt;
        guard::check_utility(node);
        if !is_wanted(context) {
            return NOT_TOLD;
        }
        if OF_ROLES.contains(&(*node).type_) && is_top() {
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_WARNING,
                "what a role owns is each server's own: this statement is not run below",
                pgrx::function_name!(),
            )
            .set_hint("Drop or alter what is to be changed below by statements of its own.")
            .report(PgLogLevel::WARNING);
        }
        if !statement::TRAVELS.contains(&(*node).type_) || !is_top() {
            return NOT_TOLD;
        }
        Ddl::of(node, own_text(&*statement, text))
    };
    ddl.map_or(NOT_TOLD, begin)
}

/// When it has run.
///
/// # Safety
/// What [`before`] gave, in the same session.
#[pg_guard]
pub unsafe extern "C-unwind" fn after(told: c_int) {
    end(told);
}

/// The part of a query's text that is this statement.
///
/// # Safety
/// `text` is what the statement was parsed from.
unsafe fn own_text(statement: &pg_sys::PlannedStmt, text: *const c_char) -> &[u8] {
    // SAFETY: as said; the text outlives the statement.
    let text = unsafe { CStr::from_ptr(text) }.to_bytes();
    let from = usize::try_from(statement.stmt_location).unwrap_or(0);
    let text = text.get(from..).unwrap_or_default();
    match usize::try_from(statement.stmt_len) {
        Ok(length) if length > 0 => text.get(..length).unwrap_or(text),
        _ => text,
    }
}
