//! Changes that belong together, in one step of Python's.
//!
//! Python runs the handler of a signal between two of its own steps. What that raises (`KeyboardInterrupt`, say) comes
//! in front of all of these changes, or behind them.

use pyo3::prelude::*;
use pyo3::types::PyList;

/// Calls functions without arguments, in order, up to the first that fails.
///
/// They must be written in C. What they give lives until all have been called, because Python code may run when an
/// object goes.
#[pyfunction]
pub(crate) fn in_one_step(calls: &Bound<'_, PyList>) -> PyResult<()> {
    let calls: Vec<_> = calls.iter().collect();
    let mut given = Vec::with_capacity(calls.len());
    for call in &calls {
        given.push(call.call0()?);
    }
    Ok(())
}
