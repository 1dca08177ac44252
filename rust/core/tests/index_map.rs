//! `IndexMap` against a vector of pairs that is searched from end to end.
//!
//! The bugs that this hunts: an entry that is there and cannot be found (a word lost by a removal or a compaction), an
//! order that a removal disturbs, an id that survives its entry. Keys are few, and in one run all collide, so that
//! every probe runs through other entries' words.

use pdrs_core::{Error, Hashed, IndexMap, MAX_ENTRIES, Matches};
use proptest::prelude::*;

/// A small key whose hash keeps only `SPREAD` bits, so that 0 makes all keys collide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key<const SPREAD: u32>(u8);

impl<const SPREAD: u32> Hashed for Key<SPREAD> {
    fn hash(&self) -> u32 {
        u32::from(self.0).wrapping_mul(0x9E37_79B9).checked_shr(32 - SPREAD).unwrap_or(0)
    }
}

impl<const SPREAD: u32> Matches<Self> for Key<SPREAD> {
    fn matches(&self, query: &Self) -> bool {
        self == query
    }
}

#[derive(Debug, Clone)]
enum Operation {
    Insert(u8, u16),
    InsertMany(Vec<(u8, u16)>),
    GetOrInsertMany(Vec<u8>),
    Remove(u8),
    PopLast,
    PopFirst,
    MoveToLast(u8),
    MoveToFirst(u8),
    RetainEven,
    Compact,
    Reserve(usize),
    Clear,
    Clone,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::*;
    let one = prop_oneof![
        12 => (any::<u8>(), any::<u16>()).prop_map(|(key, value)| Insert(key, value)),
        2 => prop::collection::vec((any::<u8>(), any::<u16>()), 0..100).prop_map(InsertMany),
        2 => prop::collection::vec(any::<u8>(), 0..100).prop_map(GetOrInsertMany),
        12 => any::<u8>().prop_map(Remove),
        6 => Just(PopLast),
        6 => Just(PopFirst),
        4 => any::<u8>().prop_map(MoveToLast),
        4 => any::<u8>().prop_map(MoveToFirst),
        1 => Just(RetainEven),
        1 => Just(Compact),
        1 => (0_usize..300).prop_map(Reserve),
        1 => Just(Clear),
        1 => Just(Clone),
    ];
    prop::collection::vec(one, 1..400)
}

/// The model: what an ordered map is, with nothing clever about it.
#[derive(Debug, Default)]
struct Model(Vec<(u8, u16)>);

impl Model {
    fn position(&self, key: u8) -> Option<usize> {
        self.0.iter().position(|(one, _)| *one == key)
    }

    fn insert(&mut self, key: u8, value: u16) -> Option<u16> {
        let Some(at) = self.position(key) else {
            self.0.push((key, value));
            return None;
        };
        Some(std::mem::replace(&mut self.0[at].1, value))
    }

    fn remove(&mut self, key: u8) -> Option<(u8, u16)> {
        self.position(key).map(|at| self.0.remove(at))
    }

    fn move_to(&mut self, key: u8, last: bool) -> bool {
        let Some(entry) = self.remove(key) else {
            return false;
        };
        let at = if last { self.0.len() } else { 0 };
        self.0.insert(at, entry);
        true
    }
}

fn plain<const SPREAD: u32>(entry: Option<(Key<SPREAD>, u16)>) -> Option<(u8, u16)> {
    entry.map(|(key, value)| (key.0, value))
}

fn apply<const SPREAD: u32>(map: &mut IndexMap<Key<SPREAD>, u16>, model: &mut Model, operation: Operation) {
    match operation {
        Operation::Insert(key, value) => assert_eq!(map.insert(Key(key), value).unwrap(), model.insert(key, value)),
        Operation::InsertMany(entries) => {
            let mut replaced = Vec::new();
            let keyed: Vec<_> = entries.iter().map(|(key, value)| (Key(*key), *value)).collect();
            map.insert_many(keyed, |old| replaced.push(old)).unwrap();
            let expected: Vec<_> = entries.iter().filter_map(|(key, value)| model.insert(*key, *value)).collect();
            assert_eq!(replaced, expected);
        }
        Operation::GetOrInsertMany(keys) => {
            let (mut next, mut found) = (1000, Vec::new());
            let make = || {
                next += 1;
                next
            };
            let keyed: Vec<_> = keys.iter().map(|key| Key(*key)).collect();
            map.get_or_insert_many(keyed, make, |value| found.push(*value)).unwrap();
            let mut next = 1000;
            let expected = keys.iter().map(|key| {
                if model.position(*key).is_none() {
                    next += 1;
                    model.insert(*key, next);
                }
                model.0[model.position(*key).unwrap()].1
            });
            assert_eq!(found, expected.collect::<Vec<_>>());
        }
        Operation::Remove(key) => assert_eq!(plain(map.remove(&Key(key))), model.remove(key)),
        Operation::PopLast => assert_eq!(plain(map.pop_last()), model.0.pop()),
        Operation::PopFirst => {
            let first = (!model.0.is_empty()).then(|| model.0.remove(0));
            assert_eq!(plain(map.pop_first()), first);
        }
        Operation::MoveToLast(key) => {
            assert_eq!(map.move_to_last(&Key(key)).unwrap(), model.move_to(key, true));
        }
        Operation::MoveToFirst(key) => {
            assert_eq!(map.move_to_first(&Key(key)).unwrap(), model.move_to(key, false));
        }
        Operation::RetainEven => {
            map.retain(|key, _| key.0 % 2 == 0).unwrap();
            model.0.retain(|(key, _)| key % 2 == 0);
        }
        Operation::Compact => map.compact(),
        Operation::Reserve(additional) => map.reserve(additional).unwrap(),
        Operation::Clear => {
            map.clear();
            model.0.clear();
        }
        Operation::Clone => *map = map.map_entries(|key, value| (*key, *value)).unwrap(),
    }
}

/// Order, look-up and invariants all at once.
fn compare<const SPREAD: u32>(map: &IndexMap<Key<SPREAD>, u16>, model: &Model) {
    map.check();
    assert_eq!(map.len(), model.0.len());
    assert_eq!(map.is_empty(), model.0.is_empty());
    let entry = |(key, value): (&Key<SPREAD>, &u16)| (key.0, *value);
    assert_eq!(map.iter().len(), model.0.len());
    assert_eq!(map.iter().map(entry).collect::<Vec<_>>(), model.0);
    assert!(map.iter().rev().map(entry).eq(model.0.iter().rev().copied()));
    let mut seen = Vec::new();
    map.for_each(|key, value| seen.push((key.0, *value)));
    assert_eq!(seen, model.0);
    let places = (0..=map.positions()).filter_map(|position| map.entry_at(position));
    assert_eq!(places.map(entry).collect::<Vec<_>>(), model.0);
    assert_eq!(map.first().map(entry), model.0.first().copied());
    assert_eq!(map.last().map(entry), model.0.last().copied());
    let keys: Vec<_> = (0..=u8::MAX).map(Key).collect();
    let expected: Vec<_> = (0..=u8::MAX).map(|key| model.position(key).map(|at| model.0[at].1)).collect();
    let mut found = Vec::new();
    map.get_many(&keys, |at, value| {
        assert_eq!(at, found.len());
        found.push(value.copied());
    });
    assert_eq!(found, expected);
    for (key, value) in keys.iter().zip(expected) {
        assert_eq!(map.get(key).copied(), value);
        assert_eq!(map.contains(key), value.is_some());
    }
    let mut walked = Vec::new();
    let mut position = 0;
    while let Some((at, key, value)) = map.entry_at_or_after(position) {
        walked.push((key.0, *value));
        position = at + 1;
    }
    assert_eq!(walked, model.0);
    position = map.positions();
    while let Some((at, key, value)) = map.entry_before(position) {
        assert_eq!(walked.pop(), Some((key.0, *value)));
        position = at;
    }
    assert!(walked.is_empty());
}

fn run<const SPREAD: u32>(operations: Vec<Operation>) {
    let (mut map, mut model) = (IndexMap::<Key<SPREAD>, u16>::new(), Model::default());
    for operation in operations {
        let before: Vec<_> = map.iter().map(|(key, _)| key.0).collect();
        let (generation, positions) = (map.generation(), map.positions());
        apply(&mut map, &mut model, operation.clone());
        compare(&map, &model);
        let same_order = map.iter().map(|(key, _)| key.0).eq(before);
        if !matches!(operation, Operation::Clone) && (!same_order || map.positions() != positions) {
            assert_ne!(map.generation(), generation, "{operation:?} changed the order unnoticed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_operations_do_what_the_model_does(operations in operations()) {
        run::<32>(operations);
    }

    #[test]
    fn any_operations_do_what_the_model_does_when_few_hashes_differ(operations in operations()) {
        run::<3>(operations);
    }

    #[test]
    fn any_operations_do_what_the_model_does_when_all_hashes_collide(operations in operations()) {
        run::<0>(operations);
    }
}

fn insert(map: &mut IndexMap<String, u32>, n: u32) {
    assert_eq!(map.insert(n.to_string(), n), Ok(None));
}

#[test]
fn removing_every_second_entry_compacts_at_each_boundary() {
    for size in [1_u32, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000] {
        let mut map = IndexMap::new();
        (0..size).for_each(|n| insert(&mut map, n));
        for n in (0..size).step_by(2) {
            assert_eq!(map.remove(n.to_string().as_str()), Some((n.to_string(), n)));
            map.check();
        }
        assert!(map.iter().map(|(_, n)| *n).eq((1..size).step_by(2)));
        for n in (1..size).step_by(2) {
            assert_eq!(map.get(n.to_string().as_str()), Some(&n));
        }
    }
}

#[test]
fn holes_of_a_small_map_stay_few_when_it_grows() {
    let mut map = IndexMap::new();
    (0..32_u32).for_each(|n| insert(&mut map, n));
    map.retain(|_, n| *n == 0 || *n > 30).unwrap();
    map.check();
    for n in 100..200 {
        insert(&mut map, n);
        map.check();
        assert!(map.positions() - map.len() < 32, "{} positions, {} entries", map.positions(), map.len());
    }
}

#[test]
fn a_map_used_as_a_queue_keeps_its_size_and_its_order() {
    let mut map = IndexMap::new();
    (0..100_u32).for_each(|n| insert(&mut map, n));
    let bytes = map.allocated_bytes();
    for n in 100..100_000_u32 {
        map.insert(n.to_string(), n).unwrap();
        assert_eq!(map.pop_first(), Some(((n - 100).to_string(), n - 100)));
    }
    map.check();
    assert!(map.allocated_bytes() <= 4 * bytes, "{} bytes, then {}", bytes, map.allocated_bytes());
}

#[test]
fn a_drained_map_gives_its_memory_back() {
    let names = (0..100_000_u32).map(|n| (n.to_string(), n));
    for last in [false, true] {
        let mut map = IndexMap::new();
        map.insert_many(names.clone(), drop).unwrap();
        let bytes = map.allocated_bytes();
        while map.len() > 100 {
            drop(if last { map.pop_last() } else { map.pop_first() });
        }
        map.check();
        assert!(map.allocated_bytes() < bytes / 50, "{} bytes of {bytes} are left", map.allocated_bytes());
    }
}

#[test]
fn room_for_a_million_names_is_one_word_a_slot_and_one_place_an_entry() {
    let mut map = IndexMap::<Key<32>, u64>::new();
    map.reserve(1_000_000).unwrap();
    let words = (1_000_000_usize * 4).div_ceil(3).next_power_of_two() * 8;
    assert_eq!(map.allocated_bytes(), words + 1_000_000 * size_of::<Option<(Key<32>, u64)>>());
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut map = IndexMap::new();
    map.insert("a".to_owned(), 1).unwrap();
    let generation = map.generation();
    let refused = map.reserve(MAX_ENTRIES);
    assert_eq!(refused, Err(Error::Full { wanted: MAX_ENTRIES + 1, limit: MAX_ENTRIES }));
    assert!(refused.unwrap_err().to_string().contains("at most"));
    assert_eq!((map.len(), map.generation()), (1, generation));
    map.check();
}

#[test]
fn a_panic_while_judging_what_to_retain_removes_nothing() {
    let mut map = IndexMap::new();
    (0..100_u32).for_each(|n| insert(&mut map, n));
    let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| map.retain(|_, n| *n != 50 || panic!())));
    assert!(judged.is_err());
    map.check();
    assert_eq!(map.len(), 100);
}

#[test]
fn a_panic_while_making_a_value_leaves_the_map_as_it_was() {
    let mut map = IndexMap::new();
    map.insert("a".to_owned(), 1).unwrap();
    let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = map.get_or_insert_with("b".to_owned(), || panic!());
    }));
    assert!(made.is_err());
    map.check();
    assert_eq!(map.iter().map(|(name, n)| (name.as_str(), *n)).collect::<Vec<_>>(), [("a", 1)]);
}

#[test]
fn ids_may_wrap_around() {
    // Popping at the front moves the base on; pushing at the front moves it back, below zero.
    let mut map = IndexMap::new();
    (0..10_u32).for_each(|n| insert(&mut map, n));
    for n in [7, 3, 9, 0, 5] {
        assert!(map.move_to_first(n.to_string().as_str()).unwrap());
        map.check();
    }
    assert_eq!(map.iter().map(|(_, n)| *n).collect::<Vec<_>>(), [5, 0, 9, 3, 7, 1, 2, 4, 6, 8]);
    for n in 0..10_u32 {
        assert_eq!(map.get(n.to_string().as_str()), Some(&n));
    }
}

/// Odd multiples keep names apart; each stands for a word anywhere in the table.
fn scattered(count: u32) -> Vec<(String, u32)> {
    (0..count).map(|n| (format!("name{}", n.wrapping_mul(0x9E37_79B1)), n)).collect()
}

#[test]
fn a_map_of_distinct_entries_is_that_of_insertions_whether_it_has_one_region_of_words_or_many() {
    for count in [0, 1, 31, 5_000, 60_000, 300_000] {
        let entries = scattered(count);
        let mut inserted = IndexMap::new();
        inserted.insert_many(entries.clone(), drop).unwrap();
        let mut made = IndexMap::from_distinct(entries.clone().into_iter()).unwrap().unwrap();
        made.check();
        assert!(made.iter().eq(inserted.iter()));
        assert_eq!(made.generation(), inserted.generation());
        assert!(entries.iter().all(|(name, n)| made.get(name.as_str()) == Some(n)));
        insert(&mut made, 7);
        assert_eq!(made.len(), count as usize + 1);
        made.check();
    }
}

#[test]
fn as_many_can_be_looked_up_at_once_as_one_likes() {
    let mut map = IndexMap::from_distinct(scattered(1_000).into_iter()).unwrap().unwrap();
    map.retain(|_, n| *n % 3 != 0).unwrap();
    let keys: Vec<_> = scattered(1_500).into_iter().map(|(name, _)| name).collect();
    for count in (0..200).chain([1_500]) {
        let mut found = Vec::new();
        map.get_many(&keys[..count], |at, value| {
            assert_eq!(at, found.len());
            found.push(value.copied());
        });
        assert!(found.into_iter().eq(keys[..count].iter().map(|key| map.get(key.as_str()).copied())));
    }
}

#[test]
fn entries_that_are_not_distinct_are_given_back_in_order() {
    for count in [2, 40, 100_000] {
        for twice in [0, count / 2] {
            let mut entries = scattered(count);
            entries.push((entries[twice as usize].0.clone(), 0));
            let back = IndexMap::from_distinct(entries.clone().into_iter()).unwrap().err();
            assert_eq!(back, Some(entries));
        }
    }
}
