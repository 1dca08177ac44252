"""What an archive is made of: tensors that are written block by block, wherever their bytes come from.

A *source* is a tensor to be: the table of a StackedParameterDict, which lies in memory, or the entries of a
ParameterDict, which are gathered while they are written. So saving takes no more memory than one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pdrs._core import IndexMap, Places, RowIndex, group_tensors, in_step, sort_tensors
from pdrs._entries.checkpointing import collecting
from pdrs._files.safetensors_file import BLOCK, CODES, MOST_EXPANDED, refuse_expanded
from pdrs._moves.staging import download
from pdrs._rows.names_codec import Header, TableHeader, is_packed, pack, unpack, used_rows
from pdrs._rows.table import Kind
from pdrs._rows.write import copy_in_pieces
from pdrs.parameter_dict import ParameterDict

__all__ = ["EXTRA_STATE", "SPARE", "Collected", "Source", "collect", "sorted_parameters"]

EXTRA_STATE = "_extra_state"

# How many entries are gathered at a time, at most: what was gathered is still in the cache when it is written.
_CHUNK = 1 << 13
# Larger entries are written from where they lie.
_LARGE = 1 << 18
# A table has at most so many times the rows that are written of it: more is not believed when it is read.
SPARE = 4


class Source(NamedTuple):
    """A tensor that is to be written.

    Parameters
    ----------
    name
        In the file.
    dtype, shape
        What it will be.
    of
        Where its rows come from: see :meth:`blocks`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    of: _Rows

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """Yield the elements in C order, in flat tensors on the CPU that hold whole rows, or parts of one."""
        return self.of.blocks()


class _Rows(Protocol):
    def blocks(self) -> Iterator[Tensor]:
        """Yield the elements in C order, in flat tensors on the CPU."""
        ...


@dataclass
class _Whole:
    """A tensor that is there."""

    tensor: Tensor

    def blocks(self) -> Iterator[Tensor]:
        tensor = self.tensor.detach()
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            flat = tensor.reshape(-1)
            rows = max(1, BLOCK // max(1, tensor[:1].nbytes)) if tensor.dim() else 1
            yield from torch.split(flat, max(1, rows * tensor[:1].numel() if tensor.dim() else 1))
            return
        if tensor.dim() == 0 or tensor.nbytes <= BLOCK or len(tensor) == 1:
            yield _on_host([tensor])
            return
        for part in torch.split(tensor, max(1, BLOCK * len(tensor) // tensor.nbytes)):
            yield _on_host([part])


@dataclass
class _Entries:
    """Tensors of one dtype, of one shape or (in a slab) of any, one behind another."""

    values: list[Tensor]
    # The bytes of the largest.
    largest: int
    # The elements of each, if they have one shape.
    numel: int | None

    def blocks(self) -> Iterator[Tensor]:
        if self.largest >= _LARGE:
            for value in self.values:
                yield from _Whole(value).blocks()
            return
        chunk = max(1, min(_CHUNK, (1 << 21) // max(1, self.largest)))
        for start in range(0, len(self.values), chunk):
            yield _on_host(self.values[start : start + chunk], self.numel)


def _on_host(values: list[Tensor], same: int | None = None) -> Tensor:
    """Return the elements of tensors of one dtype, one tensor behind another, flat and on the CPU.

    ``same`` is the number of elements of each, if all have as many.
    """
    numels = [value.numel() for value in values] if same is None else [same] * len(values)
    out = torch.empty(sum(numels), dtype=values[0].dtype, device="cpu")
    groups, unusual = group_tensors(values, keep_strides=False)
    starts = np.cumsum([0, *numels[:-1]])
    for group in groups:
        if group.device.type == "cpu" and len(group) == len(values) and (group.offsets == starts).all():
            # Nothing lies between them.
            group.gather(out)
            return out
        slab = torch.empty(group.length, dtype=group.dtype, device="cpu")
        if group.device.type == "cpu":
            group.gather(slab)
        else:
            together = group.slab()
            of_group = [values[index].detach().reshape(-1) for index in group.indices.tolist()]
            download(group, of_group if together is None else together, slab)
        _place(out, slab, group.indices, group.offsets, starts, numels, same)
    for index, _ in unusual:
        value = values[index].detach().cpu().resolve_conj().resolve_neg()
        out[starts[index] : starts[index] + numels[index]] = value.reshape(-1)
    return out


def _place(
    out: Tensor,
    slab: Tensor,
    indices: NDArray[np.int64],
    offsets: NDArray[np.int64],
    starts: NDArray[np.int64],
    numels: list[int],
    same: int | None,
) -> None:
    if same is not None:
        step = int(offsets[1] - offsets[0]) if len(offsets) > 1 else same
        if step >= same > 0 and (np.diff(offsets) == step).all():
            placed = slab.as_strided((len(offsets), same), (step, 1), int(offsets[0]))
        else:
            # A tensor that is listed twice has one place.
            placed = slab[torch.from_numpy(offsets)[:, None] + torch.arange(same)]
        if len(indices) * same == len(out):
            copy_in_pieces(out.view(len(indices), same), placed)
        else:
            out.view(-1, same)[torch.from_numpy(indices)] = placed
        return
    for index, offset in zip(indices.tolist(), offsets.tolist(), strict=True):
        out[starts[index] : starts[index] + numels[index]] = slab[offset : offset + numels[index]]


# -- what is to be saved -----------------------------------------------------------------------------------------------


@dataclass
class Collected:
    """What an archive of a module is to have, in order.

    Parameters
    ----------
    sources
        All tensors.
    dictionaries
        The name of the class of each dictionary, by its prefix.
    capacities
        How many rows tables have of which not all are written: those at the end are zero.
    """

    sources: list[Source]
    dictionaries: dict[str, str]
    capacities: dict[str, int]


def collect(obj: Module, before: Any = None) -> Collected:
    """Return what an archive of a module is to have.

    Parameters
    ----------
    obj
        Any module.
    before
        A function from the prefix of a ParameterDict to its packed names when it was saved before, or None. Entries
        keep the rows that they had then.
    """
    if not isinstance(obj, Module):
        raise TypeError(f"expected a torch.nn.Module, such as a ParameterDict, got {type(obj).__name__}")
    with collecting(obj) as collected, torch.no_grad():
        state = obj.state_dict()
    sources: list[Source] = []
    dictionaries: dict[str, str] = {}
    for prefix, module in collected:
        dictionaries[prefix] = "ParameterDict"
        sources += _of_parameter_dict(module, prefix, state, None if before is None else before(prefix))
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"'{name}' of the state dict is of type {type(value).__name__}, and an archive holds tensors: save the "
                "module with torch.save"
            )
        if is_packed(value) and name.endswith(EXTRA_STATE):
            dictionaries[name[: -len(EXTRA_STATE)]] = "StackedParameterDict"
        _check_plain(name, value)
        sources.append(Source(name, value.dtype, tuple(value.shape), _Whole(value)))
    capacities: dict[str, int] = {}
    for prefix, class_ in dictionaries.items():
        if class_ == "StackedParameterDict":
            sources = _without_spare_rows(prefix, sources, capacities)
    return Collected(sources, dictionaries, capacities)


def _check_plain(name: str, value: Tensor) -> None:
    is_wrapper: bool = is_traceable_wrapper_subclass(value)
    if value.layout != torch.strided or value.device.type == "meta" or is_wrapper:
        what = f"of layout {value.layout}" if value.layout != torch.strided else f"a {type(value).__name__}"
        where = " on the meta device" if value.device.type == "meta" else ""
        raise TypeError(f"'{name}' is {what}{where}, and an archive holds dense tensors with memory")
    if value.is_nested:
        raise TypeError(
            f"'{name}' is a nested tensor, and an archive holds dense tensors: save the module with torch.save"
        )
    refuse_expanded(name, value)


def _of_parameter_dict(
    module: ParameterDict, prefix: str, state: dict[str, Any], before: Tensor | None
) -> list[Source]:
    parameters, values, classes, firsts = sorted_parameters(module)
    index = module._keys if in_step(module._keys, parameters) else IndexMap.from_names(list(parameters))
    kinds, places = _sort(parameters, values, classes, firsts, prefix)
    attributes: dict[str, int] = {}
    if before is not None and len(values):
        packed_before, header = unpack(before)
        known = RowIndex.of_ids(packed_before, [table.used for table in header.tables])
        held = known.places(list(parameters))
        held_tables, held_rows = held.tables, held.rows
        attributes = {table.attribute: number for number, table in enumerate(header.tables)}
    numbers, rows_of = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
    tables: list[TableHeader] = []
    made: list[Source] = []
    taken: set[str] = set()
    for number, (kind, there) in enumerate(zip(kinds, places, strict=True)):
        if kind.dtype not in CODES:
            first = next(islice(parameters, int(there[0]), None))
            raise TypeError(f"safetensors has no dtype like {kind.dtype}, of which {prefix + first!r} is")
        attribute, turn = kind.attribute(), 1
        while prefix + attribute in state or attribute in taken:
            turn += 1
            attribute = f"{kind.attribute()}_{turn}"
        taken.add(attribute)
        if prod(kind.shape) * kind.dtype.itemsize > MOST_EXPANDED:
            names = list(parameters)
            for at in there.tolist():
                refuse_expanded(prefix + names[at], values[at])
        rows = np.arange(len(there))
        if attribute in attributes:
            at_before = attributes[attribute]
            had = np.where(held_tables[there] == at_before, held_rows[there], -1)
            rows = _keep_rows(had, header.tables[at_before].used)
        used = int(rows.max()) + 1
        chosen = [values[at] for at in there.tolist()] if len(there) != len(values) else values
        if not (len(rows) == used and (np.diff(rows) == 1).all()):
            ordered: list[Tensor] = [torch.zeros(kind.shape, dtype=kind.dtype)] * used
            for row, value in zip(rows.tolist(), chosen, strict=True):
                ordered[row] = value
            chosen = ordered
        numbers[there], rows_of[there] = number, rows
        tables.append(TableHeader(attribute, 0, kind.trainable, used))
        size = prod(kind.shape)
        of = _Entries(chosen, size * kind.dtype.itemsize, size)
        made.append(Source(prefix + attribute, kind.dtype, (used, *kind.shape), of))
    packed = pack(index, Header(tuple(tables)), Places.of(numbers, rows_of))
    return [*made, Source(prefix + EXTRA_STATE, torch.uint8, tuple(packed.shape), _Whole(packed))]


def _keep_rows(rows: NDArray[np.int64], used: int) -> NDArray[np.int64]:
    """Give entries without a row, which have -1, rows of a table that are free, and then the next."""
    free = np.ones(used, bool)
    free[rows[rows >= 0]] = False
    new = np.flatnonzero(rows < 0)
    given = np.flatnonzero(free)[: len(new)]
    rows[new] = np.concatenate([given, np.arange(used, used + len(new) - len(given))])
    return rows


def sorted_parameters(
    module: ParameterDict,
) -> tuple[dict[str, Any], list[Tensor], NDArray[np.int64], list[int]]:
    """Return the Parameters of a dictionary by name, without those that are None, and what ``sort_tensors`` says."""
    parameters: dict[str, Any] = module._parameters
    values = list(parameters.values())
    classes, firsts = sort_tensors(values)
    if any(values[at] is None for at in np.flatnonzero(classes < 0).tolist()):
        parameters = {name: value for name, value in parameters.items() if value is not None}
        values = list(parameters.values())
        classes, firsts = sort_tensors(values)
    return parameters, values, classes, firsts


def _sort(
    names: Iterable[str], values: list[Tensor], classes: NDArray[np.int64], firsts: list[int], prefix: str
) -> tuple[list[Kind], list[NDArray[np.int64]]]:
    """Return the kinds of some tensors, in the order of their first ones, and the places of those of each."""
    kinds: dict[Kind, list[int]] = {}
    for number, at in enumerate(firsts):
        kinds.setdefault(_kind_of(values[at]), []).append(number)
    odd = np.flatnonzero(classes < 0).tolist()
    listed = list(names) if odd else []
    for at in odd:
        _check_plain(prefix + listed[at], values[at])
        classes[at] = len(firsts)
        kinds.setdefault(_kind_of(values[at]), []).append(len(firsts))
        firsts.append(at)
    if len(kinds) < 2:
        return list(kinds), [np.arange(len(values)) for _ in kinds]
    renamed = np.empty(len(firsts), np.int64)
    for number, of_kind in enumerate(kinds.values()):
        renamed[of_kind] = number
    which = renamed[classes] if len(values) else classes
    order = np.argsort(which, kind="stable")
    return list(kinds), np.split(order, np.cumsum(np.bincount(which, minlength=len(kinds)))[:-1])


def _kind_of(value: Tensor) -> Kind:
    return Kind(tuple(value.shape), value.dtype, isinstance(value, Parameter) and value.requires_grad)


def _without_spare_rows(prefix: str, sources: list[Source], capacities: dict[str, int]) -> list[Source]:
    """Leave out the rows at the end of tables that were never given, and note how many rows there are with them."""
    names = next(source for source in sources if source.name == prefix + EXTRA_STATE)
    assert isinstance(names.of, _Whole)
    used = {prefix + attribute: rows for attribute, rows in used_rows(names.of.tensor).items()}
    made = []
    for source in sources:
        capacity = source.shape[0] if source.shape else 0
        rows = max(used.get(source.name, capacity), -(-capacity // SPARE))
        if rows < capacity and isinstance(source.of, _Whole):
            capacities[source.name] = capacity
            source = source._replace(shape=(rows, *source.shape[1:]), of=_Whole(source.of.tensor[:rows]))
        made.append(source)
    return made
