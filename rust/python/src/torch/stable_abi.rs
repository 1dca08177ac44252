//! torch's stable C ABI: tensors over memory of ours, and Parameters, made without a detour through Python.
//!
//! The functions are looked up by name in the `libtorch_cpu` that is already loaded. Where one of them is missing (torch
//! before 2.14) there is no [`StableAbi`], and callers take another way.
#![allow(unsafe_code, reason = "C functions of torch")]

use std::borrow::Cow;
use std::ffi::{CStr, c_char, c_void};
use std::mem::transmute;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyMemoryError, PyRuntimeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::torch::Plain;
use crate::torch::bytes::Bytes;
use crate::torch::dlpack::{Device, Dtype, Form, Memory};

type TensorHandle = *mut c_void;

type FromPython = unsafe extern "C" fn(*mut ffi::PyObject, *mut TensorHandle) -> i32;
type ToPython = unsafe extern "C" fn(TensorHandle, *mut ffi::PyTypeObject, *mut *mut ffi::PyObject) -> i32;
type Empty = unsafe extern "C" fn(i64, *const i64, *const i64, i32, i32, i32, *mut TensorHandle) -> i32;
type DataPointer = unsafe extern "C" fn(TensorHandle, *mut *mut c_void) -> i32;
type StorageSize = unsafe extern "C" fn(TensorHandle, *mut i64) -> i32;
type SetRequiresGrad = unsafe extern "C" fn(TensorHandle, bool) -> i32;
type FromBlob = unsafe extern "C" fn(
    *mut c_void,
    i64,
    *const i64,
    *const i64,
    i64,
    i32,
    i32,
    i32,
    *mut TensorHandle,
    i32,
    *const u8,
    i64,
    Option<GiveBack>,
    *mut c_void,
) -> i32;
type GiveBack = unsafe extern "C" fn(*mut c_void, *mut c_void);
type Ask = unsafe extern "C" fn(TensorHandle, *mut i32) -> i32;
type Delete = unsafe extern "C" fn(TensorHandle) -> i32;
type LastError = unsafe extern "C" fn() -> *const c_char;

pub(crate) struct StableAbi {
    from_python: FromPython,
    to_python: ToPython,
    from_blob: FromBlob,
    dtype: Ask,
    layout: Ask,
    device_type: Ask,
    device_index: Ask,
    empty: Empty,
    data_pointer: DataPointer,
    storage_size: StorageSize,
    set_requires_grad: SetRequiresGrad,
    delete: Delete,
    last_error: LastError,
    parameter: Py<PyType>,
    /// What [`dtype`](Self::dtype) has been told.
    numbers: Mutex<Vec<(Dtype, i32)>>,
}

/// A dtype, a layout and a device as torch numbers them.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    dtype: i32,
    layout: i32,
    /// Type and index.
    device: (i32, i32),
}

/// A reference of ours to a tensor.
pub(crate) struct Handle {
    tensor: TensorHandle,
    delete: Delete,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle came from torch as a new reference and is given up once, here.
        unsafe {
            (self.delete)(self.tensor);
        }
    }
}

impl StableAbi {
    /// Looks the functions up, if this torch has all of them.
    pub(crate) fn find(torch: &Bound<'_, PyModule>) -> PyResult<Option<Self>> {
        let Some(library) = Library::of(torch)? else {
            return Ok(None);
        };
        let parameter = torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind();
        // SAFETY: these are the names and the signatures in torch/csrc/stable/c/shim.h and
        // torch/csrc/inductor/aoti_torch/c/shim.h, which torch promises to keep. A Python object, a type object and a
        // tensor handle are opaque pointers there. Nobody unloads the library.
        let found = move || unsafe {
            Some(Self {
                from_python: transmute::<*const c_void, FromPython>(library.symbol("torch_tensor_from_pyobject")?),
                to_python: transmute::<*const c_void, ToPython>(library.symbol("torch_tensor_to_pyobject")?),
                from_blob: transmute::<*const c_void, FromBlob>(library.symbol("torch_from_blob")?),
                dtype: transmute::<*const c_void, Ask>(library.symbol("aoti_torch_get_dtype")?),
                layout: transmute::<*const c_void, Ask>(library.symbol("aoti_torch_get_layout")?),
                device_type: transmute::<*const c_void, Ask>(library.symbol("aoti_torch_get_device_type")?),
                device_index: transmute::<*const c_void, Ask>(library.symbol("aoti_torch_get_device_index")?),
                empty: transmute::<*const c_void, Empty>(library.symbol("aoti_torch_empty_strided")?),
                data_pointer: transmute::<*const c_void, DataPointer>(library.symbol("aoti_torch_get_data_ptr")?),
                storage_size: transmute::<*const c_void, StorageSize>(library.symbol("aoti_torch_get_storage_size")?),
                set_requires_grad: transmute::<*const c_void, SetRequiresGrad>(
                    library.symbol("torch_set_requires_grad")?,
                ),
                delete: transmute::<*const c_void, Delete>(library.symbol("aoti_torch_delete_tensor_object")?),
                last_error: transmute::<*const c_void, LastError>(
                    library.symbol("torch_exception_get_what_without_backtrace")?,
                ),
                parameter,
                numbers: Mutex::default(),
            })
        };
        Ok(found())
    }

    /// What [`lend`](Self::lend) has to know of a tensor, to make others like it.
    pub(crate) fn kind(&self, tensor: Plain<'_, '_>) -> PyResult<Kind> {
        // glibc ends the process where a thread asks for its place for messages only when memory has run out.
        self.message();
        let mut handle = ptr::null_mut();
        let [mut dtype, mut layout, mut device_type, mut device_index] = [0; 4];
        // SAFETY: `tensor` is a live torch.Tensor, and the GIL is held. torch gives a new reference, or not 0; then it
        // tells numbers of 32 bits of the handle, which lives until the end.
        unsafe {
            let handle = self.own((self.from_python)(tensor.0.as_ptr(), &raw mut handle), handle)?;
            self.check((self.dtype)(handle.tensor, &raw mut dtype))?;
            self.check((self.layout)(handle.tensor, &raw mut layout))?;
            self.check((self.device_type)(handle.tensor, &raw mut device_type))?;
            self.check((self.device_index)(handle.tensor, &raw mut device_index))?;
        }
        Ok(Kind { dtype, layout, device: (device_type, device_index) })
    }

    /// A tensor with a storage of its own over a part of a slab, which it keeps alive until torch lets the storage go.
    #[inline]
    pub(crate) fn lend(&self, memory: &Arc<Memory>, offset: u64, form: &Form<'_>) -> PyResult<Handle> {
        unsafe extern "C" fn give_back(_data: *mut c_void, owner: *mut c_void) {
            // SAFETY: torch calls this once, on whatever thread, with the pointer that `Arc::into_raw` gave.
            drop(unsafe { Arc::from_raw(owner.cast_const().cast::<Memory>()) });
        }
        let bytes = memory.place(offset, form)?;
        let kind = memory.kind().ok_or_else(|| PyRuntimeError::new_err("a slab whose kind was not asked for"))?;
        let ndim = form.shape().len() as u32;
        // As torch's tensors without elements have it: any other address could be that of another view, too. What lies
        // nowhere needs no owner, and torch would never let it go.
        let (address, give_back, owner): (usize, Option<GiveBack>, *mut c_void) = if bytes.len() == 0 {
            (0, None, ptr::null_mut())
        } else {
            (bytes.address(), Some(give_back), Arc::into_raw(Arc::clone(memory)).cast_mut().cast())
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the elements lie in `bytes`, whose memory `owner` keeps, which is sent to `give_back`; `kind` is of the
        // same memory. Shape and strides are `ndim` numbers each, which torch copies. If torch refuses, whether it has let
        // go of the owner cannot be told: it leaks.
        let status = unsafe {
            (self.from_blob)(
                address as *mut c_void,
                i64::from(ndim),
                form.shape().as_ptr(),
                form.strides().as_ptr(),
                0,
                kind.dtype,
                kind.device.0,
                kind.device.1,
                &raw mut handle,
                kind.layout,
                ptr::null(),
                0,
                give_back,
                owner,
            )
        };
        self.own(status, handle)
    }

    /// The number that torch has for the dtype of a tensor.
    ///
    /// torch is asked once for each dtype: a handle takes a quarter as long as a small tensor.
    pub(crate) fn dtype(&self, dtype: Dtype, tensor: Plain<'_, '_>) -> PyResult<i32> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, number)) = numbers.iter().find(|(known, _)| *known == dtype) {
            return Ok(*number);
        }
        let number = self.kind(tensor)?.dtype;
        numbers.push((dtype, number));
        Ok(number)
    }

    /// A new tensor on the CPU with whatever is in its memory, and that memory.
    pub(crate) fn empty(&self, dtype: i32, shape: &[i64], strides: &[i64]) -> PyResult<(Handle, Bytes)> {
        const CPU: i32 = 0;
        let ndim = i64::from(shape.len().min(strides.len()) as u32);
        let (mut handle, mut memory, mut size) = (ptr::null_mut(), ptr::null_mut(), 0);
        // SAFETY: shape and strides are `ndim` numbers each, which torch copies. The new tensor, which is alive as long as
        // its handle, begins where its storage does, and owns all of that.
        unsafe {
            let (shape, strides) = (shape.as_ptr(), strides.as_ptr());
            let status = (self.empty)(ndim, shape, strides, dtype, CPU, 0, &raw mut handle);
            let made = self.own(status, handle)?;
            self.check((self.data_pointer)(made.tensor, &raw mut memory))?;
            self.check((self.storage_size)(made.tensor, &raw mut size))?;
            Ok((made, Bytes::new(memory as usize, usize::try_from(size)?, Device::CPU)))
        }
    }

    pub(crate) fn require_grad(&self, tensor: &Handle) -> PyResult<()> {
        // SAFETY: `tensor` is a live handle.
        self.check(unsafe { (self.set_requires_grad)(tensor.tensor, true) })
    }

    /// The Python object of a tensor that has none yet: a Tensor or a Parameter.
    pub(crate) fn to_python<'py>(
        &self,
        py: Python<'py>,
        tensor: &Handle,
        is_parameter: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let class = if is_parameter { self.parameter.as_ptr().cast() } else { ptr::null_mut() };
        let mut made = ptr::null_mut();
        // SAFETY: `tensor` is a live handle and `class` Parameter, which adds nothing to Tensor, or null for Tensor; the
        // GIL is held. torch gives a new reference, or not 0.
        unsafe {
            if (self.to_python)(tensor.tensor, class, &raw mut made) != 0 || made.is_null() {
                return Err(PyErr::take(py).unwrap_or_else(|| self.error()));
            }
            Ok(Bound::from_owned_ptr(py, made))
        }
    }

    #[inline]
    fn own(&self, status: i32, tensor: TensorHandle) -> PyResult<Handle> {
        self.check(status)?;
        Ok(Handle { tensor, delete: self.delete })
    }

    #[inline]
    fn check(&self, status: i32) -> PyResult<()> {
        if status == 0 { Ok(()) } else { Err(self.error()) }
    }

    #[cold]
    fn error(&self) -> PyErr {
        let message = self.message();
        // What the C++ library says where memory has run out.
        if message.contains("bad_alloc") { PyMemoryError::new_err(message) } else { PyRuntimeError::new_err(message) }
    }

    fn message(&self) -> String {
        // SAFETY: torch keeps the message of this thread's last error until the next one; it is copied at once.
        let message = unsafe { (self.last_error)().as_ref().map(|text| CStr::from_ptr(text).to_string_lossy()) };
        message.map_or("torch failed".to_owned(), Cow::into_owned)
    }
}

/// A library that torch has loaded.
struct Library<'py> {
    ctypes: Bound<'py, PyModule>,
    library: Bound<'py, PyAny>,
}

impl<'py> Library<'py> {
    fn of(torch: &Bound<'py, PyModule>) -> PyResult<Option<Self>> {
        let py = torch.py();
        let file: std::path::PathBuf = torch.getattr("__file__")?.extract()?;
        let name = format!("libtorch_cpu{}", std::env::consts::DLL_SUFFIX);
        let (os, ctypes) = (py.import("os")?, py.import("ctypes")?);
        // Only if it is loaded already.
        let Ok(mode) = os.getattr("RTLD_NOLOAD").and_then(|mode| mode.bitor(os.getattr("RTLD_LAZY")?)) else {
            return Ok(None);
        };
        let path = file.with_file_name("lib").join(name).into_os_string();
        Ok(ctypes.call_method1("CDLL", (path, mode)).ok().map(|library| Self { ctypes, library }))
    }

    fn symbol(&self, name: &str) -> Option<*const c_void> {
        let address = || -> PyResult<usize> {
            let pointer = self.ctypes.getattr("c_void_p")?;
            self.ctypes.call_method1("cast", (self.library.getattr(name)?, pointer))?.getattr("value")?.extract()
        };
        address().ok().map(|address| address as *const c_void)
    }
}
