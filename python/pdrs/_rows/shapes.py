"""A dictionary of names of given shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import Parameter

from pdrs._core import Places, RowIndex
from pdrs._rows.insert import Initialiser, initialise, refuse_integers
from pdrs._rows.store import add_table
from pdrs._rows.table import Kind
from pdrs._torch import huge_pages

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["of_shapes"]


def of_shapes(
    made: StackedParameterDict,
    shapes: Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    init: Initialiser | None,
) -> StackedParameterDict:
    """Fill an empty dictionary as :meth:`StackedParameterDict.from_shapes` does."""
    pairs = shapes.items() if isinstance(shapes, Mapping) else shapes
    by_shape: dict[tuple[int, ...], list[int]] = {}
    names: list[str] = []
    for at, (name, shape) in enumerate(dict(pairs).items()):
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise TypeError(f"expected the shape of '{name}' as a sequence of int, got {shape!r}")
        by_shape.setdefault(tuple(shape), []).append(at)
        names.append(name)
    dtype = dtype or torch.get_default_dtype()
    refuse_integers(dtype, "from_tensor makes them with requires_grad=False")
    device = torch.get_default_device() if device is None else device
    numbers, rows = np.empty(len(names), np.int64), np.empty(len(names), np.int64)
    for number, there in enumerate(by_shape.values()):
        numbers[there], rows[there] = number, np.arange(len(there))
    index = RowIndex.of(names, Places.of(numbers, rows), list(map(len, by_shape.values())))
    for shape, there in by_shape.items():
        with torch.inference_mode(False), torch.no_grad():
            data = huge_pages.full((len(there), *shape), 0, dtype=dtype, device=device)
            if init is not None:
                initialise(data, init, [names[at] for at in there])
        add_table(made, Kind(shape, dtype).attribute(), Parameter(data), 0)
    made.__dict__["_index"] = index
    return made
