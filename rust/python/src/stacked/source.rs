//! The packed names of one dictionary, where they lie: most likely in a map of a file.

use numpy::{PyArray1, PyArrayMethods};
use pdrs_core::names::codec::{Names, Parts, hash};
use pdrs_core::{MAX_TABLES, Place};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyType};

use crate::python::memory::{self, OrRaise};
use crate::python::name::text_of_utf8;

/// Packed names with words, in memory that somebody else owns.
pub(crate) struct Source {
    pub(crate) bytes: Py<PyArray1<u8>>,
    pub(crate) parts: Parts,
    /// How many rows of each of its tables were ever given.
    pub(crate) used: Vec<u64>,
    /// The text that stands before each of its names, but not in the bytes.
    pub(crate) prefix: Vec<u8>,
    /// The number of its first table among those of all sources.
    pub(crate) first_table: usize,
    /// What is raised if they turn out to be damaged: a class that takes a path and a text, and how the text begins.
    error: Py<PyType>,
    path: String,
    origin: String,
}

impl Source {
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
        let (bytes, error) = (bytes.clone().unbind(), error.clone().unbind());
        Ok(Some(Self { bytes, parts, used, prefix: Vec::new(), first_table: 0, error, path, origin }))
    }

    /// The same bytes, with a text before each name, and with other numbers of its tables.
    pub(crate) fn shown(&self, py: Python<'_>, prefix: Vec<u8>, first_table: usize) -> PyResult<Self> {
        Ok(Self {
            bytes: self.bytes.clone_ref(py),
            parts: self.parts,
            used: memory::collect(self.used.iter().copied())?,
            prefix,
            first_table,
            error: self.error.clone_ref(py),
            path: self.path.clone(),
            origin: self.origin.clone(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    /// Hands over the names. It asks `NumPy` for the bytes, which may run Python code the first time.
    pub(crate) fn with<R>(&self, py: Python<'_>, take: impl FnOnce(&Names<'_>) -> R) -> PyResult<R> {
        let held = self.bytes.bind(py).try_readonly()?;
        let names = self.parts.names(held.as_slice()?).or_raise()?;
        Ok(take(&names))
    }

    /// The place of a name that the bytes say; `None` for one that cannot be.
    #[inline]
    pub(crate) fn place_at(&self, names: &Names<'_>, number: usize) -> Option<Place> {
        let place = Place::of_id(names.id(number)?)?;
        self.used.get(place.table()).filter(|used| place.row() < **used)?;
        if self.first_table == 0 { Some(place) } else { Place::new(self.first_table + place.table(), place.row()) }
    }

    /// The place of the name with this text, of which the prefix is not a part.
    pub(crate) fn find(&self, names: &Names<'_>, text: &[u8]) -> Option<Place> {
        let number = names.find(hash(text), |other| other == text)?;
        self.place_at(names, number)
    }

    /// A name of the bytes with its prefix, in a buffer if there is one.
    pub(crate) fn whole<'a>(&self, name: &'a [u8], buffer: &'a mut Vec<u8>) -> PyResult<&'a [u8]> {
        if self.prefix.is_empty() {
            return Ok(name);
        }
        buffer.clear();
        pdrs_core::memory::append(buffer, &self.prefix).or_raise()?;
        pdrs_core::memory::append(buffer, name).or_raise()?;
        Ok(buffer)
    }

    /// The name with a number.
    pub(crate) fn name<'py>(&self, py: Python<'py>, number: usize) -> PyResult<Bound<'py, PyString>> {
        let found = self.with(py, |names| {
            let name = names.name(number).filter(|name| !name.is_empty() && self.place_at(names, number).is_some())?;
            Some(self.whole(name, &mut Vec::new()).and_then(|name| text_of_utf8(py, name)))
        })?;
        match found {
            Some(name) => name.map_err(|error| self.unreadable(py, error)),
            None => Err(self.damaged(format!("name {number} does not lie in them"))),
        }
    }

    /// The error for a name of which no `str` can be made: damage, unless memory is lacking.
    pub(crate) fn unreadable(&self, py: Python<'_>, error: PyErr) -> PyErr {
        if error.is_instance_of::<PyMemoryError>(py) { error } else { self.damaged(error) }
    }

    pub(crate) fn damaged(&self, what: impl std::fmt::Display) -> PyErr {
        let what = what.to_string();
        let what =
            what.strip_prefix("the packed names are damaged").unwrap_or(&what).trim_start_matches(": ").to_owned();
        let text = format!("{}the packed names are damaged: {what}", self.origin);
        Python::attach(|py| PyErr::from_type(self.error.bind(py).clone(), (self.path.clone(), text)))
    }
}
