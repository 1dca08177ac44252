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


def gather_tables(tables: list[Tensor], owners: NDArray[np.int64], rows: NDArray[np.int64], sparse: bool) -> Tensor:
    """Return rows of several tables of one shape and dtype, in the order in which they are listed.

    Parameters
    ----------
    tables
        ``[capacity, *shape]`` each, the capacities may differ.
    owners, rows
        ``[n]``: the place of the table in the list, or -1 for a row of zeros, and the row.
    """
    device = tables[0].device
    parts, places = [], []
    for number, table in enumerate(tables):
        there = np.flatnonzero(owners == number)
        parts.append(gather_rows(table, torch.from_numpy(rows[there]).to(device), sparse))
        places.append(there)
    absent = np.flatnonzero(owners < 0)
    if len(absent):
        parts.append(tables[0].new_zeros((len(absent), *tables[0].shape[1:])))
        places.append(absent)
    order = np.empty_like(rows)
    order[np.concatenate(places)] = np.arange(len(rows))
    return torch.cat(parts).index_select(0, torch.from_numpy(order).to(device))
