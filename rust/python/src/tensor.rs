//! The border to torch: where a tensor's values lie, and tensors that are views of a slab.
//!
//! torch offers C functions to other libraries in two places, and both are reached without compiling or linking against
//! torch:
//!
//! * the *exchange API* of `DLPack`, a table of functions behind `torch.Tensor.__dlpack_c_exchange_api__`, from torch
//!   2.10 on. It tells where a tensor lies, and makes tensors out of memory that somebody else owns. Such a view has a
//!   storage of its own: `torch.save` and `deepcopy` of one view copy its bytes and not the slab, but `record_stream`
//!   does nothing to the slab.
//! * the *stable C ABI*, functions of `libtorch_cpu`, from torch 2.14 on as far as it is used here. A view made by it
//!   shares the storage of the slab: what `record_stream` and device memory need.
//!
//! So the views of a slab on the CPU are made by the first ([`Door::Dlpack`]), and those on other devices by the second
//! ([`Door::StableAbi`]) or, where torch does not have it, by `as_strided` ([`Door::AsStrided`]), which takes three
//! times as long.
//!
//! What the exchange API does not tell has been found by experiment (torch 2.15) and is looked at here. It drops the
//! conjugate and negative bits; reports int1 to int7 and uint1 to uint7 as 8 bits; gives null for a tensor that
//! has lost its memory, a functionalized or a zero tensor, as for an empty one; and exports tensors that require
//! gradients and inference tensors like others. It refuses quantized, bits, sparse, meta, nested and functorch tensors.
//! Subclasses of Tensor are never asked: what they hold may be anything.
#![allow(unsafe_code)] // C structs and functions of torch; every pointer that crosses the border does so here.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyCapsule, PyList, PyTuple, PyType};

use crate::stable_abi::{Handle, StableAbi};

/// The major version of `DLPack` whose structs are written down here; another one may have other structs.
const MAJOR: u32 = 1;
const MINOR: u32 = 3;

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
    kind: i32,
    index: i32,
}

/// The type of an element as `DLPack` numbers it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dtype {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
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
    /// Whether the CPU may read and write there: ordinary and page-locked memory.
    pub(crate) fn is_cpu(self) -> bool {
        // kDLCPU, kDLCUDAHost, kDLROCMHost
        matches!(self.kind, 1 | 3 | 11)
    }
}

impl Dtype {
    /// The bytes of one element: 1, 2, 4, 8 or 16; `None` for anything else.
    fn itemsize(self) -> Option<u64> {
        let bits = u64::from(self.bits) * u64::from(self.lanes);
        matches!(bits, 8 | 16 | 32 | 64 | 128).then_some(bits / 8)
    }

    fn is_complex(self) -> bool {
        self.code == 5
    }

    /// Whether torch can take gradients with respect to such elements.
    pub(crate) fn is_differentiable(self) -> bool {
        !matches!(self.code, 0 | 1 | 6)
    }
}

/// Where the values of a tensor lie. Its shape and its strides are kept apart, in a list for many tensors.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    /// The address of the first element; for a tensor without elements, anything.
    pub(crate) pointer: usize,
    pub(crate) device: Device,
    pub(crate) dtype: Dtype,
    pub(crate) itemsize: u64,
    pub(crate) ndim: usize,
    pub(crate) numel: u64,
}

/// Why a tensor must be left to torch.
pub(crate) enum Unusual {
    /// The class is neither Tensor nor Parameter.
    Subclass(String),
    /// torch does not export it; in its own words.
    Refused(String),
    /// Values differ from memory: a conjugate or a negative view.
    Lazy,
    /// There are elements, but no memory.
    NoMemory,
    /// Elements that `DLPack` cannot name.
    Dtype(String),
}

impl std::fmt::Display for Unusual {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Subclass(name) => write!(f, "is a {name}, of a subclass of Tensor"),
            Self::Refused(why) => write!(f, "has no plain memory: {why}"),
            Self::Lazy => write!(f, "has its conjugate or negative bit set"),
            Self::NoMemory => write!(f, "has elements but no memory"),
            Self::Dtype(name) => write!(f, "has the dtype {name}"),
        }
    }
}

/// An attribute of Tensor that is called without looking its name up.
struct Attribute {
    descriptor: Py<PyAny>,
    get: ffi::descrgetfunc,
    set: Option<ffi::descrsetfunc>,
}

impl Attribute {
    fn new(tensor: &Bound<'_, PyType>, name: &str) -> PyResult<Self> {
        let descriptor = tensor.getattr(name)?;
        // SAFETY: `descriptor` is a live object, and so is its type; the fields of the type are those of CPython.
        let (get, set) = unsafe {
            let class = ffi::Py_TYPE(descriptor.as_ptr());
            ((*class).tp_descr_get, (*class).tp_descr_set)
        };
        let get = get.ok_or_else(|| PyRuntimeError::new_err(format!("torch.Tensor.{name} is no attribute")))?;
        Ok(Self { descriptor: descriptor.unbind(), get, set })
    }

    fn get<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: descriptor and tensor are live objects; a descriptor's getter gives a new reference or raises.
        unsafe {
            let class = ffi::Py_TYPE(tensor.as_ptr()).cast();
            Bound::from_owned_ptr_or_err(tensor.py(), (self.get)(self.descriptor.as_ptr(), tensor.as_ptr(), class))
        }
    }

    fn set(&self, tensor: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let set = self.set.ok_or_else(|| PyRuntimeError::new_err("an attribute of torch.Tensor cannot be set"))?;
        // SAFETY: all three are live objects; a descriptor's setter takes its own references, and raises if not 0.
        let status = unsafe { set(self.descriptor.as_ptr(), tensor.as_ptr(), value.as_ptr()) };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(tensor.py())) }
    }
}

/// What of torch is used here, looked up once.
pub(crate) struct Torch {
    export: Export,
    import: Import,
    describe: Describe,
    stable_abi: Option<StableAbi>,
    pub(crate) module: Py<PyModule>,
    tensor: Py<PyType>,
    pub(crate) parameter: Py<PyType>,
    int8: Py<PyAny>,
    uint8: Py<PyAny>,
    data: Attribute,
    requires_grad: Attribute,
    version: Attribute,
    increment_version: Py<PyAny>,
    is_conj: Py<PyAny>,
    is_neg: Py<PyAny>,
}

impl Torch {
    pub(crate) fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || Self::look_up(py))
    }

    fn look_up(py: Python<'_>) -> PyResult<Self> {
        let module = py.import("torch")?;
        let tensor = module.getattr("Tensor")?.cast_into::<PyType>()?;
        let api = exchange_api(&module, &tensor)?;
        let describe = api.describe.ok_or_else(|| unsupported(&module, "does not tell where a tensor lies"))?;
        Ok(Self {
            export: api.export,
            import: api.import,
            describe,
            stable_abi: StableAbi::find(&module)?,
            parameter: module.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
            int8: module.getattr("int8")?.unbind(),
            uint8: module.getattr("uint8")?.unbind(),
            data: Attribute::new(&tensor, "data")?,
            requires_grad: Attribute::new(&tensor, "requires_grad")?,
            version: Attribute::new(&tensor, "_version")?,
            increment_version: py.import("torch.autograd.graph")?.getattr("increment_version")?.unbind(),
            is_conj: tensor.getattr("is_conj")?.unbind(),
            is_neg: tensor.getattr("is_neg")?.unbind(),
            tensor: tensor.unbind(),
            module: module.unbind(),
        })
    }

    /// Whether the class is exactly Tensor or Parameter.
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type();
        class.is(&self.parameter) || class.is(&self.tensor)
    }

    pub(crate) fn is_parameter(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type().is(&self.parameter)
    }

    pub(crate) fn requires_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.requires_grad.get(tensor)?.is(PyBool::new(tensor.py(), true)))
    }

    pub(crate) fn require_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        self.requires_grad.set(tensor, &PyBool::new(tensor.py(), true))
    }

    /// Tells autograd that the values of tensors change, or are about to.
    pub(crate) fn increment_version(&self, tensors: &Bound<'_, PyList>) -> PyResult<()> {
        self.increment_version.bind(tensors.py()).call1((tensors,)).map(drop)
    }

    /// Why torch would refuse [`Self::set_data`], if it would.
    pub(crate) fn check_rebindable(
        &self,
        tensor: &Bound<'_, PyAny>,
        trainable: bool,
    ) -> PyResult<std::result::Result<(), &'static str>> {
        if self.version.get(tensor).is_err() {
            return Ok(Err("was made in inference mode, and its data cannot be replaced"));
        }
        if !trainable && self.requires_grad(tensor)? {
            return Ok(Err("requires gradients, which the dtype of the slab cannot have"));
        }
        Ok(Ok(()))
    }

    /// How many threads torch may use.
    pub(crate) fn num_threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.module.bind(py).call_method0(intern!(py, "get_num_threads"))?.extract()
    }

    /// `tensor.data = data`, without looking the attribute up.
    pub(crate) fn set_data(&self, tensor: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        self.data.set(tensor, data)
    }

    /// Tells where a tensor lies, and appends its shape and then its strides, in elements, to `dims`.
    ///
    /// # Errors
    ///
    /// A `TypeError` if it is no tensor. The inner result says why a tensor must be left to torch; `dims` is as before
    /// then.
    pub(crate) fn find(
        &self,
        tensor: &Bound<'_, PyAny>,
        dims: &mut Vec<i64>,
    ) -> PyResult<std::result::Result<Found, Unusual>> {
        if !self.is_plain(tensor) {
            let class = tensor.get_type();
            let name = class.name()?.to_string();
            return if class.is_subclass(self.tensor.bind(tensor.py()))? {
                Ok(Err(Unusual::Subclass(name)))
            } else {
                Err(PyTypeError::new_err(format!("expected a Tensor, got {name}")))
            };
        }
        let mut seen = DlTensor {
            data: ptr::null_mut(),
            device: Device { kind: 0, index: 0 },
            ndim: 0,
            dtype: Dtype { code: 0, bits: 0, lanes: 0 },
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        };
        // SAFETY: `tensor` is a live torch.Tensor, the class that the table of functions is of; `seen` is a struct of
        // the layout that the checked version of the table names.
        if unsafe { (self.describe)(tensor.as_ptr(), &raw mut seen) } != 0 {
            let error = PyErr::fetch(tensor.py()).value(tensor.py()).to_string();
            return Ok(Err(Unusual::Refused(error.lines().next().unwrap_or_default().to_owned())));
        }
        let Some(itemsize) = seen.dtype.itemsize() else {
            return Ok(Err(Unusual::Dtype(dtype_name(tensor)?)));
        };
        let ndim = usize::try_from(seen.ndim).unwrap_or(0);
        let (shape, strides): (&[i64], &[i64]) = if ndim == 0 {
            (&[], &[])
        } else {
            // SAFETY: both point to `ndim` numbers inside the tensor, which is alive, and nothing else runs before they
            // have been copied.
            unsafe { (std::slice::from_raw_parts(seen.shape, ndim), std::slice::from_raw_parts(seen.strides, ndim)) }
        };
        let numel = if shape.contains(&0) { 0 } else { shape.iter().map(|size| size.cast_unsigned()).product() };
        let start = dims.len();
        dims.extend_from_slice(shape);
        dims.extend_from_slice(strides);
        let found = Found {
            pointer: (seen.data as usize).wrapping_add(seen.byte_offset as usize),
            device: seen.device,
            dtype: seen.dtype,
            itemsize,
            ndim,
            numel,
        };
        let unusual = self.look_closer(tensor, &found, &dims[start..])?;
        if unusual.is_some() {
            dims.truncate(start);
        }
        Ok(unusual.map_or(Ok(found), Err))
    }

    /// Asks for what the exchange API does not tell, where it can matter.
    fn look_closer(&self, tensor: &Bound<'_, PyAny>, found: &Found, dims: &[i64]) -> PyResult<Option<Unusual>> {
        let py = tensor.py();
        if found.numel > 0 && found.pointer == 0 {
            return Ok(Some(Unusual::NoMemory));
        }
        if found.itemsize == 1 && found.dtype.code < 2 {
            let dtype = tensor.getattr(intern!(py, "dtype"))?;
            if !dtype.is(&self.int8) && !dtype.is(&self.uint8) {
                return Ok(Some(Unusual::Dtype(dtype.to_string())));
            }
        }
        // Only complex tensors can be conjugate views. A real negative view is the imaginary part of one: it steps over
        // the real parts, unless a single element hides that. (`torch._neg_view` of contiguous memory is private.)
        let complex = found.dtype.is_complex();
        if complex && self.is_conj.bind(py).call1((tensor,))?.is_truthy()? {
            return Ok(Some(Unusual::Lazy));
        }
        let (shape, strides) = dims.split_at(found.ndim);
        if found.dtype.is_differentiable()
            && (complex || found.numel == 1 || !is_contiguous(shape, strides))
            && self.is_neg.bind(py).call1((tensor,))?.is_truthy()?
        {
            return Ok(Some(Unusual::Lazy));
        }
        Ok(None)
    }
}

/// Whether elements in C order are neighbours in memory.
pub(crate) fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    for (size, stride) in shape.iter().zip(strides).rev() {
        if *size == 0 {
            return true;
        }
        if *size != 1 && *stride != expected {
            return false;
        }
        expected *= size;
    }
    true
}

fn dtype_name(tensor: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(tensor.getattr(intern!(tensor.py(), "dtype"))?.to_string())
}

fn exchange_api(module: &Bound<'_, PyModule>, tensor: &Bound<'_, PyType>) -> PyResult<&'static ExchangeApi> {
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

fn unsupported(module: &Bound<'_, PyModule>, why: &str) -> PyErr {
    let version = module.getattr("__version__").map(|version| version.to_string()).unwrap_or_default();
    PyRuntimeError::new_err(format!("pdrs reads tensors as torch 2.10 to 2.15 offer it, but torch {version} {why}"))
}

/// How the views of a slab are made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// A storage of its own over the memory of the slab, which it keeps alive.
    Dlpack,
    /// The storage of the slab.
    StableAbi,
    /// The storage of the slab, by `Tensor.as_strided`.
    AsStrided,
}

impl Door {
    pub(crate) fn parse(name: &str) -> PyResult<Self> {
        match name {
            "dlpack" => Ok(Self::Dlpack),
            "stable_abi" => Ok(Self::StableAbi),
            "as_strided" => Ok(Self::AsStrided),
            _ => Err(PyValueError::new_err(format!("expected 'dlpack', 'stable_abi' or 'as_strided', got {name:?}"))),
        }
    }
}

/// A contiguous tensor of which views are made.
pub(crate) struct Slab<'py> {
    torch: &'static Torch,
    tensor: Bound<'py, PyAny>,
    pub(crate) found: Found,
    maker: Maker,
}

enum Maker {
    Dlpack(Arc<Memory>),
    StableAbi(&'static StableAbi, Handle),
    AsStrided { offset: i64 },
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
    memory: Arc<Memory>,
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
        let (shape, strides) = dims.split_at(found.ndim);
        if !is_contiguous(shape, strides) {
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
        let door = door.unwrap_or(match &torch.stable_abi {
            _ if found.device.is_cpu() => Door::Dlpack,
            Some(_) => Door::StableAbi,
            None => Door::AsStrided,
        });
        let maker = match (door, &torch.stable_abi) {
            (Door::Dlpack, _) => Maker::Dlpack(Memory::of(torch, tensor, &found)?),
            (Door::StableAbi, Some(abi)) => Maker::StableAbi(abi, abi.handle(tensor)?),
            (Door::StableAbi, None) => return Err(PyRuntimeError::new_err("torch has this stable C ABI from 2.14 on")),
            (Door::AsStrided, _) => {
                Maker::AsStrided { offset: tensor.call_method0(intern!(py, "storage_offset"))?.extract()? }
            }
        };
        Ok(Self { torch, tensor: tensor.clone(), found, maker })
    }

    /// Remembers the memory, so that [`Torch::flat`] knows it again.
    pub(crate) fn remember(&self) {
        if let Maker::Dlpack(memory) = &self.maker {
            let mut memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
            if memories.by_address.len() >= memories.sweep_at {
                memories.by_address.retain(|_, memory| memory.strong_count() > 0);
                memories.sweep_at = 64.max(2 * memories.by_address.len());
            }
            memories.by_address.insert(memory.pointer, Arc::downgrade(memory));
        }
    }

    /// A tensor of these elements of the slab; a plain Tensor without gradients.
    pub(crate) fn view(&self, offset: u64, shape: &[i64], strides: &[i64]) -> PyResult<Bound<'py, PyAny>> {
        self.check(offset, shape, strides)?;
        let py = self.tensor.py();
        match &self.maker {
            Maker::Dlpack(memory) => memory.view(self.torch, py, offset * self.found.itemsize, shape, strides),
            Maker::StableAbi(abi, slab) => {
                let view = abi.view(slab, offset.cast_signed(), shape, strides)?;
                abi.to_python(py, &view, None)
            }
            Maker::AsStrided { offset: start } => {
                let (shape, strides) = (PyTuple::new(py, shape)?, PyTuple::new(py, strides)?);
                let offset = start + offset.cast_signed();
                let view = self.tensor.call_method1(intern!(py, "as_strided"), (shape, strides, offset))?;
                // Without this it would be a view in autograd's eyes, too, of a base that nobody knows.
                view.call_method0(intern!(py, "detach"))
            }
        }
    }

    /// A Parameter of these elements of the slab.
    pub(crate) fn parameter(
        &self,
        offset: u64,
        shape: &[i64],
        strides: &[i64],
        requires_grad: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let class = self.torch.parameter.bind(self.tensor.py());
        if let Maker::StableAbi(abi, slab) = &self.maker {
            self.check(offset, shape, strides)?;
            let view = abi.view(slab, offset.cast_signed(), shape, strides)?;
            abi.set_requires_grad(&view, requires_grad)?;
            return abi.to_python(self.tensor.py(), &view, Some(class));
        }
        let view = self.view(offset, shape, strides)?;
        view.setattr(intern!(view.py(), "__class__"), class)?;
        if requires_grad {
            self.torch.require_grad(&view)?;
        }
        Ok(view)
    }

    /// Refuses a view that would reach beyond the slab.
    fn check(&self, offset: u64, shape: &[i64], strides: &[i64]) -> PyResult<()> {
        let end = extent(shape, strides).and_then(|extent| offset.checked_add(extent));
        if shape.len() == strides.len() && end.is_some_and(|end| end <= self.found.numel) {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "a view of shape {shape:?} and strides {strides:?} at element {offset} reaches beyond the slab of {} elements",
            self.found.numel
        )))
    }
}

/// How many elements lie from the first of a tensor to the last; `None` if a stride is negative or the sum too large.
pub(crate) fn extent(shape: &[i64], strides: &[i64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0_u64;
    for (size, stride) in shape.iter().zip(strides) {
        let steps = u64::try_from(size - 1).ok()?;
        last = last.checked_add(steps.checked_mul(u64::try_from(*stride).ok()?)?)?;
    }
    last.checked_add(1).filter(|extent| i64::try_from(*extent).is_ok())
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
        let mut lent = Box::new(Lent {
            managed: ManagedTensor {
                version: Version { major: MAJOR, minor: MINOR },
                context: ptr::null_mut(),
                deleter: Some(give_back),
                flags: 0,
                tensor: DlTensor {
                    data: (self.pointer + offset as usize) as *mut c_void,
                    device: self.device,
                    ndim: ndim as i32,
                    dtype: self.dtype,
                    shape: ptr::null_mut(),
                    strides: ptr::null_mut(),
                    byte_offset: 0,
                },
            },
            few: [0; 4],
            more: (ndim > 2).then(|| [shape, strides].concat().into_boxed_slice()),
            memory: Arc::clone(self),
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
    /// The memory that an address lies in, if it is the memory of a slab.
    fn around(address: usize) -> Option<Arc<Self>> {
        let memories = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = memories.by_address.range(..=address).next_back().and_then(|(_, memory)| memory.upgrade());
        // Should this be the last reference by now, then Python code may run when it goes.
        drop(memories);
        memory.filter(|memory| ((address - memory.pointer) as u64) < memory.bytes)
    }
}

impl Torch {
    /// A flat tensor of `length` elements from address `base` on, if they all lie in one allocation.
    ///
    /// Addresses alone cannot tell, for two allocations may be neighbours. So the allocation is looked for: it is the
    /// memory of a slab that has views, or the storage of `tensor`, which lies at `base` or soon after.
    pub(crate) fn flat<'py>(
        &self,
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
        if let Some(memory) = Memory::around(base)
            && let Some(start) = inside(memory.pointer, memory.bytes)
            && memory.dtype == dtype
            && memory.device == device
        {
            return memory.view(self, py, start, &[length.cast_signed()], &[1]).map(Some);
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
}
