//! Walks the entries of a `ParameterDict`: names from its keys, values from its dictionary of Parameters.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyDict, PyString};

use crate::parameter_dict::keys::{Cursor, EntryKeys};
use crate::python::cpython::Place;
use crate::python::memory::new_pair;
use crate::torch::own_functions::{Method, is_class_known_as_own};

/// The value of `name`, by a step from a place in the dict, if it lies there.
///
/// The names of a `ParameterDict` nearly always lie in `_parameters` in the order of the keys. So the walk keeps a
/// place in the dict, too. It takes the value from there if the very same key object stands there. Only where the two
/// differ is the module asked.
fn step_to<'py>(
    place: &mut Place,
    dict: &Bound<'py, PyDict>,
    name: &Bound<'py, PyString>,
) -> Option<Bound<'py, PyAny>> {
    let mut next = *place;
    // One entry of the dict may be none of the keys (a Parameter registered beside the entries): step over it.
    for _ in 0..2 {
        if let Some(value) = next.step_to(dict, name)? {
            *place = next;
            return Some(value);
        }
    }
    None
}

/// Yields the values or the items of a `ParameterDict` in order, or in reverse.
///
/// What is not in `parameters`, and everything as soon as torch would ask somebody else, is asked of the module.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct EntryIterator {
    /// Until the end is reached: an iterator that is kept to no purpose shall not keep a million Parameters.
    walk: Mutex<Option<Walk>>,
    method: Method,
}

struct Walk {
    cursor: Cursor,
    place: Place,
    module: Py<PyAny>,
    parameters: Py<PyDict>,
    reversed: bool,
}

/// A name, and its value, or else the module that is to be asked for it.
type Step<'py> = (Bound<'py, PyString>, Result<Bound<'py, PyAny>, Bound<'py, PyAny>>);

impl Walk {
    /// Runs no Python code, so that the lock may be held meanwhile.
    fn step<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Step<'py>>> {
        let Some(name) = self.cursor.next(py)? else {
            return Ok(None);
        };
        let name = name.into_text(py);
        let parameters = self.parameters.bind(py);
        let found = if self.reversed { None } else { step_to(&mut self.place, parameters, &name) };
        let found = found.ok_or_else(|| self.module.bind(py).clone());
        Ok(Some((name, found)))
    }
}

#[pymethods]
impl EntryIterator {
    #[new]
    fn new(
        module: Bound<'_, PyAny>,
        keys: &Bound<'_, EntryKeys>,
        parameters: Bound<'_, PyDict>,
        yields: &str,
        reversed: bool,
    ) -> PyResult<Self> {
        let method = match yields {
            "values" => Method::VALUES,
            "items" => Method::ITEMS,
            _ => {
                return Err(PyValueError::new_err(format!("expected 'values' or 'items', got {yields:?}")));
            }
        };
        let cursor = Cursor::new(keys, reversed);
        let (module, parameters) = (module.unbind(), parameters.unbind());
        Ok(Self {
            walk: Mutex::new(Some(Walk { cursor, place: Place::default(), module, parameters, reversed })),
            method,
        })
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut walk = self.walk.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        let Some(at) = walk.as_mut() else {
            return Ok(None);
        };
        let Some((name, mut found)) = at.step(py)? else {
            let ended = walk.take();
            drop(walk);
            // Python code may run when the module goes.
            drop(ended);
            return Ok(None);
        };
        let module = at.module.bind(py);
        if found.is_ok() && !is_class_known_as_own(module, self.method) {
            found = Err(module.clone());
        }
        drop(walk);
        let value = match found {
            Ok(value) => value,
            Err(module) => module.get_item(&name)?,
        };
        Ok(Some(if self.method == Method::ITEMS { new_pair(py, name, value)?.into_any() } else { value }))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Nobody waits here: the collector may run in the midst of anything. Who holds the lock has the objects, too.
        if let Ok(walk) = self.walk.try_lock()
            && let Some(walk) = walk.as_ref()
        {
            visit.call(&walk.module)?;
            visit.call(&walk.parameters)?;
        }
        Ok(())
    }
}
