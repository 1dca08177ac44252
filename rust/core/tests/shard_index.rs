//! The reader of the index of a file in shards against `serde_json`, on texts that are right, nearly right, and neither.
//!
//! The bugs that this hunts: a damaged index that is believed, a name that is found in the wrong shard or is listed twice,
//! a good index that is refused because it is written in another way.

use std::fmt;

use pdrs_core::safetensors::{Header, HeaderWriter, IndexError, ShardIndex};
use proptest::prelude::*;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// An object in which keys may come twice.
struct Pairs<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Of<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Of<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Of(std::marker::PhantomData))
    }
}

/// Names and files as `serde_json` reads them; nothing if the index is to be refused.
fn model(text: &[u8]) -> Option<Vec<(String, String)>> {
    let Pairs(fields) = serde_json::from_slice::<Pairs<Box<serde_json::value::RawValue>>>(text).ok()?;
    let maps = fields.iter().filter(|(key, value)| key == "weight_map" && value.get().starts_with('{'));
    let [map] = maps.collect::<Vec<_>>()[..] else { return None };
    let Pairs(found) = serde_json::from_str::<Pairs<Value>>(map.1.get()).ok()?;
    let mut names: Vec<_> = found.iter().map(|(name, _)| name).collect();
    names.sort();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return None;
    }
    found.into_iter().map(|(name, file)| Some((name, file.as_str()?.to_owned()))).collect()
}

/// Asserts that a text is judged as `serde_json` judges it; whether it is an index.
fn check(text: &[u8]) -> bool {
    let (read, expected) = (ShardIndex::read(text), model(text));
    let shown = String::from_utf8_lossy(text);
    let Some(expected) = expected else {
        assert!(read.is_err(), "is believed: {shown}");
        return false;
    };
    let index = read.unwrap_or_else(|error| panic!("{error}: {shown}"));
    assert_eq!(index.len(), expected.len());
    for (number, (name, file)) in expected.iter().enumerate() {
        assert_eq!(index.name(number), name);
        assert_eq!(index.find(name), Some(index.shard_of()[number]));
        assert_eq!(&index.shards()[index.shard_of()[number] as usize], file);
    }
    assert_eq!(index.find("in none"), None);
    true
}

#[test]
fn an_index_may_be_written_in_any_way_that_json_allows() {
    for text in [
        r#"{"weight_map":{}}"#,
        r#" { "metadata" : { "total_size" : 3, "of": [1, -2.5e3, {"weight_map": {}}] } , "weight_map" : { "x" : "a" } } "#,
        r#"{"weight_map":{"x":"a","":"b","\u0079\n":"\u0061","z":"b"},"metadata":null,"more":[[]]}"#,
        r#"{"weight_map":3,"weight_map":{"x":"a"}}"#,
    ] {
        assert!(check(text.as_bytes()), "{text}");
    }
}

#[test]
fn what_is_wrong_and_where_is_said() {
    for (text, said) in [
        ("", "the index cannot be read: expected a value (byte 0)"),
        ("{", "the index cannot be read: expected '\"' (byte 1)"),
        ("[1]", "the index has no 'weight_map'"),
        ("{}", "the index has no 'weight_map'"),
        (r#"{"weight_map":[]}"#, "the index has no 'weight_map'"),
        (r#"{"weight_map":{"x":3}}"#, "the index names something that is no file"),
        (r#"{"weight_map":{"x":"a","y":"a","x":"b"}}"#, "the index cannot be read: a name is listed twice (byte 31)"),
        (r#"{"weight_map":{},"weight_map":{}}"#, "the index cannot be read: a name is listed twice (byte 17)"),
        (r#"{"weight_map":{"x":"a"#, "the index cannot be read: it ends within a string (byte 21)"),
        (r#"{"weight_map":{}}}"#, "the index cannot be read: something follows its end (byte 17)"),
    ] {
        assert_eq!(ShardIndex::read(text.as_bytes()).err().map(|error| error.to_string()).as_deref(), Some(said));
        assert!(!check(text.as_bytes()));
    }
    assert_eq!(
        ShardIndex::read(b"{\xff}").err().map(|error| error.to_string()).as_deref(),
        Some("the index cannot be read: it is not in UTF-8 (byte 1)")
    );
    assert!(matches!(ShardIndex::read("[".repeat(100_000).as_bytes()), Err(IndexError::Unreadable { .. })));
}

#[test]
fn a_name_that_its_shard_has_not_is_missing() {
    let index = ShardIndex::read(br#"{"weight_map":{"x":"a","y":"b","z":"a"},"metadata":{"m":1}}"#).unwrap();
    assert_eq!((index.shards(), index.metadata()), (&["a".to_owned(), "b".to_owned()][..], r#"{"m":1}"#));
    let mut writer = HeaderWriter::default();
    let like = HeaderWriter::like(pdrs_core::safetensors::Dtype::U8, &[]);
    writer.push("x", &like, 0, 1).unwrap();
    let header = [b"{", &writer.take()[1..], b"}"].concat();
    let header = Header::read(&header, 8 + header.len() as u64 + 1).unwrap();
    assert_eq!(index.missing(&[&header, &header]), Some((1, "y")));
    assert_eq!(index.missing(&[&header]), Some((1, "y")));
    let index = ShardIndex::read(br#"{"weight_map":{"x":"a","z":"a"}}"#).unwrap();
    assert_eq!(index.missing(&[&header]), Some((0, "z")));
    let index = ShardIndex::read(br#"{"weight_map":{"x":"a"}}"#).unwrap();
    assert_eq!(index.missing(&[&header]), None);
}

/// An index, and in which way its text is changed: at a place, so many bytes are replaced by others.
fn changed() -> impl Strategy<Value = Vec<u8>> {
    let names = prop::collection::vec(("[a-c\"\\\\é]{0,3}", "[st]{1,2}"), 0..6);
    let pieces = prop::sample::select(vec!["", "\"", "{", "}", ",", ":", "\\", "x", " ", "[]", "\"a\":\"s\",", "null"]);
    (names, any::<prop::sample::Index>(), 0_usize..4, pieces, any::<bool>()).prop_map(
        |(names, at, gone, piece, is_changed)| {
            let text = |text: &str| serde_json::to_string(text).unwrap();
            let lines: Vec<_> = names.iter().map(|(name, file)| format!("{}:{}", text(name), text(file))).collect();
            let whole = format!(r#"{{"metadata":{{"total_size":7}},"weight_map":{{{}}}}}"#, lines.join(","));
            let mut bytes = whole.into_bytes();
            if is_changed {
                let at = at.index(bytes.len());
                let end = (at + gone).min(bytes.len());
                bytes.splice(at..end, piece.bytes());
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn an_index_that_was_changed_is_judged_as_serde_judges_it(text in changed()) {
        check(&text);
    }
}

#[test]
fn lines_that_are_written_are_read_back() {
    let names: Vec<_> = (0..3000).map(|n| format!("\"{n}\\\n\u{1}é")).collect();
    let mut text = br#"{"weight_map":{"first":"a""#.to_vec();
    let mut writer = HeaderWriter::default();
    for (number, name) in names.iter().enumerate() {
        writer.push_line(name, if number < 1000 { "a" } else { "b\"" }).unwrap();
        if number % 700 == 0 {
            text.extend(writer.take());
        }
    }
    text.extend(writer.take());
    text.extend(b"}}");
    assert!(check(&text));
    let index = ShardIndex::read(&text).unwrap();
    assert_eq!(index.find(&names[2999]), Some(1));
}
