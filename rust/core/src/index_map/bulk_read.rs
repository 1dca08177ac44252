//! Many keys at once: look-ups, and walks over all entries.

use super::{IndexMap, stored_hash};
use crate::key::{Hashed, Matches};

/// How many keys go through each step together. They are enough that the memory prefetched for the first has arrived by
/// the next step. They are so few that the memory prefetched for all fits into the first-level cache.
const TOGETHER: usize = 64;

/// How many entries ahead of a walk a key is prefetched.
const AHEAD: usize = 16;

impl<K: Hashed, V> IndexMap<K, V> {
    /// Calls `each` with all entries in order, and [prefetches](Hashed::prefetch) keys ahead, for those who look at them.
    ///
    /// **O(n)**.
    pub fn for_each(&self, mut each: impl FnMut(&K, &V)) {
        let (front, back) = self.entries.as_slices();
        for entries in [front, back] {
            for (at, entry) in entries.iter().enumerate() {
                entries.get(at + AHEAD).into_iter().flatten().for_each(|(key, _)| key.prefetch());
                if let Some((key, value)) = entry {
                    each(key, value);
                }
            }
        }
    }

    /// Calls `each` with all values in order, which it may replace. **O(n)**.
    pub fn for_each_value(&mut self, each: impl FnMut(&mut V)) {
        self.entries.iter_mut().flatten().map(|(_, value)| value).for_each(each);
    }

    /// Looks up many at once: calls `each` with the place in `queries` and what was found, in order.
    ///
    /// **O(m)** for `m` queries. In a map larger than the cache, it is several times faster than `m` calls of
    /// [`get`](Self::get) if keys and queries can be [prefetched](Hashed::prefetch). The misses of a batch then
    /// overlap.
    pub fn get_many<Q>(&self, queries: &[Q], mut each: impl FnMut(usize, Option<&V>))
    where
        Q: Hashed,
        K: Matches<Q>,
    {
        if self.is_empty() {
            (0..queries.len()).for_each(|at| each(at, None));
            return;
        }
        let (mut hashes, mut positions) = ([0; TOGETHER], [usize::MAX; TOGETHER]);
        queries.iter().take(TOGETHER).for_each(Q::prefetch);
        for (number, batch) in queries.chunks(TOGETHER).enumerate() {
            let begin = number * TOGETHER;
            for (query, hash) in batch.iter().zip(&mut hashes) {
                *hash = stored_hash(query);
                K::prefetch_place(self.words.home_word(*hash));
            }
            queries[begin..].iter().skip(TOGETHER).take(TOGETHER).for_each(Q::prefetch);
            for (hash, position) in hashes.iter().zip(&mut positions).take(batch.len()) {
                *position = self.words.first_id(*hash).map_or(usize::MAX, |id| self.position(id));
                self.entries.get(*position).into_iter().for_each(K::prefetch_place);
            }
            let entry = |position: usize| self.entries.get(position).and_then(Option::as_ref);
            for (key, _) in positions.iter().take(batch.len()).filter_map(|position| entry(*position)) {
                key.prefetch();
            }
            for (at, query) in batch.iter().enumerate() {
                let found = match entry(positions[at]) {
                    Some((key, _)) if !key.matches(query) => self.find_hashed(hashes[at], query),
                    first => first.map(|(_, value)| value),
                };
                each(begin + at, found);
            }
        }
    }
}
