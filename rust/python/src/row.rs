//! Rows of tables and the tensors they come from: a copy of one row, and what many tensors have in common.
#![allow(unsafe_code)] // Copies between addresses.

use std::collections::HashMap;
use std::ptr;

use numpy::PyArray1;
use pdrs_core::strides::is_contiguous;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::dlpack::Dtype;
use crate::tensor::{Torch, prefetch};

/// Larger rows are left to torch, which copies them with several threads and without the GIL.
const LARGEST: u64 = 1 << 16;

/// How many tensors ahead the memory of one is fetched.
const AHEAD: usize = 16;

/// A copy of one row of a table, with memory of its own; `None` if it is to be left to torch.
///
/// torch takes three times as long, for three operations: detach, select, clone.
pub(crate) fn copy_row<'py>(torch: &Torch, table: &Bound<'py, PyAny>, row: u64) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = table.py();
    let Some(abi) = &torch.stable_abi else {
        return Ok(None);
    };
    let mut dims = Vec::with_capacity(8);
    let Ok(found) = torch.find(table, &mut dims)? else {
        return Ok(None);
    };
    let (shape, strides) = dims.split_at(found.ndim);
    let Some((&capacity, row_shape)) = shape.split_first() else {
        return Ok(None);
    };
    let numel = found.numel / capacity.cast_unsigned().max(1);
    let bytes = numel * found.itemsize;
    let outside = row >= capacity.cast_unsigned();
    if outside || !found.device.is_cpu() || bytes == 0 || bytes > LARGEST || !is_contiguous(shape, strides) {
        return Ok(None);
    }
    let (made, memory) = abi.empty(&abi.handle(table)?, row_shape, &strides[1..])?;
    // SAFETY: the table is contiguous and alive, the row lies in it, and nothing else runs meanwhile; the new tensor has
    // the row's shape and dtype, and so as many bytes.
    unsafe {
        let source = (found.pointer as *const u8).add((row * bytes) as usize);
        ptr::copy_nonoverlapping(source, memory.cast::<u8>(), bytes as usize);
    }
    abi.to_python(py, &made, None).map(Some)
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
    let mut sorted = Vec::with_capacity(values.len());
    let mut last: Option<(Class, i64)> = None;
    let mut dims = Vec::new();
    for (at, value) in values.iter().enumerate() {
        if let Ok(ahead) = values.get_item(at + AHEAD) {
            prefetch(&ahead);
        }
        dims.clear();
        let found = if torch.is_plain(&value) { torch.find(&value, &mut dims)?.ok() } else { None };
        let Some(found) = found else {
            sorted.push(-1);
            continue;
        };
        let Dtype { code, bits, lanes } = found.dtype;
        let shape = &dims[..found.ndim];
        let dtype = (code, bits, lanes);
        let device = (found.device.kind, found.device.index);
        let trainable = if torch.is_parameter(&value) { Some(torch.requires_grad(&value)?) } else { None };
        if let Some((class, number)) = &last
            && class.dtype == dtype
            && class.device == device
            && class.shape == shape
            && class.trainable == trainable
        {
            sorted.push(*number);
            continue;
        }
        let class = Class { dtype, device, shape: shape.to_vec(), trainable };
        let number = *classes.entry(class.clone()).or_insert_with(|| {
            firsts.push(at);
            firsts.len().cast_signed() as i64 - 1
        });
        sorted.push(number);
        last = Some((class, number));
    }
    Ok((PyArray1::from_vec(py, sorted), firsts))
}
