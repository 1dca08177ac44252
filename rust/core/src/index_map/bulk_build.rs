//! Maps that are made of many entries at once.

use super::{IndexMap, MAX_ENTRIES, Words, stored_hash};
use crate::error::{Error, Result};
use crate::hash_table::word;
use crate::key::Matches;
use crate::memory;

/// Where more come than were expected.
#[cold]
fn make_room<T>(listed: &mut Vec<T>, hashed: &mut Vec<u64>) -> Result<()> {
    listed.try_reserve(1).map_err(|_| Error::Memory)?;
    hashed.try_reserve(1).map_err(|_| Error::Memory)
}

/// Entries that are no map, in their order.
type Refused<K, V> = Vec<(K, V)>;

impl<K: Matches<K>, V> IndexMap<K, V> {
    /// Makes a map of entries in their order. Gives them back, in their order, if two have the same key or there are
    /// more than [`MAX_ENTRIES`].
    ///
    /// **O(n)**, and faster than [`insert_many`](Self::insert_many) in a map larger than the cache. All keys are there
    /// before the first one is searched for, so the words can be written in the order in which they lie.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn from_distinct(entries: impl Iterator<Item = (K, V)>) -> Result<std::result::Result<Self, Refused<K, V>>> {
        let expected = entries.size_hint().1.unwrap_or(0).min(MAX_ENTRIES);
        let (mut listed, mut hashed) = (memory::with_capacity(expected)?, memory::with_capacity(expected)?);
        for entry in entries {
            if listed.len() == listed.capacity() || hashed.len() == hashed.capacity() {
                make_room(&mut listed, &mut hashed)?;
            }
            hashed.push(word(stored_hash(&entry.0), listed.len() as u32));
            listed.push(Some(entry));
        }
        let key = |id: u32| listed[id as usize].as_ref().map(|(key, _)| key);
        let are_same = |one, other| key(one).zip(key(other)).is_some_and(|(one, other)| one.matches(other));
        let words = if hashed.len() <= MAX_ENTRIES { Words::of_distinct(&hashed, are_same)? } else { None };
        drop(hashed);
        let len = listed.len();
        Ok(match words {
            Some(words) => Ok(Self { words, entries: listed.into(), base: 0, len, generation: len as u64 }),
            None => Err(memory::collect(listed.into_iter().flatten())?),
        })
    }
}
