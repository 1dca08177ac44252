//! What pdrs can prove alone: the ordered index of names, the rows of a table, and the places of many regions in one
//! slab.
//!
//! This crate knows neither Python nor torch and contains no unsafe code, so that it can be tested against a model,
//! fuzzed and measured by itself. Names lie in a piece of memory of their own ([`names::table::NameTable`]), in the order
//! of a dictionary, each with a place. Where somebody else keeps the names anyway, an [`OrderedSet`] keeps their order
//! alone. How a key of a set is hashed and compared is a parameter ([`Hashed`], [`Matches`]): the Python binding shares
//! `str` objects with torch's dict.
#![forbid(unsafe_code)]

mod error;
mod hash_table;
pub mod headers;
mod key;
pub mod memory;
pub mod names;
mod ordered_set;
pub mod row_steps;
mod rows;
pub mod safetensors;
pub mod slab;

pub use error::{Damage, Error, Result};
pub use hash_table::MAX_ENTRIES;
pub use key::{Hashed, Matches};
pub use ordered_set::OrderedSet;
pub use rows::{MAX_TABLES, OfTable, Place, Places, Plan, Refusal, RowIndex, Rows, copy_rows};
