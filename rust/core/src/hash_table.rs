//! The hash table under [names](crate::names::table), and under an [`OrderedSet`](crate::OrderedSet): it finds the id of
//! an entry, and never sees a key.
//!
//! A word holds 32 bits of hash beside the 32-bit id of an entry; 0 is empty, so a stored hash is never 0. A search
//! begins at the slot that the low bits of the hash name, its home, and ends at the first empty one.

use std::hint::black_box;

use crate::error::Result;
use crate::memory;

/// The largest number of entries: half of the ids, because up to half of the entries may be holes.
pub const MAX_ENTRIES: usize = (1 << 31) - 64;

/// Below this many words, empty ones are not worth a sweep.
const SMALL: usize = 64;

/// So many words stay in the second-level cache while a part of them is written at random.
const REGION: usize = 1 << 15;

/// More places to write to at a time would not stay in the first-level cache.
const MOST_REGIONS: usize = 1 << 8;

/// Open addressing with linear probing, at most three quarters full; removal leaves no tombstones.
#[derive(Default)]
pub(crate) struct Words {
    /// The length is a power of two, or 0 before the first insertion.
    words: Vec<u64>,
}

/// Slots for words that are not there yet.
pub(crate) struct Slots {
    /// The hash and the number of each, in an order that goes through the table once.
    words: Vec<u64>,
    /// The slot of each.
    at: Vec<u32>,
    /// The number of words of the table that they are slots of.
    table_len: usize,
}

pub(crate) fn word(hash: u32, id: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(id)
}

pub(crate) fn hash_of(word: u64) -> u32 {
    (word >> 32) as u32
}

pub(crate) fn id_of(word: u64) -> u32 {
    word as u32
}

/// The number of words for `len` entries: a power of two, at most three quarters full.
fn words_for(len: usize) -> usize {
    if len == 0 { 0 } else { (len * 4).div_ceil(3).next_power_of_two().max(8) }
}

/// The number of the first key that is the same as one before it, by the hashes of all; `None` if all are distinct.
/// **O(m)**.
///
/// # Errors
///
/// [`Error::Memory`].
pub(crate) fn first_repeated(
    hashes: impl ExactSizeIterator<Item = u32>,
    are_same: impl Fn(u32, u32) -> bool,
) -> Result<Option<usize>> {
    let mut words = Words::default();
    words.reserve(hashes.len())?;
    for (hash, at) in hashes.zip(0..) {
        match words.search(hash, |found| are_same(found, at)) {
            Ok(_) => return Ok(Some(at as usize)),
            Err(empty) => words.fill(empty, hash, at),
        }
    }
    Ok(None)
}

impl Words {
    pub(crate) fn allocated_bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>()
    }

    /// A table of words; `None` if `are_same` says so of two ids.
    pub(crate) fn of_distinct(words: &[u64], are_same: impl Fn(u32, u32) -> bool) -> Result<Option<Self>> {
        let mut made = Self { words: memory::zeros(words_for(words.len()))? };
        for word in made.by_region(words.iter().copied())? {
            let (hash, id) = (hash_of(word), id_of(word));
            match made.search(hash, |found| are_same(found, id)) {
                Ok(_) => return Ok(None),
                Err(empty) => made.words[empty] = word,
            }
        }
        Ok(Some(made))
    }

    /// The same words, those first whose homes lie in the first region, and so on.
    fn by_region(&self, words: impl ExactSizeIterator<Item = u64> + Clone) -> Result<Vec<u64>> {
        let regions = (self.words.len() / REGION).min(MOST_REGIONS);
        if regions < 2 {
            return memory::collect(words);
        }
        let bits = (self.words.len() / regions).ilog2();
        let region = |word: u64| (self.home(hash_of(word)) >> bits) % MOST_REGIONS;
        let mut counts = [0; MOST_REGIONS];
        for word in words.clone() {
            counts[region(word)] += 1;
        }
        let mut next = [0; MOST_REGIONS];
        for at in 1..MOST_REGIONS {
            next[at] = next[at - 1] + counts[at - 1];
        }
        let mut sorted = memory::zeros(words.len())?;
        for word in words {
            let place = &mut next[region(word)];
            sorted[*place] = word;
            *place += 1;
        }
        Ok(sorted)
    }

    /// Slots for entries with these hashes, none of which is there; `None` if `are_same` says so of two numbers in the
    /// list. There must be room. Nothing has changed.
    pub(crate) fn slots_of_new(
        &mut self,
        hashes: &[u32],
        are_same: impl Fn(u32, u32) -> bool,
    ) -> Result<Option<Slots>> {
        let words = self.by_region(hashes.iter().enumerate().map(|(number, hash)| word(*hash, number as u32)))?;
        let mut at = memory::with_capacity(words.len())?;
        // Each word is written, with its number as the id, so that the next ones find its slot taken.
        for &new in &words {
            // What has the same number as id and is no new word is another entry, which is not the same.
            let is_repeated =
                |found| found != id_of(new) && (found as usize) < hashes.len() && are_same(found, id_of(new));
            let Err(empty) = self.search(hash_of(new), is_repeated) else { break };
            self.words[empty] = new;
            at.push(empty as u32);
        }
        for slot in &at {
            self.words[*slot as usize] = 0;
        }
        let are_distinct = at.len() == words.len();
        Ok(are_distinct.then_some(Slots { words, at, table_len: self.words.len() }))
    }

    /// Writes words into their slots, with the id that `id` gives for each number. Nothing but reservations may have
    /// happened since the slots were found.
    pub(crate) fn fill_slots(&mut self, found: &Slots, id: impl Fn(u32) -> u32) {
        let are_valid = found.table_len == self.words.len();
        for (&new, &slot) in found.words.iter().zip(&found.at) {
            let hash = hash_of(new);
            let searched = || self.search(hash, |_| false).unwrap_or_else(|slot| slot);
            let slot = if are_valid { slot as usize } else { searched() };
            self.words[slot] = word(hash, id(id_of(new)));
        }
    }

    /// Makes room for `len` entries in all, at once.
    pub(crate) fn reserve(&mut self, len: usize) -> Result<()> {
        if words_for(len) > self.words.len() { self.resize(words_for(len)) } else { Ok(()) }
    }

    /// Makes room for `len` entries in all, growing by doubling.
    pub(crate) fn make_room(&mut self, len: usize) -> Result<()> {
        if len * 4 > self.words.len() * 3 { self.resize((self.words.len() * 2).max(8)) } else { Ok(()) }
    }

    /// Gives memory back if there are many more words than `len` entries need; whether it did.
    ///
    /// Not where there is no memory for those that stay.
    pub(crate) fn shrink(&mut self, len: usize) -> bool {
        let shrinks = self.words.len() > SMALL && self.words.len() > 16 * len;
        shrinks && self.resize(words_for(2 * len)).is_ok()
    }

    /// The slot of the entry with this hash for whose id `is_it` says so, or the empty slot that the search ended at.
    ///
    /// There must be words.
    pub(crate) fn search(&self, hash: u32, is_it: impl Fn(u32) -> bool) -> std::result::Result<usize, usize> {
        let mut slot = self.home(hash);
        loop {
            let found = self.words[slot];
            if found == 0 {
                return Err(slot);
            }
            if hash_of(found) == hash && is_it(id_of(found)) {
                return Ok(slot);
            }
            slot = self.next(slot);
        }
    }

    /// The slot of an entry whose hash and id are known.
    pub(crate) fn slot_of(&self, hash: u32, id: u32) -> usize {
        self.search(hash, |found| found == id).expect("an entry has no word")
    }

    /// The id in a slot that is not empty.
    pub(crate) fn id(&self, slot: usize) -> u32 {
        id_of(self.words[slot])
    }

    /// The id of the first entry that a search for `hash` would ask about. There must be words.
    pub(crate) fn first_id(&self, hash: u32) -> Option<u32> {
        let slot = self.search(hash, |_| true).ok()?;
        Some(id_of(self.words[slot]))
    }

    /// The word where a search for `hash` begins. There must be words.
    pub(crate) fn home_word(&self, hash: u32) -> &u64 {
        &self.words[self.home(hash)]
    }

    /// Writes a word into a slot that is empty, or is the entry's own.
    pub(crate) fn fill(&mut self, slot: usize, hash: u32, id: u32) {
        self.words[slot] = word(hash, id);
    }

    /// Empties a slot and moves back the words behind it that may then stand nearer to their homes.
    pub(crate) fn erase(&mut self, mut empty: usize) {
        let mask = self.words.len() - 1;
        let mut slot = empty;
        loop {
            slot = (slot + 1) & mask;
            let moved = self.words[slot];
            if moved == 0 {
                break;
            }
            let from_home = slot.wrapping_sub(self.home(hash_of(moved))) & mask;
            if from_home >= slot.wrapping_sub(empty) & mask {
                self.words[empty] = moved;
                empty = slot;
            }
        }
        self.words[empty] = 0;
    }

    /// Gives every entry the id that `renamed` gives for its old one.
    pub(crate) fn renumber(&mut self, renamed: impl Fn(u32) -> u32) {
        for one in self.words.iter_mut().filter(|word| **word != 0) {
            *one = word(hash_of(*one), renamed(id_of(*one)));
        }
    }

    /// Brings the homes of a batch into the cache: the loads do not wait for each other, as those of searches would.
    pub(crate) fn touch(&self, hashes: impl Iterator<Item = u32>) {
        if !self.words.is_empty() {
            black_box(hashes.fold(0, |mixed, hash| mixed ^ self.words[self.home(hash)]));
        }
    }

    /// Panics unless every word can be found; hands each hash and id to `each`. For tests.
    pub(crate) fn check(&self, mut each: impl FnMut(u32, u32)) {
        assert!(self.words.is_empty() || self.words.len().is_power_of_two());
        let used = self.words.iter().filter(|word| **word != 0).count();
        assert!(used * 4 <= self.words.len() * 3, "too full");
        for (slot, &found) in self.words.iter().enumerate().filter(|(_, word)| **word != 0) {
            let mut probed = self.home(hash_of(found));
            while probed != slot {
                assert_ne!(self.words[probed], 0, "an empty slot between a word and its home");
                probed = self.next(probed);
            }
            each(hash_of(found), id_of(found));
        }
    }

    fn home(&self, hash: u32) -> usize {
        hash as usize & (self.words.len() - 1)
    }

    fn next(&self, slot: usize) -> usize {
        (slot + 1) & (self.words.len() - 1)
    }

    fn resize(&mut self, len: usize) -> Result<()> {
        let old = std::mem::replace(&mut self.words, memory::zeros(len)?);
        for moved in old.into_iter().filter(|word| *word != 0) {
            let Err(empty) = self.search(hash_of(moved), |_| false) else { continue };
            self.words[empty] = moved;
        }
        Ok(())
    }

    pub(crate) fn copy(&self) -> Result<Self> {
        Ok(Self { words: memory::collect(self.words.iter().copied())? })
    }
}
