//! Iterators over a `RowIndex`, which must not change meanwhile.

use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::index_map::AHEAD;
use crate::python::memory::new_number;
use crate::python::name::Name;
use crate::stacked::row_index::RowIndex;

/// Where a walk is.
struct Step {
    index: Py<RowIndex>,
    position: usize,
    /// What the index counted when the walk began.
    generation: u64,
}

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct RowIterator {
    /// Until the end is reached: an iterator that is kept to no purpose shall not keep a million names.
    step: Mutex<Option<Step>>,
    is_reversed: bool,
    /// Whether it yields the place behind each name, too.
    with_places: bool,
}

impl RowIterator {
    pub(crate) fn new(index: &Bound<'_, RowIndex>, is_reversed: bool, with_places: bool) -> Self {
        let (position, generation) = index.get().begin(index.py(), is_reversed);
        let step = Step { index: index.clone().unbind(), position, generation };
        Self { step: Mutex::new(Some(step)), is_reversed, with_places }
    }

    /// The next name, its table and its row.
    fn advance(&self, py: Python<'_>, step: &mut Step) -> PyResult<Option<(Name, i64, i64)>> {
        let (at, index) = (step.position, step.index.get());
        let next = index.step(
            py,
            step.generation,
            |names| {
                let ahead = if self.is_reversed { at.checked_sub(AHEAD) } else { Some(at + AHEAD) };
                if let Some((name, _)) = ahead.and_then(|ahead| names.entry_at(ahead)) {
                    name.prefetch_object();
                }
                let next = if self.is_reversed { names.entry_before(at) } else { names.entry_at_or_after(at) };
                next.map(|(found, name, place)| (found, name.clone_ref(py), *place))
            },
            |packed| {
                let found = if self.is_reversed { at.checked_sub(1) } else { Some(at) };
                let entry = found.map_or(Ok(None), |found| packed.entry(py, found))?;
                Ok(entry.zip(found).map(|((name, place), found)| (found, name, place)))
            },
        )?;
        let Some((found, name, place)) = next else {
            return Ok(None);
        };
        step.position = if self.is_reversed { found } else { found + 1 };
        Ok(Some((name, (place.table() as u64).cast_signed(), place.row().cast_signed())))
    }
}

#[pymethods]
impl RowIterator {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut step = self.step.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some((name, table, row)) = step.as_mut().map_or(Ok(None), |step| self.advance(py, step))? else {
            let ended = step.take();
            drop(step);
            drop(ended);
            return Ok(None);
        };
        drop(step);
        let name = name.into_text(py);
        if !self.with_places {
            return Ok(Some(name.into_any()));
        }
        let entry = (name, new_number(py, table)?, new_number(py, row)?);
        Ok(Some(entry.into_pyobject(py)?.into_any()))
    }
}
