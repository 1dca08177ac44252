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
use pdrs_core::safetensors::{self, Dtype, Fault, HeaderWriter, IndexError, ShardIndex, Stack};
use pdrs_core::slab::disjoint::{Lines, Stretches};
use pdrs_core::slab::layout;
use pdrs_core::{Error, IndexMap, Refusal, RowIndex, Rows};

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

fn map_of(count: usize) -> IndexMap<String, usize> {
    IndexMap::from_distinct(names(count).into_iter().zip(0..)).unwrap().unwrap()
}

#[test]
fn a_map_is_made_whole_or_not_at_all() {
    let (map, failed) = at_every_limit(
        || {
            let limit = LEFT.replace(usize::MAX);
            let made = names(3_000);
            LEFT.set(limit);
            IndexMap::from_distinct(made.into_iter().zip(0..))
        },
        is_memory,
    );
    assert!(failed > 2 && map.unwrap().len() == 3_000);
    let twice = || names(500).into_iter().chain(names(500)).zip(0..).collect::<Vec<_>>();
    let (back, failed) = at_every_limit(
        || {
            let limit = LEFT.replace(usize::MAX);
            let entries = twice();
            LEFT.set(limit);
            IndexMap::from_distinct(entries.into_iter())
        },
        is_memory,
    );
    assert!(failed > 3 && back.err().unwrap() == twice());
}

#[test]
fn a_map_stays_as_it_was_when_there_is_no_memory_for_more() {
    let mut map = map_of(1_000);
    map.remove("name.7");
    let before: Vec<(String, usize)> = map.iter().map(|(name, number)| (name.clone(), *number)).collect();
    let added: Vec<_> = (0..3_000).map(|number| (format!("other.{number}"), number)).collect();
    let mut copies = vec![added.clone(); 20].into_iter();
    for limit in 0..3 {
        let entries = copies.next().unwrap();
        LEFT.set(limit);
        let result = map.insert_many(entries, drop);
        LEFT.set(usize::MAX);
        map.check();
        if result == Err(Error::Memory) {
            assert!(map.iter().map(|(name, number)| (name.clone(), *number)).eq(before.iter().cloned()));
        }
    }
    assert_eq!(map.insert_many(added, drop), Ok(()));
    assert_eq!(map.len(), before.len() + 3_000);
}

#[test]
fn single_insertions_fail_without_a_trace_and_succeed_later() {
    let mut map: IndexMap<String, usize> = IndexMap::new();
    let mut failed = 0;
    for number in 0..5_000 {
        let name = format!("name.{number}");
        LEFT.set(0);
        let first = map.insert(name.clone(), number);
        LEFT.set(usize::MAX);
        if first == Err(Error::Memory) {
            failed += 1;
            assert!(map.len() == number && !map.contains(name.as_str()));
            assert_eq!(map.insert(name, number), Ok(None));
        }
    }
    map.check();
    assert!(failed > 10 && map.len() == 5_000);
}

#[test]
fn whatever_removes_needs_no_memory() {
    let mut map = map_of(5_000);
    let all = names(5_000);
    LEFT.set(0);
    for name in all.iter().filter(|name| !name.ends_with('3')) {
        assert!(map.remove(name.as_str()).is_some());
    }
    let left = map.len();
    assert_eq!(map.iter().nth(7).map(|(name, _)| name.as_str()), Some("name.73"));
    map.compact();
    LEFT.set(usize::MAX);
    assert_eq!(left, 500);
    map.compact();
    map.check();
    LEFT.set(0);
    while map.pop_first().is_some() && map.pop_last().is_some() {}
    LEFT.set(usize::MAX);
    map.check();
    assert!(map.is_empty());
}

#[test]
fn a_map_is_copied_and_sifted_whole_or_not_at_all() {
    let mut map = map_of(3_000);
    let ((), failed) = at_every_limit(|| map.map_entries(|name, number| (name.len(), *number)).map(drop), is_memory);
    assert_eq!(failed, 2);
    let mut judged = 0;
    let ((), failed) =
        at_every_limit(|| map.retain(|_, number| std::mem::replace(&mut judged, 1) < 9 && *number < 9), is_memory);
    assert!(failed == 1 && map.len() == 9);
    map.check();
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
