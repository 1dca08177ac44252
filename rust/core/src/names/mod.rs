//! The names of a dictionary: in memory, as bytes, and the difference between two such pieces.

pub mod codec;
pub mod delta;
mod header;
pub mod known;
pub mod order;
mod record;
pub mod table;
pub mod text;
mod words;
