//! Packed names against a plain list of them, and against bytes that were damaged on purpose.
//!
//! The bugs that this hunts: a search that misses a name, gives the row of another, or has no end; a name, an id or a field of a header that comes back as another one; bytes that are taken
//! though they contradict themselves (a row with two names, a row that no table has, lengths that do not add up); a
//! panic, or memory without bounds, for bytes that an attacker wrote; a delta that does not give the new names.

use pdrs_core::names::codec::{
    Encoder, Header, Names, Parts, ROW_BITS, Table, decode, hash, searchable, without_words,
};
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

/// The id of a name, found by the words alone.
fn found(names: &Names<'_>, name: &[u8]) -> Option<u64> {
    names.find(hash(name), |other| other == name).and_then(|number| names.id(number))
}

/// Names that are found by their words, as a reader has them who has looked at the header only.
fn view(bytes: &[u8]) -> Names<'_> {
    let (_, parts) = Parts::of(bytes).unwrap();
    assert!(parts.is_searchable());
    parts.names(bytes).unwrap()
}

proptest! {
    #[test]
    fn each_name_is_found_by_its_words_and_no_other(model in models(), others in prop::collection::vec(text(), 8)) {
        let bytes = searchable(&encode(&model)).unwrap();
        prop_assert_eq!(bytes.len(), Parts::of(&encode(&model)).unwrap().1.searchable_len());
        prop_assert_eq!(&searchable(&bytes).unwrap(), &bytes);
        prop_assert_eq!(&model_of(&bytes), &model);
        let names = view(&bytes);
        prop_assert_eq!(names.len(), model.entries.len());
        for (number, (name, id)) in model.entries.iter().enumerate() {
            prop_assert_eq!(found(&names, name), Some(*id));
            prop_assert_eq!(names.name(number), Some(name.as_slice()));
        }
        for other in &others {
            let id = model.entries.iter().find(|(name, _)| name == other).map(|(_, id)| *id);
            prop_assert_eq!(found(&names, other), id);
        }
        for (number, (name, _)) in model.entries.iter().enumerate() {
            prop_assert!(names.home(hash(name)).is_some() && names.entry(number)[0].is_some());
        }
        prop_assert!(decode(&bytes).unwrap().1.are_words_right().unwrap());
        for cut in 0..bytes.len() {
            prop_assert!(Parts::of(&bytes[..cut]).is_err() && decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.extend([0; 8]);
        prop_assert!(Parts::of(&longer).is_err());
    }

    #[test]
    fn a_delta_is_that_of_the_names_whether_they_have_words_or_not(old in models(), new in models()) {
        let (before, after) = (encode(&old), encode(&new));
        let delta = diff(&before, &after).unwrap();
        let words = searchable(&after).unwrap();
        prop_assert_eq!(&without_words(&words).unwrap(), &after);
        prop_assert_eq!(&without_words(&after).unwrap(), &after);
        prop_assert_eq!(&diff(&searchable(&before).unwrap(), &words).unwrap(), &delta);
        prop_assert_eq!(&apply(&searchable(&before).unwrap(), &delta).unwrap(), &after);
    }

    #[test]
    fn damage_may_hide_a_name_but_never_gives_it_the_place_of_another(
        model in models(), at in any::<usize>(), with in any::<u64>(), many in any::<bool>()
    ) {
        let mut bytes = searchable(&encode(&model)).unwrap();
        let (_, parts) = Parts::of(&bytes).unwrap();
        let words = words_at(&bytes);
        prop_assume!(words < bytes.len());
        let count = (bytes.len() - words) / 8;
        for word in if many { 0..count } else { at % count..at % count + 1 } {
            // A word, or the number in it, is anything: one of no name, of another name, or each the same.
            let number = if with % 3 == 0 { with } else { with % (count as u64 + 2) };
            bytes[words + 8 * word..words + 8 * word + 8].copy_from_slice(&number.to_le_bytes());
        }
        let names = parts.names(&bytes).unwrap();
        for (name, id) in &model.entries {
            prop_assert!(found(&names, name).is_none_or(|found| found == *id));
        }
        let same = bytes == searchable(&encode(&model)).unwrap();
        prop_assert_eq!(decode(&bytes).unwrap().1.are_words_right().unwrap(), same);
    }
}

/// Where the words begin.
fn words_at(bytes: &[u8]) -> usize {
    let words = u64::from_le_bytes(bytes[48..56].try_into().unwrap());
    bytes.len() - 8 * words as usize
}

#[test]
fn the_hash_is_a_part_of_the_format() {
    // As the reference implementation of XXH3 gives them, with the seed 0.
    assert_eq!(hash(b""), 0x2d06_8005_38d3_94c2);
    assert_eq!(hash(b"a"), 0xe6c6_32b6_1e96_4e1f);
    assert_eq!(hash(b"abc"), 0x78af_5f94_892f_3950);
}

#[test]
fn many_names_are_found_and_a_search_among_words_that_are_full_ends() {
    let count = 300_000;
    let header = Header { tables: vec![Table { used: count, ..Table::default() }], patterns: vec![] };
    let entries: Vec<_> =
        (0..count).map(|n| (format!("model.layers.{n}.weight").into_bytes(), count - 1 - n)).collect();
    let mut bytes = searchable(&encode(&Model { header, entries: entries.clone() })).unwrap();
    let names = view(&bytes);
    for (name, id) in &entries {
        assert_eq!(found(&names, name), Some(*id));
        assert_eq!(found(&names, &name[1..]), None);
    }
    // No word is empty, and none is of the right name.
    let words = words_at(&bytes);
    for word in bytes[words..].chunks_exact_mut(8) {
        word.copy_from_slice(&u64::MAX.to_le_bytes());
    }
    let names = view(&bytes);
    assert!(entries.iter().take(1000).all(|(name, _)| found(&names, name).is_none()));
    // Each word has the upper half of one name's hash and the number of another name.
    let (name, _) = &entries[0];
    for word in bytes[words..].chunks_exact_mut(8) {
        word.copy_from_slice(&(hash(name) >> 32 << 32 | 2).to_le_bytes());
    }
    assert_eq!(found(&view(&bytes), name), None);
}

#[test]
fn ends_that_lie_run_backwards_or_outside_hide_names_and_are_refused_when_all_are_read() {
    let good = searchable(&encode(&small())).unwrap();
    let (_, parts) = Parts::of(&good).unwrap();
    // The ends of three names stand before the text.
    let ends = (0..good.len())
        .find(|at| good[*at..].starts_with(&1_u64.to_le_bytes()) && good[*at + 8..].starts_with(&3_u64.to_le_bytes()));
    let ends = ends.unwrap();
    for (number, end, what) in [
        (0, 0, Damage::Empty),
        (0, 4, Damage::Order),
        (1, 0, Damage::Order),
        (1, 1, Damage::Empty),
        (1, u64::MAX, Damage::Order),
        (1, 1 << 40, Damage::Order),
    ] {
        let mut bytes = good.clone();
        bytes[ends + 8 * number..ends + 8 * number + 8].copy_from_slice(&end.to_le_bytes());
        assert_eq!(damage(&bytes), what);
        let names = parts.names(&bytes).unwrap();
        for (name, id) in &small().entries {
            assert!(found(&names, name).is_none_or(|found| found == *id));
        }
        assert!(names.iter().count() <= 3);
    }
    assert!(parts.names(&good[..good.len() - 1]).is_err());
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
    for at in (8..56).step_by(8) {
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
    let words = searchable(&encode(&small())).unwrap();
    let seeds = [encode(&small()), encode(&Model::default()), with_ids([0, 1, 2]), words];
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
        if let Ok((_, parts)) = Parts::of(&bytes) {
            let names = parts.names(&bytes).unwrap();
            let _ = (found(&names, b"a"), found(&names, b"bb"), names.iter().count());
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
