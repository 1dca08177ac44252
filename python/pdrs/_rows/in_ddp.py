"""New names in the forward pass of DDP, which each rank may get in another order: said once for each dictionary."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pdrs._rows.step_warnings import warn

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["active_ddp", "is_reduced", "warn_of_ranks"]

_DDP = "torch.nn.parallel.distributed"


def active_ddp() -> Any:
    """Return the DDP module whose forward pass runs, or None."""
    module = sys.modules.get(_DDP)
    return None if module is None else getattr(module.DistributedDataParallel, "_active_ddp_module", None)


def is_reduced(table: Tensor) -> bool:
    """Whether the DDP module whose forward pass runs adds up the gradients of a table, which must be dense then."""
    active = active_ddp()
    return active is not None and any(one is table for one in active.__dict__.get("_module_parameters", ()))


def warn_of_ranks(sd: StackedParameterDict) -> None:
    """Warn if names of a dictionary are inserted in the forward pass of the DDP module that reduces its gradients.

    **O(1)** when it has warned. It is no error, because all ranks may insert the same names on purpose. To ask them
    would hang if they do not.
    """
    active = active_ddp()
    if active is None or sd.__dict__.get("_warned_of_ranks"):
        return
    if active.process_group.size() == 1 or not any(one is sd for one in active.modules()):
        return
    tables = sd.tables().values()
    if tables and not any(map(is_reduced, tables)):
        return  # DDP was told to leave them alone
    sd.__dict__["_warned_of_ranks"] = True
    warn(
        "names are inserted in the forward pass of DDP. Unless all ranks insert the same names in the same order, a "
        "row belongs to different names on different ranks, and DDP adds their gradients. Insert them before the "
        "forward pass by pdrs.distributed.insert(dictionary, names), or let pdrs.distributed.check(model, every=100) "
        "raise if the ranks differ",
        UserWarning,
    )
