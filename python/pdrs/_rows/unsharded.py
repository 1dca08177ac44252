"""The whole copies of tables that FSDP2 puts in their places for a forward pass.

They are plain Parameters, which FSDP2 fills from the shards, and throws away. What is written to one is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pdrs._rows import optimizer_state

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["FSDP2", "gathered", "is_unsharded", "refuse_unsharded", "unsharded_error"]

# Without these modules nothing is sharded by FSDP2.
FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp_param"
_STATES = "torch.distributed._composable_state"


def is_unsharded(parameter: Tensor | None) -> bool:
    """Whether a registered tensor is the copy that FSDP2 has gathered of a sharded table. **O(1)** for own tables."""
    if FSDP2 not in sys.modules or parameter is None or optimizer_state.is_watched(parameter):
        return False
    return any(one is parameter for one in _copies())


def gathered(sd: StackedParameterDict) -> list[str]:
    """Return the tables of a dictionary that are such copies. **O(tables)**, or **O(1)** if FSDP2 shards nothing."""
    states = getattr(sys.modules.get(_STATES), "_module_state_mapping", None)
    if states is None or not states.data:  # which is asked several times faster than a WeakKeyDictionary
        return []
    return [one.attribute for one in sd._tables if is_unsharded(sd._parameters.get(one.attribute))]


def refuse_unsharded(sd: StackedParameterDict, what: str) -> None:
    """Raise RuntimeError if a table is such a copy; ``what`` is what to do at another time."""
    if FSDP2 in sys.modules and (tables := gathered(sd)):
        raise unsharded_error(tables[0], what)


def unsharded_error(attribute: str, what: str) -> RuntimeError:
    """Return the error for a table that is such a copy."""
    return RuntimeError(
        f"FSDP2 has gathered the table '{attribute}', as for a forward pass, and what is written to it now is lost: "
        f"{what}"
    )


def _copies() -> Iterator[Tensor | None]:
    # torch has no public way from a Parameter to its shard. Later versions have several groups for a module.
    states: Any = getattr(sys.modules.get(_STATES), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for one in getattr(group, "fsdp_params", ()):
                yield getattr(one, "_unsharded_param", None)
