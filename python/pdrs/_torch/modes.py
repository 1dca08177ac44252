"""Which modes of torch are on: who listens to every operation would miss what is done natively."""

from __future__ import annotations

import torch
from torch.fx import _symbolic_trace
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["is_intercepted", "refuse_symbolic_trace"]

# Asked for each entry that is set: to look them up in the modules of torch would take half of the time.
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
# Newer versions of torch have an answer for each thread.
_is_fx_tracing = getattr(_symbolic_trace, "_get_is_fx_tracing", _symbolic_trace.is_fx_symbolic_tracing)


def is_intercepted() -> bool:
    """Whether somebody listens to what is done with tensors, and would not see what is done natively."""
    return (
        _len_torch_dispatch_stack() > 0
        or _peek_interpreter_stack() is not None
        or (_len_torch_function_stack() > 0 and _is_function_mode_active())
    )


def refuse_symbolic_trace() -> None:
    """Raise a RuntimeError under ``torch.fx.symbolic_trace``, which would record rows by name as constants.

    Tracers that see every operation (``torch.export``, ``make_fx``) keep the table as a parameter.
    """
    if _is_fx_tracing() and _len_torch_dispatch_stack() == 0 and not torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.fx.symbolic_trace would record the rows of a StackedParameterDict as constants, and nothing would "
            "train them: give what is traced rows = indices(names) as an input, and read table(shape)[rows]"
        )


def _is_function_mode_active() -> bool:
    # That of `with torch.device(...)` and `torch.set_default_device` changes only where new tensors lie.
    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
