//! Many names that are given in one call, in whatever holds them.

use pdrs_core::names::text::Text;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyString, PyTuple};

use crate::python::memory::{self, OrRaise};
use crate::python::name::{HASH, OfText, exact_text};
use crate::torch::bytes::hint;

/// How many names ahead one is fetched from memory, where names mostly lie scattered.
pub(crate) const AHEAD: usize = 16;

/// How many names are made at a time, at most.
const AT_ONCE: usize = 64;

/// A function that pickles call.
pub(crate) fn of_pickles<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("pdrs._pickle")?.getattr(name)
}

/// Names in order, each prefetched ahead.
pub(crate) fn prefetched<Q: Text>(names: &[Q]) -> impl ExactSizeIterator<Item = &Q> {
    let ahead = |at: usize| names.get(at + AHEAD).into_iter().for_each(Text::prefetch);
    names.iter().enumerate().map(move |(at, name)| {
        ahead(at);
        name
    })
}

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

/// Names that are made ahead of a walk, a few at a time.
pub(crate) struct Ahead {
    /// Where the walk goes on.
    pub(crate) position: usize,
    /// The names that come next and their positions, the last first.
    pub(crate) next: Vec<(usize, Py<PyString>)>,
    /// How many names were made at a time. More and more: who wants the first only does not wait for others.
    at_once: usize,
}

impl Ahead {
    pub(crate) fn of(position: usize) -> Self {
        Self { position, next: Vec::new(), at_once: 0 }
    }

    /// The next name and its position. `make` gives the name at a position or behind it, with its own position, and that
    /// of the walk behind it.
    pub(crate) fn step<'py>(
        &mut self,
        mut make: impl FnMut(usize) -> PyResult<Option<(usize, usize, Bound<'py, PyString>)>>,
    ) -> PyResult<Option<(usize, Py<PyString>)>> {
        if self.next.is_empty() {
            self.at_once = (2 * self.at_once).clamp(1, AT_ONCE);
            pdrs_core::memory::reserve(&mut self.next, self.at_once).or_raise()?;
            while self.next.len() < self.at_once {
                match make(self.position) {
                    Ok(Some((found, behind, name))) => {
                        self.next.push((found, name.unbind()));
                        self.position = behind;
                    }
                    // Names in front of one that cannot be had come first.
                    Err(error) if self.next.is_empty() => return Err(error),
                    Ok(None) | Err(_) => break,
                }
            }
            self.next.reverse();
        }
        Ok(self.next.pop())
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
