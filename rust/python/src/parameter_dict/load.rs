//! State dicts and deep copies of a `ParameterDict`, in sweeps over all entries.
//!
//! Loading copies straight from the tensors of a state dict into those of the entries, with the GIL released. It takes
//! only pairs about which nothing is unusual, and leaves the others to torch. What torch does one after another can be
//! done in any order only if no pair writes what another one reads or writes; so pairs that share memory are left to
//! torch, too ([`in_a_crowd`]).
//!
//! No Python code may run between reading an address and using it, because it may replace what lies there. Comparing a
//! key can run some, unless both are exact `str`; so can asking an unusual tensor anything, which is done last: whatever
//! has changed then is left to torch. And the collector is paused, because it runs finalizers.
#![allow(unsafe_code)] // Copies between addresses, and the C API's way to compare strings in place.

use std::ops::Range;
use std::ptr;

use pdrs_core::slab::disjoint::Lines;
use pdrs_core::slab::strides::{extent, is_dense, order_of};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyList, PyString};

use crate::moves::tensor_group::Paused;
use crate::python::memory::{self, OrRaise, new_list, new_number};
use crate::torch::{Finder, Found, Seen, Torch, prefetch};

/// How many entries are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// About how many versions are counted up in one call of torch's function, which is written in Python.
const WRITTEN_AT_ONCE: usize = 4 * BATCH;

/// Bytes to copy from one tensor to another.
struct Pair {
    /// The entry.
    at: usize,
    from: usize,
    to: usize,
    bytes: u64,
}

/// Fills Parameters from the tensors that a state dict has under their names behind `prefix`.
///
/// Gives the names of those that were left, in order: missing from the state dict, of more than `largest` bytes, or
/// unusual in any way; and the number of those that were filled. Entries that are None are neither. With `whole`, either
/// all are filled or none.
#[pyfunction]
pub(crate) fn load_matching<'py>(
    parameters: &Bound<'py, PyDict>,
    state: &Bound<'py, PyDict>,
    prefix: &Bound<'py, PyString>,
    largest: u64,
    whole: bool,
) -> PyResult<(Bound<'py, PyList>, usize)> {
    let py = parameters.py();
    let torch = Torch::get(py)?;
    let _paused = Paused::new(py)?;
    let entries = memory::collect(parameters.iter().filter(|(_, value)| !value.is_none()))?;
    let is_exact = |key: &Bound<'py, PyAny>| key.cast_exact::<PyString>().is_ok();
    if !parameters.iter().chain(state.iter()).all(|(key, _)| is_exact(&key)) {
        return Ok((new_list(py, entries.into_iter().map(|(name, _)| Ok(name)))?, 0));
    }
    let mut pairs = memory::with_capacity(entries.len())?;
    // The tensors of the pairs stay alive until they have been copied.
    let mut sources = memory::with_capacity(entries.len())?;
    // What torch will write and read for those that are left to it.
    let mut others = Vec::new();
    let mut unusual = Vec::new();
    let mut keys = Keys::new(state, prefix);
    let (mut targets, mut origins) = (Places::new(torch), Places::new(torch));
    // How many bytes to copy, while one pair is like the one before.
    let (mut bytes, mut is_known) = (None, false);
    let mut found = Vec::with_capacity(BATCH);
    let mut written = Vec::with_capacity(WRITTEN_AT_ONCE + BATCH);
    for begin in (0..entries.len()).step_by(BATCH) {
        let batch = &entries[begin..entries.len().min(begin + BATCH)];
        found.clear();
        for (name, value) in batch {
            let source = keys.value_of(name)?;
            for tensor in source.iter().chain([value]) {
                if torch.is_plain(tensor) {
                    prefetch(tensor);
                }
            }
            found.push(source);
        }
        for (at, (source, (_, to))) in found.drain(..).zip(batch).enumerate() {
            let Some(from) = source else {
                continue;
            };
            let at = begin + at;
            let into = targets.of(to)?;
            let out_of = origins.of(&from)?;
            if let (Some(into), Some(out_of)) = (&into, &out_of) {
                if !(is_known && targets.is_like_before && origins.is_like_before) {
                    bytes = copied_as_bytes(into, out_of, targets.dims(), origins.dims());
                    is_known = true;
                }
                if let Some(bytes) = bytes
                    && bytes <= largest
                    // A tensor that was made in inference mode has no version, and may not be written outside.
                    && torch.counts_writes(to)
                {
                    pairs.push(Pair { at, from: out_of.pointer, to: into.pointer, bytes });
                    sources.push(from);
                    written.push(to);
                    continue;
                }
            } else {
                is_known = false;
            }
            for (found, tensor, dims, is_written) in
                [(into, to, targets.dims(), true), (out_of, &from, origins.dims(), false)]
            {
                match found {
                    Some(found) => {
                        memory::push(&mut others, Stretch { addresses: addresses(&found, dims), at, is_written })?;
                    }
                    None => memory::push(&mut unusual, (at, tensor.clone(), is_written))?,
                }
            }
        }
        if whole && pairs.len() < begin + batch.len() {
            return Ok((new_list(py, entries.into_iter().map(|(name, _)| Ok(name)))?, 0));
        }
        // Soon, while all that this touches is in the cache: it takes half of the time of the whole otherwise. For those
        // that are left to torch in the end it happens twice, which does no harm.
        if written.len() >= WRITTEN_AT_ONCE || begin + BATCH >= entries.len() {
            torch.increment_version(&PyList::new(py, written.drain(..))?)?;
        }
    }
    if !unusual.is_empty() {
        for (at, tensor, is_written) in unusual {
            memory::push(&mut others, Stretch { addresses: storage_of(&tensor), at, is_written })?;
        }
        let before = pairs.len();
        (pairs, sources) = still_there(pairs, sources, &entries, &mut targets, &mut origins)?;
        if whole && pairs.len() < before {
            return Ok((new_list(py, entries.into_iter().map(|(name, _)| Ok(name)))?, 0));
        }
    }
    let crowded = in_a_crowd(&pairs, others)?;
    if !crowded.is_empty() {
        if whole {
            return Ok((new_list(py, entries.into_iter().map(|(name, _)| Ok(name)))?, 0));
        }
        pairs.retain(|pair| crowded.binary_search(&pair.at).is_err());
    }
    // SAFETY: `entries` and `sources` keep the tensors alive that own these bytes; as with torch's own kernels, no other
    // thread may take their memory away meanwhile. What is written is apart from everything else.
    py.detach(|| unsafe { copy(&pairs) });
    drop(sources);
    let mut filled = pairs.iter().map(|pair| pair.at).peekable();
    let left = entries.into_iter().enumerate().filter(|(at, _)| filled.next_if_eq(at).is_none());
    let left = memory::collect(left.map(|(_, (name, _))| Ok(name)))?;
    Ok((new_list(py, left)?, pairs.len()))
}

/// The pairs whose tensors lie where they lay, and their sources.
fn still_there<'py>(
    pairs: Vec<Pair>,
    sources: Vec<Bound<'py, PyAny>>,
    entries: &[(Bound<'py, PyAny>, Bound<'py, PyAny>)],
    targets: &mut Places,
    origins: &mut Places,
) -> PyResult<(Vec<Pair>, Vec<Bound<'py, PyAny>>)> {
    let (mut kept, mut kept_sources) = (memory::with_capacity(pairs.len())?, memory::with_capacity(pairs.len())?);
    for (pair, from) in pairs.into_iter().zip(sources) {
        let (into, out_of) = (targets.of(&entries[pair.at].1)?, origins.of(&from)?);
        if let (Some(into), Some(out_of)) = (into, out_of)
            && (into.pointer, out_of.pointer) == (pair.to, pair.from)
            && copied_as_bytes(&into, &out_of, targets.dims(), origins.dims()) == Some(pair.bytes)
        {
            kept.push(pair);
            kept_sources.push(from);
        }
    }
    Ok((kept, kept_sources))
}

/// The number of bytes, if one tensor becomes equal to another by a copy of so many bytes that are neighbours in both.
fn copied_as_bytes(to: &Found, from: &Found, to_dims: &[i64], from_dims: &[i64]) -> Option<u64> {
    if !to.device.is_cpu() || !from.device.is_cpu() || to.dtype != from.dtype {
        return None;
    }
    let (shape, strides) = to_dims.split_at(to.ndim);
    let (from_shape, from_strides) = from_dims.split_at(from.ndim);
    let alike = shape == from_shape
        && ((to.contiguous && from.contiguous)
            || (strides == from_strides && is_dense(shape, strides, &order_of(shape, strides))));
    alike.then(|| to.numel * to.itemsize)
}

/// Where tensors lie that are looked at one after another.
struct Places {
    torch: &'static Torch,
    finder: Finder,
    /// Whether the latest is like the one before but for its address.
    is_like_before: bool,
}

impl Places {
    fn new(torch: &'static Torch) -> Self {
        Self { torch, finder: Finder::new(torch), is_like_before: false }
    }

    /// Where a tensor lies, if it is a plain one.
    fn of(&mut self, value: &Bound<'_, PyAny>) -> PyResult<Option<Found>> {
        self.is_like_before = false;
        if !self.torch.is_plain(value) {
            return Ok(None);
        }
        Ok(match self.finder.find(value)? {
            Seen::Alike(pointer) => {
                self.is_like_before = true;
                self.finder.latest().map(|latest| Found { pointer, ..*latest })
            }
            Seen::Other(found) => Some(found),
            Seen::Unusual(_) => None,
        })
    }

    /// The shape and then the strides of the latest.
    fn dims(&self) -> &[i64] {
        self.finder.dims()
    }
}

/// The memory that a plain tensor takes: none where it could not be shared with one on the CPU.
fn addresses(found: &Found, dims: &[i64]) -> Range<usize> {
    if !found.device.is_cpu() || found.numel == 0 {
        return 0..0;
    }
    let (shape, strides) = dims.split_at(found.ndim);
    let elements = extent(shape, strides).unwrap_or(found.numel);
    found.pointer..found.pointer + (elements * found.itemsize) as usize
}

/// All of the storage of any other tensor, which may be somebody else's, too. Asking for it may run Python code.
fn storage_of(value: &Bound<'_, PyAny>) -> Range<usize> {
    let py = value.py();
    let range = || -> PyResult<Range<usize>> {
        let storage = value.call_method0(intern!(py, "untyped_storage"))?;
        let start: usize = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let bytes: usize = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
        Ok(start..start.saturating_add(bytes))
    };
    // Sparse tensors have no storage, and what is no tensor has none either.
    range().unwrap_or(0..0)
}

/// Memory that is read or written for an entry.
struct Stretch {
    addresses: Range<usize>,
    at: usize,
    is_written: bool,
}

/// The entries whose tensors share memory with those of others, so that the order of the copies matters; ascending.
///
/// A tensor that is filled from its own memory is in no crowd by that alone.
fn in_a_crowd(pairs: &[Pair], others: Vec<Stretch>) -> PyResult<Vec<usize>> {
    if are_apart(pairs, &others) {
        return Ok(Vec::new());
    }
    let stretch = |start: usize, pair: &Pair, is_written| Stretch {
        addresses: start..start + pair.bytes as usize,
        at: pair.at,
        is_written,
    };
    let mut all = others;
    pdrs_core::memory::reserve(&mut all, 2 * pairs.len()).or_raise()?;
    all.extend(pairs.iter().map(|pair| stretch(pair.to, pair, true)));
    all.extend(pairs.iter().map(|pair| stretch(pair.from, pair, false)));
    all.retain(|stretch| !stretch.addresses.is_empty());
    // Both halves are often sorted already, which this sort makes use of. It takes as much memory again, and ends the
    // process where it cannot be had.
    drop(memory::with_capacity::<Stretch>(all.len())?);
    all.sort_by_key(|stretch| stretch.addresses.start);
    let mut crowded = Vec::new();
    let mut begin = 0;
    while begin < all.len() {
        let mut end = all[begin].addresses.end;
        let mut next = begin + 1;
        while next < all.len() && all[next].addresses.start < end {
            end = end.max(all[next].addresses.end);
            next += 1;
        }
        let crowd = &all[begin..next];
        let only_itself = crowd.iter().all(|each| each.at == crowd[0].at && each.addresses == crowd[0].addresses);
        if !only_itself && crowd.iter().any(|each| each.is_written) {
            for each in crowd {
                memory::push(&mut crowded, each.at)?;
            }
        }
        begin = next;
    }
    crowded.sort_unstable();
    crowded.dedup();
    Ok(crowded)
}

/// Whether it is easily seen that nobody is in a crowd: that what is written shares no cache line with anything.
fn are_apart(pairs: &[Pair], others: &[Stretch]) -> bool {
    let mut lines = Lines::new(pairs.len() + others.len());
    let stretch = |start: usize, pair: &Pair| start..start + pair.bytes as usize;
    pairs.iter().all(|pair| lines.take(stretch(pair.to, pair)))
        && others.iter().filter(|other| other.is_written).all(|other| lines.take(other.addresses.clone()))
        && pairs.iter().all(|pair| lines.are_free(stretch(pair.from, pair)))
        && others.iter().filter(|other| !other.is_written).all(|other| lines.are_free(other.addresses.clone()))
}

/// # Safety
///
/// All bytes of all pairs can be read and written until this returns, and those written are apart from each other and
/// from those read, but for a pair that is one stretch of memory.
unsafe fn copy(pairs: &[Pair]) {
    for batch in pairs.chunks(BATCH) {
        let mut seen = 0;
        for pair in batch.iter().filter(|pair| pair.bytes > 0) {
            // Loads that do not wait for each other, as those of copies would.
            // SAFETY: there is at least one byte, as the caller promises.
            unsafe {
                seen ^= ptr::read_volatile(pair.from as *const u8) ^ ptr::read_volatile(pair.to as *const u8);
            }
        }
        std::hint::black_box(seen);
        for pair in batch.iter().filter(|pair| pair.from != pair.to) {
            // SAFETY: the caller promises that both can be used and are apart.
            unsafe { ptr::copy_nonoverlapping(pair.from as *const u8, pair.to as *mut u8, pair.bytes as usize) };
        }
    }
}

/// The keys of a state dict that names behind a prefix are looked for in.
///
/// They nearly always come in the order of the names. So the next key is compared first, and then the one after it,
/// without joining prefix and name; only when both are others, the key is made and looked up.
///
/// Another thread may change the state dict whenever torch is called, which `PyO3`'s iterator takes for a reason to
/// panic. Here that makes keys other than those expected, which are looked up.
struct Keys<'a, 'py> {
    state: &'a Bound<'py, PyDict>,
    prefix: &'a Bound<'py, PyString>,
    /// How far the interpreter has gone through the state dict.
    position: ffi::Py_ssize_t,
    next: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    after: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
}

impl<'a, 'py> Keys<'a, 'py> {
    fn new(state: &'a Bound<'py, PyDict>, prefix: &'a Bound<'py, PyString>) -> Self {
        let mut keys = Self { state, prefix, position: 0, next: None, after: None };
        keys.next = keys.read();
        keys.after = keys.read();
        keys
    }

    /// The next item of the state dict.
    fn read(&mut self) -> Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (mut key, mut value) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: `state` is a live dict, and CPython checks the position against what the dict is now. What it gives is
        // borrowed from the dict, which nobody changes before there is a reference to both.
        unsafe {
            if ffi::PyDict_Next(self.state.as_ptr(), &raw mut self.position, &raw mut key, &raw mut value) == 0 {
                return None;
            }
            let py = self.state.py();
            Some((Bound::from_borrowed_ptr(py, key), Bound::from_borrowed_ptr(py, value)))
        }
    }

    fn value_of(&mut self, name: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Ok(name) = name.cast_exact::<PyString>() else {
            return Ok(None);
        };
        let is_it = |item: &Option<(Bound<'py, PyAny>, _)>| item.as_ref().is_some_and(|(key, _)| self.joins(key, name));
        if is_it(&self.next) {
            let (_, value) = self.step().unzip();
            return Ok(value);
        }
        if is_it(&self.after) {
            self.step();
            let (_, value) = self.step().unzip();
            return Ok(value);
        }
        if self.prefix.is_empty()? { self.state.get_item(name) } else { self.state.get_item(self.prefix.add(name)?) }
    }

    fn step(&mut self) -> Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let read = self.read();
        let after = std::mem::replace(&mut self.after, read);
        std::mem::replace(&mut self.next, after)
    }

    /// Whether a key is the prefix and then the name.
    fn joins(&self, key: &Bound<'py, PyAny>, name: &Bound<'py, PyString>) -> bool {
        let Ok(key) = key.cast_exact::<PyString>() else {
            return false;
        };
        if key.is(name) && length(self.prefix) == 0 {
            return true;
        }
        length(key) == length(self.prefix) + length(name) && ends_with(key, name) && starts_with(key, self.prefix)
    }
}

/// The keys of a state dict that begin with a prefix and belong to no entry, buffer or child module of a module, in order.
///
/// torch takes what stands before the first dot of a key for the name of a child module; here a key with dots can also
/// be that of an entry, and a child module's name can have dots.
#[pyfunction]
pub(crate) fn unexpected_keys<'py>(
    state: &Bound<'py, PyAny>,
    prefix: &Bound<'py, PyString>,
    local: (Bound<'py, PyDict>, Bound<'py, PyDict>),
    modules: &Bound<'py, PyAny>,
    extra_state: &Bound<'py, PyString>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let py = state.py();
    let dot = PyString::new(py, ".");
    let mut dotted_modules = Vec::new();
    for name in modules.try_iter()? {
        let name = name?.cast_into::<PyString>()?;
        if find_dot(&name).is_some() {
            dotted_modules.push(prefix.add(name)?.add(&dot)?.cast_into::<PyString>()?);
        }
    }
    let is_local = |name: &Bound<'py, PyString>| -> PyResult<bool> {
        for place in [&local.0, &local.1] {
            if place.get_item(name)?.is_some_and(|value| !value.is_none()) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let mut unexpected = Vec::new();
    for key in PyIterator::from_object(state)? {
        let key = key?;
        let Ok(text) = key.cast::<PyString>() else {
            // As torch does, which raises for nearly everything.
            if key.call_method1(intern!(py, "startswith"), (prefix,))?.is_truthy()? {
                unexpected.push(key);
            }
            continue;
        };
        if !starts_with(text, prefix) || key.eq(extra_state)? {
            continue;
        }
        let name = substring(text, length(prefix), length(text))?;
        let of_a_child = match find_dot(&name) {
            Some(end) => modules.contains(substring(&name, 0, end)?)?,
            None => false,
        };
        if of_a_child || is_local(&name)? || dotted_modules.iter().any(|module| starts_with(text, module)) {
            continue;
        }
        unexpected.push(key);
    }
    Ok(unexpected)
}

/// The Parameters of a dict that have no copy in `memo` yet, and are of no subclass.
#[pyfunction]
pub(crate) fn not_copied_yet<'py>(
    parameters: &Bound<'py, PyDict>,
    memo: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyList>> {
    let torch = Torch::get(parameters.py())?;
    let ids = few_ids(memo);
    let mut values = memory::with_capacity(parameters.len())?;
    // A list of them, because a key of the memo may have a comparison of its own, which might change the dict.
    for value in memory::values_of(parameters)? {
        let id = value.as_ptr() as usize;
        let is_new = || match &ids {
            Some(ids) => Ok(!ids.contains(&id)),
            None => Ok::<_, PyErr>(!memo.contains(id)?),
        };
        if torch.is_parameter(&value) && is_new()? {
            memory::push(&mut values, value)?;
        }
    }
    new_list(parameters.py(), values.into_iter().map(Ok))
}

/// The keys of a memo that has few, as it has when a deep copy begins: those are faster looked through.
fn few_ids(memo: &Bound<'_, PyDict>) -> Option<Vec<usize>> {
    const FEW: usize = 16;
    if memo.len() > FEW {
        return None;
    }
    memo.keys().iter().map(|id| id.extract().ok()).collect()
}

/// Replaces Parameters in `target`, a copy of the dict `parameters`, by copies, and enters these in the memo of a deep
/// copy.
///
/// `originals` are some of the values, in order, and `copies` the copy of each, or None. Gives the names of the entries
/// of which there is none.
#[pyfunction]
pub(crate) fn place_copies<'py>(
    target: &Bound<'py, PyDict>,
    parameters: &Bound<'py, PyDict>,
    originals: &Bound<'py, PyList>,
    copies: &Bound<'py, PyList>,
    memo: &Bound<'py, PyDict>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let mut left = Vec::new();
    let mut pairs = originals.iter().zip(copies).peekable();
    // Taken together first, because a key may have a comparison of its own, which might change the dict.
    for (name, value) in memory::collect(parameters)? {
        match pairs.next_if(|(original, _)| original.is(&value)) {
            Some((_, copy)) if !copy.is_none() => {
                memo.set_item(new_number(memo.py(), (value.as_ptr() as usize).cast_signed() as i64)?, &copy)?;
                target.set_item(name, copy)?;
            }
            _ => memory::push(&mut left, name)?,
        }
    }
    Ok(left)
}

fn length(text: &Bound<'_, PyString>) -> isize {
    // SAFETY: `text` is a live `str`.
    unsafe { ffi::PyUnicode_GET_LENGTH(text.as_ptr()) }
}

fn starts_with(text: &Bound<'_, PyString>, part: &Bound<'_, PyString>) -> bool {
    // SAFETY: both are live `str` objects; then this compares characters and cannot fail.
    unsafe { ffi::PyUnicode_Tailmatch(text.as_ptr(), part.as_ptr(), 0, isize::MAX, -1) == 1 }
}

fn ends_with(text: &Bound<'_, PyString>, part: &Bound<'_, PyString>) -> bool {
    // SAFETY: as in `starts_with`.
    unsafe { ffi::PyUnicode_Tailmatch(text.as_ptr(), part.as_ptr(), 0, isize::MAX, 1) == 1 }
}

fn find_dot(text: &Bound<'_, PyString>) -> Option<isize> {
    // SAFETY: `text` is a live `str`, which cannot fail; -1 says that there is none.
    let at = unsafe { ffi::PyUnicode_FindChar(text.as_ptr(), u32::from('.'), 0, isize::MAX, 1) };
    (at >= 0).then_some(at)
}

fn substring<'py>(text: &Bound<'py, PyString>, start: isize, end: isize) -> PyResult<Bound<'py, PyString>> {
    // SAFETY: `text` is a live `str`; a new reference, or null and an error.
    let made = unsafe { Bound::from_owned_ptr_or_err(text.py(), ffi::PyUnicode_Substring(text.as_ptr(), start, end))? };
    Ok(made.cast_into::<PyString>()?)
}
