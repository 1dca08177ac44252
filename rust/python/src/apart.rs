//! Conversion of large tensors on the CPU, one after another, each into memory of its own.
//!
//! A slab saves the work that each tensor costs, of which a large one has little, and costs new memory for all at once:
//! every page of it is a fault. Here the old memory of a tensor goes before the next is converted, which may get it.
//! There is no way back from that. So nothing may fail on the way: what torch might refuse is looked at before, and
//! should memory run out, the rest goes into a slab that has been allocated before, and that costs no more than
//! addresses as long as nobody writes there.

use pyo3::intern;
use pyo3::prelude::*;

use crate::group::TensorGroup;
use crate::slab::Slab;
use crate::tensor::Torch;

/// A group whose tensors are to be converted, a dtype that can have gradients, and what gives the slab in reserve.
type Conversion<'py> = (Bound<'py, TensorGroup>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Raises if torch would refuse to replace the data of a tensor in one of the groups.
#[pyfunction]
pub(crate) fn check_apart(py: Python<'_>, groups: Vec<Bound<'_, TensorGroup>>) -> PyResult<()> {
    let torch = Torch::get(py)?;
    groups.iter().try_for_each(|group| group.get().check_rebindable(torch, py, true))
}

/// Converts the tensors of groups that have been checked; they stay the same objects.
///
/// No function mode may be on: then no Python code runs in torch's conversion, and no signal can interrupt this.
#[pyfunction]
pub(crate) fn convert_apart(py: Python<'_>, conversions: Vec<Conversion<'_>>) -> PyResult<()> {
    let torch = Torch::get(py)?;
    for (group, dtype, reserve) in conversions {
        let group = group.get();
        group.begin_to_move();
        let mut slab: Option<Slab<'_>> = None;
        for at in 0..group.regions() {
            let tensor = group.tensor(py, at)?;
            let converted = match slab {
                Some(_) => None,
                None => tensor.call_method1(intern!(py, "to"), (&dtype,)).ok(),
            };
            if let Some(converted) = converted {
                torch.set_data(&tensor, &converted)?;
                continue;
            }
            let slab = match &mut slab {
                Some(slab) => slab,
                None => slab.insert(group.slab_of(torch, &reserve.call0()?, None)?),
            };
            let place = group.view(slab, at)?;
            place.call_method1(intern!(py, "copy_"), (&tensor,))?;
            torch.set_data(&tensor, &place)?;
        }
        if let Some(slab) = slab {
            slab.remember();
        }
    }
    Ok(())
}
