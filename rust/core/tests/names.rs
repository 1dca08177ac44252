//! Packed names against a plain list of them, and against bytes that were damaged on purpose.
//!
//! The bugs that this hunts: a name, an id or a field of a header that comes back as another one; bytes that are taken
//! though they contradict themselves (a row with two names, a row that no table has, lengths that do not add up); a
//! panic, or memory without bounds, for bytes that an attacker wrote; a delta that does not give the new names.

use pdrs_core::names::codec::{Encoder, Header, ROW_BITS, Table, decode};
use pdrs_core::names::delta::{apply, diff};
use pdrs_core::names::text::{invalid_at, push_character};
use pdrs_core::{Damage, Error};
use proptest::prelude::*;

/// What is packed, as plain as can be.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    header: Header,
    entries: Vec<(Vec<u8>, u64)>,
}

fn encode(model: &Model) -> Vec<u8> {
    let ids: Vec<u64> = model.entries.iter().map(|(_, id)| *id).collect();
    let plain = ids.iter().enumerate().all(|(at, id)| at as u64 == *id);
    let mut encoder = Encoder::new(&model.header, ids.len(), (!plain).then_some(ids.into_iter()), 0).unwrap();
    model.entries.iter().for_each(|(name, _)| encoder.push(name).unwrap());
    encoder.finish()
}

fn model_of(bytes: &[u8]) -> Model {
    let (header, names) = decode(bytes).unwrap();
    assert_eq!(names.is_empty(), names.iter().next().is_none());
    Model { header, entries: names.iter().map(|(name, id)| (name.to_vec(), id)).collect() }
}

/// Text as a Python `str` may hold it: any character, and surrogates.
fn text() -> impl Strategy<Value = Vec<u8>> {
    let character = prop_oneof![
        8 => 0x61_u32..0x66,
        1 => 0x20_u32..0x250,
        1 => 0xd7f0_u32..0xe010,
        1 => 0x1_0000_u32..0x11_0000,
    ];
    // Mostly short, because equal ones are needed.
    let characters = prop_oneof![8 => 1_usize..4, 2 => 4_usize..40];
    let characters = characters.prop_flat_map(move |count| prop::collection::vec(character.clone(), count));
    characters.prop_map(|characters| {
        let mut bytes = Vec::new();
        for character in characters {
            push_character(character, &mut bytes);
        }
        bytes
    })
}

fn tables() -> impl Strategy<Value = Vec<Table>> {
    let table = (text(), 0_u64..3, any::<bool>(), 1_u64..8).prop_map(|(attribute, group, trainable, used)| Table {
        attribute,
        group,
        trainable,
        used,
    });
    prop::collection::vec(table, 1..4)
}

/// A header, and distinct names of which each has a row of its own, in any order.
fn models() -> impl Strategy<Value = Model> {
    (tables(), prop::collection::vec(text(), 0..3))
        .prop_flat_map(|(tables, patterns)| {
            let ids: Vec<u64> = (0_u64..)
                .zip(&tables)
                .flat_map(|(number, table)| (0..table.used).map(move |row| number << ROW_BITS | row))
                .collect();
            let count = ids.len();
            let names = prop::collection::btree_set(text(), 0..=count).prop_map(|set| set.into_iter().collect());
            let names = Strategy::prop_shuffle(names.prop_map(|names: Vec<_>| names));
            let ids = prop_oneof![Just(ids.clone()), Just(ids).prop_shuffle()];
            (Just(Header { tables, patterns }), names, ids)
        })
        .prop_map(|(header, names, ids)| Model { header, entries: names.into_iter().zip(ids).collect() })
}

proptest! {
    #[test]
    fn what_was_packed_comes_back(model in models()) {
        let bytes = encode(&model);
        prop_assert_eq!(&model_of(&bytes), &model);
        prop_assert_eq!(decode(&bytes).unwrap().1.repeated(), None);
        for cut in 0..bytes.len() {
            prop_assert!(decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_delta_gives_the_new_names(old in models(), new in models(), kept in any::<u64>()) {
        // As dictionaries change: some names go, and others come at the end. And as they do not: all others.
        let mut mixed = new.clone();
        let stays = old.entries.iter().enumerate().filter(|(at, _)| kept >> (at % 64) & 1 == 1);
        let mut entries: Vec<_> = stays.map(|(_, entry)| entry.0.clone()).collect();
        entries.extend(new.entries.iter().map(|(name, _)| name.clone()).filter(|name| !old.entries.iter().any(|(other, _)| other == name)));
        let ids = (0_u64..).zip(&new.header.tables).flat_map(|(number, table)| (0..table.used).map(move |row| number << ROW_BITS | row));
        mixed.entries = entries.into_iter().zip(ids).collect();
        let before = encode(&old);
        for after in [encode(&mixed), encode(&new), encode(&old)] {
            let delta = diff(&before, &after).unwrap();
            prop_assert_eq!(apply(&before, &delta).unwrap(), after);
        }
    }

    #[test]
    fn a_name_that_is_listed_twice_is_found(model in models(), from in any::<usize>(), to in any::<usize>()) {
        prop_assume!(model.entries.len() > 1);
        let mut twice = model;
        let (from, to) = (from % twice.entries.len(), to % twice.entries.len());
        prop_assume!(from != to);
        twice.entries[to].0 = twice.entries[from].0.clone();
        let bytes = encode(&twice);
        prop_assert_eq!(decode(&bytes).unwrap().1.repeated(), Some(from.max(to)));
    }
}

#[test]
fn a_delta_of_few_changes_is_small() {
    let header = Header { tables: vec![Table { used: 10_001, ..Table::default() }], patterns: vec![] };
    let entries: Vec<_> = (0..10_000).map(|n: u64| (format!("name.{n}").into_bytes(), n)).collect();
    let old = Model { header, entries };
    let mut new = old.clone();
    new.entries.remove(17);
    new.entries.remove(4000);
    new.entries[5].1 = 10_000;
    new.entries.push((b"new".to_vec(), 17));
    let (before, after) = (encode(&old), encode(&new));
    let delta = diff(&before, &after).unwrap();
    assert!(delta.len() < 250, "{} bytes", delta.len());
    assert_eq!(apply(&before, &delta).unwrap(), after);
}

fn small() -> Model {
    let floats = Table { attribute: b"float32_2".to_vec(), group: 1, trainable: true, used: 4 };
    let rare = Table { attribute: b"rare".to_vec(), used: 2, ..Table::default() };
    let header = Header { tables: vec![floats, rare], patterns: vec![b"bias$".to_vec()] };
    let entries = [("a", 3), ("bb", 1 << ROW_BITS), ("\u{e9}\u{1f600}", 0)];
    Model { header, entries: entries.map(|(name, id)| (name.as_bytes().to_vec(), id)).to_vec() }
}

fn with_ids(ids: [u64; 3]) -> Vec<u8> {
    let mut model = small();
    model.entries.iter_mut().zip(ids).for_each(|(entry, id)| entry.1 = id);
    encode(&model)
}

fn damage(bytes: &[u8]) -> Damage {
    match decode(bytes) {
        Err(Error::Damaged { what, at }) => {
            assert!(at <= bytes.len() as u64);
            what
        }
        other => panic!("expected damage, got {other:?}"),
    }
}

#[test]
fn a_row_belongs_to_one_name_and_is_one_that_its_table_has() {
    assert_eq!(damage(&with_ids([1, 2, 1])), Damage::SharedRow);
    assert_eq!(damage(&with_ids([1, 2, 4])), Damage::NoRow);
    assert_eq!(damage(&with_ids([1, 2, 2 << ROW_BITS])), Damage::NoRow);
    assert_eq!(damage(&with_ids([1, 2, u64::MAX])), Damage::NoRow);
    // Where a bit a row would be too much, too.
    let mut model = small();
    model.header.tables[0].used = 1 << ROW_BITS;
    model.entries[0].1 = 1 << 39;
    assert_eq!(model_of(&encode(&model)), model);
    model.entries[2].1 = 1 << 39;
    assert_eq!(damage(&encode(&model)), Damage::SharedRow);
    // And where no ids are listed.
    let plain = Model { header: Header::default(), entries: vec![(b"a".to_vec(), 0)] };
    assert_eq!(damage(&encode(&plain)), Damage::NoRow);
}

#[test]
fn an_empty_name_and_one_that_is_no_text_are_refused() {
    let mut model = small();
    model.entries[1].0 = vec![];
    assert_eq!(damage(&encode(&model)), Damage::Empty);
    model.entries[1].0 = vec![0xff];
    assert_eq!(damage(&encode(&model)), Damage::Text);
    // One character that is cut between two names.
    model.entries[1].0 = vec![0xc3];
    model.entries[2].0 = vec![0xa9];
    assert_eq!(damage(&encode(&model)), Damage::Text);
    assert_eq!(invalid_at(b"a\xed\xa0\x80\xed\xb0\x80b"), None);
    assert_eq!(invalid_at(b"a\xed\xa0"), Some(1));
}

#[test]
fn a_wrong_count_is_refused_before_memory_is_asked_for() {
    let good = encode(&small());
    for at in (8..48).step_by(8) {
        for count in [1 << 60, u64::MAX, u64::MAX / 4, u64::MAX / 32 + 1, 1000] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            damage(&bytes);
        }
    }
}

/// Numbers that anybody can make again: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// What cargo-fuzz does with `fuzz/fuzz_targets/names.rs`, in little and with the same seed each time.
#[test]
fn damaged_bytes_are_refused_or_hold_names_that_can_be_packed_again() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let seeds = [encode(&small()), encode(&Model::default()), with_ids([0, 1, 2])];
    let delta = diff(&seeds[0], &seeds[2]).unwrap();
    let mut taken = 0;
    for _ in 0..60_000 {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        let mut changed = delta.clone();
        for target in [&mut bytes, &mut changed] {
            for _ in 0..=random.below(3) {
                let at = random.below(target.len());
                match random.below(4) {
                    0 => target[at] ^= 1 << random.below(8),
                    1 => target[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                    2 => target.truncate(at.max(1)),
                    _ => {
                        let at = at & !7;
                        let number = [0, 1, 1 << 32, 1 << 60, u64::MAX][random.below(5)].to_le_bytes();
                        let end = target.len().min(at + 8);
                        target[at..end].copy_from_slice(&number[..end - at]);
                    }
                }
            }
        }
        if let Ok((header, names)) = decode(&bytes) {
            taken += 1;
            let entries = names.iter().map(|(name, id)| (name.to_vec(), id)).collect();
            let again = Model { header, entries };
            assert_eq!(model_of(&encode(&again)), again);
            let _ = names.repeated();
        }
        if let Ok(made) = apply(&seeds[0], &changed) {
            decode(&made).unwrap();
        }
    }
    assert!(taken > 100, "nearly nothing gets past the first check: {taken}");
}
