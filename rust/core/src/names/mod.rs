//! The names of a dictionary as bytes, and the difference between two such pieces.

pub mod codec;
pub mod delta;
mod header;
pub mod text;
mod words;
