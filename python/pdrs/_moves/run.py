"""Moves of many tensors at once: between dtypes, and between the host and devices.

torch moves a module's tensors one by one: microseconds of Python each, and one small copy each. Here the tensors of one
dtype and device are gathered into one *slab*, the slab is converted or copied, and the tensors become views of the
result. They stay the same objects, as under torch's ``Module.to``, and each has a storage of its own.

Anything unusual about a tensor is left to torch, with torch's own result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pdrs._core import (
    TensorGroup,
    all_kept,
    collect_parameters,
    complete_move,
    group_tensors,
    walk_modules,
)
from pdrs._moves import staging
from pdrs._moves.pinned import pinned_empty
from pdrs._moves.recognise import Move, TensorFunction, is_shared_memory, recognise, usual_applies
from pdrs._torch import huge_pages

__all__ = ["apply", "pin_memory"]

# How many elements are converted at a time on the CPU: what was gathered is still in the cache when it is read again,
# and torch does not share so few among threads, which would cost more than it saves.
_PIECE = 1 << 15


def apply(module: Module, function: TensorFunction, recurse: bool) -> bool:
    """Do what ``Module._apply`` does with one of torch's functions, all at once; False if it must be left to torch."""
    if is_shared_memory(function):
        _refuse_too_many_files(module)
    move = recognise(function)
    if move is None:
        return False
    held = _Held(*walk_modules([module], tuple(usual_applies) if recurse else None))
    _move(held, move)
    for other in held.others:
        other._apply(function)  # type: ignore[no-untyped-call]
    return True


def _refuse_too_many_files(module: Module) -> None:
    """Raise if torch could not share all tensors of a module, a file for each storage, but would stop half-way."""
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":  # type: ignore[no-untyped-call]
        return
    import resource  # There is none on Windows, which has another strategy.

    free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd"))
    plain = [each for each in chain(module.parameters(), module.buffers()) if type(each) in (Tensor, Parameter)]
    if len(plain) <= free:
        return
    loose = [each for each in plain if each.layout == torch.strided and not torch.Tensor.is_shared(each)]  # type: ignore[no-untyped-call]
    needed = len({each.untyped_storage()._cdata for each in loose})
    if needed > free:
        raise RuntimeError(
            f"expected at most {free:,} tensors to share, each of which keeps a file open, got {needed:,}; raise the "
            "limit (ulimit -n), call torch.multiprocessing.set_sharing_strategy('file_system'), or share pd.stack()"
        )


def pin_memory(module: Module) -> None:
    """Put the parameters, gradients and buffers of a module that lie on the CPU into page-locked memory."""
    if not torch.cuda.is_available():
        raise RuntimeError("expected a CUDA device, for which memory can be page-locked; torch finds none")
    staging.refuse_capture()
    _move(_Held(*walk_modules(list(module.modules()))), Move(lambda tensor: tensor, "pin_memory"))


class _Held(NamedTuple):
    """Modules that are moved together, and those inside that move themselves; and the dicts that hold anything."""

    modules: list[Module]
    others: list[Module]
    parameters: list[dict[str, Any]]
    buffers: list[tuple[Module, dict[str, Any]]]


class _Place(NamedTuple):
    """Where a buffer is registered."""

    module: Module
    name: str

    def get(self) -> Tensor:
        buffer = self.module._buffers[self.name]
        assert buffer is not None
        return buffer

    def set(self, buffer: Tensor) -> None:
        self.module._buffers[self.name] = buffer


@dataclass
class _Prepared:
    """Slabs that are filled and to which nothing refers yet; and the indices of what must be left to torch."""

    slabs: list[tuple[TensorGroup, Tensor]] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def _move(held: _Held, move: Move) -> None:
    """Move the parameters, gradients and buffers of some modules: all, or, if there is an error, none."""
    if not move.anew and all_kept(held.parameters, [buffers for _, buffers in held.buffers], move.keeps):
        return
    parameters, gradients = collect_parameters(held.parameters)
    places, odd_places, twins = _buffer_places(held, parameters)
    with torch.no_grad():
        # Gradients get slabs of their own, whose memory goes when the gradients are set to None.
        of_parameters = _prepare(parameters, move)
        of_gradients = _prepare(gradients, move)
        of_buffers = _prepare([place.get() for place in places], move)
        slabs = of_parameters.slabs + of_gradients.slabs
        buffers: list[tuple[dict[str, Any], str, Tensor]] = []
        if move.in_place:
            slabs += of_buffers.slabs
        else:
            for group, slab in of_buffers.slabs:
                views = zip(group.indices, group.views(slab, detached=True), strict=True)
                buffers += [(places[index].module._buffers, places[index].name, view) for index, view in views]
    left = {id(parameters[index]) for index in of_parameters.left} | {
        id(gradients[index]) for index in of_gradients.left
    }
    odd_places += [places[index] for index in of_buffers.left]
    undo: list[Callable[[], None]] = []
    try:
        if left or odd_places:
            _leave_to_torch(held.modules, left, odd_places, move, undo)
        try:
            _complete(slabs, buffers, undo)
        except ValueError:
            # A tensor from inference mode is among them, of which torch has its own mind (but none of pin_memory).
            if move.method == "pin_memory":
                raise
            _leave_to_torch(held.modules, {id(one) for one in parameters + gradients}, [], move, undo)
            _complete([], buffers, undo)
    except BaseException:
        for put_back in reversed(undo):
            put_back()
        raise
    for place in twins:
        place.set(move.function(place.get()))


def _complete(
    slabs: list[tuple[TensorGroup, Tensor]],
    buffers: list[tuple[dict[str, Any], str, Tensor]],
    undo: list[Callable[[], None]],
) -> None:
    """Do all that is left of a move. There is no way back from here: what has been done before is not undone any more.

    The modes of `torch.device` are off meanwhile: they are Python code, which a signal can interrupt.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction():
        complete_move(slabs, buffers=buffers, undo=undo)


def _buffer_places(held: _Held, parameters: list[Tensor]) -> tuple[list[_Place], list[_Place], list[_Place]]:
    """Return where buffers are; where those that are Parameters or require gradients; and where twins are.

    A twin is a Parameter of these modules that is registered as a buffer, too. When it has moved as a Parameter it is
    mostly there already, and stays the same object.
    """
    usual: list[_Place] = []
    odd: list[_Place] = []
    for module, buffers in held.buffers:
        for name, buffer in buffers.items():
            if buffer is not None:
                is_odd = isinstance(buffer, Parameter) or buffer.requires_grad
                (odd if is_odd else usual).append(_Place(module, name))
    ids = set(map(id, parameters)) if odd else set()
    twins = [place for place in odd if id(place.get()) in ids]
    return usual, [place for place in odd if id(place.get()) not in ids], twins


def _prepare(tensors: list[Tensor], move: Move) -> _Prepared:
    """Fill slabs with what the tensors will be; the tensors stay as they are."""
    prepared = _Prepared()
    if not tensors:
        return prepared
    groups, unusual = group_tensors(tensors, narrowest=move.narrowest())
    if move.method != "pin_memory":
        prepared.left += [index for index, _ in unusual]
    for group in groups:
        if move.in_place:
            prepared.slabs += _pinned(group, tensors)
        elif _is_there(group, move):
            continue
        else:
            slab = _moved(group, tensors, move)
            if slab is None:
                prepared.left += group.indices.tolist()
            else:
                prepared.slabs.append((group, slab))
    return prepared


def _pinned(group: TensorGroup, tensors: list[Tensor]) -> list[tuple[TensorGroup, Tensor]]:
    """Fill a slab in page-locked memory with those tensors of a group that are not in such memory yet."""
    if group.device.type == "cuda":
        return []  # It is not for the CPU to lock.
    waiting = [index for index in group.indices.tolist() if not tensors[index].is_pinned()]
    if not waiting:
        return []
    (group,), _ = group_tensors([tensors[index] for index in waiting])
    slab = pinned_empty(group.length, group.dtype)
    group.gather(slab)
    return [(group, slab)]


def _moved(group: TensorGroup, tensors: list[Tensor], move: Move) -> Tensor | None:
    """Return a filled slab for a group, or None if torch must move its tensors one by one."""
    dtype, device = move.target(group.dtype, group.device)
    if dtype != group.dtype and not (dtype.is_floating_point or dtype.is_complex):
        return None  # torch refuses most such conversions, in its own words.
    match move.method, group.device.type, device.type:
        case "to_empty", _, "cpu" | "cuda":
            return _allocate(group, dtype, device)
        case _, "cpu", "cpu":
            slab = _allocate(group, dtype, device)
            _convert(group, slab)
            return slab
        case _, "cpu", "cuda":
            staging.refuse_capture(device)
            slab = _allocate(group, dtype, device)
            staging.upload(group, slab, wait=not move.non_blocking)
            return slab
        case _, "cuda", "cpu":
            staging.refuse_capture(group.device)
            return _downloaded(group, tensors, dtype, move)
        case _, "cuda", "cuda":
            source = group.slab()
            if source is None:
                return None
            # Its memory may have been allocated on another stream, and goes there when nobody needs it any more.
            source.record_stream(torch.cuda.current_stream(source.device))
            with _explained(group, dtype, device):
                return source.to(device, dtype, move.non_blocking)
    return None


def _allocate(group: TensorGroup, dtype: torch.dtype, device: torch.device) -> Tensor:
    with _explained(group, dtype, device):
        return huge_pages.empty(group.length, dtype=dtype, device=device)


@contextmanager
def _explained(group: TensorGroup, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Say how much memory was wanted, and for what, if there is too little."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"expected room for {group.length * dtype.itemsize:,} bytes on {device}, where {len(group):,} tensors were "
            f"to move at once; nothing has moved. {error}"
        ) from error


def _convert(group: TensorGroup, slab: Tensor) -> None:
    """Gather into a slab of any dtype on the CPU, a piece at a time, so that each is converted from the cache."""
    if slab.dtype == group.dtype:
        group.gather(slab)
        return
    source = group.slab()
    if source is not None:
        slab.copy_(source)
        return
    piece = torch.empty(min(_PIECE, group.length), dtype=group.dtype, device="cpu")
    for start in range(0, group.length, _PIECE):
        part = piece[: group.length - start]
        group.gather(part, start)
        slab[start : start + len(part)].copy_(part)


def _downloaded(group: TensorGroup, tensors: list[Tensor], dtype: torch.dtype, move: Move) -> Tensor | None:
    source = group.slab()
    loose = [_flat(tensors[index]) for index in group.indices] if source is None else []
    dense = [tensor for tensor in loose if tensor is not None]
    if len(dense) < len(loose):
        return None
    later = move.non_blocking and source is not None and dtype == group.dtype
    slab = pinned_empty(group.length, dtype) if later else _allocate(group, dtype, torch.device("cpu"))
    if later and source is not None:
        staging.download_later(source, slab)
    else:
        staging.download(group, dense if source is None else source, slab)
    return slab


def _flat(tensor: Tensor) -> Tensor | None:
    """Return what a tensor holds as it lies in memory, if that has no gaps."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != length:
            return None
        length *= size
    return tensor.as_strided((length,), (1,))


def _is_there(group: TensorGroup, move: Move) -> bool:
    """Whether a group of tensors has the dtype and the device that it is to get already."""
    return move.method != "to_empty" and (group.dtype, group.device) == move.target(group.dtype, group.device)


def _leave_to_torch(
    modules: list[Module], left: set[int], places: list[_Place], move: Move, undo: list[Callable[[], None]]
) -> None:
    """Let torch move some Parameters and gradients (by their ids) and buffers; note how to put them back."""
    for module in modules:
        parameters = {name: each for name, each in module._parameters.items() if each is not None and id(each) in left}
        buffers = {place.name: place.get() for place in places if place.module is module}
        rest = Module()
        # Past `Module.__setattr__`: an entry may be called "_buffers".
        rest.__dict__.update(_parameters=dict(parameters), _buffers=dict(buffers))
        undo += [_put_back(parameter) for parameter in parameters.values()]
        rest._apply(move.function)  # type: ignore[no-untyped-call]
        undo += [partial(module._parameters.update, parameters), partial(module._buffers.update, buffers)]
        module._parameters.update(rest._parameters)
        module._buffers.update(rest._buffers)
    with torch.no_grad():
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.grad is not None and id(parameter.grad) in left:
                    undo.append(_put_back(parameter))
                    parameter.grad.data = move.function(parameter.grad)


def _put_back(parameter: Tensor) -> Callable[[], None]:
    """Return what gives a Parameter and its gradient the data back that they have now."""
    gradient = parameter.grad
    data, gradient_data = parameter.data, None if gradient is None else gradient.data

    def put_back() -> None:
        parameter.grad = None  # As torch does: what a Parameter holds may refuse to be swapped.
        _set_data(parameter, data)
        if gradient is not None and gradient_data is not None:
            _set_data(gradient, gradient_data)
            parameter.grad = gradient

    return put_back


def _set_data(tensor: Tensor, data: Tensor) -> None:
    # mypy takes torch's protocol of wrappers for one that no Tensor can fulfil.
    if isinstance(data, FakeTensor) or is_traceable_wrapper_subclass(data):  # type: ignore[unreachable]
        # As torch's `_apply` does: these hold more than `tensor.data = ...` replaces.
        like = Parameter(data, tensor.requires_grad) if isinstance(tensor, Parameter) else data
        torch.utils.swap_tensors(tensor, like)  # type: ignore[no-untyped-call]
    else:
        tensor.data = data
