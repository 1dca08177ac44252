"""A table that is sharded over processes: the ways to train it, their bytes, and what follows for more processes.

``launched(world, what, entries)`` runs so many processes and returns what they measured. All ways take turns in the
same processes.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns, process_time_ns
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import embedding
from torch.nn.parallel import DistributedDataParallel

import pdrs
import pdrs.distributed
import pdrs.optim
from memory import peak_beyond
from pdrs._core import Headers, KnownRows, Request
from pdrs._ranks import rows_op, sharded
from pdrs._ranks.exchange import BYTES_AT, PAYLOAD
from pdrs._ranks.owners import owners_of

FLOATS = 16
BATCH = 4_096
ZIPF_EXPONENT = 1.2
RATE = 0.1
# So many names at a time are inserted.
AT_ONCE = 20_000
# A launch measures so many rounds of so many steps. A step more goes ahead of the clock.
ROUNDS, STEPS = 5, 12
# Rounds differ by more than checks cost. So these are measured step by step, and each figure is of so many steps.
STEPS_OF_CHECKS = 200
COUNTED_STEPS = 10
STALLED_AFTER_SECONDS = 900
# Of the sums of all rows; bf16 rounds gradients.
TOLERANCE = 1e-2
# Of the network namespace of the process; /sys shows that of whoever mounted it.
INTERFACES = Path("/proc/self/net/dev")

BY_HAND, DENSE, DDP = "by hand", "by hand, dense gradient", "DDP"
NAMES, PLANNED, TEXT, BF16 = "names known", "planned before", "names as text", "bf16 on the wire"
NAMES_UNCHECKED, PLANNED_UNCHECKED = "names known, unchecked", "planned before, unchecked"
# What stands behind a way whose CPU time is meant.
CPU = ", CPU"

Step = Callable[[int], None]


class Batches:
    """The names of each rank in each step, as ids and as text: how often a name comes is its rank to a power."""

    def __init__(self, entries: int, rank: int, steps: int) -> None:
        self.names = [f"unit{n % 97:02}_{n:07}" for n in range(entries)]
        shares = np.arange(1, entries + 1) ** -ZIPF_EXPONENT
        by_rank = np.random.default_rng(0).permutation(entries)
        drawn = [
            np.random.default_rng([step, rank]).choice(entries, BATCH, p=shares / shares.sum()) for step in range(steps)
        ]
        self.ids = [by_rank[each] for each in drawn]
        self.texts = [[self.names[at] for at in each.tolist()] for each in self.ids]

    def distinct(self) -> float:
        """Return how many distinct names a batch has."""
        return float(np.mean([len(np.unique(each)) for each in self.ids]))


# -- ways --------------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """How to train a step, and how many bytes this rank has sent so far."""

    step: Step
    sent: Callable[[], float]
    values: Callable[[], Tensor]


def send_back(rows: Tensor) -> None:
    """Take gradients of ones, in memory of their own, as those of a model are: those of a sum are one number."""
    rows.backward(torch.ones_like(rows))  # type: ignore[no-untyped-call]


def by_hand(batches: Batches, sparse: bool) -> Way:
    """Make the rows with int64 ids known everywhere: counts, ids and rows go by three collectives, gradients by one."""
    world, rank = dist.get_world_size(), dist.get_rank()
    table = Parameter(torch.zeros(len(batches.names) // world + 1, FLOATS))
    # The others take the mean over ranks.
    optimizer = torch.optim.SGD([table], lr=RATE / world)
    sent = 0

    def step(number: int) -> None:
        nonlocal sent
        optimizer.zero_grad()
        distinct, which = torch.unique(torch.from_numpy(batches.ids[number]), return_inverse=True)
        owners = distinct % world
        order = torch.argsort(owners, stable=True)
        give = torch.bincount(owners, minlength=world)
        want = torch.empty_like(give)
        dist.all_to_all_single(want, give)
        gives, wants = give.tolist(), want.tolist()
        asked = torch.empty(sum(wants), dtype=torch.int64)
        dist.all_to_all_single(asked, distinct[order] // world, wants, gives)
        rows: Tensor = Exchange.apply(embedding(asked, table, sparse=sparse), wants, gives)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        send_back(rows.index_select(0, position[which]))
        optimizer.step()
        asks, answers = sum(gives) - gives[rank], sum(wants) - wants[rank]
        sent += 8 * (world - 1) + 8 * asks + 4 * FLOATS * (asks + answers)

    return Way(step, lambda: sent, lambda: table.detach())


class Exchange(torch.autograd.Function):
    """Rows that are sent, and gradients that come back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: list[int], take: list[int]) -> Tensor:
        """Send rows."""
        ctx.sizes = give, take
        out = rows.new_empty((sum(take), rows.shape[1]))
        dist.all_to_all_single(out, rows, take, give)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Send gradients back."""
        give, take = ctx.sizes
        out = gradient.new_empty((sum(give), gradient.shape[1]))
        dist.all_to_all_single(out, gradient.contiguous(), give, take)
        return out, None, None


class Rows(Module):
    """A module around a dictionary, as DDP wants one."""

    def __init__(self, words: pdrs.StackedParameterDict) -> None:
        super().__init__()
        self.words = words

    def forward(self, names: list[str]) -> Tensor:
        """Return rows."""
        return self.words.gather(names)


def replicated(batches: Batches) -> Way:
    """Make a StackedParameterDict that each rank has, in DDP, whose gradients are reduced as a whole."""
    words = pdrs.StackedParameterDict.from_tensor(batches.names, torch.zeros(len(batches.names), FLOATS))
    model = DistributedDataParallel(Rows(words))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    world, taken = dist.get_world_size(), 0

    def step(number: int) -> None:
        nonlocal taken
        optimizer.zero_grad()
        send_back(model(batches.texts[number]))
        optimizer.step()
        taken += 1

    # All-reduce in a ring.
    each = 2 * (world - 1) / world * len(batches.names) * FLOATS * 4
    return Way(step, lambda: taken * each, lambda: next(iter(words.parameters())).detach())


class Sharded:
    """The dictionaries of pdrs, which ways share."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._made: dict[str, tuple[pdrs.distributed.ShardedParameterDict, torch.optim.Optimizer]] = {}

    def words(self, what: str, **options: Any) -> tuple[pdrs.distributed.ShardedParameterDict, torch.optim.Optimizer]:
        """Make a dictionary that has all names, or return it."""
        if what not in self._made:
            names, world = self.batches.names, dist.get_world_size()
            words = pdrs.distributed.ShardedParameterDict((FLOATS,), reserve=len(names) // world + 1, **options)
            for start in range(0, len(names), AT_ONCE):
                words.plan(names[start : start + AT_ONCE], "insert")
            self._made[what] = words, torch.optim.SGD(words.parameters(), lr=RATE)
        return self._made[what]

    def way(self, what: str) -> Way:
        """Make a way of pdrs."""
        of_way: dict[str, dict[str, Any]] = {BF16: {"wire": torch.bfloat16}, TEXT: {"known_names": 0}}
        options = of_way.get(what, {})
        words, optimizer = self.words(what if options else NAMES, **options)
        is_planned = what in (PLANNED, PLANNED_UNCHECKED)
        texts: list[Any] = self.batches.texts
        asked = [words.plan(each) for each in texts] if is_planned else texts

        def step(number: int) -> None:
            optimizer.zero_grad()
            send_back(words.gather(asked[number], sparse=True))
            optimizer.step()

        run = step if what not in (NAMES_UNCHECKED, PLANNED_UNCHECKED) else unchecked(step, is_planned)
        return Way(run, lambda: words.sent_bytes, lambda: words.local.table((FLOATS,)).detach())


class Unchecked(NamedTuple):
    """What a meeting would have told if there were none."""

    told: NDArray[np.int64]
    # Where rows are wanted that have come.
    place: Tensor | None


# Rows are added and put in place by the same code, of a rank that is alone.
_ALONE = Headers(0, 1)
_CALL, _NO_PAYLOAD, _NO_WINDOWS = (0,) * 3, (0,) * PAYLOAD, np.empty((0, 0), np.uint8)


def unchecked(step: Step, is_planned: bool) -> Step:
    """Make a step that exchanges rows without a meeting where all ranks know how many there are."""

    def meet(
        rows: Tensor,
        line: Any,
        give: list[int],
        take: list[int],
        call: Any,
        payload: int = 0,
        *,
        place: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Any:
        if add_to is not None:
            given = rows.numpy()
            size = [sum(give) * rows.shape[1] * rows.element_size()]
            _, sums = _ALONE.message_of_sums(_CALL, _NO_PAYLOAD, add_to.numpy(), given, size, 0)
            rows = torch.from_numpy(sums).view(rows.dtype).view(sum(give), rows.shape[1])
        mail: Any = Unchecked(np.full((line.ranks.size, 1 + PAYLOAD), payload, np.int64), place)
        return rows_op.RowsMail(mail, rows, give, take, [])

    def receive(arriving: rows_op.RowsMail, line: Any, call: Any) -> rows_op.Come:
        mail: Any = arriving.mail
        come: Tensor = line.exchange(arriving.rows, arriving.give, arriving.take, call)
        if mail.place is None:
            return rows_op.Come(come, False)
        placed = come.new_empty(len(mail.place), come.shape[1])
        own = come.view(torch.uint8).view(-1).numpy()
        told = np.array([[0] * BYTES_AT + [own.size, 0]])
        which = own.size // max(1, len(come)), mail.place.numpy()
        into = placed.view(torch.uint8).numpy()
        _ALONE.read_and_receive(_NO_WINDOWS, _CALL, told, own, [own.size], which, into)
        return rows_op.Come(placed, True)

    modules: tuple[Any, ...] = (rows_op, sharded) if is_planned else (rows_op,)

    def run(number: int) -> None:
        before = [(each, each.meet_with_rows, each.received_rows) for each in modules]
        for each in modules:
            each.meet_with_rows, each.received_rows = meet, receive
        try:
            step(number)
        finally:
            for each, *functions in before:
                each.meet_with_rows, each.received_rows = functions

    return run


def ways(batches: Batches) -> dict[str, Way]:
    """Make all ways."""
    made = {BY_HAND: by_hand(batches, True), DENSE: by_hand(batches, False), DDP: replicated(batches)}
    dictionaries = Sharded(batches)
    for what in (NAMES, PLANNED, NAMES_UNCHECKED, PLANNED_UNCHECKED, TEXT, BF16):
        made[what] = dictionaries.way(what)
    return made


# -- what a rank measures ----------------------------------------------------------------------------------------------


def times(entries: int) -> dict[str, list[float]]:
    """Return nanoseconds of a step, a figure for each round; all ways take turns."""
    made = ways(Batches(entries, dist.get_rank(), STEPS))
    found = take_turns(made)
    check({what: way.values() for what, way in made.items()})
    return found


def checks(entries: int) -> dict[str, list[float]]:
    """Return the same of a step with and without checks, medians of many steps. Each way does one at a time.

    Each figure is of steps from the whole time, so that what else the machine does is in all of them alike.
    """
    dictionaries = Sharded(Batches(entries, dist.get_rank(), STEPS))
    ways = {what: dictionaries.way(what) for what in (NAMES, PLANNED, NAMES_UNCHECKED, PLANNED_UNCHECKED)}
    took: dict[str, list[int]] = {what: [] for what in ways}
    spent: dict[str, list[int]] = {what: [] for what in ways}
    # The first steps warm all up.
    for number in range(-STEPS, ROUNDS * STEPS_OF_CHECKS):
        # Any way may come before any other one. The order is the same on all ranks.
        for what in np.random.default_rng(number + STEPS).permutation(list(ways)).tolist():
            dist.barrier()
            begin, begin_cpu = perf_counter_ns(), process_time_ns()
            ways[what].step(number % STEPS)
            if number >= 0:
                took[what].append(perf_counter_ns() - begin)
                spent[what].append(process_time_ns() - begin_cpu)
    of_all = torch.tensor([spent[what] for what in ways], dtype=torch.float64)
    dist.all_reduce(of_all)
    found = {what: [float(np.median(each[at::ROUNDS])) for at in range(ROUNDS)] for what, each in took.items()}
    for what, each in zip(ways, of_all, strict=True):
        found[f"{what}{CPU}"] = [each[at::ROUNDS].mean().item() for at in range(ROUNDS)]
    return found


def take_turns(made: Mapping[str, Way]) -> dict[str, list[float]]:
    """Return nanoseconds of a step of each way, a figure for each round, and the CPU time of all ranks."""
    found: dict[str, list[float]] = {each: [] for what in made for each in (what, f"{what}{CPU}")}
    order = list(made)
    for number in range(1 + ROUNDS):
        for what in order[number % len(order) :] + order[: number % len(order)]:
            run = made[what].step
            run(0)
            dist.barrier()
            begin, begin_cpu = perf_counter_ns(), process_time_ns()
            for step in range(STEPS):
                run(step)
            spent = torch.tensor(process_time_ns() - begin_cpu, dtype=torch.float64)
            dist.all_reduce(spent)
            # The first round warms all up.
            if number:
                found[what].append((perf_counter_ns() - begin) / STEPS)
                found[f"{what}{CPU}"].append(spent.item() / STEPS)
    return found


def check(tables: Mapping[str, Tensor]) -> None:
    """Raise unless all ways have trained the same. Gradients are ones, so rows tell how often they were in a batch."""
    sums = torch.stack([table.double().sum() for table in tables.values()])
    # All ranks have all rows of DDP.
    sums[list(tables).index(DDP)] /= dist.get_world_size()
    dist.all_reduce(sums)
    totals = dict(zip(tables, sums.tolist(), strict=True))
    for what, total in totals.items():
        # Four ways have one dictionary.
        turns = 1 if what in (BY_HAND, DENSE, DDP, TEXT, BF16) else 4
        if abs(total / totals[BY_HAND] / turns - 1) > TOLERANCE:
            raise ValueError(f"what was timed gave wrong rows: {totals}")


def sent(entries: int) -> dict[str, list[float]]:
    """Return the bytes that all ranks send in a step: as counted, on the loopback interface, and by the formula."""
    batches = Batches(entries, dist.get_rank(), COUNTED_STEPS)
    found = {}
    for what, way in ways(batches).items():
        way.step(0)
        dist.barrier()
        before, on_wire = way.sent(), on_loopback()
        dist.barrier()
        for step in range(COUNTED_STEPS):
            way.step(step)
        dist.barrier()
        after = on_loopback()
        counted = torch.tensor(way.sent() - before, dtype=torch.float64)
        dist.all_reduce(counted)
        distinct = torch.tensor(batches.distinct(), dtype=torch.float64)
        dist.all_reduce(distinct)
        world = dist.get_world_size()
        row = FLOATS * (2 if what == BF16 else 4)
        formula = bytes_of_step(world, distinct.item() / world, row, 0 if what == PLANNED else 4)
        found[what] = [counted.item() / COUNTED_STEPS, (after - on_wire) / COUNTED_STEPS, formula]
    return found


def on_loopback() -> int:
    """Return the bytes that have gone over the loopback interface; 0 if that cannot be told."""
    if not INTERFACES.exists():
        return 0
    lines = [line.split() for line in INTERFACES.read_text().splitlines()]
    # Eight numbers are of what was received; the first of the others is the bytes that were sent.
    return next((int(words[9]) for words in lines if words and words[0] == "lo:"), 0)


def bytes_of_step(world: int, distinct: float, row_bytes: int, number_bytes: int = 4) -> float:
    """Return what all ranks send in a step with known names: the formula of the documentation.

    A plan that was made before has sent the numbers of rows already.
    """
    return (world - 1) * (128 * world + distinct * (number_bytes + 2 * row_bytes))


def grown(entries: int) -> dict[str, float]:
    """Return how far the memory of a rank grows at most with its names, rows and state, and the bytes of the cache."""
    world, rank = dist.get_world_size(), dist.get_rank()
    known = 1 << 14

    def train(count: int) -> Any:
        words = pdrs.distributed.ShardedParameterDict((FLOATS,), reserve=count // world * 21 // 20, known_names=known)
        optimizer = pdrs.optim.Adam(words.parameters())
        for start in range(0, count, AT_ONCE // 4 * world):
            first = start + AT_ONCE // 4 * rank
            names = [f"unit{n % 97:02}_{n:07}" for n in range(first, min(first + AT_ONCE // 4, count))]
            words.gather(names, "insert").sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return words, optimizer

    train(AT_ONCE)
    gc.collect()
    grown = torch.tensor(peak_beyond(lambda: train(entries)), dtype=torch.float64)
    dist.all_reduce(grown)
    return {"rank": grown.item() / world, "cache": float(known * cache_bytes_per_name(known))}


@functools.cache
def cache_bytes_per_name(count: int = AT_ONCE) -> float:
    """Return what the cache of rows takes for a name of 14 characters, if it holds as many as it may."""
    known = KnownRows(count)
    for start in range(0, 2 * count, 100):
        request = Request([f"unit{n % 97:02}_{n:07}" for n in range(start, start + 100)], known, 2)
        known.add(request, np.arange(100, dtype=np.uint32))
    return sys.getsizeof(known) / len(known)


MEASURES: dict[str, Callable[[int], Any]] = {"times": times, "checks": checks, "sent": sent, "grown": grown}


# -- launches ----------------------------------------------------------------------------------------------------------


def launched(world: int, what: str, entries: int, apart: bool = False, script: str = __file__) -> dict[str, Any]:
    """Measure in so many processes, and return what the first of them says.

    Parameters
    ----------
    apart
        Whether they have a network namespace of their own, so that the loopback interface counts nobody else.
    script
        What each of them runs.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with TemporaryDirectory(prefix="pdrs-benchmark-") as folder:
        output = Path(folder) / "figures.json"
        # The launcher of torch is torchrun.
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port()), os.path.abspath(script)]
        command += [what, str(entries), str(output)]
        if apart:
            command = [*_APART, *command]
        finished = subprocess.run(
            command, env=environment, timeout=STALLED_AFTER_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        if finished.returncode:
            raise RuntimeError(f"{what} failed in {world} processes:\n{finished.stdout}")
        found: dict[str, Any] = json.loads(output.read_text())
        return found


_APART = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@functools.cache
def can_be_apart() -> bool:
    """Whether this machine lets a user make a network namespace, and counts what goes over its loopback interface."""
    if shutil.which("unshare") is None or shutil.which("ip") is None or not INTERFACES.exists():
        return False
    return subprocess.run([*_APART, "true"], check=False, capture_output=True).returncode == 0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gc.disable()
    try:
        yield
    finally:
        dist.destroy_process_group()


# -- what follows for more ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """How fast links are, in bytes a second and direction, and how long a message takes at least.

    The figures are stated, not measured: 450 GB/s as NVLink has them on an H100, 400 Gb/s of network for each GPU, and
    2 microseconds for each message that a rank sends to another node.
    """

    ranks_of_a_node: int = 8
    within: float = 450e9
    between: float = 400e9 / 8
    message: float = 2e-6


@dataclass(frozen=True)
class Projected:
    """What a rank sends in a step, and how long that takes by the speed of links alone."""

    within: float
    between: float
    headers: float
    seconds: float
    seconds_of_messages: float


def projected(world: int, distinct: float, row_bytes: int, links: Links | None = None) -> Projected:
    """Return what a step of one rank sends by the formula, if owners are spread evenly."""
    links = links or Links()
    others = min(world, links.ranks_of_a_node) - 1
    beyond = world - 1 - others
    for_each = bytes_of_step(world, distinct, row_bytes) / world / max(1, world - 1)
    within, between = others * for_each, beyond * for_each
    # A header and rows there, gradients and a header back.
    messages = 3 * beyond * links.message
    return Projected(
        within, between, 128.0 * (world - 1), max(within / links.within, between / links.between), messages
    )


def fullest(world: int, distinct: int) -> float:
    """Return how much more the rank with most names of a batch has than the mean of all."""
    owners = owners_of([f"unit{n % 97:02}_{n:07}" for n in range(distinct)], world)
    return float(np.bincount(owners, minlength=world).max() * world / distinct)


def measure_here(measures: Mapping[str, Callable[[int], Any]]) -> None:
    """Measure in this process, one of several, what the command line says; the first writes it to a file."""
    what, entries, output = sys.argv[1:]
    with _group():
        measured = measures[what](int(entries))
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(measured), encoding="utf-8")
        dist.barrier()
        # Threads of gloo that outlive their group may end the process with a signal.
        os._exit(0)


if __name__ == "__main__":
    measure_here(MEASURES)
