//! Refuses subinterpreters: torch has none either, and what is cached once here would be shared by all.
#![allow(unsafe_code)] // The number of the interpreter, which PyO3 does not tell.

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;

/// An `ImportError` in any interpreter but the main one.
pub(crate) fn require_main(_py: Python<'_>) -> PyResult<()> {
    // SAFETY: the thread is attached to an interpreter, as `_py` proves, so there is a current one.
    let id = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    if id == 0 {
        Ok(())
    } else {
        Err(PyImportError::new_err("pdrs works in the main interpreter only, as torch does; this is a subinterpreter"))
    }
}
