//! Tensors of a file as rows of tables: those of one dtype and shape together.

use super::{Header, Kind};
use crate::error::Result;
use crate::memory;

/// A table that tensors of one kind are the rows of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The number of the kind of its rows.
    pub kind: usize,
    /// The number of rows.
    pub rows: u64,
    /// The byte of the file at which it begins, if its rows lie there together.
    pub start: Option<u64>,
}

/// Tables, and which row of them each tensor is.
pub struct Stack {
    /// The tables, in the order of their first tensors.
    pub tables: Vec<Table>,
    /// The tensors, in the order of the header.
    pub tensors: Vec<usize>,
    /// The table of each tensor.
    pub table_of: Vec<u32>,
    /// The row of each tensor in its table.
    pub row_of: Vec<u64>,
    /// The places in `tensors` of those that must be copied, in the order of the data.
    copied: Vec<u32>,
}

impl Stack {
    /// Stacks the tensors of a header that `chosen` picks.
    ///
    /// Where the tensors of one kind lie together in the file, in any order, their table is that part of the file. The
    /// others must be [copied](Self::copy_block) into theirs, in the order of the data.
    ///
    /// **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn new(header: &Header, chosen: impl Fn(usize) -> bool) -> Result<Self> {
        let tensors: Vec<usize> = memory::collect((0..header.len()).filter(|number| chosen(*number)))?;
        let mut numbers: Vec<Option<usize>> = memory::filled(None, header.kinds().len())?;
        let mut spans: Vec<(u64, u64)> = memory::with_capacity(numbers.len())?;
        let mut tables: Vec<Table> = memory::with_capacity(numbers.len())?;
        let mut table_of = memory::with_capacity(tensors.len())?;
        for &tensor in &tensors {
            let kind = header.kind_number(tensor);
            let number = *numbers[kind].get_or_insert_with(|| {
                tables.push(Table { kind, rows: 0, start: None });
                spans.push((u64::MAX, 0));
                tables.len() - 1
            });
            let (start, stop) = header.bytes(tensor);
            tables[number].rows += 1;
            spans[number] = (spans[number].0.min(start), spans[number].1.max(stop));
            table_of.push(number as u32);
        }
        for (table, (start, stop)) in tables.iter_mut().zip(&spans) {
            // They do not overlap, so they fill what they span only if nothing lies between them.
            let bytes = header.kinds()[table.kind].bytes * table.rows;
            table.start = (stop - start == bytes).then_some(*start);
        }
        let row_of = rows_of(header, &tables, &tensors, &table_of)?;
        let places = 0..tensors.len() as u32;
        let apart = places.filter(|at| tables[table_of[*at as usize] as usize].start.is_none());
        let mut copied: Vec<u32> = memory::collect(apart)?;
        copied.sort_unstable_by_key(|at| (header.bytes(tensors[*at as usize]), *at));
        Ok(Self { tables, tensors, table_of, row_of, copied })
    }

    /// The parts of the file that must be copied, in order; what lies between them is longer than `gap` bytes.
    ///
    /// **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn spans(&self, header: &Header, gap: u64) -> Result<Vec<(u64, u64)>> {
        let mut spans: Vec<(u64, u64)> = Vec::new();
        for at in &self.copied {
            let (start, stop) = header.bytes(self.tensors[*at as usize]);
            match spans.last_mut() {
                Some(last) if start - last.1 <= gap => last.1 = stop,
                _ => memory::push(&mut spans, (start, stop))?,
            }
        }
        Ok(spans)
    }

    /// Copies what a block of the file has of the rows of tables that do not lie together.
    ///
    /// `start` is the byte of the file at which the block begins; `targets` are the bytes of each table, or nothing for
    /// those that lie together.
    ///
    /// # Panics
    ///
    /// If a table has not its size.
    ///
    /// **O(log n + m)** for `m` rows that the block touches.
    pub fn copy_block(&self, header: &Header, block: &[u8], start: u64, targets: &mut [&mut [u8]]) {
        let end = start + block.len() as u64;
        let range = |at: &u32| header.bytes(self.tensors[*at as usize]);
        let begin = self.copied.partition_point(|at| range(at).1 <= start);
        for at in &self.copied[begin..] {
            let (first, last) = range(at);
            let (from, to) = (first.max(start), last.min(end));
            if first >= end {
                break;
            }
            let at = *at as usize;
            let place = (self.row_of[at] * (last - first) + (from - first)) as usize;
            let source = (from - start) as usize;
            let length = to.saturating_sub(from) as usize;
            let target = &mut targets[self.table_of[at] as usize];
            target[place..place + length].copy_from_slice(&block[source..source + length]);
        }
    }
}

fn rows_of(header: &Header, tables: &[Table], tensors: &[usize], table_of: &[u32]) -> Result<Vec<u64>> {
    let mut next = memory::filled(0, tables.len())?;
    let rows = tensors.iter().zip(table_of).map(|(&tensor, &number)| {
        let table = &tables[number as usize];
        let Kind { bytes, .. } = header.kinds()[table.kind];
        match table.start {
            Some(start) if bytes > 0 => (header.bytes(tensor).0 - start) / bytes,
            _ => {
                next[number as usize] += 1;
                next[number as usize] - 1
            }
        }
    });
    memory::collect(rows)
}
