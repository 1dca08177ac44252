"""The optimizers of ``pdrs.optim``: the same numbers as torch's, row by row, and no number of any other row.

The bugs that this hunts: a repeated row that is stepped on twice, a row that no gradient lists and that moves all the
same, the state of one name in the row of another, a state that is lost or rounded where it is saved, loaded or copied,
an order of threads that is seen in the bits, a step that fails and has begun.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pdrs
from pdrs.optim import SGD, Adagrad, Adam, AdamW, RMSprop, RowWiseAdagrad
from trained_by_row import KINDS, NAMES, Make, assert_near, batch_of, bits, loss_of, rows, stacked, table_of, train

# torch says so of its own sparse optimizers, from torch 2.15 on.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

SD = pdrs.StackedParameterDict
all_kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


# -- the same as torch -------------------------------------------------------------------------------------------------

BY_ROW: dict[str, tuple[Make, Make]] = {
    "Adam": (lambda p: Adam(p, lr=0.05), lambda p: torch.optim.SparseAdam(list(p), lr=0.05)),
    "Adam-maximize": (
        lambda p: Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-4, maximize=True),
        lambda p: torch.optim.SparseAdam(list(p), lr=0.01, betas=(0.8, 0.95), eps=1e-4, maximize=True),
    ),
    "Adagrad": (
        lambda p: Adagrad(p, lr=0.1, lr_decay=0.02, initial_accumulator_value=0.25),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.02, initial_accumulator_value=0.25),
    ),
    "SGD": (lambda p: SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD-maximize": (lambda p: SGD(p, lr=0.001, maximize=True), lambda p: torch.optim.SGD(p, lr=0.001, maximize=True)),
}


@pytest.mark.parametrize(("ours", "theirs"), BY_ROW.values(), ids=BY_ROW)
def test_a_hundred_steps_with_names_that_come_and_go_are_those_of_torchs_sparse_optimizers(
    ours: Make, theirs: Make
) -> None:
    """The peer has one large weight, in which rows are used when their names come."""
    every = [*NAMES, *(f"late.{n}" for n in range(40))]
    values = rows(len(every))
    weight = nn.Parameter(values.clone())
    sd = stacked()
    optimizers = ours(sd.parameters()), theirs([weight])
    for step in range(100):
        if step % 12 == 5:
            sd.drop(list(sd)[1:3])
        if step == 50:
            sd.compact()
        known = [*sd, *every[12 + step // 4 : 12 + step // 4 + 2]]
        names = batch_of(known, step)

        def begin(new: Tensor, names: list[str] = names) -> None:
            new.copy_(values[[every.index(name) for name in dict.fromkeys(names) if name not in sd]])

        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(sd.gather(names, missing="insert", init=begin), step).backward()
        numbers = torch.tensor([every.index(name) for name in names])
        loss_of(nn.functional.embedding(numbers, weight, sparse=True), step).backward()
        assert table_of(sd).grad.is_sparse
        for optimizer in optimizers:
            optimizer.step()
    left = torch.tensor([every.index(name) for name in sd])
    assert_near(sd.gather(list(sd)), weight[left])
    state, expected = optimizers[0].state[table_of(sd)], optimizers[1].state[weight]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor) and value.dim():
            assert_near(state[key][sd.indices(list(sd))], value[left])
        else:
            assert float(state[key]) == float(value)


DENSE: dict[str, tuple[type[Optimizer], type[Optimizer], dict[str, Any], dict[str, Any]]] = {
    "SGD": (SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}, {}),
    "SGD-dampened": (SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.3}, {}),
    "SGD-nesterov": (SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}, {}),
    "SGD-lazy": (SGD, torch.optim.SGD, {"lr": 0.02, "weight_decay": 0.1}, {"lazy_decay": True}),
    "Adagrad": (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1, "lr_decay": 0.1}, {}),
    "Adam": (Adam, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1}, {"per_row_steps": True}),
    "Adam-amsgrad": (Adam, torch.optim.Adam, {"lr": 0.02, "amsgrad": True}, {"per_row_steps": True}),
    "Adam-decoupled": (
        Adam, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}, {"lazy_decay": True},
    ),
    "AdamW": (AdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}, {}),
    "AdamW-amsgrad": (AdamW, torch.optim.AdamW, {"lr": 0.02, "amsgrad": True}, {"lazy_decay": True}),
    "RMSprop": (RMSprop, torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}, {}),
    "RMSprop-centered": (RMSprop, torch.optim.RMSprop, {"lr": 0.01, "centered": True}, {}),
    "RMSprop-momentum": (RMSprop, torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("ours", "theirs", "options", "more"), DENSE.values(), ids=DENSE)
def test_steps_on_all_rows_are_those_of_torchs_dense_optimizers(
    ours: Any, theirs: Any, options: dict[str, Any], more: dict[str, Any], maximize: bool, dtype: torch.dtype
) -> None:
    if dtype.is_complex and more.get("lazy_decay"):
        more = {}
    weight, sd = nn.Parameter(rows(dtype=dtype)), stacked(dtype)
    options = {**options, "maximize": maximize}
    # torch's fused Adagrad and SGD add up in another order.
    optimizers = ours(sd.parameters(), **options, **more), theirs([weight], **options, foreach=False)
    for step in range(30):
        for optimizer, taken in zip(optimizers, (sd.gather(NAMES, sparse=True), weight), strict=True):
            optimizer.zero_grad()
            loss_of(torch.view_as_real(taken) if dtype.is_complex else taken, step).backward()
            optimizer.step()
    near = 1e-12 if dtype == torch.float64 else 2e-6
    assert_near(sd.gather(NAMES), weight, near)
    state = optimizers[0].state[table_of(sd)]
    for key, value in optimizers[1].state[weight].items():
        assert_near(torch.as_tensor(state[key]), torch.as_tensor(value), near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True, "lr": 0.002}], ids=str
)
@pytest.mark.parametrize(("ours", "theirs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_rows_that_count_their_steps_are_trained_as_parameters_of_their_own(
    ours: Any, theirs: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    options = {"lr": 0.05, **options}
    sd = stacked(dtype)
    plain = {name: nn.Parameter(row.clone()) for name, row in sd.items()}
    alone = {name: theirs([parameter], **options) for name, parameter in plain.items()}
    optimizer = ours(sd.parameters(), per_row_steps=True, **options)
    for step in range(60):
        if step % 10 == 9:
            name, value = f"late.{step}", rows(1, seed=step, dtype=dtype)[0]
            plain.pop(next(iter(sd)))
            sd.popitem(last=False)
            sd[name], plain[name] = value, nn.Parameter(value.clone())
            alone[name] = theirs([plain[name]], **options)
        names = batch_of(list(sd), step)
        optimizer.zero_grad()
        loss_of(sd.gather(names), step).backward()
        loss_of(torch.stack([plain[name] for name in names]), step).backward()
        optimizer.step()
        for name in set(names):
            alone[name].step()
            plain[name].grad = None
    assert_near(sd.gather(list(sd)), torch.stack(list(plain.values())), 1e-6 if dtype == torch.float32 else 1e-12)


def test_row_wise_adagrad_has_one_sum_for_each_row_of_the_mean_of_squares() -> None:
    sd = stacked(torch.float64)
    optimizer = RowWiseAdagrad(
        sd.parameters(), lr=0.1, lr_decay=0.5, weight_decay=0.2, initial_accumulator_value=0.3, eps=1e-3
    )
    values, sums = rows(dtype=torch.float64), torch.full((12,), 0.3, dtype=torch.float64)
    for step in range(20):
        names = batch_of(NAMES, step)
        optimizer.zero_grad()
        loss_of(sd.gather(names), step).backward()
        gradient = table_of(sd).grad.to_dense()
        optimizer.step()
        for at in {NAMES.index(name) for name in names}:
            g = gradient[at] + 0.2 * values[at]
            sums[at] += g.square().mean()
            values[at] -= 0.1 / (1 + step * 0.5) * g / (sums[at].sqrt() + 1e-3)
    assert_near(sd.gather(NAMES), values, 1e-12)
    held = optimizer.state[table_of(sd)]["sum"]
    assert held.shape == (12, 1)
    assert_near(held[:, 0], sums, 1e-12)


def test_row_wise_adagrad_begins_anew_for_complex_rows_too() -> None:
    """Its sums are real numbers, where torch's Adagrad has complex ones."""
    sd = stacked(torch.complex64)
    optimizer = RowWiseAdagrad(sd.parameters(), initial_accumulator_value=0.25)
    sd.gather(NAMES).abs().sum().backward()
    optimizer.step()
    sd.drop(NAMES[:2])
    sd.update({f"new.{n}": torch.ones(3, dtype=torch.complex64) for n in range(20)})
    sums = optimizer.state[table_of(sd)]["sum"]
    assert sums.dtype == torch.float32
    assert sums[sd.indices([f"new.{n}" for n in range(20)])].eq(0.25).all()
    assert_near(sums[sd.indices(NAMES[2:])], torch.full((10, 1), 0.75))  # the mean over pairs of real numbers


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_row_wise_adagrad_steps_on_parameters_of_any_shape(shape: tuple[int, ...]) -> None:
    """Of a Parameter without dimensions, too: it is one row."""
    weight = nn.Parameter(torch.ones(shape))
    RowWiseAdagrad([weight], lr=0.1).load_state_dict((optimizer := RowWiseAdagrad([weight], lr=0.1)).state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        weight.mul(3).sum().backward()
        optimizer.step()
    assert_near(weight, torch.full(shape, 1 - 0.1 - 0.1 / math.sqrt(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@all_kinds
def test_the_native_step_is_that_of_the_formulas(
    make: Make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables on other devices are stepped on by operations of torch: by the same numbers."""
    import pdrs._rows.row_optimizer as private

    class Left:
        @staticmethod
        def plan(*_: object) -> None:
            return None

    seen = []
    for is_native in (True, False):
        if not is_native:
            monkeypatch.setattr(private, "RowStep", Left)
        sd = stacked(dtype)
        optimizer = make(sd.parameters())
        sd.freeze(NAMES[3:5])
        for step in range(20):
            optimizer.zero_grad()
            loss_of(sd.gather(batch_of(NAMES, step)), step).backward()
            optimizer.step()
        seen.append((sd.gather(NAMES), optimizer.state[table_of(sd)]))
    near = {torch.float64: 1e-12, torch.bfloat16: 1e-2}.get(dtype, 2e-6)
    assert_near(seen[0][0], seen[1][0], near)
    assert seen[0][1].keys() == seen[1][1].keys()
    for key, value in seen[1][1].items():
        assert value.dtype == seen[0][1][key].dtype
        assert_near(seen[0][1][key], value, near)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_writes_the_same_bits(dtype: torch.dtype) -> None:
    count = 1 << 16
    values, gradient = rows(count, 16, dtype=dtype), rows(count + 5000, 16, dtype=dtype, seed=1)
    listed = torch.randint(count // 2, (count + 5000,), generator=torch.Generator().manual_seed(2))
    seen = []
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        torch.manual_seed(0)
        weight = nn.Parameter(values.clone())
        optimizer = AdamW([weight], lr=0.1, per_row_steps=True, lazy_decay=True, stochastic_rounding=True)
        for _ in range(2):
            weight.grad = torch.sparse_coo_tensor(listed[None], gradient, weight.shape, check_invariants=False)
            optimizer.step()
        seen.append([weight.detach(), *optimizer.state[weight].values()])
    for other in seen[1:]:
        assert all(torch.equal(one, another) for one, another in zip(seen[0], other, strict=True))
    assert not torch.equal(seen[0][0], values)


# -- which rows --------------------------------------------------------------------------------------------------------


@all_kinds
def test_rows_that_no_gradient_lists_and_frozen_rows_stay_to_the_bit(make: Make) -> None:
    sd = stacked()
    optimizer = make(sd.parameters())
    train(sd, optimizer, range(5))
    sd.freeze(NAMES[:2])
    before = bits(sd, optimizer)
    optimizer.zero_grad()
    # Also where the mask of the gradient has been passed by.
    gradient = rows(3, seed=9)
    table = table_of(sd)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 2, 5]]), gradient, table.shape, check_invariants=False)
    optimizer.step()
    after = bits(sd, optimizer)
    changed = {name for name in NAMES if before[name] != after[name]}
    assert changed == {NAMES[2], NAMES[5]}


def state_of_row(sd: SD, optimizer: Optimizer, name: str) -> dict[str, Any]:
    state = optimizer.state[table_of(sd)]
    return {key: one[sd.indices([name])][0].flatten().tolist() for key, one in state.items() if one.dim()}


@pytest.mark.parametrize("how", ["set", "gather", "scatter"])
@all_kinds
def test_a_name_that_comes_begins_anew_in_a_freed_row_and_in_a_new_one(make: Make, how: str) -> None:
    sd = stacked()
    optimizer = make(sd.parameters())
    train(sd, optimizer, range(10))
    sd.drop([NAMES[4]])
    new = ["freed", *(f"new.{n}" for n in range(30))]
    if how == "set":
        sd.update({name: torch.ones(3) for name in new[1:]})
        sd["freed"] = torch.ones(3)
    elif how == "gather":
        sd.gather(new, missing="insert", init=nn.init.ones_)
    else:
        sd.scatter(new, torch.ones(31, 3), missing="insert")
    group = optimizer.param_groups[0]
    begin = group.get("initial_accumulator_value", 0.0)
    total = optimizer.state[table_of(sd)].get("decay", torch.zeros(())).item()
    assert (total < 0) == bool(group.get("lazy_decay"))
    for name in new:
        for key, value in state_of_row(sd, optimizer, name).items():
            expected = {"sum": begin, "row_decay": total}.get(key, 0.0)
            assert value == pytest.approx([expected] * len(value)), key
    if "sum" in optimizer.state[table_of(sd)] or group.get("per_row_steps"):
        # It is trained as any other, whatever had its row: as two that come now.
        optimizer.zero_grad()
        sd.gather(new[:3]).pow(2).sum().backward()
        optimizer.step()
        assert sd[new[0]].tolist() == sd[new[1]].tolist() == sd[new[2]].tolist()


@pytest.mark.parametrize("change", ["compact", "groups", "reserve", "sort"])
@all_kinds
def test_state_follows_the_names_where_rows_move(make: Make, change: str) -> None:
    sd, other = stacked(), stacked()
    optimizers = make(sd.parameters()), make(other.parameters())
    for one, optimizer in zip((sd, other), optimizers, strict=True):
        train(one, optimizer, range(10))
        one.drop(NAMES[1:5])
    before = bits(sd, optimizers[0])
    optimizers[0].zero_grad()
    if change == "compact":
        sd.compact()
    elif change == "groups":
        sd.param_groups(by={r"name\.[67]": {}})
        assert len(optimizers[0].param_groups[0]["params"]) == 2
    elif change == "reserve":
        sd.reserve(500)
    else:
        sd.move_to_end(NAMES[7])
        other.move_to_end(NAMES[7])
        sd.compact()
    after = bits(sd, optimizers[0])
    assert {name: after[name] for name in sd} == {name: before[name] for name in sd}
    # And goes on as if nothing had happened. Tables of a group without a gradient have another number of steps.
    steps = range(10, 11) if change == "groups" else range(10, 20)
    for one, optimizer in zip((sd, other), optimizers, strict=True):
        for step in steps:
            optimizer.zero_grad()
            loss_of(one.gather(list(one)), step).backward()
            optimizer.step()
    assert_near(sd.gather(list(sd)), other.gather(list(sd)))


def test_gather_returns_rows_with_sparse_gradients_if_the_optimizer_takes_them() -> None:
    sd = stacked()

    def is_sparse(**options: Any) -> bool:
        sd.zero_grad()
        sd.gather(NAMES[:2], **options).sum().backward()
        return bool(table_of(sd).grad.is_sparse)

    assert not is_sparse()
    theirs = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(theirs)
    assert not is_sparse()
    optimizer = Adam(sd.parameters())
    assert (is_sparse(), is_sparse(sparse=False), is_sparse(sparse=True)) == (True, False, True)
    # Another table takes the place of the one that it had.
    sd.load_state_dict(SD({"x": torch.ones(5)}).state_dict())
    sd.gather(["x"]).sum().backward()
    assert table_of(sd).grad.is_sparse
    sd["wide"] = torch.ones(7)
    sd.gather(["wide"]).sum().backward()
    assert sd.table((7,)).grad.is_sparse
    optimizer.step()
    assert sd["wide"].ne(1).all()
    del optimizer
    gc.collect()
    sd.zero_grad()
    sd.gather(["x"]).sum().backward()
    assert not sd.table((5,)).grad.is_sparse


# -- weight decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_lazy_decay_is_the_decay_of_all_rows(make: Any) -> None:
    """In the end each name has shrunk by all rates of the steps since it came; the rate changes."""
    sd = stacked(torch.float64)
    begun = {name: (row.clone(), 0) for name, row in sd.items()}
    optimizer = make(sd.parameters(), lr=0.1, weight_decay=0.3, lazy_decay=True)
    factors = []
    for step in range(40):
        if step % 9 == 4:
            value = rows(1, seed=step, dtype=torch.float64)[0]
            sd[f"late.{step}"] = value
            begun[f"late.{step}"] = value, step
        if step == 20:
            sd.compact()
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step % 7)
        factors.append(1 - 0.1 / (1 + step % 7) * 0.3)
        names = list(sd) if step == 39 else batch_of(list(sd), step)
        optimizer.zero_grad()
        (sd.gather(names) * 0).sum().backward()  # a gradient of zeros: all that is left is decay
        optimizer.step()
    for name, (value, since) in begun.items():
        assert_near(sd[name], value * math.prod(factors[since:]), 1e-12)


def test_lazy_decay_says_what_rates_it_takes() -> None:
    sd = stacked()
    optimizer = AdamW(sd.parameters(), lr=1.0, weight_decay=1.0, lazy_decay=True)
    sd.gather(NAMES).sum().backward()
    before = bits(sd, optimizer)
    with pytest.raises(ValueError, match=r"lr \* weight_decay below 1, got lr=1.0"):
        optimizer.step()
    assert bits(sd, optimizer) == before
    with pytest.raises(ValueError, match="without momentum"):
        SGD(sd.parameters(), lr=0.1, momentum=0.9, lazy_decay=True)
    with pytest.raises(ValueError, match="take AdamW"):
        Adam(sd.parameters(), lazy_decay=True)


def test_weight_decay_concerns_the_rows_of_the_batch() -> None:
    sd = stacked()
    optimizer = SGD(sd.parameters(), lr=0.5, weight_decay=0.5)
    (sd.gather([NAMES[2], NAMES[2]]) * 0).sum().backward()
    optimizer.step()
    expected = rows()
    expected[2] *= 0.75  # once, though it is listed twice
    assert_near(sd.gather(NAMES), expected)


# -- rows of 16 bits ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_kinds
def test_rows_of_16_bits_have_states_of_32_and_keep_them(make: Make, dtype: torch.dtype) -> None:
    sd = stacked(dtype)
    optimizer = make(sd.parameters())
    train(sd, optimizer, range(5))
    train(sd, optimizer, range(5, 6), sparse=False)
    sd.update({f"new.{n}": torch.ones(3, dtype=dtype) for n in range(20)})
    train(sd, optimizer, range(6, 10))

    def states(one: Optimizer, table: Tensor) -> list[Tensor]:
        found = [value for value in one.state[table].values() if isinstance(value, Tensor) and value.dim()]
        assert all(value.dtype == torch.float32 for value in found)
        return found

    saved = copy.deepcopy(optimizer.state_dict())
    again = make(sd.parameters())
    again.load_state_dict(saved)
    for one, other in zip(states(again, table_of(sd)), states(optimizer, table_of(sd)), strict=True):
        assert torch.equal(one, other)
    train(sd, again, range(10, 12))
    states(again, table_of(sd))


@pytest.mark.parametrize("make", [Adagrad, Adam, RMSprop])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_computed_with_in_32(make: Any, dtype: torch.dtype) -> None:
    wide, narrow = stacked(), stacked(dtype)
    wide.scatter(NAMES, narrow.gather(NAMES).detach().float())
    optimizers = make(wide.parameters(), lr=0.1), make(narrow.parameters(), lr=0.1)
    gradient = rows(8, seed=1).to(dtype)
    for sd, optimizer in zip((wide, narrow), optimizers, strict=True):
        (sd.gather([*NAMES[:4], *NAMES[:4]]) * gradient.to(table_of(sd).dtype)).sum().backward()
        optimizer.step()
    assert torch.equal(narrow.gather(NAMES), wide.gather(NAMES).to(dtype))
    states = [one.state[table_of(sd)] for sd, one in zip((wide, narrow), optimizers, strict=True)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_rounding_at_random_counts_small_steps_on_average_and_follows_torchs_seed() -> None:
    def trained(seed: int, rounds: bool) -> Tensor:
        torch.manual_seed(seed)
        sd = SD.from_tensor(["a"], torch.ones(1, 4096, dtype=torch.bfloat16))
        optimizer = SGD(sd.parameters(), lr=1.0, stochastic_rounding=rounds)
        for _ in range(50):
            optimizer.zero_grad()
            (sd.gather(["a"]) * -1e-3).sum().backward()  # neighbours are 2**-7 apart
            optimizer.step()
        return sd["a"].detach().float()

    assert trained(0, rounds=False).eq(1).all()
    moved = trained(0, rounds=True)
    assert float(moved.mean()) == pytest.approx(1.05, abs=0.002)
    assert torch.equal(moved, trained(0, rounds=True))
    assert not torch.equal(moved, trained(1, rounds=True))
    with pytest.raises(ValueError, match="rows of bfloat16"):
        SGD([torch.zeros(1, dtype=torch.float16, requires_grad=True)], stochastic_rounding=True)


@pytest.mark.parametrize("rows", [10, 300_000])
def test_a_table_of_small_pages_is_the_same_on_huge_ones(rows: int) -> None:
    values = torch.randn(rows, 4)
    sd = SD.from_tensor(list(map(str, range(rows))), values.clone())
    other = sd.table((4,)).detach()
    optimizer = SGD(sd.parameters(), lr=1.0)
    sd.gather(["3"]).sum().backward()
    optimizer.step()
    values[3] -= 1
    assert torch.equal(sd.table((4,)), values)
    assert other.data_ptr() == sd.table((4,)).data_ptr()


def test_sums_of_16_bits_begin_with_the_number_that_was_asked_for() -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = Adagrad(sd.parameters(), initial_accumulator_value=0.1)
    sd.gather(["a"]).sum().backward()
    optimizer.step()
    assert optimizer.state[sd.table((2,))]["sum"][1].tolist() == pytest.approx([0.1, 0.1], rel=1e-7)
