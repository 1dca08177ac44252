"""Puts names, rows and states that were loaded in place of those of a sharded dictionary: all in one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import RowIndex
from pdrs._ranks.model_parts import Parts, value_of
from pdrs._ranks.sharded import ShardedParameterDict
from pdrs._rows import optimizer_state
from pdrs._rows.initial_state import beginning
from pdrs._rows.optimizers import attached, refuse_strangers
from pdrs._rows.table import Table, mask_device, parameter_of, refuse_foreign
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes

__all__ = ["Loaded", "LoadedTable", "TakeOver", "fill_for", "placed", "room_for"]


class LoadedTable(NamedTuple):
    """What a table is to have.

    Parameters
    ----------
    table
        Of the dictionary.
    data
        ``[capacity, *shape]``, on the CPU.
    others
        As in :class:`OfTable`, ``[capacity, ...]``.
    numbers
        The states without rows, as the manifest has them.
    """

    table: Table
    data: Tensor
    others: dict[str, Tensor]
    numbers: dict[str, Any]


class Loaded(NamedTuple):
    """What a dictionary is to have: names, tables in their order, and how many gathers there were."""

    names: RowIndex
    tables: list[LoadedTable]
    gathers: int


def room_for(count: int, capacity: int, shape: tuple[int, ...], dtype: torch.dtype, fill: complex = 0) -> Tensor:
    """Return a tensor for so many rows that are to come, and more that are full of a number."""
    made = huge_pages.empty((max(count, capacity), *shape), dtype=dtype)
    made[count:].fill_(fill)
    return made


class TakeOver:
    """Changes of dictionaries and optimizers, which are noted one after another and made in one step.

    Parameters
    ----------
    parts
        Of the model.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._changes = Changes()
        # What each optimizer is to have as state, in the order of the optimizers and then of others.
        self._states: dict[int, tuple[Any, dict[Any, Any]]] = {
            id(one): (one, dict(one.state)) for one in parts.optimizers
        }

    def make(self) -> None:
        """Make all changes."""
        for optimizer, state in self._states.values():
            self._changes.replace_all(optimizer.state, state)
        self._changes.make()

    @torch.no_grad()
    def dictionary(self, words: ShardedParameterDict, loaded: Loaded) -> None:
        """Note what a dictionary is to have.

        Raises
        ------
        RuntimeError
            If an optimizer that nobody knows of has state for its rows, or its tables are no ordinary ones.
        """
        local = words.local
        given = self._parts.optimizers
        for table in local._tables:
            refuse_foreign(local, table, "load a checkpoint")
            refuse_strangers(local, table, parameter_of(local, table), [*attached(local), *given], "load a checkpoint")
        seen: dict[str, Tensor] = {}
        for one in loaded.tables:
            table, parameter = one.table, parameter_of(local, one.table)
            assert isinstance(parameter, Parameter)
            data = one.data.to(parameter.device)
            table.keep_node(parameter)
            self._changes.set_data(parameter, data, None)
            frozen = one.others.get("frozen")
            if frozen is not None:
                frozen = frozen.to(mask_device(parameter.device))
                table.hook(parameter, wanted=True)
            self._changes.set_attributes(
                table, frozen=frozen, gradient_rows=None, lent=None, moved_to_huge_pages=None, cleared=None, loaded=True
            )
            seen[table.attribute] = one.others["seen"]
            for number, optimizer in enumerate(given):
                self._state(optimizer, number, parameter, one)
            for optimizer in attached(local):
                if not optimizer_state.is_among(optimizer, given):
                    self._begin_anew(optimizer, parameter, data)
        self._changes.set_attributes(local, _index=loaded.names)
        self._changes.set_attributes(words, **words._with_seen(seen, loaded.gathers, loaded.names.moves))

    def _state(self, optimizer: Any, number: int, parameter: Tensor, one: LoadedTable) -> None:
        begin = f"optimizer.{number}."
        made: dict[str, Any] = {
            key.removeprefix(begin): value.to(parameter.device)
            for key, value in one.others.items()
            if key.startswith(begin)
        }
        for key, value in one.numbers.items():
            if key.startswith(begin):
                made[key.removeprefix(begin)] = placed(optimizer, parameter, value_of(value))
        self._put(optimizer, parameter, made)

    def dense(self, optimizer: Any, parameter: Tensor, state: dict[str, Any]) -> None:
        """Note what an optimizer is to have for another parameter."""
        self._put(optimizer, parameter, state)

    def options(self, group: dict[str, Any], options: dict[str, Any]) -> None:
        """Note the options of a group of parameters."""
        self._changes.update(group, {key: value_of(value, group.get(key)) for key, value in options.items()})

    def _put(self, optimizer: Any, parameter: Tensor, made: dict[str, Any]) -> None:
        state = self._states.setdefault(id(optimizer), (optimizer, dict(optimizer.state)))[1]
        if made:
            state[parameter] = made
        else:
            state.pop(parameter, None)

    def _begin_anew(self, optimizer: Any, parameter: Tensor, data: Tensor) -> None:
        """Let the state by row of an optimizer that is not loaded be that of new names."""
        made = {}
        for state, key, begin in optimizer_state.rows_and_beginnings(optimizer, parameter):
            held = state[key]
            if held.is_sparse:
                held = held.to_dense()
            new = huge_pages.full_like(held, len(data), optimizer_state.fill_of(begin))
            if isinstance(begin, str):
                new.copy_(data)
            made[key] = new
        if made:
            self._put(optimizer, parameter, {**optimizer.state[parameter], **made})


def fill_for(optimizer: Any, parameter: Tensor, key: str) -> complex:
    """Return what a state has for rows that no name has."""
    begin = beginning(optimizer, parameter, key)
    return 0.0 if begin is None else optimizer_state.fill_of(begin)


def placed(optimizer: Any, parameter: Tensor, value: Any) -> Any:
    """Return a number of a state where the optimizer has it: beside the parameter, if its kernels count there."""
    if not isinstance(value, Tensor):
        return value
    group = next(one for one in optimizer.param_groups if any(each is parameter for each in one["params"]))
    is_beside = group.get("capturable") or group.get("fused")
    return value.to(parameter.device) if is_beside else value
