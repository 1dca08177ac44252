"""Files that somebody has made on purpose: every number in them may be anything, and all checksums are right.

The bugs that this hunts: memory for sizes that a file only claims, which ends the process; an error of Python's or
torch's in the place of a CheckpointError; what opens, and fails at the first insertion; tables that share memory.

A seeded fuzzer changes fields of packed names, of headers and metadata, of deltas, of the index of shards and of what
``torch.save`` writes, and repairs the checksums. For a long run: ``python tests/files/test_forged_files.py 100000``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import random
import resource
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pdrs
from archives import Parts
from console import run as run_command
from pdrs.checkpoint import verify

Change = Callable[[bytes, random.Random], bytes]

ODD_NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    255,
    1 << 16,
    1 << 31,
    1 << 32,
    (1 << 40) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
ODD_VALUES = [
    *(
        0,
        1,
        -1,
        1 << 31,
        1 << 40,
        1 << 63,
        1 << 70,
        0.5,
        float("inf"),
        float("nan"),
        None,
        True,
        [],
        {},
        "",
        "a",
        "..",
        "/",
    ),
    *("\ud800", "\0", "x" * 5000, "same", "whole", "rows", "names", "full.st", [1 << 40, 0], [[], {}], {"": {"": ""}}),
]


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Let a size that a file claims and does not have fail at once."""
    with little_memory():
        yield


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- files, taken apart and put together -------------------------------------------------------------------------------


def change_value(value: Any, chance: random.Random) -> Any:
    """Return some JSON with one of its parts replaced by an odd one, or gone."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: change_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], change_value(value[at], chance), *value[at + 1 :]]
    return copy.deepcopy(chance.choice(ODD_VALUES))


def change_packed(data: bytes, chance: random.Random) -> bytes:
    """Return packed names, or a delta, with some number or byte of them replaced."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        if chance.random() < 0.75 and len(data) >= 24:
            # Numbers stand in front; those of tables and ids are eights, too.
            at = 8 * chance.randrange(1, min(len(data) // 8, 60))
            changed[at : at + 8] = struct.pack("<Q", chance.choice(ODD_NUMBERS))
        elif data:
            at = chance.randrange(len(data))
            changed[at] = chance.choice([0, 0x2E, 0x28, 0xED, 0xFF, chance.randrange(256)])
    return bytes(changed)


def change_file(data: bytes, chance: random.Random) -> bytes:
    """Return an archive, or any other safetensors file, that has been changed somewhere, with checksums that fit."""
    parts = Parts(data)
    fields = parts.metadata() if "pdrs" in parts.header.get("__metadata__", {}) else None
    kind = chance.randrange(4)
    if kind == 0 and fields is not None:
        fields = change_value(fields, chance)
        return parts.put_together(fields)
    if kind == 1:
        name = chance.choice(list(parts.tensors))
        shape = parts.header[name]["shape"]
        parts.header[name]["shape"] = (
            [*shape[:-1], 0] if chance.random() < 0.3 else [chance.choice(ODD_NUMBERS), *shape[1:]]
        )
        if 0 in parts.header[name]["shape"]:
            parts.tensors[name] = b""
        if chance.random() < 0.3:
            parts.header[name]["dtype"] = chance.choice(["U8", "BOOL", "F4", "F64", "C64", "I32", "F8_E8M0"])
    elif kind == 2 and len(parts.tensors) > 1:
        names = list(parts.tensors)
        one, other = chance.sample(names, 2)
        parts.header[one], parts.header[other] = parts.header[other], parts.header[one]
        parts.tensors[one], parts.tensors[other] = parts.tensors[other], parts.tensors[one]
    else:
        packed = [name for name in parts.tensors if "_extra_state" in name]
        name = chance.choice(packed or list(parts.tensors))
        parts.tensors[name] = change_packed(parts.tensors[name], chance)
    return parts.put_together(fields)


def change_torch(data: bytes, chance: random.Random) -> bytes:
    """Return what ``torch.save`` wrote with bytes changed, cut off, or changed within a record whose sum is right."""
    if chance.random() < 0.4:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 2, 8])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.1 else changed)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for record in old.infolist():
            content = bytearray(old.read(record))
            if record.filename.endswith(("data.pkl", "data/0", "byteorder", "version")) and chance.random() < 0.5:
                for _ in range(chance.choice([1, 1, 2])):
                    at = chance.randrange(len(content))
                    size = chance.choice([1, 1, 1, 4, 8])
                    odd = struct.pack("<Q", chance.choice(ODD_NUMBERS))[:size]
                    content[at : at + size] = odd
            new.writestr(record, bytes(content))
    return made.getvalue()


# -- what is done with them --------------------------------------------------------------------------------------------


def use(sd: pdrs.StackedParameterDict) -> None:
    """Do with a dictionary that has been opened what may find out that it is none."""
    assert len(sd) == len(list(sd)) == len(sd.keys())
    assert all(sd[name].shape is not None for name in list(sd)[:5])
    sd["a name that is new"] = torch.zeros(7)
    sd.pop("a name that is new")
    for name in list(sd)[:3]:
        sd.pop(name)
    copied = pdrs.StackedParameterDict()
    copied.load_state_dict(sd.state_dict())
    copied.compact()


def modules() -> list[torch.nn.Module]:
    return [
        pdrs.StackedParameterDict(),
        pdrs.ParameterDict(),
        saved(),
        torch.nn.ModuleDict({"a": pdrs.ParameterDict()}),
    ]


def attempt(path: Path) -> dict[str, int]:
    """Do everything with a file that reads one; count what succeeded. Any other error than the right ones is a bug."""
    done: dict[str, int] = {}

    def run(what: str, work: Callable[[], object], *others: type[Exception]) -> None:
        try:
            work()
            done[what] = 1
        except (pdrs.CheckpointError, *others):
            done[what] = 0

    run("open", lambda: use(pdrs.open(path)))
    run("read", lambda: use(pdrs.open(path, device="cpu")))
    run("chosen", lambda: pdrs.open(path, names=["name.1"], prefix=""), KeyError)
    run("verify", lambda: verify(path))
    for module in modules():
        # What is no damage is told as torch tells it.
        run("load", lambda module=module: pdrs.load(path, module), RuntimeError)  # type: ignore[misc]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for arguments in (["inspect"], ["inspect", "--json"], ["verify"]):
            run_command([*arguments, path])
        for layout in (".safetensors", ".pt"):
            run_command(["convert", path, path.with_name("converted" + layout)])
    assert "Traceback" not in quiet.getvalue()
    return done


def saved() -> pdrs.StackedParameterDict:
    sd = pdrs.StackedParameterDict({f"name.{n}": torch.full((3,), float(n)) for n in range(8)})
    sd.update({"é": torch.ones(2, 2), "int": torch.nn.Parameter(torch.arange(3), requires_grad=False)})
    sd["nothing"] = torch.empty(0)
    sd.pop("name.3")
    return sd


def with_many_tables() -> pdrs.ParameterDict:
    return pdrs.ParameterDict({f"n{n}": torch.full((n,), float(n)) for n in range(1, 20)})


def seeds(folder: Path) -> list[tuple[Path, Change]]:
    """Write files of all kinds; return each, and what changes it."""
    patterned = saved()
    patterned.param_groups({r"name\.[12]": {"lr": 0.1}})
    pdrs.save(patterned, folder / "full.st", sync=False)
    changed = copy.deepcopy(patterned)
    changed["name.1"] = torch.full((3,), 50.0)
    changed.pop("name.5")
    changed["new"] = torch.ones(3)
    pdrs.save(changed, folder / "delta.st", since=folder / "full.st", sync=False)
    module = torch.nn.ModuleDict({"a": with_many_tables(), "b": saved(), "c": torch.nn.Linear(2, 2)})
    pdrs.save(module, folder / "module.st", sync=False)
    pdrs.save(saved(), folder / "named.st", layout="named", sync=False)
    torch.save(patterned.state_dict(), folder / "state.pt")
    torch.save(with_many_tables().state_dict(), folder / "plain.pt")
    pdrs.save(saved(), folder / "shards.safetensors", layout="named", max_shard_size=40, sync=False)

    def change_index(data: bytes, chance: random.Random) -> bytes:
        return json.dumps(change_value(json.loads(data), chance)).encode()

    found: list[tuple[Path, Change]] = [
        (folder / name, change_file) for name in ("full.st", "delta.st", "module.st", "named.st")
    ]
    found += [(folder / name, change_torch) for name in ("state.pt", "plain.pt")]
    return [*found, (folder / "shards.safetensors.index.json", change_index)]


def fuzz(folder: Path, rounds: range) -> dict[str, int]:
    kinds = seeds(folder)
    seen = {"opened": 0, "refused": 0}
    gc.collect()
    gc.freeze()  # to look through all objects for optimizers takes most of the time otherwise
    try:
        return fuzz_each(kinds, rounds, seen)
    finally:
        gc.unfreeze()


def fuzz_each(kinds: list[tuple[Path, Change]], rounds: range, seen: dict[str, int]) -> dict[str, int]:
    for number in rounds:
        path, change = kinds[number % len(kinds)]
        chance = random.Random(number)
        bad = path.with_name("bad" + "".join(path.suffixes[-2:]))
        bad.write_bytes(change(path.read_bytes(), chance))
        try:
            done = attempt(bad)
        except BaseException:
            print("round", number, "of", path.name, flush=True)
            raise
        seen["opened" if done["open"] else "refused"] += 1
    return seen


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_changed_in_a_file_it_is_refused_as_one_or_opens_and_works(tmp_path: Path) -> None:
    seen = fuzz(tmp_path, range(112))
    assert seen["refused"] > 50, seen
    assert seen["opened"] > 10, seen


@pytest.mark.parametrize("within", [False, True])
def test_of_a_file_whose_last_table_is_wrong_nothing_is_loaded(tmp_path: Path, within: bool) -> None:
    entries = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(2)}
    kept = pdrs.ParameterDict({name: torch.zeros_like(one) for name, one in entries.items()})
    of_what = {False: pdrs.ParameterDict(entries), True: torch.nn.ModuleDict({"in": pdrs.ParameterDict(entries)})}
    into = {False: kept, True: torch.nn.ModuleDict({"in": kept})}
    pdrs.save(of_what[within], tmp_path / "full.st", sync=False)
    parts = Parts((tmp_path / "full.st").read_bytes())
    (name,) = (name for name in parts.tensors if name.endswith("float32_2"))
    parts.header[name]["shape"], parts.tensors[name] = [1, 2], parts.tensors[name][:8]
    (tmp_path / "bad.st").write_bytes(parts.put_together(parts.metadata()))
    with pytest.raises(pdrs.CheckpointError, match="2 rows are in use"):
        pdrs.load(tmp_path / "bad.st", into[within])
    assert all((one == 0).all() for one in kept.values())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    first = int(sys.argv[2]) if sys.argv[2:] else 0
    with tempfile.TemporaryDirectory() as place, little_memory():
        print(fuzz(Path(place), range(first, first + int(sys.argv[1]))))
