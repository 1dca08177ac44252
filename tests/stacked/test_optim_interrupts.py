"""A step that is stopped anywhere has written all rows of all tables, with their states, or none.

The bugs that this hunts: Ctrl-C between the tables of a step, between values and moments, or before the number of steps
is counted, after which a second try steps twice on some rows. And a file of a killed process with rows of two steps.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stacked_interrupts import AtCalls, AtLines, OutOfMemory, Stop
from torch import nn
from torch.optim import Optimizer

import pdrs
from pdrs.optim import SGD, Adagrad, Adam, AdamW

# A stop may come in a finalizer, where Python only tells of it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SD = pdrs.StackedParameterDict
MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "AdamW-lazy": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, per_row_steps=True, lazy_decay=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1),
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
}


class Scene:
    """Three tables of several kinds, a dense layer, and an optimizer that has stepped or has not."""

    def __init__(self, make: Callable[[Any], Optimizer], has_stepped: bool) -> None:
        torch.manual_seed(0)
        entries = [(f"{at}{size}", torch.full((size,), float(at + 1))) for size in (2, 3) for at in range(4)]
        halves = [(f"half.{at}", torch.full((2,), 1.0 + at, dtype=torch.bfloat16)) for at in range(4)]
        self.sd = SD([*entries, *halves])
        self.layer = nn.Linear(2, 1)
        self.optimizer = make([*self.sd.parameters(), *self.layer.parameters()])
        for _ in range(1 + has_stepped):
            self.optimizer.zero_grad()
            taken = [self.sd.gather(names) for names in (["02", "12", "02"], ["13", "23"], ["half.0", "half.2"])]
            loss = sum((one.float().pow(2).sum() for one in taken), self.layer(taken[0]).sum())
            loss.backward()
            if has_stepped:
                self.optimizer.step()
                has_stepped = False

    def seen(self) -> list[Any]:
        """Return all numbers of the tables."""
        found: list[Any] = []
        for table in self.sd.parameters():
            state = self.optimizer.state.get(table, {})
            found.append((table.tolist(), {key: value.tolist() for key, value in state.items()}))
        return found


def stopped(scene: Scene, stop: Stop) -> None:
    gc.disable()
    try:
        with stop:
            scene.optimizer.step()
    except (KeyboardInterrupt, MemoryError, RuntimeError, SystemError):
        if len(stop.places) <= stop.at or stop.at < 0:
            raise
    finally:
        gc.enable()
        torch.set_grad_enabled(True)


@pytest.mark.slow
@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("kind", [AtLines, AtCalls, OutOfMemory])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_step_that_is_stopped_anywhere_was_made_or_was_not(
    make: Callable[[Any], Optimizer], kind: type[Stop], has_stepped: bool
) -> None:
    stopped(Scene(make, has_stepped), Stop())  # what is done only once has been done
    scene, everywhere = Scene(make, has_stepped), kind()
    before = scene.seen()
    stopped(scene, everywhere)
    after = scene.seen()
    assert before != after
    assert len(everywhere.places) >= 3
    found: list[Any] = []
    for at in everywhere.chosen():
        scene = Scene(make, has_stepped)
        stopped(scene, kind(at))
        left = scene.seen()
        if left not in (before, after):
            found.append((everywhere.places[at], left))
            continue
        if left == before:
            # torch leaves the state of a dense layer half made if it is stopped there.
            scene.layer.zero_grad()
            scene.optimizer.step()
            assert scene.seen() == after, everywhere.places[at]
    assert found == []


KILLED = """
import sys
import torch, pdrs
path = sys.argv[1]
names = [f"name {number}" for number in range(20_000)]
sd = pdrs.StackedParameterDict.from_tensor(names, torch.zeros(20_000, 4))
optimizer = pdrs.optim.SGD(sd.parameters(), lr=1.0)
while True:
    sd.gather(names).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    pdrs.save(sd, path)
    print("saved", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of Unix")
@pytest.mark.parametrize("milliseconds", [0, 3, 11])
def test_a_process_that_is_killed_while_it_steps_leaves_a_file_of_one_step(tmp_path: Path, milliseconds: int) -> None:
    path = tmp_path / "words.safetensors"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "saved\n"
        time.sleep(milliseconds / 1000)
        process.kill()
    opened = pdrs.open(path, verify=True)
    table = opened.table((4,))
    steps = -table[0, 0].item()
    assert steps >= 3
    assert torch.equal(table, torch.full_like(table, -steps))
    optimizer = pdrs.optim.SGD(opened.parameters(), lr=1.0)
    opened.gather(["name 7"]).sum().backward()
    optimizer.step()
    assert opened["name 7"].tolist() == [-steps - 1] * 4
