//! Where rows lie: the number of a table and a row of it, for one name or for many.

use std::fmt;
use std::num::NonZeroU64;

use crate::error::Result;
use crate::memory;
use crate::names::codec::ROW_BITS;

/// More tables than this cannot be told apart.
pub const MAX_TABLES: usize = 1 << (63 - ROW_BITS);

/// More rows than this cannot be told apart.
const MAX_ROWS: u64 = 1 << ROW_BITS;

/// The table and the row that belong to a name, in one word.
///
/// ```text
///   bit   63   62 ... 40   39 ... 0
///       |  0 |   table   |   row   |   inverted, so that no place is 0 and a missing one needs no room of its own
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place(NonZeroU64);

impl Place {
    /// A row of a table; `None` if either is too large.
    #[must_use]
    pub fn new(table: usize, row: u64) -> Option<Self> {
        if table >= MAX_TABLES || row >= MAX_ROWS {
            return None;
        }
        Self::of_id((table as u64) << ROW_BITS | row)
    }

    /// The place with this id: the table in the upper bits, the row in the lower [`ROW_BITS`].
    #[must_use]
    pub fn of_id(id: u64) -> Option<Self> {
        if id > i64::MAX.cast_unsigned() { None } else { NonZeroU64::new(!id).map(Self) }
    }

    /// The id of the place; ids have the order of tables and, within a table, of rows.
    #[must_use]
    pub fn id(self) -> u64 {
        !self.0.get()
    }

    /// The place as a number that is not 0.
    pub(crate) fn bits(self) -> u64 {
        self.0.get()
    }

    /// The place with these [bits](Self::bits); `None` for 0.
    pub(crate) fn of_bits(bits: u64) -> Option<Self> {
        NonZeroU64::new(bits).map(Self)
    }

    /// The number of the table.
    #[must_use]
    pub fn table(self) -> usize {
        (self.id() >> ROW_BITS) as usize
    }

    /// The row in the table.
    #[must_use]
    pub fn row(self) -> u64 {
        self.id() & (MAX_ROWS - 1)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({}, {})", self.table(), self.row())
    }
}

/// The places of many names, in the order in which they were asked for; `None` for a name that is not there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Places(Vec<Option<Place>>);

/// What some places have in one table.
#[derive(Debug, PartialEq, Eq)]
pub struct OfTable {
    /// The number of the table.
    pub table: usize,
    /// Positions in the list of places, ascending.
    pub positions: Vec<i64>,
    /// The row of each position.
    pub rows: Vec<i64>,
}

impl From<Vec<Option<Place>>> for Places {
    fn from(places: Vec<Option<Place>>) -> Self {
        Self(places)
    }
}

fn table_number(place: Option<Place>) -> i64 {
    place.map_or(-1, |place| (place.table() as u64).cast_signed())
}

fn row_number(place: Option<Place>) -> i64 {
    place.map_or(-1, |place| place.row().cast_signed())
}

fn number(at: usize) -> i64 {
    (at as u64).cast_signed()
}

impl Places {
    /// The number of places, with those that are missing. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no places. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All places in order. **O(1)** a place.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Option<Place>> + '_ {
        self.0.iter().copied()
    }

    /// One place; the outer `None` if there are not so many. **O(1)**.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<Option<Place>> {
        self.0.get(at).copied()
    }

    /// The table of each, -1 for a missing one. **O(m)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory), as of all methods here that give a list.
    pub fn tables(&self) -> Result<Vec<i64>> {
        memory::collect(self.iter().map(table_number))
    }

    /// The row of each, -1 for a missing one. **O(m)**.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn rows(&self) -> Result<Vec<i64>> {
        memory::collect(self.iter().map(row_number))
    }

    /// The table that all of them lie in. `None` if there are several, if one is missing, or if there are no places.
    /// **O(m)**.
    #[must_use]
    pub fn only_table(&self) -> Option<usize> {
        let first = (*self.0.first()?)?.id();
        // The ids of one table agree above the row; a missing place would differ in the bit of the sign.
        let differing = self.iter().fold(0, |bits, place| bits | (place.map_or(u64::MAX, Place::id) ^ first));
        (differing >> ROW_BITS == 0).then_some((first >> ROW_BITS) as usize)
    }

    /// Whether none is missing. **O(m)**.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.0.iter().all(Option::is_some)
    }

    /// The positions of those that are missing, ascending. **O(m)**.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn missing(&self) -> Result<Vec<i64>> {
        memory::collect(self.iter().enumerate().filter(|(_, place)| place.is_none()).map(|(at, _)| number(at)))
    }

    /// The places without those that are missing. **O(m)**.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn found(&self) -> Result<Self> {
        Ok(Self(memory::collect(self.iter().flatten().map(Some))?))
    }

    /// Those of each table, by ascending table; what is missing is left out. **O(m)**, and a search among the tables
    /// where a place lies in another table than the one before.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn by_table(&self) -> Result<Vec<OfTable>> {
        if let Some(table) = self.only_table() {
            let positions = memory::collect((0..self.len()).map(number))?;
            return memory::collect([OfTable { table, positions, rows: self.rows()? }]);
        }
        let mut counts = self.table_counts()?;
        let mut parts = memory::with_capacity(counts.len())?;
        for (table, count) in counts.drain(..) {
            let (positions, rows) = (memory::with_capacity(count)?, memory::with_capacity(count)?);
            parts.push(OfTable { table, positions, rows });
        }
        let mut last = 0;
        for (at, place) in self.iter().enumerate() {
            let Some(place) = place else { continue };
            let table = place.table();
            if parts[last].table != table {
                last = parts.partition_point(|part| part.table < table);
            }
            parts[last].positions.push(number(at));
            parts[last].rows.push(place.row().cast_signed());
        }
        Ok(parts)
    }

    /// The tables that places lie in, ascending, and how many do.
    fn table_counts(&self) -> Result<Vec<(usize, usize)>> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for place in self.iter().flatten() {
            match runs.last_mut() {
                Some((table, count)) if *table == place.table() => *count += 1,
                _ => memory::push(&mut runs, (place.table(), 1))?,
            }
        }
        runs.sort_unstable();
        runs.dedup_by(|next, kept| {
            let is_same = next.0 == kept.0;
            kept.1 += if is_same { next.1 } else { 0 };
            is_same
        });
        Ok(runs)
    }
}
