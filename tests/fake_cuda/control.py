"""What a test sets and reads while it runs under the fake CUDA runtime.

The functions talk to the library that is preloaded into this process. They are what ``src/control.c`` offers, with
types; the ``fake_cuda`` fixture hands out one :class:`Control`, as new for each test.
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

KINDS = ("H2D", "D2H", "D2D", "P2P", "H2H")
"""Kinds of copies; P2P is from one device to another."""


class _CopyCount(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("count", "bytes", "largest", "pageable")]


_COUNTS = (
    "sets",
    "host_functions",
    "kernels",
    "device_allocations",
    "device_allocated_bytes",
    "host_allocations",
    "host_allocated_bytes",
    "host_registrations",
    "host_registered_bytes",
    "hazards",
    "races",
)


class _Counters(ctypes.Structure):
    _fields_ = [("copies", _CopyCount * len(KINDS)), *((name, ctypes.c_uint64) for name in _COUNTS)]


@dataclass(frozen=True)
class Copies:
    """How many copies of one kind were asked for, their bytes, the largest, and how many had a pageable host side."""

    count: int
    bytes: int
    largest: int
    pageable: int


@dataclass(frozen=True)
class Counters:
    """What was asked of the runtime since the last reset. `copies` has an entry for each of :data:`KINDS`.

    `hazards` counts host memory that was given back (freed, unregistered) while a copy of it was still pending; `races`
    counts work of two streams that touches the same bytes, at least one writing, with nothing that orders them.
    """

    copies: dict[str, Copies]
    sets: int
    host_functions: int
    kernels: int
    device_allocations: int
    device_allocated_bytes: int
    host_allocations: int
    host_allocated_bytes: int
    host_registrations: int
    host_registered_bytes: int
    hazards: int
    races: int


def inside() -> bool:
    """Tell whether this process runs under the fake runtime."""
    return "FAKE_CUDA_RUNTIME" in os.environ


class Control:
    """The switches and counters of the runtime in this process; `library` is the runtime itself."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.environ["FAKE_CUDA_RUNTIME"])
        library.fake_cuda_calls.argtypes = [ctypes.c_char_p]
        library.fake_cuda_calls.restype = ctypes.c_uint64
        library.fake_cuda_pending.restype = ctypes.c_uint64
        library.fake_cuda_unsupported.restype = ctypes.c_size_t
        library.fake_cuda_unsupported.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.fake_cuda_races.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.fake_cuda_set_memory.argtypes = [ctypes.c_size_t]
        library.fake_cuda_step.argtypes = [ctypes.c_uint64]
        library.fake_cuda_fail.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int]
        library.fake_cuda_hold_stream.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.fake_cuda_trace.argtypes = [ctypes.c_char_p]
        self.library = library

    def reset(self) -> None:
        """Wait for all work, drop holds and failures, zero the counters, and set the switches back."""
        self.library.fake_cuda_reset()

    @property
    def counters(self) -> Counters:
        """What was asked of the runtime since the last reset."""
        raw = _Counters()
        self.library.fake_cuda_counters(ctypes.byref(raw))
        copies = {
            kind: Copies(*(getattr(count, name) for name, _ in _CopyCount._fields_))
            for kind, count in zip(KINDS, raw.copies, strict=True)
        }
        return Counters(copies, *(getattr(raw, name) for name in _COUNTS))

    def calls(self, function: str) -> int:
        """Return how often a runtime function was called since the last reset, ``"cudaEventRecord"`` for example.

        Variants of a function count under the one that does the work: ``cudaMallocHost`` under ``cudaHostAlloc``,
        ``cudaEventRecord`` under ``cudaEventRecordWithFlags``.
        """
        return self.library.fake_cuda_calls(function.encode())

    @property
    def pending(self) -> int:
        """How many pieces of work are queued or running: copies, sets, events, callbacks."""
        return self.library.fake_cuda_pending()

    @property
    def unsupported(self) -> list[str]:
        """Functions and kernels (by their mangled names) that were called and do not exist here."""
        return self._lines(self.library.fake_cuda_unsupported)

    def take_races(self) -> list[str]:
        """Return a line for each race since the last reset or call, the first 16 of them, and forget them.

        A test that ends with races left fails, so a test that wants a race takes it.
        """
        lines = self._lines(self.library.fake_cuda_races)
        self.library.fake_cuda_forget_races()
        return lines

    @staticmethod
    def _lines(function: Callable[[ctypes.Array[ctypes.c_char], int], object]) -> list[str]:
        text = ctypes.create_string_buffer(1 << 16)
        function(text, len(text))
        return text.value.decode().splitlines()

    def set_latency(self, microseconds: int) -> None:
        """Let every copy and set sleep that long before it moves bytes."""
        self.library.fake_cuda_set_latency(microseconds)

    def set_schedule(self, schedule: str) -> None:
        """Choose when queued work runs: ``"eager"``, at once, or ``"on_demand"``, when somebody waits for it."""
        self.library.fake_cuda_set_on_demand({"eager": 0, "on_demand": 1}[schedule])

    def set_memory(self, size: int) -> None:
        """Let each device hold that many bytes."""
        self.library.fake_cuda_set_memory(size)

    def set_hold_timeout(self, milliseconds: int) -> None:
        """Let the host wait that long for held work before the wait fails with cudaErrorLaunchTimeout."""
        self.library.fake_cuda_set_hold_timeout(milliseconds)

    def trace_to(self, path: str | None) -> None:
        """Append a line to a file for each allocation, copy and failure; None ends that."""
        self.library.fake_cuda_trace(None if path is None else path.encode())

    def fail(self, what: str, *, nth: int = 1, error: str = "cudaErrorIllegalAddress", late: bool = False) -> None:
        """Let one call to come fail.

        Parameters
        ----------
        what : str
            ``"copy"``, ``"allocation"`` (of device memory), ``"host allocation"``, ``"host registration"``, or the name
            of a runtime function.
        nth : int
            Which of those calls, counted from now; 1 is the next.
        error : str
            The name of the error, as in CUDA's headers.
        late : bool
            For copies: the call succeeds, the copy moves nothing, and every call that waits for the device or uses
            it afterwards fails, as after an illegal access on a GPU.
        """
        if not self.library.fake_cuda_fail(what.encode(), nth, error.encode(), late):
            raise ValueError(
                f"cannot let call {nth} of {what!r} fail with {error!r}: unknown error or too many failures"
            )

    @contextmanager
    def hold(self, kinds: Iterable[str] = KINDS) -> Iterator[None]:
        """Let no copy of these kinds start inside the block, except those that :meth:`step` lets pass.

        A host thread that waits for a held copy gets cudaErrorLaunchTimeout (see :meth:`set_hold_timeout`).
        """
        self.library.fake_cuda_hold(sum(1 << KINDS.index(kind) for kind in kinds))
        try:
            yield
        finally:
            self.library.fake_cuda_release()

    def step(self, copies: int = 1) -> None:
        """Let that many held copies pass."""
        self.library.fake_cuda_step(copies)

    @contextmanager
    def hold_stream(self, stream: Any) -> Iterator[None]:
        """Let no work of a ``torch.cuda.Stream`` start inside the block."""
        self._hold_stream(stream, 1)
        try:
            yield
        finally:
            self._hold_stream(stream, 0)

    def _hold_stream(self, stream: Any, hold: int) -> None:
        import torch

        with torch.cuda.device(stream.device):  # Default streams of all devices have the same handle.
            if not self.library.fake_cuda_hold_stream(stream.cuda_stream, hold):
                raise ValueError(f"{stream} is no stream of the fake runtime")
