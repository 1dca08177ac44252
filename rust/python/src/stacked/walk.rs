//! Iterators over a `RowIndex`, which must not change meanwhile.

use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyString;

use pdrs_core::Place;

use crate::python::memory::new_number;
use crate::python::names::Ahead;
use crate::stacked::row_index::{PACKED, RowIndex, Walked};

/// Where a walk is.
struct Step {
    index: Py<RowIndex>,
    /// What the index counted when the walk began.
    generation: u64,
    /// Where they lie may change.
    names: Ahead,
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
        let step = Step { index: index.clone().unbind(), generation, names: Ahead::of(position) };
        Self { step: Mutex::new(Some(step)), is_reversed, with_places }
    }

    /// The next name and, if it is wanted, its place.
    fn advance(&self, py: Python<'_>, step: &mut Step) -> PyResult<Option<(Py<PyString>, Option<Place>)>> {
        let Step { index, generation, names: ahead } = step;
        index.get().step(py, *generation, |walked| {
            if let Walked::Live(names) = walked
                && *generation == PACKED
            {
                // The names have been read into memory. Where they were packed, positions are their numbers.
                let next = ahead.next.pop();
                let number = next.map_or(ahead.position, |(found, _)| found + usize::from(self.is_reversed));
                ahead.next.clear();
                (ahead.position, *generation) = (names.position_of_number(number), names.generation());
            }
            let Some((found, name)) = ahead.step(|position| walked.name(py, position, self.is_reversed))? else {
                return Ok(None);
            };
            let place = if self.with_places { Some(walked.place(py, found)?) } else { None };
            Ok(Some((name, place)))
        })
    }
}

#[pymethods]
impl RowIterator {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut step = self.step.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some((name, place)) = step.as_mut().map_or(Ok(None), |step| self.advance(py, step))? else {
            let ended = step.take();
            drop(step);
            drop(ended);
            return Ok(None);
        };
        drop(step);
        let name = name.into_bound(py);
        let Some(place) = place else {
            return Ok(Some(name.into_any()));
        };
        let table = new_number(py, (place.table() as u64).cast_signed())?;
        let entry = (name, table, new_number(py, place.row().cast_signed())?);
        Ok(Some(entry.into_pyobject(py)?.into_any()))
    }
}
