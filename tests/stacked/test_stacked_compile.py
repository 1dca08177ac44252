"""Every method of a StackedParameterDict in a compiled function, as without ``torch.compile``.

The bugs that this hunts: a change of names or tables that dynamo traces, and so makes otherwise, once or never; a graph
that goes on with what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs

pytestmark = pytest.mark.slow  # To compile takes seconds.

SD = pdrs.StackedParameterDict
Call = Callable[[SD, list[str]], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def frozen(value: float) -> Parameter:
    return Parameter(torch.full((2,), value), requires_grad=False)


OTHERS = SD({"o": torch.ones(2)}).state_dict()

# One for each way through the code: tracing what a method calls takes up to seconds.
CALLS: dict[str, Call] = {
    "sd[k]": lambda sd, names: sd[names[0]] * 2,
    "sd[k] = v": lambda sd, names: sd.__setitem__(names[0], torch.full((2,), 3.0)),
    "a new name": lambda sd, names: sd.__setitem__("new" + names[0], torch.ones(2)),
    "a new shape": lambda sd, names: sd.__setitem__("new" + names[0], torch.ones(3)),
    "another shape": lambda sd, names: sd.__setitem__(names[0], torch.ones(3)),
    "a frozen entry": lambda sd, names: sd.__setitem__(names[0], frozen(1.0)),
    "del": lambda sd, names: sd.__delitem__(names[0]),
    "del, and a new name": lambda sd, names: (sd.__delitem__(names[0]), sd.__setitem__("new", torch.ones(2))),
    "in": lambda sd, names: (names[0] in sd, "none" in sd),
    "len": lambda sd, _: len(sd),
    "iter": lambda sd, _: list(sd),
    "reversed": lambda sd, _: list(reversed(sd)),
    "keys": lambda sd, _: list(sd.keys()),
    "values": lambda sd, _: sum(row.sum() for row in sd.values()),
    "items": lambda sd, _: [(name, row.sum()) for name, row in sd.items()],
    "get": lambda sd, names: (sd.get(names[0]), sd.get("none")),
    "setdefault": lambda sd, names: (sd.setdefault(names[0], torch.ones(2)), sd.setdefault("new", torch.ones(2))),
    "pop": lambda sd, names: sd.pop(names[0]),
    "popitem": lambda sd, _: sd.popitem(),
    "update": lambda sd, names: sd.update({names[0]: torch.ones(2), "new": torch.ones(2)}),
    "clear": lambda sd, _: sd.clear(),
    "deepcopy": lambda sd, _: deepcopy(sd).named_state_dict(),
    "|": lambda sd, _: (sd | {"new": torch.ones(2)}).named_state_dict(),
    "fromkeys": lambda _, names: SD.fromkeys(names, torch.ones(2)).named_state_dict(),
    "from_tensor": lambda _, names: SD.from_tensor(names, torch.ones(len(names), 2)).named_state_dict(),
    "from_shapes": lambda _, names: SD.from_shapes({name: (2,) for name in names}).named_state_dict(),
    "unstack": lambda sd, _: sd.unstack().state_dict(),
    "lookup": lambda sd, names: sd.gather(sd.lookup(names)),
    "contains": lambda sd, names: sd.isin([*names, "none"]),
    "rows": lambda sd, names: sd.indices(names),
    "rows, new": lambda sd, names: sd.indices([*names, "new"], missing="insert"),
    "gather": lambda sd, names: sd.gather(names),
    "gather, zero": lambda sd, names: sd.gather([*names, "none"], missing="zero"),
    "gather, new names": lambda sd, names: sd.gather(
        [*names, *(f"new{n}" for n in range(40))], missing="insert", init=nn.init.ones_
    ),
    "scatter_": lambda sd, names: sd.scatter(names, torch.ones(len(names), 2)),
    "scatter_, new": lambda sd, names: sd.scatter([*names, "new"], torch.ones(len(names) + 1, 2), missing="insert"),
    "drop": lambda sd, names: sd.drop(names),
    "drop, and new names": lambda sd, names: (
        sd.drop(names),
        sd.gather(["new", "newer"], missing="insert", shape=(2,), init=nn.init.ones_),
    ),
    "table": lambda sd, _: sd.table((2,)) * 2,
    "reserve": lambda sd, _: sd.reserve(50, shape=(2,)),
    "compact": lambda sd, names: (sd.drop(names[:1]), sd.compact()),
    "named_grads": lambda sd, _: dict(sd.named_grads()),
    "norms": lambda sd, _: sd.norms(),
    "freeze": lambda sd, names: sd.freeze(names[:1]),
    "unfreeze": lambda sd, names: (sd.freeze(names), sd.unfreeze(names[:1])),
    "unfreeze all": lambda sd, names: (sd.freeze(names), sd.unfreeze()),
    "param_groups": lambda sd, _: len(sd.param_groups(by={"1": {"lr": 0.5}})),
    "state_dict": lambda sd, _: list(sd.state_dict()),
    "named_state_dict": lambda sd, _: sd.named_state_dict(),
    "load_state_dict": lambda sd, _: sd.load_state_dict(sd.state_dict()) and None,
    "load, named": lambda sd, _: sd.load_state_dict({k: v + 1 for k, v in sd.named_state_dict().items()}) and None,
    "load, others": lambda sd, _: sd.load_state_dict(OTHERS) and None,
    "double": lambda sd, _: sd.double() and None,
    "attach": lambda sd, _: sd.attach_optimizer(torch.optim.Adam(sd.parameters())),
    "repr": lambda sd, _: repr(sd),
}


def trained() -> tuple[SD, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sd = SD.from_tensor([f"n{n}" for n in range(6)], torch.randn(6, 2))
    optimizer = torch.optim.SparseAdam(sd.parameters(), lr=0.1)
    sd.attach_optimizer(optimizer)
    sd.gather(list(sd), sparse=True).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return sd, optimizer


def seen(sd: SD, optimizer: torch.optim.Optimizer, result: Any) -> Any:
    """Return all that can be seen of it, to be compared."""
    state = [[value for value in state.values() if torch.is_tensor(value)] for state in optimizer.state.values()]
    rows = {name: row.detach().clone() for name, row in sd.items()}
    tables = [(name, table.detach().clone()) for name, table in sd.named_parameters()]
    return rows, tables, state, result, len(optimizer.param_groups[0]["params"])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and bool(torch.allclose(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")  # dynamo has a word for each native function where a graph ends
def test_a_method_does_the_same_in_a_compiled_function(call: str) -> None:
    function = CALLS[call]

    def use(sd: SD, names: list[str]) -> Any:
        return function(sd, names), len(sd)

    outcomes = []
    for compile_ in (False, True):
        sd, optimizer = trained()
        used = torch.compile(use, backend="eager") if compile_ else use
        outcomes.append(seen(sd, optimizer, used(sd, ["n1", "n2"])))
    assert same(*outcomes)


@pytest.mark.parametrize(("attached", "sparse"), [(False, False), (True, True)])
@pytest.mark.filterwarnings("ignore")  # dynamo has a word for each native function where a graph ends
def test_a_compiled_step_trains_names_that_come_and_go_as_without(attached: bool, sparse: bool) -> None:
    outcomes = []
    for compile_ in (False, True):
        torch.manual_seed(0)
        sd = SD.from_tensor([f"n{n}" for n in range(8)], torch.randn(8, 4))
        optimizer = torch.optim.Adagrad(sd.parameters(), lr=0.1) if attached else torch.optim.SGD(sd.parameters(), 0.1)
        if attached:
            sd.attach_optimizer(optimizer)

        def loss(names: list[str], sd: SD = sd) -> torch.Tensor:
            sd.drop([names[0]] if names[0] in sd else [])
            if len(sd) > 12:
                sd.freeze(names[1:2])
            return (sd.gather(names, missing="insert", init=nn.init.ones_, sparse=sparse) - 1.5).pow(2).sum()

        used = torch.compile(loss, backend="eager") if compile_ else loss
        for step in range(4):
            optimizer.zero_grad()
            used([f"n{n + step * 4}" for n in range(6)]).backward()
            optimizer.step()
        outcomes.append(seen(sd, optimizer, None))
    assert same(*outcomes)
