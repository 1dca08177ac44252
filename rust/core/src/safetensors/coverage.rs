//! Whether the tensors of a header cover the data of a file: each byte belongs to exactly one of them.

use super::{Fault, Header};
use crate::memory;

/// The tensor that does not fit, if it is one, and why.
type Misplaced = (Option<usize>, Fault);

impl Header {
    /// Refuses tensors that overlap, leave a hole, or reach beyond the data. Most files have them in order.
    pub(super) fn check_coverage(&self, data: u64) -> Result<(), Misplaced> {
        let numbers = 0..self.len() as u32;
        if self.follow_each_other(numbers.clone(), data).is_ok() {
            return Ok(());
        }
        let mut order = memory::collect(numbers).map_err(|error| (None, error.into()))?;
        // Tensors without bytes come before the one that begins at the same byte.
        order.sort_unstable_by_key(|number| (self.range(*number as usize), *number));
        self.follow_each_other(order.into_iter(), data)
    }

    fn follow_each_other(&self, order: impl Iterator<Item = u32>, data: u64) -> Result<(), Misplaced> {
        let mut end = 0;
        for number in order.map(|number| number as usize) {
            let (start, stop) = self.range(number);
            if stop > data {
                return Err((Some(number), Fault::Outside { stop, data }));
            }
            if start < end {
                return Err((Some(number), Fault::Overlaps { start, behind: end }));
            }
            if start > end {
                return Err((Some(number), Fault::Hole { start: end, stop: start }));
            }
            end = stop;
        }
        if end < data {
            return Err((None, Fault::Hole { start: end, stop: data }));
        }
        Ok(())
    }

    /// Where a tensor begins and ends in the data.
    fn range(&self, number: usize) -> (u64, u64) {
        let entry = self.entries[number];
        (entry.start, entry.start + self.kinds[entry.kind as usize].bytes)
    }
}
