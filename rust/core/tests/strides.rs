//! Strided elements, against a list of the addresses of all of them.
//!
//! The bugs that this hunts: a row that begins or ends in the wrong place when a region is cut, dimensions that are made
//! one though they are not, memory that is shared and not noticed.

use pdrs_core::slab::strides::{extent, for_each_row, is_contiguous, is_dense, loops, make_dense, may_fold, order_of};
use proptest::prelude::*;

/// A shape, strides, and an order of the dimensions.
fn layouts() -> impl Strategy<Value = (Vec<i64>, Vec<i64>, Vec<usize>)> {
    (0_usize..5).prop_flat_map(|ndim| {
        let stride = prop_oneof![0_i64..5, (0_i64..5).prop_map(|rows| rows * 4), (0_i64..5).prop_map(|rows| rows * 12)];
        (
            prop::collection::vec(0_i64..5, ndim),
            prop::collection::vec(stride, ndim),
            Just((0..ndim).collect::<Vec<_>>()).prop_shuffle(),
        )
    })
}

/// The distance of every element from the first, in elements, in C order of `order`.
fn elements(shape: &[i64], strides: &[i64], order: &[usize]) -> Vec<i64> {
    order.iter().fold(vec![0], |all, &dim| {
        all.iter().flat_map(|at| (0..shape[dim]).map(move |index| at + index * strides[dim])).collect()
    })
}

proptest! {
    #[test]
    fn rows_are_the_elements_in_order_from_any_to_any((shape, strides, order) in layouts(), cut in any::<(u16, u16)>()) {
        const ITEMSIZE: u64 = 4;
        let all = elements(&shape, &strides, &order);
        let mut cut = [usize::from(cut.0) % (all.len() + 1), usize::from(cut.1) % (all.len() + 1)];
        cut.sort_unstable();
        let part = &all[cut[0]..cut[1]];
        let loops = loops(&shape, &strides, &order, ITEMSIZE);
        let Some(inner) = loops.last() else {
            // No loops: nothing there, or all are neighbours.
            prop_assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 1));
            return Ok(());
        };
        let mut seen = Vec::new();
        for_each_row(&loops, cut[0] as u64..cut[1] as u64, |offset, count| {
            seen.extend((0..count).map(|at| ((offset + at * inner.step) / ITEMSIZE).cast_signed()));
        });
        prop_assert_eq!(seen, part);
    }

    #[test]
    fn elements_that_share_memory_are_noticed((shape, strides, order) in layouts()) {
        let mut all = elements(&shape, &strides, &order);
        all.sort_unstable();
        let shared = all.windows(2).any(|pair| pair[0] == pair[1]);
        prop_assert!(!shared || may_fold(&loops(&shape, &strides, &order, 4), 4));
    }

    #[test]
    fn dense_elements_never_seem_to_share_memory((shape, mut strides, order) in layouts()) {
        make_dense(&shape, &mut strides, &order);
        prop_assert!(is_dense(&shape, &strides, &order));
        prop_assert!(loops(&shape, &strides, &order, 4).is_empty());
        let in_any_order = loops(&shape, &strides, &(0..shape.len()).collect::<Vec<_>>(), 4);
        prop_assert!(!may_fold(&in_any_order, 4));
    }

    #[test]
    fn the_extent_reaches_to_the_last_element((shape, strides, order) in layouts()) {
        let all = elements(&shape, &strides, &order);
        prop_assert_eq!(extent(&shape, &strides), Some(all.iter().max().map_or(0, |last| last.unsigned_abs() + 1)));
    }

    #[test]
    fn contiguous_elements_are_neighbours((shape, strides, _) in layouts()) {
        let in_c_order = elements(&shape, &strides, &(0..shape.len()).collect::<Vec<_>>());
        prop_assert_eq!(is_contiguous(&shape, &strides), in_c_order.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }

    #[test]
    fn the_order_of_a_permuted_tensor_is_that_of_its_strides((shape, mut strides, order) in layouts()) {
        make_dense(&shape, &mut strides, &order);
        prop_assert!(is_dense(&shape, &strides, &order_of(&shape, &strides)));
    }
}

#[test]
fn an_extent_that_no_i64_holds_is_none() {
    assert_eq!(extent(&[2], &[i64::MAX]), None);
    assert_eq!(extent(&[i64::MAX, 3], &[i64::MAX, 1]), None);
    assert_eq!(extent(&[2], &[-1]), None);
    assert_eq!(extent(&[i64::MAX], &[1]), Some(i64::MAX.cast_unsigned()));
}
