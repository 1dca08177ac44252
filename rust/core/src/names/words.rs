//! The table of words by which a name is found in packed names, without an index in memory.
//!
//! ```text
//!   word     0                  no name
//!            h << 32 | n + 1    name n, whose hash has h in its upper half
//! ```
//!
//! A search begins at the home of a hash: the word that its lower half names. It goes on one by one and around the end,
//! and stops at the first word without a name. The hash is XXH3 (64 bits, seed 0) of the UTF-8 of a name. It is a part
//! of the format, and the same in every process.
//!
//! The words may come from an attacker. So a search also stops after [`LONGEST`] words, and whoever searches compares
//! the name itself. A damaged table can hide a name; it cannot give it the row of another.

use twox_hash::XxHash3_64;

use crate::error::Result;
use crate::memory;

/// The most words that a search looks at. Names for which that is too few have no table.
pub(super) const LONGEST: usize = 1024;

/// So many words stay in the second-level cache while a part of them is written at random.
const REGION: usize = 1 << 15;

/// More places to write to at a time would not stay in the first-level cache.
const MOST_REGIONS: usize = 1 << 8;

/// The hash of a name: XXH3, 64 bits, with the seed 0.
#[must_use]
#[inline]
pub fn hash(name: &[u8]) -> u64 {
    XxHash3_64::oneshot(name)
}

/// The number of words for so many names: at least a quarter of them without a name.
pub(super) fn words_for(names: usize) -> usize {
    if names == 0 { 0 } else { names + names / 3 + 1 }
}

/// Where the search for a hash begins.
#[inline]
fn home(hash: u64, words: usize) -> usize {
    (((hash & u64::from(u32::MAX)) * words as u64) >> 32) as usize
}

#[inline]
fn upper(hash: u64) -> u64 {
    hash & !u64::from(u32::MAX)
}

/// Fills zeros with the words of names with these hashes, in their order. `false` if a search would be longer than
/// [`LONGEST`], or if there are not as many hashes as the words are for: then the words are of no use.
///
/// The hashes are asked for twice.
pub(super) fn fill<I: Iterator<Item = u64>>(words: &mut [u8], names: usize, hashes: impl Fn() -> I) -> Result<bool> {
    let len = words.len() / 8;
    let sorted = by_region(names, hashes, len)?;
    if sorted.len() != names {
        return Ok(false);
    }
    for (hash, number) in sorted {
        let mut at = home(hash, len);
        let mut looked = 1;
        while Words(words).get(at) != 0 {
            at = if at + 1 == len { 0 } else { at + 1 };
            looked += 1;
        }
        if looked > LONGEST {
            return Ok(false);
        }
        let word = upper(hash) | u64::from(number + 1);
        words[8 * at..8 * at + 8].copy_from_slice(&word.to_le_bytes());
    }
    Ok(true)
}

/// The hashes and their numbers, those first whose homes lie in the first region, and so on; fewer than `names` if there
/// are not so many.
fn by_region<I: Iterator<Item = u64>>(names: usize, hashes: impl Fn() -> I, words: usize) -> Result<Vec<(u64, u32)>> {
    let regions = (words / REGION).clamp(1, MOST_REGIONS);
    let region = |hash: u64| home(hash, regions);
    let (mut next, mut count) = ([0; MOST_REGIONS], 0);
    for hash in hashes() {
        next[region(hash)] += 1;
        count += 1;
    }
    if count != names {
        return Ok(Vec::new());
    }
    let mut before = 0;
    for count in &mut next {
        before += std::mem::replace(count, before);
    }
    let mut sorted = memory::filled((0, 0), names)?;
    for (number, hash) in (0..).zip(hashes()) {
        let place = &mut next[region(hash)];
        sorted[*place] = (hash, number);
        *place += 1;
    }
    Ok(sorted)
}

/// A table of words as a view of bytes, little-endian.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'a>(pub(super) &'a [u8]);

impl<'a> Words<'a> {
    pub(super) fn len(self) -> usize {
        self.0.len() / 8
    }

    #[inline]
    fn get(self, at: usize) -> u64 {
        let at = 8 * at;
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("these are eight"))
    }

    /// The first byte of the word where the search for a hash begins.
    #[inline]
    pub(super) fn home(self, hash: u64) -> Option<&'a u8> {
        self.0.get(8 * home(hash, self.len()))
    }

    /// The number of the first name with this hash for which `is_it` says so.
    #[inline]
    pub(super) fn search(self, hash: u64, mut is_it: impl FnMut(usize) -> bool) -> Option<usize> {
        let len = self.len();
        let mut at = home(hash, len);
        for _ in 0..LONGEST.min(len) {
            let word = self.get(at);
            if word == 0 {
                return None;
            }
            // The lower half of a word without a number is 0, and no name has the number that comes of it.
            let number = (word as u32).wrapping_sub(1) as usize;
            if upper(word) == upper(hash) && is_it(number) {
                return Some(number);
            }
            at = if at + 1 == len { 0 } else { at + 1 };
        }
        None
    }

    /// Whether these are the words of names with these hashes. **O(n)**.
    pub(super) fn are_of<I: Iterator<Item = u64>>(self, names: usize, hashes: impl Fn() -> I) -> Result<bool> {
        let mut words = memory::filled(0, 8 * words_for(names))?;
        Ok(fill(&mut words, names, hashes)? && words == self.0)
    }
}
