//! Gather and scatter: many regions of memory into one block, and back, with the GIL released.
//!
//! A block is a stretch of a slab; each region has its place there, as `pdrs_core::slab::layout` has laid it out. Regions may
//! be strided. They are copied in the order of the slab, and a part of the slab, from any element to any other, can be
//! copied by itself, which is how large work is shared among threads, too.
//!
//! What is guaranteed: a block is read or written only inside, and never one that overlaps a region. What the caller of
//! the functions for Python must uphold: as with torch's own kernels, no other thread may meanwhile take the memory of
//! one of the tensors away, by `tensor.data = ...`, `resize_` or the like.
#![allow(unsafe_code)] // Copies between addresses.

use std::hint::black_box;
use std::ops::Range;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use pdrs_core::Error;
use pdrs_core::slab::disjoint::Stretches;
use pdrs_core::slab::layout::{Layout, MOST_ALIGNMENT};
use pdrs_core::slab::strides::{self, Loop, for_each_row, may_fold};
use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::moves::huge_pages::advise;
use crate::python::memory;
use crate::torch::Torch;
use crate::torch::dlpack::Dtype;

/// How many regions are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// Work of at least so many bytes a thread is shared: below, starting threads costs more than it saves.
const BYTES_PER_THREAD: u64 = 8 << 20;

/// Regions smaller than this on average are copied by one thread: reading where they lie takes most of the time.
const SHARED_FROM: u64 = 4096;

/// A region and its place in the slab. There are millions of these: they are kept small.
#[derive(Clone, Copy)]
struct Region {
    pointer: usize,
    /// In bytes, as everything here.
    offset: u64,
    bytes: u64,
    /// Where its loops begin, and how many there are; none if its bytes are neighbours.
    first_loop: u32,
    loops: u32,
}

/// Regions in the order of their places in a slab.
pub(crate) struct Regions {
    /// What the memory belongs to.
    tensors: Py<PyTuple>,
    itemsize: u64,
    list: Vec<Region>,
    loops: Vec<Loop>,
    places: Places,
    /// The bytes from the address of the last region to its end.
    reach: usize,
    stretches: Stretches,
    /// The lowest address, and the one behind the highest.
    lowest: usize,
    end: usize,
    /// Addresses that no region shares, as was seen when the last block was looked at.
    ///
    /// A slab is often copied by way of one small block, again and again, and to look at all regions each time would
    /// take time that grows with the square of their number.
    apart: Mutex<Range<usize>>,
}

/// Gives regions their places in a slab, one after another.
struct Places {
    /// The logarithm of how many times narrower the elements may be made, and the regions are aligned even then.
    shift: u32,
    /// The slab of such narrow elements.
    layout: Layout,
    is_too_large: bool,
}

/// The memory of a contiguous tensor on the CPU.
pub(crate) struct Block<'a, 'py> {
    _owner: &'a Bound<'py, PyAny>,
    memory: Stretch,
}

#[derive(Clone, Copy)]
struct Stretch {
    pointer: usize,
    bytes: u64,
}

impl<'a, 'py> Block<'a, 'py> {
    pub(crate) fn new(torch: &Torch, tensor: &'a Bound<'py, PyAny>, dtype: Dtype) -> PyResult<Self> {
        let mut dims = Vec::new();
        let found = torch
            .find(tensor, &mut dims)?
            .map_err(|unusual| PyValueError::new_err(format!("expected a plain tensor as block, but it {unusual}")))?;
        if !found.device.is_cpu() {
            return Err(PyValueError::new_err("expected a block on the CPU"));
        }
        if found.dtype != dtype {
            return Err(PyValueError::new_err("expected a block of the dtype of the group"));
        }
        if !found.contiguous {
            let strides = &dims[found.ndim..];
            return Err(PyValueError::new_err(format!("expected a contiguous block, got strides {strides:?}")));
        }
        Ok(Self { _owner: tensor, memory: Stretch { pointer: found.pointer, bytes: found.numel * found.itemsize } })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.memory.bytes
    }
}

/// A part of a slab, and the block that holds it or shall hold it.
pub(crate) struct Part<'a, 'py> {
    regions: &'a Regions,
    block: Block<'a, 'py>,
    start: u64,
}

impl Part<'_, '_> {
    /// The regions that reach into this part.
    pub(crate) fn touched(&self) -> Range<usize> {
        self.regions.within(self.start..self.start + self.block.bytes())
    }

    /// How many threads are worth their start.
    pub(crate) fn useful_threads(&self) -> usize {
        self.regions.useful_threads(self.block.bytes())
    }

    /// Copies the regions into the block; gaps between them become zeros.
    pub(crate) fn gather(&self, py: Python<'_>, threads: usize) {
        let (regions, memory, start) = (self.regions, self.block.memory, self.start);
        // A large block is mostly new, and never written before.
        advise(memory.pointer, memory.bytes as usize);
        // SAFETY: the tensors that `regions` keeps own the regions, and the tensor in the block owns the block, which
        // shares memory with none of them (`Regions::part`) and holds whole elements, as all tensors do.
        py.detach(|| unsafe { regions.copy(Direction::Gather, memory, start, threads) });
    }

    /// Copies the block into the regions. If these share memory, `threads` has to be 1.
    pub(crate) fn scatter(&self, py: Python<'_>, threads: usize) {
        let (regions, memory, start) = (self.regions, self.block.memory, self.start);
        // SAFETY: as in `gather`.
        py.detach(|| unsafe { regions.copy(Direction::Scatter, memory, start, threads) });
    }
}

impl Places {
    fn new(shift: u32) -> Self {
        Self { shift, layout: Layout::default(), is_too_large: false }
    }

    #[inline]
    fn give(&mut self, region: &mut Region) {
        match self.layout.place(region.bytes >> self.shift) {
            Ok(place) => region.offset = place << self.shift,
            Err(_) => self.is_too_large = true,
        }
    }

    fn length(&self) -> Result<u64, Error> {
        let end = self.layout.end();
        // Not even with the widest elements may a slab be larger than torch can count.
        let widest = end.checked_mul(16).filter(|bytes| i64::try_from(*bytes).is_ok());
        if self.is_too_large || widest.is_none() { Err(Error::TooLarge) } else { Ok(end << self.shift) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Gather,
    Scatter,
}

impl Regions {
    /// No region yet. The slab will stay aligned when its elements are made `narrowest` bytes wide.
    pub(crate) fn new(tensors: &Bound<'_, PyTuple>, itemsize: u64, narrowest: u64, capacity: usize) -> PyResult<Self> {
        Ok(Self {
            tensors: tensors.clone().unbind(),
            itemsize,
            list: memory::with_capacity(capacity)?,
            loops: Vec::new(),
            places: Places::new((itemsize / narrowest.min(itemsize)).ilog2()),
            reach: 0,
            stretches: Stretches::new(1 + tensors.len() / 16),
            lowest: usize::MAX,
            end: 0,
            apart: Mutex::new(0..0),
        })
    }

    pub(crate) fn tensors<'py>(&self, py: Python<'py>) -> &Bound<'py, PyTuple> {
        self.tensors.bind(py)
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.tensors)
    }

    pub(crate) fn itemsize(&self) -> u64 {
        self.itemsize
    }

    /// Adds a region, which takes the next place in the slab.
    ///
    /// If its elements are no neighbours, they are put there in C order of the dimensions from the outermost to the
    /// innermost, which are given behind the shape and the strides.
    pub(crate) fn push(
        &mut self,
        pointer: usize,
        numel: u64,
        strided: Option<(&[i64], &[i64], &[usize])>,
    ) -> PyResult<()> {
        let first_loop = self.loops.len();
        if let Some((shape, strides, order)) = strided {
            for each in strides::loops(shape, strides, order, self.itemsize) {
                memory::push(&mut self.loops, each)?;
            }
        }
        let loops = (self.loops.len() - first_loop) as u32;
        let bytes = numel * self.itemsize;
        let region = Region { pointer, offset: 0, bytes, first_loop: first_loop as u32, loops };
        self.reach = self.end_of(&region) - pointer;
        self.append(region)
    }

    /// Adds a region that differs from the last one only in its address.
    pub(crate) fn push_alike(&mut self, pointer: usize) -> PyResult<()> {
        match self.list.last() {
            Some(last) => self.append(Region { pointer, ..*last }),
            None => Ok(()),
        }
    }

    #[inline]
    fn append(&mut self, mut region: Region) -> PyResult<()> {
        self.places.give(&mut region);
        let addresses = region.pointer..region.pointer + self.reach;
        if !addresses.is_empty() {
            self.lowest = self.lowest.min(addresses.start);
            self.end = self.end.max(addresses.end);
        }
        self.stretches.add(addresses);
        memory::push(&mut self.list, region)
    }

    /// Whether it was easily seen that no two regions share memory, and none is empty.
    pub(crate) fn are_in_order(&self) -> bool {
        self.stretches.are_apart()
    }

    /// The bytes of the slab.
    ///
    /// # Errors
    ///
    /// That torch could not count them, were its elements made as wide as any are.
    pub(crate) fn length(&self) -> Result<u64, Error> {
        self.places.length()
    }

    fn loops_of(&self, region: &Region) -> &[Loop] {
        &self.loops[region.first_loop as usize..(region.first_loop + region.loops) as usize]
    }

    /// The address behind the last byte.
    fn end_of(&self, region: &Region) -> usize {
        let bytes = if region.loops == 0 {
            region.bytes
        } else {
            self.loops_of(region).iter().map(|each| (each.count - 1) * each.step).sum::<u64>() + self.itemsize
        };
        region.pointer + bytes as usize
    }

    /// The address of the first byte, and of the one behind the last; equal for an empty region.
    pub(crate) fn addresses(&self, at: usize) -> Range<usize> {
        let region = &self.list[at];
        region.pointer..self.end_of(region)
    }

    /// Drops the regions at these places, which are ascending; the others move up in the slab.
    pub(crate) fn remove(&mut self, places: impl IntoIterator<Item = usize>) {
        let mut places = places.into_iter().peekable();
        let mut at = 0;
        self.list.retain(|_| {
            at += 1;
            places.next_if_eq(&(at - 1)).is_none()
        });
        self.places = Places::new(self.places.shift);
        for region in &mut self.list {
            self.places.give(region);
        }
    }

    /// The places in the slab.
    pub(crate) fn places(&self) -> impl Iterator<Item = Range<u64>> {
        self.list.iter().map(|region| region.offset..region.offset + region.bytes)
    }

    /// The number of the element of the slab at which a region begins.
    pub(crate) fn first_element(&self, at: usize) -> u64 {
        self.list[at].offset / self.itemsize
    }

    /// The regions that reach into these bytes of the slab.
    pub(crate) fn within(&self, bytes: Range<u64>) -> Range<usize> {
        let first = self.list.partition_point(|region| region.offset + region.bytes <= bytes.start);
        first..first + self.list[first..].partition_point(|region| region.offset < bytes.end)
    }

    /// The address at which the slab begins, if all regions already lie as they would in one, and a region there.
    pub(crate) fn base(&self) -> Option<(usize, usize)> {
        let first = self.list.iter().position(|region| region.bytes > 0)?;
        let base = self.list[first].pointer.checked_sub(self.list[first].offset as usize)?;
        let in_place = |region: &Region| {
            region.bytes == 0 || (region.loops == 0 && region.pointer == base.wrapping_add(region.offset as usize))
        };
        self.list.iter().all(in_place).then_some((base, first))
    }

    /// The first region in which two elements share memory, which cannot be scattered to.
    pub(crate) fn first_folded(&self) -> Option<usize> {
        if self.loops.is_empty() {
            return None;
        }
        self.list.iter().position(|region| region.loops > 0 && may_fold(self.loops_of(region), self.itemsize))
    }

    /// The part of the slab that begins at byte `start` and is as long as a block.
    ///
    /// # Errors
    ///
    /// Gives a region that shares memory with the block.
    pub(crate) fn part<'a, 'py>(&'a self, block: Block<'a, 'py>, start: u64) -> Result<Part<'a, 'py>, usize> {
        let Stretch { pointer, bytes } = block.memory;
        let end = pointer + bytes as usize;
        if bytes > 0 && self.lowest < end && self.end > pointer {
            let mut apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
            if !(apart.start <= pointer && end <= apart.end) {
                let shares =
                    |region: &Region| region.bytes > 0 && region.pointer < end && self.end_of(region) > pointer;
                if let Some(at) = self.list.iter().position(shares) {
                    return Err(at);
                }
                *apart = pointer..end;
            }
        }
        debug_assert!(start.is_multiple_of(self.itemsize) && bytes.is_multiple_of(self.itemsize));
        Ok(Part { regions: self, block, start })
    }

    /// How many threads are worth their start.
    fn useful_threads(&self, bytes: u64) -> usize {
        let length = self.list.last().map_or(0, |last| last.offset + last.bytes);
        let average = length / self.list.len().max(1) as u64;
        if average < SHARED_FROM { 1 } else { (bytes / BYTES_PER_THREAD).max(1) as usize }
    }

    /// # Safety
    ///
    /// The block can be read and written, and so can the regions, until this returns. They share no memory. `start` and
    /// the length of the block are multiples of the size of an element.
    unsafe fn copy(&self, direction: Direction, block: Stretch, start: u64, threads: usize) {
        let part = (block.bytes / threads.max(1) as u64).next_multiple_of(MOST_ALIGNMENT).max(MOST_ALIGNMENT);
        // SAFETY: the parts are apart, so that no byte of the block or of a region is in the hands of two threads.
        let work = |from: u64| unsafe {
            let bytes = part.min(block.bytes - from);
            self.copy_part(direction, Stretch { pointer: block.pointer + from as usize, bytes }, start + from);
        };
        let mut parts = (0..block.bytes).step_by(part as usize);
        let Some(first) = parts.next() else {
            return;
        };
        if threads <= 1 {
            return work(first);
        }
        // The threads end with this call: threads that outlive it would be missing after a fork.
        std::thread::scope(|scope| {
            for from in parts {
                let started =
                    std::thread::Builder::new().name("pdrs-copy".into()).spawn_scoped(scope, move || work(from));
                if started.is_err() {
                    work(from);
                }
            }
            work(first);
        });
    }

    unsafe fn copy_part(&self, direction: Direction, block: Stretch, start: u64) {
        let end = start + block.bytes;
        let mut filled = start;
        for batch in self.list[self.within(start..end)].chunks(BATCH) {
            touch(batch);
            for region in batch.iter().filter(|region| region.bytes > 0) {
                let from = region.offset.max(start);
                let to = end.min(region.offset + region.bytes);
                let at = |byte: u64| (block.pointer + (byte - start) as usize) as *mut u8;
                // SAFETY: `filled <= from < to <= end`, so all this lies inside the block; and `from - offset` to
                // `to - offset` lies inside the region. Block and regions are apart, as the caller promises.
                unsafe {
                    if direction == Direction::Gather && filled < from {
                        ptr::write_bytes(at(filled), 0, (from - filled) as usize);
                    }
                    self.copy_region(direction, region, from - region.offset..to - region.offset, at(from));
                }
                filled = to;
            }
        }
        if direction == Direction::Gather {
            // SAFETY: from `filled` to the end of the block.
            unsafe {
                let rest = (block.pointer + (filled - start) as usize) as *mut u8;
                ptr::write_bytes(rest, 0, (end - filled) as usize);
            }
        }
    }

    unsafe fn copy_region(&self, direction: Direction, region: &Region, bytes: Range<u64>, mut block: *mut u8) {
        if region.loops == 0 {
            let region = (region.pointer + bytes.start as usize) as *mut u8;
            // SAFETY: the caller gives bytes inside the region, and as many in the block.
            return unsafe { copy_bytes(direction, region, block, (bytes.end - bytes.start) as usize) };
        }
        let loops = self.loops_of(region);
        let step = loops[loops.len() - 1].step;
        let elements = bytes.start / self.itemsize..bytes.end / self.itemsize;
        for_each_row(loops, elements, |offset, count| {
            let row = (region.pointer + offset as usize) as *mut u8;
            // SAFETY: the row is `count` elements of the region, `step` bytes apart; the block has room for all rows,
            // one after another.
            unsafe {
                match self.itemsize {
                    size if size == step => copy_bytes(direction, row, block, (count * size) as usize),
                    1 => copy_row::<1>(direction, row, step, block, count),
                    2 => copy_row::<2>(direction, row, step, block, count),
                    4 => copy_row::<4>(direction, row, step, block, count),
                    8 => copy_row::<8>(direction, row, step, block, count),
                    _ => copy_row::<16>(direction, row, step, block, count),
                }
                block = block.add((count * self.itemsize) as usize);
            }
        });
    }
}

unsafe fn copy_bytes(direction: Direction, region: *mut u8, block: *mut u8, bytes: usize) {
    // SAFETY: the caller gives two stretches of `bytes` bytes that are apart.
    unsafe {
        match direction {
            Direction::Gather => ptr::copy_nonoverlapping(region, block, bytes),
            Direction::Scatter => ptr::copy_nonoverlapping(block, region, bytes),
        }
    }
}

/// Copies elements of `N` bytes that are `step` bytes apart in the region and neighbours in the block.
unsafe fn copy_row<const N: usize>(direction: Direction, region: *mut u8, step: u64, block: *mut u8, count: u64) {
    for at in 0..count as usize {
        // SAFETY: the caller gives `count` elements in each, apart; arrays of bytes need no alignment.
        unsafe {
            let (region, block) = (region.add(at * step as usize), block.add(at * N));
            copy_bytes(direction, region, block, N);
        }
    }
}

/// Reads a byte of each region: the loads do not wait for each other, as those of copies would.
fn touch(batch: &[Region]) {
    let sum = batch.iter().filter(|region| region.bytes > 0).fold(0_u8, |sum, region| {
        // SAFETY: the region has at least one byte and can be read, as the caller of the copy promises.
        sum ^ unsafe { ptr::read_volatile(region.pointer as *const u8) }
    });
    black_box(sum);
}
