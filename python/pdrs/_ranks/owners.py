"""Which rank owns a name: a bucket for ever, and a rank for a number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdrs._core import hash_names

__all__ = ["BUCKETS", "Owners", "buckets_of", "owners_of"]

# A part of what checkpoints may rely on, as the hash is. More ranks than this would have nothing to own.
BUCKETS = 4096


def buckets_of(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the bucket of each name, 0 to 4095, from the stable hash of its UTF-8."""
    return (hashes % np.uint64(BUCKETS)).astype(np.int64)


def owners_of(names: Sequence[str], world_size: int) -> NDArray[np.int64]:
    """Return the rank that owns each name. **O(m)** for ``m`` names.

    Buckets that follow each other belong to one rank, so that files sorted by bucket are read in one piece.

    Examples
    --------
    >>> from pdrs._ranks.owners import owners_of
    >>> owners_of(["user/1", "user/2", "item/1"], 4).tolist()
    [3, 0, 2]

    """
    return buckets_of(hash_names(names)) * world_size // BUCKETS


class Owners(NamedTuple):
    """Which ranks of a group share the names: all of them, or those of one replica."""

    # The number of ranks in the group.
    ranks: int
    # The ranks ``first`` to ``first + shards`` are the replica of this rank.
    first: int
    shards: int
    # Which part of the names this rank has.
    shard: int

    @property
    def replicas(self) -> int:
        """The number of replicas."""
        return self.ranks // self.shards

    def of(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the rank that owns each name, in the replica of this rank. **O(m)** for ``m`` names."""
        return self.first + owners_of(names, self.shards)

    def peers(self, rank: int) -> range:
        """Return the ranks that have the same names as a rank, one of each replica, itself among them."""
        return range(rank % self.shards, self.ranks, self.shards)
