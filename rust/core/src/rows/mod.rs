//! Rows of tables: which are free, and which belong to names.

mod allocator;
mod bit_set;

pub use allocator::Rows;
