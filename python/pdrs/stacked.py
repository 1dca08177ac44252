"""``pdrs.StackedParameterDict``: names by the million, a handful of registered Parameters."""

from __future__ import annotations

import copy
from collections import abc
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized

from pdrs._core import IndexMap, TableRows, pop_end_row, pop_row, set_row, slab_views
from pdrs._entries import copies, sources
from pdrs._entries.views import KeysView as NamesView
from pdrs._moves import run
from pdrs._moves.recognise import recognise
from pdrs._rows.averages import note_copy
from pdrs._rows.gather import Lookup
from pdrs._rows.insert import Initialiser, initialise, refuse_integers
from pdrs._rows.row_ids import id_of, row_of, table_of
from pdrs._rows.state_dict import SavedRows
from pdrs._rows.store import Kind, Table, mask_device, whole
from pdrs._torch import huge_pages
from pdrs._torch.errors import MissingEntryError
from pdrs._torch.modes import is_intercepted
from pdrs._torch.names import Names, as_list
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced
from pdrs.parameter_dict import ParameterDict

__all__ = ["Lookup", "StackedParameterDict"]

# A repr longer than this shows its two ends only.
_REPR_WHOLE = 20
_REPR_END = 5


class StackedParameterDict(SavedRows):
    r"""An ordered dictionary of parameters that lie together: names by the million, a handful of registered Parameters.

    Entries of one shape and dtype are the rows of one :class:`~torch.nn.Parameter`, a *table* ``[capacity, *shape]``.
    Optimizers, DDP, FSDP2, ``clip_grad_norm_`` and the like see tables. Names can be looked up and gathered by the
    thousand in one differentiable call, and come and go while the model trains; a table grows as the same Parameter.
    It answers what a :class:`pdrs.ParameterDict` answers; where the two differ, ``docs/stacked/differences.md`` lists.

    Parameters
    ----------
    parameters
        A mapping from ``str`` to tensors, or an iterable of pairs, to begin with; see :meth:`update`. They are copied.

    Notes
    -----
    *n* is the number of entries and *m* that of the names in a call; costs are amortised. The rows that a sparse
    gradient lists are sorted once, when the first name is removed, or inserted into a freed row, while the table has
    it; what it has for a row is then found in **O(log)** of their number.
    Methods may be called by any number of threads; a lock makes them take turns. It does not cover what torch does by
    itself: ``backward``, the step of an optimizer, operations on tables. What reads (``gather``, ``sd[name]``, saving)
    may run beside these. What changes names, sizes or devices must not: torch would go on with memory that has been
    freed, which can end the process. Let one thread do both, or hold a lock of your own around each.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict({"left": torch.zeros(2), "right": torch.ones(2)})
    >>> sd["layer.0.weight"] = torch.zeros(3)
    >>> list(sd)
    ['left', 'right', 'layer.0.weight']
    >>> [(name, list(table.shape)) for name, table in sd.named_parameters()]
    [('float32_2', [2, 2]), ('float32_3', [1, 3])]
    >>> optimizer = torch.optim.Adam(sd.parameters())
    >>> sd.attach_optimizer(optimizer)                                # its state follows the names from now on
    >>> sd.gather(["right", "up", "right"], missing="insert").sum().backward()
    >>> optimizer.step()
    >>> sd.pop("left").tolist()
    [0.0, 0.0]

    """

    def __init__(self, parameters: Any = None) -> None:
        super().__init__()
        if parameters is not None:
            self.update(parameters)

    # -- other ways to make one ----------------------------------------------------------------------------------------

    @classmethod
    def from_tensor(cls, names: Names, values: Tensor, *, requires_grad: bool | None = None) -> StackedParameterDict:
        """Make a dictionary of many names of one shape, whose table is a given tensor. **O(n)**; no row is copied.

        Parameters
        ----------
        names
            Distinct names.
        values
            ``[len(names), *shape]``. A Parameter becomes the table itself, another tensor shares its memory with it.
        requires_grad
            Whether the table requires gradients. By default it does, or, if it is a Parameter, as that does.

        Raises
        ------
        TypeError
            If ``values`` is not a strided tensor.
        ValueError
            If a name is listed twice, there are more or fewer names than rows, or rows share memory (``expand``,
            ``unfold``).
        KeyError
            If a name is empty.
        RuntimeError
            If the rows are integers or bool, which cannot require gradients, and ``requires_grad`` is not False.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor([f"word.{n}" for n in range(1000)], torch.randn(1000, 16))
        >>> sd["word.7"].shape
        torch.Size([16])

        """
        if not isinstance(values, Tensor) or values.layout != torch.strided:
            what = f"one of layout {values.layout}" if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"expected a strided tensor of values, got {what}")
        if _may_overlap(values):
            raise ValueError("expected values with memory of their own, got a view in which they overlap: clone() it")
        index = IndexMap.from_names(names)
        if values.dim() == 0 or len(index) != len(values):
            size = "a single number" if values.dim() == 0 else f"{len(values)} rows"
            raise ValueError(f"expected a row for each name and no name twice, got {len(index)} names and {size}")
        if "" in index:
            raise KeyError('parameter name can\'t be empty string ""')
        if requires_grad or (requires_grad is None and not isinstance(values, Parameter)):
            refuse_integers(values.dtype, "pass requires_grad=False")
        parameter = (
            values if isinstance(values, Parameter) else Parameter(values, requires_grad=requires_grad is not False)
        )
        if requires_grad is not None:
            parameter.requires_grad_(requires_grad)
        made = cls()
        kind = Kind(tuple(values.shape[1:]), values.dtype, parameter.requires_grad)
        made._tables[made._add_table(kind.attribute(), parameter, 0)].rows = TableRows(len(index))
        made.__dict__["_index"] = index
        return made

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        init: Initialiser | None = None,
    ) -> StackedParameterDict:
        """Make a dictionary of names of given shapes. **O(n)**; the values are made in place.

        Parameters
        ----------
        shapes
            The shape of each name; their order is kept.
        dtype, device
            Of all tables; by default torch's defaults.
        init
            What gives the values, as those of ``torch.nn.init`` do: called once a table with a tensor of zeros
            ``[names, *shape]``. Without it they stay zeros.

        Raises
        ------
        KeyError
            If a name is empty.
        TypeError
            If a shape is not a sequence.
        RuntimeError
            If ``dtype`` is one of integers or bool, which cannot require gradients.
        ValueError
            If ``init`` returned new values instead of writing them.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_shapes({"a": (2,), "b": (3, 4), "c": (2,)}, init=torch.nn.init.ones_)
        >>> sd["b"].shape, list(sd)
        (torch.Size([3, 4]), ['a', 'b', 'c'])

        """
        pairs = shapes.items() if isinstance(shapes, Mapping) else shapes
        by_shape: dict[tuple[int, ...], list[str]] = {}
        order = IndexMap()
        for name, shape in dict(pairs).items():
            if not isinstance(shape, Sequence) or isinstance(shape, str):
                raise TypeError(f"expected the shape of '{name}' as a sequence of int, got {shape!r}")
            by_shape.setdefault(tuple(shape), []).append(name)
            order[name] = 0
        if "" in order:
            raise KeyError('parameter name can\'t be empty string ""')
        made = cls()
        dtype = dtype or torch.get_default_dtype()
        refuse_integers(dtype, "from_tensor makes them with requires_grad=False")
        device = torch.get_default_device() if device is None else device
        ids: dict[str, int] = {}
        for shape, names in by_shape.items():
            with torch.inference_mode(False), torch.no_grad():
                data = huge_pages.full((len(names), *shape), 0, dtype=dtype, device=device)
                if init is not None:
                    initialise(data, init)
            number = made._add_table(Kind(shape, dtype).attribute(), Parameter(data), 0)
            made._tables[number].rows = TableRows(len(names))
            ids.update(zip(names, range(id_of(number, 0), id_of(number, 0) + len(names)), strict=True))
        made.__dict__["_index"] = IndexMap((name, ids[name]) for name in order)
        return made

    @classmethod
    def fromkeys(cls, keys: Names, default: Tensor) -> StackedParameterDict:
        """Make a dictionary of ``keys``, each with a row of its own that is a copy of ``default``. **O(m)**.

        Raises TypeError if ``default`` is not a tensor, and RuntimeError if it is one of integers or bool, which cannot
        require gradients, and no Parameter that need not.
        """
        if not isinstance(default, Tensor):
            raise TypeError(f"expected a tensor as default, got {type(default).__name__}")
        names = list(dict.fromkeys(as_list(keys)))
        trainable = default.requires_grad if isinstance(default, Parameter) else True
        if trainable:
            refuse_integers(default.dtype, "pass torch.nn.Parameter(default, requires_grad=False)")
        return cls.from_tensor(
            names, default.detach().expand(len(names), *default.shape).clone(), requires_grad=trainable
        )

    # -- one entry -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Tensor:
        """Return the row of ``key``: a differentiable view of the table, writable under ``torch.no_grad()``. **O(1)**.

        The view is of the table as it is: it does not follow when the table grows, moves or is compacted, or when a
        name goes while a state dict is kept.

        Raises
        ------
        KeyError
            If there is none; the error is an AttributeError, too, as torch's class raises.
        TypeError
            If ``key`` is not a ``str``.
        """
        with self._lock:
            try:
                return self._row_of(key)
            except KeyError:
                raise MissingEntryError(key) from None

    def _row_of(self, key: str) -> Tensor:
        moves = self.__dict__["_moves"]
        try:
            row = self._row(self._index[key])
        except IndexError:
            if self.__dict__["_moves"] == moves:
                raise
        # Else a finalizer has moved rows on this very thread, after the row was looked up.
        return row if self.__dict__["_moves"] == moves else self._row_of(key)

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Copy a tensor into the row of ``key``: a new key goes to the end, an old one keeps its place. **O(1)**.

        A tensor of another shape, or a Parameter with another ``requires_grad``, moves the key to another table: what
        an optimizer remembers of it, its gradient and that it was frozen are lost. What is refused leaves no trace.

        Raises
        ------
        KeyError
            If ``key`` is empty.
        TypeError
            If ``key`` is not a ``str``, ``value`` is not a tensor, or its dtype is not that of the entry.
        ValueError
            If ``value`` lies on another device than the table that it would go to.
        RuntimeError
            If the table has to grow, or gives the row of a removed name again, and an optimizer that is not attached
            has stepped on it; or if ``value`` holds integers or bool and is no Parameter that does not require
            gradients.
        """
        with self._lock:
            group = (self._groups_of(as_list([key])) or [0])[0] if self._patterns else 0
            if is_intercepted() or not set_row(self, key, value, group):
                with self._lock.change():
                    self._insert([key], [value], distinct=True)

    def __delitem__(self, key: str) -> None:
        """Remove ``key``; the order of the others stays. Raises KeyError if it is not there. **O(1)**."""
        with self._lock.change():
            ids = np.array([self._index[key]])
            changes = Changes()
            changes.call(self._index.pop, key)
            self._free(changes, ids)
            changes.make()

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` is the key of an entry. **O(1)**."""
        return key in self._index

    def get(self, key: str, default: Any = None) -> Any:
        """Return the row of ``key``, or ``default`` if it is not there. **O(1)**."""
        with self._lock:
            try:
                return self._row_of(key)
            except KeyError:
                return default

    def setdefault(self, key: str, default: Any = None) -> Tensor:
        """Return the row of ``key``; first set it to ``default`` if it is not there. **O(1)**."""
        with self._lock:
            if key not in self._index:
                self[key] = default
            return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return a copy of its row, or ``default`` if it is not there and one is given. **O(1)**.

        The order of the others stays. Raises KeyError (and AttributeError) if ``key`` is not there. To remove many,
        :meth:`drop` is several times faster. The row, its gradient and what attached optimizers remember become zero.
        """
        if len(default) > 1:
            raise TypeError(f"pop expected at most 2 arguments, got {1 + len(default)}")
        popped = pop_row(self, key)
        if popped is not None:
            return popped
        if default:
            return default[0]
        raise MissingEntryError(key)

    def popitem(self, last: bool = True) -> tuple[str, Tensor]:
        """Remove the last (or the first) entry and return its key and a copy of its row. **O(1)** at either end.

        Raises KeyError if there is none.
        """
        popped = pop_end_row(self, last)
        if popped is None:
            raise KeyError("popitem(): dictionary is empty")
        return popped

    def _copy_of_row(self, table: Table, row: int) -> Tensor:
        # For `pop_row`, where it has something unusual before it.
        return whole(self._parameter(table).detach()[row]).clone()

    # -- all entries ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of entries. **O(1)**."""
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in order; RuntimeError if entries come or go meanwhile. **O(1)** a step."""
        return iter(self._index)

    def __reversed__(self) -> Iterator[str]:
        """Iterate over the keys from the last to the first. **O(1)** a step."""
        return reversed(self._index)

    def keys(self) -> KeysView[str]:
        """Return a view of the keys: in order, reversible, a set. **O(1)**."""
        return NamesView(self._index)

    def values(self) -> RowsView:
        """Return a view of the rows: in order, reversible. **O(1)**; ``in`` is **O(n)**, and asks for the very row."""
        return RowsView(self)

    def items(self) -> ItemsView:
        """Return a view of the pairs of key and row: in order, reversible. **O(1)**; ``in`` asks for the very row."""
        return ItemsView(self)

    def update(self, parameters: Any) -> None:
        """Set many entries, as :meth:`__setitem__` would one after another. **O(m)** for ``m`` entries.

        Parameters
        ----------
        parameters
            A mapping from ``str`` to tensors, or an iterable of pairs. The entries of an ``OrderedDict``, of a
            dictionary of parameters and of pairs are set in their order; those of another mapping, a plain ``dict``
            among them, in the order of the sorted keys (as torch's ParameterDict does).

        Raises
        ------
        TypeError, ValueError, KeyError, RuntimeError
            If ``parameters`` or one of its entries cannot be taken; then no entry has been set.
        """
        if not isinstance(parameters, Iterable):
            raise TypeError(
                "StackedParameterDict.update should be called with an iterable of key/value pairs, but got "
                f"{type(parameters).__name__}"
            )
        if isinstance(parameters, StackedParameterDict):
            names, values = parameters._detached()
        else:
            names, values = sources.columns(parameters)
        with self._lock.change():
            self._insert(names, values, distinct=isinstance(parameters, Mapping | StackedParameterDict))

    def clear(self) -> None:
        """Remove all entries; the tables keep their capacity. **O(n)**."""
        with self._lock.change():
            changes = Changes()
            changes.call(self._index.clear)
            self._free(changes, self._index.indices())
            changes.make()

    def copy(self) -> StackedParameterDict:
        """Return a dictionary of the same names with tables of its own, with no gradients. **O(n)**."""
        made = copy.deepcopy(self)
        for table in made._tables:
            table.loaded = False  # no optimizer was copied with it
        return made

    @untraced
    def __deepcopy__(self, memo: dict[int, Any]) -> StackedParameterDict:
        """Return what ``copy.deepcopy`` makes of any module, while no other thread changes the tables or the names."""
        with self._lock.read():
            if is_parametrized(self):  # which torch lets be copied, but not be pickled, and so not be reduced
                reduced: Any = object.__new__, (type(self),), StackedParameterDict.__getstate__(self)
            else:
                reduced = self.__reduce_ex__(4)
                index = reduced[2].get("_index") if len(reduced) > 2 and isinstance(reduced[2], dict) else None
                if index is not self._index:
                    memo[id(index)] = index  # which is a copy already
                    memo.setdefault(id(memo), []).append(index)  # as `copy` keeps things alive
            made: StackedParameterDict = copies.deep_copy_reduced(self, reduced, memo)
            note_copy(self, made)
            return made

    def __copy__(self) -> StackedParameterDict:
        """Return what :meth:`copy` returns: two dictionaries cannot give the rows of the same tables."""
        return self.copy()

    def __or__(self, other: Any) -> StackedParameterDict:
        """Return a copy that has been updated with ``other``."""
        if not isinstance(other, Mapping | torch.nn.ParameterDict | StackedParameterDict):
            return NotImplemented
        made = self.copy()
        made.update(other)
        return made

    def __ror__(self, other: Any) -> Any:
        """Return a plain dict of what ``other`` has, updated with the rows of this."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return {**other, **dict(self.items())}

    def __ior__(self, other: Any) -> StackedParameterDict:
        """Update with ``other``."""
        self.update(other)
        return self

    def unstack(self) -> ParameterDict:
        """Return a ParameterDict of the same entries, each a Parameter with a copy of the row. **O(n)**.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.eye(2))
        >>> type(sd.unstack()["b"]).__name__, list(sd.unstack().stack())
        ('Parameter', ['a', 'b'])

        """
        with self._lock.read():
            tables = []
            for table in self._tables:
                parameter = self._parameter(table)
                # In C order, which the table of `from_tensor` need not have.
                data = whole(parameter.detach()).clone(memory_format=torch.contiguous_format)
                count, shape, numel = len(parameter), list(parameter.shape[1:]), parameter[:1].numel()
                if data.device.type in ("cpu", "cuda") and type(data) is Tensor and numel:
                    offsets = list(range(0, count * numel, numel))
                    tables.append(slab_views(data, offsets, [shape] * count, requires_grad=parameter.requires_grad))
                else:
                    rows = (row.clone() for row in data.unbind())  # In one storage they would be taken for tied.
                    tables.append([Parameter(row, requires_grad=parameter.requires_grad) for row in rows])
            return ParameterDict([(name, tables[table_of(id_)][row_of(id_)]) for name, id_ in self._index.items()])

    def _detached(self) -> tuple[list[str], list[Tensor]]:
        """Return the names and the rows, detached; those of frozen tables as frozen Parameters."""
        with self._lock.read():
            tables = []
            for table in self._tables:
                parameter = self._parameter(table)
                rows = self._lent_whole(table).unbind()
                if not parameter.requires_grad:
                    rows = tuple(Parameter(row, requires_grad=False) for row in rows)
                tables.append(rows)
            return list(self._index), [tables[table_of(id_)][row_of(id_)] for id_ in self._index.values()]

    def extra_repr(self) -> str:
        """Return a line a table, and one a name, or, of many, of the first and the last."""
        with self._lock:
            lines = [
                f"{table.attribute}: {len(table.rows)} of {len(self._parameter(table))} rows, {self._kind(table)}"
                for table in self._tables
            ]
            hidden = len(self) - 2 * _REPR_END
            names = list(islice(self._index, _REPR_END if len(self) > _REPR_WHOLE else None))
            if len(self) > _REPR_WHOLE:
                last = list(islice(reversed(self._index), _REPR_END))[::-1]
                lines.append(f"{len(self)} names: {', '.join(map(repr, names))}, ... {hidden} more ...,")
                return "\n".join([*lines, f"  {', '.join(map(repr, last))}"])
            return "\n".join([*lines, f"{len(self)} names: {', '.join(map(repr, names))}".rstrip(": ")])

    @untraced
    def _apply(self, fn: Any, recurse: bool = True) -> StackedParameterDict:
        """Move or convert the tables: where ``fn`` is one of torch's own, all or, if there is an error, none."""
        with self._lock.change():
            masks = self._moved_masks(fn)
            if not run.apply(self, fn, recurse):
                with self._swappable():
                    super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for table, mask in masks:
                table.frozen = mask
            self._adopt()
        return self

    def pin_memory(self) -> StackedParameterDict:
        """Put the tables that lie on the CPU, and their gradients, into page-locked memory. **O(n)**.

        It is of just the size that they take, and copies from there to a CUDA device need no staging. The tables stay
        the same Parameters; one that grows is no longer page-locked.

        Raises
        ------
        RuntimeError
            If there is no CUDA device, or it cannot lock so much; then nothing has changed.
        """
        with self._lock.change():
            run.pin_memory(self)
        return self

    def _moved_masks(self, fn: Any) -> list[tuple[Table, Tensor]]:
        """Return the masks of frozen rows where their tables will be, made before anything moves."""
        masks: list[tuple[Table, Tensor]] = []
        move = recognise(fn)
        if move is None:
            return masks
        for table in self._tables:
            if table.frozen is not None:
                parameter = self._parameter(table)
                _, device = move.target(parameter.dtype, parameter.device)
                masks.append((table, table.frozen.to(mask_device(device))))
        return masks


class RowsView(abc.ValuesView[Tensor]):
    """The rows of a StackedParameterDict, in order."""

    _mapping: StackedParameterDict

    def __init__(self, mapping: StackedParameterDict) -> None:
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self._mapping)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"

    def __contains__(self, value: object) -> bool:
        return any(_is_same_row(value, row) for row in self)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator lets go of the dictionary at its end, and `map` does not.
        return (row for _, row in _items(self._mapping, False))

    def __reversed__(self) -> Iterator[Tensor]:
        return (row for _, row in _items(self._mapping, True))


class ItemsView(abc.ItemsView[str, Tensor]):
    """The names and rows of a StackedParameterDict, in order."""

    _mapping: StackedParameterDict

    def __init__(self, mapping: StackedParameterDict) -> None:
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self._mapping)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2) or item[0] not in self._mapping:
            return False
        return _is_same_row(item[1], self._mapping[item[0]])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return _items(self._mapping, False)

    def __reversed__(self) -> Iterator[tuple[str, Tensor]]:
        return _items(self._mapping, True)


def _items(sd: StackedParameterDict, backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield names and rows; what another thread moves between the look-up of a row and the row is looked up again."""
    state, row = sd.__dict__, sd._row
    with sd._lock:  # not in the middle of a change
        moves, index = state["_moves"], state["_index"]
    for name, id_ in index._iterate(2, backwards):
        try:
            found = row(id_)
        except IndexError:
            if state["_moves"] == moves:
                raise
        if state["_moves"] != moves:
            moves = state["_moves"]
            if state["_index"] is not index or name not in index:
                raise RuntimeError("the dictionary was changed during iteration")
            found = sd[name]
        yield name, found


def _may_overlap(rows: Tensor) -> bool:
    """Whether two elements may have the same place: those along a dimension lie within one step along the next."""
    reach = 0
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return rows.numel() > 0
            reach += stride * (size - 1)
    return False


def _is_same_row(value: object, row: Tensor) -> bool:
    # Each look at an entry makes a new view, so identity is that of the memory.
    if not isinstance(value, Tensor) or value.shape != row.shape or value.dtype != row.dtype:
        return False
    return value.device == row.device and value.data_ptr() == row.data_ptr() and value.numel() > 0
