"""Groups of options: names that match a pattern lie in tables of their own, for which optimizers have options.

An optimizer's options belong to whole tables. So names of one shape and different options need different tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pdrs._core import Places
from pdrs._rows import optimizer_state
from pdrs._rows.optimizers import attached, refuse_strangers
from pdrs._rows.room import clear_rows, make_room
from pdrs._rows.store import numbers_by_kind, remove_last_table, table_for
from pdrs._rows.table import Kind, Rows, parameter_of, refuse_foreign
from pdrs._rows.write import write_rows
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["groups_of", "param_groups"]


def groups_of(patterns: tuple[str, ...], names: list[str]) -> list[int] | None:
    """Return the number of the group of each name; None if all are 0. Group 1 is that of the first pattern."""
    if not patterns:
        return None
    searches = [re.compile(pattern).search for pattern in patterns]
    return [next((at for at, search in enumerate(searches, 1) if search(name)), 0) for name in names]


@untraced
def param_groups(
    self: StackedParameterDict, by: Mapping[str, Mapping[str, Any]], **others: Any
) -> list[dict[str, Any]]:
    r"""Move names with different options into different tables, and return the groups. **O(n)** per pattern.

    The options of an optimizer belong to whole tables. New names go to the table of their pattern from then on. Each
    pattern is searched in each name, in Python. Gathering names of two groups takes a few operations more than
    gathering names of one. Call this before you make the optimizer, then call ``attach_optimizer``, so that new tables
    join their group. Names that move keep the mask of ``freeze`` and the
    state of attached optimizers, and lose their gradients.

    Parameters
    ----------
    by
        Options by regular expression. A name has the options of the first pattern that ``re.search`` finds in it.
    **others
        The options of all other names.

    Returns
    -------
    list of dict
        The parameter groups. ``"pattern"`` in each tells new tables which group to join.

    Raises
    ------
    RuntimeError
        If rows must move in a table that is sharded or parametrized, or for which an optimizer that is not attached has
        state.
    TypeError
        If ``by`` is not a mapping from ``str`` to mappings.
    ValueError
        If a pattern is not a regular expression, or if options contain ``"params"`` or ``"pattern"``.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict({"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
    >>> groups = sd.param_groups(by={r"bias$": {"weight_decay": 0.0}}, weight_decay=0.1)
    >>> sd.attach_optimizer(torch.optim.AdamW(groups))
    >>> [name for name, _ in sd.named_parameters()]
    ['float32_2', 'float32_2_group1']

    """
    if not isinstance(by, Mapping):
        raise TypeError(f"expected a mapping from regular expressions to options, got {type(by).__name__}")
    for expression in by:
        if not isinstance(expression, str):  # it is saved with the names
            raise TypeError(f"expected regular expressions as str, with flags as '(?i)', got {expression!r}")
        if not isinstance(by[expression], Mapping):
            raise TypeError(f"expected a mapping of options for {expression!r}, got {type(by[expression]).__name__}")
        _check_pattern(expression)
        _check_options(by[expression])
    _check_options(others)
    with self._lock.change():
        options = [(None, dict(others)), *((pattern, {**others, **options}) for pattern, options in by.items())]
        _regroup(self, tuple(by))
        made = []
        for group, (pattern, chosen) in enumerate(options):
            tables = [parameter_of(self, table) for table in self._tables if table.group == group]
            trainable = [table for table in tables if table.requires_grad]
            made.append({"params": trainable, "pattern": pattern, **chosen})
        return made


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, RuntimeError) as error:
        raise ValueError(f"expected a regular expression, got {pattern!r}: {error}") from error


def _check_options(options: Mapping[str, Any]) -> None:
    for key in ("params", "pattern"):
        if key in options:
            raise ValueError(f"{key!r} is not an option: param_groups sets it, from the names that match a pattern")


def _regroup(sd: StackedParameterDict, patterns: tuple[str, ...]) -> None:
    """Move every name to a table of its group."""
    before = sd._patterns, [table.group for table in sd._tables]
    index, changes = sd._index, Changes()
    try:
        sd.__dict__["_patterns"] = patterns
        places = index.places()
        numbers, rows = places.tables, places.rows
        groups = np.array(groups_of(patterns, index.names()) or np.zeros(len(numbers), np.int64), dtype=np.int64)
        homes, moves = [], []
        for number, table in enumerate(sd._tables):
            # A table becomes that of the group of most of its names: the fewest rows move.
            counts = np.bincount(groups[numbers == number], minlength=1)
            homes.append(int(counts.argmax()))
            strays = [int(group) for group in np.flatnonzero(counts) if group != homes[number]]
            moves += [(number, group) for group in strays]
            if strays:
                refuse_foreign(sd, table, "put names into groups")
                refuse_strangers(sd, table, parameter_of(sd, table), attached(sd), "move rows of a table")
        for table, home in zip(sd._tables, homes, strict=True):
            table.group = home
        # Names of several tables may go to one.
        arriving: dict[int, list[tuple[int, Rows]]] = {}
        for number, group in moves:
            source = parameter_of(sd, sd._tables[number])
            kind = Kind(tuple(source.shape[1:]), source.dtype, source.requires_grad, group)
            target = table_for(sd, kind, source.device, numbers_by_kind(sd))
            arriving.setdefault(target, []).append((number, np.flatnonzero((numbers == number) & (groups == group))))
        new_numbers, new_rows = numbers.copy(), rows.copy()
        for target, parts in arriving.items():
            room = make_room(sd, target, sum(len(there) for _, there in parts))
            for number, there in parts:
                given, room = room[: len(there)], room[len(there) :]
                _copy_rows(sd, number, rows[there], target, given)
                new_numbers[there], new_rows[there] = target, given
        used = [index.used(number) for number in range(len(sd._tables))]
        for number in arriving:
            used[number] = max(used[number], int(new_rows[new_numbers == number].max()) + 1)
        plan = index.plan_places(Places.of(new_numbers, new_rows), used)
        changes.call(index.commit, plan)
        for number, table in enumerate(sd._tables):
            clear_rows(sd, changes, table, rows[(numbers == number) & (new_numbers != numbers)])
        changes.make()
    except BaseException:
        if not changes.made:
            # What was copied to other tables is nobody's.
            while len(sd._tables) > len(before[1]):
                remove_last_table(sd)
            sd.__dict__["_patterns"] = before[0]
            for table, group in zip(sd._tables, before[1], strict=True):
                table.group = group
        raise


def _copy_rows(sd: StackedParameterDict, number: int, old: Rows, target: int, new: Rows) -> None:
    """Copy rows to rows of another table, and all that belongs to them but gradients."""
    home, guest = sd._tables[number], sd._tables[target]
    source, parameter = parameter_of(sd, home), parameter_of(sd, guest)
    from_rows, to_rows = torch.from_numpy(old).to(source.device), torch.from_numpy(new)
    write_rows(parameter, new, source.detach().index_select(0, from_rows))
    for optimizer in attached(sd):
        optimizer_state.carry(optimizer, source, from_rows, parameter, to_rows)
    if home.frozen is not None:
        device = home.frozen.device
        frozen = home.frozen[torch.from_numpy(old).to(device)]
        if guest.frozen is None and frozen.any():
            guest.frozen = torch.zeros(len(parameter), dtype=torch.bool, device=device)
        if guest.frozen is not None:
            guest.frozen[to_rows.to(device)] = frozen
        guest.hook(parameter)
