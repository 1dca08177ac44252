"""Finds the tensors of a module that an archive holds: tables, packed names, and everything else in the state dict.

The entries of a ParameterDict become the rows of tables. They are gathered while they are written, so saving needs
memory for one block only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter

from pdrs._core import Places, RowIndex, sort_tensors
from pdrs._entries.checkpointing import collecting
from pdrs._files.checkpoint_file import EXTRA_STATE
from pdrs._files.safetensors_write import (
    MOST_EXPANDED,
    Blocks,
    NewTensor,
    blocks_of,
    on_host,
    refuse_dtype,
    refuse_expanded,
    refuse_unusual,
)
from pdrs._rows.names_codec import (
    MOST_TIMES,
    Header,
    TableHeader,
    add_words,
    is_packed,
    pack,
    size_with_words,
    unpack,
    used_rows,
)
from pdrs._rows.table import Kind
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict

__all__ = ["Collected", "collect", "sort_alike", "sort_by_kind", "without_none"]

# Entries are gathered so many at a time, and so many bytes: what was gathered is still in the cache when it is written.
_CHUNK, _CHUNK_BYTES = 1 << 13, 2 << 20
# So many bytes of names are written at a time.
_LARGEST_BLOCK = 64 << 20
# Larger entries are written without a copy.
_LARGE = 1 << 18

Sorted = tuple[NDArray[np.int64], list[int]]
"""What `sort_tensors` says of many values: the class of each, and the first of each class."""


@dataclass
class Collected:
    """The contents of an archive, in order.

    Parameters
    ----------
    tensors
        All tensors.
    dictionaries
        The class of each dictionary, by its prefix.
    capacities
        The number of rows of tables whose unused rows are not written.
    """

    tensors: list[NewTensor] = field(default_factory=list)
    dictionaries: dict[str, str] = field(default_factory=dict)
    capacities: dict[str, int] = field(default_factory=dict)


def collect(obj: Module, before: Callable[[str], Tensor | None] = lambda _: None) -> Collected:
    """Return the contents of an archive of a module.

    ``before`` gives the packed names of the ParameterDict at a prefix when it was saved before, or None. Entries keep
    the rows that they had then.
    """
    if not isinstance(obj, Module):
        raise TypeError(f"expected a torch.nn.Module, such as a ParameterDict, got {type(obj).__name__}")
    with collecting(obj) as collected, torch.no_grad():
        state = obj.state_dict()
    found = Collected()
    for prefix, module in collected:
        found.dictionaries[prefix] = "ParameterDict"
        found.tensors += _of_parameter_dict(module, prefix, state, before(prefix))
    used: dict[str, int] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and name.endswith(EXTRA_STATE) and is_packed(value):
            prefix = name.removesuffix(EXTRA_STATE)
            found.dictionaries[prefix] = "StackedParameterDict"
            used |= {prefix + attribute: rows for attribute, rows in used_rows(value).items()}
    # Those that hooks have put into the state dict by name have tensors like any other module.
    packed = {prefix: one for prefix, one in _dictionaries(obj, collected).items() if prefix in found.dictionaries}
    _refuse_shared_names(packed, [name for name in state if name not in used])
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"'{name}' of the state dict is of type {type(value).__name__}, and an archive holds tensors: save the "
                "module with torch.save"
            )
        refuse_unusual(name, value)
        refuse_expanded(name, value)
        if name in used and value.dim():
            # Rows at the end that were never used are zero. A reader refuses tables that are much larger than the file.
            rows = max(used[name], -(-len(value) // MOST_TIMES))
            if rows < len(value):
                found.capacities[name] = len(value)
                value = value[:rows]
        is_names = name.endswith(EXTRA_STATE) and name.removesuffix(EXTRA_STATE) in found.dictionaries
        found.tensors.append(_searchable(name, value) if is_names else NewTensor.of(name, value))
    return found


def _dictionaries(
    obj: Module, collected: list[tuple[str, ParameterDict]]
) -> dict[str, ParameterDict | StackedParameterDict]:
    """Return the dictionaries of a module by their prefixes."""
    found: dict[str, ParameterDict | StackedParameterDict] = dict(collected)
    for name, module in obj.named_modules(remove_duplicate=False):
        if isinstance(module, StackedParameterDict):
            found[name + "." if name else ""] = module
    return found


def _refuse_shared_names(dictionaries: dict[str, ParameterDict | StackedParameterDict], others: list[str]) -> None:
    """Refuse a tensor, or an entry of an inner dictionary, that has the name of an entry: ValueError."""
    for name in [*others, *dictionaries]:
        for at in [0, *(at + 1 for at, character in enumerate(name) if character == ".")]:
            prefix, rest = name[:at], name[at:]
            if prefix not in dictionaries or rest in ("", EXTRA_STATE):
                continue
            outer, inner = dictionaries[prefix], dictionaries.get(name)
            if inner is None:
                shared = rest if rest in outer else None
            else:
                there = outer.keys(prefix=rest) if isinstance(outer, StackedParameterDict) else outer.keys()
                shared = next((one for one in there if one.startswith(rest) and one[len(rest) :] in inner), None)
            if shared is not None:
                raise ValueError(
                    f"expected one tensor of each name, got an entry {shared!r} of the dictionary at {prefix!r}, and "
                    "another tensor of that name beside it: rename one of them"
                )


def _searchable(name: str, packed: Tensor) -> NewTensor:
    """Return packed names with a table of words, which is made when it is written."""

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for piece in add_words(packed):
            for start in range(0, len(piece), _LARGEST_BLOCK):
                yield piece[start : start + _LARGEST_BLOCK]

    return NewTensor(name, torch.uint8, (size_with_words(packed),), blocks)


def _of_parameter_dict(
    module: ParameterDict, prefix: str, state: dict[str, Any], before: Tensor | None
) -> Iterator[NewTensor]:
    """Yield the tables of a ParameterDict as they would be stacked, and its packed names."""
    parameters, values, found = without_none(module._parameters.copy())  # names and values at one time
    names = list(parameters)
    old_tables = old_rows = np.empty(0, np.int64)
    numbers: dict[str, int] = {}
    if before is not None and len(values):
        packed, old = unpack(before)
        held = RowIndex.of_ids(packed, [table.used for table in old.tables]).places(names)
        old_tables, old_rows = held.tables, held.rows
        numbers = {table.attribute: number for number, table in enumerate(old.tables)}
    tables_of, rows_of = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
    tables: list[TableHeader] = []
    taken = set(state)
    kinds = sort_by_kind(values, lambda at: refuse_unusual(prefix + names[at], values[at]), found)
    for number, (kind, (there, is_alike)) in enumerate(kinds.items()):
        refuse_dtype(prefix + names[there[0]], kind.dtype)
        chosen = [values[at] for at in there.tolist()] if len(there) != len(values) else values
        if chosen[0].nbytes > MOST_EXPANDED:
            for at in there.tolist():
                refuse_expanded(prefix + names[at], values[at])
        attribute = _free(kind.attribute(), prefix, taken)
        rows, used = np.arange(len(there)), len(there)
        if attribute in numbers:
            was = numbers[attribute]
            rows = _keep_rows(np.where(old_tables[there] == was, old_rows[there], -1), old.tables[was].used)
            used = int(rows.max()) + 1
        if used > len(there) or (np.diff(rows) != 1).any():
            ordered: list[Tensor] = [torch.zeros(kind.shape, dtype=kind.dtype)] * used
            for row, value in zip(rows.tolist(), chosen, strict=True):
                ordered[row] = value
            chosen, is_alike = ordered, is_alike and chosen[-1].device.type == "cpu"
        tables_of[there], rows_of[there] = number, rows
        tables.append(TableHeader(attribute, 0, kind.trainable, used))
        yield NewTensor(prefix + attribute, kind.dtype, (used, *kind.shape), _stacked(chosen, is_alike))
    yield _searchable(prefix + EXTRA_STATE, pack(names, Header(tuple(tables)), Places.of(tables_of, rows_of)))


def _free(name: str, prefix: str, taken: set[str]) -> str:
    """Return a name, with a number if it is taken, and add it to those that are."""
    numbered, turn = name, 1
    while prefix + numbered in taken:
        turn += 1
        numbered = f"{name}_{turn}"
    taken.add(prefix + numbered)
    return numbered


def _keep_rows(rows: NDArray[np.int64], used: int) -> NDArray[np.int64]:
    """Give entries without a row, which have -1, rows of a table that are free, and then the next."""
    free = np.ones(used, bool)
    free[rows[rows >= 0]] = False
    new = np.flatnonzero(rows < 0)
    given = np.flatnonzero(free)[: len(new)]
    rows[new] = np.concatenate([given, np.arange(used, used + len(new) - len(given))])
    return rows


# -- tensors that are alike --------------------------------------------------------------------------------------------


def without_none(parameters: dict[str, Any]) -> tuple[dict[str, Any], list[Any], Sorted]:
    """Return Parameters by name and in a list, without those that are None, and what `sort_tensors` says of them."""
    values = list(parameters.values())
    found = sort_tensors(values)
    if any(values[at] is None for at in np.flatnonzero(found[0] < 0).tolist()):
        parameters = {name: value for name, value in parameters.items() if value is not None}
        values = list(parameters.values())
        found = sort_tensors(values)
    return parameters, values, found


def sort_alike(
    values: list[Any], refuse: Callable[[int], None] = lambda _: None, found: Sorted | None = None
) -> list[tuple[Kind, NDArray[np.int64]]]:
    """Return the positions of tensors of one dtype, shape, device and ``requires_grad``, and their kind. **O(n)**.

    ``refuse`` is called with the position of everything that is not a plain tensor with memory. It may raise. ``found``
    is what `sort_tensors` says of the values, if that is known.
    """
    classes, firsts = sort_tensors(values) if found is None else found
    others: dict[Any, int] = {}
    for at in np.flatnonzero(classes < 0).tolist():
        refuse(at)
        alike = _kind_of(values[at]), values[at].device
        if alike not in others:
            others[alike] = len(firsts)
            firsts.append(at)
        classes[at] = others[alike]
    if len(firsts) < 2:
        return [(_kind_of(values[at]), np.arange(len(values))) for at in firsts]
    ends = np.cumsum(np.bincount(classes, minlength=len(firsts)))[:-1]
    groups = np.split(np.argsort(classes, kind="stable"), ends)
    return [(_kind_of(values[at]), there) for at, there in zip(firsts, groups, strict=True)]


def _kind_of(value: Tensor) -> Kind:
    return Kind(tuple(value.shape), value.dtype, isinstance(value, Parameter) and value.requires_grad)


def sort_by_kind(
    values: list[Any], refuse: Callable[[int], None] = lambda _: None, found: Sorted | None = None
) -> dict[Kind, tuple[NDArray[np.int64], bool]]:
    """Return the positions of the tensors of each kind, and whether all of them are on one device; see `sort_alike`."""
    kinds: dict[Kind, list[NDArray[np.int64]]] = {}
    for kind, there in sort_alike(values, refuse, found):
        kinds.setdefault(kind, []).append(there)
    return {kind: (np.sort(np.concatenate(groups)), len(groups) == 1) for kind, groups in kinds.items()}


def _stacked(values: list[Tensor], is_alike: bool) -> Blocks:
    """Return what yields the bytes of tensors of one dtype and shape, one tensor after another."""
    size = values[0].nbytes if values else 0
    count = max(1, min(_CHUNK, _CHUNK_BYTES // max(1, size)))

    def blocks() -> Iterator[NDArray[np.uint8]]:
        if size >= _LARGE or not is_alike:
            for value in values:
                yield from blocks_of(value)
            return
        for start in range(0, len(values), count):
            yield from blocks_of(on_host(values[start : start + count]))

    return blocks
