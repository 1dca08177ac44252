//! Maps that are made of many entries at once.

use super::{IndexMap, MAX_ENTRIES, Words, stored_hash};
use crate::key::Matches;

impl<K: Matches<K>, V> IndexMap<K, V> {
    /// Makes a map of entries in their order, or gives them back, in their order, if two have the same key or there are
    /// more than [`MAX_ENTRIES`].
    ///
    /// **O(n)**, and faster than [`insert_many`](Self::insert_many) in a map larger than the cache: all keys are there
    /// before the first one is searched for, so the words can be written in the order in which they lie.
    ///
    /// # Errors
    ///
    /// The entries.
    pub fn from_distinct(entries: impl Iterator<Item = (K, V)>) -> Result<Self, Vec<(K, V)>> {
        let expected = entries.size_hint().1.unwrap_or(0).min(MAX_ENTRIES);
        let (mut listed, mut hashes) = (Vec::with_capacity(expected), Vec::with_capacity(expected));
        for entry in entries {
            hashes.push(stored_hash(&entry.0));
            listed.push(Some(entry));
        }
        let key = |id: u32| listed[id as usize].as_ref().map(|(key, _)| key);
        let are_same = |one, other| key(one).zip(key(other)).is_some_and(|(one, other)| one.matches(other));
        let words = (hashes.len() <= MAX_ENTRIES).then(|| Words::of_distinct(&hashes, are_same)).flatten();
        let len = listed.len();
        match words {
            Some(words) => Ok(Self { words, entries: listed.into(), base: 0, len, generation: len as u64 }),
            None => Err(listed.into_iter().flatten().collect()),
        }
    }
}
