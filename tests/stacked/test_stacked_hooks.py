"""Hooks on a table that grows between the forward and the backward pass.

The bugs that this hunts: a hook that is called once for each size that the table had, with a part of the gradient, so
that an optimizer that steps in it steps twice, and one that clips clips the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

import pdrs

Log = list[Any]


def stepping(table: Tensor, optimizer: torch.optim.Optimizer, log: Log) -> None:
    def step(_: Tensor) -> None:
        log.append("step")
        optimizer.step()
        optimizer.zero_grad()

    table.register_post_accumulate_grad_hook(step)


def clipping(table: Tensor, optimizer: torch.optim.Optimizer, log: Log) -> None:
    def clip(gradient: Tensor) -> Tensor:
        log.append(gradient.to_dense().sum().item())
        return gradient / 2 if gradient.is_sparse else gradient.clamp(max=1.5)

    table.register_hook(clip)
    stepping(table, optimizer, log)


def nothing(_table: Tensor, _optimizer: torch.optim.Optimizer, _log: Log) -> None:
    pass


@pytest.mark.parametrize("hook", [nothing, stepping, clipping])
@pytest.mark.parametrize("sizes", [1, 3])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_hooks_of_a_table_are_called_once_a_pass_though_it_grows(
    hook: Callable[..., None], sizes: int, backwards: bool, sparse: bool
) -> None:
    outcomes = []
    for reserved in (True, False):
        sd = pdrs.StackedParameterDict.from_tensor(["n0", "n1"], torch.arange(8.0).view(2, 4) / 10)
        if reserved:
            sd.reserve(60, shape=(4,))
        table, log = sd.table((4,)), []
        optimizer = torch.optim.SGD([table], lr=0.1)
        sd.attach_optimizer(optimizer)
        sd.freeze(["n1"])
        hook(table, optimizer, log)
        for step in range(2):
            # After a growth torch asks for another: it knows the node of the old size.
            of_several = register_multi_grad_hook(
                [table], lambda gradients, log=log: log.append(gradients[0].to_dense().sum().item())
            )
            parts = [sd.gather(["n0", "n1"], sparse=sparse).sum()]
            for size in range(sizes):
                names = [f"new{step}.{size}.{number}" for number in range(2 * len(sd))]
                new = sd.gather([*names, "n0"], missing="insert", init=torch.nn.init.ones_, sparse=sparse)
                parts.append(new.sum())
            sum(reversed(parts) if backwards else parts, torch.zeros(())).backward()
            of_several.remove()
            if hook is nothing:
                optimizer.step()
                optimizer.zero_grad()
        outcomes.append(({name: row.tolist() for name, row in sd.items()}, log))
    assert outcomes[0] == outcomes[1]


def test_the_gradient_of_both_sizes_is_added_in_place_of_the_one_that_is_there() -> None:
    sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    calls: list[float] = []
    handle = sd.table((2,)).register_post_accumulate_grad_hook(lambda table: calls.append(table.grad.sum().item()))
    sd.gather(["a"]).sum().backward()
    old = sd.gather(["a", "b"]).sum()
    sd["c"] = torch.zeros(2)
    (old + sd.gather(["c", "a"]).sum()).backward()
    assert dict((name, row.tolist()) for name, row in sd.named_grads()) == {"a": [3, 3], "b": [1, 1], "c": [1, 1]}
    assert calls == [2.0, 10.0]
    handle.remove()
    sd.gather(["a"]).sum().backward()
    assert len(calls) == 2


def test_an_old_graph_alone_and_a_pass_that_failed_leave_nothing_behind() -> None:
    sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    old = sd.gather(["a", "b"]).sum()
    bad = sd.gather(["a"])
    bad.register_hook(lambda _: 1 / 0)
    sd["c"] = torch.zeros(2)
    with pytest.raises(ZeroDivisionError):
        (sd.gather(["c"]).sum() + bad.sum()).backward()
    sd.zero_grad()
    old.backward()
    assert dict((name, row.tolist()) for name, row in sd.named_grads()) == {"a": [1, 1], "b": [1, 1], "c": [0, 0]}
    (gradient,) = torch.autograd.grad(sd.gather(["c"]).sum(), [sd.table((2,))])
    assert gradient[2].tolist() == [1, 1]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_hook_that_makes_the_table_grow_leaves_a_gradient_of_its_size(fused: bool, sparse: bool) -> None:
    sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.ones(2, 3))
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.5, fused=fused and not sparse)
    sd.attach_optimizer(optimizer)
    table = sd.table((3,))

    def grow(_: Tensor) -> None:
        sd.update({f"new{number}": torch.ones(3) for number in range(20)})

    table.register_hook(grow)
    sd.gather(["a"], sparse=sparse).sum().backward()
    assert table.grad is not None
    assert table.grad.shape == table.shape
    optimizer.step()
    assert sd["a"].tolist() == [0.5] * 3
    assert sd["b"].tolist() == sd["new3"].tolist() == [1.0] * 3
