"""The suite of training steps: containers that train other rows, gradients that stay, names that were hashed before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FORGOTTEN = ("cases_parameter_dict", "cases_training", "fresh_process", "loops", "measure", "memory", "training")

# torch says it once, of its own Adagrad.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("training")
    for name in FORGOTTEN:
        sys.modules.pop(name, None)


def small(training: ModuleType, optimizer: str, **options: bool | int) -> object:
    return replace(training.Setup(optimizer, **options), batch=64, steps=2)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("Adam", {"columns": 5}),
        ("Adam", {"clipped": False, "zipf": True}),
        ("Adam", {"threads": 2}),
        ("Adagrad", {}),
        ("SGD", {}),
    ],
)
def test_all_containers_train_the_same_rows(
    training: ModuleType, optimizer: str, options: dict[str, bool | int]
) -> None:
    data = training.Data(300, training.BUILD)
    setup = small(training, optimizer, **options)
    subjects = training.BUILD if optimizer == "Adam" else (training.BY_HAND, training.PDRS)
    for sample in (training.whole_step, training.step_alone, training.clip_alone):
        for _ in range(2):
            for subject in subjects:
                assert sample(subject, data, sample.__name__, setup) > 0


def test_other_rows_are_an_error(training: ModuleType) -> None:
    data = training.Data(300, training.BUILD)
    setup = small(training, "SGD")
    training.whole_step(training.BY_HAND, data, "", setup)
    trainer = data.trainer(training.PDRS, "", setup)
    trainer.optimizer.param_groups[0]["lr"] *= 1.01
    with pytest.raises(ValueError, match="wrong result"):
        training.whole_step(training.PDRS, data, "", setup)


def test_threads_are_put_back(training: ModuleType) -> None:
    before = torch.get_num_threads()
    data = training.Data(300, training.BUILD)
    training.whole_step(training.PDRS, data, "", small(training, "SGD", threads=before + 1))
    assert torch.get_num_threads() == before


def test_names_have_14_characters_and_are_new_objects(training: ModuleType) -> None:
    data = training.Data(300, training.BUILD)
    (ids,) = data.ids(small(training, "SGD"), 1, 1)
    names = data.as_names(ids)
    assert names == [data.names[at] for at in ids.tolist()]
    assert {len(name) for name in data.names} == {14}
    assert not {*map(id, names)} & {*map(id, data.names)}


def test_the_suite_asks_only_for_containers_that_it_measures(training: ModuleType) -> None:
    suite = importlib.import_module("cases_training").SUITE
    titles = [case.title for case in suite.cases]
    assert len({*titles}) == len(titles)
    for case in suite.cases:
        assert all(target.baseline in case.subjects for target in case.targets)
    assert {claim.title for claim in suite.claims} <= {*titles}
