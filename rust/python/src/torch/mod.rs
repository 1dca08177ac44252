//! The border to torch: where a tensor's values lie, and what else is asked of tensors by the million.
//!
//! Where a tensor lies is asked of torch's `DLPack` exchange API (`dlpack.rs`), which neither copies nor counts
//! references. What the exchange API does not tell was found by experiment (torch 2.15), and is looked at here:
//!
//! - It drops the conjugate and negative bits (`lazy_bits.rs`).
//! - It reports int1 to int7 and uint1 to uint7 as 8 bits.
//! - It gives null for a functionalized or a zero tensor, and for one that has lost its memory, as for an empty one.
//! - It exports tensors that require gradients, and inference tensors, like others.
//! - It refuses quantized, bits, sparse, meta, nested and functorch tensors.
//!
//! Subclasses of Tensor are never asked: what they hold may be anything.

pub(crate) mod bytes;
pub(crate) mod dlpack;
pub(crate) mod lazy_bits;
pub(crate) mod own_functions;
pub(crate) mod stable_abi;

use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyType};

use crate::python::cpython::Attribute;
use crate::torch::bytes::{Bytes, hint};
use crate::torch::dlpack::{Described, Exchange, Found, Latest};
use crate::torch::lazy_bits::LazyBits;
use crate::torch::stable_abi::StableAbi;

/// A tensor whose class is exactly Tensor or Parameter, which torch's C functions can be asked about.
#[derive(Clone, Copy)]
pub(crate) struct Plain<'a, 'py>(&'a Bound<'py, PyAny>);

/// Why a tensor must be left to torch.
pub(crate) enum Unusual {
    /// The class is neither Tensor nor Parameter.
    Subclass(String),
    /// torch does not export it; in its own words.
    Refused(String),
    /// Values differ from memory: a conjugate or a negative view.
    Lazy,
    /// There are elements, but no memory.
    NoMemory,
    /// Python code that torch ran has changed it.
    Moved,
    /// Elements that `DLPack` cannot name.
    Dtype(String),
}

impl Unusual {
    #[cold]
    fn refused(error: &PyErr, py: Python<'_>) -> Self {
        let why = error.value(py).to_string();
        Self::Refused(why.lines().next().unwrap_or_default().to_owned())
    }
}

impl std::fmt::Display for Unusual {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Subclass(name) => write!(f, "is a {name}, of a subclass of Tensor"),
            Self::Refused(why) => write!(f, "has no plain memory: {why}"),
            Self::Lazy => write!(f, "has its conjugate or negative bit set"),
            Self::NoMemory => write!(f, "has elements but no memory"),
            Self::Moved => write!(f, "was changed while it was looked at"),
            Self::Dtype(name) => write!(f, "has the dtype {name}"),
        }
    }
}

/// What of torch is used here, looked up once.
pub(crate) struct Torch {
    exchange: Exchange,
    pub(crate) stable_abi: Option<StableAbi>,
    pub(crate) module: Py<PyModule>,
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    data: Attribute,
    grad: Attribute,
    requires_grad: Attribute,
    version: Attribute,
    int8: Py<PyAny>,
    uint8: Py<PyAny>,
    increment_version: Py<PyAny>,
    lazy_bits: Option<LazyBits>,
    is_conj: Py<PyAny>,
    is_neg: Py<PyAny>,
}

#[allow(clippy::unused_self, reason = "who has a `Torch` has found the torch that these ask")]
impl Torch {
    pub(crate) fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || Self::look_up(py))
    }

    fn look_up(py: Python<'_>) -> PyResult<Self> {
        let module = py.import("torch")?;
        let tensor = module.getattr("Tensor")?.cast_into::<PyType>()?;
        let mut torch = Self {
            exchange: Exchange::look_up(&module, &tensor)?,
            stable_abi: StableAbi::find(&module)?,
            parameter: module.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
            data: Attribute::of(&tensor, "data")?,
            grad: Attribute::of(&tensor, "grad")?,
            requires_grad: Attribute::of(&tensor, "requires_grad")?,
            version: Attribute::of(&tensor, "_version")?,
            int8: module.getattr("int8")?.unbind(),
            uint8: module.getattr("uint8")?.unbind(),
            increment_version: increment_version(py)?.unbind(),
            lazy_bits: None,
            is_conj: tensor.getattr("is_conj")?.unbind(),
            is_neg: tensor.getattr("is_neg")?.unbind(),
            tensor: tensor.unbind(),
            module: module.clone().unbind(),
        };
        torch.lazy_bits = LazyBits::find(&torch, &module);
        Ok(torch)
    }

    /// The tensor, if its class is exactly Tensor or Parameter.
    #[inline]
    pub(crate) fn plain<'a, 'py>(&self, object: &'a Bound<'py, PyAny>) -> Option<Plain<'a, 'py>> {
        self.is_plain(object).then_some(Plain(object))
    }

    /// Whether the class is exactly Tensor or Parameter.
    #[inline]
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr().cast();
        class == self.parameter.as_ptr() || class == self.tensor.as_ptr()
    }

    pub(crate) fn is_parameter(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type_ptr().cast() == self.parameter.as_ptr()
    }

    pub(crate) fn gradient<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.grad.get(tensor)
    }

    pub(crate) fn requires_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.requires_grad.get(tensor)?.is_truthy()
    }

    pub(crate) fn require_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        tensor.setattr(intern!(tensor.py(), "requires_grad"), true)
    }

    /// Makes a plain tensor a Parameter, as torch's own constructor does.
    pub(crate) fn make_parameter(&self, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        tensor.setattr(intern!(tensor.py(), "__class__"), &self.parameter)
    }

    /// Whether torch counts what is written to a tensor: not of one from inference mode, which it guards otherwise.
    pub(crate) fn counts_writes(&self, tensor: &Bound<'_, PyAny>) -> bool {
        self.version.get(tensor).is_ok()
    }

    /// Tells autograd that the values of tensors change, or are about to. No signal comes in between.
    pub(crate) fn increment_version(&self, tensors: &Bound<'_, PyList>) -> PyResult<()> {
        self.increment_version.bind(tensors.py()).call1((tensors,)).map(drop)
    }

    /// Whether torch lets a tensor take the data of such another one, which does not depend on values or shapes.
    pub(crate) fn can_hold(&self, tensor: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = tensor.py();
        let compatible = intern!(py, "_has_compatible_shallow_copy_type");
        self.module.bind(py).call_method1(compatible, (tensor, data))?.is_truthy()
    }

    /// Why torch would refuse [`Self::set_data`] of compatible data, if it would.
    pub(crate) fn check_rebindable(
        &self,
        tensor: &Bound<'_, PyAny>,
        trainable: bool,
    ) -> PyResult<std::result::Result<(), &'static str>> {
        if !self.counts_writes(tensor) {
            return Ok(Err("was made in inference mode, and its data cannot be replaced"));
        }
        if !trainable && self.requires_grad(tensor)? {
            return Ok(Err("requires gradients, which the dtype of the slab cannot have"));
        }
        Ok(Ok(()))
    }

    /// How many threads torch may use.
    pub(crate) fn num_threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.module.bind(py).call_method0(intern!(py, "get_num_threads"))?.extract()
    }

    /// `tensor.data = data`.
    pub(crate) fn set_data(&self, tensor: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        self.data.set(tensor, data)
    }

    /// Tells where a tensor lies, and fills `dims` with its shape and then its strides, in elements.
    ///
    /// # Errors
    ///
    /// A `TypeError` if it is no tensor. The inner result says why a tensor must be left to torch; `dims` is of no use
    /// then.
    pub(crate) fn find(
        &self,
        tensor: &Bound<'_, PyAny>,
        dims: &mut Vec<i64>,
    ) -> PyResult<std::result::Result<Found, Unusual>> {
        let mut latest = Latest::in_place_of(std::mem::take(dims));
        let seen = self.look(tensor, &mut latest);
        let found = latest.found().copied();
        *dims = latest.into_dims();
        Ok(match (seen?, found) {
            (Seen::Unusual(unusual), _) => Err(unusual),
            (_, found) => found.ok_or(Unusual::Moved),
        })
    }

    /// Looks at a tensor, which becomes the latest one unless it is alike or unusual.
    #[inline]
    fn look(&self, tensor: &Bound<'_, PyAny>, latest: &mut Latest) -> PyResult<Seen> {
        let Some(plain) = self.plain(tensor) else {
            return self.refuse(tensor).map(Seen::Unusual);
        };
        let (seen, bytes) = match self.exchange.describe(plain, latest) {
            Ok(Described::Alike(bytes)) => (Seen::Alike(bytes), bytes),
            Ok(Described::Other(bytes)) => (Seen::Other(bytes), bytes),
            Ok(Described::Odd) => return Ok(Seen::Unusual(Unusual::Dtype(dtype_name(tensor)?))),
            Err(refused) => return Ok(Seen::Unusual(Unusual::refused(&refused, tensor.py()))),
        };
        let is_usual = self.lazy_bits.is_some_and(|bits| !bits.are_set(plain))
            && latest
                .found()
                .is_some_and(|found| !may_be_narrow(found) && (bytes.address() != 0 || found.numel() == 0));
        if is_usual {
            return Ok(seen);
        }
        Ok(self.look_closer(plain, bytes, latest)?.map_or(seen, Seen::Unusual))
    }

    /// Why something is left to torch, or is an error, that is no plain tensor.
    #[cold]
    fn refuse(&self, object: &Bound<'_, PyAny>) -> PyResult<Unusual> {
        let class = object.get_type();
        if class.is_subclass(self.tensor.bind(object.py()))? {
            return Ok(Unusual::Subclass(class.name()?.to_string()));
        }
        Err(expected_a_tensor(object)?)
    }

    /// Asks for what the exchange API does not tell, of a tensor that is the latest, or like it.
    fn look_closer(&self, plain: Plain<'_, '_>, bytes: Bytes, latest: &mut Latest) -> PyResult<Option<Unusual>> {
        let Some(found) = latest.found().copied() else {
            return Ok(Some(Unusual::Moved));
        };
        let mut unusual = self.ask(plain, bytes, &found)?;
        // Python code may have answered: a function mode.
        if unusual.is_none() && (self.lazy_bits.is_none() || may_be_narrow(&found)) {
            let again = self.exchange.describe(plain, latest);
            let is_still_there = matches!(again, Ok(Described::Alike(again)) if again.address() == bytes.address());
            unusual = (!is_still_there).then_some(Unusual::Moved);
        }
        if unusual.is_some() {
            latest.forget();
        }
        Ok(unusual)
    }

    fn ask(&self, plain: Plain<'_, '_>, bytes: Bytes, found: &Found) -> PyResult<Option<Unusual>> {
        let (tensor, py) = (plain.0, plain.0.py());
        if found.numel() > 0 && bytes.address() == 0 {
            return Ok(Some(Unusual::NoMemory));
        }
        if may_be_narrow(found) {
            let dtype = tensor.getattr(intern!(py, "dtype"))?;
            if !dtype.is(&self.int8) && !dtype.is(&self.uint8) {
                return Ok(Some(Unusual::Dtype(dtype.to_string())));
            }
        }
        let lazy = match self.lazy_bits {
            Some(bits) => bits.are_set(plain),
            None => {
                (found.dtype().is_complex() && self.is_conj.bind(py).call1((tensor,))?.is_truthy()?)
                    || self.is_neg.bind(py).call1((tensor,))?.is_truthy()?
            }
        };
        Ok(lazy.then_some(Unusual::Lazy))
    }

    /// Begins to load what [`Self::find`] will read of a tensor.
    ///
    /// Its Python object is read, which is a cache miss if it is not in the cache, but misses of several objects overlap.
    pub(crate) fn prefetch(&self, object: &Bound<'_, PyAny>) {
        if let (Some(bits), Some(tensor)) = (self.lazy_bits, self.plain(object)) {
            let address = bits.address(tensor);
            (0..3).for_each(|line| hint(address.wrapping_add(64 * line)));
        }
    }
}

/// Looks at tensors one after another: those of a list are mostly alike, so that only their addresses differ.
pub(crate) struct Finder {
    torch: &'static Torch,
    latest: Latest,
}

/// What a [`Finder`] sees.
pub(crate) enum Seen {
    /// All but the address is as of the last tensor that was found.
    Alike(Bytes),
    Other(Bytes),
    Unusual(Unusual),
}

impl Finder {
    pub(crate) fn new(torch: &'static Torch) -> Self {
        Self { torch, latest: Latest::default() }
    }

    /// What [`Torch::find`] tells, with its errors.
    #[inline]
    pub(crate) fn find(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<Seen> {
        self.torch.look(tensor, &mut self.latest)
    }

    /// The last that was found and was not [`Seen::Alike`].
    #[inline]
    pub(crate) fn found(&self) -> Option<&Found> {
        self.latest.found()
    }

    /// The shape and then the strides of that.
    pub(crate) fn dims(&self) -> &[i64] {
        self.latest.dims()
    }
}

/// Whether `DLPack` may have taken for it a tensor of integers of less than 8 bits.
#[inline]
fn may_be_narrow(found: &Found) -> bool {
    found.itemsize() == 1 && found.dtype().code < 2
}

/// What tells autograd of changes: the function in C, where there is it, because a signal may come wherever one in Python
/// begins, between a change and its being told.
fn increment_version(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    py.import("torch._C")?
        .getattr("_increment_version")
        .or_else(|_| py.import("torch.autograd.graph")?.getattr("increment_version"))
}

fn expected_a_tensor(got: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    Ok(PyTypeError::new_err(format!("expected a Tensor, got {}", got.get_type().name()?)))
}

fn dtype_name(tensor: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(tensor.getattr(intern!(tensor.py(), "dtype"))?.to_string())
}
