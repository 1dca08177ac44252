//! Where tensors lie in one block of memory: arithmetic on shapes, strides and regions.

pub mod disjoint;
pub mod layout;
pub mod strides;
