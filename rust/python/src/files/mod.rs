//! What checkpoints ask for natively.

pub(crate) mod names;
pub(crate) mod safetensors;
pub(crate) mod shard_index;
