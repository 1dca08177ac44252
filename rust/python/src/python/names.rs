//! Many names that are given in one call, in whatever holds them.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::list::BoundListIterator;
use pyo3::types::{PyList, PyString, PyTuple};

use crate::index_map::AHEAD;
use crate::python::memory;
use crate::python::name::{HASH, Name, OfText, exact_text};
use crate::torch::bytes::hint;

/// The names as an exact list or tuple: themselves, if they are one, and otherwise what Python makes of them.
///
/// What lies in it has not been looked at.
pub(crate) fn listed<'py>(names: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static LISTED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // Of a subclass, what it is to be asked for may not be what lies in it.
    if names.is_exact_instance_of::<PyList>() || names.is_exact_instance_of::<PyTuple>() {
        return Ok(names.clone());
    }
    LISTED.import(names.py(), "pdrs._torch.names", "listed")?.call1((names,))
}

/// The names in a list, up to the first that is no exact `str`.
///
/// Neither to hash nor to drop one runs Python code, so nothing changes the list meanwhile.
pub(crate) struct ExactNames<'py> {
    names: BoundListIterator<'py>,
    has_other: bool,
}

impl<'py> ExactNames<'py> {
    /// `None` if this is no exact list.
    pub(crate) fn of(names: &Bound<'py, PyAny>) -> Option<Self> {
        let list = names.cast_exact::<PyList>().ok()?;
        Some(Self { names: list.iter(), has_other: false })
    }

    /// Whether nothing else was met.
    pub(crate) fn are_all(&self) -> bool {
        !self.has_other
    }
}

impl Iterator for ExactNames<'_> {
    type Item = Name;

    fn next(&mut self) -> Option<Name> {
        let text = self.names.next()?.cast_into_exact::<PyString>();
        self.has_other |= text.is_err();
        text.ok().map(Name::new)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, self.names.size_hint().1)
    }
}

/// The names as exact `str`; a `TypeError` that says what came instead, and where, otherwise.
pub(crate) fn to_names<N: OfText>(names: &Bound<'_, PyAny>) -> PyResult<Vec<N>> {
    to_names_that(names, |_| Ok(()))
}

/// The same; `check` may refuse one.
pub(crate) fn to_names_that<'py, N: OfText>(
    names: &Bound<'py, PyAny>,
    check: impl Fn(&Bound<'py, PyString>) -> PyResult<()>,
) -> PyResult<Vec<N>> {
    let names = listed(names)?;
    let mut converted = memory::with_capacity(names.len()?)?;
    let mut take = |name: &Bound<'py, PyAny>| {
        match exact_text(name)? {
            Some(text) => {
                check(&text)?;
                memory::push(&mut converted, N::of_text(text)?)?;
            }
            None => return Err(refused(name, converted.len())),
        }
        Ok(())
    };
    if let Ok(list) = names.cast_exact::<PyList>() {
        for (at, name) in list.iter().enumerate() {
            if let Ok(ahead) = list.get_item(at + AHEAD) {
                hint(ahead.as_ptr() as usize + HASH);
            }
            take(&name)?;
        }
    } else {
        names.cast::<PyTuple>()?.iter().try_for_each(|name| take(&name))?;
    }
    Ok(converted)
}

fn refused(name: &Bound<'_, PyAny>, at: usize) -> PyErr {
    let refuse = || name.py().import("pdrs._torch.names")?.call_method1("refuse", (name, at));
    refuse().expect_err("it raises")
}
