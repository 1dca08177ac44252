//! Gather and scatter: many regions of memory into one block, and back, with the GIL released.
//!
//! A block is a stretch of a slab; each region has its place there, as `pdrs_core::slab::layout` has laid it out. Regions may
//! be strided. They are copied in the order of the slab. Any part of the slab can be copied by itself. This is also how
//! threads share large work.
//!
//! What is guaranteed: a block is read or written only inside, and never one that overlaps a region. What the caller
//! must uphold, as with torch's own kernels: no other thread may meanwhile take the memory of a tensor away, by
//! `tensor.data = ...`, `resize_` or the like.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pdrs_core::Error;
use pdrs_core::slab::disjoint::Stretches;
use pdrs_core::slab::layout::{Layout, MOST_ALIGNMENT};
use pdrs_core::slab::strides::{self, Loop, for_each_row, may_fold};
use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::moves::pages::advise;
use crate::python::memory;
use crate::torch::Torch;
use crate::torch::bytes::{Bytes, Spread, hint};
use crate::torch::dlpack::{Dtype, Found};

/// How many regions are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// Work of at least so many bytes a thread is shared: below, starting threads costs more than it saves.
const BYTES_PER_THREAD: u64 = 8 << 20;

/// Regions smaller than this on average are copied by one thread: reading where they lie takes most of the time.
const SHARED_FROM: u64 = 4096;

/// A region and its place in the slab. There are millions of these: they are kept small.
#[derive(Clone, Copy)]
struct Region {
    memory: Bytes,
    /// In bytes, as everything here.
    offset: u64,
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
    stretches: Stretches,
    /// The lowest address, and the one behind the highest.
    lowest: usize,
    end: usize,
    /// Addresses that no region shares, as was seen when the last block was looked at.
    ///
    /// A slab is often copied through one small block, again and again. A look at all regions each time would take time
    /// that grows with the square of their number.
    apart: Mutex<Range<usize>>,
    /// Whether regions may share memory.
    are_overlapping: bool,
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
    memory: Bytes,
}

impl<'a, 'py> Block<'a, 'py> {
    pub(crate) fn new(torch: &Torch, tensor: &'a Bound<'py, PyAny>, dtype: Dtype) -> PyResult<Self> {
        let mut dims = Vec::new();
        let found = torch
            .find(tensor, &mut dims)?
            .map_err(|unusual| PyValueError::new_err(format!("expected a plain tensor as block, but it {unusual}")))?;
        if !found.device().is_cpu() {
            return Err(PyValueError::new_err("expected a block on the CPU"));
        }
        if found.dtype() != dtype {
            return Err(PyValueError::new_err("expected a block of the dtype of the group"));
        }
        if !found.is_contiguous() {
            let strides = &dims[found.ndim()..];
            return Err(PyValueError::new_err(format!("expected a contiguous block, got strides {strides:?}")));
        }
        Ok(Self { _owner: tensor, memory: found.bytes() })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.memory.len() as u64
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
        advise(memory.address(), memory.len());
        py.detach(|| regions.copy(Direction::Gather, memory, start, threads));
    }

    /// Copies the block into the regions.
    pub(crate) fn scatter(&self, py: Python<'_>, threads: usize) {
        let (regions, memory, start) = (self.regions, self.block.memory, self.start);
        // Whatever several regions share is written by one thread.
        let threads = if regions.are_overlapping { 1 } else { threads };
        py.detach(|| regions.copy(Direction::Scatter, memory, start, threads));
    }
}

impl Places {
    fn new(shift: u32) -> Self {
        Self { shift, layout: Layout::default(), is_too_large: false }
    }

    /// The place of a region of so many bytes.
    #[inline]
    fn give(&mut self, bytes: u64) -> u64 {
        let Ok(place) = self.layout.place(bytes >> self.shift) else {
            self.is_too_large = true;
            return 0;
        };
        place << self.shift
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
            stretches: Stretches::new(1 + tensors.len() / 16),
            lowest: usize::MAX,
            end: 0,
            apart: Mutex::new(0..0),
            are_overlapping: true,
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

    /// Adds the region of a tensor, which takes the next place in the slab.
    ///
    /// `strided` is given if its elements are no neighbours: shape, strides, and the dimensions from the outermost to the
    /// innermost. The elements are put there in C order of these dimensions.
    pub(crate) fn push(&mut self, found: &Found, strided: Option<(&[i64], &[i64], &[usize])>) -> PyResult<()> {
        let first_loop = self.loops.len();
        if let Some((shape, strides, order)) = strided {
            for each in strides::loops(shape, strides, order, self.itemsize) {
                memory::push(&mut self.loops, each)?;
            }
        }
        let loops = (self.loops.len() - first_loop) as u32;
        self.append(Region { memory: found.bytes(), offset: 0, first_loop: first_loop as u32, loops })
    }

    /// Adds the region of a tensor that differs from the last one only in its address.
    pub(crate) fn push_alike(&mut self, memory: Bytes) -> PyResult<()> {
        match self.list.last() {
            Some(last) => self.append(Region { memory, ..*last }),
            None => Ok(()),
        }
    }

    #[inline]
    fn append(&mut self, mut region: Region) -> PyResult<()> {
        region.offset = self.places.give(self.bytes_of(&region));
        let addresses = region.memory.addresses();
        if !addresses.is_empty() {
            self.lowest = self.lowest.min(addresses.start);
            self.end = self.end.max(addresses.end);
        }
        self.stretches.add(addresses);
        memory::push(&mut self.list, region)
    }

    /// Says that no two regions share memory.
    pub(crate) fn set_apart(&mut self) {
        self.are_overlapping = false;
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

    /// The bytes of its elements, which are as many in the slab.
    #[inline]
    fn bytes_of(&self, region: &Region) -> u64 {
        match self.loops_of(region) {
            [] => region.memory.len() as u64,
            loops => loops.iter().map(|each| each.count).product::<u64>() * self.itemsize,
        }
    }

    /// The bytes of the slab that belong to it.
    #[inline]
    fn place_of(&self, region: &Region) -> Range<u64> {
        region.offset..region.offset + self.bytes_of(region)
    }

    /// The address of the first byte, and of the one behind the last; equal for an empty region.
    pub(crate) fn addresses(&self, at: usize) -> Range<usize> {
        self.list[at].memory.addresses()
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
        for at in 0..self.list.len() {
            self.list[at].offset = self.places.give(self.bytes_of(&self.list[at]));
        }
    }

    /// The places in the slab.
    pub(crate) fn places(&self) -> impl Iterator<Item = Range<u64>> {
        self.list.iter().map(|region| self.place_of(region))
    }

    /// The number of the element of the slab at which a region begins.
    pub(crate) fn first_element(&self, at: usize) -> u64 {
        self.list[at].offset / self.itemsize
    }

    /// The regions that reach into these bytes of the slab.
    pub(crate) fn within(&self, bytes: Range<u64>) -> Range<usize> {
        let first = self.list.partition_point(|region| self.place_of(region).end <= bytes.start);
        first..first + self.list[first..].partition_point(|region| region.offset < bytes.end)
    }

    /// The address at which the slab begins, if all regions already lie as they would in one, and a region there.
    pub(crate) fn base(&self) -> Option<(usize, usize)> {
        let first = self.list.iter().position(|region| region.memory.len() > 0)?;
        let base = self.list[first].memory.address().checked_sub(self.list[first].offset as usize)?;
        let in_place = |region: &Region| {
            let is_there = region.memory.address() == base.wrapping_add(region.offset as usize);
            region.memory.len() == 0 || (region.loops == 0 && is_there)
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
        let Range { start: lowest, end } = block.memory.addresses();
        if lowest < end && self.lowest < end && self.end > lowest {
            let mut apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
            if !(apart.start <= lowest && end <= apart.end) {
                let shares = |region: &Region| {
                    let Range { start, end: behind } = region.memory.addresses();
                    start < behind && start < end && behind > lowest
                };
                if let Some(at) = self.list.iter().position(shares) {
                    return Err(at);
                }
                *apart = lowest..end;
            }
        }
        debug_assert!(start.is_multiple_of(self.itemsize) && block.bytes().is_multiple_of(self.itemsize));
        Ok(Part { regions: self, block, start })
    }

    /// How many threads are worth their start.
    fn useful_threads(&self, bytes: u64) -> usize {
        let length = self.list.last().map_or(0, |last| self.place_of(last).end);
        let average = length / self.list.len().max(1) as u64;
        if average < SHARED_FROM { 1 } else { (bytes / BYTES_PER_THREAD).max(1) as usize }
    }

    /// Copies between the regions and a block that begins at byte `start` of the slab. They share no memory ([`Self::part`]).
    fn copy(&self, direction: Direction, block: Bytes, start: u64, threads: usize) {
        let length = block.len() as u64;
        let part = (length / threads.max(1) as u64).next_multiple_of(MOST_ALIGNMENT).max(MOST_ALIGNMENT);
        // The parts are apart, so that no byte of the block or of a region is in the hands of two threads.
        let work = |from: u64| {
            self.copy_part(direction, block.part(from as usize, part.min(length - from) as usize), start + from);
        };
        let mut parts = (0..length).step_by(part as usize);
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

    fn copy_part(&self, direction: Direction, block: Bytes, start: u64) {
        let end = start + block.len() as u64;
        let of_block =
            |bytes: Range<u64>| block.part((bytes.start - start) as usize, (bytes.end - bytes.start) as usize);
        let mut filled = start;
        for batch in self.list[self.within(start..end)].chunks(BATCH) {
            for region in batch {
                hint(region.memory.address());
            }
            for region in batch {
                let place = self.place_of(region);
                let part = place.start.max(start)..place.end.min(end);
                if part.is_empty() {
                    continue;
                }
                if direction == Direction::Gather && filled < part.start {
                    of_block(filled..part.start).fill_zero();
                }
                self.copy_region(direction, region, part.start - place.start, of_block(part.clone()));
                filled = part.end;
            }
        }
        if direction == Direction::Gather {
            of_block(filled..end).fill_zero();
        }
    }

    /// Copies as many bytes as the block has, from byte `start` of a region on, as its elements lie in the slab.
    fn copy_region(&self, direction: Direction, region: &Region, start: u64, block: Bytes) {
        let [.., innermost] = self.loops_of(region) else {
            return copy_bytes(direction, region.memory.part(start as usize, block.len()), block);
        };
        let (itemsize, step) = (self.itemsize as usize, innermost.step as usize);
        let elements = start / self.itemsize..(start + block.len() as u64) / self.itemsize;
        let mut filled = 0;
        for_each_row(self.loops_of(region), elements, |offset, count| {
            let (offset, count) = (offset as usize, count as usize);
            let of_block = block.part(filled, count * itemsize);
            filled += of_block.len();
            if step == itemsize {
                return copy_bytes(direction, region.memory.part(offset, of_block.len()), of_block);
            }
            let of_region = region.memory.part(offset, region.memory.len() - offset);
            let (of_region, of_block) = (Spread { bytes: of_region, step }, Spread { bytes: of_block, step: itemsize });
            match direction {
                Direction::Gather => of_region.copy_to(of_block, itemsize, count),
                Direction::Scatter => of_block.copy_to(of_region, itemsize, count),
            }
        });
    }
}

fn copy_bytes(direction: Direction, region: Bytes, block: Bytes) {
    match direction {
        Direction::Gather => region.copy_to(block),
        Direction::Scatter => block.copy_to(region),
    }
}
