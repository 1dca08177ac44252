"""``torch.compile``, ``torch.export``, ``torch.fx`` and ``torch.jit`` over a ParameterDict, as over torch's class.

The bugs that this hunts: a graph that breaks at a method of the dictionary, a compiled function that goes on with keys
that are no more, one that is compiled again though nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter
from torch.nn.utils import parametrize

import pdrs
from tensors import TORCH

Kind = type[nn.ParameterDict]
PD = nn.ParameterDict
X = torch.ones(2)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def filled(kind: Kind) -> PD:
    return kind([("right", torch.ones(2)), ("left", torch.full((2,), 2.0))])


def weighted(pairs: Any, x: Tensor) -> Tensor:
    """Add up so that the order, the keys and the values all matter."""
    for key, value in pairs:
        x = x * 3 + value * len(key)
    return x


def caught(pd: PD, x: Tensor) -> Tensor:
    try:
        return x + pd["new"]
    except AttributeError:
        return x


READS: dict[str, Callable[[PD, Tensor], Tensor]] = {
    "pd[k]": lambda pd, x: x + pd["right"],
    "pd.k": lambda pd, x: x + pd.right,
    "k in pd": lambda pd, x: x + 1 if "new" in pd else x,
    "len": lambda pd, x: x * len(pd),
    "bool": lambda pd, x: x + 1 if pd else x,
    "get": lambda pd, x: x + pd.get("new", 7),
    "iter": lambda pd, x: weighted([(key, pd[key]) for key in pd], x),
    "reversed": lambda pd, x: weighted([(key, pd[key]) for key in reversed(pd)], x),
    "keys": lambda pd, x: weighted([(key, pd[key]) for key in pd.keys()], x),  # noqa: SIM118 - the method
    "values": lambda pd, x: weighted([("k", value) for value in pd.values()], x),
    "items": lambda pd, x: weighted(pd.items(), x),
    "k in keys": lambda pd, x: x + 1 if "new" in pd.keys() else x,  # noqa: SIM118 - the method
    "next": lambda pd, x: x + next(iter(pd.values())),
    "dict": lambda pd, x: x + dict(pd.items())["right"],
    "named_parameters": lambda pd, x: weighted(pd.named_parameters(), x),
    "stack": lambda pd, x: x + torch.stack(list(pd.values())).sum(0),
}


def promote(pd: PD) -> None:
    pd["beside"] = torch.ones(2)


CHANGES: dict[str, Callable[[PD], Any]] = {
    "an entry is added": lambda pd: pd.__setitem__("new", torch.ones(2)),
    "an entry is removed": lambda pd: pd.pop("left"),
    "an entry is replaced": lambda pd: pd.__setitem__("right", torch.full((2,), 5.0)),
    "a Parameter is written": lambda pd: pd["right"].data.fill_(7),
    "an entry is moved to the end": lambda pd: pd.__setitem__("right", pd.pop("right")),
    "a key is exchanged for another": lambda pd: (pd.pop("left"), pd.__setitem__("new", torch.ones(2))),
    "torch's dict is written": lambda pd: pd._parameters.__setitem__("right", Parameter(torch.zeros(2))),
    "a Parameter beside becomes an entry": promote,
    "an entry becomes a Parameter beside": lambda pd: setattr(pd, "left", pd.pop("left")),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.slow
def test_a_read_compiles_into_one_graph_and_again_when_it_must(kind: Kind, read: str) -> None:
    if read == "reversed" and TORCH < (2, 14):
        pytest.skip("torch 2.10 does not trace reversed() of a module")
    function = READS[read]
    for change in CHANGES:
        torch._dynamo.reset()
        pd = filled(kind)
        pd.beside = Parameter(torch.zeros(2))
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        assert torch.equal(compiled(pd, X), function(pd, X))
        compiled(pd, X)
        assert counter.frame_count == 1, "compiled again though nothing changed"
        CHANGES[change](pd)
        assert torch.equal(compiled(pd, X), function(pd, X)), change
    assert torch.equal(compiled(pd, X), function(pd, X))


def test_values_that_are_no_parameters_are_traced(kind: Kind) -> None:
    pd = filled(kind)
    pd["scale"] = 3
    pd["child"] = nn.ReLU()
    pd["none"] = None
    pd.register_buffer("mean", torch.ones(2))

    def function(pd: PD, x: Tensor) -> Tensor:
        for value in pd.values():
            if isinstance(value, nn.Module):
                x = value(x)
            elif value is not None:
                x = x * value
        return x + pd["mean"]

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pd, -X), function(pd, -X))
    pd["scale"] = 5
    pd["child"] = nn.Identity()
    pd["none"] = torch.ones(2)
    assert torch.equal(compiled(pd, -X), function(pd, -X))


def test_a_parametrized_entry_is_traced(kind: Kind) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    pd = filled(kind)
    compiled = torch.compile(READS["items"], backend="eager", fullgraph=True)
    before = compiled(pd, X)
    parametrize.register_parametrization(pd, "left", Doubled())
    assert torch.equal(compiled(pd, X), READS["items"](pd, X))
    assert not torch.equal(compiled(pd, X), before)


def test_an_entry_that_may_be_missing_is_asked_for(kind: Kind) -> None:
    compiled = torch.compile(caught, backend="eager", fullgraph=True)
    assert torch.equal(compiled(filled(kind), X), X)


def test_an_entry_that_was_missing_is_found_when_it_comes() -> None:
    # torch's class goes on without it: nothing guards the miss.
    pd = filled(pdrs.ParameterDict)
    compiled = torch.compile(caught, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pd, X), X)
    pd["new"] = torch.ones(2)
    assert torch.equal(compiled(pd, X), X + 1)


def test_one_compilation_serves_all_dictionaries_with_the_same_keys(kind: Kind) -> None:
    counter = CompileCounter()
    compiled = torch.compile(READS["items"], backend=counter, fullgraph=True)
    for _ in range(3):
        pd = filled(kind)
        pd["gone"] = X
        del pd["gone"]
        assert torch.equal(compiled(pd, X), READS["items"](pd, X))
    assert counter.frame_count == 1
    other = kind([("left", torch.ones(2)), ("right", torch.ones(2))])
    assert torch.equal(compiled(other, X), READS["items"](other, X))
    assert counter.frame_count == 2


class Model(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.weights = filled(kind)

    def forward(self, x: Tensor) -> Tensor:
        for value in self.weights.values():
            x = x * value
        return x


def test_a_compiled_model_learns(kind: Kind) -> None:
    model = Model(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(X).sum().backward()
        assert model.weights["left"].grad is not None
        optimizer.step()
    assert torch.equal(compiled(X), model(X))
    assert list(compiled.state_dict()) == ["_orig_mod.weights.right", "_orig_mod.weights.left"]


OVERRIDES: dict[str, Callable[[Any], Any]] = {
    "_key_to_attr": lambda kind: lambda self, key: "p_" + kind._key_to_attr(self, key),
    "__getattr__": lambda kind: lambda self, name: triple(kind.__getattr__(self, name)),
    "__getitem__": lambda kind: lambda self, key: triple(kind.__getitem__(self, key)),
}


def triple(value: Any) -> Any:
    return value * 3 if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_subclass_overrides_is_traced(name: str) -> None:
    def function(pd: PD, x: Tensor) -> Tensor:
        return weighted(pd.items(), x) + pd["right"] + pd.get("left") + sum(pd.values())

    kinds = (type("Sub", (kind,), {name: OVERRIDES[name](kind)}) for kind in (nn.ParameterDict, pdrs.ParameterDict))
    theirs, ours = map(filled, kinds)
    expected = function(theirs, X)
    assert torch.equal(function(ours, X), expected)
    assert torch.equal(torch.compile(function, backend="eager", fullgraph=True)(ours, X), expected)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # It says why the graph breaks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile, behind a break.
def test_a_change_inside_a_compiled_function_happens_all_the_same(kind: Kind) -> None:
    parameter = Parameter(torch.ones(2))

    def function(pd: PD, x: Tensor) -> Tensor:
        x = x + pd.pop("left")
        pd["new"] = parameter
        return x + pd.copy()["new"]

    pd = filled(kind)
    assert torch.equal(torch.compile(function, backend="eager")(pd, X), X + 3)
    assert list(pd) == ["right", "new"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_is_exported(kind: Kind, strict: bool) -> None:
    model = Model(kind)
    program = torch.export.export(model, (X,), strict=strict)
    assert list(program.state_dict) == ["weights.right", "weights.left"]
    assert torch.equal(program.module()(X), model(X))


def test_a_model_is_traced_by_fx(kind: Kind) -> None:
    graph = torch.fx.symbolic_trace(Model(kind))
    assert [node.target for node in graph.graph.nodes if node.op == "get_attr"] == ["weights.right", "weights.left"]
    assert torch.equal(graph(X), X * 2)


class Scripted(nn.Module):
    def __init__(self, weights: PD) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights["right"] + self.weights.left


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning")  # It must still work.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # As older versions warn.
def test_a_model_is_scripted_and_traced_by_jit(kind: Kind) -> None:
    model = Scripted(filled(kind))
    for compiled in (torch.jit.script(model), torch.jit.trace(model, X)):
        assert list(compiled.state_dict()) == ["weights.right", "weights.left"]
        assert torch.equal(compiled(X), model(X))
    everything = Model(kind)
    assert torch.equal(torch.jit.trace(everything, X)(X), everything(X))
