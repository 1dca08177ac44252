//! Which rows of a table belong to names, which are free, and how far a table grows.
//!
//! ```text
//!   row    0    1    2    3    4    5    6    7
//!        | a  | -  | b  | -  | c  |    |    |    |
//!          live free live free live  never given
//!                                  ^ used = 5     ^ capacity = 8
//! ```
//!
//! Rows are given in ascending order, so that names that are added together lie together. A row that came back is given
//! again before any that never was, the last one first: it is the one most likely to be in the cache.

/// The rows of one table; costs are amortised.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    /// Rows from here on have never belonged to a name since the table was made or compacted.
    used: u64,
    free: Vec<u64>,
}

/// The smallest capacity that a table grows to from another.
const SMALLEST: u64 = 4;

impl Rows {
    /// The rows of a table whose first `used` rows all belong to names.
    #[must_use]
    pub fn full(used: u64) -> Self {
        Self { used, free: Vec::new() }
    }

    /// The rows of a table of whose first `used` rows `live` belong to names; the others are free, and the lowest of
    /// these is given first.
    ///
    /// **O(used)**. `None` if a row is listed twice, or is none of the first.
    #[must_use]
    pub fn of_live(used: u64, live: impl Iterator<Item = u64>) -> Option<Self> {
        let mut taken = vec![false; usize::try_from(used).ok()?];
        for row in live {
            if std::mem::replace(taken.get_mut(usize::try_from(row).ok()?)?, true) {
                return None;
            }
        }
        let free = (0..used).rev().filter(|row| !taken[*row as usize]).collect();
        Some(Self { used, free })
    }

    /// How many rows belong to names. **O(1)**.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.used - self.free.len() as u64
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

    /// The rows that came back, the next one to be given last. **O(1)**.
    #[must_use]
    pub fn free(&self) -> &[u64] {
        &self.free
    }

    /// The rows that the next `count` calls would give, in order, without giving them. **O(count)**.
    pub fn next(&self, count: u64) -> impl Iterator<Item = u64> + '_ {
        let reused = self.reused(count);
        self.free.iter().rev().copied().take(reused as usize).chain(self.used..self.used + (count - reused))
    }

    /// How many of the next `count` rows belonged to a name before. **O(1)**.
    #[must_use]
    pub fn reused(&self, count: u64) -> u64 {
        count.min(self.free.len() as u64)
    }

    /// Gives the rows that [`next`](Self::next) showed. **O(count)**.
    pub fn take(&mut self, count: u64) {
        let reused = self.reused(count);
        self.free.truncate(self.free.len() - reused as usize);
        self.used += count - reused;
    }

    /// Takes a row back, whose name is gone. **O(1)**.
    pub fn give_back(&mut self, row: u64) {
        debug_assert!(row < self.used, "a row came back that was never given");
        self.free.push(row);
    }

    /// The capacity that a table of this capacity needs before `count` more rows can be given: the same if there is
    /// room, otherwise at least the double, so that growing costs **O(1)** a row, and at first no more than is needed,
    /// because many tables are made at once and stay as they are. `None` if that overflows.
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
