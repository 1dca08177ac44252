//! The last step of a move, from which there is no way back.
//!
//! Python runs the handler of a signal between two of its own steps, and what that raises (`KeyboardInterrupt`, say)
//! would leave half of the tensors moved. So all that remains to be done is one step.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::apart::convert_apart;
use crate::group::{Paused, TensorGroup};
use crate::tensor::Torch;

/// A group, and a slab: filled, or in reserve.
type Pair<'py> = (Bound<'py, TensorGroup>, Bound<'py, PyAny>);

/// Makes tensors views of slabs, after all have been checked; converts others apart; and replaces buffers.
///
/// What `undo` holds is to be done if this fails; it is empty when there is nothing to undo any more, whatever is raised
/// then. No function mode may be on: then no Python code of torch's runs on the way.
#[pyfunction]
#[pyo3(signature = (slabs, *, apart = Vec::new(), buffers = Vec::new(), undo = None, door = None))]
pub(crate) fn complete_move(
    py: Python<'_>,
    slabs: Vec<Pair<'_>>,
    apart: Vec<Pair<'_>>,
    buffers: Vec<(Bound<'_, PyDict>, Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    undo: Option<Bound<'_, PyList>>,
    door: Option<&str>,
) -> PyResult<()> {
    let torch = Torch::get(py)?;
    let mut checked = Vec::with_capacity(slabs.len());
    for (group, slab) in &slabs {
        checked.push((group.get(), group.get().checked_slab(torch, slab, door)?));
    }
    let _paused = Paused::new(py)?;
    for (group, slab) in &checked {
        group.set_data(torch, slab)?;
    }
    let mut interrupt = None;
    for (group, reserve) in &apart {
        interrupt = convert_apart(torch, group.get(), reserve)?.or(interrupt);
    }
    for (place, name, buffer) in &buffers {
        // As an object: a class of dicts may have a `__setitem__` of its own.
        place.as_any().set_item(name, buffer)?;
    }
    if let Some(undo) = undo {
        undo.call_method0(intern!(py, "clear"))?;
    }
    interrupt.map_or(Ok(()), Err)
}
