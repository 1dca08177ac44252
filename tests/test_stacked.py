"""StackedParameterDict as a dictionary: names, order, rows.

The bugs that this hunts: a row that two names share, a name that is lost or moved in the order when its row moves, a
refused insertion that leaves something behind.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pdrs


def test_names_that_are_met_in_training_get_rows_and_free_ones_are_reused() -> None:
    sd = pdrs.StackedParameterDict({"left": torch.zeros(2), "right": torch.ones(2)})
    batch = ["right", "new", "right"]
    gathered = sd.gather(batch, missing="insert", init=lambda rows: nn.init.constant_(rows, 7.0))
    assert gathered.tolist() == [[1.0, 1.0], [7.0, 7.0], [1.0, 1.0]]
    assert list(sd) == ["left", "right", "new"]
    assert sd.pop("left").tolist() == [0.0, 0.0]
    sd["last"] = torch.full((2,), 3.0)
    assert list(sd) == ["right", "new", "last"]
    assert sd.rows(["last", "right", "new"]).tolist() == [0, 1, 2]


def test_a_missing_name_is_a_key_error_that_lists_it() -> None:
    sd = pdrs.StackedParameterDict({"left": torch.zeros(2)})
    with pytest.raises(KeyError, match="1 of 2 names are not in the dictionary: 'up'"):
        sd.gather(["left", "up"])


def test_a_handle_notices_that_rows_have_moved() -> None:
    sd = pdrs.StackedParameterDict.from_rows(["a", "b", "c"], torch.arange(3.0)[:, None])
    handle = sd.handle(["c", "b"])
    del sd["a"]
    sd.compact()
    assert sd.gather(handle).flatten().tolist() == [2.0, 1.0]
