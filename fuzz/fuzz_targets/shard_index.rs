//! The index of a file in shards: whatever the bytes are, they are refused, or each name is found where it is listed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pdrs_core::safetensors::ShardIndex;

fuzz_target!(|data: &[u8]| {
    if let Ok(index) = ShardIndex::read(data) {
        for (number, shard) in index.shard_of().iter().enumerate() {
            assert_eq!(index.find(index.name(number)), Some(*shard));
            assert!((*shard as usize) < index.shards().len());
        }
    }
});
