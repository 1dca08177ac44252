"""``torch.fx`` and what is built on it: entries are parameters of a traced module, as those of torch's class are.

The bugs that this hunts: an entry that is baked into the graph as a constant, so that the traced module does not train,
load or move; a key that cannot be an attribute, for which the graph reads something else; a model that is spoilt by
having been traced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs

Kind = type[nn.ParameterDict]
X = torch.ones(2)

READS: dict[str, Callable[[nn.ParameterDict], list[Any]]] = {
    "pd[k]": lambda pd: [pd["a"], pd["b"]],
    "pd.k": lambda pd: [pd.a, pd.b],
    "get": lambda pd: [pd.get("a"), pd.get("b"), pd.get("c", 1)],
    "setdefault": lambda pd: [pd.setdefault("a"), pd.setdefault("b")],
    "values": lambda pd: list(pd.values()),
    "items": lambda pd: [value for _, value in pd.items()],
    "dict": lambda pd: list(dict(pd).values()),
    "iter": lambda pd: [pd[key] for key in pd],
    "reversed": lambda pd: [pd[key] for key in reversed(pd)],
    "keys": lambda pd: [pd[key] for key in pd.keys()],  # noqa: SIM118 - the method
    "a module in it": lambda pd: [pd["linear"].weight, pd["a"], pd["b"]],
}


class Model(nn.Module):
    def __init__(self, kind: Kind, read: Callable[[nn.ParameterDict], list[Any]]) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"w": kind([("a", torch.ones(2)), ("b", torch.ones(2))])})
        if read is READS["a module in it"]:
            self.inner["w"]["linear"] = nn.Linear(2, 2)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        # Of entries alone, which a tracer that is not told of them computes once and for all.
        total: Any = sum(self.read(self.inner["w"]))
        return x + total


def check_traced(model: nn.Module, traced: nn.Module) -> None:
    """Check that a traced module goes on with the Parameters that it has, and trains them."""
    with torch.no_grad():
        for parameter in [*model.parameters(), *traced.parameters()]:
            parameter.fill_(10.0)
    assert torch.equal(traced(X), model(X))
    traced(X).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


def targets(traced: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize("read", READS)
def test_entries_are_parameters_of_the_traced_module(read: str) -> None:
    seen = []
    for kind in (nn.ParameterDict, pdrs.ParameterDict):
        model = Model(kind, READS[read])
        state = copy.deepcopy(model.state_dict())
        traced = torch.fx.symbolic_trace(model)
        other = copy.deepcopy(model)
        assert list(other.state_dict()) == list(state)
        assert [name for name, _ in traced.named_parameters()] != []
        check_traced(model, copy.deepcopy(traced))
        seen.append((targets(traced), [name for name, _ in traced.named_parameters()]))
    assert seen[0] == seen[1]


def test_values_in_an_iterator_made_before_are_traced(kind: Kind) -> None:
    iterators: list[Any] = []

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = kind({"a": torch.ones(2), "b": torch.ones(2)})
            iterators.append(iter(self.w.values()))

        def forward(self, x: Tensor) -> Tensor:
            return x + sum(iterators[0])

    assert targets(torch.fx.symbolic_trace(Late())) == ["w.a", "w.b"]


def test_a_tracer_of_ones_own_sees_every_look_up(kind: Kind) -> None:
    class Tracer(torch.fx.Tracer):
        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            seen.append(attr)
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    seen: list[str] = []
    Tracer().trace(Model(kind, READS["items"]))
    assert [name for name in seen if name in "ab"] == ["a", "b"]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_have_the_entries(strict: bool) -> None:
    seen = []
    for kind in (nn.ParameterDict, pdrs.ParameterDict):
        exported = torch.export.export(Model(kind, READS["items"]), (X,), strict=strict)
        seen.append((sorted(exported.state_dict), exported.module()(X).tolist()))
    assert seen[0] == seen[1]


def test_a_state_dict_and_functional_call_reach_a_traced_module(kind: Kind) -> None:
    traced = torch.fx.symbolic_trace(Model(kind, READS["pd[k]"]))
    state = {name: torch.full((2,), 3.0) for name in traced.state_dict()}
    assert torch.func.functional_call(traced, state, (X,)).tolist() == [7, 7]
    traced.load_state_dict(state)
    assert traced(X).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("key", "why"), [("a.b", "has dots"), ("type", "is an attribute"), ("training", "is an attribute")]
)
def test_keys_that_a_graph_cannot_name_are_refused(key: str, why: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = pdrs.ParameterDict({key: torch.ones(2)})

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w[key]

    model = Odd()
    with pytest.raises(RuntimeError, match=f"torch.fx cannot trace the entry '{key}'.* {why}.*; rename the entry"):
        torch.fx.symbolic_trace(model)
    assert model(X).tolist() == [1, 1]
    assert isinstance(model.w[key], Parameter)
