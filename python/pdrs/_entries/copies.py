"""How ``pdrs.ParameterDict`` is copied deeply and pickled: small values as one block, not as a million small tensors.

Everything else goes the way that it goes in torch's class, by ``__reduce_ex__``. A deep copy finds the copies of the
Parameters in its memo, where they have been entered before the rest is copied. A pickle has each Parameter as an object
of its own. So it stays one object, however often the pickled objects refer to it. But only a number is written for it:
its place in a list that is made of the block as a whole.
"""

from __future__ import annotations

import copy
import copyreg
import operator
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.nn import ModuleDict, Parameter

from pdrs._core import (
    TensorGroup,
    group_tensors,
    not_copied_yet,
    place_copies,
)
from pdrs._entries.load_state import LARGEST
from pdrs._pickle import entry, new_dict, unpack
from pdrs._torch.modes import is_intercepted

if TYPE_CHECKING:
    from pdrs.parameter_dict import ParameterDict

_Reduced = tuple[Any, ...]


def reduce(reduced: Any, parameters: dict[str, Any]) -> Any:
    """Give what ``__reduce_ex__`` gave, but for the Parameters: they go as blocks, if they are pickled."""
    state = _state_of(reduced)
    if state is None or state.get("_parameters") is not parameters or type(parameters) is not dict:
        return reduced
    return (*reduced[:2], {**state, "_parameters": _Packed(parameters)}, *reduced[3:])


def shallow_copy(module: ParameterDict) -> Any:
    """Do what ``copy.copy`` does with torch's class."""
    return copy.copy(_Unpickled(_unpacked(module.__reduce_ex__(4))[0]))


def deep_copy(module: ParameterDict, memo: dict[int, Any]) -> Any:
    """Do what ``copy.deepcopy`` does with torch's class."""
    parameters: dict[str, Any] | None = module._parameters if type(module._parameters) is dict else None
    if isinstance(module._modules.get("parametrizations"), ModuleDict):
        # torch lets a parametrized module be copied, but not be pickled, and so not be reduced; nor one that would be
        # parametrized, had that not failed.
        reduced: _Reduced = (object.__new__, (type(module),), module.__dict__)
    else:
        reduced, parameters = _unpacked(module.__reduce_ex__(4))
    state = _state_of(reduced)
    is_usual = state is not None and type(parameters) is dict and state.get("_parameters") is parameters
    if state is None or not is_usual or id(parameters) in memo:
        return deep_copy_reduced(module, reduced, memo, parameters)
    # At one time, whatever another thread does: Python lets no other thread run between the two.
    keys, copied = map(operator.methodcaller("copy"), (state["_keys"], parameters))
    memo[id(keys)] = keys  # which is a copy already
    memo.setdefault(id(memo), []).append(keys)
    reduced = (*reduced[:2], {**state, "_keys": keys, "_parameters": copied}, *reduced[3:])
    made = deep_copy_reduced(module, reduced, memo, copied)
    memo[id(parameters)] = made._parameters
    return made


def deep_copy_reduced(
    module: Any, reduced: _Reduced, memo: dict[int, Any], parameters: dict[str, Any] | None = None
) -> Any:
    """Make the deep copy of what ``__reduce_ex__`` gave for a module, some of whose Parameters are copied as blocks."""
    make = reduced[0]

    def make_and_copy_parameters(*arguments: Any) -> Any:
        # Before anything is copied that may refer to the module.
        memo[id(module)] = made = make(*arguments)
        if parameters is not None and id(parameters) not in memo:
            _copy_parameters(parameters, memo)
        return made

    stand_in = _Unpickled((make_and_copy_parameters, *reduced[1:]))
    try:
        return copy.deepcopy(stand_in, memo)
    finally:
        # The memo keeps it, and the function keeps the memo: without this, all would stay until a garbage collection.
        del stand_in._reduced


class _Unpickled:
    """Something that the module ``copy`` makes a copy of by what ``__reduce_ex__`` of something else gave."""

    def __init__(self, reduced: _Reduced) -> None:
        self._reduced = reduced

    def __reduce_ex__(self, protocol: SupportsIndex) -> _Reduced:
        return self._reduced


class _Packed:
    """A dict of Parameters in the state of a module that may be on its way to a pickle, where it becomes a dict."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters

    def __reduce_ex__(self, protocol: SupportsIndex) -> _Reduced:
        return new_dict, (), None, None, _pickled_items(self.parameters)


def attributes_of(thing: Any) -> dict[str, Any]:
    """Return what an object of a Python subclass of a native class has beside what the native class knows."""
    slots = {name: getattr(thing, name) for name in copyreg._slotnames(type(thing)) if hasattr(thing, name)}  # type: ignore[attr-defined]  # as `object.__getstate__` finds them
    return {**getattr(thing, "__dict__", {}), **slots}


def set_attributes(thing: Any, attributes: dict[str, Any]) -> None:
    """Set what :func:`attributes_of` returned."""
    for name, value in attributes.items():
        object.__setattr__(thing, name, value)


def _state_of(reduced: Any) -> dict[str, Any] | None:
    if type(reduced) is tuple and len(reduced) > 2 and type(reduced[2]) is dict:
        return reduced[2]
    return None


def _unpacked(reduced: Any) -> tuple[_Reduced, dict[str, Any] | None]:
    """Give what :func:`reduce` was given, and the Parameters, if they are in it."""
    state = _state_of(reduced)
    if state is None or type(state.get("_parameters")) is not _Packed:
        return reduced, None
    parameters = state["_parameters"].parameters
    return (*reduced[:2], {**state, "_parameters": parameters}, *reduced[3:]), parameters


# -- deep copies -------------------------------------------------------------------------------------------------------


def _copy_parameters(parameters: dict[str, Any], memo: dict[int, Any]) -> None:
    # The keys and their order; the values are replaced.
    copied = parameters.copy()
    memo[id(parameters)] = copied
    if type(memo) is dict and not is_intercepted() and not torch.is_inference_mode_enabled():
        originals, groups = _groups_of_small(not_copied_yet(parameters, memo))
        # As `deepcopy` does, so that no `id` in the memo becomes that of something else.
        memo.setdefault(id(memo), []).append(originals)
        copies: list[Any] = [None] * len(originals)
        while groups:
            # Each goes before the memo grows: it takes as much memory.
            group = groups.pop()
            views = group.views(_gathered(group))
            if len(views) == len(copies):
                copies = views
            else:
                for at, view in zip(group.indices.tolist(), views, strict=True):
                    copies[at] = view
            del group, views
        left = place_copies(copied, parameters, originals, copies, memo)
    else:
        left = list(parameters)
    for name in left:
        copied[name] = copy.deepcopy(parameters[name], memo)


def _gathered(group: TensorGroup) -> Tensor:
    slab = torch.empty(group.length, dtype=group.dtype, device="cpu")
    group.gather(slab)
    return slab


def _groups_of_small(tensors: list[Any]) -> tuple[list[Any], list[TensorGroup]]:
    """Group the tensors on the CPU, but not those that are better copied by themselves.

    Gives the list that the groups refer to, too: the same, or, in the same order, a part.
    """
    groups = _groups_on_cpu(tensors)
    if all(group.largest <= LARGEST for group in groups):
        return tensors, groups
    grouped = sorted(at for group in groups for at in group.indices.tolist())
    small = [tensors[at] for at in grouped if tensors[at].nbytes <= LARGEST]
    return small, _groups_on_cpu(small)


def _groups_on_cpu(tensors: list[Any]) -> list[TensorGroup]:
    groups, _ = group_tensors(tensors)
    return [group for group in groups if group.device.type == "cpu"]


# -- pickles -----------------------------------------------------------------------------------------------------------


class _Block:
    """Parameters of one group on their way to a pickle, in which they become a list of Parameters over one tensor.

    What the pickle calls for it is in ``pdrs._pickle``.
    """

    def __init__(self, group: TensorGroup, parameters: list[Parameter]) -> None:
        self._group = group
        self._parameters = parameters

    def __reduce__(self) -> _Reduced:
        # The values are put together only now: a pickler may have ways of its own to pickle Parameters, as that of
        # multiprocessing has, which puts each into shared memory.
        shapes: dict[tuple[int, ...], int] = {}
        numbers = [shapes.setdefault(tuple(each.shape), len(shapes)) for each in self._parameters]
        trainable = [each.requires_grad for each in self._parameters]
        return unpack, (
            _gathered(self._group),
            self._group.offsets.astype("<i8").tobytes(),
            np.array(numbers, "<u4").tobytes(),
            list(shapes),
            np.array(trainable, "?").tobytes(),
        )


# What is being pickled: dicts of the places of Parameters, by their `id`, which threads use for themselves.
class _Running(threading.local):
    def __init__(self) -> None:
        self.places: list[dict[int, tuple[_Block, int]]] = []


_running = _Running()
_registered = 0
_registering = threading.Lock()


def _renew_lock() -> None:
    # The thread that holds it may be none of a child's.
    global _registering
    _registering = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_renew_lock)


def _reduce_parameter(parameter: Parameter) -> Any:
    """Reduce a Parameter to its place in the list that becomes of a block; any other as torch does."""
    for places in _running.places:
        place = places.pop(id(parameter), None)
        if place is not None:
            return entry, place
    # What it gives does not depend on the protocol.
    return parameter.__reduce_ex__(2)  # type: ignore[no-untyped-call]


@contextmanager
def _reducing_parameters() -> Iterator[dict[int, tuple[_Block, int]]]:
    """Have Parameters pickled by :func:`_reduce_parameter`, by picklers that have no way of their own to do it."""
    global _registered
    places: dict[int, tuple[_Block, int]] = {}
    running = _running.places
    with _registering:
        _registered += 1
        copyreg.dispatch_table.setdefault(Parameter, _reduce_parameter)
    running.append(places)
    try:
        yield places
    finally:
        # By identity; and from the list of the thread that began, whichever this is.
        running[:] = [each for each in running if each is not places]
        with _registering:
            _registered -= 1
            if not _registered and copyreg.dispatch_table.get(Parameter) is _reduce_parameter:
                del copyreg.dispatch_table[Parameter]


def _pickled_items(parameters: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all entries to a pickler, which pickles each before it takes the next, or some that follow."""
    blocks = {} if is_intercepted() else _blocks(parameters)
    with _reducing_parameters() as places:
        for name, value in list(parameters.items()):
            place = blocks.get(id(value))
            if place is not None:
                places[id(value)] = place
            yield name, value


def _blocks(parameters: dict[str, Any]) -> dict[int, tuple[_Block, int]]:
    """Put Parameters that have nothing but values into blocks. Give the places of all, by their `id`."""
    distinct = {id(value): value for value in parameters.values() if type(value) is Parameter}
    # torch pickles what users have set as attributes, and keeps strides, also those along sizes of 1.
    strides: dict[torch.Size, tuple[int, ...]] = {}
    chosen = []
    for value in distinct.values():
        if value.layout is torch.strided and not value.is_nested and not value.__dict__:
            shape = value.shape
            if shape not in strides:
                strides[shape] = torch.empty(shape, device="meta").stride()
            if value.stride() == strides[shape] and 0 not in shape:
                chosen.append(value)
    chosen, groups = _groups_of_small(chosen)
    if any(group.overlapping for group in groups):
        chosen, groups = _groups_of_small(_apart(chosen))
    places = {}
    for group in groups:
        members = [chosen[at] for at in group.indices.tolist()]
        block = _Block(group, members)
        places.update({id(member): (block, number) for number, member in enumerate(members)})
    return places


def _apart(tensors: list[Parameter]) -> list[Parameter]:
    """Leave out those that share memory, which `torch.save` keeps shared."""
    apart: list[Parameter] = []
    end, alone = 0, True
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        begins_inside = tensor.data_ptr() < end
        if begins_inside and alone:
            apart.pop()
        alone = not begins_inside
        if alone:
            apart.append(tensor)
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart
