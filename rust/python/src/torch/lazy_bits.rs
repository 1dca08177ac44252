//! The bits by which torch marks conjugate and negative views: tensors whose values are not what lies in memory.
//!
//! Neither the exchange API nor the stable C ABI tells of them, and to ask Python takes as long as all the rest that is
//! asked of a tensor. So they are read from the set of dispatch keys of the tensor in C++. Where that lies is no promise
//! of torch's. It is found when torch is first used: in pairs of tensors and views of them, the one word of the struct
//! that always differs, and always by the same single bit. If there is none, Python is asked, tensor by tensor.
#![allow(unsafe_code)] // Reads a struct of torch's, after its layout has been seen.

use std::ptr;

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The words of a Python object of a tensor.
const OBJECT_WORDS: usize = 4;
/// How many words of a tensor in C++ are looked at: no more than it has in any torch that was seen. The keys come last.
const TENSOR_WORDS: usize = 24;

/// Where the bits are.
#[derive(Clone, Copy)]
pub(crate) struct LazyBits {
    /// Which word of the Python object is the address of the tensor in C++.
    object_word: usize,
    /// Which word of the tensor in C++ is its set of dispatch keys.
    keys_word: usize,
    mask: u64,
}

impl LazyBits {
    /// Looks where the bits are; none if that cannot be told, for whatever reason.
    pub(crate) fn find(torch: &Bound<'_, PyModule>) -> Option<Self> {
        Self::look(torch).ok().flatten()
    }

    fn look(torch: &Bound<'_, PyModule>) -> PyResult<Option<Self>> {
        let py = torch.py();
        let on_cpu = PyDict::new(py);
        on_cpu.set_item("device", "cpu")?;
        let make = |dtype: &str, shape: &[usize]| {
            on_cpu.set_item("dtype", torch.getattr(dtype)?)?;
            torch.call_method("zeros", (shape.to_vec(),), Some(&on_cpu))
        };
        let frozen = torch.getattr("nn")?.getattr("Parameter")?.call1((make("float64", &[])?, false))?;
        let complex = [make("complex64", &[2, 3])?, make("complex128", &[1])?];
        let real = [make("float32", &[5])?, make("int64", &[2, 0])?, make("bfloat16", &[1, 1, 1, 1, 1, 1])?, frozen];
        let negative =
            real.iter().chain(&complex).map(|each| Ok((each.clone(), torch.call_method1("_neg_view", (each,))?)));
        let conjugate = complex.iter().map(|each| Ok((each.clone(), each.call_method0("conj")?)));
        let negative: Vec<_> = negative.collect::<PyResult<_>>()?;
        let conjugate: Vec<_> = conjugate.collect::<PyResult<_>>()?;

        let mut object_word = None;
        for tensor in negative.iter().chain(&conjugate).flat_map(|(one, view)| [one, view]) {
            let address: usize = tensor.getattr("_cdata")?.extract()?;
            let found = (2..OBJECT_WORDS).find(|at| word_of(tensor, *at) == Some(address));
            if found.is_none() || object_word.is_some_and(|word| Some(word) != found) {
                return Ok(None);
            }
            object_word = found;
        }
        let Some(object_word) = object_word else {
            return Ok(None);
        };
        Ok((0..TENSOR_WORDS).find_map(|keys_word| {
            let mask = bit_of(&negative, object_word, keys_word)? | bit_of(&conjugate, object_word, keys_word)?;
            // The two must differ.
            (mask.count_ones() == 2).then_some(Self { object_word, keys_word, mask })
        }))
    }

    /// Whether one of them is set in a tensor, whose class must be exactly Tensor or Parameter.
    #[inline]
    pub(crate) fn are_set(self, tensor: &Bound<'_, PyAny>) -> bool {
        // SAFETY: the object of a Tensor or a Parameter has as many words, and the tensor in C++, which it keeps, too.
        unsafe { keys_of(tensor, self.object_word, self.keys_word) & self.mask != 0 }
    }
}

/// A word of a Python object, if it has as many.
fn word_of(object: &Bound<'_, PyAny>, at: usize) -> Option<usize> {
    let object = object.as_ptr();
    // SAFETY: `object` is a live Python object of at least so many bytes.
    unsafe {
        let size = (*pyo3::ffi::Py_TYPE(object)).tp_basicsize.cast_unsigned();
        (size >= (at + 1) * size_of::<usize>()).then(|| ptr::read_volatile(object.cast::<usize>().add(at)))
    }
}

/// # Safety
///
/// `object_word` is that word of the object which is the address of a tensor in C++, which has more than `keys_word`
/// words.
#[inline]
unsafe fn keys_of(tensor: &Bound<'_, PyAny>, object_word: usize, keys_word: usize) -> u64 {
    // SAFETY: as the caller promises.
    unsafe {
        let address = ptr::read_volatile(tensor.as_ptr().cast::<*const u64>().add(object_word));
        ptr::read_volatile(address.add(keys_word))
    }
}

/// The bit that a word of each view has and that of its tensor has not, if the words are alike except for that.
fn bit_of(pairs: &[(Bound<'_, PyAny>, Bound<'_, PyAny>)], object_word: usize, keys_word: usize) -> Option<u64> {
    let mut bit = None;
    for (tensor, view) in pairs {
        // SAFETY: that this word of the object is the address of the tensor has been seen of each.
        let (plain, marked) =
            unsafe { (keys_of(tensor, object_word, keys_word), keys_of(view, object_word, keys_word)) };
        let difference = plain ^ marked;
        if difference.count_ones() != 1 || plain & difference != 0 || bit.is_some_and(|bit| bit != difference) {
            return None;
        }
        bit = Some(difference);
    }
    bit
}
