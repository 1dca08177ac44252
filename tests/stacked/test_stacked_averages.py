"""Averages of a dictionary by torch's AveragedModel, which averages tables and knows no names.

The bug that this hunts: the average of a removed name goes on as that of the name that has its row now.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import pdrs

SD = pdrs.StackedParameterDict


class Model(nn.Module):
    """A dictionary, and what follows it among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words = SD.from_tensor(["a", "b"], torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
        self.words.reserve(4, shape=(2,))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, names: list[str]) -> Tensor:
        return self.norm(self.words.gather(names))  # type: ignore[no-any-return]


AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "mean": AveragedModel,
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "a function": lambda model: AveragedModel(model, avg_fn=lambda average, one, _: (average + one) / 2),
    "with buffers": lambda model: AveragedModel(model, use_buffers=True),
    "a subclass": type("Averaged", (AveragedModel,), {}),
}
GIVEN_AGAIN: dict[str, Callable[[SD], Any]] = {
    "set": lambda sd: sd.__setitem__("new", torch.full((2,), 9.0)),
    "updated": lambda sd: sd.update({"new": torch.full((2,), 9.0), "newer": torch.ones(2)}),
    "gathered": lambda sd: sd.gather(["new"], missing="insert", init=nn.init.ones_),
    "scattered": lambda sd: sd.scatter(["new"], torch.ones(1, 2), missing="insert"),
    "moved": lambda sd: (sd.__setitem__("b", torch.ones(3)), sd.__setitem__("new", torch.ones(2))),
    "compacted": lambda sd: sd.compact(),
    "a new table": lambda sd: sd.__setitem__("long", torch.ones(5)),
}


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize("change", GIVEN_AGAIN)
def test_a_row_that_an_average_has_a_name_for_is_given_to_no_other(change: str, how: str, updated: bool) -> None:
    model = Model()
    average = AVERAGES[how](model)
    if updated:
        average.update_parameters(model)
    words, averaged = model.words, average.module.words
    del words["a"]
    before = {name: row.tolist() for name, row in words.items()}
    with pytest.raises(RuntimeError, match="average"):
        GIVEN_AGAIN[change](words)
    assert {name: row.tolist() for name, row in words.items()} == before
    average.update_parameters(model)
    assert averaged["a"].max() <= 1  # the row is nobody's in the model
    assert averaged["b"].tolist() == [2, 2]


@pytest.mark.parametrize("how", AVERAGES)
def test_names_that_go_from_both_make_room_and_all_others_are_averaged_by_name(how: str) -> None:
    model = Model()
    average = AVERAGES[how](model)
    average.update_parameters(model)
    words, averaged = model.words, average.module.words
    for one in (words, averaged):
        one.drop(["a"])
    words["new"] = torch.full((2,), 9.0)
    words["newer"] = torch.full((2,), 8.0)
    averaged.update({name: words[name] for name in ("new", "newer")})
    average.update_parameters(model)
    update_bn([[["b", "new"]], [["new", "newer"]]], average)
    assert {name: row.tolist() for name, row in averaged.items()} == {"b": [2, 2], "new": [9, 9], "newer": [8, 8]}
    del averaged["new"]
    with pytest.raises(RuntimeError, match="average"):
        averaged["other"] = torch.ones(2)
    averaged["new"] = torch.ones(2)  # in its own row


def test_other_copies_and_averages_that_are_gone_forbid_nothing() -> None:
    model = Model()
    average, best, copied = AveragedModel(model), deepcopy(model), model.words.copy()
    del average, model.words["a"]
    model.words["new"] = torch.full((2,), 9.0)
    model.words.compact()
    assert best.words["a"].tolist() == copied["a"].tolist() == [1, 1]
    assert list(model.words) == ["b", "new"]
    del best.words["a"]
    best.words["other"] = torch.ones(2)


def test_a_name_that_comes_back_and_a_name_in_a_row_that_is_free_in_both_are_taken() -> None:
    model = Model()
    average = AveragedModel(model)
    del model.words["a"]
    model.words["a"] = torch.full((2,), 3.0)
    model.words["new"] = torch.full((2,), 9.0)
    average.update_parameters(model)
    assert average.module.words["a"].tolist() == [3, 3]
    with pytest.raises(KeyError):
        average.module.words["new"]
