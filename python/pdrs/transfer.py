"""Moves of many tensors at once: between dtypes, and between the host and devices.

torch moves a module's tensors one by one: microseconds of Python each, and one small copy each. Here the tensors of one
dtype and device are gathered into one *slab*, the slab is converted or copied, and the tensors become views of the
result. They stay the same objects, as under torch's ``Module.to``.

What moves is learnt from the function that torch hands to ``Module._apply``. Anything unusual about it, or about a
tensor, is left to torch, with torch's own result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import CodeType, FunctionType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from pdrs import _staging
from pdrs._core import TensorGroup, collect_parameters, group_tensors, kinds_of_parameters
from pdrs._pinned import pinned_empty
from pdrs._staging import set_staging

__all__ = ["set_staging", "to"]

ModuleT = TypeVar("ModuleT", bound=Module)
_Function = Callable[[Tensor], Tensor]

# How many elements are converted at a time on the CPU: what was gathered is still in the cache when it is read again,
# and torch does not share so few among threads, which would cost more than it saves.
_PIECE = 1 << 15


def _inner_functions(*methods: str) -> dict[CodeType, str]:
    return {
        constant: method
        for method in methods
        for constant in getattr(Module, method).__code__.co_consts
        if isinstance(constant, CodeType)
    }


# The functions that torch's own methods give to `_apply`, by their code.
_KNOWN = _inner_functions(
    "to", "cuda", "cpu", "type", "float", "double", "half", "bfloat16", "to_empty", "share_memory"
)


@dataclass(frozen=True)
class Move:
    """What a function of torch's does to every tensor.

    Parameters
    ----------
    function
        What torch gave to ``_apply``.
    method
        The name of the method of ``Module`` that it comes from.
    non_blocking
        Whether a move to or from a device may return before it is complete.
    """

    function: _Function
    method: str
    non_blocking: bool = False

    @property
    def door(self) -> Literal["as_strided"] | None:
        """How views of the slab are made: those in shared memory must share its storage, to be sent as one."""
        return "as_strided" if self.method == "share_memory" else None

    @property
    def anew(self) -> bool:
        """Whether tensors may need new memory though they have the right dtype and device."""
        return self.method in ("to_empty", "share_memory", "pin_memory")

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a tensor has the dtype and device that it is to get."""
        kind = (tensor.dtype, tensor.device)
        return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and self.target(*kind) == kind

    def target(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
        """Return where a tensor of this dtype and device goes: the function is asked, with an empty one."""
        probe = torch.empty(0, dtype=dtype, device=device)
        moved = self.function(probe)
        return moved.dtype, moved.device

    def narrowest(self) -> int | None:
        """Return the size of the elements that all floating point tensors get, or None if they keep theirs."""
        if self.anew:
            return None
        single, double = (self.target(dtype, torch.device("cpu"))[0] for dtype in (torch.float32, torch.float64))
        return single.itemsize if single == double else None


def recognise(function: _Function) -> Move | None:
    """Return what a function given to ``_apply`` does; None if it is not torch's, or torch does something unusual."""
    if not isinstance(function, FunctionType) or function.__code__ not in _KNOWN or _unusual_times():
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if "convert_to_format" in cells and cells["convert_to_format"].cell_contents is not None:
        return None
    non_blocking = "non_blocking" in cells and bool(cells["non_blocking"].cell_contents)
    return Move(function, _KNOWN[function.__code__], non_blocking)


def _unusual_times() -> bool:
    """Whether torch is to move otherwise than by ``tensor.data = ...``, or something listens to every operation."""
    return (
        torch.__future__.get_swap_module_params_on_conversion()
        or torch.__future__.get_overwrite_module_params_on_conversion()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.compiler.is_compiling()
    )


def apply(module: Module, function: _Function, recurse: bool) -> bool:
    """Do what ``Module._apply`` does with one of torch's functions, all at once; False if it must be left to torch."""
    move = recognise(function)
    if move is None:
        return False
    if recurse:
        for child in module.children():
            child._apply(function)  # type: ignore[no-untyped-call]
    _move([module], move)
    return True


def to(module: ModuleT, *args: Any, **kwargs: Any) -> ModuleT:
    """Move and convert the parameters and buffers of any module, as ``module.to(...)`` does, but all at once.

    Parameters
    ----------
    module
        Any module. Submodules that override ``_apply`` (recurrent ones do) are moved by it.
    *args, **kwargs
        Those of :meth:`torch.nn.Module.to`: ``device``, ``dtype``, ``tensor``, ``non_blocking``, ``memory_format``.

    Returns
    -------
    torch.nn.Module
        ``module`` itself. Its Parameters are the same objects; those of a dtype and device lie in one block of memory.

    Raises
    ------
    TypeError
        As ``Module.to``.
    torch.OutOfMemoryError
        If the device has too little memory for the block; then nothing has moved. The message says how much was wanted.
    RuntimeError
        Between host and device while a CUDA graph is being captured.

    Notes
    -----
    Old and new memory exist side by side until the move is complete. ``non_blocking`` returns before copies to a device
    end; the host tensors may change or die all the same, and work queued on the current stream finds the data complete.
    docs/transfers.md says more. **O(n)**, with a small part of torch's cost an entry.

    Examples
    --------
    >>> import torch, pdrs
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    >>> pdrs.to(model, torch.float64)[0].weight.dtype
    torch.float64
    """
    asked = _Asked()
    Module.to(asked, *args, **kwargs)
    move = recognise(asked.function)
    if move is None:
        module._apply(asked.function)  # type: ignore[no-untyped-call]
        return module
    usual, others = _walk(module)
    for other in others:
        other._apply(asked.function)  # type: ignore[no-untyped-call]
    _move(usual, move)
    return module


def pin_memory(module: Module) -> None:
    """Put the parameters, gradients and buffers of a module that lie on the CPU into page-locked memory."""
    if not torch.cuda.is_available():
        raise RuntimeError("expected a CUDA device, for which memory can be page-locked; torch finds none")
    _move(list(module.modules()), Move(lambda tensor: tensor, "pin_memory"))


class _Asked(Module):
    """Learns what torch's own methods would give to ``_apply``, errors and warnings included."""

    function: _Function

    def _apply(self, fn: _Function, recurse: bool = True) -> _Asked:
        object.__setattr__(self, "function", fn)
        return self


def _walk(module: Module) -> tuple[list[Module], list[Module]]:
    """Return the modules that ``Module._apply`` would handle itself, and those that have an ``_apply`` of their own."""
    from pdrs.parameter_dict import ParameterDict

    usual: dict[Module, None] = {}
    others: dict[Module, None] = {}
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if type(one)._apply not in (Module._apply, ParameterDict._apply):
            others[one] = None
        elif one not in usual:
            usual[one] = None
            waiting += reversed(list(one.children()))
    return list(usual), list(others)


@dataclass
class _Prepared:
    """Slabs that are filled and to which nothing refers yet, and the indices of what must be left to torch."""

    slabs: list[tuple[TensorGroup, Tensor]] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def _move(modules: list[Module], move: Move) -> None:
    """Move the parameters, gradients and buffers of some modules: all, or, if there is an error, none."""
    if _is_nothing(modules, move):
        return
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    for module in modules:
        collect_parameters(module._parameters, parameters, gradients)
    places = [(module, name) for module in modules for name, buffer in module._buffers.items() if buffer is not None]
    kept = [*parameters, *gradients] if gradients else parameters
    buffers = [module._buffers[name] for module, name in places]
    with torch.no_grad():
        of_kept = _prepare(kept, move)
        of_buffers = _prepare(buffers, move)
        if of_kept.left or of_buffers.left:
            left = {id(kept[index]) for index in of_kept.left}
            _leave_to_torch(modules, left, [places[index] for index in of_buffers.left], move)
        for group, slab in of_kept.slabs:
            group.rebind(slab, door=move.door)
        for group, slab in of_buffers.slabs:
            views = group.views(slab, detached=True, door=move.door)
            for index, view in zip(group.indices, views, strict=True):
                module, name = places[index]
                module._buffers[name] = view


def _is_nothing(modules: list[Module], move: Move) -> bool:
    """Whether everything is where it is to go already: one look at each Parameter, which stops where it can."""
    if move.anew:
        return False
    for module in modules:
        tensors = [*islice(module._parameters.values(), 1), *module._buffers.values()]
        if not all(each is None or move.keeps(each) for each in tensors):
            return False
    for module in modules:
        kinds = kinds_of_parameters(module._parameters)
        if kinds is None or not all(map(move.keeps, kinds)):
            return False
    return True


def _prepare(tensors: list[Any], move: Move) -> _Prepared:
    """Fill slabs with what the tensors will be; the tensors stay as they are."""
    prepared = _Prepared()
    if not tensors:
        return prepared
    groups, unusual = group_tensors(tensors, narrowest=move.narrowest())
    prepared.left += [index for index, _ in unusual]
    for group in groups:
        if _is_there(group, tensors, move):
            continue
        slab = _moved(group, tensors, move)
        if slab is None:
            prepared.left += group.indices.tolist()
        else:
            prepared.slabs.append((group, slab))
    return prepared


def _moved(group: TensorGroup, tensors: list[Tensor], move: Move) -> Tensor | None:
    """Return a filled slab for a group, or None if torch must move its tensors one by one."""
    dtype, device = move.target(group.dtype, group.device)
    if dtype != group.dtype and not (dtype.is_floating_point or dtype.is_complex):
        return None  # torch refuses most such conversions, in its own words.
    match move.method, group.device.type, device.type:
        case "to_empty", _, "cpu" | "cuda":
            return _allocate(group, dtype, device)
        case method, "cpu", "cpu":
            slab = pinned_empty(group.length, dtype) if method == "pin_memory" else _allocate(group, dtype, device)
            if method == "share_memory":
                slab.share_memory_()  # type: ignore[no-untyped-call]
            _convert(group, slab)
            return slab
        case _, "cpu", "cuda":
            _staging.refuse_capture()
            slab = _allocate(group, dtype, device)
            _staging.upload(group, slab, wait=not move.non_blocking)
            return slab
        case _, "cuda", "cpu":
            _staging.refuse_capture()
            return _downloaded(group, tensors, dtype, move)
        case _, "cuda", "cuda":
            source = group.slab()
            return None if source is None else source.to(device, dtype, move.non_blocking)
    return None


def _allocate(group: TensorGroup, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
    try:
        return torch.empty(group.length, dtype=dtype, device=device, pin_memory=pinned)
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
    cpu = torch.device("cpu")
    source = group.slab()
    if source is None:
        loose = [tensors[index] for index in group.indices]
        if not all(tensor.is_contiguous() for tensor in loose):
            return None
        slab = _allocate(group, dtype, cpu)
        _staging.download_loose(loose, group.offsets.tolist(), slab)
    elif move.non_blocking and dtype == group.dtype:
        slab = _allocate(group, dtype, cpu, pinned=True)
        _staging.download_later(source, slab)
    else:
        slab = _allocate(group, dtype, cpu)
        _staging.download(group, source, slab)
    return slab


def _is_there(group: TensorGroup, tensors: list[Tensor], move: Move) -> bool:
    """Whether a group of tensors has what it is to get already."""
    if move.method == "share_memory":
        return group.device.type == "cuda" or all(tensors[index].is_shared() for index in group.indices)
    if move.method == "pin_memory":
        return group.device.type != "cpu" or all(tensors[index].is_pinned() for index in group.indices)
    return not move.anew and (group.dtype, group.device) == move.target(group.dtype, group.device)


def _leave_to_torch(modules: list[Module], left: set[int], buffers: list[tuple[Module, str]], move: Move) -> None:
    """Let torch move some Parameters and gradients (by their ids) and buffers; on an error those are put back."""
    rests: list[tuple[Module, Module]] = []
    for module in modules:
        rest = Module()
        # Past `Module.__setattr__`: an entry may be called "_buffers".
        parameters = {name: each for name, each in module._parameters.items() if id(each) in left}
        own_buffers = {name: module._buffers[name] for owner, name in buffers if owner is module}
        rest.__dict__.update(_parameters=parameters, _buffers=own_buffers)
        if parameters or own_buffers:
            rests.append((module, rest))
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        for _, rest in rests:
            for parameter in rest.__dict__["_parameters"].values():
                if parameter is not None:
                    undo += [(each, each.data) for each in (parameter, parameter.grad) if each is not None]
            rest._apply(move.function)  # type: ignore[no-untyped-call]
        for gradient in _gradients(modules, left):
            undo.append((gradient, gradient.data))
            gradient.data = move.function(gradient)
    except BaseException:
        for tensor, data in undo:
            tensor.data = data
        raise
    for module, rest in rests:
        module._parameters.update(rest.__dict__["_parameters"])
        module._buffers.update(rest.__dict__["_buffers"])


def _gradients(modules: list[Module], among: set[int]) -> Iterator[Tensor]:
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter.grad) in among:
                yield parameter.grad  # type: ignore[misc]  # the id of None is not among them
