//! Sweeps over the Parameters of a module before a move: what there is to move, and whether there is anything.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::tensor::{Found, Torch, prefetch};

/// How many Parameters are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// Calls `each` with every Parameter that is not None and its gradient, until it gives false.
fn walk<'py>(
    torch: &Torch,
    parameters: &Bound<'py, PyDict>,
    mut each: impl FnMut(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>) -> PyResult<bool>,
) -> PyResult<()> {
    let name = intern!(parameters.py(), "grad");
    // A list of them, because what a `grad` property of a subclass runs might change the dict.
    let values = parameters.values();
    let mut ahead = values.iter();
    ahead.by_ref().take(BATCH).for_each(|value| prefetch(&value));
    for value in &values {
        if let Some(next) = ahead.next() {
            prefetch(&next);
        }
        if value.is_none() {
            continue;
        }
        let gradient = if torch.is_plain(&value) { torch.gradient(&value)? } else { value.getattr(name)? };
        if !each(value, (!gradient.is_none()).then_some(gradient))? {
            return Ok(());
        }
    }
    Ok(())
}

/// Adds the Parameters of a module, and their gradients, to the ends of two lists; those that are None are left out.
#[pyfunction]
pub(crate) fn collect_parameters(
    parameters: &Bound<'_, PyDict>,
    found: &Bound<'_, PyList>,
    gradients: &Bound<'_, PyList>,
) -> PyResult<()> {
    let mut all = Vec::with_capacity(parameters.len());
    walk(Torch::get(parameters.py())?, parameters, |parameter, gradient| {
        if let Some(gradient) = gradient {
            gradients.append(gradient)?;
        }
        all.push(parameter);
        Ok(true)
    })?;
    // At once: an `append` for each takes as long as all the rest that is not torch's.
    let end = found.len();
    found.set_slice(end, end, PyList::new(parameters.py(), all)?.as_any())
}

/// One tensor of each dtype and device among the Parameters of a module and their gradients.
///
/// `None` if there is an unusual one, which `group_tensors` would leave to torch.
#[pyfunction]
pub(crate) fn kinds_of_parameters<'py>(parameters: &Bound<'py, PyDict>) -> PyResult<Option<Vec<Bound<'py, PyAny>>>> {
    let torch = Torch::get(parameters.py())?;
    let mut kinds: Vec<(Found, Bound<'py, PyAny>)> = Vec::new();
    let mut dims = Vec::new();
    let mut usual = true;
    walk(torch, parameters, |parameter, gradient| {
        for tensor in std::iter::once(parameter).chain(gradient) {
            dims.clear();
            match torch.find(&tensor, &mut dims)? {
                Err(_) => usual = false,
                Ok(found) => {
                    // The latest kind is nearly always that of the next.
                    let same = |(kind, _): &&(Found, _)| kind.dtype == found.dtype && kind.device == found.device;
                    if kinds.iter().rev().find(same).is_none() {
                        kinds.push((found, tensor));
                    }
                }
            }
        }
        Ok(usual)
    })?;
    Ok(usual.then(|| kinds.into_iter().map(|(_, tensor)| tensor).collect()))
}
