"""One entry that is set: the short way, natively, beside the long one that takes whatever there is.

The bugs that this hunts: a value that the short way takes and the long one would refuse, or put elsewhere; what
belonged to a row before and is not cleared; a write that torch, or whoever listens to it, does not notice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pdrs
from observed import Calls, assert_consistent, frozen_names

SD = pdrs.StackedParameterDict


def set_natively(sd: pdrs.StackedParameterDict, key: str, value: Tensor) -> None:
    """Set an entry; fails if it was not set in a few calls, as the short way needs. The long one needs hundreds."""
    with Calls() as calls:
        sd[key] = value
    assert calls.count < 150


def dictionary() -> pdrs.StackedParameterDict:
    sd = SD(zip("abcd", torch.arange(8.0).view(4, 2), strict=True))
    sd["count"] = nn.Parameter(torch.arange(2), requires_grad=False)
    sd["fixed"] = nn.Parameter(torch.ones(2), requires_grad=False)
    sd["matrix"] = torch.eye(2)
    sd["complex"] = torch.ones(2, dtype=torch.complex64)
    sd["large"] = torch.zeros(20_000)
    sd["empty"] = torch.zeros(0)
    for shape, dtype in (((2,), torch.float32), ((2, 2), torch.float32), ((20_000,), torch.float32)):
        sd.reserve(3, shape=shape, dtype=dtype)
    del sd["c"]
    return sd


def found(sd: pdrs.StackedParameterDict) -> Any:
    entries = [(name, row.tolist()) for name, row in sd.items()]
    return (
        entries,
        assert_consistent(sd),
        [(name, table.shape, table.requires_grad) for name, table in sd.named_parameters()],
    )


class ListensAndDoesNothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


VALUES: dict[str, Callable[[pdrs.StackedParameterDict], Any]] = {
    "plain": lambda _: torch.full((2,), 9.0),
    "trained": lambda _: torch.full((2,), 9.0, requires_grad=True) * 2,
    "parameter": lambda _: nn.Parameter(torch.full((2,), 9.0)),
    "frozen": lambda _: nn.Parameter(torch.full((2,), 9.0), requires_grad=False),
    "own row": lambda sd: sd["a"],
    "another row": lambda sd: sd["b"],
    "matrix": lambda _: torch.full((2, 2), 9.0),
    "transposed": lambda _: torch.arange(4.0).view(2, 2).t(),
    "every second": lambda _: torch.arange(4.0)[::2],
    "expanded": lambda _: torch.tensor(7.0).expand(2),
    "other dtype": lambda _: torch.ones(2, dtype=torch.float64),
    "half": lambda _: torch.ones(2, dtype=torch.float16),
    "of the same size": lambda _: torch.ones(2, dtype=torch.int32),
    "integers": lambda _: torch.ones(2, dtype=torch.int64),
    "fixed integers": lambda _: nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
    "conjugate": lambda _: torch.tensor([1 + 2j, 3j], dtype=torch.complex64).conj(),
    "large": lambda _: torch.ones(20_000),
    "empty": lambda _: torch.ones(0),
    "meta": lambda _: torch.zeros(2, device="meta"),
    "sparse": lambda _: torch.eye(2).to_sparse(),
    "number": lambda _: 5.0,
    "from inference mode": lambda _: torch.inference_mode()(torch.ones)(2),
}


@pytest.mark.parametrize("key", ["a", "count", "fixed", "matrix", "complex", "large", "empty", "new", "", 5])
@pytest.mark.parametrize("kind", VALUES)
def test_both_ways_do_the_same(key: Any, kind: str) -> None:
    results = []
    # What listens to every operation hears of the long way only.
    for way in (nullcontext(), ListensAndDoesNothing()):
        sd = dictionary()
        value = VALUES[kind](sd)
        try:
            with way:
                sd[key] = value
            error = ""
        except (TypeError, ValueError, KeyError, RuntimeError) as raised:
            error = repr(raised)
        results.append((error, found(sd)))
        sd["next"] = torch.zeros(2)
        results[-1] += (found(sd),)
    assert results[0] == results[1]


def test_plain_tensors_for_rows_that_are_there_take_the_short_way() -> None:
    sd = dictionary()
    set_natively(sd, "a", torch.zeros(2))  # old
    set_natively(sd, "new", torch.zeros(2))  # a row that was another's
    set_natively(sd, "newer", nn.Parameter(torch.zeros(2)))  # a row that was nobody's
    capacity = len(sd.table((2,), torch.float32, requires_grad=True))
    for at in range(3):
        sd[f"more {at}"] = torch.zeros(2)
    assert len(sd.table((2,), torch.float32, requires_grad=True)) > capacity  # the table was full, and has grown
    assert sd.indices([f"more {at}" for at in range(3)]).tolist() == [5, 6, 7]


@pytest.mark.parametrize("kind", ["Adam", "Adagrad"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_row_that_gets_a_new_name_has_nothing_of_the_old_one(kind: str, sparse: bool) -> None:
    sd = SD(zip("abc", torch.ones(3, 2), strict=True))
    options = {"initial_accumulator_value": 0.5} if kind == "Adagrad" else {}
    optimizer = getattr(torch.optim, kind)(sd.parameters(), **options)
    sd.attach_optimizer(optimizer)
    sd.gather(["a", "b"]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    sd.gather(["a", "b"], sparse=sparse).sum().backward()
    sd.freeze(["c"])
    (row,) = sd.indices(["b"]).tolist()
    before = {key: value[0].tolist() for key, value in optimizer.state[sd.table((2,))].items() if value.dim()}
    for name in ("c", "b"):
        del sd[name]
    gradient = sd.table((2,)).grad
    assert gradient is not None
    gradient = gradient.to_dense() if sparse else gradient
    if not sparse:
        gradient.fill_(3)  # what a sum over the whole table leaves in rows that are nobody's
    set_natively(sd, "new", torch.zeros(2))
    set_natively(sd, "newer", torch.zeros(2))
    assert sd.indices(["new"]).tolist() == [row]
    grads = {name: one.tolist() for name, one in sd.named_grads()}
    assert grads["a"] == ([1, 1] if sparse else [3, 3])
    assert grads.get("new", [0, 0]) == [0, 0]
    begin = 0.5 if kind == "Adagrad" else 0.0
    for key, value in optimizer.state[sd.table((2,))].items():
        if value.dim():
            assert value[sd.indices(["new", "newer"])].tolist() == [[begin] * 2] * 2
            assert value[0].tolist() == before[key]
    assert frozen_names(sd) == set()


@pytest.mark.parametrize("many", [False, True])
def test_the_sparse_momentum_of_an_old_name_is_not_that_of_a_new_one(many: bool) -> None:
    sd = SD.from_tensor(["a", "b"], torch.ones(2, 2))
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.1, momentum=0.9)
    sd.attach_optimizer(optimizer)
    sd.gather(["a", "b", "b"], sparse=True).sum().backward()
    optimizer.step()
    sd.pop("b")
    if many:
        sd.update([("new", torch.zeros(2))])
    else:
        sd["new"] = torch.zeros(2)
    assert optimizer.state[sd.table((2,))]["momentum_buffer"].to_dense().tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")  # momentum moves absent names, as it does in torch
def test_sparse_momentum_follows_the_rows() -> None:
    sd = SD.from_tensor(["a", "b", "c"], torch.ones(3, 2))
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.1, momentum=0.9)
    sd.attach_optimizer(optimizer)
    (sd.gather(["b", "c"], sparse=True) * torch.tensor([[2.0], [3.0]])).sum().backward()
    optimizer.step()
    sd.drop(["a"])
    sd.compact()
    assert optimizer.state[sd.table((2,))]["momentum_buffer"].to_dense().tolist() == [[2.0, 2.0], [3.0, 3.0]]
    sd.update([("d", torch.ones(2)), ("e", torch.ones(2))])
    optimizer.zero_grad()
    sd.gather(["e", "c"], sparse=True).sum().backward()
    optimizer.step()
    momentum = optimizer.state[sd.table((2,))]["momentum_buffer"].to_dense()[sd.indices(["b", "c", "d", "e"])]
    assert momentum[:, 0].tolist() == pytest.approx([1.8, 3.7, 0.0, 1.0])


STATES: dict[str, Callable[[Tensor], Any]] = {
    "of another dtype": lambda state: state.double(),
    "not contiguous": lambda state: state.t().contiguous().t(),
    "with one number a row": lambda state: state[:, :1].clone(),
    "that is a Parameter": lambda state: nn.Parameter(state),
    "from inference mode": lambda state: torch.inference_mode()(torch.clone)(state),
}


@pytest.mark.parametrize("kind", STATES)
def test_state_that_was_exchanged_since_the_last_name_is_cleared_for_the_next(kind: str) -> None:
    sd = SD.from_tensor(list("abc"), torch.ones(3, 2))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(list("abc")).sum().backward()
    optimizer.step()
    state = optimizer.state[sd.table((2,))]
    state.update({"a number": 3, "another": 0.5, "nothing": None, "a word": "none"})
    for name, row in (("c", 2), ("b", 1)):
        sd.pop(name)
        with torch.inference_mode(kind == "from inference mode"):
            set_natively(sd, f"new {name}", torch.zeros(2))
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][row].any()
            assert state[key][:row].all()
        state["exp_avg"] = STATES[kind](state["exp_avg"])


@pytest.mark.parametrize("kind", ["Adagrad", "Rprop"])
def test_state_that_does_not_begin_with_zeros_begins_anew_for_a_new_name(kind: str) -> None:
    sd = SD.from_tensor(["a", "b"], torch.ones(2, 2))
    options = {"initial_accumulator_value": 0.5} if kind == "Adagrad" else {"lr": 0.25}
    optimizer = getattr(torch.optim, kind)(sd.parameters(), **options)
    sd.attach_optimizer(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sd.gather(["a", "b"]).sum().backward()
        optimizer.step()
    sd.pop("b")
    sd["new"] = torch.zeros(2)
    key, begin = ("sum", 0.5) if kind == "Adagrad" else ("step_size", 0.25)
    state = optimizer.state[sd.table((2,))][key]
    assert state[1].tolist() == [begin] * 2
    assert state[0].tolist() != [begin] * 2


@pytest.mark.parametrize("key", ["a", "new"])
def test_torch_knows_of_the_write(key: str) -> None:
    sd = dictionary()
    loss = sd["b"].pow(2).sum()
    set_natively(sd, key, torch.zeros(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whoever_listens_to_operations_hears_of_the_write() -> None:
    heard: list[str] = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    sd = dictionary()
    with Listener():
        sd["a"] = torch.zeros(2)
    assert "aten.copy_.default" in heard


def test_names_go_to_the_table_of_their_group() -> None:
    sd = SD({"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
    sd.param_groups(by={"bias$": {"lr": 1.0}})
    sd.reserve(4, shape=(2,))
    sd["1.bias"] = torch.ones(2)
    set_natively(sd, "1.weight", torch.ones(2))
    set_natively(sd, "0.bias", torch.zeros(2))
    set_natively(sd, "2.bias", torch.zeros(2))
    tables = {id(table): name for name, table in sd.named_parameters()}
    assert {name: tables[id(row._base)] for name, row in sd.items()} == {
        name: "float32_2_group1" if "bias" in name else "float32_2" for name in sd
    }
    with pytest.raises(TypeError, match="names must be str"):
        sd[5] = torch.ones(2)


def test_a_table_from_inference_mode_is_left_to_torch() -> None:
    with torch.inference_mode():
        sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        sd["a"] = torch.ones(2)
