//! What a `StackedParameterDict` asks of its index for many names in one call.

use std::collections::HashSet;

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use crate::index_map::IndexMap;
use crate::python::instance::attributes;
use crate::python::lock::{Holding, Lock, one_step};
use crate::python::memory;
use crate::python::name::{Name, to_text};
use crate::python::names::to_names;
use crate::python::one_step::call_all;
use crate::stacked::row::{Fit, RowValue, ZeroedRow, copy_row};
use crate::stacked::table_rows::TableRows;
use crate::torch::Torch;

pub(crate) use pdrs_core::names::codec::ROW_BITS;

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
    index.get().insert_all(index.py(), memory::collect(names.into_iter().zip(ids.iter().copied()))?)
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
    let missing = index.get().missing_of(py, &names)?;
    let mut seen = room_for(missing.len())?;
    for at in missing {
        if seen.insert(Key(&names[at])) {
            found.append(names[at].text(py))?;
        }
    }
    Ok(found)
}

/// The number of the table that names lie in, and their rows there, in order; or, if they do not all lie in one, -1 and
/// their ids, each -1 for a name that is not there.
#[pyfunction]
pub(crate) fn find_rows<'py>(
    index: &Bound<'py, IndexMap>,
    names: &Bound<'py, PyAny>,
) -> PyResult<(i64, Bound<'py, PyArray1<i64>>)> {
    let py = index.py();
    let mut ids = index.get().rows_or_minus_one(names)?;
    // The ids of a table, and no others, agree in the bits above the row.
    let first = ids.first().copied().unwrap_or(-1);
    let differing = ids.iter().fold(0, |bits, id| bits | (id ^ first));
    if first < 0 || differing >> ROW_BITS != 0 {
        return Ok((-1, PyArray1::from_vec(py, ids)));
    }
    for id in &mut ids {
        *id &= (1 << ROW_BITS) - 1;
    }
    Ok((first >> ROW_BITS, PyArray1::from_vec(py, ids)))
}

/// Those names that begin so and go on, without their beginning, and their ids.
#[pyfunction]
pub(crate) fn names_behind<'py>(
    index: &Bound<'py, IndexMap>,
    ids: PyReadonlyArray1<'py, i64>,
    beginning: &Bound<'py, PyString>,
) -> PyResult<(IndexMap, Bound<'py, PyArray1<i64>>)> {
    let py = index.py();
    let (mut buffer, mut kept, mut failed) = (Vec::new(), Vec::new(), None);
    let beginning = Name::new(beginning.clone()).with_utf8(py, &mut buffer, <[u8]>::to_vec);
    let mut ids = ids.as_array().into_iter();
    index.get().for_each(py, |name, _| {
        let id = ids.next();
        name.with_utf8(py, &mut buffer, |text| {
            if let (Some(rest), Some(id)) = (text.strip_prefix(&*beginning).filter(|rest| !rest.is_empty()), id)
                && failed.is_none()
            {
                let rest = memory::collect(rest.iter().copied());
                failed = rest.and_then(|rest| memory::push(&mut kept, (rest, *id))).err();
            }
        });
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let entries = kept.iter().map(|(name, id)| Ok((Name::from_utf8(py, name)?, *id)));
    let narrowed = IndexMap::collect(kept.len(), entries)?;
    let kept_ids = memory::collect(kept.iter().map(|(_, id)| *id))?;
    Ok((narrowed, PyArray1::from_vec(py, kept_ids)))
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
    if let Some(at) = index.get().missing_of(py, &names)?.first() {
        return Err(missing(*at));
    }
    let mut seen = room_for(names.len())?;
    if let Some(at) = (0..names.len()).find(|at| !seen.insert(Key(&names[*at]))) {
        return Err(PyKeyError::new_err(format!("{} is listed twice", names[at].text(py).repr()?)));
    }
    Ok(PyArray1::from_vec(py, index.get().remove_all(py, &names)?))
}

/// Sets an entry of a `StackedParameterDict`, whose lock is held, if nothing about it is unusual: a tensor on the CPU for
/// a name that has a row of this kind, or for a new one and a table of this kind and `group` that has room.
///
/// `false`, and nothing has been set, otherwise. What belonged to a row that gets a new name is left to Python.
#[pyfunction]
pub(crate) fn set_row(
    stacked: &Bound<'_, PyAny>,
    name: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    group: i64,
) -> PyResult<bool> {
    let py = stacked.py();
    let torch = Torch::get(py)?;
    let Ok(name) = name.cast_exact::<PyString>() else {
        return Ok(false);
    };
    let Some(value) = RowValue::new(torch, value)? else {
        return Ok(false);
    };
    if name.is_empty()? {
        return Ok(false);
    }
    let state = attributes(stacked)?;
    lock_of(&state)?.get().refuse_change()?;
    let moves = moves_of(&state)?;
    let index = of_state(&state, intern!(py, "_index"))?.cast_into::<IndexMap>()?;
    let set = match index.get().find(name) {
        Some(id) => replace_row(&state, id, moves, &value, group)?,
        None => insert_row(stacked, &state, index.get(), name, moves, &value, group)?,
    };
    if set {
        count(&state, intern!(py, "_inserts"))?;
    }
    Ok(set)
}

fn replace_row(state: &Bound<'_, PyDict>, id: i64, moves: u64, value: &RowValue<'_, '_>, group: i64) -> PyResult<bool> {
    let torch = Torch::get(state.py())?;
    let (number, row) = place(id);
    let table = of_state(state, intern!(state.py(), "_tables"))?.cast::<PyList>()?.get_item(number)?;
    match parameter_of(state, &table)? {
        Some(parameter) if is_of_group(&table, group)? => {
            let fits = matches!(value.fits(torch, &parameter, false)?, Fit::Rows(_));
            // Python code has run that may have moved the row.
            one_step(state.py(), || Ok(fits && moves_of(state)? == moves && value.write(torch, &parameter, row)?))
        }
        _ => Ok(false),
    }
}

fn insert_row(
    stacked: &Bound<'_, PyAny>,
    state: &Bound<'_, PyDict>,
    index: &IndexMap,
    name: &Bound<'_, PyString>,
    moves: u64,
    value: &RowValue<'_, '_>,
    group: i64,
) -> PyResult<bool> {
    let py = state.py();
    let torch = Torch::get(py)?;
    let tables = of_state(state, intern!(py, "_tables"))?.cast_into::<PyList>()?;
    for (number, table) in tables.iter().enumerate() {
        if !is_of_group(&table, group)? {
            continue;
        }
        let Some(parameter) = parameter_of(state, &table)? else {
            return Ok(false);
        };
        let capacity = match value.fits(torch, &parameter, true)? {
            Fit::Rows(capacity) => capacity,
            Fit::Other => continue,
            Fit::Unusual => return Ok(false),
        };
        let rows = table.getattr(intern!(py, "rows"))?.cast_into::<TableRows>()?;
        let Some((row, is_reused)) = rows.get().peek(py, capacity) else {
            return Ok(false);
        };
        let is_bare = !is_reused
            && of_state(state, intern!(py, "_optimizers"))?.is_empty()?
            && state.get_item(intern!(py, "_averages"))?.is_none()
            && table.getattr(intern!(py, "frozen"))?.is_none()
            && torch.gradient(&parameter)?.is_none();
        if !is_bare {
            // If there is more to do when the row has its value, Python does all of it.
            let is_all = !stacked.call_method1(intern!(py, "_make_ready"), (&table, row))?.is_truthy()?;
            if !is_all || !matches!(value.fits(torch, &parameter, true)?, Fit::Rows(_)) {
                return Ok(false);
            }
        }
        return one_step(py, || {
            // Python code has run that may have moved rows, given this one, or inserted the name.
            let is_next =
                moves_of(state)? == moves && rows.get().peek(py, capacity).is_some_and(|(next, _)| next == row);
            if !is_next || index.find(name).is_some() || !value.write(torch, &parameter, row)? {
                return Ok(false);
            }
            index.set(py, Name::new(name.clone()), ((number as u64) << ROW_BITS | row).cast_signed())?;
            rows.get().take(py, 1)?;
            Ok(true)
        });
    }
    Ok(false)
}

fn is_of_group(table: &Bound<'_, PyAny>, group: i64) -> PyResult<bool> {
    Ok(table.getattr(intern!(table.py(), "group"))?.extract::<i64>()? == group)
}

/// Removes a name of a `StackedParameterDict`, takes its row back, and gives a copy of it; `None` if it is not there.
#[pyfunction]
pub(crate) fn pop_row<'py>(
    stacked: &Bound<'py, PyAny>,
    name: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let name = to_text(name)?;
    let state = attributes(stacked)?;
    let lock = held(&state)?;
    lock.lock().refuse_change()?;
    let index = of_state(&state, intern!(state.py(), "_index"))?.cast_into::<IndexMap>()?;
    loop {
        let moves = moves_of(&state)?;
        let Some(id) = index.get().find(&name) else {
            return Ok(None);
        };
        if let Some(row) = take_row(stacked, &state, id, moves, || index.get().discard(&name))? {
            return Ok(Some(row));
        }
    }
}

/// The same for the first or last name, which it gives, too.
#[pyfunction]
pub(crate) fn pop_end_row<'py>(
    stacked: &Bound<'py, PyAny>,
    last: bool,
) -> PyResult<Option<(Bound<'py, PyString>, Bound<'py, PyAny>)>> {
    let py = stacked.py();
    let state = attributes(stacked)?;
    let lock = held(&state)?;
    lock.lock().refuse_change()?;
    let index = of_state(&state, intern!(py, "_index"))?.cast_into::<IndexMap>()?;
    loop {
        let moves = moves_of(&state)?;
        let Some((name, id)) = index.get().end_entry(py, last) else {
            return Ok(None);
        };
        let name = name.into_text(py);
        if let Some(row) = take_row(stacked, &state, id, moves, || index.get().discard_end(py, &name, last))? {
            return Ok(Some((name, row)));
        }
    }
}

/// Copies the row of an id, removes its name, clears the row and all that belongs to it, takes it back, and gives the
/// copy: all of this, or, if something fails, nothing. `None` if there were other changes meanwhile.
///
/// What is unusual is left to Python: a copy that torch must make, and what is cleared in other ways than by zeros.
fn take_row<'py>(
    stacked: &Bound<'py, PyAny>,
    state: &Bound<'py, PyDict>,
    id: i64,
    moves: u64,
    remove: impl FnOnce() -> bool,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = state.py();
    let torch = Torch::get(py)?;
    let (number, row) = place(id);
    let table = of_state(state, intern!(py, "_tables"))?.cast::<PyList>()?.get_item(number)?;
    let parameter = parameter_of(state, &table)?.filter(|parameter| torch.is_plain(parameter));
    let copied = match &parameter {
        Some(parameter) => copy_row(torch, parameter, row)?,
        None => None,
    };
    let copied = match copied {
        Some(copied) => copied,
        None => stacked.call_method1(intern!(py, "_copy_of_row"), (&table, row))?,
    };
    let mut zeroed = ZeroedRow::new(row);
    let is_usual = match &parameter {
        Some(parameter) => add_all(torch, stacked, state, &table, parameter, &mut zeroed)?,
        None => false,
    };
    // Kept until all is done, with what it replaces.
    let changes = if is_usual { None } else { Some(stacked.call_method1(intern!(py, "_clearing"), (&table, row))?) };
    let calls: Vec<_> = match &changes {
        Some(changes) => changes.getattr(intern!(py, "calls"))?.cast::<PyList>()?.iter().collect(),
        None => Vec::new(),
    };
    let rows = table.getattr(intern!(py, "rows"))?.cast_into::<TableRows>()?;
    rows.get().reserve_free(py)?;
    let mut given = Vec::with_capacity(calls.len());
    let is_taken = one_step(py, || {
        if moves_of(state)? != moves {
            return Ok(false);
        }
        call_all(&calls, &mut given)?;
        if !remove() {
            return Ok(false);
        }
        rows.get().give_back(py, row)?;
        state.set_item(intern!(py, "_moves"), moves + 1)?;
        if changes.is_none() {
            zeroed.write(torch, py)?;
        }
        PyResult::Ok(true)
    })?;
    Ok(is_taken.then_some(copied))
}

/// Adds all tensors in which a row of a table is to be zero when its name is gone; `false` if something else is to be
/// done.
fn add_all<'py>(
    torch: &Torch,
    stacked: &Bound<'py, PyAny>,
    state: &Bound<'py, PyDict>,
    table: &Bound<'py, PyAny>,
    parameter: &Bound<'py, PyAny>,
    zeroed: &mut ZeroedRow<'py>,
) -> PyResult<bool> {
    let py = state.py();
    let mask = table.getattr(intern!(py, "frozen"))?;
    // A tensor that is no Parameter may have no gradient of its own, and warn who asks.
    let is_usual = torch.is_parameter(parameter)
        && table.getattr(intern!(py, "lent"))?.is_none()
        && zeroed.add(torch, parameter)?
        && (mask.is_none() || zeroed.add(torch, &mask)?);
    if !is_usual {
        return Ok(false);
    }
    let gradient = torch.gradient(parameter)?;
    if !gradient.is_none() && !zeroed.add(torch, &gradient)? {
        return Ok(false);
    }
    if of_state(state, intern!(py, "_optimizers"))?.is_empty()? {
        return Ok(true);
    }
    let states = stacked.call_method1(intern!(py, "_states_of_zeros"), (parameter,))?;
    let Ok(states) = states.cast_into::<PyList>() else {
        return Ok(false);
    };
    for of_optimizer in states {
        if !zeroed.add_state(torch, parameter, of_optimizer.cast::<PyDict>()?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The number of the table and the row that an id names.
fn place(id: i64) -> (usize, u64) {
    let id = id.cast_unsigned();
    ((id >> ROW_BITS) as usize, id & ((1 << ROW_BITS) - 1))
}

/// How often rows of names have moved or come back.
fn moves_of(state: &Bound<'_, PyDict>) -> PyResult<u64> {
    of_state(state, intern!(state.py(), "_moves"))?.extract()
}

/// Adds one to a number that counts changes.
fn count(state: &Bound<'_, PyDict>, what: &Bound<'_, PyString>) -> PyResult<()> {
    state.set_item(what, of_state(state, what)?.extract::<u64>()? + 1)
}

/// The Parameter of a table; `None` if something else has taken its place.
fn parameter_of<'py>(state: &Bound<'py, PyDict>, table: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let parameters = of_state(state, intern!(state.py(), "_parameters"))?;
    parameters.cast::<PyDict>()?.get_item(table.getattr(intern!(state.py(), "attribute"))?)
}

fn held<'py>(state: &Bound<'py, PyDict>) -> PyResult<Holding<'py>> {
    Lock::hold(lock_of(state)?)
}

fn lock_of<'py>(state: &Bound<'py, PyDict>) -> PyResult<Bound<'py, Lock>> {
    Ok(of_state(state, intern!(state.py(), "_lock"))?.cast_into()?)
}

fn of_state<'py>(state: &Bound<'py, PyDict>, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    state.get_item(name)?.ok_or_else(|| PyKeyError::new_err(name.clone().unbind()))
}

/// Gives all names, in their order, other ids.
#[pyfunction]
pub(crate) fn replace_ids(index: &Bound<'_, IndexMap>, ids: PyReadonlyArray1<'_, i64>) -> PyResult<()> {
    // In one piece, as they nearly always are, they need no memory: this is one of several changes, which must not fail.
    let apart = if ids.as_slice().is_ok() { Vec::new() } else { memory::collect(ids.as_array().iter().copied())? };
    let ids = ids.as_slice().unwrap_or(&apart);
    if let Some(id) = ids.iter().find(|id| **id < 0) {
        return Err(PyValueError::new_err(format!("an id must be 0 or more, got {id}")));
    }
    if index.get().replace_rows(index.py(), ids) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("got {} ids for another number of names", ids.len())))
}

/// An empty set with room for so many names.
fn room_for<'a>(names: usize) -> PyResult<HashSet<Key<'a>>> {
    let mut seen = HashSet::new();
    seen.try_reserve(names).map_err(|_| memory::refused(pdrs_core::Error::Memory))?;
    Ok(seen)
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
