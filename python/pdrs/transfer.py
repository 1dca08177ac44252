"""``pdrs.to`` and ``pdrs.set_staging``: moves of any module, all its tensors at once."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.nn import Module

from pdrs._moves.recognise import asked_of_torch, is_usual
from pdrs._moves.run import apply
from pdrs._moves.staging import set_staging

__all__ = ["set_staging", "to"]

ModuleT = TypeVar("ModuleT", bound=Module)


def to(module: ModuleT, *args: Any, **kwargs: Any) -> ModuleT:
    """Move and convert all parameters and buffers of a module at once, as ``module.to(...)`` does one by one. **O(n)**.

    Parameters
    ----------
    module
        Any module. If it has its own ``to``, that is called. Submodules with their own ``_apply``, such as recurrent
        layers, are moved by it, after the rest.
    *args, **kwargs
        The arguments of :meth:`torch.nn.Module.to`: ``device``, ``dtype``, ``tensor``, ``non_blocking``,
        ``memory_format``.

    Returns
    -------
    torch.nn.Module
        ``module`` itself. Its Parameters stay the same objects. Those of one dtype and device are in one block of
        memory.

    Raises
    ------
    TypeError
        As for ``Module.to``, or if ``module`` is not a module.
    torch.OutOfMemoryError
        If the device has too little memory. Then nothing has moved. The message says how much was needed.
    RuntimeError
        For a move between host and device while a CUDA graph is captured.

    Notes
    -----
    Old and new memory exist at the same time until the move is complete. With ``non_blocking``, the call may return
    before copies to a device end. The host tensors may change or be freed at once. Work that is queued later on the
    current stream finds the complete data. ``docs/transfers.md`` lists all guarantees.

    Examples
    --------
    >>> import torch, pdrs
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    >>> pdrs.to(model, torch.float64)[0].weight.dtype
    torch.float64
    """
    if not hasattr(module, "to"):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if type(module).to is not Module.to:
        return module.to(*args, **kwargs)
    function = asked_of_torch(*args, **kwargs)
    if is_usual(module) and apply(module, function, recurse=True):
        return module
    return module._apply(function)  # type: ignore[no-untyped-call,no-any-return]
