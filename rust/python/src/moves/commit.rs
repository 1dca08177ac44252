//! The last step of a move, from which there is no way back.
//!
//! Python runs the handler of a signal between two of its own steps, and what that raises (`KeyboardInterrupt`, say)
//! would leave half of the tensors moved. So all that remains to be done is one step, and what may fail in it comes first.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::moves::tensor_group::{Paused, TensorGroup, check_room};
use crate::torch::Torch;

/// Makes tensors views of filled slabs, and replaces buffers: all, or, if there is an error, none.
///
/// What `undo` holds is to be done if this fails; it is empty when there is nothing to undo any more. No function mode may
/// be on: then no Python code of torch's runs on the way.
#[pyfunction]
#[pyo3(signature = (slabs, *, buffers = Vec::new(), undo = None))]
pub(crate) fn complete_move(
    py: Python<'_>,
    slabs: Vec<(Bound<'_, TensorGroup>, Bound<'_, PyAny>)>,
    buffers: Vec<(Bound<'_, PyDict>, Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    undo: Option<Bound<'_, PyList>>,
) -> PyResult<()> {
    let torch = Torch::get(py)?;
    let mut checked = Vec::with_capacity(slabs.len());
    for (group, slab) in &slabs {
        checked.push((group.get(), group.get().checked_slab(torch, slab)?));
    }
    let _paused = Paused::new(py)?;
    check_room(checked.iter().map(|(group, _)| group.moved()).sum(), "nothing has moved")?;
    replace(&buffers)?;
    for (group, slab) in &checked {
        group.set_data(torch, slab)?;
    }
    if let Some(undo) = undo {
        undo.call_method0(intern!(py, "clear"))?;
    }
    Ok(())
}

/// Sets items of dicts. A class of dicts may have a `__setitem__` of its own, which may raise: then what was set is put
/// back.
fn replace(items: &[(Bound<'_, PyDict>, Bound<'_, PyAny>, Bound<'_, PyAny>)]) -> PyResult<()> {
    let mut before = Vec::with_capacity(items.len());
    for (place, name, new) in items {
        before.push((place, name, place.get_item(name)?));
        let Err(error) = place.as_any().set_item(name, new) else {
            continue;
        };
        for (place, name, old) in before.into_iter().rev() {
            // Past its `__setitem__`; and what was not there need not have been set.
            match old {
                Some(old) => drop(place.set_item(name, old)),
                None => drop(place.del_item(name)),
            }
        }
        return Err(error);
    }
    Ok(())
}
