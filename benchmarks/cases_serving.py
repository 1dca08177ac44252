"""A file that is opened to be served: by ``pdrs.open`` beside safetensors, torch, and a dictionary in memory."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pdrs
import serving
from measure import LARGE_FROM_ENTRIES, Case, Claim, Suite, Target
from page_cache import can_drop
from serving import BATCH, BELOW_PREFIX, IN_MEMORY, LOOKED_UP, PDRS, PROCESSES, SAFETENSORS, TORCH

SMALL, MILLION = 10_000, 1_000_000
# Beyond this torch.load takes a minute, also to map a file.
TORCH_AT_MOST = 100_000

ANSWERED = "open and look a name up"


class Data:
    """The files that are served, and the figures of the processes that have served them.

    A process gives figures of several cases. So each case takes them in turn, and one more process starts when a case
    has taken all.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._folder = tempfile.TemporaryDirectory(prefix="pdrs-benchmark-")
        self.folder = Path(self._folder.name)
        self._saved: set[Path] = set()
        self._figures: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        self._taken: Counter[tuple[str, str, int]] = Counter()

    def saved(self, subject: str) -> Path:
        """Make the files of a container if they are not there, and return the folder."""
        for entries in {self.entries, serving.WARM_ENTRIES}:
            path = serving.file_of(subject, self.folder, entries)
            if path not in self._saved:
                path.parent.mkdir(exist_ok=True)
                _save(subject, path, entries)
                self._saved.add(path)
        return self.folder

    def figure(self, what: str, subject: str, place: int) -> float:
        """Return a figure of a process that has not been taken yet."""
        folder = self.saved(subject)
        found = self._figures.setdefault((what, subject), [])
        number = self._taken[what, subject, place]
        if number == len(found):
            found.append(serving.measured(what, subject, folder, self.entries))
        self._taken[what, subject, place] += 1
        return found[number][place]


def _save(subject: str, path: Path, entries: int) -> None:
    names, rows = [serving.name_of(row) for row in range(entries)], serving.values_of(entries)
    if subject in (IN_MEMORY, PDRS):
        pdrs.save(pdrs.StackedParameterDict.from_tensor(names, rows), path)
        return
    state = dict(zip(names, (row.clone() for row in rows.unbind()), strict=True))
    if subject == TORCH:
        torch.save(state, path)
    else:
        save_file(state, path)


# A million small tensors take others seconds, so once must do.
SLOW = {TORCH: LARGE_FROM_ENTRIES, SAFETENSORS: LARGE_FROM_ENTRIES}
UP_TO = {TORCH: TORCH_AT_MOST, SAFETENSORS: MILLION}
ON_LINUX = sys.platform == "linux"


def _case(
    title: str,
    place: int,
    subjects: tuple[str, ...],
    targets: tuple[Target, ...],
    what: str = "alone",
    per: int | None = 1,
    **options: Any,
) -> Case[Data]:
    """Make a case of a figure that a process gives; ``per`` is what it is divided by, or None for the names."""

    def sample(subject: str, data: Data) -> float:
        return data.figure(what, subject, place) / (per or data.entries)

    all_options: dict[str, Any] = {"up_to": UP_TO, "slow": SLOW, "needs": lambda: ON_LINUX} | options
    return Case(title, sample, subjects, targets, **all_options)


def _bytes(title: str, sample: Callable[[str, Data], float], bound: Target, **options: Any) -> Case[Data]:
    all_options: dict[str, Any] = {"up_to": UP_TO, "needs": lambda: ON_LINUX} | options
    return Case(title, sample, targets=(bound,), once=True, unit="B", **all_options)


def _own(place: int) -> Callable[[str, Data], float]:
    return lambda subject, data: data.figure("alone", subject, place) / data.entries


def _shared(subject: str, data: Data) -> float:
    return serving.proportional_share(subject, data.saved(subject), data.entries) / data.entries


def _copied(place: int) -> Callable[[str, Data], float]:
    return lambda subject, data: data.figure("forked", subject, place)


FROM_FILE = (SAFETENSORS, PDRS)
ALL = (SAFETENSORS, IN_MEMORY, PDRS)
CASES: tuple[Case[Data], ...] = (
    _case(
        "open",
        serving.OPENED,
        (TORCH, SAFETENSORS, PDRS),
        (Target("ratio", SAFETENSORS, 100), Target("growth", PDRS, 2)),
        extra_sizes=(SMALL,),
        note="`torch.load(mmap=True)`; `safe_open`; `pdrs.open`. In all, not per name.",
    ),
    _case(ANSWERED, serving.ANSWERED, FROM_FILE, (Target("ratio", SAFETENSORS, 100),), note="In all."),
    _case(
        f"{ANSWERED}, from the disk",
        serving.ANSWERED,
        FROM_FILE,
        (Target("ratio", SAFETENSORS, 10),),
        what="from_disk",
        needs=lambda: ON_LINUX and can_drop(),
        note="The file is not in the page cache: `posix_fadvise(POSIX_FADV_DONTNEED)`, seen to be gone by `mincore`.",
    ),
    _case(
        f"open {BATCH:,} names",
        serving.SOME_NAMES,
        FROM_FILE,
        (Target("ratio", SAFETENSORS, 10),),
        note="`pdrs.open(path, names=names)`; `safe_open` and `get_tensor` of each. In all.",
    ),
    _case(
        f"open the {BELOW_PREFIX:,} names below a prefix",
        serving.A_PREFIX,
        FROM_FILE,
        (Target("ratio", SAFETENSORS, 3),),
        note="`pdrs.open(path, prefix=prefix)`, which reads all names; `keys` and `get_tensor` of each. In all.",
    ),
    _case(
        f"gather {BATCH:,} random names, first",
        serving.FIRST_BATCH,
        ALL,
        (Target("ratio", SAFETENSORS, 3),),
        per=BATCH,
        note="Right after the file was opened, per name: pages of the file are mapped meanwhile.",
    ),
    _case(
        f"gather {BATCH:,} random names, later",
        serving.LATER_BATCH,
        (IN_MEMORY, PDRS),
        (Target("ratio", IN_MEMORY, 0.8),),
        per=BATCH,
        note="After each name was looked up once. Per name.",
    ),
    _bytes(
        "memory of its own, opened",
        _own(serving.OWN_OPENED),
        Target("total", PDRS, 2),
        subjects=ALL,
        note="Per name, after a look-up, here and below. `RssAnon`: pages of the file are not counted.",
    ),
    _bytes(
        f"memory of its own, {BATCH:,} names gathered",
        _own(serving.OWN_AFTER_BATCH),
        Target("total", PDRS, 2),
        subjects=ALL,
    ),
    _bytes(
        f"memory of {PROCESSES} processes that serve one file",
        _shared,
        Target("ratio", IN_MEMORY, 4),
        subjects=ALL,
        note=f"Of all together, per name in the file. Each gathers {BATCH:,} random names. Pages of the file count once"
        " in all (`Pss`), pages of libraries do not.",
    ),
    _bytes(
        "copied by a forked child that looks each name up",
        _copied(0),
        Target("total", PDRS, 1),
        subjects=(IN_MEMORY, PDRS),
        note=f"Growth of `Private_Dirty`, per name looked up, {LOOKED_UP:,} at most. The parent has opened the file.",
    ),
    _bytes(
        "copied by a forked child that walks over the names",
        _copied(1),
        Target("total", PDRS, 1),
        subjects=(IN_MEMORY, PDRS),
        note="`for name in sd`, per name.",
    ),
)

SUITE = Suite(
    name="serving",
    title="Serving",
    subjects=(TORCH, SAFETENSORS, IN_MEMORY, PDRS),
    baselines=(SAFETENSORS, IN_MEMORY),
    cases=CASES,
    make_data=Data,
    intro=f"Entries of {serving.FLOATS} float32 under names of 14 characters, in one file. The page cache is warm"
    " unless a line says otherwise. *In memory* is a StackedParameterDict that each process made by `from_tensor`. At"
    " 80,000 entries and more, torch and safetensors run once.",
    turns="each run was in a process of its own, with one thread of torch, and with the garbage collector off",
    marker="benchmark-serving",
    page="serving.md",
    claims=(Claim(ANSWERED, "open, and look a name up", apart=SAFETENSORS, names=1),),
)
