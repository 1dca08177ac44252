//! Headers of safetensors files for Python: reading them, stacking their tensors in tables, and writing them.

use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pdrs_core::names::codec::ROW_BITS;
use pdrs_core::names::table::NameTable;
use pdrs_core::safetensors::{Dtype, Fault, Header, HeaderError, HeaderWriter, METADATA, Stack};
use pdrs_core::{Error, MAX_TABLES, Place};
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

use crate::files::shard_index::ShardIndex;
use crate::index_map::IndexMap;
use crate::python::memory::{self, OrRaise, new_list, new_text};

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct SafetensorsHeader {
    pub(crate) header: Arc<Header>,
}

/// Dtype, shape, and the range of bytes in the file.
type Entry<'py> = (&'static str, Bound<'py, PyTuple>, u64, u64);

/// The dtypes and shapes of tensors, and the number of each tensor's.
pub(crate) type Kinds<'py> = (Vec<(&'static str, Bound<'py, PyTuple>)>, Bound<'py, PyArray1<u32>>);

fn unreadable(error: &HeaderError) -> PyErr {
    match error.fault {
        Fault::Memory => PyMemoryError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

#[pymethods]
impl SafetensorsHeader {
    #[new]
    fn new(py: Python<'_>, header: PyReadonlyArray1<'_, u8>, file_bytes: u64) -> PyResult<Self> {
        let header = header.as_slice()?;
        let read = py.detach(|| Header::read(header, file_bytes));
        Ok(Self { header: Arc::new(read.map_err(|error| unreadable(&error))?) })
    }

    #[staticmethod]
    fn size(prefix: &[u8], file_bytes: u64) -> PyResult<u64> {
        Header::size(prefix, file_bytes).map_err(|error| unreadable(&error))
    }

    fn __len__(&self) -> usize {
        self.header.len()
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metadata = PyDict::new(py);
        for (key, value) in self.header.metadata() {
            metadata.set_item(new_text(py, key)?, new_text(py, value)?)?;
        }
        Ok(metadata)
    }

    fn entry<'py>(&self, name: &Bound<'py, PyString>) -> PyResult<Option<Entry<'py>>> {
        // A name with half of a surrogate pair is in no file.
        let Some(number) = name.to_str().ok().and_then(|name| self.header.find(name)) else {
            return Ok(None);
        };
        let kind = self.header.kind(number);
        let (start, stop) = self.header.bytes(number);
        Ok(Some((kind.dtype.name(), PyTuple::new(name.py(), &kind.shape)?, start, stop)))
    }

    fn names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        new_list(py, (0..self.header.len()).map(|number| new_text(py, self.header.name(number))))
    }

    fn names_ending<'py>(&self, py: Python<'py>, ending: &str) -> PyResult<Bound<'py, PyList>> {
        let names = (0..self.header.len()).map(|number| self.header.name(number));
        let found = PyList::empty(py);
        for name in names.filter(|name| name.ends_with(ending)) {
            found.append(new_text(py, name)?)?;
        }
        Ok(found)
    }

    fn kinds<'py>(&self, py: Python<'py>) -> PyResult<Kinds<'py>> {
        let kind_of = memory::collect((0..self.header.len()).map(|number| self.header.kind_number(number) as u32))?;
        let kinds = self.header.kinds().iter();
        let kinds = memory::try_collect(kinds.map(|kind| Ok((kind.dtype.name(), PyTuple::new(py, &kind.shape)?))))?;
        Ok((kinds, PyArray1::from_vec(py, kind_of)))
    }

    fn stack(&self, py: Python<'_>, prefix: &str) -> PyResult<SafetensorsStack> {
        let header = &self.header;
        // What is the prefix itself has no name without it.
        let goes_on = |name: &str| name.starts_with(prefix) && (name.len() > prefix.len() || prefix.is_empty());
        let stack = py.detach(|| Stack::new(header, |number| goes_on(header.name(number)))).or_raise()?;
        Ok(SafetensorsStack { header: Arc::clone(header), stack, stripped: prefix.len() })
    }
}

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct SafetensorsStack {
    header: Arc<Header>,
    stack: Stack,
    /// The bytes at the beginning of names that are left out.
    stripped: usize,
}

/// A table of a stack: dtype, the shape of a row, the number of rows, and where it begins if its rows lie together.
type Table<'py> = (&'static str, Bound<'py, PyTuple>, u64, Option<u64>);

impl SafetensorsStack {
    /// The name of each tensor in the file, its table and its row.
    fn named(&self) -> impl Iterator<Item = (&str, u32, u64)> {
        let rows = self.stack.table_of.iter().zip(&self.stack.row_of);
        self.stack.tensors.iter().zip(rows).map(|(&tensor, (&table, &row))| (self.header.name(tensor), table, row))
    }
}

#[pymethods]
impl SafetensorsStack {
    fn tables<'py>(&self, py: Python<'py>) -> PyResult<Vec<Table<'py>>> {
        let tables = self.stack.tables.iter();
        let described = tables.map(|table| {
            let kind = &self.header.kinds()[table.kind];
            Ok((kind.dtype.name(), PyTuple::new(py, &kind.shape)?, table.rows, table.start))
        });
        memory::try_collect(described)
    }

    fn index(&self) -> PyResult<IndexMap> {
        let entries = self.named().map_while(|(name, table, row)| {
            let place = Place::new(table as usize, row)?;
            Some((&name[self.stripped..], place))
        });
        let made = NameTable::of_distinct(entries).or_raise()?;
        let names = made.map_err(|_| PyValueError::new_err("a tensor is listed twice"))?;
        if names.len() < self.stack.tensors.len() {
            return Err(memory::refused(Error::Tables { limit: MAX_TABLES }));
        }
        Ok(IndexMap::of(names))
    }

    fn add_names(
        &self,
        index: &Bound<'_, IndexMap>,
        numbers: Vec<u32>,
        first_rows: Vec<u64>,
        listed: Option<(Bound<'_, ShardIndex>, u32)>,
    ) -> PyResult<()> {
        if numbers.len() != self.stack.tables.len() || first_rows.len() != numbers.len() {
            return Err(PyValueError::new_err("expected a number and a first row for each table"));
        }
        let count = self.stack.tensors.len();
        let (mut names, mut ids) = (memory::with_capacity(count)?, memory::with_capacity(count)?);
        for (name, table, row) in self.named() {
            if listed.as_ref().is_some_and(|(listed, shard)| listed.get().index.find(name) != Some(*shard)) {
                continue;
            }
            let (number, row) = (numbers[table as usize], first_rows[table as usize] + row);
            names.push(&name[self.stripped..]);
            ids.push((u64::from(number) << ROW_BITS | row).cast_signed());
        }
        index.get().insert_all(index.py(), &names, &ids)
    }

    fn spans(&self, gap: u64) -> PyResult<Vec<(u64, u64)>> {
        self.stack.spans(&self.header, gap).or_raise()
    }

    fn copy_block(
        &self,
        block: PyReadonlyArray1<'_, u8>,
        start: u64,
        mut targets: Vec<PyReadwriteArray1<'_, u8>>,
    ) -> PyResult<()> {
        let tables = &self.stack.tables;
        let expected = tables.iter().map(|table| match table.start {
            Some(_) => 0,
            None => self.header.kinds()[table.kind].bytes * table.rows,
        });
        if !expected.eq(targets.iter().map(|target| target.as_array().len() as u64)) {
            return Err(PyValueError::new_err("expected the bytes of each table that is to be copied"));
        }
        let mut slices = memory::with_capacity(targets.len())?;
        for target in &mut targets {
            slices.push(target.as_slice_mut()?);
        }
        self.stack.copy_block(&self.header, block.as_slice()?, start, &mut slices);
        Ok(())
    }
}

/// The dtypes and shapes of tensors as Python gives them.
type GivenKinds = Vec<(String, Vec<u64>)>;

/// Of each kind, the text that a header has for it, and the size of a tensor.
fn described(kinds: GivenKinds) -> PyResult<Vec<(String, u64)>> {
    let described = kinds.into_iter().map(|(name, shape)| {
        let dtype = Dtype::from_name(&name).ok_or_else(|| PyValueError::new_err(format!("no dtype '{name}'")))?;
        let bytes = dtype.bytes_of(&shape).map_err(|fault| PyValueError::new_err(fault.to_string()))?;
        Ok((HeaderWriter::like(dtype, &shape), bytes))
    });
    memory::try_collect(described)
}

/// The kind of each of so many names; an error if there are more or fewer, or one is not there.
fn checked<'a>(kind_of: &'a PyReadonlyArray1<'_, u32>, names: usize, kinds: usize) -> PyResult<&'a [u32]> {
    let kind_of = kind_of.as_slice()?;
    if kind_of.len() == names && kind_of.iter().all(|kind| (*kind as usize) < kinds) {
        return Ok(kind_of);
    }
    Err(PyValueError::new_err("expected one of the kinds for each name"))
}

/// The entries of a header for some tensors, and where the data of the next one begin.
#[pyfunction]
pub(crate) fn safetensors_entries<'py>(
    py: Python<'py>,
    names: &Bound<'py, PyList>,
    kinds: GivenKinds,
    kind_of: PyReadonlyArray1<'py, u32>,
    range: (usize, usize),
    start: u64,
) -> PyResult<(Bound<'py, PyArray1<u8>>, u64)> {
    let kinds = described(kinds)?;
    let kind_of = checked(&kind_of, names.len(), kinds.len())?;
    let mut writer = HeaderWriter::default();
    let stop = range.1.min(names.len());
    writer.reserve(stop.saturating_sub(range.0), 16 * stop.saturating_sub(range.0)).or_raise()?;
    let mut start = start;
    for at in range.0..stop {
        let (like, bytes) = &kinds[kind_of[at] as usize];
        let stop = start.checked_add(*bytes).ok_or_else(|| PyValueError::new_err("the tensors are too large"))?;
        writer.push(names.get_item(at)?.cast::<PyString>()?.to_str()?, like, start, stop).or_raise()?;
        start = stop;
    }
    Ok((PyArray1::from_vec(py, writer.take()), start))
}

/// Cuts tensors into shards: how many of the first belong to the first, and the bytes of their part of its header.
#[pyfunction]
pub(crate) fn safetensors_shards(
    names: &Bound<'_, PyList>,
    kinds: GivenKinds,
    kind_of: PyReadonlyArray1<'_, u32>,
    header_bytes: usize,
    data_bytes: u64,
) -> PyResult<Vec<(usize, usize)>> {
    let kinds = described(kinds)?;
    let kind_of = checked(&kind_of, names.len(), kinds.len())?;
    let mut shards = Vec::new();
    let (mut tensors, mut header, mut data) = (0, 0, 0_u64);
    for (name, kind) in names.iter().zip(kind_of) {
        let (like, bytes) = &kinds[*kind as usize];
        let name = name.cast::<PyString>()?.to_str()?;
        if name == METADATA {
            return Err(PyValueError::new_err(format!(
                "no tensor can have the name '{METADATA}' in a safetensors file"
            )));
        }
        let mut stop = data.saturating_add(*bytes);
        let mut entry = HeaderWriter::bytes_of(name, like, data, stop);
        if tensors > 0 && (header + entry > header_bytes || stop > data_bytes) {
            memory::push(&mut shards, (tensors, header))?;
            stop = *bytes;
            entry = HeaderWriter::bytes_of(name, like, 0, stop);
            (tensors, header) = (0, 0);
        }
        tensors += 1;
        header += entry;
        data = stop;
    }
    if tensors > 0 {
        shards.push((tensors, header));
    }
    Ok(shards)
}
