//! Sweeps over many modules before a move: which of them move, what they hold, and whether any of it has to move.
//!
//! A model has thousands of modules, most of them with nothing of their own, so a few steps of Python for each would
//! take as long as the move. Classes are looked at once a sweep; modules, and what they hold, once each.

use std::collections::{HashMap, HashSet, VecDeque};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyType};

use crate::python::memory::{self, new_list};
use crate::torch::Torch;
use crate::torch::bytes::hint;
use crate::torch::dlpack::{Device, Dtype};

/// How many Parameters are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// What a class makes of methods of Module.
#[derive(Clone, Copy)]
struct Class {
    /// Whether its `_apply` is one of the usual ones.
    applies: bool,
    /// Whether its children are what lies in `_modules`.
    has_children: bool,
    /// Whether what it holds lies in the attributes of each module.
    is_open: bool,
}

struct Classes<'a, 'py> {
    module: Bound<'py, PyAny>,
    usual: &'a Bound<'py, PyTuple>,
    seen: HashMap<usize, Class>,
    last: Option<(usize, Class)>,
}

impl<'a, 'py> Classes<'a, 'py> {
    fn new(usual: &'a Bound<'py, PyTuple>) -> PyResult<Self> {
        let module = usual.py().import("torch.nn")?.getattr("Module")?;
        Ok(Self { module, usual, seen: HashMap::new(), last: None })
    }

    fn of(&mut self, module: &Bound<'py, PyAny>) -> PyResult<Class> {
        let class = module.get_type();
        // The modules of the walk keep their classes alive, so that an address is that of one class.
        let address = class.as_ptr() as usize;
        if let Some((last, facts)) = self.last
            && last == address
        {
            return Ok(facts);
        }
        let facts = match self.seen.get(&address) {
            Some(facts) => *facts,
            None => self.look_at(&class)?,
        };
        self.seen.insert(address, facts);
        self.last = Some((address, facts));
        Ok(facts)
    }

    fn look_at(&self, class: &Bound<'py, PyType>) -> PyResult<Class> {
        let py = class.py();
        let apply = class.getattr(intern!(py, "_apply"))?;
        let (mut has_children, mut is_open) = (true, true);
        for name in [intern!(py, "children"), intern!(py, "named_children")] {
            has_children &= class.getattr(name)?.is(&self.module.getattr(name)?);
        }
        for name in [intern!(py, "_parameters"), intern!(py, "_buffers"), intern!(py, "_modules")] {
            is_open &= !class.hasattr(name)?;
        }
        Ok(Class { applies: self.usual.iter().any(|usual| usual.is(&apply)), has_children, is_open })
    }
}

/// A module that the walk has come across, and its attributes.
struct Waiting<'py> {
    module: Bound<'py, PyAny>,
    own: Bound<'py, PyDict>,
}

impl<'py> Waiting<'py> {
    fn new(module: Bound<'py, PyAny>) -> PyResult<Self> {
        let own = module.getattr(intern!(module.py(), "__dict__"))?.cast_into::<PyDict>()?;
        Ok(Self { module, own })
    }

    /// An attribute of the module, without looking it up in the class if that has none of the name.
    fn attribute(&self, class: Class, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        match if class.is_open { self.own.get_item(name)? } else { None } {
            Some(found) => Ok(found),
            None => self.module.getattr(name),
        }
    }

    fn children(&self, class: Class) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let py = self.module.py();
        if class.has_children
            && !self.own.contains(intern!(py, "children"))?
            && !self.own.contains(intern!(py, "named_children"))?
            && let Ok(modules) = self.attribute(class, intern!(py, "_modules"))?.cast_exact::<PyDict>()
        {
            if modules.is_empty() {
                return Ok(Vec::new());
            }
            return memory::collect(modules.iter().map(|(_, child)| child).filter(|child| !child.is_none()));
        }
        memory::try_collect(self.module.call_method0(intern!(py, "children"))?.try_iter()?)
    }
}

/// Modules that are moved together, and those that move themselves; where their Parameters and their buffers are.
type Walked<'py> = (
    Vec<Bound<'py, PyAny>>,
    Vec<Bound<'py, PyAny>>,
    Vec<Bound<'py, PyDict>>,
    Vec<(Bound<'py, PyAny>, Bound<'py, PyDict>)>,
);

/// Modules and those inside that are moved with them, in order, and those that move themselves; each once.
///
/// `usual_applies` are the functions `_apply` of classes that leave the move to their caller. A module moves itself if
/// it has another one, or if what it holds lies elsewhere than in a dict, as that of `TorchScript` does. The modules that
/// are given are never asked; without `usual_applies`, they are all.
#[pyfunction]
#[pyo3(signature = (modules, usual_applies = None))]
pub(crate) fn walk_modules<'py>(
    modules: Vec<Bound<'py, PyAny>>,
    usual_applies: Option<&Bound<'py, PyTuple>>,
) -> PyResult<Walked<'py>> {
    let (mut usual, mut others, mut parameters, mut buffers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let Some(first) = modules.first() else {
        return Ok((usual, others, parameters, buffers));
    };
    let py = first.py();
    let none = PyTuple::empty(py);
    let mut classes = Classes::new(usual_applies.unwrap_or(&none))?;
    let mut seen = HashSet::new();
    let given: HashSet<_> = modules.iter().map(|module| module.as_ptr() as usize).collect();
    let mut waiting = modules.into_iter().rev().map(Waiting::new).collect::<PyResult<Vec<_>>>()?;
    while let Some(one) = waiting.pop() {
        let address = one.module.as_ptr() as usize;
        seen.try_reserve(1).map_err(|_| memory::refused(pdrs_core::Error::Memory))?;
        if !seen.insert(address) {
            continue;
        }
        let class = classes.of(&one.module)?;
        let is_given = given.contains(&address);
        if !is_given && (!class.applies || one.own.contains(intern!(py, "_apply"))?) {
            memory::push(&mut others, one.module)?;
            continue;
        }
        let held = one.attribute(class, intern!(py, "_parameters"))?.cast_into::<PyDict>();
        let held_buffers = one.attribute(class, intern!(py, "_buffers"))?.cast_into::<PyDict>();
        if !is_given && (held.is_err() || held_buffers.is_err()) {
            memory::push(&mut others, one.module)?;
            continue;
        }
        let (held, held_buffers) = (held?, held_buffers?);
        if usual_applies.is_some() {
            let children = one.children(class)?;
            // Sisters are looked at together, so that their cache misses overlap.
            for child in &children {
                hint(child.as_ptr() as usize);
            }
            for child in children.into_iter().rev() {
                memory::push(&mut waiting, Waiting::new(child)?)?;
            }
        }
        if !held.is_empty() {
            memory::push(&mut parameters, held)?;
        }
        if !held_buffers.is_empty() {
            memory::push(&mut buffers, (one.module.clone(), held_buffers))?;
        }
        memory::push(&mut usual, one.module)?;
    }
    Ok((usual, others, parameters, buffers))
}

/// Calls `each` with every Parameter that is not None and its gradient, until it gives false.
fn for_each_parameter<'py>(
    torch: &Torch,
    dicts: &[Bound<'py, PyDict>],
    mut each: impl FnMut(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>) -> PyResult<bool>,
) -> PyResult<bool> {
    let mut look_at = |parameter: Bound<'py, PyAny>| {
        let gradient = torch.gradient(&parameter)?;
        each(parameter, (!gradient.is_none()).then_some(gradient))
    };
    let mut ahead = VecDeque::with_capacity(BATCH);
    for parameters in dicts {
        // A list of them, because what a `grad` property of a subclass runs might change the dict.
        for parameter in memory::values_of(parameters)? {
            if parameter.is_none() {
                continue;
            }
            torch.prefetch(&parameter);
            if ahead.len() == BATCH
                && let Some(next) = ahead.pop_front()
                && !look_at(next)?
            {
                return Ok(false);
            }
            ahead.push_back(parameter);
        }
    }
    for parameter in ahead {
        if !look_at(parameter)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lists the Parameters in some dicts, as often as they are there, and their gradients; without None.
#[pyfunction]
pub(crate) fn collect_parameters<'py>(
    py: Python<'py>,
    dicts: Vec<Bound<'py, PyDict>>,
) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyList>)> {
    let (mut parameters, gradients) = (Vec::new(), PyList::empty(py));
    for_each_parameter(Torch::get(py)?, &dicts, |parameter, gradient| {
        if let Some(gradient) = gradient {
            gradients.append(gradient)?;
        }
        memory::push(&mut parameters, parameter)?;
        Ok(true)
    })?;
    // At once: an `append` for each takes as long as all the rest that is not torch's.
    Ok((new_list(py, parameters.into_iter().map(Ok))?, gradients))
}

/// Whether `keeps` says so of one tensor of each dtype and device among Parameters, their gradients and buffers.
///
/// Not if there is an unusual one, which `group_tensors` would leave to torch.
#[pyfunction]
pub(crate) fn all_kept(
    py: Python<'_>,
    parameters: Vec<Bound<'_, PyDict>>,
    buffers: Vec<Bound<'_, PyDict>>,
    keeps: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let torch = Torch::get(py)?;
    let mut kept: Vec<(Device, Dtype)> = Vec::new();
    let mut dims = Vec::new();
    let mut is_kept = |tensor: &Bound<'_, PyAny>| {
        dims.clear();
        let Ok(found) = torch.find(tensor, &mut dims)? else {
            return Ok(false);
        };
        let kind = (found.device(), found.dtype());
        // The latest kind is nearly always that of the next.
        if !kept.iter().rev().any(|other| *other == kind) {
            if !keeps.call1((tensor,))?.is_truthy()? {
                return Ok(false);
            }
            kept.push(kind);
        }
        PyResult::Ok(true)
    };
    let are_kept = for_each_parameter(torch, &parameters, |parameter, gradient| {
        Ok(is_kept(&parameter)? && gradient.map_or(Ok(true), |gradient| is_kept(&gradient))?)
    })?;
    if !are_kept {
        return Ok(false);
    }
    for of_module in &buffers {
        for buffer in memory::values_of(of_module)? {
            if !buffer.is_none() && !is_kept(&buffer)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
