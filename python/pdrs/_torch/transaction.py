"""Changes that belong together, made in one step that nothing can stop half-way.

A signal handler may run between any two steps of Python and raise, above all ``KeyboardInterrupt``. This would leave
the first of several changes made and the others not: names that give the rows of others, for example. So whatever can
fail is done first, without touching what is there, and the changes are only noted. At the end, one native call makes
them all. Meanwhile the locks that the thread holds keep all other code out. A finalizer may run wherever an object is
made. It sees the dictionary before the change, after it, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, MethodWrapperType
from typing import Any

import torch
from torch import Tensor

from pdrs._core import in_one_step

__all__ = ["Changes"]

_set_data = Tensor.data.__set__  # type: ignore[attr-defined]
_set_grad = Tensor.grad.__set__  # type: ignore[union-attr]


class Changes:
    """A list of changes that have not been made yet; what they put in place is there already."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        # What is replaced lives until all is done: code may run when an object goes.
        self._replaced: list[Any] = []
        self.made = False

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Note a call of a function that is written in C, runs no Python code, and does not fail.

        The first of all may fail: nothing has been changed then.
        """
        assert isinstance(function, BuiltinFunctionType | MethodWrapperType), function
        self.calls.append(partial(function, *arguments))

    def set_attributes(self, instance: object, **values: Any) -> None:
        """Note new values of attributes of an instance, past the ``__setattr__`` of its class."""
        self.update(vars(instance), values)

    def update(self, target: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Note new values of keys of a dict."""
        self._replaced += [target.get(key) for key in values]
        self.call(target.update, values)

    def replace_all(self, target: dict[Any, Any] | list[Any], content: dict[Any, Any] | list[Any]) -> None:
        """Note another content of a dict or a list, which stays the same object."""
        self._replaced.append(target.copy())
        self.call(target.clear)
        self.call(target.update if isinstance(target, dict) else target.extend, content)

    def replace_data(self, parameter: Tensor, data: Tensor) -> None:
        """Note another tensor of the same kind and shape as the data of a Parameter, whose gradient stays."""
        self._replaced.append(parameter.data)
        self.call(_set_data, parameter, data)

    def set_data(self, parameter: Tensor, data: Tensor, gradient: Tensor | None) -> None:
        """Note another tensor as the data of a Parameter, and another gradient."""
        self._replaced += [parameter.data, parameter.grad]
        self.call(_set_grad, parameter, None)
        if parameter.requires_grad:
            # Data of another dtype, for a moment, makes torch forget the node that accumulates gradients, which knows
            # the old size.
            other = torch.float32 if data.dtype != torch.float32 else torch.float64
            self.call(_set_data, parameter, torch.empty(0, dtype=other, device=data.device))
        self.call(_set_data, parameter, data)
        self.call(_set_grad, parameter, gradient)

    def make(self) -> None:
        """Make all changes."""
        # Function modes, which are Python code, are not for these: they see what is computed, not where it is put.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            in_one_step([*self.calls, partial(vars(self).update, made=True)])
        self.calls, self._replaced = [], []
