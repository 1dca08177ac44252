//! A Python `str` as a key: its cached hash, and comparison by identity or by bytes.
//!
//! Names are exact `str` objects. Hashing and comparing them runs no Python code, so both may happen while a lock is
//! held, and dropping one runs none either. A `str` subclass may define its own `__hash__` and `__eq__` (a string
//! enumeration does), so it is first made an exact `str` with the same characters.

use std::cell::Cell;

use pdrs_core::names::text::{Text as NameText, invalid_at, push_character};
use pdrs_core::{Hashed, Matches};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi::PyASCIIObject;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::python::cpython::{Characters, Text, new_ascii, new_wide};
use crate::python::memory::{self, OrRaise, new_text};
use crate::torch::bytes::hint;

pub(crate) use crate::python::cpython::{Listed, with_listed};

/// Where the hash of a `str` stands in it, behind its length.
pub(crate) const HASH: usize = std::mem::offset_of!(PyASCIIObject, hash);

/// What is no name, because it is not UTF-8.
pub(crate) const NO_NAME: [u8; 1] = [0xff];

/// Characters that may take more bytes than this are encoded once, where memory may be lacking.
const LONG: usize = 1 << 12;

/// A shared, exact `str` whose hash has been computed.
pub(crate) struct Name(Py<PyString>);

/// A shared, exact `str` to look a name of rows up by, or to make one of: of it only the characters are asked.
pub(crate) struct Utf8Name {
    text: Py<PyString>,
    /// If they are [long](is_long).
    encoded: Option<Box<[u8]>>,
}

/// What can be made of an exact `str`.
pub(crate) trait OfText: Sized {
    fn of_text(text: Bound<'_, PyString>) -> PyResult<Self>;
}

/// A borrowed, exact `str` to look a [`Name`] up by.
pub(crate) struct Query<'a, 'py>(&'a Bound<'py, PyString>);

impl Name {
    pub(crate) fn new(text: Bound<'_, PyString>) -> Self {
        // From now on it stands there.
        hash(&text);
        Self(text.unbind())
    }

    pub(crate) fn clone_ref(&self, py: Python<'_>) -> Self {
        Self(self.0.clone_ref(py))
    }

    /// Begins to load the object, for a reference to it that will be taken.
    pub(crate) fn prefetch_object(&self) {
        prefetch(&self.0);
    }

    pub(crate) fn full_hash(&self) -> u64 {
        Text::of(&self.0).hash.expect("the hash was computed when the name was made")
    }

    pub(crate) fn is(&self, text: &Bound<'_, PyString>) -> bool {
        self.0.is(text)
    }

    pub(crate) fn text<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.0.bind(py).clone()
    }

    pub(crate) fn into_text(self, py: Python<'_>) -> Bound<'_, PyString> {
        self.0.into_bound(py)
    }
}

/// The `str` with these bytes in UTF-8, in which surrogates may stand; an error if they are no such text.
pub(crate) fn text_of_utf8<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyString>> {
    if let Some(text) = new_ascii(py, bytes)? {
        return Ok(text);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => new_text(py, text),
        Err(_) => with_surrogates(py, bytes),
    }
}

/// Whether characters take a buffer that may be lacking.
fn is_long(characters: &Characters<'_>) -> bool {
    !matches!(characters, Characters::Ascii(_)) && 4 * characters.len() > LONG
}

/// Hands the characters in UTF-8 over, as [`with_utf8`] does; `None` if they are [long](is_long).
#[inline]
fn short_utf8<R>(text: &Py<PyString>, take: impl FnOnce(Option<&[u8]>) -> R) -> R {
    thread_local! {
        static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    match Text::of(text).characters {
        Characters::Ascii(ascii) => take(Some(ascii)),
        all if is_long(&all) => take(None),
        _ => {
            let mut buffer = BUFFER.take();
            let result = with_utf8(text, &mut buffer, |bytes| take(Some(bytes)));
            BUFFER.set(buffer);
            result
        }
    }
}

/// Begins to load a `str`.
pub(crate) fn prefetch(text: &Py<PyString>) {
    // The count of references stands in front, and often in another cache line than hash and characters.
    hint(text.as_ptr() as usize);
    hint(text.as_ptr() as usize + HASH);
}

/// Hands the characters in UTF-8, surrogates too, as Python's error handler `surrogatepass` writes them.
///
/// `buffer` is used where they do not lie in memory like that.
#[inline]
pub(crate) fn with_utf8<R>(text: &Py<PyString>, buffer: &mut Vec<u8>, take: impl FnOnce(&[u8]) -> R) -> R {
    buffer.clear();
    let mut push = |character: u32| push_character(character, buffer);
    match Text::of(text).characters {
        Characters::Ascii(ascii) => return take(ascii),
        Characters::Latin1(all) => all.iter().for_each(|one| push(u32::from(*one))),
        Characters::TwoBytes(all) => all.iter().for_each(|one| push(u32::from(*one))),
        Characters::FourBytes(all) => all.iter().for_each(|one| push(*one)),
    }
    take(buffer)
}

impl OfText for Name {
    fn of_text(text: Bound<'_, PyString>) -> PyResult<Self> {
        Ok(Self::new(text))
    }
}

impl OfText for Utf8Name {
    fn of_text(text: Bound<'_, PyString>) -> PyResult<Self> {
        let text = text.unbind();
        let characters = Text::of(&text).characters;
        if !is_long(&characters) {
            return Ok(Self { text, encoded: None });
        }
        let mut buffer = memory::with_capacity(characters.utf8_len())?;
        with_utf8(&text, &mut buffer, |_| ());
        Ok(Self { text, encoded: Some(buffer.into_boxed_slice()) })
    }
}

impl Utf8Name {
    pub(crate) fn text<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.text.bind(py).clone()
    }

    /// A copy of the bytes.
    pub(crate) fn to_bytes(&self) -> PyResult<Vec<u8>> {
        self.with_utf8(|bytes| {
            let mut copied = Vec::new();
            pdrs_core::memory::append_exact(&mut copied, bytes).or_raise().map(|()| copied)
        })
    }
}

impl NameText for Utf8Name {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        match &self.encoded {
            Some(bytes) => take(bytes),
            None => short_utf8(&self.text, |bytes| take(bytes.unwrap_or(&NO_NAME))),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        same(&self.text, &other.text)
    }

    fn prefetch(&self) {
        prefetch(&self.text);
    }

    fn prefetch_place<T>(place: &T) {
        hint(std::ptr::from_ref(place) as usize);
    }
}

/// Hands the characters of a text in UTF-8 over, surrogates too.
#[inline]
pub(crate) fn with_text<R>(text: &Bound<'_, PyString>, take: impl FnOnce(&[u8]) -> R) -> PyResult<R> {
    match Text::of(text.as_unbound()).characters {
        Characters::Ascii(ascii) => Ok(take(ascii)),
        _ => Ok(Utf8Name::of_text(text.clone())?.with_utf8(take)),
    }
}

/// The ASCII characters of a `str`.
pub(crate) struct Ascii<'a>(&'a [u8]);

impl<'a> Ascii<'a> {
    /// `None` if this is no exact `str`, or has other characters.
    pub(crate) fn of(object: &'a Bound<'_, PyAny>) -> Option<Self> {
        match Text::of(object.cast_exact::<PyString>().ok()?.as_unbound()).characters {
            Characters::Ascii(ascii) => Some(Self(ascii)),
            _ => None,
        }
    }
}

impl NameText for Ascii<'_> {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        take(self.0)
    }

    fn prefetch(&self) {
        hint(self.0.as_ptr() as usize);
    }

    fn prefetch_place<T>(place: &T) {
        hint(std::ptr::from_ref(place) as usize);
    }
}

impl Listed<'_, '_> {
    /// Whether it is an exact `str` that is not [long](is_long): all others are taken for no name.
    pub(crate) fn is_plain(&self) -> bool {
        self.text().is_some_and(|text| !is_long(&Text::of(text).characters))
    }
}

impl NameText for Listed<'_, '_> {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        match self.text() {
            Some(text) => short_utf8(text, |bytes| take(bytes.unwrap_or(&NO_NAME))),
            None => take(&NO_NAME),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        self.text().zip(other.text()).is_some_and(|(one, other)| same(one, other))
    }

    fn prefetch(&self) {
        self.prefetch();
    }

    fn prefetch_place<T>(place: &T) {
        hint(std::ptr::from_ref(place) as usize);
    }
}

impl<'a, 'py> From<&'a Bound<'py, PyString>> for Query<'a, 'py> {
    fn from(text: &'a Bound<'py, PyString>) -> Self {
        Self(text)
    }
}

impl Hashed for Name {
    fn hash(&self) -> u32 {
        folded(self.full_hash())
    }
}

impl Hashed for Query<'_, '_> {
    fn hash(&self) -> u32 {
        hash(self.0)
    }
}

impl Matches<Self> for Name {
    fn matches(&self, query: &Self) -> bool {
        same(&self.0, &query.0)
    }
}

impl Matches<Query<'_, '_>> for Name {
    fn matches(&self, query: &Query<'_, '_>) -> bool {
        same(&self.0, query.0.as_unbound())
    }
}

/// Whether one string stands in front of another, or is equal to it, in Python's order: that of the code points.
pub(crate) fn precedes(one: &Bound<'_, PyString>, other: &Bound<'_, PyString>) -> PyResult<bool> {
    match (narrow(one), narrow(other)) {
        (Some(one), Some(other)) => Ok(one <= other),
        _ => one.le(other),
    }
}

/// The `str` of characters in UTF-8, surrogates too.
fn with_surrogates<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyString>> {
    if let Some(at) = invalid_at(bytes) {
        return Err(PyValueError::new_err(format!("a name is not UTF-8 at its byte {at}")));
    }
    let mut characters = memory::with_capacity(bytes.len())?;
    for byte in bytes {
        match (*byte, characters.last_mut()) {
            (tail @ 0x80..0xc0, Some(last)) => *last = *last << 6 | u32::from(tail & 0x3f),
            (ascii @ 0..0x80, _) => characters.push(u32::from(ascii)),
            (head @ 0..0xe0, _) => characters.push(u32::from(head & 0x1f)),
            (head @ 0..0xf0, _) => characters.push(u32::from(head & 0x0f)),
            (head, _) => characters.push(u32::from(head & 0x07)),
        }
    }
    new_wide(py, &characters)
}

/// The characters of a `str` that needs one byte for each.
pub(crate) fn narrow<'a>(text: &'a Bound<'_, PyString>) -> Option<&'a [u8]> {
    match Text::of(text.as_unbound()).characters {
        Characters::Ascii(all) | Characters::Latin1(all) => Some(all),
        _ => None,
    }
}

/// The object as an exact `str`, or `None` if it is no `str` at all.
#[inline]
pub(crate) fn exact_text<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyString>>> {
    // The type stands in front, and often in another cache line: both are loaded at one time.
    hint(object.as_ptr() as usize + HASH);
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

/// The hash of an exact `str`, as the map takes it.
#[inline]
pub(crate) fn hash(text: &Bound<'_, PyString>) -> u32 {
    folded(Text::of(text.as_unbound()).hash.unwrap_or_else(|| {
        // Hashing one runs no Python code.
        text.hash().expect("an exact str has a hash").cast_unsigned() as u64
    }))
}

fn folded(hash: u64) -> u32 {
    (hash ^ (hash >> 32)) as u32
}

/// Whether two exact `str` are equal.
#[inline]
pub(crate) fn same(one: &Py<PyString>, other: &Py<PyString>) -> bool {
    one.is(other) || Text::of(one).characters == Text::of(other).characters
}
