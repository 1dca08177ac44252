//! Packed names, their words and their deltas: whatever the bytes are, they are refused, or hold names that can be packed
//! again. What is found by words has the name that was looked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pdrs_core::names::codec::{Encoder, Parts, decode, hash, searchable};
use pdrs_core::names::delta::{apply, diff};

fuzz_target!(|data: &[u8]| {
    if let Ok((_, parts)) = Parts::of(data) {
        let names = parts.names(data).unwrap();
        for (name, _) in names.iter() {
            if let Some(number) = names.find(hash(name), |other| other == name) {
                assert_eq!(names.name(number), Some(name));
            }
        }
    }
    if let Ok((header, names)) = decode(data) {
        let _ = names.repeated();
        let ids: Vec<u64> = names.iter().map(|(_, id)| id).collect();
        let mut encoder = Encoder::new(&header, names.len(), Some(ids.into_iter()), 0).unwrap();
        names.iter().for_each(|(name, _)| encoder.push(name).unwrap());
        let again = encoder.finish();
        let (same_header, same_names) = decode(&again).unwrap();
        assert_eq!(header, same_header);
        assert!(names.iter().eq(same_names.iter()));
        let searchable = searchable(&again).unwrap();
        let with_words = decode(&searchable).unwrap().1;
        assert!(with_words.are_words_right().unwrap() && with_words.iter().eq(names.iter()));
        let delta = diff(data, &again).unwrap();
        assert!(decode(&apply(data, &delta).unwrap()).unwrap().1.iter().eq(names.iter()));
    }
    // Old names and a delta, split at a length that stands in front.
    if let Some((size, rest)) = data.split_first_chunk::<2>() {
        let (old, delta) = rest.split_at(usize::from(u16::from_le_bytes(*size)).min(rest.len()));
        let _ = apply(old, delta);
    }
});
