//! What a `StackedParameterDict` asks of its index for many names in one call.

use std::collections::HashSet;

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use crate::index_map::{IndexMap, to_names};
use crate::name::{Name, to_text};
use crate::row::copy_row;
use crate::table_rows::TableRows;

pub(crate) use pdrs_core::archive::ROW_BITS;

/// Inserts names with their ids, in order: new ones at the end; those that are there keep their place.
#[pyfunction]
pub(crate) fn insert_ids(
    index: &Bound<'_, IndexMap>,
    names: &Bound<'_, PyAny>,
    ids: PyReadonlyArray1<'_, i64>,
) -> PyResult<()> {
    let names = to_names(names)?;
    let ids = ids.as_array();
    if names.len() != ids.len() {
        return Err(PyValueError::new_err(format!("got {} names and {} ids", names.len(), ids.len())));
    }
    index.get().insert_all(index.py(), names.into_iter().zip(ids.iter().copied()).collect())
}

/// The names that are not in the index, in order, each once.
#[pyfunction]
pub(crate) fn missing_names<'py>(
    index: &Bound<'py, IndexMap>,
    names: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyList>> {
    let py = index.py();
    let names = to_names(names)?;
    let found = PyList::empty(py);
    let Err(missing) = index.get().find_all(py, &names) else {
        return Ok(found);
    };
    let mut seen = HashSet::with_capacity(missing.len());
    for at in missing {
        if seen.insert(Key(&names[at])) {
            found.append(names[at].text(py))?;
        }
    }
    Ok(found)
}

/// Removes many names and gives their ids in order; a `KeyError`, with nothing removed, if one is not there, or is
/// listed twice.
#[pyfunction]
pub(crate) fn remove_names<'py>(
    index: &Bound<'py, IndexMap>,
    names: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let py = index.py();
    let names = to_names(names)?;
    let missing = |at: usize| IndexMap::missing(names[at].text(py));
    index.get().find_all(py, &names).map_err(|places| missing(places[0]))?;
    let mut seen = HashSet::with_capacity(names.len());
    if let Some(at) = (0..names.len()).find(|at| !seen.insert(Key(&names[*at]))) {
        return Err(missing(at));
    }
    let removed = index.get().remove_all(py, &names);
    Ok(PyArray1::from_vec(py, removed.iter().map(|(_, id)| *id).collect()))
}

/// What [`pop_row`] gives: the name, a copy of its row, and, if something is left to do, its table and its row.
type Popped<'py> = (Bound<'py, PyString>, Option<Bound<'py, PyAny>>, Option<(Bound<'py, PyAny>, u64)>);

/// Removes a name, or the one at an end (`true` is the last), and takes its row back; `None` if it is not there.
///
/// Left to the caller are a copy that torch must make (the row stays what it is until it is given again), and the
/// gradient of the row, if the table has one.
#[pyfunction]
#[pyo3(signature = (index, tables, parameters, name, end = None))]
pub(crate) fn pop_row<'py>(
    index: &Bound<'py, IndexMap>,
    tables: &Bound<'py, PyList>,
    parameters: &Bound<'py, PyDict>,
    name: &Bound<'py, PyAny>,
    end: Option<bool>,
) -> PyResult<Option<Popped<'py>>> {
    let py = index.py();
    let removed = match end {
        None => index.get().remove(&to_text(name)?),
        Some(last) => index.get().remove_end(py, last),
    };
    let Some((name, id)) = removed else {
        return Ok(None);
    };
    let id = id.cast_unsigned();
    let (number, row) = ((id >> ROW_BITS) as usize, id & ((1 << ROW_BITS) - 1));
    let table = tables.get_item(number)?;
    let parameter = parameters.get_item(table.getattr(intern!(py, "attribute"))?)?;
    let (copied, has_gradient) = match &parameter {
        Some(parameter) => (copy_row(parameter, row)?, !parameter.getattr(intern!(py, "grad"))?.is_none()),
        None => (None, false),
    };
    table.getattr(intern!(py, "rows"))?.cast::<TableRows>()?.get().give_back(py, row);
    let left = (copied.is_none() || has_gradient).then_some((table, row));
    Ok(Some((name.into_text(py), copied, left)))
}

/// Gives all names, in their order, other ids.
#[pyfunction]
pub(crate) fn replace_ids(index: &Bound<'_, IndexMap>, ids: PyReadonlyArray1<'_, i64>) -> PyResult<()> {
    let ids = ids.as_array().to_vec();
    if let Some(id) = ids.iter().find(|id| **id < 0) {
        return Err(PyValueError::new_err(format!("an id must be 0 or more, got {id}")));
    }
    if index.get().replace_rows(index.py(), &ids) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("got {} ids for another number of names", ids.len())))
}

/// A name in a set of the standard library.
struct Key<'a>(&'a Name);

impl std::hash::Hash for Key<'_> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.full_hash());
    }
}

impl PartialEq for Key<'_> {
    fn eq(&self, other: &Self) -> bool {
        use pdrs_core::Matches;
        self.0.matches(other.0)
    }
}

impl Eq for Key<'_> {}
