//! Rows of tables and the tensors they come from: a copy of one row, one that is written, and what many tensors have in
//! common.

use std::collections::HashMap;

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFloat, PyInt, PyList};

use crate::python::memory;
use crate::torch::Torch;
use crate::torch::bytes::{Bytes, hint};
use crate::torch::dlpack::{Dtype, Found};

/// Larger rows are left to torch, which copies them with several threads and without the GIL.
const LARGEST: usize = 1 << 16;

/// How many tensors ahead the memory of one is fetched.
const AHEAD: usize = 16;

/// A copy of one row of a table, with memory of its own; `None` if it is to be left to torch.
///
/// torch takes three times as long, for three operations: detach, select, clone.
pub(crate) fn copy_row<'py>(torch: &Torch, table: &Bound<'py, PyAny>, row: u64) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = table.py();
    let (Some(abi), Some(plain)) = (&torch.stable_abi, torch.plain(table)) else {
        return Ok(None);
    };
    let mut dims = Vec::with_capacity(8);
    let Ok(found) = torch.find(table, &mut dims)? else {
        return Ok(None);
    };
    let (shape, strides) = dims.split_at(found.ndim());
    let Some((_, row_shape)) = shape.split_first() else {
        return Ok(None);
    };
    let Some(bytes) = row_of(&found, shape, row).filter(|bytes| (1..=LARGEST).contains(&bytes.len())) else {
        return Ok(None);
    };
    // The row of a random name is in no cache, and to make a tensor takes as long as to load it.
    hint(bytes.address());
    let (made, memory) = abi.empty(abi.dtype(found.dtype(), plain)?, row_shape, &strides[1..])?;
    // The new tensor has the row's shape and dtype.
    bytes.copy_to(memory.part(0, bytes.len()));
    abi.to_python(py, &made, false).map(Some)
}

/// The bytes of a row of a table that is contiguous and on the CPU; `None` if it is another one, or has no such row.
fn row_of(table: &Found, shape: &[i64], row: u64) -> Option<Bytes> {
    let capacity = shape.first()?.cast_unsigned();
    if !table.device().is_cpu() || !table.is_contiguous() || row >= capacity {
        return None;
    }
    let length = table.nbytes() / capacity;
    Some(table.bytes().part((row * length) as usize, length as usize))
}

/// A tensor whose bytes can be written to a row: of torch's own classes, on the CPU, contiguous, and neither empty nor
/// large. What else there is, is left to torch.
pub(crate) struct RowValue<'a, 'py> {
    tensor: &'a Bound<'py, PyAny>,
    shape: Vec<i64>,
    dtype: Dtype,
    /// Of a Parameter, whether it requires gradients.
    trainable: Option<bool>,
}

/// What a table is for a [`RowValue`].
pub(crate) enum Fit {
    /// It holds rows of this kind, and so many of them.
    Rows(u64),
    /// It holds rows of another kind.
    Other,
    /// It is for torch to write to it, or to tell.
    Unusual,
}

impl<'a, 'py> RowValue<'a, 'py> {
    /// `None` if the tensor, or whatever it is, is to be left to torch.
    pub(crate) fn new(torch: &Torch, tensor: &'a Bound<'py, PyAny>) -> PyResult<Option<Self>> {
        if !torch.is_plain(tensor) {
            return Ok(None);
        }
        let mut dims = Vec::with_capacity(8);
        let Ok(found) = torch.find(tensor, &mut dims)? else {
            return Ok(None);
        };
        let is_small = (1..=LARGEST as u64).contains(&found.nbytes());
        if !found.device().is_cpu() || !is_small || !found.is_contiguous() {
            return Ok(None);
        }
        let trainable = if torch.is_parameter(tensor) { Some(torch.requires_grad(tensor)?) } else { None };
        // Of integers there are frozen Parameters only; for anything else Python has an error.
        if trainable != Some(false) && !found.dtype().is_differentiable() {
            return Ok(None);
        }
        dims.truncate(found.ndim());
        Ok(Some(Self { tensor, shape: dims, dtype: found.dtype(), trainable }))
    }

    /// Whether it can be written to rows of a table: to that of a name that lies in it already, or to a new one. A new
    /// name with a plain tensor is trained; an old one stays what it is.
    pub(crate) fn fits(&self, torch: &Torch, table: &Bound<'_, PyAny>, is_new: bool) -> PyResult<Fit> {
        // A plain tensor stands in for a Parameter that does not change.
        if !torch.is_parameter(table) {
            return Ok(Fit::Unusual);
        }
        let mut dims = Vec::with_capacity(8);
        let Ok(found) = torch.find(table, &mut dims)? else {
            return Ok(Fit::Unusual);
        };
        let Some((&capacity, row_shape)) = dims[..found.ndim()].split_first() else {
            return Ok(Fit::Unusual);
        };
        if row_shape != self.shape || found.dtype() != self.dtype {
            return Ok(Fit::Other);
        }
        if let Some(trainable) = self.trainable.or(is_new.then_some(true))
            && trainable != torch.requires_grad(table)?
        {
            return Ok(Fit::Other);
        }
        if !found.device().is_cpu() || !found.is_contiguous() || !torch.counts_writes(table) {
            return Ok(Fit::Unusual);
        }
        Ok(Fit::Rows(capacity.cast_unsigned()))
    }

    /// Copies the values into a row of a table that [fits](Self::fits). `false`, and nothing is done, if it does not.
    pub(crate) fn write(&self, torch: &Torch, table: &Bound<'_, PyAny>, row: u64) -> PyResult<bool> {
        let (mut dims, mut row_dims) = (Vec::with_capacity(8), Vec::with_capacity(8));
        let (Ok(to), Ok(from)) = (torch.find(table, &mut dims)?, torch.find(self.tensor, &mut row_dims)?) else {
            return Ok(false);
        };
        let from_is_usual = from.device().is_cpu() && from.is_contiguous();
        let Some(target) = row_of(&to, &dims[..to.ndim()], row) else {
            return Ok(false);
        };
        if !from_is_usual || target.len() as u64 != from.nbytes() {
            return Ok(false);
        }
        // The value may be a row of the same table.
        from.bytes().copy_to(target);
        torch.increment_version(&PyList::new(table.py(), [table])?)?;
        Ok(true)
    }
}

/// Sets a row of some tensors to zero, and gives the tensors that are to be left to torch.
#[pyfunction]
pub(crate) fn zero_row<'py>(tensors: &Bound<'py, PyList>, row: u64) -> PyResult<Bound<'py, PyList>> {
    let py = tensors.py();
    let torch = Torch::get(py)?;
    let left = PyList::empty(py);
    let mut zeroed = ZeroedRow::new(row);
    for tensor in tensors {
        if !zeroed.add(torch, &tensor)? {
            left.append(tensor)?;
        }
    }
    zeroed.write(torch, py)?;
    Ok(left)
}

/// Sets a row of each tensor in a dictionary that has the shape of a table to zero, and passes over
/// numbers, torch's and Python's.
///
/// `false` if there is anything else, or a tensor that is to be left to torch: then nothing is done.
#[pyfunction]
pub(crate) fn zero_row_of_state(table: &Bound<'_, PyAny>, state: &Bound<'_, PyDict>, row: u64) -> PyResult<bool> {
    let py = table.py();
    let torch = Torch::get(py)?;
    let mut zeroed = ZeroedRow::new(row);
    let is_all = zeroed.add_state(torch, table, state)?;
    if is_all {
        zeroed.write(torch, py)?;
    }
    Ok(is_all)
}

/// A row that is to be set to zero in several tensors at once, when it has been seen that this is possible in all.
pub(crate) struct ZeroedRow<'py> {
    row: u64,
    tensors: Vec<Bound<'py, PyAny>>,
}

impl<'py> ZeroedRow<'py> {
    pub(crate) fn new(row: u64) -> Self {
        Self { row, tensors: Vec::new() }
    }

    /// Adds a tensor; `false` if it is to be left to torch.
    pub(crate) fn add(&mut self, torch: &Torch, tensor: &Bound<'py, PyAny>) -> PyResult<bool> {
        let fits =
            RowMemory::find(torch, tensor)?.is_some_and(|rows| self.row < rows.count && rows.length <= LARGEST as u64);
        if fits {
            self.tensors.push(tensor.clone());
        }
        Ok(fits)
    }

    /// Adds what an optimizer has for a table: tensors of its shape; numbers are passed over. `false` if there is
    /// anything else, or a tensor that is to be left to torch.
    pub(crate) fn add_state(
        &mut self,
        torch: &Torch,
        table: &Bound<'py, PyAny>,
        state: &Bound<'py, PyDict>,
    ) -> PyResult<bool> {
        let (mut dims, mut shape) = (Vec::with_capacity(8), Vec::with_capacity(8));
        let Some(like) = find_plain(torch, table, &mut shape)? else {
            return Ok(false);
        };
        shape.truncate(like.ndim());
        // A list, because a dictionary must not change while it is gone through.
        for value in state.values() {
            let Some(found) = find_plain(torch, &value, &mut dims)? else {
                if value.is_exact_instance_of::<PyFloat>() || value.is_exact_instance_of::<PyInt>() {
                    continue;
                }
                return Ok(false);
            };
            if found.ndim() > 0 && !(dims[..found.ndim()] == shape && self.add(torch, &value)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sets the row to zero; a tensor that has lost its memory or the row meanwhile is passed over.
    pub(crate) fn write(&self, torch: &Torch, py: Python<'py>) -> PyResult<()> {
        let counting = PyList::empty(py);
        for tensor in &self.tensors {
            let Some(rows) = RowMemory::find(torch, tensor)? else { continue };
            if let Some(row) = rows.get(self.row) {
                row.fill_zero();
            }
            if torch.counts_writes(tensor) {
                counting.append(tensor)?;
            }
        }
        torch.increment_version(&counting)
    }
}

/// Sets rows of a tensor to zero; `false`, and nothing is done, if it is to be left to torch. Rows that it does not have
/// are passed over.
#[pyfunction]
pub(crate) fn zero_rows(tensor: &Bound<'_, PyAny>, rows: PyReadonlyArray1<'_, i64>) -> PyResult<bool> {
    let py = tensor.py();
    let torch = Torch::get(py)?;
    let Some(memory) = RowMemory::find(torch, tensor)? else {
        return Ok(false);
    };
    let rows = rows.as_array();
    for (at, row) in rows.iter().enumerate() {
        if let Some(ahead) = rows.get(at + AHEAD).and_then(|row| memory.get(row.cast_unsigned())) {
            hint(ahead.address());
        }
        if let Some(row) = memory.get(row.cast_unsigned()) {
            row.fill_zero();
        }
    }
    if !rows.is_empty() && torch.counts_writes(tensor) {
        torch.increment_version(&PyList::new(py, [tensor])?)?;
    }
    Ok(true)
}

/// Where the rows of a plain tensor lie that is contiguous and on the CPU.
struct RowMemory {
    bytes: Bytes,
    count: u64,
    /// The bytes of a row.
    length: u64,
}

impl RowMemory {
    fn find(torch: &Torch, tensor: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let mut dims = Vec::with_capacity(8);
        let Some(found) = find_plain(torch, tensor, &mut dims)? else {
            return Ok(None);
        };
        let Some(count) = dims[..found.ndim()].first().map(|count| count.cast_unsigned()) else {
            return Ok(None);
        };
        let is_usual = found.device().is_cpu() && found.is_contiguous();
        Ok(is_usual.then(|| Self { bytes: found.bytes(), count, length: found.nbytes() / count.max(1) }))
    }

    #[inline]
    fn get(&self, row: u64) -> Option<Bytes> {
        (row < self.count).then(|| self.bytes.part((row * self.length) as usize, self.length as usize))
    }
}

fn find_plain(torch: &Torch, tensor: &Bound<'_, PyAny>, dims: &mut Vec<i64>) -> PyResult<Option<Found>> {
    dims.clear();
    Ok(if torch.is_plain(tensor) { torch.find(tensor, dims)?.ok() } else { None })
}

/// What the tensors of one class have in common.
#[derive(PartialEq, Eq, Hash, Clone)]
struct Class {
    dtype: (u8, u8, u16),
    device: (i32, i32),
    shape: Vec<i64>,
    /// Of a Parameter, whether it requires gradients.
    trainable: Option<bool>,
}

/// Sorts tensors into classes of one shape, dtype, device and, of Parameters, one `requires_grad`.
///
/// Gives the class of each, and the place of the first tensor of each class. What is no plain tensor with memory, or no
/// tensor at all, has the class -1.
#[pyfunction]
pub(crate) fn sort_tensors<'py>(values: &Bound<'py, PyList>) -> PyResult<(Bound<'py, PyArray1<i64>>, Vec<usize>)> {
    let py = values.py();
    let torch = Torch::get(py)?;
    let mut classes: HashMap<Class, i64> = HashMap::new();
    let mut firsts = Vec::new();
    // Where other threads make the list longer meanwhile, what they add is sorted, too.
    let mut sorted = memory::with_capacity(values.len())?;
    let mut last: Option<(Class, i64)> = None;
    let mut dims = Vec::new();
    for (at, value) in values.iter().enumerate() {
        if let Ok(ahead) = values.get_item(at + AHEAD) {
            torch.prefetch(&ahead);
        }
        dims.clear();
        let found = if torch.is_plain(&value) { torch.find(&value, &mut dims)?.ok() } else { None };
        let Some(found) = found else {
            memory::push(&mut sorted, -1)?;
            continue;
        };
        let Dtype { code, bits, lanes } = found.dtype();
        let shape = &dims[..found.ndim()];
        let dtype = (code, bits, lanes);
        let device = (found.device().kind, found.device().index);
        let trainable = if torch.is_parameter(&value) { Some(torch.requires_grad(&value)?) } else { None };
        if let Some((class, number)) = &last
            && class.dtype == dtype
            && class.device == device
            && class.shape == shape
            && class.trainable == trainable
        {
            memory::push(&mut sorted, *number)?;
            continue;
        }
        classes.try_reserve(1).map_err(|_| memory::refused(pdrs_core::Error::Memory))?;
        let class = Class { dtype, device, shape: shape.to_vec(), trainable };
        let next = firsts.len();
        let number = *classes.entry(class.clone()).or_insert(next.cast_signed() as i64);
        if number == next.cast_signed() as i64 {
            memory::push(&mut firsts, at)?;
        }
        memory::push(&mut sorted, number)?;
        last = Some((class, number));
    }
    Ok((PyArray1::from_vec(py, sorted), firsts))
}
