//! Changes whose memory was reserved and whose entries were found before: none of them can fail.

use super::{BATCH, IndexMap, first_repeated, stored_hash};
use crate::error::Result;
use crate::hash_table::Slots;
use crate::key::Matches;

impl<K: Matches<K>, V> IndexMap<K, V> {
    /// Replaces the value of the entry at a position. **O(1)**.
    pub(crate) fn set_value_at(&mut self, position: usize, value: V) {
        let (_, old) = self.entries[position].as_mut().expect("a hole has no value");
        *old = value;
    }

    /// Makes room for keys that are not there, and finds where their words will stand, by their hashes as
    /// [`find_many`](Self::find_many) gave them. Gives instead the number of the first key that is equal to one before
    /// it, if there is one. **O(m)**.
    pub(crate) fn slots_of_new(&mut self, keys: &[K], hashes: &[u32]) -> Result<std::result::Result<Slots, usize>> {
        self.reserve(keys.len())?;
        let are_same = |one: u32, other: u32| keys[one as usize].matches(&keys[other as usize]);
        if let Some(slots) = self.words.slots_of_new(hashes, are_same)? {
            return Ok(Ok(slots));
        }
        let repeated = first_repeated(keys.len(), |at| &keys[at])?;
        Ok(Err(repeated.expect("a key is repeated")))
    }

    /// Adds keys at the end, whose slots were found, with a value for each. Nothing but reservations may have happened
    /// since. **O(m)**.
    pub(crate) fn append_new(&mut self, keys: Vec<K>, slots: &Slots, values: impl Iterator<Item = V>) {
        let count = keys.len();
        let first_id = self.base.wrapping_add(self.entries.len() as u32);
        self.words.fill_slots(slots, first_id);
        self.entries.extend(keys.into_iter().zip(values).map(Some));
        self.len += count;
        self.generation += count as u64;
    }

    /// Puts the entries of another map in place of none.
    pub(crate) fn become_filled(&mut self, filled: Self) {
        debug_assert!(self.is_empty(), "entries would be lost");
        let generation = self.generation + 1;
        *self = filled;
        self.generation += generation;
    }

    /// Removes the entries at distinct positions, and hands their keys to `removed`. **O(m)**, amortised.
    pub(crate) fn remove_at(&mut self, positions: &[usize], mut removed: impl FnMut(K)) {
        for batch in positions.chunks(BATCH) {
            let key = |position: &usize| self.entries[*position].as_ref().map(|(key, _)| key);
            batch.iter().filter_map(key).for_each(K::prefetch);
            self.words.touch(batch.iter().filter_map(key).map(stored_hash));
            for position in batch {
                let slot = self.slot_at(*position);
                self.words.erase(slot);
                let (key, _) = self.entries[*position].take().expect("a hole has no slot");
                self.len -= 1;
                self.generation += 1;
                removed(key);
            }
        }
        self.tidy();
    }

    /// Removes all entries, and hands their keys to `removed`. **O(n)**.
    pub(crate) fn remove_all(&mut self, removed: impl FnMut(K)) {
        let generation = self.generation + 1;
        let old = std::mem::replace(self, Self { generation, ..Self::default() });
        old.entries.into_iter().flatten().map(|(key, _)| key).for_each(removed);
    }

    /// Gives the entry at a position another key, which is not there yet; its place stays. Gives the old one. **O(1)**.
    pub(crate) fn rename_at(&mut self, position: usize, key: K) -> K {
        let slot = self.slot_at(position);
        let id = self.words.id(slot);
        self.words.erase(slot);
        let hash = stored_hash(&key);
        let empty = self.words.search(hash, |_| false).unwrap_or_else(|slot| slot);
        self.words.fill(empty, hash, id);
        self.generation += 1;
        let (old, _) = self.entries[position].as_mut().expect("a hole has no slot");
        std::mem::replace(old, key)
    }

    /// Moves the entry at a position behind or in front of all others; there must be a place for it. **O(1)**.
    pub(crate) fn move_at(&mut self, position: usize, last: bool) {
        let slot = self.slot_at(position);
        let hash = self.entries[position].as_ref().map_or(0, |(key, _)| stored_hash(key));
        self.move_slot(slot, hash, last);
    }
}
