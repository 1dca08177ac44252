//! `RowIndex` against a vector of names and rows that is searched from end to end.
//!
//! The bugs that this hunts: a row that two names have, or that is lost; a name whose row changes unnoticed; a plan that
//! is committed to an index that has changed since; a refusal that has changed something; rows given in an order that
//! depends on more than which are free. Names are few, and in one run all searches begin at one word.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use pdrs_core::names::table::stored_hash;
use pdrs_core::{Error, OfTable, Place, Places, Plan, Refusal, RowIndex};
use proptest::prelude::*;

thread_local! {
    /// Whether all searches of a run begin at the same word.
    static COLLIDE: Cell<bool> = const { Cell::new(false) };
}

/// A name with this number. Many are about so long that a length, or the size of a record, needs more bytes.
fn query(name: u8) -> String {
    static COLLIDING: OnceLock<Vec<String>> = OnceLock::new();
    let long = [0, 3, 236, 300, 900, 4000];
    let lengths = || long.into_iter().chain(247..253).chain(2011..2030).cycle();
    let plain = |name: u8| format!("{name} {}", "x".repeat(lengths().nth(name.into()).unwrap()));
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
    assert_eq!(name, query(number));
    number
}

#[derive(Debug, Clone)]
enum Operation {
    AddTable,
    PopTable,
    Insert(Vec<(u8, usize)>),
    InsertOne(u8, usize),
    Remove(Vec<u8>),
    RemoveOne(u8),
    RemoveEnd(bool),
    Clear,
    /// Names go to tables by their number times this; rows count down from the end, with some free ones in front.
    Places(usize, u64),
    Rename(u8, u8),
    MoveToEnd(u8, bool),
    NoteSet,
    Copy,
    Rebuild,
}

fn key() -> impl Strategy<Value = u8> {
    0_u8..48
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::*;
    let one = prop_oneof![
        3 => Just(AddTable),
        1 => Just(PopTable),
        8 => prop::collection::vec((key(), 0_usize..5), 0..12).prop_map(Insert),
        4 => (key(), 0_usize..5).prop_map(|(name, table)| InsertOne(name, table)),
        6 => prop::collection::vec(key(), 0..4).prop_map(Remove),
        4 => key().prop_map(RemoveOne),
        2 => any::<bool>().prop_map(RemoveEnd),
        1 => Just(Clear),
        2 => (0_usize..5, 0_u64..3).prop_map(|(factor, spare)| Places(factor, spare)),
        2 => (key(), key()).prop_map(|(old, new)| Rename(old, new)),
        2 => (key(), any::<bool>()).prop_map(|(name, last)| MoveToEnd(name, last)),
        1 => Just(NoteSet),
        1 => Just(Copy),
        1 => Just(Rebuild),
    ];
    prop::collection::vec(one, 1..80)
}

type At = (usize, u64);

/// The model: nothing clever about it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    entries: Vec<(u8, At)>,
    used: Vec<u64>,
}

impl Model {
    fn position(&self, name: u8) -> Option<usize> {
        self.entries.iter().position(|(one, _)| *one == name)
    }

    fn place(&self, name: u8) -> Option<At> {
        self.position(name).map(|at| self.entries[at].1)
    }

    fn free(&self, table: usize) -> Vec<u64> {
        (0..self.used[table]).filter(|row| self.entries.iter().all(|(_, at)| *at != (table, *row))).collect()
    }

    /// Inserts distinct names; the place of each, and the places that are lost.
    fn insert(&mut self, names: &[(u8, usize)]) -> (Vec<At>, Vec<usize>, Vec<At>) {
        let (mut places, mut new, mut freed) = (Vec::new(), Vec::new(), Vec::new());
        let mut next: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for (at, &(name, table)) in names.iter().enumerate() {
            let held = self.place(name);
            if let Some(place) = held.filter(|(of, _)| *of == table) {
                places.push(place);
                continue;
            }
            // Rows that names lose in this very change are not given yet.
            let free = next.entry(table).or_insert_with(|| {
                let mut rows = self.free(table);
                rows.retain(|row| !freed.contains(&(table, *row)));
                rows.reverse();
                rows
            });
            let row = free.pop().unwrap_or_else(|| {
                self.used[table] += 1;
                self.used[table] - 1
            });
            places.push((table, row));
            new.push(at);
            match self.position(name) {
                Some(at) => self.entries[at].1 = (table, row),
                None => self.entries.push((name, (table, row))),
            }
            freed.extend(held);
        }
        (places, new, freed)
    }
}

fn plain(places: &Places) -> Vec<At> {
    places.iter().map(|place| place.map(|place| (place.table(), place.row())).unwrap()).collect()
}

fn is_distinct(names: &[u8]) -> bool {
    (1..names.len()).all(|at| !names[..at].contains(&names[at]))
}

/// Commits a plan; first makes sure that it is refused by another index, and by one that has changed since.
fn commit(index: &mut RowIndex, mut plan: Plan) {
    let mut other = index.copy().unwrap();
    assert!(!other.commit(&mut plan));
    assert!(index.commit(&mut plan));
    assert!(!index.commit(&mut plan), "it is committed once");
}

fn apply(index: &mut RowIndex, model: &mut Model, operation: Operation) {
    match operation {
        Operation::AddTable => {
            assert_eq!(index.add_table(), Ok(model.used.len()));
            model.used.push(0);
        }
        Operation::PopTable => {
            let table = model.used.len().wrapping_sub(1);
            let can_go = !model.used.is_empty() && model.entries.iter().all(|(_, at)| at.0 != table);
            assert_eq!(index.pop_table().map(|rows| rows.used()), model.used.last().copied().filter(|_| can_go));
            model.used.truncate(table.wrapping_add(usize::from(!can_go)));
        }
        Operation::Insert(names) => insert(index, model, &names),
        Operation::InsertOne(name, table) => {
            let Some((row, is_reused)) = index.next_row(table, u64::MAX) else {
                return assert!(table >= model.used.len());
            };
            assert_eq!(is_reused, row < model.used[table]);
            assert_eq!(index.next_row(table, row), None, "the table must grow before");
            assert!(!index.insert_one(&query(name), table, row + 1).unwrap());
            let is_new = model.place(name).is_none();
            assert_eq!(index.insert_one(&query(name), table, row), Ok(is_new));
            if is_new {
                assert_eq!(model.insert(&[(name, table)]).0, [(table, row)]);
            }
        }
        Operation::Remove(names) => remove(index, model, &names),
        Operation::RemoveOne(name) => {
            let place = model.place(name).unwrap_or_default();
            let other = Place::new(place.0 + 1, place.1).unwrap();
            assert_eq!(index.remove_one(&query(name), other), Ok(false));
            let removed = index.remove_one(&query(name), Place::new(place.0, place.1).unwrap());
            assert_eq!(removed, Ok(model.position(name).map(|at| model.entries.remove(at)).is_some()));
        }
        Operation::RemoveEnd(last) => {
            let at = if last { model.entries.len().wrapping_sub(1) } else { 0 };
            let Some(&(_, (table, row))) = model.entries.get(at) else {
                return assert_eq!(index.remove_end(last, Place::new(0, 0).unwrap()), Ok(false));
            };
            assert_eq!(index.remove_end(last, Place::new(table, row + 1).unwrap()), Ok(false));
            assert_eq!(index.remove_end(last, Place::new(table, row).unwrap()), Ok(true));
            model.entries.remove(at);
        }
        Operation::Clear => {
            let plan = index.plan_clear().unwrap();
            assert!(plain(plan.freed()).into_iter().eq(model.entries.iter().map(|(_, at)| *at)));
            commit(index, plan);
            model.entries.clear();
        }
        Operation::Places(factor, spare) => replace(index, model, factor, spare),
        Operation::Rename(old, new) => match index.plan_rename(&query(old), &query(new)) {
            Err(Refusal::Missing { at }) => assert!(at == 0 && model.position(old).is_none()),
            Err(refusal) => {
                assert_eq!(refusal, Refusal::Present);
                assert!(model.position(new).is_some());
            }
            Ok(plan) => {
                commit(index, plan);
                let at = model.position(old).unwrap();
                model.entries[at].0 = new;
            }
        },
        Operation::MoveToEnd(name, last) => {
            let Some(at) = model.position(name) else {
                let refusal = index.plan_move_to_end(&query(name), last).err();
                return assert_eq!(refusal, Some(Refusal::Missing { at: 0 }));
            };
            let plan = index.plan_move_to_end(&query(name), last).unwrap();
            commit(index, plan);
            let entry = model.entries.remove(at);
            model.entries.insert(if last { model.entries.len() } else { 0 }, entry);
        }
        Operation::NoteSet => index.note_set(),
        Operation::Copy => *index = index.copy().unwrap(),
        Operation::Rebuild => {
            let names = model.entries.iter().map(|(name, _)| query(*name));
            *index = RowIndex::of(names, &index.places().unwrap(), &model.used).unwrap();
        }
    }
}

fn insert(index: &mut RowIndex, model: &mut Model, listed: &[(u8, usize)]) {
    let keys: Vec<_> = listed.iter().map(|(name, _)| query(*name)).collect();
    let tables: Vec<_> = listed.iter().map(|(_, table)| table.cast_signed() as i64).collect();
    let names: Vec<_> = listed.iter().map(|(name, _)| *name).collect();
    let planned = index.plan_insert(keys, &tables);
    if let Some(table) = tables.iter().find(|table| **table >= model.used.len().cast_signed() as i64) {
        return assert_eq!(planned.err(), Some(Refusal::NoTable(*table)));
    }
    if !is_distinct(&names) {
        let Some(Refusal::Repeated { at }) = planned.err() else { panic!("a name is listed twice") };
        return assert!(names[..at].contains(&names[at]));
    }
    let plan = planned.unwrap();
    let before = model.clone();
    compare(index, &before);
    let (places, new, freed) = model.insert(listed);
    assert_eq!(plain(plan.places()), places);
    assert!(plan.new_rows().eq(new));
    assert_eq!(plain(plan.freed()), freed);
    commit(index, plan);
}

fn remove(index: &mut RowIndex, model: &mut Model, names: &[u8]) {
    let planned = index.plan_remove(&names.iter().map(|name| query(*name)).collect::<Vec<_>>());
    if let Some(at) = names.iter().position(|name| model.position(*name).is_none()) {
        return assert_eq!(planned.err(), Some(Refusal::Missing { at }));
    }
    if !is_distinct(names) {
        let first = (1..names.len()).find(|at| names[..*at].contains(&names[*at])).unwrap();
        return assert_eq!(planned.err(), Some(Refusal::Repeated { at: first }));
    }
    let plan = planned.unwrap();
    assert_eq!(plain(plan.freed()), names.iter().map(|name| model.place(*name).unwrap()).collect::<Vec<_>>());
    commit(index, plan);
    model.entries.retain(|(name, _)| !names.contains(name));
}

fn replace(index: &mut RowIndex, model: &mut Model, factor: usize, spare: u64) {
    let count = model.used.len().max(1);
    let mut used = vec![spare; model.used.len()];
    let mut places: Vec<At> = Vec::new();
    for (number, _) in model.entries.iter().enumerate().rev() {
        let table = number * factor % count;
        places.push((table, used[table]));
        used[table] += 1;
    }
    places.reverse();
    let packed: Vec<_> = places.iter().map(|(table, row)| Place::new(*table, *row)).collect();
    let plan = index.plan_places(Arc::new(packed.clone().into()), &used).unwrap();
    let before: Vec<At> = model.entries.iter().map(|(_, at)| *at).collect();
    for (entry, place) in model.entries.iter_mut().zip(&places) {
        entry.1 = *place;
    }
    // What is wrong is refused: one too few, one missing, one outside, one twice, a table too many.
    let mut wrong = vec![packed[..packed.len().saturating_sub(1)].to_vec()];
    for other in [None, Place::new(count, 0), Place::new(0, 1 << 20), packed.last().copied().flatten()] {
        let mut one = packed.clone();
        if let Some(first) = one.first_mut().filter(|first| **first != other) {
            *first = other;
            wrong.push(one);
        }
    }
    for places in wrong.into_iter().filter(|_| !packed.is_empty()) {
        let refusal = index.plan_places(Arc::new(places.into()), &used).err().unwrap();
        assert!(matches!(refusal, Refusal::Place { .. } | Refusal::Lengths { .. }), "{refusal:?}");
    }
    let more: Vec<u64> = used.iter().copied().chain([0]).collect();
    let refusal = index.plan_places(plan.places().clone(), &more).err();
    assert_eq!(refusal, Some(Refusal::Tables { tables: used.len(), used: more.len() }));
    model.used = used;
    let is_free = |at: &At| model.free(at.0).contains(&at.1);
    assert_eq!(plain(plan.freed()), before.into_iter().filter(is_free).collect::<Vec<_>>());
    commit(index, plan);
}

/// Order, places, free rows and invariants all at once.
fn compare(index: &RowIndex, model: &Model) {
    index.check();
    let entries = index.names().iter().map(|(name, place)| (number(name), (place.table(), place.row())));
    assert_eq!(entries.collect::<Vec<_>>(), model.entries);
    assert_eq!(plain(&index.places().unwrap()), model.entries.iter().map(|(_, at)| *at).collect::<Vec<_>>());
    for name in 0..=u8::MAX {
        let place = index.names().get(&query(name)).map(|place| (place.table(), place.row()));
        assert_eq!(place, model.place(name));
    }
    assert_eq!(index.tables().len(), model.used.len());
    for (table, rows) in index.tables().iter().enumerate() {
        assert_eq!(rows.used(), model.used[table]);
        assert_eq!(rows.free().collect::<Vec<_>>(), model.free(table));
        let all: Vec<u64> = (0..rows.used()).rev().collect();
        let table_number = table.cast_signed() as i64;
        let named = index.names_of(table_number, all.iter().copied()).unwrap();
        for (row, name) in all.iter().zip(named) {
            let expected = model.entries.iter().find(|(_, at)| *at == (table, *row));
            assert_eq!(name.map(number), expected.map(|(name, _)| *name));
        }
        assert_eq!(index.names_of(table_number, [rows.used()].into_iter()).err(), Some(Refusal::Place { at: 0 }));
    }
    for table in [-1, model.used.len().cast_signed() as i64] {
        assert_eq!(index.names_of(table, [].into_iter()).err(), Some(Refusal::NoTable(table)));
    }
}

fn run(operations: Vec<Operation>) {
    let (mut index, mut model) = (RowIndex::new(), Model::default());
    for operation in operations {
        let before = model.clone();
        let (moves, inserts, generation) = (index.moves(), index.inserts(), index.names().generation());
        apply(&mut index, &mut model, operation.clone());
        compare(&index, &model);
        let has_moved = before.entries.iter().any(|(name, at)| model.place(*name) != Some(*at));
        assert!(!has_moved || index.moves() != moves, "{operation:?} moved rows unnoticed");
        let order = |model: &Model| model.entries.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let is_same = matches!(operation, Operation::Copy | Operation::Rebuild) || order(&before) == order(&model);
        assert!(is_same || index.names().generation() != generation, "{operation:?} changed the order unnoticed");
        let mut kept = order(&before);
        kept.retain(|name| model.position(*name).is_some());
        assert!(kept == order(&model) || index.inserts() != inserts, "{operation:?} added names unnoticed");
        if matches!(operation, Operation::NoteSet) {
            assert!(index.inserts() != inserts && index.moves() == moves);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_operations_do_what_the_model_does(operations in operations()) {
        run(operations);
    }

    #[test]
    fn places_are_sorted_by_table(listed in prop::collection::vec((0_usize..4, any::<bool>()), 0..60)) {
        let numbers = [0, 3, 70_000, pdrs_core::MAX_TABLES - 1];
        let place = |at: usize, (table, is_there): (usize, bool)| {
            is_there.then(|| Place::new(numbers[table], at as u64).unwrap())
        };
        let listed: Vec<_> = listed.into_iter().enumerate().map(|(at, one)| place(at, one)).collect();
        let mut expected: BTreeMap<usize, OfTable> = BTreeMap::new();
        for (at, place) in (0..).zip(&listed) {
            let Some(place) = place else { continue };
            let new = || OfTable { table: place.table(), positions: Vec::new(), rows: Vec::new() };
            let part = expected.entry(place.table()).or_insert_with(new);
            part.positions.push(at);
            part.rows.push(place.row().cast_signed());
        }
        let places = Places::from(listed.clone());
        prop_assert_eq!(places.by_table().unwrap(), expected.into_values().collect::<Vec<_>>());
        let present: Vec<_> = listed.iter().copied().flatten().collect();
        prop_assert_eq!(places.is_complete(), present.len() == listed.len());
        let is_one = present.len() == listed.len() && present.iter().all(|place| place.table() == present[0].table());
        prop_assert_eq!(places.only_table(), present.first().filter(|_| is_one).map(|place| place.table()));
        prop_assert_eq!(places.missing().unwrap().len() + places.found().unwrap().len(), listed.len());
        let numbers = places.tables().unwrap().into_iter().zip(places.rows().unwrap());
        for ((table, row), (at, place)) in numbers.zip(listed.iter().enumerate()) {
            let expected = place.map_or((-1, -1), |place| (place.table().cast_signed() as i64, at.cast_signed() as i64));
            prop_assert_eq!((table, row), expected);
        }
    }
}

fn names(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| format!("name.{n}")).collect()
}

#[test]
fn many_names_are_inserted_moved_and_removed_as_few_are() {
    let mut index = RowIndex::new();
    index.add_table().unwrap();
    index.add_table().unwrap();
    let mut plan = index.plan_insert(names(0..70_000), &vec![0; 70_000]).unwrap();
    assert!(index.commit(&mut plan));
    let tables: Vec<i64> = (0..70_000).map(|n| n % 2).collect();
    let mut plan = index.plan_insert(names(35_000..105_000), &tables).unwrap();
    assert_eq!((plan.new_rows().len(), plan.freed().len()), (52_500, 17_500));
    assert!(index.commit(&mut plan));
    index.check();
    assert!(index.names().iter().zip(names(0..105_000)).all(|((name, _), expected)| *name == *expected.as_bytes()));
    let mut plan = index.plan_remove(&names(10..100_000)).unwrap();
    assert!(index.commit(&mut plan));
    index.check();
    assert_eq!(index.names().len(), 5_010);
}

#[test]
fn names_that_all_become_longer_take_the_memory_of_longer_names() {
    let count = 20_000;
    let longer = |name: &str| format!("a.longer.prefix.of.many.names.{name}");
    let mut index = RowIndex::of_one_table(names(0..count).into_iter()).unwrap();
    for name in names(0..count) {
        let mut plan = index.plan_rename(&name, &longer(&name)).unwrap();
        assert!(index.commit(&mut plan));
    }
    index.check();
    for (name, row) in names(0..count).iter().zip(0..) {
        assert_eq!((index.names().get(name), index.names().get(&longer(name))), (None, Place::new(0, row)));
    }
    let made = RowIndex::of_one_table(names(0..count).iter().map(|name| longer(name))).unwrap();
    assert!(index.names().iter().eq(made.names().iter()));
    assert!(index.names().allocated_bytes() < 3 * made.names().allocated_bytes());
    // To either end and back, over records that were left behind.
    for last in [false, true] {
        for name in names(0..count / 2) {
            let mut plan = index.plan_move_to_end(&longer(&name), last).unwrap();
            assert!(index.commit(&mut plan));
        }
        index.check();
    }
    let order = names(count / 2..count).into_iter().chain(names(0..count / 2));
    assert!(index.names().iter().map(|(name, _)| name.to_vec()).eq(order.map(|name| longer(&name).into_bytes())));
}

#[test]
fn a_plan_holds_while_others_make_more_room_and_no_longer_when_one_is_committed() {
    let mut index = RowIndex::of_one_table(names(0..100).into_iter()).unwrap();
    let mut small = index.plan_insert(names(90..150), &[0; 60]).unwrap();
    let mut large = index.plan_insert(names(100..9_000), &vec![0; 8_900]).unwrap();
    let mut removal = index.plan_remove(&names(3..5)).unwrap();
    index.check();
    assert!(index.commit(&mut small));
    index.check();
    assert!(index.names().iter().zip(names(0..150)).all(|((name, _), expected)| *name == *expected.as_bytes()));
    assert!(names(0..150).iter().all(|name| index.names().contains(name)));
    assert!(!index.commit(&mut large) && !index.commit(&mut removal));
    index.check();
}

#[test]
fn names_that_are_the_first_again_change_what_iterators_compare() {
    let mut index = RowIndex::new();
    index.add_table().unwrap();
    for count in 0..20 {
        let generation = index.names().generation();
        let mut plan = index.plan_insert(names(0..count), &vec![0; count as usize]).unwrap();
        assert!(index.commit(&mut plan) && (index.names().generation() != generation || count == 0));
        let mut plan = index.plan_clear().unwrap();
        assert!(index.commit(&mut plan));
    }
}

#[test]
fn names_with_the_same_hash_are_told_apart() {
    let mut seen = HashMap::new();
    let mut pairs = Vec::new();
    for name in names(0..400_000) {
        if let Some(other) = seen.insert(stored_hash(name.as_bytes()), name.clone()) {
            pairs.push([other, name]);
        }
    }
    assert!(pairs.len() > 4, "of so many names some have the same 32 bits");
    let mut index = RowIndex::of_one_table(pairs.iter().map(|pair| &pair[0])).unwrap();
    for ([there, missing], row) in pairs.iter().zip(0..) {
        assert_eq!((index.names().get(there), index.names().get(missing)), (Place::new(0, row), None));
    }
    let [added, removed] = [1, 0].map(|of| pairs.iter().map(|pair| pair[of].clone()).collect::<Vec<_>>());
    let mut plan = index.plan_insert(added.clone(), &vec![0; pairs.len()]).unwrap();
    assert!(index.commit(&mut plan));
    index.check();
    let mut plan = index.plan_remove(&removed).unwrap();
    assert!(index.commit(&mut plan));
    index.check();
    let mut found = Vec::new();
    index.names().get_many(&added, |place| found.push(place.map(Place::row)));
    assert!(found.into_iter().eq((pairs.len() as u64..2 * pairs.len() as u64).map(Some)));
    assert!(!removed.iter().any(|name| index.names().contains(name)));
}

#[test]
fn an_index_of_one_table_has_its_names_in_the_order_of_rows() {
    let mut index = RowIndex::of_one_table(names(0..1_000).into_iter()).unwrap();
    index.check();
    assert_eq!(index.names().get("name.7"), Some(Place::new(0, 7).unwrap()));
    assert_eq!(index.next_row(0, 1_001), Some((1_000, false)));
    let repeated = names(0..9).into_iter().chain(names(3..5));
    assert_eq!(RowIndex::of_one_table(repeated).err(), Some(Refusal::Repeated { at: 9 }));
    index.reserve_one("other").unwrap();
    assert!(index.insert_one("other", 0, 1_000).unwrap());
}

#[test]
fn what_no_index_can_have_is_refused() {
    let places = Places::default();
    let refused = RowIndex::of([""; 0].into_iter(), &places, &[1 << 40]).err().unwrap();
    assert!(matches!(refused, Refusal::Limit(Error::Rows { wanted: 1_099_511_627_776, .. })), "{refused:?}");
    let tables = vec![0; pdrs_core::MAX_TABLES + 1];
    let refused = RowIndex::of([""; 0].into_iter(), &places, &tables).err().unwrap();
    assert_eq!(refused, Refusal::Limit(Error::Tables { limit: pdrs_core::MAX_TABLES }));
    let mut full = RowIndex::of([""; 0].into_iter(), &places, &tables[1..]).unwrap();
    assert_eq!(full.add_table(), Err(Error::Tables { limit: pdrs_core::MAX_TABLES }));
    assert_eq!(full.plan_insert(names(0..1), &[]).err(), Some(Refusal::Lengths { names: 1, places: 0 }));
}

#[test]
fn a_place_is_a_table_and_a_row_in_one_word() {
    assert_eq!(size_of::<Option<Place>>(), 8);
    let last = Place::new(pdrs_core::MAX_TABLES - 1, (1 << 40) - 1).unwrap();
    assert_eq!(
        (last.table(), last.row(), Place::of_id(last.id())),
        (pdrs_core::MAX_TABLES - 1, (1 << 40) - 1, Some(last))
    );
    assert_eq!(Place::new(pdrs_core::MAX_TABLES, 0), None);
    assert_eq!(Place::new(0, 1 << 40), None);
    assert_eq!(Place::of_id(1 << 63), None);
    assert_eq!(format!("{:?}", Place::new(2, 5).unwrap()), "Place(2, 5)");
}
