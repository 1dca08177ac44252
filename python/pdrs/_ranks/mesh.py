"""What the ranks of a mesh exchange that own the same names, one rank of each replica."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pdrs._ranks.exchange import Call, Line
from pdrs._ranks.owners import Owners

__all__ = ["names_of_replicas", "of_replicas", "own_part", "rows_of_replicas"]


def names_of_replicas(line: Line, owners: Owners, names: list[str], call: Call) -> list[str]:
    """Return the sorted union of the names of all replicas, so that each can do the same with them.

    All ranks must call it.
    """
    if owners.replicas == 1:
        return names
    texts = [name.encode("utf-8", "surrogatepass") for name in names]
    message = np.frombuffer(bytearray(np.array(list(map(len, texts)), np.uint32).tobytes() + b"".join(texts)), np.uint8)
    told = line.meet(line.call(f"new names of {call.operation}", call.number), [len(texts), len(message), 0, 0])
    come = of_replicas(line, owners, torch.from_numpy(message), told[:, 2].tolist(), call).numpy().tobytes()
    union, at = set[str](), 0
    for peer in owners.peers(line.ranks.rank):
        count = int(told[peer, 1])
        lengths = np.frombuffer(come, np.uint32, count, at).tolist()
        at += 4 * count
        for length in lengths:
            union.add(come[at : at + length].decode("utf-8", "surrogatepass"))
            at += length
    return sorted(union)


def rows_of_replicas(line: Line, owners: Owners, rows: Tensor, call: Call) -> tuple[Tensor, list[int]]:
    """Return the row numbers of all replicas, those of the first one first, and how many come from each rank.

    All ranks must call it.
    """
    told = line.meet(line.call(f"rows of {call.operation}", call.number), [len(rows), 0, 0, 0])
    counts = [int(count) if rank in owners.peers(line.ranks.rank) else 0 for rank, count in enumerate(told[:, 1])]
    sent = torch.from_numpy(rows.numpy().astype(np.uint32).view(np.uint8).reshape(-1, 4))
    come = of_replicas(line, owners, sent, counts, call)
    return torch.from_numpy(come.numpy().reshape(-1).view(np.uint32).astype(np.int64)), counts


def own_part(line: Line, rows: Tensor, counts: list[int] | None) -> Tensor:
    """Return the part of :func:`of_replicas` that this rank has sent."""
    if counts is None:
        return rows
    before = sum(counts[: line.ranks.rank])
    return rows[before : before + counts[line.ranks.rank]]


def of_replicas(line: Line, owners: Owners, given: Tensor, counts: list[int], call: Call) -> Tensor:
    """Return the rows of all replicas, ``[sum(counts), ...]``: each rank sends all of its own to its peers.

    Parameters
    ----------
    line, call
        The way to the other ranks, and the call that all ranks have met for.
    owners
        Which ranks share the names.
    given
        The rows of this rank.
    counts
        How many rows each rank has. Those of ranks that are no peers do not count.
    """
    peers = owners.peers(line.ranks.rank)
    give = [len(given) if rank in peers else 0 for rank in range(owners.ranks)]
    take = [count if rank in peers else 0 for rank, count in enumerate(counts)]
    return line.exchange(given.repeat(owners.replicas, *[1] * (given.dim() - 1)), give, take, call)
