//! Tensors of one dtype and device, and the places that they have, or shall have, in one slab.

use numpy::PyArray1;
use pdrs_core::staging;
use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::copy::{Block, Regions};
use crate::tensor::{Device, Door, Dtype, Found, Slab, Torch, extent, is_contiguous};

/// How many tensors are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// A tensor of the list.
struct Entry {
    index: usize,
    pointer: usize,
    numel: u64,
    /// Where shape and strides begin in `dims`.
    dims: usize,
    ndim: usize,
}

/// Entries of one dtype and device, while the list is read.
struct Gathered {
    device: Device,
    dtype: Dtype,
    itemsize: u64,
    entries: Vec<Entry>,
    dims: Vec<i64>,
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
    dims: Vec<i64>,
    /// Entries that are the tensor of an earlier one: their index, and the region.
    repeated: Vec<(usize, usize)>,
    overlapping: bool,
}

/// Puts tensors into groups of one dtype and device, and lays each group out in a slab.
#[pyfunction]
#[pyo3(signature = (tensors, *, keep_strides = true, narrowest = None))]
pub(crate) fn group_tensors<'py>(
    tensors: &Bound<'py, PyList>,
    keep_strides: bool,
    narrowest: Option<u64>,
) -> PyResult<(Vec<TensorGroup>, Vec<(usize, String)>)> {
    let narrowest = narrowest.unwrap_or(16);
    if !matches!(narrowest, 1 | 2 | 4 | 8 | 16) {
        return Err(PyValueError::new_err(format!("narrowest must be 1, 2, 4, 8 or 16 bytes, got {narrowest}")));
    }
    let py = tensors.py();
    let torch = Torch::get(py)?;
    let tensors = tensors.to_tuple();
    let mut groups: Vec<Gathered> = Vec::new();
    let mut unusual = Vec::new();
    let mut dims = Vec::new();
    let mut current = 0;
    for begin in (0..tensors.len()).step_by(BATCH) {
        let batch = begin..tensors.len().min(begin + BATCH);
        for index in batch.clone() {
            std::hint::black_box(torch.is_plain(&*tensors.get_borrowed_item(index)?));
        }
        for index in batch {
            dims.clear();
            let tensor = tensors.get_borrowed_item(index)?;
            match torch.find(&tensor, &mut dims) {
                Ok(Ok(found)) => add(&mut groups, &mut current, index, &found, &dims),
                Ok(Err(why)) => unusual.push((index, why.to_string())),
                Err(error) => {
                    let message = format!("tensors[{index}]: {}", error.value(py));
                    return Err(PyTypeError::new_err(message));
                }
            }
        }
    }
    let groups =
        groups.into_iter().map(|group| group.lay_out(&tensors, keep_strides, narrowest)).collect::<PyResult<_>>()?;
    Ok((groups, unusual))
}

fn add(groups: &mut Vec<Gathered>, current: &mut usize, index: usize, found: &Found, dims: &[i64]) {
    let fits = |group: &Gathered| group.device == found.device && group.dtype == found.dtype;
    if !groups.get(*current).is_some_and(fits) {
        *current = groups.iter().position(fits).unwrap_or_else(|| {
            groups.push(Gathered {
                device: found.device,
                dtype: found.dtype,
                itemsize: found.itemsize,
                entries: Vec::new(),
                dims: Vec::new(),
            });
            groups.len() - 1
        });
    }
    let group = &mut groups[*current];
    let entry = Entry { index, pointer: found.pointer, numel: found.numel, dims: group.dims.len(), ndim: found.ndim };
    group.entries.push(entry);
    group.dims.extend_from_slice(dims);
}

impl Gathered {
    fn lay_out(mut self, tensors: &Bound<'_, PyTuple>, keep_strides: bool, narrowest: u64) -> PyResult<TensorGroup> {
        let (overlapping, repeated) = self.take_repeated(tensors)?;
        let narrow = narrowest.min(self.itemsize);
        let sizes = self.entries.iter().map(|entry| entry.numel.saturating_mul(narrow));
        let (offsets, end) = staging::lay_out(sizes).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let mut regions = Regions::new(tensors, self.itemsize, self.entries.len());
        let scale = self.itemsize / narrow;
        if (end / narrow).checked_mul(16).is_none() {
            return Err(PyValueError::new_err(pdrs_core::Error::TooLarge.to_string()));
        }
        for (entry, offset) in self.entries.iter().zip(offsets) {
            let offset = offset * scale;
            let (shape, strides) = self.dims[entry.dims..entry.dims + 2 * entry.ndim].split_at_mut(entry.ndim);
            if is_contiguous(shape, strides) {
                regions.push_run(entry.pointer, offset, entry.numel * self.itemsize);
                continue;
            }
            let order = if keep_strides { order_of(shape, strides) } else { (0..entry.ndim).collect() };
            regions.push(entry.pointer, offset, shape, strides, &order);
            if !(keep_strides && is_dense(shape, strides, &order)) {
                make_dense(shape, strides, &order);
            }
        }
        Ok(TensorGroup {
            device: self.device,
            dtype: self.dtype,
            length: end / narrow,
            regions,
            entries: self.entries,
            dims: self.dims,
            repeated,
            overlapping,
        })
    }

    fn shape_and_strides(&self, entry: &Entry) -> (&[i64], &[i64]) {
        self.dims[entry.dims..entry.dims + 2 * entry.ndim].split_at(entry.ndim)
    }

    /// From the first byte to behind the last.
    fn end(&self, entry: &Entry) -> usize {
        let (shape, strides) = self.shape_and_strides(entry);
        entry.pointer.saturating_add((extent(shape, strides).unwrap_or(entry.numel) * self.itemsize) as usize)
    }

    /// Takes out what is listed again; tells whether other entries share memory, and which those were.
    fn take_repeated(&mut self, tensors: &Bound<'_, PyTuple>) -> PyResult<(bool, Vec<(usize, usize)>)> {
        // Nearly always the tensors were made in order, and lie in order.
        let mut end = 0;
        let in_order = self.entries.iter().all(|entry| {
            let apart = entry.pointer >= end && entry.numel > 0;
            end = self.end(entry);
            apart
        });
        if in_order {
            return Ok((false, Vec::new()));
        }
        let mut order = Vec::with_capacity(self.entries.len());
        for (at, entry) in self.entries.iter().enumerate() {
            order.push((entry.pointer, tensors.get_borrowed_item(entry.index)?.as_ptr() as usize, at));
        }
        order.sort_unstable();
        let (mut overlapping, mut end) = (false, 0);
        // For each entry that is listed again: the entry that it repeats.
        let mut again = Vec::new();
        let mut before: Option<(usize, usize, usize)> = None;
        for &(pointer, object, at) in &order {
            match before {
                Some((_, same, first)) if same == object => again.push((at, first)),
                _ => {
                    let entry = &self.entries[at];
                    if entry.numel > 0 {
                        overlapping |= pointer < end;
                        end = end.max(self.end(entry));
                    }
                    before = Some((pointer, object, at));
                }
            }
        }
        if again.is_empty() {
            return Ok((overlapping, Vec::new()));
        }
        again.sort_unstable();
        let mut taken = again.iter().map(|(at, _)| *at).peekable();
        let mut region = 0;
        // Where each entry's region is among those that stay.
        let regions: Vec<usize> = (0..self.entries.len())
            .map(|at| {
                let here = region;
                if taken.next_if_eq(&at).is_none() {
                    region += 1;
                }
                here
            })
            .collect();
        let repeated = again.iter().map(|&(at, first)| (self.entries[at].index, regions[first])).collect();
        let mut gone = again.iter().map(|(at, _)| *at).peekable();
        let mut at = 0;
        self.entries.retain(|_| {
            let stays = gone.next_if_eq(&at).is_none();
            at += 1;
            stays
        });
        Ok((overlapping, repeated))
    }
}

/// The dimensions from the outermost to the innermost, as torch orders them when it preserves the memory format.
fn order_of(shape: &[i64], strides: &[i64]) -> Vec<usize> {
    // An insertion sort from the innermost on, in which a stride of 0 compares with nothing and so does not move.
    let mut inner_first: Vec<usize> = (0..shape.len()).rev().collect();
    for start in 1..inner_first.len() {
        let mut at = start;
        for before in (0..start).rev() {
            let (one, other) = (inner_first[before], inner_first[at]);
            if strides[one] == 0 || strides[other] == 0 {
                continue;
            }
            if strides[one] > strides[other] || (strides[one] == strides[other] && shape[one] > shape[other]) {
                inner_first.swap(before, at);
                at = before;
            } else if strides[one] < strides[other] {
                break;
            }
        }
    }
    inner_first.reverse();
    inner_first
}

/// Whether the elements fill a stretch of memory.
fn is_dense(shape: &[i64], strides: &[i64], order: &[usize]) -> bool {
    let shape: Vec<_> = order.iter().map(|dim| shape[*dim]).collect();
    let strides: Vec<_> = order.iter().map(|dim| strides[*dim]).collect();
    is_contiguous(&shape, &strides)
}

/// Sets the strides to those of elements that fill a stretch of memory in this order.
fn make_dense(shape: &[i64], strides: &mut [i64], order: &[usize]) {
    let mut stride = 1;
    for dim in order.iter().rev() {
        strides[*dim] = stride;
        stride *= shape[*dim].max(1);
    }
}

/// Makes new tensors that are views of a slab.
#[pyfunction]
#[pyo3(signature = (slab, offsets, shapes, *, requires_grad = None, door = None))]
pub(crate) fn slab_views<'py>(
    slab: &Bound<'py, PyAny>,
    offsets: Vec<i64>,
    shapes: &Bound<'py, PyList>,
    requires_grad: Option<bool>,
    door: Option<&str>,
) -> PyResult<Bound<'py, PyList>> {
    let py = slab.py();
    let torch = Torch::get(py)?;
    if offsets.len() != shapes.len() {
        return Err(PyValueError::new_err(format!(
            "expected as many offsets as shapes, got {} and {}",
            offsets.len(),
            shapes.len()
        )));
    }
    let slab = Slab::new(torch, slab, door.map(Door::parse).transpose()?)?;
    if requires_grad == Some(true) && !slab.found.dtype.is_differentiable() {
        return Err(PyValueError::new_err("only floating point and complex Parameters can require gradients"));
    }
    let _paused = Paused::new(py)?;
    let mut made = Vec::with_capacity(shapes.len());
    let mut strides = Vec::new();
    for (offset, shape) in offsets.into_iter().zip(shapes) {
        let offset = u64::try_from(offset)
            .map_err(|_| PyValueError::new_err(format!("expected offsets of 0 or more, got {offset}")))?;
        let shape: Vec<i64> = shape.extract()?;
        strides.clear();
        strides.resize(shape.len(), 0);
        make_dense(&shape, &mut strides, &(0..shape.len()).collect::<Vec<_>>());
        made.push(match requires_grad {
            Some(requires_grad) => slab.parameter(offset, &shape, &strides, requires_grad)?,
            None => slab.view(offset, &shape, &strides)?,
        });
    }
    slab.remember();
    PyList::new(py, made)
}

#[pymethods]
impl TensorGroup {
    fn __len__(&self) -> usize {
        self.entries.len() + self.repeated.len()
    }

    #[getter]
    fn indices<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        PyArray1::from_vec(py, self.by_index(|index, _| index as i64))
    }

    #[getter]
    fn offsets<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        PyArray1::from_vec(py, self.by_index(|_, at| self.regions.first_element(at).cast_signed()))
    }

    #[getter]
    fn length(&self) -> u64 {
        self.length
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.regions.places().map(|place| place.end - place.start).sum()
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
        let block = self.block(torch, out, start)?;
        if torch.requires_grad(out)? {
            return Err(PyValueError::new_err("expected a block that does not require gradients"));
        }
        torch.increment_version(&PyList::new(py, [out])?)?;
        self.regions.gather(py, &block, start * self.regions.itemsize(), self.threads(torch, py, &block)?);
        Ok(())
    }

    #[pyo3(signature = (block, start = 0))]
    fn scatter(&self, block: &Bound<'_, PyAny>, start: u64) -> PyResult<()> {
        let py = block.py();
        let torch = Torch::get(py)?;
        let block = self.block(torch, block, start)?;
        if let Some(at) = self.regions.first_folded() {
            return Err(PyValueError::new_err(format!(
                "tensors[{}] cannot be written: several of its elements share memory",
                self.entries[at].index
            )));
        }
        let start = start * self.regions.itemsize();
        let written = self.regions.within(start..start + block.bytes());
        let written = written.map(|at| self.tensor(py, at)).collect::<PyResult<Vec<_>>>()?;
        torch.increment_version(&PyList::new(py, written)?)?;
        let threads = if self.overlapping { 1 } else { self.threads(torch, py, &block)? };
        self.regions.scatter(py, &block, start, threads);
        Ok(())
    }

    #[pyo3(signature = (slab, *, door = None))]
    fn rebind(&self, slab: &Bound<'_, PyAny>, door: Option<&str>) -> PyResult<()> {
        let py = slab.py();
        let torch = Torch::get(py)?;
        let slab = self.slab_of(torch, slab, door)?;
        let trainable = slab.found.dtype.is_differentiable();
        for (at, entry) in self.entries.iter().enumerate() {
            if let Err(why) = torch.check_rebindable(&self.tensor(py, at)?, trainable)? {
                return Err(PyValueError::new_err(format!("tensors[{}] {why}", entry.index)));
            }
        }
        let _paused = Paused::new(py)?;
        for at in 0..self.entries.len() {
            torch.set_data(&self.tensor(py, at)?, &self.view(&slab, at)?)?;
        }
        slab.remember();
        Ok(())
    }

    #[pyo3(signature = (slab, *, detached = false, door = None))]
    fn views<'py>(&self, slab: &Bound<'py, PyAny>, detached: bool, door: Option<&str>) -> PyResult<Bound<'py, PyList>> {
        let py = slab.py();
        let torch = Torch::get(py)?;
        let slab = self.slab_of(torch, slab, door)?;
        let trainable = slab.found.dtype.is_differentiable();
        let _paused = Paused::new(py)?;
        let mut made = Vec::with_capacity(self.entries.len());
        for (at, entry) in self.entries.iter().enumerate() {
            let like = self.tensor(py, at)?;
            let requires_grad = !detached && trainable && torch.requires_grad(&like)?;
            made.push(if !detached && torch.is_parameter(&like) {
                let (shape, strides) = self.shape_and_strides(entry);
                slab.parameter(self.regions.first_element(at), shape, strides, requires_grad)?
            } else {
                let view = self.view(&slab, at)?;
                if requires_grad {
                    torch.require_grad(&view)?;
                }
                view
            });
        }
        slab.remember();
        if self.repeated.is_empty() {
            return PyList::new(py, made);
        }
        PyList::new(py, self.by_index(|_, at| made[at].clone()))
    }

    #[pyo3(signature = (block_bytes, direct_bytes = None))]
    fn blocks(&self, block_bytes: u64, direct_bytes: Option<u64>) -> PyResult<Vec<(u64, u64, Option<usize>)>> {
        let blocks = staging::cut(self.regions.places(), block_bytes, direct_bytes.unwrap_or(u64::MAX))
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        let elements = |bytes: u64| bytes / self.regions.itemsize();
        let whole = |block: &staging::Block| block.direct.then(|| self.entries[block.regions.start].index);
        Ok(blocks.iter().map(|block| (elements(block.bytes.start), elements(block.bytes.end), whole(block))).collect())
    }

    fn slab<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let torch = Torch::get(py)?;
        match self.regions.base() {
            Some((base, first)) => torch.flat(&self.tensor(py, first)?, base, self.dtype, self.device, self.length),
            None => Ok(None),
        }
    }
}

impl TensorGroup {
    fn tensor<'py>(&self, py: Python<'py>, at: usize) -> PyResult<Bound<'py, PyAny>> {
        let entry = self.entries.get(at).ok_or_else(|| PyIndexError::new_err("the group is empty"))?;
        self.regions.tensors(py).get_item(entry.index)
    }

    fn shape_and_strides(&self, entry: &Entry) -> (&[i64], &[i64]) {
        self.dims[entry.dims..entry.dims + 2 * entry.ndim].split_at(entry.ndim)
    }

    /// What `give` says of each entry, in the order of the list; it gets the index and the region.
    fn by_index<T>(&self, give: impl Fn(usize, usize) -> T) -> Vec<T> {
        let mut repeated = self.repeated.iter().peekable();
        let mut all = Vec::with_capacity(self.__len__());
        for (at, entry) in self.entries.iter().enumerate() {
            while let Some(&(index, region)) = repeated.next_if(|(index, _)| *index < entry.index) {
                all.push(give(index, region));
            }
            all.push(give(entry.index, at));
        }
        all.extend(repeated.map(|&(index, region)| give(index, region)));
        all
    }

    fn view<'py>(&self, slab: &Slab<'py>, at: usize) -> PyResult<Bound<'py, PyAny>> {
        let (shape, strides) = self.shape_and_strides(&self.entries[at]);
        slab.view(self.regions.first_element(at), shape, strides)
    }

    fn slab_of<'py>(&self, torch: &'static Torch, slab: &Bound<'py, PyAny>, door: Option<&str>) -> PyResult<Slab<'py>> {
        let slab = Slab::new(torch, slab, door.map(Door::parse).transpose()?)?;
        if slab.found.numel < self.length {
            return Err(PyValueError::new_err(format!(
                "expected a slab of {} elements or more, got {}",
                self.length, slab.found.numel
            )));
        }
        Ok(slab)
    }

    /// The memory of a tensor that holds a part of the slab.
    fn block<'a, 'py>(&self, torch: &Torch, tensor: &'a Bound<'py, PyAny>, start: u64) -> PyResult<Block<'a, 'py>> {
        let block = Block::new(torch, tensor, self.dtype)?;
        if !self.device.is_cpu() {
            return Err(PyValueError::new_err("only tensors on the CPU can be gathered and scattered"));
        }
        let numel = block.bytes() / self.regions.itemsize();
        if start.checked_add(numel).is_none_or(|end| end > self.length) {
            return Err(PyValueError::new_err(format!(
                "a block of {numel} elements at element {start} reaches beyond the {} of the slab",
                self.length
            )));
        }
        if let Some(at) = self.regions.first_under(&block) {
            return Err(PyValueError::new_err(format!(
                "the block shares memory with tensors[{}]",
                self.entries[at].index
            )));
        }
        Ok(block)
    }

    /// How many threads shall copy: no more than torch may use.
    fn threads(&self, torch: &Torch, py: Python<'_>, block: &Block<'_, '_>) -> PyResult<usize> {
        let useful = self.regions.useful_threads(block.bytes());
        if useful == 1 {
            return Ok(1);
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(useful.min(cores).min(torch.num_threads(py)?))
    }
}

/// Python's cyclic garbage collector, stopped; it goes on as before when this is dropped.
///
/// Making a million objects would set it off again and again, to find nothing.
struct Paused<'py>(Option<Bound<'py, PyModule>>);

impl<'py> Paused<'py> {
    fn new(py: Python<'py>) -> PyResult<Self> {
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
