//! Whether the tensors of a header share out the data of a file: each byte to one of them.

use super::{Fault, Header};
use crate::memory;

/// The tensor that does not fit, where it is one, and why.
type Misplaced = (Option<usize>, Fault);

impl Header {
    /// The order of the tensors in the data, if it is not that of the header.
    pub(super) fn checked_layout(&self, data: u64) -> Result<Option<Box<[u32]>>, Misplaced> {
        if self.follow_each_other((0..self.len()).map(|number| number as u32), data).is_ok() {
            return Ok(None);
        }
        let order = memory::collect(0..self.len() as u32).map_err(|error| (None, error.into()))?;
        let mut order = order.into_boxed_slice();
        // Tensors without bytes come in front of the one that begins at the same place.
        order.sort_unstable_by_key(|number| (self.range(*number as usize), *number));
        self.follow_each_other(order.iter().copied(), data)?;
        Ok(Some(order))
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
