//! `Places`: the table and the row of each of many names, as Python sees them.

use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray1};
use pdrs_core::{Place, Places as Found};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::python::memory::{self, OrRaise, new_list};

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct Places(Arc<Found>);

impl From<Found> for Places {
    fn from(found: Found) -> Self {
        Self(Arc::new(found))
    }
}

impl From<&Arc<Found>> for Places {
    fn from(found: &Arc<Found>) -> Self {
        Self(found.clone())
    }
}

impl Places {
    pub(crate) fn found(&self) -> &Arc<Found> {
        &self.0
    }
}

fn to_place(table: i64, row: i64) -> PyResult<Option<Place>> {
    if (table, row) == (-1, -1) {
        return Ok(None);
    }
    let numbers = usize::try_from(table).ok().zip(u64::try_from(row).ok());
    match numbers.and_then(|(table, row)| Place::new(table, row)) {
        Some(place) => Ok(Some(place)),
        None => Err(PyValueError::new_err(format!("there is no row {row} of a table {table}"))),
    }
}

fn numbers_of(place: Option<Place>) -> (i64, i64) {
    place.map_or((-1, -1), |place| ((place.table() as u64).cast_signed(), place.row().cast_signed()))
}

#[pymethods]
impl Places {
    #[staticmethod]
    fn of(tables: PyReadonlyArray1<'_, i64>, rows: PyReadonlyArray1<'_, i64>) -> PyResult<Self> {
        let (tables, rows) = (tables.as_array(), rows.as_array());
        if tables.len() != rows.len() {
            return Err(PyValueError::new_err(format!("got {} tables and {} rows", tables.len(), rows.len())));
        }
        let places = tables.iter().zip(rows).map(|(table, row)| to_place(*table, *row));
        Ok(Found::from(memory::try_collect(places)?).into())
    }

    #[staticmethod]
    fn of_ids(ids: PyReadonlyArray1<'_, u64>) -> PyResult<Self> {
        let place = |id: &u64| {
            let unknown = || PyValueError::new_err(format!("there is no place with the id {id}"));
            Place::of_id(*id).map(Some).ok_or_else(unknown)
        };
        Ok(Found::from(memory::try_collect(ids.as_array().iter().map(place))?).into())
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __getitem__(&self, at: isize) -> PyResult<(i64, i64)> {
        let from_start = if at < 0 { at.checked_add_unsigned(self.0.len()) } else { Some(at) };
        let place = from_start.and_then(|at| self.0.get(usize::try_from(at).ok()?));
        let outside = || PyIndexError::new_err(format!("there is no place {at}: there are {}", self.0.len()));
        place.map(numbers_of).ok_or_else(outside)
    }

    #[getter]
    fn tables<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(PyArray1::from_vec(py, self.0.tables().or_raise()?))
    }

    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(PyArray1::from_vec(py, self.0.rows().or_raise()?))
    }

    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let id = |at| {
            let missing = || PyValueError::new_err("a name is missing, which has no id");
            self.0.get(at).flatten().map(Place::id).ok_or_else(missing)
        };
        Ok(PyArray1::from_vec(py, memory::try_collect((0..self.0.len()).map(id))?))
    }

    fn only_table(&self) -> i64 {
        self.0.only_table().map_or(-1, |table| (table as u64).cast_signed())
    }

    fn is_complete(&self) -> bool {
        self.0.is_complete()
    }

    fn missing<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(PyArray1::from_vec(py, self.0.missing().or_raise()?))
    }

    #[pyo3(name = "found")]
    fn without_missing(&self) -> PyResult<Self> {
        if self.0.is_complete() {
            return Ok(Self(self.0.clone()));
        }
        Ok(self.0.found().or_raise()?.into())
    }

    fn by_table<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let parts = self.0.by_table().or_raise()?;
        let to_tuple = |part: pdrs_core::OfTable| -> PyResult<Bound<'py, PyTuple>> {
            let (positions, rows) = (PyArray1::from_vec(py, part.positions), PyArray1::from_vec(py, part.rows));
            (part.table, positions, rows).into_pyobject(py)
        };
        new_list(py, parts.into_iter().map(to_tuple))
    }
}
