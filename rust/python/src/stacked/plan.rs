//! `RowPlan`: a change of a `RowIndex` that was planned, as Python sees it; and why one cannot be planned.

use std::sync::{Mutex, MutexGuard};

use numpy::PyArray1;
use pdrs_core::{Plan, Refusal};
use pyo3::exceptions::{PyIndexError, PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::python::memory;
use crate::python::name::Name;
use crate::stacked::places::Places;

/// Made by the `plan_...` methods of a `RowIndex`, whose `commit` takes it.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct RowPlan {
    plan: Mutex<Plan<Name>>,
}

impl RowPlan {
    pub(crate) fn new(plan: Plan<Name>) -> Self {
        Self { plan: Mutex::new(plan) }
    }

    pub(crate) fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Plan<Name>> {
        self.plan.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[pymethods]
impl RowPlan {
    #[getter]
    fn places(&self, py: Python<'_>) -> Places {
        self.lock(py).places().into()
    }

    #[getter(new)]
    fn new_rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let new = memory::collect(self.lock(py).new_rows().map(|at| (at as u64).cast_signed()))?;
        Ok(PyArray1::from_vec(py, new))
    }

    #[getter]
    fn freed(&self, py: Python<'_>) -> Places {
        self.lock(py).freed().into()
    }
}

/// The exception for what was refused. It runs Python code, so no lock may be held.
pub(crate) fn refused(py: Python<'_>, refusal: Refusal<Name>) -> PyErr {
    let message = match refusal {
        Refusal::Limit(error) => return memory::refused(error),
        Refusal::Missing(name) => return PyKeyError::new_err(name.into_text(py).unbind()),
        Refusal::NoTable(table) => return no_table(table),
        Refusal::Repeated(name) => return about(py, name, "is listed twice").unwrap_or_else(|error| error),
        Refusal::Present(name) => return about(py, name, "is there already").unwrap_or_else(|error| error),
        Refusal::Lengths { names, places } => format!("got {names} names and {places} places"),
        Refusal::Tables { tables, used } => format!("got {used} numbers of rows for {tables} tables"),
        Refusal::Place { at } => {
            format!("the place of name {at} is missing, lies outside the tables, or is that of another name")
        }
    };
    PyValueError::new_err(message)
}

/// The same, where a name that is listed twice is a key that cannot be there any more.
pub(crate) fn refused_removal(py: Python<'_>, refusal: Refusal<Name>) -> PyErr {
    let is_repeated = matches!(refusal, Refusal::Repeated(_));
    let error = refused(py, refusal);
    if is_repeated { PyKeyError::new_err(error.value(py).to_string()) } else { error }
}

pub(crate) fn no_table(table: impl std::fmt::Display) -> PyErr {
    PyIndexError::new_err(format!("there is no table {table}"))
}

fn about(py: Python<'_>, name: Name, what: &str) -> PyResult<PyErr> {
    Ok(PyValueError::new_err(format!("{} {what}", name.into_text(py).repr()?)))
}

/// Makes a Python exception of what was refused.
pub(crate) trait OrRefuse<T> {
    fn or_refuse(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRefuse<T> for std::result::Result<T, Refusal<Name>> {
    fn or_refuse(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|refusal| refused(py, refusal))
    }
}
