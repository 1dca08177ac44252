"""The suite of sharded tables: ways that train other rows, bytes that are not those sent, formulas of other figures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FORGOTTEN = ("cases_distributed", "fresh_process", "measure", "memory", "report", "sharded_steps")
NAMES = 600


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("sharded_steps")
    for name in FORGOTTEN:
        sys.modules.pop(name, None)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_all_ways_train_the_same_rows(sharded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "ROUNDS", 1)
    found = sharded.times(NAMES)
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in found.values())
    monkeypatch.setattr(sharded, "STEPS_OF_CHECKS", 2)
    found = sharded.checks(NAMES)
    assert {sharded.PLANNED, sharded.PLANNED_UNCHECKED + sharded.CPU} < set(found)
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in found.values())
    rate = sharded.RATE

    def wrong(batches: object, sparse: bool) -> object:
        monkeypatch.setattr(sharded, "RATE", rate * 1.1)
        way = by_hand(batches, sparse)
        monkeypatch.setattr(sharded, "RATE", rate)
        return way

    by_hand = sharded.by_hand
    monkeypatch.setattr(sharded, "by_hand", wrong)
    with pytest.raises(ValueError, match="wrong rows"):
        sharded.times(NAMES)


@pytest.mark.slow
def test_what_is_sent_is_what_the_formula_says(sharded: ModuleType) -> None:
    world = 2
    apart = sharded.can_be_apart()
    found = sharded.launched(world, "sent", NAMES, apart)
    for what in (sharded.NAMES, sharded.PLANNED, sharded.BF16):
        counted, on_loopback, formula = found[what]
        # The names of a batch are not spread quite evenly.
        assert counted == pytest.approx(formula, rel=0.05)
        assert not apart or counted < on_loopback < 1.2 * counted
    assert found[sharded.DDP][0] == 2 * (world - 1) * NAMES * sharded.FLOATS * 4
    by_hand, names = found[sharded.BY_HAND][0], found[sharded.NAMES][0]
    assert found[sharded.PLANNED][0] < names < by_hand < 1.1 * names
    assert found[sharded.TEXT][0] > names


def test_the_share_of_links_follows_from_the_formula(sharded: ModuleType) -> None:
    links = sharded.Links()
    one = sharded.projected(8, 1000, 64, links)
    assert one.between == one.seconds_of_messages == 0
    assert one.within == pytest.approx(sharded.bytes_of_step(8, 1000, 64) / 8)
    many = sharded.projected(1024, 1000, 64, links)
    assert many.within + many.between == pytest.approx(sharded.bytes_of_step(1024, 1000, 64) / 1024)
    assert many.seconds == pytest.approx(many.between / links.between)
    assert 1 <= sharded.fullest(4, 10_000) < 1.1


def test_the_suite_asks_only_for_ways_that_it_measures(sharded: ModuleType) -> None:
    cases = importlib.import_module("cases_distributed")
    suite = cases.SUITE
    titles = [case.title for case in suite.cases]
    assert len({*titles}) == len(titles)
    for case in suite.cases:
        assert set(case.subjects) <= set(suite.subjects)
        assert all(target.baseline in case.subjects for target in case.targets)
    assert "1,024" in cases.projections()
    assert sharded.cache_bytes_per_name(1000) > 14
