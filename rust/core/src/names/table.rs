//! The names of a dictionary and the place of each, in order, in one piece of memory.
//!
//! ```text
//!   words     [ 0 | h,3 | h,0 | 0 | h,9 ]           open addressing: 32 bits of hash beside a 32-bit id
//!                      \_____|________|_______
//!   records   [ place "a" | gone | place "bcd" | place "a long name" | place "e" ]        in order
//!   unit        0           2      4             6                     9
//! ```
//!
//! * An id is the unit of 8 bytes at which a record begins, counted from a base that moves when names come or go in
//!   front. So a look-up misses the cache twice: for the word, and for the record with the place and the text.
//! * The hash is XXH3 with a seed that each process draws. That of [packed names](super::codec::hash) has none, so that
//!   all processes agree on it, and whoever chooses names can make them collide there. Here that takes the seed.
//! * A name that goes leaves its record behind. When more bytes belong to such records than to others, these move
//!   together. That looks at no text and hashes nothing.
//! * A name whose record would have another size when it is renamed has its text elsewhere until then. When there are
//!   too many of these, the records are moved, too.

mod changes;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use twox_hash::XxHash3_64;

use crate::error::{Error, Result};
use crate::hash_table::{MAX_ENTRIES, Slots, Words, first_repeated, hash_of, id_of, word};
use crate::memory;
use crate::names::record::{self, UNIT};
use crate::names::text::Text;
use crate::rows::Place;

/// How many names go through each step together. They are enough that the memory prefetched for the first has arrived by
/// the next step. They are so few that the memory prefetched for all fits into the first-level cache.
const TOGETHER: usize = 64;

/// So many names tell how much room others will take.
const ENOUGH: usize = 256;

/// Below this many bytes, what is left behind is not worth a sweep.
const SMALL: usize = 1 << 12;

/// A text that lies elsewhere takes about so many bytes more.
const APART: usize = 64;

/// Ids wrap around; so many units can be told apart.
const MOST_UNITS: usize = (1 << 32) - 2;

/// Names in order and their places; see the [module's description](self).
///
/// Costs are amortised, with `n` the number of names.
#[derive(Default)]
pub struct NameTable {
    words: Words,
    records: Vec<u8>,
    /// The byte at which the first record begins. The first and the last are those of names that are there.
    begin: usize,
    /// The id of the first record.
    base: u32,
    len: usize,
    /// How many bytes belong to records of names that are gone.
    gone: usize,
    /// The texts that do not lie in their records, by id.
    elsewhere: HashMap<u32, Vec<u8>>,
    generation: u64,
}

/// A name as a walk finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its position: that of the walk before it.
    pub position: usize,
    /// The position of a walk behind it.
    pub next: usize,
    /// Its bytes in UTF-8.
    pub name: &'a [u8],
    /// Its table and row.
    pub place: Place,
}

/// Names to be added.
pub(crate) struct New {
    listed: Listed,
    slots: Slots,
}

/// Names that are no table, because one is listed twice: the position of the second.
pub struct Repeated(pub(crate) usize);

/// The hash of a name as it stands in a word: never 0, so that no word of a name is 0. Another one in each process.
#[must_use]
#[inline]
pub fn stored_hash(text: &[u8]) -> u32 {
    static SEED: OnceLock<u64> = OnceLock::new();
    let seed = *SEED.get_or_init(|| RandomState::new().hash_one(0));
    (XxHash3_64::oneshot_with_seed(seed, text) as u32).max(1)
}

/// Records that are listed, one behind the other.
struct Listed {
    records: Vec<u8>,
    /// The hash of each, and the unit at which it begins.
    words: Vec<u64>,
}

impl Listed {
    fn with_capacity(names: usize) -> Result<Self> {
        Ok(Self { records: Vec::new(), words: memory::with_capacity(names)? })
    }

    #[inline]
    fn push(&mut self, hash: u32, text: &[u8], place: Option<Place>, expected: usize) -> Result<()> {
        let size = record::units_for(text.len())? * UNIT;
        if self.records.len() + size > self.records.capacity() {
            self.make_room(size, expected)?;
        }
        let unit = self.records.len() / UNIT;
        if unit > MOST_UNITS {
            return Err(too_much(text));
        }
        memory::push(&mut self.words, word(hash, unit as u32))?;
        record::push(&mut self.records, place, text);
        Ok(())
    }

    /// Makes room for one record, and for as many as are expected once there are enough to tell how large they are.
    #[cold]
    fn make_room(&mut self, size: usize, expected: usize) -> Result<()> {
        let listed = self.words.len();
        if listed >= ENOUGH && expected > listed {
            let average = self.records.len() / listed + 1;
            // The first names may be longer than others, or shorter.
            let all = (expected - listed).saturating_mul(average);
            let all = all.clamp(self.records.len() / 8, 8 * self.records.len().max(1 << 20)).max(size);
            if self.records.try_reserve_exact(all).is_ok() {
                return Ok(());
            }
        }
        self.records.try_reserve(size).map_err(|_| Error::Memory)
    }

    fn text(&self, unit: u32) -> &[u8] {
        record::text(&self.records, unit as usize * UNIT).unwrap_or_default()
    }

    fn are_same(&self, one: u32, other: u32) -> bool {
        let text = |number: u32| self.text(id_of(self.words[number as usize]));
        text(one) == text(other)
    }

    fn first_repeated(&self) -> Result<Repeated> {
        let hashes = self.words.iter().map(|word| hash_of(*word));
        let repeated = first_repeated(hashes, |one, other| self.are_same(one, other))?;
        Ok(Repeated(repeated.expect("a name is repeated")))
    }
}

fn too_much(text: &[u8]) -> Error {
    Error::Text { bytes: text.len() as u64 }
}

impl NameTable {
    /// The number of names. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no names. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A number that changes whenever a name is added, removed or moved, and not when its place changes. **O(1)**.
    ///
    /// Positions mean something else then.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The bytes that are allocated. **O(1)**, and O(m) where m names were renamed of late.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        let elsewhere = self.elsewhere.capacity() * size_of::<(u32, Vec<u8>)>();
        let texts: usize = self.elsewhere.values().map(Vec::capacity).sum();
        self.words.allocated_bytes() + self.records.capacity() + elsewhere + texts
    }

    /// Where a walk from the end begins. **O(1)**.
    #[must_use]
    pub fn positions(&self) -> usize {
        (self.records.len() - self.begin) / UNIT
    }

    /// The first name at a position or behind it. **O(1)**, amortised over a walk.
    #[must_use]
    #[inline]
    pub fn next(&self, mut position: usize) -> Option<Entry<'_>> {
        let positions = self.positions();
        while position < positions {
            let at = self.byte(position);
            let next = position + record::units(&self.records, at);
            if let Some(place) = record::place(&self.records, at) {
                return Some(Entry { position, next, name: self.text(position), place });
            }
            position = next;
        }
        None
    }

    /// The last name in front of a position, whose `next` is the position of a walk in front of it. **O(1)**, amortised
    /// over a walk.
    #[must_use]
    pub fn previous(&self, position: usize) -> Option<Entry<'_>> {
        let mut end = position.min(self.positions());
        while end > 0 {
            let position = end - record::units_before(&self.records, self.byte(end));
            if let Some(place) = record::place(&self.records, self.byte(position)) {
                return Some(Entry { position, next: position, name: self.text(position), place });
            }
            end = position;
        }
        None
    }

    /// The first name. **O(1)**.
    #[must_use]
    pub fn first(&self) -> Option<Entry<'_>> {
        self.next(0)
    }

    /// The last name. **O(1)**.
    #[must_use]
    pub fn last(&self) -> Option<Entry<'_>> {
        self.previous(usize::MAX)
    }

    /// All names in order. **O(n)** for all.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], Place)> {
        let mut position = 0;
        let step = move || {
            let entry = self.next(position)?;
            position = entry.next;
            Some((entry.name, entry.place))
        };
        Walk { step, left: self.len }
    }

    /// The position of the name in front of which so many others stand, or behind the last. **O(n)**.
    #[must_use]
    pub fn position_of_number(&self, number: usize) -> usize {
        let mut position = 0;
        for _ in 0..number {
            let Some(entry) = self.next(position) else { break };
            position = entry.next;
        }
        position
    }

    /// The place of the name that begins at a position; `None` if it is gone, or behind the last. **O(1)**.
    #[must_use]
    pub fn place_at(&self, position: usize) -> Option<Place> {
        if position < self.positions() { record::place(&self.records, self.byte(position)) } else { None }
    }

    /// The place of a name. **O(1)**.
    #[must_use]
    pub fn get(&self, name: &(impl Text + ?Sized)) -> Option<Place> {
        record::place(&self.records, self.byte(self.position_of(name)?))
    }

    /// Whether a name is there. **O(1)**.
    #[must_use]
    pub fn contains(&self, name: &(impl Text + ?Sized)) -> bool {
        self.position_of(name).is_some()
    }

    /// The position of a name. **O(1)**.
    pub(crate) fn position_of(&self, name: &(impl Text + ?Sized)) -> Option<usize> {
        name.with_utf8(|text| self.find(stored_hash(text), text))
    }

    /// Looks up many at once: calls `each` with the place of each name, in order. **O(m)**.
    ///
    /// All that a name needs is loaded a batch ahead, so that the cache misses of a batch overlap.
    pub fn get_many<Q: Text>(&self, names: &[Q], mut each: impl FnMut(Option<Place>)) {
        self.find_many(names, |_, _, found| each(found.map(|(_, place)| place)));
    }

    /// The same, with the number of each name, its hash, and its position.
    pub(crate) fn find_many<Q: Text>(&self, names: &[Q], each: impl FnMut(usize, u32, Option<(usize, Place)>)) {
        self.find_hashed(names, |_, name| name.with_utf8(stored_hash), each);
    }

    /// The same, of names whose hashes may be known.
    pub(crate) fn find_hashed<Q: Text>(
        &self,
        names: &[Q],
        hash_of: impl Fn(usize, &Q) -> u32,
        mut each: impl FnMut(usize, u32, Option<(usize, Place)>),
    ) {
        if self.is_empty() {
            names.iter().enumerate().for_each(|(at, name)| each(at, hash_of(at, name), None));
            return;
        }
        let (mut hashes, mut positions) = ([0; TOGETHER], [usize::MAX; TOGETHER]);
        names.iter().take(TOGETHER).for_each(Q::prefetch);
        for (number, batch) in names.chunks(TOGETHER).enumerate() {
            let begin = number * TOGETHER;
            for (at, (name, hash)) in batch.iter().zip(&mut hashes).enumerate() {
                *hash = hash_of(begin + at, name);
                Q::prefetch_place(self.words.home_word(*hash));
            }
            names[begin..].iter().skip(TOGETHER).take(TOGETHER).for_each(Q::prefetch);
            for (hash, position) in hashes.iter().zip(&mut positions).take(batch.len()) {
                *position = usize::MAX;
                if let Some(id) = self.words.first_id(*hash) {
                    *position = self.position(id);
                    let at = self.byte(*position);
                    // A record may begin in one cache line and end in the next.
                    for byte in [at, at + 3 * UNIT - 1] {
                        self.records.get(byte).into_iter().for_each(Q::prefetch_place);
                    }
                }
            }
            for (at, name) in batch.iter().enumerate() {
                let position = name.with_utf8(|text| match positions[at] {
                    usize::MAX => None,
                    first if record::are_same(self.text(first), text) => Some(first),
                    _ => self.find(hashes[at], text),
                });
                let place = position.and_then(|position| self.place_at(position));
                each(begin + at, hashes[at], position.zip(place));
            }
        }
    }

    /// A table of distinct names, in order. **O(n)**.
    ///
    /// All names are there before the first is searched for, so the words are written in the order in which they lie.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`], [`Error::Text`].
    pub fn of_distinct<Q: Text>(
        entries: impl Iterator<Item = (Q, Place)>,
    ) -> Result<std::result::Result<Self, Repeated>> {
        let expected = entries.size_hint().1.unwrap_or(0).min(MAX_ENTRIES);
        let mut listed = Listed::with_capacity(expected)?;
        for (name, place) in entries {
            name.with_utf8(|text| listed.push(stored_hash(text), text, Some(place), expected))?;
        }
        let len = listed.words.len();
        if len > MAX_ENTRIES {
            return Err(Error::Full { wanted: len, limit: MAX_ENTRIES });
        }
        let are_same = |one: u32, other: u32| listed.text(one) == listed.text(other);
        let Some(words) = Words::of_distinct(&listed.words, are_same)? else {
            return listed.first_repeated().map(Err);
        };
        Ok(Ok(Self { words, records: listed.records, len, generation: len as u64, ..Self::default() }))
    }

    /// Makes room for names that are not there, and finds where their words will stand, by their hashes as
    /// [`find_many`](Self::find_many) gave them. Gives instead the number of the first that is listed before, too.
    /// **O(m)**.
    pub(crate) fn plan_new<Q: Text>(
        &mut self,
        names: &[Q],
        hashes: &[u32],
    ) -> Result<std::result::Result<New, Repeated>> {
        let mut listed = Listed::with_capacity(names.len())?;
        for (name, hash) in names.iter().zip(hashes) {
            name.with_utf8(|text| listed.push(*hash, text, None, names.len()))?;
        }
        self.reserve_words(names.len())?;
        self.reserve_bytes(listed.records.len())?;
        match self.words.slots_of_new(hashes, |one, other| listed.are_same(one, other))? {
            Some(slots) => Ok(Ok(New { listed, slots })),
            None => listed.first_repeated().map(Err),
        }
    }

    /// Adds names at the end, whose slots were found, with a place for each. Nothing but reservations may have happened
    /// since. **O(m)**.
    pub(crate) fn append_new(&mut self, new: New, places: impl Iterator<Item = Place>) {
        let New { listed: Listed { mut records, words }, slots } = new;
        for (word, place) in words.iter().zip(places) {
            record::set_bits(&mut records, id_of(*word) as usize * UNIT, place.bits());
        }
        let first_id = self.id(self.positions());
        self.words.fill_slots(&slots, |number| first_id.wrapping_add(id_of(words[number as usize])));
        self.records.extend_from_slice(&records);
        self.len += words.len();
        self.generation += words.len() as u64;
    }

    /// Puts the names of another table in place of none.
    pub(crate) fn become_filled(&mut self, filled: Self) {
        debug_assert!(self.is_empty(), "names would be lost");
        let generation = self.generation + 1;
        *self = filled;
        self.generation += generation;
    }

    /// Makes sure that to insert this name needs no memory. **O(1)**, amortised.
    pub(crate) fn reserve_one(&mut self, name: &(impl Text + ?Sized)) -> Result<()> {
        let units = name.with_utf8(|text| record::units_for(text.len()))?;
        self.reserve_words(1)?;
        self.reserve_bytes(units * UNIT)
    }

    /// Adds a name at the end; `false`, and nothing has changed, if it is there. **O(1)**, amortised.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`], [`Error::Text`]; nothing has changed.
    pub fn insert_new(&mut self, name: &(impl Text + ?Sized), place: Place) -> Result<bool> {
        self.reserve_one(name)?;
        Ok(name.with_utf8(|text| {
            let hash = stored_hash(text);
            let Err(empty) = self.search(hash, text) else { return false };
            let id = self.id(self.positions());
            record::push(&mut self.records, Some(place), text);
            self.words.fill(empty, hash, id);
            self.len += 1;
            self.generation += 1;
            true
        }))
    }

    /// Gives the name at a position another place. **O(1)**.
    pub(crate) fn set_place_at(&mut self, position: usize, place: Place) {
        let at = self.byte(position);
        record::set_bits(&mut self.records, at, place.bits());
    }

    /// Gives all names other places, in order. **O(n)**.
    pub(crate) fn set_places(&mut self, mut places: impl Iterator<Item = Place>) {
        let mut position = 0;
        while let Some(entry) = self.next(position) {
            let (here, next, place) = (entry.position, entry.next, places.next().unwrap_or(entry.place));
            self.set_place_at(here, place);
            position = next;
        }
    }

    /// Removes the names at distinct positions; the order of the others stays. **O(m)**, amortised.
    pub(crate) fn remove_at(&mut self, positions: &[usize]) {
        let mut hashes = [0; TOGETHER];
        for batch in positions.chunks(TOGETHER) {
            for (position, hash) in batch.iter().zip(&mut hashes) {
                *hash = stored_hash(self.text(*position));
            }
            if batch.len() > 1 {
                self.words.touch(hashes[..batch.len()].iter().copied());
            }
            for (position, hash) in batch.iter().zip(&hashes) {
                self.take(*position, *hash);
            }
        }
        self.tidy();
    }

    /// Removes all names and gives the memory back. **O(1)**, but for that.
    pub fn clear(&mut self) {
        *self = Self { generation: self.generation + 1, ..Self::default() };
    }

    /// Makes sure that [`rename_at`](Self::rename_at) needs no memory for this name.
    pub(crate) fn reserve_renamed(&mut self, name: &(impl Text + ?Sized)) -> Result<Vec<u8>> {
        self.elsewhere.try_reserve(1).map_err(|_| Error::Memory)?;
        name.with_utf8(|text| {
            record::units_for(text.len())?;
            let mut kept = memory::with_capacity(text.len())?;
            kept.extend_from_slice(text);
            Ok(kept)
        })
    }

    /// Gives the name at a position another text, which no other name has; its place in the order stays. **O(1)**.
    pub(crate) fn rename_at(&mut self, position: usize, text: Vec<u8>) {
        let slot = self.slot_at(position);
        let id = self.words.id(slot);
        self.words.erase(slot);
        let (at, hash) = (self.byte(position), stored_hash(&text));
        let empty = self.words.search(hash, |_| false).unwrap_or_else(|slot| slot);
        self.words.fill(empty, hash, id);
        self.generation += 1;
        let units = record::units(&self.records, at);
        if record::units_for(text.len()) == Ok(units) {
            let place = record::place(&self.records, at);
            record::fill_at(&mut self.records, at, place, &text);
            self.elsewhere.remove(&id);
        } else {
            record::set_elsewhere(&mut self.records, at);
            self.elsewhere.insert(id, text);
        }
        self.tidy();
    }

    /// Makes sure that [`move_at`](Self::move_at) needs no memory.
    pub(crate) fn reserve_moved(&mut self, position: usize, last: bool) -> Result<()> {
        let bytes = record::size(self.text(position));
        if last {
            return self.reserve_bytes(bytes);
        }
        if position == 0 || self.begin >= bytes {
            return Ok(());
        }
        if self.positions() + bytes / UNIT > MOST_UNITS {
            return Err(Error::Text { bytes: bytes as u64 });
        }
        // As much room in front as there are records, so that the next ones need not move.
        let kept = self.records.len() - self.begin;
        let front = kept + bytes.next_multiple_of(SMALL);
        // Others may have reserved what is behind them.
        let mut records = memory::with_capacity(front + self.records.capacity() - self.begin)?;
        records.resize(front, 0);
        records.extend_from_slice(&self.records[self.begin..]);
        (self.records, self.begin) = (records, front);
        Ok(())
    }

    /// Moves the name at a position behind or in front of all others; there must be room. **O(1)**.
    pub(crate) fn move_at(&mut self, position: usize, last: bool) {
        self.move_hashed(position, stored_hash(self.text(position)), last);
    }

    /// The same, for a name with this hash.
    fn move_hashed(&mut self, position: usize, hash: u32, last: bool) {
        let there = if last { self.last() } else { self.first() };
        if there.is_some_and(|there| there.position == position) {
            return;
        }
        let (slot, old) = (self.words.slot_of(hash, self.id(position)), self.byte(position));
        let elsewhere = if self.elsewhere.is_empty() { None } else { self.elsewhere.remove(&self.id(position)) };
        let place = record::place(&self.records, old);
        let size = match &elsewhere {
            Some(text) => record::size(text),
            None => record::units(&self.records, old) * UNIT,
        };
        let id = if last { self.id(self.positions()) } else { self.base.wrapping_sub((size / UNIT) as u32) };
        match (elsewhere, last) {
            (None, true) => self.records.extend_from_within(old..old + size),
            (Some(text), true) => record::push(&mut self.records, place, &text),
            (None, false) => self.records.copy_within(old..old + size, self.begin - size),
            (Some(text), false) => {
                let at = self.begin - size;
                record::fill_at(&mut self.records, at, place, &text);
            }
        }
        if !last {
            (self.begin, self.base) = (self.begin - size, id);
        }
        self.words.fill(slot, hash, id);
        self.leave(old);
        self.generation += 1;
        self.tidy();
    }

    /// Another table with the same names and places. Nothing is hashed. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn copy(&self) -> Result<Self> {
        let mut records = Vec::new();
        memory::append_exact(&mut records, &self.records[self.begin..])?;
        let mut elsewhere = HashMap::new();
        elsewhere.try_reserve(self.elsewhere.len()).map_err(|_| Error::Memory)?;
        for (id, text) in &self.elsewhere {
            let mut copied = Vec::new();
            memory::append_exact(&mut copied, text)?;
            elsewhere.insert(*id, copied);
        }
        let words = self.words.copy()?;
        Ok(Self { words, records, begin: 0, elsewhere, generation: 0, ..*self })
    }

    /// Checks that the table is as its description says. For tests: **O(n)**.
    ///
    /// # Panics
    ///
    /// If it is not.
    pub fn check(&self) {
        let (mut len, mut gone, mut position) = (0, 0, 0);
        while position < self.positions() {
            let at = self.byte(position);
            let units = record::units(&self.records, at);
            assert_eq!(units, record::units_before(&self.records, at + units * UNIT), "both ways lead back");
            let is_there = record::place(&self.records, at).is_some();
            let is_end = position == 0 || position + units == self.positions();
            assert!(is_there || !is_end, "a record of no name at an end");
            if is_there {
                len += 1;
            } else {
                gone += units * UNIT;
            }
            position += units;
        }
        assert_eq!((position, len, gone), (self.positions(), self.len, self.gone), "the numbers are right");
        assert!(self.gone < SMALL || 2 * self.gone <= self.records.len() - self.begin, "too much is gone");
        let mut words = 0;
        self.words.check(|hash, id| {
            let position = self.position(id);
            assert!(self.place_at(position).is_some(), "a word points at no name");
            assert_eq!(stored_hash(self.text(position)), hash, "a word has another hash than its name");
            words += 1;
        });
        assert_eq!(words, self.len, "one word a name");
        for id in self.elsewhere.keys() {
            let at = self.byte(self.position(*id));
            assert!(record::text(&self.records, at).is_none() && record::place(&self.records, at).is_some());
        }
    }

    #[inline]
    fn position(&self, id: u32) -> usize {
        id.wrapping_sub(self.base) as usize
    }

    #[inline]
    fn id(&self, position: usize) -> u32 {
        self.base.wrapping_add(position as u32)
    }

    #[inline]
    fn byte(&self, position: usize) -> usize {
        self.begin + position * UNIT
    }

    /// The text of the record at a position.
    #[inline]
    fn text(&self, position: usize) -> &[u8] {
        record::text(&self.records, self.byte(position)).unwrap_or_else(|| self.text_elsewhere(position))
    }

    #[cold]
    fn text_elsewhere(&self, position: usize) -> &[u8] {
        self.elsewhere.get(&self.id(position)).map_or(&[], Vec::as_slice)
    }

    /// The slot of a name, or the empty one that the search ended at. There must be words.
    fn search(&self, hash: u32, text: &[u8]) -> std::result::Result<usize, usize> {
        self.words.search(hash, |id| record::are_same(self.text(self.position(id)), text))
    }

    /// The position of a name.
    fn find(&self, hash: u32, text: &[u8]) -> Option<usize> {
        if self.is_empty() {
            return None;
        }
        Some(self.position(self.words.id(self.search(hash, text).ok()?)))
    }

    fn slot_at(&self, position: usize) -> usize {
        self.words.slot_of(stored_hash(self.text(position)), self.id(position))
    }

    fn reserve_words(&mut self, names: usize) -> Result<()> {
        let wanted = self.len.saturating_add(names);
        if wanted > MAX_ENTRIES {
            return Err(Error::Full { wanted, limit: MAX_ENTRIES });
        }
        self.words.reserve(wanted)
    }

    /// Makes room for so many bytes more at the end.
    fn reserve_bytes(&mut self, bytes: usize) -> Result<()> {
        if self.positions() + bytes / UNIT > MOST_UNITS {
            return Err(Error::Text { bytes: bytes as u64 });
        }
        if self.records.capacity() - self.records.len() < bytes {
            self.records.try_reserve(bytes).map_err(|_| Error::Memory)?;
        }
        Ok(())
    }

    /// Takes the name with this hash at a position out.
    fn take(&mut self, position: usize, hash: u32) {
        let id = self.id(position);
        let slot = self.words.slot_of(hash, id);
        self.words.erase(slot);
        if !self.elsewhere.is_empty() {
            self.elsewhere.remove(&id);
        }
        self.leave(self.byte(position));
        self.len -= 1;
        self.generation += 1;
    }

    /// Notes that a record is that of no name.
    fn leave(&mut self, at: usize) {
        record::set_bits(&mut self.records, at, 0);
        self.gone += record::units(&self.records, at) * UNIT;
    }

    /// Drops what is left behind at both ends, and all of it where it is too much.
    fn tidy(&mut self) {
        while self.positions() > 0 && record::place(&self.records, self.begin).is_none() {
            let units = record::units(&self.records, self.begin);
            self.begin += units * UNIT;
            self.base = self.base.wrapping_add(units as u32);
            self.gone -= units * UNIT;
        }
        while self.positions() > 0 {
            let at = self.records.len() - record::units_before(&self.records, self.records.len()) * UNIT;
            if record::place(&self.records, at).is_some() {
                break;
            }
            self.gone -= self.records.len() - at;
            self.records.truncate(at);
        }
        let kept = self.records.len() - self.begin;
        let shrinks = self.words.shrink(self.len);
        let apart = self.elsewhere.len() * APART;
        if (self.gone >= SMALL && 2 * self.gone > kept) || (apart >= SMALL && 2 * apart > kept) || shrinks {
            self.compact();
        } else if self.begin > 2 * kept + 2 * SMALL {
            self.records.drain(..self.begin);
            self.begin = 0;
        }
    }

    /// Moves the records of names together, into memory of just their size. Where there is none, they stay.
    fn compact(&mut self) {
        let longer: usize = self.elsewhere.values().map(|text| record::size(text)).sum();
        let Ok(mut records) = memory::with_capacity(self.records.len() - self.begin - self.gone + longer) else {
            return;
        };
        let mut at = self.begin;
        while at < self.records.len() {
            let units = record::units(&self.records, at);
            if let Some(place) = record::place(&self.records, at) {
                let unit = records.len() / UNIT;
                match record::text(&self.records, at) {
                    Some(_) => records.extend_from_slice(&self.records[at..at + units * UNIT]),
                    None => record::push(&mut records, Some(place), self.text((at - self.begin) / UNIT)),
                }
                // The words find it there.
                record::set_bits(&mut self.records, at, unit as u64);
            }
            at += units * UNIT;
        }
        let (base, begin, old) = (self.base, self.begin, &self.records);
        self.words.renumber(|id| {
            let at = begin + id.wrapping_sub(base) as usize * UNIT;
            base.wrapping_add(record::bits(old, at) as u32)
        });
        (self.records, self.begin, self.gone) = (records, 0, 0);
        self.elsewhere = HashMap::new();
        self.generation += 1;
    }
}

/// The steps of a walk that are left.
struct Walk<F> {
    step: F,
    left: usize,
}

impl<T, F: FnMut() -> Option<T>> Iterator for Walk<F> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let item = (self.step)()?;
        self.left -= 1;
        Some(item)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<T, F: FnMut() -> Option<T>> ExactSizeIterator for Walk<F> {}
