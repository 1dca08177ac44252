//! `Rows` against a set of the rows that are taken.
//!
//! The bugs that this hunts: a row that two names get, a row that is lost when it came back, a row beyond the capacity,
//! growth by so little that a million insertions copy the table a million times, rows that are given in an order which
//! depends on more than which are free, so that nothing that was saved can go on as it was.

use std::collections::BTreeSet;

use pdrs_core::Rows;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Operation {
    Take(u64),
    GiveBack(usize),
    Rebuild,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![
        3 => (0_u64..20).prop_map(Operation::Take),
        6 => any::<usize>().prop_map(Operation::GiveBack),
        1 => Just(Operation::Rebuild),
    ];
    prop::collection::vec(one, 1..200)
}

proptest! {
    #[test]
    fn every_row_belongs_to_one_name_at_most(operations in operations()) {
        let mut rows = Rows::default();
        let mut capacity = 0;
        let mut live = Vec::new();
        let mut given_back = BTreeSet::new();
        for operation in operations {
            match operation {
                Operation::Take(count) => {
                    capacity = rows.capacity_for(count, capacity).unwrap();
                    let next: Vec<u64> = rows.next(count).collect();
                    prop_assert_eq!(next.len() as u64, count);
                    let reused = rows.reused(count) as usize;
                    let expected: Vec<u64> = given_back.iter().take(reused).copied().collect();
                    prop_assert_eq!(&next[..reused], &expected[..], "the lowest first");
                    let fresh: Vec<u64> = (rows.used()..rows.used() + count - reused as u64).collect();
                    prop_assert_eq!(&next[reused..], &fresh[..], "then ascending");
                    given_back.retain(|row| !expected.contains(row));
                    rows.take(count);
                    live.extend(next);
                }
                Operation::GiveBack(at) if !live.is_empty() => {
                    let row = live.swap_remove(at % live.len());
                    rows.give_back(row);
                    given_back.insert(row);
                }
                Operation::GiveBack(_) => {}
                Operation::Rebuild => {
                    rows = Rows::of_live(rows.used(), live.iter().copied()).unwrap().unwrap();
                    prop_assert_eq!(rows.free().collect::<BTreeSet<_>>(), given_back.clone());
                }
            }
            let distinct: BTreeSet<u64> = live.iter().copied().chain(rows.free()).collect();
            prop_assert_eq!(distinct.len(), live.len() + rows.free().count(), "a row is live or free, once");
            prop_assert_eq!(distinct.len() as u64, rows.used(), "none is lost");
            prop_assert_eq!(rows.len(), live.len() as u64);
            prop_assert_eq!(rows.is_empty(), live.is_empty());
            prop_assert!(distinct.last().is_none_or(|last| *last < capacity));
        }
    }
}

#[test]
fn a_million_single_rows_grow_a_table_twenty_times_or_less() {
    let mut rows = Rows::default();
    let (mut capacity, mut grown) = (0, 0);
    for _ in 0..1_000_000 {
        let wanted = rows.capacity_for(1, capacity).unwrap();
        grown += u64::from(wanted != capacity);
        capacity = wanted;
        rows.take(1);
    }
    assert!(grown <= 20, "grew {grown} times");
    assert!(capacity < 2_200_000);
}

#[test]
fn rows_that_are_listed_twice_or_lie_outside_are_refused() {
    assert_eq!(Rows::of_live(5, [1, 3, 1].into_iter()), Ok(None));
    assert_eq!(Rows::of_live(5, [1, 5].into_iter()), Ok(None));
    let rows = Rows::of_live(5, [3, 1].into_iter()).unwrap().unwrap();
    assert_eq!(rows.free().collect::<Vec<_>>(), [0, 2, 4]);
}

#[test]
fn free_rows_far_apart_are_found_in_order() {
    let far = [1 << 20, 63, (1 << 18) - 1, 1 << 12, 64, 4095, 0];
    let mut rows = Rows::full(1 << 21);
    for row in far {
        rows.give_back(row);
    }
    assert_eq!(rows.next(8).collect::<Vec<_>>(), [0, 63, 64, 4095, 1 << 12, (1 << 18) - 1, 1 << 20, 1 << 21]);
    rows.take(3);
    rows.give_back(2);
    assert_eq!(rows.next(2).collect::<Vec<_>>(), [2, 4095]);
    rows.take(5);
    assert_eq!((rows.free().next(), rows.len()), (None, 1 << 21));
}

#[test]
fn a_capacity_that_cannot_be_counted_is_refused() {
    assert_eq!(Rows::full(u64::MAX - 1).capacity_for(5, u64::MAX - 1), None);
    assert_eq!(Rows::full(10).capacity_for(1, u64::MAX - 1), Some(u64::MAX - 1));
}
