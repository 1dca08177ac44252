"""The rows that other ranks have said names to have: a bounded cache, so that a name is sent as text once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdrs._core import IndexMap

__all__ = ["OWNER_BITS", "KnownRows"]

# An id has the owner above so many bits, and the row below.
OWNER_BITS = 40


class KnownRows:
    """A cache from names to ids, which are ``owner << 40 | row``.

    There are two maps. New names go to the young one. When that has half of the names that may be held, it becomes the
    old one, and the old one is forgotten. A name that is found in the old one becomes young again.

    Parameters
    ----------
    limit
        How many names are held at most.
    """

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._young, self._old = IndexMap(), IndexMap()

    def __len__(self) -> int:
        """Return the number of names, those that are in both maps twice."""
        return len(self._young) + len(self._old)

    def find(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the id of each name, or -1. **O(m)** for ``m`` names.

        Raises
        ------
        TypeError
            If a name is not a ``str``.
        """
        ids = self._young.indices(names, missing=-1)
        if len(self._old):
            lacking = np.flatnonzero(ids < 0)
            if len(lacking):
                asked = [names[at] for at in lacking.tolist()]
                found = self._old.indices(asked, missing=-1)
                ids[lacking] = found
                self.add([name for name, one in zip(asked, found.tolist(), strict=True) if one >= 0], found[found >= 0])
        return ids

    def add(self, names: Sequence[str], ids: NDArray[np.int64]) -> None:
        """Remember the ids of names. **O(m)**."""
        if len(self._young) + len(names) > self._half:
            self._old, self._young = self._young, IndexMap()
            if len(names) > self._half:
                return  # more than may be held
        self._young.update(zip(names, ids.tolist(), strict=True))

    def forget(self, owner: int) -> None:
        """Forget all names of a rank. **O(n)** for ``n`` names that are held."""
        self._young, self._old = (_without(one, owner) for one in (self._young, self._old))


def _without(names: IndexMap, owner: int) -> IndexMap:
    ids = names.indices()
    kept = ids >> OWNER_BITS != owner
    return IndexMap.from_names(names.select(kept), ids[kept])
