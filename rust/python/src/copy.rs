//! Gather and scatter: many regions of memory into one block, and back, with the GIL released.
//!
//! A block is a stretch of a slab; each region has its place there, as `pdrs_core::staging` has laid it out. Regions may
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

use pdrs_core::staging::MOST_ALIGNMENT;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::tensor::{Dtype, Torch, is_contiguous};

/// How many regions are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// Work of at least so many bytes a thread is shared: below, starting threads costs more than it saves.
const BYTES_PER_THREAD: u64 = 8 << 20;

/// Regions smaller than this on average are copied by one thread: reading where they lie takes most of the time.
const SHARED_FROM: u64 = 4096;

/// A region and its place in the slab.
struct Region {
    pointer: usize,
    /// In bytes, as everything here.
    offset: u64,
    bytes: u64,
    /// From the first byte to the last: more than `bytes` if strided, less if elements share memory.
    extent: u64,
    /// Where its loops begin, and how many there are; none if its bytes are neighbours.
    first_loop: usize,
    loops: usize,
}

/// One dimension of a strided region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loop {
    count: u64,
    step: u64,
}

/// Regions in the order of their places in a slab.
pub(crate) struct Regions {
    /// What the memory belongs to.
    tensors: Py<PyTuple>,
    itemsize: u64,
    regions: Vec<Region>,
    loops: Vec<Loop>,
    /// From the lowest address to the highest.
    span: Range<usize>,
    /// The first region in which two elements share memory.
    first_folded: Option<usize>,
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
        let (shape, strides) = dims.split_at(found.ndim);
        if !found.device.is_cpu() {
            return Err(PyValueError::new_err("expected a block on the CPU"));
        }
        if found.dtype != dtype {
            return Err(PyValueError::new_err("expected a block of the dtype of the group"));
        }
        if !is_contiguous(shape, strides) {
            return Err(PyValueError::new_err(format!("expected a contiguous block, got strides {strides:?}")));
        }
        Ok(Self { _owner: tensor, memory: Stretch { pointer: found.pointer, bytes: found.numel * found.itemsize } })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.memory.bytes
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Gather,
    Scatter,
}

impl Regions {
    pub(crate) fn new(tensors: &Bound<'_, PyTuple>, itemsize: u64, capacity: usize) -> Self {
        Self {
            tensors: tensors.clone().unbind(),
            itemsize,
            regions: Vec::with_capacity(capacity),
            loops: Vec::new(),
            span: usize::MAX..0,
            first_folded: None,
        }
    }

    pub(crate) fn tensors<'py>(&self, py: Python<'py>) -> &Bound<'py, PyTuple> {
        self.tensors.bind(py)
    }

    pub(crate) fn itemsize(&self) -> u64 {
        self.itemsize
    }

    /// The places in the slab.
    pub(crate) fn places(&self) -> impl Iterator<Item = Range<u64>> {
        self.regions.iter().map(|region| region.offset..region.offset + region.bytes)
    }

    /// The number of the element of the slab at which a region begins.
    pub(crate) fn first_element(&self, at: usize) -> u64 {
        self.regions[at].offset / self.itemsize
    }

    /// The regions that reach into these bytes of the slab.
    pub(crate) fn within(&self, bytes: Range<u64>) -> Range<usize> {
        let first = self.regions.partition_point(|region| region.offset + region.bytes <= bytes.start);
        first..first + self.regions[first..].partition_point(|region| region.offset < bytes.end)
    }

    /// The address at which the slab begins, if all regions already lie as they would in one, and a region there.
    pub(crate) fn base(&self) -> Option<(usize, usize)> {
        let first = self.regions.iter().position(|region| region.bytes > 0)?;
        let base = self.regions[first].pointer.checked_sub(self.regions[first].offset as usize)?;
        let in_place = |region: &Region| {
            region.bytes == 0 || (region.loops == 0 && region.pointer == base.wrapping_add(region.offset as usize))
        };
        self.regions.iter().all(in_place).then_some((base, first))
    }

    /// The first region in which two elements share memory, which cannot be scattered to.
    pub(crate) fn first_folded(&self) -> Option<usize> {
        self.first_folded
    }

    /// Adds a region whose elements are neighbours, behind all others.
    pub(crate) fn push_run(&mut self, pointer: usize, offset: u64, bytes: u64) {
        self.add(Region { pointer, offset, bytes, extent: bytes, first_loop: 0, loops: 0 });
    }

    /// Adds a region of this shape and these strides, in elements, behind all others.
    ///
    /// Its elements are put into the slab in C order of `order`, the dimensions from the outermost to the innermost.
    pub(crate) fn push(&mut self, pointer: usize, offset: u64, shape: &[i64], strides: &[i64], order: &[usize]) {
        let first_loop = self.loops.len();
        let mut bytes = self.itemsize;
        for &dim in order {
            let (count, step) = (shape[dim].cast_unsigned(), strides[dim].cast_unsigned() * self.itemsize);
            bytes *= count;
            if count == 1 {
                continue;
            }
            match self.loops[first_loop..].last_mut() {
                // The outer dimension goes on where the inner one ends: both are one.
                Some(outer) if outer.step == count.wrapping_mul(step) => {
                    *outer = Loop { count: outer.count * count, step };
                }
                _ => self.loops.push(Loop { count, step }),
            }
        }
        let loops = &self.loops[first_loop..];
        if bytes == 0 || loops.is_empty() || matches!(loops, [only] if only.step == self.itemsize) {
            self.loops.truncate(first_loop);
            return self.push_run(pointer, offset, bytes);
        }
        if self.first_folded.is_none() && may_fold(loops, self.itemsize) {
            self.first_folded = Some(self.regions.len());
        }
        let extent = loops.iter().map(|each| (each.count - 1) * each.step).sum::<u64>() + self.itemsize;
        let loops = loops.len();
        self.add(Region { pointer, offset, bytes, extent, first_loop, loops });
    }

    fn add(&mut self, region: Region) {
        debug_assert!(
            self.regions.last().is_none_or(|last| last.offset + last.bytes <= region.offset),
            "places in a slab are apart"
        );
        if region.bytes > 0 {
            self.span.start = self.span.start.min(region.pointer);
            self.span.end = self.span.end.max(region.pointer + region.extent as usize);
        }
        self.regions.push(region);
    }

    /// A region that shares memory with a block.
    pub(crate) fn first_under(&self, block: &Block<'_, '_>) -> Option<usize> {
        let block = block.memory;
        let end = block.pointer + block.bytes as usize;
        if block.bytes == 0 || self.span.start >= end || self.span.end <= block.pointer {
            return None;
        }
        self.regions.iter().position(|region| {
            region.bytes > 0 && region.pointer < end && region.pointer + region.extent as usize > block.pointer
        })
    }

    /// Copies the part of the slab that begins at byte `start` and is as long as `block` into it.
    ///
    /// Gaps between the regions become zeros. At most `threads` threads take part.
    pub(crate) fn gather(&self, py: Python<'_>, block: &Block<'_, '_>, start: u64, threads: usize) {
        self.check(block, start);
        let memory = block.memory;
        // SAFETY: the tensors, kept by `self`, own the regions, and the tensor in `block` owns the block, which shares
        // memory with none of them and begins and ends between elements.
        py.detach(|| unsafe { self.copy(Direction::Gather, memory, start, threads) });
    }

    /// Copies `block` into the regions that lie in the part of the slab that begins at byte `start`.
    ///
    /// Regions that share memory are to be written by one thread.
    pub(crate) fn scatter(&self, py: Python<'_>, block: &Block<'_, '_>, start: u64, threads: usize) {
        self.check(block, start);
        let memory = block.memory;
        // SAFETY: as in `gather`.
        py.detach(|| unsafe { self.copy(Direction::Scatter, memory, start, threads) });
    }

    fn check(&self, block: &Block<'_, '_>, start: u64) {
        assert!(start.is_multiple_of(self.itemsize) && block.bytes().is_multiple_of(self.itemsize));
        assert!(self.first_under(block).is_none(), "a block must not share memory with the regions");
    }

    /// How many threads are worth their start.
    pub(crate) fn useful_threads(&self, bytes: u64) -> usize {
        let average = self.places().last().map_or(0, |last| last.end) / self.regions.len().max(1) as u64;
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
        for batch in self.regions[self.within(start..end)].chunks(BATCH) {
            touch(batch);
            for region in batch.iter().filter(|region| region.bytes > 0) {
                let from = region.offset.max(start);
                let to = end.min(region.offset + region.bytes);
                let at = |byte: u64| (block.pointer + (byte - start) as usize) as *mut u8;
                // SAFETY: `filled <= from < to <= end`, so all this lies inside the block; and `from - offset` to
                // `to - offset` lies inside the region. Block and regions are apart, as the caller promises.
                unsafe {
                    if direction == Direction::Gather {
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
        let loops = &self.loops[region.first_loop..region.first_loop + region.loops];
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

/// Calls `each` for every row of the innermost loop, or part of one, that the elements in C order lie in.
///
/// It gets the distance of its first element from that of the region, in bytes, and the number of elements.
fn for_each_row(loops: &[Loop], elements: Range<u64>, mut each: impl FnMut(u64, u64)) {
    let Some((inner, outer)) = loops.split_last() else {
        return;
    };
    let (mut left, mut row) = (elements.end - elements.start, elements.start / inner.count);
    let mut column = elements.start % inner.count;
    let mut index = vec![0; outer.len()];
    for (index, each) in index.iter_mut().zip(outer).rev() {
        *index = row % each.count;
        row /= each.count;
    }
    while left > 0 {
        let count = left.min(inner.count - column);
        let offset: u64 = index.iter().zip(outer).map(|(index, each)| index * each.step).sum();
        each(offset + column * inner.step, count);
        left -= count;
        column = 0;
        for (index, each) in index.iter_mut().zip(outer).rev() {
            *index += 1;
            if *index < each.count {
                break;
            }
            *index = 0;
        }
    }
}

/// Whether two elements may share memory: false only if each loop steps over all that the smaller ones reach.
fn may_fold(loops: &[Loop], itemsize: u64) -> bool {
    let mut sorted = loops.to_vec();
    sorted.sort_unstable_by_key(|each| each.step);
    let mut reach = itemsize;
    for each in sorted {
        if each.step < reach {
            return true;
        }
        reach += (each.count - 1) * each.step;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows in C order of a 3-dimensional region, from any element to any other.
    #[test]
    fn any_part_of_a_strided_region_is_the_same_part_of_its_elements_in_order() {
        let loops = [Loop { count: 3, step: 7 }, Loop { count: 2, step: 100 }, Loop { count: 4, step: 1000 }];
        let mut all = Vec::new();
        for (a, b, c) in (0..3).flat_map(|a| (0..2).flat_map(move |b| (0..4).map(move |c| (a, b, c)))) {
            all.push(a * 7 + b * 100 + c * 1000);
        }
        for start in 0..=all.len() {
            for end in start..=all.len() {
                let mut seen = Vec::new();
                for_each_row(&loops, start as u64..end as u64, |offset, count| {
                    seen.extend((0..count).map(|at| offset + at * 1000));
                });
                assert_eq!(seen, all[start..end]);
            }
        }
    }

    #[test]
    fn loops_that_step_on_each_other_are_seen() {
        let looped =
            |loops: &[(u64, u64)]| -> Vec<Loop> { loops.iter().map(|&(count, step)| Loop { count, step }).collect() };
        assert!(may_fold(&looped(&[(3, 0)]), 4));
        assert!(may_fold(&looped(&[(3, 4), (3, 4)]), 4));
        assert!(may_fold(&looped(&[(2, 4), (3, 4)]), 4));
        assert!(!may_fold(&looped(&[(3, 8), (2, 4)]), 4));
        assert!(!may_fold(&looped(&[(2, 4), (3, 8)]), 4));
        assert!(!may_fold(&looped(&[(5, 12)]), 4));
    }
}
