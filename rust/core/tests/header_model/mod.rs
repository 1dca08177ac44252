//! What a header must be, told by `serde_json` and plain loops: slow, simple, and nothing of it is that of the reader.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use pdrs_core::safetensors::{Dtype, Fault, Header, HeaderWriter, MAX_DIMENSIONS};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// A tensor as the model reads it: name, dtype, shape, start and end.
pub(crate) type Tensor = (String, Dtype, Vec<u64>, u64, u64);

/// The pairs of an object, also those of one name.
struct Pairs<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Pairs<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

impl<V> Pairs<V> {
    /// The value of a key that is there once.
    fn once(&self, key: &str) -> Option<&V> {
        let mut found = self.0.iter().filter(|(name, _)| name == key);
        found.next().filter(|_| found.next().is_none()).map(|(_, value)| value)
    }
}

/// The tensors of a header that describes so many bytes of data, or nothing.
fn model(header: &[u8], data: u64) -> Option<Vec<Tensor>> {
    let Pairs::<Box<RawValue>>(pairs) = serde_json::from_slice(header).ok()?;
    let mut tensors = Vec::new();
    for (name, value) in pairs {
        if name == "__metadata__" {
            let texts: Option<Pairs<String>> = serde_json::from_str(value.get()).ok()?;
            let keys: Option<HashSet<_>> = texts.as_ref().map(|texts| texts.0.iter().map(|text| &text.0).collect());
            if keys.map(|keys| keys.len()) != texts.as_ref().map(|texts| texts.0.len()) {
                return None;
            }
            continue;
        }
        let fields: Pairs<Value> = serde_json::from_str(value.get()).ok()?;
        let numbers = |field| fields.once(field)?.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<_>>>();
        let dtype = Dtype::from_name(fields.once("dtype")?.as_str()?)?;
        let (shape, offsets) = (numbers("shape")?, numbers("data_offsets")?);
        let &[start, stop] = &offsets[..] else { return None };
        let mut sizes = shape.iter().map(|size| u128::from((*size).max(1)));
        let counted = sizes.try_fold(u128::from(dtype.bits()), u128::checked_mul)?;
        let bits = if shape.contains(&0) { 0 } else { counted };
        if counted > i64::MAX as u128 || bits % 8 != 0 {
            return None;
        }
        if u128::from(stop.checked_sub(start)?) != bits / 8 {
            return None;
        }
        tensors.push((name, dtype, shape, start, stop));
    }
    let names: HashSet<_> = tensors.iter().map(|tensor| &tensor.0).collect();
    if names.len() < tensors.len() {
        return None;
    }
    let mut ranges: Vec<_> = tensors.iter().map(|tensor| (tensor.3, tensor.4)).collect();
    ranges.sort_unstable();
    let mut end = 0;
    for (start, stop) in ranges {
        if start != end {
            return None;
        }
        end = stop;
    }
    (end == data).then_some(tensors)
}

/// Panics unless the reader and the model agree on a header.
pub(crate) fn check(header: &[u8], data: u64) {
    let file = 8 + header.len() as u64 + data;
    match (Header::read(header, file), model(header, data)) {
        (Ok(found), Some(expected)) => {
            assert_eq!(found.len(), expected.len());
            for (number, (name, dtype, shape, start, stop)) in expected.iter().enumerate() {
                assert_eq!(found.name(number), name);
                assert_eq!(found.find(name), Some(number));
                assert_eq!((found.kind(number).dtype, &*found.kind(number).shape), (*dtype, &shape[..]));
                let begin = found.data_start();
                assert_eq!(found.bytes(number), (begin + start, begin + stop));
            }
            assert_eq!(found.find("a name that is not there"), None);
            rewritten(&found, &expected, data);
        }
        (Err(error), None) => {
            assert!(error.at <= file, "{error}");
            assert!(error.to_string().len() < 2000, "{error}");
        }
        (Ok(found), None) => panic!("{} tensors found where there are none", found.len()),
        (Err(error), Some(_)) => {
            // What the reader refuses and serde does not: also a second header of metadata.
            let strict = matches!(error.fault, Fault::DuplicateMetadata | Fault::Nested | Fault::NoHeader);
            let dimensions = error.fault == Fault::Dimensions && header.len() > 2 * MAX_DIMENSIONS;
            assert!(strict || dimensions, "refused: {error}");
        }
    }
}

/// A header of these texts and entries, which begin with commas.
pub(crate) fn header_of(metadata: &[(String, String)], entries: &[u8]) -> Vec<u8> {
    let quoted = |text: &String| serde_json::to_string(text).unwrap();
    let texts: Vec<_> = metadata.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
    let start = format!("{{\"__metadata__\":{{{}}}", texts.join(","));
    [start.as_bytes(), entries, b"}"].concat()
}

/// Panics unless what was read can be written and read again.
fn rewritten(found: &Header, expected: &[Tensor], data: u64) {
    let mut writer = HeaderWriter::default();
    let mut size = 0;
    for (name, dtype, shape, start, stop) in expected {
        let like = HeaderWriter::like(*dtype, shape);
        writer.push(name, &like, *start, *stop).unwrap();
        size += HeaderWriter::bytes_of(name, &like, *start, *stop);
    }
    let entries = writer.take();
    assert_eq!(size, entries.len());
    let bytes = header_of(found.metadata(), &entries);
    let again = Header::read(&bytes, 8 + bytes.len() as u64 + data).expect("what was written can be read");
    assert_eq!(again.metadata(), found.metadata());
    assert_eq!(model(&bytes, data).as_deref(), Some(expected));
}
