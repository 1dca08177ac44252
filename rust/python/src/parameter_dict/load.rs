//! State dicts and deep copies of a `ParameterDict`, in sweeps over all entries.
//!
//! Loading copies straight from the tensors of a state dict into those of the entries, with the GIL released. It takes
//! only pairs about which nothing is unusual, and leaves the others to torch. torch copies pair after pair. Another
//! order gives the same only if no pair writes what another one reads or writes. So pairs that share memory are left to
//! torch, too ([`in_a_crowd`]).
//!
//! No Python code may run between reading an address and using it, because it may replace what lies there. Comparing a
//! key can run some, unless both are exact `str`; so can asking an unusual tensor anything, which is done last: whatever
//! has changed then is left to torch. And the collector is paused, because it runs finalizers.

use std::ops::Range;

use pdrs_core::slab::disjoint::Lines;
use pdrs_core::slab::strides::{is_dense, order_of};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyList, PyString};

use crate::moves::tensor_group::Paused;
use crate::python::cpython::Place;
use crate::python::memory::{self, OrRaise, new_list, new_number};
use crate::python::name::exact_text;
use crate::python::text::{find_dot, is_empty, joins, length, part_of, starts_with};
use crate::torch::bytes::{Bytes, hint};
use crate::torch::{Finder, Seen, Torch};

/// How many entries are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// About how many versions are counted up in one call of torch's function, which is written in Python.
const WRITTEN_AT_ONCE: usize = 4 * BATCH;

/// Bytes to copy from one tensor to another, which has as many.
struct Pair {
    /// The entry.
    at: usize,
    from: Bytes,
    to: Bytes,
}

/// Fills Parameters from the tensors that a state dict has under their names behind `prefix`.
///
/// Gives the names of those that were left, in order, and the number of those that were filled. Left are entries that
/// the state dict does not have, of more than `largest` bytes, or unusual in any way. Entries that are None are neither
/// left nor filled. With `whole`, either all are filled or none.
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
    // Whether to copy bytes, while one pair is like the one before.
    let (mut are_bytes, mut is_known) = (false, false);
    let mut found = Vec::with_capacity(BATCH);
    let mut written = Vec::with_capacity(WRITTEN_AT_ONCE + BATCH);
    for begin in (0..entries.len()).step_by(BATCH) {
        let batch = &entries[begin..entries.len().min(begin + BATCH)];
        found.clear();
        for (name, value) in batch {
            let source = keys.value_of(name)?;
            for tensor in source.iter().chain([value]) {
                torch.prefetch(tensor);
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
            if let (Some(into), Some(out_of)) = (into, out_of) {
                if !(is_known && targets.is_like_before && origins.is_like_before) {
                    are_bytes = are_copied_as_bytes(&targets, &origins);
                    is_known = true;
                }
                if are_bytes
                    && into.len() as u64 <= largest
                    // A tensor that was made in inference mode has no version, and may not be written outside.
                    && torch.counts_writes(to)
                {
                    pairs.push(Pair { at, from: out_of, to: into });
                    sources.push(from);
                    written.push(to);
                    continue;
                }
            } else {
                is_known = false;
            }
            for (found, tensor, is_written) in [(into, to, true), (out_of, &from, false)] {
                match found {
                    Some(bytes) => {
                        memory::push(&mut others, Stretch { addresses: addresses(bytes), at, is_written })?;
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
    // `entries` and `sources` keep the tensors alive that own these bytes.
    py.detach(|| copy(&pairs));
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
            && into.addresses() == pair.to.addresses()
            && out_of.addresses() == pair.from.addresses()
            && are_copied_as_bytes(targets, origins)
        {
            kept.push(pair);
            kept_sources.push(from);
        }
    }
    Ok((kept, kept_sources))
}

/// Whether the latest target becomes equal to the latest origin by a copy of all bytes, which are neighbours in both.
fn are_copied_as_bytes(targets: &Places, origins: &Places) -> bool {
    let (to_dims, from_dims) = (targets.finder.dims(), origins.finder.dims());
    let (Some(to), Some(from)) = (targets.finder.found(), origins.finder.found()) else {
        return false;
    };
    if !to.device().is_cpu() || !from.device().is_cpu() || to.dtype() != from.dtype() {
        return false;
    }
    let (shape, strides) = to_dims.split_at(to.ndim());
    let (from_shape, from_strides) = from_dims.split_at(from.ndim());
    shape == from_shape
        && ((to.is_contiguous() && from.is_contiguous())
            || (strides == from_strides && is_dense(shape, strides, &order_of(shape, strides))))
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
    fn of(&mut self, value: &Bound<'_, PyAny>) -> PyResult<Option<Bytes>> {
        self.is_like_before = false;
        if !self.torch.is_plain(value) {
            return Ok(None);
        }
        Ok(match self.finder.find(value)? {
            Seen::Alike(bytes) => {
                self.is_like_before = true;
                Some(bytes)
            }
            Seen::Other(bytes) => Some(bytes),
            Seen::Unusual(_) => None,
        })
    }
}

/// The memory that a plain tensor takes: none where it could not be shared with one on the CPU.
fn addresses(bytes: Bytes) -> Range<usize> {
    if bytes.are_here() { bytes.addresses() } else { 0..0 }
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
    let stretch = |bytes: Bytes, at, is_written| Stretch { addresses: bytes.addresses(), at, is_written };
    let mut all = others;
    pdrs_core::memory::reserve(&mut all, 2 * pairs.len()).or_raise()?;
    all.extend(pairs.iter().map(|pair| stretch(pair.to, pair.at, true)));
    all.extend(pairs.iter().map(|pair| stretch(pair.from, pair.at, false)));
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
    pairs.iter().all(|pair| lines.take(pair.to.addresses()))
        && others.iter().filter(|other| other.is_written).all(|other| lines.take(other.addresses.clone()))
        && pairs.iter().all(|pair| lines.are_free(pair.from.addresses()))
        && others.iter().filter(|other| !other.is_written).all(|other| lines.are_free(other.addresses.clone()))
}

fn copy(pairs: &[Pair]) {
    for batch in pairs.chunks(BATCH) {
        for pair in batch {
            hint(pair.from.address());
            hint(pair.to.address());
        }
        for pair in batch.iter().filter(|pair| pair.from.address() != pair.to.address()) {
            pair.from.copy_to(pair.to);
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
    place: Place,
    /// Whether the prefix is empty.
    is_bare: bool,
    next: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    after: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
}

impl<'a, 'py> Keys<'a, 'py> {
    fn new(state: &'a Bound<'py, PyDict>, prefix: &'a Bound<'py, PyString>) -> Self {
        let mut keys =
            Self { state, prefix, place: Place::default(), is_bare: is_empty(prefix), next: None, after: None };
        keys.next = keys.place.step(state);
        keys.after = keys.place.step(state);
        keys
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
        if self.is_bare { self.state.get_item(name) } else { self.state.get_item(self.prefix.add(name)?) }
    }

    fn step(&mut self) -> Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let read = self.place.step(self.state);
        let after = std::mem::replace(&mut self.after, read);
        std::mem::replace(&mut self.next, after)
    }

    /// Whether a key is the prefix and then the name.
    fn joins(&self, key: &Bound<'py, PyAny>, name: &Bound<'py, PyString>) -> bool {
        let Ok(key) = key.cast_exact::<PyString>() else {
            return false;
        };
        key.is(name) && self.is_bare || joins(key, self.prefix, name)
    }
}

/// The keys of a state dict that begin with a prefix and belong to no entry, buffer or child module of a module, in order.
///
/// torch takes what stands before the first dot of a key for the name of a child module. Here the name of an entry can
/// have dots, and so can that of a child module.
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
        let Some(text) = exact_text(&key)? else {
            // As torch does, which raises for nearly everything.
            if key.call_method1(intern!(py, "startswith"), (prefix,))?.is_truthy()? {
                unexpected.push(key);
            }
            continue;
        };
        if !starts_with(&text, prefix) || key.eq(extra_state)? {
            continue;
        }
        let name = part_of(&text, length(prefix)..length(&text))?;
        let of_a_child = match find_dot(&name) {
            Some(end) => modules.contains(part_of(&name, 0..end)?)?,
            None => false,
        };
        if of_a_child || is_local(&name)? || dotted_modules.iter().any(|module| starts_with(&text, module)) {
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
