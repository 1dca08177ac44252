"""A step that is stopped anywhere has written all rows of all tables, with their states, or none.

The bugs that this hunts: Ctrl-C between the tables of a step, between values and moments, or before the number of steps
is counted, after which a second try steps twice on some rows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_stacked_interrupts import AtCalls, AtLines, OutOfMemory, Stop
from torch import nn
from torch.optim import Optimizer

import pdrs
from pdrs.optim import SGD, Adagrad, Adam, AdamW

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
