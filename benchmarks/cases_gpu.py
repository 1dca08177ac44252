"""Moves to a GPU and back, and steps on one, beside torch's loop and beside one copy of a page-locked table.

On a machine without a GPU the cases run on the CPU, so that a test can see that they are right; nothing is measured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding

import pdrs
from machine import gpu
from measure import Case, Suite, Task, timed

FLOATS = 16
CHECKED = 100
BATCH = 4_096
BATCHES = 10
# torch's loop takes seconds with a million entries.
TORCH_SLOW_FROM = 100_000
# To step on so many Parameters takes 10 GB of state.
TORCH_STEPS_UP_TO = 100_000

TORCH, PLAIN, PDRS = "torch", "plain", "pdrs"
DEVICE = "cpu" if gpu() is None else "cuda"


class Data:
    """Names and rows of one size; what a case moves is put back to where it was before each run."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.names = [f"entity{n}" for n in range(entries)]
        self._parameters: dict[str, list[Parameter]] = {}
        self._containers: dict[str, Any] = {}

    @cached_property
    def rows(self) -> Tensor:
        """The values of all entries, ``[entries, FLOATS]``."""
        return torch.randn(self.entries, FLOATS, generator=torch.Generator().manual_seed(0))

    @cached_property
    def pinned(self) -> Tensor:
        """The same in page-locked memory, as somebody keeps them who has no names."""
        return self.rows.pin_memory() if DEVICE == "cuda" else self.rows.clone()

    @cached_property
    def there(self) -> Tensor:
        """The same on the device."""
        return self.rows.to(DEVICE)

    @cached_property
    def ids(self) -> list[list[int]]:
        """The numbers of random names, a batch after another; the first goes ahead of the clock."""
        ids = torch.randint(self.entries, (1 + BATCHES, BATCH), generator=torch.Generator().manual_seed(1))
        batches: list[list[int]] = ids.tolist()
        return batches

    @cached_property
    def batches(self) -> list[list[str]]:
        """The names of these."""
        return [[self.names[at] for at in batch] for batch in self.ids]

    def on_host(self, subject: str) -> Any:
        """Return torch's dictionary or ours on the CPU, whose entries have memory of their own, each."""
        if subject not in self._containers:
            self._parameters[subject] = [Parameter(row) for row in self.rows.unbind()]
            named = OrderedDict(zip(self.names, self._parameters[subject], strict=True))
            self._containers[subject] = pdrs.ParameterDict(named) if subject == PDRS else torch.nn.ParameterDict(named)
        for parameter, row in zip(self._parameters[subject], self.rows.unbind(), strict=True):
            parameter.data = row.clone()
        return self._containers[subject]

    def on_device(self, subject: str) -> Any:
        """Return them on the device, where a move has brought them."""
        container = self.on_host(subject).to(DEVICE)
        _finish()
        return container

    def table(self, subject: str) -> Any:
        """Return what names are gathered from on the device."""
        if subject == PDRS:
            return pdrs.StackedParameterDict.from_tensor(self.names, self.there.clone())
        if subject == PLAIN:
            return Parameter(self.there.clone())
        return self.on_device(TORCH)

    def holds(self, moved: Any, dtype: torch.dtype) -> bool:
        """Whether what was moved has a dtype, and some rows that lie far apart their values."""
        entries = moved if isinstance(moved, Tensor) else list(moved.values())
        if len(entries) != self.entries:
            return False
        places = range(0, self.entries, max(1, self.entries // CHECKED))
        expected = self.rows.to(dtype)
        return all(
            entries[at].dtype == dtype and torch.equal(entries[at].detach().cpu(), expected[at]) for at in places
        )


def _finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _finished(run: Callable[[], Any]) -> Callable[[], Any]:
    """Let the device be done before the clock stops."""

    def finished() -> Any:
        made = run()
        _finish()
        return made

    return finished


def _move(dtype: torch.dtype, *, up: bool, slab: bool = False) -> Callable[[str, Data], Task]:
    """Make the task of a move between the host and the device, of another dtype perhaps."""

    def make_task(subject: str, data: Data) -> Task:
        if subject == PLAIN:
            run = partial(_copy_up, data.pinned, dtype) if up else _copy_down(data.there, dtype)
        else:
            container = data.on_host(subject) if up else data.on_device(subject)
            if slab:
                container.double().float()
            run = partial(container.to, DEVICE if up else "cpu", dtype)
        return Task(_finished(run), data.entries, lambda moved: data.holds(moved, dtype))

    return make_task


def _copy_up(table: Tensor, dtype: torch.dtype) -> Tensor:
    return table.to(DEVICE, non_blocking=True).to(dtype)


def _copy_down(table: Tensor, dtype: torch.dtype) -> partial[Tensor]:
    target = torch.empty(table.shape, dtype=dtype, pin_memory=DEVICE == "cuda")
    return partial(lambda: target.copy_(table.to(dtype), non_blocking=True))


def _convert(subject: str, data: Data) -> Task:
    container = data.there if subject == PLAIN else data.on_device(subject)
    return Task(_finished(container.half), data.entries, lambda moved: data.holds(moved, torch.float16))


def _gather_once(subject: str, container: Any, data: Data, number: int, sparse: bool = False) -> Tensor:
    if subject == PDRS:
        gathered: Tensor = container.gather(data.batches[number], sparse=sparse)
        return gathered
    if subject == PLAIN:
        return embedding(torch.tensor(data.ids[number]).to(DEVICE), container, sparse=sparse)
    return torch.stack([container[name] for name in data.batches[number]])


def _gather(subject: str, data: Data) -> Task:
    container = data.table(subject)
    _gather_once(subject, container, data, 0)

    def run() -> Any:
        return [_gather_once(subject, container, data, number) for number in range(1, 1 + BATCHES)]

    def holds(made: list[Tensor]) -> bool:
        return all(
            torch.equal(each.detach().cpu(), data.rows[ids]) for each, ids in zip(made, data.ids[1:], strict=True)
        )

    return Task(_finished(run), BATCHES * BATCH, holds)


def _step(sparse: bool) -> Callable[[str, Data], Task]:
    """Make the task of steps: names are gathered, a loss goes backward, and an optimizer steps."""

    def make_task(subject: str, data: Data) -> Task:
        container = data.table(subject)
        parameters = [container] if subject == PLAIN else list(container.parameters())
        optimizer: Any = (
            torch.optim.SparseAdam(parameters) if sparse else torch.optim.Adam(parameters, fused=DEVICE == "cuda")
        )
        if subject == PDRS:
            container.attach_optimizer(optimizer)

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss: Any = _gather_once(subject, container, data, number, sparse).square().sum()
            loss.backward()
            optimizer.step()

        step(0)

        def run() -> Any:
            for number in range(1, 1 + BATCHES):
                step(number)
            return container

        def holds(stepped: Any) -> bool:
            at = data.ids[-1][0]
            row = stepped[at] if subject == PLAIN else stepped[data.names[at]]
            return not torch.equal(row.detach().cpu(), data.rows[at])

        return Task(_finished(run), BATCHES * BATCH, holds)

    return make_task


def _has_gpu() -> bool:
    return gpu() is not None


def _case(title: str, make_task: Callable[[str, Data], Task], note: str = "", **options: Any) -> Case[Data]:
    slow = {TORCH: TORCH_SLOW_FROM}
    return Case(title, timed(make_task), most_runs=3, slow=slow, needs=_has_gpu, note=note, **options)


CASES: tuple[Case[Data], ...] = (
    _case(
        "up: `.to(device)`",
        _move(torch.float32, up=True),
        "From pageable memory, where each entry has its own; plain: one page-locked table, copied once. The device is"
        " done before the clock stops, here and below.",
    ),
    _case(
        "up, in a slab",
        _move(torch.float32, up=True, slab=True),
        "An earlier move on the CPU has put our entries into one block of pageable memory.",
    ),
    _case("up and to float16: `.to(device, torch.float16)`", _move(torch.float16, up=True)),
    _case("down: `.cpu()`", _move(torch.float32, up=False), "After a move up; plain: into page-locked memory."),
    _case("down and to float16", _move(torch.float16, up=False)),
    _case("on the device: `.half()`", _convert),
    _case(
        f"gather {BATCH:,} names",
        _gather,
        "Per name. plain: the numbers of the rows are known, and go to the device as a tensor.",
        up_to={TORCH: TORCH_STEPS_UP_TO},
    ),
    _case(
        f"step on {BATCH:,} names, Adam",
        _step(sparse=False),
        "Per name: gathered, backward, and a fused step, which goes over the whole table.",
        up_to={TORCH: TORCH_SLOW_FROM // 10},
    ),
    _case(f"step on {BATCH:,} names, SparseAdam", _step(sparse=True), "Per name, as above.", subjects=(PLAIN, PDRS)),
)

SUITE = Suite(
    name="gpu",
    title="On a GPU",
    subjects=(TORCH, PLAIN, PDRS),
    baselines=(TORCH, PLAIN),
    cases=CASES,
    make_data=Data,
    intro=f"Entries of {FLOATS} float32: `torch.nn.ParameterDict`, whose moves go entry by entry; a plain table"
    f" `[n, {FLOATS}]` without names, moved by one copy; and ours, a `pdrs.ParameterDict` that moves and a"
    " `pdrs.StackedParameterDict` that is gathered from.",
)
