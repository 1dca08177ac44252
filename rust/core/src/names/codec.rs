//! Packs the names of a dictionary into bytes: one tensor of a state dict or an archive.
//!
//! ```text
//! magic      8 bytes      "pdrs", 0, 0, 0, and 2, the version of the format
//! counts     6 u64        names; ids (as many, or 0); tables; patterns; bytes of labels; words
//! tables     4 u64 each   bytes of the attribute; group; 1 if trainable, else 0; rows used
//! patterns   u64 each     bytes
//! labels     bytes        the attribute of each table, then the patterns; padded to 8 bytes
//! ids        u64 each     table and row of each name, in order; none where the n-th name has row n of table 0
//! ends       u64 each     where each name ends in the text
//! text       bytes        the names, without separators; padded to 8 bytes if something follows
//! words      u64 each     the table by which a name is found: see `words.rs`; or none. Not counted, and of no meaning,
//!                         if a search would be too long
//! ```
//!
//! All numbers are little-endian; padding is zero. Texts are UTF-8, with surrogates as three bytes each. An id is the
//! number of a table and, in the lower [`ROW_BITS`], a row of it.
//!
//! The bytes may come from an attacker. [`decode`] refuses whatever [`Encoder`] does not write, and says where. It
//! allocates no more than a few times the size of what it was given.

use std::collections::HashSet;

pub use super::header::{Header, MAGIC, ROW_BITS, Table};
use super::header::{Reader, WORDS_AT, damaged, numbers, put};
use super::text::invalid_at;
pub use super::words::hash;
use super::words::{Words, fill, words_for};
use crate::error::{Damage, Error, Result};
use crate::memory;

/// Writes names after a header, into one piece of memory.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    /// Where the end of the next name goes.
    end: usize,
    /// Where the text begins.
    text: usize,
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
        memory::reserve(&mut bytes, 8 * (listed + names) + text)?;
        if let Some(ids) = ids {
            ids.for_each(|id| put(&mut bytes, id));
        }
        let end = bytes.len();
        let text = end + 8 * names;
        bytes.resize(text, 0);
        Ok(Self { bytes, end, text })
    }

    /// Adds the next name.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if there are more names than were announced; [`Error::Memory`].
    pub fn push(&mut self, name: &[u8]) -> Result<()> {
        let next = self.end + 8;
        if next > self.text {
            return Err(Error::TooLarge);
        }
        memory::append(&mut self.bytes, name)?;
        let length = (self.bytes.len() - self.text) as u64;
        self.bytes[self.end..next].copy_from_slice(&length.to_le_bytes());
        self.end = next;
        Ok(())
    }

    /// All bytes.
    ///
    /// # Panics
    ///
    /// If there are fewer names than were announced.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        assert_eq!(self.end, self.text, "fewer names than were announced");
        self.bytes
    }
}

/// Reads what [`Encoder`] wrote. **O(n)**.
///
/// Everything is checked except whether a name is listed twice, and whether the words fit. That would cost more than the
/// rest. Making an index of the names finds the one; see [`Names::repeated`] and [`Names::are_words_right`].
///
/// # Errors
///
/// [`Error::Damaged`] if the bytes are anything else; [`Error::Memory`].
pub fn decode(data: &[u8]) -> Result<(Header, Names<'_>)> {
    let (header, parts) = Parts::of(data)?;
    let names = parts.names(data)?;
    let used: Vec<u64> = memory::collect(header.tables.iter().map(|table| table.used))?;
    names.check(&parts, &used)?;
    Ok((header, names))
}

/// Where the parts of packed names lie in their bytes.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    names: usize,
    /// Where the ids begin, if they are listed.
    ids: Option<usize>,
    ends: usize,
    text: usize,
    text_end: usize,
    words: usize,
    /// Where the bytes end.
    bytes: usize,
}

impl Parts {
    /// Reads the header of packed names, and where what follows it lies. **O(tables)**.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if the sizes do not add up; [`Error::Memory`].
    pub fn of(data: &[u8]) -> Result<(Header, Self)> {
        let mut reader = Reader { data, at: 0 };
        let (header, counts) = Header::decode(&mut reader)?;
        let ids = (counts.ids != 0).then_some(reader.at);
        reader.many(counts.ids, 8)?;
        let ends = reader.at;
        let listed = reader.many(counts.names, 8)?;
        let text = reader.at;
        reader.many(listed.last_chunk().map_or(0, |end| u64::from_le_bytes(*end)), 1)?;
        let text_end = reader.at;
        let names = listed.len() / 8;
        if reader.at < data.len() {
            reader.padding()?;
            reader.many(words_for(names) as u64, 8)?;
        }
        let words = data.len() - if counts.words == 0 { 0 } else { 8 * words_for(names) };
        let is_right = counts.words == 0 || (counts.words == words_for(names) as u64 && words >= text_end);
        if reader.at != data.len() || !is_right || (names == 0 && text_end < data.len()) {
            return Err(damaged(text_end, Damage::Words));
        }
        Ok((header, Self { names, ids, ends, text, text_end, words, bytes: data.len() }))
    }

    /// The names in the bytes that these are the parts of. **O(1)**.
    ///
    /// Nothing is known of what lies in the parts. All that [`Names`] gives is looked at before it is used.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if the bytes have another length.
    pub fn names<'a>(&self, data: &'a [u8]) -> Result<Names<'a>> {
        if data.len() != self.bytes {
            return Err(damaged(self.bytes, Damage::Words));
        }
        Ok(Names {
            ids: self.ids.map(|ids| &data[ids..self.ends]),
            ends: &data[self.ends..self.text],
            text: &data[self.text..self.text_end],
            words: Words(&data[self.words..]),
        })
    }

    /// The number of names. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names
    }

    /// Whether there are no names. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names == 0
    }

    /// The number of bytes that the names have with words. **O(1)**.
    #[must_use]
    pub fn searchable_len(&self) -> usize {
        if self.names == 0 { self.text_end } else { self.text_end.next_multiple_of(8) + 8 * words_for(self.names) }
    }

    /// Whether names are found without looking at all of them. **O(1)**.
    #[must_use]
    pub fn is_searchable(&self) -> bool {
        self.words < self.bytes || self.names == 0
    }
}

/// Names and ids, as a view of the packed bytes.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// Eight bytes each, if they are listed.
    ids: Option<&'a [u8]>,
    /// Eight bytes each.
    ends: &'a [u8],
    text: &'a [u8],
    words: Words<'a>,
}

/// The number at a place of a list of them.
#[inline]
fn number_at(bytes: &[u8], at: usize) -> Option<u64> {
    let begin = at.checked_mul(8)?;
    bytes.get(begin..)?.first_chunk().map(|number| u64::from_le_bytes(*number))
}

impl<'a> Names<'a> {
    /// Checks what follows the header; `used` is the number of used rows of each table.
    fn check(&self, parts: &Parts, used: &[u64]) -> Result<()> {
        let mut start = 0;
        for (at, end) in numbers(self.ends).enumerate() {
            let here = parts.ends + 8 * at;
            if end == start {
                return Err(damaged(here, Damage::Empty));
            }
            if end < start || end > self.text.len() as u64 {
                return Err(damaged(here, Damage::Order));
            }
            start = end;
        }
        self.check_text(parts.text)?;
        match self.ids {
            Some(ids) => check_ids(ids, parts.ids.unwrap_or(0), used),
            None if self.len() as u64 > used.first().copied().unwrap_or(0) => Err(damaged(parts.ends, Damage::NoRow)),
            None => Ok(()),
        }
    }

    fn check_text(&self, text_at: usize) -> Result<()> {
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
        self.ends.len() / 8
    }

    /// Whether there are no names. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether there are words. **O(1)**.
    #[must_use]
    pub fn has_words(&self) -> bool {
        self.words.len() > 0
    }

    /// A name; `None` if there are not so many, or the bytes do not have it. **O(1)**.
    #[must_use]
    #[inline]
    pub fn name(&self, number: usize) -> Option<&'a [u8]> {
        let start = if number == 0 { 0 } else { number_at(self.ends, number - 1)? };
        let end = number_at(self.ends, number)?;
        self.text.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    /// The id of a name; `None` if there are not so many. **O(1)**.
    #[must_use]
    #[inline]
    pub fn id(&self, number: usize) -> Option<u64> {
        match self.ids {
            Some(ids) => number_at(ids, number),
            None => (number < self.len()).then_some(number as u64),
        }
    }

    /// The names and their ids, in order. Ends where the bytes do not have a name.
    pub fn iter(&self) -> impl Iterator<Item = (&'a [u8], u64)> + use<'a> {
        let text = self.text;
        let mut ids = self.ids.map(numbers);
        let mut start = 0;
        numbers(self.ends).enumerate().map_while(move |(at, end)| {
            let name = text.get(start..usize::try_from(end).ok()?)?;
            start += name.len();
            Some((name, ids.as_mut().and_then(Iterator::next).unwrap_or(at as u64)))
        })
    }

    /// The number of the name with this [`hash`] of which `is_it` says that it is the one; among names that have words.
    ///
    /// `is_it` must compare the whole name. **O(1)**.
    #[must_use]
    #[inline]
    pub fn find(&self, hash: u64, is_it: impl Fn(&[u8]) -> bool) -> Option<usize> {
        if !self.has_words() {
            return None;
        }
        self.words.search(hash, |number| self.name(number).is_some_and(&is_it))
    }

    /// The number of the first name that [`find`](Self::find) would read. It may be too large. **O(1)**.
    #[must_use]
    #[inline]
    pub fn candidate(&self, hash: u64) -> Option<usize> {
        if !self.has_words() {
            return None;
        }
        self.words.search(hash, |_| true)
    }

    /// Where [`find`](Self::find) begins: whoever looks many names up has this loaded first.
    #[must_use]
    #[inline]
    pub fn home(&self, hash: u64) -> Option<&'a u8> {
        self.words.home(hash)
    }

    /// What [`name`](Self::name) and [`id`](Self::id) read of a name, apart from its text: to be loaded next.
    #[must_use]
    #[inline]
    pub fn entry(&self, number: usize) -> [Option<&'a u8>; 2] {
        [self.ends.get(8 * number), self.ids.and_then(|ids| ids.get(8 * number))]
    }

    /// The position of the first name that is listed before, too; `None` also if memory is lacking. **O(n)**.
    #[must_use]
    pub fn repeated(&self) -> Option<usize> {
        let mut seen = HashSet::new();
        seen.try_reserve(self.len()).ok()?;
        self.iter().position(|(name, _)| !seen.insert(name))
    }

    /// Whether the words find each name, and no other. True if there are none. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn are_words_right(&self) -> Result<bool> {
        if !self.has_words() {
            return Ok(true);
        }
        self.words.are_of(self.len(), || self.iter().map(|(name, _)| hash(name)))
    }
}

/// Takes the words from packed names. **O(n)**.
///
/// # Errors
///
/// [`Error::Damaged`] if the sizes do not add up; [`Error::Memory`].
pub fn without_words(packed: &[u8]) -> Result<Vec<u8>> {
    let (_, parts) = Parts::of(packed)?;
    let mut bytes = memory::collect(packed[..parts.text_end].iter().copied())?;
    bytes[WORDS_AT..WORDS_AT + 8].fill(0);
    Ok(bytes)
}

/// What packed names have behind their text if they get words, and how many words are counted in their header. **O(n)**.
///
/// # Errors
///
/// [`Error::Damaged`], [`Error::Memory`].
pub fn words_behind(packed: &[u8]) -> Result<(Vec<u8>, u64)> {
    let (_, parts) = Parts::of(packed)?;
    let names = parts.names(packed)?;
    if names.iter().count() != names.len() {
        return Err(damaged(parts.ends, Damage::Order));
    }
    let mut behind = memory::filled(0, parts.searchable_len() - parts.text_end)?;
    let words = words_for(names.len());
    let start = behind.len() - 8 * words;
    let found = fill(&mut behind[start..], names.len(), || names.iter().map(|(name, _)| hash(name)))?;
    if !found {
        behind.fill(0);
    }
    Ok((behind, if found { words as u64 } else { 0 }))
}

/// Packed names with words. **O(n)**.
///
/// # Errors
///
/// As of [`words_behind`].
pub fn searchable(packed: &[u8]) -> Result<Vec<u8>> {
    let (behind, count) = words_behind(packed)?;
    let mut bytes = without_words(packed)?;
    memory::append(&mut bytes, &behind)?;
    bytes[WORDS_AT..WORDS_AT + 8].copy_from_slice(&count.to_le_bytes());
    Ok(bytes)
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
