//! The door to `CPython`: names, locks, memory, and what only its C side offers.

pub(crate) mod cpython;
pub(crate) mod interpreter;
pub(crate) mod lock;
pub(crate) mod memory;
pub(crate) mod name;
pub(crate) mod names;
pub(crate) mod one_step;
pub(crate) mod text;
pub(crate) mod type_slots;
