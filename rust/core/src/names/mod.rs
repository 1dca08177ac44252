//! Names as bytes: packed beside the tables whose rows they name, and what has changed from one pack to the next.

pub mod codec;
pub mod delta;
