"""``pdrs.ParameterDict`` beside ``torch.nn.ParameterDict``, and a plain dict where that is a floor."""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch.nn import Parameter

import pdrs
from loops import (
    contains_each,
    drain_by_pop,
    drain_by_popitem,
    get_each,
    pop_each,
    popitem_last,
    set_each,
    sweep,
)
from measure import Case, Claim, Suite, Target, Task, own, timed
from memory import bytes_per_entry, names_of

FLOATS = 16
HOT_CALLS = 200_000
POPPED_AT_MOST = 100_000
# Where popping from the front of torch's takes seconds.
DRAINED_AT_MOST = 80_000

CONTAINERS: dict[str, Callable[..., Any]] = {
    "dict": dict,
    "torch": torch.nn.ParameterDict,
    "pdrs": pdrs.ParameterDict,
}
MODULES = ("torch", "pdrs")


class Data:
    """Names and Parameters of one size, which all containers share."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.names = names_of(entries)
        self.rows = torch.randn(entries, FLOATS)
        self.parameters = [Parameter(row.clone()) for row in self.rows]
        self.shuffled = random.Random(0).sample(self.names, entries)
        self._built: dict[str, Any] = {}

    @cached_property
    def ordered(self) -> OrderedDict[str, Parameter]:
        """What containers are built from: their order is that of the names."""
        return OrderedDict(zip(self.names, self.parameters, strict=True))

    @cached_property
    def plain(self) -> dict[str, Parameter]:
        """The same as a dict, whose names happen to be sorted."""
        return dict(self.ordered)

    @cached_property
    def plain_shuffled(self) -> dict[str, Parameter]:
        """The same as a dict whose names are not sorted."""
        return {name: self.ordered[name] for name in self.shuffled}

    @cached_property
    def saved(self) -> dict[str, torch.Tensor]:
        """A state dict: other tensors under the same names."""
        return {name: parameter.detach().clone() for name, parameter in self.ordered.items()}

    @cached_property
    def named_rows(self) -> list[tuple[str, torch.Tensor]]:
        """Names and the rows of one tensor, which are not yet Parameters."""
        return list(zip(self.names, self.rows.unbind(), strict=True))

    def new(self, subject: str) -> Any:
        """Build a container to change."""
        return CONTAINERS[subject](self.ordered)

    def shared(self, subject: str) -> Any:
        """Return a container to read."""
        if subject not in self._built:
            self._built[subject] = self.new(subject)
        return self._built[subject]

    def is_last(self, value: Any) -> bool:
        """Whether a sweep ended with the last Parameter."""
        return value is self.parameters[-1]

    def is_whole(self, container: Any) -> bool:
        """Whether a container has all names in order."""
        return list(container) == self.names

    def task(self, run: Callable[[], Any], holds: Callable[[Any], bool], operations: int | None = None) -> Task:
        """Make a task of one operation an entry, unless told otherwise."""
        return Task(run, self.entries if operations is None else operations, holds)


def _build_plain(subject: str, data: Data) -> Task:
    source = data.plain
    return data.task(lambda: CONTAINERS[subject](source), data.is_whole)


def _build_ordered(subject: str, data: Data) -> Task:
    source = data.ordered
    return data.task(lambda: CONTAINERS[subject](source), data.is_whole)


def _build_shuffled(subject: str, data: Data) -> Task:
    source = data.plain_shuffled
    if subject == "dict":
        return data.task(lambda: {name: source[name] for name in sorted(source)}, data.is_whole)
    return data.task(lambda: CONTAINERS[subject](source), data.is_whole)


def _build_rows(subject: str, data: Data) -> Task:
    pairs = data.named_rows
    if subject == "dict":
        return data.task(lambda: {name: Parameter(row) for name, row in pairs}, data.is_whole)
    return data.task(lambda: CONTAINERS[subject](pairs), data.is_whole)


def _set_each(subject: str, data: Data) -> Task:
    return data.task(own(set_each, CONTAINERS[subject](), data.names, data.parameters), data.is_whole)


def _get_hot(subject: str, data: Data) -> Task:
    name, parameter = data.names[data.entries // 2], data.parameters[data.entries // 2]
    run = own(get_each, data.shared(subject), repeat(name, HOT_CALLS))
    return data.task(run, lambda got: got is parameter, HOT_CALLS)


def _get_random(subject: str, data: Data) -> Task:
    last = data.ordered[data.shuffled[-1]]
    return data.task(own(get_each, data.shared(subject), data.shuffled), lambda got: got is last)


def _get_fresh(subject: str, data: Data) -> Task:
    last = data.ordered[data.shuffled[-1]]
    return data.task(own(get_each, data.shared(subject), fresh(data.shuffled)), lambda got: got is last)


def _contains_hot(subject: str, data: Data) -> Task:
    name = data.names[data.entries // 2]
    return data.task(own(contains_each, data.shared(subject), repeat(name, HOT_CALLS)), bool, HOT_CALLS)


def _contains_random(subject: str, data: Data) -> Task:
    return data.task(own(contains_each, data.shared(subject), data.shuffled), bool)


def _keys(subject: str, data: Data) -> Task:
    return data.task(own(sweep, data.shared(subject).keys), lambda last: last == data.names[-1])


def _values(subject: str, data: Data) -> Task:
    return data.task(own(sweep, data.shared(subject).values), data.is_last)


def _items(subject: str, data: Data) -> Task:
    return data.task(own(sweep, data.shared(subject).items), lambda last: data.is_last(last[1]))


def _pop_random(subject: str, data: Data) -> Task:
    count = min(data.entries, POPPED_AT_MOST)
    run = own(pop_each, data.new(subject), data.shuffled[:count])
    return data.task(run, lambda left: len(left) == data.entries - count, count)


def _popitem_last(subject: str, data: Data) -> Task:
    count = min(data.entries, POPPED_AT_MOST)
    run = own(popitem_last, data.new(subject), count)
    return data.task(run, lambda left: list(left) == data.names[: data.entries - count], count)


def _drain(subject: str, data: Data) -> Task:
    loop = drain_by_popitem if subject == "pdrs" else drain_by_pop
    return data.task(own(loop, data.new(subject)), lambda left: not len(left))


def _drain_by_pop(subject: str, data: Data) -> Task:
    return data.task(own(drain_by_pop, data.new(subject)), lambda left: not len(left))


def _copy(subject: str, data: Data) -> Task:
    return data.task(data.shared(subject).copy, data.is_whole)


def _deepcopy(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    return data.task(lambda: copy.deepcopy(container), data.is_whole)


def _repr(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    return data.task(lambda: repr(container), lambda text: data.names[0] in text and data.names[-1] in text)


def _named_parameters(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    named: Callable[[], Iterable[Any]] = container.items if subject == "dict" else container.named_parameters
    return data.task(own(sweep, named), lambda last: data.is_last(last[1]))


def _state_dict(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    if subject == "dict":
        return data.task(lambda: {name: each.detach() for name, each in container.items()}, data.is_whole)
    return data.task(container.state_dict, data.is_whole)


def _load_state_dict(subject: str, data: Data) -> Task:
    container, saved = data.shared(subject), data.saved
    return data.task(lambda: container.load_state_dict(saved), lambda result: result == ([], []))


def _load_state_dict_of_model(subject: str, data: Data) -> Task:
    model = torch.nn.ModuleDict({"weights": data.shared(subject)})
    saved = {f"weights.{name}": tensor for name, tensor in data.saved.items()}
    return data.task(lambda: model.load_state_dict(saved), lambda result: result == ([], []))


def _pickle(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    return data.task(lambda: pickle.loads(pickle.dumps(container)), data.is_whole)


def _zero_grad(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    gradient = torch.zeros(FLOATS)
    for parameter in data.parameters:
        parameter.grad = gradient
    run = own(_forget_gradients, container) if subject == "dict" else container.zero_grad
    return data.task(run, lambda _: all(parameter.grad is None for parameter in data.parameters))


def _forget_gradients(container: dict[str, Parameter]) -> None:
    for parameter in container.values():
        parameter.grad = None


def _memory(subject: str, data: Data) -> float:
    return bytes_per_entry(f"parameter_dict/{subject}", data.entries)


def fresh(names: list[str]) -> list[str]:
    """Make equal strings that are other objects, and were never hashed."""
    return [f"{name}."[:-1] for name in names]


def _case(
    title: str,
    make_task: Callable[[str, Data], Task],
    at_least: float | None = None,
    subjects: tuple[str, ...] = (),
    most_runs: int = 5,
    note: str = "",
) -> Case[Data]:
    targets = () if at_least is None else (Target("ratio", "torch", at_least),)
    return Case(title, timed(make_task), subjects, targets, most_runs, note=note)


CASES: tuple[Case[Data], ...] = (
    _case("build from Parameters, dict", _build_plain, at_least=30, most_runs=3, note="Its names are sorted already."),
    _case("build from Parameters, OrderedDict", _build_ordered, at_least=30, most_runs=3),
    _case(
        "build from Parameters, dict in random order",
        _build_shuffled,
        most_runs=3,
        note="Both classes sort a plain dict, which is most of the time.",
    ),
    _case("build from the rows of a tensor", _build_rows, at_least=8, most_runs=3),
    _case("`pd[k] = parameter`, new keys", _set_each, most_runs=3),
    _case("`pd[k]`, same key", _get_hot, at_least=8),
    _case(
        "`pd[k]`, random",
        _get_random,
        at_least=2,
        note="All keys in random order; they are the very `str` objects.",
    ),
    _case(
        "`pd[k]`, random, new strings",
        _get_fresh,
        note="Equal `str` objects that were never hashed, as from a file.",
    ),
    _case("`k in pd`, same key", _contains_hot, at_least=1),
    _case("`k in pd`, random", _contains_random, at_least=1),
    _case("`keys()`", _keys, at_least=0.15),
    _case("`items()`", _items, at_least=10),
    _case("`values()`", _values, at_least=10),
    _case(
        "`pop(k)`, random",
        _pop_random,
        at_least=4,
        most_runs=3,
        note=f"Of {POPPED_AT_MOST:,} keys at most, and so is `popitem()`.",
    ),
    _case("`popitem()`", _popitem_last, at_least=5, most_runs=3),
    Case(
        "drain from the front",
        timed(_drain),
        targets=(Target("ratio", "torch", 60, entries=DRAINED_AT_MOST),),
        most_runs=3,
        up_to={"dict": DRAINED_AT_MOST, "torch": DRAINED_AT_MOST},
        extra_sizes=(20_000, 40_000, DRAINED_AT_MOST),
        note="`popitem(last=False)`; torch and dict have `pop(next(iter(pd)))` only, which is quadratic.",
    ),
    Case(
        "drain by `pop(next(iter(pd)))`",
        timed(_drain_by_pop),
        subjects=MODULES,
        most_runs=3,
        up_to={"torch": DRAINED_AT_MOST},
        extra_sizes=(DRAINED_AT_MOST,),
        note="The same loop for both.",
    ),
    _case("`copy()`", _copy, at_least=20, most_runs=3),
    _case("`copy.deepcopy`", _deepcopy, at_least=6, most_runs=1),
    _case(
        "`pickle.dumps` and `loads`",
        _pickle,
        at_least=10,
        subjects=MODULES,
        most_runs=1,
        note="torch's class writes a million storages, each as a file of its own.",
    ),
    _case(
        "`repr`",
        _repr,
        at_least=100,
        subjects=MODULES,
        most_runs=3,
        note="torch's has a line an entry; ours shows the first and the last ten of more than 100.",
    ),
    _case("`named_parameters()`", _named_parameters, at_least=1),
    _case("`state_dict()`", _state_dict, at_least=1.3),
    _case("`load_state_dict`", _load_state_dict, at_least=10, subjects=MODULES, most_runs=3),
    _case(
        "`load_state_dict` of a model",
        _load_state_dict_of_model,
        subjects=MODULES,
        most_runs=3,
        note="The model has the ParameterDict as a child; torch copies the state dict twice on the way to it.",
    ),
    _case("`zero_grad()`", _zero_grad, note="Every Parameter has a gradient."),
    Case(
        "memory",
        _memory,
        targets=(Target("beyond", "torch", 50),),
        once=True,
        unit="B",
        note=(
            "Bytes beyond the names and Parameters themselves, built from an OrderedDict: the C allocator's own count"
            " (`mallinfo2`), in a process of its own. torch's `setattr` also enters every name in Python's table of"
            " interned strings, which is counted."
        ),
    ),
)

SUITE = Suite(
    name="parameter_dict",
    title="ParameterDict",
    subjects=("dict", "torch", "pdrs"),
    baselines=("torch",),
    cases=CASES,
    make_data=Data,
    intro=f"`pdrs.ParameterDict` beside `torch.nn.ParameterDict`, and a plain `dict` as the floor. "
    f"Entries are Parameters of {FLOATS} float32; names have 14 characters.",
    marker="benchmark-parameter-dict",
    claims=(Claim("`load_state_dict`", "`load_state_dict` of a ParameterDict", apart="torch"),),
)
