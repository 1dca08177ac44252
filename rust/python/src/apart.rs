//! Conversion of large tensors on the CPU, one after another, each into memory of its own.
//!
//! A slab saves the work that each tensor costs, of which a large one has little, and costs new memory for all at once:
//! every page of it is a fault. Here the old memory of a tensor goes before the next is converted, which may get it.
//! There is no way back from that. So should anything fail on the way, as for want of memory, the rest goes into a slab
//! that has been allocated before, and that costs no more than addresses as long as nobody writes there.

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;

use crate::group::TensorGroup;
use crate::slab::Slab;
use crate::tensor::Torch;

/// Converts the tensors of a group to the dtype of the slab in reserve; they stay the same objects.
///
/// Gives an error that is none of the conversion but was to stop the program; all tensors have been converted then, too.
pub(crate) fn convert_apart(
    torch: &'static Torch,
    group: &TensorGroup,
    reserve: &Bound<'_, PyAny>,
) -> PyResult<Option<PyErr>> {
    let py = reserve.py();
    let dtype = reserve.getattr(intern!(py, "dtype"))?;
    let mut slab: Option<Slab<'_>> = None;
    let mut interrupt = None;
    group.begin_to_move();
    for at in 0..group.regions() {
        let tensor = group.tensor(py, at)?;
        if slab.is_none() {
            match tensor.call_method1(intern!(py, "to"), (&dtype,)) {
                Ok(converted) => {
                    torch.set_data(tensor, &converted)?;
                    continue;
                }
                Err(error) => interrupt = (!error.is_instance_of::<PyException>(py)).then_some(error),
            }
        }
        let slab = match &mut slab {
            Some(slab) => slab,
            None => slab.insert(group.slab_of(torch, reserve, None)?),
        };
        let place = group.view(slab, at)?;
        place.call_method1(intern!(py, "copy_"), (tensor,))?;
        torch.set_data(tensor, &place)?;
    }
    if let Some(slab) = slab {
        slab.remember();
    }
    Ok(interrupt)
}
