//! What `str` is asked of many keys, in place: none of it runs Python code, whatever the class of the `str`.

use std::ops::Range;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PySlice, PyString};

use crate::python::cpython::{Characters, Text, new_ascii};

impl Characters<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Ascii(all) | Self::Latin1(all) => all.len(),
            Self::TwoBytes(all) => all.len(),
            Self::FourBytes(all) => all.len(),
        }
    }

    /// The bytes that they take in UTF-8, where each surrogate takes three.
    pub(crate) fn utf8_len(&self) -> usize {
        let bytes = |character: u32| match character {
            0..0x80 => 1,
            0x80..0x800 => 2,
            0x800..0x1_0000 => 3,
            _ => 4,
        };
        match self {
            Self::Ascii(all) => all.len(),
            _ => (0..self.len()).map(|at| bytes(self.at(at))).sum(),
        }
    }

    /// A code point.
    fn at(&self, at: usize) -> u32 {
        match self {
            Self::Ascii(all) | Self::Latin1(all) => u32::from(all[at]),
            Self::TwoBytes(all) => u32::from(all[at]),
            Self::FourBytes(all) => all[at],
        }
    }

    /// Whether the characters of another text stand here from a place on.
    fn has(&self, part: &Self, start: usize) -> bool {
        let end = start + part.len();
        if end > self.len() {
            return false;
        }
        match (self, part) {
            (Self::Ascii(all) | Self::Latin1(all), Self::Ascii(part) | Self::Latin1(part)) => &all[start..end] == *part,
            (Self::TwoBytes(all), Self::TwoBytes(part)) => &all[start..end] == *part,
            _ => (0..part.len()).all(|at| self.at(start + at) == part.at(at)),
        }
    }
}

fn characters<'a>(text: &'a Bound<'_, PyString>) -> Characters<'a> {
    Text::of(text.as_unbound()).characters
}

pub(crate) fn length(text: &Bound<'_, PyString>) -> usize {
    characters(text).len()
}

pub(crate) fn is_empty(text: &Bound<'_, PyString>) -> bool {
    length(text) == 0
}

pub(crate) fn starts_with(text: &Bound<'_, PyString>, part: &Bound<'_, PyString>) -> bool {
    characters(text).has(&characters(part), 0)
}

/// Whether a text is one and then another.
pub(crate) fn joins(text: &Bound<'_, PyString>, one: &Bound<'_, PyString>, other: &Bound<'_, PyString>) -> bool {
    let (text, one, other) = (characters(text), characters(one), characters(other));
    // Names differ at the end more often than at the beginning.
    text.len() == one.len() + other.len() && text.has(&other, one.len()) && text.has(&one, 0)
}

/// Where the first dot is.
pub(crate) fn find_dot(text: &Bound<'_, PyString>) -> Option<usize> {
    const DOT: u32 = '.' as u32;
    match characters(text) {
        Characters::Ascii(all) | Characters::Latin1(all) => all.iter().position(|one| *one == b'.'),
        all => (0..all.len()).find(|at| all.at(*at) == DOT),
    }
}

/// The characters in a range.
pub(crate) fn part_of<'py>(text: &Bound<'py, PyString>, range: Range<usize>) -> PyResult<Bound<'py, PyString>> {
    let py = text.py();
    let all = characters(text);
    if range == (0..all.len()) {
        return Ok(text.clone());
    }
    if let Characters::Ascii(all) = all
        && let Some(part) = new_ascii(py, &all[range.clone()])?
    {
        return Ok(part);
    }
    let slice = PySlice::new(py, range.start.cast_signed(), range.end.cast_signed(), 1);
    Ok(py.get_type::<PyString>().call_method1(intern!(py, "__getitem__"), (text, slice))?.cast_into()?)
}
