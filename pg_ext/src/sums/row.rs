//! What is hashed of a row.
//!
//! Guarantee: rows hash alike on every server where their columns say the same: integers of
//! any width, texts of any type and in any encoding of the database, everything else by its
//! text. Each value is told from its neighbours, and a long one stands there by its hash, so rows
//! that differ give the hash other bytes.

use std::ffi::{CStr, c_char, c_int};

use pgrx::varlena::{varatt_is_1b, varatt_is_1b_e, varatt_is_4b_u, vardata_any, varsize_any_exhdr};
use pgrx::{PgMemoryContexts, pg_sys};
use twox_hash::XxHash3_64;

/// How the values of a column are read.
pub(super) enum Column {
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
pub(super) enum Width {
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
    /// Of a type and its modifier, looked at in the current memory context.
    ///
    /// # Safety
    /// There must be such a type.
    pub(super) unsafe fn of(type_: pg_sys::Oid, mut modifier: i32) -> Column {
        // SAFETY: as the caller promises.
        match unsafe { pg_sys::getBaseTypeAndTypmod(type_, &mut modifier) } {
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
            // Without a length nothing is padded, and blanks are those that somebody wrote.
            pg_sys::BPCHAROID if modifier < 0 => Column::Text,
            pg_sys::BPCHAROID => Column::Padded,
            base => {
                let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
                let mut function = Box::<pg_sys::FmgrInfo>::default();
                // SAFETY: as the caller promises.
                unsafe {
                    pg_sys::getTypeOutputInfo(base, &mut output, &mut is_varlena);
                    pg_sys::fmgr_info(output, &mut *function);
                }
                Column::Other(function)
            }
        }
    }

    /// A row's number, if it has one.
    pub(super) fn number(&self, value: Option<pg_sys::Datum>) -> Option<i64> {
        match (self, value) {
            (Column::Int(width), Some(value)) => Some(width.read(value)),
            _ => None,
        }
    }
}

/// The bytes of a row.
pub(super) struct RowBytes {
    bytes: Vec<u8>,
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
    pub(super) fn new() -> RowBytes {
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

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.size = 0;
    }

    pub(super) fn hash(&self) -> i64 {
        XxHash3_64::oneshot(&self.bytes) as i64
    }

    /// Bytes of its texts, as long as they were.
    pub(super) fn size(&self) -> usize {
        self.size
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

    /// The next value, none where it is NULL.
    ///
    /// # Safety
    /// The value must be one of the column's.
    pub(super) unsafe fn put(&mut self, column: &mut Column, value: Option<pg_sys::Datum>) {
        let Some(value) = value else {
            return self.bytes.push(NULL);
        };
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
        // SAFETY: what was the context before is put back, after an error by the drop of the other.
        unsafe { self.scratch.switch_to(|_| run()) }
    }
}

fn without_blanks(mut text: &[u8]) -> &[u8] {
    // As one number: byte by byte it takes as long as all else.
    const BLANKS: u128 = u128::from_ne_bytes([b' '; 16]);
    while let Some((rest, last)) = text.split_last_chunk()
        && u128::from_ne_bytes(*last) == BLANKS
    {
        text = rest;
    }
    let end = text.iter().rposition(|byte| *byte != b' ');
    &text[..end.map_or(0, |last| last + 1)]
}
