//! Sweeps over all entries of a `ParameterDict`, each in one call.

use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyType};

use crate::parameter_dict::keys::EntryKeys;
use crate::python::memory::{self, new_list, new_pair};
use crate::python::name::{Name, exact_text, precedes};
use crate::torch::Torch;
use crate::torch::own_functions::{Method, is_free_of_hooks, own_parts};

/// How many entries are looked at ahead, so that their cache misses overlap.
const AHEAD: usize = 32;

/// Readies names and values for `_parameters`, in place. Gives the places of what needs a closer look.
///
/// A plain tensor becomes a Parameter. Left to the caller are names that are not `str`, and values that are neither
/// tensors nor Parameters, or that torch might refuse. Names become exact `str`.
#[pyfunction]
pub(crate) fn prepare(
    names: &Bound<'_, PyList>,
    values: &Bound<'_, PyList>,
    parameter: &Bound<'_, PyType>,
    tensor: &Bound<'_, PyType>,
) -> PyResult<Vec<usize>> {
    let py = names.py();
    let mut unusual = Vec::new();
    let detach = tensor.getattr(intern!(py, "detach"))?;
    for (at, (name, value)) in names.iter().zip(values.iter()).enumerate() {
        let Ok(text) = name.cast_exact::<PyString>() else {
            if let Some(text) = exact_text(&name)? {
                names.set_item(at, text)?;
            }
            memory::push(&mut unusual, at)?;
            continue;
        };
        if is_usual(text, &value, parameter)? {
            continue;
        }
        if !text.is_empty()? && value.get_type().is(tensor)
            // Let torch say in its own words why it makes no Parameter of a tensor.
            && let Ok(made) = to_parameter(&value, &detach, parameter)
        {
            values.set_item(at, made)?;
        } else {
            memory::push(&mut unusual, at)?;
        }
    }
    Ok(unusual)
}

/// Whether an entry needs no closer look: its name is not empty, its value a leaf that is exactly a `Parameter`.
fn is_usual(name: &Bound<'_, PyString>, value: &Bound<'_, PyAny>, parameter: &Bound<'_, PyType>) -> PyResult<bool> {
    Ok(value.get_type().is(parameter)
        && value.getattr(intern!(value.py(), "grad_fn"))?.is_none()
        && !name.is_empty()?)
}

/// `Parameter(value)` for a plain tensor: the same data and version counter, a leaf that requires gradients.
fn to_parameter<'py>(
    value: &Bound<'py, PyAny>,
    detach: &Bound<'py, PyAny>,
    parameter: &Bound<'py, PyType>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = value.py();
    let made = detach.call1((value,))?;
    made.setattr(intern!(py, "__class__"), parameter)?;
    made.setattr(intern!(py, "requires_grad"), true)?;
    Ok(made)
}

/// The value of one entry if it is a Parameter that nothing hides, and torch would ask nobody else for it.
///
/// `None`, and the caller must look further, otherwise.
#[pyfunction]
pub(crate) fn get_entry<'py>(
    module: &Bound<'py, PyAny>,
    key: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Ok(name) = key.cast_exact::<PyString>() else {
        return Ok(None);
    };
    let Some((attributes, parameters)) = own_parts(module, Method::GET)? else {
        return Ok(None);
    };
    // As in torch, an attribute of that name comes first; the caller knows which attributes are none of the entry.
    if attributes.contains(name)? { Ok(None) } else { parameters.get_item(name) }
}

/// Sets one entry if nothing about it is unusual: an exact, non-empty `str`, a leaf that is exactly a `Parameter`, and a
/// module that has nothing else and asks nobody.
///
/// `false`, and nothing is done, otherwise.
#[pyfunction]
pub(crate) fn set_entry(
    module: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    parameter: &Bound<'_, PyType>,
) -> PyResult<bool> {
    let py = module.py();
    let Ok(name) = key.cast_exact::<PyString>() else {
        return Ok(false);
    };
    if !is_usual(name, value, parameter)? || !is_free_of_hooks(py) {
        return Ok(false);
    }
    let Some((attributes, parameters)) = own_parts(module, Method::SET)? else {
        return Ok(false);
    };
    for place in [intern!(py, "_modules"), intern!(py, "_values"), intern!(py, "_buffers")] {
        if !attributes.get_item(place)?.is_some_and(|place| place.cast::<PyDict>().is_ok_and(PyDictMethods::is_empty)) {
            return Ok(false);
        }
    }
    if attributes.contains(name)? {
        return Ok(false);
    }
    let Some(keys) = keys_in(&attributes)? else {
        return Ok(false);
    };
    keys.get().put(py, Name::new(name.clone()))?;
    let done = parameters.set_item(name, value);
    if done.is_err() && !parameters.contains(name)? {
        keys.get().remove(name);
    }
    done.map(|()| true)
}

/// The keys of a `ParameterDict`, from its attributes.
fn keys_in<'py>(attributes: &Bound<'py, PyDict>) -> PyResult<Option<Bound<'py, EntryKeys>>> {
    let found = attributes.get_item(intern!(attributes.py(), "_keys"))?;
    Ok(found.and_then(|keys| keys.cast_into::<EntryKeys>().ok()))
}

/// Whether all entries of a dict are usual, as for [`set_entry`]; if `sorted`, the names must ascend, too.
#[pyfunction]
pub(crate) fn can_take_over(source: &Bound<'_, PyDict>, parameter: &Bound<'_, PyType>, sorted: bool) -> PyResult<bool> {
    let mut before: Option<Bound<'_, PyString>> = None;
    for (name, value) in source {
        let Ok(name) = name.cast_into_exact::<PyString>() else {
            return Ok(false);
        };
        if !is_usual(&name, &value, parameter)? {
            return Ok(false);
        }
        if sorted {
            if let Some(before) = &before
                && !precedes(before, &name)?
            {
                return Ok(false);
            }
            before = Some(name);
        }
    }
    Ok(true)
}

/// Copies all entries of a dict into `parameters`, and the names that are new to the end of `keys`.
///
/// Into an empty dict Python copies another as a whole, which is several times faster than an insertion an entry.
#[pyfunction]
pub(crate) fn take_over<'py>(
    keys: &Bound<'py, EntryKeys>,
    parameters: &Bound<'py, PyDict>,
    source: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let mut names = memory::with_capacity(source.len())?;
    for (name, _) in source {
        memory::push(&mut names, name.cast_into_exact::<PyString>()?)?;
    }
    put_all(keys, parameters, names, || parameters.update(source.as_mapping()))
}

/// Puts values behind names, and the names that are new at the end of `keys`: all or none.
///
/// Memory may run out in both. The keys take all or none by themselves; so they come last, and the dict is put right.
fn put_all<'py>(
    keys: &Bound<'py, EntryKeys>,
    parameters: &Bound<'py, PyDict>,
    names: Vec<Bound<'py, PyString>>,
    put: impl FnOnce() -> PyResult<()>,
) -> PyResult<()> {
    // What is replaced goes when all is done: its finalizers may change the dictionary.
    let mut before = Vec::new();
    let was_empty = parameters.is_empty();
    if !was_empty {
        before = memory::try_collect(names.iter().map(|name| parameters.get_item(name)))?;
    }
    let added = memory::collect(names.iter().map(|name| Name::new(name.clone())))?;
    let done = put().and_then(|()| keys.get().append(keys.py(), added));
    if done.is_err() {
        if was_empty {
            parameters.clear();
        }
        // Neither takes memory: to remove a key, and to replace what stands behind one that is there.
        for (name, before) in names.iter().zip(&before) {
            match before {
                Some(before) => parameters.set_item(name, before)?,
                None if parameters.contains(name)? => parameters.del_item(name)?,
                None => {}
            }
        }
    }
    done
}

/// Puts prepared names and values in: into `parameters`, and the names that are new at the end of `keys`.
#[pyfunction]
pub(crate) fn insert_all<'py>(
    keys: &Bound<'py, EntryKeys>,
    parameters: &Bound<'py, PyDict>,
    names: &Bound<'py, PyList>,
    values: &Bound<'_, PyList>,
) -> PyResult<()> {
    let texts = memory::try_collect(names.iter().map(|name| Ok(name.cast_into_exact::<PyString>()?)))?;
    put_all(keys, parameters, texts, || {
        names.iter().zip(values.iter()).try_for_each(|(name, value)| parameters.set_item(name, value))
    })
}

/// The first and the second elements of pairs, or `None` if one of them is not a tuple or list of two.
#[pyfunction]
pub(crate) fn unzip<'py>(pairs: &Bound<'py, PyList>) -> PyResult<Option<(Bound<'py, PyList>, Bound<'py, PyList>)>> {
    let py = pairs.py();
    let (mut names, mut values) = (memory::with_capacity(pairs.len())?, memory::with_capacity(pairs.len())?);
    for pair in pairs {
        let (name, value) = if let Ok(pair) = pair.cast_exact::<PyTuple>() {
            if pair.len() != 2 {
                return Ok(None);
            }
            (pair.get_item(0)?, pair.get_item(1)?)
        } else if let Ok(pair) = pair.cast_exact::<PyList>() {
            if pair.len() != 2 {
                return Ok(None);
            }
            (pair.get_item(0)?, pair.get_item(1)?)
        } else {
            return Ok(None);
        };
        memory::push(&mut names, name)?;
        memory::push(&mut values, value)?;
    }
    Ok(Some((new_list(py, names.into_iter().map(Ok))?, new_list(py, values.into_iter().map(Ok))?)))
}

/// Takes the entry of `key` out of a module and gives its value.
///
/// `None`, and nothing is done, if there is none, if what stands behind it is None or no Parameter, or if torch would ask
/// somebody else.
#[pyfunction]
pub(crate) fn pop_entry<'py>(
    module: &Bound<'py, PyAny>,
    key: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Ok(key) = key.cast_exact::<PyString>() else {
        return Ok(None);
    };
    take_entry(module, key, Method::POP)
}

/// Deletes the entry of `key`; `false`, and nothing is done, where [`pop_entry`] would give `None`.
#[pyfunction]
pub(crate) fn delete_entry(module: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>) -> PyResult<bool> {
    let Ok(key) = key.cast_exact::<PyString>() else {
        return Ok(false);
    };
    Ok(take_entry(module, key, Method::DELETE)?.is_some())
}

fn take_entry<'py>(
    module: &Bound<'py, PyAny>,
    key: &Bound<'py, PyString>,
    method: Method,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some((attributes, parameters)) = own_parts(module, method)? else {
        return Ok(None);
    };
    let Some(keys) = keys_in(&attributes)? else {
        return Ok(None);
    };
    let Some(value) = parameters.get_item(key)?.filter(|value| !value.is_none()) else {
        return Ok(None);
    };
    if attributes.contains(key)? || !keys.get().remove(key) {
        return Ok(None);
    }
    parameters.del_item(key)?;
    Ok(Some(value))
}

/// Takes the last (or the first) entry out of a module and gives its name and value.
///
/// `None`, and nothing is done, if there is none, if what stands behind it is no Parameter, or if torch would ask somebody
/// else.
#[pyfunction]
pub(crate) fn pop_end<'py>(
    module: &Bound<'py, PyAny>,
    last: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = module.py();
    let Ok(last) = last.extract::<bool>() else {
        let shown = last.repr()?;
        return Err(PyTypeError::new_err(format!("popitem(): expected last to be True or False, got {shown}")));
    };
    let Some((attributes, parameters)) = own_parts(module, Method::POPITEM)? else {
        return Ok(None);
    };
    let Some(keys) = keys_in(&attributes)? else {
        return Ok(None);
    };
    let Some(name) = keys.get().end(py, last).filter(|name| !attributes.contains(name).unwrap_or(true)) else {
        return Ok(None);
    };
    if last && !parameters.is_empty() {
        // The last name is nearly always the last key of the dict, which it gives without a look-up.
        let popped = parameters.call_method0(intern!(py, "popitem"))?;
        let item = popped.cast::<PyTuple>()?;
        if item.get_item(0)?.is(&name) && keys.get().discard_end(py, &name, last) {
            return Ok(Some(popped));
        }
        parameters.set_item(item.get_item(0)?, item.get_item(1)?)?;
    }
    match parameters.get_item(&name)? {
        Some(value) if keys.get().discard_end(py, &name, last) => {
            parameters.del_item(&name)?;
            Ok(Some(new_pair(py, name, value)?.into_any()))
        }
        _ => Ok(None),
    }
}

/// Puts the detached tensor of each of `parameters` into a state dict, under its name behind `prefix`.
///
/// Those that are None are left out, as torch does.
#[pyfunction]
pub(crate) fn save_parameters(
    parameters: &Bound<'_, PyDict>,
    destination: &Bound<'_, PyAny>,
    prefix: &Bound<'_, PyString>,
    parameter: &Bound<'_, PyType>,
) -> PyResult<()> {
    let py = parameters.py();
    let torch = Torch::get(py)?;
    let detach_name = intern!(py, "detach");
    let detach = parameter.getattr(detach_name)?;
    let bare = prefix.is_empty()?;
    // Taken together first: what a `detach` of a subclass runs, or another thread meanwhile, may change the dict. Each is
    // given up as soon as it is saved, as long as it is in the cache.
    let mut all = memory::collect(parameters.iter())?.into_iter();
    while let Some((name, value)) = all.next() {
        if let Some((_, next)) = all.as_slice().get(AHEAD - 1) {
            torch.prefetch(next);
        }
        if value.is_none() {
            continue;
        }
        let exact = value.get_type().is(parameter);
        let tensor = if exact { detach.call1((value,))? } else { value.call_method0(detach_name)? };
        if bare {
            destination.set_item(name, tensor)?;
        } else {
            destination.set_item(prefix.add(name)?, tensor)?;
        }
    }
    Ok(())
}

/// Whether the keys of `parameters` are the names of `keys`, in the same order.
#[pyfunction]
pub(crate) fn in_step(py: Python<'_>, keys: &Bound<'_, EntryKeys>, parameters: &Bound<'_, PyDict>) -> PyResult<bool> {
    let names = keys.get().names(py)?;
    Ok(names.len() == parameters.len()
        && names.into_iter().zip(parameters.iter()).all(|(name, (key, _))| key.is(name.into_text(py))))
}

/// Takes all names out of `keys`, and what stands behind them out of `parameters`; gives the names that were not there.
#[pyfunction]
pub(crate) fn clear_entries<'py>(
    keys: &Bound<'py, EntryKeys>,
    parameters: &Bound<'py, PyDict>,
) -> PyResult<Vec<Bound<'py, PyString>>> {
    let py = keys.py();
    let names = keys.get().take_names(py)?;
    let mut elsewhere = Vec::new();
    // They go when all is done: their finalizers may change the dictionary.
    let mut removed = memory::with_capacity(names.len())?;
    for name in names {
        let name = name.into_text(py);
        match parameters.get_item(&name)? {
            Some(value) => {
                removed.push(value);
                parameters.del_item(&name)?;
            }
            None => elsewhere.push(name),
        }
    }
    Ok(elsewhere)
}
