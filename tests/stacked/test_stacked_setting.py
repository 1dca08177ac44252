"""One entry that is set: the short way, natively, beside the long one that takes whatever there is.

The bugs that this hunts: a value that the short way takes and the long one would refuse, or put elsewhere; what
belonged to a row before and is not cleared; a write that torch, or whoever listens to it, does not notice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pdrs
from pdrs import stacked
from pdrs._rows import optimizer_state

SD = pdrs.StackedParameterDict


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note each time whether the short way was taken."""
    taken: list[bool] = []
    short = stacked.set_row

    def watched(*arguments: Any) -> bool:
        taken.append(short(*arguments))
        return taken[-1]

    monkeypatch.setattr(stacked, "set_row", watched)
    return taken


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
    entries = [(name, row.tolist(), sd._index[name]) for name, row in sd.items()]
    return entries, [(name, table.shape, table.requires_grad) for name, table in sd.named_parameters()]


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
def test_both_ways_do_the_same(key: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for short in (stacked.set_row, lambda *_: False):
        monkeypatch.setattr(stacked, "set_row", short)
        sd = dictionary()
        try:
            sd[key] = VALUES[kind](sd)
            error = ""
        except (TypeError, ValueError, KeyError, RuntimeError) as raised:
            error = repr(raised)
        results.append((error, found(sd)))
        sd["next"] = torch.zeros(2)
        results[-1] += (found(sd),)
    assert results[0] == results[1]


def test_plain_tensors_for_rows_that_are_there_take_the_short_way(ways: list[bool]) -> None:
    sd = dictionary()
    ways.clear()
    sd["a"] = torch.zeros(2)  # old
    sd["new"] = torch.zeros(2)  # a row that was another's
    sd["newer"] = nn.Parameter(torch.zeros(2))  # a row that was nobody's
    assert ways == [True] * 3
    for at in range(3):
        sd[f"more {at}"] = torch.zeros(2)
    assert ways == [True] * 5 + [False]  # the table is full, and must grow


@pytest.mark.parametrize("kind", ["Adam", "Adagrad"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_row_that_gets_a_new_name_has_nothing_of_the_old_one(kind: str, sparse: bool, ways: list[bool]) -> None:
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
    ways.clear()
    sd["new"] = torch.zeros(2)
    sd["newer"] = torch.zeros(2)
    assert ways == [True, True]
    assert sd.indices(["new"]).tolist() == [row]
    grads = {name: one.tolist() for name, one in sd.named_grads()}
    assert grads["a"] == ([1, 1] if sparse else [3, 3])
    assert grads.get("new", [0, 0]) == [0, 0]
    begin = 0.5 if kind == "Adagrad" else 0.0
    for key, value in optimizer.state[sd.table((2,))].items():
        if value.dim():
            assert value[sd.indices(["new", "newer"])].tolist() == [[begin] * 2] * 2
            assert value[0].tolist() == before[key]
    assert sd._tables[0].frozen is not None
    assert not sd._tables[0].frozen.any()


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
def test_state_that_was_exchanged_since_the_last_name_is_cleared_for_the_next(kind: str, ways: list[bool]) -> None:
    sd = SD.from_tensor(list("abc"), torch.ones(3, 2))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(list("abc")).sum().backward()
    optimizer.step()
    state = optimizer.state[sd.table((2,))]
    state.update({"a number": 3, "another": 0.5, "nothing": None, "a word": "none"})
    for name, row in (("c", 2), ("b", 1)):
        sd.pop(name)
        ways.clear()
        with torch.inference_mode(kind == "from inference mode"):
            sd[f"new {name}"] = torch.zeros(2)
        assert ways == [True]
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


def test_a_tensor_at_the_address_of_a_table_that_is_gone_is_not_taken_for_it() -> None:
    sd = SD.from_tensor(["a"], torch.zeros(1, 2))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.gather(["a"]).sum().backward()
    optimizer.step()
    table = sd.table((2,))
    key = id(table)
    other = nn.Parameter(torch.zeros(1, 2))
    watched = optimizer_state._stepped[key]
    assert optimizer_state._steppers(table)
    optimizer_state._stepped[id(other)] = watched  # as if it had the old address
    assert optimizer_state._steppers(other) is None
    optimizer_state.watch(other)
    assert optimizer_state._steppers(other) == []
    del sd, table, optimizer, watched
    gc.collect()
    assert key not in optimizer_state._stepped
    assert optimizer_state._steppers(other) == []
    optimizer_state.unwatch(other)


@pytest.mark.parametrize("key", ["a", "new"])
def test_torch_knows_of_the_write(key: str, ways: list[bool]) -> None:
    sd = dictionary()
    ways.clear()
    loss = sd["b"].pow(2).sum()
    sd[key] = torch.zeros(2)
    assert ways == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whoever_listens_to_operations_hears_of_the_write(ways: list[bool]) -> None:
    heard: list[str] = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    sd = dictionary()
    ways.clear()
    with Listener():
        sd["a"] = torch.zeros(2)
    assert "aten.copy_.default" in heard
    assert ways == []


def test_names_go_to_the_table_of_their_group(ways: list[bool]) -> None:
    sd = SD({"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
    sd.param_groups(by={"bias$": {"lr": 1.0}})
    sd.reserve(4, shape=(2,))
    sd["1.bias"] = torch.ones(2)
    ways.clear()
    sd["1.weight"] = torch.ones(2)
    sd["0.bias"] = torch.zeros(2)
    sd["2.bias"] = torch.zeros(2)
    assert ways == [True] * 3
    assert [sd._tables[sd._index[name] >> 40].group for name in sd] == [int("bias" in name) for name in sd]
    with pytest.raises(TypeError, match="names must be str"):
        sd[5] = torch.ones(2)


def test_a_table_from_inference_mode_is_left_to_torch(ways: list[bool]) -> None:
    with torch.inference_mode():
        sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        sd["a"] = torch.ones(2)
    assert ways == [False]
