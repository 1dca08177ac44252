//! The attributes of an instance, past the `__getattr__` of its class, which makes every look-up slower.
#![allow(unsafe_code)] // The C API's way to the dict of an instance.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// `object.__dict__`, of a class that has none of its own making.
pub(crate) fn attributes<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    // SAFETY: `object` is a live object; a new reference is given, or an error is raised, if it has no dict, too.
    let dict = unsafe {
        let dict = ffi::PyObject_GenericGetDict(object.as_ptr(), std::ptr::null_mut());
        Bound::from_owned_ptr_or_err(object.py(), dict)?
    };
    Ok(dict.cast_into()?)
}
