//! Pages of memory: large blocks on huge ones, and maps of files.
//!
//! Random reads of a large table miss the processor's translation cache nearly every time. Fresh memory faults once for
//! each 4 KiB that is first written. On pages of 2 MiB both are rare. Linux gives these to who asks for them
//! (`madvise`). Elsewhere, and where its administrator has switched them off, nothing changes.
//!
//! The allocator also keeps a reserve for small blocks. Whatever grows with what a caller asks for fails with a
//! `MemoryError` ([`crate::python::memory`]), but errors, too, take a few bytes, and Rust ends a process that has none.
#![allow(unsafe_code, reason = "an allocator is unsafe by its trait; the rest are system calls")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PySlice};

use crate::torch::Torch;

/// Smaller blocks are not worth a system call: they may hold no huge page whole.
const LARGE: usize = 4 << 20;

/// Larger blocks are refused where memory has run out.
const SMALL: usize = 64 << 10;

/// As much as the C library asks the system for at least, and more: addresses only, as long as nobody writes there.
const RESERVED: usize = LARGE - 1;

/// Given back to the system when a small block cannot be had.
static RESERVE: Mutex<Vec<u8>> = Mutex::new(Vec::new());

#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// The system's allocator, which asks for huge pages for what is large.
struct HugePages;

#[global_allocator]
static ALLOCATOR: HugePages = HugePages;

// SAFETY: all calls are handed on to the system's allocator as they came; the advice changes no memory.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        let ask = || unsafe { System.alloc(layout) };
        let mut block = ask();
        if block.is_null() && layout.size() <= SMALL {
            give_reserve_back();
            block = ask();
        }
        if !block.is_null() {
            advise(block as usize, layout.size());
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
        if layout.size() > SMALL {
            keep_reserve();
        }
    }
}

/// Sets memory aside for small blocks, if there is none.
pub(crate) fn keep_reserve() {
    // Who has it locked is about to change it: another thread, or this one, whose change came here.
    if let Ok(mut reserve) = RESERVE.try_lock()
        && reserve.capacity() == 0
    {
        let _ = reserve.try_reserve_exact(RESERVED);
    }
}

#[cold]
fn give_reserve_back() {
    if let Ok(mut reserve) = RESERVE.try_lock() {
        *reserve = Vec::new();
    }
}

/// Asks for huge pages for memory, whatever it holds, if there is much: for the pages that lie in it whole.
#[inline]
pub(crate) fn advise(address: usize, bytes: usize) {
    advise_by(address, bytes, false);
}

/// The same; with `now` memory that has small pages already moves to huge ones before this returns.
#[cfg(target_os = "linux")]
#[inline]
fn advise_by(address: usize, bytes: usize, now: bool) {
    if bytes < LARGE {
        return;
    }
    let begin = address.next_multiple_of(HUGE_PAGE);
    let end = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE].into_iter().take(1 + usize::from(now)) {
        if begin < end {
            // SAFETY: the advice changes no value, whatever lies there; where it cannot be taken, nothing happens.
            unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, advice) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_by(_address: usize, _bytes: usize, _now: bool) {}

/// Asks for huge pages for a tensor's memory, if it is a large plain tensor on the CPU; best before it is written to.
///
/// With `now`, memory that was written to moves to huge pages before this returns, where the system can do that.
#[pyfunction]
#[pyo3(signature = (tensor, now = false))]
pub(crate) fn use_huge_pages(tensor: &Bound<'_, PyAny>, now: bool) -> PyResult<()> {
    let torch = Torch::get(tensor.py())?;
    if let Ok(found) = torch.find(tensor, &mut Vec::new())?
        && found.device().is_cpu()
        && found.is_contiguous()
    {
        tensor.py().detach(|| advise_by(found.bytes().address(), found.bytes().len(), now));
    }
    Ok(())
}

/// Maps bytes of a file over the beginning of anonymous memory, which is private and begins on a page.
///
/// The memory goes on behind them with zeros, where rows can be added. `offset` is a multiple of the page size.
#[cfg(unix)]
#[pyfunction]
pub(crate) fn map_over(memory: &Bound<'_, PyAny>, file: i32, offset: i64, length: usize) -> PyResult<()> {
    use std::io::Error;

    let py = memory.py();
    let buffer = PyBuffer::<u8>::get(memory)?;
    let page: usize = py.import("mmap")?.getattr("PAGESIZE")?.extract()?;
    let address = buffer.buf_ptr() as usize;
    if length == 0 || length > buffer.len_bytes() || buffer.readonly() || !address.is_multiple_of(page) {
        return Err(PyValueError::new_err("expected memory of whole pages that is larger than the part of the file"));
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    // SAFETY: the pages are those of the caller's memory, which stays mapped as long as its owner lives, and of which
    // nobody else has a reference: it has just been made. Only pages of it are replaced.
    let mapped = unsafe { libc::mmap(buffer.buf_ptr(), length, protection, flags, file, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(PyOSError::new_err(Error::last_os_error().to_string()));
    }
    // What the last page has behind those bytes is of the file, too.
    let end = length.next_multiple_of(page).min(buffer.len_bytes());
    let rest = PySlice::new(py, length.cast_signed(), end.cast_signed(), 1);
    PyMemoryView::from(memory)?.set_item(rest, PyBytes::new(py, &vec![0; end - length]))
}

#[cfg(not(unix))]
#[pyfunction]
pub(crate) fn map_over(_memory: &Bound<'_, PyAny>, _file: i32, _offset: i64, _length: usize) -> PyResult<()> {
    Err(PyOSError::new_err("this system does not map files over memory"))
}
