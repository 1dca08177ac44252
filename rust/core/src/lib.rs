//! What pdrs can prove alone: the ordered index of names, the rows of a table, and the places of many regions in one
//! slab.
//!
//! This crate knows neither Python nor torch and contains no unsafe code, so that it can be tested against a model,
//! fuzzed and measured by itself. How a key of an [`IndexMap`] is hashed and compared is a parameter ([`Hashed`],
//! [`Matches`]). The Python binding keys by shared `str` objects and their cached hash, other users by Rust strings. The
//! names of rows lie in a piece of memory of their own ([`names::table::NameTable`]).
#![forbid(unsafe_code)]

mod error;
mod hash_table;
mod index_map;
mod key;
pub mod memory;
pub mod names;
pub mod row_steps;
mod rows;
pub mod safetensors;
pub mod slab;

pub use error::{Damage, Error, Result};
pub use index_map::{IndexMap, Iter, MAX_ENTRIES};
pub use key::{Hashed, Matches};
pub use rows::{MAX_TABLES, OfTable, Place, Places, Plan, Refusal, RowIndex, Rows};
