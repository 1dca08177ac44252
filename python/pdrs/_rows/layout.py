"""Which table has which entries, how much room there is, and rows in the order of the names.

The functions do what the methods of the same names of ``StackedParameterDict`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pdrs._core import Places
from pdrs._rows.averages import averages_with
from pdrs._rows.insert import as_shape, kind_to_insert, refuse_integers
from pdrs._rows.room import rearrange
from pdrs._rows.store import device_of, numbers_by_kind, remove_last_table, table_for
from pdrs._rows.table import Kind, parameter_of
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["compact", "reserve", "table", "table_number", "tables"]


def table(
    self: StackedParameterDict,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    requires_grad: bool | None = None,
) -> Tensor:
    """Return the Parameter whose rows are the entries of a shape and dtype. **O(tables)**.

    Several tables may fit: without gradients, of parameter groups, after a move to another dtype, or from a file. Then
    the result is the one that has names, else the first that requires gradients. If several have names, this raises,
    because a row number in the wrong table belongs to another name.

    Parameters
    ----------
    shape
        The shape of an entry.
    dtype
        The dtype of an entry. The default is torch's default dtype, or the only dtype of this shape.
    requires_grad
        Whether the table requires gradients. By default either.

    Returns
    -------
    torch.nn.Parameter
        ``[capacity, *shape]``, including free rows. ``indices`` returns the row numbers of names.

    Raises
    ------
    KeyError
        If there is no such table.
    ValueError
        If names are in several such tables. ``gather`` finds the table of each name. ``get_parameter`` takes the name
        of a table. ``StackedParameterDict(sd.named_state_dict())`` has one table for all.
    """
    return parameter_of(self, self._tables[table_number(self, shape, dtype, requires_grad)])


def tables(self: StackedParameterDict) -> dict[str, Tensor]:
    """Return a dict of all tables by the names under which they are registered. **O(tables)**.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict({"a": torch.zeros(2), "b": torch.zeros(3, 4)})
    >>> {name: list(table.shape) for name, table in sd.tables().items()}
    {'float32_2': [1, 2], 'float32_3x4': [1, 3, 4]}

    """
    return {one.attribute: parameter_of(self, one) for one in self._tables}


def table_number(
    sd: StackedParameterDict, shape: Sequence[int], dtype: torch.dtype | None, requires_grad: bool | None
) -> int:
    """Return the number of the table that :meth:`StackedParameterDict.table` returns."""
    shape = as_shape(shape)
    parameters = [(number, parameter_of(sd, table)) for number, table in enumerate(sd._tables)]
    of_shape = [(number, one) for number, one in parameters if tuple(one.shape[1:]) == shape]
    if len(of_shape) == 1 and dtype is None and requires_grad is None:  # as in each step of a sharded dictionary
        return of_shape[0][0]
    wanted = Kind(shape, dtype or torch.get_default_dtype(), requires_grad is not False)
    dtypes = {one.dtype for _, one in of_shape}
    # The only one that there is, unless another is asked for.
    wanted_dtypes = dtypes if dtype is None and len(dtypes) == 1 else {wanted.dtype}
    fitting = [
        (number, one)
        for number, one in of_shape
        if one.dtype in wanted_dtypes and requires_grad in (None, one.requires_grad)
    ]
    if not fitting:
        raise KeyError(f"no table of {wanted}")
    if len(fitting) == 1:  # which torch.compile can trace
        return fitting[0][0]
    # A sort keeps the order of those that are alike.
    fitting = sorted(fitting, key=lambda found: not found[1].requires_grad)
    with_names = [number for number, _ in fitting if sd._index.count(number)]
    if len(with_names) > 1:
        listing = ", ".join(repr(sd._tables[number].attribute) for number in with_names)
        raise ValueError(
            f"expected one table of {wanted} with names, got {listing}: a row of one is another name's in the others. "
            "gather(names) finds the table of each name, get_parameter(table) gives the one of a name, and "
            "requires_grad= chooses between those that require gradients and those that do not"
        )
    return with_names[0] if with_names else fitting[0][0]


@untraced
def reserve(
    self: StackedParameterDict,
    count: int,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Make room for ``count`` more names, so that inserting them does not make the table grow. **O(n + count)**.

    An empty dictionary gets its first table, so that an optimizer can be made of it.

    Parameters
    ----------
    count
        The number of names to come.
    shape, dtype
        The shape and dtype of an entry. Not needed if there is only one table.
    device
        The device of a new table. The default is that of the other tables.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict()
    >>> sd.reserve(1000, shape=(16,))
    >>> len(sd), sd.table((16,)).shape
    (0, torch.Size([1000, 16]))

    """
    if not isinstance(count, int):
        raise TypeError(f"expected a number of names, got {count!r}")
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    with self._lock.change():
        kind = kind_to_insert(self, shape, dtype)
        refuse_integers(kind.dtype)
        place = device_of(self) if device is None else torch.device(device)
        tables, changes = len(self._tables), Changes()
        try:
            number = table_for(self, kind, place, numbers_by_kind(self))
            table, index = self._tables[number], self._index
            wanted = index.used(number) + count - index.reused(number, count)
            if wanted > len(parameter_of(self, table)):
                rearrange(self, changes, table, wanted, None)
                changes.make()
        except BaseException:
            while not changes.made and len(self._tables) > tables:
                remove_last_table(self)
            raise


@untraced
def compact(self: StackedParameterDict) -> None:
    """Put the rows in the order of the names, and free the memory of all other rows. **O(n)**.

    Gradients, masks and the state of attached optimizers move along, and each Lookup notices it. Do not call it between
    a forward pass and its backward pass: gradients that are still to come would reach other rows.

    Raises
    ------
    RuntimeError
        If an optimizer that is not attached has state for the rows.
    """
    with self._lock.change():
        index = self._index
        places = index.places()
        numbers, rows = places.tables, places.rows
        used = [index.used(number) for number in range(len(self._tables))]
        for number, table in enumerate(self._tables):
            there = np.flatnonzero(numbers == number)
            of_table, parameter = rows[there], parameter_of(self, table)
            packed = np.arange(len(there))
            if len(there) == len(parameter) and (of_table == packed).all():
                continue
            if averages_with(self):
                raise RuntimeError(
                    "cannot compact: an average of this dictionary (AveragedModel), or what it is an average of, has "
                    "names in the same rows. Make the average after it"
                )
            # One table after another: each is right, whatever stops the next.
            rows[there], used[number] = packed, len(there)
            plan, changes = index.plan_places(Places.of(numbers, rows), used), Changes()
            changes.call(index.commit, plan)
            rearrange(self, changes, table, len(there), torch.from_numpy(of_table))
            changes.make()
