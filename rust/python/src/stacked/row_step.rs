//! A step of an optimizer on the rows of a table that its sparse gradient lists: planned first, which touches nothing,
//! and written in one call for all tables.

use half::{bf16, f16};
use pdrs_core::row_steps::{Element, Kind, Listing, Rule, Step, sum_repeated};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::python::memory::{self, OrRaise};
use crate::torch::Torch;
use crate::torch::bytes::{Bytes, exclusive, hint};
use crate::torch::dlpack::{Dtype, Found};

/// An optimizer's formula, and its numbers for one step.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct RowRule {
    rule: Rule,
}

#[pymethods]
impl RowRule {
    #[new]
    #[pyo3(signature = (kind, *, lr, eps = 0.0, decay = 0.0, shrink = 1.0, log_decay = None, maximize = false, size = None,
        beta1 = 0.0, beta2 = 0.0, amsgrad = false, momentum = 0.0, gain = 1.0, nesterov = false, alpha = 0.0,
        centered = false))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "the numbers of all formulas")]
    fn new(
        kind: &str,
        lr: f64,
        eps: f64,
        decay: f64,
        shrink: f64,
        log_decay: Option<f64>,
        maximize: bool,
        size: Option<(f64, f64)>,
        beta1: f64,
        beta2: f64,
        amsgrad: bool,
        momentum: f64,
        gain: f64,
        nesterov: bool,
        alpha: f64,
        centered: bool,
    ) -> PyResult<Self> {
        let kind = match kind {
            "sgd" => Kind::Sgd { momentum, gain, nesterov },
            "adagrad" => Kind::Adagrad,
            "row_wise_adagrad" => Kind::RowWiseAdagrad,
            "adam" => Kind::Adam { beta1, beta2, size, amsgrad },
            "rmsprop" => Kind::RmsProp { alpha, momentum, centered },
            other => return Err(PyValueError::new_err(format!("no rule has the name '{other}'"))),
        };
        Ok(Self { rule: Rule { kind, lr, eps, decay, shrink, log_decay, maximize } })
    }
}

/// The tensors of a step, and which rows of them it writes.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct RowStep {
    rule: Rule,
    table: Py<PyAny>,
    full: Vec<Py<PyAny>>,
    single: Vec<Py<PyAny>>,
    gradients: Py<PyAny>,
    listing: Listing,
    shape: Shape,
    seed: Option<u64>,
}

/// What a table and its gradient have in common, and how many rows each has.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    capacity: usize,
    listed: usize,
    width: usize,
    dtype: Dtype,
}

#[pymethods]
impl RowStep {
    /// Sorts the rows; `None` if a tensor is to be left to torch.
    #[staticmethod]
    #[pyo3(signature = (rule, table, full, single, rows, gradients, frozen = None, seed = None))]
    #[allow(clippy::too_many_arguments, reason = "all that a step needs")]
    fn plan(
        py: Python<'_>,
        rule: &RowRule,
        table: Bound<'_, PyAny>,
        full: Vec<Bound<'_, PyAny>>,
        single: Vec<Bound<'_, PyAny>>,
        rows: Option<Bound<'_, PyAny>>,
        gradients: Bound<'_, PyAny>,
        frozen: Option<Bound<'_, PyAny>>,
        seed: Option<u64>,
    ) -> PyResult<Option<Self>> {
        let torch = Torch::get(py)?;
        let rule = rule.rule;
        if full.len() != rule.full_states() || single.len() != rule.single_states() {
            return Err(PyValueError::new_err("expected as many states as the rule has"));
        }
        let Some(memory) = Memory::find(torch, &table, &full, &single, &gradients)? else {
            return Ok(None);
        };
        let Some(frozen) = flags(torch, frozen.as_ref(), memory.shape.capacity)? else {
            return Ok(None);
        };
        let skips = |row: usize| frozen.get(row).is_some_and(|flag| *flag != 0);
        let shape = memory.shape;
        let listing = match &rows {
            None if shape.listed == shape.capacity => {
                let all = (0..shape.capacity).map(|row| (row as u64).cast_signed());
                Listing::of(all, shape.capacity, skips)
            }
            None => return Err(PyValueError::new_err("expected a gradient for each row")),
            Some(rows) => {
                let Some(rows) = row_numbers(torch, rows, shape.listed)? else { return Ok(None) };
                Listing::of(rows.iter().copied(), shape.capacity, skips)
            }
        };
        Ok(Some(Self {
            rule,
            table: table.unbind(),
            full: full.into_iter().map(Bound::unbind).collect(),
            single: single.into_iter().map(Bound::unbind).collect(),
            gradients: gradients.unbind(),
            listing: listing.or_raise()?,
            shape,
            seed,
        }))
    }
}

impl RowStep {
    /// Where its tensors lie now; an error if they are others than when it was planned.
    fn find(&self, py: Python<'_>, torch: &Torch) -> PyResult<Memory> {
        let of = |tensors: &[Py<PyAny>]| tensors.iter().map(|tensor| tensor.bind(py).clone()).collect::<Vec<_>>();
        let (table, gradients) = (self.table.bind(py), self.gradients.bind(py));
        Memory::find(torch, table, &of(&self.full), &of(&self.single), gradients)?
            .filter(|memory| memory.shape == self.shape)
            .ok_or_else(|| PyRuntimeError::new_err("a table has changed while an optimizer stepped on it"))
    }

    fn write(&self, memory: &Memory, threads: usize) -> pdrs_core::Result<()> {
        let Dtype { code, bits, .. } = self.shape.dtype;
        match (code, bits) {
            (2, 32) => self.write_as::<f32>(memory, threads),
            (2, 64) => self.write_as::<f64>(memory, threads),
            (2, 16) => self.write_as::<f16>(memory, threads),
            (4, 16) => self.write_as::<bf16>(memory, threads),
            _ => Ok(()),
        }
    }

    fn write_as<T: Element>(&self, memory: &Memory, threads: usize) -> pdrs_core::Result<()> {
        let mut slices = exclusive(&memory.bytes).into_iter().flatten();
        let Some(values) = slices.next() else { return Ok(()) };
        let Some(gradients) = slices.next() else { return Ok(()) };
        let mut states = slices.map(bytemuck::cast_slice_mut);
        let full = states.by_ref().take(self.full.len()).collect();
        Step::<T> {
            rule: self.rule,
            values: bytemuck::cast_slice_mut(values),
            full,
            single: states.collect(),
            width: self.shape.width,
            gradients: bytemuck::cast_slice(gradients),
            seed: self.seed,
        }
        .write(&self.listing, threads, hint)
    }
}

/// Where the tensors of a step lie: the table, the gradients, and the states.
struct Memory {
    shape: Shape,
    bytes: Vec<Bytes>,
}

impl Memory {
    /// `None` if one of them is to be left to torch.
    fn find(
        torch: &Torch,
        table: &Bound<'_, PyAny>,
        full: &[Bound<'_, PyAny>],
        single: &[Bound<'_, PyAny>],
        gradients: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Self>> {
        let (mut dims, mut shape) = (Vec::with_capacity(8), Vec::with_capacity(8));
        let Some(found) = find_plain(torch, table, &mut shape)? else { return Ok(None) };
        shape.truncate(found.ndim());
        let dtype = found.dtype();
        let Some((&capacity, row)) = shape.split_first() else { return Ok(None) };
        let Some(real) = real_of(dtype) else { return Ok(None) };
        let Some(listed) = find_plain(torch, gradients, &mut dims)?.filter(|found| found.dtype() == dtype) else {
            return Ok(None);
        };
        let listed_dims = &dims[..listed.ndim()];
        if listed_dims.split_first().is_none_or(|(_, of_each)| of_each != row) {
            return Ok(None);
        }
        let shape_of_all = Shape {
            capacity: capacity.cast_unsigned() as usize,
            listed: listed_dims[0].cast_unsigned() as usize,
            width: row.iter().product::<i64>().cast_unsigned() as usize,
            dtype,
        };
        let mut bytes = vec![found.bytes(), listed.bytes()];
        for (at, state) in full.iter().chain(single).enumerate() {
            let Some(found) = find_plain(torch, state, &mut dims)?.filter(|found| found.dtype() == real) else {
                return Ok(None);
            };
            let is_full = at < full.len();
            let fits =
                if is_full { dims[..found.ndim()] == shape[..] } else { found.numel() == capacity.cast_unsigned() };
            if !fits {
                return Ok(None);
            }
            bytes.push(found.bytes());
        }
        let is_usual = u32::try_from(shape_of_all.listed).is_ok()
            && u32::try_from(shape_of_all.capacity).is_ok()
            && bytes.iter().all(|bytes| bytes.address().is_multiple_of(8) || bytes.len() == 0)
            && exclusive(&bytes).is_some();
        Ok(is_usual.then_some(Self { shape: shape_of_all, bytes }))
    }
}

/// Writes the rows of all steps, and adds 1 to numbers of steps; or raises and has written nothing. No Python code runs
/// in between.
#[pyfunction]
pub(crate) fn write_row_steps(
    py: Python<'_>,
    steps: Vec<Py<RowStep>>,
    counts: Vec<Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let torch = Torch::get(py)?;
    let memory: Vec<_> = steps.iter().map(|step| step.get().find(py, torch)).collect::<PyResult<_>>()?;
    let numbers: Vec<_> = counts.iter().map(|count| number(torch, count)).collect::<PyResult<_>>()?;
    let changed = PyList::new(py, &counts)?;
    for step in &steps {
        let RowStep { table, full, single, .. } = step.get();
        for tensor in std::iter::once(table).chain(full).chain(single) {
            changed.append(tensor)?;
        }
    }
    let counting = PyList::empty(py);
    for tensor in changed {
        if torch.counts_writes(&tensor) {
            counting.append(tensor)?;
        }
    }
    torch.increment_version(&counting)?;
    let steps: Vec<_> = steps.iter().map(Py::get).collect();
    py.detach(|| steps.iter().zip(&memory).try_for_each(|(step, memory)| step.write(memory, threads))).or_raise()?;
    for slice in numbers.iter().filter_map(|bytes| exclusive(&[*bytes])).flatten() {
        for count in bytemuck::cast_slice_mut::<u8, f32>(slice) {
            *count += 1.0;
        }
    }
    Ok(())
}

/// Where a number of float32 lies.
fn number(torch: &Torch, tensor: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let found = find_plain(torch, tensor, &mut Vec::new())?;
    found
        .filter(|found| found.dtype() == Dtype { code: 2, bits: 32, lanes: 1 } && found.numel() == 1)
        .map(|found| found.bytes())
        .filter(|bytes| bytes.address().is_multiple_of(align_of::<f32>()))
        .ok_or_else(|| PyValueError::new_err("expected a number of steps as a float32 on the CPU"))
}

/// Adds up what a sparse gradient has for a row that it lists several times, at the first place. The others become zeros.
///
/// `false`, and nothing is done, if it is to be left to torch.
#[pyfunction]
pub(crate) fn sum_repeated_rows(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    gradients: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let torch = Torch::get(py)?;
    let mut dims = Vec::with_capacity(8);
    let Some(found) = find_plain(torch, gradients, &mut dims)? else { return Ok(false) };
    let Some((&listed, row)) = dims[..found.ndim()].split_first() else { return Ok(false) };
    let (listed, width) = (listed.cast_unsigned() as usize, row.iter().product::<i64>().cast_unsigned() as usize);
    let (Some(_), Some(numbers)) = (real_of(found.dtype()), row_numbers(torch, rows, listed)?) else {
        return Ok(false);
    };
    let most = numbers.iter().copied().max().unwrap_or(-1).saturating_add(1);
    let Ok(capacity) = u32::try_from(most) else { return Ok(false) };
    let listing = Listing::of(numbers.iter().copied(), capacity as usize, |_| false).or_raise()?;
    if !listing.repeats() {
        return Ok(true);
    }
    let Some(slices) = exclusive(&[found.bytes()]) else { return Ok(false) };
    for bytes in slices {
        match (found.dtype().code, found.dtype().bits) {
            (2, 32) => sum_repeated::<f32>(&listing, bytemuck::cast_slice_mut(bytes), width),
            (2, 64) => sum_repeated::<f64>(&listing, bytemuck::cast_slice_mut(bytes), width),
            (2, 16) => sum_repeated::<f16>(&listing, bytemuck::cast_slice_mut(bytes), width),
            _ => sum_repeated::<bf16>(&listing, bytemuck::cast_slice_mut(bytes), width),
        }
        .or_raise()?;
    }
    if torch.counts_writes(gradients) {
        torch.increment_version(&PyList::new(py, [gradients])?)?;
    }
    Ok(true)
}

/// The dtype of the states of such rows; `None` if they are not computed with here.
fn real_of(dtype: Dtype) -> Option<Dtype> {
    match (dtype.code, dtype.bits, dtype.lanes) {
        (2, 16 | 32, 1) | (4, 16, 1) => Some(Dtype { code: 2, bits: 32, lanes: 1 }),
        (2, 64, 1) => Some(dtype),
        _ => None,
    }
}

/// The rows that a gradient lists, `[listed]` or `[1, listed]`, as they are now.
fn row_numbers(torch: &Torch, rows: &Bound<'_, PyAny>, listed: usize) -> PyResult<Option<Vec<i64>>> {
    let mut dims = Vec::with_capacity(8);
    let Some(found) = find_plain(torch, rows, &mut dims)? else { return Ok(None) };
    let is_int64 = found.dtype() == Dtype { code: 0, bits: 64, lanes: 1 };
    if !is_int64 || found.numel() != listed as u64 || !matches!(dims[..found.ndim()], [_] | [1, _]) {
        return Ok(None);
    }
    let mut copied = memory::with_capacity(listed)?;
    for slice in exclusive(&[found.bytes()]).into_iter().flatten() {
        let Ok(numbers) = bytemuck::try_cast_slice::<u8, i64>(slice) else { return Ok(None) };
        copied.extend_from_slice(numbers);
    }
    Ok(Some(copied))
}

/// A bool for each row of a table, or no bytes where there is no tensor.
fn flags(torch: &Torch, tensor: Option<&Bound<'_, PyAny>>, capacity: usize) -> PyResult<Option<Vec<u8>>> {
    let Some(tensor) = tensor else { return Ok(Some(Vec::new())) };
    let mut dims = Vec::with_capacity(8);
    let Some(found) = find_plain(torch, tensor, &mut dims)? else { return Ok(None) };
    if found.nbytes() != capacity as u64 {
        return Ok(None);
    }
    let mut copied = memory::with_capacity(capacity)?;
    exclusive(&[found.bytes()]).into_iter().flatten().for_each(|slice| copied.extend_from_slice(slice));
    Ok(Some(copied))
}

/// Where a plain tensor lies that is contiguous and on the CPU.
fn find_plain(torch: &Torch, tensor: &Bound<'_, PyAny>, dims: &mut Vec<i64>) -> PyResult<Option<Found>> {
    dims.clear();
    if !torch.is_plain(tensor) {
        return Ok(None);
    }
    Ok(torch.find(tensor, dims)?.ok().filter(|found| found.device().is_cpu() && found.is_contiguous()))
}
