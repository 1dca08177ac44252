"""The norm of gradients of which some are on one rank only."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pdrs._ranks.sharded import ShardedParameterDict, dictionary_of, joined_norm, norm_over_ranks
from pdrs._rows.clipping import values_of_gradients

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip the norm of all gradients together, those of sharded tables and those of other parameters, in place.

    All ranks must call it, with the same parameters. The norm of sharded tables is summed over the ranks. Other
    parameters are equal on all ranks, as DDP makes them, and count once.

    Parameters
    ----------
    parameters
        Parameters whose gradients are clipped; those without one are passed over.
    max_norm
        The largest norm.
    norm_type
        The number of the p-norm, above 0; it may be ``inf``.
    error_if_nonfinite
        Whether a norm that is ``nan`` or ``inf`` is an error.

    Returns
    -------
    torch.Tensor
        The norm before: a tensor without dimensions, the same on all ranks.

    Raises
    ------
    RuntimeError
        If the norm is not finite, and ``error_if_nonfinite``. It is raised on all ranks, and nothing has been clipped.
    ValueError
        If ``norm_type`` is not above 0.

    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"expected a norm_type above 0, got {norm_type}")
    owners: dict[ShardedParameterDict, list[Tensor]] = {}
    dense = []
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    values = []
    for parameter in given:
        owner = dictionary_of(parameter)
        own = [each for _, each in values_of_gradients(parameter)]
        values += own
        if owner is not None:
            owners.setdefault(owner, []).extend(own)
        else:
            dense += own
    parts = [_norm(dense, norm_type)]
    parts += [norm_over_ranks(owner, _norm(tables, norm_type), norm_type) for owner, tables in owners.items()]
    total = joined_norm(parts, norm_type)
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is not finite: it cannot be clipped")
    factor = max_norm / (total + 1e-6)
    if not factor >= 1.0:  # also if it is nan
        for each in values:
            each.mul_(factor)
    return torch.tensor(total, dtype=torch.get_default_dtype())


def _norm(gradients: list[Tensor], norm_type: float) -> float:
    """Return the norm of gradients, or of their values, on this rank."""
    norm = torch.nn.utils.get_total_norm([one for one in gradients if one.numel()], norm_type)
    # Of parameters that FSDP2 has sharded, which has its own collectives.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
