//! torch's stable C ABI: tensors over memory of ours, and Parameters, made without a detour through Python.
//!
//! The functions are looked up by name in the `libtorch_cpu` that is already loaded; where one of them is missing
//! (torch before 2.14) there is no [`StableAbi`], and callers take another way.
#![allow(unsafe_code)] // C functions of torch.

use std::ffi::{CStr, c_char, c_void};
use std::mem::transmute;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyMemoryError, PyRuntimeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::torch::dlpack::Dtype;

type TensorHandle = *mut c_void;

type FromPython = unsafe extern "C" fn(*mut ffi::PyObject, *mut TensorHandle) -> i32;
type ToPython = unsafe extern "C" fn(TensorHandle, *mut ffi::PyTypeObject, *mut *mut ffi::PyObject) -> i32;
type Empty = unsafe extern "C" fn(i64, *const i64, *const i64, i32, i32, i32, *mut TensorHandle) -> i32;
type DataPointer = unsafe extern "C" fn(TensorHandle, *mut *mut c_void) -> i32;
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
    set_requires_grad: SetRequiresGrad,
    delete: Delete,
    last_error: LastError,
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

impl Handle {
    /// The address of the tensor in C++, its `TensorImpl`.
    pub(crate) fn address(&self) -> usize {
        // SAFETY: a live handle points to an `at::Tensor`, which is a pointer and nothing else.
        unsafe { ptr::read(self.tensor.cast()) }
    }
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
        // SAFETY: these are the names and the signatures in torch/csrc/stable/c/shim.h and
        // torch/csrc/inductor/aoti_torch/c/shim.h, which torch promises to keep. A Python object, a type object and a
        // tensor handle are opaque pointers there.
        let found = || unsafe {
            Some(Self {
                from_python: transmute::<*mut c_void, FromPython>(library.symbol(c"torch_tensor_from_pyobject")?),
                to_python: transmute::<*mut c_void, ToPython>(library.symbol(c"torch_tensor_to_pyobject")?),
                from_blob: transmute::<*mut c_void, FromBlob>(library.symbol(c"torch_from_blob")?),
                dtype: transmute::<*mut c_void, Ask>(library.symbol(c"aoti_torch_get_dtype")?),
                layout: transmute::<*mut c_void, Ask>(library.symbol(c"aoti_torch_get_layout")?),
                device_type: transmute::<*mut c_void, Ask>(library.symbol(c"aoti_torch_get_device_type")?),
                device_index: transmute::<*mut c_void, Ask>(library.symbol(c"aoti_torch_get_device_index")?),
                empty: transmute::<*mut c_void, Empty>(library.symbol(c"aoti_torch_empty_strided")?),
                data_pointer: transmute::<*mut c_void, DataPointer>(library.symbol(c"aoti_torch_get_data_ptr")?),
                set_requires_grad: transmute::<*mut c_void, SetRequiresGrad>(
                    library.symbol(c"torch_set_requires_grad")?,
                ),
                delete: transmute::<*mut c_void, Delete>(library.symbol(c"aoti_torch_delete_tensor_object")?),
                last_error: transmute::<*mut c_void, LastError>(
                    library.symbol(c"torch_exception_get_what_without_backtrace")?,
                ),
                numbers: Mutex::default(),
            })
        };
        Ok(found())
    }

    /// A handle to a tensor.
    pub(crate) fn handle(&self, tensor: &Bound<'_, PyAny>) -> PyResult<Handle> {
        let mut handle = ptr::null_mut();
        // SAFETY: `tensor` is a live torch.Tensor, and the GIL is held; torch gives a new reference, or not 0.
        let status = unsafe { (self.from_python)(tensor.as_ptr(), &raw mut handle) };
        self.own(status, handle)
    }

    /// What [`lend`](Self::lend) has to know of a tensor, to make others like it.
    pub(crate) fn kind(&self, tensor: &Handle) -> PyResult<Kind> {
        // glibc ends the process where a thread asks for its place for messages only when memory has run out.
        // SAFETY: torch gives the address of a text that nobody reads here.
        unsafe {
            (self.last_error)();
        }
        let ask = |ask: Ask| {
            let mut answer = 0;
            // SAFETY: `tensor` is a live handle, and the answer is a number of 32 bits.
            if unsafe { ask(tensor.tensor, &raw mut answer) } == 0 { Ok(answer) } else { Err(self.error()) }
        };
        Ok(Kind {
            dtype: ask(self.dtype)?,
            layout: ask(self.layout)?,
            device: (ask(self.device_type)?, ask(self.device_index)?),
        })
    }

    /// A tensor with a storage of its own over memory that `owner` keeps alive, until torch lets the storage go.
    ///
    /// # Safety
    ///
    /// All elements must lie in memory that `owner` keeps, on the device of `kind`.
    pub(crate) unsafe fn lend<T: Send + Sync>(
        &self,
        address: usize,
        kind: Kind,
        shape: &[i64],
        strides: &[i64],
        owner: Arc<T>,
    ) -> PyResult<Handle> {
        unsafe extern "C" fn give_back<T>(_data: *mut c_void, owner: *mut c_void) {
            // SAFETY: torch calls this once, on whatever thread, with the pointer that `Arc::into_raw` gave.
            drop(unsafe { Arc::from_raw(owner.cast_const().cast::<T>()) });
        }
        let ndim = shape.len().min(strides.len()) as u32;
        // What lies nowhere needs no owner, and torch would never let it go.
        let (give_back, owner): (Option<GiveBack>, *mut c_void) = if address == 0 {
            (None, ptr::null_mut())
        } else {
            (Some(give_back::<T>), Arc::into_raw(owner).cast_mut().cast())
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the caller answers for the memory; shape and strides are `ndim` numbers each, which torch copies; the
        // owner is sent to `give_back`. If torch refuses, whether it has let go of the owner cannot be told: it leaks.
        let status = unsafe {
            (self.from_blob)(
                address as *mut c_void,
                i64::from(ndim),
                shape.as_ptr(),
                strides.as_ptr(),
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

    /// The number that torch has for the dtype of a tensor of one of its own classes.
    ///
    /// torch is asked once for each dtype: a handle takes a quarter as long as a small tensor.
    pub(crate) fn dtype(&self, dtype: Dtype, tensor: &Bound<'_, PyAny>) -> PyResult<i32> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, number)) = numbers.iter().find(|(known, _)| *known == dtype) {
            return Ok(*number);
        }
        let number = self.kind(&self.handle(tensor)?)?.dtype;
        numbers.push((dtype, number));
        Ok(number)
    }

    /// A new tensor on the CPU, and the address of its memory, with whatever is there.
    pub(crate) fn empty(&self, dtype: i32, shape: &[i64], strides: &[i64]) -> PyResult<(Handle, *mut c_void)> {
        const CPU: i32 = 0;
        let ndim = shape.len().min(strides.len()) as u32;
        let (mut handle, mut memory) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: shape and strides are `ndim` numbers each, which torch copies. The memory is asked of the new tensor,
        // which is alive as long as its handle.
        unsafe {
            let (shape, strides) = (shape.as_ptr(), strides.as_ptr());
            let status = (self.empty)(i64::from(ndim), shape, strides, dtype, CPU, 0, &raw mut handle);
            let made = self.own(status, handle)?;
            if (self.data_pointer)(made.tensor, &raw mut memory) != 0 {
                return Err(self.error());
            }
            Ok((made, memory))
        }
    }

    pub(crate) fn require_grad(&self, tensor: &Handle) -> PyResult<()> {
        // SAFETY: `tensor` is a live handle.
        let status = unsafe { (self.set_requires_grad)(tensor.tensor, true) };
        if status == 0 { Ok(()) } else { Err(self.error()) }
    }

    /// The Python object of a tensor that has none yet, of a class that adds nothing to Tensor.
    pub(crate) fn to_python<'py>(
        &self,
        py: Python<'py>,
        tensor: &Handle,
        class: Option<&Bound<'py, PyType>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let class = class.map_or(ptr::null_mut(), |class| class.as_ptr().cast());
        let mut made = ptr::null_mut();
        // SAFETY: `tensor` is a live handle and `class` a live subclass of Tensor, or null for Tensor itself; the GIL is
        // held. torch gives a new reference, or not 0.
        unsafe {
            if (self.to_python)(tensor.tensor, class, &raw mut made) != 0 || made.is_null() {
                return Err(PyErr::take(py).unwrap_or_else(|| self.error()));
            }
            Ok(Bound::from_owned_ptr(py, made))
        }
    }

    fn own(&self, status: i32, tensor: TensorHandle) -> PyResult<Handle> {
        if status == 0 { Ok(Handle { tensor, delete: self.delete }) } else { Err(self.error()) }
    }

    fn error(&self) -> PyErr {
        // SAFETY: torch keeps the message of this thread's last error until the next one; it is copied at once.
        let message = unsafe { (self.last_error)().as_ref().map(|text| CStr::from_ptr(text).to_string_lossy()) };
        let message = message.map_or("torch failed".to_owned(), std::borrow::Cow::into_owned);
        // What the C++ library says where memory has run out.
        if message.contains("bad_alloc") { PyMemoryError::new_err(message) } else { PyRuntimeError::new_err(message) }
    }
}

/// A library that torch has loaded.
struct Library(#[cfg_attr(not(unix), expect(dead_code, reason = "never made there"))] *mut c_void);

impl Library {
    #[cfg(unix)]
    fn of(torch: &Bound<'_, PyModule>) -> PyResult<Option<Self>> {
        use std::os::unix::ffi::OsStringExt;
        let file: std::path::PathBuf = torch.getattr("__file__")?.extract()?;
        let name = format!("libtorch_cpu{}", std::env::consts::DLL_SUFFIX);
        let path = file.with_file_name("lib").join(name).into_os_string().into_vec();
        let Ok(path) = std::ffi::CString::new(path) else {
            return Ok(None);
        };
        // SAFETY: the path is a C string. The library is not loaded anew, so none of its code runs.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        Ok((!library.is_null()).then_some(Self(library)))
    }

    #[cfg(not(unix))]
    fn of(_torch: &Bound<'_, PyModule>) -> PyResult<Option<Self>> {
        Ok(None)
    }

    #[cfg(unix)]
    fn symbol(&self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the library stays loaded, for nobody closes it; the name is a C string.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    }

    #[cfg(not(unix))]
    fn symbol(&self, _name: &CStr) -> Option<*mut c_void> {
        None
    }
}
