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
use crate::hash_table::MAX_ENTRIES;
use crate::memory;
use crate::names::table::{NameTable, Repeated};
use crate::names::text::Text;
use crate::rows::allocator::Rows;
use crate::rows::places::{MAX_TABLES, Place, Places};
use crate::rows::plan::Refusal;

/// Names in order, and the table and row of each. Costs are amortised, with `n` the number of names.
pub struct RowIndex {
    pub(super) names: NameTable,
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

impl Default for RowIndex {
    fn default() -> Self {
        Self::of_parts(NameTable::default(), Vec::new())
    }
}

impl RowIndex {
    fn of_parts(names: NameTable, tables: Vec<Rows>) -> Self {
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
    pub fn names(&self) -> &NameTable {
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
        Ok(memory::collect(self.names.iter().map(|(_, place)| Some(place)))?.into())
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
    ) -> std::result::Result<Vec<Option<&[u8]>>, Refusal> {
        let number = usize::try_from(table).unwrap_or(usize::MAX);
        let used = self.tables.get(number).ok_or(Refusal::NoTable(table))?.used();
        if let Some(at) = rows.clone().position(|row| row >= used) {
            return Err(Refusal::Place { at });
        }
        let mut named: Vec<Option<&[u8]>> = memory::filled(None, usize::try_from(used).unwrap_or(usize::MAX))?;
        for (name, place) in self.names.iter().filter(|(_, place)| place.table() == number) {
            named[place.row() as usize] = Some(name);
        }
        Ok(memory::collect(rows.map(|row| named[row as usize]))?)
    }

    /// Another index with the same names, in the same order and rows. Nothing is hashed. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn copy(&self) -> Result<Self> {
        let names = self.names.copy()?;
        let mut tables = memory::with_capacity(self.tables.len())?;
        for rows in &self.tables {
            tables.push(rows.copy()?);
        }
        Ok(Self::of_parts(names, tables))
    }

    /// The row that the next name of a table would get, and whether another name had it. `None` if a table of this
    /// capacity must grow before, or if there is no such table. **O(1)**.
    #[must_use]
    pub fn next_row(&self, table: usize, capacity: u64) -> Option<(u64, bool)> {
        let rows = self.tables.get(table)?;
        let row = rows.next(1).next()?;
        (row < capacity).then(|| (row, rows.reused(1) == 1))
    }

    /// Makes sure that to insert this name needs no memory. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`].
    pub fn reserve_one(&mut self, name: &(impl Text + ?Sized)) -> Result<()> {
        self.names.reserve_one(name)
    }

    /// An index of distinct names, of which the n-th has row n of the only table. **O(n)**.
    ///
    /// # Errors
    ///
    /// [`Refusal::Repeated`], [`Error::Memory`], [`Error::Full`].
    pub fn of_one_table<Q: Text>(names: impl Iterator<Item = Q>) -> std::result::Result<Self, Refusal> {
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
    pub fn of<Q: Text>(
        names: impl ExactSizeIterator<Item = Q>,
        places: &Places,
        used: &[u64],
    ) -> std::result::Result<Self, Refusal> {
        if names.len() != places.len() {
            return Err(Refusal::Lengths { names: names.len(), places: places.len() });
        }
        let tables = tables_of(places.iter(), used)?;
        let entries = names.zip(places.iter()).map(|(name, place)| (name, certain(place)));
        Ok(Self::of_parts(distinct(entries)?, tables))
    }

    /// An index of names with distinct places, and of a table for each number of rows that it has given. Nothing is
    /// hashed. **O(n)**, and **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// As of [`of`](Self::of).
    pub fn of_names(names: NameTable, used: &[u64]) -> std::result::Result<Self, Refusal> {
        let tables = tables_of(names.iter().map(|(_, place)| Some(place)), used)?;
        Ok(Self::of_parts(names, tables))
    }

    /// Adds a name at the end with a row that is the next of its table; there must be room for it. `false`, and nothing
    /// has changed, if the name is there or the row is not the next. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::Full`]; nothing has changed. None after [`reserve_one`](Self::reserve_one).
    pub fn insert_one(&mut self, name: &(impl Text + ?Sized), table: usize, row: u64) -> Result<bool> {
        let Some(place) = Place::new(table, row) else { return Ok(false) };
        if self.next_row(table, u64::MAX).is_none_or(|(next, _)| next != row) || !self.names.insert_new(name, place)? {
            return Ok(false);
        }
        self.tables[table].take(1);
        (self.version, self.inserts) = (draw(), draw());
        Ok(true)
    }

    /// Removes a name, if it has this place; its row is free. Whether it did. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; nothing has changed.
    pub fn remove_one(&mut self, name: &(impl Text + ?Sized), place: Place) -> Result<bool> {
        let position = self.names.position_of(name).filter(|at| self.names.place_at(*at) == Some(place));
        self.remove_at(position, place)
    }

    /// Removes the last or the first name, if it has this place; its row is free. Whether it did. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]; nothing has changed.
    pub fn remove_end(&mut self, last: bool, place: Place) -> Result<bool> {
        let end = if last { self.names.last() } else { self.names.first() };
        let position = end.filter(|end| end.place == place).map(|end| end.position);
        self.remove_at(position, place)
    }

    fn remove_at(&mut self, position: Option<usize>, place: Place) -> Result<bool> {
        let Some(position) = position else { return Ok(false) };
        self.make_room_to_free(place)?;
        self.names.remove_at(&[position]);
        self.give_back(place);
        Ok(true)
    }

    fn make_room_to_free(&mut self, place: Place) -> Result<()> {
        self.tables[place.table()].reserve_free_below(place.row() + 1)
    }

    fn give_back(&mut self, place: Place) {
        self.tables[place.table()].give_back(place.row());
        (self.version, self.moves) = (draw(), draw());
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
        for (_, place) in self.names.iter() {
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

/// A table of distinct names.
pub(super) fn distinct<Q: Text>(entries: impl Iterator<Item = (Q, Place)>) -> std::result::Result<NameTable, Refusal> {
    NameTable::of_distinct(entries)?.map_err(|Repeated(at)| Refusal::Repeated { at })
}

/// Tables that have given so many rows, of which those at some places belong to names and all others are free.
pub(super) fn tables_of(
    places: impl Iterator<Item = Option<Place>>,
    used: &[u64],
) -> std::result::Result<Vec<Rows>, Refusal> {
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
    for (at, place) in places.enumerate() {
        let rows = place.and_then(|place| Some((tables.get_mut(place.table())?, place.row())));
        if !rows.is_some_and(|(rows, row): (&mut Rows, u64)| rows.claim(row)) {
            return Err(Refusal::Place { at });
        }
    }
    Ok(tables)
}
