"""Rows of tables as one differentiable tensor."""

from __future__ import annotations

from typing import Any

import torch
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


def gather_tables(tables: list[Tensor], owners: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """Return rows of several tables of one shape and dtype, in the order in which they are listed.

    Parameters
    ----------
    tables
        ``[capacity, *shape]`` each, the capacities may differ.
    owners, rows
        int64 ``[n]``, on the tables' device: the place of the table in the list, or -1 for a row of zeros, and the row.
    """
    parts, places = [], []
    for number, table in enumerate(tables):
        there = (owners == number).nonzero()[:, 0]
        parts.append(gather_rows(table, rows[there], sparse))
        places.append(there)
    absent = (owners < 0).nonzero()[:, 0]
    if len(absent):
        parts.append(tables[0].new_zeros((len(absent), *tables[0].shape[1:])))
        places.append(absent)
    order = torch.empty_like(rows)
    order[torch.cat(places)] = torch.arange(len(rows), device=rows.device)
    return torch.cat(parts).index_select(0, order)
