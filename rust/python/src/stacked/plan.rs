//! `RowPlan`: a change of a `RowIndex` that was planned, as Python sees it; and why one cannot be planned.

use std::sync::{Mutex, MutexGuard};

use numpy::PyArray1;
use pdrs_core::{Plan, Refusal};
use pyo3::exceptions::{PyIndexError, PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::python::memory;
use crate::python::name::to_text;
use crate::stacked::places::Places;

/// Made by the `plan_...` methods of a `RowIndex`, whose `commit` takes it.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct RowPlan {
    plan: Mutex<Plan>,
}

impl RowPlan {
    pub(crate) fn new(plan: Plan) -> Self {
        Self { plan: Mutex::new(plan) }
    }

    pub(crate) fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Plan> {
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

/// The exception for what was refused; `names` are those that were listed. It runs Python code, so no lock may be held.
pub(crate) fn refused(names: &Bound<'_, PyAny>, refusal: Refusal) -> PyErr {
    let message = match refusal {
        Refusal::Limit(error) => return memory::refused(error),
        Refusal::Missing { at } => return names.get_item(at).map_or_else(|error| error, |name| missing(&name)),
        Refusal::NoTable(table) => return no_table(table),
        Refusal::Repeated { at } => return about(names.get_item(at), "is listed twice"),
        Refusal::Present => return about(Ok(names.clone()), "is there already"),
        Refusal::Lengths { names, places } => format!("got {names} names and {places} places"),
        Refusal::Tables { tables, used } => format!("got {used} numbers of rows for {tables} tables"),
        Refusal::Place { at } => {
            format!("the place of name {at} is missing, lies outside the tables, or is that of another name")
        }
    };
    PyValueError::new_err(message)
}

/// The same, where a name that is listed twice is a key that cannot be there any more.
pub(crate) fn refused_removal(names: &Bound<'_, PyAny>, refusal: Refusal) -> PyErr {
    let is_repeated = matches!(refusal, Refusal::Repeated { .. });
    let error = refused(names, refusal);
    if is_repeated { PyKeyError::new_err(error.value(names.py()).to_string()) } else { error }
}

pub(crate) fn missing(name: &Bound<'_, PyAny>) -> PyErr {
    to_text(name).map_or_else(|error| error, |name| PyKeyError::new_err(name.unbind()))
}

pub(crate) fn no_table(table: impl std::fmt::Display) -> PyErr {
    PyIndexError::new_err(format!("there is no table {table}"))
}

fn about(name: PyResult<Bound<'_, PyAny>>, what: &str) -> PyErr {
    let message = name.and_then(|name| to_text(&name)?.repr().map(|name| format!("{name} {what}")));
    message.map_or_else(|error| error, PyValueError::new_err)
}

/// Makes a Python exception of what was refused.
pub(crate) trait OrRefuse<T> {
    /// `names` are those that were listed.
    fn or_refuse(self, names: &Bound<'_, PyAny>) -> PyResult<T>;
}

impl<T> OrRefuse<T> for std::result::Result<T, Refusal> {
    fn or_refuse(self, names: &Bound<'_, PyAny>) -> PyResult<T> {
        self.map_err(|refusal| refused(names, refusal))
    }
}
