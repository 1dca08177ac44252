//! Refuses subinterpreters: torch has none either, and what is cached once here would be shared by all.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

use crate::python::cpython::interpreter;

/// An `ImportError` in any interpreter but the main one.
pub(crate) fn require_main(py: Python<'_>) -> PyResult<()> {
    if interpreter(py) == 0 {
        Ok(())
    } else {
        Err(PyImportError::new_err("pdrs works in the main interpreter only, as torch does; this is a subinterpreter"))
    }
}
