"""What a move is: learnt from the function that torch hands to ``Module._apply``.

Anything unusual about the function, or about the modes of torch that are on, is not recognised, and is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["Move", "TensorFunction", "asked_of_torch", "is_shared_memory", "is_usual", "recognise", "usual_applies"]

TensorFunction = Callable[[Tensor], Tensor]

# Methods that move what a module holds, and nothing else. A class that moves faster puts its own here.
usual_applies: list[Any] = [Module._apply]


def _inner_functions(*methods: str) -> dict[CodeType, str]:
    return {
        constant: method
        for method in methods
        for constant in getattr(Module, method).__code__.co_consts
        if isinstance(constant, CodeType)
    }


# The functions that torch's own methods give to `_apply`, by their code.
_KNOWN = _inner_functions("to", "cuda", "cpu", "type", "float", "double", "half", "bfloat16", "to_empty")
_SHARES_MEMORY = _inner_functions("share_memory")


@dataclass(frozen=True)
class Move:
    """What a function of torch's does to every tensor.

    Parameters
    ----------
    function
        What torch gave to ``_apply``.
    method
        The name of the method of ``Module`` that it comes from.
    non_blocking
        Whether a move to or from a device may return before it is complete.
    """

    function: TensorFunction
    method: str
    non_blocking: bool = False
    _targets: dict[tuple[torch.dtype, torch.device], tuple[torch.dtype, torch.device]] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether buffers stay the same objects, as Parameters do; so does what is already as it shall be."""
        return self.method == "pin_memory"

    @property
    def anew(self) -> bool:
        """Whether tensors may need new memory though they have the right dtype and device."""
        return self.method in ("to_empty", "pin_memory")

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a tensor has the dtype and device that it is to get."""
        kind = (tensor.dtype, tensor.device)
        return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and self.target(*kind) == kind

    def target(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
        """Return where a tensor of this dtype and device goes: the function is asked, with an empty one."""
        if (dtype, device) not in self._targets:
            moved = self.function(torch.empty(0, dtype=dtype, device=device))
            self._targets[dtype, device] = moved.dtype, moved.device
        return self._targets[dtype, device]

    def narrowest(self) -> int | None:
        """Return the size of the elements that all floating point tensors get, or None if they keep theirs."""
        if self.anew:
            return None
        single, double = (self.target(dtype, torch.device("cpu"))[0] for dtype in (torch.float32, torch.float64))
        return single.itemsize if single == double else None


def recognise(function: TensorFunction) -> Move | None:
    """Return what a function given to ``_apply`` does; None if it is not torch's, or torch does something unusual."""
    if not isinstance(function, FunctionType) or function.__code__ not in _KNOWN or _unusual_times():
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if "convert_to_format" in cells and cells["convert_to_format"].cell_contents is not None:
        return None
    non_blocking = "non_blocking" in cells and bool(cells["non_blocking"].cell_contents)
    return Move(function, _KNOWN[function.__code__], non_blocking)


def _unusual_times() -> bool:
    """Whether torch is to move otherwise than by ``tensor.data = ...``, or something listens to every operation."""
    return (
        torch.__future__.get_swap_module_params_on_conversion()
        or torch.__future__.get_overwrite_module_params_on_conversion()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(
            type(mode) is not DeviceContext
            for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        )
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.compiler.is_compiling()
    )


def is_shared_memory(function: TensorFunction) -> bool:
    """Whether torch is about to put every tensor into shared memory."""
    return getattr(function, "__code__", None) in _SHARES_MEMORY


def is_usual(module: Module) -> bool:
    """Whether ``Module._apply`` itself moves what a module holds. TorchScript's modules hold it elsewhere."""
    own = type(module)._apply not in usual_applies or "_apply" in vars(module)
    return not own and isinstance(module._parameters, dict)


def asked_of_torch(*args: Any, **kwargs: Any) -> TensorFunction:
    """Return what ``Module.to`` would give to ``_apply``, errors and warnings included."""
    asked = _Asked()
    Module.to(asked, *args, **kwargs)
    return asked.function


class _Asked(Module):
    """Learns what torch's own methods would give to ``_apply``, errors and warnings included."""

    function: TensorFunction

    def _apply(self, fn: TensorFunction, recurse: bool = True) -> _Asked:
        object.__setattr__(self, "function", fn)
        return self
