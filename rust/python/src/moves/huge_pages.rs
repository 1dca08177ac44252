//! Large blocks of memory on huge pages, which Linux gives to who asks for them (`madvise`).
//!
//! A large table that is looked into at random misses the processor's translation cache at nearly every look, and a
//! fresh one faults once for each 4 KiB that is first written. On pages of 2 MiB both are rare. Elsewhere than on Linux,
//! and where its administrator has switched them off, nothing changes.
//!
//! The allocator also keeps a reserve for small blocks. Whatever grows with what a caller asks for fails with a
//! `MemoryError` ([`crate::python::memory`]), but errors, too, take a few bytes, and Rust ends a process that has none.
#![allow(unsafe_code)] // An allocator is unsafe by its trait; the advice is a system call.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use pyo3::prelude::*;

use crate::torch::Torch;

/// Smaller blocks are not worth a system call: they may hold no huge page whole.
const LARGE: usize = 4 << 20;

/// Larger blocks are refused where memory has run out.
const SMALL: usize = 64 << 10;

/// As much as the C library asks the system for at least, and more: addresses only, as long as nobody writes there.
const RESERVE: Layout = match Layout::from_size_align(4 << 20, 16) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two"),
};

/// Given back to the system when a small block cannot be had.
static RESERVED: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

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
        had(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        had(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
        if layout.size() > SMALL {
            keep_reserve();
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promises; a block that cannot be had again is as it was.
        had(size, || unsafe { System.realloc(block, layout, size) })
    }
}

#[inline]
fn had(size: usize, ask: impl Fn() -> *mut u8) -> *mut u8 {
    let block = ask();
    if !block.is_null() {
        advise(block as usize, size);
        return block;
    }
    if size > SMALL {
        return block;
    }
    give_reserve_back();
    ask()
}

/// Sets memory aside for small blocks, if there is none.
pub(crate) fn keep_reserve() {
    if !RESERVED.load(Ordering::Relaxed).is_null() {
        return;
    }
    // SAFETY: the layout has a size.
    let block = unsafe { System.alloc(RESERVE) };
    let none = RESERVED.compare_exchange(ptr::null_mut(), block, Ordering::AcqRel, Ordering::Relaxed);
    if none.is_err() && !block.is_null() {
        // SAFETY: it came from there, and nobody else has seen it: another thread was faster.
        unsafe { System.dealloc(block, RESERVE) };
    }
}

#[cold]
fn give_reserve_back() {
    let block = RESERVED.swap(ptr::null_mut(), Ordering::AcqRel);
    if !block.is_null() {
        // SAFETY: it came from there with this layout, and is nobody else's any more.
        unsafe { System.dealloc(block, RESERVE) };
    }
}

/// Asks for huge pages for memory, whatever it holds, if there is much: for the pages that lie in it whole.
#[cfg(target_os = "linux")]
#[inline]
pub(crate) fn advise(address: usize, bytes: usize) {
    if bytes < LARGE {
        return;
    }
    let begin = address.next_multiple_of(HUGE_PAGE);
    let end = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
    if begin < end {
        // SAFETY: the advice changes no value, whatever lies there; where it cannot be taken, nothing happens.
        unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn advise(_address: usize, _bytes: usize) {}

/// Asks for huge pages for a tensor's memory, if it is a large plain tensor on the CPU; best before it is written to.
#[pyfunction]
pub(crate) fn use_huge_pages(tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    let torch = Torch::get(tensor.py())?;
    if let Ok(found) = torch.find(tensor, &mut Vec::new())?
        && found.device.is_cpu()
        && found.contiguous
    {
        advise(found.pointer, usize::try_from(found.numel * found.itemsize)?);
    }
    Ok(())
}
