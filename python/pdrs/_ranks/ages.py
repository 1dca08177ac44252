"""When the rows of a rank were last used, by which names are evicted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Ages"]


class Ages:
    """In which gather each row was last used, for the tables of all shapes.

    Parameters
    ----------
    seen
        int64 ``[capacity]`` by shape; it may be shorter.
    gathers
        How many gathers there have been.
    layout
        The layout of the rows.
    """

    __slots__ = ("_layout", "_seen", "gathers")

    def __init__(self, seen: dict[tuple[int, ...], Tensor], gathers: int, layout: int) -> None:
        self._seen, self.gathers, self._layout = seen, gathers, layout

    @classmethod
    def of_new(cls, shapes: Iterable[tuple[int, ...]], layout: int) -> Ages:
        """Return those of tables without names."""
        return cls({shape: torch.zeros(0, dtype=torch.int64, device="cpu") for shape in shapes}, 0, layout)

    def see(self, rows: Tensor, shape: tuple[int, ...], capacity: int, layout: int) -> None:
        """Note that rows are used in this gather."""
        self.of(shape, capacity, layout).index_fill_(0, rows, self.gathers)

    def of(self, shape: tuple[int, ...], capacity: int, layout: int) -> Tensor:
        """Return in which gather each row of a table was last used, ``[capacity]``."""
        self.follow(layout)
        seen = self._seen[shape]
        if (length := seen.shape[0]) < capacity:
            new = seen.new_full((capacity - length,), self.gathers)
            self._seen[shape] = seen = torch.cat([seen, new])
        return seen

    def follow(self, layout: int) -> None:
        """Let all ages begin again if someone else has moved rows, such as ``local.compact()``."""
        if layout != self._layout:
            self.moved(layout)
            for seen in self._seen.values():
                seen.fill_(self.gathers)

    def moved(self, layout: int) -> None:
        """Note that rows have gone, and that all others are where they were."""
        self._layout = layout
