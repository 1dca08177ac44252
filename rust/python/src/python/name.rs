//! A Python `str` as a key: its cached hash, and comparison by identity or by bytes.
//!
//! Names are exact `str` objects. Hashing and comparing them runs no Python code, so both may happen while a lock is
//! held, and dropping one runs none either. A `str` subclass may define its own `__hash__` and `__eq__` (a string
//! enumeration does), so it is first made an exact `str` with the same characters.
#![allow(unsafe_code)] // The C API's view of a string: its cached hash and its characters in place.

use std::marker::PhantomData;

use pdrs_core::names::text::push_character;
use pdrs_core::{Hashed, IndexMap as Map, Matches, memory};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;
use pyo3::types::{PyList, PyString, PyTuple};

use crate::python::memory::new_text;
use crate::torch::hint;

/// Where the length of a `str` stands.
const LENGTH: usize = std::mem::offset_of!(ffi::PyASCIIObject, length);

/// A shared, exact `str` whose hash has been computed.
pub(crate) struct Name(Py<PyString>);

/// A borrowed, exact `str` to look a [`Name`] up by.
pub(crate) struct Query<'a, 'py>(&'a Bound<'py, PyString>);

/// What lies in a list, borrowed from it: an exact `str` to look a [`Name`] up by, or something that matches none.
#[repr(transparent)]
struct Listed<'a>(*mut ffi::PyObject, PhantomData<&'a ()>);

impl Name {
    pub(crate) fn new(text: Bound<'_, PyString>) -> Self {
        hash(text.as_ptr());
        Self(text.unbind())
    }

    pub(crate) fn clone_ref(&self, py: Python<'_>) -> Self {
        Self(self.0.clone_ref(py))
    }

    /// Begins to load the object, for a reference to it that will be taken.
    pub(crate) fn prefetch_object(&self) {
        // The count of references stands in front, and often in another cache line than hash and characters.
        hint(self.0.as_ptr() as usize);
        self.prefetch();
    }

    pub(crate) fn full_hash(&self) -> u64 {
        full_hash(self.0.as_ptr())
    }

    pub(crate) fn is(&self, text: &Bound<'_, PyString>) -> bool {
        self.0.is(text)
    }

    pub(crate) fn text<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.0.bind(py).clone()
    }

    /// Hands the characters in UTF-8, surrogates too, as Python's error handler `surrogatepass` writes them.
    ///
    /// `buffer` is used where they do not lie in memory like that.
    pub(crate) fn with_utf8<R>(&self, py: Python<'_>, buffer: &mut Vec<u8>, take: impl FnOnce(&[u8]) -> R) -> R {
        let text = self.0.bind(py);
        if let Some(ascii) = ascii_of(text) {
            return take(ascii);
        }
        buffer.clear();
        each_character(text, |character| push_character(character, buffer));
        take(buffer)
    }

    /// The name that [`with_utf8`](Self::with_utf8) handed out; an error if the bytes are no such name.
    pub(crate) fn from_utf8(py: Python<'_>, bytes: &[u8]) -> PyResult<Self> {
        // Python has one object for each `str` of one character.
        if bytes.len() > 1 && bytes.is_ascii() {
            return Ok(Self::new(ascii(py, bytes)?));
        }
        if let Ok(text) = std::str::from_utf8(bytes) {
            return Ok(Self::new(new_text(py, text)?));
        }
        Ok(Self::new(with_surrogates(py, bytes)?))
    }

    pub(crate) fn into_text(self, py: Python<'_>) -> Bound<'_, PyString> {
        self.0.into_bound(py)
    }
}

impl<'a, 'py> From<&'a Bound<'py, PyString>> for Query<'a, 'py> {
    fn from(text: &'a Bound<'py, PyString>) -> Self {
        Self(text)
    }
}

impl Hashed for Name {
    fn hash(&self) -> u32 {
        hash(self.0.as_ptr())
    }

    fn prefetch(&self) {
        // The length stands in the object, and short characters behind it, mostly in the same cache line.
        hint(self.0.as_ptr() as usize + LENGTH);
    }

    fn prefetch_place<T>(place: &T) {
        hint(std::ptr::from_ref(place) as usize);
    }
}

impl Hashed for Query<'_, '_> {
    fn hash(&self) -> u32 {
        hash(self.0.as_ptr())
    }
}

impl Matches<Self> for Name {
    fn matches(&self, query: &Self) -> bool {
        same(self.0.as_ptr(), query.0.as_ptr())
    }
}

impl Matches<Query<'_, '_>> for Name {
    fn matches(&self, query: &Query<'_, '_>) -> bool {
        same(self.0.as_ptr(), query.0.as_ptr())
    }
}

impl Listed<'_> {
    fn is_exact_text(&self) -> bool {
        // SAFETY: the list keeps the object alive as long as the borrow.
        unsafe { ffi::PyUnicode_CheckExact(self.0) != 0 }
    }
}

impl Hashed for Listed<'_> {
    fn hash(&self) -> u32 {
        if self.is_exact_text() { hash(self.0) } else { 0 }
    }

    fn prefetch(&self) {
        // The type stands in front, and often in another cache line than hash and characters.
        hint(self.0 as usize);
        hint(self.0 as usize + LENGTH);
    }
}

impl Matches<Listed<'_>> for Name {
    fn matches(&self, query: &Listed<'_>) -> bool {
        query.is_exact_text() && same(self.0.as_ptr(), query.0)
    }
}

/// What `convert` makes of the value of each name in a list or tuple of nothing but exact `str`, in their order, or of
/// `None` for one that is not there; `None` for anything else.
///
/// The names stay in the list: to take a reference to each and give it back would write to all of them.
pub(crate) fn find_listed<V: Copy, T>(
    map: &Map<Name, V>,
    names: &Bound<'_, PyAny>,
    convert: impl Fn(Option<V>) -> T,
) -> pdrs_core::Result<Option<Vec<T>>> {
    // Without a GIL it keeps other threads from changing the list; with one it does nothing.
    with_critical_section(names, || {
        // SAFETY: a list and a tuple hold as many pointers to live objects as they are long, in a row (a list without
        // any may have no memory), and `Listed` is laid out as such a pointer. Nothing changes them meanwhile: to look
        // an exact `str` up, and to look at the type of anything else, runs no Python code.
        let listed: &[Listed<'_>] = unsafe {
            if let Ok(list) = names.cast_exact::<PyList>() {
                let items = (*list.as_ptr().cast::<ffi::PyListObject>()).ob_item;
                if items.is_null() { &[] } else { std::slice::from_raw_parts(items.cast(), list.len()) }
            } else {
                let Ok(tuple) = names.cast_exact::<PyTuple>() else {
                    return Ok(None);
                };
                let items = &raw const (*tuple.as_ptr().cast::<ffi::PyTupleObject>()).ob_item;
                std::slice::from_raw_parts(items.cast(), tuple.len())
            }
        };
        let mut values = memory::with_capacity(listed.len())?;
        let mut all_found = true;
        map.get_many(listed, |_, value| {
            all_found &= value.is_some();
            values.push(convert(value.copied()));
        });
        Ok((all_found || listed.iter().all(Listed::is_exact_text)).then_some(values))
    })
}

/// Begins to load what lies at a place of a list, if there is one.
pub(crate) fn prefetch_listed(list: &Bound<'_, PyList>, at: usize) {
    // Without a GIL it keeps other threads from changing the list; with one it does nothing.
    with_critical_section(list, || {
        if at < list.len() {
            // SAFETY: the list is as long as that, and nothing changes it meanwhile. What lies there is not looked at.
            let object = unsafe { *(*list.as_ptr().cast::<ffi::PyListObject>()).ob_item.add(at) };
            hint(object as usize);
            hint(object as usize + LENGTH);
        }
    });
}

/// Whether one string stands in front of another, or is equal to it, in Python's order: that of the code points.
pub(crate) fn precedes(one: &Bound<'_, PyString>, other: &Bound<'_, PyString>) -> PyResult<bool> {
    match (latin1(one), latin1(other)) {
        (Some(one), Some(other)) => Ok(one <= other),
        _ => one.le(other),
    }
}

/// The `str` of ASCII characters: Python's decoder would look at them once more, and copy them as this does.
fn ascii<'py>(py: Python<'py>, characters: &[u8]) -> PyResult<Bound<'py, PyString>> {
    let length = ffi::Py_ssize_t::try_from(characters.len())?;
    // SAFETY: a new `str` of that length, which nobody else has seen, has one byte for each character if the largest is
    // below 128; all of them are written.
    unsafe {
        let text =
            Bound::from_owned_ptr_or_err(py, ffi::PyUnicode_New(length, 0x7f))?.cast_into_unchecked::<PyString>();
        let data = ffi::PyUnicode_DATA(text.as_ptr()).cast::<u8>();
        std::ptr::copy_nonoverlapping(characters.as_ptr(), data, characters.len());
        Ok(text)
    }
}

/// The `str` of characters in UTF-8, surrogates too.
fn with_surrogates<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyString>> {
    let length = ffi::Py_ssize_t::try_from(bytes.len())?;
    // SAFETY: these are so many bytes, which are copied; a new reference is given, or an error raised.
    unsafe {
        let made = ffi::PyUnicode_DecodeUTF8(bytes.as_ptr().cast(), length, c"surrogatepass".as_ptr());
        Ok(Bound::from_owned_ptr_or_err(py, made)?.cast_into_exact::<PyString>()?)
    }
}

/// The characters of an exact `str` that needs one byte for each.
fn latin1<'a>(text: &'a Bound<'_, PyString>) -> Option<&'a [u8]> {
    let text = text.as_ptr();
    // SAFETY: `text` is a live `str`, kept alive and unchanged as long as the borrow; the kind says that its length
    // counts bytes.
    unsafe {
        let length = ffi::PyUnicode_GET_LENGTH(text).unsigned_abs();
        (ffi::PyUnicode_KIND(text) == ffi::PyUnicode_1BYTE_KIND)
            .then(|| std::slice::from_raw_parts(ffi::PyUnicode_DATA(text).cast(), length))
    }
}

/// The characters of an exact `str` of nothing but ASCII.
fn ascii_of<'a>(text: &'a Bound<'_, PyString>) -> Option<&'a [u8]> {
    // SAFETY: `text` is a live `str`, which knows whether it is ASCII.
    if unsafe { ffi::PyUnicode_IS_ASCII(text.as_ptr()) } == 0 {
        return None;
    }
    latin1(text)
}

/// Hands the code points of an exact `str` to `take`.
fn each_character(text: &Bound<'_, PyString>, mut take: impl FnMut(u32)) {
    let text = text.as_ptr();
    // SAFETY: `text` is a live `str`, kept alive and unchanged as long as the borrow; its length counts characters, and
    // its kind says which numbers they are.
    unsafe {
        let (length, data) = (ffi::PyUnicode_GET_LENGTH(text).unsigned_abs(), ffi::PyUnicode_DATA(text));
        match ffi::PyUnicode_KIND(text) {
            ffi::PyUnicode_1BYTE_KIND => {
                for one in std::slice::from_raw_parts(data.cast::<u8>(), length) {
                    take(u32::from(*one));
                }
            }
            ffi::PyUnicode_2BYTE_KIND => {
                for one in std::slice::from_raw_parts(data.cast::<u16>(), length) {
                    take(u32::from(*one));
                }
            }
            _ => {
                for one in std::slice::from_raw_parts(data.cast::<u32>(), length) {
                    take(*one);
                }
            }
        }
    }
}

/// The object as an exact `str`, or `None` if it is no `str` at all.
pub(crate) fn exact_text<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyString>>> {
    if let Ok(text) = object.cast_exact::<PyString>() {
        return Ok(Some(text.clone()));
    }
    if object.cast::<PyString>().is_err() {
        return Ok(None);
    }
    let py = object.py();
    let text = py.get_type::<PyString>().call_method1(intern!(py, "__str__"), (object,))?;
    Ok(Some(text.cast_into_exact::<PyString>()?))
}

/// The object as an exact `str`; a `TypeError` that says what came instead otherwise.
pub(crate) fn to_text<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
    match exact_text(object)? {
        Some(text) => Ok(text),
        None => Err(PyTypeError::new_err(format!("names must be str, got {}", object.get_type().name()?))),
    }
}

fn hash(text: *mut ffi::PyObject) -> u32 {
    let hash = full_hash(text);
    (hash ^ (hash >> 32)) as u32
}

fn full_hash(text: *mut ffi::PyObject) -> u64 {
    // SAFETY: `text` is an exact `str` kept alive by its `Name`, `Query` or list, and so begins as every `str` does.
    // Hashing one runs no Python code, and cannot fail; afterwards the hash stands in it. -1 says that it does not yet.
    let hash = unsafe {
        let cached = (*text.cast::<ffi::PyASCIIObject>()).hash;
        if cached == -1 { ffi::PyObject_Hash(text) } else { cached }
    };
    hash.cast_unsigned() as u64
}

fn same(one: *mut ffi::PyObject, other: *mut ffi::PyObject) -> bool {
    if one == other {
        return true;
    }
    // SAFETY: both are exact `str` objects kept alive by their `Name`, `Query` or list; a `str` never changes, its
    // length counts characters of `kind` bytes each, and equal strings have the same kind.
    unsafe {
        let (length, kind) = (ffi::PyUnicode_GET_LENGTH(one), ffi::PyUnicode_KIND(one));
        if length != ffi::PyUnicode_GET_LENGTH(other) || kind != ffi::PyUnicode_KIND(other) {
            return false;
        }
        let bytes = length.unsigned_abs() * kind as usize;
        let characters = |text| std::slice::from_raw_parts(ffi::PyUnicode_DATA(text).cast::<u8>(), bytes);
        characters(one) == characters(other)
    }
}
