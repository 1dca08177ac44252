//! `TableRows`: the free rows of one table, as Python sees them.

use std::sync::{Mutex, MutexGuard};

use numpy::{PyArray1, PyReadonlyArray1};
use pdrs_core::Rows;
use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::python::memory::{self, OrRaise};

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct TableRows {
    rows: Mutex<Rows>,
}

impl TableRows {
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Rows> {
        self.rows.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The row that the next name gets, and whether another one had it; `None` if the table must grow before.
    pub(crate) fn peek(&self, py: Python<'_>, capacity: u64) -> Option<(u64, bool)> {
        let rows = self.lock(py);
        let row = rows.next(1).next()?;
        (row < capacity).then(|| (row, rows.reused(1) == 1))
    }
}

fn give_back(rows: &mut Rows, row: u64) -> PyResult<()> {
    if row >= rows.used() {
        return Err(PyValueError::new_err(format!("row {} was never given", row.cast_signed())));
    }
    if rows.is_free(row) {
        return Err(PyValueError::new_err(format!("row {row} is free already")));
    }
    rows.give_back(row);
    Ok(())
}

/// Refuses more rows than can be counted.
fn check_left(rows: &Rows, count: u64) -> PyResult<()> {
    match rows.used().checked_add(count) {
        Some(_) => Ok(()),
        None => Err(PyOverflowError::new_err(format!("a table cannot have {count} rows more than it has"))),
    }
}

fn to_array(py: Python<'_>, rows: impl Iterator<Item = u64>) -> PyResult<Bound<'_, PyArray1<i64>>> {
    Ok(PyArray1::from_vec(py, memory::collect(rows.map(u64::cast_signed))?))
}

#[pymethods]
impl TableRows {
    #[new]
    #[pyo3(signature = (used = 0))]
    fn new(used: u64) -> Self {
        Self { rows: Mutex::new(Rows::full(used)) }
    }

    #[staticmethod]
    fn of_live(used: u64, live: PyReadonlyArray1<'_, i64>) -> PyResult<Self> {
        let live = live.as_array();
        if let Some(row) = live.iter().find(|row| **row < 0) {
            return Err(PyValueError::new_err(format!("a row must be 0 or more, got {row}")));
        }
        match Rows::of_live(used, live.iter().map(|row| row.cast_unsigned())).or_raise()? {
            Some(rows) => Ok(Self { rows: Mutex::new(rows) }),
            None => Err(PyValueError::new_err("a row is listed twice, or was never given")),
        }
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.lock(py).len() as usize
    }

    #[getter]
    fn used(&self, py: Python<'_>) -> u64 {
        self.lock(py).used()
    }

    fn free<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        to_array(py, self.lock(py).free())
    }

    fn next<'py>(&self, py: Python<'py>, count: u64) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let rows = self.lock(py);
        check_left(&rows, count)?;
        to_array(py, rows.next(count))
    }

    fn reused(&self, py: Python<'_>, count: u64) -> u64 {
        self.lock(py).reused(count)
    }

    pub(crate) fn take(&self, py: Python<'_>, count: u64) -> PyResult<()> {
        let mut rows = self.lock(py);
        check_left(&rows, count)?;
        rows.take(count);
        Ok(())
    }

    /// Makes sure that no memory is needed to give rows back.
    pub(crate) fn reserve_free(&self, py: Python<'_>) -> PyResult<()> {
        self.lock(py).reserve_free().or_raise()
    }

    pub(crate) fn give_back(&self, py: Python<'_>, row: u64) -> PyResult<()> {
        give_back(&mut self.lock(py), row)
    }

    fn give_back_many(&self, py: Python<'_>, rows: PyReadonlyArray1<'_, i64>) -> PyResult<()> {
        let mut ours = self.lock(py);
        ours.reserve_free().or_raise()?;
        rows.as_array().iter().try_for_each(|row| give_back(&mut ours, row.cast_unsigned()))
    }

    fn capacity_for(&self, py: Python<'_>, count: u64, capacity: u64) -> PyResult<u64> {
        let wanted = self.lock(py).capacity_for(count, capacity);
        wanted.ok_or_else(|| PyOverflowError::new_err(format!("a table cannot have {count} rows more than it has")))
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.__copy__(py)
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<Self> {
        Ok(Self { rows: Mutex::new(self.lock(py).copy().or_raise()?) })
    }
}
