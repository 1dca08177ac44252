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
    """Move and convert the parameters and buffers of any module, as ``module.to(...)`` does, but all at once.

    Parameters
    ----------
    module
        Any module. One with a ``to`` of its own is moved by that; submodules with an ``_apply`` of their own (recurrent
        ones have it) are moved by that, after the rest.
    *args, **kwargs
        Those of :meth:`torch.nn.Module.to`: ``device``, ``dtype``, ``tensor``, ``non_blocking``, ``memory_format``.

    Returns
    -------
    torch.nn.Module
        ``module`` itself. Its Parameters are the same objects; those of a dtype and device lie in one block of memory.

    Raises
    ------
    TypeError
        As ``Module.to``, or if ``module`` is none.
    torch.OutOfMemoryError
        If the device has too little memory for the block; then nothing has moved. The message says how much was wanted.
    RuntimeError
        Between host and device while a CUDA graph is being captured.

    Notes
    -----
    Old and new memory exist side by side until the move is complete. ``non_blocking`` returns before copies to a device
    end; the host tensors may change or die all the same, and work queued on the current stream finds the data complete.
    docs/transfers.md says more. **O(n)**, with a small part of torch's cost an entry.

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
