//! An ordered map that can be popped at both ends, and anywhere, in O(1).
//!
//! A hash map that keeps insertion order usually pays for removal: it either closes the gap (O(n)) or fills it with the
//! last entry (the order is lost). This one leaves a hole, and closes the holes all at once when more than half of the
//! entries are holes.
//!
//! ```text
//!   words     [ 0 | h,12 | h,10 | 0 | h,13 | 0 | 0 | h,15 ]   open addressing, linear probing, 0 is empty
//!                     \______|________|______________|        a word: 32 bits of hash beside a 32-bit id
//!   entries         [ k,v | hole | k,v | k,v | hole | k,v ]   insertion order
//!   id                10     11    12    13     14    15
//!                     base = 10: id - base is the position
//! ```
//!
//! * A probe costs one cache miss in `words`; the entry is touched only where all 32 bits of the hash agree.
//! * Popping at the front moves `base` instead of the entries. Ids wrap around at 2^32; only differences count.
//! * Growing, shrinking and compaction move words, never look at a key, and never hash one.
//! * Removal shifts the words behind it back, so there are no tombstones and look-ups do not slow down with age.
//! * Bulk operations first touch what a batch will need, so that the cache misses of a batch overlap.

mod bulk_build;
mod bulk_read;

use std::collections::VecDeque;

use crate::error::{Error, Result};
use crate::hash_table::Words;
use crate::key::{Hashed, Matches};
use crate::memory;

/// The largest number of entries of a map: half of the ids, because up to half of the entries may be holes.
pub const MAX_ENTRIES: usize = (1 << 31) - 64;

/// How many keys a bulk operation looks ahead: enough independent loads to keep the memory system busy, few enough for
/// their words to stay in the first-level cache.
const BATCH: usize = 32;

/// Below this many entries, holes and empty words are not worth a sweep.
const SMALL: usize = 32;

/// An ordered map from keys to values; see the [module's description](self).
///
/// Costs are amortised, with `n` the number of entries.
pub struct IndexMap<K, V> {
    words: Words,
    /// The first and the last are never holes.
    entries: VecDeque<Option<(K, V)>>,
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

impl<K, V> Default for IndexMap<K, V> {
    fn default() -> Self {
        Self { words: Words::default(), entries: VecDeque::new(), base: 0, len: 0, generation: 0 }
    }
}

impl<K, V> IndexMap<K, V> {
    /// Makes an empty map; nothing is allocated.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of entries. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no entries. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A number that changes whenever an entry is added, removed or moved, and not when a value is replaced.
    ///
    /// Who walks the map by position compares it to notice a change. **O(1)**.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The bytes that the map has allocated, without what keys and values own. **O(1)**.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.words.allocated_bytes() + self.entries.capacity() * size_of::<Option<(K, V)>>()
    }

    /// Makes room for `additional` more entries.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if the map would have to hold more than [`MAX_ENTRIES`], [`Error::Memory`] if there is none; the
    /// map holds what it did.
    ///
    /// **O(n)**.
    pub fn reserve(&mut self, additional: usize) -> Result<()> {
        let wanted = self.len.saturating_add(additional);
        if wanted > MAX_ENTRIES {
            return Err(Error::Full { wanted, limit: MAX_ENTRIES });
        }
        self.entries.try_reserve(additional).map_err(|_| Error::Memory)?;
        self.words.reserve(wanted)
    }

    /// Makes sure that so many more entries, or entries that move, have an id.
    fn make_ids(&mut self, additional: usize) -> Result<()> {
        // Where there was no memory to close them, there may be more holes than ids for holes.
        if self.entries.len().saturating_add(additional) > 2 * MAX_ENTRIES {
            self.compact();
            if self.entries.len().saturating_add(additional) > 2 * MAX_ENTRIES {
                return Err(Error::Memory);
            }
        }
        Ok(())
    }

    /// The first entry in order. **O(1)**.
    #[must_use]
    pub fn first(&self) -> Option<(&K, &V)> {
        self.entry_at_or_after(0).map(|(_, key, value)| (key, value))
    }

    /// The last entry in order. **O(1)**.
    #[must_use]
    pub fn last(&self) -> Option<(&K, &V)> {
        let (key, value) = self.entries.back()?.as_ref()?;
        Some((key, value))
    }

    /// The entry at `position`, if there is one and not a hole. **O(1)**.
    #[must_use]
    pub fn entry_at(&self, position: usize) -> Option<(&K, &V)> {
        let (key, value) = self.entries.get(position)?.as_ref()?;
        Some((key, value))
    }

    /// The entry at `position` or, if there is a hole, the next one behind it, and its position.
    ///
    /// Positions run from 0 to [`positions`](Self::positions), holes included, and keep their meaning as long as the
    /// [`generation`](Self::generation) stays. A walk over all positions is **O(n)**; one step is amortised **O(1)**.
    #[must_use]
    pub fn entry_at_or_after(&self, position: usize) -> Option<(usize, &K, &V)> {
        (position..self.entries.len()).find_map(|at| self.entry_at(at).map(|(key, value)| (at, key, value)))
    }

    /// The entry in front of `position`, over holes, and its position; the mirror of
    /// [`entry_at_or_after`](Self::entry_at_or_after).
    #[must_use]
    pub fn entry_before(&self, position: usize) -> Option<(usize, &K, &V)> {
        let end = position.min(self.entries.len());
        (0..end).rev().find_map(|at| self.entry_at(at).map(|(key, value)| (at, key, value)))
    }

    /// One more than the largest position. **O(1)**.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.entries.len()
    }

    /// The entries in order, from either end. **O(n)** for all.
    #[must_use]
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter { entries: self.entries.iter(), left: self.len }
    }

    /// Removes all entries and gives the memory back. **O(n)**.
    pub fn clear(&mut self) {
        let generation = self.generation + 1;
        *self = Self { generation, ..Self::default() };
    }

    /// Closes the holes that removals left; the order stays. **O(n)**, or **O(1)** if there are none.
    ///
    /// Where there is no memory to do so, they stay until the next time.
    pub fn compact(&mut self) {
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

    /// Makes a map with the same order, of what `convert` makes of each entry, which must match and hash the same.
    ///
    /// Nothing is hashed or compared. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn map_entries<L, W>(&self, mut convert: impl FnMut(&K, &V) -> (L, W)) -> Result<IndexMap<L, W>> {
        let words = self.words.copy()?;
        let entries = self.entries.iter().map(|entry| entry.as_ref().map(|(key, value)| convert(key, value)));
        let entries = memory::collect(entries)?.into();
        Ok(IndexMap { words, entries, base: self.base, len: self.len, generation: 0 })
    }

    /// Checks that the map is as its description says. For tests: **O(n)**.
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
        // Fewer than SMALL holes may stay whatever happens, also when insertions make a small map larger.
        assert!(self.entries.len() - self.len <= self.len.max(SMALL), "too many holes");
        let mut words = 0;
        self.words.check(|hash, id| {
            let (key, _) = self.entries[self.position(id)].as_ref().expect("a word points at a hole");
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
    fn take(&mut self, slot: usize) -> (K, V) {
        let position = self.position_in(slot);
        self.words.erase(slot);
        let taken = self.entries[position].take().expect("a word points at a hole");
        self.len -= 1;
        self.generation += 1;
        self.tidy();
        taken
    }

    /// Drops the holes at both ends, and the holes and words of a map that has become much smaller.
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

impl<K: Hashed, V> IndexMap<K, V> {
    /// The slot of the entry that `query` names, or the empty slot that the search ended at.
    fn search<Q>(&self, hash: u32, query: &Q) -> std::result::Result<usize, usize>
    where
        Q: ?Sized,
        K: Matches<Q>,
    {
        self.words.search(hash, |id| match &self.entries[self.position(id)] {
            Some((key, _)) => key.matches(query),
            None => false,
        })
    }

    fn find<Q>(&self, hash: u32, query: &Q) -> Option<usize>
    where
        Q: ?Sized,
        K: Matches<Q>,
    {
        if self.is_empty() { None } else { self.search(hash, query).ok() }
    }

    fn find_hashed<Q>(&self, hash: u32, query: &Q) -> Option<&V>
    where
        Q: ?Sized,
        K: Matches<Q>,
    {
        let position = self.position_in(self.find(hash, query)?);
        self.entries[position].as_ref().map(|(_, value)| value)
    }

    fn position_of<Q>(&self, query: &Q) -> Option<usize>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.find(stored_hash(query), query).map(|slot| self.position_in(slot))
    }

    /// The key and value that `query` names. **O(1)**.
    pub fn get_key_value<Q>(&self, query: &Q) -> Option<(&K, &V)>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        let (key, value) = self.entries[self.position_of(query)?].as_ref()?;
        Some((key, value))
    }

    /// The value that `query` names. **O(1)**.
    pub fn get<Q>(&self, query: &Q) -> Option<&V>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.get_key_value(query).map(|(_, value)| value)
    }

    /// Whether there is an entry that `query` names. **O(1)**.
    pub fn contains<Q>(&self, query: &Q) -> bool
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.find(stored_hash(query), query).is_some()
    }

    /// Adds an entry at the end and gives `None`. If there is one with this key, replaces its value and gives the old
    /// one; the entry keeps its key and its place.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there are [`MAX_ENTRIES`] already, [`Error::Memory`]; nothing has changed then.
    ///
    /// **O(1)**.
    pub fn insert(&mut self, key: K, value: V) -> Result<Option<V>>
    where
        K: Matches<K>,
    {
        self.insert_hashed(stored_hash(&key), key, value)
    }

    /// The value of the entry with this key; first adds it at the end, with what `make` gives, if there is none.
    ///
    /// Gives also whether it was added. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there are [`MAX_ENTRIES`] already, [`Error::Memory`]; nothing has changed then.
    pub fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> Result<(&mut V, bool)>
    where
        K: Matches<K>,
    {
        self.get_or_insert_hashed(stored_hash(&key), key, make)
    }
}

impl<K: Matches<K>, V> IndexMap<K, V> {
    /// Inserts many entries, in order, and calls `replaced` with each value that gave way to a later one.
    ///
    /// **O(m)** for `m` entries, several times faster than `m` calls of [`insert`](Self::insert) in a map larger than
    /// the cache, because the misses of a batch overlap. The order and the result are those of `m` calls.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], or [`Error::Full`] if the map could not hold all of them were they all new: before anything has
    /// changed.
    pub fn insert_many<I>(&mut self, entries: I, mut replaced: impl FnMut(V)) -> Result<()>
    where
        I: IntoIterator<Item = (K, V), IntoIter: ExactSizeIterator>,
    {
        let entries = entries.into_iter().map(|(key, value)| (stored_hash(&key), (key, value)));
        self.in_batches(entries, |map, hash, (key, value)| {
            if let Some(old) = map.insert_hashed(hash, key, value)? {
                replaced(old);
            }
            Ok(())
        })
    }

    /// Calls `each` with the value of each key, in order; a key that is new is first added at the end, with the value
    /// that `make` gives.
    ///
    /// **O(m)** for `m` keys, and as fast as [`insert_many`](Self::insert_many).
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], or [`Error::Full`] if the map could not hold all of them were they all new: before anything has
    /// changed.
    pub fn get_or_insert_many<I>(
        &mut self,
        keys: I,
        mut make: impl FnMut() -> V,
        mut each: impl FnMut(&V),
    ) -> Result<()>
    where
        I: IntoIterator<Item = K, IntoIter: ExactSizeIterator>,
    {
        let keys = keys.into_iter().map(|key| (stored_hash(&key), key));
        self.in_batches(keys, |map, hash, key| {
            each(map.get_or_insert_hashed(hash, key, &mut make)?.0);
            Ok(())
        })
    }

    /// Makes room for all items, and then, batch by batch, touches the words that they need and hands them to `insert`.
    fn in_batches<T>(
        &mut self,
        mut items: impl ExactSizeIterator<Item = (u32, T)>,
        mut insert: impl FnMut(&mut Self, u32, T) -> Result<()>,
    ) -> Result<()> {
        self.reserve(items.len())?;
        let mut batch = memory::with_capacity(BATCH)?;
        loop {
            batch.extend(items.by_ref().take(BATCH));
            if batch.is_empty() {
                return Ok(());
            }
            self.words.touch(batch.iter().map(|(hash, _)| *hash));
            for (hash, item) in batch.drain(..) {
                insert(self, hash, item)?;
            }
        }
    }

    fn insert_hashed(&mut self, hash: u32, key: K, value: V) -> Result<Option<V>> {
        self.make_room()?;
        match self.search(hash, &key) {
            Ok(slot) => {
                let position = self.position_in(slot);
                let (_, old) = self.entries[position].as_mut().expect("a word points at a hole");
                Ok(Some(std::mem::replace(old, value)))
            }
            Err(empty) => {
                self.append_at(empty, hash, key, value);
                Ok(None)
            }
        }
    }

    fn get_or_insert_hashed(&mut self, hash: u32, key: K, make: impl FnOnce() -> V) -> Result<(&mut V, bool)> {
        self.make_room()?;
        let (position, added) = match self.search(hash, &key) {
            Ok(slot) => (self.position_in(slot), false),
            Err(empty) => (self.append_at(empty, hash, key, make()), true),
        };
        let (_, value) = self.entries[position].as_mut().expect("a word points at a hole");
        Ok((value, added))
    }

    /// Makes sure that one more entry has a word, a place and an id.
    fn make_room(&mut self) -> Result<()> {
        if self.len == MAX_ENTRIES {
            return Err(Error::Full { wanted: MAX_ENTRIES + 1, limit: MAX_ENTRIES });
        }
        self.make_place()?;
        self.words.make_room(self.len + 1)
    }

    /// Makes sure that one more entry, or one that moves, has a place and an id.
    fn make_place(&mut self) -> Result<()> {
        self.make_ids(1)?;
        memory::make_room(&mut self.entries)
    }

    /// Adds an entry that is known to be new, in the empty slot where the search for it ended.
    fn append_at(&mut self, empty: usize, hash: u32, key: K, value: V) -> usize {
        let position = self.entries.len();
        self.entries.push_back(Some((key, value)));
        self.words.fill(empty, hash, self.base.wrapping_add(position as u32));
        self.len += 1;
        self.generation += 1;
        position
    }

    /// Removes the entry that `query` names and gives it; the order of the others stays. **O(1)**.
    pub fn remove<Q>(&mut self, query: &Q) -> Option<(K, V)>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        let slot = self.find(stored_hash(query), query)?;
        Some(self.take(slot))
    }

    /// Removes the last entry and gives it. **O(1)**.
    pub fn pop_last(&mut self) -> Option<(K, V)> {
        let position = self.entries.len().checked_sub(1)?;
        if position.is_multiple_of(BATCH) {
            self.touch_entries(position.saturating_sub(BATCH)..position);
        }
        Some(self.take_at(position))
    }

    /// Removes the first entry and gives it. **O(1)**.
    pub fn pop_first(&mut self) -> Option<(K, V)> {
        if self.len == 0 {
            return None;
        }
        if (self.base as usize).is_multiple_of(BATCH) {
            self.touch_entries(0..BATCH.min(self.entries.len()));
        }
        Some(self.take_at(0))
    }

    /// Moves the entry that `query` names behind all others; whether there is one. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; nothing has changed then.
    pub fn move_to_last<Q>(&mut self, query: &Q) -> Result<bool>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.move_to(query, true)
    }

    /// Moves the entry that `query` names in front of all others; whether there is one. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; nothing has changed then.
    pub fn move_to_first<Q>(&mut self, query: &Q) -> Result<bool>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.move_to(query, false)
    }

    /// Keeps the entries for which `keep` says so, in order. **O(n)**.
    ///
    /// All are judged before any is removed: if `keep` panics, none is.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], before any is judged.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) -> Result<()> {
        let judge = |entry: &mut Option<(K, V)>| entry.as_mut().is_some_and(|(key, value)| !keep(key, value));
        let refused: Vec<bool> = memory::collect(self.entries.iter_mut().map(judge))?;
        for position in (0..refused.len()).filter(|position| refused[*position]) {
            let slot = self.slot_at(position);
            self.words.erase(slot);
            self.entries[position] = None;
            self.len -= 1;
            self.generation += 1;
        }
        self.tidy();
        Ok(())
    }

    /// The slot of the entry at a position that is not a hole.
    fn slot_at(&self, position: usize) -> usize {
        let (key, _) = self.entries[position].as_ref().expect("a hole has no slot");
        self.words.slot_of(stored_hash(key), self.base.wrapping_add(position as u32))
    }

    /// Who pops one entry often pops its neighbours next: their words can be fetched together.
    fn touch_entries(&self, positions: std::ops::Range<usize>) {
        self.words.touch(self.entries.range(positions).flatten().map(|(key, _)| stored_hash(key)));
    }

    fn take_at(&mut self, position: usize) -> (K, V) {
        let slot = self.slot_at(position);
        self.take(slot)
    }

    fn move_to<Q>(&mut self, query: &Q, last: bool) -> Result<bool>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        self.make_place()?;
        let hash = stored_hash(query);
        let Some(slot) = self.find(hash, query) else {
            return Ok(false);
        };
        self.move_slot(slot, hash, last);
        Ok(true)
    }

    /// Moves the entry in a slot behind or in front of all others, for which there is room.
    fn move_slot(&mut self, slot: usize, hash: u32, last: bool) {
        let position = self.position_in(slot);
        let there = if last { self.entries.len() - 1 } else { 0 };
        if position == there {
            return;
        }
        let entry = self.entries[position].take();
        let id = if last {
            self.entries.push_back(entry);
            self.base.wrapping_add((self.entries.len() - 1) as u32)
        } else {
            self.entries.push_front(entry);
            self.base = self.base.wrapping_sub(1);
            self.base
        };
        self.words.fill(slot, hash, id);
        self.generation += 1;
        self.tidy();
    }
}

impl<K: std::fmt::Debug, V: std::fmt::Debug> std::fmt::Debug for IndexMap<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<'a, K, V> IntoIterator for &'a IndexMap<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The entries of an [`IndexMap`] in order, from either end.
pub struct Iter<'a, K, V> {
    entries: std::collections::vec_deque::Iter<'a, Option<(K, V)>>,
    left: usize,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        let (key, value) = self.entries.by_ref().flatten().next()?;
        self.left -= 1;
        Some((key, value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }

    fn fold<B, F: FnMut(B, Self::Item) -> B>(self, first: B, mut fold: F) -> B {
        // In two slices, which a deque hands out only here.
        self.entries.fold(first, |folded, entry| match entry {
            Some((key, value)) => fold(folded, (key, value)),
            None => folded,
        })
    }
}

impl<K, V> DoubleEndedIterator for Iter<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let (key, value) = self.entries.by_ref().rev().flatten().next()?;
        self.left -= 1;
        Some((key, value))
    }
}

impl<K, V> ExactSizeIterator for Iter<'_, K, V> {}
