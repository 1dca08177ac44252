//! Changes that belong together, in one step of Python's.
//!
//! Python runs the handler of a signal between two of its own steps. What that raises (`KeyboardInterrupt`, say) comes
//! in front of all of these changes, or behind them.

use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::python::lock::one_step;

/// Calls functions without arguments, in order, up to the first that fails.
///
/// They must be written in C. What they give lives until all have been called, because Python code may run when an
/// object goes. Where it runs all the same, as a finalizer does if the collector comes, it finds the locks closed that
/// this thread holds.
#[pyfunction]
pub(crate) fn in_one_step(calls: &Bound<'_, PyList>) -> PyResult<()> {
    let py = calls.py();
    let calls: Vec<_> = calls.iter().collect();
    let mut given = Vec::with_capacity(calls.len());
    one_step(py, || call_all(&calls, &mut given))
}

/// Calls functions without arguments, in order, and keeps what they give.
pub(crate) fn call_all<'py>(calls: &[Bound<'py, PyAny>], given: &mut Vec<Bound<'py, PyAny>>) -> PyResult<()> {
    for call in calls {
        given.push(call.call0()?);
    }
    Ok(())
}
