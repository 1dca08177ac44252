"""Random operations on ours, on torch's ParameterDict and on a dict, side by side.

The bugs that this hunts: two operations that are right alone and wrong one after the other, such as a hole in the index
that a sweep trips over, an entry that is left behind when its kind changes, a copy that is still tied to its source.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn import Parameter

import pdrs

# Few names, so that they meet again; one is longer than any inline buffer, one is of wide characters.
NAMES = st.sampled_from([*"abcdefgh", "x" * 300, "名前", "Straße", "a_b"])
VALUES = st.builds(lambda number: Parameter(torch.tensor([float(number)])), st.integers(0, 99))
PAIRS = st.lists(st.tuples(NAMES, VALUES), max_size=12)


class SideBySide(RuleBasedStateMachine):
    """The same operations on three dictionaries, which then must hold the same objects in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = pdrs.ParameterDict()
        self.torchs = nn.ParameterDict()
        self.model: dict[str, Any] = {}

    @initialize(pairs=PAIRS)
    def build(self, pairs: list[tuple[str, Parameter]]) -> None:
        self.ours = pdrs.ParameterDict(pairs)
        self.torchs = nn.ParameterDict(pairs)
        self.model = dict(pairs)

    def both(self) -> tuple[pdrs.ParameterDict, nn.ParameterDict]:
        return self.ours, self.torchs

    @rule(name=NAMES, value=VALUES)
    def set(self, name: str, value: Parameter) -> None:
        for pd in self.both():
            pd[name] = value
        self.model[name] = value

    @rule(name=NAMES, value=VALUES)
    def set_as_attribute_what_is_there(self, name: str, value: Parameter) -> None:
        if name in self.model:
            for pd in self.both():
                setattr(pd, name, value)
            self.model[name] = value

    @rule(name=NAMES, value=VALUES)
    def write_past_the_class(self, name: str, value: Parameter) -> None:
        if name in self.model:
            for pd in self.both():
                pd._parameters[name] = value
            self.model[name] = value

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        for pd in self.both():
            try:
                del pd[name]
            except KeyError:
                assert name not in self.model
            else:
                assert name in self.model
        self.model.pop(name, None)

    @rule(name=NAMES)
    def pop(self, name: str) -> None:
        expected = self.model.pop(name, None)
        for pd in self.both():
            try:
                assert pd.pop(name) is expected
            except AttributeError:
                assert expected is None

    @precondition(lambda self: self.model)
    @rule()
    def popitem(self) -> None:
        expected = self.model.popitem()
        for pd in self.both():
            assert pd.popitem() == expected

    @precondition(lambda self: self.model)
    @rule()
    def take_the_first(self) -> None:
        name = next(iter(self.model))
        expected = self.model.pop(name)
        assert self.ours.popitem(last=False) == (name, expected)
        assert self.torchs.pop(name) is expected

    @rule(pairs=PAIRS, wrap=st.sampled_from([list, OrderedDict, dict, nn.ParameterDict, pdrs.ParameterDict]))
    def update(self, pairs: list[tuple[str, Parameter]], wrap: Any) -> None:
        for pd in self.both():
            pd.update(wrap(pairs))
        self.model.update(sorted(dict(pairs).items(), key=lambda pair: pair[0]) if wrap is dict else pairs)

    @rule(name=NAMES, value=VALUES)
    def setdefault(self, name: str, value: Parameter) -> None:
        expected = self.model.setdefault(name, value)
        for pd in self.both():
            assert pd.setdefault(name, value) is expected

    @rule(pairs=PAIRS)
    def union(self, pairs: list[tuple[str, Parameter]]) -> None:
        self.ours = self.ours | pdrs.ParameterDict(pairs)
        self.torchs = self.torchs | nn.ParameterDict(pairs)
        self.model = self.model | dict(pairs)

    @rule()
    def go_on_with_a_copy(self) -> None:
        old = self.both()
        self.ours, self.torchs = self.ours.copy(), self.torchs.copy()
        for pd in old:
            pd.clear()

    @rule()
    def go_on_with_a_deep_copy(self) -> None:
        self.ours, self.torchs = copy.deepcopy(self.ours), copy.deepcopy(self.torchs)
        self.adopt_equal_values()

    @rule(whole=st.booleans())
    def go_on_with_what_was_pickled(self, whole: bool) -> None:
        if whole:
            self.ours, self.torchs = (pickle.loads(pickle.dumps(pd)) for pd in self.both())
        else:
            file = io.BytesIO()
            torch.save(self.both(), file)
            file.seek(0)
            self.ours, self.torchs = torch.load(file, weights_only=False)
        self.adopt_equal_values()

    def adopt_equal_values(self) -> None:
        """Go on with torch's class holding our Parameters, which must equal its own."""
        assert list(self.ours) == list(self.torchs) == list(self.model)
        for name, value in self.ours.items():
            assert torch.equal(value, self.torchs[name])
            assert torch.equal(value, self.model[name])
            assert type(value) is Parameter
            self.torchs[name] = self.model[name] = value

    @rule()
    def load_each_others_state(self) -> None:
        state = {name: value.detach() + 1 for name, value in self.model.items()}
        for pd, other in (self.both(), self.both()[::-1]):
            pd.load_state_dict(state)
            assert list(pd.state_dict()) == list(other.state_dict()) == list(self.model)

    @rule()
    def clear(self) -> None:
        for pd in self.both():
            pd.clear()
        self.model.clear()

    @invariant()
    def all_three_hold_the_same(self) -> None:
        names, values = list(self.model), list(self.model.values())
        for pd in self.both():
            assert len(pd) == len(names)
            assert bool(pd) == bool(names)
            assert list(pd) == list(pd.keys()) == names
            assert list(reversed(pd)) == names[::-1]
            assert [name for name, _ in pd.items()] == names
            assert all(one is other for one, other in zip(pd.values(), values, strict=True))
            assert all(pd[name] is value and name in pd for name, value in self.model.items())
        assert list(map(id, reversed(self.ours.values()))) == list(map(id, reversed(values)))
        assert [name for name, _ in reversed(self.ours.items())] == names[::-1]
        assert self.ours._parameters.keys() == self.ours._keys.keys() == set(names)
        assert list(self.ours._parameters) == list(self.torchs._parameters)


TestSideBySide = SideBySide.TestCase
TestSideBySide.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
