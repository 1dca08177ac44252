"""Moves of a whole module at once, beside torch's moves tensor by tensor, and tensordict's."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict, TensorDictParams
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import parameters_to_vector

import pdrs
from large_moves import large_move
from measure import Case, Suite, Target, Task, timed
from memory import names_of
from pdrs._core import group_tensors

FLOATS = 16
CHECKED = 100
# A tensordict takes its microseconds at any size.
TENSORDICT_AT_MOST = 100_000

LAYERS = 417
PARAMETERS_OF_LAYER = 12
SMALL_PARAMETERS = LAYERS * PARAMETERS_OF_LAYER

LARGE_ENTRIES = 100

LOOSE = "`.to(torch.float64)`"
IN_A_SLAB = "`.to(torch.float64)`, in a slab"
MODULES = ("torch", "pdrs")

CONTAINERS: dict[str, Callable[[OrderedDict[str, Parameter]], Any]] = {
    "tensordict": lambda named: TensorDictParams(TensorDict(named)),
    "torch": torch.nn.ParameterDict,
    "pdrs": pdrs.ParameterDict,
}


class Data:
    """One container of each kind, with Parameters of its own, that is put back to where it was before each run."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._parameters: dict[str, list[Parameter]] = {}
        self._containers: dict[str, Any] = {}

    @cached_property
    def rows(self) -> Tensor:
        """The values of all entries, ``[entries, FLOATS]``."""
        return torch.randn(self.entries, FLOATS)

    @cached_property
    def consolidated(self) -> TensorDict:
        """A tensordict whose entries lie in one storage. Its moves make another, so it need not be put back."""
        consolidated: TensorDict = self.loose("tensordict").consolidate()
        return consolidated

    @cached_property
    def unmoved(self) -> list[Tensor]:
        """Parameters that have memory of their own, each, and that nothing moves."""
        return [Parameter(row.clone()) for row in self.rows.unbind()]

    @cached_property
    def transformer(self) -> Module:
        """A model of very many small parameters."""
        layer = torch.nn.TransformerEncoderLayer(FLOATS, nhead=2, dim_feedforward=2 * FLOATS, batch_first=True)
        return torch.nn.Sequential(*(copy.deepcopy(layer) for _ in range(self.entries // PARAMETERS_OF_LAYER)))

    def loose(self, subject: str, dtype: torch.dtype = torch.float32, gradients: bool = False) -> Any:
        """Return a container whose entries have memory of their own, each, as from a checkpoint or an initialisation.

        Parameters
        ----------
        gradients
            Whether each has a gradient, as loose; otherwise none has.
        """
        if subject not in self._containers:
            self._parameters[subject] = [Parameter(row) for row in self.rows.unbind()]
            named = OrderedDict(zip(names_of(self.entries), self._parameters[subject], strict=True))
            self._containers[subject] = CONTAINERS[subject](named)
        for parameter, row in zip(self._parameters[subject], self.rows.to(dtype).unbind(), strict=True):
            parameter.grad = None
            parameter.data = row.clone()
            if gradients:
                parameter.grad = row.clone()
        return self._containers[subject]

    def moved_before(self, subject: str) -> Any:
        """Return a container of float32 that it got by a move: ours has it in a slab, tensordict consolidates."""
        if subject == "tensordict":
            return self.consolidated
        return self.loose(subject, torch.float64).to(torch.float32)

    def holds(self, container: Any, dtype: torch.dtype, gradients: bool = False) -> bool:
        """Whether all entries have a dtype, and some that lie far apart their values."""
        entries = list(container.values())
        if gradients:
            entries += [entry.grad for entry in entries]
        if len(entries) != self.entries * (1 + gradients) or any(entry.dtype != dtype for entry in entries):
            return False
        expected = self.rows.to(dtype)
        return all(
            torch.equal(entries[at].detach().cpu(), expected[at % self.entries])
            for at in range(0, len(entries), max(1, len(entries) // CHECKED))
        )

    def task(self, run: Callable[[], Any], dtype: torch.dtype, gradients: bool = False) -> Task:
        """Make the task of a move, which gives back the container that has moved."""
        return Task(run, self.entries, lambda moved: self.holds(moved, dtype, gradients))


def gather(tensors: list[Tensor]) -> Tensor:
    """Copy tensors of one dtype into one flat tensor."""
    (group,), _ = group_tensors(tensors, keep_strides=False)
    vector = torch.empty(group.length, dtype=group.dtype)
    group.gather(vector)
    return vector


def _double(subject: str, data: Data) -> Task:
    container = data.loose(subject)
    return data.task(lambda: container.to(torch.float64), torch.float64)


def _half(subject: str, data: Data) -> Task:
    return data.task(data.loose(subject).half, torch.float16)


def _double_in_a_slab(subject: str, data: Data) -> Task:
    container = data.moved_before(subject)
    return data.task(lambda: container.to(torch.float64), torch.float64)


def _half_in_a_slab(subject: str, data: Data) -> Task:
    return data.task(data.moved_before(subject).half, torch.float16)


def _nothing_to_do(subject: str, data: Data) -> Task:
    container = data.loose(subject)
    return data.task(lambda: container.to(torch.float32), torch.float32)


def _double_with_gradients(subject: str, data: Data) -> Task:
    container = data.loose(subject, gradients=True)
    return data.task(lambda: container.to(torch.float64), torch.float64, gradients=True)


def _double_of_parent(subject: str, data: Data) -> Task:
    parent = torch.nn.ModuleDict({"entries": data.loose(subject), "head": torch.nn.Linear(FLOATS, 1)})
    return data.task(lambda: parent.to(torch.float64)["entries"], torch.float64)


def _to_empty(subject: str, data: Data) -> Task:
    container = data.loose(subject)
    return Task(
        lambda: container.to_empty(device="cpu"), data.entries, lambda moved: len(list(moved.values())) == data.entries
    )


def _gather_beside(join: Callable[[list[Tensor]], Tensor]) -> Callable[[str, Data], Task]:
    def make_task(subject: str, data: Data) -> Task:
        tensors = data.unmoved
        run = gather if subject == "pdrs" else torch.no_grad()(join)
        return Task(
            lambda: run(tensors), data.entries, lambda joined: torch.equal(joined.flatten(), data.rows.flatten())
        )

    return make_task


def _double_of_transformer(subject: str, data: Data) -> Task:
    model = copy.deepcopy(data.transformer)
    return Task(
        lambda: pdrs.to(model, torch.float64) if subject == "pdrs" else model.to(torch.float64),
        data.entries,
        lambda moved: _are_equal(moved, data.transformer),
    )


def _are_equal(doubles: Module, singles: Module) -> bool:
    pairs = zip(doubles.parameters(), singles.parameters(), strict=True)
    return all(torch.equal(double, single.double()) for double, single in pairs)


def _case(
    title: str,
    make_task: Callable[[str, Data], Task],
    at_least: float | None = None,
    subjects: tuple[str, ...] = (),
    note: str = "",
    most_runs: int = 3,
) -> Case[Data]:
    targets = () if at_least is None else (Target("ratio", "torch", at_least),)
    up_to = {"tensordict": TENSORDICT_AT_MOST}
    return Case(title, timed(make_task), subjects, targets, most_runs, up_to=up_to, note=note)


SLAB_NOTE = (
    "An earlier move made the entries float32. Ours lie in one block of memory since then, torch's do not;"
    " tensordict's were put into one by `consolidate()`, which makes plain tensors of Parameters."
)

CASES: tuple[Case[Data], ...] = (
    _case(
        LOOSE,
        _double,
        at_least=5,
        note="Each entry has memory of its own. tensordict's `.to` and `.half` give another container, with other"
        " Parameters; only a move of its parent moves it in place.",
    ),
    _case("`.half()`", _half, at_least=5),
    _case(IN_A_SLAB, _double_in_a_slab, at_least=6, note=SLAB_NOTE),
    _case("`.half()`, in a slab", _half_in_a_slab, at_least=6, note="As above."),
    _case("`.to(torch.float32)`, nothing to do", _nothing_to_do, at_least=20),
    _case("`.to(torch.float64)`, with gradients", _double_with_gradients, subjects=MODULES, most_runs=1),
    _case("`parent.to(torch.float64)`", _double_of_parent, most_runs=1),
    _case('`.to_empty(device="cpu")`', _to_empty, most_runs=1),
    _case(
        "all in one vector, `parameters_to_vector`",
        _gather_beside(parameters_to_vector),
        at_least=50,
        subjects=MODULES,
        note="pdrs here and in the next two is `pdrs._core.group_tensors` and `TensorGroup.gather`, what every move of"
        " loose entries begins with. torch's run in `torch.no_grad()`.",
    ),
    _case("all in one vector, `torch.cat`", _gather_beside(torch.cat), at_least=3, subjects=MODULES),
    _case("all in one table, `torch.stack`", _gather_beside(torch.stack), at_least=3, subjects=MODULES),
    Case(
        f"`pdrs.to(transformer, torch.float64)`, {LAYERS} layers",
        timed(_double_of_transformer),
        subjects=MODULES,
        targets=(Target("ratio", "torch", 3, entries=SMALL_PARAMETERS),),
        only_sizes=(SMALL_PARAMETERS,),
        note=f"A plain torch model: {SMALL_PARAMETERS:,} parameters of {FLOATS} to {3 * FLOATS * FLOATS} float32."
        " torch: `transformer.to(torch.float64)`.",
    ),
    Case(
        "`pdrs.to(module, torch.float64)`, 8 MB each, per 64 B",
        lambda subject, data: large_move("equal", subject, data.entries),
        subjects=MODULES,
        targets=(Target("ratio", "torch", 1, entries=LARGE_ENTRIES),),
        only_sizes=(LARGE_ENTRIES,),
        note="A `ParameterList` of 2,000,000 float32 an entry: what matters is the memory, not the calls. Each run is a"
        " process of its own, in which the memory that one module frees is for nobody else; the two take turns. The"
        " time is that of 64 bytes, which is what an entry of the other cases has.",
    ),
    Case(
        "`pdrs.to(module, torch.float64)`, 64 KiB to 32 MiB each, per 64 B",
        lambda subject, data: large_move("mixed", subject, data.entries),
        subjects=MODULES,
        targets=(Target("ratio", "torch", 1, entries=LARGE_ENTRIES),),
        only_sizes=(LARGE_ENTRIES,),
        note="As above; sizes are evenly spread by their logarithm, large and small by turns.",
    ),
)

SUITE = Suite(
    name="transfer",
    title="Moves",
    subjects=("tensordict", "torch", "pdrs"),
    baselines=("torch", "tensordict"),
    cases=CASES,
    make_data=Data,
    intro=f"Moves of a `pdrs.ParameterDict`, a `torch.nn.ParameterDict` and a `tensordict.TensorDictParams` with"
    f" entries of {FLOATS} float32, and of other modules by `pdrs.to`. Each container has Parameters of its own, which"
    " are put back before each run. Moves in place (torch's and ours) free the old memory while the clock runs.",
    marker="benchmark-transfer",
)
