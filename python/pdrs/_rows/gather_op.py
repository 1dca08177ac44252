"""Rows of tables as one differentiable tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["gather_rows", "gather_tables"]


class _SparseRows(torch.autograd.Function):
    """``table[rows]`` with a sparse gradient: what torch's embedding does, for rows of any shape."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = table.shape
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(rows[None], gradient, ctx.size, check_invariants=False), None


def gather_rows(table: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """Return ``table[rows]``; rows may be listed many times.

    Parameters
    ----------
    table
        ``[capacity, *shape]``.
    rows
        int64 ``[n]``, on the table's device.
    sparse
        Whether the gradient of the table is sparse; its cost is then that of the rows and not that of the table.
    """
    if table.dim() == 2 and not table.is_complex():  # whose gradient torch's embedding does not have
        # What `torch.nn.functional.embedding` comes to; it takes a tenth of the time of a small batch to get there.
        return torch.embedding(table, rows, -1, False, sparse)
    if sparse and table.requires_grad and torch.is_grad_enabled():
        return _SparseRows.apply(table, rows)  # type: ignore[no-any-return]
    return table.index_select(0, rows)


def gather_tables(parts: list[tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]], count: int, sparse: bool) -> Tensor:
    """Return rows of several tables of one shape and dtype as ``[count, *shape]``.

    Parameters
    ----------
    parts
        A table ``[capacity, *shape]``, places in the result, and the row for each place. Capacities may differ.
    count
        The number of rows of the result. A place that no part has is a row of zeros.
    sparse
        As for :func:`gather_rows`.
    """
    first = parts[0][0]
    rows = [gather_rows(table, torch.from_numpy(of_table).to(first.device), sparse) for table, _, of_table in parts]
    places = [there for _, there, _ in parts]
    order = np.full(count, -1)
    for there, start in zip(places, np.cumsum([0, *map(len, places)]), strict=False):
        order[there] = np.arange(start, start + len(there))
    absent = np.flatnonzero(order < 0)
    if len(absent):
        order[absent] = np.arange(count - len(absent), count)
        rows.append(first.new_zeros((len(absent), *first.shape[1:])))
    return torch.cat(rows).index_select(0, torch.from_numpy(order).to(first.device))
