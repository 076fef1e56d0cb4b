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

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char, c_int};

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pg_sys::{self, AlterTableType, NodeTag, ObjectType, ProcessUtilityContext};
use pgrx::prelude::*;

use crate::{as_owner, guard, put_json, write_sealed};

/// Prefix of the message that carries a statement.
const PREFIX: &str = "terrace.ddl";

static DDL: GucSetting<bool> = GucSetting::<bool>::new(false);

/// Settings by which the text of a statement is read.
const SETTINGS: [&CStr; 6] = [
    c"search_path",
    c"datestyle",
    c"intervalstyle",
    c"timezone",
    c"standard_conforming_strings",
    c"xmloption",
];

thread_local! {
    static NEXT: Cell<pg_sys::ProcessUtility_hook_type> = const { Cell::new(None) };
    /// The hook has seen a statement of this session.
    static SEEING: Cell<bool> = const { Cell::new(false) };
    /// To be told when it is done, as it ends its transaction and begins another one.
    static LATER: RefCell<Option<Ddl>> = const { RefCell::new(None) };
}

/// What travels. Roles, databases, publications and the like are each server's own.
const TRAVELS: &[NodeTag] = &[
    NodeTag::T_CreateStmt,
    NodeTag::T_CreateTableAsStmt,
    NodeTag::T_AlterTableStmt,
    NodeTag::T_IndexStmt,
    NodeTag::T_DropStmt,
    NodeTag::T_RenameStmt,
    NodeTag::T_AlterObjectSchemaStmt,
    NodeTag::T_AlterOwnerStmt,
    NodeTag::T_ViewStmt,
    NodeTag::T_RefreshMatViewStmt,
    NodeTag::T_CreateFunctionStmt,
    NodeTag::T_AlterFunctionStmt,
    NodeTag::T_CreateTrigStmt,
    NodeTag::T_CreateSchemaStmt,
    NodeTag::T_CreateSeqStmt,
    NodeTag::T_AlterSeqStmt,
    NodeTag::T_DefineStmt,
    NodeTag::T_CompositeTypeStmt,
    NodeTag::T_CreateEnumStmt,
    NodeTag::T_AlterEnumStmt,
    NodeTag::T_CreateRangeStmt,
    NodeTag::T_AlterTypeStmt,
    NodeTag::T_CreateDomainStmt,
    NodeTag::T_AlterDomainStmt,
    NodeTag::T_CommentStmt,
    NodeTag::T_CreateStatsStmt,
    NodeTag::T_AlterStatsStmt,
    NodeTag::T_CreatePolicyStmt,
    NodeTag::T_AlterPolicyStmt,
    NodeTag::T_RuleStmt,
    NodeTag::T_CreateCastStmt,
    NodeTag::T_CreateExtensionStmt,
    NodeTag::T_AlterExtensionStmt,
    NodeTag::T_CreateOpClassStmt,
    NodeTag::T_CreateOpFamilyStmt,
    NodeTag::T_AlterOpFamilyStmt,
    NodeTag::T_AlterOperatorStmt,
];

/// Kinds of objects that are each server's own.
const OF_ITS_OWN: &[ObjectType::Type] = &[
    ObjectType::OBJECT_DATABASE,
    ObjectType::OBJECT_ROLE,
    ObjectType::OBJECT_TABLESPACE,
    ObjectType::OBJECT_PUBLICATION,
    ObjectType::OBJECT_SUBSCRIPTION,
    ObjectType::OBJECT_EVENT_TRIGGER,
    ObjectType::OBJECT_FDW,
    ObjectType::OBJECT_FOREIGN_SERVER,
    ObjectType::OBJECT_FOREIGN_TABLE,
    ObjectType::OBJECT_USER_MAPPING,
];

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
    // SAFETY: hooks are of this process, which runs one session in one thread; one that
    // was there before is called by ours.
    unsafe {
        NEXT.set(pg_sys::ProcessUtility_hook);
        pg_sys::ProcessUtility_hook = Some(on_utility);
    }
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
    // SAFETY: the text lives through the call; an error in it is raised as PostgreSQL does.
    let statements = unsafe {
        elements::<pg_sys::RawStmt>(pg_sys::raw_parser(
            text.as_ptr(),
            pg_sys::RawParseMode::RAW_PARSE_DEFAULT,
        ))
    };
    let [statement] = statements[..] else {
        let found = format!(
            "terrace.replicate_ddl takes one statement, not {}",
            statements.len()
        );
        return refuse(found, one);
    };
    // SAFETY: the parser made the list, and a statement in each of its nodes.
    let Some(ddl) = (unsafe { Ddl::of((*statement).stmt, text.to_bytes()) }) else {
        return refuse(
            "this statement cannot be replicated as DDL".into(),
            "Rows travel by themselves; roles, databases, publications, grants and temporary \
             objects are each server's own.",
        );
    };
    ddl.tell();
    let level = ddl_off();
    if let Err(error) = Spi::run(&ddl.own) {
        pgrx::error!("terrace: {error}");
    }
    // SAFETY: the level was begun above.
    unsafe { pg_sys::AtEOXact_GUC(false, level) };
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

/// A statement that travels.
struct Ddl {
    /// As it is run here.
    own: String,
    /// As it is run below.
    sql: String,
    /// It cannot run inside a transaction.
    outside: bool,
    /// The index that it makes outside of one, as SQL names it.
    index: Option<String>,
    /// Where what it changes is missing, it is left out.
    optional: bool,
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
            if !TRAVELS.contains(&tag) || stays(node, tag) {
                return None;
            }
            let own = String::from_utf8_lossy(text).trim().to_owned();
            let mut ddl = Ddl {
                sql: own.clone(),
                own,
                outside: false,
                index: None,
                optional: is_optional(node, tag),
            };
            match tag {
                NodeTag::T_CreateTableAsStmt => without_data(&mut ddl, &*node.cast()),
                NodeTag::T_IndexStmt => {
                    let index = &*node.cast::<pg_sys::IndexStmt>();
                    ddl.outside = index.concurrent;
                    if index.concurrent {
                        ddl.index = index_name(index);
                    }
                    if index.concurrent && ddl.index.is_none() {
                        raise(
                            PgSqlErrorCode::ERRCODE_INVALID_NAME,
                            "CREATE INDEX CONCURRENTLY without a name cannot be replicated".into(),
                            "Name the index, so that it is known when it is there.",
                        );
                    }
                }
                NodeTag::T_DropStmt => {
                    ddl.outside = (*node.cast::<pg_sys::DropStmt>()).concurrent;
                }
                NodeTag::T_AlterTableStmt => {
                    ddl.outside = detaches_concurrently(&*node.cast());
                }
                _ => {}
            }
            Some(ddl)
        }
    }

    /// Writes it into the stream, as a part of this transaction.
    fn tell(&self) {
        let mut message = String::from("{\"sql\":");
        put_json(&mut message, &self.sql);
        message.push_str(",\"role\":");
        // SAFETY: the current user exists while it is that; the name is copied.
        let (role, superuser) = unsafe {
            let user = pg_sys::GetUserId();
            let name = CStr::from_ptr(pg_sys::GetUserNameFromId(user, false));
            (
                name.to_string_lossy().into_owned(),
                pg_sys::superuser_arg(user),
            )
        };
        put_json(&mut message, &role);
        message.push_str(&format!(",\"superuser\":{superuser},\"settings\":{{"));
        for (index, name) in SETTINGS.into_iter().enumerate() {
            // SAFETY: the settings are PostgreSQL's own, so each has a value; it is copied.
            let value =
                unsafe { CStr::from_ptr(pg_sys::GetConfigOption(name.as_ptr(), true, false)) };
            if index > 0 {
                message.push(',');
            }
            put_json(&mut message, &name.to_string_lossy());
            message.push(':');
            put_json(&mut message, &value.to_string_lossy());
        }
        let (outside, optional) = (self.outside, self.optional);
        message.push_str(&format!("}},\"outside\":{outside},\"optional\":{optional}"));
        if let Some(index) = &self.index {
            message.push_str(",\"index\":");
            put_json(&mut message, index);
        }
        message.push('}');
        write_sealed(PREFIX, &message);
    }
}

/// The rows of a new table travel as rows, if they are to.
fn without_data(ddl: &mut Ddl, create: &pg_sys::CreateTableAsStmt) {
    if create.objtype != ObjectType::OBJECT_TABLE {
        return;
    }
    if create.is_select_into {
        raise(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            "SELECT INTO cannot be replicated".into(),
            "Use CREATE TABLE AS.",
        );
    }
    // SAFETY: the parser gives it always.
    if unsafe { (*create.into).skipData } {
        return;
    }
    let mut sql = ddl
        .sql
        .trim_end_matches(|c: char| c == ';' || c.is_whitespace());
    if let Some(rest) = strip_word(sql, "data").and_then(|rest| strip_word(rest, "with")) {
        sql = rest;
    }
    ddl.sql = format!("{sql}\nWITH NO DATA");
}

/// The name of an index, if it is given one; it is where its table is.
///
/// # Safety
/// The statement comes from the parser.
unsafe fn index_name(index: &pg_sys::IndexStmt) -> Option<String> {
    let quoted = |name: *const c_char| {
        // SAFETY: a string of the parser, or null.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
        Some(format!(
            "\"{}\"",
            name.to_string_lossy().replace('"', "\"\"")
        ))
    };
    let name = quoted(index.idxname)?;
    // SAFETY: an index is one of a relation.
    Some(match quoted(unsafe { (*index.relation).schemaname }) {
        Some(schema) => format!("{schema}.{name}"),
        None => name,
    })
}

fn strip_word<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let at = text.len().checked_sub(word.len())?;
    let fits = text.is_char_boundary(at) && text[at..].eq_ignore_ascii_case(word);
    let rest = fits.then(|| &text[..at])?;
    rest.ends_with(char::is_whitespace).then(|| rest.trim_end())
}

/// # Safety
/// The statement comes from the parser.
unsafe fn detaches_concurrently(alter: &pg_sys::AlterTableStmt) -> bool {
    // SAFETY: the command's kind says what its definition is.
    unsafe {
        elements::<pg_sys::AlterTableCmd>(alter.cmds)
            .into_iter()
            .any(|command| {
                (*command).subtype == AlterTableType::AT_DetachPartition
                    && (*(*command).def.cast::<pg_sys::PartitionCmd>()).concurrent
            })
    }
}

/// Whether a statement is about what is this server's, or this session's, own.
///
/// # Safety
/// `node` is a parsed statement of this tag.
unsafe fn stays(node: *mut pg_sys::Node, tag: NodeTag) -> bool {
    // SAFETY: a node's tag says what it is; names of extensions are strings.
    unsafe {
        let of_terrace = match tag {
            NodeTag::T_CreateExtensionStmt => {
                is_terrace((*node.cast::<pg_sys::CreateExtensionStmt>()).extname)
            }
            NodeTag::T_AlterExtensionStmt => {
                is_terrace((*node.cast::<pg_sys::AlterExtensionStmt>()).extname)
            }
            NodeTag::T_DropStmt => {
                let drop = &*node.cast::<pg_sys::DropStmt>();
                drop.removeType == ObjectType::OBJECT_EXTENSION
                    && elements::<pg_sys::String>(drop.objects)
                        .into_iter()
                        .any(|name| is_terrace((*name).sval))
            }
            _ => false,
        };
        let own = kind(node, tag).is_some_and(|kind| OF_ITS_OWN.contains(&kind));
        of_terrace
            || own
            || relations(node, tag)
                .into_iter()
                .any(|name| is_temporary(name))
    }
}

/// Of what kind the object is that a statement names, where the statement says so.
///
/// # Safety
/// `node` is a parsed statement of this tag.
unsafe fn kind(node: *mut pg_sys::Node, tag: NodeTag) -> Option<ObjectType::Type> {
    // SAFETY: a node's tag says what it is.
    Some(unsafe {
        match tag {
            NodeTag::T_AlterTableStmt => (*node.cast::<pg_sys::AlterTableStmt>()).objtype,
            NodeTag::T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).renameType,
            NodeTag::T_AlterObjectSchemaStmt => {
                (*node.cast::<pg_sys::AlterObjectSchemaStmt>()).objectType
            }
            NodeTag::T_AlterOwnerStmt => (*node.cast::<pg_sys::AlterOwnerStmt>()).objectType,
            NodeTag::T_CommentStmt => (*node.cast::<pg_sys::CommentStmt>()).objtype,
            NodeTag::T_DropStmt => (*node.cast::<pg_sys::DropStmt>()).removeType,
            _ => return None,
        }
    })
}

/// The relations that a statement makes or changes.
///
/// # Safety
/// `node` is a parsed statement of this tag.
unsafe fn relations(node: *mut pg_sys::Node, tag: NodeTag) -> Vec<*mut pg_sys::RangeVar> {
    use ObjectType::*;
    // SAFETY: a node's tag says what it is; names of relations are lists of strings.
    unsafe {
        let relation = match tag {
            NodeTag::T_CreateStmt => (*node.cast::<pg_sys::CreateStmt>()).relation,
            NodeTag::T_CreateTableAsStmt => (*(*node.cast::<pg_sys::CreateTableAsStmt>()).into).rel,
            NodeTag::T_ViewStmt => (*node.cast::<pg_sys::ViewStmt>()).view,
            NodeTag::T_CreateSeqStmt => (*node.cast::<pg_sys::CreateSeqStmt>()).sequence,
            NodeTag::T_AlterSeqStmt => (*node.cast::<pg_sys::AlterSeqStmt>()).sequence,
            NodeTag::T_AlterTableStmt => (*node.cast::<pg_sys::AlterTableStmt>()).relation,
            NodeTag::T_IndexStmt => (*node.cast::<pg_sys::IndexStmt>()).relation,
            NodeTag::T_CreateTrigStmt => (*node.cast::<pg_sys::CreateTrigStmt>()).relation,
            NodeTag::T_RuleStmt => (*node.cast::<pg_sys::RuleStmt>()).relation,
            NodeTag::T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).relation,
            NodeTag::T_AlterObjectSchemaStmt => {
                (*node.cast::<pg_sys::AlterObjectSchemaStmt>()).relation
            }
            NodeTag::T_DropStmt => {
                let drop = &*node.cast::<pg_sys::DropStmt>();
                return match drop.removeType {
                    OBJECT_TABLE | OBJECT_VIEW | OBJECT_MATVIEW | OBJECT_INDEX
                    | OBJECT_SEQUENCE => elements::<pg_sys::List>(drop.objects)
                        .into_iter()
                        .map(|names| pg_sys::makeRangeVarFromNameList(names))
                        .collect(),
                    _ => Vec::new(),
                };
            }
            _ => return Vec::new(),
        };
        if relation.is_null() {
            return Vec::new();
        }
        vec![relation]
    }
}

/// Whether a statement only changes relations that are not synchronised, which servers
/// below need not have.
///
/// # Safety
/// `node` is a parsed statement of this tag.
unsafe fn is_optional(node: *mut pg_sys::Node, tag: NodeTag) -> bool {
    // SAFETY: as said.
    let found: Vec<pg_sys::Oid> = unsafe { relations(node, tag) }
        .into_iter()
        // SAFETY: a name from the parser.
        .map(|name| unsafe { look_up(name) })
        .collect();
    !found.is_empty()
        && found
            .into_iter()
            .all(|relation| relation != pg_sys::InvalidOid && !is_listed(relation))
}

fn is_listed(relation: pg_sys::Oid) -> bool {
    let listed = || {
        Spi::connect(|client| {
            let sql = "SELECT terrace.setting_of($1) IS NOT NULL";
            let rows = client.select(sql, Some(1), &[relation.into()])?;
            rows.first().get_one::<bool>()
        })
    };
    as_owner(listed).is_ok_and(|listed| listed == Some(true))
}

/// # Safety
/// A list of pointers to `T`, or null.
unsafe fn elements<T>(list: *const pg_sys::List) -> Vec<*mut T> {
    // SAFETY: a list has as many cells as it says.
    unsafe {
        list.as_ref().map_or_else(Vec::new, |list| {
            std::slice::from_raw_parts(list.elements, list.length as usize)
                .iter()
                .map(|cell| cell.ptr_value.cast())
                .collect()
        })
    }
}

/// # Safety
/// A string of the parser, or null.
unsafe fn is_terrace(name: *const c_char) -> bool {
    // SAFETY: as said.
    !name.is_null() && unsafe { CStr::from_ptr(name) } == c"terrace"
}

/// The relation of this name, if there is one.
///
/// # Safety
/// A name from the parser.
unsafe fn look_up(name: *const pg_sys::RangeVar) -> pg_sys::Oid {
    let missing = pg_sys::RVROption::RVR_MISSING_OK;
    let lock = pg_sys::NoLock as c_int;
    // SAFETY: as said; a look-up that takes no lock may find nothing.
    unsafe { pg_sys::RangeVarGetRelidExtended(name, lock, missing, None, std::ptr::null_mut()) }
}

/// # Safety
/// A name from the parser.
unsafe fn is_temporary(name: *const pg_sys::RangeVar) -> bool {
    const TEMPORARY: c_char = b't' as c_char;
    // SAFETY: as said.
    unsafe {
        let found = look_up(name);
        (*name).relpersistence == TEMPORARY
            || found != pg_sys::InvalidOid && pg_sys::get_rel_persistence(found) == TEMPORARY
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
        let told = before(statement, text, context);
        let run = match NEXT.get() {
            Some(next) => next,
            None => process,
        };
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
        if told != NOT_TOLD {
            after(told);
        }
    }
}

/// What [`before`] gives for a statement that does not travel …
const NOT_TOLD: c_int = -1;
/// … and for one that is told when it is done; else it is a nesting level.
const LATE: c_int = 0;

#[pg_guard]
unsafe extern "C-unwind" fn before(
    statement: *mut pg_sys::PlannedStmt,
    text: *const c_char,
    context: ProcessUtilityContext::Type,
) -> c_int {
    SEEING.set(true);
    // SAFETY: as PostgreSQL called us.
    let ddl = unsafe {
        let node = (*statement).utilityStmt;
        guard::check_utility(node);
        if !is_wanted(context) || !TRAVELS.contains(&(*node).type_) || !is_top() {
            return NOT_TOLD;
        }
        Ddl::of(node, own_text(&*statement, text))
    };
    match ddl {
        None => NOT_TOLD,
        Some(ddl) if ddl.outside => {
            LATER.set(Some(ddl));
            LATE
        }
        Some(ddl) => {
            ddl.tell();
            ddl_off()
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn after(told: c_int) {
    if told != LATE {
        // SAFETY: the level that `before` began.
        unsafe { pg_sys::AtEOXact_GUC(false, told) };
    } else if let Some(ddl) = LATER.take() {
        ddl.tell();
    }
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
