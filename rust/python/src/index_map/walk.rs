//! Iterators over an `IndexMap`, which must not change meanwhile.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyString;

use crate::index_map::{IndexMap, row_of};
use crate::python::memory::{new_number, new_pair};
use crate::python::name::text_of_utf8;
use crate::python::names::Ahead;

#[derive(Clone, Copy)]
pub(super) enum Yield {
    Name,
    Row,
    Both,
}

struct Cursor {
    index: Py<IndexMap>,
    generation: u64,
    names: Ahead,
}

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct NameIterator {
    /// Until the end is reached: an iterator that is kept to no purpose shall not keep a million names.
    cursor: Mutex<Option<Cursor>>,
    reversed: bool,
    yields: Yield,
}

impl NameIterator {
    pub(super) fn new(index: &Bound<'_, IndexMap>, reversed: bool, yields: Yield) -> Self {
        let names = &index.get().read(index.py()).names;
        let position = if reversed { names.positions() } else { 0 };
        let cursor =
            Cursor { index: index.clone().unbind(), generation: names.generation(), names: Ahead::of(position) };
        Self { cursor: Mutex::new(Some(cursor)), reversed, yields }
    }

    /// What comes next; `RuntimeError` if names were added, removed or moved since the walk began.
    fn advance(&self, py: Python<'_>, cursor: &mut Cursor) -> PyResult<Option<(Option<Py<PyString>>, i64)>> {
        let (index, ahead) = (cursor.index.get(), &mut cursor.names);
        if index.generation.load(Ordering::Acquire) != cursor.generation {
            return Err(PyRuntimeError::new_err("dictionary changed during iteration"));
        }
        if matches!(self.yields, Yield::Name)
            && let Some((_, name)) = ahead.next.pop()
        {
            return Ok(Some((Some(name), 0)));
        }
        let names = &index.read(py).names;
        let step = |position| if self.reversed { names.previous(position) } else { names.next(position) };
        if matches!(self.yields, Yield::Row) {
            return Ok(step(ahead.position).map(|found| {
                ahead.position = found.next;
                (None, row_of(found.place))
            }));
        }
        let make = |position| {
            let made = step(position).map(|found| Ok((found.position, found.next, text_of_utf8(py, found.name)?)));
            made.transpose()
        };
        let found = ahead.step(make)?;
        Ok(found.and_then(|(position, name)| Some((Some(name), row_of(names.place_at(position)?)))))
    }
}

#[pymethods]
impl NameIterator {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut cursor = self.cursor.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        let Some((name, row)) = cursor.as_mut().map_or(Ok(None), |cursor| self.advance(py, cursor))? else {
            let ended = cursor.take();
            drop(cursor);
            drop(ended);
            return Ok(None);
        };
        drop(cursor);
        let Some(name) = name.map(|name| name.into_bound(py)) else {
            return Ok(Some(new_number(py, row)?.into_any()));
        };
        match self.yields {
            Yield::Both => Ok(Some(new_pair(py, name, new_number(py, row)?)?.into_any())),
            _ => Ok(Some(name.into_any())),
        }
    }
}
