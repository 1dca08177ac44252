"""What keeps DDP and FSDP2 from taking sharded tables for copies of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch.nn import Module, Parameter

from pdrs._ranks.sharded import ShardedParameterDict

__all__ = ["ignored_params", "leave_out"]

_Module = TypeVar("_Module", bound=Module)


def leave_out(model: _Module) -> _Module:
    """Tell DDP to leave the sharded tables of a model alone, and return the model.

    Call it on the very module that is wrapped: DDP asks no other. It reduces the gradients of all other parameters.

    Parameters
    ----------
    model
        A module with any number of :class:`ShardedParameterDict`.

    Examples
    --------
    ``DistributedDataParallel(pdrs.distributed.leave_out(model))``

    """
    names = [name for name, _ in _sharded(model)]
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = [*dict.fromkeys([*before, *names])]  # type: ignore[assignment]
    return model


def ignored_params(model: Module) -> set[Parameter]:
    """Return the sharded tables of a model, for FSDP2: ``fully_shard(model, ignored_params=ignored_params(model))``."""
    return {parameter for _, parameter in _sharded(model)}


def _sharded(model: Module) -> Iterator[tuple[str, Parameter]]:
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedParameterDict):
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}" if prefix else name, parameter
