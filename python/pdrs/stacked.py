"""``pdrs.StackedParameterDict``: names by the million, a handful of registered Parameters."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from sys import modules
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.utils.parametrize import is_parametrized

from pdrs._core import Lock, RowIndex, pop_end_entry_row, pop_entry_row, set_entry_row, slab_views
from pdrs._entries import copies, sources
from pdrs._entries.views import KeysView as NamesView
from pdrs._moves import run
from pdrs._moves.recognise import recognise
from pdrs._rows import gather as _gather
from pdrs._rows import gather_bag as _bags
from pdrs._rows import groups as _groups
from pdrs._rows import insert as _insert
from pdrs._rows import layout as _layout
from pdrs._rows import optimizer_state, room, store
from pdrs._rows import optimizers as _attached
from pdrs._rows import shapes as _shapes
from pdrs._rows import state_dict as _states
from pdrs._rows import train as _train
from pdrs._rows import views as _views
from pdrs._rows.averages import note_copy
from pdrs._rows.gather import Lookup
from pdrs._rows.insert import Initialiser
from pdrs._rows.names_codec import Header
from pdrs._rows.table import Kind, Table, parameter_of, whole
from pdrs._rows.unsharded import FSDP2, gathered
from pdrs._rows.views import ItemsView, RowsView
from pdrs._torch.errors import MissingEntryError
from pdrs._torch.modes import is_intercepted, refuse_symbolic_trace
from pdrs._torch.names import Names, as_list
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced
from pdrs.parameter_dict import ParameterDict

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Lookup", "StackedParameterDict"]

_T = TypeVar("_T")


class StackedParameterDict(Module):
    r"""An ordered dictionary of millions of named parameters, which torch sees as a few large Parameters.

    Entries of one shape and dtype are the rows of one :class:`~torch.nn.Parameter`, a *table* ``[capacity, *shape]``.
    Optimizers, DDP, FSDP2 and ``clip_grad_norm_`` see tables. One differentiable call gathers thousands of names. Names
    come and go while the model trains, and a table that grows stays the same Parameter. The class has the methods of
    :class:`pdrs.ParameterDict`; ``docs/stacked/differences.md`` lists the differences.

    Parameters
    ----------
    parameters
        The first entries: a mapping from ``str`` to tensors, or pairs. See :meth:`update`. The tensors are copied.

    Notes
    -----
    Costs are amortised; *n* is the number of entries, *m* the number of names in a call. A sparse gradient is sorted
    once when a name is removed, or inserted into a freed row. After that, its values for a row are found in **O(log)**
    of its rows.
    Several threads may call methods; a lock makes them take turns. ``backward``, optimizers and operations on tables
    take no lock. Methods that read (``gather``, ``sd[name]``, saving) may run beside these. Methods that change names,
    sizes or devices must not: torch could use freed memory, and the process may end. Let one thread do both, or use a
    lock of your own.

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
    >>> sd.attach_optimizer(optimizer)                                # its state now follows the names
    >>> sd.gather(["right", "up", "right"], missing="insert").sum().backward()
    >>> optimizer.step()
    >>> sd.pop("left").tolist()
    [0.0, 0.0]

    """

    if TYPE_CHECKING:  # Not at run time: torch.jit.script would read these, and fail.
        # Names, and which row of which table each has; the number of a table is its place in `_tables`.
        _index: RowIndex
        _tables: list[Table]
        _optimizers: list[weakref.ref[Optimizer]]
        _lock: Lock
        # The patterns of names whose tables have options of their own; the group of the first is 1.
        _patterns: tuple[str, ...]
        # The names as they were last packed, and what was counted then: kept, because models are saved again and again,
        # and because to compare bytes is the fastest way to find out that what is loaded has the same names.
        # Distributed checkpoints are loaded into the tensors of a state dict in place: torch counts what is written to
        # them.
        _packed: tuple[Tensor, int, int, int, Header] | None
        # Packed names of someone else's that were found to be the same, and what was counted then.
        _same: tuple[weakref.ref[Tensor], int, int, int, Header] | None
        # What `load_state_dict` has taken the names from, until it is done.
        _taken: Tensor | None
        # Texts beside the tensors of the file that it was opened from. They are no part of its state.
        metadata: dict[str, str]

    def __init__(self, parameters: Any = None) -> None:
        super().__init__()
        self.__dict__.update(
            _index=RowIndex(),
            _tables=[],
            _optimizers=[],
            _lock=Lock(),
            _patterns=(),
            _packed=None,
            _same=None,
            _taken=None,
            metadata={},
        )
        if parameters is not None:
            self.update(parameters)

    # -- other ways to make one ----------------------------------------------------------------------------------------

    @classmethod
    def from_tensor(cls, names: Names, values: Tensor, *, requires_grad: bool | None = None) -> StackedParameterDict:
        """Make a dictionary of many names of one shape, with a given tensor as its table. **O(n)**; copies no row.

        Parameters
        ----------
        names
            Distinct names.
        values
            ``[len(names), *shape]``. A Parameter becomes the table itself. Of another tensor, the table shares
            the memory until it grows or is compacted.
        requires_grad
            Whether the table requires gradients. The default is True, or the flag of a Parameter.

        Raises
        ------
        TypeError
            If ``values`` is not a strided tensor.
        ValueError
            If a name is listed twice, if the numbers of names and rows differ, or if rows share memory (``expand``,
            ``unfold``).
        KeyError
            If a name is empty.
        RuntimeError
            If the values are integers or bool and ``requires_grad`` is not False. These cannot require gradients.

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
        index = RowIndex.of_one_table(names)
        if values.dim() == 0 or len(index) != len(values):
            size = "a single number" if values.dim() == 0 else f"{len(values)} rows"
            raise ValueError(f"expected a row for each name and no name twice, got {len(index)} names and {size}")
        if requires_grad or (requires_grad is None and not isinstance(values, Parameter)):
            _insert.refuse_integers(values.dtype, "pass requires_grad=False")
        parameter = (
            values if isinstance(values, Parameter) else Parameter(values, requires_grad=requires_grad is not False)
        )
        if requires_grad is not None:
            parameter.requires_grad_(requires_grad)
        made = cls()
        kind = Kind(tuple(values.shape[1:]), values.dtype, parameter.requires_grad)
        store.add_table(made, kind.attribute(), parameter, 0)
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
        """Make a dictionary from names and shapes. **O(n)**; the values are made in place.

        Parameters
        ----------
        shapes
            The shape of each name. Their order is kept.
        dtype, device
            The dtype and device of all tables. The defaults are those of torch.
        init
            Writes the initial values in place, as functions of ``torch.nn.init`` do. It is called once for each table,
            with a tensor ``[names, *shape]`` of zeros. Without it, values are zeros.

        Raises
        ------
        KeyError
            If a name is empty.
        TypeError
            If a shape is not a sequence.
        RuntimeError
            If ``dtype`` is one of integers or bool. These cannot require gradients.
        ValueError
            If ``init`` returned values instead of writing them.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_shapes({"a": (2,), "b": (3, 4), "c": (2,)}, init=torch.nn.init.ones_)
        >>> sd["b"].shape, list(sd)
        (torch.Size([3, 4]), ['a', 'b', 'c'])

        """
        return _shapes.of_shapes(cls(), shapes, dtype, device, init)

    @classmethod
    def fromkeys(cls, keys: Names, default: Tensor) -> StackedParameterDict:
        """Make a dictionary in which each of ``keys`` has its own row, a copy of ``default``. **O(m)**.

        Raises TypeError if ``default`` is not a tensor. Integers and bool cannot require gradients: they raise
        RuntimeError unless ``default`` is a Parameter with ``requires_grad=False``.
        """
        if not isinstance(default, Tensor):
            raise TypeError(f"expected a tensor as default, got {type(default).__name__}")
        names = list(dict.fromkeys(as_list(keys)))
        trainable = default.requires_grad if isinstance(default, Parameter) else True
        if trainable:
            _insert.refuse_integers(default.dtype, "pass torch.nn.Parameter(default, requires_grad=False)")
        return cls.from_tensor(
            names, default.detach().expand(len(names), *default.shape).clone(), requires_grad=trainable
        )

    # -- one entry -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Tensor:
        """Return the row of ``key``: a differentiable view of the table, writable under ``torch.no_grad()``. **O(1)**.

        The view does not follow later changes. Look it up again after the table grew, moved or was compacted, or after
        a removal while a state dict is kept.

        Raises
        ------
        KeyError
            If ``key`` is missing. The error is a :class:`pdrs.MissingEntryError`, which is also an AttributeError.
        TypeError
            If ``key`` is not a ``str``.
        """
        with self._lock:
            try:
                return self._row_of(key)
            except KeyError:
                raise MissingEntryError(key) from None

    def _row_of(self, key: str) -> Tensor:
        refuse_symbolic_trace()
        index = self.__dict__["_index"]
        version = index.moves
        place = index.find(key)
        if place is None:
            raise KeyError(key)
        try:
            row = parameter_of(self, self._tables[place[0]])[place[1]]
        except IndexError:
            if self.__dict__["_index"].moves == version:
                raise
        # Else a finalizer has moved rows on this very thread, after the row was looked up.
        return row if self.__dict__["_index"].moves == version else self._row_of(key)

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Copy a tensor into the row of ``key``. A new key goes to the end, an old one keeps its place. **O(1)**.

        A tensor of another shape, or a Parameter with another ``requires_grad``, moves the key to another table. The
        key then loses its optimizer state, its gradient and its gradient mask. A refused value changes nothing.

        Raises
        ------
        KeyError
            If ``key`` is empty.
        TypeError
            If ``key`` is not a ``str``, if ``value`` is not a tensor, or if its dtype is not that of the entry.
        ValueError
            If ``value`` is on another device than its table.
        RuntimeError
            If an optimizer that is not attached has stepped on the table, and the table must grow or use an old row
            again. Also if ``value`` has integers or bool and is not a Parameter with
            ``requires_grad=False``.
        """
        with self._lock:
            group = (_groups.groups_of(self._patterns, as_list([key])) or [0])[0] if self._patterns else 0
            if is_intercepted() or (FSDP2 in modules and gathered(self)) or not set_entry_row(self, key, value, group):
                with self._lock.change():
                    _insert.insert_values(self, [key], [value], distinct=True)

    def __delitem__(self, key: str) -> None:
        """Remove ``key``. The other entries keep their order. Raises KeyError if ``key`` is missing. **O(1)**."""
        with self._lock.change():
            _insert.remove_entry(self, key)

    def __contains__(self, key: object) -> bool:
        """Return whether ``key`` is the key of an entry. **O(1)**."""
        return key in self._index

    @overload
    def get(self, key: str, default: None = None) -> Tensor | None: ...
    @overload
    def get(self, key: str, default: _T) -> Tensor | _T: ...
    def get(self, key: str, default: Any = None) -> Any:
        """Return the row of ``key``, or ``default`` if ``key`` is missing. **O(1)**."""
        with self._lock:
            try:
                return self._row_of(key)
            except KeyError:
                return default

    def setdefault(self, key: str, default: Any = None) -> Tensor:
        """Return the row of ``key``. If ``key`` is missing, first set it to ``default``. **O(1)**."""
        with self._lock:
            if key not in self._index:
                self[key] = default
            return self[key]

    @overload
    def pop(self, key: str, /) -> Tensor: ...
    @overload
    def pop(self, key: str, default: _T, /) -> Tensor | _T: ...
    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return a copy of its row. If ``key`` is missing, return ``default`` if given. **O(1)**.

        The other entries keep their order. The row, its gradient and its state in attached optimizers become zero.
        Without a default, a missing key raises :class:`pdrs.MissingEntryError`. To remove many names, :meth:`drop` is
        several times faster.
        """
        if len(default) > 1:
            raise TypeError(f"pop expected at most 2 arguments, got {1 + len(default)}")
        popped = pop_entry_row(room.poppable(self), key)
        if popped is not None:
            return popped
        if default:
            return default[0]
        raise MissingEntryError(key)

    def popitem(self, last: bool = True) -> tuple[str, Tensor]:
        """Remove the last (or the first) entry and return its key and a copy of its row. **O(1)** at both ends.

        Raises KeyError if the dictionary is empty, and TypeError if ``last`` is not a bool.
        """
        popped = pop_end_entry_row(room.poppable(self), _insert.as_last(last))
        if popped is None:
            raise KeyError("popitem(): dictionary is empty")
        return popped

    # For native code, where it has something unusual before it.

    def _make_ready(self, number: int, row: int) -> bool:
        return room.make_ready(self, number, row)

    def _copy_of_row(self, number: int, row: int) -> Tensor:
        return whole(parameter_of(self, self._tables[number]).detach()[row]).clone()

    def _clearing(self, number: int, row: int) -> Changes:
        changes = Changes()
        room.clear_rows(self, changes, self._tables[number], np.array([row]))
        return changes

    def _states_of_zeros(self, parameter: Tensor) -> list[dict[str, Any]] | None:
        return optimizer_state.states_of_zeros(self._optimizers, parameter)

    # -- all entries ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of entries. **O(1)**."""
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in order. **O(1)** per step; RuntimeError if entries come or go meanwhile."""
        return iter(self._index)

    def __reversed__(self) -> Iterator[str]:
        """Iterate over the keys from the last to the first. **O(1)** per step."""
        return reversed(self._index)

    @overload
    def keys(self) -> KeysView[str]: ...
    @overload
    def keys(self, *, prefix: str) -> list[str]: ...
    def keys(self, *, prefix: str | None = None) -> KeysView[str] | list[str]:
        """Return a view of the keys: ordered, reversible, with set operations. **O(1)**.

        With ``prefix``, return a list of the keys that begin with it, in order. **O(n)**.
        """
        return NamesView(self._index) if prefix is None else self._index.with_prefix(prefix)

    def values(self) -> RowsView:
        """Return a view of the rows: ordered, reversible. **O(1)**; ``in`` is **O(n)** and compares by identity."""
        return RowsView(self)

    def items(self) -> ItemsView:
        """Return a view of the pairs of key and row: ordered, reversible. **O(1)**; ``in`` compares by identity."""
        return ItemsView(self)

    def update(self, parameters: Any) -> None:
        """Set many entries, all or none. **O(m)** for ``m`` entries.

        Parameters
        ----------
        parameters
            A mapping from ``str`` to tensors, or an iterable of pairs. An ``OrderedDict``, a dictionary of parameters
            and pairs keep their order. Other mappings, such as a plain ``dict``, are sorted by key, as in torch.

        Raises
        ------
        TypeError, ValueError, KeyError, RuntimeError
            If ``parameters`` or one of its entries is refused. Then no entry has been set.
        """
        if not isinstance(parameters, Iterable):
            raise TypeError(
                "StackedParameterDict.update should be called with an iterable of key/value pairs, but got "
                f"{type(parameters).__name__}"
            )
        if isinstance(parameters, StackedParameterDict):
            names, values = parameters._detached()
        else:
            names, values = sources.columns(parameters, "StackedParameterDict")
        with self._lock.change():
            _insert.insert_values(self, names, values, distinct=isinstance(parameters, Mapping | StackedParameterDict))

    def clear(self) -> None:
        """Remove all entries. The tables keep their capacity. **O(n)**."""
        with self._lock.change():
            _insert.remove(self, self._index.plan_clear())

    def copy(self) -> StackedParameterDict:
        """Return a dictionary with the same names and copies of the tables, without gradients. **O(n)**."""
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

    # -- many entries in one call --------------------------------------------------------------------------------------
    # Each is documented where it is written.

    lookup = _gather.lookup
    isin = _gather.isin
    indices = _gather.indices
    names_of = _gather.names_of
    gather = _gather.gather
    gather_bag = _bags.gather_bag
    scatter = _gather.scatter
    insert = _insert.insert
    select = _insert.select
    drop = _insert.drop
    retain = _insert.retain
    rename = _insert.rename
    move_to_end = _insert.move_to_end

    # -- tables --------------------------------------------------------------------------------------------------------

    table = _layout.table
    tables = _layout.tables
    reserve = _layout.reserve
    compact = _layout.compact

    # torch.jit.script compiles other properties.
    __jit_unused_properties__ = ("nbytes", "layout_version")

    @property
    def nbytes(self) -> int:
        """The bytes of all tables, including free rows. **O(tables)**."""
        return sum(parameter_of(self, table).nbytes for table in self._tables)

    @property
    def layout_version(self) -> int:
        """A number that changes when a name gets another row or loses its row. **O(1)**.

        New names do not change it. While it stays the same, row numbers from :meth:`indices` stay valid. So does a
        tensor that you keep beside a table, with one element per row.
        """
        return self._index.moves

    # -- training ------------------------------------------------------------------------------------------------------

    attach_optimizer = _attached.attach_optimizer
    detach_optimizer = _attached.detach_optimizer
    param_groups = _groups.param_groups
    named_grads = _train.named_grads
    norms = _train.norms
    freeze = _train.freeze
    unfreeze = _train.unfreeze

    # -- as a Module, and as other objects ----------------------------------------------------------------------------

    def unstack(self) -> ParameterDict:
        """Return a ParameterDict with the same names. Each entry is a Parameter with a copy of the row. **O(n)**.

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
                parameter = parameter_of(self, table)
                # In C order, which the table of `from_tensor` need not have.
                data = whole(parameter.detach()).clone(memory_format=torch.contiguous_format)
                count, shape, numel = len(parameter), list(parameter.shape[1:]), parameter[:1].numel()
                if data.device.type in ("cpu", "cuda") and type(data) is Tensor and numel:
                    offsets = list(range(0, count * numel, numel))
                    tables.append(slab_views(data, offsets, [shape] * count, requires_grad=parameter.requires_grad))
                else:
                    rows = (row.clone() for row in data.unbind())  # In one storage they would be taken for tied.
                    tables.append([Parameter(row, requires_grad=parameter.requires_grad) for row in rows])
            return ParameterDict([(name, tables[number][row]) for name, number, row in self._index.entries()])

    def _detached(self) -> tuple[list[str], list[Tensor]]:
        """Return the names and the rows, detached; those of tables without gradients as such Parameters."""
        with self._lock.read():
            tables = []
            for table in self._tables:
                parameter = parameter_of(self, table)
                rows = room.lent_whole(self, table).unbind()
                if not parameter.requires_grad:
                    rows = tuple(Parameter(row, requires_grad=False) for row in rows)
                tables.append(rows)
            return self._index.names(), [tables[number][row] for _, number, row in self._index.entries()]

    def extra_repr(self) -> str:
        """Return one line for each table, and the names. Of many names, only the first and last are shown."""
        return _views.described(self)

    @untraced
    def _apply(self, fn: Any, recurse: bool = True) -> StackedParameterDict:
        """Move or convert the tables: where ``fn`` is one of torch's own, all or, if there is an error, none."""
        with self._lock.change():
            move = recognise(fn)
            masks = [] if move is None else store.moved_masks(self, move.target)
            if not run.apply(self, fn, recurse):
                with store.swappable(self):
                    super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for table, mask in masks:
                table.frozen = mask
            store.adopt(self)
        return self

    def pin_memory(self) -> StackedParameterDict:
        """Put the tables on the CPU, and their gradients, into page-locked memory of exactly their size. **O(n)**.

        Copies from there to a CUDA device need no staging. A table that grows is no longer page-locked.

        Raises
        ------
        RuntimeError
            If there is no CUDA device, or too little memory can be locked. Then nothing has changed.
        """
        with self._lock.change():
            run.pin_memory(self)
        return self

    # -- state dicts, pickles ------------------------------------------------------------------------------------------

    def named_state_dict(self) -> dict[str, Tensor]:
        """Return a dict of names and rows, like the ``state_dict`` of a ParameterDict. **O(n)**.

        The rows are detached views of the tables. If a table is sharded, they are copies, and all processes must call
        this. ParameterDict (of torch and of pdrs) and StackedParameterDict load the result.
        """
        with self._lock.read():
            tables = [room.lent_whole(self, table).unbind() for table in self._tables]
            return {name: tables[number][row] for name, number, row in self._index.entries()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Tables and names, as they are at one time.
        with self._lock.read():
            for number in range(len(self._tables)):
                room.clear_free(self, number)
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for table in self._tables:
                saved = destination.get(prefix + table.attribute)
                if not keep_vars and isinstance(saved, Tensor):
                    room.lend(self, table, saved)

    def get_extra_state(self) -> Tensor:
        """Return the names, their rows and the facts about the tables, as uint8 ``[bytes]``. **O(n)**."""
        return _states.names_as_packed(self)

    def set_extra_state(self, state: Any) -> None:
        """Take the names and rows, and make, remove and resize tables. **O(n)**; nearly free if they are the same."""
        _states.take_packed(self, state)

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as torch does. That of a ParameterDict loads much faster if it fits and has no hooks."""
        own = type(self)._load_from_state_dict is StackedParameterDict._load_from_state_dict
        if own and not assign and not torch.compiler.is_compiling():
            with self._lock.change():
                if _states.load_whole(self, state_dict):
                    _states.note_load(self)
                    return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

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
        problems = missing_keys, unexpected_keys, error_msgs
        _states.load(self, super()._load_from_state_dict, state_dict, prefix, local_metadata, strict, *problems)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, the optimizers, which hold the Parameters of this very object, and what is remembered."""
        with self._lock:
            state = self.__dict__.copy()
        for key in ("_lock", "_warned_of_absent", "_warned_of_ranks", "_in_ddp", "_averages", "_is_average"):
            state.pop(key, None)
        tables = [table.to_plain() for table in self._tables]
        return state | {"_optimizers": [], "_tables": tables, "_packed": None, "_same": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what ``pickle`` writes: names and tables as they are at one time, whatever other threads do."""
        with self._lock.read():
            for number in range(len(self._tables)):
                room.clear_free(self, number)
            reduced = super().__reduce_ex__(protocol)
            state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
            if not isinstance(state, dict) or state.get("_index") is not self._index:
                return reduced
            # The last is asked when all others have been written.
            state = state | {"_index": self._index.copy(), "_lent": _states.LentTables(self)}
            return (*reduced[:2], state, *reduced[3:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled or copied."""
        super().__setstate__({key: value for key, value in state.items() if key != "_lent"})  # type: ignore[no-untyped-call]
        # Frameworks rebuild modules from their own `__dict__`, too.
        tables = [one if isinstance(one, Table) else Table.from_plain(one) for one in state["_tables"]]
        self.__dict__.update(_tables=tables, _lock=Lock())
        for number, table in enumerate(tables):
            if self._index.used(number) > len(parameter_of(self, table)):
                raise ValueError(f"the table '{table.attribute}' has fewer rows than the names that were pickled")
        store.adopt(self)


def _may_overlap(rows: Tensor) -> bool:
    """Whether two elements may have the same place: those along a dimension lie within one step along the next."""
    reach = 0
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return rows.numel() > 0
            reach += stride * (size - 1)
    return False
