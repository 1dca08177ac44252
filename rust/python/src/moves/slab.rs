//! Slabs and the tensors that are views of them.
//!
//! Each view has a storage of its own over a part of the slab, which it keeps alive, and a version counter of its own. For
//! tensors of one storage are taken for tied by all who compare storages, and to save one of them writes the storage.
//!
//! torch's allocators do not know such storages. So `record_stream` on a view does nothing, and a slab on a device is made
//! known to all streams instead, once, when its first views are made.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

use crate::torch::Torch;
use crate::torch::dlpack::{Device, Dtype, Form, Found, Memory};
use crate::torch::stable_abi::StableAbi;

/// How the views of a slab are made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// By torch's stable C ABI, from torch 2.14 on.
    FromBlob,
    /// By `DLPack`, which older torch has, too, and which takes half again as long.
    Dlpack,
}

impl Door {
    pub(crate) fn parse(name: &str) -> PyResult<Self> {
        match name {
            "from_blob" => Ok(Self::FromBlob),
            "dlpack" => Ok(Self::Dlpack),
            _ => Err(PyValueError::new_err(format!("expected 'from_blob' or 'dlpack', got {name:?}"))),
        }
    }
}

/// A contiguous tensor of which views are made.
pub(crate) struct Slab<'py> {
    torch: &'static Torch,
    tensor: Bound<'py, PyAny>,
    pub(crate) found: Found,
    memory: Arc<Memory>,
    /// For [`Door::FromBlob`].
    abi: Option<&'static StableAbi>,
}

impl<'py> Slab<'py> {
    /// Takes a contiguous tensor as a slab. Whoever holds it besides must not resize it or its storage.
    ///
    /// # Errors
    ///
    /// A `TypeError` or `ValueError` that says what was expected. A `RuntimeError` in inference mode, because views made
    /// there would be inference tensors for ever.
    pub(crate) fn new(torch: &'static Torch, tensor: &Bound<'py, PyAny>, door: Option<Door>) -> PyResult<Self> {
        let py = tensor.py();
        let mut dims = Vec::new();
        let found = torch
            .find(tensor, &mut dims)?
            .map_err(|unusual| PyValueError::new_err(format!("expected a plain tensor as slab, but it {unusual}")))?;
        if !found.is_contiguous() {
            let strides = &dims[found.ndim()..];
            return Err(PyValueError::new_err(format!("expected a contiguous slab, got strides {strides:?}")));
        }
        if torch.requires_grad(tensor)? {
            return Err(PyValueError::new_err("expected a slab that does not require gradients"));
        }
        if torch.module.bind(py).call_method0(intern!(py, "is_inference_mode_enabled"))?.is_truthy()? {
            return Err(PyRuntimeError::new_err(
                "views made in inference mode could never be trained; use torch.inference_mode(False) around this",
            ));
        }
        if tensor.call_method0(intern!(py, "is_inference"))?.is_truthy()? {
            return Err(PyValueError::new_err("expected a slab that was not made in inference mode"));
        }
        let abi = match (door, &torch.stable_abi) {
            (Some(Door::Dlpack), _) | (None, None) => None,
            (_, Some(abi)) => Some(abi),
            (Some(Door::FromBlob), None) => {
                return Err(PyRuntimeError::new_err(
                    "torch has the functions of its stable C ABI that this needs from 2.14 on",
                ));
            }
        };
        let memory = Memory::of(torch, tensor, abi.is_some())?;
        if found.device().is_cuda() {
            py.import("pdrs._moves.staging")?.call_method1(intern!(py, "make_known_to_streams"), (tensor,))?;
        } else if !found.device().is_cpu() {
            return Err(PyValueError::new_err("expected a slab on the CPU or on a CUDA device"));
        }
        Ok(Self { torch, tensor: tensor.clone(), found, memory, abi })
    }

    pub(crate) fn py(&self) -> Python<'py> {
        self.tensor.py()
    }

    /// Remembers the memory, so that [`flat`] knows it again.
    pub(crate) fn remember(&self) {
        let mut memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
        if memories.by_address.len() >= memories.sweep_at {
            memories.by_address.retain(|_, memory| memory.strong_count() > 0);
            memories.sweep_at = 64.max(2 * memories.by_address.len());
        }
        memories.by_address.insert(self.memory.bytes().address(), Arc::downgrade(&self.memory));
    }

    /// A tensor of these elements of the slab; a plain Tensor without gradients.
    pub(crate) fn view(&self, offset: u64, form: &Form<'_>) -> PyResult<Bound<'py, PyAny>> {
        self.with_view(offset, form, |view| Ok(view.clone()))
    }

    /// Calls `take` with a [`view`](Self::view).
    ///
    /// A tensor with a Python object takes the GIL whenever its owners in C++ become one, or more than one. This happens
    /// each time that its data is taken. With our handle there are always two.
    pub(crate) fn with_view<T>(
        &self,
        offset: u64,
        form: &Form<'_>,
        take: impl FnOnce(&Bound<'py, PyAny>) -> PyResult<T>,
    ) -> PyResult<T> {
        let py = self.py();
        let Some(abi) = self.abi else {
            return take(&self.memory.view(self.torch, py, offset, form)?);
        };
        let handle = abi.lend(&self.memory, offset, form)?;
        take(&abi.to_python(py, &handle, false)?)
    }

    /// A Parameter of these elements of the slab.
    pub(crate) fn parameter(&self, offset: u64, form: &Form<'_>, requires_grad: bool) -> PyResult<Bound<'py, PyAny>> {
        if let Some(abi) = self.abi {
            let handle = abi.lend(&self.memory, offset, form)?;
            if requires_grad {
                abi.require_grad(&handle)?;
            }
            return abi.to_python(self.py(), &handle, true);
        }
        let view = self.view(offset, form)?;
        self.torch.make_parameter(&view)?;
        if requires_grad {
            self.torch.require_grad(&view)?;
        }
        Ok(view)
    }
}

/// The memory of slabs whose views were made by `DLPack`, by address, as long as there are views.
///
/// What lies between the first and the last address of a memory that is alive belongs to it: nothing else can be
/// allocated there. Only threads that hold the GIL take the lock, so none holds it when a process forks; views that die
/// on other threads only count themselves down.
static MEMORIES: Mutex<Memories> = Mutex::new(Memories { by_address: BTreeMap::new(), sweep_at: 64 });

struct Memories {
    by_address: BTreeMap<usize, Weak<Memory>>,
    /// The number of entries at which the dead ones are swept out.
    sweep_at: usize,
}

/// The memory that an address may lie in: that of the slab that begins there or most closely before.
fn memory_before(address: usize) -> Option<Arc<Memory>> {
    let memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
    // The caller lets it go without the lock: should it be the last reference by then, Python code may run.
    memories.by_address.range(..=address).next_back().and_then(|(_, memory)| memory.upgrade())
}

/// A flat tensor of `length` elements from address `base` on, if they all lie in one allocation.
///
/// Addresses alone cannot tell, for two allocations may be neighbours. So the allocation is looked for: it is the
/// memory of a slab that has views, or the storage of `tensor`, which lies at `base` or soon after.
pub(crate) fn flat<'py>(
    torch: &Torch,
    tensor: &Bound<'py, PyAny>,
    base: usize,
    dtype: Dtype,
    device: Device,
    length: u64,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = tensor.py();
    let Some((itemsize, bytes)) = dtype.itemsize().and_then(|size| Some((size, size.checked_mul(length)?))) else {
        return Ok(None);
    };
    // At which element it begins.
    let inside = |pointer: usize, size: u64| {
        let start = base.checked_sub(pointer)? as u64;
        (start.is_multiple_of(itemsize) && start + bytes <= size).then_some(start / itemsize)
    };
    if let Some(memory) = memory_before(base)
        && let Some(start) = inside(memory.bytes().address(), memory.bytes().len() as u64)
        && memory.dtype() == dtype
        && memory.device() == device
    {
        return memory.view(torch, py, start, &Form::new(&[length.cast_signed()], &[1])).map(Some);
    }
    let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
    let pointer = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
    let size = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
    let Some(start) = inside(pointer, size) else {
        return Ok(None);
    };
    let alias = tensor.call_method0(intern!(py, "detach"))?;
    alias.call_method1(intern!(py, "as_strided"), ((length,), (1,), start)).map(Some)
}
