//! Lets the interpreter call native code where torch.compile traces Python functions.
//!
//! `pd["x"]`, `"x" in pd`, `len(pd)` and their like reach `CPython` through slots of the type, which normally call the
//! Python functions `__getitem__` and so on. torch.compile can only trace Python functions, so the class must have them;
//! but calling one costs more than what it does. [`use_native_slots`] fills the slots with native functions that do what
//! is usual, and leave the rest to the Python functions, by way of `CPython`'s own slots. Subclasses that
//! override one of these functions keep `CPython`'s slots, which call what they see; and assigning to an attribute of a
//! class puts them back.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::parameter_dict::entries::{delete_entry, get_entry, set_entry};
use crate::parameter_dict::keys::EntryKeys;
use crate::python::cpython::{NativeSlots, fill_slots};
use crate::torch::own_functions::{Method, is_class_own};

/// The class of Parameters.
static PARAMETER: PyOnceLock<Py<PyType>> = PyOnceLock::new();

struct Entries;

impl NativeSlots for Entries {
    fn get<'py>(module: &Bound<'py, PyAny>, key: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        get_entry(module, key)
    }

    fn set(module: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>, value: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        match (value, PARAMETER.get(module.py())) {
            (Some(value), Some(parameter)) => set_entry(module, key, value, parameter.bind(module.py())),
            (Some(_), None) => Ok(false),
            (None, _) => delete_entry(module, key),
        }
    }

    fn contains(module: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>) -> PyResult<Option<bool>> {
        own_keys(module, Method::CONTAINS)?.map(|keys| keys.get().__contains__(key)).transpose()
    }

    fn len(module: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        Ok(own_keys(module, Method::LEN)?.map(|keys| keys.get().len(module.py())))
    }
}

/// Makes `[]`, `in` and `len` on direct instances of `class` native, as far as they need no Python code.
#[pyfunction]
pub(crate) fn use_native_slots(class: &Bound<'_, PyType>, parameter: &Bound<'_, PyType>) -> PyResult<()> {
    let _ = PARAMETER.set(class.py(), parameter.clone().unbind());
    fill_slots::<Entries>(class)
}

/// The keys of a module, if a method needs to ask nobody.
fn own_keys<'py>(module: &Bound<'py, PyAny>, method: Method) -> PyResult<Option<Bound<'py, EntryKeys>>> {
    if !is_class_own(module, method)? {
        return Ok(None);
    }
    Ok(Some(module.getattr(intern!(module.py(), "_keys"))?.cast_into()?))
}
