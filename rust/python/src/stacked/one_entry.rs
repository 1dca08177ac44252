//! One entry of a `StackedParameterDict` that is set or popped: natively where nothing about it is unusual.

use pyo3::exceptions::PyKeyError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

use pdrs_core::Place;

use crate::python::cpython::attributes;
use crate::python::lock::{Holding, Lock, one_step};
use crate::python::memory::OrRaise;
use crate::python::name::{OfText, Utf8Name, text_of_utf8, to_text};
use crate::python::one_step::call_all;
use crate::stacked::row::{Fit, RowValue, ZeroedRow, copy_row};
use crate::stacked::row_index::RowIndex;
use crate::torch::Torch;

/// A `StackedParameterDict`: the one place that knows what Python calls its parts.
struct Stacked<'a, 'py> {
    object: &'a Bound<'py, PyAny>,
    state: Bound<'py, PyDict>,
}

impl<'a, 'py> Stacked<'a, 'py> {
    fn new(object: &'a Bound<'py, PyAny>) -> PyResult<Self> {
        Ok(Self { object, state: attributes(object)? })
    }

    fn py(&self) -> Python<'py> {
        self.state.py()
    }

    fn part(&self, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        self.state.get_item(name)?.ok_or_else(|| PyKeyError::new_err(name.clone().unbind()))
    }

    fn lock(&self) -> PyResult<Bound<'py, Lock>> {
        Ok(self.part(intern!(self.py(), "_lock"))?.cast_into()?)
    }

    fn index(&self) -> PyResult<Bound<'py, RowIndex>> {
        Ok(self.part(intern!(self.py(), "_index"))?.cast_into()?)
    }

    /// Whether the rows of all names are where they were when this was counted, and the index is the same.
    fn is_as_counted(&self, moves: u64) -> PyResult<bool> {
        // Python code may have loaded other names: then there is another index, which never counts the same.
        Ok(self.index()?.get().moves(self.py()) == moves)
    }

    fn tables(&self) -> PyResult<Bound<'py, PyList>> {
        Ok(self.part(intern!(self.py(), "_tables"))?.cast_into()?)
    }

    /// The Parameter of a table; `None` if something else has taken its place.
    fn parameter(&self, table: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let parameters = self.part(intern!(self.py(), "_parameters"))?;
        parameters.cast::<PyDict>()?.get_item(table.getattr(intern!(self.py(), "attribute"))?)
    }

    fn has_optimizers(&self) -> PyResult<bool> {
        Ok(!self.part(intern!(self.py(), "_optimizers"))?.is_empty()?)
    }

    fn has_averages(&self) -> PyResult<bool> {
        Ok(self.state.get_item(intern!(self.py(), "_averages"))?.is_some())
    }

    fn mask(table: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        table.getattr(intern!(table.py(), "frozen"))
    }

    fn is_lent(table: &Bound<'py, PyAny>) -> PyResult<bool> {
        Ok(!table.getattr(intern!(table.py(), "lent"))?.is_none())
    }

    fn is_of_group(table: &Bound<'py, PyAny>, group: i64) -> PyResult<bool> {
        Ok(table.getattr(intern!(table.py(), "group"))?.extract::<i64>()? == group)
    }

    /// Clears what belonged to the row that is given next; whether there is more to do when it has its value.
    fn make_ready(&self, table: usize, row: u64) -> PyResult<bool> {
        self.object.call_method1(intern!(self.py(), "_make_ready"), (table, row))?.is_truthy()
    }

    fn copy_of_row(&self, place: Place) -> PyResult<Bound<'py, PyAny>> {
        self.object.call_method1(intern!(self.py(), "_copy_of_row"), (place.table(), place.row()))
    }

    /// What clears a row and all that belongs to it.
    fn clearing(&self, place: Place) -> PyResult<Bound<'py, PyAny>> {
        self.object.call_method1(intern!(self.py(), "_clearing"), (place.table(), place.row()))
    }

    fn states_of_zeros(&self, parameter: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.object.call_method1(intern!(self.py(), "_states_of_zeros"), (parameter,))
    }
}

/// Sets an entry of a `StackedParameterDict`, whose lock is held, if nothing about it is unusual.
///
/// Usual is a tensor on the CPU for a name that has a row of this kind. So is one for a new name, if there is a table of
/// this kind and `group` that has room. Otherwise nothing is set, and the result is `false`. What belonged to a row that
/// gets a new name is left to Python.
#[pyfunction]
pub(crate) fn set_entry_row(
    stacked: &Bound<'_, PyAny>,
    name: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    group: i64,
) -> PyResult<bool> {
    let torch = Torch::get(stacked.py())?;
    let Ok(name) = name.cast_exact::<PyString>() else {
        return Ok(false);
    };
    let Some(value) = RowValue::new(torch, value)? else {
        return Ok(false);
    };
    if name.is_empty()? {
        return Ok(false);
    }
    let stacked = Stacked::new(stacked)?;
    stacked.lock()?.get().refuse_change()?;
    let index = stacked.index()?;
    match index.get().place(name)? {
        Some(place) => replace(&stacked, index.get(), place, &value, group),
        None => insert(&stacked, index.get(), name, &value, group),
    }
}

fn replace(
    stacked: &Stacked<'_, '_>,
    index: &RowIndex,
    place: Place,
    value: &RowValue<'_, '_>,
    group: i64,
) -> PyResult<bool> {
    let py = stacked.py();
    let torch = Torch::get(py)?;
    let moves = index.moves(py);
    let table = stacked.tables()?.get_item(place.table())?;
    match stacked.parameter(&table)? {
        Some(parameter) if Stacked::is_of_group(&table, group)? => {
            let fits = matches!(value.fits(torch, &parameter, false)?, Fit::Rows(_));
            // Python code has run that may have moved the row.
            one_step(py, || {
                let is_there = stacked.is_as_counted(moves)?;
                let set = fits && is_there && value.write(torch, &parameter, place.row())?;
                if set {
                    index.note_set(py);
                }
                Ok(set)
            })
        }
        _ => Ok(false),
    }
}

fn insert(
    stacked: &Stacked<'_, '_>,
    index: &RowIndex,
    name: &Bound<'_, PyString>,
    value: &RowValue<'_, '_>,
    group: i64,
) -> PyResult<bool> {
    let py = stacked.py();
    let torch = Torch::get(py)?;
    let moves = index.moves(py);
    for (number, table) in stacked.tables()?.iter().enumerate() {
        if !Stacked::is_of_group(&table, group)? {
            continue;
        }
        let Some(parameter) = stacked.parameter(&table)? else {
            return Ok(false);
        };
        let capacity = match value.fits(torch, &parameter, true)? {
            Fit::Rows(capacity) => capacity,
            Fit::Other => continue,
            Fit::Unusual => return Ok(false),
        };
        let Some((row, is_reused)) = index.lock(py)?.next_row(number, capacity) else {
            return Ok(false);
        };
        let is_bare = !is_reused
            && !stacked.has_optimizers()?
            && !stacked.has_averages()?
            && Stacked::mask(&table)?.is_none()
            && torch.gradient(&parameter)?.is_none();
        // If there is more to do when the row has its value, Python does all of it.
        if !is_bare
            && (stacked.make_ready(number, row)? || !matches!(value.fits(torch, &parameter, true)?, Fit::Rows(_)))
        {
            return Ok(false);
        }
        let new = Utf8Name::of_text(name.clone())?;
        return one_step(py, || {
            // Python code has run that may have moved rows, given this one, or inserted the name.
            if !stacked.is_as_counted(moves)? {
                return Ok(false);
            }
            {
                let mut state = index.lock(py)?;
                let is_next = state.next_row(number, capacity).is_some_and(|(next, _)| next == row);
                if !is_next || state.names().contains(&new) {
                    return Ok(false);
                }
                state.reserve_one(&new).or_raise()?;
            }
            if !value.write(torch, &parameter, row)? {
                return Ok(false);
            }
            index.lock(py)?.insert_one(&new, number, row).or_raise()
        });
    }
    Ok(false)
}

/// Removes a name of a `StackedParameterDict`, takes its row back, and gives a copy of it; `None` if it is not there.
#[pyfunction]
pub(crate) fn pop_entry_row<'py>(
    stacked: &Bound<'py, PyAny>,
    name: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let name = to_text(name)?;
    let stacked = Stacked::new(stacked)?;
    let lock: Holding<'py> = Lock::hold(stacked.lock()?)?;
    lock.lock().refuse_change()?;
    loop {
        let index = stacked.index()?;
        let Some(place) = index.get().place(&name)? else {
            return Ok(None);
        };
        let removed = Utf8Name::of_text(name.clone())?;
        let remove = |py| index.get().lock(py)?.remove_one(&removed, place).or_raise();
        if let Some(row) = take_row(&stacked, index.get(), place, remove)? {
            return Ok(Some(row));
        }
    }
}

/// The same for the first or last name, which it gives, too.
#[pyfunction]
pub(crate) fn pop_end_entry_row<'py>(
    stacked: &Bound<'py, PyAny>,
    last: bool,
) -> PyResult<Option<(Bound<'py, PyString>, Bound<'py, PyAny>)>> {
    let py = stacked.py();
    let stacked = Stacked::new(stacked)?;
    let lock: Holding<'py> = Lock::hold(stacked.lock()?)?;
    lock.lock().refuse_change()?;
    loop {
        let index = stacked.index()?;
        let end = {
            let state = index.get().lock(py)?;
            let end = if last { state.names().last() } else { state.names().first() };
            end.map(|end| Ok::<_, PyErr>((text_of_utf8(py, end.name)?, end.place))).transpose()?
        };
        let Some((name, place)) = end else {
            return Ok(None);
        };
        let removed = Utf8Name::of_text(name.clone())?;
        let remove = |py| {
            let mut state = index.get().lock(py)?;
            // Another name may have come to the end.
            if state.names().get(&removed) == Some(place) {
                state.remove_end(last, place).or_raise()
            } else {
                Ok(false)
            }
        };
        if let Some(row) = take_row(&stacked, index.get(), place, remove)? {
            return Ok(Some((name, row)));
        }
    }
}

/// Removes a name and gives a copy of its row. The row is cleared with all that belongs to it, and is free then.
///
/// If something fails, nothing has changed. `None` if there were other changes meanwhile.
///
/// What is unusual is left to Python: a copy that torch must make, and what is cleared in other ways than by zeros.
fn take_row<'py>(
    stacked: &Stacked<'_, 'py>,
    index: &RowIndex,
    place: Place,
    remove: impl FnOnce(Python<'py>) -> PyResult<bool>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = stacked.py();
    let torch = Torch::get(py)?;
    let moves = index.moves(py);
    let table = stacked.tables()?.get_item(place.table())?;
    let parameter = stacked.parameter(&table)?.filter(|parameter| torch.is_plain(parameter));
    let copied = match &parameter {
        Some(parameter) => copy_row(torch, parameter, place.row())?,
        None => None,
    };
    let copied = match copied {
        Some(copied) => copied,
        None => stacked.copy_of_row(place)?,
    };
    let mut zeroed = ZeroedRow::new(place.row());
    let is_usual = match &parameter {
        Some(parameter) => add_all(torch, stacked, &table, parameter, &mut zeroed)?,
        None => false,
    };
    // Kept until all is done, with what it replaces.
    let changes = if is_usual { None } else { Some(stacked.clearing(place)?) };
    let calls: Vec<_> = match &changes {
        Some(changes) => changes.getattr(intern!(py, "calls"))?.cast::<PyList>()?.iter().collect(),
        None => Vec::new(),
    };
    let mut given = Vec::with_capacity(calls.len());
    let removed = one_step(py, || {
        if !stacked.is_as_counted(moves)? {
            return Ok(false);
        }
        let removed = remove(py)?;
        if removed {
            call_all(&calls, &mut given)?;
            if changes.is_none() {
                zeroed.write(torch, py)?;
            }
        }
        PyResult::Ok(removed)
    })?;
    Ok(removed.then_some(copied))
}

/// Adds all tensors in which a row of a table is to be zero when its name is gone; `false` if something else is to be
/// done.
fn add_all<'py>(
    torch: &Torch,
    stacked: &Stacked<'_, 'py>,
    table: &Bound<'py, PyAny>,
    parameter: &Bound<'py, PyAny>,
    zeroed: &mut ZeroedRow<'py>,
) -> PyResult<bool> {
    let mask = Stacked::mask(table)?;
    // A tensor that is no Parameter may have no gradient of its own, and warn who asks.
    let is_usual = torch.is_parameter(parameter)
        && !Stacked::is_lent(table)?
        && zeroed.add(torch, parameter)?
        && (mask.is_none() || zeroed.add(torch, &mask)?);
    if !is_usual {
        return Ok(false);
    }
    let gradient = torch.gradient(parameter)?;
    if !gradient.is_none() && !zeroed.add(torch, &gradient)? {
        return Ok(false);
    }
    if !stacked.has_optimizers()? {
        return Ok(true);
    }
    let Ok(states) = stacked.states_of_zeros(parameter)?.cast_into::<PyList>() else {
        return Ok(false);
    };
    for of_optimizer in states {
        if !zeroed.add_state(torch, parameter, of_optimizer.cast::<PyDict>()?)? {
            return Ok(false);
        }
    }
    Ok(true)
}
