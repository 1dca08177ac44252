//! The rows that a sparse gradient lists, each with the places at which it is listed.

use crate::error::{Error, Result};
use crate::memory;

/// The rows in ascending order, each as often as it is listed, in the order in which it is listed there.
///
/// So rows are visited in the order of memory. The sum for a row does not depend on how many threads there are.
#[derive(Debug, Default)]
pub struct Listing {
    /// The row, and the place in the list in the lower 32 bits.
    entries: Vec<u64>,
}

/// So many bits are sorted by in one pass.
const DIGIT: u32 = 11;

/// Fewer are sorted faster by comparing.
const FEW: usize = 512;

impl Listing {
    /// Sorts the rows of a list. **O(k)** for `k` rows.
    ///
    /// # Errors
    ///
    /// [`Error::Row`] with the first row that the table does not have, or that is listed after 2^32 others. Also with one
    /// beyond 2^32. [`Error::Memory`].
    pub fn of(
        rows: impl ExactSizeIterator<Item = i64>,
        capacity: usize,
        skips: impl Fn(usize) -> bool,
    ) -> Result<Self> {
        let mut entries = memory::with_capacity(rows.len())?;
        let (mut is_sorted, mut last) = (true, 0);
        for (place, row) in rows.enumerate() {
            let known = u32::try_from(row).ok().filter(|row| (*row as usize) < capacity);
            let (Some(index), Ok(place)) = (known, u32::try_from(place)) else {
                return Err(Error::Row { row, capacity: capacity as u64 });
            };
            if skips(index as usize) {
                continue;
            }
            let entry = u64::from(index) << 32 | u64::from(place);
            is_sorted &= entry >= last;
            last = entry;
            entries.push(entry);
        }
        if !is_sorted {
            sort(&mut entries, capacity)?;
        }
        Ok(Self { entries })
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a row is listed more than once.
    #[must_use]
    pub fn repeats(&self) -> bool {
        self.entries.windows(2).any(|pair| row_of(pair[0]) == row_of(pair[1]))
    }

    /// All entries, by row.
    #[must_use]
    pub(super) fn entries(&self) -> &[u64] {
        &self.entries
    }
}

/// The row of an entry.
#[inline]
pub(super) fn row_of(entry: u64) -> usize {
    (entry >> 32) as usize
}

/// The place in the list of an entry.
#[inline]
pub(super) fn place_of(entry: u64) -> usize {
    (entry & u64::from(u32::MAX)) as usize
}

/// Sorts entries by their rows and places, which ascend before.
fn sort(entries: &mut Vec<u64>, capacity: usize) -> Result<()> {
    if entries.len() < FEW {
        entries.sort_unstable();
        return Ok(());
    }
    let bits = usize::BITS - capacity.leading_zeros();
    let mut sorted = memory::with_capacity(entries.len())?;
    sorted.resize(entries.len(), 0);
    for shift in (0..bits).step_by(DIGIT as usize) {
        let digit = |entry: u64| (entry >> (32 + shift)) as usize & ((1 << DIGIT) - 1);
        let mut starts = [0_u32; 1 << DIGIT];
        for entry in entries.iter() {
            starts[digit(*entry)] += 1;
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += std::mem::replace(start, sum);
        }
        for entry in entries.iter() {
            let start = &mut starts[digit(*entry)];
            sorted[*start as usize] = *entry;
            *start += 1;
        }
        std::mem::swap(entries, &mut sorted);
    }
    Ok(())
}
