//! What grows with what a caller asks for: a `MemoryError` where memory runs out.
//!
//! The collections of the standard library end the process instead, and what `PyO3` makes panics. So whatever may be
//! large is made here. What is small is always to be had: see [`crate::moves::huge_pages`].
#![allow(unsafe_code)] // The C API's way to objects that may not be had.

use pdrs_core::{Error, memory};
use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyList, PyString, PyTuple};

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

/// A Python list of items that know how many they are.
pub(crate) fn new_list<'py, T, I>(py: Python<'py>, items: I) -> PyResult<Bound<'py, PyList>>
where
    I: IntoIterator<Item = PyResult<Bound<'py, T>>, IntoIter: ExactSizeIterator>,
{
    let items = items.into_iter();
    let length = ffi::Py_ssize_t::try_from(items.len())?;
    // SAFETY: a new reference is given, or an error raised. Each place of the list is filled once, with a reference that
    // it takes, and in the order of the list; should items be missing, then places stay empty in a list that goes.
    unsafe {
        let list = Bound::from_owned_ptr_or_err(py, ffi::PyList_New(length))?.cast_into_unchecked::<PyList>();
        let mut at = 0;
        for item in items.take(length.unsigned_abs()) {
            ffi::PyList_SET_ITEM(list.as_ptr(), at, item?.into_ptr());
            at += 1;
        }
        if at < length {
            return Err(PyValueError::new_err(format!("got {at} items of {length}")));
        }
        Ok(list)
    }
}

/// A tuple of two.
#[inline]
pub(crate) fn new_pair<'py, T, U>(
    py: Python<'py>,
    one: Bound<'py, T>,
    other: Bound<'py, U>,
) -> PyResult<Bound<'py, PyTuple>> {
    // SAFETY: a new reference is given, or an error raised; a new tuple takes a reference for each of its places.
    unsafe {
        let pair = Bound::from_owned_ptr_or_err(py, ffi::PyTuple_New(2))?.cast_into_unchecked::<PyTuple>();
        ffi::PyTuple_SET_ITEM(pair.as_ptr(), 0, one.into_ptr());
        ffi::PyTuple_SET_ITEM(pair.as_ptr(), 1, other.into_ptr());
        Ok(pair)
    }
}

/// An `int`.
#[inline]
pub(crate) fn new_number(py: Python<'_>, number: i64) -> PyResult<Bound<'_, PyInt>> {
    // SAFETY: a new reference is given, or an error raised.
    unsafe { Ok(Bound::from_owned_ptr_or_err(py, ffi::PyLong_FromLongLong(number))?.cast_into_unchecked()) }
}

/// What is in a list.
pub(crate) fn to_tuple<'py>(list: &Bound<'py, PyList>) -> PyResult<Bound<'py, PyTuple>> {
    // SAFETY: `list` is a live list; a new reference is given, or an error raised.
    unsafe { Ok(Bound::from_owned_ptr_or_err(list.py(), ffi::PyList_AsTuple(list.as_ptr()))?.cast_into_unchecked()) }
}

/// The keys of a dict, in order.
pub(crate) fn keys_of<'py>(dict: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyList>> {
    // SAFETY: `dict` is a live dict; a new reference is given, or an error raised.
    unsafe { Ok(Bound::from_owned_ptr_or_err(dict.py(), ffi::PyDict_Keys(dict.as_ptr()))?.cast_into_unchecked()) }
}

/// The values of a dict, in order.
pub(crate) fn values_of<'py>(dict: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyList>> {
    // SAFETY: `dict` is a live dict; a new reference is given, or an error raised.
    unsafe { Ok(Bound::from_owned_ptr_or_err(dict.py(), ffi::PyDict_Values(dict.as_ptr()))?.cast_into_unchecked()) }
}

/// A `str`.
pub(crate) fn new_text<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyString>> {
    let length = ffi::Py_ssize_t::try_from(text.len())?;
    // SAFETY: these are so many bytes of UTF-8, which are copied; a new reference is given, or an error raised.
    unsafe {
        let made = ffi::PyUnicode_FromStringAndSize(text.as_ptr().cast(), length);
        Ok(Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked())
    }
}
