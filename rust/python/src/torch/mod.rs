//! The border to torch: where a tensor's values lie, and what else is asked of tensors by the million.
//!
//! Where a tensor lies is asked of torch's `DLPack` exchange API (`dlpack.rs`), which neither copies nor counts references.
//! What the exchange API does not tell has been found by experiment (torch 2.15) and is looked at here. It drops the
//! conjugate and negative bits (`lazy_bits.rs`); reports int1 to int7 and uint1 to uint7 as 8 bits; gives null for a tensor that
//! has lost its memory, a functionalized or a zero tensor, as for an empty one; and exports tensors that require
//! gradients and inference tensors like others. It refuses quantized, bits, sparse, meta, nested and functorch tensors.
//! Subclasses of Tensor are never asked: what they hold may be anything.
#![allow(unsafe_code)] // C structs and functions of torch; every pointer that crosses the border does so here.

pub(crate) mod dlpack;
pub(crate) mod lazy_bits;
pub(crate) mod own_functions;
pub(crate) mod stable_abi;

use std::ffi::c_void;
use std::ptr;

use pdrs_core::slab::strides::is_contiguous;
use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::iter::BorrowedTupleIterator;
use pyo3::types::{PyBool, PyDict, PyList, PyTuple, PyType};

use crate::torch::dlpack::{Describe, Device, DlTensor, Dtype, Export, Import, exchange_api, unsupported};
use crate::torch::lazy_bits::LazyBits;
use crate::torch::stable_abi::StableAbi;

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
    /// Whether elements in C order are neighbours.
    pub(crate) contiguous: bool,
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
    /// Python code that torch ran has changed it.
    Moved,
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
            Self::Moved => write!(f, "was changed while it was looked at"),
            Self::Dtype(name) => write!(f, "has the dtype {name}"),
        }
    }
}

/// An attribute of Tensor that is read and set without looking its name up, and without looking at the tensor's class.
///
/// torch has it from a table of C functions, as `CPython` has attributes of types that are written in C.
struct Attribute {
    get: ffi::getter,
    set: Option<ffi::setter>,
    closure: *mut c_void,
    /// Owns the table.
    _descriptor: Py<PyAny>,
}

// SAFETY: the pointer is an opaque argument of torch's functions, which are called with the GIL held only.
unsafe impl Send for Attribute {}
// SAFETY: as above; nothing can be changed through a shared reference.
unsafe impl Sync for Attribute {}

impl Attribute {
    fn new(tensor: &Bound<'_, PyType>, name: &str) -> PyResult<Self> {
        let descriptor = tensor.getattr(name)?;
        let unknown = || PyRuntimeError::new_err(format!("torch.Tensor.{name} is not an attribute written in C"));
        // SAFETY: `descriptor` is a live object. If this is its exact type, it is a struct of the type's layout, which
        // points to a row of a table that lives as long as the class that it is an attribute of.
        let row = unsafe {
            if ffi::Py_TYPE(descriptor.as_ptr()) != &raw mut ffi::PyGetSetDescr_Type {
                return Err(unknown());
            }
            *(*descriptor.as_ptr().cast::<ffi::PyGetSetDescrObject>()).d_getset
        };
        let get = row.get.ok_or_else(unknown)?;
        Ok(Self { get, set: row.set, closure: row.closure, _descriptor: descriptor.unbind() })
    }

    /// # Safety
    ///
    /// It must be a Tensor.
    unsafe fn get<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: `tensor` is a live object of the class that the attribute is of; a getter gives a new reference or
        // raises.
        unsafe { Bound::from_owned_ptr_or_err(tensor.py(), (self.get)(tensor.as_ptr(), self.closure)) }
    }

    /// # Safety
    ///
    /// It must be a Tensor.
    unsafe fn set(&self, tensor: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let set = self.set.ok_or_else(|| PyRuntimeError::new_err("an attribute of torch.Tensor cannot be set"))?;
        // SAFETY: both are live objects, and `tensor` is of the class that the attribute is of; a setter takes its own
        // references, and raises if not 0.
        let status = unsafe { set(tensor.as_ptr(), value.as_ptr(), self.closure) };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(tensor.py())) }
    }
}

/// What of torch is used here, looked up once.
pub(crate) struct Torch {
    pub(crate) export: Export,
    pub(crate) import: Import,
    describe: Describe,
    pub(crate) stable_abi: Option<StableAbi>,
    pub(crate) module: Py<PyModule>,
    tensor: Py<PyType>,
    pub(crate) parameter: Py<PyType>,
    int8: Py<PyAny>,
    uint8: Py<PyAny>,
    data: Attribute,
    grad: Attribute,
    requires_grad: Attribute,
    version: Attribute,
    increment_version: Py<PyAny>,
    lazy_bits: Option<LazyBits>,
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
            grad: Attribute::new(&tensor, "grad")?,
            requires_grad: Attribute::new(&tensor, "requires_grad")?,
            version: Attribute::new(&tensor, "_version")?,
            increment_version: increment_version(py)?.unbind(),
            lazy_bits: LazyBits::find(&module),
            is_conj: tensor.getattr("is_conj")?.unbind(),
            is_neg: tensor.getattr("is_neg")?.unbind(),
            tensor: tensor.unbind(),
            module: module.unbind(),
        })
    }

    /// Whether the class is exactly Tensor or Parameter.
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr().cast();
        class == self.parameter.as_ptr() || class == self.tensor.as_ptr()
    }

    pub(crate) fn is_parameter(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type_ptr().cast() == self.parameter.as_ptr()
    }

    fn get_attribute<'py>(&self, attribute: &Attribute, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        if !self.is_plain(tensor) {
            return Err(expected_a_tensor(tensor)?);
        }
        // SAFETY: it is a Tensor, as has just been seen.
        unsafe { attribute.get(tensor) }
    }

    fn set_attribute(&self, attribute: &Attribute, tensor: &Bound<'_, PyAny>, to: &Bound<'_, PyAny>) -> PyResult<()> {
        if !self.is_plain(tensor) {
            return Err(expected_a_tensor(tensor)?);
        }
        // SAFETY: it is a Tensor, as has just been seen.
        unsafe { attribute.set(tensor, to) }
    }

    /// `tensor.grad` of a plain tensor, without looking the attribute up.
    pub(crate) fn gradient<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.get_attribute(&self.grad, tensor)
    }

    pub(crate) fn requires_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.get_attribute(&self.requires_grad, tensor)?.is(PyBool::new(tensor.py(), true)))
    }

    pub(crate) fn require_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        self.set_attribute(&self.requires_grad, tensor, &PyBool::new(tensor.py(), true))
    }

    /// Whether torch counts what is written to a tensor: not of one from inference mode, which it guards otherwise.
    pub(crate) fn counts_writes(&self, tensor: &Bound<'_, PyAny>) -> bool {
        self.get_attribute(&self.version, tensor).is_ok()
    }

    /// Tells autograd that the values of tensors change, or are about to. No signal comes in between.
    pub(crate) fn increment_version(&self, tensors: &Bound<'_, PyList>) -> PyResult<()> {
        self.increment_version.bind(tensors.py()).call1((tensors,)).map(drop)
    }

    /// Whether torch lets a tensor take the data of such another one, which does not depend on values or shapes.
    pub(crate) fn can_hold(&self, tensor: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = tensor.py();
        let compatible = intern!(py, "_has_compatible_shallow_copy_type");
        self.module.bind(py).call_method1(compatible, (tensor, data))?.is_truthy()
    }

    /// Why torch would refuse [`Self::set_data`] of compatible data, if it would.
    pub(crate) fn check_rebindable(
        &self,
        tensor: &Bound<'_, PyAny>,
        trainable: bool,
    ) -> PyResult<std::result::Result<(), &'static str>> {
        if !self.counts_writes(tensor) {
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
        self.set_attribute(&self.data, tensor, data)
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
        match self.see(tensor)? {
            Ok(seen) => self.read(tensor, &seen, dims),
            Err(unusual) => Ok(Err(unusual)),
        }
    }

    /// What torch says of a tensor. Where the shape and the strides lie is good until the tensor changes.
    #[inline]
    fn see(&self, tensor: &Bound<'_, PyAny>) -> PyResult<std::result::Result<DlTensor, Unusual>> {
        if !self.is_plain(tensor) {
            let class = tensor.get_type();
            let name = class.name()?.to_string();
            return if class.is_subclass(self.tensor.bind(tensor.py()))? {
                Ok(Err(Unusual::Subclass(name)))
            } else {
                Err(expected_a_tensor(tensor)?)
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
        Ok(Ok(seen))
    }

    /// Makes sense of what torch has just said of a tensor.
    fn read(
        &self,
        tensor: &Bound<'_, PyAny>,
        seen: &DlTensor,
        dims: &mut Vec<i64>,
    ) -> PyResult<std::result::Result<Found, Unusual>> {
        let Some(itemsize) = seen.dtype.itemsize() else {
            return Ok(Err(Unusual::Dtype(dtype_name(tensor)?)));
        };
        // SAFETY: `tensor` has not changed since it was seen.
        let (shape, strides) = unsafe { seen.dims() };
        let start = dims.len();
        // As a loop: there are few, and a call of `memcpy` takes longer.
        dims.extend(shape.iter().chain(strides));
        let found = Found {
            pointer: seen.pointer(),
            device: seen.device,
            dtype: seen.dtype,
            itemsize,
            ndim: shape.len(),
            numel: if shape.contains(&0) { 0 } else { shape.iter().map(|size| size.cast_unsigned()).product() },
            contiguous: is_contiguous(shape, strides),
        };
        let mut unusual = self.look_closer(tensor, &found)?;
        if unusual.is_none() && self.asks_python(&found) && !self.is_still_there(tensor, &found, &dims[start..])? {
            unusual = Some(Unusual::Moved);
        }
        if unusual.is_some() {
            dims.truncate(start);
        }
        Ok(unusual.map_or(Ok(found), Err))
    }

    /// Whether a tensor still lies where it was found, after questions that Python code may have answered: a function
    /// mode.
    fn is_still_there(&self, tensor: &Bound<'_, PyAny>, found: &Found, dims: &[i64]) -> PyResult<bool> {
        let Ok(seen) = self.see(tensor)? else {
            return Ok(false);
        };
        // SAFETY: nothing has run since the tensor was seen.
        Ok(seen.pointer() == found.pointer && unsafe { seen.has_dims(dims) })
    }

    /// Asks for what the exchange API does not tell, where it can matter.
    fn look_closer(&self, tensor: &Bound<'_, PyAny>, found: &Found) -> PyResult<Option<Unusual>> {
        let py = tensor.py();
        if found.numel > 0 && found.pointer == 0 {
            return Ok(Some(Unusual::NoMemory));
        }
        if found.may_be_narrow() {
            let dtype = tensor.getattr(intern!(py, "dtype"))?;
            if !dtype.is(&self.int8) && !dtype.is(&self.uint8) {
                return Ok(Some(Unusual::Dtype(dtype.to_string())));
            }
        }
        let lazy = match self.lazy_bits {
            Some(bits) => bits.are_set(tensor),
            None => {
                (found.dtype.is_complex() && self.is_conj.bind(py).call1((tensor,))?.is_truthy()?)
                    || self.is_neg.bind(py).call1((tensor,))?.is_truthy()?
            }
        };
        Ok(lazy.then_some(Unusual::Lazy))
    }

    /// Whether [`Self::look_closer`] asks torch's Python.
    fn asks_python(&self, found: &Found) -> bool {
        self.lazy_bits.is_none() || found.may_be_narrow()
    }
}

/// Looks at tensors one after another: those of a list are mostly alike, so that only their addresses differ.
pub(crate) struct Finder {
    torch: &'static Torch,
    /// The last that was found, and its shape and strides.
    latest: Option<Found>,
    dims: Vec<i64>,
}

/// What a [`Finder`] sees.
pub(crate) enum Seen {
    /// All but the address is as of the last tensor that was found.
    Alike(usize),
    Other(Found),
    Unusual(Unusual),
}

impl Finder {
    pub(crate) fn new(torch: &'static Torch) -> Self {
        Self { torch, latest: None, dims: Vec::new() }
    }

    /// What [`Torch::find`] tells, with its errors.
    #[inline]
    pub(crate) fn find(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<Seen> {
        let seen = match self.torch.see(tensor)? {
            Ok(seen) => seen,
            Err(unusual) => return Ok(Seen::Unusual(unusual)),
        };
        if let Some(latest) = &self.latest
            && latest.device == seen.device
            && latest.dtype == seen.dtype
            // SAFETY: nothing has run since the tensor was seen.
            && unsafe { seen.has_dims(&self.dims) }
        {
            let pointer = seen.pointer();
            let closer = self.torch.lazy_bits.is_none_or(|bits| bits.are_set(tensor));
            if pointer == 0 || closer || latest.may_be_narrow() {
                let found = Found { pointer, ..*latest };
                if let Some(unusual) = self.torch.look_closer(tensor, &found)? {
                    return Ok(Seen::Unusual(unusual));
                }
                if !self.torch.is_still_there(tensor, &found, &self.dims)? {
                    return Ok(Seen::Unusual(Unusual::Moved));
                }
            }
            return Ok(Seen::Alike(pointer));
        }
        self.dims.clear();
        self.latest = None;
        Ok(match self.torch.read(tensor, &seen, &mut self.dims)? {
            Ok(found) => Seen::Other(*self.latest.insert(found)),
            Err(unusual) => Seen::Unusual(unusual),
        })
    }

    /// The last that was found and was not [`Seen::Alike`].
    pub(crate) fn latest(&self) -> Option<&Found> {
        self.latest.as_ref()
    }

    /// The shape and then the strides of the last that was found.
    pub(crate) fn dims(&self) -> &[i64] {
        &self.dims
    }
}

impl Found {
    /// Whether `DLPack` may have taken for it a tensor of integers of less than 8 bits.
    fn may_be_narrow(&self) -> bool {
        self.itemsize == 1 && self.dtype.code < 2
    }
}

/// What tells autograd of changes: the function in C, where there is it, because a signal may come wherever one in Python
/// begins, between a change and its being told.
fn increment_version(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    py.import("torch._C")?
        .getattr("_increment_version")
        .or_else(|_| py.import("torch.autograd.graph")?.getattr("increment_version"))
}

/// Begins to load what [`Torch::find`] will read of a tensor.
///
/// Its Python object is read, which is a cache miss if it is not in the cache, but misses of several objects overlap.
/// What it points to is only hinted at: with tensors in random order that makes `find` two to three times as fast.
pub(crate) fn prefetch(object: &Bound<'_, PyAny>) {
    let Some(words) = words_of(object) else {
        return;
    };
    // Behind the two words of every Python object lies the address of the tensor in C++; in older torch, a flag first.
    // Should this be wrong, then nothing is gained, but nothing is lost.
    let address = if words[2] > usize::from(u8::MAX) { words[2] } else { words[3] };
    for line in 0..3 {
        hint(address.wrapping_add(64 * line));
    }
}

/// The first words of a Python object, if it has as many.
#[inline]
fn words_of(object: &Bound<'_, PyAny>) -> Option<[usize; 4]> {
    let object = object.as_ptr();
    // SAFETY: `object` is a live Python object of at least so many bytes; any words of it may be read.
    unsafe {
        let is_large = (*ffi::Py_TYPE(object)).tp_basicsize >= size_of::<[usize; 4]>().cast_signed();
        is_large.then(|| ptr::read_volatile(object.cast()))
    }
}

/// Goes ahead of who looks at tensors one after another, and begins to load what [`Torch::find`] will read.
///
/// Where a tensor lies is known only when its object has been read, and where its storage lies when the tensor has; so
/// there are three of these walks, one behind the other.
pub(crate) struct Ahead<'a, 'py> {
    torch: &'static Torch,
    objects: BorrowedTupleIterator<'a, 'py>,
    tensors: BorrowedTupleIterator<'a, 'py>,
    storages: BorrowedTupleIterator<'a, 'py>,
    /// Whether it is certain where the object of a tensor has the address of the tensor in C++.
    is_address_known: bool,
}

impl<'a, 'py> Ahead<'a, 'py> {
    /// How many tensors each walk is ahead of the next one.
    const DISTANCE: usize = 16;

    pub(crate) fn new(torch: &'static Torch, list: &'a Bound<'py, PyTuple>) -> PyResult<Self> {
        let walk = || list.iter_borrowed();
        let is_address_known = match (&torch.stable_abi, walk().find(|object| torch.is_plain(object))) {
            (Some(abi), Some(tensor)) => {
                abi.handle(&tensor)?.address() == words_of(&tensor).map_or(0, |words| words[2])
            }
            _ => false,
        };
        let mut ahead = Self { torch, objects: walk(), tensors: walk(), storages: walk(), is_address_known };
        (0..2 * Self::DISTANCE).for_each(|_| ahead.step_objects());
        (0..Self::DISTANCE).for_each(|_| ahead.step_tensors());
        Ok(ahead)
    }

    /// To be called before each tensor is looked at.
    #[inline]
    pub(crate) fn step(&mut self) {
        self.step_objects();
        self.step_tensors();
        if self.is_address_known {
            self.step_storages();
        }
    }

    #[inline]
    fn step_objects(&mut self) {
        if let Some(object) = self.objects.next() {
            hint(object.as_ptr() as usize);
        }
    }

    #[inline]
    fn step_tensors(&mut self) {
        if let Some(object) = self.tensors.next() {
            prefetch(&object);
        }
    }

    #[inline]
    fn step_storages(&mut self) {
        if let Some(object) = self.storages.next()
            && self.torch.is_plain(&object)
            && let Some(words) = words_of(&object)
            && words[2] != 0
        {
            // SAFETY: this is the address of the tensor in C++, as was seen of an object of the same layout; it is alive,
            // and has many words. The third is the address of the storage; should it not be, then nothing is lost.
            let storage = unsafe { ptr::read_volatile((words[2] as *const usize).add(2)) };
            hint(storage);
            hint(storage.wrapping_add(64));
        }
    }
}

/// Begins to load what a look-up in a dict will read.
pub(crate) fn prefetch_dict(dict: &Bound<'_, PyDict>) {
    // The fifth word is the address of the table of keys. Should this be wrong, nothing is lost.
    // SAFETY: `dict` is a live dict, whose object has at least six words in every CPython.
    let table = unsafe { ptr::read_volatile(dict.as_ptr().cast::<usize>().add(4)) };
    for line in 0..4 {
        hint(table.wrapping_add(64 * line));
    }
}

/// Begins to load what lies at an address.
#[cfg(target_arch = "x86_64")]
pub(crate) fn hint(address: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address as *const i8) };
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn hint(_address: usize) {}

fn expected_a_tensor(got: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    Ok(PyTypeError::new_err(format!("expected a Tensor, got {}", got.get_type().name()?)))
}

fn dtype_name(tensor: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(tensor.getattr(intern!(tensor.py(), "dtype"))?.to_string())
}
