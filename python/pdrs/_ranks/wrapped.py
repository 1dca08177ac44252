"""Notices that DDP or FSDP2 has taken tables for its own that are sharded by name."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Wrappers"]


class Wrappers:
    """What is known of the wrappers around a dictionary.

    Parameters
    ----------
    local
        The dictionary that has the tables.
    tables
        Its tables at first.
    """

    def __init__(self, local: Module, tables: Sequence[Tensor]) -> None:
        self._local = local
        self._looked_for_ddp, self._ids = False, set(map(id, tables))

    def refuse(self, tables: Sequence[Tensor]) -> None:
        """Raise RuntimeError if a wrapper has taken the tables for its own.

        All objects are looked through once, for what is there already. Later, a table in a forward pass of DDP is
        noticed.
        """
        ids = set(map(id, tables))
        if ids != self._ids and not _is_in_fsdp2(self._local):
            self._ids = ids
        if ids != self._ids or any(hasattr(table, "placements") for table in tables):
            raise RuntimeError(
                "FSDP2 has sharded a table that is sharded by name: pass ignored_params=pdrs.distributed.ignored_params"
                "(model) to fully_shard"
            )
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        wrapped = [] if active is None else [active]
        if not self._looked_for_ddp:
            self._looked_for_ddp = True
            wrapped += [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
        for one in wrapped:
            if any(id(parameter) in ids for parameter in one.__dict__.get("_module_parameters", ())):
                self._looked_for_ddp = False  # so that it looks again if this is caught
                raise RuntimeError(
                    "DDP has overwritten the rows of this rank with those of rank 0: wrap pdrs.distributed.leave_out"
                    "(model) instead of the model"
                )


def _is_in_fsdp2(module: Module) -> bool:
    """Whether FSDP2 has sharded a module around this one; its forward pass puts other Parameters in place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    found = [one for one in gc.get_objects() if issubclass(type(one), fsdp.FSDPModule)]
    return any(each is module for one in found for each in one.modules())
