"""What training asks of named rows: gradients and norms by name, rows that are frozen, groups of options by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pdrs._core import TableRows, replace_ids
from pdrs._rows import optimizer_state
from pdrs._rows.gather import GatheredRows, Lookup
from pdrs._rows.row_ids import id_of, row_of, table_of
from pdrs._rows.store import Kind, Table, mask_device, whole
from pdrs._rows.write import write_rows
from pdrs._torch.names import Names
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

__all__ = ["TrainedRows"]


class TrainedRows(GatheredRows):
    """Named rows, and what training asks of them."""

    if TYPE_CHECKING:
        # The patterns of names whose tables have options of their own; the group of the first is 1.
        _patterns: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_patterns"] = ()

    # -- by name -------------------------------------------------------------------------------------------------------

    def named_grads(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over names and gradients, in order; names whose table has no gradient are left out. **O(n)**.

        A dense gradient is a view of the table's. Of a sparse one, only names that it has rows of are given, and what
        is given may be a copy. Rows that move meanwhile end the iteration with a RuntimeError.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
        >>> sd.gather(["b"]).sum().backward()
        >>> {name: gradient.tolist() for name, gradient in sd.named_grads()}
        {'a': [0.0, 0.0], 'b': [1.0, 1.0]}

        """
        rows: list[Mapping[int, Tensor] | tuple[Tensor, ...]] = []
        moves = self._moves
        for table in self._tables:
            gradient = self._parameter(table).grad
            gradient = None if gradient is None else whole(gradient)
            if gradient is None:
                rows.append({})
            elif gradient.is_sparse:
                gradient = gradient.coalesce()
                rows.append(dict(zip(gradient.indices()[0].tolist(), gradient.values().unbind(), strict=True)))
            else:
                rows.append(gradient.unbind())
        for name, id_ in self._index.items():
            if self._moves != moves:
                raise RuntimeError("rows of the dictionary moved during iteration")
            of_table, row = rows[table_of(id_)], row_of(id_)
            if not isinstance(of_table, dict) or row in of_table:
                yield name, of_table[row]

    @torch.no_grad()
    def norms(self, p: float = 2.0) -> Tensor:
        """Return the norm of every entry, in order. **O(n)**, a few operations a table.

        Parameters
        ----------
        p
            The order of the norm, as for ``torch.linalg.vector_norm``.

        Returns
        -------
        torch.Tensor
            ``[len(self)]``, on the device of the first table.
        """
        with self._lock.read():
            ids = self._index.indices()
            device = self._device()
            norms = torch.zeros(len(ids), device=device)
            numbers = table_of(ids)
            for number in np.unique(numbers):
                table = whole(self._parameter(self._tables[number]))
                if not (table.is_floating_point() or table.is_complex()) or table.itemsize == 1:
                    table = table.to(torch.get_default_dtype())
                of_table: Tensor = torch.linalg.vector_norm(table.reshape(len(table), -1), p, dim=1)
                there = np.flatnonzero(numbers == number)
                of_names = of_table[torch.from_numpy(row_of(ids[there])).to(table.device)].to(device)
                if len(there) == len(ids):
                    return of_names
                norms = norms.to(torch.promote_types(norms.dtype, of_names.dtype))
                norms[torch.from_numpy(there).to(device)] = of_names.to(norms.dtype)
            return norms

    # -- frozen rows ---------------------------------------------------------------------------------------------------

    @untraced
    def freeze(self, names: Names | Lookup) -> None:
        """Mask the gradients of some names until they are unfrozen. **O(m)** for ``m`` names, and **O(capacity)** once.

        The gradient that ``backward`` gives these rows is set to zero, dense or sparse, and so is the one that they
        have, and what attached optimizers remember of them. (What ``torch.autograd.grad`` returns is not masked: it
        goes past the gradients of Parameters.) So they stay as they are under optimizers without weight decay that were
        attached before; others go on moving them by their momentum. Weight decay moves every row of a table: names that
        must not change at all are better inserted as ``Parameter(..., requires_grad=False)``, which puts them into a
        table that no optimizer has. A name that is set to a value of another shape is no longer frozen.

        The mask is pickled and copied with the dictionary, and is no part of its state dict.

        Raises
        ------
        KeyError
            If a name is not there.
        RuntimeError
            If the table is sharded or parametrized. Names that were frozen before stay frozen.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
        >>> sd.freeze(["a"])
        >>> sd.gather(["a", "b"]).sum().backward()
        >>> sd.table((2,)).grad.tolist()
        [[0.0, 0.0], [1.0, 1.0]]

        """
        with self._lock.change():
            parts = self._by_table(names)
            for table, _ in parts:
                self._refuse_foreign(table, "freeze names")
            changes, optimizers = Changes(), self._attached()
            for table, rows in parts:
                parameter = self._parameter(table)
                table.hook(parameter, wanted=True)
                for optimizer in optimizers:
                    optimizer_state.forget_rows(changes, optimizer, parameter, rows)
                self._clear_gradient(changes, table, rows)
                mask, index = table.frozen, torch.from_numpy(rows).to(mask_device(parameter.device))
                if mask is None:
                    mask = torch.zeros(len(parameter), dtype=torch.bool, device=index.device)
                    changes.set_attributes(table, frozen=mask)
                changes.call(mask.index_fill_, 0, index, True)
            changes.make()

    @untraced
    def unfreeze(self, names: Names | Lookup | None = None) -> None:
        """Let names, or all, have gradients again; those that are not frozen are passed over. **O(m + capacity)**."""
        with self._lock.change():
            changes = Changes()
            if names is None:
                for table in self._tables:
                    changes.set_attributes(table, frozen=None)
            else:
                for table, rows in self._by_table(names):
                    if table.frozen is not None:
                        mask = table.frozen.index_fill(0, torch.from_numpy(rows).to(table.frozen.device), False)
                        is_left = mask.view(torch.uint8).any()  # ten times as fast as for bool
                        changes.set_attributes(table, frozen=mask if is_left else None)
            changes.make()
            for table in self._tables:
                table.hook(self._parameter(table))

    def _by_table(self, names: Names | Lookup) -> list[tuple[Table, Any]]:
        ids = self._look_up(names)
        numbers = table_of(ids)
        return [(self._tables[number], row_of(ids[numbers == number])) for number in np.unique(numbers)]

    # -- groups of options ---------------------------------------------------------------------------------------------

    @untraced
    def param_groups(self, by: Mapping[str, Mapping[str, Any]], **others: Any) -> list[dict[str, Any]]:
        r"""Return parameter groups for an optimizer, whose options depend on the names. **O(n)** a pattern.

        An optimizer's options belong to whole tables. So names of one shape and different options are first moved into
        different tables, once, and new names go to the table of their pattern from then on. What this costs: a pattern
        is searched in every name, in Python; and to gather names of two groups takes a few operations more than to
        gather those of one. Call it before the optimizer is made, then :meth:`attach_optimizer`, so that tables that
        are made later join their group. Frozen names stay frozen, the state of attached optimizers moves along, and the
        gradients of names that move are dropped.

        Parameters
        ----------
        by
            Options by regular expression. A name has the options of the first that is found in it (``re.search``).
        **others
            The options of all other names.

        Returns
        -------
        list of dict
            What optimizers take; ``"pattern"`` in each tells tables that are made later where to go.

        Raises
        ------
        RuntimeError
            If rows of a table must move for which an optimizer that is not attached has state, or that is sharded or
            parametrized.
        TypeError
            If ``by`` is not a mapping from ``str`` to mappings.

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
                raise TypeError(
                    f"expected a mapping of options for {expression!r}, got {type(by[expression]).__name__}"
                )
        with self._lock.change():
            options = [(None, dict(others)), *((pattern, {**others, **options}) for pattern, options in by.items())]
            self._regroup(tuple(by))
            made = []
            for group, (pattern, chosen) in enumerate(options):
                tables = [self._parameter(table) for table in self._tables if table.group == group]
                trainable = [table for table in tables if table.requires_grad]
                made.append({"params": trainable, "pattern": pattern, **chosen})
            return made

    def _pattern(self, group: int) -> str | None:
        return self._patterns[group - 1] if 0 < group <= len(self._patterns) else None

    def _groups_of(self, names: list[str]) -> list[int] | None:
        if not self._patterns:
            return None
        searches = [re.compile(pattern).search for pattern in self._patterns]
        return [next((at for at, search in enumerate(searches, 1) if search(name)), 0) for name in names]

    def _regroup(self, patterns: tuple[str, ...]) -> None:
        """Move every name to a table of its group."""
        before = self._patterns, [(table.group, copy(table.rows)) for table in self._tables]
        changes = Changes()
        try:
            self.__dict__["_patterns"] = patterns
            ids = self._index.indices()
            numbers = table_of(ids)
            groups = np.array(self._groups_of(list(self._index)) or np.zeros(len(ids), np.int64), dtype=np.int64)
            homes, moves = [], []
            for number, table in enumerate(self._tables):
                # A table becomes that of the group of most of its names: the fewest rows move.
                counts = np.bincount(groups[numbers == number], minlength=1)
                homes.append(int(counts.argmax()))
                strays = [int(group) for group in np.flatnonzero(counts) if group != homes[number]]
                moves += [(number, group) for group in strays]
                if strays:
                    self._refuse_foreign(table, "put names into groups")
                    self._refuse_strangers(table, self._parameter(table), self._attached(), "move rows of a table")
            for table, home in zip(self._tables, homes, strict=True):
                table.group = home
            moved = ids.copy()
            for number, group in moves:
                self._move_rows(moved, np.flatnonzero((numbers == number) & (groups == group)), group)
            for number, table in enumerate(self._tables):
                live = row_of(moved[table_of(moved) == number])
                changes.set_attributes(table, rows=TableRows.of_live(table.rows.used, live))
                self._clear_rows(changes, table, row_of(ids[(numbers == number) & (moved != ids)]))
            changes.call(replace_ids, self._index, moved)
            self._moved(changes)
            changes.make()
        except BaseException:
            if not changes.made:
                # What was copied to other tables is nobody's.
                while len(self._tables) > len(before[1]):
                    self._remove_last_table()
                self.__dict__["_patterns"] = before[0]
                for table, (group, rows) in zip(self._tables, before[1], strict=True):
                    table.group, table.rows = group, rows
            raise

    def _move_rows(self, ids: Any, there: Any, group: int) -> None:
        """Copy the rows of some of the ids, and all that belongs to them but gradients, to new rows; give their ids."""
        home = self._tables[table_of(int(ids[there[0]]))]
        source = self._parameter(home)
        kind = Kind(tuple(source.shape[1:]), source.dtype, source.requires_grad, group)
        number = self._table_for(kind, source.device, self._numbers())
        target = self._tables[number]
        rows = self._make_room(target, len(there))
        old = torch.from_numpy(row_of(ids[there])).to(source.device)
        write_rows(self._parameter(target), rows, source.detach().index_select(0, old))
        target.rows.take(len(there))
        for optimizer in self._attached():
            optimizer_state.carry(optimizer, source, old, self._parameter(target), torch.from_numpy(rows))
        if home.frozen is not None:
            device = home.frozen.device
            frozen = home.frozen[torch.from_numpy(row_of(ids[there])).to(device)]
            if target.frozen is None and frozen.any():
                target.frozen = torch.zeros(len(self._parameter(target)), dtype=torch.bool, device=device)
            if target.frozen is not None:
                target.frozen[torch.from_numpy(rows).to(device)] = frozen
            target.hook(self._parameter(target))
        ids[there] = id_of(number, rows)
