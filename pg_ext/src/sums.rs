//! Sums over whole tables, for `terrace.checksums`: of each range of keys how many rows it has
//! and the sum of their hashes. Rows go from the scan to the hash without anything between,
//! and the session rests now and then, since others work here.
//!
//! Guarantee: rows hash alike on every server where their columns say the same: integers of
//! any width, texts of any type and in any encoding of the database, everything else by its
//! text. Each value is told from its neighbours, and a long one stands there by its hash, so rows that
//! differ give the hash other bytes. A sum is one of 64 bits: the order of rows and the parts that a table is
//! stored in do not matter.

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::os::raw::{c_char, c_int};
use std::time::{Duration, Instant};

use pgrx::prelude::*;
use pgrx::varlena::{varatt_is_1b, varatt_is_1b_e, varatt_is_4b_u, vardata_any, varsize_any_exhdr};
use pgrx::{Array, PgMemoryContexts, PgTupleDesc, pg_sys};
use twox_hash::XxHash3_64;

/// Runs queries, each of which gives a number and the columns of a row, and sums the rows:
/// those whose number is below the first of `bounds` are in range 0, and so on. Ranges that
/// have no rows are left out. The session is one of low priority from then on.
#[pg_extern]
fn sum_rows(
    // Texts, but in the database's encoding, and so no strings of Rust's.
    queries: Array<'_, &[u8]>,
    bounds: Vec<i64>,
) -> TableIterator<'static, (name!(range, i32), name!(rows, i64), name!(sum, i64))> {
    let mut sums = Sums::new(bounds);
    begin_work();
    Spi::connect(|_| {
        for query in queries.iter().flatten() {
            sums.run(query);
        }
    });
    TableIterator::new(
        (0..)
            .zip(sums.ranges)
            .filter(|(_, (rows, _))| *rows > 0)
            .map(|(range, (rows, sum))| (range, rows, sum)),
    )
}

/// What receives the rows of a query (`tcop/dest.h`); PostgreSQL knows its first member.
#[repr(C)]
struct Sums {
    receiver: pg_sys::DestReceiver,
    columns: Vec<Column>,
    /// Ascending.
    bounds: Vec<i64>,
    /// Rows and sum.
    ranges: Vec<(i64, i64)>,
    /// That the last row was in: mostly the next one is, too.
    range: usize,
    row: RowBytes,
}

impl Sums {
    fn new(bounds: Vec<i64>) -> Box<Sums> {
        Box::new(Sums {
            receiver: pg_sys::DestReceiver {
                receiveSlot: Some(receive),
                rStartup: Some(start_up),
                rShutdown: Some(nothing_to_do),
                rDestroy: Some(nothing_to_do),
                mydest: pg_sys::CommandDest::DestNone,
            },
            columns: Vec::new(),
            ranges: vec![(0, 0); bounds.len() + 1],
            bounds,
            range: 0,
            row: RowBytes::new(),
        })
    }

    fn run(self: &mut Box<Self>, query: &[u8]) {
        let Ok(query) = CString::new(query) else {
            pgrx::error!("a query has no zero byte");
        };
        let options = pg_sys::SPIExecuteOptions {
            read_only: true,
            dest: std::ptr::from_mut::<Sums>(self).cast(),
            ..Default::default()
        };
        // SAFETY: in an SPI connection; query and receiver outlive the call.
        let code = unsafe { pg_sys::SPI_execute_extended(query.as_ptr(), &options) };
        if code < 0 {
            pgrx::error!("a query to be summed was not run (SPI code {code})");
        }
    }

    fn range_of(&mut self, key: i64) -> usize {
        let below = |range: usize| self.bounds.get(range).is_none_or(|bound| key < *bound);
        let from = |range: usize| range == 0 || self.bounds[range - 1] <= key;
        if !(from(self.range) && below(self.range)) {
            self.range = self.bounds.partition_point(|bound| *bound <= key);
        }
        self.range
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn start_up(
    sums: *mut pg_sys::DestReceiver,
    _operation: c_int,
    shape: pg_sys::TupleDesc,
) {
    // SAFETY: what is told to us is what `run` gave, and the shape of its query's rows.
    unsafe {
        let sums = &mut *sums.cast::<Sums>();
        let shape = PgTupleDesc::from_pg_unchecked(shape);
        sums.columns = shape
            .iter()
            .map(|column| Column::of(column.atttypid))
            .collect();
        if !matches!(sums.columns.first(), Some(Column::Int(_))) {
            pgrx::error!("the first column of a query to be summed is an integer");
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn receive(
    slot: *mut pg_sys::TupleTableSlot,
    sums: *mut pg_sys::DestReceiver,
) -> bool {
    // SAFETY: as in `start_up`; a slot has as many values as its columns once they were got.
    let size = unsafe {
        let sums = &mut *sums.cast::<Sums>();
        let count = sums.columns.len();
        if ((*slot).tts_nvalid as usize) < count {
            pg_sys::slot_getsomeattrs_int(slot, count as c_int);
        }
        let values = std::slice::from_raw_parts((*slot).tts_values, count);
        let nulls = std::slice::from_raw_parts((*slot).tts_isnull, count);
        sums.row.clear();
        for i in 1..count {
            match nulls[i] {
                true => sums.row.put_null(),
                false => sums.row.put(&mut sums.columns[i], values[i]),
            }
        }
        let key = match (&sums.columns[0], nulls[0]) {
            (Column::Int(width), false) => width.read(values[0]),
            _ => i64::MIN,
        };
        let range = sums.range_of(key);
        let (rows, sum) = &mut sums.ranges[range];
        *rows += 1;
        *sum = sum.wrapping_add(sums.row.hash());
        sums.row.size
    };
    pass(size);
    true
}

#[pg_guard]
unsafe extern "C-unwind" fn nothing_to_do(_sums: *mut pg_sys::DestReceiver) {}

/// How the values of a column are read.
enum Column {
    Int(Width),
    Uuid,
    Bytes,
    Text,
    /// Blanks at its end are no part of it.
    Padded,
    /// By the type's output function.
    Other(Box<pg_sys::FmgrInfo>),
}

/// Of a number that is in a datum.
#[derive(Clone, Copy)]
enum Width {
    Bool,
    Int2,
    Int4,
    Int8,
    Oid,
}

impl Width {
    fn read(self, value: pg_sys::Datum) -> i64 {
        match self {
            Width::Bool => (value.value() as u8 != 0).into(),
            Width::Int2 => (value.value() as i16).into(),
            Width::Int4 => (value.value() as i32).into(),
            Width::Int8 => value.value() as i64,
            Width::Oid => (value.value() as u32).into(),
        }
    }
}

impl Column {
    /// # Safety
    /// There must be such a type.
    unsafe fn of(type_: pg_sys::Oid) -> Column {
        // SAFETY: as the caller promises.
        match unsafe { pg_sys::getBaseType(type_) } {
            pg_sys::BOOLOID => Column::Int(Width::Bool),
            pg_sys::INT2OID => Column::Int(Width::Int2),
            pg_sys::INT4OID | pg_sys::DATEOID => Column::Int(Width::Int4),
            pg_sys::INT8OID | pg_sys::TIMESTAMPOID | pg_sys::TIMESTAMPTZOID => {
                Column::Int(Width::Int8)
            }
            pg_sys::OIDOID => Column::Int(Width::Oid),
            pg_sys::UUIDOID => Column::Uuid,
            pg_sys::BYTEAOID => Column::Bytes,
            pg_sys::TEXTOID | pg_sys::VARCHAROID => Column::Text,
            pg_sys::BPCHAROID => Column::Padded,
            base => {
                let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
                let mut function = Box::<pg_sys::FmgrInfo>::default();
                // SAFETY: as the caller promises; the executor's context lives as long as the
                // query, and so do we.
                unsafe {
                    pg_sys::getTypeOutputInfo(base, &mut output, &mut is_varlena);
                    pg_sys::fmgr_info(output, &mut *function);
                }
                Column::Other(function)
            }
        }
    }
}

/// What is hashed of a row.
struct RowBytes {
    bytes: Vec<u8>,
    /// Of its texts, as long as they were.
    size: usize,
    /// For what is made to be looked at.
    scratch: PgMemoryContexts,
    is_scratched: bool,
    /// Texts are in another encoding than what is compared.
    is_foreign: bool,
}

const NULL: u8 = 0;
const NUMBER: u8 = 1;
const BYTES: u8 = 2;
const HASHED: u8 = 3;

/// Of longer values their hash is kept in place of them: rows may have more bytes than there is
/// memory, and only PostgreSQL's own allocations fail without ending the server.
const LONG: usize = 64 << 10;

impl RowBytes {
    fn new() -> RowBytes {
        // SAFETY: it looks at what the session knows of its database.
        let encoding = unsafe { pg_sys::GetDatabaseEncoding() } as pg_sys::pg_enc::Type;
        RowBytes {
            bytes: Vec::new(),
            size: 0,
            scratch: PgMemoryContexts::new("terrace row"),
            is_scratched: false,
            // Of SQL_ASCII nobody knows what it means.
            is_foreign: encoding != pg_sys::pg_enc::PG_UTF8
                && encoding != pg_sys::pg_enc::PG_SQL_ASCII,
        }
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.size = 0;
    }

    fn hash(&self) -> i64 {
        XxHash3_64::oneshot(&self.bytes) as i64
    }

    fn put_null(&mut self) {
        self.bytes.push(NULL);
    }

    fn put_number(&mut self, value: i64) {
        self.bytes.push(NUMBER);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn put_bytes(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        self.size += bytes.len();
        if bytes.len() > LONG {
            self.bytes.push(HASHED);
            self.bytes.extend_from_slice(&length);
            let hash = XxHash3_64::oneshot(bytes);
            return self.bytes.extend_from_slice(&hash.to_le_bytes());
        }
        self.bytes.push(BYTES);
        self.bytes.extend_from_slice(&length);
        self.bytes.extend_from_slice(bytes);
    }

    fn put_text(&mut self, bytes: &[u8]) {
        if !self.is_foreign || bytes.is_ascii() {
            return self.put_bytes(bytes);
        }
        let (text, length) = (bytes.as_ptr().cast::<c_char>(), bytes.len() as c_int);
        // SAFETY: it reads so many bytes, which were found valid when they were stored.
        let utf8 = self.scratched(|| unsafe {
            pg_sys::pg_server_to_any(text, length, pg_sys::pg_enc::PG_UTF8 as c_int)
        });
        match utf8.cast_const() == text {
            true => self.put_bytes(bytes),
            // SAFETY: what it makes ends with a zero byte.
            false => self.put_bytes(unsafe { CStr::from_ptr(utf8) }.to_bytes()),
        }
    }

    /// # Safety
    /// The value must be one of the column's.
    unsafe fn put(&mut self, column: &mut Column, value: pg_sys::Datum) {
        // SAFETY: as the caller promises.
        unsafe {
            match column {
                Column::Int(width) => self.put_number(width.read(value)),
                Column::Uuid => self.put_bytes(&*value.cast_mut_ptr::<[u8; 16]>()),
                Column::Bytes => {
                    let bytes = self.plain(value);
                    self.put_bytes(bytes);
                }
                Column::Text => {
                    let text = self.plain(value);
                    self.put_text(text);
                }
                Column::Padded => {
                    let text = self.plain(value);
                    self.put_text(without_blanks(text));
                }
                Column::Other(function) => {
                    let text =
                        self.scratched(|| pg_sys::OutputFunctionCall(&mut **function, value));
                    self.put_text(CStr::from_ptr(text).to_bytes());
                }
            }
        }
        if std::mem::take(&mut self.is_scratched) {
            // SAFETY: what was made of the value is not looked at any more.
            unsafe { self.scratch.reset() };
        }
    }

    /// The bytes of a value of varying length, fetched when they are not with the row. They
    /// last as long as the value is put.
    ///
    /// # Safety
    /// It must be such a value.
    unsafe fn plain<'a>(&mut self, value: pg_sys::Datum) -> &'a [u8] {
        let mut value = value.cast_mut_ptr::<pg_sys::varlena>();
        // SAFETY: as the caller promises.
        unsafe {
            if !(varatt_is_4b_u(value) || varatt_is_1b(value) && !varatt_is_1b_e(value)) {
                value = self.scratched(|| pg_sys::pg_detoast_datum_packed(value));
            }
            std::slice::from_raw_parts(vardata_any(value).cast(), varsize_any_exhdr(value))
        }
    }

    fn scratched<R>(&mut self, run: impl FnOnce() -> R) -> R {
        self.is_scratched = true;
        // SAFETY: what was the context before is put back; after an error SPI does that.
        unsafe { self.scratch.switch_to(|_| run()) }
    }
}

fn without_blanks(mut text: &[u8]) -> &[u8] {
    const BLANKS: &[u8; 16] = &[b' '; 16];
    while let Some((rest, BLANKS)) = text.split_last_chunk() {
        text = rest;
    }
    let end = text.iter().rposition(|byte| *byte != b' ');
    &text[..end.map_or(0, |last| last + 1)]
}

/// A condition that is true of every row: for those that a filter leaves out, which the sums
/// do not see.
#[pg_extern]
fn give_way() -> bool {
    pass(0);
    true
}

thread_local! {
    /// Rows and bytes since the time was looked at.
    static PASSED: Cell<(u32, usize)> = const { Cell::new((0, 0)) };
    /// When the session began to work or had its last rest, and its processor time then.
    static SINCE: Cell<Option<(Instant, Duration)>> = const { Cell::new(None) };
}

/// Called before the first row. From then on the processor goes to whoever else wants it. There is
/// no way back, so the session should be one that does nothing else. Nobody waits for it long: it
/// holds a lock on a page while it looks at that.
fn begin_work() {
    unsafe extern "C" {
        fn nice(increment: c_int) -> c_int;
    }
    if SINCE.replace(Some(now())).is_none() {
        // SAFETY: of the C library; what it answers is of no interest, nor is a refusal.
        unsafe { nice(10) };
    }
}

/// Called for each row: now and then rests for some times as long as the session has worked
/// since, and longer where others were in the way, so that it does not take the processor from
/// those who work here. Waiting for the processor is no work: where many wait, all would rest for
/// ever longer.
fn pass(bytes: usize) {
    /// So many rows or bytes pass before the time is looked at.
    const ROWS: u32 = 64;
    const MANY_BYTES: usize = 256 << 10;
    /// Work before a rest: with less, what a rest itself costs is felt.
    const WORK: Duration = Duration::from_millis(50);
    /// A rest is so many times as long, alone …
    const ALONE: f64 = 3.0;
    /// … and where work took half as long again as it took of a processor.
    const IN_COMPANY: f64 = 4.0;
    let (rows, before) = PASSED.get();
    PASSED.set((rows + 1, before + bytes));
    if rows < ROWS && before < MANY_BYTES {
        return;
    }
    PASSED.set((0, 0));
    let Some((since, had)) = SINCE.get() else {
        return;
    };
    let work = since.elapsed();
    if work < WORK {
        return;
    }
    let used = processor_time().saturating_sub(had);
    let factor = match work > used * 3 / 2 {
        true => IN_COMPANY,
        false => ALONE,
    };
    rest(used.mul_f64(factor));
    SINCE.set(Some(now()));
}

fn rest(mut time: Duration) {
    const SLICE: Duration = Duration::from_millis(100);
    while !time.is_zero() {
        pgrx::check_for_interrupts!();
        let slice = time.min(SLICE);
        std::thread::sleep(slice);
        time -= slice;
    }
}

fn now() -> (Instant, Duration) {
    (Instant::now(), processor_time())
}

/// Of this process.
fn processor_time() -> Duration {
    unsafe extern "C" {
        fn clock() -> std::os::raw::c_long;
    }
    // SAFETY: of the C library; POSIX has it in microseconds, negative when not known.
    Duration::from_micros(unsafe { clock() }.try_into().unwrap_or(0))
}
