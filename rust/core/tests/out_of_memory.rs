//! What happens where memory ends: an error, and everything as it was.
//!
//! The bugs that this hunts: an allocation that ends the process, because the standard library knows no error for it; a
//! map that has lost or gained an entry when it says that there is no memory.
#![allow(unsafe_code, missing_docs)] // An allocator is unsafe by its trait.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;

use pdrs_core::names::codec::{self, Encoder, Header, Table};
use pdrs_core::names::delta;
use pdrs_core::names::table::NameTable;
use pdrs_core::safetensors::{self, Dtype, Fault, HeaderWriter, IndexError, ShardIndex, Stack};
use pdrs_core::slab::disjoint::{Lines, Stretches};
use pdrs_core::slab::layout;
use pdrs_core::{Error, Hashed, Matches, OrderedSet, Place, Refusal, RowIndex, Rows};

/// Refuses blocks of some size to a thread, from a number of them on.
struct Limited;

#[global_allocator]
static ALLOCATOR: Limited = Limited;

thread_local! {
    /// How many large blocks there are still to be had.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Smaller blocks are always to be had: errors need some.
const LARGE: usize = 2048;

fn is_refused(size: usize) -> bool {
    size >= LARGE
        && LEFT.with(|left| {
            let refused = left.get() == 0;
            left.set(left.get().saturating_sub(1));
            refused
        })
}

// SAFETY: all calls are handed on to the system's allocator as they came, or refused.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        if is_refused(layout.size()) { ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Smaller than before, there is always room for it.
        let refused = size > layout.size() && is_refused(size);
        // SAFETY: as the caller promises.
        if refused { ptr::null_mut() } else { unsafe { System.realloc(block, layout, size) } }
    }
}

/// Does something with memory for no large block, then for one, and so on until it succeeds; how often it failed.
///
/// Whoever ends the process instead of failing ends this test.
fn at_every_limit<T, E>(mut work: impl FnMut() -> Result<T, E>, mut failed: impl FnMut(E)) -> (T, usize) {
    for limit in 0.. {
        LEFT.set(limit);
        let result = work();
        LEFT.set(usize::MAX);
        match result {
            Ok(done) => return (done, limit),
            Err(error) => failed(error),
        }
    }
    unreachable!("it succeeds with memory enough");
}

#[allow(clippy::needless_pass_by_value, reason = "as a function that is given an error")]
fn is_memory(error: Error) {
    assert_eq!(error, Error::Memory);
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("name.{number}")).collect()
}

/// So many names, each with its number as the id of its place.
fn numbered(names: &[String]) -> impl ExactSizeIterator<Item = (&String, Place)> {
    names.iter().enumerate().map(|(number, name)| (name, Place::of_id(number as u64).unwrap()))
}

fn table_of(count: usize) -> NameTable {
    NameTable::of_distinct(numbered(&names(count))).unwrap().ok().unwrap()
}

fn entries_of(table: &NameTable) -> Vec<(Vec<u8>, Place)> {
    table.iter().map(|(name, place)| (name.to_vec(), place)).collect()
}

#[test]
fn a_table_of_names_is_made_and_copied_whole_or_not_at_all() {
    let listed = names(3_000);
    let (table, failed) = at_every_limit(|| NameTable::of_distinct(numbered(&listed)), is_memory);
    let table = table.ok().unwrap();
    assert!(failed > 2 && table.len() == 3_000);
    let (copy, failed) = at_every_limit(|| table.copy(), is_memory);
    assert!(failed > 1 && entries_of(&copy) == entries_of(&table));
    let twice = [names(500), names(500)].concat();
    let (made, failed) = at_every_limit(|| NameTable::of_distinct(numbered(&twice)), is_memory);
    assert!(failed > 2 && made.is_err());
}

#[test]
fn a_table_of_names_stays_as_it_was_when_there_is_no_memory_for_more() {
    let mut table = table_of(1_000);
    table.remove("name.7").unwrap();
    let before = entries_of(&table);
    let added: Vec<String> = (0..3_000).map(|number| format!("other.{number}")).chain(names(9)).collect();
    let place = |at: usize| Place::of_id(at as u64).unwrap();
    for limit in 0..2 {
        LEFT.set(limit);
        let result = table.set_many(&added, |at, _| place(at));
        LEFT.set(usize::MAX);
        table.check();
        assert_eq!(result, Err(Error::Memory));
        assert_eq!(entries_of(&table), before);
    }
    assert_eq!(table.set_many(&added, |at, _| place(at)), Ok(()));
    assert_eq!(table.len(), 4_000);
    assert_eq!(table.get("name.8"), Some(place(3_008)));
}

#[test]
fn single_insertions_fail_without_a_trace_and_succeed_later() {
    let (mut table, mut set) = (NameTable::default(), OrderedSet::<Key>::new());
    let mut failed = [0, 0];
    for number in 0..5_000 {
        let (name, place) = (format!("name.{number}"), Place::of_id(number).unwrap());
        LEFT.set(0);
        let results = [table.set(&name, |_| place), set.insert(Key(number)).map(drop)];
        LEFT.set(usize::MAX);
        if results[0] == Err(Error::Memory) {
            failed[0] += 1;
            assert!(table.len() as u64 == number && !table.contains(&name));
            assert_eq!(table.set(&name, |_| place), Ok(()));
        }
        if results[1] == Err(Error::Memory) {
            failed[1] += 1;
            assert!(set.len() as u64 == number && !set.contains(&Key(number)));
            assert_eq!(set.insert(Key(number)), Ok(true));
        }
    }
    table.check();
    set.check();
    assert!(failed.into_iter().all(|failed| failed > 10) && table.len() == 5_000 && set.len() == 5_000);
}

#[test]
fn moves_to_an_end_fail_without_a_trace_and_succeed_later() {
    let mut table = table_of(5_000);
    let mut failed = 0;
    for name in names(5_000).iter().rev() {
        let (first, before) = (table.first().unwrap().place, table.generation());
        LEFT.set(0);
        let moved = table.move_to_end(name, false);
        LEFT.set(usize::MAX);
        if moved == Err(Error::Memory) {
            failed += 1;
            assert_eq!((table.first().unwrap().place, table.generation()), (first, before));
            assert_eq!(table.move_to_end(name, false), Ok(true));
        }
    }
    table.check();
    assert!(failed > 0);
    assert!(table.iter().map(|(_, place)| place.id()).eq(0..5_000));
}

#[test]
fn whatever_removes_needs_no_memory() {
    let (mut table, all) = (table_of(5_000), names(5_000));
    LEFT.set(0);
    for name in all.iter().filter(|name| !name.ends_with('3')) {
        assert!(table.remove(name.as_str()).is_some());
    }
    assert_eq!(table.iter().nth(7).map(|(name, _)| name), Some(&b"name.73"[..]));
    LEFT.set(usize::MAX);
    assert_eq!(table.len(), 500);
    // What was left behind goes with the next name that goes.
    assert!(table.remove("name.3").is_some());
    table.check();
    LEFT.set(0);
    while table.remove_end(false).is_some() && table.remove_end(true).is_some() {}
    LEFT.set(usize::MAX);
    table.check();
    assert!(table.is_empty());
}

/// A key of an ordered set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key(u64);

impl Hashed for Key {
    fn hash(&self) -> u32 {
        (self.0 as u32).wrapping_mul(0x9E37_79B9)
    }
}

impl Matches<Self> for Key {
    fn matches(&self, query: &Self) -> bool {
        self == query
    }
}

#[test]
fn an_ordered_set_is_filled_and_copied_whole_or_not_at_all_and_emptied_without_memory() {
    let mut set = OrderedSet::new();
    let ((), failed) = at_every_limit(|| set.insert_many((0..3_000_u32).map(|number| Key(number.into()))), is_memory);
    assert!(failed > 1 && set.len() == 3_000);
    let (copy, failed) = at_every_limit(|| set.map_keys(|key| Key(key.0)), is_memory);
    assert_eq!(failed, 2);
    assert!(copy.iter().eq(set.iter()));
    LEFT.set(0);
    for number in (0..3_000).filter(|number| number % 10 != 3) {
        assert!(set.remove(&Key(number)).is_some());
    }
    assert_eq!(set.iter().nth(7), Some(&Key(73)));
    while set.pop_first().is_some() && set.pop_last().is_some() {}
    LEFT.set(usize::MAX);
    set.check();
    assert!(set.is_empty());
}

#[test]
fn rows_come_back_without_memory_once_it_was_reserved() {
    let mut rows = Rows::full(1 << 20);
    let ((), failed) = at_every_limit(|| rows.reserve_free(), is_memory);
    assert!(failed > 0);
    LEFT.set(0);
    for row in (0..1 << 20).rev() {
        rows.give_back(row);
    }
    LEFT.set(usize::MAX);
    assert!(rows.is_empty());
    let (copy, failed) = at_every_limit(|| rows.copy(), is_memory);
    assert!(failed > 0 && copy == rows);
    let (made, failed) = at_every_limit(|| Rows::of_live(1 << 20, [5].into_iter()), is_memory);
    assert!(failed > 0 && made.unwrap().len() == 1);
}

fn index_of(count: usize) -> RowIndex {
    RowIndex::of_one_table(names(count).into_iter()).unwrap()
}

#[allow(clippy::needless_pass_by_value, reason = "as a function that is given an error")]
fn is_limit(refusal: Refusal) {
    assert_eq!(refusal, Refusal::Limit(Error::Memory));
}

/// Makes something with all memory that there is.
fn unlimited<T>(work: impl FnOnce() -> T) -> T {
    let limit = LEFT.replace(usize::MAX);
    let made = work();
    LEFT.set(limit);
    made
}

/// Some names are there, and some of these get a row of another table.
fn to_insert(count: usize) -> (Vec<String>, Vec<i64>) {
    unlimited(|| {
        (names(2 * count).split_off(count / 2), [0, 0, 1].into_iter().cycle().take(count + count / 2).collect())
    })
}

#[test]
fn plans_are_made_whole_or_not_at_all_and_are_committed_without_memory() {
    let mut index = index_of(3_000);
    index.add_table().unwrap();
    let unchanged = index.copy().unwrap();
    let insert = |index: &mut RowIndex| {
        let (names, tables) = to_insert(3_000);
        index.plan_insert(names, &tables)
    };
    let is_unchanged = |index: &RowIndex| {
        index.check();
        assert!(index.names().iter().eq(unchanged.names().iter()) && index.tables() == unchanged.tables());
    };
    let (mut plan, failed) = at_every_limit(|| insert(&mut index), is_limit);
    assert!(failed > 6, "failed {failed} times");
    is_unchanged(&index);
    LEFT.set(0);
    assert!(index.commit(&mut plan));
    LEFT.set(usize::MAX);
    index.check();
    assert_eq!(index.names().len(), 6_000);
    let (mut plan, failed) = at_every_limit(|| index.plan_remove(&to_insert(3_000).0), is_limit);
    assert!(failed > 2, "failed {failed} times");
    LEFT.set(0);
    assert!(index.commit(&mut plan));
    LEFT.set(usize::MAX);
    index.check();
    assert_eq!(index.names().len(), 1_500);
    let (mut plan, failed) = at_every_limit(|| index.plan_clear(), is_memory);
    assert!(failed > 0, "failed {failed} times");
    LEFT.set(0);
    assert!(index.commit(&mut plan));
    LEFT.set(usize::MAX);
    index.check();
    let (mut plan, failed) = at_every_limit(|| insert(&mut index), is_limit);
    assert!(failed > 4, "failed {failed} times");
    LEFT.set(0);
    assert!(index.commit(&mut plan));
    let removed = index.remove_end(true, index.names().last().unwrap().place);
    LEFT.set(usize::MAX);
    index.check();
    assert!(removed.unwrap() && index.names().len() == 4_499);
}

#[test]
fn what_a_plan_has_reserved_stays_when_another_makes_room_in_front() {
    let mut index = index_of(3_000);
    let (names, _) = to_insert(3_000);
    let mut insert = index.plan_insert(names, &vec![0; 4_500]).unwrap();
    index.plan_move_to_end("name.50", false).unwrap();
    LEFT.set(0);
    assert!(index.commit(&mut insert));
    LEFT.set(usize::MAX);
    index.check();
}

#[test]
fn names_are_renamed_moved_and_removed_without_memory_once_that_is_planned() {
    let mut index = index_of(3_000);
    let mut model = names(3_000);
    for n in 0..1_500 {
        let new = format!("{n}.{}", "y".repeat([3, 300, 3_000, 5][n % 4]));
        let at = (n * 7) % model.len();
        let (mut plan, _) = at_every_limit(|| index.plan_rename(&model[at], &new), is_limit);
        LEFT.set(0);
        assert!(index.commit(&mut plan));
        LEFT.set(usize::MAX);
        model[at] = new;
        let (at, last) = ((n * 11) % model.len(), n % 3 == 0);
        let (mut plan, _) = at_every_limit(|| index.plan_move_to_end(&model[at], last), is_limit);
        LEFT.set(0);
        assert!(index.commit(&mut plan));
        LEFT.set(usize::MAX);
        let name = model.remove(at);
        model.insert(if last { model.len() } else { 0 }, name);
        if n % 5 == 0 {
            let at = (n * 13) % model.len();
            let place = index.names().get(&model[at]).unwrap();
            let (removed, _) = at_every_limit(|| index.remove_one(&model[at], place), is_memory);
            assert!(removed && index.names().get(&model.remove(at)).is_none());
        }
        assert!(index.names().contains(&model[n % model.len()]));
    }
    assert!(index.names().iter().map(|(name, _)| name).eq(model.iter().map(String::as_bytes)));
    let mut plan = index.plan_remove(&model.split_off(100)).unwrap();
    LEFT.set(0);
    assert!(index.commit(&mut plan));
    LEFT.set(usize::MAX);
    assert!(index.names().iter().map(|(name, _)| name).eq(model.iter().map(String::as_bytes)));
    let mut plan = index.plan_move_to_end(&model[7], true).unwrap();
    assert!(index.commit(&mut plan));
    index.check();
}

#[test]
fn rows_of_a_large_table_become_free_without_memory_once_that_is_planned() {
    let mut index = index_of(200_000);
    index.add_table().unwrap();
    let last = || unlimited(|| names(200_000).split_off(199_990));
    let (mut plan, failed) = at_every_limit(|| index.plan_insert(last(), &[1; 10]), is_limit);
    assert_eq!(failed, 1);
    LEFT.set(0);
    assert!(index.commit(&mut plan));
    LEFT.set(usize::MAX);
    index.check();
    assert_eq!(index.next_row(0, u64::MAX), Some((199_990, true)));
    let mut other = index_of(200_000);
    let end = other.names().last().unwrap().place;
    let (removed, failed) = at_every_limit(|| other.remove_end(true, end), is_memory);
    assert!(failed == 1 && removed);
    other.check();
    let mut other = index_of(200_000);
    let (removed, failed) = at_every_limit(|| other.remove_one("name.199999", end), is_memory);
    assert!(failed == 1 && removed);
    other.check();
}

#[test]
fn an_index_is_made_copied_and_asked_whole_or_not_at_all() {
    let ((), failed) =
        at_every_limit(|| RowIndex::of_one_table(unlimited(|| names(1_000)).into_iter()).map(drop), is_limit);
    assert!(failed > 3, "failed {failed} times");
    let twice = || names(500).into_iter().chain(names(500));
    let mut refused = 0;
    let ((), failed) = at_every_limit(
        || {
            let names: Vec<_> = unlimited(|| twice().collect());
            match RowIndex::of_one_table(names.into_iter()) {
                Err(Refusal::Repeated { .. }) => Ok(()),
                other => other.map(drop),
            }
        },
        |refusal| {
            refused += 1;
            is_limit(refusal);
        },
    );
    assert!(failed > 4 && refused == failed, "failed {failed} times");
    let index = index_of(20_000);
    let places = index.places().unwrap();
    let ((), failed) = at_every_limit(|| index.places().map(drop), is_memory);
    assert!(failed > 0);
    let ((), failed) = at_every_limit(|| places.by_table().map(drop), is_memory);
    assert_eq!(failed, 2);
    let (copied, failed) = at_every_limit(|| index.copy(), is_memory);
    assert!(failed > 1 && copied.names().iter().eq(index.names().iter()));
    let ((), failed) = at_every_limit(|| index.names_of(0, 0..20_000).map(drop).map_err(|_| ()), |()| ());
    assert_eq!(failed, 2);
    let of = || RowIndex::of(unlimited(|| names(20_000)).into_iter(), &places, &[30_000]);
    let (made, failed) = at_every_limit(of, is_limit);
    assert!(failed > 4 && made.names().iter().eq(index.names().iter()), "failed {failed} times");
}

fn packed(count: u32) -> Vec<u8> {
    let table = Table { attribute: b"table".to_vec(), used: count.into(), ..Table::default() };
    let header = Header { tables: vec![table; 50], patterns: vec![b"a".to_vec(); 300] };
    let ids = (0..count).rev().map(u64::from);
    let mut encoder = Encoder::new(&header, count as usize, Some(ids), 0).unwrap();
    for name in names(count as usize) {
        encoder.push(name.as_bytes()).unwrap();
    }
    encoder.finish()
}

#[test]
fn packed_names_are_written_and_read_whole_or_not_at_all() {
    let bytes = packed(1_000);
    let (header, read) = codec::decode(&bytes).unwrap();
    let (again, failed) = at_every_limit(
        || {
            let mut encoder = Encoder::new(&header, 1_000, Some((0..1_000_u32).rev().map(u64::from)), 0)?;
            read.iter().try_for_each(|(name, _)| encoder.push(name))?;
            Ok(encoder.finish())
        },
        is_memory,
    );
    assert!(failed > 2 && again == bytes);
    let ((), failed) = at_every_limit(|| codec::decode(&bytes).map(drop), is_memory);
    assert!(failed > 1);
    let words = codec::searchable(&bytes).unwrap();
    let (made, failed) = at_every_limit(|| codec::searchable(&bytes), is_memory);
    assert!(failed > 4 && made == words);
    let (_, read) = codec::decode(&words).unwrap();
    let (are_right, failed) = at_every_limit(|| read.are_words_right(), is_memory);
    assert!(failed > 1 && are_right);
    let other = packed(1_500);
    let (delta, failed) = at_every_limit(|| delta::diff(&bytes, &other), is_memory);
    assert!(failed > 3);
    let (applied, failed) = at_every_limit(|| delta::apply(&bytes, &delta), is_memory);
    assert!(failed > 3 && applied == other);
}

#[test]
fn headers_are_written_read_and_stacked_whole_or_not_at_all() {
    let all: Vec<String> = names(1_000);
    let likes: Vec<String> = (0..1_000).map(|size| HeaderWriter::like(Dtype::U8, &[1, size % 500])).collect();
    let order = |at: usize| (at * 7) % 1_000;
    let mut starts = vec![0; 1_001];
    for place in 0..1_000 {
        starts[place + 1] = starts[place] + (order(place) % 500) as u64;
    }
    let (entries, failed) = at_every_limit(
        || {
            let mut writer = HeaderWriter::default();
            for at in 0..1_000 {
                let place = (at * 143) % 1_000;
                assert_eq!(order(place), at);
                writer.push(&all[at], &likes[at], starts[place], starts[place + 1])?;
            }
            Ok(writer.take())
        },
        is_memory,
    );
    assert!(failed > 3);
    let bytes = [b"{", &entries[1..], b"}"].concat();
    let file = 8 + bytes.len() as u64 + starts[1_000];
    let refused = |error: safetensors::HeaderError| assert_eq!(error.fault, Fault::Memory);
    let (header, failed) = at_every_limit(|| safetensors::Header::read(&bytes, file), refused);
    assert!(failed > 10);
    let (stack, failed) = at_every_limit(|| Stack::new(&header, |number| number % 3 > 0), is_memory);
    assert!(failed > 3);
    let ((), failed) = at_every_limit(|| stack.spans(&header, 0).map(drop), is_memory);
    assert!(failed > 1);
}

#[test]
fn a_text_full_of_escapes_is_read_whole_or_not_at_all() {
    let long = "\\n\\u00e9".repeat(2_000);
    let text = format!(r#"{{"__metadata__":{{"{long}":"{long}"}}}}"#);
    let file = text.len() as u64 + 8;
    let refused = |error: safetensors::HeaderError| assert_eq!(error.fault, Fault::Memory);
    let (header, failed) = at_every_limit(|| safetensors::Header::read(text.as_bytes(), file), refused);
    assert!(failed > 4 && header.metadata()[0].0.chars().count() == 4_000);
}

#[test]
fn an_index_of_shards_is_read_whole_or_not_at_all() {
    let lines: Vec<String> = names(1_000).iter().map(|name| format!(r#""{name}":"shard.{}""#, name.len())).collect();
    let text = format!(r#"{{"metadata":{{"a":"{}"}},"weight_map":{{{}}}}}"#, "b".repeat(5_000), lines.join(","));
    let refused = |error| assert!(matches!(error, IndexError::Unreadable { fault: Fault::Memory, .. }), "{error:?}");
    let (index, failed) = at_every_limit(|| ShardIndex::read(text.as_bytes()), refused);
    assert!(failed > 5 && index.len() == 1_000);
}

#[test]
fn what_cannot_be_told_without_memory_is_not_told() {
    LEFT.set(0);
    assert!(!Lines::new(100).take(0..64));
    let mut stretches = Stretches::new(1_000);
    (0..600).for_each(|number| stretches.add(100_000 - number * 100..100_010 - number * 100));
    assert!(!stretches.are_apart());
    LEFT.set(usize::MAX);
    let regions = || (0..1_000).map(|number| number * 100..number * 100 + 100);
    let (blocks, failed) = at_every_limit(|| layout::cut(regions(), 64), is_memory);
    assert!(failed > 2 && blocks.len() == 1_563);
}
