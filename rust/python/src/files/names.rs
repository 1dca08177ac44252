//! Packed names, their deltas, checksums, and a comparison of tables row by row, for Python.

use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pdrs_core::Place;
use pdrs_core::names::codec::{self, Encoder, Header, Names, Table};
use pdrs_core::names::table::NameTable;
use pdrs_core::names::text::Text;
use pdrs_core::names::{delta, order};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString};

use std::cell::RefCell;
use std::sync::Arc;

use crate::index_map::{IndexMap, checked_row};
use crate::python::memory::{self, OrRaise};
use crate::python::name::{Utf8Name, text_of_utf8, with_utf8};
use crate::python::names::to_names;
use crate::stacked::places::Places;
use crate::stacked::row_index::RowIndex;

/// A table as Python has it: attribute, group, whether it is trainable, and the number of used rows.
pub(crate) type TableTuple<'py> = (Bound<'py, PyString>, u64, bool, u64);

fn to_utf8(text: &Bound<'_, PyString>) -> Vec<u8> {
    let mut bytes = Vec::new();
    with_utf8(text.as_unbound(), &mut Vec::new(), |utf8| bytes.extend_from_slice(utf8));
    bytes
}

fn from_utf8<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyString>> {
    text_of_utf8(py, bytes)
}

pub(crate) fn to_header(tables: Vec<TableTuple<'_>>, patterns: &[Bound<'_, PyString>]) -> Header {
    let to_table =
        |(attribute, group, trainable, used)| Table { attribute: to_utf8(&attribute), group, trainable, used };
    Header { tables: tables.into_iter().map(to_table).collect(), patterns: patterns.iter().map(to_utf8).collect() }
}

/// Names in order, with their places or without.
#[derive(FromPyObject)]
pub(crate) enum Named<'py> {
    #[pyo3(transparent)]
    Rows(Bound<'py, RowIndex>),
    #[pyo3(transparent)]
    Names(Bound<'py, PyList>),
}

impl Named<'_> {
    fn for_each_utf8(&self, py: Python<'_>, mut take: impl FnMut(&[u8])) -> PyResult<()> {
        match self {
            Self::Rows(index) => index.get().for_each_utf8(py, |name, _| take(name)),
            Self::Names(names) => {
                to_names::<Utf8Name>(names)?.iter().for_each(|name| name.with_utf8(&mut take));
                Ok(())
            }
        }
    }
}

/// The packed names of an index, with its places or others.
#[pyfunction]
#[pyo3(signature = (index, tables, patterns, places = None))]
pub(crate) fn pack_names<'py>(
    py: Python<'py>,
    index: Named<'py>,
    tables: Vec<TableTuple<'py>>,
    patterns: Vec<Bound<'py, PyString>>,
    places: Option<Bound<'py, Places>>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let header = to_header(tables, &patterns);
    let places = match (&places, &index) {
        (Some(places), _) => places.get().found().clone(),
        (None, Named::Rows(index)) => Arc::new(index.get().all_places(py)?),
        (None, Named::Names(_)) => return Err(PyValueError::new_err("names in a list have no places: expected some")),
    };
    let ids = || places.iter().map(|place| place.map_or(0, pdrs_core::Place::id));
    let is_plain = ids().enumerate().all(|(at, id)| at as u64 == id);
    let listed = if is_plain { None } else { Some(memory::collect(ids())?.into_iter()) };
    let count = places.len();
    let mut encoder = Encoder::new(&header, count, listed, 16 * count).or_raise()?;
    let (mut pushed, mut refused) = (0, None);
    index.for_each_utf8(py, |name| {
        pushed += 1;
        if refused.is_none()
            && let Err(error) = encoder.push(name)
        {
            refused = Some(error);
        }
    })?;
    if pushed != count {
        return Err(PyValueError::new_err(format!("got {pushed} names and {count} places")));
    }
    if let Some(error) = refused {
        return Err(memory::refused(error));
    }
    Ok(PyArray1::from_vec(py, encoder.finish()))
}

/// The packed names, each after a prefix, with their ids, the tables and the patterns.
#[pyfunction]
#[pyo3(signature = (packed, prefix = None))]
#[allow(clippy::type_complexity)]
pub(crate) fn unpack_names<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'py, u8>,
    prefix: Option<&Bound<'py, PyString>>,
) -> PyResult<(IndexMap, Vec<TableTuple<'py>>, Vec<Bound<'py, PyString>>)> {
    let packed = packed.as_slice()?;
    let (header, names) = py.detach(|| codec::decode(packed)).or_raise()?;
    let index = to_index(&names, prefix)?;
    let (tables, patterns) = from_header(py, header)?;
    Ok((index, tables, patterns))
}

fn to_index(names: &Names<'_>, prefix: Option<&Bound<'_, PyString>>) -> PyResult<IndexMap> {
    names.iter().try_for_each(|(_, id)| checked_row(id.cast_signed()).map(drop))?;
    let prefix = prefix.map(to_utf8).unwrap_or_default();
    let longest = names.iter().map(|(name, _)| prefix.len() + name.len()).max();
    let buffer = RefCell::new(memory::with_capacity(longest.unwrap_or(0))?);
    let behind = |(name, id)| Some((Behind { prefix: &prefix, name, buffer: &buffer }, Place::of_id(id)?));
    if let Ok(table) = NameTable::of_distinct(names.iter().map_while(behind)).or_raise()? {
        return Ok(IndexMap::of(table));
    }
    let twice = names.repeated().and_then(|at| names.iter().nth(at));
    let name = twice.map(|(name, _)| String::from_utf8_lossy(name).into_owned()).unwrap_or_default();
    Err(PyValueError::new_err(format!("the packed names are damaged: {name:?} is listed twice")))
}

/// A name behind a prefix.
struct Behind<'a> {
    prefix: &'a [u8],
    name: &'a [u8],
    buffer: &'a RefCell<Vec<u8>>,
}

impl Text for Behind<'_> {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        if self.prefix.is_empty() {
            return take(self.name);
        }
        let mut joined = self.buffer.borrow_mut();
        joined.clear();
        joined.extend_from_slice(self.prefix);
        joined.extend_from_slice(self.name);
        take(&joined)
    }
}

/// What packed names have behind their text if they get words, and how many words their header counts then.
#[pyfunction]
pub(crate) fn words_behind<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'_, u8>,
) -> PyResult<(Bound<'py, PyArray1<u8>>, u64)> {
    let packed = packed.as_slice()?;
    let (behind, count) = py.detach(|| codec::words_behind(packed)).or_raise()?;
    Ok((PyArray1::from_vec(py, behind), count))
}

/// How many bytes packed names have with words.
#[pyfunction]
pub(crate) fn searchable_size(packed: PyReadonlyArray1<'_, u8>) -> PyResult<usize> {
    Ok(codec::Parts::of(packed.as_slice()?).or_raise()?.1.searchable_len())
}

/// Packed names without words, made from some with.
#[pyfunction]
pub(crate) fn names_without_words<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'_, u8>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let packed = packed.as_slice()?;
    let made = py.detach(|| codec::without_words(packed)).or_raise()?;
    Ok(PyArray1::from_vec(py, made))
}

/// The number of packed names, the tables and the patterns.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub(crate) fn unpack_header<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'_, u8>,
) -> PyResult<(usize, Vec<TableTuple<'py>>, Vec<Bound<'py, PyString>>)> {
    let (header, parts) = codec::Parts::of(packed.as_slice()?).or_raise()?;
    let (tables, patterns) = from_header(py, header)?;
    Ok((parts.len(), tables, patterns))
}

#[allow(clippy::type_complexity)]
fn from_header(py: Python<'_>, header: Header) -> PyResult<(Vec<TableTuple<'_>>, Vec<Bound<'_, PyString>>)> {
    let from_table = |table: Table| Ok((from_utf8(py, &table.attribute)?, table.group, table.trainable, table.used));
    let tables = memory::try_collect(header.tables.into_iter().map(from_table))?;
    let patterns = memory::try_collect(header.patterns.iter().map(|pattern| from_utf8(py, pattern)))?;
    Ok((tables, patterns))
}

/// The delta from packed names to others.
#[pyfunction]
pub(crate) fn diff_names<'py>(
    py: Python<'py>,
    old: PyReadonlyArray1<'py, u8>,
    new: PyReadonlyArray1<'py, u8>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let (old, new) = (old.as_slice()?, new.as_slice()?);
    let delta = py.detach(|| delta::diff(old, new)).or_raise()?;
    Ok(PyArray1::from_vec(py, delta))
}

/// The new packed names, made from the old ones and a delta.
#[pyfunction]
pub(crate) fn apply_names<'py>(
    py: Python<'py>,
    old: PyReadonlyArray1<'py, u8>,
    delta: PyReadonlyArray1<'py, u8>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let (old, delta) = (old.as_slice()?, delta.as_slice()?);
    let new = py.detach(|| delta::apply(old, delta)).or_raise()?;
    Ok(PyArray1::from_vec(py, new))
}

/// The hash of each name, as packed names have it: the same in every process and version.
#[pyfunction]
pub(crate) fn hash_names<'py>(names: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let py = names.py();
    let names = to_names::<Utf8Name>(names)?;
    let hashes = memory::collect(names.iter().map(|name| name.with_utf8(codec::hash)))?;
    Ok(PyArray1::from_vec(py, hashes))
}

/// The places of packed names in the order of their buckets, and how many names each bucket has.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub(crate) fn names_by_bucket<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'py, u8>,
    buckets: u32,
) -> PyResult<(Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<u64>>)> {
    let packed = packed.as_slice()?;
    let (order, counts) =
        py.detach(|| codec::decode(packed).and_then(|(_, names)| order::by_bucket(&names, buckets))).or_raise()?;
    Ok((PyArray1::from_vec(py, order), PyArray1::from_vec(py, counts)))
}

/// Some of the packed names in another order, with another header and other ids, without a table of words.
#[pyfunction]
pub(crate) fn reorder_names<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'py, u8>,
    order: PyReadonlyArray1<'py, u64>,
    tables: Vec<TableTuple<'py>>,
    patterns: Vec<Bound<'py, PyString>>,
    ids: PyReadonlyArray1<'py, u64>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let header = to_header(tables, &patterns);
    let (packed, places, ids) = (packed.as_slice()?, order.as_slice()?, ids.as_slice()?);
    let made = py
        .detach(|| codec::decode(packed).and_then(|(_, names)| order::reordered(&names, &header, places, ids)))
        .or_raise()?;
    Ok(PyArray1::from_vec(py, made))
}

/// The CRC-32 of bytes, as zlib computes it; `start` is that of what came before.
#[pyfunction]
#[pyo3(signature = (data, start = 0))]
pub(crate) fn crc32(py: Python<'_>, data: PyReadonlyArray1<'_, u8>, start: u32) -> PyResult<u32> {
    let data = data.as_slice()?;
    Ok(py.detach(|| {
        let mut hasher = crc32fast::Hasher::new_with_initial(start);
        hasher.update(data);
        hasher.finalize()
    }))
}

/// Copies rows of a table, by their numbers, to where there is room for them.
#[pyfunction]
pub(crate) fn copy_rows(
    py: Python<'_>,
    table: PyReadonlyArray1<'_, u8>,
    row_bytes: usize,
    rows: PyReadonlyArray1<'_, i64>,
    mut out: PyReadwriteArray1<'_, u8>,
) -> PyResult<()> {
    let (table, rows, out) = (table.as_slice()?, rows.as_slice()?, out.as_slice_mut()?);
    py.detach(|| pdrs_core::copy_rows(table, row_bytes, rows, out)).map_err(|_| {
        let held = table.len().checked_div(row_bytes).unwrap_or_default();
        PyValueError::new_err(format!("expected rows below {held}, or -1, and room for just as many"))
    })
}

/// The rows in which two tables of as many bytes differ, ascending.
#[pyfunction]
pub(crate) fn changed_rows<'py>(
    py: Python<'py>,
    old: PyReadonlyArray1<'py, u8>,
    new: PyReadonlyArray1<'py, u8>,
    row_bytes: usize,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let (old, new) = (old.as_slice()?, new.as_slice()?);
    if row_bytes == 0 || old.len() != new.len() || !old.len().is_multiple_of(row_bytes) {
        let (old, new) = (old.len(), new.len());
        return Err(PyValueError::new_err(format!(
            "expected two tables of rows of {row_bytes} bytes, got {old} and {new}"
        )));
    }
    let rows = py.detach(|| {
        let pairs = old.chunks_exact(row_bytes).zip(new.chunks_exact(row_bytes)).enumerate();
        memory::collect(pairs.filter(|(_, (old, new))| old != new).map(|(row, _)| (row as u64).cast_signed()))
    })?;
    Ok(PyArray1::from_vec(py, rows))
}
