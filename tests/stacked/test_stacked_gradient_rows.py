"""Names that come and go one by one while their table has a sparse gradient.

The bugs that this hunts: a gradient that is looked through for every name; one that was looked through, has changed
since and is cleared in other places; what is remembered of it and outlives it, or is pickled with the table; a new name
that an optimizer moves because the row was listed for an old one.
"""

from __future__ import annotations

import copy
import gc
import pickle
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pdrs

SD = pdrs.StackedParameterDict


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    with torch.sparse.check_sparse_tensor_invariants(False):  # torch warns where nothing is said
        yield


def sparse_gradient(rows: list[int], capacity: int, shape: tuple[int, ...] = (2,)) -> Tensor:
    values = torch.arange(1.0, 1 + len(rows) * torch.Size(shape).numel()).view(len(rows), *shape)
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, (capacity, *shape))


def with_gradient(count: int, listed: int, shape: tuple[int, ...] = (2,)) -> SD:
    sd = SD.from_tensor([str(n) for n in range(count)], torch.zeros(count, *shape))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, count, (listed,), generator=generator).tolist()
    sd.table(shape).grad = sparse_gradient(rows, count, shape)
    return sd


class Elements(TorchDispatchMode):
    """Counts the elements of the tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        results = made if isinstance(made, tuple | list) else [made]
        for returns, result in zip(func._schema.returns, results, strict=False):
            if isinstance(result, Tensor) and returns.alias_info is None:
                self.count += result.numel()
        return made


def insert_again(sd: SD, name: str) -> None:
    sd.pop(name)
    sd[f"{name} again"] = torch.ones(2)


CHANGES: dict[str, Callable[[SD, str], Any]] = {
    "pop": lambda sd, name: sd.pop(name),
    "del": SD.__delitem__,
    "popitem": lambda sd, _: sd.popitem(),
    "drop": lambda sd, name: sd.drop([name]),
    "freeze": lambda sd, name: sd.freeze([name]),
    "pop and insert": insert_again,
    "pop and insert many": lambda sd, name: (sd.pop(name), sd.update([(f"{name} again", torch.ones(2))])),
    "pop, gather and insert": lambda sd, name: (sd.pop(name), sd.gather([f"{name} again"], missing="insert")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_gradient_is_looked_through_once_and_not_for_every_name(change: Callable[[SD, str], Any]) -> None:
    listed = 100_000
    sd = with_gradient(1000, listed)
    gradient = sd.table((2,)).grad
    assert gradient is not None
    with Elements() as elements:
        change(sd, "0")
        first = elements.count
        tracemalloc.start()  # NumPy's memory; torch's is that of the elements
        for n in range(1, 101):
            change(sd, str(n))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert first < 10 * listed
    assert elements.count - first < listed, "of a hundred names, which are listed a hundred times each"
    assert peak < 8 * listed, "bytes; one number for each row that is listed takes as much"
    dense = gradient.to_dense()
    rows = range(899, 1000) if change is CHANGES["popitem"] else range(101)
    assert {row for row, is_clear in enumerate((dense == 0).all(1).tolist()) if is_clear} == set(rows)


@given(
    listed=st.lists(st.integers(0, 5), max_size=12),
    shape=st.sampled_from([(), (2,), (2, 3)]),
    coalesced=st.booleans(),
    removed=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), max_size=4),
)
@settings(deadline=None)
def test_what_is_cleared_is_what_the_row_has_in_a_dense_gradient(
    listed: list[int], shape: tuple[int, ...], coalesced: bool, removed: list[list[int]]
) -> None:
    gradient = sparse_gradient(listed, 6, shape)
    gradient = gradient.coalesce() if coalesced else gradient
    expected, is_coalesced = gradient.to_dense(), gradient.is_coalesced()
    sd = SD.from_tensor(list("abcdef"), torch.zeros(6, *shape))
    sd.table(shape).grad = gradient
    for rows in removed:
        names = ["abcdef"[row] for row in rows if "abcdef"[row] in sd]
        if len(names) == 1:
            sd.pop(names[0])
        else:
            sd.drop(names)
        expected[rows] = 0
        assert torch.equal(gradient.to_dense(), expected)
        assert gradient.is_coalesced() == is_coalesced
    assert sd.table(shape).grad is gradient


@pytest.mark.parametrize("sparse", [False, True])
def test_whoever_holds_a_gradient_sees_that_it_is_cleared_and_torch_knows_of_the_write(sparse: bool) -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2))
    sd.gather(["a", "b", "b"], sparse=sparse).sum().backward()
    held = sd.table((2,)).grad
    assert held is not None
    versions = [held._version]
    sd.pop("a")  # listed once
    versions.append(held._version)
    sd.drop(["b"])  # listed twice
    versions.append(held._version)
    assert held is sd.table((2,)).grad
    assert not held.to_dense().any()
    assert versions[0] < versions[1] < versions[2]


def _accumulate(sd: SD) -> None:
    sd.gather(["c", "b", "a"], sparse=True).sum().backward()


def _zero(sd: SD) -> None:
    for table in sd.parameters():
        assert table.grad is not None
        table.grad.zero_()
    _accumulate(sd)


def _swap_data(sd: SD) -> None:
    gradient = sd.table((2,)).grad
    assert gradient is not None
    before = gradient._version
    gradient.data = sparse_gradient([2, 2, 1, 0], 4)
    assert gradient._version == before, "torch counts this now: the comparison of memory can go"


def _rewrite_indices(sd: SD) -> None:
    gradient = sd.table((2,)).grad
    assert gradient is not None
    gradient._indices().copy_(gradient._indices().flip(1))


def _another(sd: SD) -> None:
    # What is freed last is what is given next: the new one has the addresses of the old one.
    sd.table((2,)).grad = None
    sd.table((2,)).grad = sparse_gradient([3, 2, 1, 0], 4)


def _another_in_the_same_memory(sd: SD) -> None:
    before = sd.table((2,)).grad
    assert before is not None
    sd.table((2,)).grad = gradient = torch.sparse_coo_tensor(before._indices(), torch.ones(4, 2), (4, 2))
    _rewrite_indices(sd)
    assert gradient._version == before._version


@pytest.mark.parametrize(
    "change", [_accumulate, _zero, _swap_data, _rewrite_indices, _another, _another_in_the_same_memory]
)
def test_a_gradient_that_has_changed_is_looked_through_again(change: Callable[[SD], None]) -> None:
    sd = SD.from_tensor(list("abcd"), torch.zeros(4, 2))
    sd.table((2,)).grad = sparse_gradient([0, 1, 2, 3], 4)
    sd.pop("d")
    change(sd)
    gradient = sd.table((2,)).grad
    assert gradient is not None
    expected = gradient.to_dense()
    assert expected[2].any()
    for row, name in ((2, "c"), (1, "b")):
        sd.pop(name)
        expected[row] = 0
        assert torch.equal(gradient.to_dense(), expected)
    assert expected.any()


def test_what_another_thread_writes_while_a_row_is_cleared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sd = SD.from_tensor(list("abcd"), torch.zeros(4, 2))
    sd.table((2,)).grad = sparse_gradient([0, 1, 2, 3], 4)
    gradient = sd.table((2,)).grad
    assert gradient is not None
    values = type(gradient)._values

    def meanwhile(tensor: Tensor) -> Tensor:
        tensor._indices().copy_(tensor._indices().flip(1))
        return values(tensor)

    sd.pop("d")
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "_values", meanwhile)
        sd.pop("a")
    expected = gradient.to_dense()
    expected[1] = 0
    sd.pop("b")
    assert torch.equal(gradient.to_dense(), expected)


def test_nothing_is_remembered_of_a_gradient_that_has_been_freed() -> None:
    sd = SD.from_tensor([str(n) for n in range(10)], torch.zeros(10, 2))
    rows = np.array([[3, 4, 5, 3]])
    # torch takes the memory of the array for the indices, and lets it go with them.
    gradient = torch.sparse_coo_tensor(torch.from_numpy(rows), torch.ones(4, 2), (10, 2))
    sd.table((2,)).grad = gradient
    held = weakref.ref(rows)
    del rows
    sd.pop("3")
    sd.zero_grad()
    sd.pop("4")
    assert held() is not None, "somebody holds the gradient"
    del gradient
    gc.collect()
    assert held() is None
    sd.pop("5")
    sd.table((2,)).grad = sparse_gradient([6, 7], 10)
    sd.pop("6")
    assert {name for name, row in sd.named_grads() if row.any()} == {"7"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sd: pickle.loads(pickle.dumps(sd))])
def test_copies_and_pickles_have_nothing_of_it(duplicate: Callable[[SD], SD]) -> None:
    sd = with_gradient(10, 1000)
    sd.pop("3")
    assert len(pickle.dumps(sd)) < 8 * 1000, "bytes; one number for each row that is listed takes as much"
    other = duplicate(sd)
    other.table((2,)).grad = sparse_gradient([4, 5], 10)
    other.pop("4")
    sd.pop("4")
    assert {name for name, row in other.named_grads() if row.any()} == {"5"}
    assert "5" in {name for name, row in sd.named_grads() if row.any()}


def test_a_table_is_swapped_though_its_gradient_has_been_looked_through() -> None:
    sd = with_gradient(10, 20)
    sd.pop("3")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        sd.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    gradient = sd.table((2,), torch.float64).grad
    assert gradient is not None
    sd.pop("4")
    assert not gradient.to_dense()[[3, 4]].any()
    assert gradient.to_dense().any()


def test_gradients_from_inference_mode_and_of_double_backward_are_cleared() -> None:
    sd = SD.from_tensor(list("abc"), torch.ones(3, 2))
    with torch.inference_mode():
        made = sd.table((2,)).grad = sparse_gradient([0, 2, 2], 3)
        sd.pop("a")
        sd.pop("c")
    assert not made.to_dense().any()
    (gradient,) = torch.autograd.grad(
        sd.gather(["b", "b"], sparse=True).pow(2).sum(), list(sd.parameters()), create_graph=True
    )
    assert gradient.requires_grad
    sd.table((2,)).grad = gradient
    sd.pop("b")
    assert not gradient.detach().to_dense().any()


def test_tables_without_memory_have_no_rows_to_clear() -> None:
    sd = with_gradient(10, 20)
    sd.to("meta")
    sd.pop("3")
    assert "3" not in sd


def test_names_that_count_as_zeros_are_cleared_nowhere() -> None:
    sd = SD.from_tensor(list("abc"), torch.ones(3, 2))
    sd.gather(["c", "absent", "a", "gone"], missing="zero", sparse=True).sum().backward()
    sd.pop("c")
    assert {name: row.tolist() for name, row in sd.named_grads() if row.any()} == {"a": [1.0, 1.0]}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_new_name_in_a_row_that_is_listed_for_an_old_one_gets_no_step_and_no_state(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    sd = SD.from_tensor(list("abc"), torch.ones(3, 2))
    optimizer = make(sd.parameters())
    sd.attach_optimizer(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        sd.gather(["a", "b", "b", "c"], sparse=True).pow(2).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    sd.gather(["a", "b", "b"], sparse=True).pow(2).sum().backward()
    (row,) = sd.indices(["b"]).tolist()
    sd.pop("b")
    sd["new"] = torch.full((2,), 3.0)
    assert sd.indices(["new"]).tolist() == [row]
    before = sd["a"].tolist()
    optimizer.step()
    assert sd["new"].tolist() == [3.0, 3.0]
    assert sd["a"].tolist() != before
    for key, value in optimizer.state[sd.table((2,))].items():
        if isinstance(value, Tensor) and value.dim():
            assert value[row].tolist() == [0.0, 0.0], key
