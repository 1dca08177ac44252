//! `pdrs.IndexMap`: the ordered map from names to row ids, as Python sees it.
//!
//! The map lies behind a lock that is held only for pure Rust work. While it is held, no Python code runs, and no object
//! is made that Python's garbage collector tracks.

use std::hash::{DefaultHasher, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use numpy::{PyArray1, PyReadonlyArray1};
use pdrs_core::IndexMap as Map;
use pyo3::exceptions::{PyKeyError, PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple, PyType};

use crate::python::memory::{self, OrRaise, new_list, new_number, new_pair, refused};
use crate::python::name::{Name, Query, exact_text, find_listed, to_text};
use crate::python::names::{ExactNames, listed, to_names};

/// How many entries `repr` shows at each end of a long map.
const SHOWN: usize = 5;

/// How many of many missing names an error lists.
const LISTED: usize = 5;

/// How many entries ahead of a walk a name is fetched from memory, where names mostly lie scattered.
pub(crate) const AHEAD: usize = 16;

/// How many names are made before they are put into a map: few enough to be in the cache still.
const TOGETHER: usize = 256;

struct State {
    map: Map<Name, i64>,
    /// One more than the largest row that was ever given to a name.
    next_row: i64,
}

/// An ordered map from names to row numbers that pops anywhere in O(1).
///
/// Names are ``str``. Row numbers are integers from 0 to 2**63 - 1, such as the row of a table that belongs to the
/// name. The map has every method of a dict, and methods that handle many names in one call. Several threads may use
/// it at once. Costs are amortised; *n* is the number of names.
///
/// Parameters
/// ----------
/// entries
///     A mapping of names to row numbers, or an iterable of pairs. Their order is kept.
/// **rows
///     More names and their row numbers, as a dict takes them.
///
/// Raises
/// ------
/// TypeError
///     If a name is not a ``str``. A ``str`` of a subclass counts as its characters.
/// ValueError
///     If a row number is negative.
///
/// Examples
/// --------
/// >>> import pdrs
/// >>> index = pdrs.IndexMap.from_names(["a", "b", "c"])
/// >>> index["b"], index.popitem(last=False), list(index)
/// (1, ('a', 0), ['b', 'c'])
/// >>> index.indices(["c", "b", "c"])
/// array([2, 1, 2])
#[allow(
    clippy::doc_markdown,
    clippy::doc_link_with_quotes,
    reason = "what Python shows as docstrings, as the stubs have them"
)]
#[pyclass(frozen, mapping, subclass, module = "pdrs")]
pub(crate) struct IndexMap {
    state: Mutex<State>,
    /// The map's generation, to be read without the lock.
    generation: AtomicU64,
    /// Whether None passes for a row: torch's own methods of a `ParameterDict` write it behind their keys.
    takes_none: AtomicBool,
    /// The fingerprint of the names, and the generation that it was computed for. Locked before `state`.
    fingerprint: Mutex<Option<(u64, u64)>>,
}

/// The lock, and the duty to publish the generation when it is given back.
struct Locked<'a> {
    state: MutexGuard<'a, State>,
    generation: &'a AtomicU64,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.generation.store(self.state.map.generation(), Ordering::Release);
    }
}

impl IndexMap {
    pub(crate) fn empty() -> Self {
        Self::from_state(State { map: Map::new(), next_row: 0 })
    }

    /// A map of so many entries, in their order; a name that comes again keeps its place.
    ///
    /// Each is put into the map while what made it is still in the cache.
    pub(crate) fn collect(len: usize, mut entries: impl Iterator<Item = PyResult<(Name, i64)>>) -> PyResult<Self> {
        let (mut map, mut next_row) = (Map::new(), 0);
        map.reserve(len).or_raise()?;
        let mut batch = Vec::with_capacity(TOGETHER);
        loop {
            for entry in entries.by_ref().take(TOGETHER) {
                let (name, row) = entry?;
                next_row = checked_row(row)?.saturating_add(1).max(next_row);
                batch.push((name, row));
            }
            if batch.is_empty() {
                return Ok(Self::from_state(State { map, next_row }));
            }
            map.insert_many(batch.drain(..), drop).or_raise()?;
        }
    }

    fn from_state(state: State) -> Self {
        Self {
            generation: AtomicU64::new(state.map.generation()),
            takes_none: AtomicBool::new(false),
            fingerprint: Mutex::new(None),
            state: Mutex::new(state),
        }
    }

    fn read(&self, py: Python<'_>) -> MutexGuard<'_, State> {
        self.state.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self, py: Python<'_>) -> Locked<'_> {
        Locked { state: self.read(py), generation: &self.generation }
    }

    /// All names in order.
    pub(crate) fn names(&self, py: Python<'_>) -> PyResult<Vec<Name>> {
        memory::collect(self.read(py).map.iter().map(|(name, _)| name.clone_ref(py)))
    }

    /// Looks at every name and its row in order, under the lock: `take` must run no Python code.
    pub(crate) fn for_each(&self, py: Python<'_>, mut take: impl FnMut(&Name, i64)) {
        self.read(py).map.for_each(|name, row| take(name, *row));
    }

    /// Looks at the map under the lock: `take` must run no Python code.
    pub(crate) fn with_map<T>(&self, py: Python<'_>, take: impl FnOnce(&Map<Name, i64>) -> T) -> T {
        take(&self.read(py).map)
    }

    pub(crate) fn len(&self, py: Python<'_>) -> usize {
        self.read(py).map.len()
    }

    /// The first or last name.
    pub(crate) fn end<'py>(&self, py: Python<'py>, last: bool) -> Option<Bound<'py, PyString>> {
        let state = self.read(py);
        let (name, _) = if last { state.map.last() } else { state.map.first() }?;
        Some(name.text(py))
    }

    /// Removes a name; whether it was there.
    pub(crate) fn discard(&self, name: &Bound<'_, PyString>) -> bool {
        let removed = self.write(name.py()).state.map.remove(&Query::from(name));
        removed.is_some()
    }

    /// Removes the last or first name if it still is `name`; whether it was.
    pub(crate) fn discard_end(&self, py: Python<'_>, name: &Bound<'_, PyString>, last: bool) -> bool {
        let map = &mut self.write(py).state.map;
        let end = if last { map.last() } else { map.first() };
        if !end.is_some_and(|(end, _)| end.is(name)) {
            return false;
        }
        if last { map.pop_last() } else { map.pop_first() }.is_some()
    }

    /// Empties the map and gives the names that it had.
    pub(crate) fn take_names(&self, py: Python<'_>) -> PyResult<Vec<Name>> {
        let mut locked = self.write(py);
        let names = memory::collect(locked.state.map.iter().map(|(name, _)| name.clone_ref(py)))?;
        locked.state.map.clear();
        Ok(names)
    }

    /// Adds a name that is not there yet, with row 0; one that is there stays as it is.
    pub(crate) fn put(&self, py: Python<'_>, name: Name) -> PyResult<()> {
        self.write(py).state.map.get_or_insert_with(name, || 0).or_raise()?;
        Ok(())
    }

    /// Adds names that are not there yet, each with the next row.
    pub(crate) fn append(&self, py: Python<'_>, names: Vec<Name>) -> PyResult<Vec<i64>> {
        let mut rows = memory::with_capacity(names.len())?;
        let mut locked = self.write(py);
        let State { map, next_row } = &mut *locked.state;
        check_rows_left(*next_row, names.len())?;
        let draw = || {
            *next_row += 1;
            *next_row - 1
        };
        map.get_or_insert_many(names, draw, |row| rows.push(*row)).or_raise()?;
        Ok(rows)
    }

    /// Adds names that are not there yet to an empty map, each with the next row.
    fn number(&self, py: Python<'_>, names: impl ExactSizeIterator<Item = Name>) -> PyResult<()> {
        let mut locked = self.write(py);
        let State { map, next_row } = &mut *locked.state;
        let draw = || {
            *next_row += 1;
            *next_row - 1
        };
        map.get_or_insert_many(names, draw, |_| ()).or_raise()
    }

    /// Inserts entries as they are made, a batch at a time; those in front of one that fails stay.
    pub(crate) fn extend_with(
        &self,
        py: Python<'_>,
        mut entries: impl Iterator<Item = PyResult<(Name, i64)>>,
    ) -> PyResult<()> {
        loop {
            let batch = memory::try_collect(entries.by_ref().take(TOGETHER))?;
            if batch.is_empty() {
                return Ok(());
            }
            self.insert_all(py, batch)?;
        }
    }

    /// Inserts entries: all, or, if a row is negative or there are too many, none.
    pub(crate) fn insert_all(&self, py: Python<'_>, entries: Vec<(Name, i64)>) -> PyResult<()> {
        let Some(largest) = entries.iter().map(|(_, row)| *row).max() else {
            return Ok(());
        };
        entries.iter().try_for_each(|(_, row)| checked_row(*row).map(drop))?;
        let mut locked = self.write(py);
        let map = &mut locked.state.map;
        let left = if map.is_empty() && map.generation() == 0 {
            Map::from_distinct(entries.into_iter()).or_raise()?.map_or_else(Some, |made| {
                *map = made;
                None
            })
        } else {
            Some(entries)
        };
        if let Some(entries) = left {
            map.insert_many(entries, drop).or_raise()?;
        }
        locked.state.next_row = locked.state.next_row.max(largest.saturating_add(1));
        Ok(())
    }

    /// The row of a name, if it is there.
    pub(crate) fn find(&self, name: &Bound<'_, PyString>) -> Option<i64> {
        self.read(name.py()).map.get(&Query::from(name)).copied()
    }

    /// Gives a name a row: a new one goes to the end, one that is there keeps its place.
    pub(crate) fn set(&self, py: Python<'_>, name: Name, row: i64) -> PyResult<()> {
        let row = checked_row(row)?;
        let mut locked = self.write(py);
        locked.state.map.insert(name, row).or_raise()?;
        locked.state.next_row = locked.state.next_row.max(row.saturating_add(1));
        Ok(())
    }

    /// The same for a list or tuple of nothing but exact `str`; `None` for anything else.
    fn rows_of_listed(&self, names: &Bound<'_, PyAny>) -> PyResult<Option<Vec<i64>>> {
        find_listed(&self.read(names.py()).map, names, |row| row.unwrap_or(-1)).or_raise()
    }

    /// The last or first name and its row.
    pub(crate) fn end_entry(&self, py: Python<'_>, last: bool) -> Option<(Name, i64)> {
        let state = self.read(py);
        let (name, row) = if last { state.map.last() } else { state.map.first() }?;
        Some((name.clone_ref(py), *row))
    }

    pub(crate) fn missing(name: Bound<'_, PyString>) -> PyErr {
        PyKeyError::new_err(name.unbind())
    }

    /// The entry at or behind `position` (in front of it, if `reversed`) and where to go on.
    fn step(&self, py: Python<'_>, position: usize, reversed: bool) -> Option<(usize, Name, i64)> {
        let state = self.read(py);
        let ahead = if reversed { position.checked_sub(AHEAD) } else { Some(position + AHEAD) };
        if let Some((name, _)) = ahead.and_then(|ahead| state.map.entry_at(ahead)) {
            name.prefetch_object();
        }
        let (found, name, row) =
            if reversed { state.map.entry_before(position) } else { state.map.entry_at_or_after(position) }?;
        Some((if reversed { found } else { found + 1 }, name.clone_ref(py), *row))
    }
}

fn check_rows_left(next_row: i64, wanted: usize) -> PyResult<()> {
    match i64::try_from(wanted).ok().and_then(|wanted| next_row.checked_add(wanted)) {
        Some(_) => Ok(()),
        None => Err(PyOverflowError::new_err(format!("no {wanted} rows are left behind row {next_row}"))),
    }
}

fn checked_row(row: i64) -> PyResult<i64> {
    if row < 0 {
        return Err(PyValueError::new_err(format!("a row must be 0 or more, got {row}")));
    }
    Ok(row)
}

/// A map of a list of distinct names, each with the next row; `None` if something else is in the list.
fn number_distinct(names: &Bound<'_, PyAny>) -> PyResult<Option<Map<Name, i64>>> {
    let Some(mut exact) = ExactNames::of(names) else {
        return Ok(None);
    };
    let map = Map::from_distinct(exact.by_ref().zip(0..)).or_raise()?.ok();
    Ok(map.filter(|_| exact.are_all()))
}

/// An argument that may be left out, and is not taken for left out if it is None.
pub(crate) struct Given<'py>(pub(crate) Option<Bound<'py, PyAny>>);

impl<'py> FromPyObject<'_, 'py> for Given<'py> {
    type Error = std::convert::Infallible;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> Result<Self, Self::Error> {
        Ok(Self(Some(given.to_owned())))
    }
}

/// What stands for names that are not there: a number, or `None` if they are an error.
fn number_for_missing(missing: &Bound<'_, PyAny>) -> PyResult<Option<i64>> {
    let Ok(text) = missing.cast::<PyString>() else {
        return missing.extract().map(Some);
    };
    if text == "error" {
        return Ok(None);
    }
    Err(PyValueError::new_err(format!("missing must be 'error' or a number, got {}", text.repr()?)))
}

fn copies(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    PyModule::import(py, "pdrs._entries.copies")
}

fn is_mapping(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    static MAPPING: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    object.is_instance(MAPPING.import(object.py(), "collections.abc", "Mapping")?)
}

/// Adds what a dict would take as its entries: those of something that has `keys`, or pairs.
fn add_entries(entries: &Bound<'_, PyAny>, pairs: &mut Vec<(Name, i64)>) -> PyResult<()> {
    let mut add = |name: &Bound<'_, PyAny>, row: &Bound<'_, PyAny>| {
        memory::push(pairs, (Name::new(to_text(name)?), row.extract()?))
    };
    let keys = intern!(entries.py(), "keys");
    if let Ok(dict) = entries.cast_exact::<PyDict>() {
        // Of a list, because a row of a class of its own may run code that changes the dict.
        return memory::items_of(dict)?.iter().try_for_each(|(name, row)| add(name, row));
    }
    if entries.hasattr(keys)? {
        for name in entries.call_method0(keys)?.try_iter()? {
            let name = name?;
            add(&name, &entries.get_item(&name)?)?;
        }
        return Ok(());
    }
    for (at, pair) in entries.try_iter()?.enumerate() {
        let pair = pair?;
        let items: Vec<Bound<'_, PyAny>> = match pair.cast::<PyTuple>() {
            Ok(pair) => pair.iter().collect(),
            Err(_) => pair.try_iter()?.collect::<PyResult<_>>()?,
        };
        let [name, row] = &items[..] else {
            let length = items.len();
            return Err(PyValueError::new_err(format!(
                "update sequence element #{at} has length {length}; 2 is required"
            )));
        };
        add(name, row)?;
    }
    Ok(())
}

fn view<'py>(py: Python<'py>, class: &str, index: &Bound<'py, IndexMap>) -> PyResult<Bound<'py, PyAny>> {
    static VIEWS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let views = VIEWS.get_or_try_init(py, || PyModule::import(py, "pdrs._entries.views").map(Bound::unbind))?;
    views.bind(py).getattr(class)?.call1((index,))
}

#[allow(
    clippy::doc_markdown,
    clippy::doc_link_with_quotes,
    reason = "what Python shows as docstrings, as the stubs have them"
)]
#[pymethods]
impl IndexMap {
    // Subclasses may have a constructor that takes something else.
    #[new]
    #[pyo3(signature = (*_arguments, **_options), text_signature = "(entries=None, /, **rows)")]
    fn new(_arguments: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, PyDict>>) -> Self {
        Self::empty()
    }

    #[pyo3(signature = (entries=None, /, **rows))]
    fn __init__(
        &self,
        py: Python<'_>,
        entries: Option<&Bound<'_, PyAny>>,
        rows: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        self.update(py, entries, rows)
    }

    /// Make an IndexMap of many names at once. **O(n)**, several times faster than ``dict(zip(names, range(n)))``.
    ///
    /// Parameters
    /// ----------
    /// names
    ///     A list, array, column of another library or other iterable of ``str``. If a name is listed twice, its first
    ///     place counts.
    /// rows
    ///     The row numbers, int64 of shape ``[len(names)]``. Without them, the first name gets 0, the next new name
    ///     1, and so on. If a name is listed twice, its last row number counts.
    #[classmethod]
    #[pyo3(signature = (names, rows=None))]
    fn from_names<'py>(
        class: &Bound<'py, PyType>,
        names: &Bound<'py, PyAny>,
        rows: Option<PyReadonlyArray1<'_, i64>>,
    ) -> PyResult<Bound<'py, Self>> {
        let (py, names) = (names.py(), &listed(names)?);
        let made = Self::of_class(class)?;
        let index = made.get();
        match rows {
            None => match number_distinct(names)? {
                Some(map) => {
                    let next_row = map.len().cast_signed() as i64;
                    *index.write(py).state = State { map, next_row };
                }
                None => index.number(py, to_names(names)?.into_iter())?,
            },
            Some(rows) => {
                let names = to_names(names)?;
                let rows = rows.as_array();
                if rows.len() != names.len() {
                    let (names, rows) = (names.len(), rows.len());
                    return Err(PyValueError::new_err(format!("got {names} names and {rows} rows")));
                }
                index.insert_all(py, memory::collect(names.into_iter().zip(rows.iter().copied()))?)?;
            }
        }
        Ok(made)
    }

    /// Make an IndexMap of many names with the same row. **O(n)**.
    #[classmethod]
    #[pyo3(signature = (names, row=0, /))]
    fn fromkeys<'py>(class: &Bound<'py, PyType>, names: &Bound<'py, PyAny>, row: i64) -> PyResult<Bound<'py, Self>> {
        let made = Self::of_class(class)?;
        let names = to_names(names)?;
        made.get().insert_all(class.py(), memory::collect(names.into_iter().map(|name| (name, row)))?)?;
        Ok(made)
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.len(py)
    }

    pub(crate) fn __contains__(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        if let Ok(text) = name.cast_exact::<PyString>() {
            return Ok(self.read(name.py()).map.contains(&Query::from(text)));
        }
        match exact_text(name)? {
            Some(text) => Ok(self.read(name.py()).map.contains(&Query::from(&text))),
            // As in a dict: what cannot be hashed is an error, what can is simply not there.
            None => name.hash().map(|_| false),
        }
    }

    fn __getitem__<'py>(slf: &Bound<'py, Self>, name: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let name = to_text(name)?;
        if let Some(row) = slf.get().find(&name) {
            return Ok(new_number(py, row)?.into_any());
        }
        Self::not_found(slf, name)
    }

    fn __setitem__(&self, py: Python<'_>, name: &Bound<'_, PyAny>, row: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = Name::new(to_text(name)?);
        if row.is_none() && self.takes_none.load(Ordering::Relaxed) {
            return self.put(py, name);
        }
        self.set(py, name, row.extract()?)
    }

    fn _take_none(&self) {
        self.takes_none.store(true, Ordering::Relaxed);
    }

    fn __delitem__(&self, name: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = to_text(name)?;
        let removed = self.write(name.py()).state.map.remove(&Query::from(&name));
        removed.map(drop).ok_or_else(|| Self::missing(name))
    }

    fn __iter__(slf: Bound<'_, Self>) -> NameIterator {
        NameIterator::new(&slf, false, Yield::Name)
    }

    fn __reversed__(slf: Bound<'_, Self>) -> NameIterator {
        NameIterator::new(&slf, true, Yield::Name)
    }

    /// The same for the same names in the same order, and different for others. **O(1)** until names change, then
    /// **O(n)** once.
    ///
    /// A `str`, because torch.compile guards one by its value, and would take an `int` that changes for one that varies.
    #[getter]
    fn _fingerprint(&self, py: Python<'_>) -> String {
        let mut known = self.fingerprint.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner);
        let state = self.read(py);
        let generation = state.map.generation();
        let fingerprint = match *known {
            Some((then, fingerprint)) if then == generation => fingerprint,
            _ => {
                let mut hasher = DefaultHasher::new();
                state.map.iter().for_each(|(name, _)| hasher.write_u64(name.full_hash()));
                hasher.finish()
            }
        };
        *known = Some((generation, fingerprint));
        format!("{fingerprint:016x}")
    }

    /// The iterator behind the views: what it yields is 0 for names, 1 for rows, 2 for both.
    fn _iterate(slf: Bound<'_, Self>, yields: u8, reversed: bool) -> NameIterator {
        let yields = match yields {
            0 => Yield::Name,
            1 => Yield::Row,
            _ => Yield::Both,
        };
        NameIterator::new(&slf, reversed, yields)
    }

    /// Return a view of the names: ordered, reversible, with set operations. **O(1)**.
    fn keys(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf.py(), "KeysView", &slf)
    }

    /// Return a view of the row numbers in the order of the names. **O(1)**.
    fn values(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf.py(), "ValuesView", &slf)
    }

    /// Return a view of the pairs of name and row number, in order. **O(1)**.
    fn items(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf.py(), "ItemsView", &slf)
    }

    /// Return the row number of ``name``, or ``default`` if the name is missing. **O(1)**.
    #[pyo3(signature = (name, default=None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        name: &Bound<'py, PyAny>,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let name = to_text(name)?;
        Ok(match self.find(&name) {
            Some(row) => Some(new_number(py, row)?.into_any()),
            None => default,
        })
    }

    /// Return the row number of ``name``. If the name is missing, first set it to ``default``. **O(1)**.
    #[pyo3(signature = (name, default=None))]
    fn setdefault(&self, py: Python<'_>, name: &Bound<'_, PyAny>, default: Option<&Bound<'_, PyAny>>) -> PyResult<i64> {
        let name = to_text(name)?;
        if let Some(row) = self.find(&name) {
            return Ok(row);
        }
        let Some(default) = default else {
            return Err(PyTypeError::new_err("a row must be an int, got None"));
        };
        let row = checked_row(default.extract()?)?;
        // Another thread may have set it meanwhile.
        let mut locked = self.write(py);
        let State { map, next_row } = &mut *locked.state;
        let (row, _) = map.get_or_insert_with(Name::new(name), || row).map_err(refused)?;
        *next_row = (*next_row).max(row.saturating_add(1));
        Ok(*row)
    }

    /// Remove ``name`` and return its row number. The other names keep their order. **O(1)**.
    ///
    /// If the name is missing, return the default, or raise KeyError if none is given.
    #[pyo3(signature = (name, /, *default))]
    fn pop<'py>(
        &self,
        py: Python<'py>,
        name: &Bound<'py, PyAny>,
        default: &Bound<'py, PyTuple>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if default.len() > 1 {
            return Err(PyTypeError::new_err(format!("pop expected at most 2 arguments, got {}", 1 + default.len())));
        }
        let name = to_text(name)?;
        if let Some(row) = self.find(&name) {
            // What is given is made first: where there is no memory for it, the name stays.
            let given = new_number(py, row)?.into_any();
            match self.write(py).state.map.remove(&Query::from(&name)) {
                Some((_, removed)) if removed == row => return Ok(given),
                // Another thread has set it meanwhile.
                Some((_, removed)) => return Ok(new_number(py, removed)?.into_any()),
                None => {}
            }
        }
        if default.is_empty() { Err(Self::missing(name)) } else { default.get_item(0) }
    }

    /// Remove the last (or the first) name and return it with its row number. **O(1)** at both ends.
    ///
    /// Raises KeyError if the map is empty.
    #[pyo3(signature = (last=true))]
    fn popitem<'py>(&self, py: Python<'py>, last: bool) -> PyResult<Bound<'py, PyTuple>> {
        let gone = || PyKeyError::new_err("popitem(): dictionary is empty");
        loop {
            // What is given is made first: where there is no memory for it, the name stays.
            let (name, row) = self.end_entry(py, last).ok_or_else(gone)?;
            let name = name.into_text(py);
            let pair = new_pair(py, name.clone(), new_number(py, row)?)?;
            if self.discard_end(py, &name, last) {
                return Ok(pair);
            }
        }
    }

    /// Move ``name`` to the end (or to the beginning). **O(1)**. Raises KeyError if it is missing.
    #[pyo3(signature = (name, last=true))]
    fn move_to_end(&self, name: &Bound<'_, PyAny>, last: bool) -> PyResult<()> {
        let name = to_text(name)?;
        let moved = {
            let map = &mut self.write(name.py()).state.map;
            let query = Query::from(&name);
            if last { map.move_to_last(&query) } else { map.move_to_first(&query) }.or_raise()?
        };
        if moved { Ok(()) } else { Err(Self::missing(name)) }
    }

    /// Remove all names, and count rows from 0 again. **O(n)**.
    fn clear(&self, py: Python<'_>) {
        let mut locked = self.write(py);
        locked.state.map.clear();
        locked.state.next_row = 0;
    }

    /// Set many row numbers, all or none. New names go to the end, in order. **O(m)** for ``m`` entries.
    ///
    /// Takes what a dict takes: a mapping, an object with ``keys`` and ``__getitem__``, or pairs, and ``name=row``.
    #[pyo3(signature = (entries=None, /, **rows))]
    fn update(
        &self,
        py: Python<'_>,
        entries: Option<&Bound<'_, PyAny>>,
        rows: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let mut pairs = Vec::new();
        match entries {
            None => {}
            // Of a subclass, what it answers may not be what is in the map.
            Some(entries) => match entries.cast_exact::<IndexMap>() {
                Ok(index) => {
                    let source = index.get().read(py);
                    pairs = memory::collect(source.map.iter().map(|(name, row)| (name.clone_ref(py), *row)))?;
                }
                Err(_) => add_entries(entries, &mut pairs)?,
            },
        }
        if let Some(rows) = rows {
            add_entries(rows, &mut pairs)?;
        }
        self.insert_all(py, pairs)
    }

    fn __or__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if !is_mapping(other)? {
            return Ok(py.NotImplemented().into_bound(py));
        }
        let made = Self::copy(slf)?;
        made.get().update(py, Some(other), None)?;
        Ok(made.into_any())
    }

    fn __ror__<'py>(slf: &Bound<'py, Self>, other: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if !is_mapping(other)? {
            return Ok(py.NotImplemented().into_bound(py));
        }
        let made = Self::of_class(&slf.get_type())?;
        made.get().update(py, Some(other), None)?;
        made.get().update(py, Some(slf.as_any()), None)?;
        Ok(made.into_any())
    }

    fn __ior__(&self, py: Python<'_>, other: &Bound<'_, PyAny>) -> PyResult<()> {
        self.update(py, Some(other), None)
    }

    /// Add new names at the end, and return the row numbers of all names. **O(m)** for ``m`` names.
    ///
    /// A new name gets the next row number: one more than the largest since the map was made or cleared.
    ///
    /// Parameters
    /// ----------
    /// names
    ///     A list, array, column of another library or other iterable of ``str``.
    ///
    /// Returns
    /// -------
    /// numpy.ndarray
    ///     int64 of shape ``[len(names)]``: the row numbers of new and old names, in the order of ``names``.
    fn extend<'py>(&self, names: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let py = names.py();
        Ok(PyArray1::from_vec(py, self.append(py, to_names(names)?)?))
    }

    /// Return the row numbers of many names. **O(m)** for ``m`` names, several times faster than ``m`` look-ups.
    ///
    /// Parameters
    /// ----------
    /// names
    ///     A list, array, column of another library or other iterable of ``str``. Repeated names are fine. By default
    ///     all names of the map, in order.
    /// missing
    ///     ``"error"``, or the number to return for a missing name.
    ///
    /// Returns
    /// -------
    /// numpy.ndarray
    ///     int64 of shape ``[len(names)]``. ``torch.from_numpy`` makes a tensor of it without a copy.
    ///
    /// Raises
    /// ------
    /// KeyError
    ///     If names are missing and ``missing`` is ``"error"``. The message counts them and lists some.
    /// ValueError
    ///     If ``missing`` is another text.
    #[pyo3(signature = (names=Given(None), *, missing=None), text_signature = "($self, names=..., *, missing='error')")]
    fn indices<'py>(
        &self,
        py: Python<'py>,
        names: Given<'py>,
        missing: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let default = missing.map_or(Ok(None), number_for_missing)?;
        let Given(Some(names)) = names else {
            let rows = memory::collect(self.read(py).map.iter().map(|(_, row)| *row))?;
            return Ok(PyArray1::from_vec(py, rows));
        };
        let names = &listed(&names)?;
        if let Some(mut rows) = self.rows_of_listed(names)?
            && (default.is_some() || rows.iter().all(|row| *row >= 0))
        {
            rows.iter_mut().filter(|row| **row < 0).for_each(|row| *row = default.unwrap_or(-1));
            return Ok(PyArray1::from_vec(py, rows));
        }
        let names = to_names::<Name>(names)?;
        let mut rows = memory::with_capacity(names.len())?;
        let (mut first, mut count) = (Vec::with_capacity(LISTED), 0);
        self.read(py).map.get_many(&names, |at, row| {
            if let Some(row) = row.copied().or(default) {
                rows.push(row);
                return;
            }
            count += 1;
            if count <= LISTED {
                first.push(at);
            }
        });
        if count == 0 {
            return Ok(PyArray1::from_vec(py, rows));
        }
        let mut listed = Vec::with_capacity(LISTED);
        for at in first {
            listed.push(names[at].text(py).repr()?.to_string());
        }
        let more = if count > LISTED { ", ..." } else { "" };
        let (total, listed) = (names.len(), listed.join(", "));
        Err(PyKeyError::new_err(format!("{count} of {total} names are not in the IndexMap: {listed}{more}")))
    }

    /// Return the names, in order, for which a mask is true. **O(n)**.
    ///
    /// Parameters
    /// ----------
    /// mask
    ///     bool ``[n]``: an array, a tensor, a column of another library, or a list.
    ///
    /// Raises
    /// ------
    /// TypeError
    ///     If the mask has values that are not bool.
    /// ValueError
    ///     If the mask has another length.
    ///
    /// Examples
    /// --------
    /// >>> import pdrs
    /// >>> index = pdrs.IndexMap({"a": 3, "b": 0, "c": 5})
    /// >>> index.select(index.indices() > 1)
    /// ['a', 'c']
    fn select<'py>(&self, py: Python<'py>, mask: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        static AS_MASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let mask = AS_MASK.import(py, "pdrs._torch.names", "as_mask")?.call1((mask, self.len(py)))?;
        let mask = mask.extract::<PyReadonlyArray1<'_, bool>>()?;
        let mask = mask.as_array();
        let chosen = {
            let state = self.read(py);
            if state.map.len() != mask.len() {
                return Err(PyRuntimeError::new_err("dictionary changed while names were selected"));
            }
            let chosen = state.map.iter().zip(mask).filter(|(_, chosen)| **chosen);
            memory::collect(chosen.map(|((name, _), _)| name.clone_ref(py)))?
        };
        new_list(py, chosen.into_iter().map(|name| Ok(name.into_text(py))))
    }

    /// Return a map with the same names and row numbers, in the same order. **O(n)**; no name is hashed.
    fn copy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let py = slf.py();
        if !slf.is_exact_instance_of::<Self>() {
            // With what else the subclass has.
            let copied = copies(py)?.call_method1(intern!(py, "shallow_copy"), (slf,))?;
            return Ok(copied.cast_into()?);
        }
        Bound::new(py, slf.get().duplicate(py)?)
    }

    fn __copy__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        Self::copy(slf)
    }

    fn __deepcopy__<'py>(slf: &Bound<'py, Self>, memo: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if !slf.is_exact_instance_of::<Self>() {
            let reduced = slf.call_method1(intern!(py, "__reduce_ex__"), (4,))?;
            return copies(py)?.call_method1(intern!(py, "deep_copy_reduced"), (slf, reduced, memo));
        }
        Ok(Bound::new(py, slf.get().duplicate(py)?)?.into_any())
    }

    fn __eq__<'py>(&self, py: Python<'py>, other: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        if !is_mapping(other)? {
            return Ok(py.NotImplemented().into_bound(py));
        }
        let theirs = if let Ok(other) = other.cast_exact::<IndexMap>() {
            other.get().to_dict(py)?
        } else {
            let theirs = PyDict::new(py);
            theirs.update(other.cast()?)?;
            theirs
        };
        Ok(self.to_dict(py)?.eq(theirs)?.into_pyobject(py)?.to_owned().into_any())
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let py = slf.py();
        let (head, tail, hidden) = {
            let state = slf.get().read(py);
            let entry = |(name, row): (&Name, &i64)| (name.clone_ref(py), *row);
            let head: Vec<_> = state.map.iter().take(2 * SHOWN + 1).map(entry).collect();
            if head.len() <= 2 * SHOWN {
                (head, Vec::new(), 0)
            } else {
                let mut tail: Vec<_> = state.map.iter().rev().take(SHOWN).map(entry).collect();
                tail.reverse();
                (head.into_iter().take(SHOWN).collect(), tail, state.map.len() - 2 * SHOWN)
            }
        };
        let mut shown = Vec::with_capacity(2 * SHOWN + 1);
        for (at, (name, row)) in head.into_iter().chain(tail).enumerate() {
            if at == SHOWN && hidden > 0 {
                shown.push(format!("... {hidden} more ..."));
            }
            shown.push(format!("{}: {row}", name.into_text(py).repr()?));
        }
        Ok(format!("{}({{{}}})", slf.get_type().name()?, shown.join(", ")))
    }

    fn __sizeof__(&self, py: Python<'_>) -> usize {
        size_of::<Self>() + self.read(py).map.allocated_bytes()
    }

    /// As of any object; but in the protocols 0 and 1, too, where Python refuses native classes.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let new_object = py.import(intern!(py, "copyreg"))?.getattr(intern!(py, "__newobj__"))?;
        let state = slf.call_method0(intern!(py, "__getstate__"))?;
        (new_object, (slf.get_type(),), state).into_pyobject(py)
    }

    /// What is pickled: the names, their rows, the next row, and what a subclass has beside.
    ///
    /// The rows are int64, little endian, or `None` if there are none: old protocols write empty bytes as a call.
    fn __getstate__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let (names, rows, next_row) = {
            let state = slf.get().read(py);
            let mut rows = memory::with_capacity(8 * state.map.len())?;
            state.map.iter().for_each(|(_, row)| rows.extend_from_slice(&row.to_le_bytes()));
            let names = memory::collect(state.map.iter().map(|(name, _)| name.clone_ref(py)))?;
            (names, rows, state.next_row)
        };
        let names = new_list(py, names.into_iter().map(|name| Ok(name.into_text(py))))?;
        let rows = (!rows.is_empty()).then(|| PyBytes::new(py, &rows));
        if slf.is_exact_instance_of::<Self>() {
            return Ok((names, rows, next_row).into_pyobject(py)?.into_any());
        }
        let others = copies(py)?.call_method1(intern!(py, "attributes_of"), (slf,))?;
        Ok((names, rows, next_row, others).into_pyobject(py)?.into_any())
    }

    /// All or nothing; a `ValueError` or `TypeError` if the state is damaged.
    fn __setstate__(slf: &Bound<'_, Self>, state: &Bound<'_, PyTuple>) -> PyResult<()> {
        let (py, index) = (slf.py(), slf.get());
        if !(3..=4).contains(&state.len()) {
            return Err(PyValueError::new_err(format!(
                "the state of an IndexMap has 3 or 4 parts, got {}",
                state.len()
            )));
        }
        let names = to_names(&state.get_item(0)?)?;
        let rows: Option<Bound<'_, PyBytes>> = state.get_item(1)?.extract()?;
        let rows = rows.as_ref().map_or(&[][..], |rows| rows.as_bytes());
        let next_row: i64 = state.get_item(2)?.extract()?;
        if rows.len() != 8 * names.len() {
            return Err(PyValueError::new_err(format!("got {} names and {} bytes of rows", names.len(), rows.len())));
        }
        let rows = rows.chunks_exact(8).map(|row| i64::from_le_bytes(row.try_into().expect("8 bytes")));
        let count = names.len();
        let made = Self::empty();
        made.insert_all(py, memory::collect(names.into_iter().zip(rows))?)?;
        let mut made = made.state.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        if made.map.len() != count {
            return Err(PyValueError::new_err("a name is listed twice in the state of an IndexMap"));
        }
        made.next_row = made.next_row.max(next_row);
        let mut locked = index.write(py);
        if !locked.state.map.is_empty() || locked.state.map.generation() != 0 {
            return Err(PyRuntimeError::new_err("an IndexMap that has been used cannot be given a state"));
        }
        *locked.state = made;
        drop(locked);
        if let Ok(others) = state.get_item(3) {
            copies(py)?.call_method1(intern!(py, "set_attributes"), (slf, others))?;
        }
        Ok(())
    }
}

impl IndexMap {
    /// An empty map of a class, whose constructor is not asked.
    fn of_class<'py>(class: &Bound<'py, PyType>) -> PyResult<Bound<'py, Self>> {
        let py = class.py();
        if class.is(py.get_type::<Self>()) {
            return Bound::new(py, Self::empty());
        }
        Ok(class.call_method1(intern!(py, "__new__"), (class,))?.cast_into()?)
    }

    /// Asks ``__missing__`` of a subclass, as a dict does, which has none of its own either.
    #[cold]
    fn not_found<'py>(slf: &Bound<'py, Self>, name: Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        let missing = intern!(slf.py(), "__missing__");
        let class = slf.get_type();
        if !slf.is_exact_instance_of::<Self>() && class.hasattr(missing)? {
            return class.getattr(missing)?.call1((slf, name));
        }
        Err(Self::missing(name))
    }

    fn duplicate(&self, py: Python<'_>) -> PyResult<Self> {
        let state = self.read(py);
        let map = state.map.map_entries(|name, row| (name.clone_ref(py), *row)).or_raise()?;
        Ok(Self::from_state(State { map, next_row: state.next_row }))
    }

    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let entries = memory::collect(self.read(py).map.iter().map(|(name, row)| (name.clone_ref(py), *row)))?;
        let dict = PyDict::new(py);
        for (name, row) in entries {
            dict.set_item(name.into_text(py), new_number(py, row)?)?;
        }
        Ok(dict)
    }
}

#[derive(Clone, Copy)]
enum Yield {
    Name,
    Row,
    Both,
}

/// Walks an [`IndexMap`] that must not change meanwhile.
pub(crate) struct Cursor {
    index: Py<IndexMap>,
    generation: u64,
    reversed: bool,
    /// Where to go on.
    position: usize,
}

impl Cursor {
    pub(crate) fn new(index: &Bound<'_, IndexMap>, reversed: bool) -> Self {
        let state = index.get().read(index.py());
        let position = if reversed { state.map.positions() } else { 0 };
        let generation = state.map.generation();
        drop(state);
        Self { index: index.clone().unbind(), generation, reversed, position }
    }

    /// The next name and row; `RuntimeError` if names were added, removed or moved since the walk began.
    pub(crate) fn next(&mut self, py: Python<'_>) -> PyResult<Option<(Name, i64)>> {
        let index = self.index.get();
        if index.generation.load(Ordering::Acquire) != self.generation {
            return Err(PyRuntimeError::new_err("dictionary changed during iteration"));
        }
        Ok(index.step(py, self.position, self.reversed).map(|(next, name, row)| {
            self.position = next;
            (name, row)
        }))
    }
}

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct NameIterator {
    /// Until the end is reached: an iterator that is kept to no purpose shall not keep a million names.
    cursor: Mutex<Option<Cursor>>,
    yields: Yield,
}

impl NameIterator {
    fn new(index: &Bound<'_, IndexMap>, reversed: bool, yields: Yield) -> Self {
        Self { cursor: Mutex::new(Some(Cursor::new(index, reversed))), yields }
    }
}

#[pymethods]
impl NameIterator {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut cursor = self.cursor.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some((name, row)) = cursor.as_mut().map_or(Ok(None), |cursor| cursor.next(py))? else {
            let ended = cursor.take();
            drop(cursor);
            drop(ended);
            return Ok(None);
        };
        drop(cursor);
        Ok(Some(match self.yields {
            Yield::Name => name.into_text(py).into_any(),
            Yield::Row => new_number(py, row)?.into_any(),
            Yield::Both => new_pair(py, name.into_text(py), new_number(py, row)?)?.into_any(),
        }))
    }
}
