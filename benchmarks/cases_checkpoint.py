"""``pdrs.save``, and what reads a file whole, beside torch, safetensors, tensordict, distributed checkpoints, and cp.

The suite ``serving`` measures files that are opened and not read.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

import pdrs
from measure import LARGE_FROM_ENTRIES, Case, Claim, Suite, Target, Task, timed
from memory import all_bytes_per_entry, names_of, peak_beyond
from page_cache import can_drop, drop
from pdrs._files.safetensors_file import SafetensorsFile

FLOATS = 16
NAME_BYTES = 14
VALUE_BYTES = 4 * FLOATS
# Part of the entries that is looked at, loaded or changed.
PART = 100
FIRST_LOOKS = 1_000
BLOCK_BYTES = 64 << 20
LARGEST = 10_000_000
MILLION = 1_000_000

TORCH, SAFETENSORS, TENSORDICT, DCP, CP, PDRS = "torch", "safetensors", "tensordict", "DCP", "cp", "pdrs"
# They take a file, or a millisecond, for each tensor.
SMALL_ONLY = 10_000
# Beyond this torch.load takes a minute, also to map a file.
TORCH_MAPS_AT_MOST = 100_000
# In processes of their own, which build everything anew.
MEASURED_APART_AT_MOST = 100_000

SAVED = "save, archive"
LOADED = "open and load everything"


class Data:
    """The same names and values for all, and the files that they were saved to: made when they are asked for."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._folder = tempfile.TemporaryDirectory(prefix="pdrs-benchmark-")
        self.folder = Path(self._folder.name)
        self._saved: set[str] = set()
        self._peaks: dict[str, tuple[float, ...]] = {}

    @cached_property
    def names(self) -> list[str]:
        """The names, of 14 characters."""
        return names_of(self.entries)

    @cached_property
    def rows(self) -> Tensor:
        """The values of all entries, ``[entries, FLOATS]``."""
        return torch.randn(self.entries, FLOATS)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """What the ``state_dict()`` of torch's class is: tensors that have memory of their own, each."""
        return dict(zip(self.names, (row.clone() for row in self.rows.unbind()), strict=True))

    @cached_property
    def stacked(self) -> pdrs.StackedParameterDict:
        """What pdrs saves."""
        return pdrs.StackedParameterDict.from_tensor(self.names, self.rows)

    @cached_property
    def changed(self) -> pdrs.StackedParameterDict:
        """The same, but for some rows."""
        changed = self.stacked.copy()
        with torch.no_grad():
            changed.table((FLOATS,))[self.some_rows] += 1
        return changed

    @cached_property
    def some_rows(self) -> Tensor:
        """Rows that lie here and there, one in a hundred."""
        drawn = random.Random(0).sample(range(self.entries), max(1, self.entries // PART))
        return torch.tensor(sorted(drawn))

    def forget(self) -> None:
        """Free what has been made, but for the files."""
        for name in ("names", "rows", "state", "stacked"):
            self.__dict__.pop(name, None)

    def peaks(self, subject: str) -> tuple[float, ...]:
        """Return the bytes an entry that saving and loading take at their peaks, beside what was there."""
        if subject not in self._peaks:
            self._peaks[subject] = all_bytes_per_entry(f"checkpoint/{subject}", self.entries)
        return self._peaks[subject]

    def source(self, subject: str) -> Any:
        """Return what a container saves."""
        return self.stacked if subject == PDRS else self.state

    def path(self, subject: str) -> Path:
        """Return where a container saves to."""
        return self.folder / {SAFETENSORS: "peer.safetensors", PDRS: "archive.safetensors"}.get(subject, subject)

    def saved(self, subject: str) -> Path:
        """Return what a container has saved; it is saved now, if it was not."""
        path = self.path(subject)
        if subject not in self._saved:
            SAVE[subject](self.source(subject), path)
            self._saved.add(subject)
        return path

    def saving(self, subject: str) -> Task:
        """Make the task of a save, in the place of what was there. Nothing else waits to be written meanwhile."""
        path, source = self.path(subject), self.source(subject)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.sync()
        self._saved.add(subject)
        return Task(lambda: SAVE[subject](source, path), self.entries, lambda _: size_of(path) > self.rows.nbytes)

    def is_row(self, row: Tensor, at: int) -> bool:
        """Whether a tensor has the values of an entry."""
        return torch.equal(row.detach(), self.rows[at])

    def has_ends(self, found: Any) -> bool:
        """Whether a mapping has the first and the last entry."""
        return self.is_row(found[self.names[0]], 0) and self.is_row(found[self.names[-1]], self.entries - 1)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


# -- what each of them does --------------------------------------------------------------------------------------------


def _save_distributed(state: dict[str, Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        # That there is one process.
        warnings.simplefilter("ignore")
        save_distributed(dict(state), checkpoint_id=path, no_dist=True)


def _load_distributed(path: Path) -> dict[str, Tensor]:
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_distributed(state, checkpoint_id=path, no_dist=True)
    return state


def _load_tensordict(path: Path) -> Any:
    return TensorDict.load_memmap(path).clone()


SAVE: dict[str, Callable[[Any, Path], Any]] = {
    TORCH: torch.save,
    SAFETENSORS: save_file,
    TENSORDICT: lambda state, path: TensorDict(state).memmap(path),
    DCP: _save_distributed,
    PDRS: pdrs.save,
}
OPEN: dict[str, Callable[[Path], Any]] = {
    TORCH: lambda path: torch.load(path, weights_only=True, mmap=True),
    SAFETENSORS: lambda path: safe_open(path, "pt"),
    TENSORDICT: TensorDict.load_memmap,
    PDRS: pdrs.open,
}
LOAD: dict[str, Callable[[Path], Any]] = {
    TORCH: lambda path: torch.load(path, weights_only=True),
    SAFETENSORS: load_file,
    TENSORDICT: _load_tensordict,
    DCP: _load_distributed,
    PDRS: partial(pdrs.open, device="cpu"),
}


def _get(subject: str, opened: Any, name: str) -> Tensor:
    found: Tensor = opened.get_tensor(name) if subject == SAFETENSORS else opened[name]
    return found


# -- the cases ---------------------------------------------------------------------------------------------------------


def _save(subject: str, data: Data) -> Task:
    if subject != CP:
        return data.saving(subject)
    source, copied = data.saved(PDRS), data.path(CP)
    copied.unlink(missing_ok=True)
    os.sync()
    return Task(lambda: _copy(source, copied, sync=True), data.entries, lambda _: size_of(copied) == size_of(source))


def _copy(source: Path, copied: Path, sync: bool) -> None:
    subprocess.run(["cp", source, copied], check=True)
    if sync:
        subprocess.run(["sync", copied], check=True)


def _save_parameters(_: str, data: Data) -> Task:
    source, path = pdrs.ParameterDict(data.state), data.folder / "parameters.safetensors"
    os.sync()
    return Task(lambda: pdrs.save(source, path), data.entries, lambda _: size_of(path) > data.rows.nbytes)


def _save_named(subject: str, data: Data) -> Task:
    if subject == SAFETENSORS:
        return data.saving(subject)
    folder = data.folder / "named"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    return Task(
        lambda: pdrs.save(data.stacked, folder / "model.safetensors", layout="named"),
        data.entries,
        lambda _: size_of(folder) > data.rows.nbytes,
    )


def _load(subject: str, data: Data, prepare: Callable[[Path], Any] = lambda path: None) -> Task:
    if subject == CP:
        source, copied = data.saved(PDRS), data.path(CP)
        copied.unlink(missing_ok=True)
        os.sync()
        prepare(source)
        return Task(lambda: _copy(source, copied, sync=False), data.entries, lambda _: copied.exists())
    path = data.saved(subject)
    prepare(path)
    return Task(lambda: LOAD[subject](path), data.entries, data.has_ends)


def _load_tables(subject: str, data: Data) -> Task:
    if subject == CP:
        source, copied = data.folder / "tables", data.folder / "tables.copy"
        source.write_bytes(data.rows.numpy().data)
        copied.unlink(missing_ok=True)
        os.sync()
        return Task(lambda: _copy(source, copied, sync=False), data.entries, lambda _: copied.exists())
    file = SafetensorsFile(data.saved(PDRS))
    (table,) = (name for name in file if file.shape(name) == (data.entries, FLOATS))
    return Task(lambda: file.load(table), data.entries, lambda found: torch.equal(found, data.rows))


def _load_named_file(subject: str, data: Data) -> Task:
    path = data.saved(SAFETENSORS)
    return Task(lambda: (load_file if subject == SAFETENSORS else pdrs.open)(path), data.entries, data.has_ends)


def _load_into_parameters(_: str, data: Data) -> Task:
    path = data.saved(PDRS)
    module = pdrs.ParameterDict(dict(zip(data.names, torch.zeros(data.entries, FLOATS).unbind(), strict=True)))
    return Task(lambda: pdrs.load(path, module), data.entries, lambda _: data.has_ends(module))


def _first_looks(subject: str, data: Data, prepare: Callable[[Path], Any] = lambda path: None) -> Task:
    path = data.saved(subject)
    prepare(path)
    opened = OPEN[subject](path)
    rows = random.Random(1).sample(range(data.entries), min(FIRST_LOOKS, data.entries))
    names = [data.names[row] for row in rows]

    def run() -> Tensor:
        for name in names:
            # A mapped row is read when it is looked at.
            found = _get(subject, opened, name)
            found[0].item()
        return found

    return Task(run, len(names), lambda found: data.is_row(found, rows[-1]))


def _save_changes(_: str, data: Data) -> Task:
    before, path = data.saved(PDRS), data.folder / "changes.safetensors"
    changed = data.changed
    path.unlink(missing_ok=True)
    os.sync()
    return Task(lambda: pdrs.save(changed, path, since=before), data.entries, lambda _: path.exists())


def _open_changes(_: str, data: Data) -> Task:
    path = data.folder / "changes.safetensors"
    pdrs.save(data.changed, path, since=data.saved(PDRS))
    at = int(data.some_rows[-1])
    return Task(
        lambda: pdrs.open(path),
        data.entries,
        lambda opened: torch.equal(opened[data.names[at]].detach(), data.rows[at] + 1),
    )


def _bytes_of_changes(subject: str, data: Data) -> float:
    if subject != PDRS:
        return _bytes_of_file(subject, data)
    path = data.folder / "changes.safetensors"
    pdrs.save(data.changed, path, since=data.saved(PDRS))
    return size_of(path) / data.entries


def _bytes_of_file(subject: str, data: Data) -> float:
    return size_of(data.saved(subject)) / data.entries


def _peak(what: int) -> Callable[[str, Data], float]:
    return lambda subject, data: data.peaks(subject)[what]


def extra_memory(subject: str, entries: int) -> tuple[int, int]:
    """Count what saving and loading take at their peaks, beside what was there; for a fresh process."""
    # Whatever is done for the first time loads libraries.
    warm = Data(10)
    LOAD[subject](warm.saved(subject))
    data = Data(entries)
    path, save = data.path(subject), partial(SAVE[subject], data.source(subject), data.path(subject))
    saving = peak_beyond(save)
    del save
    data.forget()
    return saving, peak_beyond(lambda: LOAD[subject](path))


def _from_disk(
    make_task: Callable[[str, Data, Callable[[Path], Any]], Task],
) -> Callable[[str, Data], Task]:
    return lambda subject, data: make_task(subject, data, _drop)


def _drop(path: Path) -> None:
    if not drop(path):
        raise RuntimeError(f"{path} is still in the page cache")


# A million small tensors take others seconds to minutes, so once must do.
SLOW = {TORCH: LARGE_FROM_ENTRIES, SAFETENSORS: LARGE_FROM_ENTRIES, TENSORDICT: 1, DCP: 1}
UP_TO = {TENSORDICT: SMALL_ONLY, DCP: SMALL_ONLY, TORCH: MILLION, SAFETENSORS: MILLION, CP: LARGEST}
MAPPED = UP_TO | {TORCH: TORCH_MAPS_AT_MOST}
APART = UP_TO | {TORCH: MEASURED_APART_AT_MOST, SAFETENSORS: MEASURED_APART_AT_MOST}
COLD_NOTE = "The file is not in the page cache: `posix_fadvise(POSIX_FADV_DONTNEED)`, seen to be gone by `mincore`."


def _case(
    title: str,
    make_task: Callable[[str, Data], Task],
    subjects: tuple[str, ...] = (PDRS,),
    targets: tuple[Target, ...] = (),
    **options: Any,
) -> Case[Data]:
    all_options: dict[str, Any] = {"up_to": UP_TO, "slow": SLOW, "most_runs": 3} | options
    return Case(title, timed(make_task), subjects, targets, **all_options)


def _bytes(
    title: str, sample: Callable[[str, Data], float], targets: tuple[Target, ...] = (), **options: Any
) -> Case[Data]:
    all_options: dict[str, Any] = {"up_to": UP_TO} | options
    return Case(title, sample, targets=targets, once=True, unit="B", **all_options)


CASES: tuple[Case[Data], ...] = (
    _case(
        SAVED,
        _save,
        (TORCH, SAFETENSORS, TENSORDICT, DCP, CP, PDRS),
        (Target("ratio", TORCH, 100), Target("ratio", SAFETENSORS, 80), Target("ratio", CP, 0.6)),
        larger_sizes=(LARGEST,),
        note="Ours and cp, of the archive, wait until the bytes are on the disk (`fsync`, `sync`); the others do not."
        " torch and safetensors save a state dict of a tensor a name, pdrs a StackedParameterDict.",
    ),
    _case("save, archive of a ParameterDict", _save_parameters),
    _case(
        "save, a tensor a name",
        _save_named,
        (SAFETENSORS, PDRS),
        (Target("ratio", SAFETENSORS, 30),),
        note='`pdrs.save(sd, path, layout="named")`: safetensors files that other tools read.',
    ),
    _case(
        LOADED,
        _load,
        (TORCH, SAFETENSORS, TENSORDICT, DCP, CP, PDRS),
        (Target("ratio", TORCH, 200), Target("ratio", SAFETENSORS, 60)),
        larger_sizes=(LARGEST,),
        note='`pdrs.open(path, device="cpu")`: the index of the names is made, and all tables are read into memory. cp'
        " copies the archive, makes no index, and waits for no disk.",
    ),
    _case(
        "load the table data alone",
        _load_tables,
        (CP, PDRS),
        (Target("ratio", CP, 0.6),),
        larger_sizes=(LARGEST,),
        note="Of an archive that is open, without the names: what the case above does beside making the index. cp"
        " copies a file of as many bytes as the table has, and waits for no disk.",
    ),
    _case("load into a ParameterDict", _load_into_parameters),
    _case(
        "open a file of safetensors, a tensor a name",
        _load_named_file,
        (SAFETENSORS, PDRS),
        (Target("ratio", SAFETENSORS, 20),),
        note="`safetensors.torch.load_file`, and `pdrs.open` of the same file, which stacks the tensors.",
    ),
    _case(
        "first look at an entry",
        _first_looks,
        (TORCH, SAFETENSORS, TENSORDICT, PDRS),
        (Target("ratio", SAFETENSORS, 1),),
        up_to=MAPPED,
        note=f"A number of each of {FIRST_LOOKS:,} random entries is read, right after the file was opened. Per entry.",
    ),
    _case("save what has changed, one entry in a hundred", _save_changes, note="`pdrs.save(sd, path, since=before)`."),
    _case("open what has changed", _open_changes, note="And the archive that it continues."),
    _case(
        "open and load everything, from the disk",
        _from_disk(_load),
        (SAFETENSORS, CP, PDRS),
        needs=can_drop,
        note=COLD_NOTE,
    ),
    _bytes(
        "size of the file",
        _bytes_of_file,
        (Target("total", SAFETENSORS, VALUE_BYTES + NAME_BYTES + 24),),
        subjects=(TORCH, SAFETENSORS, TENSORDICT, DCP, PDRS),
        larger_sizes=(LARGEST,),
        note=f"{VALUE_BYTES} bytes are values, {NAME_BYTES} are the name.",
    ),
    _bytes(
        "bytes written when one entry in a hundred has changed",
        _bytes_of_changes,
        # Three in a hundred of values, names, and what there is beside them.
        (Target("total", SAFETENSORS, 0.03 * (VALUE_BYTES + NAME_BYTES)),),
        subjects=(SAFETENSORS, PDRS),
    ),
    _bytes(
        "extra memory while saving",
        _peak(0),
        (Target("total", PDRS, BLOCK_BYTES / MILLION),),
        subjects=(TORCH, SAFETENSORS, PDRS),
        up_to=APART,
        note="The peak beyond what was there, in a process of its own (`VmHWM` of Linux), here and in the next.",
    ),
    _bytes("extra memory, everything loaded", _peak(1), subjects=(TORCH, SAFETENSORS, PDRS), up_to=APART),
)

SUITE = Suite(
    name="checkpoint",
    title="Checkpoints",
    subjects=(TENSORDICT, DCP, CP, TORCH, SAFETENSORS, PDRS),
    baselines=(SAFETENSORS, TORCH, CP),
    cases=CASES,
    make_data=Data,
    intro=f"Entries of {FLOATS} float32 under names of {NAME_BYTES} characters, saved and loaded on the CPU. The page"
    " cache is warm unless a line says otherwise. At 80,000 entries and more, torch and safetensors run once; so do, at"
    f" {SMALL_ONLY:,} entries and no more, tensordict's memory maps and distributed checkpoints (DCP).",
    marker="benchmark-checkpoint",
    claims=(Claim(SAVED, "save", together=CP, apart=SAFETENSORS),),
)
