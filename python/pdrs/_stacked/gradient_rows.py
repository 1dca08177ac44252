"""Where the rows of a table lie in its sparse gradient: looked for once a gradient, and not once a row.

A sparse gradient lists rows in any order, and each any number of times. Names come and go one by one while it is there,
and what it has for their rows is set to zero in place, as in a dense gradient: whoever holds the gradient sees it.
"""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import zero_row

__all__ = ["GradientRows"]


class GradientRows:
    """The rows that a sparse gradient lists, in order. **O(k log k)** to make, for a gradient that lists ``k``.

    It holds of one gradient, until anything but :meth:`clear` writes to it: torch counts that. It takes 16 bytes for
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

    def clear(self, gradient: Tensor, rows: NDArray[np.int64] | int) -> None:
        """Set what the gradient, which it is of, has for a row, or for distinct rows, to zero, in place.

        **O(m log k)** for ``m`` rows, and the number of times that they are listed.
        """
        first, last = self._rows.searchsorted(rows), self._rows.searchsorted(rows, "right")
        if isinstance(rows, int):
            places = self._places[first:last]
        else:
            counts = last - first
            places = self._places[np.repeat(last - counts.cumsum(), counts) + np.arange(counts.sum())]
        if len(places) == 0:
            return
        values = gradient._values()
        if len(places) > 1 or zero_row([values], int(places[0])):
            values.index_fill_(0, torch.from_numpy(places).to(values.device), 0)
        # Counted, and not read: what another thread has written meanwhile must be noticed.
        self._version += 1


def _let_go(this: weakref.ref[GradientRows], _gradient: weakref.ref[Tensor]) -> None:
    known = this()
    if known is not None:
        del known._indices, known._rows, known._places
