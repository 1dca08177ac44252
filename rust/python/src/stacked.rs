//! What a `StackedParameterDict` asks of its index for many names in one call.

use std::collections::HashSet;

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use crate::index_map::{IndexMap, to_names};
use crate::name::{Name, to_text};
use crate::row::copy_row;
use crate::table_rows::TableRows;
use crate::tensor::Torch;

/// An id is the number of a table and, in so many lower bits, a row of it.
const ROW_BITS: u32 = 40;

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

/// Removes a name of a `StackedParameterDict`, takes its row back, and gives a copy of it; `None` if it is not there.
#[pyfunction]
pub(crate) fn pop_row<'py>(
    stacked: &Bound<'py, PyAny>,
    name: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let name = to_text(name)?;
    let state = state_of(stacked)?;
    let _lock = Locked::new(&state)?;
    let Some((_, id)) = of_state(&state, intern!(state.py(), "_index"))?.cast::<IndexMap>()?.get().remove(&name) else {
        return Ok(None);
    };
    take_row(stacked, &state, id).map(Some)
}

/// The same for the first or last name, which it gives, too.
#[pyfunction]
pub(crate) fn pop_end_row<'py>(
    stacked: &Bound<'py, PyAny>,
    last: bool,
) -> PyResult<Option<(Bound<'py, PyString>, Bound<'py, PyAny>)>> {
    let py = stacked.py();
    let state = state_of(stacked)?;
    let _lock = Locked::new(&state)?;
    let index = of_state(&state, intern!(py, "_index"))?;
    let Some((name, id)) = index.cast::<IndexMap>()?.get().remove_end(py, last) else {
        return Ok(None);
    };
    Ok(Some((name.into_text(py), take_row(stacked, &state, id)?)))
}

/// Takes the row of an id back, whose name has been removed, and gives a copy.
///
/// What is unusual about it is left to Python: a copy that torch must make (the row stays what it is until it is given
/// again), and the gradient of the row, if the table has one.
fn take_row<'py>(stacked: &Bound<'py, PyAny>, state: &Bound<'py, PyDict>, id: i64) -> PyResult<Bound<'py, PyAny>> {
    let py = state.py();
    let id = id.cast_unsigned();
    let (number, row) = ((id >> ROW_BITS) as usize, id & ((1 << ROW_BITS) - 1));
    let table = of_state(state, intern!(py, "_tables"))?.cast::<PyList>()?.get_item(number)?;
    table.getattr(intern!(py, "rows"))?.cast::<TableRows>()?.get().give_back(py, row);
    let moves = intern!(py, "_moves");
    state.set_item(moves, of_state(state, moves)?.extract::<u64>()? + 1)?;
    let parameters = of_state(state, intern!(py, "_parameters"))?;
    let parameter = parameters.cast::<PyDict>()?.get_item(table.getattr(intern!(py, "attribute"))?)?;
    let torch = Torch::get(py)?;
    let copied = match &parameter {
        Some(parameter) if torch.is_plain(parameter) => {
            let copied = copy_row(torch, parameter, row)?;
            if let Some(copied) = &copied
                && torch.gradient(parameter)?.is_none()
            {
                return Ok(copied.clone());
            }
            copied
        }
        _ => None,
    };
    stacked.call_method1(intern!(py, "_popped"), (copied, table, row))
}

fn state_of<'py>(stacked: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    Ok(stacked.getattr(intern!(stacked.py(), "__dict__"))?.cast_into()?)
}

fn of_state<'py>(state: &Bound<'py, PyDict>, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    state.get_item(name)?.ok_or_else(|| PyKeyError::new_err(name.clone().unbind()))
}

/// The lock of a dictionary, held as long as this lives. Python's own: to wait for it, it lets other threads run.
struct Locked<'py>(Bound<'py, PyAny>);

impl<'py> Locked<'py> {
    fn new(state: &Bound<'py, PyDict>) -> PyResult<Self> {
        let py = state.py();
        let lock = of_state(state, intern!(py, "_lock"))?;
        lock.call_method0(intern!(py, "acquire"))?;
        Ok(Self(lock))
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let released = self.0.call_method0(intern!(self.0.py(), "release"));
        debug_assert!(released.is_ok(), "a lock that is held can be released");
    }
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

/// Some bytes, and behind them the number of bytes of each name, in order, and all names as UTF-8 one behind another.
#[pyfunction]
pub(crate) fn pack_names<'py>(index: &Bound<'py, IndexMap>, head: &[u8]) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let py = index.py();
    let names = index.get().names(py);
    let text = head.len() + (4 * names.len()).next_multiple_of(8);
    let mut packed = Vec::with_capacity(text + 16 * names.len());
    packed.extend_from_slice(head);
    packed.resize(text, 0);
    for (at, name) in names.iter().enumerate() {
        let start = packed.len();
        name.append_utf8(py, &mut packed)?;
        let length = u32::try_from(packed.len() - start)?;
        packed[head.len() + 4 * at..][..4].copy_from_slice(&length.to_le_bytes());
    }
    Ok(PyArray1::from_vec(py, packed))
}

/// The index of names that were packed, with these ids.
#[pyfunction]
pub(crate) fn unpack_names(
    py: Python<'_>,
    text: PyReadonlyArray1<'_, u8>,
    lengths: PyReadonlyArray1<'_, u32>,
    ids: PyReadonlyArray1<'_, i64>,
) -> PyResult<IndexMap> {
    let (mut text, lengths, ids) = (text.as_slice()?, lengths.as_slice()?, ids.as_slice()?);
    if lengths.len() != ids.len() || lengths.iter().map(|length| *length as usize).sum::<usize>() != text.len() {
        return Err(PyValueError::new_err("the packed names are damaged: their lengths do not fit"));
    }
    let mut entries = Vec::with_capacity(ids.len());
    for (length, id) in lengths.iter().zip(ids) {
        let name;
        (name, text) = text.split_at(*length as usize);
        entries.push((Name::from_utf8(py, name)?, *id));
    }
    let index = IndexMap::empty();
    index.insert_all(py, entries)?;
    if index.len(py) != ids.len() {
        return Err(PyValueError::new_err("the packed names are damaged: one is listed twice"));
    }
    Ok(index)
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
