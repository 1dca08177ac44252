//! `NameTable` against a vector of pairs that is searched from end to end.
//!
//! The bugs that this hunts: a name that is there and cannot be found (a word lost by a removal or when records move
//! together), an order that a removal disturbs, an id that survives its name, a change of many that is not that of one
//! after the other. Names are few, and in one run all collide, so that every search runs through other names' words.

use std::cell::Cell;
use std::sync::OnceLock;

use pdrs_core::Place;
use pdrs_core::names::table::{NameTable, stored_hash};
use proptest::prelude::*;

thread_local! {
    /// Whether all searches of a run begin at the same word.
    static COLLIDE: Cell<bool> = const { Cell::new(false) };
}

/// A name with this number. Many are about so long that a length, or the size of a record, needs more bytes.
fn text(name: u8) -> String {
    static COLLIDING: OnceLock<Vec<String>> = OnceLock::new();
    let plain = |name: u8| format!("{name} {}", "x".repeat([0, 3, 240, 250, 2020][usize::from(name) % 5]));
    if !COLLIDE.get() {
        return plain(name);
    }
    let collide = |name| {
        let mut names = (0..).map(|n| format!("{} {n}", plain(name)));
        names.find(|name| stored_hash(name.as_bytes()).is_multiple_of(512)).unwrap()
    };
    COLLIDING.get_or_init(|| (0..=u8::MAX).map(collide).collect())[usize::from(name)].clone()
}

fn number(name: &[u8]) -> u8 {
    let name = str::from_utf8(name).unwrap();
    let number = name.split_once(' ').unwrap().0.parse().unwrap();
    assert_eq!(name, text(number));
    number
}

fn place(value: u16) -> Place {
    Place::of_id(value.into()).unwrap()
}

fn value(place: Place) -> u16 {
    place.id().try_into().unwrap()
}

#[derive(Debug, Clone)]
enum Operation {
    Set(u8, u16),
    SetMany(Vec<(u8, u16)>),
    AddMany(Vec<u8>),
    InsertNew(u8, u16),
    Remove(u8),
    RemoveEnd(bool),
    MoveToEnd(u8, bool),
    Clear,
    Copy,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::*;
    let one = prop_oneof![
        12 => (any::<u8>(), any::<u16>()).prop_map(|(name, value)| Set(name, value)),
        2 => prop::collection::vec((any::<u8>(), any::<u16>()), 0..150).prop_map(SetMany),
        2 => prop::collection::vec(any::<u8>(), 0..150).prop_map(AddMany),
        2 => (any::<u8>(), any::<u16>()).prop_map(|(name, value)| InsertNew(name, value)),
        16 => any::<u8>().prop_map(Remove),
        12 => any::<bool>().prop_map(RemoveEnd),
        8 => (any::<u8>(), any::<bool>()).prop_map(|(name, last)| MoveToEnd(name, last)),
        1 => Just(Clear),
        1 => Just(Copy),
    ];
    prop::collection::vec(one, 1..200)
}

/// The model: what an ordered map is, with nothing clever about it.
#[derive(Debug, Default)]
struct Model(Vec<(u8, u16)>);

impl Model {
    fn position(&self, name: u8) -> Option<usize> {
        self.0.iter().position(|(one, _)| *one == name)
    }

    fn get(&self, name: u8) -> Option<u16> {
        self.position(name).map(|at| self.0[at].1)
    }

    fn set(&mut self, name: u8, value: u16) {
        match self.position(name) {
            Some(at) => self.0[at].1 = value,
            None => self.0.push((name, value)),
        }
    }

    fn remove(&mut self, name: u8) -> Option<(u8, u16)> {
        self.position(name).map(|at| self.0.remove(at))
    }
}

fn apply(table: &mut NameTable, model: &mut Model, operation: &Operation) {
    match operation {
        Operation::Set(name, value) => {
            let mut old = None;
            let choose = |held: Option<Place>| {
                old = held.map(self::value);
                place(*value)
            };
            table.set(&text(*name), choose).unwrap();
            assert_eq!(old, model.get(*name));
            model.set(*name, *value);
        }
        Operation::SetMany(entries) => {
            let names: Vec<_> = entries.iter().map(|(name, _)| text(*name)).collect();
            let mut numbers = Vec::new();
            let choose = |at: usize, _| {
                numbers.push(at);
                place(entries[at].1)
            };
            table.set_many(&names, choose).unwrap();
            assert!(numbers.into_iter().eq(0..entries.len()));
            for (name, value) in entries {
                model.set(*name, *value);
            }
        }
        Operation::AddMany(names) => {
            let texts: Vec<_> = names.iter().map(|name| text(*name)).collect();
            let (mut next, mut found) = (1000, Vec::new());
            let choose = |_, held: Option<Place>| {
                let chosen = held.unwrap_or_else(|| {
                    next += 1;
                    place(next)
                });
                found.push(value(chosen));
                chosen
            };
            table.set_many(&texts, choose).unwrap();
            let mut next = 1000;
            for (name, found) in names.iter().zip(found) {
                if model.get(*name).is_none() {
                    next += 1;
                    model.set(*name, next);
                }
                assert_eq!(model.get(*name), Some(found));
            }
        }
        Operation::InsertNew(name, value) => {
            let is_new = model.get(*name).is_none();
            assert_eq!(table.insert_new(&text(*name), place(*value)), Ok(is_new));
            if is_new {
                model.set(*name, *value);
            }
        }
        Operation::Remove(name) => {
            assert_eq!(table.remove(&text(*name)).map(value), model.remove(*name).map(|(_, value)| value));
        }
        Operation::RemoveEnd(last) => {
            let end = if *last { model.0.last() } else { model.0.first() }.copied();
            assert_eq!(table.remove_end(*last).map(value), end.map(|(_, value)| value));
            end.map(|(name, _)| model.remove(name));
        }
        Operation::MoveToEnd(name, last) => {
            let moved = model.remove(*name);
            assert_eq!(table.move_to_end(&text(*name), *last), Ok(moved.is_some()));
            let at = if *last { model.0.len() } else { 0 };
            model.0.splice(at..at, moved);
        }
        Operation::Clear => {
            table.clear();
            model.0.clear();
        }
        Operation::Copy => *table = table.copy().unwrap(),
    }
}

/// Order, look-up and invariants all at once.
fn compare(table: &NameTable, model: &Model) {
    table.check();
    assert_eq!((table.len(), table.is_empty()), (model.0.len(), model.0.is_empty()));
    assert_eq!(table.iter().len(), model.0.len());
    assert!(table.iter().map(|(name, place)| (number(name), value(place))).eq(model.0.iter().copied()));
    assert_eq!(table.first().map(|entry| number(entry.name)), model.0.first().map(|(name, _)| *name));
    assert_eq!(table.last().map(|entry| number(entry.name)), model.0.last().map(|(name, _)| *name));
    let names: Vec<_> = (0..=u8::MAX).map(text).collect();
    let expected: Vec<_> = (0..=u8::MAX).map(|name| model.get(name)).collect();
    let mut found = Vec::new();
    table.get_many(&names, |place| found.push(place.map(value)));
    assert_eq!(found, expected);
    for (name, expected) in names.iter().zip(expected) {
        assert_eq!(table.get(name).map(value), expected);
        assert_eq!(table.contains(name), expected.is_some());
    }
    let (mut walked, mut position) = (Vec::new(), 0);
    while let Some(entry) = table.next(position) {
        assert_eq!(table.place_at(entry.position), Some(entry.place));
        walked.push((number(entry.name), value(entry.place)));
        position = entry.next;
    }
    assert_eq!(walked, model.0);
    position = table.positions();
    while let Some(entry) = table.previous(position) {
        assert_eq!(walked.pop(), Some((number(entry.name), value(entry.place))));
        position = entry.next;
    }
    assert!(walked.is_empty());
}

fn run(operations: &[Operation]) {
    let (mut table, mut model) = (NameTable::default(), Model::default());
    let order = |table: &NameTable| table.iter().map(|(name, _)| number(name)).collect::<Vec<_>>();
    for operation in operations {
        let (before, generation, positions) = (order(&table), table.generation(), table.positions());
        apply(&mut table, &mut model, operation);
        compare(&table, &model);
        if !matches!(operation, Operation::Copy) && (order(&table) != before || table.positions() != positions) {
            assert_ne!(table.generation(), generation, "{operation:?} changed the order unnoticed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_operations_do_what_the_model_does(operations in operations()) {
        COLLIDE.set(false);
        run(&operations);
    }

    #[test]
    fn any_operations_do_what_the_model_does_when_all_searches_begin_at_one_word(operations in operations()) {
        COLLIDE.set(true);
        run(&operations);
        COLLIDE.set(false);
    }
}

fn name(n: u64) -> String {
    format!("name.{n}")
}

fn numbered(count: u64) -> NameTable {
    let entries = (0..count).map(|n| (name(n), Place::of_id(n).unwrap()));
    NameTable::of_distinct(entries).unwrap().ok().unwrap()
}

fn ids(table: &NameTable) -> Vec<u64> {
    table.iter().map(|(_, place)| place.id()).collect()
}

#[test]
fn a_table_used_as_a_queue_keeps_its_size_and_its_order() {
    let mut table = numbered(100);
    let bytes = table.allocated_bytes();
    for n in 100..100_000 {
        table.set(&name(n), |_| Place::of_id(n).unwrap()).unwrap();
        assert_eq!(table.remove_end(false).unwrap().id(), n - 100);
    }
    table.check();
    assert!(table.allocated_bytes() <= 8 * bytes, "{bytes} bytes, then {}", table.allocated_bytes());
}

#[test]
fn a_drained_table_gives_its_memory_back() {
    for last in [false, true] {
        let mut table = numbered(100_000);
        let bytes = table.allocated_bytes();
        while table.len() > 100 {
            table.remove_end(last);
        }
        table.check();
        assert!(table.allocated_bytes() < bytes / 50, "{} bytes of {bytes} are left", table.allocated_bytes());
    }
}

#[test]
fn a_panic_while_a_place_is_chosen_leaves_the_table_as_it_was() {
    let mut table = numbered(3);
    for asked in [name(1), name(7)] {
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.set(&asked, |_| panic!())));
        assert!(made.is_err());
        table.check();
        assert_eq!(ids(&table), [0, 1, 2]);
    }
}

#[test]
fn ids_may_wrap_around() {
    // Popping at the front moves the base on; moving to the front moves it back, below zero.
    let mut table = numbered(10);
    for n in [7, 3, 9, 0, 5] {
        assert_eq!(table.move_to_end(&name(n), false), Ok(true));
        table.check();
    }
    assert_eq!(ids(&table), [5, 0, 9, 3, 7, 1, 2, 4, 6, 8]);
    assert!((0..10).all(|n| table.get(&name(n)).unwrap().id() == n));
}

#[test]
fn a_table_of_distinct_names_is_that_of_insertions_whether_it_has_one_region_of_words_or_many() {
    for count in [0, 1, 31, 5_000, 300_000] {
        let made = numbered(count);
        made.check();
        let mut inserted = NameTable::default();
        let names: Vec<_> = (0..count).map(name).collect();
        inserted.set_many(&names, |at, _| Place::of_id(at as u64).unwrap()).unwrap();
        inserted.check();
        assert!(made.iter().eq(inserted.iter()));
        assert_eq!(made.generation(), inserted.generation());
        assert!((0..count).all(|n| made.get(&name(n)).unwrap().id() == n));
    }
}
