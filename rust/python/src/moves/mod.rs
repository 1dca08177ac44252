//! Moves of many tensors at once: slabs, and the regions of memory that go into them.

pub(crate) mod commit;
pub(crate) mod pages;
pub(crate) mod regions;
pub(crate) mod slab;
pub(crate) mod tensor_group;
pub(crate) mod walk;
