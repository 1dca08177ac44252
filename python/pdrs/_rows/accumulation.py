"""One accumulation a backward pass for a table that has changed its size since the forward pass began.

autograd has a node for each parameter that adds what reaches it to ``.grad``. The node knows the size of the parameter,
so a table that grows gets another one, and graphs from before go on to end in the old one. A backward pass through both
would add up twice, and call twice what hangs on it: an optimizer that steps in ``register_post_accumulate_grad_hook``,
a hook of ``register_hook`` that clips. So the gradients of all nodes of a table wait for the last one of the pass.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["Accumulation"]

# So many sizes of a table may have graphs at once; older graphs accumulate on their own.
_NODES = 16


class Accumulation:
    """The nodes that accumulate the gradient of a parameter, and what has reached them in passes that go on.

    Parameters
    ----------
    resize
        What gives a gradient of another size that of the parameter.
    """

    def __init__(self, resize: Callable[[Tensor, int], Tensor]) -> None:
        self._resize = resize
        self._nodes: deque[Any] = deque(maxlen=_NODES)
        # By the number of a backward pass.
        self._passes: dict[int, _Pass] = {}

    def keep_node(self, parameter: Tensor) -> None:
        """Remember the node of a parameter that is about to change its size."""
        if parameter.requires_grad and parameter.is_leaf and not parameter.is_inference():
            with torch.inference_mode(False):
                node = get_gradient_edge(parameter).node
            if node not in self._nodes:
                self._nodes.append(node)

    def before(self, parameter: Tensor, gradient: Tensor, own: list[Any]) -> Tensor | None:
        """See what reaches one of the nodes, in front of all other hooks of the parameter; ``own`` are not to wait."""
        if not self._nodes:
            return None
        number, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        try:
            if not torch._C._will_engine_execute_node(node):
                return None
        except RuntimeError:  # of `torch.autograd.grad`, which takes it from here
            return None
        current = get_gradient_edge(parameter).node
        known = {*self._nodes, current}
        going = self._passes.setdefault(number, _Pass())
        going.reached.add(node)
        going.waits = any(one not in going.reached and torch._C._will_engine_execute_node(one) for one in known)
        if not going.waits and len(going.reached) == 1 and gradient.shape == parameter.shape:
            del self._passes[number]  # it is torch's alone
            return None
        self.gate_hooks(parameter, own)
        # torch stores the gradient in the place of the one that is there, and `after` takes it from there. It does so
        # with another size only if nobody else has the gradient.
        going.before, parameter.grad = parameter.grad, None
        return None if gradient.shape == parameter.shape or gradient.is_sparse else gradient.clone()

    def after(self, parameter: Tensor) -> bool:
        """Put the sum of what the nodes have brought in place; tell whether the gradient counts."""
        number = torch._C._current_graph_task_id()
        going = self._passes.get(number)
        if going is None:
            return parameter.grad is not None
        brought = parameter.grad
        parameter.grad = None  # torch looks at the size of what it replaces
        if brought is not None:
            brought = brought if brought.shape == parameter.shape else self._resize(brought, len(parameter))
            going.total = brought if going.total is None else _added(going.total, brought)
        parameter.grad = going.before
        if going.waits:
            return False
        del self._passes[number]
        total = going.total
        if total is None:
            return False
        for hook in list((parameter._backward_hooks or {}).values()):
            if isinstance(hook, _Gate):
                replaced = hook.hook(total)
                total = total if replaced is None else replaced
        if going.before is not None:
            total = _added(going.before, total)
        parameter.grad = total
        return True

    def gate_hooks(self, parameter: Any, own: Any) -> None:
        """Make all hooks of a parameter wait for the last gradient, but the first ones of the two kinds, our own."""
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            for key, hook in list((hooks or {}).items()):
                if not isinstance(hook, _Gate) and hook not in own:
                    hooks[key] = _Gate(self, hook)  # under its number, by which its handle removes it

    def holds_back(self) -> bool:
        """Whether the gradient that is here now is not yet the one that counts."""
        return torch._C._current_graph_task_id() in self._passes


class _Pass:
    """What the nodes of a table have brought in one backward pass."""

    def __init__(self) -> None:
        self.reached: set[Any] = set()
        self.waits = True
        self.total: Tensor | None = None
        self.before: Tensor | None = None


class _Gate:
    """A hook of somebody's, which is called once a pass, with the whole gradient."""

    def __init__(self, accumulation: Accumulation, hook: Callable[[Tensor], Any]) -> None:
        self._accumulation = weakref.ref(accumulation)
        self.hook = hook

    def __call__(self, tensor: Tensor) -> Any:
        accumulation = self._accumulation()
        return None if accumulation is not None and accumulation.holds_back() else self.hook(tensor)


def _added(one: Tensor, other: Tensor) -> Tensor:
    # torch adds a sparse one to a dense one only.
    return other + one if one.is_sparse else one + other
