//! Rows of tables: which are free, which belong to names, and how that changes.

mod allocator;
mod bit_set;
mod copy;
mod index;
pub(crate) mod parts;
mod places;
mod plan;

pub use allocator::Rows;
pub use copy::copy_rows;
pub use index::RowIndex;
pub use places::{MAX_TABLES, OfTable, Place, Places};
pub use plan::{Plan, Refusal};
