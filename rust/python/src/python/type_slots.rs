//! Lets the interpreter call native code where torch.compile traces Python functions.
//!
//! `pd["x"]`, `"x" in pd`, `len(pd)` and their like reach `CPython` through slots of the type, which normally call the
//! Python functions `__getitem__` and so on. torch.compile can only trace Python functions, so the class must have them;
//! but calling one costs more than what it does. [`use_native_slots`] fills the slots with native functions that do what
//! is usual, and leave the rest to the Python functions, by way of `CPython`'s own slots. Subclasses that
//! override one of these functions keep `CPython`'s slots, which call what they see; and assigning to an attribute of a
//! class puts them back.
//!
//! When the interpreter ends, it unwinds the stack of any other thread that runs Python code. So the functions here may
//! be unwound, and have nothing to drop when they call `CPython`'s slots.
#![allow(unsafe_code)] // Writes five fields of a type object, and calls what was there.

use std::ffi::c_int;
use std::mem::transmute;

use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::index_map::IndexMap;
use crate::parameter_dict::entries::{delete_entry, get_entry, set_entry};
use crate::torch::own_functions::{Method, is_class_own};

type Object = *mut ffi::PyObject;
type Subscript = unsafe extern "C-unwind" fn(Object, Object) -> Object;
type Assign = unsafe extern "C-unwind" fn(Object, Object, Object) -> c_int;
type Contains = unsafe extern "C-unwind" fn(Object, Object) -> c_int;
type Length = unsafe extern "C-unwind" fn(Object) -> ffi::Py_ssize_t;

/// The slots of a class made in Python, and the class of Parameters.
struct Usual {
    subscript: Subscript,
    assign: Assign,
    contains: Contains,
    length: Length,
    parameter: Py<PyType>,
}

static USUAL: PyOnceLock<Usual> = PyOnceLock::new();

/// Makes `[]`, `in` and `len` on direct instances of `class` native, as far as they need no Python code.
#[pyfunction]
pub(crate) fn use_native_slots(class: &Bound<'_, PyType>, parameter: &Bound<'_, PyType>) -> PyResult<()> {
    let py = class.py();
    let class = class.as_ptr().cast::<ffi::PyTypeObject>();
    let expected = || PyTypeError::new_err("expected a class made in Python, with [], in and len");
    // SAFETY: `class` is a live type object. A class made in Python is a heap type, whose `tp_as_sequence` and
    // `tp_as_mapping` point into the type object itself, so only this class is changed. The caller does this once,
    // before there are instances. Functions of both ABIs are called in the same way.
    unsafe {
        if (*class).tp_flags & ffi::Py_TPFLAGS_HEAPTYPE == 0
            || (*class).tp_as_sequence.is_null()
            || (*class).tp_as_mapping.is_null()
        {
            return Err(expected());
        }
        let (sequence, mapping) = (&mut *(*class).tp_as_sequence, &mut *(*class).tp_as_mapping);
        // The same for all such classes, so it is kept once.
        let usual = Usual {
            subscript: transmute::<ffi::binaryfunc, Subscript>(mapping.mp_subscript.ok_or_else(expected)?),
            assign: transmute::<ffi::objobjargproc, Assign>(mapping.mp_ass_subscript.ok_or_else(expected)?),
            contains: transmute::<ffi::objobjproc, Contains>(sequence.sq_contains.ok_or_else(expected)?),
            length: transmute::<ffi::lenfunc, Length>(mapping.mp_length.ok_or_else(expected)?),
            parameter: parameter.clone().unbind(),
        };
        let _ = USUAL.set(py, usual);
        mapping.mp_subscript = Some(transmute::<Subscript, ffi::binaryfunc>(subscript));
        mapping.mp_ass_subscript = Some(transmute::<Assign, ffi::objobjargproc>(assign));
        sequence.sq_contains = Some(transmute::<Contains, ffi::objobjproc>(contains));
        sequence.sq_length = Some(transmute::<Length, ffi::lenfunc>(length));
        mapping.mp_length = sequence.sq_length;
        ffi::PyType_Modified(class);
    }
    Ok(())
}

/// The slots are filled after this has been set.
fn usual(py: Python<'_>) -> &'static Usual {
    USUAL.get(py).expect("the slots have been filled")
}

// SAFETY, of all four: CPython calls a slot with the GIL held (attached) and with live objects that it keeps alive
// meanwhile, and so may its own slot be called.

unsafe extern "C-unwind" fn subscript(module: Object, key: Object) -> Object {
    // SAFETY: see above.
    unsafe {
        let py = Python::assume_attached();
        let value = {
            let (module, key) = (Borrowed::from_ptr(py, module), Borrowed::from_ptr(py, key));
            get_entry(&module, &key).map(|value| value.map(Bound::into_ptr))
        };
        match value {
            Ok(Some(value)) => value,
            Ok(None) => (usual(py).subscript)(module, key),
            Err(error) => {
                error.restore(py);
                std::ptr::null_mut()
            }
        }
    }
}

unsafe extern "C-unwind" fn assign(module: Object, key: Object, value: Object) -> c_int {
    // SAFETY: see above; the value is null if the entry is to be deleted.
    unsafe {
        let py = Python::assume_attached();
        let done = {
            let (module, key) = (Borrowed::from_ptr(py, module), Borrowed::from_ptr(py, key));
            match Borrowed::from_ptr_or_opt(py, value) {
                Some(value) => set_entry(&module, &key, &value, usual(py).parameter.bind(py)),
                None => delete_entry(&module, &key),
            }
        };
        match done {
            Ok(true) => 0,
            Ok(false) => (usual(py).assign)(module, key, value),
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    }
}

unsafe extern "C-unwind" fn contains(module: Object, key: Object) -> c_int {
    // SAFETY: see above.
    unsafe {
        let py = Python::assume_attached();
        let found = {
            let (module, key) = (Borrowed::from_ptr(py, module), Borrowed::from_ptr(py, key));
            own_index(&module, Method::CONTAINS)
                .and_then(|index| index.map(|index| index.get().__contains__(&key)).transpose())
        };
        match found {
            Ok(Some(found)) => found.into(),
            Ok(None) => (usual(py).contains)(module, key),
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    }
}

unsafe extern "C-unwind" fn length(module: Object) -> ffi::Py_ssize_t {
    // SAFETY: see above.
    unsafe {
        let py = Python::assume_attached();
        let found = {
            let module = Borrowed::from_ptr(py, module);
            // A map holds fewer than 2^31 names.
            own_index(&module, Method::LEN).map(|index| index.map(|index| index.get().len(py).cast_signed()))
        };
        match found {
            Ok(Some(found)) => found,
            Ok(None) => (usual(py).length)(module),
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    }
}

/// The index of a module, if a method needs to ask nobody.
fn own_index<'py>(module: &Bound<'py, PyAny>, method: Method) -> PyResult<Option<Bound<'py, IndexMap>>> {
    if !is_class_own(module, method)? {
        return Ok(None);
    }
    Ok(Some(module.getattr(intern!(module.py(), "_keys"))?.cast_into()?))
}
