"""``pdrs.StackedParameterDict`` beside torch's and tensordict's dictionaries, and beside what people write by hand."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictParams
from torch import Tensor
from torch.nn import Embedding, Parameter
from torch.nn.functional import embedding
from torch.nn.utils import clip_grad_norm_

import pdrs
from cases_parameter_dict import fresh
from loops import call_each, pop_each, popitem_last
from measure import Case, Claim, Suite, Target, Task, own, timed
from memory import bytes_per_entry, names_of

FLOATS = 16
BATCH = 4_096
BATCHES = 10
# `update` is called so many times.
UPDATES = 10
POPPED_AT_MOST = 100_000
# The most runs of what takes milliseconds, where one that is disturbed counts for much.
SHORT_RUNS = 15
# A million Parameters with the state of Adam take 10 GB and 20 seconds a step.
ADAM_AT_MOST = 100_000
# A tensordict takes its microseconds at any size.
TENSORDICT_AT_MOST = 100_000
LARGEST = 10_000_000

# What is measured up to the largest size.
FROM_NAMES, LOOKED_UP = f"{BATCH:,} random names: `gather`, `backward`", "the same, looked up before"
INSERTED, POPPED, GATHERED = "insert, at every size", "pop, at every size", "gather, at every size"
EMBEDDED = "`F.embedding`, at every size"

BY_HAND, TENSORDICT, TORCH, PDRS = "by hand", "tensordict", "torch", "pdrs"


class ByHand:
    """What people write today: a dict of ids beside an embedding."""

    def __init__(self, names: list[str], rows: Tensor) -> None:
        self.ids = {name: n for n, name in enumerate(names)}
        self.table = Embedding(len(rows), rows.shape[1], sparse=True, _weight=rows)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.ids)

    def gather(self, names: list[str]) -> Tensor:
        """Look up a batch."""
        rows: Tensor = self.table(torch.tensor([self.ids[name] for name in names]))
        return rows

    def pop(self, name: str) -> Tensor:
        """Remove a name and give its row, which stays in the table for good."""
        row: Tensor = self.table.weight[self.ids.pop(name)].detach().clone()
        return row

    def popitem(self) -> tuple[str, Tensor]:
        """Remove the last name and give it and its row."""
        name, row = self.ids.popitem()
        return name, self.table.weight[row].detach().clone()


def _tensordict(names: list[str], rows: Tensor) -> TensorDictParams:
    return TensorDictParams(TensorDict({name: Parameter(row) for name, row in zip(names, rows, strict=True)}))


BUILD: dict[str, Callable[[list[str], Tensor], Any]] = {
    BY_HAND: ByHand,
    TENSORDICT: _tensordict,
    TORCH: lambda names, rows: torch.nn.ParameterDict(zip(names, rows, strict=True)),
    PDRS: pdrs.StackedParameterDict.from_tensor,
}


class Data:
    """Names and rows of one size, which all containers share; what a case changes is its own, or put back."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.names = names_of(entries)
        self._built: dict[tuple[str, str], Any] = {}
        self._emptied: dict[tuple[str, str], tuple[Any, list[list[str]]]] = {}

    @cached_property
    def rows(self) -> Tensor:
        """The values of all entries, ``[entries, FLOATS]``."""
        return torch.randn(self.entries, FLOATS)

    @cached_property
    def updates(self) -> list[OrderedDict[str, Tensor]]:
        """All names and rows, in parts."""
        parts = np.array_split(np.arange(self.entries), UPDATES)
        views = self.rows.unbind()
        return [OrderedDict((self.names[at], views[at]) for at in part) for part in parts if len(part)]

    @cached_property
    def saved(self) -> OrderedDict[str, Tensor]:
        """The state dict of a ParameterDict, each tensor with memory of its own."""
        return OrderedDict((name, row.clone()) for name, row in zip(self.names, self.rows.unbind(), strict=True))

    @cached_property
    def ids(self) -> Tensor:
        """The numbers of random names, ``[1 + BATCHES, BATCH]``: the first batch goes ahead of the clock."""
        return torch.randint(self.entries, (1 + BATCHES, BATCH), generator=torch.Generator().manual_seed(0))

    @cached_property
    def batches(self) -> list[list[str]]:
        """The same names as other ``str`` objects, as they come out of a text."""
        return [fresh([self.names[at] for at in batch]) for batch in self.ids.tolist()]

    @cached_property
    def lookups(self) -> list[pdrs.Lookup]:
        """The same, looked up in ours; not in front of each run, which would begin with a cache full of names."""
        container = self.shared(PDRS)
        return [container.lookup(batch) for batch in self.batches]

    @cached_property
    def popped(self) -> list[str]:
        """Random names, each once."""
        chosen = torch.randperm(self.entries, generator=torch.Generator().manual_seed(1))[:POPPED_AT_MOST]
        return [self.names[at] for at in chosen.tolist()]

    def new(self, subject: str) -> Any:
        """Build a container to change."""
        return BUILD[subject](self.names, self.rows.clone())

    def shared(self, subject: str, which: str = "") -> Any:
        """Return a container to read, or one that is put back; there may be several."""
        if (subject, which) not in self._built:
            self._built[subject, which] = self.new(subject)
        return self._built[subject, which]

    def emptied(self, subject: str, which: str) -> tuple[Any, list[str]]:
        """Return a container that is emptied part by part, and some of the names to pop, whose turn it is.

        To build one takes seconds, in which a shared machine changes its pace, and to pop a part takes hundredths: so
        the containers take turns at the same pace.
        """
        container, parts = self._emptied.get((subject, which), (None, []))
        if not parts:
            container = self.new(subject)
            parts = [part.tolist() for part in np.array_split(np.array(self.popped, object), SHORT_RUNS) if len(part)]
            self._emptied[subject, which] = container, parts
        return container, parts.pop()

    def is_whole(self, container: Any) -> bool:
        """Whether a container has all names, and the last one its values."""
        if (len(list(container.keys())) if isinstance(container, TensorDictParams) else len(container)) != self.entries:
            return False
        last = container.gather(self.names[-1:])[0] if isinstance(container, ByHand) else container[self.names[-1]]
        return torch.equal(last.detach().to(torch.float32), self.rows[-1])

    def task(self, run: Callable[[], Any], holds: Callable[[Any], bool], operations: int | None = None) -> Task:
        """Make a task of one operation an entry, unless told otherwise."""
        return Task(run, self.entries if operations is None else operations, holds)


# -- coming and going --------------------------------------------------------------------------------------------------


def _from_rows(subject: str, data: Data) -> Task:
    names, rows = data.names, data.rows
    return data.task(lambda: BUILD[subject](names, rows), data.is_whole)


def _update(subject: str, data: Data) -> Task:
    container = pdrs.StackedParameterDict() if subject == PDRS else torch.nn.ParameterDict()
    updates = data.updates

    def run() -> Any:
        for part in updates:
            container.update(part)
        return container

    return data.task(run, data.is_whole)


def _insert_missing(subject: str, data: Data) -> Task:
    batches = [data.names[start : start + BATCH] for start in range(0, data.entries, BATCH)]
    if subject == PDRS:
        stacked = pdrs.StackedParameterDict()

        def run() -> Any:
            for batch in batches:
                stacked.gather(batch, missing="insert", shape=(FLOATS,))
            return stacked
    else:
        container = torch.nn.ParameterDict()

        def run() -> Any:
            for batch in batches:
                container.update(OrderedDict(zip(batch, torch.zeros(len(batch), FLOATS), strict=True)))
            return container

    return data.task(run, lambda made: len(made) == data.entries)


def _pop(subject: str, data: Data) -> Task:
    container, names = data.emptied(subject, "pop")
    left = len(container) - len(names)
    return data.task(own(pop_each, container, names), lambda popped: len(popped) == left, len(names))


def _popitem(subject: str, data: Data) -> Task:
    container, names = data.emptied(subject, "popitem")
    left = len(container) - len(names)
    return data.task(own(popitem_last, container, len(names)), lambda popped: len(popped) == left, len(names))


def _walk(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    names = container.keys()
    return data.task(lambda: list(names), lambda walked: walked == data.names)


def _make_tensor(_subject: str, data: Data) -> Task:
    count = -(-len(data.popped) // SHORT_RUNS)
    run = own(call_each, torch.empty, FLOATS, count)
    return data.task(run, lambda made: made.shape == (FLOATS,), count)


# -- moves and copies --------------------------------------------------------------------------------------------------


def _double(subject: str, data: Data) -> Task:
    if subject != TORCH:
        container = data.new(subject)
        module = container.table if subject == BY_HAND else container
        return data.task(lambda: (module.to(torch.float64), container)[1], data.is_whole)
    container = data.shared(TORCH, "moved")
    for parameter, row in zip(container.parameters(), data.rows.unbind(), strict=True):
        parameter.data = row.clone()
    return data.task(lambda: container.to(torch.float64), data.is_whole)


def _deepcopy(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    return data.task(lambda: copy.deepcopy(container), data.is_whole)


def _save_and_load(subject: str, data: Data) -> Task:
    # Ours are new ones: what they remember of an earlier save would help.
    source, target = (
        (data.new(PDRS), data.new(PDRS)) if subject == PDRS else (data.shared(subject), data.shared(subject, "loaded"))
    )
    return _saving_task(source, target, data)


def _save_and_load_again(subject: str, data: Data) -> Task:
    source, target = data.shared(subject), data.shared(subject, "loaded")
    target.load_state_dict({key: value.clone() for key, value in source.state_dict().items()})
    return _saving_task(source, target, data)


def _saving_task(source: Any, target: Any, data: Data) -> Task:
    def run() -> Any:
        target.load_state_dict(source.state_dict())
        return target

    return data.task(run, data.is_whole)


def _load_named(subject: str, data: Data) -> Task:
    saved, target = data.saved, data.shared(subject, "loaded")

    def run() -> Any:
        target.load_state_dict(saved)
        return target

    return data.task(run, data.is_whole)


# -- training ----------------------------------------------------------------------------------------------------------


def _with_gradients(container: Any) -> Any:
    for parameter in container.parameters():
        parameter.grad = torch.ones_like(parameter)
    return container


def _adam(subject: str, data: Data) -> Task:
    container = _with_gradients(data.new(subject))
    optimizer = torch.optim.Adam(container.parameters(), foreach=True)
    optimizer.step()  # makes the state

    def run() -> Any:
        optimizer.step()
        return optimizer

    return data.task(run, lambda stepped: all(state["step"] == 2 for state in stepped.state.values()))


def _zero_grad(subject: str, data: Data) -> Task:
    container = _with_gradients(data.shared(subject))

    def run() -> Any:
        container.zero_grad()
        return container

    return data.task(run, lambda cleared: next(cleared.parameters()).grad is None)


def _clip(subject: str, data: Data) -> Task:
    container = _with_gradients(data.shared(subject))
    parameters = list(container.parameters())

    def holds(norm: Tensor) -> bool:
        container.zero_grad()
        return bool(abs(norm.item() / (data.entries * FLOATS) ** 0.5 - 1) < 1e-3)

    return data.task(lambda: clip_grad_norm_(parameters, 1.0), holds)


def _step(gather: Callable[[Any], Tensor], batches: Any, table: Parameter | None) -> Tensor:
    """Gather batches, each with its backward pass; a gradient of the last would be added to otherwise."""
    gathered = None
    for batch in batches:
        if table is not None:
            table.grad = None
        gathered = gather(batch)
        gathered.sum().backward()  # type: ignore[no-untyped-call]
    assert gathered is not None
    return gathered


def _gather_backward(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    container_gather: Callable[[list[str]], Tensor]
    if subject == PDRS:
        table = container.table((FLOATS,))
        container_gather = lambda names: container.gather(names, sparse=True)  # noqa: E731  # a line a container
    elif subject == BY_HAND:
        table, container_gather = container.table.weight, container.gather
    else:
        table, container_gather = None, lambda names: torch.stack([container[name] for name in names])
    return _gathering_task(container_gather, data.batches, table, container, data)


def _gather_prepared(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    if subject == PDRS:
        table = container.table((FLOATS,))
        return _gathering_task(
            lambda lookup: container.gather(lookup, sparse=True), data.lookups, table, container, data
        )
    table = container.table.weight
    return _gathering_task(lambda ids: embedding(ids, table, sparse=True), list(data.ids), table, container, data)


def _gathering_task(
    gather: Callable[[Any], Tensor], batches: list[Any], table: Parameter | None, container: Any, data: Data
) -> Task:
    # As a loop that goes on: torch's other threads sleep by now, and to wake them can take longer than all batches.
    _step(gather, batches[:1], table)

    def holds(gathered: Tensor) -> bool:
        if table is not None:
            grown = table.grad is not None and table.grad.is_sparse
            table.grad = None
        else:
            grown = container[data.batches[-1][0]].grad is not None
            container.zero_grad()
        return grown and torch.equal(gathered.detach(), data.rows[data.ids[-1]])

    return data.task(own(_step, gather, batches[1:], table), holds, BATCHES * BATCH)


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(subject: str, data: Data) -> float:
    return bytes_per_entry(f"stacked/{subject}", data.entries)


# -- at every size -----------------------------------------------------------------------------------------------------


def _insert_at_size(subject: str, data: Data) -> Task:
    starts = range(0, data.entries, BATCH)
    batches = [(data.names[start : start + BATCH], data.rows[start : start + BATCH]) for start in starts]
    stacked = pdrs.StackedParameterDict()

    def run() -> Any:
        for names, rows in batches:
            stacked.scatter(names, rows, missing="insert")
        return stacked

    return data.task(run, data.is_whole)


def _pop_at_size(subject: str, data: Data) -> Task:
    stacked, names = data.shared(PDRS), data.popped[:BATCH]
    # What was popped before comes back.
    stacked.scatter(names, data.rows[[int(name[7:]) for name in names]], missing="insert")
    run = own(pop_each, stacked, names)
    return data.task(run, lambda left: len(left) == data.entries - len(names), len(names))


def _gather_at_size(subject: str, data: Data) -> Task:
    container = data.shared(subject)
    if subject == BY_HAND:
        return _reading_task(container.gather, data.batches, data)
    # What was popped before comes back.
    names = data.popped[:BATCH]
    container.scatter(names, data.rows[[int(name[7:]) for name in names]], missing="insert")
    return _reading_task(lambda names: container.gather(names, sparse=True), data.batches, data)


def _embed_at_size(_subject: str, data: Data) -> Task:
    table = data.shared(BY_HAND).table
    return _reading_task(table, list(data.ids), data)


def _reading_task(gather: Callable[[Any], Tensor], batches: list[Any], data: Data) -> Task:
    def read(gather: Callable[[Any], Tensor], batches: list[Any]) -> Tensor | None:
        gathered = None
        for batch in batches:
            gathered = gather(batch)
        return gathered

    def holds(gathered: Tensor) -> bool:
        return torch.equal(gathered.detach(), data.rows[data.ids[-1]])

    read(gather, batches[:1])  # wakes torch's other threads, as above
    return data.task(own(read, gather, batches[1:]), holds, BATCHES * BATCH)


def _case(
    title: str,
    make_task: Callable[[str, Data], Task],
    at_least: float | None = None,
    subjects: tuple[str, ...] = (TORCH, PDRS),
    note: str = "",
    most_runs: int = 3,
    targets: tuple[Target, ...] = (),
) -> Case[Data]:
    if at_least is not None:
        targets = (Target("ratio", TORCH, at_least), *targets)
    up_to = {TENSORDICT: TENSORDICT_AT_MOST}
    return Case(title, timed(make_task), subjects, targets, most_runs, up_to=up_to, note=note)


def _growing_case(
    title: str,
    make_task: Callable[[str, Data], Task],
    note: str,
    most_runs: int,
    subjects: tuple[str, ...] = (PDRS,),
) -> Case[Data]:
    return Case(
        title,
        timed(make_task),
        subjects,
        (Target("growth", PDRS, 4, entries=LARGEST),) if PDRS in subjects else (),
        most_runs,
        larger_sizes=(LARGEST,),
        beside_smallest=True,
        note=note,
    )


ALL = (BY_HAND, TENSORDICT, TORCH, PDRS)

CASES: tuple[Case[Data], ...] = (
    _case(
        "`from_tensor`",
        _from_rows,
        at_least=200,
        subjects=ALL,
        note="The others are built of the same names and the same tensor, torch's by"
        " `ParameterDict(zip(names, rows))`, by hand a dict and an `Embedding` of that tensor.",
    ),
    _case("`update` with new names", _update, at_least=10, note=f"An empty dictionary, {UPDATES} calls."),
    _case(
        '`gather(names, missing="insert")`, new names',
        _insert_missing,
        at_least=10,
        note=f"An empty dictionary, batches of {BATCH:,} names. torch:"
        " `update` with an OrderedDict of zeros, and nothing is gathered.",
    ),
    _case(
        "`pop(k)`, random",
        _pop,
        at_least=3,
        subjects=(BY_HAND, TORCH, PDRS),
        most_runs=SHORT_RUNS,
        note="torch gives the Parameter, ours a copy of the row, and the row to the next new name; by hand"
        " `weight[ids.pop(name)].detach().clone()`, whose row stays. The same for `popitem()`.",
    ),
    _case("`popitem()`", _popitem, at_least=3, subjects=(BY_HAND, TORCH, PDRS), most_runs=SHORT_RUNS),
    _case("`list(keys())`", _walk, at_least=0.33, note="Ours makes each `str` anew, torch has them in a dict."),
    _case(
        f"`torch.empty({FLOATS})`",
        _make_tensor,
        subjects=(TORCH,),
        most_runs=SHORT_RUNS,
        note="A tensor like those that ours and by hand give when they pop, made and freed.",
    ),
    _case("`.to(torch.float64)`", _double, at_least=50, subjects=(BY_HAND, TORCH, PDRS), most_runs=5),
    _case("`copy.deepcopy`", _deepcopy, at_least=60, subjects=ALL, most_runs=5),
    _case(
        "`state_dict()` and `load_state_dict`",
        _save_and_load,
        at_least=300,
        subjects=(TENSORDICT, TORCH, PDRS),
        note="Into another dictionary of the same names. Ours are new, so that the names must be packed and compared.",
    ),
    _case(
        "the same, again",
        _save_and_load_again,
        note="Ours remember the names that they have packed before.",
    ),
    _case(
        "`load_state_dict` of a ParameterDict's",
        _load_named,
        at_least=8,
        note="A tensor a name, each with memory of its own.",
    ),
    Case(
        "Adam, a step",
        timed(_adam),
        (TORCH, PDRS),
        (Target("ratio", TORCH, 200, entries=ADAM_AT_MOST),),
        most_runs=3,
        up_to={TORCH: ADAM_AT_MOST},
        note="`foreach=True`, all names touched, the second step. A million Parameters of torch's with their state take"
        f" 10 GB and about 20 seconds a step, so the two are compared at {ADAM_AT_MOST:,} entries.",
    ),
    _case("`zero_grad()`", _zero_grad, at_least=100, note="All have gradients."),
    _case("`clip_grad_norm_`", _clip, at_least=100),
    _case(
        FROM_NAMES,
        _gather_backward,
        at_least=100,
        subjects=ALL,
        targets=(Target("ratio", BY_HAND, 4),),
        most_runs=SHORT_RUNS,
        note="Names are new `str` objects, as a text gives them. torch and tensordict:"
        " `torch.stack([pd[name] for name in names])`; by hand `table(torch.tensor([ids[name] for name in names]))`."
        " By hand and ours with sparse gradients. Per name, and behind one batch that is not timed, as in a loop that"
        " goes on: to wake torch's other threads can take longer than what is timed.",
    ),
    _case(
        LOOKED_UP,
        _gather_prepared,
        subjects=(BY_HAND, PDRS),
        targets=(Target("ratio", BY_HAND, 0.9),),
        most_runs=SHORT_RUNS,
        note="Ours: `gather(sd.lookup(names), sparse=True)`, which notices when names have gone or rows have moved; by"
        " hand `F.embedding(ids, weight, sparse=True)`. Behind a batch that is not timed, as above.",
    ),
    Case(
        "memory",
        _memory,
        (BY_HAND, TORCH, PDRS),
        (Target("total", TORCH, 64),),
        once=True,
        unit="B",
        note="Bytes beyond the `str` objects of the names and the tensor of the rows, from which each is built: the C"
        " allocator's own count (`mallinfo2`), in a process of its own.",
    ),
    _growing_case(
        INSERTED,
        _insert_at_size,
        f"All names into an empty dictionary, by `scatter` of {BATCH:,} at a time: growth is part of it.",
        most_runs=5,
    ),
    _growing_case(POPPED, _pop_at_size, f"{BATCH:,} random names, one by one.", SHORT_RUNS),
    _growing_case(
        GATHERED,
        _gather_at_size,
        f"{BATCH:,} random names at a time, per name, behind a batch that is not timed. The same for the next row.",
        SHORT_RUNS,
        (BY_HAND, PDRS),
    ),
    _growing_case(
        EMBEDDED,
        _embed_at_size,
        "The rows of the same names, which are known: what it costs torch to read them, and no name is looked up.",
        SHORT_RUNS,
        (TORCH,),
    ),
)

SUITE = Suite(
    name="stacked",
    title="StackedParameterDict",
    subjects=ALL,
    baselines=(TORCH, BY_HAND),
    cases=CASES,
    make_data=Data,
    intro=f"`pdrs.StackedParameterDict` beside `torch.nn.ParameterDict`, `tensordict.TensorDictParams`, and, by hand, a"
    f" `dict` of ids beside an `nn.Embedding(sparse=True)`. Entries are {FLOATS} float32; names have 14 characters.",
    marker="benchmark-stacked",
    claims=(
        Claim(FROM_NAMES, f"`gather` and `backward` of {BATCH:,} names", apart=TORCH, names=BATCH),
        Claim(LOOKED_UP, "the same, names looked up before", together=BY_HAND, names=BATCH),
    ),
    growth_at_most=4,
)
