//! Packs the names of a dictionary into bytes: one tensor of a state dict or an archive.
//!
//! ```text
//! magic      8 bytes      "pdrs", 0, 0, 0, and 1, the version of the layout
//! counts     5 u64        names; ids (as many, or 0); tables; patterns; bytes of labels
//! tables     4 u64 each   bytes of the attribute; group; 1 if trainable, else 0; rows used
//! patterns   u64 each     bytes
//! labels     bytes        the attribute of each table, then the patterns; padded to 8 bytes
//! ids        u64 each     table and row of each name, in order; none where the n-th name has row n of table 0
//! lengths    u32 each     bytes of each name; padded to 8 bytes
//! text       bytes        the names, without separators
//! ```
//!
//! All numbers are little-endian; padding is zero. Texts are UTF-8, with surrogates as three bytes each. An id is the
//! number of a table and, in the lower [`ROW_BITS`], a row of it.
//!
//! The bytes may come from an attacker. [`decode`] refuses whatever [`Encoder`] does not write, and says where. It
//! allocates no more than a few times the size of what it was given.

use std::collections::HashSet;

pub use super::header::{Header, MAGIC, ROW_BITS, Table};
use super::header::{Reader, damaged, numbers, put, short_numbers};
use super::text::invalid_at;
use crate::error::{Damage, Error, Result};
use crate::memory;

/// Writes names after a header, into one piece of memory.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    /// Where the length of the next name goes, and where those lengths end.
    length: usize,
    lengths_end: usize,
}

impl Encoder {
    /// Begins with a header and the ids of so many names; `None` if the n-th name has row n of table 0.
    ///
    /// `text` is about how many bytes the names will have.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(
        header: &Header,
        names: usize,
        ids: Option<impl ExactSizeIterator<Item = u64>>,
        text: usize,
    ) -> Result<Self> {
        let listed = ids.as_ref().map_or(0, ExactSizeIterator::len);
        let mut bytes = header.encode(names, listed)?;
        memory::reserve(&mut bytes, 8 * listed + 4 * names + 8 + text)?;
        if let Some(ids) = ids {
            ids.for_each(|id| put(&mut bytes, id));
        }
        let length = bytes.len();
        let lengths_end = length + 4 * names;
        bytes.resize(lengths_end.next_multiple_of(8), 0);
        Ok(Self { bytes, length, lengths_end })
    }

    /// Adds the next name.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if it has 4 GB or more, or there are more names than were announced; [`Error::Memory`].
    pub fn push(&mut self, name: &[u8]) -> Result<()> {
        let length = u32::try_from(name.len()).map_err(|_| Error::TooLarge)?;
        let end = self.length + 4;
        if end > self.lengths_end {
            return Err(Error::TooLarge);
        }
        memory::append(&mut self.bytes, name)?;
        self.bytes[self.length..end].copy_from_slice(&length.to_le_bytes());
        self.length = end;
        Ok(())
    }

    /// All bytes.
    ///
    /// # Panics
    ///
    /// If there are fewer names than were announced.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        assert_eq!(self.length, self.lengths_end, "fewer names than were announced");
        self.bytes
    }
}

/// Reads what [`Encoder`] wrote. **O(n)**.
///
/// Everything is checked except whether a name is listed twice. That would cost more than the rest, and making an index
/// of the names finds it anyway; see [`Names::repeated`].
///
/// # Errors
///
/// [`Error::Damaged`] if the bytes are anything else; [`Error::Memory`].
pub fn decode(data: &[u8]) -> Result<(Header, Names<'_>)> {
    let mut reader = Reader { data, at: 0 };
    let (header, names, ids) = Header::decode(&mut reader)?;
    let used: Vec<u64> = memory::collect(header.tables.iter().map(|table| table.used))?;
    let names = Names::parse(reader, names, ids != 0, &used)?;
    Ok((header, names))
}

/// Checked names and ids, as a view of the packed bytes.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    len: usize,
    /// Eight bytes each, if they are listed.
    ids: Option<&'a [u8]>,
    /// Four bytes each.
    lengths: &'a [u8],
    text: &'a [u8],
}

impl<'a> Names<'a> {
    /// Reads and checks what follows the header; `used` is the number of used rows of each table.
    fn parse(mut reader: Reader<'a>, names: u64, has_ids: bool, used: &[u64]) -> Result<Self> {
        let at = reader.at;
        let ids = if has_ids { Some(reader.many(names, 8)?) } else { None };
        let lengths_at = reader.at;
        let lengths = reader.many(names, 4)?;
        reader.padding()?;
        let text_at = reader.at;
        let text = reader.rest();
        let found = Self { len: lengths.len() / 4, ids, lengths, text };
        // The sum of so many 32-bit numbers does not overflow.
        let wanted: u64 = short_numbers(lengths).map(u64::from).sum();
        if wanted != text.len() as u64 {
            return Err(damaged(lengths_at, Damage::Lengths { wanted, got: text.len() as u64 }));
        }
        found.check_text(lengths_at, text_at)?;
        match ids {
            Some(ids) => check_ids(ids, at, used)?,
            None if names > used.first().copied().unwrap_or(0) => return Err(damaged(at, Damage::NoRow)),
            None => {}
        }
        Ok(found)
    }

    fn check_text(&self, lengths_at: usize, text_at: usize) -> Result<()> {
        if let Some(empty) = short_numbers(self.lengths).position(|length| length == 0) {
            return Err(damaged(lengths_at + 4 * empty, Damage::Empty));
        }
        if self.text.is_ascii() {
            return Ok(());
        }
        let mut at = text_at;
        for (name, _) in self.iter() {
            if let Some(wrong) = invalid_at(name) {
                return Err(damaged(at + wrong, Damage::Text));
            }
            at += name.len();
        }
        Ok(())
    }

    /// The number of names. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no names. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The names and their ids, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a [u8], u64)> + use<'a> {
        let mut text = self.text;
        let mut ids = self.ids.map(numbers);
        short_numbers(self.lengths).enumerate().map(move |(at, length)| {
            let (name, rest) = text.split_at(length as usize);
            text = rest;
            (name, ids.as_mut().and_then(Iterator::next).unwrap_or(at as u64))
        })
    }

    /// The position of the first name that is listed before, too; `None` also if memory is lacking. **O(n)**.
    #[must_use]
    pub fn repeated(&self) -> Option<usize> {
        let mut seen = HashSet::new();
        seen.try_reserve(self.len).ok()?;
        self.iter().position(|(name, _)| !seen.insert(name))
    }
}

/// Refuses ids whose table or row does not exist, and a row that two names have.
fn check_ids(ids: &[u8], at: usize, used: &[u64]) -> Result<()> {
    let mut first = memory::with_capacity(used.len())?;
    let mut rows = 0_u64;
    for count in used {
        first.push(rows);
        rows = rows.checked_add(*count).ok_or(damaged(at, Damage::NoRow))?;
    }
    // A bit for each row, unless most rows have no name: then the rows are sorted.
    let dense = rows / 64 <= (ids.len() / 8 + used.len()) as u64;
    let mut bits = memory::filled(0_u64, if dense { (rows / 64) as usize + 1 } else { 0 })?;
    let mut sorted = memory::with_capacity(if dense { 0 } else { ids.len() / 8 })?;
    for (number, id) in numbers(ids).enumerate() {
        let (table, row) = ((id >> ROW_BITS) as usize, id & ((1 << ROW_BITS) - 1));
        if used.get(table).is_none_or(|used| row >= *used) {
            return Err(damaged(at + 8 * number, Damage::NoRow));
        }
        let row = first[table] + row;
        if dense {
            let (word, bit) = (&mut bits[(row / 64) as usize], 1 << (row % 64));
            if *word & bit != 0 {
                return Err(damaged(at + 8 * number, Damage::SharedRow));
            }
            *word |= bit;
        } else {
            sorted.push((row, number));
        }
    }
    sorted.sort_unstable();
    match sorted.windows(2).filter(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1].1).min() {
        Some(number) => Err(damaged(at + 8 * number, Damage::SharedRow)),
        None => Ok(()),
    }
}
