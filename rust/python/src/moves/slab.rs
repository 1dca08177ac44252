//! Slabs and the tensors that are views of them.
//!
//! Each view has a storage of its own over a part of the slab, which it keeps alive, and a version counter of its own. For
//! tensors of one storage are taken for tied by all who compare storages, and to save one of them writes the storage.
//!
//! torch's allocators do not know such storages. So `record_stream` on a view does nothing, and a slab on a device is made
//! known to all streams instead, once, when its first views are made.
#![allow(unsafe_code)] // Lends memory to torch, and takes it back.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pdrs_core::slab::strides::extent;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

use crate::torch::dlpack::{Device, DlTensor, Dtype, MAJOR, MINOR, ManagedTensor, Version};
use crate::torch::stable_abi::{Handle, Kind, StableAbi};
use crate::torch::{Found, Torch};

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

/// The shape and the strides of views, and how far they reach, which is looked at once for all of them.
#[derive(Clone, Copy)]
pub(crate) struct Form<'a> {
    shape: &'a [i64],
    strides: &'a [i64],
    /// None if no slab can hold such a view.
    extent: Option<u64>,
}

impl<'a> Form<'a> {
    pub(crate) fn new(shape: &'a [i64], strides: &'a [i64]) -> Self {
        let extent = if shape.len() == strides.len() { extent(shape, strides) } else { None };
        Self { shape, strides, extent }
    }
}

/// A contiguous tensor of which views are made.
pub(crate) struct Slab<'py> {
    torch: &'static Torch,
    tensor: Bound<'py, PyAny>,
    pub(crate) found: Found,
    memory: Arc<Memory>,
    /// For [`Door::FromBlob`].
    abi: Option<(&'static StableAbi, Kind)>,
}

/// The memory of a slab, kept by a `DLPack` tensor of torch's, which may be let go on any thread.
pub(crate) struct Memory {
    owner: *mut ManagedTensor,
    pub(crate) pointer: usize,
    pub(crate) bytes: u64,
    device: Device,
    dtype: Dtype,
}

// SAFETY: the owner is only ever handed to its own deleter, once, and DLPack lets that happen on any thread. The rest
// are numbers.
unsafe impl Send for Memory {}
// SAFETY: as above; nothing can be changed through a shared reference.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `owner` came from torch's export and was ours; nobody reads it after this. A deleter may be missing.
        unsafe {
            if let Some(deleter) = (*self.owner).deleter {
                deleter(self.owner);
            }
        }
    }
}

/// A view of a slab on its way to torch: first the struct that torch sees, then what it points to or keeps alive.
#[repr(C)]
struct Lent {
    managed: ManagedTensor,
    /// Shape and strides of up to two dimensions, as most tensors have; others are in `more`.
    few: [i64; 4],
    more: Option<Box<[i64]>>,
    /// None for a view without elements: torch never gives back what lies nowhere, so this struct, which is small, leaks.
    _memory: Option<Arc<Memory>>,
}

unsafe extern "C" fn give_back(managed: *mut ManagedTensor) {
    // SAFETY: torch calls this once, with the pointer that `Box::into_raw` gave, whose struct begins with `managed`.
    // Dropping it frees memory, and may call torch's deleter of the slab, which may run on any thread, as this may.
    drop(unsafe { Box::from_raw(managed.cast::<Lent>()) });
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
        if !found.contiguous {
            let strides = &dims[found.ndim..];
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
            (_, Some(abi)) => Some((abi, abi.kind(&abi.handle(tensor)?)?)),
            (Some(Door::FromBlob), None) => {
                return Err(PyRuntimeError::new_err(
                    "torch has the functions of its stable C ABI that this needs from 2.14 on",
                ));
            }
        };
        let memory = Memory::of(torch, tensor, &found)?;
        if found.device.is_cuda() {
            py.import("pdrs._moves.staging")?.call_method1(intern!(py, "make_known_to_streams"), (tensor,))?;
        } else if !found.device.is_cpu() {
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
        memories.by_address.insert(self.memory.pointer, Arc::downgrade(&self.memory));
    }

    /// A tensor of these elements of the slab; a plain Tensor without gradients.
    pub(crate) fn view(&self, offset: u64, form: &Form<'_>) -> PyResult<Bound<'py, PyAny>> {
        self.with_view(offset, form, |view| Ok(view.clone()))
    }

    /// Calls `take` with a [`view`](Self::view).
    ///
    /// A tensor with a Python object takes the GIL whenever it comes to have one owner in C++, or no longer one, as it
    /// does each time that its data is taken. With our handle there are always two.
    pub(crate) fn with_view<T>(
        &self,
        offset: u64,
        form: &Form<'_>,
        take: impl FnOnce(&Bound<'py, PyAny>) -> PyResult<T>,
    ) -> PyResult<T> {
        let py = self.py();
        let Some((abi, kind)) = self.abi else {
            self.check(offset, form)?;
            let offset = offset * self.found.itemsize;
            return take(&self.memory.view(self.torch, py, offset, form.shape, form.strides)?);
        };
        let handle = self.lent(abi, kind, offset, form)?;
        take(&abi.to_python(py, &handle, None)?)
    }

    /// A Parameter of these elements of the slab.
    pub(crate) fn parameter(&self, offset: u64, form: &Form<'_>, requires_grad: bool) -> PyResult<Bound<'py, PyAny>> {
        let class = self.torch.parameter.bind(self.tensor.py());
        if let Some((abi, kind)) = self.abi {
            let handle = self.lent(abi, kind, offset, form)?;
            if requires_grad {
                abi.require_grad(&handle)?;
            }
            return abi.to_python(self.tensor.py(), &handle, Some(class));
        }
        let view = self.view(offset, form)?;
        view.setattr(intern!(view.py(), "__class__"), class)?;
        if requires_grad {
            self.torch.require_grad(&view)?;
        }
        Ok(view)
    }

    fn lent(&self, abi: &StableAbi, kind: Kind, offset: u64, form: &Form<'_>) -> PyResult<Handle> {
        self.check(offset, form)?;
        // As torch's tensors without elements have it; such an address could be that of another view, too.
        let is_empty = form.extent == Some(0);
        let address = if is_empty { 0 } else { self.memory.pointer + (offset * self.found.itemsize) as usize };
        // SAFETY: `check` has found that the elements lie in the slab, whose memory `memory` keeps.
        unsafe { abi.lend(address, kind, form.shape, form.strides, Arc::clone(&self.memory)) }
    }

    /// Refuses a view that would reach beyond the slab.
    #[inline]
    fn check(&self, offset: u64, form: &Form<'_>) -> PyResult<()> {
        let end = form.extent.and_then(|extent| offset.checked_add(extent));
        if end.is_some_and(|end| end <= self.found.numel) { Ok(()) } else { Err(self.reaches_beyond(offset, form)) }
    }

    #[cold]
    fn reaches_beyond(&self, offset: u64, form: &Form<'_>) -> PyErr {
        let Form { shape, strides, .. } = form;
        PyValueError::new_err(format!(
            "a view of shape {shape:?} and strides {strides:?} at element {offset} reaches beyond the slab of {} elements",
            self.found.numel
        ))
    }
}

impl Memory {
    /// The memory of a contiguous tensor, which stays alive with it.
    fn of(torch: &Torch, tensor: &Bound<'_, PyAny>, found: &Found) -> PyResult<Arc<Self>> {
        let py = tensor.py();
        // Another tensor of the same storage: who holds the slab may point it elsewhere by `slab.data = ...`.
        let alias = tensor.call_method0(intern!(py, "detach"))?;
        let mut owner = ptr::null_mut();
        // SAFETY: `alias` is a live torch.Tensor; torch fills in an owning pointer or raises.
        if unsafe { (torch.export)(alias.as_ptr(), &raw mut owner) } != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(Arc::new(Self {
            owner,
            pointer: found.pointer,
            bytes: found.numel * found.itemsize,
            device: found.device,
            dtype: found.dtype,
        }))
    }

    /// A tensor over a part of the memory that the caller has checked to lie inside.
    fn view<'py>(
        self: &Arc<Self>,
        torch: &Torch,
        py: Python<'py>,
        offset: u64,
        shape: &[i64],
        strides: &[i64],
    ) -> PyResult<Bound<'py, PyAny>> {
        let ndim = shape.len();
        let is_empty = shape.contains(&0);
        let mut lent = Box::new(Lent {
            managed: ManagedTensor {
                version: Version { major: MAJOR, minor: MINOR },
                context: ptr::null_mut(),
                deleter: Some(give_back),
                flags: 0,
                tensor: DlTensor {
                    data: if is_empty { 0 } else { self.pointer + offset as usize } as *mut c_void,
                    device: self.device,
                    ndim: i32::try_from(ndim)?,
                    dtype: self.dtype,
                    shape: ptr::null_mut(),
                    strides: ptr::null_mut(),
                    byte_offset: 0,
                },
            },
            few: [0; 4],
            more: (ndim > 2).then(|| [shape, strides].concat().into_boxed_slice()),
            _memory: (!is_empty).then(|| Arc::clone(self)),
        });
        if ndim <= 2 {
            lent.few[..ndim].copy_from_slice(shape);
            lent.few[2..2 + ndim].copy_from_slice(strides);
        }
        let lent = Box::into_raw(lent);
        let mut made = ptr::null_mut();
        // SAFETY: the shape and the strides that `managed` points to are in the same box, which lives until torch calls
        // `give_back`; so does the memory that `data` points into, which `memory` keeps. torch gives a new reference or
        // raises; then the box is leaked, for whether torch has let it go cannot be told.
        unsafe {
            let (shape, strides) = match &mut (*lent).more {
                Some(dims) => (dims.as_mut_ptr(), dims.as_mut_ptr().add(ndim)),
                None => ((&raw mut (*lent).few).cast(), (&raw mut (*lent).few).cast::<i64>().add(2)),
            };
            (*lent).managed.tensor.shape = shape;
            (*lent).managed.tensor.strides = strides;
            if (torch.import)(lent.cast(), &raw mut made) != 0 {
                return Err(PyErr::fetch(py));
            }
            Ok(Bound::from_owned_ptr(py, made))
        }
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

impl Memory {
    /// The memory that an address may lie in: that of the slab that begins there or most closely before.
    fn before(address: usize) -> Option<Arc<Self>> {
        let memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
        // The caller lets it go without the lock: should it be the last reference by then, Python code may run.
        memories.by_address.range(..=address).next_back().and_then(|(_, memory)| memory.upgrade())
    }
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
    let Some(bytes) = dtype.itemsize().and_then(|itemsize| itemsize.checked_mul(length)) else {
        return Ok(None);
    };
    let inside = |pointer: usize, size: u64| {
        base.checked_sub(pointer).map(|start| start as u64).filter(|start| start + bytes <= size)
    };
    if let Some(memory) = Memory::before(base)
        && let Some(start) = inside(memory.pointer, memory.bytes)
        && memory.dtype == dtype
        && memory.device == device
    {
        return memory.view(torch, py, start, &[length.cast_signed()], &[1]).map(Some);
    }
    let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
    let pointer = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
    let size = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
    let itemsize = bytes / length.max(1);
    match inside(pointer, size) {
        Some(start) if itemsize > 0 && start.is_multiple_of(itemsize) => {
            let alias = tensor.call_method0(intern!(py, "detach"))?;
            alias.call_method1(intern!(py, "as_strided"), ((length,), (1,), start / itemsize)).map(Some)
        }
        _ => Ok(None),
    }
}
