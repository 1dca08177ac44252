//! Which rows of a table belong to names, which are free, and how far a table grows.
//!
//! ```text
//!   row    0    1    2    3    4    5    6    7
//!        | a  | -  | b  | -  | c  |    |    |    |
//!          live free live free live  never given
//!                                  ^ used = 5     ^ capacity = 8
//! ```
//!
//! The lowest free row is the next to be given. So names that are added together lie together, and which rows come next
//! depends only on which belong to names. A run that was saved and loaded gives the rows that it would have given. So
//! it adds up in the same order, to the same bits.

use crate::error::Result;
use crate::rows::bit_set::RowSet;

/// The rows of one table; costs are amortised.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Rows from here on have never belonged to a name since the table was made or compacted.
    used: u64,
    free: RowSet,
}

/// The smallest capacity that a table grows to from another.
const SMALLEST: u64 = 4;

impl Rows {
    /// The rows of a table whose first `used` rows all belong to names.
    #[must_use]
    pub fn full(used: u64) -> Self {
        Self { used, free: RowSet::default() }
    }

    /// The rows of a table of whose first `used` rows `live` belong to names; the others are free.
    ///
    /// **O(used / 64)**, and **O(1)** a live row. `None` if a row is listed twice, or is none of the first.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn of_live(used: u64, mut live: impl Iterator<Item = u64>) -> Result<Option<Self>> {
        let mut rows = Self::all_free(used)?;
        Ok(live.all(|row| rows.claim(row)).then_some(rows))
    }

    /// The rows of a table of whose first `used` rows none belongs to a name. **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory).
    pub(crate) fn all_free(used: u64) -> Result<Self> {
        Ok(Self { used, free: RowSet::all_below(used)? })
    }

    /// Gives one row that is free; whether it was. **O(1)**.
    pub(crate) fn claim(&mut self, row: u64) -> bool {
        self.free.remove(row)
    }

    /// The same rows once more. **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { used: self.used, free: self.free.copy()? })
    }

    /// Makes sure that any row can be given back without memory for it.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory); the rows are as they were.
    pub fn reserve_free(&mut self) -> Result<()> {
        self.free.reserve(self.used)
    }

    /// The same for the rows below `end` only.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn reserve_free_below(&mut self, end: u64) -> Result<()> {
        self.free.reserve(end.min(self.used))
    }

    /// How many rows belong to names. **O(1)**.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.used - self.free.len()
    }

    /// Whether no row belongs to a name. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One more than the largest row that was ever given. **O(1)**.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Whether a row came back, and has not been given since. **O(1)**.
    #[must_use]
    pub fn is_free(&self, row: u64) -> bool {
        self.free.contains(row)
    }

    /// The rows that came back, ascending. **O(1)** a row.
    pub fn free(&self) -> impl Iterator<Item = u64> + '_ {
        self.free.iter()
    }

    /// The rows that the next `count` calls would give, in order, without giving them. **O(count)**.
    pub fn next(&self, count: u64) -> impl Iterator<Item = u64> + '_ {
        let reused = self.reused(count);
        self.free.iter().take(reused as usize).chain(self.used..self.used + (count - reused))
    }

    /// How many of the next `count` rows belonged to a name before. **O(1)**.
    #[must_use]
    pub fn reused(&self, count: u64) -> u64 {
        count.min(self.free.len())
    }

    /// Gives the rows that [`next`](Self::next) showed. **O(count)**.
    pub fn take(&mut self, count: u64) {
        let reused = self.reused(count);
        for _ in 0..reused {
            self.free.pop_first();
        }
        self.used += count - reused;
    }

    /// Takes a row back, whose name is gone. **O(1)**.
    pub fn give_back(&mut self, row: u64) {
        debug_assert!(row < self.used, "a row came back that was never given");
        self.free.insert(row);
    }

    /// The capacity that a table of this capacity needs before `count` more rows can be given; `None` if it overflows.
    ///
    /// It is the same if there is room. Otherwise it is at least the double, so that growing costs **O(1)** a row. The
    /// first capacity is no more than is needed, because many tables are made at once and stay as they are.
    #[must_use]
    pub fn capacity_for(&self, count: u64, capacity: u64) -> Option<u64> {
        let wanted = self.used.checked_add(count - self.reused(count))?;
        if wanted <= capacity {
            return Some(capacity);
        }
        let doubled = capacity.checked_mul(2)?;
        Some(if capacity == 0 { wanted } else { wanted.max(doubled).max(SMALLEST) })
    }
}
