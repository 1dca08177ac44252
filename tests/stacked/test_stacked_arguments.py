"""Arguments of ``StackedParameterDict`` that contradict each other, what is there, or what they are for.

The bugs that this hunts: an argument that is ignored without a word, -1 as a row number, which is the last row, a
Lookup whose names are changed behind its back, an initialiser whose values are lost, and an error that does not say
what to do.
"""

from __future__ import annotations

import pytest
import torch

import pdrs

SD = pdrs.StackedParameterDict


@pytest.fixture
def sd() -> SD:
    return SD.from_tensor(["a", "b", "c"], torch.eye(3))


@pytest.fixture
def mixed() -> SD:
    return SD([("a", torch.ones(3)), ("b", torch.ones(2)), ("c", torch.zeros(3))])


# -- row numbers -------------------------------------------------------------------------------------------------------


def test_a_missing_name_has_no_row_number(sd: SD) -> None:
    with pytest.raises(ValueError, match=r"isin\(\) .* missing=\"skip\""):
        sd.indices(["nope"], missing="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"isin\(\)"):
        sd.indices(["a"], missing="zero")  # type: ignore[arg-type]
    assert sd.indices(["nope", "c"], missing="skip").tolist() == [2]
