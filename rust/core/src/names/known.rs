//! Names whose owner and row are known, and what a batch of names asks the owners for.
//!
//! ```text
//!   names        a  b  a  c  d        owner 0 has a and d, owner 1 has b; nobody has said who has c
//!   distinct     0  1     2  3        one hash each; the same hash finds the record
//!   message      [ a d | ]  [ b | c ] rows of known names, then the lengths and the texts of others, by owner
//!   place        0  2  0  3  1        which of the rows that come each name has
//! ```
//!
//! * There are two tables. New names go to the young one. When that has half of the names that may be held, it becomes
//!   the old one, and the old one is forgotten. A name that is found in the old one becomes young again.
//! * The place of a name has a *tag* instead of a table. A tag is that of an owner, until all names of the owner are
//!   forgotten. That is one write; the names go when their table does, or are given another tag.
//! * The hash that finds a name has a seed that each process draws, as everywhere in memory. Only a name that is not
//!   known is hashed again, without a seed, because all processes agree on its owner.

use crate::error::{Error, Result};
use crate::hash_table::MAX_ENTRIES;
use crate::hash_table::Words;
use crate::memory;
use crate::names::codec;
use crate::names::table::{NameTable, stored_hash};
use crate::names::text::Text;
use crate::rows::{MAX_TABLES, Place};

/// How many buckets names are spread over: see [`Owners`].
pub const BUCKETS: u64 = 4096;

/// What an owner replies for a name that it has no row of.
pub const NO_ROW: u32 = u32::MAX;

/// How many names are hashed together: see [`NameTable`].
const TOGETHER: usize = 64;

/// The numbers of names and rows, and lengths of texts, take so many bytes in a message.
const NUMBER: usize = 4;

/// A tag of names that are forgotten.
const NOBODY: u32 = u32::MAX;

/// No number.
const NONE: u32 = u32::MAX;

/// Which ranks own names: `first + bucket * shards / BUCKETS`, where the bucket is the hash modulo [`BUCKETS`].
#[derive(Debug, Clone, Copy)]
pub struct Owners {
    first: usize,
    shards: usize,
    ranks: usize,
}

impl Owners {
    /// `None` if these are no ranks, or more than there are buckets.
    #[must_use]
    pub fn new(first: usize, shards: usize, ranks: usize) -> Option<Self> {
        let fits = shards > 0 && shards as u64 <= BUCKETS && first.checked_add(shards)? <= ranks;
        fits.then_some(Self { first, shards, ranks })
    }

    /// The rank that owns a name.
    #[must_use]
    #[inline]
    pub fn of(&self, text: &[u8]) -> usize {
        let bucket = codec::hash(text) % BUCKETS;
        self.first + (bucket * self.shards as u64 / BUCKETS) as usize
    }
}

/// A bounded cache from names to owners and rows; see the [module's description](self).
pub struct KnownRows {
    young: NameTable,
    old: NameTable,
    half: usize,
    /// The owner of each tag.
    tags: Vec<u32>,
    /// The tag of each owner.
    current: Vec<u32>,
}

/// What a rank asks another for, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Known names.
    pub known: usize,
    /// Others.
    pub new: usize,
    /// The bytes of these.
    pub text: usize,
}

impl Counts {
    /// The bytes of the message.
    #[must_use]
    pub fn bytes(&self) -> usize {
        NUMBER * (self.known + self.new) + self.text
    }
}

/// What a batch of names asks for.
#[derive(Debug, Default)]
pub struct Request {
    /// What is asked of each rank.
    pub counts: Vec<Counts>,
    /// For each rank in turn: the rows of known names, the lengths of others, and their texts.
    pub message: Vec<u8>,
    /// The distinct name of each name.
    which: Vec<u32>,
    /// The number of each distinct name in the order of ranks, among the known ones or among the others.
    numbers: Vec<u32>,
    /// The rank of each distinct name.
    ranks: Vec<u32>,
    /// Whether each distinct name is new; none if no name is.
    is_new: Vec<bool>,
    /// The texts of new names, in the order of ranks; where each ends; and the hash of each.
    texts: Vec<u8>,
    ends: Vec<usize>,
    hashes: Vec<u32>,
}

/// Which row that comes each name has.
#[derive(Debug, PartialEq, Eq)]
pub struct Placed {
    /// The number of the row; -1 if there is none.
    pub places: Vec<i64>,
    /// How many rows come from each rank.
    pub take: Vec<usize>,
    /// Whether each row is that of the name with its number.
    pub is_identity: bool,
    /// Whether a name has no row.
    pub has_absent: bool,
}

impl KnownRows {
    /// A cache of so many names at most.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        let (young, old) = (NameTable::default(), NameTable::default());
        Self { young, old, half: (limit / 2).max(1), tags: Vec::new(), current: Vec::new() }
    }

    /// How many names are held, those in both tables twice, and those that were forgotten and are there still. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether none is held. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes that are allocated.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        let tags = (self.tags.capacity() + self.current.capacity()) * size_of::<u32>();
        self.young.allocated_bytes() + self.old.allocated_bytes() + tags
    }

    /// Forgets all names of an owner. **O(1)**.
    pub fn forget(&mut self, owner: usize) {
        if let Some(tag) = self.current.get_mut(owner)
            && let Some(of_tag) = self.tags.get_mut(*tag as usize)
        {
            *of_tag = NOBODY;
            *tag = NONE;
        }
    }

    /// What a batch of names asks for; `None` if a name is empty. **O(m)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`].
    pub fn plan<Q: Text>(&mut self, names: &[Q], owners: Owners) -> Result<Option<Request>> {
        let Some(distinct) = Distinct::of(names)? else { return Ok(None) };
        let found = self.find(names, &distinct)?;
        Request::of(names, distinct, &found, owners).map(Some)
    }

    /// The owner and row of each distinct name.
    fn find<Q: Text>(&mut self, names: &[Q], distinct: &Distinct) -> Result<Vec<Option<(u32, u32)>>> {
        let asked: Vec<&Q> = memory::collect(distinct.first.iter().map(|at| &names[*at as usize]))?;
        let mut found = memory::filled(None, asked.len())?;
        let tags = &self.tags;
        let of_place = |place: Place| {
            let owner = *tags.get(place.table())?;
            (owner != NOBODY).then_some((owner, place.row() as u32))
        };
        let mut lacking = Vec::new();
        let has_old = !self.old.is_empty();
        let mut failure = Ok(());
        self.young.find_hashed(
            &asked,
            |at, _| distinct.hashes[at],
            |at, _, place| {
                found[at] = place.and_then(|(_, place)| of_place(place));
                if has_old && found[at].is_none() && failure.is_ok() {
                    failure = memory::push(&mut lacking, at);
                }
            },
        );
        failure?;
        if lacking.is_empty() {
            return Ok(found);
        }
        let of_lacking: Vec<&Q> = memory::collect(lacking.iter().map(|at| asked[*at]))?;
        let mut again = Added::with_capacity(lacking.len())?;
        self.old.find_hashed(
            &of_lacking,
            |at, _| distinct.hashes[lacking[at]],
            |at, hash, place| {
                if let Some((_, place)) = place
                    && let Some(one) = of_place(place)
                {
                    found[lacking[at]] = Some(one);
                    again.push(of_lacking[at], hash, place);
                }
            },
        );
        self.make_young(again)?;
        Ok(found)
    }

    /// Remembers the rows of a request's new names, in their order; [`NO_ROW`] for a name without. **O(m)**.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if there are not as many rows as new names; [`Error::Memory`], [`Error::Full`].
    pub fn add(&mut self, request: &Request, rows: &[u32]) -> Result<()> {
        let expected = request.ends.len();
        if rows.len() != expected {
            return Err(Error::Length { expected, got: rows.len() });
        }
        let ranks = request.counts.len();
        if self.tags.len() + ranks > MAX_TABLES {
            *self = Self::new(2 * self.half);
        }
        if self.current.len() < ranks {
            memory::resize(&mut self.current, ranks, NONE)?;
        }
        let mut added = Added::with_capacity(expected)?;
        let mut number = 0;
        for (owner, counts) in request.counts.iter().enumerate() {
            for _ in 0..counts.new {
                let row = rows[number];
                if row != NO_ROW {
                    let tag = self.tag_of(owner)?;
                    if let Some(place) = Place::new(tag, u64::from(row)) {
                        added.push(request.new_name(number), request.hashes[number], place);
                    }
                }
                number += 1;
            }
        }
        self.make_young(added)
    }

    fn tag_of(&mut self, owner: usize) -> Result<usize> {
        if self.current[owner] == NONE {
            memory::push(&mut self.tags, owner as u32)?;
            self.current[owner] = (self.tags.len() - 1) as u32;
        }
        Ok(self.current[owner] as usize)
    }

    /// Puts distinct names into the young table.
    fn make_young<Q: Text>(&mut self, added: Added<Q>) -> Result<()> {
        let Added { mut names, mut hashes, mut places } = added;
        if self.young.len() + names.len() > self.half {
            self.old = std::mem::take(&mut self.young);
            if names.len() > self.half {
                return Ok(()); // more than may be held
            }
        }
        // Those that were forgotten are there still.
        let mut there = Vec::new();
        let mut failure = Ok(());
        self.young.find_hashed(
            &names,
            |at, _| hashes[at],
            |at, _, found| {
                if let Some((position, _)) = found
                    && failure.is_ok()
                {
                    failure = memory::push(&mut there, (at, position));
                }
            },
        );
        failure?;
        for (at, position) in &there {
            self.young.set_place_at(*position, places[*at]);
        }
        for (at, _) in there.iter().rev() {
            names.swap_remove(*at);
            hashes.swap_remove(*at);
            places.swap_remove(*at);
        }
        if let Ok(new) = self.young.plan_new(&names, &hashes)? {
            self.young.append_new(new, places.into_iter());
        }
        Ok(())
    }

    /// Checks that the cache is as its description says. For tests: **O(n)**.
    ///
    /// # Panics
    ///
    /// If it is not.
    pub fn check(&self) {
        self.young.check();
        self.old.check();
        assert!(self.young.len() <= self.half && self.old.len() <= self.half, "more names than may be held");
        for (owner, tag) in self.current.iter().enumerate().filter(|(_, tag)| **tag != NONE) {
            assert_eq!(self.tags[*tag as usize] as usize, owner, "a tag of another owner");
        }
    }
}

/// Names to be remembered, with their hashes and places.
struct Added<Q> {
    names: Vec<Q>,
    hashes: Vec<u32>,
    places: Vec<Place>,
}

impl<Q> Added<Q> {
    fn with_capacity(count: usize) -> Result<Self> {
        let (names, hashes) = (memory::with_capacity(count)?, memory::with_capacity(count)?);
        Ok(Self { names, hashes, places: memory::with_capacity(count)? })
    }

    /// There must be room.
    fn push(&mut self, name: Q, hash: u32, place: Place) {
        self.names.push(name);
        self.hashes.push(hash);
        self.places.push(place);
    }
}

/// Which names of a batch are the same.
struct Distinct {
    /// The distinct name of each name.
    which: Vec<u32>,
    /// Where each distinct name comes first, and its hash.
    first: Vec<u32>,
    hashes: Vec<u32>,
}

impl Distinct {
    /// `None` if a name is empty.
    fn of<Q: Text>(names: &[Q]) -> Result<Option<Self>> {
        if names.len() > MAX_ENTRIES {
            return Err(Error::Full { wanted: names.len(), limit: MAX_ENTRIES });
        }
        let mut words = Words::default();
        words.reserve(names.len())?;
        let mut which = memory::with_capacity(names.len())?;
        let (mut first, mut hashes) = (memory::with_capacity(names.len())?, memory::with_capacity(names.len())?);
        let mut of_batch = [0; TOGETHER];
        let mut is_empty = false;
        names.iter().take(TOGETHER).for_each(Q::prefetch);
        for (number, batch) in names.chunks(TOGETHER).enumerate() {
            let begin = number * TOGETHER;
            names[begin..].iter().skip(TOGETHER).take(TOGETHER).for_each(Q::prefetch);
            for (name, hash) in batch.iter().zip(&mut of_batch) {
                *hash = name.with_utf8(|text| {
                    is_empty |= text.is_empty();
                    stored_hash(text)
                });
            }
            for (at, (name, hash)) in batch.iter().zip(of_batch).enumerate() {
                let is_it = |distinct: u32| names[first[distinct as usize] as usize].is_same(name);
                let found = match words.search(hash, is_it) {
                    Ok(slot) => words.id(slot),
                    Err(empty) => {
                        let distinct = first.len() as u32;
                        words.fill(empty, hash, distinct);
                        first.push((begin + at) as u32);
                        hashes.push(hash);
                        distinct
                    }
                };
                which.push(found);
            }
        }
        Ok((!is_empty).then_some(Self { which, first, hashes }))
    }
}

/// Where the parts of a message that are for one rank begin.
#[derive(Debug, Clone, Copy)]
struct Parts {
    rows: usize,
    lengths: usize,
    texts: usize,
}

/// Where the part for each rank begins.
fn parts_of(counts: &[Counts]) -> Result<Vec<Parts>> {
    let mut begin = 0;
    memory::collect(counts.iter().map(|one| {
        let lengths = begin + NUMBER * one.known;
        let parts = Parts { rows: begin, lengths, texts: lengths + NUMBER * one.new };
        begin += one.bytes();
        parts
    }))
}

/// How many there are before each rank.
fn before(counts: &[Counts], of: impl Fn(&Counts) -> usize) -> Result<Vec<usize>> {
    let mut sum = 0;
    memory::collect(counts.iter().map(|one| {
        sum += of(one);
        sum - of(one)
    }))
}

fn write_number(bytes: &mut [u8], at: &mut usize, number: u32) {
    bytes[*at..*at + NUMBER].copy_from_slice(&number.to_le_bytes());
    *at += NUMBER;
}

impl Request {
    fn of<Q: Text>(names: &[Q], distinct: Distinct, found: &[Option<(u32, u32)>], owners: Owners) -> Result<Self> {
        let Distinct { which, first, hashes } = distinct;
        let mut counts = memory::filled(Counts::default(), owners.ranks)?;
        let mut ranks = memory::with_capacity(found.len())?;
        let mut all_text = 0;
        for (one, at) in found.iter().zip(&first) {
            let rank = match one {
                Some((owner, _)) => {
                    counts[*owner as usize].known += 1;
                    *owner
                }
                None => names[*at as usize].with_utf8(|text| {
                    let owner = owners.of(text);
                    counts[owner].new += 1;
                    counts[owner].text += text.len();
                    all_text += text.len();
                    owner as u32
                }),
            };
            ranks.push(rank);
        }
        let new_count: usize = counts.iter().map(|one| one.new).sum();
        let mut parts = parts_of(&counts)?;
        let (mut known_before, mut new_before) = (before(&counts, |one| one.known)?, before(&counts, |one| one.new)?);
        let mut text_before = before(&counts, |one| one.text)?;
        let mut message = memory::filled(0, counts.iter().map(Counts::bytes).sum())?;
        let mut numbers = memory::with_capacity(found.len())?;
        let mut is_new = memory::with_capacity(if new_count > 0 { found.len() } else { 0 })?;
        let mut texts = memory::filled(0, all_text)?;
        let (mut ends, mut new_hashes) = (memory::filled(0, new_count)?, memory::filled(0, new_count)?);
        for (at, (one, rank)) in found.iter().zip(&ranks).enumerate() {
            let rank = *rank as usize;
            let part = &mut parts[rank];
            let next = if one.is_some() { &mut known_before[rank] } else { &mut new_before[rank] };
            let number = *next;
            *next += 1;
            numbers.push(number as u32);
            if new_count > 0 {
                is_new.push(one.is_none());
            }
            if let Some((_, row)) = one {
                write_number(&mut message, &mut part.rows, *row);
                continue;
            }
            names[first[at] as usize].with_utf8(|text| {
                write_number(&mut message, &mut part.lengths, text.len() as u32);
                message[part.texts..part.texts + text.len()].copy_from_slice(text);
                part.texts += text.len();
                let begin = text_before[rank];
                text_before[rank] += text.len();
                texts[begin..begin + text.len()].copy_from_slice(text);
                ends[number] = begin + text.len();
            });
            new_hashes[number] = hashes[at];
        }
        Ok(Self { counts, message, which, numbers, ranks, is_new, texts, ends, hashes: new_hashes })
    }

    /// How many names there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.which.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.which.is_empty()
    }

    /// How many of them are new: distinct, in the order of ranks.
    #[must_use]
    pub fn new_names(&self) -> usize {
        self.ends.len()
    }

    /// A new name.
    #[must_use]
    pub fn new_name(&self, number: usize) -> &[u8] {
        let begin = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.texts[begin..self.ends[number]]
    }

    /// All new names.
    pub fn new_texts(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.new_names()).map(|number| self.new_name(number))
    }

    /// Which row that comes each name has, by the rows of the new names: [`NO_ROW`] for one without. **O(m)**.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if there are not as many rows as new names; [`Error::Memory`].
    pub fn place(&self, rows: &[u32]) -> Result<Placed> {
        let expected = self.ends.len();
        if rows.len() != expected {
            return Err(Error::Length { expected, got: rows.len() });
        }
        let mut coming = memory::filled(0, self.counts.len())?;
        // What stands for each new name: how many before it have a row.
        let mut found_before = memory::with_capacity(expected)?;
        let (mut number, mut all_found) = (0, 0);
        for (of_rank, counts) in coming.iter_mut().zip(&self.counts) {
            for row in &rows[number..number + counts.new] {
                found_before.push(all_found);
                if *row != NO_ROW {
                    *of_rank += 1;
                    all_found += 1;
                }
            }
            number += counts.new;
        }
        let take: Vec<usize> = memory::collect(self.counts.iter().zip(&coming).map(|(one, new)| one.known + new))?;
        // Before the rows of a rank stand the new ones of ranks before it; before its new ones all known ones up to it.
        let (mut new_before, mut known_up_to) =
            (memory::with_capacity(take.len())?, memory::with_capacity(take.len())?);
        let (mut new_sum, mut known_sum) = (0, 0);
        for (new, counts) in coming.iter().zip(&self.counts) {
            new_before.push(new_sum);
            new_sum += new;
            known_sum += counts.known;
            known_up_to.push(known_sum);
        }
        let mut of_distinct = memory::with_capacity(self.numbers.len())?;
        for (at, (number, rank)) in self.numbers.iter().zip(&self.ranks).enumerate() {
            let (number, rank) = (*number as usize, *rank as usize);
            let place = if !self.is_new.get(at).is_some_and(|is_new| *is_new) {
                Some(number + new_before[rank])
            } else if rows[number] == NO_ROW {
                None
            } else {
                Some(known_up_to[rank] + found_before[number])
            };
            of_distinct.push(place.map_or(-1, |place| (place as u64).cast_signed()));
        }
        let has_absent = all_found < expected;
        let places: Vec<i64> = memory::collect(self.which.iter().map(|distinct| of_distinct[*distinct as usize]))?;
        let rows_that_come: usize = take.iter().sum();
        let is_identity = rows_that_come == places.len() && places.iter().zip(0..).all(|(place, at)| *place == at);
        Ok(Placed { places, take, is_identity, has_absent })
    }
}

/// What all ranks ask of this one.
#[derive(Debug)]
pub struct Asked<'a> {
    message: &'a [u8],
    counts: &'a [Counts],
    parts: Vec<Parts>,
}

/// What this rank answers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The row of each new name, for all ranks in turn; [`NO_ROW`] for a name without.
    pub reply: Vec<u32>,
    /// The rows that go to the ranks, those of the first rank first.
    pub rows: Vec<i64>,
    /// How many rows go to each.
    pub give: Vec<usize>,
}

impl<'a> Asked<'a> {
    /// The messages of all ranks, one behind the other.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if they have other lengths than their counts say; [`Error::Memory`].
    pub fn of(message: &'a [u8], counts: &'a [Counts]) -> Result<Self> {
        let expected = counts.iter().map(Counts::bytes).sum();
        if message.len() != expected {
            return Err(Error::Length { expected, got: message.len() });
        }
        Ok(Self { message, counts, parts: parts_of(counts)? })
    }

    fn numbers(&self, at: usize, count: usize) -> impl Iterator<Item = u32> {
        self.message[at..at + NUMBER * count]
            .chunks_exact(NUMBER)
            .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
    }

    /// The new names, those of the first rank first.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if texts have other lengths in all than their counts say; what `each` raises.
    pub fn names<E: From<Error>>(
        &self,
        mut each: impl FnMut(&'a [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        for (counts, parts) in self.counts.iter().zip(&self.parts) {
            let (mut at, end) = (parts.texts, parts.texts + counts.text);
            for length in self.numbers(parts.lengths, counts.new) {
                let next = at + length as usize;
                if next > end {
                    return Err(Error::Length { expected: end - at, got: length as usize }.into());
                }
                each(&self.message[at..next])?;
                at = next;
            }
        }
        Ok(())
    }

    /// The answer, by the row of each new name; -1 for one without. **O(m)**.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if there are not as many rows as new names; [`Error::Memory`].
    pub fn answer(&self, rows: &[i64]) -> Result<Answer> {
        let expected = self.counts.iter().map(|one| one.new).sum();
        if rows.len() != expected {
            return Err(Error::Length { expected, got: rows.len() });
        }
        let known: usize = self.counts.iter().map(|one| one.known).sum();
        let mut answer = Answer {
            reply: memory::collect(rows.iter().map(|row| u32::try_from(*row).unwrap_or(NO_ROW)))?,
            rows: memory::with_capacity(known + expected)?,
            give: memory::with_capacity(self.counts.len())?,
        };
        let mut number = 0;
        for (counts, parts) in self.counts.iter().zip(&self.parts) {
            let begin = answer.rows.len();
            answer.rows.extend(self.numbers(parts.rows, counts.known).map(i64::from));
            answer.rows.extend(rows[number..number + counts.new].iter().filter(|row| **row >= 0));
            answer.give.push(answer.rows.len() - begin);
            number += counts.new;
        }
        Ok(answer)
    }
}
