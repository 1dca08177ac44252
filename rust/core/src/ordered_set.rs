//! An ordered set that can be popped at both ends, and anywhere, in O(1).
//!
//! A hash set that keeps insertion order usually pays for removal: it either closes the gap (O(n)) or fills it with the
//! last entry (the order is lost). This one leaves a hole, and closes the holes all at once when more than half of the
//! entries are holes.
//!
//! ```text
//!   words     [ 0 | h,12 | h,10 | 0 | h,13 | 0 | 0 | h,15 ]   open addressing, linear probing, 0 is empty
//!                     \______|________|______________|        a word: 32 bits of hash beside a 32-bit id
//!   entries         [ key | hole | key | key | hole | key ]   insertion order
//!   id                10     11    12    13     14    15
//!                     base = 10: id - base is the position
//! ```
//!
//! * A probe costs one cache miss in `words`; the entry is touched only where all 32 bits of the hash agree.
//! * Popping at the front moves `base` instead of the entries. Ids wrap around at 2^32; only differences count.
//! * Growing, shrinking and compaction move words, never look at a key, and never hash one.
//! * Removal shifts the words behind it back, so there are no tombstones and look-ups do not slow down with age.
//! * Bulk operations first touch what a batch will need, so that the cache misses of a batch overlap.

use std::collections::VecDeque;

use crate::error::{Error, Result};
use crate::hash_table::{MAX_ENTRIES, Words};
use crate::key::{Hashed, Matches};
use crate::memory;

/// How many keys a bulk operation looks ahead: enough independent loads to keep the memory system busy, few enough for
/// their words to stay in the first-level cache.
const BATCH: usize = 32;

/// Below this many entries, holes and empty words are not worth a sweep.
const SMALL: usize = 32;

/// Distinct keys in order; see the [module's description](self).
///
/// Costs are amortised, with `n` the number of keys.
pub struct OrderedSet<K> {
    words: Words,
    /// The first and the last are never holes.
    entries: VecDeque<Option<K>>,
    /// The id of `entries[0]`.
    base: u32,
    /// The entries that are not holes.
    len: usize,
    /// Counts the changes after which a position means something else.
    generation: u64,
}

/// The hash as it stands in a word: never 0, so that no word of an entry is 0.
fn stored_hash<Q: Hashed + ?Sized>(query: &Q) -> u32 {
    query.hash().max(1)
}

impl<K> Default for OrderedSet<K> {
    fn default() -> Self {
        Self { words: Words::default(), entries: VecDeque::new(), base: 0, len: 0, generation: 0 }
    }
}

impl<K> OrderedSet<K> {
    /// Makes an empty set; nothing is allocated.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of keys. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no keys. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A number that changes whenever a key is added or removed. Who walks the set by position compares it. **O(1)**.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The bytes that the set has allocated, without what keys own. **O(1)**.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.words.allocated_bytes() + self.entries.capacity() * size_of::<Option<K>>()
    }

    /// Makes room for so many more keys.
    fn reserve(&mut self, additional: usize) -> Result<()> {
        let wanted = self.len.saturating_add(additional);
        if wanted > MAX_ENTRIES {
            return Err(Error::Full { wanted, limit: MAX_ENTRIES });
        }
        self.entries.try_reserve(additional).map_err(|_| Error::Memory)?;
        self.words.reserve(wanted)
    }

    /// Makes sure that one more entry has an id.
    fn make_id(&mut self) -> Result<()> {
        // Where there was no memory to close them, there may be more holes than ids for holes.
        if self.entries.len() >= 2 * MAX_ENTRIES {
            self.compact();
            if self.entries.len() >= 2 * MAX_ENTRIES {
                return Err(Error::Memory);
            }
        }
        Ok(())
    }

    /// The first key in order. **O(1)**.
    #[must_use]
    pub fn first(&self) -> Option<&K> {
        self.entries.front()?.as_ref()
    }

    /// The last key in order. **O(1)**.
    #[must_use]
    pub fn last(&self) -> Option<&K> {
        self.entries.back()?.as_ref()
    }

    /// The key at `position`, if there is one and not a hole. **O(1)**.
    #[must_use]
    pub fn key_at(&self, position: usize) -> Option<&K> {
        self.entries.get(position)?.as_ref()
    }

    /// The key at `position` or, if there is a hole, the next one behind it, and its position.
    ///
    /// Positions run from 0 to [`positions`](Self::positions), holes included, and keep their meaning as long as the
    /// [`generation`](Self::generation) stays. A walk over all positions is **O(n)**; one step is amortised **O(1)**.
    #[must_use]
    pub fn key_at_or_after(&self, position: usize) -> Option<(usize, &K)> {
        (position..self.entries.len()).find_map(|at| self.key_at(at).map(|key| (at, key)))
    }

    /// The key in front of `position`, over holes, and its position; the mirror of
    /// [`key_at_or_after`](Self::key_at_or_after).
    #[must_use]
    pub fn key_before(&self, position: usize) -> Option<(usize, &K)> {
        let end = position.min(self.entries.len());
        (0..end).rev().find_map(|at| self.key_at(at).map(|key| (at, key)))
    }

    /// One more than the largest position. **O(1)**.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.entries.len()
    }

    /// The keys in order. **O(n)** for all.
    pub fn iter(&self) -> impl Iterator<Item = &K> {
        self.entries.iter().flatten()
    }

    /// Removes all keys and gives the memory back. **O(n)**.
    pub fn clear(&mut self) {
        let generation = self.generation + 1;
        *self = Self { generation, ..Self::default() };
    }

    /// Closes the holes that removals left; the order stays. **O(n)**, or **O(1)** if there are none.
    ///
    /// Where there is no memory to do so, they stay until the next time.
    fn compact(&mut self) {
        if self.entries.len() == self.len {
            return;
        }
        let Ok(mut closed_up) = memory::with_capacity(self.entries.len()) else {
            return;
        };
        let mut live = 0_u32;
        for entry in &self.entries {
            closed_up.push(live);
            live += u32::from(entry.is_some());
        }
        let base = self.base;
        self.words.renumber(|id| base.wrapping_add(closed_up[id.wrapping_sub(base) as usize]));
        self.entries.retain(Option::is_some);
        self.generation += 1;
    }

    /// Makes a set with the same order, of what `convert` makes of each key, which must match and hash the same.
    ///
    /// Nothing is hashed or compared. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn map_keys<L>(&self, mut convert: impl FnMut(&K) -> L) -> Result<OrderedSet<L>> {
        let words = self.words.copy()?;
        let entries = memory::collect(self.entries.iter().map(|key| key.as_ref().map(&mut convert)))?.into();
        Ok(OrderedSet { words, entries, base: self.base, len: self.len, generation: 0 })
    }

    /// Checks that the set is as its description says. For tests: **O(n)**.
    ///
    /// # Panics
    ///
    /// If it is not.
    pub fn check(&self)
    where
        K: Hashed,
    {
        assert_eq!(self.len, self.entries.iter().flatten().count(), "len counts the entries");
        assert!(!matches!(self.entries.front(), Some(None)), "a hole at the front");
        assert!(!matches!(self.entries.back(), Some(None)), "a hole at the back");
        // Fewer than SMALL holes may stay whatever happens, also when insertions make a small set larger.
        assert!(self.entries.len() - self.len <= self.len.max(SMALL), "too many holes");
        let mut words = 0;
        self.words.check(|hash, id| {
            let key = self.entries[self.position(id)].as_ref().expect("a word points at a hole");
            assert_eq!(stored_hash(key), hash, "a word has another hash than its key");
            words += 1;
        });
        assert_eq!(words, self.len, "one word an entry");
    }

    fn position(&self, id: u32) -> usize {
        id.wrapping_sub(self.base) as usize
    }

    fn position_in(&self, slot: usize) -> usize {
        self.position(self.words.id(slot))
    }

    /// Takes the entry in `slot` out, leaving a hole.
    fn take(&mut self, slot: usize) -> K {
        let position = self.position_in(slot);
        self.words.erase(slot);
        let taken = self.entries[position].take().expect("a word points at a hole");
        self.len -= 1;
        self.generation += 1;
        self.tidy();
        taken
    }

    /// Drops the holes at both ends, and the holes and words of a set that has become much smaller.
    fn tidy(&mut self) {
        while matches!(self.entries.front(), Some(None)) {
            self.entries.pop_front();
            self.base = self.base.wrapping_add(1);
        }
        while matches!(self.entries.back(), Some(None)) {
            self.entries.pop_back();
        }
        if self.entries.len() > SMALL && self.entries.len() > 2 * self.len {
            self.compact();
        }
        if self.words.shrink(self.len) {
            self.entries.shrink_to(2 * self.len);
        }
    }
}

impl<K: Hashed> OrderedSet<K> {
    /// The slot of the entry that `query` names, or the empty slot that the search ended at.
    fn search<Q>(&self, hash: u32, query: &Q) -> std::result::Result<usize, usize>
    where
        Q: ?Sized,
        K: Matches<Q>,
    {
        self.words.search(hash, |id| self.key_at(self.position(id)).is_some_and(|key| key.matches(query)))
    }

    fn find<Q>(&self, hash: u32, query: &Q) -> Option<usize>
    where
        Q: ?Sized,
        K: Matches<Q>,
    {
        if self.is_empty() { None } else { self.search(hash, query).ok() }
    }

    /// Whether there is a key that `query` names. **O(1)**.
    pub fn contains<Q>(&self, query: &Q) -> bool
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.find(stored_hash(query), query).is_some()
    }

    /// Adds a key at the end; `false`, and nothing has changed, if there is one that matches it. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there are [`MAX_ENTRIES`] already, [`Error::Memory`]; nothing has changed then.
    pub fn insert(&mut self, key: K) -> Result<bool>
    where
        K: Matches<K>,
    {
        self.insert_hashed(stored_hash(&key), key)
    }

    /// Adds the keys that are not there yet at the end, in order. **O(m)**; the cache misses of a batch overlap.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], or [`Error::Full`] if the set could not hold all of them were they all new: before anything has
    /// changed.
    pub fn insert_many(&mut self, keys: impl IntoIterator<Item = K, IntoIter: ExactSizeIterator>) -> Result<()>
    where
        K: Matches<K>,
    {
        let mut keys = keys.into_iter().map(|key| (stored_hash(&key), key));
        self.reserve(keys.len())?;
        let mut batch = memory::with_capacity(BATCH)?;
        loop {
            batch.extend(keys.by_ref().take(BATCH));
            if batch.is_empty() {
                return Ok(());
            }
            self.words.touch(batch.iter().map(|(hash, _)| *hash));
            for (hash, key) in batch.drain(..) {
                self.insert_hashed(hash, key)?;
            }
        }
    }

    fn insert_hashed(&mut self, hash: u32, key: K) -> Result<bool>
    where
        K: Matches<K>,
    {
        if self.len == MAX_ENTRIES {
            return Err(Error::Full { wanted: MAX_ENTRIES + 1, limit: MAX_ENTRIES });
        }
        self.make_id()?;
        memory::make_room(&mut self.entries)?;
        self.words.make_room(self.len + 1)?;
        let Err(empty) = self.search(hash, &key) else { return Ok(false) };
        self.words.fill(empty, hash, self.base.wrapping_add(self.entries.len() as u32));
        self.entries.push_back(Some(key));
        self.len += 1;
        self.generation += 1;
        Ok(true)
    }

    /// Removes the key that `query` names and gives it; the order of the others stays. **O(1)**.
    pub fn remove<Q>(&mut self, query: &Q) -> Option<K>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        let slot = self.find(stored_hash(query), query)?;
        Some(self.take(slot))
    }

    /// Removes the last key and gives it. **O(1)**.
    pub fn pop_last(&mut self) -> Option<K> {
        let position = self.entries.len().checked_sub(1)?;
        if position.is_multiple_of(BATCH) {
            self.touch_entries(position.saturating_sub(BATCH)..position);
        }
        Some(self.take_at(position))
    }

    /// Removes the first key and gives it. **O(1)**.
    pub fn pop_first(&mut self) -> Option<K> {
        if self.len == 0 {
            return None;
        }
        if (self.base as usize).is_multiple_of(BATCH) {
            self.touch_entries(0..BATCH.min(self.entries.len()));
        }
        Some(self.take_at(0))
    }

    /// The slot of the entry at a position that is not a hole.
    fn slot_at(&self, position: usize) -> usize {
        let key = self.entries[position].as_ref().expect("a hole has no slot");
        self.words.slot_of(stored_hash(key), self.base.wrapping_add(position as u32))
    }

    /// Who pops one entry often pops its neighbours next: their words can be fetched together.
    fn touch_entries(&self, positions: std::ops::Range<usize>) {
        self.words.touch(self.entries.range(positions).flatten().map(stored_hash));
    }

    fn take_at(&mut self, position: usize) -> K {
        let slot = self.slot_at(position);
        self.take(slot)
    }
}
