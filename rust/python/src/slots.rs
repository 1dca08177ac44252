//! Lets the interpreter call native code where torch.compile traces Python functions.
//!
//! `"x" in pd` reaches `CPython` through a slot of the type, which normally calls the Python function `__contains__`.
//! torch.compile can only trace the Python function, so the class must have one; but calling it costs more than the
//! look-up. [`use_native_slots`] fills the slot with a native function that does what the Python function does, and
//! leaves the function in the class. Subclasses get `CPython`'s own slot, which calls the function they see, so an
//! override is always respected; so does assigning to the attribute of the class.
#![allow(unsafe_code)] // Writes one field of a type object; reads the instance without a detour through Python.

use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::index_map::IndexMap;

/// Makes `in` on direct instances of `class` a native look-up in their `_keys`.
#[pyfunction]
pub(crate) fn use_native_slots(class: &Bound<'_, PyType>) -> PyResult<()> {
    let class = class.as_ptr().cast::<ffi::PyTypeObject>();
    // SAFETY: `class` is a live type object. A class made in Python is a heap type, whose `tp_as_sequence` points into
    // the type object itself, so only this class is changed. The caller does this once, before there are instances.
    unsafe {
        if (*class).tp_flags & ffi::Py_TPFLAGS_HEAPTYPE == 0 || (*class).tp_as_sequence.is_null() {
            return Err(PyTypeError::new_err("expected a class made in Python"));
        }
        (*(*class).tp_as_sequence).sq_contains = Some(contains);
        ffi::PyType_Modified(class);
    }
    Ok(())
}

unsafe extern "C" fn contains(module: *mut ffi::PyObject, key: *mut ffi::PyObject) -> std::ffi::c_int {
    // SAFETY: CPython calls a slot with the GIL held (attached) and with two live objects that it keeps alive meanwhile.
    let (module, key) = unsafe {
        let py = Python::assume_attached();
        (Borrowed::from_ptr(py, module), Borrowed::from_ptr(py, key))
    };
    match find(&module, &key) {
        Ok(found) => found.into(),
        Err(error) => {
            error.restore(module.py());
            -1
        }
    }
}

fn find(module: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>) -> PyResult<bool> {
    let index = module.getattr(intern!(module.py(), "_keys"))?;
    index.cast::<IndexMap>()?.get().__contains__(key)
}
