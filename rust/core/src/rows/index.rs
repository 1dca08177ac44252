//! The names of rows: an ordered map from names to places, and the rows of all tables that they lie in.
//!
//! ```text
//!   names    "a"     "b"     "c"     "d"          in order; each has one place
//!            (0,0)   (1,0)   (0,2)   (0,1)        (table, row)
//!   tables   0: used 4, row 3 is free             which rows belong to names, and which come next
//!            1: used 1
//! ```
//!
//! Invariant: each row that a table has given and that is not free belongs to exactly one name; a free row to none.
//! Larger changes are planned first: a [`Plan`](super::Plan) has found all names, refused what cannot be, and reserved
//! all memory. To commit it cannot fail.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::index_map::{IndexMap, MAX_ENTRIES};
use crate::key::{Hashed, Matches};
use crate::memory;
use crate::rows::allocator::Rows;
use crate::rows::places::{MAX_TABLES, Place, Places};
use crate::rows::plan::Refusal;

/// Names in order, and the table and row of each. Costs are amortised, with `n` the number of names.
pub struct RowIndex<K> {
    pub(super) names: IndexMap<K, Place>,
    pub(super) tables: Vec<Rows>,
    /// Drawn anew with each change of what this struct describes.
    pub(super) version: u64,
    pub(super) moves: u64,
    pub(super) inserts: u64,
}

/// A number that was never drawn before in this process, by no other index either.
pub(super) fn draw() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<K> Default for RowIndex<K> {
    fn default() -> Self {
        Self::of_parts(IndexMap::new(), Vec::new())
    }
}

impl<K> RowIndex<K> {
    fn of_parts(names: IndexMap<K, Place>, tables: Vec<Rows>) -> Self {
        Self { names, tables, version: draw(), moves: draw(), inserts: draw() }
    }

    /// The same index, which counts on from these numbers: those of one with the same names and places.
    #[must_use]
    pub fn counted_from(mut self, moves: u64, inserts: u64) -> Self {
        (self.moves, self.inserts) = (moves, inserts);
        self
    }

    /// A number for [`counted_from`](Self::counted_from) that no index has had.
    #[must_use]
    pub fn new_count() -> u64 {
        draw()
    }

    /// An index of no names and no tables.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The names and their places. **O(1)**.
    #[must_use]
    pub fn names(&self) -> &IndexMap<K, Place> {
        &self.names
    }

    /// A number that changes whenever the row of a name that was there changes, or a row comes back; the name may be
    /// gone. No two indices have the same. **O(1)**.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// A number that changes whenever names are added, their order changes, or entries are set. **O(1)**.
    #[must_use]
    pub fn inserts(&self) -> u64 {
        self.inserts
    }

    /// Notes that the values of entries were set, whose rows stay. **O(1)**.
    pub fn note_set(&mut self) {
        self.inserts = draw();
    }

    /// The rows of each table. **O(1)**.
    #[must_use]
    pub fn tables(&self) -> &[Rows] {
        &self.tables
    }

    /// Adds a table without rows, and gives its number. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; [`Error::Tables`] if there are [`MAX_TABLES`]. Nothing has changed.
    pub fn add_table(&mut self) -> Result<usize> {
        if self.tables.len() == MAX_TABLES {
            return Err(Error::Tables { limit: MAX_TABLES });
        }
        memory::push(&mut self.tables, Rows::default())?;
        self.version = draw();
        Ok(self.tables.len() - 1)
    }

    /// Removes the last table and gives its rows; `None`, and nothing has changed, if it has names or there is no table.
    /// **O(1)**.
    pub fn pop_table(&mut self) -> Option<Rows> {
        let rows = self.tables.pop_if(|rows| rows.is_empty())?;
        self.version = draw();
        Some(rows)
    }

    /// All places in the order of the names. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn places(&self) -> Result<Places> {
        Ok(memory::collect(self.names.iter().map(|(_, place)| Some(*place)))?.into())
    }

    /// The name that each of some rows of a table has now, `None` for a free one. **O(n + m)**, and O(used) bytes.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoTable`], [`Refusal::Place`] for a row that the table has never given, [`Error::Memory`].
    pub fn names_of(
        &self,
        table: i64,
        rows: impl Iterator<Item = u64> + Clone,
    ) -> std::result::Result<Vec<Option<&K>>, Refusal<K>> {
        let number = usize::try_from(table).unwrap_or(usize::MAX);
        let used = self.tables.get(number).ok_or(Refusal::NoTable(table))?.used();
        if let Some(at) = rows.clone().position(|row| row >= used) {
            return Err(Refusal::Place { at });
        }
        let mut named: Vec<Option<&K>> = memory::filled(None, usize::try_from(used).unwrap_or(usize::MAX))?;
        for (name, place) in self.names.iter().filter(|(_, place)| place.table() == number) {
            named[place.row() as usize] = Some(name);
        }
        Ok(memory::collect(rows.map(|row| named[row as usize]))?)
    }

    /// Another index with the same names, in the same order and rows, of what `convert` makes of each name, which must
    /// match and hash the same. Nothing is hashed. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn copy<L>(&self, mut convert: impl FnMut(&K) -> L) -> Result<RowIndex<L>> {
        let names = self.names.map_entries(|name, place| (convert(name), *place))?;
        let mut tables = memory::with_capacity(self.tables.len())?;
        for rows in &self.tables {
            tables.push(rows.copy()?);
        }
        Ok(RowIndex::of_parts(names, tables))
    }

    /// The row that the next name of a table would get, and whether another name had it. `None` if a table of this
    /// capacity must grow before, or if there is no such table. **O(1)**.
    #[must_use]
    pub fn next_row(&self, table: usize, capacity: u64) -> Option<(u64, bool)> {
        let rows = self.tables.get(table)?;
        let row = rows.next(1).next()?;
        (row < capacity).then(|| (row, rows.reused(1) == 1))
    }

    /// Makes sure that one more name needs no memory. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`].
    pub fn reserve_one(&mut self) -> Result<()> {
        self.names.make_ids(1)?;
        self.names.reserve(1)
    }
}

impl<K: Matches<K>> RowIndex<K> {
    /// An index of distinct names, of which the n-th has row n of the only table. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Refusal::Repeated`], [`Error::Memory`], [`Error::Full`].
    pub fn of_one_table(names: impl Iterator<Item = K>) -> std::result::Result<Self, Refusal<K>> {
        let places = (0..).map_while(|row| Place::new(0, row));
        let names = distinct(names.zip(places))?;
        let tables = memory::collect([Rows::full(names.len() as u64)])?;
        Ok(Self::of_parts(names, tables))
    }

    /// An index of distinct names with distinct places, and of a table for each number of rows that it has given; the
    /// rows below that have no name are free. **O(n)**, and **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// [`Refusal::Repeated`]; [`Refusal::Lengths`] if there are not as many places; [`Refusal::Place`] for a place that
    /// is missing, outside, or that of a name before; [`Error::Memory`], [`Error::Full`], [`Error::Tables`].
    pub fn of(names: Vec<K>, places: &Places, used: &[u64]) -> std::result::Result<Self, Refusal<K>> {
        if names.len() != places.len() {
            return Err(Refusal::Lengths { names: names.len(), places: places.len() });
        }
        let tables = tables_of(places, used)?;
        let entries = names.into_iter().zip(places.iter()).map(|(name, place)| (name, certain(place)));
        Ok(Self::of_parts(distinct(entries)?, tables))
    }

    /// An index of names that are in another map, where `place_of` gives the place of each by its value. Nothing is
    /// hashed. **O(n)**, and **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// As of [`of`](Self::of).
    pub fn of_map<L, V>(
        map: &IndexMap<L, V>,
        used: &[u64],
        mut convert: impl FnMut(&L) -> K,
        place_of: impl Fn(&V) -> Option<Place>,
    ) -> std::result::Result<Self, Refusal<K>> {
        let places: Places = memory::collect(map.iter().map(|(_, value)| place_of(value)))?.into();
        let tables = tables_of(&places, used)?;
        let mut places = places.iter();
        let names = map.map_entries(|name, _| (convert(name), certain(places.next().flatten())))?;
        Ok(Self::of_parts(names, tables))
    }

    /// Adds a name at the end with a row that is the next of its table; there must be room for it. `false`, and nothing
    /// has changed, if the name is there or the row is not the next. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`]; nothing has changed. None after [`reserve_one`](Self::reserve_one).
    pub fn insert_one(&mut self, name: K, table: usize, row: u64) -> Result<bool> {
        let Some(place) = Place::new(table, row) else { return Ok(false) };
        if self.next_row(table, u64::MAX).is_none_or(|(next, _)| next != row) || self.names.contains(&name) {
            return Ok(false);
        }
        self.names.insert(name, place)?;
        self.tables[table].take(1);
        (self.version, self.inserts) = (draw(), draw());
        Ok(true)
    }

    /// Removes the name that `query` names, if it has this place, and gives it; its row is free. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; nothing has changed.
    pub fn remove_one<Q>(&mut self, query: &Q, place: Place) -> Result<Option<K>>
    where
        Q: Hashed + ?Sized,
        K: Matches<Q>,
    {
        if self.names.get(query) != Some(&place) {
            return Ok(None);
        }
        self.make_room_to_free(place)?;
        let removed = self.names.remove(query);
        Ok(removed.map(|(name, _)| self.give_back(name, place)))
    }

    /// Removes the last or the first name, if it has this place, and gives it; its row is free. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; nothing has changed.
    pub fn remove_end(&mut self, last: bool, place: Place) -> Result<Option<K>> {
        let end = if last { self.names.last() } else { self.names.first() };
        if end.map(|(_, at_end)| *at_end) != Some(place) {
            return Ok(None);
        }
        self.make_room_to_free(place)?;
        let removed = if last { self.names.pop_last() } else { self.names.pop_first() };
        Ok(removed.map(|(name, _)| self.give_back(name, place)))
    }

    fn make_room_to_free(&mut self, place: Place) -> Result<()> {
        self.tables[place.table()].reserve_free_below(place.row() + 1)
    }

    fn give_back(&mut self, name: K, place: Place) -> K {
        self.tables[place.table()].give_back(place.row());
        (self.version, self.moves) = (draw(), draw());
        name
    }

    /// Checks that the index is as its description says. For tests: **O(n + used)**.
    ///
    /// # Panics
    ///
    /// If it is not.
    pub fn check(&self) {
        self.names.check();
        let mut tables: Vec<Rows> =
            self.tables.iter().map(|rows| Rows::all_free(rows.used()).expect("memory for a test")).collect();
        for (_, place) in &self.names {
            assert!(tables[place.table()].claim(place.row()), "two names have {place:?}, or no table has given it");
        }
        for (number, (claimed, rows)) in tables.iter().zip(&self.tables).enumerate() {
            assert!(claimed.free().eq(rows.free()), "a row of table {number} is lost, or free and that of a name");
            assert_eq!(claimed.len(), rows.len());
        }
    }
}

/// A place that was looked at before.
pub(super) fn certain(place: Option<Place>) -> Place {
    place.expect("what has no place has been refused")
}

/// A map of entries whose names are distinct.
pub(super) fn distinct<K: Matches<K>>(
    entries: impl Iterator<Item = (K, Place)>,
) -> std::result::Result<IndexMap<K, Place>, Refusal<K>> {
    match IndexMap::from_distinct(entries)? {
        Ok(map) => Ok(map),
        Err(mut entries) if entries.len() <= MAX_ENTRIES => {
            let repeated = crate::index_map::first_repeated(entries.len(), |at| &entries[at].0)?;
            Err(Refusal::Repeated(entries.swap_remove(repeated.expect("a name is repeated")).0))
        }
        Err(entries) => Err(Error::Full { wanted: entries.len(), limit: MAX_ENTRIES }.into()),
    }
}

/// Tables that have given so many rows, of which those at some places belong to names and all others are free.
pub(super) fn tables_of<K>(places: &Places, used: &[u64]) -> std::result::Result<Vec<Rows>, Refusal<K>> {
    if used.len() > MAX_TABLES {
        return Err(Error::Tables { limit: MAX_TABLES }.into());
    }
    let mut tables = memory::with_capacity(used.len())?;
    for &rows in used {
        // The lowest free row is given first. So a table has never given more rows than there may be names.
        if rows > MAX_ENTRIES as u64 {
            return Err(Error::Rows { wanted: rows, limit: MAX_ENTRIES as u64 }.into());
        }
        tables.push(Rows::all_free(rows)?);
    }
    for (at, place) in places.iter().enumerate() {
        let rows = place.and_then(|place| Some((tables.get_mut(place.table())?, place.row())));
        if !rows.is_some_and(|(rows, row): (&mut Rows, u64)| rows.claim(row)) {
            return Err(Refusal::Place { at });
        }
    }
    Ok(tables)
}
