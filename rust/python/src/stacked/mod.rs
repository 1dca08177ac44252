//! What a `StackedParameterDict` asks for natively.

pub(crate) mod one_entry;
pub(crate) mod packed;
pub(crate) mod places;
pub(crate) mod plan;
pub(crate) mod row;
pub(crate) mod row_index;
pub(crate) mod row_step;
mod source;
pub(crate) mod walk;
