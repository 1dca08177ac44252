//! Cache lines that are taken, against every pair of stretches.
//!
//! The bugs that this hunts: an overlap that is not seen, so that a tensor is written twice; a bit of the wrong line,
//! word or chunk; memory for lines that nobody uses.

use std::ops::Range;

use pdrs_core::lines::Lines;
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
