"""What a module that is loaded needs beside names and values: memory for what is on the meta device, and its ties.

A module is made on the meta device so that nobody initialises, and nobody has room for, values that a file is about to
give. torch copies nothing there, with a warning for each name. Here such tensors get memory first, and lose it again
if the file had nothing for them, so that nobody takes for values what nobody has written.

A parameter that stands in a module under several names is written once by many tools. The other names are not missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter, ParameterDict
from torch.nn.parameter import is_lazy

from pdrs._files.checkpoint_file import EXTRA_STATE
from pdrs._rows.names_codec import byte_view
from pdrs._rows.store import adopt
from pdrs.stacked import StackedParameterDict

__all__ = ["add_tied", "with_memory"]

# How many names a warning lists.
_LISTED = 5


class _Slot(NamedTuple):
    """Where a module keeps a parameter or a buffer."""

    module: Module
    held: dict[str, Any]
    name: str
    key: str

    def set(self, value: Tensor) -> None:
        """Put another in its place, as who assigns to the attribute does: an RNN keeps a list of its parameters."""
        if not isinstance(self.module, (ParameterDict, StackedParameterDict)):
            setattr(self.module, self.name, value)
        # There, names may be those of methods.
        self.held[self.name] = value


class _Made(NamedTuple):
    """A tensor that has got memory, full of zeros, and the one on the meta device in whose place it is."""

    slot: _Slot
    before: Tensor
    now: Tensor
    version: int

    def is_written(self) -> bool:
        """Whether somebody has given it values: torch counts what is written, but not what goes past it by `.data`."""
        if is_lazy(self.now):
            return False
        if self.now._version > self.version or self.now.numel() == 0:
            return True
        return bool(byte_view(self.now.detach().contiguous()).any())


def _slots(module: Module) -> Iterator[_Slot]:
    """Yield where a module and those in it keep parameters and buffers, each module once."""
    for prefix, one in module.named_modules():
        for held in (one._parameters, one._buffers):
            # What torch.jit has compiled keeps them elsewhere.
            if isinstance(held, dict) and _some_on_meta(held):
                start = prefix + "." if prefix else ""
                yield from [_Slot(one, held, name, start + name) for name, value in held.items() if _on_meta(value)]


def _some_on_meta(held: dict[str, Any]) -> bool:
    """Look for a tensor on the meta device among a million, say, twice as fast if none is None."""
    with suppress(AttributeError):
        return True in map(attrgetter("is_meta"), held.values())
    return any(map(_on_meta, held.values()))


def _on_meta(value: Any) -> bool:
    return value is not None and value.is_meta


def _can_be_made(value: Tensor) -> bool:
    """Whether a tensor on the meta device is an ordinary one, or one without a shape yet, and is not sharded, say."""
    return is_lazy(value) or type(value) is Tensor or (isinstance(value, Parameter) and type(value.data) is Tensor)


def _like(value: Tensor, device: torch.device) -> Tensor:
    """Return what a tensor on the meta device is, full of zeros elsewhere."""
    if is_lazy(value):  # a file gives it its shape
        options = {"requires_grad": value.requires_grad} if isinstance(value, Parameter) else {}
        class_: Any = type(value)
        empty: Tensor = class_(device=device, dtype=value.dtype, **options)
        return empty
    with torch.inference_mode(False), torch.no_grad():
        data = torch.zeros_like(value.data, device=device)
        if not isinstance(value, Parameter):
            data.__dict__.update(value.__dict__)
            return data
        made: Tensor = torch.Tensor._make_subclass(type(value), data, value.requires_grad)
    made.__dict__.update(value.__dict__)
    return made


@contextmanager
def with_memory(module: Module, device: torch.device | None) -> Iterator[list[str]]:
    """Give memory to what a module has on the meta device, while it is loaded, and take it from what gets no values.

    Parameters
    ----------
    module
        The module. What is in several places is one tensor in all of them afterwards, too.
    device
        Where the memory is; by default where the rest of the module lies, or on the CPU.

    Yields
    ------
    list
        To be filled with the names that are known to be missing. Of others without values a warning tells.
    """
    with ExitStack() as end:
        if torch.get_default_device().type == "meta":
            # What is made on the way is to be loaded, too.
            end.enter_context(torch.device("cpu"))
        places = list(_slots(module))
        if not places:
            yield []
            return
        target = _place_of(module) if device is None else device
        new: dict[int, Tensor] = {}
        made: list[_Made] = []
        missing: list[str] = []
        try:
            for slot in places:
                before = slot.held[slot.name]
                if _can_be_made(before):
                    if id(before) not in new:
                        new[id(before)] = _like(before, target)
                    made.append(_Made(slot, before, new[id(before)], new[id(before)]._version))
            for one in made:
                one.slot.set(one.now)
            _adopt(made)
            yield missing
        except BaseException:
            _put_back(made)
            raise
        _put_back([one for one in made if not one.is_written()])
        left = [slot.key for slot in _slots(module) if slot.key not in missing]
        if left:
            listed = ", ".join(map(repr, left[:_LISTED])) + (", ..." if len(left) > _LISTED else "")
            warnings.warn(
                f"{len(left)} parameters or buffers are on the meta device after loading, as the checkpoint has no "
                f"values for them: {listed}. Give them memory and values, by to_empty() and an initialisation",
                stacklevel=4,
            )


def _place_of(module: Module) -> torch.device:
    devices = {one.device for one in chain(module.parameters(), module.buffers()) if not one.is_meta}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _put_back(made: list[_Made]) -> None:
    there = [one for one in made if one.slot.held.get(one.slot.name) is one.now]
    for one in there:
        one.slot.set(one.before)
    _adopt(there)


def _adopt(made: Iterable[_Made]) -> None:
    for sd in {one.slot.module for one in made if isinstance(one.slot.module, StackedParameterDict)}:
        assert isinstance(sd, StackedParameterDict)
        adopt(sd)


# -- names of one parameter --------------------------------------------------------------------------------------------


def add_tied(state: dict[str, Tensor], modules: Mapping[str, Module], given: Iterable[str]) -> None:
    """Add to a state dict the names that it lacks of parameters and buffers that it has under other names.

    Parameters
    ----------
    state
        By names in the module.
    modules
        All modules by their prefixes, those that are in several places at each.
    given
        The prefixes of those whose entries come from elsewhere.
    """
    own = {prefix: one for prefix, one in modules.items() if prefix not in set(given)}
    missing = {key: what for prefix, one in own.items() for key, what in _kept(prefix, one) if key not in state}
    if not missing:
        return
    wanted = {_identity(what) for what in missing.values()}
    found: dict[Any, str] = {}
    for prefix, one in own.items():
        for key, what in _kept(prefix, one):
            if key in state and _identity(what) in wanted:
                found.setdefault(_identity(what), key)
    for key, what in missing.items():
        if _identity(what) in found:
            state[key] = state[found[_identity(what)]]
    # Its entries have names of their own.
    first: dict[int, str] = {}
    for prefix, one in own.items():
        if isinstance(one, StackedParameterDict) and first.setdefault(id(one), prefix) != prefix:
            _add_names(state, one, first[id(one)], prefix)


def _add_names(state: dict[str, Tensor], sd: StackedParameterDict, first: str, second: str) -> None:
    for one, other in ((first, second), (second, first)):
        if one + EXTRA_STATE not in state and not any(other + name in state for name in sd):
            state.update({other + name: state[one + name] for name in sd if one + name in state})


def _kept(prefix: str, module: Module) -> Iterator[tuple[str, Any]]:
    """Yield the names that a module has in a state dict, without those of the modules in it, and what is there."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    if type(module).get_extra_state is not Module.get_extra_state:
        yield prefix + EXTRA_STATE, module


def _identity(what: Any) -> Any:
    """Return what two names of one tensor have in common: the tensor, or all of its memory."""
    if isinstance(what, Tensor) and not what.is_meta and not is_lazy(what) and what.numel():
        # Not every kind of tensor has an address.
        with suppress(RuntimeError, NotImplementedError):
            return what.device, what.data_ptr(), what.shape, what.stride(), what.dtype
    return id(what)
