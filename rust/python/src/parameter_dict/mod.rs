//! What a `ParameterDict` asks for natively.

pub(crate) mod entries;
pub(crate) mod iterate;
pub(crate) mod keys;
pub(crate) mod load;
