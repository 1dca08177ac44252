//! The memory of tensors: bytes that are copied, set to zero, or fetched into the cache before they are used.
//!
//! [`Bytes`] come from torch only: from a tensor that was found, from one that torch has just made, or from a slab. Each
//! operation checks its bounds. No check can tell whether the memory is still there: as with torch's own kernels, nobody
//! may take it away meanwhile, by `tensor.data = ...`, `resize_` or the like. So no Python code runs between finding a
//! tensor and using its bytes. Where some can, the Python side answers for it, and its docs say so.
#![allow(unsafe_code, reason = "reads and writes memory by its address")]

use std::ops::Range;
use std::{ptr, slice};

use crate::torch::dlpack::Device;

/// The memory that a tensor reaches over, from its first byte to its last. There are millions of these: they are small.
#[derive(Clone, Copy)]
pub(crate) struct Bytes {
    address: usize,
    /// How many there are; with [`ELSEWHERE`] set if the CPU cannot use them.
    length: usize,
}

/// A bit that no length of memory has.
const ELSEWHERE: usize = 1 << (usize::BITS - 1);

/// An address that elements of any width may begin at.
const ALIGNED: usize = 64;

impl Bytes {
    /// # Safety
    ///
    /// A tensor on this device owns these bytes until somebody takes its memory away.
    pub(super) unsafe fn new(address: usize, length: usize, device: Device) -> Self {
        let elsewhere = if device.is_cpu() { 0 } else { ELSEWHERE };
        Self { address, length: length | elsewhere }
    }

    /// The address of the first.
    #[inline]
    pub(crate) fn address(self) -> usize {
        self.address
    }

    /// How many there are.
    #[inline]
    pub(crate) fn len(self) -> usize {
        self.length & !ELSEWHERE
    }

    /// The addresses from the first to the last.
    #[inline]
    pub(crate) fn addresses(self) -> Range<usize> {
        self.address..self.address + self.len()
    }

    /// So many of them, from the byte `start` on.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    #[inline]
    pub(crate) fn part(self, start: usize, length: usize) -> Self {
        assert!(start <= self.len() && length <= self.len() - start, "a part reaches beyond its memory");
        Self { address: self.address + start, length: length | (self.length & ELSEWHERE) }
    }

    /// Copies them to as many others, which they may overlap.
    ///
    /// # Panics
    ///
    /// If there are more or fewer of those, or if the CPU cannot use them.
    #[inline]
    pub(crate) fn copy_to(self, target: Self) {
        assert!(self.length == target.length && self.are_here(), "copied to memory of another length or device");
        // SAFETY: tensors own both (`Bytes::new`); the CPU can use both, and they are equally long.
        unsafe { ptr::copy(self.address as *const u8, target.address as *mut u8, self.length) }
    }

    /// Sets them to zero.
    ///
    /// # Panics
    ///
    /// If the CPU cannot use them.
    #[inline]
    pub(crate) fn fill_zero(self) {
        assert!(self.are_here(), "zeros for memory of another device");
        self.slice().fill(0);
    }

    /// The bytes, which the CPU can use, and nothing else reads or writes meanwhile.
    #[inline]
    fn slice<'a>(self) -> &'a mut [u8] {
        debug_assert!(self.are_here(), "memory of another device");
        let address = if self.length == 0 { ptr::without_provenance_mut(ALIGNED) } else { self.address as *mut u8 };
        // SAFETY: a tensor owns these bytes (`Bytes::new`), and the CPU can use them.
        unsafe { slice::from_raw_parts_mut(address, self.length) }
    }

    /// Whether the CPU can use them.
    #[inline]
    pub(crate) fn are_here(self) -> bool {
        self.length & ELSEWHERE == 0
    }
}

/// The bytes of several pieces of memory, to be read and written; `None` if two of them overlap, or if the CPU cannot use
/// one.
///
/// Nothing else may read or write them meanwhile, nor take them away: see the module's description.
#[inline]
pub(crate) fn exclusive<'a>(pieces: &[Bytes]) -> Option<Vec<&'a mut [u8]>> {
    let is_apart = |(at, one): (usize, &Bytes)| {
        let of_one = one.addresses();
        one.are_here()
            && pieces[..at].iter().all(|other| {
                let of_other = other.addresses();
                of_one.is_empty() || of_other.is_empty() || of_one.end <= of_other.start || of_other.end <= of_one.start
            })
    };
    pieces.iter().enumerate().all(is_apart).then(|| pieces.iter().map(|piece| piece.slice()).collect())
}

/// Elements that are as many bytes apart as their step, the first of them at the beginning of the bytes.
#[derive(Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) bytes: Bytes,
    pub(crate) step: usize,
}

impl Spread {
    /// Copies so many elements of 1, 2, 4, 8 or 16 bytes to others.
    ///
    /// # Panics
    ///
    /// If there are fewer, or if the CPU cannot use them.
    pub(crate) fn copy_to(self, target: Self, itemsize: usize, count: usize) {
        match itemsize {
            1 => self.copy_elements::<1>(target, count),
            2 => self.copy_elements::<2>(target, count),
            4 => self.copy_elements::<4>(target, count),
            8 => self.copy_elements::<8>(target, count),
            16 => self.copy_elements::<16>(target, count),
            _ => panic!("elements of {itemsize} bytes"),
        }
    }

    fn copy_elements<const N: usize>(self, target: Self, count: usize) {
        assert!(self.holds(N, count) && target.holds(N, count), "elements beyond their memory");
        let (mut from, mut to) = (self.bytes.address, target.bytes.address);
        for _ in 0..count {
            // SAFETY: tensors own both (`Bytes::new`), the CPU can use both, and `count` elements lie in them. Arrays of
            // bytes need no alignment.
            unsafe { ptr::write(to as *mut [u8; N], ptr::read(from as *const [u8; N])) };
            from = from.wrapping_add(self.step);
            to = to.wrapping_add(target.step);
        }
    }

    /// Whether so many elements lie in the bytes, which the CPU can use.
    fn holds(self, itemsize: usize, count: usize) -> bool {
        let Some(last) = count.checked_sub(1) else { return true };
        let end = last.checked_mul(self.step).and_then(|start| start.checked_add(itemsize));
        self.bytes.are_here() && end.is_some_and(|end| end <= self.bytes.len())
    }
}

/// Begins to load what lies at an address, wherever that is.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline]
pub(crate) fn hint(address: usize) {
    // SAFETY: a prefetch is a hint: it changes nothing, and never faults, whatever the address.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address as *const i8);
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags));
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn hint(_address: usize) {}
