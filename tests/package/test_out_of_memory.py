"""What happens where memory ends: a MemoryError, and everything as it was.

The bugs that this hunts: a native list, table or text that grows with the number of names and ends the process where it
cannot be had; a panic in the place of an error; names that are gone, or there, although the call failed.

Each work is done in a child process with room for a little more than it has, then for more, until it succeeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import copy, gc, pickle, resource, sys
import numpy as np, torch, pdrs

N, folder = 30_000, sys.argv[1]
names, others = [f"name.{n}" for n in range(N)], [f"other.{n}" for n in range(N)]
new = dict.fromkeys(others, 1)
SD = pdrs.StackedParameterDict

def index():
    return pdrs.IndexMap.from_names(names)

def stacked():
    return SD.from_tensor(names, torch.zeros(N, 2))

def large():
    # To pack its names takes more than what earlier works left to the allocator.
    return SD.from_tensor([f"a.rather.long.name.{n}" for n in range(200_000)], torch.zeros(200_000, 1))

def entries():
    return pdrs.ParameterDict({name: torch.zeros(1) for name in names[:4000]})

def many():
    return pdrs.ParameterDict(dict.fromkeys(names[:20000], torch.nn.Parameter(torch.zeros(1))))

def none():
    return None

def seen(made):
    if isinstance(made, SD):
        # A table may have grown before there was no memory for the rest.
        return len(made), hash(tuple(made)), list(made.tables()), float(made.norms().sum()) if len(made) else 0.0
    if isinstance(made, pdrs.ParameterDict):
        assert list(made) == list(made._parameters)
        return len(made), made[names[2500]]._cdata, next(made.parameters()).dtype
    return len(made) if made is not None else 0

def one_by_one(made):
    for name in others:
        made[name] = 1

def pops(made):
    for name in names[1::3]:
        made.pop(name)

def takes(made):
    kept, at = [None] * N, 0
    try:
        while at < N:
            kept[at] = made.popitem(at % 2 == 0)
            at += 1
    except MemoryError:
        assert at + len(made) == N
        raise

def moves(made):
    for name in names[1::3]:
        made.move_to_end(name)

dropped = stacked()
dropped.drop(names[::7])
full, delta, named = (folder + "/" + name for name in ("full", "delta", "named"))
pdrs.save(stacked(), full, sync=False)
pdrs.save(dropped, delta, since=full, sync=False)
pdrs.save(stacked(), named, layout="named", sync=False)
state = stacked().state_dict()
pickled = pickle.dumps(index())
rows = torch.zeros(N, 2)
additions = [dict.fromkeys(others[:more], torch.nn.Parameter(torch.zeros(1))) for more in (2000, 9000, 20000)]

WORKS = {
    "maps": [
        (none, lambda _: pdrs.IndexMap.from_names(names)),
        (none, lambda _: pdrs.IndexMap.from_names(iter(names))),
        (none, lambda _: pdrs.IndexMap.from_names(names + names)),
        (none, lambda _: pdrs.IndexMap.from_names(names, np.arange(N))),
        (none, lambda _: pickle.loads(pickled)),
        (index, lambda made: made.extend(others)),
        (index, lambda made: made.update(new)),
        (index, lambda made: made.indices(names)),
        (index, lambda made: made.indices(others, missing=-1)),
        (index, lambda made: made.copy()),
        (index, lambda made: made.indices()),
        (index, lambda made: list(made.items())),
        (index, lambda made: made == made.copy()),
        (index, pickle.dumps),
    ],
    "parts": [(pdrs.IndexMap, one_by_one), (index, pops), (index, takes), (index, moves)],
    "tables": [
        (none, lambda _: SD.from_tensor(names, rows)),
        (stacked, lambda made: made.gather(names)),
        (stacked, lambda made: made.drop(names[::2])),
        (stacked, lambda made: made.update(dict.fromkeys(others[:999], rows[0]))),
        (stacked, lambda made: made.unstack()),
        (stacked, copy.deepcopy),
        (stacked, lambda made: made.state_dict()),
        (SD, lambda made: made.load_state_dict(state)),
        *((many, lambda made, new=new: made.update(new)) for new in additions),
        *((many, lambda made, new=new: made.update(new.items())) for new in additions),
        (entries, lambda made: made.stack()),
        (entries, lambda made: made.state_dict()),
        (entries, copy.deepcopy),
        (entries, lambda made: made.double()),
        (lambda: copy.deepcopy(dropped), lambda made: made.compact()),
    ],
    "files": [
        (stacked, lambda made: pdrs.save(made, folder + "/new", sync=False)),
        (large, lambda made: pdrs.save(made, folder + "/large", sync=False)),
        (stacked, lambda made: pdrs.save(made, folder + "/named_new", layout="named", sync=False)),
        (none, lambda _: pdrs.open(full)),
        (none, lambda _: pdrs.open(delta)),
        (none, lambda _: pdrs.open(named)),
        (none, lambda _: pdrs.open(full, names=names[::2])),
        (stacked, lambda made: pdrs.load(named, made)),
    ],
}

def attempt(work, made, room):
    gc.collect()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, limit))
    try:
        work(made)
    except MemoryError:
        return False
    except RuntimeError as error:
        # What torch raises where it has no memory.
        if "allocate memory" not in str(error) and "bad_alloc" not in str(error):
            raise
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return True

# What C libraries begin once ends a process that has no memory for it.
small = SD.from_tensor(["a", "b", "c"], torch.zeros(3, 2))
copy.deepcopy(small).compact()
small.gather(["a"])
small.unstack().double().stack().load_state_dict(small.state_dict())
pickle.loads(pickle.dumps(pdrs.IndexMap({"a": 1})))
pdrs.open(full, names=[names[0]])
gc.collect()
gc.freeze()  # what is there by now need not be looked at again
limit = resource.getrlimit(resource.RLIMIT_AS)[1]
for kind, works in WORKS.items():
    failed = 0
    for number, (make, work) in enumerate(works):
        for room in [*range(0, 6 << 20, 3 << 17), 1 << 29]:
            made = make()
            before = seen(made)
            print(kind, number, "with", room, "bytes", flush=True)
            if attempt(work, made, room):
                break
            failed += 1
            assert kind == "parts" or seen(made) == before, (kind, number, before, seen(made))
            if made is not None and kind == "maps":
                assert list(made) == names and made[names[7]] == 7
        else:
            raise AssertionError(f"{kind} {number} fails with memory enough")
    print(kind, "failed", failed)
"""


LONG_NAMES = """
import resource, sys, torch, pdrs
SD = pdrs.StackedParameterDict
long = "\\xe9" * 40_000_000
sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2))
if sys.argv[1] == "opened":
    pdrs.save(sd, sys.argv[2], sync=False)
    sd = pdrs.open(sys.argv[2])
row = torch.zeros(2)
works = {
    "in": lambda: long in sd,
    "get": lambda: sd.get(long),
    "set": lambda: sd.__setitem__(long, row),
    "pop": lambda: sd.pop(long, None),
    "gather": lambda: sd.gather(["a", long], missing="zero"),
    "gather tuple": lambda: sd.gather(("a", long), missing="skip"),
    "isin": lambda: sd.isin([long, "b"]),
    "insert": lambda: sd.insert([long], shape=(2,)),
    "rename": lambda: sd.rename("a", long),
    "drop": lambda: sd.drop([long]),
    "prefix": lambda: list(sd.keys(prefix=long)),
    "from_tensor": lambda: SD.from_tensor(["a", long], torch.zeros(2, 2)),
    "from_tensor, twice": lambda: SD.from_tensor([long, long], torch.zeros(2, 2)),
}
hash(long)
limit = resource.getrlimit(resource.RLIMIT_AS)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for what, work in works.items():
    resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, limit))
    try:
        work()
        print(what, "done")
    except MemoryError:
        print(what, "MemoryError")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assert list(sd) == ["a", "b"], what
sd.insert([long], shape=(2,))
assert long in sd and sd.isin(["c", long]).tolist() == [False, True] and sd.gather((long,)).shape == (1, 2)
assert next(reversed(sd)) == long
sd.rename(long, "c")
assert list(sd) == ["a", "b", "c"]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process like this")
@pytest.mark.parametrize("kind", ["in memory", "opened"])
def test_a_long_name_that_cannot_be_encoded_is_an_error(kind: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", LONG_NAMES, kind, str(tmp_path / "names")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    lines = done.stdout.splitlines()
    assert len(lines) == 13
    assert all(line.endswith("MemoryError") for line in lines), lines


@pytest.mark.slow
def test_out_of_memory_is_an_error_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    if sys.platform != "linux":
        return
    # So that what is large comes from the system, and goes back there. OpenMP ends a process that has no memory for its
    # threads.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.returncode, done.stderr[-2000:])
    failed = {line.split()[0]: int(line.split()[2]) for line in lines if " failed " in line}
    for kind, least in (("maps", 15), ("parts", 1), ("tables", 8), ("files", 1)):
        assert failed[kind] >= least, failed
