//! The rows of a table in the order of its file.
//!
//! Guarantee: what a sequential scan in the active snapshot finds (`heapgetpage` of
//! `access/heap/heapam.c`, `heap_prepare_pagescan` since 17), each row once. Unlike that it prunes no
//! pages, which writes WAL; it takes values out of a row where they are, as `heap_deform_tuple` does
//! (`access/common/heaptuple.c`); and it holds no page while it rests. Where numbers are given,
//! of the rows that have one of them: an index says which pages those are on, and has each row that
//! the snapshot shows.

use std::ffi::{CStr, CString, c_int};
use std::mem::offset_of;
use std::ops::RangeInclusive;

use pgrx::varlena::varsize_any;
use pgrx::{PgRelation, pg_sys};

use super::Sums;
use super::pace::pass;
use super::row::{Column, RowBytes};

const SHARED: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// Adds the rows of a table.
pub(super) fn sum_up(
    table: pg_sys::Oid,
    index: Option<pg_sys::Oid>,
    numbers: &RangeInclusive<i64>,
    key: Option<&[u8]>,
    columns: &[&[u8]],
    sums: &mut Sums,
) {
    // SAFETY: the lock is had before anything is looked at.
    let table = unsafe { PgRelation::with_lock(table, SHARED) };
    // SAFETY: an open relation has its row of pg_class.
    if unsafe { (*table.rd_rel).relam } != pg_sys::HEAP_TABLE_AM_OID {
        pgrx::error!(
            "table \"{}\" does not keep its rows in a heap",
            table.name()
        );
    }
    let mut shape = Shape::of(&table, key, columns);
    let mut row = RowBytes::new();
    // SAFETY: the table is open, and a function that is called has a snapshot.
    let (blocks, snapshot, strategy) = unsafe {
        (
            pg_sys::RelationGetNumberOfBlocksInFork(
                table.as_ptr(),
                pg_sys::ForkNumber::MAIN_FORKNUM,
            ),
            pg_sys::GetActiveSnapshot(),
            pg_sys::GetAccessStrategy(pg_sys::BufferAccessStrategyType::BAS_BULKREAD),
        )
    };
    let wanted = index.map(|index| pages(&table, index, numbers, blocks));
    let mut tuples = Vec::new();
    for block in 0..blocks {
        pgrx::check_for_interrupts!();
        if wanted.as_ref().is_some_and(|pages| !pages.has(block)) {
            continue;
        }
        let mut bytes = 0;
        // SAFETY: the block is one of the table's, and its buffer stays where it is as long as it is
        // pinned; so do rows that somebody sees.
        unsafe {
            let buffer = pg_sys::ReadBufferExtended(
                table.as_ptr(),
                pg_sys::ForkNumber::MAIN_FORKNUM,
                block,
                pg_sys::ReadBufferMode::RBM_NORMAL,
                strategy,
            );
            pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as c_int);
            visible(&table, buffer, block, snapshot, &mut tuples);
            pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as c_int);
            for tuple in &tuples {
                shape.take_apart(*tuple);
                let number = shape.number();
                if index.is_none() || number.is_some_and(|number| numbers.contains(&number)) {
                    shape.write(&mut row);
                    sums.add(number, row.hash());
                    bytes += row.size();
                }
            }
            pg_sys::ReleaseBuffer(buffer);
        }
        pass(tuples.len().max(1) as u32, bytes);
    }
    // SAFETY: it was made above, and no buffer is read any more.
    unsafe { pg_sys::FreeAccessStrategy(strategy) };
}

/// Some of a file's pages, a bit each.
struct Pages(Vec<u64>);

impl Pages {
    fn add(&mut self, block: pg_sys::BlockNumber) {
        if let Some(word) = self.0.get_mut(block as usize / 64) {
            *word |= 1 << (block % 64);
        }
    }

    fn has(&self, block: pg_sys::BlockNumber) -> bool {
        self.0[block as usize / 64] & 1 << (block % 64) != 0
    }
}

/// Where an index on integers says that rows with these numbers are.
fn pages(
    table: &PgRelation,
    index: pg_sys::Oid,
    numbers: &RangeInclusive<i64>,
    blocks: pg_sys::BlockNumber,
) -> Pages {
    let mut pages = Pages(vec![0; blocks.div_ceil(64) as usize]);
    // SAFETY: the lock is had before anything is looked at.
    let index = unsafe { PgRelation::with_lock(index, SHARED) };
    // SAFETY: an open index has its row of pg_index.
    if unsafe { index.rd_index.as_ref() }.is_none_or(|row| row.indrelid != table.oid()) {
        pgrx::error!(
            "\"{}\" is not an index on table \"{}\"",
            index.name(),
            table.name()
        );
    }
    let mut keys = [
        (pg_sys::BTGreaterEqualStrategyNumber, *numbers.start()),
        (pg_sys::BTLessEqualStrategyNumber, *numbers.end()),
    ]
    .map(|(strategy, bound)| scan_key(&index, strategy, bound));
    let count = keys.len() as c_int;
    // SAFETY: both are open, the keys are for this index, and a function that is called has a
    // snapshot; what is found is looked at before the next one is.
    unsafe {
        let (heap, index) = (table.as_ptr(), index.as_ptr());
        let snapshot = pg_sys::GetActiveSnapshot();
        #[cfg(not(feature = "pg18"))]
        let scan = pg_sys::index_beginscan(heap, index, snapshot, count, 0);
        #[cfg(feature = "pg18")]
        let scan = pg_sys::index_beginscan(heap, index, snapshot, std::ptr::null_mut(), count, 0);
        pg_sys::index_rescan(scan, keys.as_mut_ptr(), count, std::ptr::null_mut(), 0);
        loop {
            let found =
                pg_sys::index_getnext_tid(scan, pg_sys::ScanDirection::ForwardScanDirection);
            let Some(place) = found.as_ref() else { break };
            let block = place.ip_blkid;
            pages.add(u32::from(block.bi_hi) << 16 | u32::from(block.bi_lo));
            pgrx::check_for_interrupts!();
            pass(1, 0);
        }
        pg_sys::index_endscan(scan);
    }
    pages
}

/// A comparison of an index's first column with a number.
fn scan_key(index: &PgRelation, strategy: u32, bound: i64) -> pg_sys::ScanKeyData {
    let mut key = pg_sys::ScanKeyData::default();
    // SAFETY: an index has a family and a type for each of its columns.
    unsafe {
        let operator = pg_sys::get_opfamily_member(
            *index.rd_opfamily,
            *index.rd_opcintype,
            pg_sys::INT8OID,
            strategy as i16,
        );
        if operator == pg_sys::InvalidOid {
            pgrx::error!("index \"{}\" is not one of integers", index.name());
        }
        pg_sys::ScanKeyEntryInitialize(
            &mut key,
            0,
            1,
            strategy as pg_sys::StrategyNumber,
            pg_sys::INT8OID,
            pg_sys::InvalidOid,
            pg_sys::get_opcode(operator),
            pg_sys::Datum::from(bound),
        );
    }
    key
}

/// The rows of a page that the snapshot shows.
///
/// # Safety
/// The buffer must hold that block of the table, and be locked.
unsafe fn visible(
    table: &PgRelation,
    buffer: pg_sys::Buffer,
    block: pg_sys::BlockNumber,
    snapshot: pg_sys::Snapshot,
    tuples: &mut Vec<pg_sys::HeapTupleHeader>,
) {
    tuples.clear();
    // SAFETY: as the caller promises; a page's items are where its line pointers say.
    unsafe {
        let page = pg_sys::BufferGetPage(buffer);
        let header = page.cast::<pg_sys::PageHeaderData>();
        let all = u32::from((*header).pd_flags) & pg_sys::PD_ALL_VISIBLE != 0
            && !(*snapshot).takenDuringRecovery;
        for (item, offset) in items(header).iter().zip(1..) {
            if item.lp_flags() != pg_sys::LP_NORMAL {
                continue;
            }
            let mut tuple = pg_sys::HeapTupleData {
                t_len: item.lp_len(),
                t_self: pg_sys::ItemPointerData {
                    ip_blkid: pg_sys::BlockIdData {
                        bi_hi: (block >> 16) as u16,
                        bi_lo: block as u16,
                    },
                    ip_posid: offset,
                },
                t_tableOid: table.oid(),
                t_data: page.add(item.lp_off() as usize).cast(),
            };
            if all || pg_sys::HeapTupleSatisfiesVisibility(&mut tuple, snapshot, buffer) {
                tuples.push(tuple.t_data);
            }
        }
    }
}

/// A page's line pointers (`PageGetMaxOffsetNumber` of `storage/bufpage.h`).
///
/// # Safety
/// It must be a page that is initialised or all zero, and locked.
unsafe fn items<'a>(page: *const pg_sys::PageHeaderData) -> &'a [pg_sys::ItemIdData] {
    // SAFETY: as the caller promises: they lie between the header and its pd_lower.
    unsafe {
        let end = usize::from((*page).pd_lower);
        let bytes = end.saturating_sub(offset_of!(pg_sys::PageHeaderData, pd_linp));
        let count = bytes / size_of::<pg_sys::ItemIdData>();
        std::slice::from_raw_parts((&raw const (*page).pd_linp).cast(), count)
    }
}

/// An attribute as it lies in a row.
struct Attribute {
    length: i16,
    /// To a multiple of so many bytes, a power of two.
    align: usize,
    by_value: bool,
}

/// Where the columns of a table's rows are, and those of the row that is looked at.
struct Shape {
    descriptor: pg_sys::TupleDesc,
    /// Up to the last one that is wanted.
    attributes: Vec<Attribute>,
    values: Vec<Option<pg_sys::Datum>>,
    key: Option<(usize, Column)>,
    /// In the order in which they are hashed.
    columns: Vec<(usize, Column)>,
}

impl Shape {
    fn of(table: &PgRelation, key: Option<&[u8]>, columns: &[&[u8]]) -> Shape {
        let descriptor = table.tuple_desc();
        let find = |name: &&[u8]| {
            let number = number(table, name);
            let attribute = descriptor.get(number)?;
            // SAFETY: the type of a column that is there.
            let column = unsafe { Column::of(attribute.atttypid, attribute.atttypmod) };
            Some((number, column))
        };
        let columns: Vec<_> = columns.iter().filter_map(find).collect();
        let key = key.as_ref().and_then(find);
        if !matches!(key, None | Some((_, Column::Int(_)))) {
            pgrx::error!("a column with the numbers of rows is one of integers");
        }
        let wanted = columns.iter().chain(&key).map(|(number, _)| number + 1);
        let attributes = descriptor.iter().take(wanted.max().unwrap_or(0));
        let attributes: Vec<Attribute> = attributes
            .map(|attribute| Attribute {
                length: attribute.attlen,
                align: match attribute.attalign as u8 {
                    pg_sys::TYPALIGN_DOUBLE => align_of::<f64>(),
                    pg_sys::TYPALIGN_INT => align_of::<c_int>(),
                    pg_sys::TYPALIGN_SHORT => align_of::<i16>(),
                    _ => 1,
                },
                by_value: attribute.attbyval,
            })
            .collect();
        Shape {
            // SAFETY: it lasts as long as the table is open.
            descriptor: unsafe { (*table.as_ptr()).rd_att },
            values: vec![None; attributes.len()],
            attributes,
            key,
            columns,
        }
    }

    /// # Safety
    /// The tuple must be one of the table's.
    unsafe fn take_apart(&mut self, tuple: pg_sys::HeapTupleHeader) {
        // SAFETY: as the caller promises: values follow each other as the attributes say.
        unsafe {
            let stored = u32::from((*tuple).t_infomask2) & pg_sys::HEAP_NATTS_MASK;
            let nulls = u32::from((*tuple).t_infomask) & pg_sys::HEAP_HASNULL != 0;
            let nulls = nulls.then(|| (*tuple).t_bits.as_ptr());
            let start = tuple.cast::<u8>().add(usize::from((*tuple).t_hoff));
            let mut at = 0;
            for (number, attribute) in self.attributes.iter().enumerate() {
                self.values[number] = if number >= stored as usize {
                    self.missing(number)
                } else if nulls.is_some_and(|bits| *bits.add(number / 8) & 1 << (number % 8) == 0) {
                    None
                } else {
                    at = attribute.begin(start, at);
                    let place = start.add(at);
                    at += attribute.size(place);
                    Some(attribute.value(place))
                };
            }
        }
    }

    /// What the row has of a column that was added after it.
    ///
    /// # Safety
    /// The table must be open.
    unsafe fn missing(&self, number: usize) -> Option<pg_sys::Datum> {
        let mut is_null = true;
        // SAFETY: as the caller promises; it is one of its columns.
        let value =
            unsafe { pg_sys::getmissingattr(self.descriptor, number as c_int + 1, &mut is_null) };
        (!is_null).then_some(value)
    }

    /// Of the row that was taken apart.
    fn number(&self) -> Option<i64> {
        self.key.as_ref().map_or(Some(0), |(number, column)| {
            column.number(self.values[*number])
        })
    }

    /// Writes down what is hashed of it.
    ///
    /// # Safety
    /// The row must be where it was.
    unsafe fn write(&mut self, row: &mut RowBytes) {
        row.clear();
        for (number, column) in &mut self.columns {
            // SAFETY: as the caller promises.
            unsafe { row.put(column, self.values[*number]) };
        }
    }
}

impl Attribute {
    /// Where it begins, from the start of the values, when what is before it ends at `end`
    /// (`att_align_pointer` of `access/tupmacs.h`).
    ///
    /// # Safety
    /// It must be there.
    unsafe fn begin(&self, start: *const u8, end: usize) -> usize {
        // SAFETY: as the caller promises; what is put between for alignment is zero, and no
        // varlena with a short header begins with that.
        match self.length == -1 && unsafe { *start.add(end) } != 0 {
            true => end,
            false => (end + self.align - 1) & !(self.align - 1),
        }
    }

    /// # Safety
    /// It must be there.
    unsafe fn size(&self, place: *const u8) -> usize {
        // SAFETY: as the caller promises.
        unsafe {
            match self.length {
                -1 => varsize_any(place.cast()),
                -2 => CStr::from_ptr(place.cast()).to_bytes_with_nul().len(),
                length => length.unsigned_abs().into(),
            }
        }
    }

    /// # Safety
    /// It must be there.
    unsafe fn value(&self, place: *const u8) -> pg_sys::Datum {
        if !self.by_value {
            return pg_sys::Datum::from(place.cast_mut());
        }
        // SAFETY: as the caller promises; by value are those of 1, 2, 4 and 8 bytes.
        unsafe {
            match self.length {
                1 => pg_sys::Datum::from(*place.cast::<i8>()),
                2 => pg_sys::Datum::from(*place.cast::<i16>()),
                4 => pg_sys::Datum::from(*place.cast::<i32>()),
                _ => pg_sys::Datum::from(*place.cast::<i64>()),
            }
        }
    }
}

/// Of a column, from 0.
fn number(table: &PgRelation, name: &[u8]) -> usize {
    let Ok(name) = CString::new(name) else {
        pgrx::error!("a column's name has no zero byte");
    };
    // SAFETY: it looks the name up.
    let number = unsafe { pg_sys::get_attnum(table.oid(), name.as_ptr()) };
    if number <= 0 {
        pgrx::error!("table \"{}\" has no column {name:?}", table.name());
    }
    number as usize - 1
}
