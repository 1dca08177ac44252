//! The names of an archive as they lie in its file: looked up there, and read into memory when they change.

use std::ptr;

use numpy::{PyArray1, PyArrayMethods};
use pdrs_core::names::codec::{self, Names, Parts, hash};
use pdrs_core::names::text::Text;
use pdrs_core::{MAX_TABLES, Place, Places as Found, Refusal, RowIndex as Index};
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::python::memory::{self, OrRaise};
use crate::python::name::Exact;
use crate::torch::bytes::hint;

/// How many names are looked up together.
const BATCH: usize = 64;

/// Packed names with words, in memory that somebody else owns: most likely a map of a file.
pub(crate) struct Packed {
    bytes: Py<PyArray1<u8>>,
    parts: Parts,
    /// How many rows of each table were ever given.
    used: Vec<u64>,
    pub(crate) moves: u64,
    pub(crate) inserts: u64,
    /// What is raised if they turn out to be damaged: a class that takes a path and a text, and how the text begins.
    error: Py<PyType>,
    path: String,
    origin: String,
}

impl Packed {
    /// Names that have words; `None` if they have not. Only the header is read.
    pub(crate) fn of(
        bytes: &Bound<'_, PyArray1<u8>>,
        error: &Bound<'_, PyType>,
        path: String,
        origin: String,
    ) -> PyResult<Option<Self>> {
        let held = bytes.try_readonly()?;
        let (header, parts) = Parts::of(held.as_slice()?).or_raise()?;
        let used: Vec<u64> = memory::collect(header.tables.iter().map(|table| table.used))?;
        if !parts.is_searchable() || used.len() > MAX_TABLES {
            return Ok(None);
        }
        Ok(Some(Self {
            bytes: bytes.clone().unbind(),
            parts,
            used,
            moves: Index::new_count(),
            inserts: Index::new_count(),
            error: error.clone().unbind(),
            path,
            origin,
        }))
    }

    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    pub(crate) fn used(&self) -> &[u64] {
        &self.used
    }

    /// Hands over the names. It asks `NumPy` for the bytes, which may run Python code the first time.
    pub(crate) fn with<R>(&self, py: Python<'_>, take: impl FnOnce(&Names<'_>) -> R) -> PyResult<R> {
        let held = self.bytes.bind(py).try_readonly()?;
        let names = self.parts.names(held.as_slice()?).or_raise()?;
        Ok(take(&names))
    }

    /// The place of a name that the bytes say; `None` for one that cannot be.
    fn place_at(&self, names: &Names<'_>, number: usize) -> Option<Place> {
        let place = Place::of_id(names.id(number)?)?;
        self.used.get(place.table()).filter(|used| place.row() < **used).map(|_| place)
    }

    /// The place of a name, if it is there. **O(1)**.
    pub(crate) fn place(&self, py: Python<'_>, name: &impl Text) -> PyResult<Option<Place>> {
        self.with(py, |names| {
            name.with_utf8(|text| {
                names.find(hash(text), |other| other == text).and_then(|number| self.place_at(names, number))
            })
        })
    }

    /// The place of each of many names. **O(m)**.
    ///
    /// All that a name needs is loaded a batch ahead: the cache misses of a batch overlap.
    /// Runs no Python code.
    pub(crate) fn places<Q: Text>(&self, names: &Names<'_>, wanted: &[Q]) -> PyResult<Found> {
        let load = |place: Option<&u8>| place.into_iter().for_each(|place| hint(ptr::from_ref(place) as usize));
        let mut places = memory::with_capacity(wanted.len())?;
        let (mut hashes, mut numbers) = ([0; BATCH], [None; BATCH]);
        let mut batches = wanted.chunks(BATCH).peekable();
        while let Some(batch) = batches.next() {
            for (place, name) in hashes.iter_mut().zip(batch) {
                *place = name.with_utf8(hash);
                load(names.home(*place));
            }
            batches.peek().into_iter().copied().flatten().for_each(Q::prefetch);
            for (number, hash) in numbers.iter_mut().zip(&hashes[..batch.len()]) {
                *number = names.candidate(*hash);
                number.map(|number| names.entry(number)).into_iter().flatten().for_each(load);
            }
            for number in &numbers[..batch.len()] {
                load(number.and_then(|number| names.name(number)?.first()));
            }
            for ((name, hash), number) in batch.iter().zip(&hashes).zip(&numbers) {
                let number = name.with_utf8(|text| match number {
                    Some(number) if names.name(*number) == Some(text) => Some(*number),
                    Some(_) => names.find(*hash, |other| other == text),
                    None => None,
                });
                places.push(number.and_then(|number| self.place_at(names, number)));
            }
        }
        Ok(places.into())
    }

    /// All places, in order. **O(n)**.
    pub(crate) fn all_places(&self, py: Python<'_>) -> PyResult<Found> {
        let places = self.with(py, |names| memory::collect((0..names.len()).map(|at| self.place_at(names, at))))??;
        Ok(places.into())
    }

    /// Hands over each name in UTF-8, in order, with its place. **O(n)**.
    pub(crate) fn for_each(&self, py: Python<'_>, mut take: impl FnMut(&[u8], Option<Place>)) -> PyResult<()> {
        self.with(py, |names| {
            (0..names.len()).map_while(|at| Some((names.name(at)?, self.place_at(names, at)))).for_each(
                |(name, place)| {
                    take(name, place);
                },
            );
        })
    }

    /// A name; `None` behind the last one.
    pub(crate) fn name(&self, py: Python<'_>, number: usize) -> PyResult<Option<Exact>> {
        if number >= self.len() {
            return Ok(None);
        }
        let found = self.with(py, |names| {
            let name = names.name(number).filter(|name| !name.is_empty() && self.place_at(names, number).is_some())?;
            Some(Exact::from_utf8(py, name))
        })?;
        match found {
            Some(name) => name.map(Some).map_err(|error| self.unreadable(py, error)),
            None => Err(self.damaged(format!("name {number} does not lie in them"))),
        }
    }

    /// The place of the name with a number, if there is one.
    pub(crate) fn place_of_number(&self, py: Python<'_>, number: usize) -> PyResult<Option<Place>> {
        self.with(py, |names| self.place_at(names, number))
    }

    /// All names, in order. **O(n)**.
    pub(crate) fn names(&self, py: Python<'_>) -> PyResult<Vec<Exact>> {
        let mut made = memory::with_capacity(self.len())?;
        let mut failed = None;
        self.for_each(py, |name, _| match Exact::from_utf8(py, name) {
            Ok(name) => made.push(name),
            Err(error) => failed = Some(error),
        })?;
        match failed {
            Some(error) => Err(self.unreadable(py, error)),
            None if made.len() < self.len() => Err(self.damaged("a name does not lie in them")),
            None => Ok(made),
        }
    }

    /// The names of which `keep` says so, in order. **O(n)**.
    pub(crate) fn names_that(&self, py: Python<'_>, keep: impl Fn(&[u8]) -> bool) -> PyResult<Vec<Exact>> {
        let mut made = Ok(Vec::new());
        self.for_each(py, |name, _| {
            if keep(name)
                && let Ok(list) = &mut made
            {
                match Exact::from_utf8(py, name) {
                    Ok(name) => made = memory::push(list, name).map(|()| std::mem::take(list)),
                    Err(error) => made = Err(error),
                }
            }
        })?;
        made.map_err(|error| self.unreadable(py, error))
    }

    /// An index of the same names in memory. **O(n)**.
    pub(crate) fn to_index(&self, py: Python<'_>) -> PyResult<Index> {
        let held = self.bytes.bind(py).try_readonly()?;
        let (_, names) = codec::decode(held.as_slice()?).or_raise().map_err(|error| self.damaged(error.value(py)))?;
        let made = memory::collect(names.iter().map(|(name, _)| name))?;
        let places: Found = memory::collect(names.iter().map(|(_, id)| Place::of_id(id)))?.into();
        match Index::of(made.into_iter(), &places, &self.used) {
            Ok(index) => Ok(index.counted_from(self.moves, self.inserts)),
            Err(Refusal::Limit(error)) => Err(memory::refused(error)),
            Err(Refusal::Repeated { at }) => {
                let twice = names.name(at).unwrap_or_default();
                Err(self.damaged(format!("{:?} is listed twice", String::from_utf8_lossy(twice))))
            }
            Err(_) => Err(self.damaged("a name has no row of its own")),
        }
    }

    /// The error for a name of which no `str` can be made: damage, unless memory is lacking.
    fn unreadable(&self, py: Python<'_>, error: PyErr) -> PyErr {
        if error.is_instance_of::<PyMemoryError>(py) { error } else { self.damaged(error) }
    }

    fn damaged(&self, what: impl std::fmt::Display) -> PyErr {
        let what = what.to_string();
        let what =
            what.strip_prefix("the packed names are damaged").unwrap_or(&what).trim_start_matches(": ").to_owned();
        let text = format!("{}the packed names are damaged: {what}", self.origin);
        Python::attach(|py| PyErr::from_type(self.error.bind(py).clone(), (self.path.clone(), text)))
    }
}

/// Whether packed names have words that do not fit to them: an error that says so.
#[pyfunction]
pub(crate) fn check_words(packed: numpy::PyReadonlyArray1<'_, u8>) -> PyResult<()> {
    let (_, names) = codec::decode(packed.as_slice()?).or_raise()?;
    if names.are_words_right().or_raise()? {
        return Ok(());
    }
    Err(PyValueError::new_err("the packed names are damaged: the table of words does not fit to the names"))
}
