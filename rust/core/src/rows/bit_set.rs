//! A set of rows that finds its smallest quickly, in little more than a bit a row.
//!
//! ```text
//!   level 1   a bit for each word of level 0 that is not 0        0b101
//!   level 0   a bit for each row                                  [0b10010, 0, 0b1, ..]
//! ```
//!
//! A search climbs until it sees a bit and follows it down. Most rows change no level but the lowest.

use std::iter;

use crate::error::Result;
use crate::memory;

/// Words of 64 bits on each of which lie those of the level below: enough for 2^42 rows; an id has 40 bits for the row.
const LEVELS: usize = 7;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RowSet {
    levels: [Vec<u64>; LEVELS],
    len: u64,
}

impl RowSet {
    /// How many rows are in the set. **O(1)**.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// All rows below `end`. **O(end / 64)**.
    pub(crate) fn all_below(end: u64) -> Result<Self> {
        let mut made = Self { len: end, ..Self::default() };
        let mut bits = end;
        for words in &mut made.levels {
            *words = memory::filled(u64::MAX, usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX))?;
            if let Some(last) = words.last_mut()
                && !bits.is_multiple_of(64)
            {
                *last = (1 << (bits % 64)) - 1;
            }
            bits = words.len() as u64;
        }
        Ok(made)
    }

    /// Makes room for all rows below `end`, so that none of them needs memory when it is put into the set.
    pub(crate) fn reserve(&mut self, end: u64) -> Result<()> {
        let mut bits = usize::try_from(end).unwrap_or(usize::MAX);
        for words in &mut self.levels {
            bits = bits.div_ceil(64);
            if words.capacity() < bits {
                words.try_reserve(bits - words.len()).map_err(|_| crate::Error::Memory)?;
            }
        }
        Ok(())
    }

    pub(crate) fn copy(&self) -> Result<Self> {
        let mut made = Self { len: self.len, ..Self::default() };
        for (copy, words) in made.levels.iter_mut().zip(&self.levels) {
            *copy = memory::collect(words.iter().copied())?;
        }
        Ok(made)
    }

    /// Puts a row into the set, which must not have it. **O(1)**, amortised.
    ///
    /// What it needs for that has been [reserved](Self::reserve) where memory may be short.
    pub(crate) fn insert(&mut self, row: u64) {
        let mut place = row as usize;
        for words in &mut self.levels {
            let (word, bit) = (place / 64, 1 << (place % 64));
            if words.len() <= word {
                words.resize(word + 1, 0);
            }
            let before = words[word];
            debug_assert!(before & bit == 0, "row {row} came back twice");
            words[word] = before | bit;
            if before != 0 {
                break;
            }
            place = word;
        }
        self.len += 1;
    }

    /// Takes the smallest row out. **O(1)**.
    pub(crate) fn pop_first(&mut self) -> Option<u64> {
        let row = self.from(0)?;
        self.remove(row);
        Some(row)
    }

    /// Whether a row is in the set. **O(1)**.
    pub(crate) fn contains(&self, row: u64) -> bool {
        self.levels[0].get((row / 64) as usize).is_some_and(|word| word & 1 << (row % 64) != 0)
    }

    /// Takes a row out; whether it was there. **O(1)**.
    pub(crate) fn remove(&mut self, row: u64) -> bool {
        if !self.contains(row) {
            return false;
        }
        let mut place = row as usize;
        for words in &mut self.levels {
            let word = place / 64;
            words[word] &= !(1 << (place % 64));
            if words[word] != 0 {
                break;
            }
            place = word;
        }
        self.len -= 1;
        true
    }

    /// The rows, ascending. **O(1)** a row.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        iter::successors(self.from(0), |row| self.from(row + 1))
    }

    /// The smallest row that is not below `start`. **O(1)**.
    fn from(&self, start: u64) -> Option<u64> {
        let mut place = start as usize;
        for (level, words) in self.levels.iter().enumerate() {
            let word = place / 64;
            let bits = words.get(word)? & (u64::MAX << (place % 64));
            if bits != 0 {
                let found = word * 64 + bits.trailing_zeros() as usize;
                let down = |place: usize, words: &Vec<u64>| place * 64 + words[place].trailing_zeros() as usize;
                return Some(self.levels[..level].iter().rev().fold(found, down) as u64);
            }
            place = word + 1;
        }
        None
    }
}
