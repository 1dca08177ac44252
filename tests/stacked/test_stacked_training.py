"""Training with stacked rows: the same numbers as with one Parameter a name, while names come and go.

The bugs that this hunts: an optimizer that goes on with the state of another name, a gradient that is lost or lands in
another row when a table grows, a row that moves although nobody gathered it.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

import pdrs
from observed import NoMemory

SD = pdrs.StackedParameterDict
NAMES = [f"name.{n}" for n in range(6)]


def rows(shape: tuple[int, ...] = (3,), count: int = len(NAMES)) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def loss_of(taken: Tensor, step: int) -> Tensor:
    target = torch.linspace(-1, 1, taken.numel()).view_as(taken) * (1 + step % 3)
    return (taken - target).pow(2).sum()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
}


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fifty_steps_equal_those_with_one_parameter_a_name(
    make: Callable[[Any], torch.optim.Optimizer], shape: tuple[int, ...]
) -> None:
    plain = nn.ParameterDict({name.replace(".", "_"): row for name, row in zip(NAMES, rows(shape), strict=True)})
    sd = SD.from_tensor(NAMES, rows(shape).clone())
    optimizers = make(plain.parameters()), make(sd.parameters())
    for step in range(50):
        for optimizer, taken in zip(optimizers, (torch.stack(list(plain.values())), sd.gather(NAMES)), strict=True):
            optimizer.zero_grad()
            loss_of(taken, step).backward()
            optimizer.step()
    torch.testing.assert_close(sd.gather(NAMES), torch.stack(list(plain.values())), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop", "Rprop"])
def test_names_that_come_go_and_move_keep_their_state_and_no_other(kind: str) -> None:
    """With optimizers that count no steps, a name that comes late is trained as any other."""
    plain = {name: nn.Parameter(row.clone()) for name, row in zip(NAMES, rows(), strict=True)}
    alone = {name: OPTIMIZERS[kind]([parameter]) for name, parameter in plain.items()}
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = OPTIMIZERS[kind](sd.parameters())
    sd.attach_optimizer(optimizer)
    for step in range(40):
        if step == 10:
            for name in NAMES[1:3]:
                sd.pop(name)
                del plain[name], alone[name]
        if step % 8 == 4:
            names, values = [f"late.{step}.{n}" for n in range(3)], rows(count=3) * step
            sd.scatter(names, values, missing="insert")
            plain |= {name: nn.Parameter(row.clone()) for name, row in zip(names, values, strict=True)}
            alone |= {name: OPTIMIZERS[kind]([plain[name]]) for name in names}
        if step in (15, 35):
            sd.compact()
        optimizer.zero_grad()
        loss_of(sd.gather(list(plain)), step).backward()
        optimizer.step()
        for one in alone.values():
            one.zero_grad()
        loss_of(torch.stack(list(plain.values())), step).backward()
        for one in alone.values():
            one.step()
    assert list(sd) == list(plain)
    torch.testing.assert_close(sd.gather(list(plain)), torch.stack(list(plain.values())), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad sets it off in torch 2.15
@pytest.mark.parametrize("shape", [(4,), (2, 2), ()])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SparseAdam(parameters, lr=0.05),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ],
    ids=["SparseAdam", "Adagrad", "SGD"],
)
def test_sparse_gradients_train_as_those_of_an_embedding(make: Any, shape: tuple[int, ...]) -> None:
    weight = rows(shape)
    theirs = nn.Embedding.from_pretrained(weight.reshape(len(NAMES), -1).clone(), freeze=False, sparse=True)
    sd = SD.from_tensor(NAMES, weight.clone())
    optimizers = make(list(theirs.parameters())), make(list(sd.parameters()))
    for step in range(20):
        batch = [(step * 7 + n * n) % len(NAMES) for n in range(5)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(theirs(torch.tensor(batch)), step).backward()
        loss_of(sd.gather([NAMES[n] for n in batch], sparse=True).reshape(len(batch), -1), step).backward()
        assert next(sd.parameters()).grad.is_sparse
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sd.gather(NAMES).reshape(len(NAMES), -1), theirs.weight)


# -- optimizers that are not attached ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda sd: sd.__setitem__("new", torch.zeros(3)),
        lambda sd: sd.gather(["new"], missing="insert"),
        lambda sd: (sd.pop("name.0"), sd.__setitem__("new", torch.zeros(3))),
        lambda sd: (sd.pop("name.0"), sd.compact()),
        lambda sd: sd.reserve(100),
        lambda sd: sd.param_groups(by={"0": {"lr": 1.0}}),
        lambda sd: sd.load_state_dict(SD({"other": torch.zeros(3)}).state_dict()),
    ],
    ids=["set", "gather", "reuse", "compact", "reserve", "groups", "load"],
)
def test_what_would_mix_up_the_state_of_a_strange_optimizer_is_refused(change: Callable[[SD], Any]) -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.Adam(sd.parameters())
    sd.gather(NAMES).sum().backward()
    optimizer.step()
    before = {name: row.clone() for name, row in sd.items()}
    with pytest.raises(RuntimeError, match=r"attach_optimizer\(optimizer\)"):
        change(sd)
    left = [name for name in before if name in sd]
    assert list(sd) == left
    assert len(left) >= len(before) - 1
    assert all(torch.equal(sd[name], before[name]) for name in left)
    sd.attach_optimizer(optimizer)
    sd["new"] = torch.ones(3)
    table = sd.table((3,))
    assert optimizer.state[table]["exp_avg"].shape == table.shape


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sd: pickle.loads(pickle.dumps(sd))])
def test_a_strange_optimizer_of_a_copy_is_noticed(duplicate: Callable[[SD], SD]) -> None:
    sd = duplicate(SD.from_tensor(NAMES, rows().clone()))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.gather(NAMES).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"attach_optimizer\(optimizer\)"):
        sd["new"] = torch.zeros(3)


def test_optimizers_that_keep_no_state_need_not_be_attached() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.1)
    for step in range(3):
        sd.gather([*NAMES, f"new.{step}"], missing="insert").sum().backward()
        optimizer.step()
        sd.compact()
    assert len(sd) == 9


def test_an_optimizer_that_has_not_stepped_need_not_be_attached_before_names_come() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.Adam(sd.parameters())
    sd["new"] = torch.zeros(3)
    sd.gather(["new"]).sum().backward()
    optimizer.step()
    assert sd["new"].ne(0).all()


def test_an_optimizer_that_had_the_tensor_before_it_became_a_table_is_noticed() -> None:
    weight = nn.Parameter(rows().clone())
    optimizer = torch.optim.Adam([weight])
    for _ in range(2):
        weight.sum().backward()
        optimizer.step()
    sd = SD.from_tensor(NAMES, weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="attach"):
        sd["new"] = torch.zeros(3)


def test_state_is_carried_where_rows_change_places_and_the_table_keeps_its_size() -> None:
    sd = SD.from_tensor(["a", "b", "c"], torch.zeros(3, 2))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    (sd.gather(["a", "b", "c"]) * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    optimizer.step()
    moments = optimizer.state[sd.table((2,))]["exp_avg"]
    before = {name: moments[at].tolist() for at, name in enumerate("abc")}
    del sd["a"]
    sd["d"] = torch.zeros(2)  # the row of a
    sd.compact()
    moments = optimizer.state[sd.table((2,))]["exp_avg"]
    assert sd.indices(["b", "c", "d"]).tolist() == [0, 1, 2]
    assert moments.tolist() == [before["b"], before["c"], [0, 0]]


@pytest.mark.parametrize("remove", [SD.pop, SD.__delitem__, lambda sd, name: sd.drop([name])])
@pytest.mark.parametrize("insert", ["one", "many"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_reused_row_has_no_gradient_of_its_old_name(remove: Callable[..., Any], insert: str, sparse: bool) -> None:
    sd = SD.from_tensor(["a", "b", "c"], torch.zeros(3, 2))
    sd.gather(["a", "b", "b"], sparse=sparse).sum().backward()
    remove(sd, "b")
    gradient = sd.table((2,)).grad
    assert gradient is not None
    assert gradient.to_dense().tolist() == [[1, 1], [0, 0], [0, 0]]
    late = sd.gather(["a"], sparse=sparse).sum() + sd.table((2,))[1].sum()  # a row that is nobody's
    late.backward()
    sd.update([("new", torch.zeros(2))] if insert == "many" else {})
    if insert == "one":
        sd["new"] = torch.zeros(2)
    assert sd.indices(["new"]).tolist() == [1]
    gradient = sd.table((2,)).grad
    assert gradient is not None
    assert gradient.to_dense().tolist() == [[2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize("layout", ["state_dict", "named_state_dict"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_optimizer_that_was_loaded_and_has_not_stepped_is_noticed(layout: str, nested: bool) -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.Adam(sd.parameters())
    sd.gather(NAMES).sum().backward()
    optimizer.step()
    resumed = SD.from_tensor(NAMES, torch.zeros(6, 3))
    state = getattr(sd, layout)()
    if nested:
        nn.ModuleDict({"words": resumed}).load_state_dict({f"words.{key}": value for key, value in state.items()})
    else:
        resumed.load_state_dict(state)
    again = torch.optim.Adam(resumed.parameters())
    again.load_state_dict(optimizer.state_dict())
    del resumed[NAMES[0]]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"attach_optimizer\(optimizer\)"):
            resumed["new"] = torch.ones(3)
    assert "new" not in resumed
    resumed.attach_optimizer(again)
    resumed["new"] = torch.ones(3)
    assert again.state[resumed.table((3,))]["exp_avg"][resumed.indices(["new"])].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1,), ()])
def test_statistics_of_rows_follow_them_and_those_of_columns_stay(shape: tuple[int, ...]) -> None:
    """Adafactor's; of a table with one row the shapes do not tell which is which."""
    sd = SD.from_tensor(["a"], torch.ones(1, *shape))
    optimizer = torch.optim.Adafactor(sd.parameters())
    sd.attach_optimizer(optimizer)
    for step in range(6):
        optimizer.zero_grad()
        sd.gather(["a", f"new.{step}"], missing="insert").pow(2).sum().backward()
        optimizer.step()
        if step == 3:
            sd.drop(["new.0", "new.1", "new.2", "new.3"])
            sd.compact()
    sizes = {key: len(value) for key, value in optimizer.state[sd.table(shape)].items() if value.dim()}
    assert sizes == ({"variance": 4} if shape == () else {"row_var": 4, "col_var": 1 if len(shape) == 1 else 4})


def test_state_that_cannot_follow_rows_is_refused() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.LBFGS(sd.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sd.gather(NAMES).pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="cannot follow"):
        sd["new"] = torch.zeros(3)
    with pytest.raises(ValueError, match="no parameter of this dictionary"):
        sd.attach_optimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))


def test_a_table_that_is_made_later_joins_the_attached_optimizer() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd["matrix"] = torch.zeros(2, 2)
    sd["frozen"] = nn.Parameter(torch.zeros(5), requires_grad=False)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    sd["matrix"].sum().backward()
    optimizer.step()
    assert sd["matrix"].ne(0).all()


def test_a_table_that_joins_adagrad_begins_as_its_others() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.Adagrad(sd.parameters(), initial_accumulator_value=0.25)
    sd.attach_optimizer(optimizer)
    sd["matrix"] = torch.zeros(2, 2)
    table = sd.table((2, 2))
    assert optimizer.state[table]["sum"].eq(0.25).all()
    assert float(optimizer.state[table]["step"]) == 0.0
    sd["matrix"].sum().backward()
    optimizer.step()
    assert optimizer.state[table]["sum"].eq(1.25).all()


class Model(nn.Module):
    """A dictionary with Parameters before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.words = SD()
        self.last = nn.Linear(3, 3)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss = self.last(self.first(self.words.gather(NAMES))).pow(2).sum()
        for name in self.words:
            loss = loss + (self.words[name] * len(name)).pow(2).sum()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("by_name", [False, True])
def test_training_goes_on_from_a_checkpoint_with_tables_that_were_made_meanwhile(by_name: bool) -> None:
    def adam(model: Model) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.named_parameters() if by_name else model.parameters(), lr=0.1)

    torch.manual_seed(0)
    model = Model()
    model.words.update(zip(NAMES, rows(), strict=True))
    optimizer = adam(model)
    model.words.attach_optimizer(optimizer)
    for size in (4, 5):
        model.step(optimizer)
        model.words[f"late.{size}"] = torch.ones(size)
        model.words[f"matrix.{size}"] = torch.ones(3, size)
    model.step(optimizer)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    resumed = Model()
    resumed.load_state_dict(state[0])
    again = adam(resumed)
    again.load_state_dict(state[1])
    resumed.words.attach_optimizer(again)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for _ in range(3):
        model.step(optimizer)
        resumed.step(again)
    for name, row in model.words.items():
        torch.testing.assert_close(resumed.words[name], row)


def test_a_dictionary_that_is_loaded_brings_its_optimizer_into_the_saved_order() -> None:
    shapes = {"a": (3,), "matrix": (2, 2), "b": (3,), "long": (5,)}

    def made(order: Sequence[str]) -> tuple[SD, torch.optim.Optimizer]:
        sd = SD([(name, torch.full(shapes[name], float(len(name)))) for name in order])
        optimizer = torch.optim.Adam([{"params": [torch.zeros(1, requires_grad=True)]}, *sd.param_groups(by={})])
        sd.attach_optimizer(optimizer)
        sum(row.pow(2).sum() for row in sd.values()).backward()
        optimizer.step()
        return sd, optimizer

    (sd, optimizer), (other, its) = made(["a", "b", "matrix"]), made(["long", "matrix", "a"])
    other.load_state_dict(sd.state_dict())
    its.load_state_dict(optimizer.state_dict())
    for key, table in sd.named_parameters():
        assert torch.equal(its.state[other.get_parameter(key)]["exp_avg"], optimizer.state[table]["exp_avg"])
    assert len(its.param_groups[1]["params"]) == 2
    other["b"] = torch.zeros(5)


# -- gradients and growth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_grows_between_two_forward_passes_and_one_backward(sparse: bool) -> None:
    sd = SD.from_tensor(NAMES[:2], torch.zeros(2, 3))
    table = sd.table((3,))
    first = sd.gather([NAMES[0]], sparse=sparse)
    second = sd.gather([NAMES[0], "new"], sparse=sparse, missing="insert")
    third = sd.gather([f"more.{n}" for n in range(9)], sparse=sparse, missing="insert")
    (first.sum() + 2 * second.sum() + 3 * third.sum()).backward()
    assert sd.table((3,)) is table
    assert {name: float(gradient[0]) for name, gradient in sd.named_grads()} == {
        NAMES[0]: 3.0,
        **({} if sparse else {NAMES[1]: 0.0}),
        "new": 2.0,
        **{f"more.{n}": 3.0 for n in range(9)},
    }


@pytest.mark.parametrize("first", [False, True])
def test_sparse_and_dense_gradients_add_up_though_the_table_grows_between(first: bool) -> None:
    sd = SD.from_tensor(NAMES[:2], torch.zeros(2, 3))
    sd.gather([NAMES[0]], sparse=first).sum().backward()
    before = sd.gather(NAMES[:2], sparse=not first).sum()
    sd.reserve(2)
    before.backward()
    assert sd.table((3,)).grad.to_dense()[:, 0].tolist() == [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_follow_their_names(sparse: bool) -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    weights = torch.arange(1.0, 7.0)[:, None]
    (sd.gather(NAMES, sparse=sparse) * weights).sum().backward()
    expected = {name: float(weight) for name, weight in zip(NAMES, weights, strict=True)}

    def check() -> None:
        found = {name: float(gradient[0]) for name, gradient in sd.named_grads()}
        assert {name: value for name, value in found.items() if value} == expected
        # Nor is there any in rows that are free.
        assert float(sd.table((3,)).grad.to_dense().sum()) == 3 * sum(expected.values())

    sd.reserve(20)
    check()
    sd.pop(NAMES[1])
    del expected[NAMES[1]]
    check()
    sd.drop(NAMES[2:4])
    del expected[NAMES[2]], expected[NAMES[3]]
    check()
    sd["new"] = torch.zeros(3)  # in an old row
    check()
    sd.compact()
    check()
    total = torch.tensor(list(expected.values())).pow(2).sum() * 3
    assert nn.utils.get_total_norm([sd.table((3,)).grad.to_dense()]) == pytest.approx(float(total.sqrt()))


def test_a_failure_to_allocate_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(NAMES).sum().backward()
    optimizer.step()
    table = sd.table((3,))
    before = table.detach().clone(), table.grad.clone(), optimizer.state[table]["exp_avg"].clone()
    allocate = Tensor.new_empty
    for allowed in range(4):
        calls = 0

        def failing(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > allowed:  # noqa: B023  # used in this turn only
                raise torch.OutOfMemoryError("no memory")
            return allocate(self, *arguments, **keywords)

        monkeypatch.setattr(Tensor, "new_empty", failing)
        with pytest.raises(torch.OutOfMemoryError):
            sd.update([("new.0", torch.zeros(3)), ("new.1", torch.zeros(7)), (NAMES[0], torch.zeros(3))])
        monkeypatch.undo()
        assert list(sd) == NAMES
        assert [name for name, _ in sd.named_parameters()] == ["float32_3"]
        assert len(optimizer.param_groups[0]["params"]) == 1
        for now, then in zip((table, table.grad, optimizer.state[table]["exp_avg"]), before, strict=True):
            assert torch.equal(now, then)
    sd["new"] = torch.zeros(3)
    assert len(sd) == 7


# -- freezing and groups -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")
@pytest.mark.parametrize("sparse", [False, True])
def test_frozen_names_stay_as_they_are_wherever_their_rows_go(sparse: bool) -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    optimizer = torch.optim.SparseAdam(sd.parameters()) if sparse else torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    frozen = [NAMES[1], NAMES[4]]
    for step in range(8):
        if step == 2:
            sd.freeze(frozen)
            held = sd.gather(frozen).detach().clone()
        if step == 4:
            sd.pop(NAMES[0])
            sd.compact()
        if step == 6:
            sd.gather([f"new.{n}" for n in range(20)], missing="insert")
        before = sd.gather(NAMES[2:4]).detach().clone()
        optimizer.zero_grad()
        sd.gather(NAMES[1:], sparse=sparse).pow(2).sum().backward()
        optimizer.step()
        assert sd.gather(NAMES[2:4]).ne(before).all()
    assert torch.equal(sd.gather(frozen), held)
    sd.pop(frozen[0])
    sd["fresh"] = torch.ones(3)  # in the row of a frozen name
    sd.unfreeze([frozen[1]])
    optimizer.zero_grad()
    sd.gather(["fresh", frozen[1]], sparse=sparse).sum().backward()
    optimizer.step()
    assert sd["fresh"].ne(1).all()
    assert sd[frozen[1]].ne(held[1]).all()


def test_frozen_names_stay_frozen_while_their_table_is_not_trained_and_when_they_change_the_table() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    sd.requires_grad_(False)
    sd.freeze([NAMES[1], NAMES[2]])
    assert not sd.table((3,), requires_grad=False).requires_grad
    sd.requires_grad_()
    sd.param_groups(by={r"[12]$": {}, r"[34]$": {}})
    sd.gather(NAMES).sum().backward()
    found = {name: float(gradient.sum()) for name, gradient in sd.named_grads()}
    assert found == {name: 0.0 if name in NAMES[1:3] else 3.0 for name in NAMES}
    sd.pop(NAMES[1])
    sd["x1"] = torch.zeros(3)  # in the row of a frozen name
    sd.gather(["x1", NAMES[2]]).sum().backward()
    found = {name: float(gradient.sum()) for name, gradient in sd.named_grads()}
    assert (found["x1"], found[NAMES[2]]) == (3.0, 0.0)


def test_groups_that_fail_midway_leave_no_trace() -> None:
    failures = 0
    while True:
        sd = SD.from_tensor(NAMES, rows().clone())
        try:
            with NoMemory(failures):
                sd.param_groups(by={"1$": {}, "2$": {}})
            break
        except torch.OutOfMemoryError:
            failures += 1
        assert [name for name, _ in sd.named_parameters()] == ["float32_3"]
        assert sd.indices(NAMES).tolist() == list(range(6))
        sd["new.1"] = torch.ones(3)
        assert sd.indices([*NAMES, "new.1"]).tolist() == list(range(7))
        torch.testing.assert_close(sd.gather(NAMES), rows())
    assert failures > 4, "two tables, their rows and what is gathered for them"
    assert [len(table) for table in sd.parameters()] == [6, 1, 1]


def test_the_state_of_an_attached_optimizer_moves_to_the_tables_of_groups() -> None:
    one, other = SD.from_tensor(NAMES, rows().clone()), SD.from_tensor(NAMES, rows().clone())
    optimizers = [torch.optim.Adam(sd.parameters(), lr=0.1) for sd in (one, other)]
    for sd, optimizer in zip((one, other), optimizers, strict=True):
        sd.attach_optimizer(optimizer)
    for step in range(6):
        if step == 3:
            other.pop(NAMES[0])
            one.pop(NAMES[0])
            other.param_groups(by={"[45]$": {}})
            assert len(list(other.parameters())) == 2
        for sd, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(sd.gather(NAMES[1:]), step).backward()
            optimizer.step()
    torch.testing.assert_close(one.gather(NAMES[1:]), other.gather(NAMES[1:]))


def test_groups_of_options_by_name_train_as_groups_of_parameters() -> None:
    names = [f"{n}.{kind}" for n in range(4) for kind in ("weight", "bias")]
    values = rows(count=8)
    plain = {name: nn.Parameter(row.clone()) for name, row in zip(names, values, strict=True)}
    theirs = torch.optim.AdamW(
        [
            {"params": [plain[name] for name in names if name.endswith("weight")], "weight_decay": 0.5},
            {"params": [plain[name] for name in names if name.endswith("bias")], "weight_decay": 0.0},
        ]
    )
    sd = SD(list(zip(names, values, strict=True)))
    ours = torch.optim.AdamW(sd.param_groups(by={r"bias$": {"weight_decay": 0.0}}, weight_decay=0.5))
    sd.attach_optimizer(ours)
    for step in range(10):
        for optimizer, taken in ((theirs, torch.stack(list(plain.values()))), (ours, sd.gather(names))):
            optimizer.zero_grad()
            loss_of(taken, step).backward()
            optimizer.step()
    torch.testing.assert_close(sd.gather(names), torch.stack(list(plain.values())))
    sd["late.bias"] = torch.ones(3)
    sd["tall.bias"] = torch.ones(4)
    sd["tall.weight"] = torch.ones(4)
    decay = {id(table): group["weight_decay"] for group in ours.param_groups for table in group["params"]}
    tables = {name: id(sd[name]._base) for name in sd}
    assert {name: decay[table] for name, table in tables.items()} == {
        name: 0.0 if name.endswith("bias") else 0.5 for name in sd
    }
    assert list(sd) == [*names, "late.bias", "tall.bias", "tall.weight"]


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_two_passes_add_up_in_a_table_with_frozen_names_and_in_one_that_has_grown(sparse: bool) -> None:
    frozen, grown = SD.from_tensor(NAMES, rows().clone()), SD.from_tensor(NAMES, rows().clone())
    frozen.freeze(NAMES[:1])
    grown["new"] = torch.zeros(3)
    for sd in (frozen, grown):
        for _ in range(2):
            sd.gather(NAMES, sparse=sparse).sum().backward()
        assert dict(sd.named_grads())[NAMES[1]].tolist() == [2.0, 2.0, 2.0]


def test_gradients_of_names_that_move_to_another_group_are_dropped() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    sd.gather(NAMES).sum().backward()
    sd.param_groups(by={"0$": {}})
    moved = [name for name in NAMES if name.endswith("0")]
    assert 0 < len(moved) < len(NAMES)
    total = nn.utils.get_total_norm([table.grad for table in sd.parameters() if table.grad is not None])
    assert total == pytest.approx(((len(NAMES) - len(moved)) * 3) ** 0.5), "a row that belongs to nobody has a gradient"


def test_norms_are_those_of_the_entries_in_order() -> None:
    counts = nn.Parameter(torch.tensor([6, 8]), requires_grad=False)
    assert SD([("counts", counts), ("none", torch.zeros(0)), ("a", torch.ones(1))]).norms().tolist() == [10.0, 0.0, 1.0]
    sd = SD([("a", torch.tensor([3.0, 4.0])), ("m", torch.full((2, 2), 2.0)), ("b", torch.tensor([0.0, 1.0]))])
    assert sd.norms().tolist() == [5.0, 4.0, 1.0]
    assert sd.norms(p=1).tolist() == [7.0, 8.0, 1.0]
    assert SD().norms().tolist() == []


# -- the rest of torch -------------------------------------------------------------------------------------------------


def test_gradients_of_a_name_that_is_listed_twice_add_up() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    for sparse in (False, True):
        sd.zero_grad()
        sd.gather([NAMES[1], NAMES[3], NAMES[1]], sparse=sparse).sum().backward()
        found = {name: float(gradient[0]) for name, gradient in sd.named_grads() if gradient.any()}
        assert found == {NAMES[1]: 2.0, NAMES[3]: 1.0}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_complex_entries_have_gradients(shape: tuple[int, ...], sparse: bool) -> None:
    sd = SD([(name, torch.full(shape, 1j)) for name in NAMES[:3]])
    sd.gather([NAMES[1], NAMES[1], "new"], missing="insert", sparse=sparse).abs().sum().backward()
    found = {name: gradient.flatten()[0].item() for name, gradient in sd.named_grads()}
    assert found[NAMES[1]] == 2j
    assert sd.norms()[0] == torch.ones(shape).norm()


def test_trainable_and_frozen_entries_are_gathered_together() -> None:
    sd = SD(
        [("a", torch.ones(2)), ("f", nn.Parameter(torch.full((2,), 2.0), requires_grad=False)), ("b", torch.ones(2))]
    )
    gathered = sd.gather(["f", "b", "none", "a", "f"], missing="zero")
    assert gathered[:, 0].tolist() == [2.0, 1.0, 0.0, 1.0, 2.0]
    (gathered * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    assert {name: float(gradient[0]) for name, gradient in sd.named_grads()} == {"a": 4.0, "b": 2.0}


def test_a_step_that_takes_row_ids_compiles_as_one_graph() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())

    def step(ids: Tensor) -> Tensor:
        return embedding(ids, sd.table((3,))).tanh().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ids = sd.indices([NAMES[2], NAMES[2], NAMES[5]])
    torch.testing.assert_close(compiled(ids), step(ids))
    compiled(ids).backward()
    assert sd.table((3,)).grad[2].ne(0).all()


def test_functional_call_replaces_tables() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = SD.from_tensor(NAMES, rows().clone())

        def forward(self, names: list[str]) -> Tensor:
            return self.words.gather(names).sum()

    model = Model()
    other = {"words.float32_3": torch.ones(6, 3, requires_grad=True)}
    result = torch.func.functional_call(model, other, (NAMES[:2],))
    assert float(result.detach()) == 6.0
    result.backward()
    assert other["words.float32_3"].grad[:2].eq(1).all()


def test_threads_insert_gather_and_remove_at_once() -> None:
    sd = SD.from_tensor(NAMES, rows().clone())
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(40):
                mine = [f"{number}.{turn}.{n}" for n in range(5)]
                sd.scatter(mine, torch.full((5, 3), float(number)), missing="insert")
                assert sd.gather(mine).eq(number).all()
                sd.drop(mine[:3])
                if turn % 10 == number:
                    sd.compact()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(sd) == 6 + 4 * 40 * 2
    torch.testing.assert_close(sd.gather(NAMES), rows())
    assert all(row[0].item() == float(name.split(".")[0]) for name, row in sd.items() if name not in NAMES)


def test_a_new_table_joins_one_of_two_optimizers() -> None:
    sd = SD({"a": torch.zeros(2), "b": torch.zeros(3)})
    one, other = (torch.optim.SGD([sd.table(shape)], lr=1.0) for shape in ((2,), (3,)))
    sd.attach_optimizer(one)
    sd.attach_optimizer(other)
    sd["c"] = torch.zeros(4)
    sd["c"].sum().backward()
    one.step()
    other.step()
    assert sd["c"].tolist() == [-1.0] * 4


def test_a_new_table_joins_the_optimizer_of_its_pattern() -> None:
    sd = SD({"a.w": torch.zeros(2), "a.b": torch.zeros(2)})
    groups = sd.param_groups(by={r"b$": {"lr": 0.1}}, lr=1.0)
    one, other = (torch.optim.SGD([group]) for group in groups)
    sd.attach_optimizer(one)
    sd.attach_optimizer(other)
    sd["c.b"], sd["c.w"] = torch.zeros(3), torch.zeros(3)
    (sd["c.b"].sum() + sd["c.w"].sum()).backward()
    one.step()
    other.step()
    assert torch.allclose(sd["c.b"], torch.full((3,), -0.1))
    assert sd["c.w"].tolist() == [-1.0] * 3


def test_a_new_table_joins_all_optimizers_that_have_the_same_tables() -> None:
    sd = SD({"a": torch.zeros(2)})
    optimizers = [torch.optim.SGD(sd.parameters(), lr=1.0) for _ in range(2)]
    for optimizer in optimizers:
        sd.attach_optimizer(optimizer)
    sd["c"] = torch.zeros(4)
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in optimizers] == [2, 2]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("pops", [True, False], ids=["reused", "grown"])
def test_an_optimizer_that_was_copied_with_the_dictionary_is_noticed(duplicate: Any, pops: bool) -> None:
    sd = SD.from_tensor(list("abcd"), torch.zeros(4, 2))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(list("abcd")).sum().backward()
    optimizer.step()
    copied, its_optimizer = duplicate((sd, optimizer))
    if pops:
        copied.pop("a")
    with pytest.raises(RuntimeError, match="Call attach"):
        copied["new"] = torch.zeros(2)
    copied.attach_optimizer(its_optimizer)
    copied["new"] = torch.ones(2)
    assert its_optimizer.state[copied.table((2,))]["exp_avg"][copied.indices(["new"])].tolist() == [[0.0, 0.0]]


def test_gradients_by_name_are_not_mixed_up_by_rows_that_move_meanwhile() -> None:
    sd = SD.from_tensor(list("abcd"), torch.zeros(4, 2))
    sd.drop(["a"])
    sd.gather(["b", "c", "d"]).sum().backward()
    gradients = sd.named_grads()
    next(gradients)
    sd.compact()
    with pytest.raises(RuntimeError, match="moved during iteration"):
        next(gradients)


@pytest.mark.parametrize("options", [0.1, None, [("lr", 0.1)]])
def test_options_that_are_no_mapping_are_refused(options: Any) -> None:
    sd = SD({"a": torch.zeros(2)})
    with pytest.raises(TypeError, match=r"expected a mapping of options for 'a', got (float|NoneType|list)"):
        sd.param_groups(by={"a": options})
