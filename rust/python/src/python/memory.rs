//! What grows with what a caller asks for: a `MemoryError` where memory runs out.
//!
//! The collections of the standard library end the process instead, and what `PyO3` makes panics. So whatever may be
//! large is made here. What is small is always to be had: see [`crate::moves::pages`].

use pdrs_core::{Error, memory};
use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

pub(crate) use crate::python::cpython::{new_list, new_number, new_pair};

/// The exception for what the core refuses.
pub(crate) fn refused(error: Error) -> PyErr {
    match error {
        Error::Memory => PyMemoryError::new_err(error.to_string()),
        Error::Full { .. } => PyOverflowError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// Makes a Python exception of an error of the core.
pub(crate) trait OrRaise<T> {
    fn or_raise(self) -> PyResult<T>;
}

impl<T> OrRaise<T> for pdrs_core::Result<T> {
    fn or_raise(self) -> PyResult<T> {
        self.map_err(refused)
    }
}

/// An empty list with room for so many items.
pub(crate) fn with_capacity<T>(capacity: usize) -> PyResult<Vec<T>> {
    memory::with_capacity(capacity).or_raise()
}

/// Adds an item; the list grows by doubling.
#[inline]
pub(crate) fn push<T>(list: &mut Vec<T>, item: T) -> PyResult<()> {
    memory::push(list, item).or_raise()
}

/// A list of all items.
pub(crate) fn collect<T>(items: impl IntoIterator<Item = T>) -> PyResult<Vec<T>> {
    memory::collect(items).or_raise()
}

/// A list of all items, up to the first error.
pub(crate) fn try_collect<T>(items: impl IntoIterator<Item = PyResult<T>>) -> PyResult<Vec<T>> {
    let mut items = items.into_iter();
    let mut list = with_capacity(items.size_hint().0)?;
    items.try_for_each(|item| push(&mut list, item?))?;
    Ok(list)
}

/// What is in a list.
pub(crate) fn to_tuple<'py>(list: &Bound<'py, PyList>) -> PyResult<Bound<'py, PyTuple>> {
    Ok(list.py().get_type::<PyTuple>().call1((list,))?.cast_into()?)
}

/// The keys and values of a dict, in order, whatever changes it afterwards.
pub(crate) fn items_of<'py>(dict: &Bound<'py, PyDict>) -> PyResult<Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>> {
    collect(dict.iter())
}

/// The values of a dict, in order, whatever changes it afterwards.
pub(crate) fn values_of<'py>(dict: &Bound<'py, PyDict>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    collect(dict.iter().map(|(_, value)| value))
}

/// A `str`.
pub(crate) fn new_text<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyString>> {
    PyString::from_bytes(py, text.as_bytes())
}
