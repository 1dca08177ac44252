//! `DLPack` as torch speaks it: the C structs, and the table of functions behind
//! `torch.Tensor.__dlpack_c_exchange_api__`.
//!
//! The layouts are those of dlpack.h, major version 1, which `ATen/dlpack.h` in torch's include folder is a copy of. A
//! change of them changes the major version, which is looked at before anything else is read.
#![allow(unsafe_code, reason = "C structs and C functions of torch")]

use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;
use std::sync::Arc;

use pdrs_core::slab::strides::{extent, is_contiguous};
use pyo3::exceptions::{PyImportError, PyValueError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};

use crate::torch::bytes::Bytes;
use crate::torch::stable_abi::Kind;
use crate::torch::{Plain, Torch, expected_a_tensor};

/// The major version of `DLPack` whose structs are written down here; another one may have other structs.
const MAJOR: u32 = 1;
/// The minor version that views claim, of which they use nothing but what 1.0 had.
const MINOR: u32 = 0;

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
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
struct DlTensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: Dtype,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct ManagedTensor {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    flags: u64,
    tensor: DlTensor,
}

/// Gives an owning reference to the memory of a tensor.
type Export = unsafe extern "C" fn(*mut ffi::PyObject, *mut *mut ManagedTensor) -> c_int;
/// Makes a tensor, and takes the reference.
type Import = unsafe extern "C" fn(*mut ManagedTensor, *mut *mut ffi::PyObject) -> c_int;
/// Tells where a tensor lies.
type Describe = unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int;

#[repr(C)]
struct ExchangeApi {
    version: Version,
    previous: *const ExchangeApi,
    allocate: *const c_void,
    export: Export,
    import: Import,
    describe: Option<Describe>,
    current_stream: *const c_void,
}

impl Device {
    /// kDLCPU
    pub(crate) const CPU: Self = Self { kind: 1, index: 0 };

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

/// Where a tensor lies. Its shape and its strides are kept apart, in a list for many tensors.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    bytes: Bytes,
    device: Device,
    dtype: Dtype,
    itemsize: u64,
    ndim: usize,
    numel: u64,
    is_contiguous: bool,
}

impl Found {
    /// From the first element to the last. Of a tensor without elements none, at any address.
    #[inline]
    pub(crate) fn bytes(&self) -> Bytes {
        self.bytes
    }

    #[inline]
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    #[inline]
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The bytes of an element.
    #[inline]
    pub(crate) fn itemsize(&self) -> u64 {
        self.itemsize
    }

    #[inline]
    pub(crate) fn ndim(&self) -> usize {
        self.ndim
    }

    /// The number of elements.
    #[inline]
    pub(crate) fn numel(&self) -> u64 {
        self.numel
    }

    /// The bytes of all elements.
    #[inline]
    pub(crate) fn nbytes(&self) -> u64 {
        self.numel * self.itemsize
    }

    /// Whether elements in C order are neighbours.
    #[inline]
    pub(crate) fn is_contiguous(&self) -> bool {
        self.is_contiguous
    }
}

/// The tensor that was found last, its shape and then its strides.
#[derive(Default)]
pub(crate) struct Latest {
    found: Option<Found>,
    dims: Vec<i64>,
}

impl Latest {
    /// None yet; the list will be used for shape and strides.
    pub(crate) fn in_place_of(dims: Vec<i64>) -> Self {
        Self { found: None, dims }
    }

    #[inline]
    pub(crate) fn dims(&self) -> &[i64] {
        &self.dims
    }

    pub(crate) fn into_dims(self) -> Vec<i64> {
        self.dims
    }

    #[inline]
    pub(crate) fn found(&self) -> Option<&Found> {
        self.found.as_ref()
    }

    pub(crate) fn forget(&mut self) {
        self.found = None;
    }

    #[inline]
    fn has_dims(&self, shape: &[i64], strides: &[i64]) -> bool {
        let (ndim, dims) = (shape.len(), &self.dims[..]);
        // As a loop: there are few, and a call of `memcmp` takes longer.
        dims.len() == 2 * ndim && (0..ndim).all(|dim| shape[dim] == dims[dim] && strides[dim] == dims[ndim + dim])
    }
}

/// What torch says of a tensor: the memory that it reaches over.
#[derive(Clone, Copy)]
pub(crate) enum Described {
    /// All else is as of the latest, which stays the same.
    Alike(Bytes),
    /// It is the latest now.
    Other(Bytes),
    /// Its elements are no whole bytes. There is no latest any more.
    Odd,
}

/// torch's functions, of the major version that is written down here.
#[derive(Clone, Copy)]
pub(crate) struct Exchange {
    describe: Describe,
    export: Export,
    import: Import,
}

impl Exchange {
    pub(super) fn look_up(module: &Bound<'_, PyModule>, tensor: &Bound<'_, PyType>) -> PyResult<Self> {
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
                    let silent = || unsupported(module, "does not tell where a tensor lies");
                    let describe = table.describe.ok_or_else(silent)?;
                    return Ok(Self { describe, export: table.export, import: table.import });
                }
                api = table.previous;
            }
        }
        Err(unsupported(module, "has another major version of DLPack than 1"))
    }

    /// Tells where a tensor lies, and what it has in common with the latest. The error is torch's, where it refuses.
    #[inline]
    pub(super) fn describe(self, tensor: Plain<'_, '_>, latest: &mut Latest) -> PyResult<Described> {
        let mut seen = DlTensor {
            data: ptr::null_mut(),
            device: Device { kind: 0, index: 0 },
            ndim: 0,
            dtype: Dtype { code: 0, bits: 0, lanes: 0 },
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        };
        // SAFETY: `tensor` is a live torch.Tensor, and `seen` a struct of the layout that the checked version names. What
        // torch fills in points to `ndim` sizes and strides inside the tensor, which does not change here; from the
        // address on, the tensor owns all bytes that its shape and its strides reach.
        unsafe {
            if (self.describe)(tensor.0.as_ptr(), &raw mut seen) != 0 {
                return Err(PyErr::fetch(tensor.0.py()));
            }
            let ndim = usize::try_from(seen.ndim).unwrap_or(0);
            let (shape, strides): (&[i64], &[i64]) = match ndim {
                0 => (&[], &[]),
                _ => (slice::from_raw_parts(seen.shape, ndim), slice::from_raw_parts(seen.strides, ndim)),
            };
            let address = (seen.data as usize).wrapping_add(seen.byte_offset as usize);
            if let Some(before) = &latest.found
                && before.device == seen.device
                && before.dtype == seen.dtype
                && latest.has_dims(shape, strides)
            {
                return Ok(Described::Alike(Bytes::new(address, before.bytes.len(), seen.device)));
            }
            latest.found = None;
            let Some(itemsize) = seen.dtype.itemsize() else {
                return Ok(Described::Odd);
            };
            latest.dims.clear();
            // As a loop: there are few, and a call of `memcpy` takes longer.
            latest.dims.extend(shape.iter().chain(strides));
            let reach = extent(shape, strides).and_then(|elements| elements.checked_mul(itemsize)).unwrap_or(0);
            let bytes = Bytes::new(address, reach as usize, seen.device);
            latest.found = Some(Found {
                bytes,
                device: seen.device,
                dtype: seen.dtype,
                itemsize,
                ndim,
                numel: if shape.contains(&0) { 0 } else { shape.iter().map(|size| size.cast_unsigned()).product() },
                is_contiguous: is_contiguous(shape, strides),
            });
            Ok(Described::Other(bytes))
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

    pub(crate) fn shape(&self) -> &'a [i64] {
        self.shape
    }

    pub(crate) fn strides(&self) -> &'a [i64] {
        self.strides
    }
}

/// The memory of a slab, kept by a `DLPack` tensor of torch's, which may be let go on any thread.
pub(crate) struct Memory {
    owner: *mut ManagedTensor,
    bytes: Bytes,
    device: Device,
    dtype: Dtype,
    itemsize: u64,
    /// What tensors over it are for the stable C ABI, if that makes them.
    kind: Option<Kind>,
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

impl Memory {
    /// The memory of a contiguous tensor, which stays alive with it. The stable C ABI can make views of it if `by_abi`.
    pub(crate) fn of(torch: &Torch, tensor: &Bound<'_, PyAny>, by_abi: bool) -> PyResult<Arc<Self>> {
        let py = tensor.py();
        // Another tensor of the same storage: who holds the slab may point it elsewhere by `slab.data = ...`.
        let alias = tensor.call_method0(intern!(py, "detach"))?;
        let Some(plain) = torch.plain(&alias) else {
            return Err(expected_a_tensor(&alias)?);
        };
        let mut latest = Latest::default();
        torch.exchange.describe(plain, &mut latest)?;
        let Some(found) = latest.found.filter(|found| found.is_contiguous) else {
            return Err(PyValueError::new_err("expected a contiguous slab"));
        };
        let kind = torch.stable_abi.as_ref().filter(|_| by_abi).map(|abi| abi.kind(plain)).transpose()?;
        let mut owner = ptr::null_mut();
        // SAFETY: `alias` is a live torch.Tensor; torch fills in an owning pointer or raises.
        if unsafe { (torch.exchange.export)(alias.as_ptr(), &raw mut owner) } != 0 {
            return Err(PyErr::fetch(py));
        }
        let Found { bytes, device, dtype, itemsize, .. } = found;
        Ok(Arc::new(Self { owner, bytes, device, dtype, itemsize, kind }))
    }

    #[inline]
    pub(crate) fn bytes(&self) -> Bytes {
        self.bytes
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[inline]
    pub(super) fn kind(&self) -> Option<Kind> {
        self.kind
    }

    /// The memory of a view that begins at element `offset`.
    ///
    /// # Errors
    ///
    /// A `ValueError` if it reaches beyond.
    #[inline]
    pub(super) fn place(&self, offset: u64, form: &Form<'_>) -> PyResult<Bytes> {
        let numel = self.bytes.len() as u64 / self.itemsize;
        match form.extent {
            Some(extent) if offset <= numel && extent <= numel - offset => {
                Ok(self.bytes.part((offset * self.itemsize) as usize, (extent * self.itemsize) as usize))
            }
            _ => Err(reaches_beyond(offset, form, numel)),
        }
    }

    /// A tensor over a part of the memory, by `DLPack`.
    pub(crate) fn view<'py>(
        self: &Arc<Self>,
        torch: &Torch,
        py: Python<'py>,
        offset: u64,
        form: &Form<'_>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let bytes = self.place(offset, form)?;
        let ndim = form.shape.len();
        let is_empty = bytes.len() == 0;
        let mut lent = Box::new(Lent {
            managed: ManagedTensor {
                version: Version { major: MAJOR, minor: MINOR },
                context: ptr::null_mut(),
                deleter: Some(give_back),
                flags: 0,
                tensor: DlTensor {
                    data: if is_empty { 0 } else { bytes.address() } as *mut c_void,
                    device: self.device,
                    ndim: i32::try_from(ndim)?,
                    dtype: self.dtype,
                    shape: ptr::null_mut(),
                    strides: ptr::null_mut(),
                    byte_offset: 0,
                },
            },
            few: [0; 4],
            more: (ndim > 2).then(|| [form.shape, form.strides].concat().into_boxed_slice()),
            _memory: (!is_empty).then(|| Arc::clone(self)),
        });
        if ndim <= 2 {
            lent.few[..ndim].copy_from_slice(form.shape);
            lent.few[2..2 + ndim].copy_from_slice(form.strides);
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
            if (torch.exchange.import)(lent.cast(), &raw mut made) != 0 {
                return Err(PyErr::fetch(py));
            }
            Ok(Bound::from_owned_ptr(py, made))
        }
    }
}

#[cold]
fn reaches_beyond(offset: u64, form: &Form<'_>, numel: u64) -> PyErr {
    let Form { shape, strides, .. } = form;
    PyValueError::new_err(format!(
        "a view of shape {shape:?} and strides {strides:?} at element {offset} reaches beyond the slab of {numel} elements"
    ))
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

fn unsupported(module: &Bound<'_, PyModule>, why: &str) -> PyErr {
    let version = module.getattr("__version__").map(|version| version.to_string()).unwrap_or_default();
    PyImportError::new_err(format!("pdrs reads tensors as torch 2.10 to 2.15 offer it, but torch {version} {why}"))
}
