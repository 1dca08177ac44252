//! Shard indexes for Python: reading them, comparing them with the shards, and writing them.

use std::collections::HashMap;

use numpy::PyArray1;
use pdrs_core::safetensors::{Fault, HeaderWriter, IndexError, ShardIndex as Index};
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString, PyTuple};

use crate::files::safetensors::{Kinds, SafetensorsHeader};
use crate::python::memory::{self, OrRaise, new_list, new_text};

#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct ShardIndex {
    pub(crate) index: Index,
}

#[pymethods]
impl ShardIndex {
    #[new]
    fn new(py: Python<'_>, text: &Bound<'_, PyBytes>) -> PyResult<Self> {
        let text = text.as_bytes();
        let read = py.detach(|| Index::read(text));
        let index = read.map_err(|error| match error {
            IndexError::Unreadable { fault: Fault::Memory, .. } => PyMemoryError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        })?;
        Ok(Self { index })
    }

    fn __len__(&self) -> usize {
        self.index.len()
    }

    #[getter]
    fn shards(&self) -> Vec<&str> {
        self.index.shards().iter().map(String::as_str).collect()
    }

    #[getter]
    fn metadata(&self) -> &str {
        self.index.metadata()
    }

    fn counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.index.shards().len()];
        self.index.shard_of().iter().for_each(|shard| counts[*shard as usize] += 1);
        counts
    }

    fn names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        new_list(py, (0..self.index.len()).map(|number| new_text(py, self.index.name(number))))
    }

    fn names_ending<'py>(&self, py: Python<'py>, ending: &str) -> PyResult<Bound<'py, PyList>> {
        let names = (0..self.index.len()).map(|number| self.index.name(number));
        let found = PyList::empty(py);
        for name in names.filter(|name| name.ends_with(ending)) {
            found.append(new_text(py, name)?)?;
        }
        Ok(found)
    }

    fn find(&self, name: &Bound<'_, PyString>) -> Option<u32> {
        // A name with half of a surrogate pair is in no file.
        self.index.find(name.to_str().ok()?)
    }

    fn missing(&self, py: Python<'_>, headers: Vec<Bound<'_, SafetensorsHeader>>) -> Option<(u32, &str)> {
        let headers: Vec<_> = headers.iter().map(|header| &*header.get().header).collect();
        py.detach(|| self.index.missing(&headers))
    }

    fn kinds<'py>(&self, py: Python<'py>, headers: Vec<Bound<'py, SafetensorsHeader>>) -> PyResult<Kinds<'py>> {
        let headers: Vec<_> = headers.iter().map(|header| &*header.get().header).collect();
        let (mut kinds, mut known) = (Vec::new(), HashMap::new());
        // By shard and its own number; most kinds are in all shards.
        let mut renamed: Vec<Vec<Option<u32>>> =
            headers.iter().map(|header| vec![None; header.kinds().len()]).collect();
        let mut kind_of = memory::with_capacity(self.index.len())?;
        for (number, &shard) in self.index.shard_of().iter().enumerate() {
            let name = self.index.name(number);
            let header = headers.get(shard as usize);
            let tensor = header.and_then(|header| Some((header, header.find(name)?)));
            let Some((header, tensor)) = tensor else {
                return Err(PyValueError::new_err(format!("no tensor {name:?}")));
            };
            let number = &mut renamed[shard as usize][header.kind_number(tensor)];
            kind_of.push(*number.get_or_insert_with(|| {
                let kind = header.kind(tensor);
                *known.entry(kind).or_insert_with(|| {
                    kinds.push(kind);
                    kinds.len() as u32 - 1
                })
            }));
        }
        let kinds = kinds.iter().map(|kind| Ok((kind.dtype.name(), PyTuple::new(py, &kind.shape)?)));
        Ok((kinds.collect::<PyResult<_>>()?, PyArray1::from_vec(py, kind_of)))
    }
}

/// The lines of an index that say which file some names are in.
#[pyfunction]
pub(crate) fn shard_lines<'py>(
    py: Python<'py>,
    names: &Bound<'py, PyList>,
    range: (usize, usize),
    file: &str,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let mut writer = HeaderWriter::default();
    for at in range.0..range.1.min(names.len()) {
        writer.push_line(names.get_item(at)?.cast::<PyString>()?.to_str()?, file).or_raise()?;
    }
    Ok(PyArray1::from_vec(py, writer.take()))
}
