//! What the ranks of a sharded table ask each other for.

pub(crate) mod headers;
pub(crate) mod known_rows;
