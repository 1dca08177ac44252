//! `pdrs.IndexMap`: the ordered map from names to row ids, as Python sees it.
//!
//! Names lie as text in the [table](NameTable) that a `StackedParameterDict` has, too. The row of a name is the
//! [id](Place::id) of its place there.
//!
//! The map lies behind a lock that is held only for pure Rust work. While it is held, no Python code runs, and no object
//! is made that Python's garbage collector tracks.

mod walk;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::{PyArray1, PyReadonlyArray1};
use pdrs_core::Place;
use pdrs_core::names::table::NameTable;
use pdrs_core::names::text::Text;
use pyo3::exceptions::{PyKeyError, PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple, PyType};

use crate::python::memory::{self, OrRaise, new_list, new_number, new_pair};
use crate::python::name::{
    Ascii, Listed, NO_NAME, OfText, Utf8Name, exact_text, text_of_utf8, to_text, with_listed, with_text,
};
use crate::python::names::{listed, prefetched, to_names};

pub(crate) use crate::index_map::walk::NameIterator;
use crate::index_map::walk::Yield;

/// How many entries `repr` shows at each end of a long map.
const SHOWN: usize = 5;

/// How many of many missing names an error lists.
const LISTED: usize = 5;

/// Names and the row of each.
type Entries = (Vec<Utf8Name>, Vec<i64>);

struct State {
    names: NameTable,
    /// One more than the largest row that was ever given to a name.
    next_row: i64,
}

/// An ordered map from names to row numbers that pops anywhere in O(1).
///
/// Names are ``str``. Row numbers are integers from 0 to 2**63 - 1, such as the row of a table that belongs to the
/// name. The map has every method of a dict, and methods that handle many names in one call. It keeps the
/// characters of its names, and no ``str`` objects: what it returns are equal ones. Several threads may use it at once.
/// Costs are amortised; *n* is the number of names.
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
}

/// The lock, and the duty to publish the generation when it is given back.
struct Locked<'a> {
    state: MutexGuard<'a, State>,
    generation: &'a AtomicU64,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.generation.store(self.state.names.generation(), Ordering::Release);
    }
}

impl IndexMap {
    fn empty() -> Self {
        Self::from_state(State { names: NameTable::default(), next_row: 0 })
    }

    /// A map of names and their rows.
    pub(crate) fn of(names: NameTable) -> Self {
        let largest = names.iter().map(|(_, place)| row_of(place)).max();
        Self::from_state(State { names, next_row: largest.map_or(0, |row| row.saturating_add(1)) })
    }

    fn from_state(state: State) -> Self {
        Self { generation: AtomicU64::new(state.names.generation()), state: Mutex::new(state) }
    }

    fn read(&self, py: Python<'_>) -> MutexGuard<'_, State> {
        self.state.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, py: Python<'_>) -> Locked<'_> {
        Locked { state: self.read(py), generation: &self.generation }
    }

    /// A copy of the names and their rows.
    pub(crate) fn names(&self, py: Python<'_>) -> PyResult<NameTable> {
        self.read(py).names.copy().or_raise()
    }

    fn len(&self, py: Python<'_>) -> usize {
        self.read(py).names.len()
    }

    /// Adds the names in a list or tuple that are not there yet, each with the next row, and hands over the row of each.
    fn append(&self, names: &Bound<'_, PyAny>, mut take: impl FnMut(i64)) -> PyResult<()> {
        let mut locked = self.write(names.py());
        if let Some(done) = with_plain(names, |listed| locked.state.append(listed, &mut take)) {
            return done;
        }
        drop(locked);
        let others = to_names::<Utf8Name>(names)?;
        self.write(names.py()).state.append(&others, take)
    }

    /// Inserts the names in a list or tuple: all, or, if a row is negative or there are too many, none.
    fn insert_listed(&self, names: &Bound<'_, PyAny>, rows: &[i64]) -> PyResult<()> {
        let mut locked = self.write(names.py());
        if let Some(done) = with_plain(names, |listed| locked.state.insert_all(listed, rows)) {
            return done;
        }
        drop(locked);
        self.insert_all(names.py(), &to_names::<Utf8Name>(names)?, rows)
    }

    /// The same for names of any kind.
    pub(crate) fn insert_all<Q: Text>(&self, py: Python<'_>, names: &[Q], rows: &[i64]) -> PyResult<()> {
        self.write(py).state.insert_all(names, rows)
    }

    /// The row of a name, if it is there.
    #[inline]
    fn find(&self, name: &Bound<'_, PyString>) -> PyResult<Option<i64>> {
        with_text(name, |text| self.read(name.py()).names.get(text).map(row_of))
    }

    /// Gives a name a row: a new one goes to the end, one that is there keeps its place.
    fn set(&self, name: &Bound<'_, PyString>, row: i64) -> PyResult<()> {
        let row = checked_row(row)?;
        let mut locked = self.write(name.py());
        with_text(name, |text| locked.state.names.set(text, |_| place_of(row)))?.or_raise()?;
        locked.state.next_row = locked.state.next_row.max(row.saturating_add(1));
        Ok(())
    }

    fn remove(&self, name: &Bound<'_, PyString>) -> PyResult<Option<i64>> {
        with_text(name, |text| self.write(name.py()).state.names.remove(text).map(row_of))
    }

    /// The rows of what lies in a list or tuple, -1 for what is missing; `None` unless all are plain `str`.
    fn rows_of_listed(&self, names: &Bound<'_, PyAny>) -> PyResult<Option<Vec<i64>>> {
        let state = self.read(names.py());
        let find = |listed: &[Listed<'_, '_>]| {
            let mut rows = memory::with_capacity(listed.len())?;
            let mut are_all_there = true;
            state.names.get_many(listed, |place| {
                are_all_there &= place.is_some();
                rows.push(place.map_or(-1, row_of));
            });
            // What is no plain `str` was taken for no name.
            let are_texts = are_all_there || listed.iter().all(Listed::is_plain);
            Ok(are_texts.then_some(rows))
        };
        with_listed(names, find).unwrap_or(Ok(None))
    }
}

pub(crate) fn missing(name: Bound<'_, PyString>) -> PyErr {
    PyKeyError::new_err(name.unbind())
}

/// The place whose id is a row that is not negative.
fn place_of(row: i64) -> Place {
    Place::of_id(row.cast_unsigned()).expect("a row that is not negative is the id of a place")
}

/// Hands over what lies in a list or tuple, if it is nothing but plain `str`.
fn with_plain<R>(names: &Bound<'_, PyAny>, take: impl FnOnce(&[Listed<'_, '_>]) -> R) -> Option<R> {
    with_listed(names, |listed| prefetched(listed).all(Listed::is_plain).then(|| take(listed))).flatten()
}

fn row_of(place: Place) -> i64 {
    place.id().cast_signed()
}

fn check_rows_left(next_row: i64, wanted: usize) -> PyResult<()> {
    match i64::try_from(wanted).ok().and_then(|wanted| next_row.checked_add(wanted)) {
        Some(_) => Ok(()),
        None => Err(PyOverflowError::new_err(format!("no {wanted} rows are left behind row {next_row}"))),
    }
}

pub(crate) fn checked_row(row: i64) -> PyResult<i64> {
    if row < 0 {
        return Err(PyValueError::new_err(format!("a row must be 0 or more, got {row}")));
    }
    Ok(row)
}

/// A table of a list of distinct names, each with the next row; `None` if something else is in the list.
fn number_distinct(names: &Bound<'_, PyAny>) -> Option<NameTable> {
    // What is no `str` has a name there that no `str` has.
    let made = with_listed(names, |listed| NameTable::of_distinct(prefetched(listed).zip((0..).map(place_of))));
    made?.ok()?.ok().filter(|names| !names.contains(&NO_NAME[..]))
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
fn add_entries(entries: &Bound<'_, PyAny>, (names, rows): &mut Entries) -> PyResult<()> {
    let mut add = |name: &Bound<'_, PyAny>, row: &Bound<'_, PyAny>| {
        memory::push(names, Utf8Name::of_text(to_text(name)?)?)?;
        memory::push(rows, row.extract()?)
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

pub(crate) fn view<'py>(py: Python<'py>, class: &str, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
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
            None => match number_distinct(names) {
                Some(names) => *index.write(py).state = Self::of(names).into_state(),
                None => index.append(names, |_| ())?,
            },
            Some(rows) => {
                let (given, rows) = (names.len()?, rows.as_array());
                if rows.len() != given {
                    return Err(PyValueError::new_err(format!("got {given} names and {} rows", rows.len())));
                }
                index.insert_listed(names, &memory::collect(rows.iter().copied())?)?;
            }
        }
        Ok(made)
    }

    /// Make an IndexMap of many names with the same row. **O(n)**.
    #[classmethod]
    #[pyo3(signature = (names, row=0, /))]
    fn fromkeys<'py>(class: &Bound<'py, PyType>, names: &Bound<'py, PyAny>, row: i64) -> PyResult<Bound<'py, Self>> {
        let made = Self::of_class(class)?;
        let names = &listed(names)?;
        made.get().insert_listed(names, &memory::collect(std::iter::repeat_n(row, names.len()?))?)?;
        Ok(made)
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.len(py)
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        if let Ok(text) = name.cast_exact::<PyString>() {
            return Ok(self.find(text)?.is_some());
        }
        match exact_text(name)? {
            Some(text) => Ok(self.find(&text)?.is_some()),
            // As in a dict: what cannot be hashed is an error, what can is simply not there.
            None => name.hash().map(|_| false),
        }
    }

    fn __getitem__<'py>(slf: &Bound<'py, Self>, name: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let name = to_text(name)?;
        if let Some(row) = slf.get().find(&name)? {
            return Ok(new_number(py, row)?.into_any());
        }
        Self::not_found(slf, name)
    }

    fn __setitem__(&self, name: &Bound<'_, PyAny>, row: &Bound<'_, PyAny>) -> PyResult<()> {
        self.set(&to_text(name)?, row.extract()?)
    }

    fn __delitem__(&self, name: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = to_text(name)?;
        if self.remove(&name)?.is_some() { Ok(()) } else { Err(missing(name)) }
    }

    fn __iter__(slf: Bound<'_, Self>) -> NameIterator {
        NameIterator::new(&slf, false, Yield::Name)
    }

    fn __reversed__(slf: Bound<'_, Self>) -> NameIterator {
        NameIterator::new(&slf, true, Yield::Name)
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
        view(slf.py(), "KeysView", slf.as_any())
    }

    /// Return a view of the row numbers in the order of the names. **O(1)**.
    fn values(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf.py(), "ValuesView", slf.as_any())
    }

    /// Return a view of the pairs of name and row number, in order. **O(1)**.
    fn items(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        view(slf.py(), "ItemsView", slf.as_any())
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
        Ok(match self.find(&name)? {
            Some(row) => Some(new_number(py, row)?.into_any()),
            None => default,
        })
    }

    /// Return the row number of ``name``. If the name is missing, first set it to ``default``. **O(1)**.
    #[pyo3(signature = (name, default=None))]
    fn setdefault(&self, py: Python<'_>, name: &Bound<'_, PyAny>, default: Option<&Bound<'_, PyAny>>) -> PyResult<i64> {
        let name = to_text(name)?;
        if let Some(row) = self.find(&name)? {
            return Ok(row);
        }
        let Some(default) = default else {
            return Err(PyTypeError::new_err("a row must be an int, got None"));
        };
        let mut row = checked_row(default.extract()?)?;
        let mut locked = self.write(py);
        let State { names, next_row } = &mut *locked.state;
        // Another thread may have set it meanwhile.
        let choose = |old: Option<Place>| {
            row = old.map_or(row, row_of);
            place_of(row)
        };
        with_text(&name, |text| names.set(text, choose))?.or_raise()?;
        *next_row = (*next_row).max(row.saturating_add(1));
        Ok(row)
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
        if let Some(row) = self.find(&name)? {
            // What is given is made first: where there is no memory for it, the name stays.
            let given = new_number(py, row)?.into_any();
            match self.remove(&name)? {
                Some(removed) if removed == row => return Ok(given),
                // Another thread has set it meanwhile.
                Some(removed) => return Ok(new_number(py, removed)?.into_any()),
                None => {}
            }
        }
        if default.is_empty() { Err(missing(name)) } else { default.get_item(0) }
    }

    /// Remove the last (or the first) name and return it with its row number. **O(1)** at both ends.
    ///
    /// Raises KeyError if the map is empty.
    #[pyo3(signature = (last=true))]
    fn popitem<'py>(&self, py: Python<'py>, last: bool) -> PyResult<Bound<'py, PyTuple>> {
        loop {
            // What is given is made first: where there is no memory for it, the name stays.
            let (generation, place, name) = {
                let names = &self.read(py).names;
                let end = if last { names.last() } else { names.first() };
                let end = end.ok_or_else(|| PyKeyError::new_err("popitem(): dictionary is empty"))?;
                (names.generation(), end.place, text_of_utf8(py, end.name)?)
            };
            let pair = new_pair(py, name, new_number(py, row_of(place))?)?;
            let names = &mut self.write(py).state.names;
            let end = if last { names.last() } else { names.first() };
            if names.generation() == generation && end.is_some_and(|end| end.place == place) {
                names.remove_end(last);
                return Ok(pair);
            }
        }
    }

    /// Move ``name`` to the end (or to the beginning). **O(1)**. Raises KeyError if it is missing.
    #[pyo3(signature = (name, last=true))]
    fn move_to_end(&self, name: &Bound<'_, PyAny>, last: bool) -> PyResult<()> {
        let name = to_text(name)?;
        let is_there = with_text(&name, |text| self.write(name.py()).state.names.move_to_end(text, last))?;
        if is_there.or_raise()? { Ok(()) } else { Err(missing(name)) }
    }

    /// Remove all names, and count rows from 0 again. **O(n)**.
    fn clear(&self, py: Python<'_>) {
        let mut locked = self.write(py);
        locked.state.names.clear();
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
        if let (Some(entries), None) = (entries, rows)
            && let Ok(dict) = entries.cast_exact::<PyDict>()
        {
            let items = memory::items_of(dict)?;
            let names = items.iter().map_while(|(name, _)| Ascii::of(name));
            let names: Vec<Ascii<'_>> = memory::collect(names)?;
            if names.len() == items.len() {
                let rows: Vec<i64> = memory::try_collect(items.iter().map(|(_, row)| row.extract()))?;
                return self.insert_all(py, &names, &rows);
            }
        }
        let (mut given, mut source) = (Entries::default(), None);
        match entries {
            None => {}
            // Of a subclass, what it answers may not be what is in the map.
            Some(entries) => match entries.cast_exact::<IndexMap>() {
                Ok(index) => source = Some(index.get().names(py)?),
                Err(_) => add_entries(entries, &mut given)?,
            },
        }
        if let Some(rows) = rows {
            add_entries(rows, &mut given)?;
        }
        let (names, rows) = given;
        let Some(source) = source else {
            return self.insert_all(py, &names, &rows);
        };
        let texts = memory::try_collect(names.iter().map(Utf8Name::to_bytes))?;
        let all = || source.iter().map(|(name, place)| (name, row_of(place)));
        let names: Vec<&[u8]> = memory::collect(all().map(|(name, _)| name).chain(texts.iter().map(Vec::as_slice)))?;
        let rows: Vec<i64> = memory::collect(all().map(|(_, row)| row).chain(rows))?;
        self.insert_all(py, &names, &rows)
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
        let names = &listed(names)?;
        let mut rows = memory::with_capacity(names.len()?)?;
        self.append(names, |row| rows.push(row))?;
        Ok(PyArray1::from_vec(names.py(), rows))
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
            let rows = memory::collect(self.read(py).names.iter().map(|(_, place)| row_of(place)))?;
            return Ok(PyArray1::from_vec(py, rows));
        };
        let names = &listed(&names)?;
        if let Some(mut rows) = self.rows_of_listed(names)?
            && (default.is_some() || rows.iter().all(|row| *row >= 0))
        {
            rows.iter_mut().filter(|row| **row < 0).for_each(|row| *row = default.unwrap_or(-1));
            return Ok(PyArray1::from_vec(py, rows));
        }
        let names = to_names::<Utf8Name>(names)?;
        let mut rows = memory::with_capacity(names.len())?;
        let (mut first, mut at, mut count) = (Vec::with_capacity(LISTED), 0, 0);
        self.read(py).names.get_many(&names, |place| {
            if let Some(row) = place.map(row_of).or(default) {
                rows.push(row);
            } else {
                count += 1;
                if count <= LISTED {
                    first.push(at);
                }
            }
            at += 1;
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
            let names = &self.read(py).names;
            if names.len() != mask.len() {
                return Err(PyRuntimeError::new_err("dictionary changed while names were selected"));
            }
            let chosen = names.iter().zip(mask).filter(|(_, chosen)| **chosen);
            memory::try_collect(chosen.map(|((name, _), _)| text_of_utf8(py, name)))?
        };
        new_list(py, chosen.into_iter().map(Ok))
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
        if let Ok(other) = other.cast_exact::<IndexMap>() {
            let (theirs, ours) = (other.get().names(py)?, &self.read(py).names);
            let are_equal =
                theirs.len() == ours.len() && theirs.iter().all(|(name, place)| ours.get(name) == Some(place));
            return Ok(are_equal.into_pyobject(py)?.to_owned().into_any());
        }
        let theirs = PyDict::new(py);
        theirs.update(other.cast()?)?;
        Ok(self.to_dict(py)?.eq(theirs)?.into_pyobject(py)?.to_owned().into_any())
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let py = slf.py();
        let (shown, hidden) = {
            let names = &slf.get().read(py).names;
            let hidden = names.len().saturating_sub(2 * SHOWN);
            let mut position = names.positions();
            let last = std::iter::from_fn(|| {
                let entry = names.previous(position)?;
                position = entry.position;
                Some((entry.name, entry.place))
            });
            let mut tail: Vec<_> = if hidden > 0 { last.take(SHOWN).collect() } else { Vec::new() };
            tail.reverse();
            let head = names.iter().take(if hidden > 0 { SHOWN } else { 2 * SHOWN });
            let to_shown = |(name, place)| PyResult::Ok((text_of_utf8(py, name)?, row_of(place)));
            (memory::try_collect(head.chain(tail).map(to_shown))?, hidden)
        };
        let mut lines = Vec::with_capacity(2 * SHOWN + 1);
        for (at, (name, row)) in shown.into_iter().enumerate() {
            if at == SHOWN && hidden > 0 {
                lines.push(format!("... {hidden} more ..."));
            }
            lines.push(format!("{}: {row}", name.repr()?));
        }
        Ok(format!("{}({{{}}})", slf.get_type().name()?, lines.join(", ")))
    }

    fn __sizeof__(&self, py: Python<'_>) -> usize {
        size_of::<Self>() + self.read(py).names.allocated_bytes()
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
            let mut rows = memory::with_capacity(8 * state.names.len())?;
            state.names.iter().for_each(|(_, place)| rows.extend_from_slice(&row_of(place).to_le_bytes()));
            (state.all_names(py)?, rows, state.next_row)
        };
        let names = new_list(py, names.into_iter().map(Ok))?;
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
        let names = to_names::<Utf8Name>(&state.get_item(0)?)?;
        let rows: Option<Bound<'_, PyBytes>> = state.get_item(1)?.extract()?;
        let rows = rows.as_ref().map_or(&[][..], |rows| rows.as_bytes());
        let next_row: i64 = state.get_item(2)?.extract()?;
        if rows.len() != 8 * names.len() {
            return Err(PyValueError::new_err(format!("got {} names and {} bytes of rows", names.len(), rows.len())));
        }
        let rows = rows.chunks_exact(8).map(|row| i64::from_le_bytes(row.try_into().expect("8 bytes")));
        let made = Self::empty();
        made.insert_all(py, &names, &memory::collect(rows)?)?;
        let mut made = made.into_state();
        if made.names.len() != names.len() {
            return Err(PyValueError::new_err("a name is listed twice in the state of an IndexMap"));
        }
        made.next_row = made.next_row.max(next_row);
        let mut locked = index.write(py);
        if !locked.state.names.is_empty() || locked.state.names.generation() != 0 {
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
        let function = intern!(slf.py(), "__missing__");
        let class = slf.get_type();
        if !slf.is_exact_instance_of::<Self>() && class.hasattr(function)? {
            return class.getattr(function)?.call1((slf, name));
        }
        Err(missing(name))
    }

    fn duplicate(&self, py: Python<'_>) -> PyResult<Self> {
        let state = self.read(py);
        Ok(Self::from_state(State { names: state.names.copy().or_raise()?, next_row: state.next_row }))
    }

    fn into_state(self) -> State {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (names, rows): (_, Vec<i64>) = {
            let state = self.read(py);
            (state.all_names(py)?, memory::collect(state.names.iter().map(|(_, place)| row_of(place)))?)
        };
        let dict = PyDict::new(py);
        for (name, row) in names.into_iter().zip(rows) {
            dict.set_item(name, new_number(py, row)?)?;
        }
        Ok(dict)
    }
}

impl State {
    fn append<Q: Text>(&mut self, names: &[Q], mut take: impl FnMut(i64)) -> PyResult<()> {
        check_rows_left(self.next_row, names.len())?;
        let choose = |_, old: Option<Place>| {
            let place = old.unwrap_or_else(|| {
                self.next_row += 1;
                place_of(self.next_row - 1)
            });
            take(row_of(place));
            place
        };
        self.names.set_many(names, choose).or_raise()
    }

    fn insert_all<Q: Text>(&mut self, names: &[Q], rows: &[i64]) -> PyResult<()> {
        let Some(largest) = rows.iter().max() else {
            return Ok(());
        };
        rows.iter().try_for_each(|row| checked_row(*row).map(drop))?;
        let made = if self.names.is_empty() && self.names.generation() == 0 {
            NameTable::of_distinct(prefetched(names).zip(rows.iter().map(|row| place_of(*row)))).or_raise()?.ok()
        } else {
            None
        };
        match made {
            Some(made) => self.names = made,
            None => self.names.set_many(names, |at, _| place_of(rows[at])).or_raise()?,
        }
        self.next_row = self.next_row.max(largest.saturating_add(1));
        Ok(())
    }

    fn all_names<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyString>>> {
        memory::try_collect(self.names.iter().map(|(name, _)| text_of_utf8(py, name)))
    }
}
