"""Random operations on a StackedParameterDict and its optimizer, against plain dicts of numbers.

The bugs that this hunts: two operations that are right alone and wrong one after the other, above all where rows change
hands: a new name that finds the value, the gradient or the Adagrad sum of the one that had its row; a name whose sum
stays behind when rows move, tables grow, or a state dict of another size is loaded.
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pdrs
from observed import assert_consistent, frozen_names

# Few names, so that they meet again; one is longer than any inline buffer, one is of wide characters.
NAMES = st.sampled_from([*"abcdefgh", "x" * 300, "名前", "Straße", "a.b", "keys", "float32_2"])
SHAPES = st.sampled_from([(2,), (2, 1), ()])
VALUES = st.integers(1, 9)
BATCHES = st.lists(NAMES, max_size=12)
RATE, BEGIN, EPS = 0.5, 0.25, 1e-10


@dataclass
class Entry:
    """What the model knows of a name: its value and Adagrad's sum, which are equal in all elements."""

    shape: tuple[int, ...]
    value: float
    sum: float = BEGIN
    gradient: float = field(default=0.0)
    frozen: bool = False

    def step(self) -> None:
        self.sum += self.gradient**2
        self.value -= RATE * self.gradient / (np.sqrt(self.sum) + EPS)


class Stacked(RuleBasedStateMachine):
    """A StackedParameterDict with an attached optimizer, and a dict of what its entries must be."""

    def __init__(self) -> None:
        super().__init__()
        self.sd = pdrs.StackedParameterDict()
        self.model: dict[str, Entry] = {}
        self.handle: tuple[list[str], pdrs.stacked.Lookup] | None = None

    @initialize(names=st.lists(NAMES, unique=True, max_size=5))
    def build(self, names: list[str]) -> None:
        self.sd = pdrs.StackedParameterDict([(name, torch.ones(2)) for name in names])
        self.sd.reserve(1, shape=(2,))
        self.model = {name: Entry((2,), 1.0) for name in names}
        self.begin_training()

    def begin_training(self) -> None:
        self.optimizer = torch.optim.Adagrad(self.sd.parameters(), lr=RATE, initial_accumulator_value=BEGIN)
        self.sd.attach_optimizer(self.optimizer)

    def table_of(self, name: str) -> torch.Tensor:
        """Return the table of a name: where names have groups of options, there are several of one shape."""
        table: torch.Tensor = self.sd[name]._base
        return table

    def put(self, name: str, shape: tuple[int, ...], value: float) -> None:
        entry = self.model.get(name)
        if entry is None or entry.shape != shape:
            self.model[name] = Entry(shape, value)
        else:
            entry.value = value

    # -- entries come and go -------------------------------------------------------------------------------------------

    @rule(name=NAMES, shape=SHAPES, value=VALUES)
    def set(self, name: str, shape: tuple[int, ...], value: int) -> None:
        self.sd[name] = torch.full(shape, float(value))
        self.put(name, shape, value)

    @rule(names=BATCHES, shape=SHAPES, value=VALUES)
    def update(self, names: list[str], shape: tuple[int, ...], value: int) -> None:
        self.sd.update([(name, torch.full(shape, float(value + at))) for at, name in enumerate(names)])
        for name in names:
            self.put(name, shape, value + len(names) - 1 - names[::-1].index(name))

    @rule(names=BATCHES, value=VALUES)
    def gather_and_insert(self, names: list[str], value: int) -> None:
        names = [name for name in names if name not in self.model or self.model[name].shape == (2,)]
        gathered = self.sd.gather(
            names, missing="insert", shape=(2,), init=lambda rows: torch.nn.init.constant_(rows, value)
        )
        for name in names:
            if name not in self.model:
                self.model[name] = Entry((2,), value)
        assert np.allclose(gathered.detach()[:, 0].numpy(), [self.model[name].value for name in names], atol=1e-5)

    @rule(names=BATCHES, value=VALUES)
    def scatter_and_insert(self, names: list[str], value: int) -> None:
        names = [name for name in names if name not in self.model or self.model[name].shape == (2,)]
        self.sd.scatter(names, torch.full((len(names), 2), float(value)), missing="insert")
        for name in names:
            self.put(name, (2,), value)

    @rule(name=NAMES)
    def pop(self, name: str) -> None:
        entry = self.model.pop(name, None)
        popped = self.sd.pop(name, None)
        assert (popped is None) == (entry is None)
        if entry is not None:
            assert popped.shape == entry.shape
            assert np.allclose(popped.numpy(), entry.value, atol=1e-5)

    @precondition(lambda self: self.model)
    @rule(last=st.booleans())
    def popitem(self, last: bool) -> None:
        name, value = self.sd.popitem(last)
        assert name == (list(self.model)[-1] if last else next(iter(self.model)))
        assert np.allclose(value.numpy(), self.model.pop(name).value, atol=1e-5)

    @rule(names=st.sets(NAMES))
    def drop(self, names: set[str]) -> None:
        gone = [name for name in names if name in self.model]
        self.sd.drop(gone)
        for name in gone:
            del self.model[name]

    @rule()
    def clear(self) -> None:
        self.sd.clear()
        self.model.clear()

    # -- training ------------------------------------------------------------------------------------------------------

    @rule(names=BATCHES, sparse=st.booleans())
    def backward(self, names: list[str], sparse: bool) -> None:
        names = [name for name in names if name in self.model]
        loss = torch.zeros(())
        for shape in [(2,), (2, 1), ()]:
            batch = [name for name in names if self.model[name].shape == shape]
            if batch:
                loss = loss + self.sd.gather(batch, sparse=sparse).pow(2).sum() / 2
            for name in batch:
                self.model[name].gradient += 0.0 if self.model[name].frozen else self.model[name].value
        if loss.requires_grad:
            loss.backward()

    @rule()
    def step(self) -> None:
        with torch.sparse.check_sparse_tensor_invariants(False):  # torch's Adagrad does not say, which torch warns of
            self.optimizer.step()
        self.optimizer.zero_grad()
        for entry in self.model.values():
            entry.step()
            entry.gradient = 0.0

    @rule(sparse=st.booleans())
    def train_all(self, sparse: bool) -> None:
        self.backward(list(self.model), sparse)
        self.step()

    @rule(names=st.sets(NAMES))
    def freeze(self, names: set[str]) -> None:
        names = names & self.model.keys()
        self.sd.freeze(list(names))
        for name in names:
            entry = self.model[name]
            entry.frozen, entry.gradient, entry.sum = True, 0.0, BEGIN

    @rule(names=st.none() | st.sets(NAMES))
    def unfreeze(self, names: set[str] | None) -> None:
        names = None if names is None else names & self.model.keys()
        self.sd.unfreeze(None if names is None else list(names))
        for name in self.model.keys() if names is None else names:
            self.model[name].frozen = False

    @rule(patterns=st.lists(st.sampled_from(["[a-d]$", "[c-f]", "x"]), unique=True))
    def regroup(self, patterns: list[str]) -> None:
        self.optimizer.zero_grad()
        for entry in self.model.values():
            entry.gradient = 0.0
        self.sd.param_groups(by={pattern: {} for pattern in patterns})

    @rule()
    def look_which_names_are_frozen(self) -> None:
        assert frozen_names(self.sd) == {name for name, entry in self.model.items() if entry.frozen}

    @rule()
    def compact(self) -> None:
        self.sd.compact()

    @rule(count=st.integers(0, 9))
    def reserve(self, count: int) -> None:
        self.sd.reserve(count, shape=(2,), dtype=torch.float32)

    @precondition(lambda self: any(entry.shape == (2,) for entry in self.model.values()))
    @rule()
    def prepare_a_handle(self) -> None:
        names = [name for name, entry in self.model.items() if entry.shape == (2,)]
        self.handle = names, self.sd.lookup(names)

    # -- copies --------------------------------------------------------------------------------------------------------

    def go_on_with(self, sd: pdrs.StackedParameterDict, sums: bool) -> None:
        self.sd, self.handle = sd, None
        self.sd.reserve(1, shape=(2,), dtype=torch.float32)
        state = self.optimizer.state_dict()
        self.begin_training()
        if sums:
            self.optimizer.load_state_dict(state)
        for entry in self.model.values():
            entry.gradient = 0.0
            if not sums:
                entry.sum = BEGIN

    def thaw(self) -> None:
        for entry in self.model.values():
            entry.frozen = False

    @rule()
    def unstack_and_stack(self) -> None:
        self.go_on_with(self.sd.unstack().stack(), sums=False)
        self.thaw()

    @rule()
    def deep_copy(self) -> None:
        self.go_on_with(copy.deepcopy(self.sd), sums=False)

    @rule(grown=st.lists(NAMES, max_size=9))
    def save_and_load_into_another(self, grown: list[str]) -> None:
        file = io.BytesIO()
        torch.save((self.sd.state_dict(), self.optimizer.state_dict()), file)
        file.seek(0)
        state, of_optimizer = torch.load(file, weights_only=True)
        self.sd = pdrs.StackedParameterDict([(name, torch.zeros(2)) for name in grown])
        self.sd.load_state_dict(state)
        self.begin_training()
        self.optimizer.load_state_dict(of_optimizer)
        self.handle = None
        self.thaw()
        for entry in self.model.values():
            entry.gradient = 0.0

    @rule(names=st.lists(NAMES, unique=True, max_size=4))
    def load_names_into_this(self, names: list[str]) -> None:
        """Load other names: what both have keeps its sum and takes the value; the rest goes, or comes."""
        other = pdrs.StackedParameterDict([(name, torch.full((2,), 5.0)) for name in names])
        # Those of another group of options lie in another table than the loaded one.
        tables = dict(self.sd.named_parameters())
        stays = [name for name in names if name in self.model and self.table_of(name) is tables.get("float32_2")]
        self.sd.load_state_dict(other.state_dict())
        self.optimizer.zero_grad()
        old = self.model
        self.model = {}
        for name in names:
            kept = name in stays
            self.model[name] = Entry((2,), 5.0, old[name].sum if kept else BEGIN, frozen=kept and old[name].frozen)
        for entry in self.model.values():
            entry.gradient = 0.0
        self.handle = None
        self.sd.reserve(1, shape=(2,), dtype=torch.float32)

    @rule()
    def load_by_name(self) -> None:
        self.sd.load_state_dict({name: row + 1 for name, row in reversed(self.sd.named_state_dict().items())})
        for entry in self.model.values():
            entry.value += 1

    # -- what must always hold -----------------------------------------------------------------------------------------

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert list(self.sd) == list(self.model)
        assert len(self.sd) == len(self.model)
        assert list(reversed(self.sd)) == list(self.model)[::-1]
        for name, row in self.sd.items():
            entry = self.model[name]
            assert row.shape == entry.shape
            assert np.allclose(row.detach().numpy(), entry.value, atol=1e-4), name

    @invariant()
    def each_name_has_a_row_of_its_own_and_spare_rows_are_zero(self) -> None:
        for table in assert_consistent(self.sd).tables:
            assert not self.sd.get_parameter(table.attribute)[table.used :].any()

    @invariant()
    def sums_and_gradients_are_those_of_the_names(self) -> None:
        for name, entry in self.model.items():
            table = self.table_of(name)
            row = self.sd.indices([name])
            state = self.optimizer.state.get(table)
            if state:
                assert state["sum"].shape == table.shape
                assert np.allclose(state["sum"][row].numpy(), entry.sum, rtol=1e-4), name
            else:
                assert entry.sum == BEGIN
            gradient = 0.0 if table.grad is None else table.grad.to_dense()[row].numpy()
            assert np.allclose(gradient, entry.gradient, atol=1e-4), name

    @invariant()
    def a_handle_gathers_its_names(self) -> None:
        if self.handle is None:
            return
        names, handle = self.handle
        if any(name not in self.model or self.model[name].shape != (2,) for name in names):
            self.handle = None
            return
        gathered = self.sd.gather(handle).detach()[:, 0].numpy()
        assert np.allclose(gathered, [self.model[name].value for name in names], atol=1e-4)


TestStacked = Stacked.TestCase
TestStacked.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStacked.pytestmark = [pytest.mark.slow]
