//! Iterators over a `RowIndex`, which must not change meanwhile.

use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyString;

use pdrs_core::Place;

use crate::python::memory::{OrRaise, new_number};
use crate::stacked::row_index::{PACKED, RowIndex, Walked};

/// How many names are made at a time, at most.
const AT_ONCE: usize = 64;

/// Where a walk is.
struct Step {
    index: Py<RowIndex>,
    position: usize,
    /// What the index counted when the walk began.
    generation: u64,
    /// The names that come next and their positions, the last first. Where they lie may change.
    next: Vec<(usize, Py<PyString>)>,
    /// How many names were made at a time. More and more: who wants the first only does not wait for others.
    at_once: usize,
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
        let step = Step { index: index.clone().unbind(), position, generation, next: Vec::new(), at_once: 0 };
        Self { step: Mutex::new(Some(step)), is_reversed, with_places }
    }

    /// The next name and, if it is wanted, its place.
    fn advance(&self, py: Python<'_>, step: &mut Step) -> PyResult<Option<(Py<PyString>, Option<Place>)>> {
        let Step { index, position, generation, next, at_once } = step;
        index.get().step(py, *generation, |walked| {
            if let Walked::Live(names) = walked
                && *generation == PACKED
            {
                // The names have been read into memory. Where they were packed, positions are their numbers.
                let number = next.pop().map_or(*position, |(found, _)| found + usize::from(self.is_reversed));
                next.clear();
                (*position, *generation) = (names.position_of_number(number), names.generation());
            }
            if next.is_empty() {
                *at_once = (2 * *at_once).clamp(1, AT_ONCE);
                pdrs_core::memory::reserve(next, *at_once).or_raise()?;
                self.walk_on(py, walked, position, next, *at_once)?;
            }
            let Some((found, name)) = next.pop() else { return Ok(None) };
            let place = if self.with_places { Some(walked.place(py, found)?) } else { None };
            Ok(Some((name, place)))
        })
    }

    /// Makes so many names, for which there is room.
    fn walk_on(
        &self,
        py: Python<'_>,
        walked: Walked<'_>,
        position: &mut usize,
        next: &mut Vec<(usize, Py<PyString>)>,
        count: usize,
    ) -> PyResult<()> {
        while next.len() < count {
            match walked.name(py, *position, self.is_reversed) {
                Ok(Some((found, behind, name))) => {
                    next.push((found, name.unbind()));
                    *position = behind;
                }
                // Names in front of one that cannot be had come first.
                Err(error) if next.is_empty() => return Err(error),
                Ok(None) | Err(_) => break,
            }
        }
        next.reverse();
        Ok(())
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
