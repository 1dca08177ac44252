"""State of optimizers that is no row of zeros: it is carried rightly, or refused.

The bugs that this hunts: a new name that begins with zeros where its optimizer begins with the value; state in a dict,
a list, an object or beside the state, which goes on belonging to the name that had the row before; a tensor that has
the shape of a table and is something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, Adagrad, Optimizer, Rprop

import pdrs

SD = pdrs.StackedParameterDict
VALUE = torch.tensor([5.0, 6.0, 7.0, 8.0])


class Of(Optimizer):
    """Gradient descent beside a state that ``begin`` makes of a parameter."""

    begin: Callable[[Tensor], Any]
    place = "state"

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.kept: Any = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                made = type(self).begin
                if self.place == "state":
                    self.state[p].setdefault("z", made(p)) if "z" not in self.state[p] else None
                elif self.place == "whole":
                    self.state.setdefault(p, made(p))
                elif self.place == "group":
                    group.setdefault("kept", made(p))
                elif self.place == "other key":
                    self.state["kept"] = {id(p): made(p)}  # type: ignore[index]
                else:
                    self.kept.setdefault(id(p), made(p))
                p.sub_(p.grad, alpha=group["lr"])


def optimizer(begin: Callable[[Tensor], Any], place: str = "state") -> type[Of]:
    return type("Made", (Of,), {"begin": staticmethod(begin), "place": place})


def trained(kind: Callable[[Any], Optimizer], *, attach: bool = True, **begins: Any) -> tuple[SD, Optimizer]:
    torch.manual_seed(0)
    sd = SD.from_tensor([f"n{n}" for n in range(8)], torch.randn(8, 4))
    made = kind(sd.parameters())
    if attach:
        sd.attach_optimizer(made, **begins)
    for _ in range(3):
        made.zero_grad()
        (sd.gather(list(sd)) - 3).pow(2).sum().backward()
        made.step()
    return sd, made


CHANGES: dict[str, Callable[[SD], Any]] = {
    "grows": lambda sd: sd.__setitem__("new", VALUE),
    "is given again": lambda sd: (sd.drop(["n2"]), sd.__setitem__("new", VALUE)),
    "is popped and given again": lambda sd: (sd.pop("n2"), sd.update({"new": VALUE, "newer": VALUE})),
    "is inserted by gather": lambda sd: (
        sd.drop(["n2"]),
        sd.gather(["new"], missing="insert", init=lambda new: new.copy_(VALUE)),
    ),
    "is scattered": lambda sd: (sd.drop(["n2"]), sd.scatter(["new"], VALUE[None], missing="insert")),
    "is compacted before": lambda sd: (sd.drop(["n2"]), sd.compact(), sd.__setitem__("new", VALUE)),
}

BEGINS: dict[str, tuple[Callable[[Any], Optimizer], str, Tensor]] = {
    "zeros": (optimizer(torch.zeros_like), "z", torch.zeros(4)),
    "a number": (optimizer(lambda p: torch.full_like(p, 0.25)), "z", torch.full((4,), 0.25)),
    "the value": (optimizer(torch.clone), "z", VALUE),
    "the value, filled later": (optimizer(lambda p: torch.empty_like(p).copy_(p)), "z", VALUE),
    "the value in double": (optimizer(lambda p: p.double()), "z", VALUE.double()),
    "a number a row": (optimizer(lambda p: torch.full((len(p), 1), 2.0)), "z", torch.tensor([2.0])),
    "Adagrad": (lambda p: Adagrad(p, initial_accumulator_value=0.5), "sum", torch.full((4,), 0.5)),
    "Rprop": (lambda p: Rprop(p, lr=0.125), "step_size", torch.full((4,), 0.125)),
    "ASGD": (ASGD, "ax", VALUE),
}


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")  # ASGD decays all rows
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("begin", BEGINS)
def test_state_begins_for_a_new_name_as_for_a_new_parameter(begin: str, change: str) -> None:
    kind, key, expected = BEGINS[begin]
    sd, made = trained(kind)
    other = made.state[sd.table((4,))][key][sd.indices(["n5"])[0]].clone()
    CHANGES[change](sd)
    state = made.state[sd.table((4,))][key]
    assert torch.equal(state[sd.indices(["new"])[0]], expected)
    assert torch.equal(state[sd.indices(["n5"])[0]], other)
    assert len(state) == len(sd.table((4,)))
    made.zero_grad()
    sd.gather(["new"]).sum().backward()
    made.step()


@dataclass
class Box:
    """An object with a tensor."""

    held: Tensor


class Slots:
    """The same without a dict."""

    __slots__ = ("held",)

    def __init__(self, held: Tensor) -> None:
        self.held = held


class Quantized(torch.Tensor):
    """A tensor whose rows cannot be written."""


REFUSED: dict[str, Callable[[Any], Optimizer]] = {
    "a dict": optimizer(lambda p: {0.9: torch.zeros_like(p)}),
    "a dict of lists": optimizer(lambda p: {"a": [torch.zeros_like(p)]}),
    "a list of lists": optimizer(lambda p: [[torch.zeros_like(p)]]),
    "a tuple": optimizer(lambda p: (torch.zeros_like(p),)),
    "a deque": optimizer(lambda p: deque([torch.zeros_like(p)])),
    "an object": optimizer(lambda p: Box(torch.zeros_like(p))),
    "an object with slots": optimizer(lambda p: Slots(torch.zeros_like(p))),
    "an array": optimizer(lambda p: torch.zeros_like(p).numpy()),
    "a subclass": optimizer(lambda p: torch.zeros_like(p).as_subclass(Quantized)),
    "flat": optimizer(lambda p: torch.zeros(p.numel())),
    "columns": optimizer(lambda p: torch.zeros(p.shape[1])),
    "an object for all": optimizer(lambda p: Box(torch.zeros_like(p)), "whole"),
    "a list for all": optimizer(lambda p: [torch.zeros_like(p)], "whole"),
    "in the group": optimizer(torch.zeros_like, "group"),
    "under another key": optimizer(torch.zeros_like, "other key"),
    "beside the state": optimizer(torch.zeros_like, "beside"),
    "random": optimizer(torch.rand_like),
    "a function of the value": optimizer(torch.abs),
}


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("change", ["grows", "is given again", "is scattered"])
@pytest.mark.parametrize("what", REFUSED)
def test_state_that_cannot_follow_is_refused(what: str, change: str, attach: bool) -> None:
    sd, _ = trained(REFUSED[what], attach=attach)
    with pytest.raises(RuntimeError, match=r"cannot follow|cannot be moved|cannot tell|attach"):
        CHANGES[change](sd)
    assert "new" not in sd


def test_a_square_matrix_of_columns_is_not_taken_for_rows() -> None:
    sd = SD.from_tensor(list("abcd"), torch.ones(4, 4))
    made = optimizer(lambda p: torch.zeros(p.shape[1], p.shape[1]))(sd.parameters())
    sd.attach_optimizer(made)
    sd.gather(["a"]).sum().backward()
    made.step()
    with pytest.raises(RuntimeError, match=r"cannot follow|not a row"):
        sd["new"] = torch.ones(4)


class Asking(Of):
    """One that cannot be made of its options alone."""

    begin = staticmethod(torch.clone)

    def __init__(self, params: Any, secret: object) -> None:
        super().__init__(params)


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_told_is_refused_until_the_user_says_it(change: str) -> None:
    sd, _ = trained(lambda params: Asking(params, None))
    with pytest.raises(
        RuntimeError, match=r'attach_optimizer\(optimizer, initial_state=\{"z": "value"|initial_state=\{"z": 0.0\}'
    ):
        CHANGES[change](sd)
    sd, made = trained(lambda params: Asking(params, None), initial_state={"z": "value"})
    CHANGES[change](sd)
    assert torch.equal(made.state[sd.table((4,))]["z"][sd.indices(["new"])[0]], VALUE)


def test_what_a_user_says_is_checked() -> None:
    sd, made = trained(optimizer(torch.clone))
    with pytest.raises(ValueError, match='a number or "value"'):
        sd.attach_optimizer(made, initial_state={"z": "zeros"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="got list"):
        sd.attach_optimizer(made, initial_state={"z": [0.0]})  # type: ignore[dict-item]


def test_to_ask_an_optimizer_leaves_random_numbers_and_its_parameters_as_they_are() -> None:
    sd, _ = trained(optimizer(torch.clone))
    row, state, version = sd["n5"].clone(), torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    sd["new"] = VALUE
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sd["n5"], row)
    assert torch.are_deterministic_algorithms_enabled() == version


def test_names_that_are_loaded_into_state_that_begins_with_their_values_are_refused() -> None:
    sd, _ = trained(optimizer(torch.clone))
    before = {name: row.tolist() for name, row in sd.items()}
    with pytest.raises(RuntimeError, match="Load the dictionary first"):
        sd.load_state_dict(SD({"o": torch.ones(4)}).state_dict())
    assert {name: row.tolist() for name, row in sd.items()} == before


def test_a_frozen_name_has_state_of_its_value() -> None:
    sd, made = trained(optimizer(torch.clone))
    sd.freeze(["n3"])
    assert torch.equal(made.state[sd.table((4,))]["z"][3], sd["n3"])


def test_names_that_change_their_group_take_such_state_along() -> None:
    sd, made = trained(optimizer(torch.clone))
    before = made.state[sd.table((4,))]["z"].clone()
    sd.param_groups(by={"n[12]": {"lr": 1.0}})
    table = sd.get_parameter("float32_4_group1")
    assert torch.equal(made.state[table]["z"][:2], before[1:3])
    sd["n1.new"] = VALUE
    assert torch.equal(made.state[table]["z"][2], VALUE)


def test_rows_of_several_tables_begin_with_their_own_values() -> None:
    sd = SD({"a": torch.ones(2), "b": torch.ones(3)})
    made = optimizer(torch.clone)(sd.parameters())
    sd.attach_optimizer(made)
    (sd["a"].sum() + sd["b"].sum()).backward()
    made.step()
    sd.update({"c": torch.full((2,), 4.0), "d": torch.full((3,), 5.0), "e": nn.Parameter(torch.full((2,), 6.0))})
    states = [made.state[table]["z"] for table in sd.parameters()]
    assert states[0][1:3].tolist() == [[4.0, 4.0], [6.0, 6.0]]
    assert states[1][1].tolist() == [5.0] * 3
