"""Bags of names, each reduced to one row: ``torch.nn.functional.embedding_bag`` by name.

The bags are checked before anything else, because torch reads foreign memory where offsets do not ascend. All that
comes after knows names in one list, and the bounds of the bags in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, ValuesView
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from pdrs._rows.gather import Lookup, Missing, check_missing, gather, in_order, look_up, takes_rows
from pdrs._rows.insert import Initialiser, kind_to_insert, missing_error, refuse_other
from pdrs._rows.same_names import refuse_other_names
from pdrs._rows.store import device_of
from pdrs._rows.table import Kind, Rows, kind_of, parameter_of
from pdrs._torch.modes import refuse_symbolic_trace
from pdrs._torch.names import Names
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs._core import Places
    from pdrs.stacked import StackedParameterDict

__all__ = ["gather_bag"]

Mode = Literal["sum", "mean", "max"]
Offsets: TypeAlias = Tensor | NDArray[np.integer[Any]] | Sequence[int]
# Those of each bag in a list of their own, or of all bags in one.
Weights: TypeAlias = Tensor | NDArray[Any] | Sequence[float] | Sequence[Sequence[float] | NDArray[Any] | Tensor]

# For which torch's embedding_bag is written, on CPUs and GPUs.
_DTYPES_OF_TORCH = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


class _Bags(NamedTuple):
    """What is asked for, with all names in one list. Bag ``n`` has those from ``bounds[n]`` to ``bounds[n + 1]``."""

    names: Sequence[str] | Lookup
    bounds: Rows
    # One for each name. What is no tensor becomes one when the dtype of the entries is known.
    weights: Tensor | NDArray[Any] | None
    mode: Mode
    sparse: bool | None
    missing: Missing
    init: Initialiser | None
    shape: Sequence[int] | None
    dtype: torch.dtype | None


@untraced
def gather_bag(
    self: StackedParameterDict,
    names: Names | Iterable[Names] | Lookup,
    offsets: Offsets | None = None,
    *,
    mode: Mode = "sum",
    weights: Weights | None = None,
    sparse: bool | None = None,
    missing: Missing = "error",
    init: Initialiser | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """Return the sum, mean or maximum of the rows of each bag of names. **O(m)** for ``m`` names.

    This is ``torch.nn.functional.embedding_bag`` by name. The result is differentiable, once: torch's embedding_bag has
    no second derivative. The backward pass costs what that of :meth:`StackedParameterDict.gather` costs.

    Parameters
    ----------
    names
        A list of lists of names, one for each bag, or a two-dimensional array with a bag in each row. With ``offsets``,
        the names of all bags in one list, or a Lookup. All names need one shape and dtype.
    offsets
        Where each bag begins in ``names``: ascending integers, of which the first is 0. A nested tensor with the jagged
        layout gives its own offsets.
    mode
        ``"sum"``, ``"mean"`` or ``"max"``. An empty bag gives zeros in each of them.
    weights
        What each row is multiplied by, with ``mode="sum"`` only: ``[len(names)]``, a list for each bag, or a jagged
        nested tensor. Tensors need the dtype and device of the entries, and get gradients.
    sparse
        As for :meth:`StackedParameterDict.gather`, in every mode.
    missing
        What to do with missing names. ``"error"`` raises. ``"skip"`` leaves them out of their bags, and their weights
        with them. ``"zero"`` counts them as rows of zeros, in the mean and maximum too. ``"insert"`` first inserts them
        at the end, in order.
    init, shape, dtype
        As for :meth:`StackedParameterDict.gather`.
    include_last_offset
        Whether ``offsets`` end with the number of names. There is then one more of them than there are bags.

    Returns
    -------
    torch.Tensor
        ``[bags, *shape]``.

    Raises
    ------
    KeyError
        If names are missing and ``missing`` is ``"error"``. The message counts them and lists some.
    TypeError
        If names, offsets or weights are of the wrong type or dtype, or if entries of this dtype have no such ``mode``.
    ValueError
        If offsets or weights do not fit the names. If names in one list have no offsets, or bags have some. Also as for
        :meth:`StackedParameterDict.gather`. After any of these errors, nothing has changed.
    RuntimeError
        As for :meth:`StackedParameterDict.gather`.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> sd.gather_bag([["a", "b"], ["b"], []]).tolist()
    [[4.0, 6.0], [3.0, 4.0], [0.0, 0.0]]
    >>> sd.gather_bag(["a", "b", "b"], offsets=[0, 2], mode="mean").tolist()
    [[2.0, 3.0], [3.0, 4.0]]
    >>> sd.gather_bag([["a", "c"], ["c"]], weights=[[0.5, 1.0], [1.0]], missing="skip").tolist()
    [[0.5, 1.0], [0.0, 0.0]]

    """
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {mode!r}")
    if weights is not None and mode != "sum":
        raise ValueError(f'weights= needs mode="sum", got mode={mode!r}')
    check_missing(missing, init)
    refuse_symbolic_trace()
    refuse_other_names(self)
    listing, bounds = _listed_bags(names, offsets, include_last_offset)
    flat = None if weights is None else _listed_weights(weights, bounds)
    bags = _Bags(listing, bounds, flat, mode, sparse, missing, init, shape, dtype)
    with self._lock:
        while True:
            version = self.__dict__["_index"].moves
            try:
                pooled = _pool(self, bags)
            except Exception:
                if self.__dict__["_index"].moves == version:
                    raise
                continue  # As in `gather`: a finalizer has moved rows on this very thread, after they were looked up.
            if self.__dict__["_index"].moves == version:
                return pooled


# -- bags and weights that are given -----------------------------------------------------------------------------------


def _listed_bags(names: Any, offsets: Offsets | None, include_last_offset: bool) -> tuple[Sequence[str] | Lookup, Rows]:
    """Return all names in one list, and the bounds of the bags in it."""
    if isinstance(names, Lookup):
        if offsets is None:
            raise ValueError("a Lookup has its names in one list: pass offsets=, where each bag begins in it")
        return names, _bounds(offsets, len(names), include_last_offset)
    if isinstance(names, np.ndarray) and names.ndim == 2:
        _refuse_offsets(offsets, "two-dimensional names")
        bags, width = names.shape
        return in_order(names.reshape(-1)), np.arange(bags + 1) * width
    if offsets is None and isinstance(names, Iterator | ValuesView):
        names = [*names]  # of which each may be a bag
    listing = in_order(names)
    if offsets is None:
        return _joined(listing)
    if listing and isinstance(listing[0], list | tuple | np.ndarray):
        _refuse_offsets(offsets, "a list of bags")
    return listing, _bounds(offsets, len(listing), include_last_offset)


def _refuse_offsets(offsets: Offsets | None, what: str) -> None:
    if offsets is not None:
        raise ValueError(f"{what} have bags already: leave offsets= out, or pass all names in one list")


def _joined(bags: Sequence[Any]) -> tuple[list[Any], Rows]:
    """Return the names of all bags in one list, and its bounds."""
    kinds = set(map(type, bags))
    if not kinds <= {list, tuple}:
        at = next((at for at, bag in enumerate(bags) if isinstance(bag, str)), -1)
        if at >= 0 and all(isinstance(bag, str) for bag in bags):
            raise ValueError(
                "expected a list of names for each bag, got names in one list: pass offsets=, where each bag begins in "
                f"it, or bags such as [[{bags[0]!r}]]"
            )
        if at >= 0:
            raise TypeError(f"expected a list of names for each bag, got the str {bags[at]!r} as bag {at}")
        bags = [_names_of_bag(bag, at) for at, bag in enumerate(bags)]
    bounds = np.zeros(len(bags) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, bags), np.int64, len(bags)), out=bounds[1:])
    return list(chain.from_iterable(bags)), bounds


def _names_of_bag(bag: Any, at: int) -> Sequence[Any]:
    try:
        return in_order(bag)
    except TypeError as error:
        raise TypeError(f"in bag {at}: {error}") from None


def _bounds(offsets: Offsets, count: int, include_last_offset: bool) -> Rows:
    """Return where each bag begins, and at last the number of names.

    With other offsets, torch reads foreign memory. Of names after the last bag, it makes gradients out of such memory.
    """
    if isinstance(offsets, Tensor) and offsets.is_nested:
        given, ends = _bounds_of_jagged(offsets, "offsets"), True
        if len(_values_of_jagged(offsets)) != count:
            raise ValueError(
                f"expected a nested tensor with a value for each of {count} names, got "
                f"{len(_values_of_jagged(offsets))} values"
            )
    else:
        given, ends = _integers(offsets), include_last_offset
    if given.ndim != 1:
        raise ValueError(f"expected offsets in one dimension, got shape {list(given.shape)}")
    if len(given) == 0 and (ends or count):
        raise ValueError(
            "expected at least one offset with include_last_offset=True, got none"
            if ends
            else f"expected the offsets of the bags of {count} names, got none"
        )
    # Not by differences, which overflow.
    wrong = np.flatnonzero(given[1:] < given[:-1])
    if len(given) and given[0] != 0:
        raise ValueError(f"expected offsets of which the first is 0, got {given[0]}")
    if len(wrong):
        at = wrong[0]
        raise ValueError(f"expected ascending offsets, got {given[at]} and then {given[at + 1]} at position {at + 1}")
    if len(given) and ends and given[-1] != count:
        raise ValueError(f"expected {count}, the number of names, as the last offset, got {given[-1]}")
    if len(given) and given[-1] > count:
        raise ValueError(f"expected offsets of at most {count}, the number of names, got {given[-1]}")
    bounds = np.empty(len(given) + (not ends), np.int64)
    bounds[: len(given)] = given
    if not ends:
        bounds[-1] = count
    return bounds


def _integers(offsets: Any) -> NDArray[Any]:
    if isinstance(offsets, Tensor):
        offsets = offsets.detach().cpu().numpy()
    try:
        given = np.asarray(offsets)
    except ValueError:  # of lists of several lengths
        raise TypeError("expected integers as offsets, got lists of several lengths") from None
    if given.dtype.kind not in "iu" and (given.size or given.dtype.kind != "f" or isinstance(offsets, np.ndarray)):
        raise TypeError(f"expected integers as offsets, got {type(offsets).__name__} of {given.dtype}")
    return given


def _bounds_of_jagged(nested: Any, what: str) -> Rows:
    """Return the offsets of a nested tensor, of which all values must belong to bags."""
    if nested.layout != torch.jagged:
        raise TypeError(f"expected a nested tensor with the layout torch.jagged as {what}, got {nested.layout}")
    if isinstance(nested.shape[1], int):
        raise ValueError(f"expected a nested tensor whose second dimension is ragged as {what}, got {nested.shape}")
    if nested.lengths() is not None:
        raise ValueError(f"expected a nested tensor without holes as {what}: pass nested.contiguous()")
    bounds: Rows = nested.offsets().cpu().numpy()
    return bounds.astype(np.int64)


def _values_of_jagged(nested: Any) -> Tensor:
    values: Tensor = nested.values()
    return values


def _listed_weights(weights: Any, bounds: Rows) -> Tensor | NDArray[Any]:
    """Return the weights of all names, in one dimension."""
    count, lengths = int(bounds[-1]), np.diff(bounds)
    if isinstance(weights, Tensor) and weights.is_nested:
        given = _bounds_of_jagged(weights, "weights")
        if not np.array_equal(given, bounds):
            raise ValueError(
                f"expected weights with as many values in each bag as it has names, got {_first_other(given, bounds)}"
            )
        weights = _values_of_jagged(weights)
    elif isinstance(weights, list | tuple) and any(
        isinstance(one, list | tuple | np.ndarray | Tensor) for one in weights
    ):
        weights = _joined_weights(weights, bounds)
    elif not isinstance(weights, Tensor):
        if isinstance(weights, str):
            raise TypeError("expected numbers as weights, got a single str")
        weights = _numbers(weights)
    if weights.ndim == 2 and weights.shape[0] == len(lengths) and (lengths == weights.shape[1]).all():
        weights = weights.reshape(-1)  # beside names that are two-dimensional
    if tuple(weights.shape) != (count,):
        raise ValueError(f"expected a weight for each of {count} names, got weights of shape {list(weights.shape)}")
    return weights  # type: ignore[no-any-return]


def _joined_weights(weights: Sequence[Any], bounds: Rows) -> Tensor | NDArray[Any]:
    """Return the weights of all bags in one dimension: a tensor if those of each bag are one."""
    tensors = all(isinstance(one, Tensor) for one in weights)
    bags: list[Any] = list(weights) if tensors else [_numbers(one) for one in weights]
    for at, bag in enumerate(bags):
        if bag.ndim != 1:
            raise ValueError(f"expected the weights of a bag in one dimension, got shape {list(bag.shape)} as bag {at}")
    given = np.cumsum([0, *map(len, bags)])
    if not np.array_equal(given, bounds):
        raise ValueError(
            f"expected weights with as many values in each bag as it has names, got {_first_other(given, bounds)}"
        )
    # Without those of empty bags, which NumPy takes for float64.
    return torch.cat(bags) if tensors else np.concatenate([bag for bag in bags if len(bag)] or bags)


def _numbers(given: Any) -> NDArray[Any]:
    if isinstance(given, Tensor):
        raise TypeError("expected the weights of all bags as tensors, or of none, got both: torch.cat() them")
    try:
        array = np.asarray(given)
    except ValueError:  # of lists of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iufc":
        raise TypeError(f"expected numbers as weights, got {type(given).__name__} of {array.dtype}")
    return array


def _first_other(given: Rows, bounds: Rows) -> str:
    if len(given) != len(bounds):
        return f"{len(given) - 1} bags of weights for {len(bounds) - 1} bags of names"
    lengths, wanted = np.diff(given), np.diff(bounds)
    at = np.flatnonzero(lengths != wanted)[0]
    return f"{lengths[at]} weights for the {wanted[at]} names of bag {at}"


# -- rows of bags ------------------------------------------------------------------------------------------------------


def _pool(sd: StackedParameterDict, bags: _Bags) -> Tensor:
    names, bounds = bags.names, bags.bounds
    places = look_up(sd, names) if isinstance(names, Lookup) else sd._index.places(names)
    number = places.only_table()
    complete = number >= 0 or places.is_complete()
    if not complete and bags.missing == "error":
        raise missing_error(bags.names, places.missing())  # type: ignore[arg-type]
    kind = _kind_of_all(sd, places, number, bags)
    device = parameter_of(sd, sd._tables[number]).device if number >= 0 else device_of(sd)
    _refuse_dtype(kind.dtype, bags.mode)
    weights = None if bags.weights is None else _as_weights(bags.weights, kind.dtype, device)
    # From here on nothing is refused: new names may come.
    if not complete:
        if bags.missing == "insert":
            places = look_up(sd, names, "insert", bags.init, bags.shape, bags.dtype)
        elif bags.missing == "skip":
            there = places.tables >= 0
            bounds = np.concatenate(([0], np.cumsum(there)))[bounds]
            weights = None if weights is None else weights[torch.from_numpy(there).to(weights.device)]
            places = places.found()
        number = places.only_table()
    if number >= 0:
        table = parameter_of(sd, sd._tables[number])
        by_row = takes_rows(sd, table) if bags.sparse is None else bags.sparse
        sparse = by_row and table.requires_grad and torch.is_grad_enabled()
        if _is_for_torch(table, bags.mode, weights, sparse):
            rows = names._rows if isinstance(names, Lookup) else torch.from_numpy(places.rows).to(table.device)
            return _reduced(table, rows, bounds, bags.mode, weights, sparse)
    gathered = gather(
        sd,
        names,
        sparse=bags.sparse,
        missing="error" if bags.missing == "insert" else bags.missing,
        shape=bags.shape,
        dtype=bags.dtype,
    )
    return _reduced(gathered, torch.arange(len(gathered), device=gathered.device), bounds, bags.mode, weights, False)


def _kind_of_all(sd: StackedParameterDict, places: Places, only: int, bags: _Bags) -> Kind:
    """Return the shape and dtype that all names have, or will have; ValueError if they have several."""
    numbers = [only] if only >= 0 else [number for number, _, _ in places.by_table()]
    kinds = [kind_of(sd, sd._tables[number]) for number in numbers]
    if not kinds:
        inserts = bags.missing == "insert" and len(bags.names) > 0
        return kind_to_insert(sd, bags.shape, bags.dtype, also_no_grad=not inserts)
    if len({kind[:2] for kind in kinds}) > 1:
        raise ValueError(
            f"expected names of one shape and dtype, got {' and '.join(sorted({str(kind) for kind in kinds}))}"
        )
    refuse_other(kinds[0], bags.shape, bags.dtype)
    return kinds[0]


def _refuse_dtype(dtype: torch.dtype, mode: Mode) -> None:
    if dtype in _DTYPES_OF_TORCH or (dtype in _INTEGERS and mode != "mean"):
        return
    if not (isinstance(dtype, torch.dtype) and dtype.is_complex and mode != "max"):
        raise TypeError(f'entries of {dtype} have no mode="{mode}": gather() them, and convert the rows')


def _as_weights(weights: Tensor | NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return weights of entries of a dtype; TypeError or ValueError for a tensor of another dtype or device."""
    if isinstance(weights, Tensor):
        if weights.layout != torch.strided:
            raise TypeError(f"expected a dense tensor of weights, got one with the layout {weights.layout}")
        if weights.dtype != dtype:
            raise TypeError(f"expected weights of {dtype}, as the entries have, got {weights.dtype}")
        if weights.device != device:
            raise ValueError(f"expected weights on {device}, where the entries are, got some on {weights.device}")
        return weights
    # A copy: the backward pass may read it, and torch warns of an array that it cannot write to.
    made = torch.from_numpy(np.array(weights, weights.dtype.newbyteorder("=")))
    if made.numel() and not torch.can_cast(made.dtype, dtype):
        raise TypeError(f"expected weights of {dtype}, as the entries have, got {made.dtype}")
    return made.to(device, dtype)


def _is_for_torch(table: Tensor, mode: Mode, weights: Tensor | None, sparse: bool) -> bool:
    """Whether torch's embedding_bag may read a table itself, instead of rows that were gathered from it."""
    if table.dtype not in _DTYPES_OF_TORCH or (sparse and (mode == "max" or table.dim() != 2)):
        return False
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        return False  # It would keep the table for the backward pass, and a step before that would be an error.
    return table.dim() == 2 or table.is_contiguous()  # Else `reshape` would copy all of it.


def _reduced(table: Tensor, rows: Tensor, bounds: Rows, mode: Mode, weights: Tensor | None, sparse: bool) -> Tensor:
    """Return one row for each bag of rows of a table, of zeros for an empty bag."""
    shape = table.shape[1:]
    flat = table if len(shape) == 1 else table.reshape(len(table), math.prod(shape))
    offsets = torch.from_numpy(bounds).to(table.device)
    # torch's kernels take rows without elements for row numbers that the table does not have.
    if table.dtype in _DTYPES_OF_TORCH and flat.shape[1]:
        made = embedding_bag(
            rows, flat, offsets, mode=mode, sparse=sparse, per_sample_weights=weights, include_last_offset=True
        )
    else:
        made = _reduced_by_index(flat[rows], offsets, mode, weights)
    return made if len(shape) == 1 else made.reshape(len(made), *shape)


def _reduced_by_index(rows: Tensor, offsets: Tensor, mode: Mode, weights: Tensor | None) -> Tensor:
    """Return what embedding_bag would, of complex numbers and integers."""
    lengths = offsets.diff()
    bag_of = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths, output_size=len(rows))
    zeros = rows.new_zeros(len(lengths), rows.shape[1])
    if mode == "max":
        return zeros.scatter_reduce(0, bag_of[:, None].expand_as(rows), rows, "amax", include_self=False)
    if weights is not None:
        rows = rows * weights[:, None]
    summed = zeros.index_add(0, bag_of, rows)
    return summed / lengths.clamp(min=1)[:, None] if mode == "mean" else summed
