//! Headers of safetensors files: the reader says what `serde_json` and plain loops say, whatever the bytes are.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../rust/core/tests/header_model/mod.rs"]
mod header_model;

fuzz_target!(|input: &[u8]| {
    // The first bytes say how many data there are, the others are the header.
    if let Some((data, header)) = input.split_first_chunk::<2>() {
        header_model::check(header, u64::from(u16::from_le_bytes(*data)));
    }
});
