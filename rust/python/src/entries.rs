//! Walks the entries of a `ParameterDict`: names from its index, values from its dictionary of Parameters.
#![allow(unsafe_code)] // `PyDict_Next`: a walk through a dict that may change between two steps.

use std::sync::atomic::{AtomicIsize, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;
use pyo3::types::{PyDict, PyString};

use crate::index_map::{Cursor, IndexMap};

/// The place in a dict that a walk has reached.
///
/// The names of a `ParameterDict` nearly always lie in `_parameters` in the order of the index. So the walk keeps a
/// place in the dict, too, and takes the value from there if the very same key object stands there; a look-up is
/// needed only where the two differ.
struct Place(isize);

impl Place {
    /// The value of `name`, by a step from this place or, failing that, by a look-up.
    fn value<'py>(
        &mut self,
        dict: &Bound<'py, PyDict>,
        name: &Bound<'py, PyString>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let stepped = with_critical_section(dict, || self.step_to(dict, name));
        if stepped.is_some() { Ok(stepped) } else { dict.get_item(name) }
    }

    fn step_to<'py>(&mut self, dict: &Bound<'py, PyDict>, name: &Bound<'py, PyString>) -> Option<Bound<'py, PyAny>> {
        let mut position = self.0;
        // One entry of the dict may be none of the index (a Parameter registered beside the entries): step over it.
        for _ in 0..2 {
            let (mut key, mut value) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: `dict` is a live dict, and is not changed by another thread meanwhile (the GIL, or the critical
            // section). `PyDict_Next` checks `position` against the dict as it is now, so a place kept from before a
            // change may give another entry, but none that is not there. What it lends is owned before anything
            // else can run.
            let value = unsafe {
                if ffi::PyDict_Next(dict.as_ptr(), &raw mut position, &raw mut key, &raw mut value) == 0 {
                    return None;
                }
                if key != name.as_ptr() {
                    continue;
                }
                Bound::from_borrowed_ptr(dict.py(), value)
            };
            self.0 = position;
            return Some(value);
        }
        None
    }
}

#[derive(Clone, Copy)]
enum Yield {
    Value,
    Item,
}

/// Yields the values or the items of a `ParameterDict` in order, or in reverse.
///
/// What is not in `parameters` is asked of `other`, a function of the name.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct EntryIterator {
    cursor: Cursor,
    reversed: bool,
    place: AtomicIsize,
    parameters: Py<PyDict>,
    other: Py<PyAny>,
    yields: Yield,
}

#[pymethods]
impl EntryIterator {
    #[new]
    fn new(
        index: &Bound<'_, IndexMap>,
        parameters: Bound<'_, PyDict>,
        other: Bound<'_, PyAny>,
        yields: &str,
        reversed: bool,
    ) -> PyResult<Self> {
        let yields = match yields {
            "values" => Yield::Value,
            "items" => Yield::Item,
            _ => {
                return Err(PyValueError::new_err(format!("expected 'values' or 'items', got {yields:?}")));
            }
        };
        Ok(Self {
            cursor: Cursor::new(index, reversed),
            reversed,
            place: AtomicIsize::new(0),
            parameters: parameters.unbind(),
            other: other.unbind(),
            yields,
        })
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some((name, _)) = self.cursor.next(py)? else {
            return Ok(None);
        };
        let name = name.into_text(py);
        let parameters = self.parameters.bind(py);
        let found = if self.reversed {
            parameters.get_item(&name)?
        } else {
            // Only a hint: if two threads share the iterator, the worst that happens is a look-up.
            let mut place = Place(self.place.load(Ordering::Relaxed));
            let found = place.value(parameters, &name)?;
            self.place.store(place.0, Ordering::Relaxed);
            found
        };
        let value = match found {
            Some(value) => value,
            None => self.other.bind(py).call1((&name,))?,
        };
        Ok(Some(match self.yields {
            Yield::Value => value,
            Yield::Item => (name, value).into_pyobject(py)?.into_any(),
        }))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.parameters)?;
        visit.call(&self.other)
    }
}
