"""The optimizers of a dictionary: those that are attached, whose state follows the rows, and strangers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pdrs._rows import optimizer_state
from pdrs._rows.by_row import ByRow
from pdrs._rows.initial_state import Beginning, declare
from pdrs._rows.table import Table, parameter_of
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pdrs.stacked import StackedParameterDict

__all__ = ["attach_optimizer", "attached", "detach_optimizer", "refuse_strangers"]


def attached(sd: StackedParameterDict) -> list[Optimizer]:
    references = sd._optimizers
    alive = [optimizer for reference in references if (optimizer := reference()) is not None]
    if len(alive) < len(references):
        sd.__dict__["_optimizers"] = [reference for reference in references if reference() is not None]
    return alive


@untraced
def refuse_strangers(
    sd: StackedParameterDict, table: Table, parameter: Tensor, optimizers: list[Optimizer], what: str
) -> None:
    """Raise if an optimizer that is not attached has state by row for a table."""
    if table.loaded:
        optimizer_state.look_for_optimizers()
        table.loaded = False
    optimizer_state.refuse_strangers(parameter, optimizers, what)


@untraced
def attach_optimizer(
    self: StackedParameterDict, optimizer: Optimizer, *, initial_state: Mapping[str, Beginning] | None = None
) -> None:
    """Let the state of an optimizer follow the names: it grows, is cleared and moves with the rows. **O(tables)**.

    This concerns state with one row for each row of a table, such as the moments of Adam, the sums of Adagrad, and
    momentum. It grows with the table, begins anew for a new name, and moves with ``compact`` and ``load_state_dict``.
    Numbers, such as the count of steps, stay.

    A new table joins the first attached optimizer that owns its parameter group. If none does, it joins the first that
    has tables of this dictionary. It joins further optimizers only if they have the same tables.

    The dictionary does not keep the optimizer alive. Its copies and pickles have no attached optimizers. An optimizer
    and its wrapper (of accelerate, Lightning, Hugging Face) count as one: pass either.

    Parameters
    ----------
    optimizer
        An optimizer that has tables of this dictionary.
    initial_state
        What the state of a new name begins with, by the keys of the state: a number, or ``"value"`` for a copy of the
        parameter. Needed only if pdrs cannot find it out. It knows the optimizers of torch. For others, an optimizer of
        the same class and options takes a step on a small parameter.

    Raises
    ------
    TypeError
        If ``optimizer`` is not an optimizer, or ``initial_state`` is not a mapping.
    ValueError
        If there are tables, and the optimizer has none of them. Also if ``initial_state`` has a key that the state of
        the optimizer lacks. An optimizer that has not stepped yet has no state, and takes any key.
    RuntimeError
        If its state cannot follow the rows: anything except numbers, and plain tensors with one row for each row of a
        table. State that appears later raises at the first change. So does state whose beginning is unknown. Also if
        it is a ZeroRedundancyOptimizer, which keeps the state of a table on one rank only.
    """
    _refuse_no_optimizer(optimizer)
    _refuse_zero(optimizer)
    begins = {} if initial_state is None else initial_state
    _refuse_no_mapping(begins)
    with self._lock.change():
        tables = [parameter_of(self, table) for table in self._tables]
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if tables and not any(id(parameter) in held for parameter in tables):
            raise ValueError("the optimizer has no parameter of this dictionary: make it of dictionary.parameters()")
        parts = optimizer_state.parts_of(optimizer)
        for part in parts:
            for parameter in tables:
                for _ in optimizer_state.of_rows(part, parameter):
                    pass
        if begins:
            _refuse_unknown(parts, tables, begins)
        for part in parts:
            declare(part, begins)
            if isinstance(part, ByRow):
                part.follows = True
            if not optimizer_state.is_among(part, attached(self)):
                self._optimizers.append(weakref.ref(part))


@untraced
def detach_optimizer(self: StackedParameterDict, optimizer: Optimizer) -> None:
    """Stop what ``attach_optimizer`` began.

    Raises
    ------
    TypeError
        If ``optimizer`` is not an optimizer.
    ValueError
        If it is not attached.
    """
    _refuse_no_optimizer(optimizer)
    with self._lock.change():
        parts, held = optimizer_state.parts_of(optimizer), attached(self)
        kept = [one for one in held if not optimizer_state.is_among(one, parts)]
        if len(kept) == len(held):
            raise ValueError(f"the optimizer ({type(optimizer).__name__}) is not attached to this dictionary")
        for part in parts:
            if isinstance(part, ByRow):
                part.follows = False
        self.__dict__["_optimizers"] = list(map(weakref.ref, kept))


def _refuse_no_optimizer(given: object) -> None:
    if not (hasattr(given, "param_groups") and hasattr(given, "state")):
        raise TypeError(f"expected an optimizer, got {type(given).__name__}")


def _refuse_zero(optimizer: object) -> None:
    """Raise RuntimeError for a ZeroRedundancyOptimizer, or what wraps one, on each rank alike."""
    inner = [one for one in getattr(optimizer, "__dict__", {}).values() if optimizer_state.is_optimizer(one)]
    for one in (optimizer, *inner):
        for base in type(one).__mro__:
            if base.__name__ == "ZeroRedundancyOptimizer" and base.__module__.startswith("torch."):
                raise RuntimeError(
                    "a ZeroRedundancyOptimizer keeps the state of a table on one rank only, where it cannot follow "
                    "the names: give the tables of this dictionary an optimizer of their own, such as "
                    "torch.optim.Adam(dictionary.parameters()), and the other parameters to ZeroRedundancyOptimizer"
                )


def _refuse_no_mapping(given: object) -> None:
    if not isinstance(given, Mapping):
        what = type(given).__name__
        raise TypeError(f"expected initial_state as a mapping from keys of the optimizer's state, got {what}")


def _refuse_unknown(parts: list[Optimizer], tables: list[Tensor], keys: Mapping[str, Beginning]) -> None:
    """Raise ValueError for a key that no part of an optimizer has, once each of them has state."""
    states = [[state for one in tables if (state := part.state.get(one))] for part in parts]
    if not all(states):
        return
    for key in keys:
        if not any(key in state for of_part in states for state in of_part):
            by_row = dict.fromkeys(
                repr(name) for part in parts for one in tables for _, name in optimizer_state.of_rows(part, one)
            )
            raise ValueError(
                f"the optimizer ({type(parts[0]).__name__}) has no state {key!r}; it has {', '.join(by_row) or 'none'}"
            )
