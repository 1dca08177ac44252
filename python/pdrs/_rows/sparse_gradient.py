"""Where the rows of a table lie in its sparse gradient: looked for once a gradient, and not once a row.

A sparse gradient lists rows in any order, and each any number of times. Names come and go one by one while it is there.
What it has for their rows is then set to zero in place, as in a dense gradient. So all references to it see the change.
"""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import zero_row
from pdrs._rows.write import by_bits, note_zeros
from pdrs._torch.transaction import Changes

__all__ = ["GradientRows", "moved_rows"]


class GradientRows:
    """The rows that a sparse gradient lists, in order. **O(k log k)** to make, for a gradient that lists ``k``.

    It holds of one gradient, until anything else writes to it: torch counts that. It takes 16 bytes for
    each row that is listed, and lets them go when the gradient is freed.

    Parameters
    ----------
    gradient
        In torch's COO layout, coalesced or not, and not on the meta device. Its first dimension is that of the rows.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = weakref.ref(gradient, partial(_let_go, weakref.ref(self)))
        # Tensors from inference mode count no writes: this holds for one call then.
        self._version = -1 if gradient.is_inference() else gradient._version
        # `gradient.data = other` is not counted. Held, so that no other indices can come to lie in this memory.
        self._indices = gradient._indices()
        rows, places = torch.sort(self._indices[0].cpu())
        self._rows, self._places = rows.numpy(), places.numpy()

    def is_of(self, gradient: Tensor) -> bool:
        """Whether it holds of this gradient, as that is now. **O(1)**."""
        if self._gradient() is not gradient or gradient.is_inference() or gradient._version != self._version:
            return False
        indices = gradient._indices()
        return indices.data_ptr() == self._indices.data_ptr() and indices.shape == self._indices.shape

    def clear_row(self, gradient: Tensor, row: int) -> None:
        """Set what the gradient, which it is of, has for a row to zero, in place.

        **O(log k)**, and the number of times that it is listed.
        """
        places = self._places[self._rows.searchsorted(row) : self._rows.searchsorted(row, "right")]
        if len(places) == 0:
            return
        values = gradient._values().detach()  # one from inference mode may be written to then
        if len(places) > 1 or zero_row([values], int(places[0])):
            by_bits(values).index_fill_(0, torch.from_numpy(places).to(values.device), 0)
        # Counted, and not read: what another thread has written meanwhile must be noticed.
        self._version += 1

    def note(self, changes: Changes, gradient: Tensor, rows: NDArray[np.int64]) -> None:
        """Note the same for distinct rows. **O(m log k)** for ``m`` rows, and the number of times they are listed."""
        first, last = self._rows.searchsorted(rows), self._rows.searchsorted(rows, "right")
        counts = last - first
        places = self._places[np.repeat(last - counts.cumsum(), counts) + np.arange(counts.sum())]
        if len(places):
            note_zeros(changes, gradient._values(), places)
            changes.set_attributes(self, _version=self._version + 1)


def moved_rows(tensor: Tensor, old: Tensor, new: Tensor, capacity: int) -> Tensor:
    """Return what a sparse tensor has for rows ``old`` as rows ``new`` of one with another number of rows."""
    renamed = torch.full((len(tensor),), -1, device=tensor.device)
    renamed[old.to(tensor.device)] = new.to(tensor.device)
    rows = renamed[tensor._indices()[0]]
    kept = rows >= 0
    size = (capacity, *tensor.shape[1:])
    values = tensor._values()[kept]
    return torch.sparse_coo_tensor(rows[kept][None], values, size, device=values.device, check_invariants=False)


def _let_go(this: weakref.ref[GradientRows], _gradient: weakref.ref[Tensor]) -> None:
    known = this()
    if known is not None:
        del known._indices, known._rows, known._places
