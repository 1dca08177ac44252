//! Lets the interpreter call native code where torch.compile traces Python functions.
//!
//! `"x" in pd`, `len(pd)` and `while pd` reach `CPython` through slots of the type, which normally call the Python
//! functions `__contains__` and `__len__`. torch.compile can only trace Python functions, so the class must have them;
//! but calling one costs more than what it does. [`use_native_slots`] fills the slots with native functions that do what
//! the Python functions do, and leaves those in the class. Subclasses get `CPython`'s own slots, which call the functions
//! they see, so an override is always respected; so does assigning to the attribute of the class.
#![allow(unsafe_code)] // Writes three fields of a type object; reads the instance without a detour through Python.

use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::index_map::IndexMap;

/// Makes `in` and `len` on direct instances of `class` ask their `_keys` natively.
#[pyfunction]
pub(crate) fn use_native_slots(class: &Bound<'_, PyType>) -> PyResult<()> {
    let class = class.as_ptr().cast::<ffi::PyTypeObject>();
    // SAFETY: `class` is a live type object. A class made in Python is a heap type, whose `tp_as_sequence` and
    // `tp_as_mapping` point into the type object itself, so only this class is changed. The caller does this once, before there are instances.
    unsafe {
        if (*class).tp_flags & ffi::Py_TPFLAGS_HEAPTYPE == 0
            || (*class).tp_as_sequence.is_null()
            || (*class).tp_as_mapping.is_null()
        {
            return Err(PyTypeError::new_err("expected a class made in Python"));
        }
        (*(*class).tp_as_sequence).sq_contains = Some(contains);
        (*(*class).tp_as_sequence).sq_length = Some(length);
        (*(*class).tp_as_mapping).mp_length = Some(length);
        ffi::PyType_Modified(class);
    }
    Ok(())
}

unsafe extern "C" fn contains(module: *mut ffi::PyObject, key: *mut ffi::PyObject) -> std::ffi::c_int {
    // SAFETY: CPython calls a slot with the GIL held (attached) and with live objects that it keeps alive meanwhile.
    let (module, key) = unsafe {
        let py = Python::assume_attached();
        (Borrowed::from_ptr(py, module), Borrowed::from_ptr(py, key))
    };
    or_minus_one(module.py(), index_of(&module).and_then(|index| index.get().__contains__(&key)).map(Into::into))
}

unsafe extern "C" fn length(module: *mut ffi::PyObject) -> ffi::Py_ssize_t {
    // SAFETY: as in `contains`.
    let module = unsafe { Borrowed::from_ptr(Python::assume_attached(), module) };
    let py = module.py();
    // A map holds fewer than 2^31 names.
    or_minus_one(py, index_of(&module).map(|index| index.get().len(py).cast_signed()))
}

fn index_of<'py>(module: &Bound<'py, PyAny>) -> PyResult<Bound<'py, IndexMap>> {
    Ok(module.getattr(intern!(module.py(), "_keys"))?.cast_into()?)
}

/// What a slot gives: -1 says that there is an exception.
fn or_minus_one<T: From<i8>>(py: Python<'_>, result: PyResult<T>) -> T {
    result.unwrap_or_else(|error| {
        error.restore(py);
        T::from(-1)
    })
}
