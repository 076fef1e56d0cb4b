//! Sums over whole tables, for `terrace.checksums`: of each range of keys how many rows it has
//! and the sum of their hashes. Rows come from queries, or where nothing is asked of them but their
//! columns, from the table's file itself; the session rests now and then, since others work here.
//!
//! Guarantee: rows hash alike on every server where their columns say the same, whichever way they
//! come. A sum is one of 64 bits: the order of rows and the parts that a table is stored in do not
//! matter.

mod file;
mod pace;
mod row;

use std::ffi::{CString, c_int};
use std::ops::RangeInclusive;

use pgrx::prelude::*;
use pgrx::{Array, PgTupleDesc, pg_sys};

use row::{Column, RowBytes};

/// Runs queries, each of which gives a number and the columns of a row, and sums the rows:
/// those whose number is below the first of `bounds` are in range 0, and so on. Ranges that
/// have no rows are left out. The session is one of low priority from then on.
#[pg_extern]
fn sum_rows(
    // Texts, but in the database's encoding, and so no strings of Rust's.
    queries: Array<'_, &[u8]>,
    bounds: Vec<i64>,
) -> TableIterator<'static, (name!(range, i32), name!(rows, i64), name!(sum, i64))> {
    let mut receiver = Receiver::new(bounds);
    pace::begin_work();
    Spi::connect(|_| {
        for query in queries.iter().flatten() {
            receiver.run(query);
        }
    });
    receiver.sums.found()
}

/// The same of the rows of tables, of those in their files that the snapshot shows: `key` is the
/// column with a row's number, without one all rows are in range 0. With `indexes` on that column, one
/// for each table, only pages with rows from `first` on and `before` another are looked at, and only such rows.
///
/// # Errors
/// When a table has no such column, or does not keep its rows in a heap; when an index is of another kind.
#[pg_extern]
fn sum_tables(
    tables: Vec<pg_sys::Oid>,
    key: Option<&[u8]>,
    columns: Array<'_, &[u8]>,
    bounds: Vec<i64>,
    indexes: Option<Vec<pg_sys::Oid>>,
    first: Option<i64>,
    before: Option<i64>,
) -> TableIterator<'static, (name!(range, i32), name!(rows, i64), name!(sum, i64))> {
    let columns: Vec<&[u8]> = columns.iter().flatten().collect();
    let numbers = match before {
        // No number is below the lowest one.
        Some(i64::MIN) => RangeInclusive::new(1, 0),
        _ => first.unwrap_or(i64::MIN)..=before.map_or(i64::MAX, |before| before - 1),
    };
    let mut sums = Sums::new(bounds);
    pace::begin_work();
    for (place, table) in tables.into_iter().enumerate() {
        let index = indexes.as_ref().and_then(|indexes| indexes.get(place));
        file::sum_up(table, index.copied(), &numbers, key, &columns, &mut sums);
    }
    sums.found()
}

/// What has been summed so far.
struct Sums {
    /// Ascending.
    bounds: Vec<i64>,
    /// Rows and sum.
    ranges: Vec<(i64, i64)>,
    /// That the last row was in: mostly the next one is, too.
    range: usize,
}

impl Sums {
    fn new(bounds: Vec<i64>) -> Sums {
        Sums {
            ranges: vec![(0, 0); bounds.len() + 1],
            bounds,
            range: 0,
        }
    }

    /// Takes in a row. One without a number is below all others.
    fn add(&mut self, number: Option<i64>, hash: i64) {
        let range = self.range_of(number.unwrap_or(i64::MIN));
        let (rows, sum) = &mut self.ranges[range];
        *rows += 1;
        *sum = sum.wrapping_add(hash);
    }

    fn range_of(&mut self, key: i64) -> usize {
        let below = |range: usize| self.bounds.get(range).is_none_or(|bound| key < *bound);
        let from = |range: usize| range == 0 || self.bounds[range - 1] <= key;
        if !(from(self.range) && below(self.range)) {
            self.range = self.bounds.partition_point(|bound| *bound <= key);
        }
        self.range
    }

    fn found(
        self,
    ) -> TableIterator<'static, (name!(range, i32), name!(rows, i64), name!(sum, i64))> {
        TableIterator::new(
            (0..)
                .zip(self.ranges)
                .filter(|(_, (rows, _))| *rows > 0)
                .map(|(range, (rows, sum))| (range, rows, sum)),
        )
    }
}

/// What receives the rows of a query (`tcop/dest.h`); PostgreSQL knows its first member.
#[repr(C)]
struct Receiver {
    receiver: pg_sys::DestReceiver,
    columns: Vec<Column>,
    row: RowBytes,
    sums: Sums,
}

impl Receiver {
    fn new(bounds: Vec<i64>) -> Box<Receiver> {
        Box::new(Receiver {
            receiver: pg_sys::DestReceiver {
                receiveSlot: Some(receive),
                rStartup: Some(start_up),
                rShutdown: Some(nothing_to_do),
                rDestroy: Some(nothing_to_do),
                mydest: pg_sys::CommandDest::DestNone,
            },
            columns: Vec::new(),
            row: RowBytes::new(),
            sums: Sums::new(bounds),
        })
    }

    fn run(self: &mut Box<Self>, query: &[u8]) {
        let Ok(query) = CString::new(query) else {
            pgrx::error!("a query has no zero byte");
        };
        let options = pg_sys::SPIExecuteOptions {
            read_only: true,
            dest: std::ptr::from_mut::<Receiver>(self).cast(),
            ..Default::default()
        };
        // SAFETY: in an SPI connection; query and receiver outlive the call.
        let code = unsafe { pg_sys::SPI_execute_extended(query.as_ptr(), &options) };
        if code < 0 {
            pgrx::error!("a query to be summed was not run (SPI code {code})");
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn start_up(
    receiver: *mut pg_sys::DestReceiver,
    _operation: c_int,
    shape: pg_sys::TupleDesc,
) {
    // SAFETY: what is told to us is what `run` gave, and the shape of its query's rows.
    unsafe {
        let receiver = &mut *receiver.cast::<Receiver>();
        let shape = PgTupleDesc::from_pg_unchecked(shape);
        receiver.columns = shape
            .iter()
            .map(|column| Column::of(column.atttypid, column.atttypmod))
            .collect();
        if !matches!(receiver.columns.first(), Some(Column::Int(_))) {
            pgrx::error!("the first column of a query to be summed is an integer");
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn receive(
    slot: *mut pg_sys::TupleTableSlot,
    receiver: *mut pg_sys::DestReceiver,
) -> bool {
    // SAFETY: as in `start_up`; a slot has as many values as its columns once they were got.
    let size = unsafe {
        let receiver = &mut *receiver.cast::<Receiver>();
        let count = receiver.columns.len();
        if ((*slot).tts_nvalid as usize) < count {
            pg_sys::slot_getsomeattrs_int(slot, count as c_int);
        }
        let values = std::slice::from_raw_parts((*slot).tts_values, count);
        let nulls = std::slice::from_raw_parts((*slot).tts_isnull, count);
        receiver.row.clear();
        for i in 1..count {
            let value = (!nulls[i]).then_some(values[i]);
            receiver.row.put(&mut receiver.columns[i], value);
        }
        let key = (!nulls[0]).then_some(values[0]);
        let key = receiver.columns[0].number(key);
        receiver.sums.add(key, receiver.row.hash());
        receiver.row.size()
    };
    pace::pass(1, size);
    true
}

#[pg_guard]
unsafe extern "C-unwind" fn nothing_to_do(_receiver: *mut pg_sys::DestReceiver) {}
