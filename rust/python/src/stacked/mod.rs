//! What a `StackedParameterDict` asks for natively.

pub(crate) mod row;
pub(crate) mod row_index;
pub(crate) mod table_rows;
