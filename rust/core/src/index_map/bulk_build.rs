//! Maps that are made of many entries at once.

use super::{IndexMap, MAX_ENTRIES, Words, stored_hash};
use crate::error::{Error, Result};
use crate::key::Matches;
use crate::memory;

/// Where more come than were expected.
#[cold]
fn make_room<T>(listed: &mut Vec<T>, hashes: &mut Vec<u32>) -> Result<()> {
    listed.try_reserve(1).map_err(|_| Error::Memory)?;
    hashes.try_reserve(1).map_err(|_| Error::Memory)
}

/// The number of the first of so many keys that is equal to one before it; `None` if all are distinct. **O(m)**.
///
/// # Errors
///
/// [`Error::Memory`]; [`Error::Full`] for more keys than a map can hold.
pub(crate) fn first_repeated<'a, K: Matches<K> + 'a>(
    count: usize,
    key: impl Fn(usize) -> &'a K,
) -> Result<Option<usize>> {
    if count > MAX_ENTRIES {
        return Err(Error::Full { wanted: count, limit: MAX_ENTRIES });
    }
    if count < 2 {
        return Ok(None);
    }
    let hashes = memory::collect((0..count).map(|at| stored_hash(key(at))))?;
    let are_same = |one: u32, other: u32| key(one as usize).matches(key(other as usize));
    if Words::of_distinct(&hashes, are_same)?.is_some() {
        return Ok(None);
    }
    let mut words = Words::default();
    words.reserve(count)?;
    for (hash, at) in hashes.into_iter().zip(0..) {
        match words.search(hash, |found| are_same(found, at)) {
            Ok(_) => return Ok(Some(at as usize)),
            Err(empty) => words.fill(empty, hash, at),
        }
    }
    Ok(None)
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
        let (mut listed, mut hashes) = (memory::with_capacity(expected)?, memory::with_capacity(expected)?);
        for entry in entries {
            if listed.len() == listed.capacity() || hashes.len() == hashes.capacity() {
                make_room(&mut listed, &mut hashes)?;
            }
            hashes.push(stored_hash(&entry.0));
            listed.push(Some(entry));
        }
        let key = |id: u32| listed[id as usize].as_ref().map(|(key, _)| key);
        let are_same = |one, other| key(one).zip(key(other)).is_some_and(|(one, other)| one.matches(other));
        let words = if hashes.len() <= MAX_ENTRIES { Words::of_distinct(&hashes, are_same)? } else { None };
        drop(hashes);
        let len = listed.len();
        Ok(match words {
            Some(words) => Ok(Self { words, entries: listed.into(), base: 0, len, generation: len as u64 }),
            None => Err(memory::collect(listed.into_iter().flatten())?),
        })
    }
}
