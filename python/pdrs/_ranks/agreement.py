"""One call of a function that all ranks call together: they go on together, or raise together.

A rank that raises alone leaves the others waiting in their next collective. So before each step all ranks meet, as
those of sharded tables do, and tell whether the call has failed, and a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from pdrs._ranks.exchange import PAYLOAD, Call, group_of
from pdrs._rows.names_codec import byte_view

__all__ = ["CommonCall"]

_T = TypeVar("_T")

# Collectives of one size at most, in bytes.
_PIECE = 1 << 28
# How many seconds to wait for a rank that does not come.
_TIMEOUT = 60.0


class CommonCall:
    """A call that all ranks of a process group are in. Without a process group, one rank.

    Parameters
    ----------
    call
        The name of the function that all ranks have called.
    group
        The process group; by default that of all ranks.
    timeout
        How many seconds to wait for a rank that does not come.
    options
        The arguments that all ranks must give alike, because they meet more often for some: in words.
    """

    def __init__(self, call: str, group: Any = None, timeout: float = _TIMEOUT, options: str = "") -> None:
        self._ranks = group_of(group, timeout)
        self._call = Call(0, call, 0, options)
        self.group, self.size, self.rank = self._ranks.group, self._ranks.size, self._ranks.rank
        self.device = torch.device("cpu") if self.size == 1 else _device_of(self.group)
        self.failed = False

    def global_rank(self, rank: int) -> int:
        """Return the number of a rank of this group among all ranks."""
        return self._ranks.global_rank(rank)

    def group_rank(self, rank: int) -> int:
        """Return the reverse; ValueError if the rank is not in the group."""
        if self.size > 1:
            return dist.get_group_rank(self.group, rank)
        if rank != 0:
            raise ValueError(f"there is only rank 0, got src={rank}")
        return 0

    def run(self, work: Callable[[], _T]) -> _T:
        """Do what may fail on some ranks, and raise on all if it does. The others get a RuntimeError that says why."""
        try:
            done = work()
        except Exception as error:
            self.fail(error)
        self.agree()
        return done

    def fail(self, error: Exception) -> NoReturn:
        """Tell the others, which are about to agree, and raise the error. It is raised at once if they know."""
        if not self.failed:
            self.agree(error=error)
        raise error

    def agree(self, numbers: Sequence[int] = (), error: Exception | None = None) -> list[list[int]]:
        """Return the numbers of all ranks, if none has failed. One small collective.

        Raises
        ------
        OutOfStepError
            If the ranks have called different functions, or one of them does not come.
        RuntimeError
            If a rank has failed. The rank itself raises ``error``.
        """
        self.failed = True  # unless this is left at the end
        payload = [*numbers, *[0] * (PAYLOAD - len(numbers))]
        told = self._ranks.meet(self._call, payload, 0, error)
        self.failed = False
        return [row[1 : 1 + len(numbers)] for row in told.tolist()]

    def objects(self, one: Any) -> list[Any]:
        """Return an object of each rank. They are pickled, so they should be small."""
        if self.size == 1:
            return [one]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, one, self.group)
        return found

    def object_of(self, rank: int, one: Any) -> Any:
        """Return the object of one rank. It is pickled, so it should be small."""
        if self.size == 1:
            return one
        found = [one]
        dist.broadcast_object_list(found, self.global_rank(rank), self.group)
        return found[0]

    def bytes_of_all(self, own: NDArray[np.uint8], sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return the bytes of each rank, of which all know how many there are."""
        if self.size == 1:
            return [own]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(own)] = torch.from_numpy(own)
        found = self._gathered(padded).cpu().numpy()
        return [found[at, :size] for at, size in enumerate(sizes)]

    @torch.no_grad()
    def share(self, tensor: Tensor, rank: int) -> None:
        """Copy a tensor of one rank into that of each, in place. All have one shape and dtype."""
        if self.size == 1 or tensor.numel() == 0:
            return
        tensor = tensor.detach()
        plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        sent = plain.to(self.device).contiguous()
        flat = byte_view(sent)
        for piece in torch.split(flat, _PIECE):
            dist.broadcast(piece, self.global_rank(rank), self.group)
        if self.rank != rank and sent is not plain:
            plain.copy_(sent)

    def _gathered(self, own: Tensor) -> Tensor:
        found = list(torch.empty((self.size, *own.shape), dtype=own.dtype, device=self.device).unbind())
        dist.all_gather(found, own, self.group)
        return torch.stack(found)


def _device_of(group: Any) -> torch.device:
    """Return a device whose tensors the group sends: the CPU if it can."""
    kinds = [one.partition(":")[0] for one in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
