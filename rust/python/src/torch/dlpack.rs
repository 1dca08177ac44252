//! `DLPack` as torch speaks it: the C structs, and the table of functions behind
//! `torch.Tensor.__dlpack_c_exchange_api__`.
//!
//! The layouts are those of dlpack.h, major version 1, which `ATen/dlpack.h` in torch's include folder is a copy of. A
//! change of them changes the major version, which is looked at before anything else is read.
#![allow(unsafe_code)] // C structs of torch.

use std::ffi::{c_int, c_void};

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};

/// The major version of `DLPack` whose structs are written down here; another one may have other structs.
pub(crate) const MAJOR: u32 = 1;
/// The minor version that views claim, of which they use nothing but what 1.0 had.
pub(crate) const MINOR: u32 = 0;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// A device as `DLPack` numbers it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) index: i32,
}

/// The type of an element as `DLPack` numbers it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dtype {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DlTensor {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) ndim: i32,
    pub(crate) dtype: Dtype,
    pub(crate) shape: *mut i64,
    pub(crate) strides: *mut i64,
    pub(crate) byte_offset: u64,
}

impl DlTensor {
    /// The address of the first element.
    pub(crate) fn pointer(&self) -> usize {
        (self.data as usize).wrapping_add(self.byte_offset as usize)
    }

    /// The shape and the strides.
    ///
    /// # Safety
    ///
    /// The tensor that is described lives, and keeps its shape, as long as they are used.
    pub(crate) unsafe fn dims(&self) -> (&[i64], &[i64]) {
        let ndim = usize::try_from(self.ndim).unwrap_or(0);
        if ndim == 0 {
            return (&[], &[]);
        }
        // SAFETY: both point to `ndim` numbers inside the tensor, as the caller promises.
        unsafe { (std::slice::from_raw_parts(self.shape, ndim), std::slice::from_raw_parts(self.strides, ndim)) }
    }

    /// Whether these are its shape and then its strides.
    ///
    /// # Safety
    ///
    /// As of [`Self::dims`].
    #[inline]
    pub(crate) unsafe fn has_dims(&self, dims: &[i64]) -> bool {
        // SAFETY: as the caller promises.
        let (shape, strides) = unsafe { self.dims() };
        let ndim = shape.len();
        // As a loop: there are few, and a call of `memcmp` takes longer.
        dims.len() == 2 * ndim && (0..ndim).all(|dim| shape[dim] == dims[dim] && strides[dim] == dims[ndim + dim])
    }
}

#[repr(C)]
pub(crate) struct ManagedTensor {
    pub(crate) version: Version,
    pub(crate) context: *mut c_void,
    pub(crate) deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    pub(crate) flags: u64,
    pub(crate) tensor: DlTensor,
}

/// Gives an owning reference to the memory of a tensor.
pub(crate) type Export = unsafe extern "C" fn(*mut ffi::PyObject, *mut *mut ManagedTensor) -> c_int;
/// Makes a tensor, and takes the reference.
pub(crate) type Import = unsafe extern "C" fn(*mut ManagedTensor, *mut *mut ffi::PyObject) -> c_int;
/// Tells where a tensor lies.
pub(crate) type Describe = unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int;

#[repr(C)]
pub(crate) struct ExchangeApi {
    pub(crate) version: Version,
    pub(crate) previous: *const ExchangeApi,
    pub(crate) allocate: *const c_void,
    pub(crate) export: Export,
    pub(crate) import: Import,
    pub(crate) describe: Option<Describe>,
    pub(crate) current_stream: *const c_void,
}

impl Device {
    /// Whether the CPU may read and write there: ordinary and page-locked memory.
    pub(crate) fn is_cpu(self) -> bool {
        // kDLCPU, kDLCUDAHost, kDLROCMHost
        matches!(self.kind, 1 | 3 | 11)
    }

    /// Whether torch calls it a CUDA device.
    pub(crate) fn is_cuda(self) -> bool {
        // kDLCUDA, kDLROCM, kDLCUDAManaged
        matches!(self.kind, 2 | 10 | 13)
    }
}

impl Dtype {
    /// The bytes of one element: 1, 2, 4, 8 or 16; `None` for anything else.
    pub(crate) fn itemsize(self) -> Option<u64> {
        let bits = u64::from(self.bits) * u64::from(self.lanes);
        matches!(bits, 8 | 16 | 32 | 64 | 128).then_some(bits / 8)
    }

    pub(crate) fn is_complex(self) -> bool {
        self.code == 5
    }

    /// Whether torch can take gradients with respect to such elements.
    pub(crate) fn is_differentiable(self) -> bool {
        !matches!(self.code, 0 | 1 | 6)
    }
}

/// The table of functions, of the major version that is written down here.
pub(crate) fn exchange_api(module: &Bound<'_, PyModule>, tensor: &Bound<'_, PyType>) -> PyResult<&'static ExchangeApi> {
    let capsule = tensor
        .getattr("__dlpack_c_exchange_api__")
        .ok()
        .and_then(|capsule| capsule.cast_into::<PyCapsule>().ok())
        .ok_or_else(|| unsupported(module, "has no __dlpack_c_exchange_api__"))?;
    let pointer = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?;
    let mut api: *const ExchangeApi = pointer.as_ptr().cast();
    // SAFETY: a capsule of this name holds a table that lives as long as the process. The version and the link to the
    // table of an older version lie at the same place in every version; the rest is read only if the version is ours.
    unsafe {
        while let Some(table) = api.as_ref() {
            if table.version.major == MAJOR {
                return Ok(table);
            }
            api = table.previous;
        }
    }
    Err(unsupported(module, "has another major version of DLPack than 1"))
}

pub(crate) fn unsupported(module: &Bound<'_, PyModule>, why: &str) -> PyErr {
    let version = module.getattr("__version__").map(|version| version.to_string()).unwrap_or_default();
    PyImportError::new_err(format!("pdrs reads tensors as torch 2.10 to 2.15 offer it, but torch {version} {why}"))
}
