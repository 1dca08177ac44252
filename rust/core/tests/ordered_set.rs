//! `OrderedSet` against a vector that is searched from end to end.
//!
//! The bugs that this hunts: an entry that is there and cannot be found (a word lost by a removal or a compaction), an
//! order that a removal disturbs, an id that survives its entry. Keys are few, and in one run all collide, so that
//! every probe runs through other entries' words.

use pdrs_core::{Hashed, Matches, OrderedSet};
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
    Insert(u8),
    InsertMany(Vec<u8>),
    Remove(u8),
    PopLast,
    PopFirst,
    Clear,
    Clone,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::*;
    let one = prop_oneof![
        12 => any::<u8>().prop_map(Insert),
        3 => prop::collection::vec(any::<u8>(), 0..100).prop_map(InsertMany),
        12 => any::<u8>().prop_map(Remove),
        6 => Just(PopLast),
        6 => Just(PopFirst),
        1 => Just(Clear),
        1 => Just(Clone),
    ];
    prop::collection::vec(one, 1..400)
}

/// What an ordered set is, with nothing clever about it.
fn insert(model: &mut Vec<u8>, key: u8) -> bool {
    let is_new = !model.contains(&key);
    if is_new {
        model.push(key);
    }
    is_new
}

fn apply<const SPREAD: u32>(set: &mut OrderedSet<Key<SPREAD>>, model: &mut Vec<u8>, operation: &Operation) {
    match operation {
        Operation::Insert(key) => assert_eq!(set.insert(Key(*key)), Ok(insert(model, *key))),
        Operation::InsertMany(keys) => {
            set.insert_many(keys.iter().map(|key| Key(*key))).unwrap();
            for key in keys {
                insert(model, *key);
            }
        }
        Operation::Remove(key) => {
            let at = model.iter().position(|one| one == key);
            assert_eq!(set.remove(&Key(*key)), at.map(|at| Key(model.remove(at))));
        }
        Operation::PopLast => assert_eq!(set.pop_last(), model.pop().map(Key)),
        Operation::PopFirst => {
            let first = (!model.is_empty()).then(|| model.remove(0));
            assert_eq!(set.pop_first(), first.map(Key));
        }
        Operation::Clear => {
            set.clear();
            model.clear();
        }
        Operation::Clone => *set = set.map_keys(|key| *key).unwrap(),
    }
}

/// Order, look-up and invariants all at once.
fn compare<const SPREAD: u32>(set: &OrderedSet<Key<SPREAD>>, model: &[u8]) {
    set.check();
    assert_eq!((set.len(), set.is_empty()), (model.len(), model.is_empty()));
    assert!(set.iter().map(|key| key.0).eq(model.iter().copied()));
    let places = (0..=set.positions()).filter_map(|position| set.key_at(position));
    assert!(places.map(|key| key.0).eq(model.iter().copied()));
    assert_eq!(set.first().map(|key| key.0), model.first().copied());
    assert_eq!(set.last().map(|key| key.0), model.last().copied());
    assert!((0..=u8::MAX).all(|key| set.contains(&Key(key)) == model.contains(&key)));
    let (mut walked, mut position) = (Vec::new(), 0);
    while let Some((at, key)) = set.key_at_or_after(position) {
        walked.push(key.0);
        position = at + 1;
    }
    assert_eq!(walked, model);
    position = set.positions();
    while let Some((at, key)) = set.key_before(position) {
        assert_eq!(walked.pop(), Some(key.0));
        position = at;
    }
    assert!(walked.is_empty());
}

fn run<const SPREAD: u32>(operations: &[Operation]) {
    let (mut set, mut model) = (OrderedSet::<Key<SPREAD>>::new(), Vec::new());
    for operation in operations {
        let before: Vec<_> = set.iter().map(|key| key.0).collect();
        let (generation, positions) = (set.generation(), set.positions());
        apply(&mut set, &mut model, operation);
        compare(&set, &model);
        let same_order = set.iter().map(|key| key.0).eq(before);
        if !matches!(operation, Operation::Clone) && (!same_order || set.positions() != positions) {
            assert_ne!(set.generation(), generation, "{operation:?} changed the order unnoticed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_operations_do_what_the_model_does(operations in operations()) {
        run::<32>(&operations);
    }

    #[test]
    fn any_operations_do_what_the_model_does_when_few_hashes_differ(operations in operations()) {
        run::<3>(&operations);
    }

    #[test]
    fn any_operations_do_what_the_model_does_when_all_hashes_collide(operations in operations()) {
        run::<0>(&operations);
    }
}

/// Keys whose hashes lie anywhere.
type Wide = Key<32>;

fn filled(count: u8) -> OrderedSet<Wide> {
    let mut set = OrderedSet::new();
    set.insert_many((0..count).map(Key)).unwrap();
    set
}

#[test]
fn removing_every_second_key_compacts_at_each_boundary() {
    for size in [1_u8, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255] {
        let mut set = filled(size);
        for n in (0..size).step_by(2) {
            assert_eq!(set.remove(&Key(n)), Some(Key(n)));
            set.check();
        }
        assert!(set.iter().map(|key| key.0).eq((1..size).step_by(2)));
    }
}

#[test]
fn holes_of_a_small_set_stay_few_when_it_grows() {
    let mut set = filled(32);
    for n in 1..31 {
        assert_eq!(set.remove(&Key(n)), Some(Key(n)));
    }
    set.check();
    for n in 100..200 {
        assert_eq!(set.insert(Key(n)), Ok(true));
        set.check();
        assert!(set.positions() - set.len() < 32, "{} positions, {} keys", set.positions(), set.len());
    }
}

#[test]
fn a_set_used_as_a_queue_keeps_its_size() {
    let mut set = filled(100);
    let bytes = set.allocated_bytes();
    for n in 0..100_000_u32 {
        assert_eq!(set.pop_first(), Some(Key((n % 200) as u8)));
        assert_eq!(set.insert(Key(((n + 100) % 200) as u8)), Ok(true));
    }
    set.check();
    assert!(set.allocated_bytes() <= 4 * bytes, "{bytes} bytes, then {}", set.allocated_bytes());
}
