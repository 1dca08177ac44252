"""Bags of names, reduced to a row each, as by a loop over the names of each bag.

The bugs that this hunts: a row that is counted in the bag beside its own, where names are missing or bags are empty; a
weight that goes on with another name; a gradient that differs between torch's kernel and the way around it; names that
are inserted by a call that is refused; offsets with which torch would read foreign memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding_bag

import pdrs
from observed import At, assert_consistent

SD = pdrs.StackedParameterDict
NAMES = [f"name.{n}" for n in range(6)]
MODES = ["sum", "mean", "max"]
# With empty bags at both ends and between, and names that come twice in a bag.
BAGS = [[], NAMES[:2], [NAMES[5]], [], [NAMES[3], NAMES[1], NAMES[3]], [NAMES[4], NAMES[0]], []]
UNKNOWN = [["x"], [NAMES[1], "x", NAMES[2]], [], ["y", NAMES[5]], ["x", "y"], [NAMES[0], NAMES[0], "z"]]


def values(shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64, count: int = len(NAMES)) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def numbered(shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64) -> SD:
    return SD.from_tensor(NAMES, values(shape, dtype))


def several(shape: tuple[int, ...] = (3,)) -> SD:
    """Return the same names and rows in four tables, one of which requires no gradient."""
    sd = numbered(shape)
    sd[NAMES[1]] = Parameter(sd[NAMES[1]].detach().clone(), requires_grad=False)
    sd.param_groups(by={NAMES[3]: {"lr": 0.5}, NAMES[5]: {"lr": 0.5}})
    assert len(sd.tables()) == 4
    return sd


def weights_of(bags: Sequence[Sequence[str]], dtype: torch.dtype = torch.float64) -> list[list[float]]:
    numbers = random.Random(0)
    made = [[numbers.uniform(0.5, 2) for _ in bag] for bag in bags]
    return [torch.tensor(bag, dtype=dtype).tolist() for bag in made]


def looped(
    sd: SD, bags: Sequence[Sequence[str]], mode: str, missing: str = "error", weights: Any = None, shape: Any = (3,)
) -> Tensor:
    """Return what is expected: by a loop over the names of each bag."""
    made = []
    for at, bag in enumerate(bags):
        taken = []
        for place, name in enumerate(bag):
            if name not in sd and missing == "skip":
                continue
            row = sd[name] if missing != "zero" or name in sd else torch.zeros(shape, dtype=torch.float64)
            taken.append(row if weights is None else row * weights[at][place])
        if not taken:
            made.append(torch.zeros(shape, dtype=torch.float64))
        else:
            rows = torch.stack(taken)
            made.append({"sum": rows.sum, "mean": rows.mean, "max": lambda at, rows=rows: rows.max(at)[0]}[mode](0))
    return torch.stack(made)


def gradients(sd: SD, result: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each name, of a loss to which each element counts differently."""
    sd.zero_grad()
    (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    found = {}
    for table in sd.parameters():
        if table.grad is not None and table.grad.is_sparse:
            table.grad = table.grad.to_dense()
    for name, gradient in sd.named_grads():
        found[name] = gradient.clone()
    return found


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def flat(bags: Sequence[Sequence[Any]]) -> list[Any]:
    return [one for bag in bags for one in bag]


def starts(bags: Sequence[Sequence[Any]]) -> list[int]:
    return [sum(map(len, bags[:at])) for at in range(len(bags))]


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [numbered, several])
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "weights"])
@pytest.mark.parametrize("missing", ["error", "skip", "zero", "insert"])
def test_bags_are_those_of_a_loop(
    make: Callable[..., SD], shape: tuple[int, ...], sparse: bool, mode: str, missing: Any
) -> None:
    sd, bags = make(shape), BAGS if missing == "error" else [*BAGS, *UNKNOWN]
    weights = weights_of(bags) if mode == "weights" else None
    how: Any = "sum" if weights else mode
    learned = torch.tensor(flat(weights), dtype=torch.float64, requires_grad=True) if weights else None
    init = torch.nn.init.ones_ if missing == "insert" else None
    found = sd.gather_bag(bags, mode=how, weights=weights, sparse=sparse, missing=missing, init=init)
    wanted = looped(sd, bags, how, missing, weights, shape)
    torch.testing.assert_close(found, wanted)
    assert found.shape == (len(bags), *shape)
    assert not [name for name in "xyz" if (name in sd) != (missing == "insert")]
    of_names = gradients(sd, wanted)
    assert_same_gradients(gradients(sd, found), of_names)
    # The same, by offsets, and with weights that are learned, too.
    again = sd.gather_bag(flat(bags), starts(bags), mode=how, weights=learned, sparse=sparse, missing=missing)
    torch.testing.assert_close(again, wanted)
    assert_same_gradients(gradients(sd, again), of_names)
    if learned is not None:
        theirs = learned.detach().requires_grad_()
        parts = theirs.split([len(bag) for bag in bags])
        gradients(sd, looped(sd, bags, how, missing, parts, shape))
        assert theirs.grad is not None
        torch.testing.assert_close(learned.grad, theirs.grad)
    assert_consistent(sd)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "weights"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bags_are_those_of_embedding_bag_with_row_numbers(
    dtype: torch.dtype, mode: str, sparse: bool, last: bool
) -> None:
    sd = numbered(dtype=dtype)
    weights = torch.tensor(flat(weights_of(BAGS)), dtype=dtype) if mode == "weights" else None
    how: Any = "sum" if weights is not None else mode
    offsets = torch.tensor([*starts(BAGS), len(flat(BAGS))] if last else starts(BAGS))
    found = sd.gather_bag(flat(BAGS), offsets, mode=how, weights=weights, sparse=sparse, include_last_offset=last)
    wanted = embedding_bag(
        sd.indices(flat(BAGS)),
        sd.table((3,)),
        offsets,
        mode=how,
        per_sample_weights=weights,
        sparse=sparse and mode != "max",
        include_last_offset=last,
    )
    assert torch.equal(found, wanted)
    of_names = gradients(sd, wanted)
    found.sum().backward()
    assert sd.table((3,)).grad is not None
    assert sd.table((3,)).grad.dtype == dtype
    found = sd.gather_bag(flat(BAGS), offsets, mode=how, weights=weights, sparse=sparse, include_last_offset=last)
    assert_same_gradients(gradients(sd, found), of_names)


@pytest.mark.parametrize("make", [numbered, several])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_small_differences(make: Callable[..., SD], mode: Any) -> None:
    sd = make()
    tables = [table for table in sd.parameters() if table.requires_grad]
    weights = torch.tensor(flat(weights_of(BAGS)), dtype=torch.float64, requires_grad=True)

    def call(*given: Tensor) -> Tensor:
        return sd.gather_bag(flat(BAGS), starts(BAGS), mode=mode, weights=given[0] if mode == "sum" else None)

    assert torch.autograd.gradcheck(call, (weights, *tables))


@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
@pytest.mark.parametrize("mode", MODES)
def test_a_sparse_gradient_holds_the_names_of_the_bags_only(mode: Any, shape: tuple[int, ...]) -> None:
    sd = numbered(shape)
    sd.gather_bag([NAMES[:2], [], [NAMES[4]]], mode=mode, sparse=True).sum().backward()
    gradient = sd.table(shape).grad
    assert gradient is not None
    assert gradient.is_sparse
    assert set(gradient.coalesce().indices()[0].tolist()) == {0, 1, 4}


def test_without_gradients_nothing_is_recorded() -> None:
    sd = numbered()
    with torch.no_grad():
        assert not sd.gather_bag(BAGS, sparse=True, mode="max").requires_grad
    sd.requires_grad_(False)
    assert not sd.gather_bag(BAGS, sparse=True).requires_grad
    weights = torch.ones(len(flat(BAGS)), dtype=torch.float64, requires_grad=True)
    sd.gather_bag(flat(BAGS), starts(BAGS), weights=weights).sum().backward()
    torch.testing.assert_close(weights.grad, sd.gather(flat(BAGS)).sum(1))


def test_frozen_names_count_and_get_no_gradient() -> None:
    for sparse in (False, True):
        for mode in MODES:
            sd = numbered()
            sd.freeze(NAMES[:2])
            found = sd.gather_bag(BAGS, mode=mode, sparse=sparse)
            torch.testing.assert_close(found, looped(numbered(), BAGS, mode))
            found.sum().backward()
            gradient = sd.table((3,)).grad
            assert gradient is not None
            dense = gradient.to_dense()
            assert not dense[:2].any()
            assert dense[3:6].any()


def test_a_table_may_grow_and_change_between_the_call_and_backward() -> None:
    for mode in MODES:
        for shape in ((3,), (2, 2)):
            sd, weights = numbered(shape), torch.ones(len(flat(BAGS)), dtype=torch.float64, requires_grad=True)
            given = weights if mode == "sum" else None
            sd.gather_bag(flat(BAGS), starts(BAGS), mode=mode, weights=given).sum().backward()
            wanted = {name: gradient.clone() for name, gradient in sd.named_grads()}
            of_weights = None if weights.grad is None else weights.grad.clone()
            sd.zero_grad()
            weights.grad = None
            found = sd.gather_bag(flat(BAGS), starts(BAGS), mode=mode, weights=given)
            sd.insert([f"new.{n}" for n in range(100)], shape=shape)
            with torch.no_grad():
                for table in sd.parameters():
                    table.mul_(2)
            found.sum().backward()
            torch.testing.assert_close({name: dict(sd.named_grads())[name] for name in wanted}, wanted)
            assert of_weights is None or torch.equal(weights.grad, of_weights)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_dtypes_for_which_torch_has_no_kernel(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = (
        (torch.arange(6 * 4) - (0 if dtype == torch.uint8 else 12))
        .reshape(6, 4)[:, : 3 if shape == (3,) else 4]
        .reshape(6, *shape)
        .to(dtype)
    )
    if dtype.is_complex:
        rows = rows * (1 + 2j)
    sd = SD.from_tensor(NAMES, rows, requires_grad=dtype.is_complex)
    zeros = torch.zeros(shape, dtype=dtype)
    mode = "mean" if dtype.is_complex else "max"
    other = "max" if dtype.is_complex else "mean"
    for how in ("sum", mode):
        found = sd.gather_bag(BAGS, mode=how)
        reduce = {
            "sum": lambda one: one.sum(0).to(dtype),
            "mean": lambda one: one.mean(0),
            "max": lambda one: one.amax(0),
        }
        wanted = [reduce[how](torch.stack([sd[name] for name in bag])) if bag else zeros for bag in BAGS]
        torch.testing.assert_close(found, torch.stack(wanted))
        assert found.dtype == dtype
    weighted = sd.gather_bag(BAGS, weights=[[2] * len(bag) for bag in BAGS])
    torch.testing.assert_close(weighted, 2 * sd.gather_bag(BAGS))
    if dtype.is_complex:
        sd.gather_bag(BAGS, mode="mean", sparse=True).abs().sum().backward()
    before = list(sd)
    with pytest.raises(TypeError, match=f'no mode="{other}": gather'):
        sd.gather_bag([["new", NAMES[0]]], mode=other, missing="insert")
    assert list(sd) == before


def test_rows_that_lie_apart_in_memory() -> None:
    rows = values((2, 3)).transpose(1, 2)
    sd = SD.from_tensor(NAMES, rows)
    torch.testing.assert_close(sd.gather_bag(BAGS), looped(sd, BAGS, "sum", shape=(3, 2)))
    sd = SD.from_tensor(NAMES, values((6,), count=3).t()[:, ::2])
    torch.testing.assert_close(sd.gather_bag(BAGS), looped(sd, BAGS, "sum", shape=(2,)))


def test_entries_without_elements() -> None:
    sd = SD.from_tensor(NAMES, torch.ones(6, 0))
    assert sd.gather_bag(BAGS).shape == (len(BAGS), 0)
    sd = SD.from_tensor(NAMES, torch.ones(6, 2, 0))
    assert sd.gather_bag(BAGS, mode="max").shape == (len(BAGS), 2, 0)


def test_tables_on_the_meta_device() -> None:
    sd = SD.from_tensor(NAMES, torch.ones(6, 3, device="meta"))
    for mode in MODES:
        found = sd.gather_bag(BAGS, mode=mode)
        assert found.is_meta
        assert found.shape == (len(BAGS), 3)


# -- forms of names, offsets and weights -------------------------------------------------------------------------------

GRID = [NAMES[:3], NAMES[3:6]]
OFFSETS = starts(BAGS)
JAGGED = torch.nested.nested_tensor([torch.ones(len(bag), dtype=torch.float64) for bag in BAGS], layout=torch.jagged)

FORMS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "lists": lambda: (BAGS,),
    "tuples": lambda: (tuple(map(tuple, BAGS)),),
    "arrays": lambda: ([np.array(bag, dtype=str) for bag in BAGS],),
    "arrays of objects": lambda: ([np.array(bag, dtype=object) for bag in BAGS],),
    "an array of lists": lambda: (np.array([*BAGS, None], dtype=object)[:-1],),
    "a generator of lists": lambda: ((bag for bag in BAGS),),
    "values of a dict": lambda: (dict(enumerate(BAGS)).values(),),
    "keys of dicts, and lists": lambda: ([dict.fromkeys(bag) if len({*bag}) == len(bag) else bag for bag in BAGS],),
    "a list": lambda: (flat(BAGS), OFFSETS),
    "a tuple": lambda: (tuple(flat(BAGS)), tuple(OFFSETS)),
    "an array": lambda: (np.array(flat(BAGS)), np.array(OFFSETS)),
    "an array of objects": lambda: (np.array(flat(BAGS), dtype=object), np.array(OFFSETS, np.uint8)),
    "a generator": lambda: (iter(flat(BAGS)), OFFSETS),
    "int64": lambda: (flat(BAGS), torch.tensor(OFFSETS)),
    "int32": lambda: (flat(BAGS), torch.tensor(OFFSETS, dtype=torch.int32)),
    "nested": lambda: (flat(BAGS), JAGGED),
    "nested, two more dimensions": lambda: (
        flat(BAGS),
        torch.nested.nested_tensor([torch.ones(len(bag), 2, 3) for bag in BAGS], layout=torch.jagged),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_and_offsets_of_every_form(form: str) -> None:
    sd = numbered()
    torch.testing.assert_close(sd.gather_bag(*FORMS[form]()), looped(sd, BAGS, "sum"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [np.array(GRID), np.array(GRID, dtype=object), np.array(GRID).T.copy().T])
def test_an_array_has_a_bag_in_each_row(names: Any) -> None:
    sd = numbered()
    torch.testing.assert_close(sd.gather_bag(names, mode="mean"), looped(sd, GRID, "mean"))
    weights = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    wanted = looped(sd, GRID, "sum", weights=weights)
    for given in (weights, np.array(weights), torch.tensor(weights, dtype=torch.float64)):
        torch.testing.assert_close(sd.gather_bag(names, weights=given), wanted)
    assert sd.gather_bag(names[:, :0], mode="max").tolist() == [[0.0] * 3] * 2
    assert sd.gather_bag(names[:0], weights=np.ones((0, 3))).shape == (0, 3)


def _learned(bags: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(bag, dtype=torch.float64, requires_grad=True) for bag in bags]


WEIGHTS: dict[str, Callable[[list[list[float]]], Any]] = {
    "lists": lambda bags: bags,
    "tuples": lambda bags: tuple(map(tuple, bags)),
    "arrays": lambda bags: [np.array(bag) for bag in bags],
    "tensors": _learned,
    "a list": flat,
    "an array": lambda bags: np.array(flat(bags)),
    "an array of the other order of bytes": lambda bags: np.array(flat(bags), ">f8"),
    "an array that cannot be written to": lambda bags: np.frombuffer(np.array(flat(bags)).tobytes()),
    "a tensor": lambda bags: torch.tensor(flat(bags), dtype=torch.float64),
    "nested": lambda bags: torch.nested.nested_tensor(
        [torch.tensor(bag, dtype=torch.float64) for bag in bags], layout=torch.jagged
    ),
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_weights_of_every_form(form: str) -> None:
    sd, bags = numbered(), weights_of(BAGS)
    for given in ((BAGS,), (flat(BAGS), OFFSETS), (flat(BAGS), JAGGED)):
        found = sd.gather_bag(*given, weights=WEIGHTS[form](bags))
        torch.testing.assert_close(found, looped(sd, BAGS, "sum", weights=bags))
    skipped = [*BAGS[:3], ["x", NAMES[0], "y", NAMES[1]], ["z"]]
    bags = weights_of(skipped)
    found = sd.gather_bag(skipped, weights=WEIGHTS[form](bags), missing="skip")
    torch.testing.assert_close(found, looped(sd, skipped, "sum", "skip", bags))


def test_weights_of_several_tensors_get_gradients() -> None:
    sd, weights = numbered(), _learned(weights_of(BAGS))
    sd.gather_bag(BAGS, weights=weights).sum().backward()
    for bag, given in zip(BAGS, weights, strict=True):
        assert given.grad is not None
        torch.testing.assert_close(given.grad, sd.gather(bag, shape=(3,)).sum(1))
    leaf = torch.ones(len(flat(BAGS)), dtype=torch.float64, requires_grad=True)
    nested = torch.nested.nested_tensor_from_jagged(leaf, JAGGED.offsets())
    sd.gather_bag(BAGS, weights=nested, missing="skip").sum().backward()
    torch.testing.assert_close(leaf.grad, sd.gather(flat(BAGS)).sum(1))


def test_weights_that_are_no_tensor_become_those_of_the_entries() -> None:
    sd = numbered(dtype=torch.float16)
    assert sd.gather_bag([NAMES[:2]], weights=[[1, 0.5]]).dtype == torch.float16
    assert sd.gather_bag([NAMES[:2]], weights=[np.array([1.0, 0.5])]).dtype == torch.float16


# -- little, or nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("missing", ["error", "skip", "zero", "insert"])
def test_no_bags_and_empty_bags(mode: Any, missing: Any) -> None:
    for sd, shape in ((numbered(), (3,)), (several((2, 2)), (2, 2)), (SD(), (4,))):
        asked: Any = {} if len(sd) == 6 and shape == (3,) else {"shape": shape}
        if shape == (2, 2):
            asked["dtype"] = torch.float64
        for names, count in (([], 0), ([[]], 1), ([[], (), []], 3), (np.empty((2, 0), dtype=str), 2)):
            found = sd.gather_bag(names, mode=mode, missing=missing, **asked)
            assert found.tolist() == torch.zeros(count, *shape).tolist()
            if found.requires_grad:
                found.sum().backward()
        for offsets, count in (([], 0), ([0], 1), ([0, 0], 2), (torch.tensor([0, 0]), 2)):
            found = sd.gather_bag([], offsets, mode=mode, missing=missing, **asked)
            assert found.tolist() == torch.zeros(count, *shape).tolist()
        assert sd.gather_bag([], [0], include_last_offset=True, mode=mode, **asked).shape == (0, *shape)
    assert numbered().gather_bag([[]], mode=mode).requires_grad  # a backward pass like any other
    sd = numbered()
    sd.requires_grad_(False)
    assert sd.gather_bag([[]], mode=mode, missing=missing).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("missing", ["skip", "zero"])
def test_where_no_name_is_there_bags_are_zeros(mode: Any, missing: Any) -> None:
    bags = [["x"], ["y", "z"], []]
    for sd in (numbered(), SD()):
        found = sd.gather_bag(bags, mode=mode, missing=missing, shape=(3,))
        assert found.tolist() == [[0.0] * 3] * 3
        if len(sd):
            found.sum().backward()
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    numbered().gather_bag(["x", "y", "z"], [0, 1], missing=missing, weights=weights).sum().backward()
    assert weights.grad is not None
    assert not weights.grad.any()


def test_names_are_inserted_into_an_empty_dictionary() -> None:
    sd = SD()
    found = sd.gather_bag([["a", "b"], ["a"]], missing="insert", shape=(2,), init=torch.nn.init.ones_)
    assert found.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert list(sd) == ["a", "b"]


# -- a Lookup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [numbered, several])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_lookup_notices_that_rows_have_moved(make: Callable[..., SD], mode: Any, sparse: bool) -> None:
    sd = make()
    lookup = sd.lookup(flat(BAGS))
    wanted = looped(sd, BAGS, mode)
    for _ in range(2):
        torch.testing.assert_close(sd.gather_bag(lookup, OFFSETS, mode=mode, sparse=sparse), wanted)
    del sd[NAMES[2]]
    sd.compact()
    sd.insert(["new"], shape=(3,), dtype=torch.float64)
    torch.testing.assert_close(sd.gather_bag(lookup, OFFSETS, mode=mode, sparse=sparse), wanted)
    del sd[NAMES[0]]
    for missing in ("error", "skip", "zero", "insert"):  # which have no effect on a Lookup
        with pytest.raises(KeyError, match="2 of 8 names"):
            sd.gather_bag(lookup, OFFSETS, mode=mode, missing=missing)
    assert NAMES[0] not in sd


def test_a_lookup_needs_offsets_and_its_own_dictionary() -> None:
    sd = numbered()
    with pytest.raises(ValueError, match=r"pass offsets="):
        sd.gather_bag(sd.lookup(NAMES))
    with pytest.raises(ValueError, match="another dictionary"):
        numbered().gather_bag(sd.lookup(NAMES), [0])
    assert sd.gather_bag(sd.lookup([]), [0, 0], shape=(3,)).tolist() == [[0.0] * 3] * 2


# -- errors ------------------------------------------------------------------------------------------------------------

NEW = ["new", NAMES[0], "newer"]
ERRORS: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "one list": (ValueError, r"got names in one list: pass offsets=", (NEW,), {}),
    "bags that are str": (ValueError, r"bags such as \[\['abc'\]\]", (["abc", "de"],), {}),
    "an array of str": (ValueError, r"pass offsets=", (np.array(NEW),), {}),
    "a generator of str": (ValueError, r"pass offsets=", (iter(NEW),), {}),
    "a str between bags": (TypeError, r"got the str 'newer' as bag 1", ([NEW, "newer"],), {}),
    "a single str": (TypeError, "single str", ("new",), {}),
    "a number as a bag": (TypeError, "in bag 1: .* int", ([NEW, 3],), {}),
    "None as a bag": (TypeError, "in bag 1: .* NoneType", ([NEW, None],), {}),
    "a set of bags": (TypeError, "in an order", ({("new",)},), {}),
    "a set as a bag": (TypeError, "in bag 1: .* in an order", ([NEW, {"new"}],), {}),
    "a list in a bag": (TypeError, "must be str, got list", ([["new", ["newer"]]],), {}),
    "a number in a bag": (TypeError, "must be str, got int", ([["new", 3]],), {}),
    "three dimensions": (TypeError, "3 dimensions", (np.array([[NEW]]),), {}),
    "no dimension": (TypeError, "0 dimensions", (np.array("new"),), {}),
    "a tensor": (TypeError, "iterable of str", (torch.ones(3), [0]), {}),
    "bags and offsets": (ValueError, r"leave offsets= out", ([NEW], [0]), {}),
    "an array and offsets": (ValueError, r"leave offsets= out", (np.array([NEW]), [0]), {}),
    "a first offset": (ValueError, "the first is 0, got 1", (NEW, [1]), {}),
    "descending": (ValueError, "ascending offsets, got 2 and then 1 at position 2", (NEW, [0, 2, 1]), {}),
    "negative": (ValueError, "ascending offsets, got 0 and then -1", (NEW, [0, -1]), {}),
    "large": (ValueError, "at most 3, the number of names, got 4", (NEW, [0, 4]), {}),
    "very large": (ValueError, "ascending|at most 3", (NEW, np.array([0, 2**64 - 1], np.uint64)), {}),
    "no offset": (ValueError, "bags of 3 names, got none", (NEW, []), {}),
    "no last offset": (ValueError, "at least one offset", (NEW, []), {"include_last_offset": True}),
    "a small last offset": (ValueError, "expected 3.* got 2", (NEW, [0, 2]), {"include_last_offset": True}),
    "a large last offset": (ValueError, "expected 3.* got 4", (NEW, [0, 4]), {"include_last_offset": True}),
    "two dimensions of offsets": (ValueError, r"one dimension, got shape \[1, 1\]", (NEW, [[0]]), {}),
    "uneven offsets": (TypeError, "several lengths", (NEW, [[0], [1, 2]]), {}),
    "offsets of float": (TypeError, "integers as offsets, got list of float64", (NEW, [0.0]), {}),
    "a tensor of float": (TypeError, "integers as offsets", (NEW, torch.tensor([0.0])), {}),
    "an empty array of float": (TypeError, "integers as offsets", ([], np.empty(0)), {}),
    "offsets of bool": (TypeError, "integers as offsets", (NEW, [False, True]), {}),
    "a str as offsets": (TypeError, "integers as offsets", (NEW, "0"), {}),
    "nested of others": (ValueError, "each of 3 names, got 8 values", (NEW, JAGGED), {}),
    "nested with holes": (
        ValueError,
        r"contiguous\(\)",
        (NEW, lambda: torch.nested.narrow(torch.ones(2, 4), 1, *torch.tensor([[0, 1], [1, 2]]), layout=torch.jagged)),
        {},
    ),
    "nested along another dimension": (
        ValueError,
        "second dimension is ragged",
        (NEW, lambda: torch.nested.nested_tensor([torch.ones(3, 2)], layout=torch.jagged).transpose(1, 2)),
        {},
    ),
    "a mode": (ValueError, "mode must be 'sum', 'mean' or 'max', got 'min'", ([NEW],), {"mode": "min"}),
    "weights of a mean": (ValueError, r'needs mode="sum", got mode=\'mean\'', ([NEW],), {"mode": "mean", "weights": 1}),
    "few weights": (ValueError, r"each of 3 names, got weights of shape \[2\]", ([NEW],), {"weights": torch.ones(2)}),
    "weights of other bags": (ValueError, "1 weights for the 3 names of bag 0", ([NEW],), {"weights": [[1]]}),
    "weights of even bags": (ValueError, r"\[2, 2\]", ([["new"], NEW],), {"weights": torch.ones(2, 2)}),
    "more bags": (ValueError, "2 bags of weights for 1 bags of names", ([NEW],), {"weights": [[1.0] * 3, []]}),
    "nested weights": (ValueError, "7 bags of weights for 1 bags", ([NEW],), {"weights": JAGGED}),
    "weights of deep lists": (ValueError, r"got shape \[1, 3\] as bag 0", ([NEW],), {"weights": [[[1] * 3]]}),
    "weights of str": (TypeError, "numbers as weights", ([NEW],), {"weights": ["a", "b", "c"]}),
    "a str of weights": (TypeError, "single str", ([NEW],), {"weights": "abc"}),
    "uneven weights": (TypeError, "numbers as weights", ([NEW],), {"weights": [[[1.0], [2.0, 3.0], []]]}),
    "some tensors": (TypeError, "or of none, got both", ([NEW, NEW],), {"weights": [torch.ones(3), [1.0] * 3]}),
    "weights of another dtype": (
        TypeError, "of torch.float64, as the entries have, got torch.float32", ([NEW],), {"weights": torch.ones(3)}
    ),
    "complex weights": (TypeError, "got torch.complex128", ([NEW],), {"weights": [[1j, 0, 0]]}),
    "sparse weights": (TypeError, "layout", ([NEW],), {"weights": torch.ones(3, dtype=torch.float64).to_sparse()}),
    "weights elsewhere": (
        ValueError, "weights on cpu, where the entries are, got some on meta",
        ([NEW],), {"weights": torch.ones(3, device="meta", dtype=torch.float64)},
    ),
    "another shape": (ValueError, r"expected float64 of shape \[4\]", ([NEW],), {"shape": (4,)}),
    "another dtype": (ValueError, "expected float16", ([NEW],), {"dtype": torch.float16}),
    "several shapes": (ValueError, "one shape and dtype, got .* and", ([[*NEW, "wide"]],), {}),
    "no name": (KeyError, "empty", ([[*NEW, ""]],), {}),
    "an init that returns": (ValueError, "in place", ([NEW],), {"init": torch.zeros_like}),
    "an init that raises": (ZeroDivisionError, "division", ([NEW],), {"init": lambda _: 1 / 0}),
    "no init": (TypeError, "init must be a function", ([NEW],), {"init": 3}),
    "an unknown shape": (ValueError, "pass shape=", ([["new"]],), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_after_an_error_all_is_as_it_was(case: str) -> None:
    error, match, given, options = ERRORS[case]
    sd = numbered()
    sd["wide"] = torch.ones(9, dtype=torch.float64)
    before = {name: row.detach().clone() for name, row in sd.items()}
    given = tuple(one() if callable(one) else one for one in given)
    with pytest.raises(error, match=match):
        sd.gather_bag(*given, missing="insert", **options)
    assert list(sd) == list(before)
    for name, row in sd.items():
        assert torch.equal(row, before[name])
    assert len(sd.tables()) == 2
    assert_consistent(sd)


def test_strided_nested_tensors_are_refused_with_the_layout_to_use() -> None:
    with pytest.warns(UserWarning, match="nested tensors"):
        nested = torch.nested.nested_tensor([torch.ones(3)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"torch\.jagged as offsets"):
        numbered().gather_bag(NAMES[:3], nested)
    with pytest.raises(TypeError, match=r"torch\.jagged as weights"):
        numbered().gather_bag([NAMES[:3]], weights=nested)


@pytest.mark.parametrize("missing", ["skip", "zero", "error"])
def test_what_the_other_ways_to_treat_names_refuse(missing: Any) -> None:
    sd = numbered()
    with pytest.raises(ValueError, match='init= needs missing="insert"'):
        sd.gather_bag(BAGS, missing=missing, init=torch.nn.init.ones_)
    with pytest.raises(ValueError, match="missing must be"):
        sd.gather_bag(BAGS, missing="none")
    with pytest.raises(ValueError, match=r"expected float64 of shape \[4\]"):
        sd.gather_bag(BAGS, missing=missing, shape=(4,))
    with pytest.raises(KeyError, match="2 of 4 names are not in the dictionary: 'x', 'y'"):
        sd.gather_bag([["x", NAMES[0]], [NAMES[1], "y"]])


# -- beside others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [numbered, several])
@pytest.mark.parametrize("missing", ["skip", "zero", "insert"])
def test_random_bags_are_those_of_a_loop_while_names_come_and_go(make: Callable[..., SD], missing: Any) -> None:
    chosen, sd = random.Random(0), make()
    for step in range(60):
        known = [*sd, *(f"unknown.{step}.{n}" for n in range(chosen.randrange(3)))]
        bags = [[chosen.choice(known) for _ in range(chosen.randrange(5))] for _ in range(chosen.randrange(1, 6))]
        mode = chosen.choice(MODES)
        weights = weights_of(bags) if mode == "sum" and step % 2 else None
        found = sd.gather_bag(
            bags, mode=mode, missing=missing, weights=weights, sparse=step % 3 == 0, shape=(3,), dtype=torch.float64
        )
        wanted = looped(sd, bags, mode, missing, weights)
        torch.testing.assert_close(found, wanted)
        if wanted.requires_grad:
            assert_same_gradients(gradients(sd, found), gradients(sd, wanted))
        if step % 7 == 3:
            del sd[chosen.choice(list(sd))]
            sd.insert([f"late.{step}"], shape=(3,), dtype=torch.float64, init=torch.nn.init.normal_)
        if step % 20 == 19:
            sd.compact()
    assert_consistent(sd)


# Of which no row is the last: one that is read in another's place is no error.
FEW = [[NAMES[0], NAMES[3]], [], [NAMES[4]]]


@pytest.mark.parametrize("make", [numbered, several])
@pytest.mark.parametrize(
    "call",
    [
        lambda sd: sd.gather_bag(FEW),
        lambda sd: sd.gather_bag(FEW, mode="max", sparse=True),
        lambda sd: sd.gather_bag(flat(FEW), starts(FEW), weights=[1, 2, 3], missing="zero"),
        lambda sd: sd.gather_bag([*FEW, ["x"]], missing="skip"),
        lambda sd: sd.gather_bag(sd.lookup(flat(FEW)), starts(FEW), mode="mean"),
        lambda sd: sd.gather_bag(BAGS),  # also the last row, so that the table gets too short
    ],
    ids=["sum", "sparse max", "weights", "skip", "lookup", "a shorter table"],
)
def test_rows_that_a_finalizer_moves_in_the_middle_are_looked_up_again(
    make: Callable[[], SD], call: Callable[[SD], Tensor]
) -> None:
    def move(sd: SD) -> None:
        del sd[NAMES[2]]
        sd.compact()

    sd = make()
    with At() as steps:
        wanted = call(sd)
    assert len(steps.places) > 10
    for step, place in enumerate(steps.places):
        sd = make()
        with At(step, partial(move, sd)):
            found = call(sd)
        assert torch.equal(found, wanted), place
        assert NAMES[2] not in sd


def test_an_fx_trace_is_refused() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sd = numbered()

        def forward(self, given: Tensor) -> Tensor:
            return self.sd.gather_bag(BAGS) * given

    with pytest.raises(RuntimeError, match="symbolic_trace"):
        torch.fx.symbolic_trace(Model())


@pytest.mark.slow  # To compile takes seconds.
@pytest.mark.filterwarnings("ignore")  # dynamo has a word for each native function where a graph ends
def test_in_a_compiled_function_bags_are_the_same() -> None:
    torch._dynamo.reset()
    sd = numbered()
    compiled = torch.compile(lambda bags, mode: sd.gather_bag(bags, mode=mode, missing="insert") * 2, backend="eager")
    for bags in (BAGS, [*BAGS, ["new", NAMES[0]]], [NAMES]):
        for mode in MODES:
            torch.testing.assert_close(compiled(bags, mode), 2 * looped(sd, bags, mode))
    torch._dynamo.reset()


def test_training_with_bags_is_that_of_torchs_embedding_bag() -> None:
    theirs = torch.nn.EmbeddingBag.from_pretrained(values(), freeze=False, mode="mean", sparse=True)
    sd = numbered()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (theirs, sd)]
    for step in range(10):
        numbers = [(step * 7 + n * n) % 6 for n in range(5)]
        losses = (
            theirs(torch.tensor(numbers), torch.tensor([0, 2])),
            sd.gather_bag([[NAMES[n] for n in numbers[:2]], [NAMES[n] for n in numbers[2:]]], mode="mean", sparse=True),
        )
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(sd.gather(NAMES), theirs.weight)
