//! Layouts of slabs and their cuts into blocks, against what they promise.
//!
//! The bugs that this hunts: a byte that no block carries, or two; an element cut in two; a region that lies where
//! vector loads are slow; sums that wrap around.

use pdrs_core::Error;
use pdrs_core::slab::layout::{LEAST_ALIGNMENT, Layout, MOST_ALIGNMENT, alignment, cut};
use proptest::prelude::*;

fn sizes() -> impl Strategy<Value = Vec<u64>> {
    let size = prop_oneof![Just(0), 1_u64..9, 10_u64..200, (1_u64..8).prop_map(|lines| lines * 64), 500_u64..3000];
    prop::collection::vec(size, 0..60)
}

fn lay_out(sizes: &[u64]) -> Result<(Vec<u64>, u64), Error> {
    let mut layout = Layout::default();
    let offsets = sizes.iter().map(|size| layout.place(*size)).collect::<Result<_, _>>()?;
    Ok((offsets, layout.end()))
}

proptest! {
    #[test]
    fn regions_lie_in_order_aligned_and_close(sizes in sizes()) {
        let (offsets, length) = lay_out(&sizes).unwrap();
        prop_assert_eq!(offsets.len(), sizes.len());
        let mut end = 0;
        for (offset, size) in offsets.iter().zip(&sizes) {
            prop_assert!(*offset >= end && offset - end < alignment(*size));
            prop_assert!(offset.is_multiple_of(LEAST_ALIGNMENT));
            end = offset + size;
        }
        prop_assert_eq!(length, end);
    }

    #[test]
    fn no_region_touches_more_cache_lines_than_it_must(sizes in sizes()) {
        let (offsets, _) = lay_out(&sizes).unwrap();
        for (offset, size) in offsets.iter().zip(&sizes).filter(|(_, size)| **size > 0) {
            let lines = (offset + size).div_ceil(MOST_ALIGNMENT) - offset / MOST_ALIGNMENT;
            prop_assert_eq!(lines, size.div_ceil(MOST_ALIGNMENT));
        }
    }

    #[test]
    fn blocks_hold_every_byte_once_and_in_order(
        sizes in sizes(),
        block_size in (1_u64..40).prop_map(|lines| lines * MOST_ALIGNMENT),
    ) {
        let (offsets, _) = lay_out(&sizes).unwrap();
        let regions: Vec<_> = offsets.iter().zip(&sizes).map(|(offset, size)| *offset..offset + size).collect();
        let mut held: Vec<_> = regions.iter().map(|region| region.start).collect();
        let mut end = 0;
        for block in cut(regions.iter().cloned(), block_size).unwrap() {
            prop_assert!(block.bytes.start >= end && !block.bytes.is_empty());
            prop_assert!(block.bytes.start.is_multiple_of(LEAST_ALIGNMENT));
            end = block.bytes.end;
            prop_assert!(block.bytes.end - block.bytes.start <= block_size);
            for region in block.regions {
                let part = regions[region].start.max(block.bytes.start)..regions[region].end.min(block.bytes.end);
                if regions[region].is_empty() {
                    continue;
                }
                prop_assert!(!part.is_empty(), "a block names a region that does not reach into it");
                prop_assert_eq!(part.start, held[region]);
                held[region] = part.end;
            }
        }
        for (region, held) in regions.iter().zip(held) {
            prop_assert_eq!(region.end, held);
        }
    }

    #[test]
    fn blocks_are_as_few_as_their_size_allows(
        sizes in sizes(),
        block_size in (1_u64..40).prop_map(|lines| lines * MOST_ALIGNMENT),
    ) {
        let (offsets, _) = lay_out(&sizes).unwrap();
        let regions = offsets.iter().zip(&sizes).map(|(offset, size)| *offset..offset + size);
        let blocks = cut(regions, block_size).unwrap();
        for pair in blocks.windows(2) {
            prop_assert!(pair[1].bytes.start >= pair[0].bytes.start + block_size);
        }
    }
}

#[test]
fn sums_that_no_i64_holds_are_refused() {
    let most = i64::MAX.cast_unsigned();
    assert_eq!(lay_out(&[most]).map(|(_, length)| length), Ok(most));
    assert_eq!(lay_out(&[most, 1]), Err(Error::TooLarge));
    assert_eq!(lay_out(&[most / 2 + 1, most / 2 + 1]), Err(Error::TooLarge));
    assert_eq!(lay_out(&[u64::MAX]), Err(Error::TooLarge));
    assert_eq!(lay_out(&[1, u64::MAX]), Err(Error::TooLarge));
}

#[test]
fn a_block_size_that_might_cut_an_element_is_refused() {
    for got in [0, 1, 63, 96] {
        assert_eq!(cut([], got), Err(Error::BlockSize { got, multiple_of: MOST_ALIGNMENT }));
    }
}

#[test]
fn a_slab_at_the_end_of_the_numbers_is_cut() {
    let end = i64::MAX.cast_unsigned();
    let blocks = cut(std::iter::once(end - 100..end), u64::MAX - 63).unwrap();
    assert_eq!(blocks.len(), 1);
}
