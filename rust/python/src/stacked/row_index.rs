//! `RowIndex`: the names of a `StackedParameterDict` and the rows of all its tables, as Python sees them.
//!
//! It lies behind a lock that is held only for pure Rust work. While it is held, no Python code runs, and no object is
//! made that Python's garbage collector tracks.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard};

use numpy::{PyArray1, PyReadonlyArray1};
use pdrs_core::names::codec::{self, Names as Saved};
use pdrs_core::names::order::{self, Sorted};
use pdrs_core::names::table::NameTable;
use pdrs_core::{Error, MAX_TABLES, Place, Places as Found, Plan, Refusal, RowIndex as Index, Rows};
use pyo3::exceptions::{PyIndexError, PyKeyError, PyOverflowError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyBytes, PyList, PyString, PyTuple, PyType};

use crate::files::names::{TableTuple, to_header};
use crate::index_map::{Given, IndexMap};
use crate::python::memory::{self, OrRaise, new_list, new_number, new_pair};
use crate::python::name::{Listed, NO_NAME, OfText, Utf8Name, exact_text, text_of_utf8, to_text, with_listed};
use crate::python::names::{listed, of_pickles, prefetched, to_names, to_names_that};
use crate::stacked::packed::Packed;
use crate::stacked::places::Places;
use crate::stacked::plan::{OrRefuse, RowPlan, missing, no_table, refused_removal};
use crate::stacked::source::Source;
use crate::stacked::walk::RowIterator;

#[pyclass(frozen, mapping, module = "pdrs._core")]
pub(crate) struct RowIndex {
    state: Mutex<State>,
}

/// Where the names are.
enum State {
    /// In memory. If they were packed once, with the generation of the names when they were read.
    Live(Index, Option<u64>),
    /// Where they were packed. The first change reads them into memory, and so does whatever else is not here.
    Packed(Packed),
}

/// The names in memory, locked.
pub(crate) struct Live<'a> {
    state: MutexGuard<'a, State>,
    /// Where they were until now. Goes when the lock is given back, because Python code may run then.
    _packed: Option<Packed>,
}

impl Deref for Live<'_> {
    type Target = Index;

    fn deref(&self) -> &Index {
        match &*self.state {
            State::Live(index, _) => index,
            State::Packed(_) => unreachable!("the names have been read into memory"),
        }
    }
}

impl DerefMut for Live<'_> {
    fn deref_mut(&mut self) -> &mut Index {
        match &mut *self.state {
            State::Live(index, _) => index,
            State::Packed(_) => unreachable!("the names have been read into memory"),
        }
    }
}

/// What a walk over names goes over.
#[derive(Clone, Copy)]
pub(crate) enum Walked<'a> {
    Live(&'a NameTable),
    Packed(&'a Packed),
}

impl Walked<'_> {
    /// The position of the name behind, or in front of, a position, where the walk goes on, and the name.
    pub(crate) fn name(
        self,
        py: Python<'_>,
        position: usize,
        is_reversed: bool,
    ) -> PyResult<Option<(usize, usize, Bound<'_, PyString>)>> {
        match self {
            Self::Live(names) => {
                let found = if is_reversed { names.previous(position) } else { names.next(position) };
                found.map(|found| Ok((found.position, found.next, text_of_utf8(py, found.name)?))).transpose()
            }
            Self::Packed(packed) => {
                let Some(found) = (if is_reversed { position.checked_sub(1) } else { Some(position) }) else {
                    return Ok(None);
                };
                let next = if is_reversed { found } else { found + 1 };
                Ok(packed.name(py, found)?.map(|name| (found, next, name)))
            }
        }
    }

    /// The place of the name at a position.
    pub(crate) fn place(self, py: Python<'_>, position: usize) -> PyResult<Place> {
        let place = match self {
            Self::Live(names) => names.place_at(position),
            Self::Packed(packed) => packed.place_at(py, position)?,
        };
        place.ok_or_else(|| PyRuntimeError::new_err("a name has lost its row during iteration"))
    }
}

/// A walk that began when the names were packed has this generation.
pub(crate) const PACKED: u64 = u64::MAX;

/// `KeyError` for the name that no entry can have.
fn refuse_empty(name: &Bound<'_, PyString>) -> PyResult<()> {
    if name.is_empty()? { Err(empty_name()) } else { Ok(()) }
}

fn empty_name() -> PyErr {
    PyKeyError::new_err("parameter name can't be empty string \"\"")
}

/// Names of entries, none of them empty.
fn to_entry_names(names: &Bound<'_, PyAny>) -> PyResult<Vec<Utf8Name>> {
    to_names_that(names, refuse_empty)
}

/// How many rows each table has given.
fn to_counts(used: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    let mut counts = Vec::new();
    for used in used.try_iter()? {
        if counts.len() == MAX_TABLES {
            return Err(memory::refused(Error::Tables { limit: MAX_TABLES }));
        }
        let used: i64 = used?.extract()?;
        let refused = || PyValueError::new_err(format!("the rows of a table must be 0 or more, got {used}"));
        memory::push(&mut counts, u64::try_from(used).map_err(|_| refused())?)?;
    }
    Ok(counts)
}

fn table_of(state: &Index, table: i64) -> PyResult<&Rows> {
    let rows = usize::try_from(table).ok().and_then(|table| state.tables().get(table));
    rows.ok_or_else(|| no_table(table))
}

fn to_array(py: Python<'_>, rows: impl Iterator<Item = u64>) -> PyResult<Bound<'_, PyArray1<i64>>> {
    Ok(PyArray1::from_vec(py, memory::collect(rows.map(u64::cast_signed))?))
}

fn too_many(count: u64) -> PyErr {
    PyOverflowError::new_err(format!("a table cannot have {count} rows more than it has"))
}

/// The bytes of numbers, little endian; `None` for none, because old protocols of pickle write no bytes as a call.
fn to_bytes(py: Python<'_>, numbers: Vec<i64>) -> PyResult<Option<Bound<'_, PyBytes>>> {
    if numbers.is_empty() {
        return Ok(None);
    }
    let fill = |bytes: &mut [u8]| {
        for (place, number) in bytes.chunks_exact_mut(8).zip(&numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        Ok(())
    };
    PyBytes::new_with(py, 8 * numbers.len(), fill).map(Some)
}

impl RowIndex {
    fn new_of(index: Index) -> Self {
        Self { state: Mutex::new(State::Live(index, None)) }
    }

    fn state(&self, py: Python<'_>) -> MutexGuard<'_, State> {
        self.state.lock_py_attached(py).unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The names in memory. **O(n)** if they were packed until now.
    pub(crate) fn lock(&self, py: Python<'_>) -> PyResult<Live<'_>> {
        let mut state = self.state(py);
        let mut packed = None;
        if let State::Packed(read) = &*state {
            let index = read.to_index(py)?;
            let generation = index.names().generation();
            if let State::Packed(read) = std::mem::replace(&mut *state, State::Live(index, Some(generation))) {
                packed = Some(read);
            }
        }
        Ok(Live { state, _packed: packed })
    }

    /// The place of a name, if it is there.
    pub(crate) fn place(&self, name: &Bound<'_, PyString>) -> PyResult<Option<Place>> {
        let (py, name) = (name.py(), Utf8Name::of_text(name.clone())?);
        match &*self.state(py) {
            State::Live(index, _) => Ok(index.names().get(&name)),
            State::Packed(packed) => packed.place(py, &name),
        }
    }

    pub(crate) fn moves(&self, py: Python<'_>) -> u64 {
        match &*self.state(py) {
            State::Live(index, _) => index.moves(),
            State::Packed(packed) => packed.moves,
        }
    }

    /// Notes that the values of entries were set, whose rows stay.
    pub(crate) fn note_set(&self, py: Python<'_>) {
        match &mut *self.state(py) {
            State::Live(index, _) => index.note_set(),
            State::Packed(packed) => packed.inserts = Index::new_count(),
        }
    }

    /// Where a walk over the names begins, and what tells whether they have changed since.
    pub(crate) fn begin(&self, py: Python<'_>, is_reversed: bool) -> (usize, u64) {
        let (end, generation) = match &*self.state(py) {
            State::Live(index, _) => (index.names().positions(), index.names().generation()),
            State::Packed(packed) => (packed.len(), PACKED),
        };
        (if is_reversed { end } else { 0 }, generation)
    }

    /// Takes a step of a walk, unless the names have changed since it began.
    pub(crate) fn step<R>(
        &self,
        py: Python<'_>,
        generation: u64,
        take: impl FnOnce(Walked<'_>) -> PyResult<R>,
    ) -> PyResult<R> {
        let state = self.state(py);
        match &*state {
            State::Live(index, read) => {
                let now = index.names().generation();
                if now == generation || (generation == PACKED && *read == Some(now)) {
                    return take(Walked::Live(index.names()));
                }
            }
            State::Packed(names) if generation == PACKED => return take(Walked::Packed(names)),
            State::Packed(_) => {}
        }
        drop(state);
        Err(PyRuntimeError::new_err("dictionary changed during iteration"))
    }

    /// Hands over each name in UTF-8, in order, and the place that it has.
    pub(crate) fn for_each_utf8(&self, py: Python<'_>, mut take: impl FnMut(&[u8], Option<Place>)) -> PyResult<()> {
        match &*self.state(py) {
            State::Live(index, _) => {
                index.names().iter().for_each(|(name, place)| take(name, Some(place)));
                Ok(())
            }
            State::Packed(packed) => packed.for_each(py, take),
        }
    }

    /// All places, in order.
    pub(crate) fn all_places(&self, py: Python<'_>) -> PyResult<Found> {
        match &*self.state(py) {
            State::Live(index, _) => index.places().or_raise(),
            State::Packed(packed) => packed.all_places(py),
        }
    }

    fn places_of(&self, py: Python<'_>, names: &[Utf8Name]) -> PyResult<Found> {
        match &*self.state(py) {
            State::Live(index, _) => {
                let mut places = memory::with_capacity(names.len())?;
                index.names().get_many(names, |place| places.push(place));
                Ok(Found::from(places))
            }
            State::Packed(packed) => packed.with(py, |saved| packed.places(saved, names))?,
        }
    }

    fn used_of_all(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        match &*self.state(py) {
            State::Live(index, _) => memory::collect(index.tables().iter().map(Rows::used)),
            State::Packed(packed) => memory::collect(packed.used().iter().copied()),
        }
    }

    fn plan(
        &self,
        py: Python<'_>,
        make: impl FnOnce(&mut Index) -> Result<Plan, Refusal>,
    ) -> PyResult<Result<RowPlan, Refusal>> {
        Ok(make(&mut *self.lock(py)?).map(RowPlan::new))
    }

    fn to_list<'py>(py: Python<'py>, names: Vec<Bound<'py, PyString>>) -> PyResult<Bound<'py, PyList>> {
        new_list(py, names.into_iter().map(Ok))
    }

    fn all_names<'py>(state: &Index, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyString>>> {
        memory::try_collect(state.names().iter().map(|(name, _)| text_of_utf8(py, name)))
    }

    fn duplicate(&self, py: Python<'_>) -> PyResult<Self> {
        Ok(Self::new_of(self.lock(py)?.copy().or_raise()?))
    }
}

#[pymethods]
impl RowIndex {
    #[new]
    fn new() -> Self {
        Self::new_of(Index::new())
    }

    #[staticmethod]
    fn of(names: &Bound<'_, PyAny>, places: &Bound<'_, Places>, used: &Bound<'_, PyAny>) -> PyResult<Self> {
        let names = &listed(names)?;
        let made = Index::of(to_entry_names(names)?.into_iter(), places.get().found(), &to_counts(used)?);
        made.or_refuse(names).map(Self::new_of)
    }

    #[staticmethod]
    fn of_one_table(names: &Bound<'_, PyAny>) -> PyResult<Self> {
        let names = &listed(names)?;
        // What is no `str` has a name there that no `str` has.
        if let Some(Ok(made)) = with_listed(names, |listed| Index::of_one_table(prefetched(listed)))
            && !made.names().contains("")
            && !made.names().contains(&NO_NAME[..])
        {
            return Ok(Self::new_of(made));
        }
        Index::of_one_table(to_entry_names(names)?.into_iter()).or_refuse(names).map(Self::new_of)
    }

    #[staticmethod]
    fn of_ids(index: &Bound<'_, IndexMap>, used: &Bound<'_, PyAny>) -> PyResult<Self> {
        let made = Index::of_names(index.get().names(index.py())?, &to_counts(used)?);
        let made = made.or_refuse(index.as_any())?;
        if made.names().contains("") {
            return Err(empty_name());
        }
        Ok(Self::new_of(made))
    }

    /// Names that were packed, in memory.
    #[staticmethod]
    fn of_bytes(py: Python<'_>, packed: PyReadonlyArray1<'_, u8>) -> PyResult<Self> {
        let packed = packed.as_slice()?;
        let made = py.detach(|| {
            let (header, names) = codec::decode(packed)?;
            let used: Vec<u64> = pdrs_core::memory::collect(header.tables.iter().map(|table| table.used))?;
            let entries = names.iter().map_while(|(name, id)| Some((name, Place::of_id(id)?)));
            let Ok(table) = NameTable::of_distinct(entries)? else { return Ok(None) };
            let is_whole = table.len() == names.len();
            Ok(Some(if is_whole { Index::of_names(table, &used) } else { Err(Refusal::Place { at: table.len() }) }))
        });
        let Some(made) = made.or_raise()? else { return Err(PyValueError::new_err("a name is listed twice")) };
        let made = made.map_err(|refusal| match refusal {
            Refusal::Limit(error) => memory::refused(error),
            _ => PyValueError::new_err("the places of the names are not those of rows in use, each of one name"),
        })?;
        Ok(Self::new_of(made))
    }

    /// The names in the order of their buckets, packed.
    #[allow(clippy::type_complexity)]
    fn sorted_by_bucket<'py>(
        &self,
        py: Python<'py>,
        tables: Vec<TableTuple<'py>>,
        patterns: Vec<Bound<'py, PyString>>,
        buckets: u32,
    ) -> PyResult<(Bound<'py, PyArray1<u8>>, Bound<'py, PyArray1<u64>>, Vec<Bound<'py, PyArray1<i64>>>)> {
        let sorted = order::sorted_by_bucket(self.lock(py)?.names(), &to_header(tables, &patterns), buckets);
        let Sorted { packed, counts, rows } = sorted.or_raise()?;
        let rows = memory::collect(rows.into_iter().map(|rows| PyArray1::from_vec(py, rows)))?;
        Ok((PyArray1::from_vec(py, packed), PyArray1::from_vec(py, counts), rows))
    }

    /// Names that are looked up where they were packed; `None` if they have no words.
    #[staticmethod]
    fn of_packed(
        packed: &Bound<'_, PyArray1<u8>>,
        error: &Bound<'_, PyType>,
        path: String,
        origin: String,
    ) -> PyResult<Option<Self>> {
        let source = Source::of(packed, error, path, origin)?;
        source.map(|source| Ok(Self { state: Mutex::new(State::Packed(Packed::of(source)?)) })).transpose()
    }

    /// Names of several places that are looked up there; `None` if that cannot be.
    #[staticmethod]
    fn joined(
        dictionaries: Vec<(Bound<'_, Self>, Bound<'_, PyString>, usize, usize)>,
        singles: Option<Bound<'_, Self>>,
        py: Python<'_>,
    ) -> PyResult<Option<Self>> {
        let source = |index: &Bound<'_, Self>, prefix: Vec<u8>, first_table| match &*index.get().state(py) {
            State::Packed(packed) => packed.only().map(|one| one.shown(py, prefix, first_table)).transpose(),
            State::Live(..) => Ok(None),
        };
        let (mut sources, mut before) = (Vec::new(), Vec::new());
        for (index, prefix, first_table, singles_before) in dictionaries {
            let prefix = Utf8Name::of_text(to_text(&prefix)?)?.to_bytes()?;
            let Some(made) = source(&index, prefix, first_table)? else { return Ok(None) };
            memory::push(&mut sources, made)?;
            memory::push(&mut before, singles_before)?;
        }
        let others = singles.as_ref().map_or(Ok(None), |index| source(index, Vec::new(), 0))?;
        if others.is_none() && singles.is_some() {
            return Ok(None);
        }
        let made = Packed::joined(py, sources, &before, others)?;
        Ok(made.map(|packed| Self { state: Mutex::new(State::Packed(packed)) }))
    }

    #[getter(moves)]
    fn count_of_moves(&self, py: Python<'_>) -> u64 {
        self.moves(py)
    }

    #[getter]
    fn inserts(&self, py: Python<'_>) -> u64 {
        match &*self.state(py) {
            State::Live(index, _) => index.inserts(),
            State::Packed(packed) => packed.inserts,
        }
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        match &*self.state(py) {
            State::Live(index, _) => index.names().len(),
            State::Packed(packed) => packed.len(),
        }
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        if let Ok(text) = name.cast_exact::<PyString>() {
            return Ok(self.place(text)?.is_some());
        }
        match exact_text(name)? {
            Some(text) => Ok(self.place(&text)?.is_some()),
            // As in a dict: what cannot be hashed is an error, what can is simply not there.
            None => name.hash().map(|_| false),
        }
    }

    fn __iter__(slf: &Bound<'_, Self>) -> RowIterator {
        RowIterator::new(slf, false, false)
    }

    fn __reversed__(slf: &Bound<'_, Self>) -> RowIterator {
        RowIterator::new(slf, true, false)
    }

    #[pyo3(signature = (*, reverse = false))]
    fn entries(slf: &Bound<'_, Self>, reverse: bool) -> RowIterator {
        RowIterator::new(slf, reverse, true)
    }

    fn find<'py>(&self, name: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let py = name.py();
        let Some(place) = self.place(&to_text(name)?)? else {
            return Ok(None);
        };
        let table = new_number(py, (place.table() as u64).cast_signed())?;
        new_pair(py, table, new_number(py, place.row().cast_signed())?).map(Some)
    }

    #[pyo3(signature = (names = Given(None)), text_signature = "($self, names=...)")]
    fn places(&self, py: Python<'_>, names: Given<'_>) -> PyResult<Places> {
        let Given(Some(names)) = names else {
            return Ok(self.all_places(py)?.into());
        };
        let names = &listed(&names)?;
        let found = match &*self.state(py) {
            State::Live(index, _) => with_listed(names, |listed| {
                let mut places = memory::with_capacity(listed.len())?;
                let mut are_all_there = true;
                index.names().get_many(listed, |place| {
                    are_all_there &= place.is_some();
                    places.push(place);
                });
                // What is no plain `str` was taken for no name.
                let are_texts = are_all_there || listed.iter().all(Listed::is_plain);
                PyResult::Ok(are_texts.then(|| Found::from(places)))
            })
            .transpose()?
            .flatten(),
            State::Packed(packed) => {
                let listed = |saved: &[Saved<'_>]| {
                    with_listed(names, |listed| {
                        let are_texts = listed.iter().all(Listed::is_plain);
                        if are_texts { packed.places(saved, listed).map(Some) } else { Ok(None) }
                    })
                };
                packed.with(py, listed)?.transpose()?.flatten()
            }
        };
        if let Some(places) = found {
            return Ok(places.into());
        }
        Ok(self.places_of(py, &to_names(names)?)?.into())
    }

    fn names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let names = match &*self.state(py) {
            State::Live(index, _) => Self::all_names(index, py)?,
            State::Packed(packed) => packed.names(py)?,
        };
        Self::to_list(py, names)
    }

    fn missing<'py>(&self, names: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let py = names.py();
        let names = to_names::<Utf8Name>(names)?;
        let places = self.places_of(py, &names)?;
        let (mut seen, mut missing) = (NameTable::default(), Vec::new());
        let listed = names.iter().zip(places.iter()).filter(|(_, place)| place.is_none());
        for ((name, _), number) in listed.zip((0..).map_while(Place::of_id)) {
            if seen.insert_new(name, number).or_raise()? {
                memory::push(&mut missing, name.text(py))?;
            }
        }
        new_list(py, missing.into_iter().map(Ok))
    }

    fn select<'py>(&self, py: Python<'py>, mask: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        static AS_MASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let mask = AS_MASK.import(py, "pdrs._torch.names", "as_mask")?.call1((mask, self.__len__(py)))?;
        let mask = mask.extract::<PyReadonlyArray1<'_, bool>>()?;
        let mask = mask.as_array();
        let chosen = {
            let state = self.lock(py)?;
            if state.names().len() != mask.len() {
                return Err(PyRuntimeError::new_err("dictionary changed while names were selected"));
            }
            let chosen = state.names().iter().zip(mask).filter(|(_, chosen)| **chosen);
            memory::try_collect(chosen.map(|((name, _), _)| text_of_utf8(py, name)))?
        };
        Self::to_list(py, chosen)
    }

    fn with_prefix<'py>(&self, prefix: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let py = prefix.py();
        let prefix = Utf8Name::of_text(to_text(prefix)?)?.to_bytes()?;
        let kept = match &*self.state(py) {
            State::Live(index, _) => {
                let kept = index.names().iter().filter(|(name, _)| name.starts_with(&prefix));
                memory::try_collect(kept.map(|(name, _)| text_of_utf8(py, name)))?
            }
            State::Packed(packed) => packed.names_that(py, |text| text.starts_with(&prefix))?,
        };
        Self::to_list(py, kept)
    }

    /// An index of the names that begin so and go on, without their beginning. The tables are the same.
    fn below(&self, prefix: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = prefix.py();
        let prefix_text = to_text(prefix)?;
        let (mut text, mut parts, mut places, mut failed) = (Vec::new(), Vec::new(), Vec::new(), None);
        let prefix = Utf8Name::of_text(prefix_text.clone())?.to_bytes()?;
        self.for_each_utf8(py, |name, place| {
            if let Some(rest) = name.strip_prefix(&*prefix).filter(|rest| !rest.is_empty())
                && failed.is_none()
            {
                let kept = pdrs_core::memory::append(&mut text, rest)
                    .and_then(|()| pdrs_core::memory::push(&mut parts, text.len() - rest.len()..text.len()))
                    .and_then(|()| pdrs_core::memory::push(&mut places, place));
                failed = kept.err();
            }
        })?;
        let used = self.used_of_all(py)?;
        if let Some(error) = failed {
            return Err(memory::refused(error));
        }
        let made = Index::of(parts.iter().map(|part| &text[part.clone()]), &places.into(), &used);
        if let Err(Refusal::Repeated { at }) = &made {
            let name = String::from_utf8_lossy(&text[parts[*at].clone()]);
            return Err(PyValueError::new_err(format!("{name:?} is listed twice")));
        }
        made.or_refuse(prefix_text.as_any()).map(Self::new_of)
    }

    fn names_of<'py>(
        &self,
        py: Python<'py>,
        table: i64,
        rows: PyReadonlyArray1<'py, i64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let rows = rows.as_array();
        let named = {
            let state = self.lock(py)?;
            match state.names_of(table, rows.iter().map(|row| row.cast_unsigned())) {
                Ok(named) => {
                    let to_name = |name: Option<&[u8]>| name.map(|name| text_of_utf8(py, name)).transpose();
                    memory::try_collect(named.into_iter().map(to_name))?
                }
                Err(Refusal::Place { at }) => {
                    let used = table_of(&state, table)?.used();
                    return Err(PyIndexError::new_err(format!("table {table} has {used} rows, got row {}", rows[at])));
                }
                Err(refusal) => {
                    drop(state);
                    return Err(refusal).or_refuse(py.None().bind(py));
                }
            }
        };
        let to_object = |name: Option<Bound<'py, PyString>>| match name {
            Some(name) => name.into_any(),
            None => py.None().into_bound(py),
        };
        new_list(py, named.into_iter().map(|name| Ok(to_object(name))))
    }

    fn copy(&self, py: Python<'_>) -> PyResult<Self> {
        self.duplicate(py)
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<Self> {
        self.duplicate(py)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.duplicate(py)
    }

    fn __sizeof__(&self, py: Python<'_>) -> usize {
        let allocated = match &*self.state(py) {
            State::Live(index, _) => index.names().allocated_bytes(),
            State::Packed(_) => 0,
        };
        size_of::<Self>() + allocated
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let (names, places, used) = {
            let state = self.lock(py)?;
            let used: Vec<u64> = memory::collect(state.tables().iter().map(Rows::used))?;
            (Self::all_names(&state, py)?, state.places().or_raise()?, used)
        };
        let make = of_pickles(py, "row_index")?;
        let tables = to_bytes(py, places.tables().or_raise()?)?;
        let rows = to_bytes(py, places.rows().or_raise()?)?;
        let used = new_list(py, used.into_iter().map(|used| new_number(py, used.cast_signed())))?;
        let arguments = (Self::to_list(py, names)?, tables, rows, memory::to_tuple(&used)?);
        (make, arguments).into_pyobject(py)
    }

    fn add_table(&self, py: Python<'_>) -> PyResult<usize> {
        self.lock(py)?.add_table().or_raise()
    }

    fn pop_table(&self, py: Python<'_>) -> PyResult<()> {
        let mut state = self.lock(py)?;
        if state.pop_table().is_some() {
            return Ok(());
        }
        let what = if state.tables().is_empty() { "there is no table" } else { "the last table has names" };
        Err(PyValueError::new_err(what))
    }

    #[getter]
    fn table_count(&self, py: Python<'_>) -> usize {
        match &*self.state(py) {
            State::Live(index, _) => index.tables().len(),
            State::Packed(packed) => packed.used().len(),
        }
    }

    fn used(&self, py: Python<'_>, table: i64) -> PyResult<u64> {
        match &*self.state(py) {
            State::Live(index, _) => Ok(table_of(index, table)?.used()),
            State::Packed(packed) => {
                let used = usize::try_from(table).ok().and_then(|table| packed.used().get(table));
                used.copied().ok_or_else(|| no_table(table))
            }
        }
    }

    /// **O(1)**, or **O(n)** if the names are packed and there are several tables.
    fn count(&self, py: Python<'_>, table: i64) -> PyResult<u64> {
        match &*self.state(py) {
            State::Live(index, _) => Ok(table_of(index, table)?.len()),
            State::Packed(packed) => packed.count(py, table),
        }
    }

    fn free<'py>(&self, py: Python<'py>, table: i64) -> PyResult<Bound<'py, PyArray1<i64>>> {
        to_array(py, table_of(&*self.lock(py)?, table)?.free())
    }

    fn next<'py>(&self, py: Python<'py>, table: i64, count: u64) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let state = self.lock(py)?;
        let rows = table_of(&state, table)?;
        if rows.used().checked_add(count).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(too_many(count));
        }
        to_array(py, rows.next(count))
    }

    fn reused(&self, py: Python<'_>, table: i64, count: u64) -> PyResult<u64> {
        Ok(table_of(&*self.lock(py)?, table)?.reused(count))
    }

    fn is_taken<'py>(
        &self,
        py: Python<'py>,
        table: i64,
        rows: PyReadonlyArray1<'py, i64>,
    ) -> PyResult<Bound<'py, PyArray1<bool>>> {
        let state = self.lock(py)?;
        let ours = table_of(&state, table)?;
        let is_taken =
            |row: &i64| (0..ours.used()).contains(&row.cast_unsigned()) && !ours.is_free(row.cast_unsigned());
        let taken = memory::collect(rows.as_array().iter().map(is_taken))?;
        drop(state);
        Ok(PyArray1::from_vec(py, taken))
    }

    fn capacity_for(&self, py: Python<'_>, table: i64, count: u64, capacity: u64) -> PyResult<u64> {
        table_of(&*self.lock(py)?, table)?.capacity_for(count, capacity).ok_or_else(|| too_many(count))
    }

    fn plan_insert(&self, names: &Bound<'_, PyAny>, tables: PyReadonlyArray1<'_, i64>) -> PyResult<RowPlan> {
        let (py, listed) = (names.py(), &listed(names)?);
        let names = to_entry_names(listed)?;
        let apart =
            if tables.as_slice().is_ok() { Vec::new() } else { memory::collect(tables.as_array().iter().copied())? };
        let tables = tables.as_slice().unwrap_or(&apart);
        self.plan(py, |state| state.plan_insert(names, tables))?.or_refuse(listed)
    }

    fn plan_remove(&self, names: &Bound<'_, PyAny>) -> PyResult<RowPlan> {
        let (py, listed) = (names.py(), &listed(names)?);
        let names = to_names::<Utf8Name>(listed)?;
        self.plan(py, |state| state.plan_remove(&names))?.map_err(|refusal| refused_removal(listed, refusal))
    }

    fn plan_clear(&self, py: Python<'_>) -> PyResult<RowPlan> {
        self.plan(py, |state| Ok(state.plan_clear()?))?.or_refuse(py.None().bind(py))
    }

    fn plan_places(&self, places: &Bound<'_, Places>, used: &Bound<'_, PyAny>) -> PyResult<RowPlan> {
        let (py, places, used) = (places.py(), places.get().found().clone(), to_counts(used)?);
        self.plan(py, |state| state.plan_places(places, &used))?.or_refuse(py.None().bind(py))
    }

    fn plan_rename(&self, old: &Bound<'_, PyAny>, new: &Bound<'_, PyAny>) -> PyResult<RowPlan> {
        let (py, old, new) = (old.py(), to_text(old)?, to_text(new)?);
        refuse_empty(&new)?;
        let names = (Utf8Name::of_text(old.clone())?, Utf8Name::of_text(new.clone())?);
        match self.plan(py, |state| state.plan_rename(&names.0, &names.1))? {
            Err(Refusal::Missing { .. }) => Err(missing(&old)),
            planned => planned.or_refuse(&new),
        }
    }

    fn plan_move_to_end(&self, name: &Bound<'_, PyAny>, last: bool) -> PyResult<RowPlan> {
        let (py, name) = (name.py(), to_text(name)?);
        let moved = Utf8Name::of_text(name.clone())?;
        match self.plan(py, |state| state.plan_move_to_end(&moved, last))? {
            Err(Refusal::Missing { .. }) => Err(missing(&name)),
            planned => planned.or_refuse(&name),
        }
    }

    fn commit(&self, plan: &Bound<'_, RowPlan>) -> PyResult<()> {
        let py = plan.py();
        let mut plan = plan.get().lock(py);
        if self.lock(py)?.commit(&mut plan) {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(
            "the index has changed since this was planned, or it was planned for another index",
        ))
    }
}
