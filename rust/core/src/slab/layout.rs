//! Where many regions of memory lie in one slab, and how a slab is cut into blocks: arithmetic only.
//!
//! A *slab* is one stretch of bytes that holds many regions, one after another, with gaps only for alignment
//! ([`Layout`]). It may be too large to be carried at once, so it is cut into *blocks* ([`cut`]). A block holds
//! regions, or a part of a large one, as they lie in the slab.
//!
//! ```text
//!     regions   aaaa bb ccccccccccccccc dddddddddddddddddddddddddddddddd e
//!     slab      |aaaa|bb··|ccccccccccccccc·|dddddddddddddddddddddddddddddddd|e|
//!     blocks    [-----------][------------][-----------][------------][-----] []
//! ```

use std::ops::Range;

use crate::error::{Error, Result};
use crate::memory;

/// Every region begins at a multiple of this many bytes: GPUs load 16 bytes at once, and only from such addresses.
pub const LEAST_ALIGNMENT: u64 = 16;

/// No region is aligned to more bytes than these: a cache line, the widest vector register of a CPU, and what torch's
/// own CPU allocator aligns to.
pub const MOST_ALIGNMENT: u64 = 64;

/// A stretch of a slab that is carried at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The bytes of the slab, from the first byte of a region, or of its rest, to the last of one, or of its part.
    pub bytes: Range<u64>,
    /// The regions that lie in these bytes, at least in part. Empty ones at the edges may be left out.
    pub regions: Range<usize>,
}

/// To what a region of `size` bytes is aligned: small regions lie close together, yet none crosses more cache lines
/// than it must.
#[must_use]
#[inline]
pub fn alignment(size: u64) -> u64 {
    size.min(MOST_ALIGNMENT).next_power_of_two().max(LEAST_ALIGNMENT)
}

/// Lays regions out in a slab, one after another.
#[derive(Debug, Default)]
pub struct Layout {
    end: u64,
}

impl Layout {
    /// Gives a region of `size` bytes the next place: where it begins. Computes in **O(1)** time.
    ///
    /// A region of no size has a place, too, but takes none.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if the slab would be larger than an `i64` can tell: torch counts in those.
    #[inline]
    pub fn place(&mut self, size: u64) -> Result<u64> {
        // The alignment is a power of two.
        let mask = alignment(size) - 1;
        let offset = self.end.checked_add(mask).ok_or(Error::TooLarge)? & !mask;
        self.end = offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok()).ok_or(Error::TooLarge)?;
        Ok(offset)
    }

    /// Where the last region ends.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }
}

/// Cuts a slab into blocks of at most `block_size` bytes, in order.
///
/// `regions` are the places of its regions, ascending and apart. Every byte of a region is in exactly one block. A block
/// begins at a multiple of [`LEAST_ALIGNMENT`] if all regions do. Computes in **O(n + blocks)** time.
///
/// # Errors
///
/// [`Error::BlockSize`] if `block_size` is no positive multiple of [`MOST_ALIGNMENT`]: an element might be cut in two;
/// [`Error::Memory`].
pub fn cut(regions: impl IntoIterator<Item = Range<u64>>, block_size: u64) -> Result<Vec<Block>> {
    if block_size == 0 || !block_size.is_multiple_of(MOST_ALIGNMENT) {
        return Err(Error::BlockSize { got: block_size, multiple_of: MOST_ALIGNMENT });
    }
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, region) in regions.into_iter().enumerate() {
        if region.is_empty() {
            continue;
        }
        debug_assert!(open.as_ref().is_none_or(|block| block.bytes.end <= region.start), "regions overlap");
        let mut from = region.start;
        while from < region.end {
            let block = match &mut open {
                // A gap may reach beyond the end of the block; then the region begins the next one.
                Some(block) if from - block.bytes.start < block_size => block,
                _ => {
                    close(&mut blocks, &mut open)?;
                    open.insert(Block { bytes: from..from, regions: number..number })
                }
            };
            let to = region.end.min(block.bytes.start.saturating_add(block_size));
            block.bytes.end = to;
            block.regions.end = number + 1;
            from = to;
        }
    }
    close(&mut blocks, &mut open)?;
    Ok(blocks)
}

fn close(blocks: &mut Vec<Block>, open: &mut Option<Block>) -> Result<()> {
    open.take().map_or(Ok(()), |block| memory::push(blocks, block))
}
