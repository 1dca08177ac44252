"""Functions that ``torch.compile`` leaves alone, together with all that they call.

What changes tables, names or the state of optimizers is no part of a graph. Traced, it goes wrong: dynamo takes the
weak reference to an optimizer for the optimizer. ``torch.compiler.disable`` would do the same as this, but imports
``torch._dynamo``, which takes longer than to import torch, and costs a microsecond each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

__all__ = ["untraced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def untraced(function: _Function) -> _Function:
    """Let a function run as it is, whether it is called by a compiled function, or by what that calls.

    Other decorators go above it: this is for the code of the function itself, which a wrapper has not.
    """
    assert not hasattr(function, "__wrapped__"), function
    code: Any = function.__code__
    eval_frame.set_code_exec_strategy(code, _SKIP)  # where its frame would be compiled
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # where a frame that calls it is
    return function
