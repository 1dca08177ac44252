//! A private map of a part of a file that goes on behind it with zeros, where rows can be added.
#![allow(unsafe_code)] // A system call.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

/// Maps bytes of a file over the beginning of anonymous memory, which is private and begins on a page.
///
/// `offset` is a multiple of the page size. What the last page has behind those bytes becomes zero.
#[cfg(unix)]
#[pyfunction]
pub(crate) fn map_over(memory: &Bound<'_, PyAny>, file: i32, offset: i64, length: usize) -> PyResult<()> {
    use std::io::Error;

    let buffer = PyBuffer::<u8>::get(memory)?;
    // SAFETY: it is asked for a number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let address = buffer.buf_ptr() as usize;
    if length == 0 || length > buffer.len_bytes() || buffer.readonly() || !address.is_multiple_of(page) {
        return Err(PyValueError::new_err("expected memory of whole pages that is larger than the part of the file"));
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    // SAFETY: the pages are those of the caller's memory, which stays mapped as long as its owner lives, and of which
    // nobody has a reference: it has just been made. Only pages of it are replaced.
    let mapped = unsafe { libc::mmap(buffer.buf_ptr(), length, protection, flags, file, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(PyOSError::new_err(Error::last_os_error().to_string()));
    }
    let end = length.next_multiple_of(page).min(buffer.len_bytes());
    // SAFETY: these bytes lie in the caller's memory, on a page of the file that is private.
    unsafe { std::ptr::write_bytes((address + length) as *mut u8, 0, end - length) };
    Ok(())
}

#[cfg(not(unix))]
#[pyfunction]
pub(crate) fn map_over(_memory: &Bound<'_, PyAny>, _file: i32, _offset: i64, _length: usize) -> PyResult<()> {
    Err(PyOSError::new_err("this system does not map files over memory"))
}
