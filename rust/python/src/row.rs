//! Rows of tables and the tensors they come from: a copy of one row, and what many tensors have in common.
#![allow(unsafe_code)] // Lends memory to torch, which gives it back.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;

use numpy::PyArray1;
use pdrs_core::strides::is_contiguous;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::dlpack::{Device, DlTensor, Dtype, MAJOR, MINOR, ManagedTensor, Version};
use crate::tensor::{Torch, prefetch};

/// Larger rows are left to torch, which copies them with several threads and without the GIL.
const LARGEST: u64 = 1 << 16;

/// How many tensors ahead the memory of one is fetched.
const AHEAD: usize = 16;

/// What torch aligns its own memory to.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// A tensor on its way to torch: first the struct that torch sees, then what it points to.
#[repr(C)]
struct Owned {
    managed: ManagedTensor,
    dims: Box<[i64]>,
    memory: Box<[Line]>,
}

unsafe extern "C" fn give_back(managed: *mut ManagedTensor) {
    // SAFETY: torch calls this once, with the pointer that `Box::into_raw` gave, whose struct begins with `managed`.
    drop(unsafe { Box::from_raw(managed.cast::<Owned>()) });
}

/// A copy of one row of a table, with memory of its own; `None` if it is to be left to torch.
///
/// torch takes three times as long, for three operations: detach, select, clone.
#[pyfunction]
pub(crate) fn copy_row<'py>(table: &Bound<'py, PyAny>, row: u64) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = table.py();
    let torch = Torch::get(py)?;
    let mut dims = Vec::new();
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
    let mut memory = vec![Line([0; 64]); (bytes as usize).div_ceil(64)].into_boxed_slice();
    // SAFETY: the table is contiguous and alive, the row lies in it, and nothing else runs meanwhile; the new memory has
    // at least so many bytes.
    unsafe {
        let source = (found.pointer as *const u8).add((row * bytes) as usize);
        ptr::copy_nonoverlapping(source, memory.as_mut_ptr().cast::<u8>(), bytes as usize);
    }
    let row_dims = [row_shape, &strides[1..]].concat().into_boxed_slice();
    let owned = Box::into_raw(Box::new(Owned {
        managed: ManagedTensor {
            version: Version { major: MAJOR, minor: MINOR },
            context: ptr::null_mut(),
            deleter: Some(give_back),
            flags: 0,
            tensor: DlTensor {
                data: ptr::null_mut(),
                device: Device { kind: 1, index: 0 },
                ndim: i32::try_from(row_shape.len())?,
                dtype: found.dtype,
                shape: ptr::null_mut(),
                strides: ptr::null_mut(),
                byte_offset: 0,
            },
        },
        dims: row_dims,
        memory,
    }));
    let mut made = ptr::null_mut();
    // SAFETY: what `managed` points to is owned by the same box, which lives until torch calls `give_back`. torch gives
    // a new reference or raises; then the box is leaked, for whether torch has let it go cannot be told.
    unsafe {
        let dims = (*owned).dims.as_mut_ptr();
        (*owned).managed.tensor.data = (*owned).memory.as_mut_ptr().cast::<c_void>();
        (*owned).managed.tensor.shape = dims;
        (*owned).managed.tensor.strides = dims.add(row_shape.len());
        if (torch.import)(owned.cast(), &raw mut made) != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(Some(Bound::from_owned_ptr(py, made)))
    }
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
