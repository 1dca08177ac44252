"""Fills a module from a checkpoint: tables at once if names and shapes match, everything else by the state dict.

A million names make a state dict of a million tensors. So ParameterDicts are filled from tables, and so are
StackedParameterDicts whose names and shapes are those of the file. Modules with hooks or methods that may change a
state dict get one with a tensor for each name.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import _IncompatibleKeys

from pdrs._entries.checkpointing import NamedSource, changes_what_is_loaded, giving, prefixes_where
from pdrs._files.checkpoint_file import EXTRA_STATE, CheckpointFile
from pdrs._files.into_modules import add_tied
from pdrs._files.open_dictionary import continues
from pdrs._files.saved_dictionary import PackedDictionary, PlainTensors, SavedDictionary
from pdrs._files.torch_file import VERSIONS
from pdrs._rows.insert import partition
from pdrs._rows.names_codec import TableHeader
from pdrs._rows.state_dict import note_load
from pdrs._rows.write import write_rows
from pdrs._torch.modes import is_intercepted
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict

__all__ = ["IncompatibleKeys", "load_module"]


class IncompatibleKeys(Protocol):
    """What loading returns: the NamedTuple of ``load_state_dict``, whose fields torch gives no types."""

    @property
    def missing_keys(self) -> list[str]:
        """Names that the module has and the file has not."""

    @property
    def unexpected_keys(self) -> list[str]:
        """Names that the file has and the module has not."""


def load_module(module: Module, checkpoint: CheckpointFile, strict: bool) -> IncompatibleKeys:
    """Load a checkpoint into a module, all of which has memory. Return what ``load_state_dict`` returns."""
    if isinstance(module, StackedParameterDict) and _load_rows(module, checkpoint):
        return _IncompatibleKeys([], [])
    state, given = _state_for(module, checkpoint)
    with giving(given):
        if given and isinstance(module, ParameterDict):
            # Its own method has a shortcut for state dicts that fit as they are.
            loaded: IncompatibleKeys = Module.load_state_dict(module, state, strict)
        else:
            loaded = module.load_state_dict(state, strict)
        return loaded


def _is_watched(sd: StackedParameterDict) -> bool:
    """Return whether hooks, subclasses or modes must see how a dictionary is loaded, or it has other state."""
    others = sd._modules or sd._buffers or sd._load_state_dict_post_hooks or len(sd._parameters) != len(sd._tables)
    return bool(others) or changes_what_is_loaded(sd) or is_intercepted()


class _Match(NamedTuple):
    """A table of a dictionary, the table of a file that has values for it, and the rows of the same names in both."""

    own: Tensor
    own_rows: NDArray[np.int64]
    saved: Tensor
    saved_rows: NDArray[np.int64]
    header: TableHeader


def _matches(sd: StackedParameterDict, saved: SavedDictionary) -> list[_Match] | None:
    """Return which tables have values for which; None unless both dictionaries have the same names and shapes."""
    if not 0 < len(sd) == len(saved.index):
        return None
    own, theirs = sd._index.places(saved.index.names()), saved.index.places()
    if not own.is_complete():
        return None
    tables, own_rows, saved_rows = list(sd.tables().values()), own.rows, theirs.rows
    found = []
    for (number, of_file), there in partition([own.tables, theirs.tables]):
        rows, header = saved.table(int(of_file)), saved.header.tables[of_file]
        if tables[number].shape[1:] != rows.shape[1:]:
            return None
        found.append(_Match(tables[number], own_rows[there], rows, saved_rows[there], header))
    return found


def _load_rows(sd: StackedParameterDict, checkpoint: CheckpointFile) -> bool:
    """Copy rows of a checkpoint without dictionaries, if names and shapes match; return whether it was done."""
    if checkpoint.prefixes() or continues(checkpoint) or _is_watched(sd):
        return False
    saved = PlainTensors.stacked(checkpoint, "", loads=False)
    with sd._lock:
        found = _matches(sd, saved)
        if found is None:
            return False
        for one in found:
            if type(one.own) is not Parameter or type(one.own.data) is not Tensor or one.own.is_meta:
                return False
        for one in found:
            is_whole = len(one.saved_rows) == len(one.saved) and bool((np.diff(one.saved_rows) == 1).all())
            values = one.saved if is_whole else one.saved[torch.from_numpy(one.saved_rows)]
            write_rows(one.own, one.own_rows, values)
        note_load(sd)
    return True


def _takes_tables(sd: StackedParameterDict, saved: PackedDictionary, sees_names: bool) -> bool:
    """Return whether a dictionary takes over the tables of a file, or else loads its entries by name.

    What a StackedParameterDict saved is taken over. What a ParameterDict saved is loaded by name, as from its state
    dict. It is taken over only if that is the same: each name has the dtype, shape and flag that it has in the file.
    """
    if not len(sd) or saved.checkpoint.dictionaries.get(saved.prefix) != "ParameterDict":
        return True
    found = None if sees_names else _matches(sd, saved)
    return found is not None and all(
        one.own.dtype == one.saved.dtype and one.own.requires_grad == one.header.trainable for one in found
    )


def _state_for(module: Module, checkpoint: CheckpointFile) -> tuple[dict[str, Tensor], dict[str, NamedSource]]:
    """Return a state dict for a module, and what its ParameterDicts load their entries from, by their prefixes."""
    modules = {name + "." if name else "": one for name, one in module.named_modules(remove_duplicate=False)}
    state: dict[str, Tensor] = OrderedDict()
    if checkpoint.versions:
        setattr(state, VERSIONS, checkpoint.versions)
    given: dict[str, NamedSource] = {}
    members: set[str] = set()
    watched = prefixes_where(module, changes_what_is_loaded)
    for prefix in checkpoint.prefixes():
        saved = PackedDictionary(checkpoint, prefix)
        target = modules.get(prefix)
        members |= saved.members()
        sees_names = any(map(prefix.startswith, watched))
        # Names and tables must agree before anything is changed.
        tables = {prefix + one.attribute: saved.table(number) for number, one in enumerate(saved.header.tables)}
        if isinstance(target, ParameterDict) and not (sees_names and len(target)):
            given[prefix] = saved
        elif isinstance(target, StackedParameterDict) and _takes_tables(target, saved, sees_names):
            state.update(tables)
            state[prefix + EXTRA_STATE] = checkpoint.tensor(prefix + EXTRA_STATE)
        else:
            state.update(saved.state(prefix))
    state.update(checkpoint.tensors([name for name in checkpoint.names if name not in members]))
    empty = [
        prefix
        for prefix, one in modules.items()
        if isinstance(one, ParameterDict) and not one._parameters and prefix not in given
    ]
    given.update(_taken_over(modules, [one for one in empty if not any(map(one.startswith, watched))], state))
    add_tied(state, modules, given)
    return state, given


class _NamedTensors:
    """Tensors by name, which an empty ParameterDict takes over."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def load_into(self, module: ParameterDict, *_: object) -> None:
        """Make entries of copies."""
        values = [Parameter(one.clone(), one.is_floating_point() or one.is_complex()) for one in self.tensors.values()]
        module._insert(list(self.tensors), values)


def _taken_over(modules: dict[str, Module], empty: list[str], state: dict[str, Tensor]) -> dict[str, _NamedTensors]:
    """Move from a state dict what empty ParameterDicts take over; they are given, and returned, by their prefixes."""
    found = {prefix: _NamedTensors() for prefix in empty}
    for key in list(state) if found else ():
        ends = [0, *(at + 1 for at, character in enumerate(key) if character == ".")]
        # The innermost module whose prefix it has. Names in a ParameterDict may have dots, as names of modules do.
        prefix = next((key[:end] for end in reversed(ends) if key[:end] in modules), None)
        if prefix not in found:
            continue
        name, module = key[len(prefix) :], modules[prefix]
        if name not in module._buffers and name not in module._modules:
            found[prefix].tensors[name] = state.pop(key)
    return {prefix: one for prefix, one in found.items() if one.tensors}
