"""Many names that are given in one call, in whatever holds them: the one place that asks an object for its names.

Arrays and columns of other libraries (NumPy, pandas, Polars, Arrow) are asked for all names at once. Iterating over
them takes up to a hundred times as long, or gives something other than ``str``. None of these libraries is imported,
except NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeGuard

import numpy as np

# At once: NumPy imports it late, for `unique`, and a process that is forked while it does so could import nothing more.
from numpy import ma
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Mask", "Names", "as_list", "as_mask", "is_mask", "listed", "refuse"]

Names = Sequence[str] | NDArray[Any] | Iterable[str]
Mask = Tensor | NDArray[np.bool_] | Sequence[bool]

# What a column that has no `__array__` may have instead.
_LISTING = ("tolist", "to_pylist", "to_list")
# How pandas says that there is no value; None and NaN say so, too.
_MISSING = ("NAType", "NaTType")


def listed(names: Any) -> list[Any] | tuple[Any, ...]:
    """Return names as an exact list or tuple: themselves, if they are one. What lies in it may be anything.

    Raises
    ------
    TypeError
        If this is a single ``str``, is not iterable, or has more or less than one dimension.
    """
    kind = type(names)
    if kind is list or kind is tuple:
        return names  # type: ignore[no-any-return]  # mypy does not follow `kind`
    if isinstance(names, str | Tensor):
        raise TypeError(f"names must be an iterable of str, got a {'single str' if kind is str else kind.__name__}")
    # Of the class, because an object may give anything for an attribute: a ParameterDict gives its entries.
    if hasattr(kind, "__array__"):
        # As Python objects; but not a NumPy array itself, of which a subclass may know that values are missing.
        array = names if isinstance(names, np.ndarray) else np.asarray(names, dtype=object)
        if array.ndim != 1:
            raise TypeError(f"names must be an iterable of str, got {kind.__name__} with {array.ndim} dimensions")
        return _list_from(array, "tolist")
    for method in _LISTING:
        if callable(getattr(kind, method, None)):
            return _list_from(names, method)
    try:
        iterator = iter(names)
    except TypeError:
        raise TypeError(f"names must be an iterable of str, got {kind.__name__}") from None
    # Not by `list`, which believes whatever says how many there will be; and `range` would go on for hours.
    made = []
    for at, name in enumerate(iterator):
        if not isinstance(name, str):
            refuse(name, at)
        made.append(name)
    return made


def _list_from(names: Any, method: str) -> list[Any]:
    # What comes is a list, or is refused: to ask that again might never end.
    made = getattr(names, method)()
    if type(made) is not list:
        raise TypeError(
            f"names must be an iterable of str, got {type(names).__name__}, whose {method}() returned "
            f"{type(made).__name__} instead of a list"
        )
    return made


def as_list(names: Names | Mask) -> list[str]:
    """Return names as a new list of exact ``str``; TypeError if there is something else."""
    made = list(listed(names))
    if set(map(type, made)) <= {str}:
        return made
    for at, name in enumerate(made):
        made[at] = str.__str__(name) if isinstance(name, str) else refuse(name, at)
    return made


def refuse(name: object, at: int) -> NoReturn:
    """Raise the TypeError for something in a list of names that is no ``str``."""
    kind = type(name).__name__
    missing = name is None or (isinstance(name, float) and name != name) or kind in _MISSING
    raise TypeError(f"names must be str, got {kind} at position {at}{', a missing value' if missing else ''}")


def is_mask(given: object) -> TypeGuard[Mask]:
    """Whether something holds bool and no names: a tensor, an array, a column of another library, or a list of bool.

    A tensor of something else is no mask, but no names either: :func:`as_mask` says so.
    """
    if isinstance(given, list | tuple):
        return bool(given) and isinstance(given[0], bool | np.bool_)
    kind = getattr(given, "dtype", getattr(given, "type", ""))
    return isinstance(given, Tensor) or str(kind).lower().startswith("bool")


def as_mask(given: Any, count: int) -> NDArray[np.bool_]:
    """Return a mask of so many names as an array of bool.

    Raises
    ------
    TypeError
        If it holds anything but bool.
    ValueError
        If it is of another length.
    """
    if isinstance(given, ma.MaskedArray) and ma.is_masked(given):
        masked: Any = given.astype(object)
        given = masked.filled(None)  # what is below a mask is missing, and not what was there
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.dtype == object and set(map(type, array.reshape(-1).tolist())) <= {bool, np.bool_}:
        array = array.astype(bool)  # of a column where values could be missing
    if array.dtype != np.bool_ and array.size:
        raise TypeError(f"expected a mask of bool, got {type(given).__name__} of {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"expected a mask with a bool for each of {count} names, got shape {list(array.shape)}")
    return np.ascontiguousarray(array, np.bool_)
