//! The bits by which torch marks conjugate and negative views: tensors whose values are not what lies in memory.
//!
//! Neither the exchange API nor the stable C ABI tells of them, and to ask Python takes as long as all the rest that is
//! asked of a tensor. So they are read from the set of dispatch keys of the tensor in C++. Where that lies is no promise
//! of torch's. So it is found when torch is first used, by comparing tensors with views of them. It is the one word of
//! the struct that always differs, and always by the same single bit. If there is none, Python is asked, tensor by
//! tensor.
//!
//! The same layout tells what to load ahead of looking at a tensor.
#![allow(unsafe_code, reason = "reads a struct of torch's, after its layout has been seen")]

use std::ptr;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::torch::{Plain, Torch};

/// The words of a Python object of a tensor.
const OBJECT_WORDS: usize = 4;
/// How many words of a tensor in C++ are looked at: no more than it has in any torch that was seen. The keys come last.
const TENSOR_WORDS: usize = 24;

/// Where the object of a tensor has the address of the tensor in C++.
#[derive(Clone, Copy)]
struct Layout {
    /// Which word of the object that is.
    object_word: usize,
}

impl Layout {
    /// Looks at tensors, which must all have it in the same place.
    fn find<'a, 'py: 'a>(tensors: impl IntoIterator<Item = Plain<'a, 'py>>) -> PyResult<Option<Self>> {
        let mut found = None;
        for tensor in tensors {
            let object_bytes: usize = tensor.0.get_type().getattr("__basicsize__")?.extract()?;
            if object_bytes < OBJECT_WORDS * size_of::<usize>() {
                return Ok(None);
            }
            let address: usize = tensor.0.getattr("_cdata")?.extract()?;
            let word = (2..OBJECT_WORDS).find(|word| Self { object_word: *word }.address(tensor) == address);
            if word.is_none() || found.is_some_and(|found| Some(found) != word) {
                return Ok(None);
            }
            found = word;
        }
        Ok(found.map(|object_word| Self { object_word }))
    }

    /// The address of the tensor in C++.
    #[inline]
    fn address(self, tensor: Plain<'_, '_>) -> usize {
        self.read(tensor, None) as usize
    }

    /// A word of the tensor in C++.
    #[inline]
    fn word(self, tensor: Plain<'_, '_>, at: usize) -> u64 {
        assert!(at < TENSOR_WORDS, "a word that a tensor may not have");
        self.read(tensor, Some(at))
    }

    #[inline]
    fn read(self, tensor: Plain<'_, '_>, word: Option<usize>) -> u64 {
        // SAFETY: the object of a Tensor or a Parameter has as many words, as `find` has seen; any of them may be read.
        // `word` is asked for where `find` has seen that this one is the address in C++. The object keeps the tensor
        // alive, which has as many words.
        unsafe {
            let address = ptr::read_volatile(tensor.0.as_ptr().cast::<usize>().add(self.object_word));
            word.map_or(address as u64, |at| ptr::read_volatile((address as *const u64).add(at)))
        }
    }
}

/// Where the bits are.
#[derive(Clone, Copy)]
pub(crate) struct LazyBits {
    layout: Layout,
    /// Which word of the tensor in C++ is its set of dispatch keys.
    keys_word: usize,
    mask: u64,
}

impl LazyBits {
    /// Looks where the bits are; none if that cannot be told, for whatever reason.
    pub(crate) fn find(torch: &Torch, module: &Bound<'_, PyModule>) -> Option<Self> {
        Self::look(torch, module).ok().flatten()
    }

    fn look(torch: &Torch, module: &Bound<'_, PyModule>) -> PyResult<Option<Self>> {
        let py = module.py();
        let on_cpu = PyDict::new(py);
        on_cpu.set_item("device", "cpu")?;
        let make = |dtype: &str, shape: &[usize]| {
            on_cpu.set_item("dtype", module.getattr(dtype)?)?;
            module.call_method("zeros", (shape.to_vec(),), Some(&on_cpu))
        };
        let frozen = module.getattr("nn")?.getattr("Parameter")?.call1((make("float64", &[])?, false))?;
        let complex = [make("complex64", &[2, 3])?, make("complex128", &[1])?];
        let real = [make("float32", &[5])?, make("int64", &[2, 0])?, make("bfloat16", &[1, 1, 1, 1, 1, 1])?, frozen];
        let negative =
            real.iter().chain(&complex).map(|each| Ok((each.clone(), module.call_method1("_neg_view", (each,))?)));
        let conjugate = complex.iter().map(|each| Ok((each.clone(), each.call_method0("conj")?)));
        let negative: Vec<_> = negative.collect::<PyResult<_>>()?;
        let conjugate: Vec<_> = conjugate.collect::<PyResult<_>>()?;
        let (Some(negative), Some(conjugate)) = (plain(torch, &negative), plain(torch, &conjugate)) else {
            return Ok(None);
        };
        let all = negative.iter().chain(&conjugate).flat_map(|(tensor, view)| [*tensor, *view]);
        let Some(layout) = Layout::find(all)? else {
            return Ok(None);
        };
        Ok((0..TENSOR_WORDS).find_map(|keys_word| {
            let mask = bit_of(&negative, layout, keys_word)? | bit_of(&conjugate, layout, keys_word)?;
            // The two must differ.
            (mask.count_ones() == 2).then_some(Self { layout, keys_word, mask })
        }))
    }

    /// Whether one of them is set in a tensor.
    #[inline]
    pub(crate) fn are_set(self, tensor: Plain<'_, '_>) -> bool {
        self.layout.word(tensor, self.keys_word) & self.mask != 0
    }

    /// The address of a tensor in C++.
    #[inline]
    pub(crate) fn address(self, tensor: Plain<'_, '_>) -> usize {
        self.layout.address(tensor)
    }
}

fn plain<'a, 'py>(
    torch: &Torch,
    pairs: &'a [(Bound<'py, PyAny>, Bound<'py, PyAny>)],
) -> Option<Vec<(Plain<'a, 'py>, Plain<'a, 'py>)>> {
    pairs.iter().map(|(tensor, view)| Some((torch.plain(tensor)?, torch.plain(view)?))).collect()
}

/// The bit that a word of each view has and that of its tensor has not, if the words are alike except for that.
fn bit_of(pairs: &[(Plain<'_, '_>, Plain<'_, '_>)], layout: Layout, keys_word: usize) -> Option<u64> {
    let mut bit = None;
    for (tensor, view) in pairs {
        let (plain, marked) = (layout.word(*tensor, keys_word), layout.word(*view, keys_word));
        let difference = plain ^ marked;
        if difference.count_ones() != 1 || plain & difference != 0 || bit.is_some_and(|bit| bit != difference) {
            return None;
        }
        bit = Some(difference);
    }
    bit
}
