//! Sweeps over many modules before a move: which of them move, what they hold, and whether any of it has to move.
//!
//! A model has thousands of modules, most of them with nothing of their own, so a few steps of Python for each would
//! take as long as the move. Classes are looked at once a sweep; modules, and what they hold, once each.

use std::collections::{HashMap, HashSet};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};

use crate::dlpack::{Device, Dtype};
use crate::tensor::{Torch, prefetch};

/// How many Parameters are looked at ahead, so that their cache misses overlap.
const BATCH: usize = 32;

/// What a class makes of methods of Module.
#[derive(Clone, Copy)]
struct Class {
    /// Whether its `_apply` is one of the usual ones.
    applies: bool,
    /// Whether its children are what lies in `_modules`.
    has_children: bool,
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
        let mut has_children = true;
        for name in [intern!(py, "children"), intern!(py, "named_children")] {
            has_children &= class.getattr(name)?.is(&self.module.getattr(name)?);
        }
        Ok(Class { applies: self.usual.iter().any(|usual| usual.is(&apply)), has_children })
    }
}

/// A module and those inside that are moved with it, in order, and those that move themselves; each once.
///
/// `usual_applies` are the functions `_apply` of classes that leave the move to their caller. A module moves itself if
/// it has another one, or if what it holds lies elsewhere than in a dict, as that of `TorchScript` does. The first module
/// is never asked.
#[pyfunction]
pub(crate) fn walk_modules<'py>(
    module: Bound<'py, PyAny>,
    usual_applies: &Bound<'py, PyTuple>,
) -> PyResult<(Vec<Bound<'py, PyAny>>, Vec<Bound<'py, PyAny>>)> {
    let mut classes = Classes::new(usual_applies)?;
    let (mut usual, mut others) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    let mut waiting = vec![module];
    while let Some(one) = waiting.pop() {
        if !seen.insert(one.as_ptr() as usize) {
            continue;
        }
        let class = classes.of(&one)?;
        let own = one.getattr(intern!(one.py(), "__dict__"))?.cast_into::<PyDict>()?;
        if !usual.is_empty() && !is_moved_by_others(&one, class, &own)? {
            others.push(one);
            continue;
        }
        let first = waiting.len();
        for_each_child(&one, class, &own, |child| waiting.push(child))?;
        waiting[first..].reverse();
        usual.push(one);
    }
    Ok((usual, others))
}

fn is_moved_by_others(module: &Bound<'_, PyAny>, class: Class, own: &Bound<'_, PyDict>) -> PyResult<bool> {
    let py = module.py();
    Ok(class.applies
        && !own.contains(intern!(py, "_apply"))?
        && module.getattr(intern!(py, "_parameters"))?.is_instance_of::<PyDict>()
        && module.getattr(intern!(py, "_buffers"))?.is_instance_of::<PyDict>())
}

fn for_each_child<'py>(
    module: &Bound<'py, PyAny>,
    class: Class,
    own: &Bound<'py, PyDict>,
    mut each: impl FnMut(Bound<'py, PyAny>),
) -> PyResult<()> {
    let py = module.py();
    if class.has_children
        && !own.contains(intern!(py, "children"))?
        && !own.contains(intern!(py, "named_children"))?
        && let Ok(modules) = module.getattr(intern!(py, "_modules"))?.cast_exact::<PyDict>()
    {
        modules.iter().filter(|(_, child)| !child.is_none()).for_each(|(_, child)| each(child));
        return Ok(());
    }
    for child in module.call_method0(intern!(py, "children"))?.try_iter()? {
        each(child?);
    }
    Ok(())
}

/// Calls `each` with every Parameter of a module that is not None and its gradient, until it gives false.
fn for_each_parameter<'py>(
    torch: &Torch,
    module: &Bound<'py, PyAny>,
    mut each: impl FnMut(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>) -> PyResult<bool>,
) -> PyResult<bool> {
    let py = module.py();
    let parameters = module.getattr(intern!(py, "_parameters"))?.cast_into::<PyDict>()?;
    if parameters.is_empty() {
        return Ok(true);
    }
    // A list of them, because what a `grad` property of a subclass runs might change the dict.
    let values = parameters.values();
    let mut ahead = values.iter();
    ahead.by_ref().take(BATCH).for_each(|value| prefetch(&value));
    for value in &values {
        if let Some(next) = ahead.next() {
            prefetch(&next);
        }
        if value.is_none() {
            continue;
        }
        let gradient =
            if torch.is_plain(&value) { torch.gradient(&value)? } else { value.getattr(intern!(py, "grad"))? };
        if !each(value, (!gradient.is_none()).then_some(gradient))? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn buffers_of<'py>(module: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyDict>>> {
    let buffers = module.getattr(intern!(module.py(), "_buffers"))?.cast_into::<PyDict>()?;
    Ok((!buffers.is_empty()).then_some(buffers))
}

/// What modules hold: the Parameters, their gradients, and the module and the name of each buffer; without None.
type Held<'py> = (Bound<'py, PyList>, Bound<'py, PyList>, Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>);

/// Lists what modules hold. A Parameter is listed as often as it is held.
#[pyfunction]
pub(crate) fn collect_tensors<'py>(modules: &Bound<'py, PyList>) -> PyResult<Held<'py>> {
    let py = modules.py();
    let torch = Torch::get(py)?;
    let (parameters, gradients, mut buffers) = (PyList::empty(py), PyList::empty(py), Vec::new());
    for module in modules {
        for_each_parameter(torch, &module, |parameter, gradient| {
            if let Some(gradient) = gradient {
                gradients.append(gradient)?;
            }
            parameters.append(parameter)?;
            Ok(true)
        })?;
        if let Some(held) = buffers_of(&module)? {
            let named = held.iter().filter(|(_, buffer)| !buffer.is_none());
            buffers.extend(named.map(|(name, _)| (module.clone(), name)));
        }
    }
    Ok((parameters, gradients, buffers))
}

/// Whether `keeps` says so of one tensor of each dtype and device among all that modules hold.
///
/// Not if there is an unusual one, which `group_tensors` would leave to torch.
#[pyfunction]
pub(crate) fn all_kept(modules: &Bound<'_, PyList>, keeps: &Bound<'_, PyAny>) -> PyResult<bool> {
    let torch = Torch::get(modules.py())?;
    let mut kept: Vec<(Device, Dtype)> = Vec::new();
    let mut dims = Vec::new();
    let mut is_kept = |tensor: &Bound<'_, PyAny>| {
        dims.clear();
        let Ok(found) = torch.find(tensor, &mut dims)? else {
            return Ok(false);
        };
        let kind = (found.device, found.dtype);
        // The latest kind is nearly always that of the next.
        if !kept.iter().rev().any(|other| *other == kind) {
            if !keeps.call1((tensor,))?.is_truthy()? {
                return Ok(false);
            }
            kept.push(kind);
        }
        PyResult::Ok(true)
    };
    for module in modules {
        let go_on = for_each_parameter(torch, &module, |parameter, gradient| {
            Ok(is_kept(&parameter)? && gradient.map_or(Ok(true), |gradient| is_kept(&gradient))?)
        })?;
        if !go_on {
            return Ok(false);
        }
        if let Some(buffers) = buffers_of(&module)? {
            for buffer in buffers.values().iter().filter(|buffer| !buffer.is_none()) {
                if !is_kept(&buffer)? {
                    return Ok(false);
                }
            }
        }
    }
    Ok(true)
}
