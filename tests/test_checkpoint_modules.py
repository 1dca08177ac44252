"""``pdrs.load`` into modules of every make: nested, on the meta device, with tied parameters.

The bugs that this hunts: a file whose names all match and of which nothing is loaded, a name that goes to another
module than the one that it is of, memory that nobody has written to, parameters that were one and are two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

import pdrs

LAYOUTS: list[Literal["archive", "named"]] = ["archive", "named"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inner", [pdrs.StackedParameterDict, pdrs.ParameterDict])
def test_dictionaries_in_a_dictionary_have_any_names(
    layout: Literal["archive", "named"], inner: type, tmp_path: Path
) -> None:
    keys = ("items", "type", "pop", "w.x", "training", "keys")

    def make(value: float) -> pdrs.ParameterDict:
        return pdrs.ParameterDict({key: inner({"a.b": torch.full((2,), value)}) for key in keys})

    pdrs.save(make(1.0), tmp_path / "f", layout=layout)
    filled = make(0.0)
    assert not any(pdrs.load(tmp_path / "f", filled))
    assert {key: filled[key]["a.b"].tolist() for key in keys} == {key: [1.0, 1.0] for key in keys}
    empty = pdrs.ParameterDict({key: inner() for key in keys})
    assert not any(pdrs.load(tmp_path / "f", empty))
    assert {key: empty[key]["a.b"].tolist() for key in keys} == {key: [1.0, 1.0] for key in keys}
