//! `EntryKeys`: the keys of a `ParameterDict` in order, as the very `str` objects that torch's dict has.
//!
//! They lie behind a lock that is held only for pure Rust work. While it is held, no Python code runs, and no object is
//! made that Python's garbage collector tracks.

use std::hash::{DefaultHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pdrs_core::OrderedSet;
use pyo3::exceptions::{PyKeyError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyList, PyString, PyTuple};

use crate::index_map::{missing, view};
use crate::python::memory::{self, OrRaise, new_list, new_pair};
use crate::python::name::{Name, Query, exact_text, to_text};
use crate::python::names::{AHEAD, of_pickles, to_names};

/// The keys of a `ParameterDict`, in order; for torch's own methods a dict without values.
#[pyclass(frozen, mapping, module = "pdrs._core")]
pub(crate) struct EntryKeys {
    keys: Mutex<OrderedSet<Name>>,
    /// The generation of the keys, to be read without the lock.
    generation: AtomicU64,
    /// The fingerprint of the keys, and the generation that it was computed for. Locked before `keys`.
    fingerprint: Mutex<Option<(u64, u64)>>,
}

/// The lock, and the duty to publish the generation when it is given back.
struct Locked<'a> {
    keys: MutexGuard<'a, OrderedSet<Name>>,
    generation: &'a AtomicU64,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.generation.store(self.keys.generation(), Ordering::Release);
    }
}

impl EntryKeys {
    fn of(keys: OrderedSet<Name>) -> Self {
        Self { generation: AtomicU64::new(keys.generation()), keys: Mutex::new(keys), fingerprint: Mutex::new(None) }
    }

    fn read(&self, py: Python<'_>) -> MutexGuard<'_, OrderedSet<Name>> {
        self.keys.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, py: Python<'_>) -> Locked<'_> {
        Locked { keys: self.read(py), generation: &self.generation }
    }

    /// All keys in order.
    pub(crate) fn names(&self, py: Python<'_>) -> PyResult<Vec<Name>> {
        memory::collect(self.read(py).iter().map(|name| name.clone_ref(py)))
    }

    pub(crate) fn len(&self, py: Python<'_>) -> usize {
        self.read(py).len()
    }

    /// The first or last key.
    pub(crate) fn end<'py>(&self, py: Python<'py>, last: bool) -> Option<Bound<'py, PyString>> {
        let keys = self.read(py);
        let name = if last { keys.last() } else { keys.first() }?;
        Some(name.text(py))
    }

    /// Removes the last or first key if it still is `name`; whether it was.
    pub(crate) fn discard_end(&self, py: Python<'_>, name: &Bound<'_, PyString>, last: bool) -> bool {
        let keys = &mut self.write(py).keys;
        let end = if last { keys.last() } else { keys.first() };
        if !end.is_some_and(|end| end.is(name)) {
            return false;
        }
        if last { keys.pop_last() } else { keys.pop_first() }.is_some()
    }

    /// Removes all keys and gives them.
    pub(crate) fn take_names(&self, py: Python<'_>) -> PyResult<Vec<Name>> {
        let mut locked = self.write(py);
        let names = memory::collect(locked.keys.iter().map(|name| name.clone_ref(py)))?;
        locked.keys.clear();
        Ok(names)
    }

    /// Adds a key that is not there yet; one that is there stays as it is.
    pub(crate) fn put(&self, py: Python<'_>, name: Name) -> PyResult<()> {
        self.write(py).keys.insert(name).or_raise()?;
        Ok(())
    }

    /// Adds keys that are not there yet: all, or none.
    pub(crate) fn append(&self, py: Python<'_>, names: Vec<Name>) -> PyResult<()> {
        self.write(py).keys.insert_many(names).or_raise()
    }

    /// Removes a key; whether it was there.
    pub(crate) fn remove(&self, name: &Bound<'_, PyString>) -> bool {
        let removed = self.write(name.py()).keys.remove(&Query::from(name));
        removed.is_some()
    }
}

#[pymethods]
impl EntryKeys {
    #[new]
    #[pyo3(signature = (names = None))]
    fn new(py: Python<'_>, names: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let made = Self::of(OrderedSet::new());
        if let Some(names) = names {
            made.append(py, to_names(names)?)?;
        }
        Ok(made)
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.len(py)
    }

    pub(crate) fn __contains__(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        if let Ok(text) = name.cast_exact::<PyString>() {
            return Ok(self.read(name.py()).contains(&Query::from(text)));
        }
        match exact_text(name)? {
            Some(text) => Ok(self.read(name.py()).contains(&Query::from(&text))),
            // As in a dict: what cannot be hashed is an error, what can is simply not there.
            None => name.hash().map(|_| false),
        }
    }

    /// torch's own methods write None behind their keys.
    fn __setitem__(&self, py: Python<'_>, name: &Bound<'_, PyAny>, _value: &Bound<'_, PyAny>) -> PyResult<()> {
        self.put(py, Name::new(to_text(name)?))
    }

    fn __delitem__(&self, name: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = to_text(name)?;
        if self.remove(&name) { Ok(()) } else { Err(missing(name)) }
    }

    fn __iter__(slf: &Bound<'_, Self>) -> KeyIterator {
        KeyIterator(Mutex::new(Some(Cursor::new(slf, false))))
    }

    fn __reversed__(slf: &Bound<'_, Self>) -> KeyIterator {
        KeyIterator(Mutex::new(Some(Cursor::new(slf, true))))
    }

    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        view(slf.py(), "KeysView", slf.as_any())
    }

    /// As of a dict whose values are None. **O(1)**.
    fn popitem<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        loop {
            let end = self.end(py, true);
            let name = end.ok_or_else(|| PyKeyError::new_err("popitem(): dictionary is empty"))?;
            let pair = new_pair(py, name.clone(), py.None().into_bound(py))?;
            if self.discard_end(py, &name, true) {
                return Ok(pair);
            }
        }
    }

    /// Remove a key, if it is there.
    fn discard(&self, name: &Bound<'_, PyAny>) -> PyResult<()> {
        self.remove(&to_text(name)?);
        Ok(())
    }

    /// **O(n)**; nothing is hashed.
    fn copy(&self, py: Python<'_>) -> PyResult<Self> {
        let copied = self.read(py).map_keys(|name| name.clone_ref(py));
        Ok(Self::of(copied.or_raise()?))
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<Self> {
        self.copy(py)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.copy(py)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let make = of_pickles(py, "entry_keys")?;
        let names: Bound<'py, PyList> = new_list(py, self.names(py)?.into_iter().map(|name| Ok(name.into_text(py))))?;
        (make, (names,)).into_pyobject(py)
    }

    fn __sizeof__(&self, py: Python<'_>) -> usize {
        size_of::<Self>() + self.read(py).allocated_bytes()
    }

    /// The same for the same keys in the same order, and different for others. **O(1)** until keys change, then **O(n)**
    /// once.
    ///
    /// A `str`, because torch.compile guards one by its value, and would take an `int` that changes for one that varies.
    #[getter]
    fn _fingerprint(&self, py: Python<'_>) -> String {
        let mut known = self.fingerprint.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        let keys = self.read(py);
        let generation = keys.generation();
        let fingerprint = match *known {
            Some((then, fingerprint)) if then == generation => fingerprint,
            _ => {
                let mut hasher = DefaultHasher::new();
                keys.iter().for_each(|name| hasher.write_u64(name.full_hash()));
                hasher.finish()
            }
        };
        *known = Some((generation, fingerprint));
        format!("{fingerprint:016x}")
    }
}

/// Walks keys that must not change meanwhile.
pub(crate) struct Cursor {
    keys: Py<EntryKeys>,
    generation: u64,
    reversed: bool,
    /// Where to go on.
    position: usize,
}

impl Cursor {
    pub(crate) fn new(keys: &Bound<'_, EntryKeys>, reversed: bool) -> Self {
        let held = keys.get().read(keys.py());
        let position = if reversed { held.positions() } else { 0 };
        let generation = held.generation();
        drop(held);
        Self { keys: keys.clone().unbind(), generation, reversed, position }
    }

    /// The next key; `RuntimeError` if keys were added or removed since the walk began.
    pub(crate) fn next(&mut self, py: Python<'_>) -> PyResult<Option<Name>> {
        let keys = self.keys.get();
        if keys.generation.load(Ordering::Acquire) != self.generation {
            return Err(PyRuntimeError::new_err("dictionary changed during iteration"));
        }
        let held = keys.read(py);
        let ahead = if self.reversed { self.position.checked_sub(AHEAD) } else { Some(self.position + AHEAD) };
        if let Some(name) = ahead.and_then(|ahead| held.key_at(ahead)) {
            name.prefetch_object();
        }
        let found = if self.reversed { held.key_before(self.position) } else { held.key_at_or_after(self.position) };
        Ok(found.map(|(found, name)| {
            self.position = if self.reversed { found } else { found + 1 };
            name.clone_ref(py)
        }))
    }
}

/// Until the end is reached it has a cursor: an iterator that is kept to no purpose shall not keep a million keys.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct KeyIterator(Mutex<Option<Cursor>>);

#[pymethods]
impl KeyIterator {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyString>>> {
        let mut cursor = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        let found = cursor.as_mut().map_or(Ok(None), |cursor| cursor.next(py))?;
        let ended = if found.is_none() { cursor.take() } else { None };
        drop(cursor);
        drop(ended);
        Ok(found.map(|name| name.into_text(py)))
    }
}
