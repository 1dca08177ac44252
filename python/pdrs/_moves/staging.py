"""Copies between pageable host memory and a CUDA device, through page-locked blocks and a stream of their own.

A copy from pageable memory keeps the host waiting, and one copy an entry keeps the device waiting. So entries are
gathered into a block of page-locked memory, which the device fetches on a side stream while the next block is filled:

    host          | gather 0 | gather 1 | gather 2 | wait for 0, gather 3 | ...
    side stream              | copy 0   | copy 1   | copy 2               | copy 3 | ...
    current stream  work ...                                                       | waits, then work ...

Three guards keep that right; tests/moves/test_transfer_guards.py deletes each line of them to see that it is needed:

- An *event* for each block says when it may be filled, or read, again. Without it the device fetches what belongs to a
  later block, or the host reads what has not come yet.
- The side stream *waits* for the current one before it touches the device's memory, which queued work may still use.
  The current stream waits for the side stream before it goes on.
- Slabs are made *known to all streams*, because torch's allocator does not know the storages of their views. So their
  memory is not handed out again before the work is done that was queued when the last view went. A source that is no
  such slab lies in a storage of torch's. It is read on a stream that its allocator may not know: `record_stream`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pdrs._core import TensorGroup

__all__ = ["download", "download_later", "make_known_to_streams", "refuse_capture", "set_staging", "upload"]

# Offsets in a slab are multiples of this many bytes at most, and so are the edges of blocks.
_ALIGNMENT = 64
# A block holds so many of the narrowest elements (1 byte) even when they are widened to the widest (16 bytes).
_LEAST_BLOCK_BYTES = _ALIGNMENT * 16
_DEFAULT_BLOCK_BYTES = 8 << 20
_DEFAULT_BLOCKS = 3


@dataclass
class _Block:
    """Page-locked memory, and the event behind the last copy that used it."""

    memory: Tensor
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the last copy has read, or written, the memory."""
        if self.event is not None:
            self.event.synchronize()

    def mark(self) -> None:
        """Note that what the current stream has been given so far uses the memory."""
        # A new one: an event belongs to the device on which it is first recorded, a block to none.
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record()

    def part(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return the beginning of the memory as a flat tensor."""
        return self.memory[: length * dtype.itemsize].view(dtype)


class _StagingBlocks:
    """Page-locked blocks that transfers borrow and give back.

    They come from torch's allocator of page-locked memory, which gives powers of two. Several threads may transfer at
    once: each borrows blocks of its own, and what is more than ``count`` in the end goes back to torch.
    """

    def __init__(self, block_bytes: int = _DEFAULT_BLOCK_BYTES, count: int = _DEFAULT_BLOCKS) -> None:
        for name, number in (("block_bytes", block_bytes), ("blocks", count)):
            if not isinstance(number, int):
                raise TypeError(f"expected {name} to be an int, got {number!r}")
        if block_bytes < _LEAST_BLOCK_BYTES or block_bytes % _ALIGNMENT:
            raise ValueError(
                f"expected block_bytes to be a multiple of {_ALIGNMENT}, {_LEAST_BLOCK_BYTES} or more, "
                f"got {block_bytes}"
            )
        if count < 1:
            raise ValueError(f"expected blocks to be 1 or more, got {count}")
        self.block_bytes = block_bytes
        self.count = count
        self._idle: list[_Block] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[list[_Block]]:
        """Lend as many blocks as a transfer of so many bytes can use."""
        wanted = min(self.count, -(-nbytes // self.block_bytes))
        with self._lock:
            blocks = [self._idle.pop() for _ in range(min(wanted, len(self._idle)))]
        while len(blocks) < wanted:
            blocks.append(_Block(torch.empty(self.block_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)))
        yield blocks
        # Not after an error: there may be a copy that no event tells of. torch frees such memory when it is over.
        with self._lock:
            self._idle += blocks[: max(0, self.count - len(self._idle))]


_staging = _StagingBlocks()
_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_side_streams_lock = threading.Lock()
_torch_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def set_staging(*, block_bytes: int = _DEFAULT_BLOCK_BYTES, blocks: int = _DEFAULT_BLOCKS) -> None:
    """Set the page-locked memory for transfers between host and CUDA devices, for all threads and devices.

    Parameters
    ----------
    block_bytes
        The size of a block in bytes: a multiple of 64, at least 1024. Use a power of two, because torch rounds up to
        one.
    blocks
        How many blocks take turns in a transfer. With one block, gathering and copying do not overlap.

    Raises
    ------
    TypeError
        If a number is not an ``int``. Then nothing has changed.
    ValueError
        If a number is out of range. Then nothing has changed.

    Examples
    --------
    >>> import pdrs
    >>> pdrs.set_staging(block_bytes=32 << 20, blocks=2)
    >>> pdrs.set_staging()  # the default

    """
    global _staging
    _staging = _StagingBlocks(block_bytes, blocks)


def refuse_capture(device: torch.device | None = None) -> None:
    """Raise if the current stream, or that of a device, is captured: a graph would replay copies of other data."""
    captured = torch.cuda.is_current_stream_capturing()
    if device is not None and not captured:
        with torch.cuda.device(device):
            captured = torch.cuda.is_current_stream_capturing()
    if captured:
        raise RuntimeError(
            "expected a move outside of the capture of a CUDA graph, got one inside: move the module before "
            "torch.cuda.graph(...)"
        )


def upload(group: TensorGroup, slab: Tensor, *, wait: bool) -> None:
    """Copy tensors from the host into a slab on a device; dtypes are converted on the host, as torch does.

    Parameters
    ----------
    group
        Tensors on the CPU.
    slab
        Flat, on a CUDA device, allocated on its current stream; what is queued there later finds the data complete.
    wait
        Whether to return only when the data is there. In any case the tensors may change or die after the return.
    """
    staging = _staging
    source = group.slab() if wait and slab.dtype == group.dtype else None
    if source is not None and source.is_pinned():
        with _side_stream(slab.device) as side, torch.cuda.stream(side):
            slab.copy_(source, non_blocking=True)
        side.synchronize()
        return
    last = None
    with staging.borrow(slab.nbytes) as blocks, _side_stream(slab.device) as side:
        for turn, (start, stop) in enumerate(_cuts(group, staging.block_bytes, slab.dtype)):
            last = blocks[turn % len(blocks)]
            last.wait()
            part = last.part(stop - start, slab.dtype)
            _gather(group, part, start)
            with torch.cuda.stream(side):
                slab[start:stop].copy_(part, non_blocking=True)
                last.mark()
    if wait and last is not None:
        last.wait()


def download(group: TensorGroup, source: Tensor | list[Tensor], slab: Tensor) -> None:
    """Copy tensors from a device into a slab on the host; dtypes are converted there. Returns finished data.

    Parameters
    ----------
    group
        Tensors on a CUDA device.
    source
        The slab that they lie in. Or, if they lie here and there, a list of them all, flat. Then each takes a copy of
        its own, but a whole block of them is waited for at once.
    slab
        Flat, on the CPU.
    """
    staging = _staging
    # Copies under way: the block, what of it they fill, and where that goes.
    under_way: deque[tuple[_Block, Tensor, Tensor]] = deque()
    cuts = _cuts(group, staging.block_bytes, group.dtype)
    device = source.device if isinstance(source, Tensor) else source[0].device
    with staging.borrow(group.length * group.dtype.itemsize) as blocks, _side_stream(device) as side:
        for turn, (start, stop, pieces) in enumerate(_pieces(group, source, cuts)):
            if len(under_way) == len(blocks):
                _land(under_way)
            block = blocks[turn % len(blocks)]
            # Another transfer may have left it to a copy that is still under way.
            block.wait()
            part = block.part(stop - start, group.dtype)
            with torch.cuda.stream(side):
                for at, piece in pieces:
                    part[at - start : at - start + len(piece)].copy_(piece, non_blocking=True)
                block.mark()
            under_way.append((block, part, slab[start:stop]))
        while under_way:
            _land(under_way)


def download_later(source: Tensor, slab: Tensor) -> None:
    """Queue the copy of a slab on a device into one in page-locked memory, and return before it ends.

    The source may change or die after the return; the copy is complete once its current stream has been waited for.
    """
    with _side_stream(source.device) as side, torch.cuda.stream(side):
        source.record_stream(side)
        slab.copy_(source, non_blocking=True)


def make_known_to_streams(slab: Tensor) -> None:
    """Have the memory of a slab handed out again only when all streams have done what they had to do when it was freed.

    torch's allocator lets a stream be recorded for memory of its own only, and the storage of a view of a slab is not.
    So all streams that torch has for the device are recorded for the slab, once. When the last view has gone, the
    allocator asks each of them for an event; that goes by the slab, and not by the entry, and keeps nobody waiting.
    """
    current = torch.cuda.current_stream(slab.device)
    for stream in [*_streams_of(slab.device), current]:
        slab.record_stream(stream)


def _streams_of(device: torch.device) -> list[torch.cuda.Stream]:
    """Return the default stream of a device, and all others that torch ever hands out."""
    if device not in _torch_streams:
        _torch_streams[device] = [torch.cuda.default_stream(device), *_pool(device)]
    return _torch_streams[device]


def _pool(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Yield all streams of torch's pool, of which it has some for each priority, and hands them out in turn.

    Each is asked for twice: another thread that takes one meanwhile hides it in one round only. After whole rounds it
    is the turn of the same stream as before.
    """
    least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # a static method
    for priority in range(greatest, least + 1):
        seen: set[int] = set()
        again = 0
        while again < len(seen) or not seen:
            stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
            if stream.stream_id in seen:
                again += 1
            else:
                seen.add(stream.stream_id)
                again = 0
                yield stream


@contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Give the stream that carries copies from and to a device, between what its current stream does before and after.

    All threads share it: copies of one direction gain nothing from a second stream.
    """
    with _side_streams_lock:
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side = _side_streams[device]
    current = torch.cuda.current_stream(device)
    side.wait_stream(current)
    try:
        yield side
    finally:
        current.wait_stream(side)


def _land(under_way: deque[tuple[_Block, Tensor, Tensor]]) -> None:
    """Wait for the oldest copy that is under way, and bring its data to the slab."""
    block, part, target = under_way.popleft()
    block.wait()
    target.copy_(part)


def _cuts(group: TensorGroup, block_bytes: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Cut a slab of some dtype into parts that fit into a block, as ranges of elements."""
    nbytes = block_bytes * group.dtype.itemsize // max(dtype.itemsize, group.dtype.itemsize)
    yield from group.blocks(nbytes - nbytes % _ALIGNMENT)


def _pieces(
    group: TensorGroup, source: Tensor | list[Tensor], cuts: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, list[tuple[int, Tensor]]]]:
    """Give for each cut what it consists of: flat tensors, and at which element of the slab each begins."""
    if isinstance(source, Tensor):
        yield from ((start, stop, [(start, source[start:stop])]) for start, stop in cuts)
        return
    # By place, for a tensor that is listed twice has one.
    tensors = {offset: tensor for offset, tensor in zip(group.offsets.tolist(), source, strict=True) if len(tensor)}
    waiting = deque(tensors.items())
    for start, stop in cuts:
        pieces = []
        while waiting and waiting[0][0] < stop:
            at, tensor = waiting.popleft()
            fits = stop - at
            pieces.append((at, tensor[:fits]))
            if len(tensor) > fits:
                waiting.appendleft((stop, tensor[fits:]))
        yield start, stop, pieces


def _gather(group: TensorGroup, part: Tensor, start: int) -> None:
    if part.dtype == group.dtype:
        group.gather(part, start)
    else:
        gathered = torch.empty(len(part), dtype=group.dtype, device="cpu")
        group.gather(gathered, start)
        part.copy_(gathered)
