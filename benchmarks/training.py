"""Training steps as users write them: the loop that is timed, the containers, and batches of names.

All containers train on the same batches, so that their rows can be compared. Names are new ``str`` objects in each run,
as a data loader gives them: a ``str`` that was looked up before has its hash, and a dict is faster with those.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Parameter
from torch.nn.utils import clip_grad_norm_

import pdrs
from cases_parameter_dict import fresh
from measure import Task, nanoseconds, own
from pdrs import optim

FLOATS = 16
BATCH = 4_096
# The gradients of a batch have a norm of hundreds, so that clipping has something to do.
MAX_NORM = 100.0
# How often a name comes is its rank to this power.
ZIPF_EXPONENT = -1.05
RATES = {"Adam": 0.01, "Adagrad": 0.1, "RowWiseAdagrad": 0.1, "SGD": 0.1}
# So many names at a time are trained before anything is timed.
WARMED_AT_ONCE = 65_536
TOLERANCE = 1e-5

TORCH, DENSE, BY_HAND, ONE_THREAD, PDRS = "torch", "dense", "by hand", "one thread", "pdrs"
# Their rows equal those of the others after the first step only. Dense Adam moves also names that are not in the batch,
# and a ParameterDict counts steps for each name.
DIFFERENT = (TORCH, DENSE)


@dataclass(frozen=True)
class Setup:
    """What a case trains.

    Parameters
    ----------
    optimizer
        A key of ``RATES``.
    steps
        How many are timed in a run. One step more goes ahead of the clock.
    """

    optimizer: str
    columns: int = FLOATS
    batch: int = BATCH
    zipf: bool = False
    clipped: bool = True
    threads: int = 1
    steps: int = 10


@dataclass
class Trainer:
    """A container with its optimizer.

    Parameters
    ----------
    look_up
        Gives the rows of a batch, with a gradient.
    optimizer
        None if the backward pass updates the rows.
    clip
        Clips the norm of all gradients.
    takes_ids
        Whether a batch is a tensor of the numbers of names.
    """

    look_up: Callable[[Any], Tensor]
    parameters: list[Parameter] = field(default_factory=list)
    optimizer: Any = None
    clip: Callable[[list[Parameter], float], Any] = clip_grad_norm_
    takes_ids: bool = False

    def rows(self, batch: Any) -> Tensor:
        """Return a copy of the rows of a batch."""
        return self.look_up(batch).detach().clone()


def train(trainer: Trainer, batches: Sequence[Any], clipped: bool) -> Trainer:
    """Take a whole step for each batch."""
    look_up, parameters, optimizer, clip = trainer.look_up, trainer.parameters, trainer.optimizer, trainer.clip
    for batch in batches:
        look_up(batch).pow(2).sum().backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            if clipped:
                clip(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return trainer


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- containers --------------------------------------------------------------------------------------------------------


class Data:
    """Names of one size, and the containers that are trained on them.

    Parameters
    ----------
    build
        Makes the trainer of each container from these data and a setup.
    """

    def __init__(self, entries: int, build: Mapping[str, Callable[[Data, Setup], Trainer]]) -> None:
        self.entries = entries
        self.build = build
        self.names = [f"unit{n % 97:02}_{n:07}" for n in range(entries)]
        self._what: Any = None
        self._trainers: dict[str, Trainer] = {}
        self._turns: Counter[str] = Counter()
        self._first: dict[Any, Tensor] = {}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The ids of names, as people keep them who write it by hand."""
        return {name: n for n, name in enumerate(self.names)}

    @cached_property
    def _by_rank(self) -> tuple[Tensor, Tensor]:
        """The share of the names up to each rank, and which name has the rank."""
        shares = torch.arange(1, self.entries + 1, dtype=torch.float64).pow_(ZIPF_EXPONENT).cumsum_(0)
        return shares / shares[-1], torch.randperm(self.entries, generator=torch.Generator().manual_seed(0))

    def rows(self, columns: int) -> Tensor:
        """Make the values that all begin with: away from zero, where an optimizer would divide by nearly nothing."""
        rows = torch.rand(self.entries, columns, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
        return rows.add_(rows.sign().mul_(0.5))

    def ids(self, setup: Setup, turn: int, count: int) -> list[Tensor]:
        """Draw the batches of a turn, as numbers of names."""
        generator = torch.Generator().manual_seed(1 + turn)
        if not setup.zipf:
            return list(torch.randint(self.entries, (count, setup.batch), generator=generator))
        shares, names = self._by_rank
        drawn = torch.rand(count, setup.batch, generator=generator, dtype=torch.float64)
        return list(names[torch.searchsorted(shares, drawn).clamp_(max=self.entries - 1)])

    def as_names(self, ids: Tensor) -> list[str]:
        """Make the names of a batch, as new objects."""
        return fresh([self.names[at] for at in ids.tolist()])

    def trainer(self, subject: str, what: str, setup: Setup) -> Trainer:
        """Return the container of a case, and forget those of the case before: together they may not fit.

        Each name has been trained before anything is timed, and its state is there, as in a training that goes on.
        """
        if self._what != (what, setup):
            self._what = what, setup
            self._trainers.clear()
            self._turns.clear()
            self._first.clear()
            gc.collect()
        if subject not in self._trainers:
            trainer = self._trainers[subject] = self.build[subject](self, setup)
            with threads(setup.threads):
                self._warm(subject, trainer, setup)
        return self._trainers[subject]

    def _warm(self, subject: str, trainer: Trainer, setup: Setup) -> None:
        (first,) = self._batches(trainer, setup, 0, 1)
        train(trainer, [first], setup.clipped)
        if not self.agrees(subject, 0, trainer.rows(first)):
            raise ValueError("the first step gave wrong rows")
        if subject == DENSE:  # It has stepped on all names.
            return
        for start in range(0, self.entries, WARMED_AT_ONCE):
            ids = torch.arange(start, min(start + WARMED_AT_ONCE, self.entries))
            train(trainer, [ids if trainer.takes_ids else self.as_names(ids)], setup.clipped)

    def batches(self, subject: str, trainer: Trainer, setup: Setup) -> list[Any]:
        """Return the batches of the next run of a container, which are those of the same run of the others."""
        self._turns[subject] += 1
        return self._batches(trainer, setup, self._turns[subject], 1 + setup.steps)

    def _batches(self, trainer: Trainer, setup: Setup, turn: int, count: int) -> list[Any]:
        ids = self.ids(setup, turn, count)
        return ids if trainer.takes_ids else [self.as_names(batch) for batch in ids]

    def agrees(self, subject: str, turn: int, result: Tensor) -> bool:
        """Whether a container gave the same after a turn as the first that had it."""
        if turn and subject in DIFFERENT:
            return bool(result.isfinite().all())
        expected = self._first.setdefault(turn, result)
        return torch.allclose(result, expected, rtol=TOLERANCE, atol=TOLERANCE)

    def turn(self, subject: str) -> int:
        """Return which run of a container this is, from 1 on."""
        return self._turns[subject]


def _pdrs(data: Data, setup: Setup) -> Trainer:
    stacked = pdrs.StackedParameterDict.from_tensor(data.names, data.rows(setup.columns))
    parameters = list(stacked.parameters())
    optimizer = getattr(optim, setup.optimizer)(parameters, lr=RATES[setup.optimizer])
    return Trainer(stacked.gather, parameters, optimizer, optim.clip_grad_norm_)


def _by_hand(data: Data, setup: Setup) -> Trainer:
    optimizers: dict[str, Any] = {
        "Adam": torch.optim.SparseAdam,
        "Adagrad": torch.optim.Adagrad,
        "SGD": torch.optim.SGD,
    }
    return _embedding(data, setup, True, lambda table: optimizers[setup.optimizer](table, lr=RATES[setup.optimizer]))


def _dense(data: Data, setup: Setup) -> Trainer:
    return _embedding(data, setup, False, lambda table: torch.optim.Adam(table, lr=RATES["Adam"], fused=True))


def _embedding(data: Data, setup: Setup, sparse: bool, make: Callable[[list[Parameter]], Any]) -> Trainer:
    table = Embedding(data.entries, setup.columns, sparse=sparse, _weight=data.rows(setup.columns))
    ids = data.numbers
    parameters = list(table.parameters())
    return Trainer(lambda names: table(torch.tensor([ids[name] for name in names])), parameters, make(parameters))


def _torch(data: Data, setup: Setup) -> Trainer:
    container = torch.nn.ParameterDict(zip(data.names, data.rows(setup.columns), strict=True))
    parameters = list(container.parameters())
    optimizer = torch.optim.Adam(parameters, lr=RATES["Adam"], foreach=True)
    return Trainer(lambda names: torch.stack([container[name] for name in names]), parameters, optimizer)


BUILD: dict[str, Callable[[Data, Setup], Trainer]] = {
    TORCH: _torch,
    DENSE: _dense,
    BY_HAND: _by_hand,
    ONE_THREAD: _pdrs,
    PDRS: _pdrs,
}


# -- what is timed -----------------------------------------------------------------------------------------------------


def whole_step(subject: str, data: Data, what: str, setup: Setup) -> float:
    """Return nanoseconds per name of a whole step."""
    trainer = data.trainer(subject, what, setup)
    batches = data.batches(subject, trainer, setup)
    with threads(1 if subject == ONE_THREAD else setup.threads):
        # As a loop that goes on: torch's other threads sleep by now, and to wake them can take longer than a step.
        train(trainer, batches[:1], setup.clipped)

        def holds(trained: Trainer) -> bool:
            cleared = all(parameter.grad is None for parameter in trained.parameters)
            return cleared and data.agrees(subject, data.turn(subject), trained.rows(batches[-1]))

        run = own(train, trainer, batches[1:], setup.clipped)
        return nanoseconds(Task(run, setup.steps * setup.batch, holds))


def step_alone(subject: str, data: Data, what: str, setup: Setup) -> float:
    """Return nanoseconds per name of ``step()``, each after a look-up and a backward pass that are not timed."""
    trainer = data.trainer(subject, what, setup)
    batches = data.batches(subject, trainer, setup)
    with threads(setup.threads):
        spent = _timed_between(trainer, batches, trainer.optimizer.step)
        if not data.agrees(subject, data.turn(subject), trainer.rows(batches[-1])):
            raise ValueError("what was timed gave a wrong result")
    return spent / (setup.steps * setup.batch)


def clip_alone(subject: str, data: Data, what: str, setup: Setup) -> float:
    """Return nanoseconds per name of clipping, each after a look-up and a backward pass that are not timed."""
    trainer = data.trainer(subject, what, setup)
    batches = data.batches(subject, trainer, setup)
    norms: list[Tensor] = []
    with threads(setup.threads):
        spent = _timed_between(
            trainer, batches, lambda: norms.append(torch.as_tensor(trainer.clip(trainer.parameters, MAX_NORM)))
        )
        # Relative to the clipped norm: a norm of hundreds may differ in its last digits.
        if not data.agrees(subject, data.turn(subject), torch.stack(norms) / MAX_NORM):
            raise ValueError("what was timed gave a wrong result")
    return spent / (setup.steps * setup.batch)


def _timed_between(trainer: Trainer, batches: list[Any], run: Callable[[], Any]) -> int:
    spent = 0
    for number, batch in enumerate(batches):
        trainer.look_up(batch).pow(2).sum().backward()  # type: ignore[no-untyped-call]
        begin = perf_counter_ns()
        run()
        if number:
            spent += perf_counter_ns() - begin
        trainer.optimizer.zero_grad()
    return spent
