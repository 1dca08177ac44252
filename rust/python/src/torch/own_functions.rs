//! Whether torch's own functions stand where a native method of `ParameterDict` goes around them.
//!
//! `pdrs/_torch/own_functions.py` says which functions those are, for each method, and looks at a class. What it finds
//! is kept under the version tag of the class. `CPython` gives a class a new tag whenever an attribute of it, or of one
//! of its bases, is set or deleted. So a patch is seen at once, and the usual answer costs one comparison.

use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString};

use crate::python::cpython::{attributes, version_tag};

/// A method of `ParameterDict`: its place in the table in `pdrs/_torch/own_functions.py`, which begins with those named here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Method(u32);

impl Method {
    pub(crate) const GET: Self = Self(0);
    pub(crate) const SET: Self = Self(1);
    pub(crate) const CONTAINS: Self = Self(2);
    pub(crate) const LEN: Self = Self(3);
    pub(crate) const DELETE: Self = Self(4);
    pub(crate) const POP: Self = Self(5);
    pub(crate) const POPITEM: Self = Self(6);
    pub(crate) const VALUES: Self = Self(7);
    pub(crate) const ITEMS: Self = Self(8);
}

const FIRST: [&str; 9] =
    ["__getitem__", "__setitem__", "__contains__", "__len__", "__delitem__", "pop", "popitem", "values", "items"];

struct Table {
    /// Gives, for a class, the bits of the methods that must ask others.
    look: Py<PyAny>,
    /// The functions that each method would find in the attributes of an instance first.
    in_instances: Vec<Vec<Py<PyString>>>,
    /// torch's hooks for every Parameter that is registered with any module.
    hooks: Py<PyDict>,
}

static TABLE: PyOnceLock<Table> = PyOnceLock::new();

/// Version tags, and with each the bits of its class. Two of the same place replace each other.
static KNOWN: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

/// Says how to look at a class; once, when `pdrs` is imported.
#[pyfunction]
pub(crate) fn watch_functions(
    py: Python<'_>,
    methods: Vec<String>,
    in_instances: Vec<Vec<Py<PyString>>>,
    look: Py<PyAny>,
    hooks: Py<PyDict>,
) -> PyResult<()> {
    if methods.len() > 32 || methods.len() != in_instances.len() || !methods.iter().take(FIRST.len()).eq(&FIRST) {
        return Err(PyValueError::new_err(format!("expected at most 32 methods, {FIRST:?} first, got {methods:?}")));
    }
    let _ = TABLE.set(py, Table { look, in_instances, hooks });
    Ok(())
}

/// Whether nothing but torch's own functions, and this package's, is asked by a method, as far as the class says.
#[inline]
pub(crate) fn is_class_own(module: &Bound<'_, PyAny>, method: Method) -> PyResult<bool> {
    let tag = version_tag(module);
    let known = KNOWN[tag as usize % KNOWN.len()].load(Ordering::Relaxed);
    // 0 says that the class has no tag at present.
    let asked = if tag != 0 && known >> 32 == u64::from(tag) { known as u32 } else { look_at(module)? };
    Ok(asked & (1 << method.0) == 0)
}

/// The same, but false if somebody would have to look at the class first. It runs no Python code.
#[inline]
pub(crate) fn is_class_known_as_own(module: &Bound<'_, PyAny>, method: Method) -> bool {
    let tag = version_tag(module);
    let known = KNOWN[tag as usize % KNOWN.len()].load(Ordering::Relaxed);
    tag != 0 && known >> 32 == u64::from(tag) && known as u32 & (1 << method.0) == 0
}

#[cold]
fn look_at(module: &Bound<'_, PyAny>) -> PyResult<u32> {
    let py = module.py();
    let Some(table) = TABLE.get(py) else {
        return Ok(u32::MAX);
    };
    let class = module.get_type();
    // Looking an attribute up gives the class a tag. It is read first: should the class change meanwhile, what is found
    // is kept for a tag that is gone.
    class.hasattr(intern!(py, "__getitem__"))?;
    let tag = version_tag(module);
    let asked: u32 = table.look.bind(py).call1((class,))?.extract()?;
    KNOWN[tag as usize % KNOWN.len()].store(u64::from(tag) << 32 | u64::from(asked), Ordering::Relaxed);
    Ok(asked)
}

/// The attributes of a module, and its Parameters, if a method needs to ask nobody.
///
/// Not if the Parameters lie in anything else than an exact dict, which may have methods of its own.
#[inline]
pub(crate) fn own_parts<'py>(
    module: &Bound<'py, PyAny>,
    method: Method,
) -> PyResult<Option<(Bound<'py, PyDict>, Bound<'py, PyDict>)>> {
    let py = module.py();
    if !is_class_own(module, method)? {
        return Ok(None);
    }
    let attributes = attributes(module)?;
    if let Some(table) = TABLE.get(py) {
        for name in &table.in_instances[method.0 as usize] {
            if attributes.contains(name)? {
                return Ok(None);
            }
        }
    }
    let parameters = attributes.get_item(intern!(py, "_parameters"))?;
    Ok(parameters.and_then(|found| found.cast_into_exact::<PyDict>().ok()).map(|found| (attributes, found)))
}

/// Whether nobody has hooks on the registration of Parameters.
pub(crate) fn is_free_of_hooks(py: Python<'_>) -> bool {
    TABLE.get(py).is_some_and(|table| table.hooks.bind(py).is_empty())
}

/// Whether nothing but torch's own functions, and this package's, would be asked if torch's class did what a method does.
///
/// The Parameters must also lie in an exact dict.
#[pyfunction]
pub(crate) fn is_own(module: &Bound<'_, PyAny>, method: u32) -> PyResult<bool> {
    Ok(own_parts(module, Method(method))?.is_some())
}

/// The same, wherever the Parameters lie.
#[pyfunction]
pub(crate) fn are_functions_own(module: &Bound<'_, PyAny>, method: u32) -> PyResult<bool> {
    if !is_class_own(module, Method(method))? {
        return Ok(false);
    }
    let (py, attributes) = (module.py(), attributes(module)?);
    let Some(table) = TABLE.get(py) else {
        return Ok(false);
    };
    for name in &table.in_instances[method as usize] {
        if attributes.contains(name)? {
            return Ok(false);
        }
    }
    Ok(true)
}
