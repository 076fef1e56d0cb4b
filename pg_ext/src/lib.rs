//! The part of the extension that SQL cannot say: session settings, the tag
//! that is written when a transaction commits, and the publication's tie to
//! the extension. Everything else is in `sql/`.
//!
//! Guarantee: a transaction that changed a synchronised table carries exactly
//! one tag, as the last message before its commit record. A statement trigger
//! arms it, the transaction callback writes it, so nothing need be preloaded.
//! A transaction that is rolled back leaves nothing; one whose armed
//! subtransaction was rolled back may carry a tag and no change, which is harmless.

mod ddl;
mod fill;
mod guard;
mod hold;
mod owner;
mod sender;
mod sums;
mod utility;
mod watch;

use std::cell::{Cell, RefCell};
use std::ffi::CString;
use std::os::raw::{c_char, c_void};

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::prelude::*;

pgrx::pg_module_magic!();

static LABEL: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static DOMAINS: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static SYNC: GucSetting<bool> = GucSetting::<bool>::new(true);
/// Looked at by `terrace.slices_of`.
static COMPARE_SLICE: GucSetting<i32> = GucSetting::<i32>::new(256);

/// A tag that a bridge takes is of less than 64 KiB.
const MAX_LABEL: usize = 1_000;
const MAX_DOMAINS: usize = 1_000;

thread_local! {
    /// Domains resolved for the `terrace.domains` setting of this transaction;
    /// present when a synchronised table has been changed.
    static ARMED: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
    /// This transaction is to be applied by itself.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Called by PostgreSQL when the library is loaded.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    GucRegistry::define_string_guc(
        c"terrace.label",
        c"Label of this session's transactions, shown with the lag.",
        c"Travels in the tag of each transaction that changes a synchronised table.",
        &LABEL,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"terrace.domains",
        c"Domains that this session's transactions are for, separated by commas.",
        c"Empty means all. Domains on the way to the named ones receive them too.",
        &DOMAINS,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"terrace.compare_slice",
        c"Size of the slices in which a table is compared.",
        c"Smaller ones hold a snapshot for a shorter time, and cost more in all.",
        &COMPARE_SLICE,
        1,
        i32::MAX,
        GucContext::Userset,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_bool_guc(
        c"terrace.sync",
        c"Whether this session's transactions are synchronised.",
        c"When off, they stay at the top.",
        &SYNC,
        GucContext::Userset,
        GucFlags::default(),
    );
    ddl::init();
    owner::init();
    utility::init();
    // SAFETY: the callback is a plain function that lives as long as the library.
    unsafe { pg_sys::RegisterXactCallback(Some(on_transaction_end), std::ptr::null_mut()) };
}

/// Tells PostgreSQL how [`arm_tag_wrapper`] is called (`fmgr.h`, PG_FUNCTION_INFO_V1).
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_finfo_arm_tag_wrapper() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// Trigger on each synchronised table: the current transaction is to be tagged.
///
/// It runs for every statement at the top, so it looks at nothing of the trigger:
/// a BEFORE STATEMENT trigger has no row, and its result is not read.
///
/// # Safety
/// Called by PostgreSQL's trigger manager alone.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn arm_tag_wrapper(
    _fcinfo: pg_sys::FunctionCallInfo,
) -> pg_sys::Datum {
    if let Err(error) = arm() {
        pgrx::error!("terrace: {error}");
    }
    pg_sys::Datum::from(0)
}

/// Does what the trigger does, for changes that are no rows.
#[pg_extern]
fn arm_now() -> Result<(), spi::Error> {
    guard::refuse_if_guarded("send messages");
    arm()
}

/// As [`arm_now`]; and servers below apply this transaction by itself.
#[pg_extern]
fn arm_alone() -> Result<(), spi::Error> {
    ALONE.set(true);
    arm_now()
}

fn arm() -> Result<(), spi::Error> {
    if ARMED.with_borrow(Option::is_some) {
        return Ok(());
    }
    // The way to a domain is looked up once a transaction, and only when asked for.
    let domains = match DOMAINS.get() {
        Some(list) if !list.is_empty() => {
            let list = list.to_string_lossy().into_owned();
            // Not `get_one_with_args`, which gives the transaction an id.
            Spi::connect(|client| {
                let sql = "SELECT terrace.with_ancestors(pg_catalog.regexp_split_to_array($1, '\\s*,\\s*'))";
                let rows = client.select(sql, Some(1), &[list.into()])?;
                rows.first().get_one::<Vec<String>>()
            })?
            .unwrap_or_default()
        }
        _ => Vec::new(),
    };
    ARMED.with_borrow_mut(|armed| *armed = Some(domains));
    Ok(())
}

#[pg_guard]
unsafe extern "C-unwind" fn on_transaction_end(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT | pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE => {
            // The trigger runs before the statement; one that changed nothing has no id.
            let alone = ALONE.take();
            // SAFETY: inside a transaction.
            let changed =
                unsafe { pg_sys::GetTopTransactionIdIfAny() } != pg_sys::InvalidTransactionId;
            if let Some(domains) = ARMED.take()
                && changed
            {
                write_tag(&domains, alone);
            }
        }
        pg_sys::XactEvent::XACT_EVENT_COMMIT
        | pg_sys::XactEvent::XACT_EVENT_ABORT
        | pg_sys::XactEvent::XACT_EVENT_PREPARE => {
            ARMED.take();
            ALONE.take();
            if event == pg_sys::XactEvent::XACT_EVENT_ABORT {
                ddl::forget(ddl::WHOLE);
                hold::forget();
            }
        }
        _ => {}
    }
}

fn write_tag(domains: &[String], alone: bool) {
    // SAFETY: inside a transaction; a change was made, so the id exists or is due.
    let xid = unsafe { pg_sys::GetTopFullTransactionId() }.value;
    let mut tag = format!("{{\"tag\":\"{xid}\"");
    if let Some(label) = LABEL.get() {
        let label = label.to_string_lossy();
        if label.len() > MAX_LABEL {
            too_long(
                "terrace.label is too long",
                format!("The limit is {MAX_LABEL} bytes."),
            );
        }
        if !label.is_empty() {
            tag.push_str(",\"label\":");
            put_json(&mut tag, &label);
        }
    }
    if domains.len() > MAX_DOMAINS {
        let limit = format!("The limit is {MAX_DOMAINS} domains, with those on the way to them.");
        too_long("terrace.domains names too many domains", limit);
    }
    if !domains.is_empty() {
        tag.push_str(",\"domains\":[");
        for (index, domain) in domains.iter().enumerate() {
            if index > 0 {
                tag.push(',');
            }
            put_json(&mut tag, domain);
        }
        tag.push(']');
    }
    if !SYNC.get() {
        tag.push_str(",\"sync\":false");
    }
    if alone {
        tag.push_str(",\"alone\":true");
    }
    tag.push_str(",\"user\":");
    put_json(&mut tag, &session_user());
    tag.push('}');
    log_message(&tag);
}

fn too_long(what: &str, limit: String) {
    ereport!(
        PgLogLevel::ERROR,
        PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
        what.to_owned(),
        limit
    );
}

/// Writes a message that bridges obey into this transaction. Anybody may write messages,
/// so each is announced by a row of `terrace.seal`, which only the extension writes.
pub(crate) fn write_sealed(prefix: &str, content: &str) {
    let written = as_owner(|| {
        Spi::run_with_args(
            "SELECT terrace.write_sealed($1, $2)",
            &[prefix.into(), content.into()],
        )
    });
    if let Err(error) = written {
        pgrx::error!("terrace: {error}");
    }
}

/// Runs with the rights of whom the extension belongs to. An error ends the transaction
/// or a part of it, which puts the user back as well.
pub(crate) fn as_owner<R>(run: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    let owner = pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID);
    // SAFETY: inside a transaction; what was is put back.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let local = context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
        pg_sys::SetUserIdAndSecContext(owner, local);
    }
    let result = run();
    // SAFETY: as above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    result
}

fn session_user() -> String {
    // SAFETY: the session user exists while its session runs; the name is copied.
    unsafe {
        let name = pg_sys::GetUserNameFromId(pg_sys::GetSessionUserId(), true);
        if name.is_null() {
            return String::new();
        }
        std::ffi::CStr::from_ptr(name)
            .to_string_lossy()
            .into_owned()
    }
}

// src/include/replication/message.h; not in pgrx's bindings.
unsafe extern "C-unwind" {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
    ) -> pg_sys::XLogRecPtr;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
        flush: bool,
    ) -> pg_sys::XLogRecPtr;
}

fn log_message(content: &str) {
    let (prefix, message) = (c"terrace".as_ptr(), content.as_ptr().cast());
    // SAFETY: prefix and content outlive the call, which copies them into the WAL;
    // the signature is that of the major version that this is built for.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        LogLogicalMessage(prefix, message, content.len(), true);
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        LogLogicalMessage(prefix, message, content.len(), true, false);
    }
}

/// Runs SQL that is in the encoding of the database, which need not be UTF8.
pub(crate) fn run_bytes(sql: &[u8]) {
    let Ok(sql) = CString::new(sql) else {
        pgrx::error!("terrace: a statement has a zero byte");
    };
    let run = Spi::connect_mut(|client| client.update(sql.as_c_str(), None, &[]).map(drop));
    if let Err(error) = run {
        pgrx::error!("terrace: {error}");
    }
}

pub(crate) fn put_json(out: &mut String, text: &str) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' | '\\' => {
                out.push('\\');
                out.push(char);
            }
            char if char < ' ' => out.push_str(&format!("\\u{:04x}", char as u32)),
            char => out.push(char),
        }
    }
    out.push('"');
}

/// Makes a publication go with the extension when that is dropped. SQL cannot:
/// a publication can be no member of an extension.
#[pg_extern]
fn tie_publication(publication: pg_sys::Oid, extension: pg_sys::Oid) {
    let address = |class, object| pg_sys::ObjectAddress {
        classId: class,
        objectId: object,
        objectSubId: 0,
    };
    let depender = address(pg_sys::PublicationRelationId, publication);
    let referenced = address(pg_sys::ExtensionRelationId, extension);
    // SAFETY: both addresses live through the call, which only reads them.
    unsafe {
        pg_sys::recordDependencyOn(
            &depender,
            &referenced,
            pg_sys::DependencyType::DEPENDENCY_AUTO,
        );
    }
}
