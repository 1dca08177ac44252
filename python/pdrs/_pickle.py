"""What pickles of pdrs call, besides the public classes and what torch's own pickles call.

Each is found by its name, in pickles that are years old, so names and arguments stay. All are functions of a module,
called with tensors, numbers, ``bytes`` and containers of these: ``torch.load(weights_only=True)`` calls nothing else,
once it has been told to trust them. What comes from a pickle is checked: it may be damaged, or made to do harm.
"""

from __future__ import annotations

import math
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import EntryKeys, Places, RowIndex, slab_views
from pdrs._torch.modes import is_intercepted

__all__ = ["entry", "entry_keys", "new_dict", "row_index", "unpack"]

# Tables with more rows that have no name are taken for damage: each such row costs a bit, and none in the pickle.
_MOST_ROWS = 1 << 33


def new_dict() -> dict[str, Any]:
    """Return an empty dict, which the pickle fills: not a dict that the pickler would find in its memo."""
    return {}


def entry(block: list[Parameter], number: int) -> Parameter:
    """Return one of the Parameters that :func:`unpack` returned."""
    if type(block) is not list or type(number) is not int or not 0 <= number < len(block):
        raise UnpicklingError("a pickle refers to a Parameter that is not in its block")
    return block[number]


def entry_keys(names: list[str]) -> EntryKeys:
    """Make the keys of a ParameterDict, in order.

    Raises
    ------
    UnpicklingError
        If they are no list of distinct ``str``.
    """
    if type(names) is list and all(type(name) is str for name in names):
        keys = EntryKeys(names)
        if len(keys) == len(names):
            return keys
    raise UnpicklingError("the keys of a ParameterDict are no list of distinct str")


def row_index(names: list[str], tables: bytes | None, rows: bytes | None, used: tuple[int, ...]) -> RowIndex:
    """Make an index of names and rows.

    Parameters
    ----------
    names
        The names, in order.
    tables, rows
        int64, little endian: the table and the row of each name; None for no names.
    used
        How many rows each table has given.

    Raises
    ------
    UnpicklingError
        If these do not fit together.
    """
    tables, rows = tables or b"", rows or b""
    if not (
        type(names) is list
        and all(type(name) is str for name in names)
        and type(tables) is bytes
        and type(rows) is bytes
        and type(used) is tuple
        and all(type(count) is int and count >= 0 for count in used)
    ):
        raise UnpicklingError("an index of rows is not of the types that were pickled")
    if {len(tables), len(rows)} != {8 * len(names)} or sum(used) > _MOST_ROWS:
        raise UnpicklingError(
            f"an index of {len(names)} names has {len(tables)} bytes of tables, {len(rows)} of rows, and {sum(used)} "
            "rows in use"
        )
    places = np.frombuffer(tables, "<i8").astype(np.int64), np.frombuffer(rows, "<i8").astype(np.int64)
    try:
        return RowIndex.of(names, Places.of(*places), used)
    except (KeyError, ValueError) as error:
        raise UnpicklingError(f"an index of rows cannot be used: {error}") from error


def unpack(
    values: Tensor, offsets: bytes, shape_numbers: bytes, shapes: list[tuple[int, ...]], trainable: bytes
) -> list[Parameter]:
    """Make Parameters over one tensor.

    Parameters
    ----------
    values
        The values of all, one-dimensional.
    offsets
        int64, little endian: where in ``values`` each Parameter begins.
    shape_numbers
        uint32, little endian: the number in ``shapes`` of the shape of each Parameter.
    shapes
        The different shapes.
    trainable
        A byte for each Parameter: 1 if it requires gradients, 0 if not.

    Raises
    ------
    UnpicklingError
        If these do not fit together.
    """
    begins, numbers, flags = _checked(values, offsets, shape_numbers, shapes, trainable)
    make = _make_natively if _can_be_slab(values) else _make_by_torch
    made: list[Any] = [None] * len(begins)
    for flag in (False, True):
        those = np.flatnonzero(flags == flag)
        if not those.size:
            continue
        views = make(values, begins[those], [shapes[number] for number in numbers[those].tolist()], flag)
        for at, view in zip(those.tolist(), views, strict=True):
            made[at] = view
    return made


def _can_be_slab(values: Tensor) -> bool:
    # Not if it was loaded to the meta device, say, or as a fake tensor.
    return values.device.type in ("cpu", "cuda") and not is_intercepted() and not torch.is_inference_mode_enabled()


def _make_natively(
    values: Tensor, begins: NDArray[np.int64], shapes: list[tuple[int, ...]], trainable: bool
) -> list[Any]:
    try:
        return slab_views(values.detach(), begins, shapes, requires_grad=trainable)
    except ValueError as error:
        raise UnpicklingError(f"a block of Parameters cannot be used: {error}") from error


def _make_by_torch(
    values: Tensor, begins: NDArray[np.int64], shapes: list[tuple[int, ...]], trainable: bool
) -> list[Any]:
    values = values.detach()
    made = []
    for begin, shape in zip(begins.tolist(), shapes, strict=True):
        # Each in a storage of its own, as the native ones have it: those that share one would be taken for tied.
        one = values[begin : begin + math.prod(shape)].view(shape).clone()
        made.append(Parameter(one, requires_grad=trainable))
    return made


def _checked(
    values: Any, offsets: Any, shape_numbers: Any, shapes: Any, trainable: Any
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.bool_]]:
    if not (
        isinstance(values, Tensor)
        and values.layout is torch.strided
        and values.ndim == 1
        and values.is_contiguous()
        and all(type(each) is bytes for each in (offsets, shape_numbers, trainable))
        and type(shapes) is list
        and all(type(shape) is tuple and all(type(size) is int for size in shape) for shape in shapes)
    ):
        raise UnpicklingError("a block of Parameters is not of the types that were pickled")
    count = len(trainable)
    if (len(offsets), len(shape_numbers)) != (8 * count, 4 * count):
        raise UnpicklingError(
            f"a block of {count} Parameters has {len(offsets)} bytes of offsets and {len(shape_numbers)} of shapes"
        )
    begins = np.frombuffer(offsets, "<i8")
    numbers = np.frombuffer(shape_numbers, "<u4")
    if count and int(numbers.max()) >= len(shapes):
        raise UnpicklingError(f"a block of Parameters has {len(shapes)} shapes, but not number {numbers.max()}")
    for shape in shapes:
        if not all(size > 0 for size in shape) or math.prod(shape) > values.numel():
            raise UnpicklingError(f"a block of {values.numel()} elements has a Parameter of shape {shape}")
    # No sum can overflow: the begin is compared first.
    lasts = values.numel() - np.array([math.prod(shape) for shape in shapes], np.int64)[numbers]
    if count and not ((begins >= 0) & (begins <= lasts)).all():
        raise UnpicklingError(f"a block of {values.numel()} elements has Parameters that reach beyond it")
    flags = np.frombuffer(trainable, np.uint8) != 0
    if flags.any() and not (values.is_floating_point() or values.is_complex()):
        raise UnpicklingError(f"a block of {values.dtype} has Parameters that require gradients")
    return begins, numbers, flags
