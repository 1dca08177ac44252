"""State dicts of a StackedParameterDict: in its own layout, tables and packed names, and in that of a ParameterDict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs import _optimizer_rows
from pdrs._core import TableRows, sort_tensors
from pdrs._named_rows import partition, row_of, table_of
from pdrs._packed_names import Header, TableHeader, is_packed, pack, table_in_slab, unpack
from pdrs._row_blocks import stack, write_rows
from pdrs._tables import Table
from pdrs._tensor_file import is_padding
from pdrs._trained_rows import TrainedRows

__all__ = ["SavedRows"]

_EXTRA_STATE = "_extra_state"  # the key that torch gives what `get_extra_state` returns


class SavedRows(TrainedRows):
    """Named rows that can be saved and loaded."""

    # The names as they were last packed, and what was counted then: kept, because models are saved again and again, and
    # because to compare bytes is the fastest way to find out that what is loaded has the same names.
    _packed: tuple[Tensor, int, int, Header] | None

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_packed"] = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is only remembered to be faster."""
        return super().__getstate__() | {"_packed": None}

    # -- saving --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the names, their rows, and what there is to know of the tables: uint8 ``[bytes]``. **O(n)**."""
        # A copy: distributed checkpoints load into the tensors of a state dict, and what is kept here must not change.
        with self._lock:
            return self._packed_names().clone()

    def _packed_names(self) -> Tensor:
        """Return what :meth:`get_extra_state` gives a copy of."""
        counted, kept = (self._moves, self._inserts, self._header()), self._packed
        if kept is None or kept[1:] != counted:
            kept = self.__dict__["_packed"] = (pack(self._index, self._header()), *counted)
        return kept[0]

    def _header(self) -> Header:
        tables = tuple(
            TableHeader(table.attribute, table.group, self._parameter(table).requires_grad, table.rows.used)
            for table in self._tables
        )
        return Header(tables, self._patterns)

    def named_state_dict(self) -> dict[str, Tensor]:
        """Return a dict of names and rows, as a ParameterDict's ``state_dict`` is. **O(n)**.

        The rows are detached views of the tables. Both classes of ParameterDict load it, and so does this one.
        """
        with self._lock:
            tables = [self._parameter(table).detach().unbind() for table in self._tables]
            return {name: tables[table_of(id_)][row_of(id_)] for name, id_ in self._index.items()}

    # -- loading -------------------------------------------------------------------------------------------------------

    def set_extra_state(self, state: Any) -> None:
        """Take over names and rows; tables are made, removed and resized. **O(n)**, or little if they are the same."""
        if not is_packed(state):
            raise ValueError("expected the packed names of a StackedParameterDict")
        with self._lock:
            self._conform(state, {})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names: Any = state_dict.get(prefix + _EXTRA_STATE)
        if not is_packed(names):
            with self._lock:
                _load_named(self, state_dict, prefix, strict, missing_keys, unexpected_keys, error_msgs)
            return
        saved = {key[len(prefix) :]: state_dict[key] for key in _under(state_dict, prefix) if not is_padding(key)}
        with self._lock:
            try:
                self._conform(names, saved)
            except (ValueError, RuntimeError) as error:
                error_msgs.append(f"While loading the names of {prefix or 'the dictionary'}: {error}")
                return
        if names.device.type != "meta":
            # torch hands it to `set_extra_state`, which has nothing left to do.
            saved[_EXTRA_STATE] = self._packed_names()
        state_dict = {prefix + key: value for key, value in saved.items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._adopt()

    def _conform(self, packed: Any, saved: dict[str, Any]) -> None:
        """Become a dictionary of the packed names and rows, with tables as large as the saved ones; values are not set.

        In ``saved``, views of tables take the place of the slabs that they lie in. Nothing has changed if the names are
        damaged, or an optimizer that is not attached has state for the rows.
        """
        if packed.device.type == "meta":
            return
        ours = self._packed_names()
        if packed is ours or torch.equal(ours, packed.cpu()):
            self._fit_capacities(saved)
            return
        index, ids, header = unpack(packed)
        _take_out_of_slabs(header, saved)
        old = {table.attribute: (number, table) for number, table in enumerate(self._tables)}
        for attribute, *_ in header.tables:
            if attribute not in old and hasattr(self, attribute):
                raise ValueError(f"the table '{attribute}' cannot be made: there is another attribute of that name")
        numbers, rows = table_of(ids), row_of(ids)
        before = self._index.lookup(list(index), -1)
        plan = []
        for number, (attribute, group, trainable, used, _) in enumerate(header.tables):
            there = numbers == number
            tensor = saved.get(attribute)
            if isinstance(tensor, Tensor) and tensor.dim() and used > len(tensor):
                raise ValueError(f"the table '{attribute}' has {len(tensor)} rows, and {used} are in use")
            of_table = TableRows.of_live(used, rows[there])
            if tensor is None and attribute in old:
                tensor = self._parameter(old[attribute][1])
            capacity = max(used, len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0)
            plan.append((attribute, group, trainable, there, of_table, tensor, capacity))
        for table in self._tables:
            _optimizer_rows.refuse_strangers(self._parameter(table), self._attached(), "load other names into a table")
        made: list[Table] = []
        for attribute, group, trainable, there, of_table, tensor, capacity in plan:
            if attribute in old:
                was, table = old[attribute]
                source = np.full(capacity, -1)
                kept = there & (before >= 0) & (table_of(before) == was)
                source[rows[kept]] = row_of(before[kept])
                parameter = self._parameter(table)
                if capacity != len(parameter) or (source != np.arange(capacity)).any():
                    self._rearrange(table, capacity, torch.from_numpy(source).to(parameter.device))
                table.group = group
            else:
                table = self._new_table(attribute, group, trainable, tensor, capacity)
            table.rows = of_table
            made.append(table)
        for attribute, (_, table) in old.items():
            if table not in made:
                self._discard_table(attribute)
        for table in made:
            # In the saved order, by which an optimizer's state dict knows them.
            self._parameters[table.attribute] = self._parameters.pop(table.attribute)
        self.__dict__.update(_tables=made, _index=index, _patterns=header.patterns)
        self._moved()

    def _fit_capacities(self, saved: Mapping[str, Any]) -> None:
        for table in self._tables:
            tensor = saved.get(table.attribute)
            if isinstance(tensor, Tensor) and tensor.dim() and table.rows.used <= len(tensor):
                self._resize(table, len(tensor))

    def _new_table(self, attribute: str, group: int, trainable: bool, tensor: Any, capacity: int) -> Table:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise ValueError(f"the table '{attribute}' is missing")
        data = torch.zeros((capacity, *tensor.shape[1:]), dtype=tensor.dtype, device=self._device())
        return self._tables[self._add_table(attribute, Parameter(data, requires_grad=trainable), group)]


def _take_out_of_slabs(header: Header, saved: dict[str, Any]) -> None:
    """Replace slabs in a state dict by views of the tables that lie in them."""
    names = {table.slab.tensor for table in header.tables if table.slab is not None}
    slabs = {name: saved.pop(name, None) for name in names}
    for table in header.tables:
        if table.slab is not None:
            saved[table.attribute] = table_in_slab(table, slabs[table.slab.tensor])


def _under(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    return [key for key in state_dict if key.startswith(prefix)] if prefix else list(state_dict)


def _load_named(
    sd: SavedRows,
    state_dict: Mapping[str, Any],
    prefix: str,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load what a ParameterDict saved: an empty dictionary takes over the names, another one must have them."""
    keys = _under(state_dict, prefix)
    names = [key[len(prefix) :] for key in keys] if prefix else keys
    values = list(map(state_dict.__getitem__, keys))
    classes, firsts = sort_tensors(values)
    # What is no plain tensor is looked at one by one: subclasses, tensors on the meta device, and no tensors at all.
    odd = [at for at in np.flatnonzero(classes < 0).tolist() if not isinstance(values[at], Tensor)]
    error_msgs += [
        f'While copying the parameter named "{keys[at]}", expected torch.Tensor or Tensor-like object from '
        f"checkpoint but received {type(values[at])}"
        for at in odd
    ]
    if len(sd._index) == 0:
        taken = sorted(set(range(len(keys))).difference(odd))
        sd._insert([names[at] for at in taken], [_as_entry(values[at]) for at in taken])
        return
    ids = sd._index.lookup(names, -1)
    if strict:
        unexpected_keys += [keys[at] for at in np.flatnonzero(ids < 0)]
        if (ids >= 0).sum() < len(sd._index):
            given = set(names)
            missing_keys += [prefix + name for name in sd._index if name not in given]
    for (class_, number), there in partition([classes, table_of(ids)]):
        if number < 0:
            continue
        parameter = sd._parameter(sd._tables[number])
        places = there.tolist()
        if class_ >= 0 and values[firsts[class_]].shape == parameter.shape[1:]:
            chosen = values if len(places) == len(values) else [values[at] for at in places]
            write_rows(parameter, row_of(ids[there]), stack(chosen, chosen[0].detach()[None]))
            continue
        for at in places:
            value = values[at]
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape[1:]:
                write_rows(parameter, row_of(ids[at : at + 1]), value.detach()[None])
            else:
                error_msgs.append(
                    f"size mismatch for {keys[at]}: copying a param with shape {value.shape} from checkpoint, the "
                    f"shape in current model is {parameter.shape[1:]}."
                )


def _as_entry(value: Tensor) -> Tensor:
    differentiable = value.is_floating_point() or value.is_complex()
    return value if differentiable else Parameter(value.detach(), requires_grad=False)
