//! Stretches that come in order, and cache lines that are taken, against every pair of stretches.
//!
//! The bugs that this hunts: an overlap that is not seen, so that a tensor is written twice; a bit of the wrong line,
//! word or chunk; memory for lines that nobody uses.

use std::ops::Range;

use pdrs_core::slab::disjoint::{Lines, Stretches};
use proptest::prelude::*;

const CHUNK: usize = 1 << 24;

fn share_a_line(one: &Range<usize>, other: &Range<usize>) -> bool {
    let lines = |stretch: &Range<usize>| stretch.start / 64..(stretch.end - 1) / 64 + 1;
    let (one, other) = (lines(one), lines(other));
    one.start < other.end && other.start < one.end
}

/// Stretches around the border of two chunks, and near the end of memory.
fn stretch() -> impl Strategy<Value = Range<usize>> {
    let begin = prop_oneof![CHUNK - 20_000..CHUNK + 20_000, usize::MAX - 60_000..usize::MAX - 20_000];
    (begin, prop_oneof![1_usize..200, 1_usize..20_000]).prop_map(|(begin, bytes)| begin..begin + bytes)
}

proptest! {
    #[test]
    fn a_stretch_is_taken_if_it_shares_no_line(stretches in prop::collection::vec(stretch(), 1..12)) {
        let mut lines = Lines::new(stretches.len());
        for (at, one) in stretches.iter().enumerate() {
            let is_free = !stretches[..at].iter().any(|other| share_a_line(one, other));
            prop_assert_eq!(lines.are_free(one.clone()), is_free);
            prop_assert_eq!(lines.take(one.clone()), is_free);
            if !is_free {
                break;
            }
        }
    }
}

fn are_apart(most: usize, stretches: &[Range<usize>]) -> bool {
    let mut seen = Stretches::new(most);
    for stretch in stretches {
        seen.add(stretch.clone());
    }
    seen.are_apart()
}

proptest! {
    #[test]
    fn stretches_are_apart_if_none_shares_a_byte_with_another(
        stretches in prop::collection::vec((0_usize..60, 1_usize..9).prop_map(|(begin, bytes)| begin..begin + bytes), 0..6)
    ) {
        let apart = |one: &Range<usize>, other: &Range<usize>| one.end <= other.start || other.end <= one.start;
        let expected = (0..stretches.len()).all(|at| stretches[..at].iter().all(|other| apart(&stretches[at], other)));
        // Runs that lie within each other cannot be told apart, but are never taken for apart.
        prop_assert!(expected || !are_apart(10, &stretches));
        let mut sorted = stretches;
        sorted.sort_unstable_by_key(|stretch| stretch.start);
        prop_assert_eq!(are_apart(10, &sorted), expected);
        prop_assert_eq!(are_apart(1, &sorted), expected);
    }
}

#[test]
fn too_many_runs_and_empty_stretches_cannot_be_told() {
    assert!(are_apart(2, &[10..11, 11..12, 0..4, 4..8]));
    assert!(!are_apart(1, &[10..11, 0..4]) && !are_apart(2, &[20..21, 10..11, 0..4]));
    assert!(!are_apart(2, &[0..1, 1..1, 1..2]) && !are_apart(2, &[0..0, 0..1]));
    assert!(!are_apart(2, &[0..1, 5..6, 4..7]) && !are_apart(2, &[4..7, 5..6]));
}

#[test]
fn an_empty_stretch_takes_nothing() {
    let mut lines = Lines::new(2);
    assert!(lines.take(64..64) && lines.take(64..65) && lines.take(64..64) && lines.are_free(64..64));
}

#[test]
fn stretches_that_lie_too_far_apart_cannot_be_told() {
    let mut lines = Lines::new(10);
    assert!((0..4).all(|chunk| lines.take(chunk * CHUNK..chunk * CHUNK + 1)));
    assert!(!lines.take(4 * CHUNK..4 * CHUNK + 1));
    assert!(lines.take(CHUNK + 64..CHUNK + 65) && !lines.take(CHUNK..CHUNK + 1));
}
