"""Random training with ``pdrs.optim``, against one Parameter and one optimizer of torch for each name.

The bugs that this hunts: two operations that are right alone and wrong one after the other: a name that finds the
moments, the count of steps or the sum of the one that had its row; a state that stays behind where rows move, where a
table grows or another joins, or where a checkpoint is loaded.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import pdrs
from observed import assert_consistent

SD = pdrs.StackedParameterDict
NAMES = st.sampled_from([*"abcdefgh", "x" * 300, "名前"])
BATCHES = st.lists(NAMES, max_size=10)
SHAPES = [(2,), (2, 1), ()]
VALUES = st.integers(1, 9)


class RowWise:
    """The model of RowWiseAdagrad: with the interface of an optimizer of one parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        (self.parameter,) = parameters
        self.state = {self.parameter: {"sum": torch.tensor(0.25, dtype=torch.float64)}}

    def step(self) -> None:
        gradient, total = self.parameter.grad, self.state[self.parameter]["sum"]
        assert gradient is not None
        total += gradient.square().mean()
        with torch.no_grad():
            self.parameter -= 0.1 * gradient / (total.sqrt() + 1e-3)


# Ours; that of each name; and for each state of ours what it is called there, and begins with.
Kind = tuple[Callable[[Any], Any], Callable[[Any], Any], dict[str, tuple[str, float]]]
KINDS: dict[str, Kind] = {
    "Adam": (
        lambda p: pdrs.optim.Adam(p, lr=0.1, weight_decay=0.1, per_row_steps=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        {"exp_avg": ("exp_avg", 0.0), "exp_avg_sq": ("exp_avg_sq", 0.0), "row_steps": ("step", 0.0)},
    ),
    "Adagrad": (
        lambda p: pdrs.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25),
        {"sum": ("sum", 0.25)},
    ),
    "SGD": (lambda p: pdrs.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1), {}),
    "SGD with momentum": (
        lambda p: pdrs.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
        {"momentum_buffer": ("momentum_buffer", 0.0)},
    ),
    "RowWiseAdagrad": (
        lambda p: pdrs.optim.RowWiseAdagrad(p, lr=0.1, eps=1e-3, initial_accumulator_value=0.25),
        RowWise,
        {"sum": ("sum", 0.25)},
    ),
}


class Trained(RuleBasedStateMachine):
    """A StackedParameterDict with an optimizer by row, and for each name what it must be."""

    @initialize(kind=st.sampled_from(list(KINDS)), names=st.lists(NAMES, unique=True, max_size=5))
    def build(self, kind: str, names: list[str]) -> None:
        self.make, self.make_one, self.states = KINDS[kind]
        self.sd = SD([(name, torch.ones(2, dtype=torch.float64)) for name in names])
        self.sd.reserve(1, shape=(2,), dtype=torch.float64)
        self.optimizer = self.make(self.sd.parameters())
        self.model: dict[str, nn.Parameter] = {}
        self.alone: dict[str, Any] = {}
        self.frozen: set[str] = set()
        for name in names:
            self.put(name, torch.ones(2, dtype=torch.float64))

    def put(self, name: str, value: Tensor) -> None:
        held = self.model.get(name)
        if held is not None and held.shape == value.shape:
            held.data.copy_(value)
            return
        self.model[name] = nn.Parameter(value.clone())
        self.begin(name)
        self.frozen.discard(name)

    def begin(self, name: str) -> None:
        self.alone[name] = self.make_one([self.model[name]])

    def take_away(self, name: str) -> None:
        del self.model[name], self.alone[name]
        self.frozen.discard(name)

    def fitting(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self.model or self.model[name].shape == (2,)]

    # -- training ------------------------------------------------------------------------------------------------------

    @rule(batches=st.lists(BATCHES, min_size=1, max_size=2), set_to_none=st.booleans())
    def train(self, batches: list[list[str]], set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        listed = set()
        for number, batch in enumerate(batches):
            for shape in SHAPES:
                names = [name for name in batch if name in self.model and self.model[name].shape == shape]
                if not names:
                    continue
                # So small that training does not diverge: what is left of large numbers that cancel out is of no use.
                weight = torch.arange(1.0 + number, len(names) + 1 + number, dtype=torch.float64) / 10
                weight = weight.view(-1, *[1] * len(shape))
                (self.sd.gather(names) * weight).square().sum().backward()
                (torch.stack([self.model[name] for name in names]) * weight).square().sum().backward()
                listed |= set(names)
        self.optimizer.step()
        for name in listed:
            if name not in self.frozen:
                self.alone[name].step()
            self.model[name].grad = None

    @rule(names=st.sets(NAMES))
    def freeze(self, names: set[str]) -> None:
        names = names & self.model.keys()
        self.sd.freeze(list(names))
        self.frozen |= names
        for name in names:
            self.begin(name)

    @rule()
    def unfreeze(self) -> None:
        self.sd.unfreeze()
        self.frozen.clear()

    # -- names come, go and move ---------------------------------------------------------------------------------------

    @rule(name=NAMES, shape=st.sampled_from(SHAPES), value=VALUES)
    def set(self, name: str, shape: tuple[int, ...], value: int) -> None:
        self.sd[name] = torch.full(shape, float(value), dtype=torch.float64)
        self.put(name, torch.full(shape, float(value), dtype=torch.float64))

    @rule(names=BATCHES, value=VALUES)
    def gather_and_insert(self, names: list[str], value: int) -> None:
        names = self.fitting(names)
        with torch.no_grad():
            self.sd.gather(
                names,
                missing="insert",
                shape=(2,),
                dtype=torch.float64,
                init=lambda rows: torch.nn.init.constant_(rows, value),
            )
        for name in names:
            if name not in self.model:
                self.put(name, torch.full((2,), float(value), dtype=torch.float64))

    @rule(names=BATCHES, value=VALUES)
    def scatter_and_insert(self, names: list[str], value: int) -> None:
        names = self.fitting(names)
        values = torch.full((len(names), 2), float(value), dtype=torch.float64)
        self.sd.scatter(names, values, missing="insert")
        for name in names:
            self.put(name, values[0])

    @rule(names=st.sets(NAMES))
    def drop(self, names: set[str]) -> None:
        gone = [name for name in names if name in self.model]
        self.sd.drop(gone)
        for name in gone:
            self.take_away(name)

    @precondition(lambda self: self.model)
    @rule()
    def popitem(self) -> None:
        name, _ = self.sd.popitem(last=False)
        self.take_away(name)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), last=st.booleans())
    def reorder(self, data: st.DataObject, last: bool) -> None:
        self.sd.move_to_end(data.draw(st.sampled_from(list(self.model))), last)
        self.model = {name: self.model[name] for name in self.sd}

    @rule()
    def compact(self) -> None:
        self.sd.compact()

    @rule(count=st.integers(0, 40))
    def reserve(self, count: int) -> None:
        self.sd.reserve(count, shape=(2,), dtype=torch.float64)

    @rule(patterns=st.lists(st.sampled_from(["[a-d]$", "[c-f]", "x"]), unique=True))
    def regroup(self, patterns: list[str]) -> None:
        self.optimizer.zero_grad()
        self.sd.param_groups(by={pattern: {} for pattern in patterns})

    # -- copies --------------------------------------------------------------------------------------------------------

    @rule()
    def save_and_resume(self) -> None:
        file = io.BytesIO()
        torch.save((self.sd.state_dict(), self.optimizer.state_dict()), file)
        file.seek(0)
        of_rows, of_optimizer = torch.load(file, weights_only=True)
        self.sd = SD()
        self.sd.load_state_dict(of_rows)
        self.optimizer = self.make(self.sd.parameters())
        self.optimizer.load_state_dict(of_optimizer)
        self.frozen.clear()

    @rule()
    def copy_both(self) -> None:
        self.sd, self.optimizer = copy.deepcopy((self.sd, self.optimizer))

    # -- what must always hold -----------------------------------------------------------------------------------------

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert_consistent(self.sd)
        assert list(self.sd) == list(self.model)
        for name, row in self.sd.items():
            torch.testing.assert_close(row.detach(), self.model[name].detach(), rtol=1e-9, atol=1e-9)

    @invariant()
    def states_are_those_of_the_names(self) -> None:
        for name, row in self.sd.items():
            state, at = self.optimizer.state.get(row._base, {}), self.sd.indices([name])
            expected = self.alone[name].state.get(self.model[name], {})
            for key, (theirs, begin) in self.states.items():
                got = state[key][at][0].flatten() if key in state else torch.tensor([begin], dtype=torch.float64)
                wanted = torch.as_tensor(begin if expected.get(theirs) is None else expected[theirs]).double().flatten()
                assert torch.allclose(got, wanted.expand_as(got) if len(wanted) == 1 else wanted, 1e-9, 1e-9), (
                    name,
                    key,
                )


TestTrained = Trained.TestCase
TestTrained.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTrained.pytestmark = [pytest.mark.slow]
