//! Tensors of one dtype and device, and the places that they have, or shall have, in one slab.

use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use numpy::{PyArray1, PyReadonlyArray1};
use pdrs_core::slab::disjoint::Lines;
use pdrs_core::slab::layout;
use pdrs_core::slab::strides::{is_dense, make_dense, order_of};
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::moves::regions::{Block, Part, Regions};
use crate::moves::slab::{Door, Slab, flat};
use crate::python::memory::{self, OrRaise, new_list};
use crate::torch::bytes::{Bytes, hint};
use crate::torch::dlpack::{Device, Dtype, Form, Found};
use crate::torch::{Finder, Seen, Torch};

/// How many tensors ahead the object of one is fetched, and at half of that what the object points to, so that their
/// cache misses overlap.
const AHEAD: usize = 32;

/// A tensor of the list. There are millions of these: they are kept small.
struct Entry {
    index: u32,
    /// The number of its form.
    form: u32,
}

/// Shapes and strides of tensors. Those that follow each other are mostly the same.
struct Forms {
    dims: Vec<i64>,
    /// Where each form ends in `dims`.
    ends: Vec<usize>,
}

impl Forms {
    fn dims(&self, form: u32) -> &[i64] {
        let form = form as usize;
        let begin = if form == 0 { 0 } else { self.ends[form - 1] };
        &self.dims[begin..self.ends[form]]
    }

    /// The number of the latest form.
    fn last(&self) -> u32 {
        (self.ends.len() as u32).saturating_sub(1)
    }

    /// The number of a form, which is a new one if it is not that of the latest.
    fn add(&mut self, dims: &[i64]) -> PyResult<u32> {
        if !self.ends.is_empty() && self.dims(self.last()) == dims {
            return Ok(self.last());
        }
        pdrs_core::memory::append(&mut self.dims, dims).or_raise()?;
        memory::push(&mut self.ends, self.dims.len())?;
        Ok(self.last())
    }

    fn get(&self, form: u32) -> Form<'_> {
        let dims = self.dims(form);
        let (shape, strides) = dims.split_at(dims.len() / 2);
        Form::new(shape, strides)
    }
}

/// The forms of entries, one after another: a form is got anew only where it changes.
struct Latest<'a> {
    forms: &'a Forms,
    latest: Option<(u32, Form<'a>)>,
}

impl<'a> Latest<'a> {
    fn new(forms: &'a Forms) -> Self {
        Self { forms, latest: None }
    }

    #[inline]
    fn of(&mut self, entry: &Entry) -> &Form<'a> {
        if self.latest.is_some_and(|(form, _)| form != entry.form) {
            self.latest = None;
        }
        &self.latest.get_or_insert_with(|| (entry.form, self.forms.get(entry.form))).1
    }
}

/// Tensors of one dtype and device, and the place of each in one slab.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct TensorGroup {
    device: Device,
    dtype: Dtype,
    /// Elements of a slab.
    length: u64,
    regions: Regions,
    /// The entries that have a region of their own, in order, and their shapes and strides in the slab.
    entries: Vec<Entry>,
    forms: Forms,
    /// Entries that are the tensor of an earlier one: their index, and the region.
    repeated: Vec<(u32, usize)>,
    overlapping: bool,
    /// Whether the tensors have been made views of a slab, so that the regions are theirs no more.
    moved: AtomicBool,
}

/// The groups, and for each tensor that is in none its index and why.
type Grouped = (Vec<TensorGroup>, Vec<(usize, String)>);

/// Puts tensors into groups of one dtype and device, and lays each group out in a slab.
#[pyfunction]
#[pyo3(signature = (tensors, *, keep_strides = true, narrowest = None))]
pub(crate) fn group_tensors(
    tensors: &Bound<'_, PyList>,
    keep_strides: bool,
    narrowest: Option<u64>,
) -> PyResult<Grouped> {
    let narrowest = narrowest.unwrap_or(16);
    if !matches!(narrowest, 1 | 2 | 4 | 8 | 16) {
        return Err(PyValueError::new_err(format!("narrowest must be 1, 2, 4, 8 or 16 bytes, got {narrowest}")));
    }
    if u32::try_from(tensors.len()).is_err() {
        return Err(PyValueError::new_err(format!("expected at most {} tensors, got {}", u32::MAX, tensors.len())));
    }
    let py = tensors.py();
    let torch = Torch::get(py)?;
    let tensors = memory::to_tuple(tensors)?;
    let mut groups: Vec<TensorGroup> = Vec::new();
    let mut unusual = Vec::new();
    let mut current = 0;
    let mut finder = Finder::new(torch);
    let list = tensors.as_slice();
    for (index, tensor) in list.iter().enumerate() {
        // Tensors in no order are grouped in 1/1.7 of the time, and a move takes 1/1.2.
        list.get(index + AHEAD).into_iter().for_each(|object| hint(object.as_ptr() as usize));
        list.get(index + AHEAD / 2).into_iter().for_each(|object| torch.prefetch(object));
        let seen = finder
            .find(tensor)
            .map_err(|error| PyTypeError::new_err(format!("tensors[{index}]: {}", error.value(py))))?;
        match seen {
            // The last that was found was the last of this group, too.
            Seen::Alike(memory) => groups[current].add_alike(index as u32, memory)?,
            Seen::Other(_) => {
                let Some(found) = finder.found().copied() else { continue };
                let fits = |group: &TensorGroup| group.device == found.device() && group.dtype == found.dtype();
                if !groups.get(current).is_some_and(fits) {
                    current = groups.iter().position(fits).unwrap_or(groups.len());
                }
                if current == groups.len() {
                    // Nearly always all tensors are of one group.
                    let capacity = if current == 0 { tensors.len() } else { 0 };
                    groups.push(TensorGroup::new(&tensors, &found, narrowest, capacity)?);
                }
                groups[current].add(index as u32, &found, finder.dims(), keep_strides)?;
            }
            Seen::Unusual(why) => memory::push(&mut unusual, (index, why.to_string()))?,
        }
    }
    for group in &mut groups {
        group.take_repeated(py)?;
        let bytes = group.regions.length().map_err(|error| PyValueError::new_err(error.to_string()))?;
        group.length = bytes / group.regions.itemsize();
    }
    Ok((groups, unusual))
}

impl TensorGroup {
    /// An empty group, whose slab stays aligned when each element is made as narrow as `narrowest`.
    fn new(tensors: &Bound<'_, PyTuple>, found: &Found, narrowest: u64, capacity: usize) -> PyResult<Self> {
        Ok(Self {
            device: found.device(),
            dtype: found.dtype(),
            length: 0,
            regions: Regions::new(tensors, found.itemsize(), narrowest, capacity)?,
            entries: memory::with_capacity(capacity)?,
            forms: Forms { dims: Vec::new(), ends: Vec::new() },
            repeated: Vec::new(),
            overlapping: false,
            moved: AtomicBool::new(false),
        })
    }

    /// Adds a tensor; `dims` are its shape and its strides.
    fn add(&mut self, index: u32, found: &Found, dims: &[i64], keep_strides: bool) -> PyResult<()> {
        let form = if found.is_contiguous() {
            self.regions.push(found, None)?;
            self.forms.add(dims)?
        } else {
            let mut dims = dims.to_vec();
            let (shape, strides) = dims.split_at_mut(found.ndim());
            let order = if keep_strides { order_of(shape, strides) } else { (0..found.ndim()).collect() };
            self.regions.push(found, Some((shape, strides, &order)))?;
            if !(keep_strides && is_dense(shape, strides, &order)) {
                make_dense(shape, strides, &order);
            }
            self.forms.add(&dims)?
        };
        memory::push(&mut self.entries, Entry { index, form })
    }

    /// Adds a tensor that differs from the last one of the group only in its address.
    fn add_alike(&mut self, index: u32, memory: Bytes) -> PyResult<()> {
        self.regions.push_alike(memory)?;
        memory::push(&mut self.entries, Entry { index, form: self.forms.last() })
    }

    /// Whether it is easily seen that no two tensors share memory, and none is empty, for each begins a cache line, as
    /// most that was allocated does.
    fn are_on_lines_of_their_own(&self) -> bool {
        let mut lines = Lines::new(self.entries.len());
        (0..self.entries.len()).all(|at| {
            let addresses = self.regions.addresses(at);
            !addresses.is_empty() && lines.take(addresses)
        })
    }

    /// Takes out what is listed again, and notes whether other entries share memory.
    fn take_repeated(&mut self, py: Python<'_>) -> PyResult<()> {
        if self.regions.are_in_order() || self.are_on_lines_of_their_own() {
            self.regions.set_apart();
            return Ok(());
        }
        let tensors = self.regions.tensors(py).as_slice();
        let object = |at: usize| tensors[self.entries[at].index as usize].as_ptr() as usize;
        // A stable sort makes use of stretches that are in order already.
        let mut order =
            memory::collect((0..self.entries.len()).map(|at| (self.regions.addresses(at).start, at as u32)))?;
        // The sort takes as much memory again, and ends the process where it cannot be had.
        drop(memory::with_capacity::<(usize, u32)>(order.len())?);
        order.sort_by_key(|(address, _)| *address);
        // For each entry that is listed again: the entry that it repeats.
        let mut again = Vec::new();
        let mut overlapping = false;
        let mut end = 0;
        let mut note = |addresses: Range<usize>| {
            if !addresses.is_empty() {
                overlapping |= addresses.start < end;
                end = end.max(addresses.end);
            }
        };
        for same_address in order.chunk_by(|one, other| one.0 == other.0) {
            if let [(_, only)] = same_address {
                note(self.regions.addresses(*only as usize));
                continue;
            }
            let mut objects = memory::with_capacity(same_address.len())?;
            for &(_, at) in same_address {
                objects.push((object(at as usize), at as usize));
            }
            objects.sort_unstable();
            for same_object in objects.chunk_by(|one, other| one.0 == other.0) {
                let first = same_object[0].1;
                for (at, _) in same_object[1..].iter().map(|(_, at)| (*at, first)) {
                    memory::push(&mut again, (at, first))?;
                }
                note(self.regions.addresses(first));
            }
        }
        self.overlapping = overlapping;
        if !overlapping {
            self.regions.set_apart();
        }
        again.sort_unstable();
        pdrs_core::memory::reserve(&mut self.repeated, again.len()).or_raise()?;
        for &(at, first) in &again {
            let gone_before = again.partition_point(|(gone, _)| *gone < first);
            self.repeated.push((self.entries[at].index, first - gone_before));
        }
        let mut gone = again.iter().map(|(at, _)| *at).peekable();
        let mut at = 0;
        self.entries.retain(|_| {
            at += 1;
            gone.next_if_eq(&(at - 1)).is_none()
        });
        self.regions.remove(again.iter().map(|(at, _)| *at));
        Ok(())
    }
}

/// Makes new tensors that are views of a slab.
#[pyfunction]
#[pyo3(signature = (slab, offsets, shapes, *, requires_grad = None, door = None))]
pub(crate) fn slab_views<'py>(
    slab: &Bound<'py, PyAny>,
    offsets: &Bound<'py, PyAny>,
    shapes: &Bound<'py, PyList>,
    requires_grad: Option<bool>,
    door: Option<&str>,
) -> PyResult<Bound<'py, PyList>> {
    let py = slab.py();
    let torch = Torch::get(py)?;
    let offsets = match offsets.extract::<PyReadonlyArray1<'_, i64>>() {
        Ok(array) => memory::collect(array.as_array().iter().copied())?,
        Err(_) => memory::try_collect(offsets.cast::<PyList>()?.iter().map(|offset| offset.extract()))?,
    };
    if offsets.len() != shapes.len() {
        return Err(PyValueError::new_err(format!(
            "expected as many offsets as shapes, got {} and {}",
            offsets.len(),
            shapes.len()
        )));
    }
    let slab = Slab::new(torch, slab, door.map(Door::parse).transpose()?)?;
    if requires_grad == Some(true) && !slab.found.dtype().is_differentiable() {
        return Err(PyValueError::new_err("only floating point and complex Parameters can require gradients"));
    }
    let _paused = Paused::new(py)?;
    check_room(shapes.len(), "none was made")?;
    let mut made = memory::with_capacity(shapes.len())?;
    let mut strides = Vec::new();
    for (offset, shape) in offsets.into_iter().zip(shapes) {
        let offset = u64::try_from(offset)
            .map_err(|_| PyValueError::new_err(format!("expected offsets of 0 or more, got {offset}")))?;
        let shape: Vec<i64> = shape.extract()?;
        strides.clear();
        strides.resize(shape.len(), 0);
        make_dense(&shape, &mut strides, &(0..shape.len()).collect::<Vec<_>>());
        let form = Form::new(&shape, &strides);
        let view = match requires_grad {
            Some(requires_grad) => slab.parameter(offset, &form, requires_grad)?,
            None => slab.view(offset, &form)?,
        };
        memory::push(&mut made, view)?;
    }
    slab.remember();
    new_list(py, made.into_iter().map(Ok))
}

#[pymethods]
impl TensorGroup {
    fn __len__(&self) -> usize {
        self.entries.len() + self.repeated.len()
    }

    #[getter]
    fn indices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(PyArray1::from_vec(py, self.by_index(|index, _| i64::from(index))?))
    }

    #[getter]
    fn offsets<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(PyArray1::from_vec(py, self.by_index(|_, at| self.regions.first_element(at).cast_signed())?))
    }

    #[getter]
    fn length(&self) -> u64 {
        self.length
    }

    #[getter]
    fn largest(&self) -> u64 {
        self.regions.places().map(|place| place.end - place.start).max().unwrap_or(0)
    }

    #[getter]
    fn dtype<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.tensor(py, 0)?.getattr(intern!(py, "dtype"))
    }

    #[getter]
    fn device<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.tensor(py, 0)?.getattr(intern!(py, "device"))
    }

    #[getter]
    fn overlapping(&self) -> bool {
        self.overlapping
    }

    #[pyo3(signature = (out, start = 0))]
    fn gather(&self, out: &Bound<'_, PyAny>, start: u64) -> PyResult<()> {
        let py = out.py();
        let torch = Torch::get(py)?;
        let part = self.part(torch, out, start)?;
        if torch.requires_grad(out)? {
            return Err(PyValueError::new_err("expected a block that does not require gradients"));
        }
        let threads = threads(torch, py, part.useful_threads())?;
        torch.increment_version(&PyList::new(py, [out])?)?;
        part.gather(py, threads);
        Ok(())
    }

    #[pyo3(signature = (block, start = 0))]
    fn scatter(&self, block: &Bound<'_, PyAny>, start: u64) -> PyResult<()> {
        let py = block.py();
        let torch = Torch::get(py)?;
        let part = self.part(torch, block, start)?;
        if let Some(at) = self.regions.first_folded() {
            return Err(PyValueError::new_err(format!(
                "tensors[{}] cannot be written: several of its elements share memory",
                self.entries[at].index
            )));
        }
        let threads = threads(torch, py, part.useful_threads())?;
        let mut written = Vec::new();
        for at in part.touched() {
            let tensor = self.tensor(py, at)?;
            // Any dtype can be written, but torch would not count up the version of a tensor from inference mode.
            if let Err(why) = torch.check_rebindable(tensor, true)? {
                return Err(PyValueError::new_err(format!("tensors[{}] {why}", self.entries[at].index)));
            }
            memory::push(&mut written, tensor)?;
        }
        torch.increment_version(&new_list(py, written.into_iter().cloned().map(Ok))?)?;
        part.scatter(py, threads);
        Ok(())
    }

    #[pyo3(signature = (slab, *, detached = false, door = None))]
    fn views<'py>(&self, slab: &Bound<'py, PyAny>, detached: bool, door: Option<&str>) -> PyResult<Bound<'py, PyList>> {
        let py = slab.py();
        let torch = Torch::get(py)?;
        let slab = self.slab_of(torch, slab, door)?;
        let trainable = slab.found.dtype().is_differentiable();
        let _paused = Paused::new(py)?;
        check_room(self.moved(), "none was made")?;
        let mut made = memory::with_capacity(self.entries.len())?;
        let mut forms = Latest::new(&self.forms);
        for (at, entry) in self.entries.iter().enumerate() {
            self.fetch_ahead(torch, py, at)?;
            let like = self.tensor(py, at)?;
            let requires_grad = !detached && trainable && torch.requires_grad(like)?;
            made.push(if !detached && torch.is_parameter(like) {
                slab.parameter(self.regions.first_element(at), forms.of(entry), requires_grad)?
            } else {
                let view = slab.view(self.regions.first_element(at), forms.of(entry))?;
                if requires_grad {
                    torch.require_grad(&view)?;
                }
                view
            });
        }
        slab.remember();
        if self.repeated.is_empty() {
            return new_list(py, made.into_iter().map(Ok));
        }
        new_list(py, self.by_index(|_, at| made[at].clone())?.into_iter().map(Ok))
    }

    fn blocks(&self, block_bytes: u64) -> PyResult<Vec<(u64, u64)>> {
        let blocks = layout::cut(self.regions.places(), block_bytes)
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        let elements = |bytes: u64| bytes / self.regions.itemsize();
        Ok(blocks.iter().map(|block| (elements(block.bytes.start), elements(block.bytes.end))).collect())
    }

    fn slab<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let torch = Torch::get(py)?;
        self.check_in_place()?;
        match self.regions.base() {
            Some((base, first)) => flat(torch, self.tensor(py, first)?, base, self.dtype, self.device, self.length),
            None => Ok(None),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.regions.traverse(&visit)
    }
}

impl TensorGroup {
    /// How many tensors become views when the group moves.
    pub(crate) fn moved(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn tensor<'a, 'py: 'a>(&'a self, py: Python<'py>, at: usize) -> PyResult<&'a Bound<'py, PyAny>> {
        let entry = self.entries.get(at).ok_or_else(|| PyIndexError::new_err("the group is empty"))?;
        Ok(&self.regions.tensors(py).as_slice()[entry.index as usize])
    }

    /// What `give` says of each entry, in the order of the list; it gets the index and the region.
    fn by_index<T>(&self, give: impl Fn(u32, usize) -> T) -> PyResult<Vec<T>> {
        let mut repeated = self.repeated.iter().peekable();
        let mut all = memory::with_capacity(self.__len__())?;
        for (at, entry) in self.entries.iter().enumerate() {
            while let Some(&(index, region)) = repeated.next_if(|(index, _)| *index < entry.index) {
                all.push(give(index, region));
            }
            all.push(give(entry.index, at));
        }
        all.extend(repeated.map(|&(index, region)| give(index, region)));
        Ok(all)
    }

    pub(crate) fn slab_of<'py>(
        &self,
        torch: &'static Torch,
        slab: &Bound<'py, PyAny>,
        door: Option<&str>,
    ) -> PyResult<Slab<'py>> {
        let slab = Slab::new(torch, slab, door.map(Door::parse).transpose()?)?;
        if slab.found.numel() < self.length {
            return Err(PyValueError::new_err(format!(
                "expected a slab of {} elements or more, got {}",
                self.length,
                slab.found.numel()
            )));
        }
        Ok(slab)
    }

    fn check_in_place(&self) -> PyResult<()> {
        if self.moved.load(Ordering::Relaxed) {
            return Err(PyValueError::new_err("the tensors have moved since they were grouped; group them again"));
        }
        Ok(())
    }

    /// Brings a tensor that is needed soon into the cache.
    fn fetch_ahead(&self, torch: &Torch, py: Python<'_>, at: usize) -> PyResult<()> {
        if at + AHEAD < self.entries.len() {
            torch.prefetch(self.tensor(py, at + AHEAD)?);
        }
        Ok(())
    }

    /// A slab whose views every tensor can become: what torch might refuse is looked at here.
    pub(crate) fn checked_slab<'py>(&self, torch: &'static Torch, slab: &Bound<'py, PyAny>) -> PyResult<Slab<'py>> {
        let py = slab.py();
        self.check_in_place()?;
        let slab = self.slab_of(torch, slab, None)?;
        if let Some(entry) = self.entries.first() {
            let view = slab.view(self.regions.first_element(0), &self.forms.get(entry.form))?;
            if !torch.can_hold(self.tensor(py, 0)?, &view)? {
                return Err(PyValueError::new_err("tensors of this device cannot become tensors of the slab's device"));
            }
        }
        self.check_rebindable(torch, py, slab.found.dtype().is_differentiable())?;
        Ok(slab)
    }

    /// Refuses what torch might refuse when the data of the tensors is replaced.
    fn check_rebindable(&self, torch: &Torch, py: Python<'_>, trainable: bool) -> PyResult<()> {
        self.check_in_place()?;
        for (at, entry) in self.entries.iter().enumerate() {
            self.fetch_ahead(torch, py, at)?;
            if let Err(why) = torch.check_rebindable(self.tensor(py, at)?, trainable)? {
                return Err(PyValueError::new_err(format!("tensors[{}] {why}", entry.index)));
            }
        }
        Ok(())
    }

    /// Makes the tensors views of a [checked](Self::checked_slab) slab, for which there is [room](check_room): nothing can
    /// fail then.
    pub(crate) fn set_data(&self, torch: &Torch, slab: &Slab<'_>) -> PyResult<()> {
        self.moved.store(true, Ordering::Relaxed);
        let mut forms = Latest::new(&self.forms);
        for (at, entry) in self.entries.iter().enumerate() {
            self.fetch_ahead(torch, slab.py(), at)?;
            let tensor = self.tensor(slab.py(), at)?;
            slab.with_view(self.regions.first_element(at), forms.of(entry), |view| torch.set_data(tensor, view))?;
        }
        slab.remember();
        Ok(())
    }

    /// The part of the slab that a tensor holds, or shall hold.
    fn part<'a, 'py>(&'a self, torch: &Torch, tensor: &'a Bound<'py, PyAny>, start: u64) -> PyResult<Part<'a, 'py>> {
        self.check_in_place()?;
        if !self.device.is_cpu() {
            return Err(PyValueError::new_err("only tensors on the CPU can be gathered and scattered"));
        }
        let block = Block::new(torch, tensor, self.dtype)?;
        let itemsize = self.regions.itemsize();
        let numel = block.bytes() / itemsize;
        if start.checked_add(numel).is_none_or(|end| end > self.length) {
            return Err(PyValueError::new_err(format!(
                "a block of {numel} elements at element {start} reaches beyond the {} of the slab",
                self.length
            )));
        }
        self.regions.part(block, start * itemsize).map_err(|at| {
            PyValueError::new_err(format!("the block shares memory with tensors[{}]", self.entries[at].index))
        })
    }
}

/// More than torch, Python and this module allocate for a view.
const BYTES_PER_VIEW: usize = 1024;

/// And for what C libraries allocate ahead.
const AHEAD_OF_VIEWS: usize = 1 << 20;

/// Looks whether there is room for so many views, before the first is made: torch ends the process where it has no memory
/// for one.
///
/// To make all views before the first is used would show it, too. But then old and new views exist side by side and
/// fragment memory. Each move of small tensors would take longer than the one before: 2 to 4 times as long after some.
/// Nobody writes to the room, so it takes addresses, but no memory.
pub(crate) fn check_room(views: usize, otherwise: &str) -> PyResult<()> {
    let mut room = Vec::<u8>::new();
    room.try_reserve_exact(views.saturating_mul(BYTES_PER_VIEW).saturating_add(AHEAD_OF_VIEWS))
        .map_err(|_| PyMemoryError::new_err(format!("there is no room for {views} tensors; {otherwise}")))?;
    // Or the compiler might see that nobody reads it, and leave it out.
    drop(black_box(room));
    Ok(())
}

/// How many threads shall copy, of those that would be useful: no more than torch may use.
fn threads(torch: &Torch, py: Python<'_>, useful: usize) -> PyResult<usize> {
    if useful == 1 {
        return Ok(1);
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(useful.min(cores).min(torch.num_threads(py)?))
}

/// Python's cyclic garbage collector, stopped; it goes on as before when this is dropped.
///
/// Making a million objects would set it off again and again, to find nothing.
pub(crate) struct Paused<'py>(Option<Bound<'py, PyModule>>);

impl<'py> Paused<'py> {
    pub(crate) fn new(py: Python<'py>) -> PyResult<Self> {
        let gc = py.import("gc")?;
        if !gc.call_method0(intern!(py, "isenabled"))?.is_truthy()? {
            return Ok(Self(None));
        }
        gc.call_method0(intern!(py, "disable"))?;
        Ok(Self(Some(gc)))
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if let Some(gc) = &self.0
            && let Err(error) = gc.call_method0(intern!(gc.py(), "enable"))
        {
            error.write_unraisable(gc.py(), None);
        }
    }
}
