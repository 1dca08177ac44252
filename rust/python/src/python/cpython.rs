//! What `CPython` has and `PyO3` has not, or not as fast: small functions that are safe to call.
//!
//! How much a look past `PyO3` gains stands beside it, as a share of what a caller waits for (`CPython` 3.11, 100,000
//! names). Objects that are made here raise a `MemoryError` where memory runs out; those that `PyO3` makes panic.
#![allow(unsafe_code, reason = "the C API of Python, and the structs behind it")]

use std::ffi::c_int;
use std::marker::PhantomData;
use std::mem::transmute;
use std::{ptr, slice};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::sync::critical_section::with_critical_section;
use pyo3::types::{PyDict, PyFunction, PyInt, PyList, PyString, PyTuple, PyType};

use crate::python::name::HASH;
use crate::torch::bytes::hint;

/// The number of the interpreter that runs; 0 is the main one.
pub(crate) fn interpreter(_py: Python<'_>) -> i64 {
    // SAFETY: the thread is attached to an interpreter, as `_py` proves, so there is a current one.
    unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) }
}

// -- objects and classes ----------------------------------------------------------------------------------------------

/// `object.__dict__`, past the `__getattr__` of its class, which makes every look-up slower.
///
/// By `getattr`, reading an entry takes 1.36 times as long, and setting one 1.12 times.
pub(crate) fn attributes<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    // SAFETY: `object` is a live object; a new reference is given, or an error is raised, if it has no dict, too.
    let dict = unsafe {
        let dict = ffi::PyObject_GenericGetDict(object.as_ptr(), ptr::null_mut());
        Bound::from_owned_ptr_or_err(object.py(), dict)?
    };
    Ok(dict.cast_into()?)
}

/// The version tag of the class of an object, or 0 if it has none at present.
///
/// It changes whenever an attribute of the class or of its bases is set or deleted.
#[inline]
pub(crate) fn version_tag(object: &Bound<'_, PyAny>) -> u32 {
    // SAFETY: the type of a live object is alive. Without a GIL a stale tag may be read, but none that never was.
    unsafe { (*ffi::Py_TYPE(object.as_ptr())).tp_version_tag }
}

/// An attribute of a class that is written in C, read and set without looking its name up.
///
/// By `getattr` and `setattr`, sorting the tensors of a `ParameterDict` takes 1.25 times as long, and moving tensors that
/// have gradients 1.15 times.
pub(crate) struct Attribute {
    descriptor: Py<PyAny>,
}

impl Attribute {
    /// An attribute of a class; an error if it is not one of functions in C.
    pub(crate) fn of(class: &Bound<'_, PyType>, name: &str) -> PyResult<Self> {
        let descriptor = class.getattr(name)?;
        if descriptor.get_type_ptr() != &raw mut ffi::PyGetSetDescr_Type {
            return Err(PyTypeError::new_err(format!("expected the attribute {name:?} of {class} to be written in C")));
        }
        Ok(Self { descriptor: descriptor.unbind() })
    }

    /// `object.name`, for an object of the class.
    #[inline]
    pub(crate) fn get<'py>(&self, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.call(object, None)?.ok_or_else(|| PyTypeError::new_err("the attribute cannot be read"))
    }

    /// `object.name = value`, for an object of the class.
    #[inline]
    pub(crate) fn set<'py>(&self, object: &Bound<'py, PyAny>, value: &Bound<'py, PyAny>) -> PyResult<()> {
        self.call(object, Some(value)).map(drop)
    }

    #[inline]
    fn call<'py>(
        &self,
        object: &Bound<'py, PyAny>,
        value: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = object.py();
        let descriptor = self.descriptor.as_ptr().cast::<ffi::PyGetSetDescrObject>();
        // SAFETY: a descriptor of this exact type has this layout, and points to a row of a table that lives as long as
        // its class. Its functions take objects of that class; one gives a new reference or raises, the other takes its
        // own reference, and raises if it does not give 0.
        unsafe {
            let row = &*(*descriptor).d_getset;
            if ffi::PyType_IsSubtype(object.get_type_ptr(), (*descriptor).d_common.d_type) == 0 {
                return Err(PyTypeError::new_err("expected an object of the class that has the attribute"));
            }
            match (row.get, row.set, value) {
                (Some(get), _, None) => Bound::from_owned_ptr_or_err(py, get(object.as_ptr(), row.closure)).map(Some),
                (_, Some(set), Some(value)) if set(object.as_ptr(), value.as_ptr(), row.closure) == 0 => Ok(None),
                (_, Some(_), Some(_)) => Err(PyErr::fetch(py)),
                _ => Err(PyTypeError::new_err("the attribute cannot be read, or cannot be set")),
            }
        }
    }
}

// -- new objects ------------------------------------------------------------------------------------------------------

/// A Python list of items that know how many they are.
pub(crate) fn new_list<'py, T, I>(py: Python<'py>, items: I) -> PyResult<Bound<'py, PyList>>
where
    I: IntoIterator<Item = PyResult<Bound<'py, T>>, IntoIter: ExactSizeIterator>,
{
    let items = items.into_iter();
    let length = ffi::Py_ssize_t::try_from(items.len())?;
    // SAFETY: a new reference is given, or an error raised. Each place of the list is filled once, with a reference that
    // it takes, and in the order of the list; should items be missing, then places stay empty in a list that goes.
    unsafe {
        let list = Bound::from_owned_ptr_or_err(py, ffi::PyList_New(length))?.cast_into_unchecked::<PyList>();
        let mut at = 0;
        for item in items.take(length.unsigned_abs()) {
            ffi::PyList_SET_ITEM(list.as_ptr(), at, item?.into_ptr());
            at += 1;
        }
        if at < length {
            return Err(PyValueError::new_err(format!("got {at} items of {length}")));
        }
        Ok(list)
    }
}

/// A tuple of two.
#[inline]
pub(crate) fn new_pair<'py, T, U>(
    py: Python<'py>,
    one: Bound<'py, T>,
    other: Bound<'py, U>,
) -> PyResult<Bound<'py, PyTuple>> {
    // SAFETY: a new reference is given, or an error raised; a new tuple takes a reference for each of its places.
    unsafe {
        let pair = Bound::from_owned_ptr_or_err(py, ffi::PyTuple_New(2))?.cast_into_unchecked::<PyTuple>();
        ffi::PyTuple_SET_ITEM(pair.as_ptr(), 0, one.into_ptr());
        ffi::PyTuple_SET_ITEM(pair.as_ptr(), 1, other.into_ptr());
        Ok(pair)
    }
}

/// An `int`.
#[inline]
pub(crate) fn new_number(py: Python<'_>, number: i64) -> PyResult<Bound<'_, PyInt>> {
    // SAFETY: a new reference is given, or an error raised.
    unsafe { Ok(Bound::from_owned_ptr_or_err(py, ffi::PyLong_FromLongLong(number))?.cast_into_unchecked()) }
}

/// The `str` of several ASCII characters; `None` of other characters, or of fewer than two.
///
/// Python's decoder would look at them once more: unpacking names takes 1.2 times as long with it.
pub(crate) fn new_ascii<'py>(py: Python<'py>, characters: &[u8]) -> PyResult<Option<Bound<'py, PyString>>> {
    // Python has one object for each `str` of one character.
    if characters.len() < 2 || !characters.is_ascii() {
        return Ok(None);
    }
    new_str(py, &New::Ascii(characters)).map(Some)
}

/// The `str` of code points, of which none is above 0x10ffff: surrogates, too.
///
/// Python's decoder for these runs Python code.
pub(crate) fn new_wide<'py>(py: Python<'py>, characters: &[u32]) -> PyResult<Bound<'py, PyString>> {
    if characters.iter().any(|one| *one > 0x0010_ffff) {
        return Err(PyValueError::new_err("expected code points"));
    }
    new_str(py, &New::CodePoints(characters))
}

/// What a new `str` is made of.
enum New<'a> {
    Ascii(&'a [u8]),
    CodePoints(&'a [u32]),
}

fn new_str<'py>(py: Python<'py>, characters: &New<'_>) -> PyResult<Bound<'py, PyString>> {
    /// `PyUnicode_4BYTE_KIND`
    const CODE_POINTS: c_int = 4;
    // SAFETY: a new reference is given, or an error raised. A new `str` of a length, which nobody else has seen, has one
    // byte for each character if the largest is below 128, as those of ASCII are; all of them are written. Of code
    // points Python copies as many as there are.
    unsafe {
        let text = match characters {
            New::Ascii(all) => {
                let text = ffi::PyUnicode_New(all.len().cast_signed(), 0x7f);
                if !text.is_null() {
                    ptr::copy_nonoverlapping(all.as_ptr(), ffi::PyUnicode_DATA(text).cast::<u8>(), all.len());
                }
                text
            }
            New::CodePoints(all) => {
                ffi::PyUnicode_FromKindAndData(CODE_POINTS, all.as_ptr().cast(), all.len().cast_signed())
            }
        };
        Ok(Bound::from_owned_ptr_or_err(py, text)?.cast_into_unchecked())
    }
}

// -- what is in a `str` -----------------------------------------------------------------------------------------------

/// What stands in a `str`, which never changes.
pub(crate) struct Text<'a> {
    /// If it has been asked for before.
    pub(crate) hash: Option<u64>,
    pub(crate) characters: Characters<'a>,
}

/// Characters, of the narrowest kind that holds them all: equal texts are of the same kind.
#[derive(PartialEq, Eq)]
pub(crate) enum Characters<'a> {
    Ascii(&'a [u8]),
    Latin1(&'a [u8]),
    TwoBytes(&'a [u16]),
    FourBytes(&'a [u32]),
}

impl<'a> Text<'a> {
    /// Reads a `str` in place. Asking Python for the hash instead, look-ups of many names take 1.1 times as long, and
    /// making an index 1.2 times.
    #[inline]
    pub(crate) fn of(text: &'a Py<PyString>) -> Self {
        let text = text.as_ptr();
        // SAFETY: `text` is a live `str`, kept alive as long as the borrow, and never changes, except that its hash is
        // written once (-1 stands there before). Its length counts characters of the width that its kind says.
        unsafe {
            let hash = (*text.cast::<ffi::PyASCIIObject>()).hash;
            let (data, length) = (ffi::PyUnicode_DATA(text), ffi::PyUnicode_GET_LENGTH(text).unsigned_abs());
            let characters = match ffi::PyUnicode_KIND(text) {
                ffi::PyUnicode_1BYTE_KIND if ffi::PyUnicode_IS_ASCII(text) != 0 => {
                    Characters::Ascii(slice::from_raw_parts(data.cast(), length))
                }
                ffi::PyUnicode_1BYTE_KIND => Characters::Latin1(slice::from_raw_parts(data.cast(), length)),
                ffi::PyUnicode_2BYTE_KIND => Characters::TwoBytes(slice::from_raw_parts(data.cast(), length)),
                _ => Characters::FourBytes(slice::from_raw_parts(data.cast(), length)),
            };
            Self { hash: (hash != -1).then_some(hash.cast_unsigned() as u64), characters }
        }
    }
}

// -- what is in a list, a tuple or a dict -----------------------------------------------------------------------------

/// What lies in a list, borrowed from it: an exact `str` that is a name, or something that is none.
#[repr(transparent)]
pub(crate) struct Listed<'a, 'py>(Bound<'py, PyAny>, PhantomData<&'a ()>);

impl Listed<'_, '_> {
    /// Begins to load what will be asked of it.
    pub(crate) fn prefetch(&self) {
        // The type stands in front, and often in another cache line than hash and characters.
        hint(self.0.as_ptr() as usize);
        hint(self.0.as_ptr() as usize + HASH);
    }

    /// The text, if it is an exact `str`.
    pub(crate) fn text(&self) -> Option<&Py<PyString>> {
        self.0.cast_exact::<PyString>().ok().map(Bound::as_unbound)
    }
}

/// Hands over what lies in a list or tuple; `None` for any other kind of object.
///
/// The names stay in the list: to take a reference to each would write to all of them, and take 1.7 times as long.
/// `take` must run no Python code.
pub(crate) fn with_listed<R>(names: &Bound<'_, PyAny>, take: impl FnOnce(&[Listed<'_, '_>]) -> R) -> Option<R> {
    // Without a GIL it keeps other threads from changing the list; with one it does nothing.
    with_critical_section(names, || {
        // SAFETY: a list and a tuple hold as many pointers to live objects as they are long, in a row (a list without
        // any may have no memory), and `Listed` is laid out as such a pointer. Nothing changes them meanwhile: to look
        // an exact `str` up, and to look at the type of anything else, runs no Python code.
        let listed: &[Listed<'_, '_>] = unsafe {
            let (items, length) = match (names.cast_exact::<PyList>(), names.cast_exact::<PyTuple>()) {
                (Ok(list), _) => ((*list.as_ptr().cast::<ffi::PyListObject>()).ob_item.cast_const(), list.len()),
                (_, Ok(tuple)) => (tuple.as_slice().as_ptr().cast(), tuple.len()),
                _ => return None,
            };
            if items.is_null() { &[] } else { slice::from_raw_parts(items.cast(), length) }
        };
        Some(take(listed))
    })
}

/// A place in a dict that may change between two steps, which `PyO3`'s iterators take for a reason to panic.
///
/// A step from a place that was reached before a change may give another entry, but none that is not there.
#[derive(Clone, Copy, Default)]
pub(crate) struct Place(ffi::Py_ssize_t);

type Next<'py> = (Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

impl Place {
    /// The next key and value.
    #[inline]
    pub(crate) fn step<'py>(&mut self, dict: &Bound<'py, PyDict>) -> Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (key, value) = self.next::<true>(dict, None)?;
        key.zip(value)
    }

    /// The next value, if its key is this very object; `None` inside otherwise.
    #[allow(clippy::option_option, reason = "the end of the dict, and another key, are two things")]
    #[inline]
    pub(crate) fn step_to<'py>(
        &mut self,
        dict: &Bound<'py, PyDict>,
        key: &Bound<'py, PyAny>,
    ) -> Option<Option<Bound<'py, PyAny>>> {
        Some(self.next::<false>(dict, Some(key))?.1)
    }

    /// The next key, if `KEY`, and the next value, if the key is the one that is wanted.
    #[inline]
    fn next<'py, const KEY: bool>(
        &mut self,
        dict: &Bound<'py, PyDict>,
        only: Option<&Bound<'py, PyAny>>,
    ) -> Option<Next<'py>> {
        let (mut key, mut value) = (ptr::null_mut(), ptr::null_mut());
        // Without a GIL it keeps other threads from changing the dict; with one it does nothing.
        with_critical_section(dict, || {
            // SAFETY: `dict` is a live dict, and CPython checks the position against what it is now. What it gives is
            // borrowed from the dict, which nobody changes before there are references.
            unsafe {
                if ffi::PyDict_Next(dict.as_ptr(), &raw mut self.0, &raw mut key, &raw mut value) == 0 {
                    return None;
                }
                if only.is_some_and(|only| only.as_ptr() != key) {
                    return Some((None, None));
                }
                let key = if KEY { Some(Bound::from_borrowed_ptr(dict.py(), key)) } else { None };
                Some((key, Some(Bound::from_borrowed_ptr(dict.py(), value))))
            }
        })
    }
}

// -- slots of a class -------------------------------------------------------------------------------------------------

/// What the interpreter asks of a class before its Python functions: each may leave the answer to these.
///
/// When the interpreter ends, it unwinds the stack of any other thread that runs Python code. So there is nothing to drop
/// when the functions of `CPython`'s own slots are called.
pub(crate) trait NativeSlots {
    fn get<'py>(object: &Bound<'py, PyAny>, key: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>>;
    /// Without a value, deletes. False leaves it to Python.
    fn set(object: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>, value: Option<&Bound<'_, PyAny>>) -> PyResult<bool>;
    fn contains(object: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>) -> PyResult<Option<bool>>;
    fn len(object: &Bound<'_, PyAny>) -> PyResult<Option<usize>>;
}

type Object = *mut ffi::PyObject;
type Subscript = unsafe extern "C-unwind" fn(Object, Object) -> Object;
type Assign = unsafe extern "C-unwind" fn(Object, Object, Object) -> c_int;
type Contains = unsafe extern "C-unwind" fn(Object, Object) -> c_int;
type Length = unsafe extern "C-unwind" fn(Object) -> ffi::Py_ssize_t;

/// The slots of a class made in Python.
struct Usual {
    subscript: Subscript,
    assign: Assign,
    contains: Contains,
    length: Length,
}

static USUAL: PyOnceLock<Usual> = PyOnceLock::new();

/// Fills the slots of a class whose `[]`, `in` and `len` are Python functions; best before it has instances.
pub(crate) fn fill_slots<S: NativeSlots>(class: &Bound<'_, PyType>) -> PyResult<()> {
    let py = class.py();
    let expected = || PyTypeError::new_err("expected a class made in Python, with [], in and len");
    for name in ["__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__"] {
        if !class.getattr(name)?.is_exact_instance_of::<PyFunction>() {
            return Err(expected());
        }
    }
    let class = class.as_type_ptr();
    // SAFETY: `class` is a live type object. A class made in Python is a heap type, whose `tp_as_sequence` and
    // `tp_as_mapping` point into the type object itself, so only this class is changed. Where the methods are Python
    // functions, CPython has filled these slots with functions that call them, the same for all classes. Functions of both
    // ABIs are called in the same way.
    unsafe {
        if (*class).tp_flags & ffi::Py_TPFLAGS_HEAPTYPE == 0
            || (*class).tp_as_sequence.is_null()
            || (*class).tp_as_mapping.is_null()
        {
            return Err(expected());
        }
        let (sequence, mapping) = (&mut *(*class).tp_as_sequence, &mut *(*class).tp_as_mapping);
        // Those of the first class: another one may have been filled before.
        if USUAL.get(py).is_none() {
            let usual = Usual {
                subscript: transmute::<ffi::binaryfunc, Subscript>(mapping.mp_subscript.ok_or_else(expected)?),
                assign: transmute::<ffi::objobjargproc, Assign>(mapping.mp_ass_subscript.ok_or_else(expected)?),
                contains: transmute::<ffi::objobjproc, Contains>(sequence.sq_contains.ok_or_else(expected)?),
                length: transmute::<ffi::lenfunc, Length>(mapping.mp_length.ok_or_else(expected)?),
            };
            let _ = USUAL.set(py, usual);
        }
        mapping.mp_subscript = Some(transmute::<Subscript, ffi::binaryfunc>(subscript::<S>));
        mapping.mp_ass_subscript = Some(transmute::<Assign, ffi::objobjargproc>(assign::<S>));
        sequence.sq_contains = Some(transmute::<Contains, ffi::objobjproc>(contains::<S>));
        sequence.sq_length = Some(transmute::<Length, ffi::lenfunc>(length::<S>));
        mapping.mp_length = sequence.sq_length;
        ffi::PyType_Modified(class);
    }
    Ok(())
}

/// The slots are filled after this has been set.
fn usual(py: Python<'_>) -> &'static Usual {
    USUAL.get(py).expect("the slots have been filled")
}

unsafe extern "C-unwind" fn subscript<S: NativeSlots>(object: Object, key: Object) -> Object {
    // SAFETY: CPython calls a slot with the GIL held (attached) and with live objects that it keeps alive meanwhile, and
    // so may its own slot be called.
    unsafe {
        let py = Python::assume_attached();
        let value = {
            let (object, key) = (Borrowed::from_ptr(py, object), Borrowed::from_ptr(py, key));
            S::get(&object, &key).map(|value| value.map(Bound::into_ptr))
        };
        match value {
            Ok(Some(value)) => value,
            Ok(None) => (usual(py).subscript)(object, key),
            Err(error) => {
                error.restore(py);
                ptr::null_mut()
            }
        }
    }
}

unsafe extern "C-unwind" fn assign<S: NativeSlots>(object: Object, key: Object, value: Object) -> c_int {
    // SAFETY: as of `subscript`; the value is null if the entry is to be deleted.
    unsafe {
        let py = Python::assume_attached();
        let done = {
            let (object, key) = (Borrowed::from_ptr(py, object), Borrowed::from_ptr(py, key));
            S::set(&object, &key, Borrowed::from_ptr_or_opt(py, value).as_deref())
        };
        match done {
            Ok(true) => 0,
            Ok(false) => (usual(py).assign)(object, key, value),
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    }
}

unsafe extern "C-unwind" fn contains<S: NativeSlots>(object: Object, key: Object) -> c_int {
    // SAFETY: as of `subscript`.
    unsafe {
        let py = Python::assume_attached();
        let found = {
            let (object, key) = (Borrowed::from_ptr(py, object), Borrowed::from_ptr(py, key));
            S::contains(&object, &key)
        };
        match found {
            Ok(Some(found)) => found.into(),
            Ok(None) => (usual(py).contains)(object, key),
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    }
}

unsafe extern "C-unwind" fn length<S: NativeSlots>(object: Object) -> ffi::Py_ssize_t {
    // SAFETY: as of `subscript`.
    unsafe {
        let py = Python::assume_attached();
        let found = {
            let object = Borrowed::from_ptr(py, object);
            S::len(&object)
        };
        match found {
            // No object has more than that.
            Ok(Some(found)) => found.cast_signed(),
            Ok(None) => (usual(py).length)(object),
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    }
}
