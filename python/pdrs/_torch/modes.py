"""Which modes of torch are on: who listens to every operation would miss what is done natively."""

from __future__ import annotations

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["is_intercepted"]

# Asked for each entry that is set: to look them up in the modules of torch would take half of the time.
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack


def is_intercepted() -> bool:
    """Whether somebody listens to what is done with tensors, and would not see what is done natively."""
    return (
        _len_torch_dispatch_stack() > 0
        or _peek_interpreter_stack() is not None
        or (_len_torch_function_stack() > 0 and _is_function_mode_active())
    )


def _is_function_mode_active() -> bool:
    # That of `with torch.device(...)` and `torch.set_default_device` changes only where new tensors lie.
    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
