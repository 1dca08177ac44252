//! Changes whose memory was reserved and whose entries were found before: none of them can fail.

use super::{BATCH, IndexMap, stored_hash};
use crate::key::Matches;

impl<K: Matches<K>, V> IndexMap<K, V> {
    /// Replaces the value of the entry at a position. **O(1)**.
    pub(crate) fn set_value_at(&mut self, position: usize, value: V) {
        let (_, old) = self.entries[position].as_mut().expect("a hole has no value");
        *old = value;
    }

    /// Adds entries at the end whose keys are distinct and not there yet; there must be room for them. **O(m)**.
    pub(crate) fn append_new(&mut self, entries: Vec<(K, V)>) {
        let mut entries = entries.into_iter();
        loop {
            let batch = entries.as_slice();
            if batch.is_empty() {
                return;
            }
            batch.iter().skip(BATCH).take(BATCH).for_each(|(key, _)| key.prefetch());
            self.words.touch(batch.iter().take(BATCH).map(|(key, _)| stored_hash(key)));
            for (key, value) in entries.by_ref().take(BATCH) {
                let hash = stored_hash(&key);
                let empty = self.words.search(hash, |_| false).unwrap_or_else(|slot| slot);
                self.append_at(empty, hash, key, value);
            }
        }
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
