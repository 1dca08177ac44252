"""What ranks send each other, and how they notice that they are about to do different things.

Collectives of different sizes that meet end a gloo process without a Python exception, or hang, or mix up rows. So
there are *meetings*, on a group of its own: each rank tells what it is about to do. If all say the same, all go on.
Otherwise all raise, and name who does what.

A collective takes longer than what it sends, if that is little. So data travels with the header where the host has it,
and if it is short. Each rank receives into a window that is as long as any message may be. gloo accepts a message that
is shorter than its window, and ends the process only if one is longer. So whatever meets has room.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pdrs._core import Headers

__all__ = [
    "BYTES_AT",
    "HEADER_BYTES",
    "Call",
    "Line",
    "Mail",
    "OutOfStepError",
    "Ranks",
    "Room",
    "Sums",
    "group_of",
    "ranks_and_shards",
]

# A header: the call in three numbers, the status, and what the call adds for each peer.
PAYLOAD = 4
# Where what is told of a rank says how many bytes of data it has sent, unless a call says something else there.
BYTES_AT = 3
HEADER_BYTES = 8 * (3 + 1 + PAYLOAD)
# The longest message to a rank that travels with a header, and the windows of all ranks together.
_WINDOW, _WINDOWS = 1 << 20, 1 << 26
# Ranks that have failed tell each other why in so many bytes.
_TEXT_BYTES = 1024
# So long a rank that waited in vain waits for the others that did, to find out who never came.
_GRACE = 1.0
_NO_BYTES, _NOTHING = np.empty(0, np.uint8), (0,) * PAYLOAD


_Error = TypeVar("_Error", bound=BaseException)


class Room(NamedTuple):
    """Where data goes."""

    into: NDArray[np.uint8]
    # How many bytes come from each rank.
    take: list[int]
    # The bytes of a row, and which rows go there; the row behind the last one is of zeros. None if all bytes do.
    rows: tuple[int, NDArray[np.int64]] | None


MakeRoom = Callable[[], Room]


class Sums(NamedTuple):
    """Sums of rows, to be sent: row ``m`` of what is given is added to row ``rows[m]``. They must fit into windows.

    What is added to the row behind the last one goes nowhere.
    """

    rows: NDArray[np.int64]
    # float32 or float64 [rows, elements]
    given: NDArray[Any]


Data = NDArray[np.uint8] | Sums


class OutOfStepError(RuntimeError):
    """The ranks of a group have called different things, or one of them did not come."""


class Call(NamedTuple):
    """What a rank is about to do."""

    dictionary: int
    operation: str
    # How many of this operation came before.
    number: int
    # What must be equal on all ranks.
    options: str

    def __str__(self) -> str:
        of = f" of dictionary {self.dictionary}" if self.dictionary else ""
        return f"{self.operation} {self.number}{of} ({self.options})"

    def words(self) -> list[int]:
        """Return it as numbers."""
        return [
            self.dictionary << 32 | zlib.crc32(self.operation.encode()),
            self.number,
            zlib.crc32(self.options.encode()),
        ]


class Mail:
    """What the ranks have told in a meeting, and the data that each has sent to this one.

    Attributes
    ----------
    told
        int64 ``[ranks, 1 + PAYLOAD]``: the status, and what the call adds.
    have_come
        Whether the data already lies where room was made for it.
    """

    __slots__ = ("_data", "_give", "_later", "_own", "_ranks", "have_come", "told")

    def __init__(
        self,
        ranks: Ranks,
        told: NDArray[np.int64],
        data: NDArray[np.uint8],
        give: list[int],
        own: NDArray[np.uint8],
        later: list[bool],
        have_come: bool,
    ) -> None:
        self.told, self._ranks, self._data, self._give, self._own = told, ranks, data, give, own
        self._later, self.have_come = later, have_come

    def receive(self, take: list[int], call: Call) -> NDArray[np.uint8]:
        """Return ``take[r]`` bytes of each rank ``r``, one behind the other. It must come before the next meeting."""
        come = np.empty(sum(take), np.uint8)
        self.receive_into(come, take, call)
        return come

    def receive_into(self, come: NDArray[np.uint8], take: list[int], call: Call) -> None:
        """Write what :meth:`receive` returns into an array of ``sum(take)`` bytes."""
        ranks, later = self._ranks, self._later
        of_later = _NO_BYTES
        if later:
            sent, gives = (self._data, self._give) if later[ranks.rank] else (_NO_BYTES, [0] * ranks.size)
            takes = [count if is_later else 0 for count, is_later in zip(take, later, strict=True)]
            all_later = torch.empty(sum(takes), dtype=torch.uint8)
            ranks.exchange(all_later, torch.from_numpy(sent), takes, gives, call)
            of_later = all_later.numpy()
        ranks.headers.receive(ranks.windows, self._own, take, later, of_later, come)


class Ranks:
    """The ranks of a process group, and the groups of its own that pdrs uses. All dictionaries of a group share it.

    Parameters
    ----------
    group
        The process group; None if there is only this process.
    timeout
        How many seconds to wait for a rank that does not come.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self.group = group
        self.dictionaries = 0
        self._broken: str | None = None
        # The last error that all ranks have raised together, after which they may go on.
        self._agreed: BaseException | None = None
        self._meetings = 0
        if group is None:
            self.rank, self.size, self._global = 0, 1, [0]
            self.headers, self.windows = Headers(0, 1), np.empty((0, _WINDOW), np.uint8)
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._global = dist.get_process_group_ranks(group)
        self._name = f"pdrs/{group.group_name}/{'-'.join(map(str, self._global))}/{_count_of(group)}"
        self._store = dist.distributed_c10d._get_default_store()
        limit = timedelta(seconds=timeout)
        self._timeout = timeout
        # Only what is written to takes memory.
        self.windows = np.empty((self.size - 1, min(_WINDOW, _WINDOWS // self.size)), np.uint8)
        self.headers = Headers(self.rank, self.size)
        self._flat = torch.from_numpy(self.windows).view(-1)
        # What a rank has for itself goes nowhere.
        self._room = [self.windows.shape[1] * (rank != self.rank) for rank in range(self.size)]
        self._control: Any = dist.new_group(self._global, limit, "gloo", use_local_synchronization=True)
        # DDP's collectives on the given group must not come between ours.
        self._rows: Any = dist.new_group(self._global, limit, use_local_synchronization=True)

    def agreed(self, error: _Error) -> _Error:
        """Note and return an error that all ranks raise."""
        self._agreed = error
        return error

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Refuse all later calls if one fails on this rank alone: what it sends would be taken for something else."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and error is not self._agreed and self._broken is None:
                self._broken = f"rank {self._global[self.rank]} failed in the middle of a call: {error!r}"
            self._agreed = None
            raise

    def global_rank(self, rank: int) -> int:
        """Return the number of a rank in the whole job, as logs name it."""
        return self._global[rank]

    def meet(self, call: Call, payload: Any, status: int, failure: Exception | None) -> NDArray[np.int64]:
        """Tell all ranks what this one is about to do, and return what they told: ``[ranks, 1 + PAYLOAD]``.

        Raises
        ------
        OutOfStepError, RuntimeError
            As for :meth:`meet_with`.
        """
        return self.meet_with(None, None, call, payload, status, failure).told

    def meet_with(
        self,
        data: Data | None,
        give: list[int] | None,
        call: Call,
        payload: Any,
        status: int,
        failure: Exception | None,
        make_room: MakeRoom | None = None,
    ) -> Mail:
        """Tell all ranks what this one is about to do, send each some bytes, and return what they told.

        Parameters
        ----------
        data, give
            Bytes, and how many of them are for each rank. Who receives them must know how many there are. Sums need a
            list of numbers as ``payload``, and ``fits``.
        payload
            ``PAYLOAD`` numbers for all ranks, of which ``give`` replaces the third, or int64 ``[ranks, PAYLOAD]``.
        status
            A number, for all ranks.
        failure
            What has failed on this rank. Then it sends no bytes.
        make_room
            Returns where the data goes, and how many bytes of each rank. It is called while the others are waited for,
            if there are others. If other numbers of bytes come, they do not go there.

        Raises
        ------
        OutOfStepError
            If a rank is about to do something else, or does not come.
        RuntimeError
            If a rank has failed. The rank itself raises ``failure``.
        """
        if self._broken is not None:
            raise OutOfStepError(self._broken)
        words, room, own = call.words(), self.windows.shape[1], _NO_BYTES
        if isinstance(data, Sums):
            assert give is not None
            (message, sizes, told), own = self.headers.message_of_sums(words, payload, *data, give, room)
            data = _NO_BYTES
        else:
            failed = failure is not None
            message, sizes, told = self.headers.message(words, status, failed, payload, data, give, room)
            if data is not None and give is not None:
                data = data.reshape(-1)
                begin = sum(give[: self.rank])
                own = data[begin : begin + give[self.rank]]
        where = self._swap(message, sizes, call, make_room) if self.size > 1 else None
        have_come = False
        if where is None:
            differs, has_failed, later = self.headers.read(self.windows, words, told)
        else:
            found = self.headers.read_and_receive(self.windows, words, told, own, where.take, where.rows, where.into)
            differs, has_failed, later, have_come = found
        if differs:
            self._refuse(call)
        if has_failed:
            self._fail_together(call, failure)
        return Mail(self, told, _NO_BYTES if data is None else data, give or [], own, later, have_come)

    def fits(self, give: list[int]) -> bool:
        """Whether so many bytes for each rank travel with headers."""
        room = self.windows.shape[1] - HEADER_BYTES
        return self.size > 1 and all(count <= room for count in give)

    def texts(self, call: Call, text: str) -> list[str]:
        """Exchange a text of each rank, which is cut to a fixed size."""
        if self.size == 1:
            return [text]
        cut = text.encode("utf-8", "backslashreplace")[:_TEXT_BYTES]
        sent = np.frombuffer(bytearray(cut.ljust(_TEXT_BYTES, b"\0") * (self.size - 1)), np.uint8)
        self._swap(sent, [_TEXT_BYTES * (rank != self.rank) for rank in range(self.size)], call)
        said = [row[:_TEXT_BYTES].tobytes() for row in self.windows]
        said.insert(self.rank, cut)
        return [one.rstrip(b"\0").decode("utf-8", "ignore") for one in said]

    def exchange(self, out: Tensor, given: Tensor, take: list[int], give: list[int], call: Call) -> None:
        """Send ``give`` rows of a tensor to each rank, and receive ``take`` of each. All ranks have met before."""
        try:
            group = self._rows if given.dtype != torch.uint8 else self._control
            dist.all_to_all_single(out, given, take, give, group=group)
        except RuntimeError as error:
            self._lose(call, error)

    def _swap(
        self, message: NDArray[np.uint8], sizes: list[int], call: Call, make_room: MakeRoom | None = None
    ) -> Room | None:
        """Send each rank its part of a message; what comes stays in the windows until the next one."""
        self._meetings += 1
        given = torch.from_numpy(message)
        try:
            under_way: Any = dist.all_to_all_single(self._flat, given, self._room, sizes, self._control, async_op=True)
        except RuntimeError as error:
            self._lose(call, error)
        room = None if make_room is None else make_room()
        try:
            under_way.wait()
        except RuntimeError as error:
            self._lose(call, error)
        return room

    def _refuse(self, call: Call) -> NoReturn:
        said = "; ".join(self._named(self.texts(call, str(call))))
        self._broken = (
            f"the ranks are out of step: {said}. All ranks must make the same calls in the same order and with the "
            "same options, and the result of each gather must be part of the loss on all ranks or on none"
        )
        raise OutOfStepError(self._broken)

    def _fail_together(self, call: Call, failure: Exception | None) -> NoReturn:
        said = self.texts(call, "" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise self.agreed(failure)
        which = "; ".join(one for one, text in zip(self._named(said), said, strict=True) if text)
        raise self.agreed(RuntimeError(f"all ranks have stopped before {call}, because it failed on {which}"))

    def _named(self, texts: list[str]) -> list[str]:
        return [f"rank {self._global[rank]}: {text}" for rank, text in enumerate(texts)]

    def _lose(self, call: Call, error: RuntimeError) -> NoReturn:
        """Raise because a rank did not come; those that did tell so in the store of the job."""
        keys = [f"{self._name}/{self._meetings}/{rank}" for rank in range(self.size)]
        said = [""] * self.size
        try:
            self._store.set(keys[self.rank], str(call))
            until = time.monotonic() + _GRACE
            while not all(said) and time.monotonic() < until:
                for rank, key in enumerate(keys):
                    if not said[rank] and self._store.check([key]):
                        said[rank] = self._store.get(key).decode("utf-8", "replace")
                time.sleep(0.02)
        except RuntimeError:
            pass  # The rank that has the store may be the one that is gone.
        lost = [f"rank {self._global[rank]}" for rank, text in enumerate(said) if not text and rank != self.rank]
        who = " and ".join(lost) or "another rank"
        self._broken = (
            f"rank {self._global[self.rank]} was about to do {call}; {who} did not come within {self._timeout:g} s, or "
            f"came too late, or its process has ended ({str(error).strip()[:200]})"
        )
        raise OutOfStepError(self._broken) from error


class Line:
    """What one dictionary sends over the ranks of its group, and how much."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.dictionary = ranks.dictionaries
        ranks.dictionaries += 1
        self.sent_bytes = 0

    def call(self, operation: str, number: int, options: str = "") -> Call:
        """Return a call of this dictionary."""
        return Call(self.dictionary, operation, number, options)

    def meet(
        self, call: Call, payload: Any = _NOTHING, status: int = 0, failure: Exception | None = None
    ) -> NDArray[np.int64]:
        """As for :meth:`Ranks.meet`."""
        return self.meet_with(None, None, call, payload, status, failure).told

    def meet_with(
        self,
        data: Data | None,
        give: list[int] | None,
        call: Call,
        payload: Any = _NOTHING,
        status: int = 0,
        failure: Exception | None = None,
        make_room: MakeRoom | None = None,
    ) -> Mail:
        """As for :meth:`Ranks.meet_with`."""
        self.sent_bytes += HEADER_BYTES * (self.ranks.size - 1)
        if data is not None and give is not None:
            self.sent_bytes += sum(give) - give[self.ranks.rank]
        return self.ranks.meet_with(data, give, call, payload, status, failure, make_room)

    def texts(self, call: Call, text: str) -> list[str]:
        """As for :meth:`Ranks.texts`."""
        self.sent_bytes += _TEXT_BYTES * (self.ranks.size - 1)
        return self.ranks.texts(call, text)

    def exchange(self, given: Tensor, give: list[int], take: list[int], call: Call) -> Tensor:
        """Send ``give[r]`` rows of a tensor to each rank ``r``, and return the ``take[r]`` rows that come of each."""
        if self.ranks.size == 1:
            return given
        given = given.resolve_conj().resolve_neg().contiguous()
        out = given.new_empty((sum(take), *given.shape[1:]))
        if count := given.shape[0]:
            self.sent_bytes += (count - give[self.ranks.rank]) * (given.nbytes // count)
        self.ranks.exchange(out, given, take, give, call)
        return out


_all_ranks: dict[tuple[str, float], Ranks] = {}
_counts: dict[str, int] = {}
# The groups of all ranks of meshes with two dimensions, each beside the group of all processes at that time.
_meshes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def group_of(group: Any, timeout: float) -> Ranks:
    """Return the ranks of a process group or of a mesh with one dimension; those of a group are made once.

    Raises
    ------
    TypeError
        If this is neither.
    ValueError
        If a mesh has several dimensions, or if this process is not in the group.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"expected a mesh with one dimension, got {group.ndim}: pass mesh['name']")
        group = group.get_group()
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the process group")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"expected a process group or a DeviceMesh, got {type(group).__name__}")
    key = "" if group is None else group.group_name, timeout
    known = _all_ranks.get(key)
    if known is None or known.group is not group:
        known = _all_ranks[key] = Ranks(group, timeout)
    return known


def ranks_and_shards(mesh_or_group: Any, timeout: float) -> tuple[Ranks, int]:
    """Return the ranks of a process group or of a mesh, and over how many ranks names are spread.

    A mesh with two dimensions has replicas: the names are spread over its second dimension.

    Raises
    ------
    TypeError, ValueError
        As for :func:`group_of`. Also if the ranks of a mesh with two dimensions do not ascend.
    """
    if not isinstance(mesh_or_group, DeviceMesh) or mesh_or_group.ndim != 2:
        ranks = group_of(mesh_or_group, timeout)
        return ranks, ranks.size
    members = tuple(mesh_or_group.mesh.flatten().tolist())
    if list(members) != sorted(members):
        raise ValueError(f"expected a mesh whose ranks ascend, as init_device_mesh makes it, got {list(members)}")
    job, group = _meshes.get(members, (None, None))
    if job is not dist.group.WORLD:  # torch.distributed has been initialised since
        group = dist.new_group(list(members), use_local_synchronization=True)
        _meshes[members] = dist.group.WORLD, group
    return group_of(group, timeout), mesh_or_group.size(1)


def _count_of(group: Any) -> int:
    """Return how many groups of a name came before: names in the store must be new."""
    _counts[group.group_name] = number = _counts.get(group.group_name, -1) + 1
    return number
