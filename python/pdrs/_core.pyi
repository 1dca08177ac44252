"""The native part of pdrs."""

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, final, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter
from typing_extensions import Self, disjoint_base

__all__ = [
    "EntryIterator",
    "EntryKeys",
    "Headers",
    "IndexMap",
    "KeyIterator",
    "KnownRows",
    "Lock",
    "NameIterator",
    "Places",
    "Request",
    "RowIndex",
    "RowIterator",
    "RowPlan",
    "RowRule",
    "RowStep",
    "SafetensorsHeader",
    "SafetensorsStack",
    "ShardIndex",
    "Stay",
    "TensorGroup",
    "all_kept",
    "answer_asked",
    "apply_names",
    "are_functions_own",
    "asked_bytes",
    "asked_names",
    "can_take_over",
    "changed_rows",
    "check_words",
    "clear_entries",
    "collect_parameters",
    "complete_move",
    "copy_rows",
    "crc32",
    "delete_entry",
    "diff_names",
    "get_entry",
    "group_tensors",
    "hash_names",
    "in_one_step",
    "in_step",
    "insert_all",
    "is_own",
    "load_matching",
    "map_over",
    "names_by_bucket",
    "names_without_words",
    "not_copied_yet",
    "pack_names",
    "place_copies",
    "pop_end",
    "pop_end_entry_row",
    "pop_entry",
    "pop_entry_row",
    "prepare",
    "reorder_names",
    "safetensors_entries",
    "safetensors_shards",
    "save_parameters",
    "searchable_size",
    "set_entry",
    "set_entry_row",
    "shard_lines",
    "slab_views",
    "sort_tensors",
    "sum_repeated_rows",
    "take_over",
    "unexpected_keys",
    "unpack_header",
    "unpack_names",
    "unzip",
    "use_huge_pages",
    "use_native_slots",
    "walk_modules",
    "watch_functions",
    "words_behind",
    "write_row_steps",
    "zero_row",
    "zero_row_of_state",
    "zero_rows",
]

_T = TypeVar("_T")
_Door = Literal["from_blob", "dlpack"]

class _Keyed(Protocol):
    def keys(self) -> Iterable[str]: ...
    def __getitem__(self, name: str, /) -> int: ...

_Entries = Mapping[str, int] | _Keyed | Iterable[tuple[str, int]]

@disjoint_base
class IndexMap:
    """An ordered map from names to row numbers that pops anywhere in O(1).

    Names are ``str``. Row numbers are integers from 0 to 2**63 - 1, such as the row of a table that belongs to the
    name. The map has every method of a dict, and methods that handle many names in one call. It keeps the
    characters of its names, and no ``str`` objects: what it returns are equal ones. Several threads may use it at once.
    Costs are amortised; *n* is the number of names.

    Parameters
    ----------
    entries
        A mapping of names to row numbers, or an iterable of pairs. Their order is kept.
    **rows
        More names and their row numbers, as a dict takes them.

    Raises
    ------
    TypeError
        If a name is not a ``str``. A ``str`` of a subclass counts as its characters.
    ValueError
        If a row number is negative.

    Examples
    --------
    >>> import pdrs
    >>> index = pdrs.IndexMap.from_names(["a", "b", "c"])
    >>> index["b"], index.popitem(last=False), list(index)
    (1, ('a', 0), ['b', 'c'])
    >>> index.indices(["c", "b", "c"])
    array([2, 1, 2])

    """

    def __new__(cls, entries: _Entries | None = None, /, **rows: int) -> Self: ...
    def __init__(self, entries: _Entries | None = None, /, **rows: int) -> None: ...
    @classmethod
    def fromkeys(cls, names: Iterable[str], row: int = 0, /) -> Self:
        """Make an IndexMap of many names with the same row. **O(n)**."""
    @classmethod
    def from_names(cls, names: Iterable[str], rows: NDArray[np.int64] | None = None) -> Self:
        """Make an IndexMap of many names at once. **O(n)**, several times faster than ``dict(zip(names, range(n)))``.

        Parameters
        ----------
        names
            A list, array, column of another library or other iterable of ``str``. If a name is listed twice, its first
            place counts.
        rows
            The row numbers, int64 of shape ``[len(names)]``. Without them, the first name gets 0, the next new name
            1, and so on. If a name is listed twice, its last row number counts.
        """
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> int: ...
    def __setitem__(self, name: str, row: int, /) -> None: ...
    def __delitem__(self, name: str, /) -> None: ...
    def __iter__(self) -> Iterator[str]: ...
    def __reversed__(self) -> Iterator[str]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __or__(self, other: Mapping[str, int], /) -> Self: ...
    def __ror__(self, other: Mapping[str, int], /) -> Self: ...
    def __ior__(self, other: _Entries, /) -> Self: ...
    def __copy__(self) -> Self: ...
    def __deepcopy__(self, memo: object, /) -> Self: ...
    def __getstate__(self) -> tuple[Any, ...]: ...
    def __setstate__(self, state: tuple[Any, ...], /) -> None: ...
    def keys(self) -> KeysView[str]:
        """Return a view of the names: ordered, reversible, with set operations. **O(1)**."""
    def values(self) -> ValuesView[int]:
        """Return a view of the row numbers in the order of the names. **O(1)**."""
    def items(self) -> ItemsView[str, int]:
        """Return a view of the pairs of name and row number, in order. **O(1)**."""
    @overload
    def get(self, name: str, default: None = None) -> int | None:
        """Return the row number of ``name``, or ``default`` if the name is missing. **O(1)**."""
    @overload
    def get(self, name: str, default: _T) -> int | _T: ...
    def setdefault(self, name: str, default: int | None = None) -> int:
        """Return the row number of ``name``. If the name is missing, first set it to ``default``. **O(1)**."""
    @overload
    def pop(self, name: str, /) -> int:
        """Remove ``name`` and return its row number. The other names keep their order. **O(1)**.

        If the name is missing, return the default, or raise KeyError if none is given.
        """
    @overload
    def pop(self, name: str, default: _T, /) -> int | _T: ...
    def popitem(self, last: bool = True) -> tuple[str, int]:
        """Remove the last (or the first) name and return it with its row number. **O(1)** at both ends.

        Raises KeyError if the map is empty.
        """
    def move_to_end(self, name: str, last: bool = True) -> None:
        """Move ``name`` to the end (or to the beginning). **O(1)**. Raises KeyError if it is missing."""
    def clear(self) -> None:
        """Remove all names, and count rows from 0 again. **O(n)**."""
    def update(self, entries: _Entries | None = None, /, **rows: int) -> None:
        """Set many row numbers, all or none. New names go to the end, in order. **O(m)** for ``m`` entries.

        Takes what a dict takes: a mapping, an object with ``keys`` and ``__getitem__``, or pairs, and ``name=row``.
        """
    def select(self, mask: Tensor | NDArray[np.bool_] | Sequence[bool]) -> list[str]:
        """Return the names, in order, for which a mask is true. **O(n)**.

        Parameters
        ----------
        mask
            bool ``[n]``: an array, a tensor, a column of another library, or a list.

        Raises
        ------
        TypeError
            If the mask has values that are not bool.
        ValueError
            If the mask has another length.

        Examples
        --------
        >>> import pdrs
        >>> index = pdrs.IndexMap({"a": 3, "b": 0, "c": 5})
        >>> index.select(index.indices() > 1)
        ['a', 'c']

        """
    def extend(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Add new names at the end, and return the row numbers of all names. **O(m)** for ``m`` names.

        A new name gets the next row number: one more than the largest since the map was made or cleared.

        Parameters
        ----------
        names
            A list, array, column of another library or other iterable of ``str``.

        Returns
        -------
        numpy.ndarray
            int64 of shape ``[len(names)]``: the row numbers of new and old names, in the order of ``names``.
        """
    def indices(self, names: Iterable[str] = ..., *, missing: Literal["error"] | int = "error") -> NDArray[np.int64]:
        """Return the row numbers of many names. **O(m)** for ``m`` names, several times faster than ``m`` look-ups.

        Parameters
        ----------
        names
            A list, array, column of another library or other iterable of ``str``. Repeated names are fine. By default
            all names of the map, in order.
        missing
            ``"error"``, or the number to return for a missing name.

        Returns
        -------
        numpy.ndarray
            int64 of shape ``[len(names)]``. ``torch.from_numpy`` makes a tensor of it without a copy.

        Raises
        ------
        KeyError
            If names are missing and ``missing`` is ``"error"``. The message counts them and lists some.
        ValueError
            If ``missing`` is another text.
        """
    def copy(self) -> Self:
        """Return a map with the same names and row numbers, in the same order. **O(n)**; no name is hashed."""
    def _iterate(self, yields: int, reversed: bool) -> Iterator[Any]: ...

@final
class NameIterator(Iterator[Any]):
    def __iter__(self) -> NameIterator: ...
    def __next__(self) -> Any: ...

@final
class EntryKeys:
    def __new__(cls, names: Iterable[str] | None = None) -> EntryKeys: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __setitem__(self, name: str, _value: object, /) -> None: ...
    def __delitem__(self, name: str, /) -> None: ...
    def __iter__(self) -> Iterator[str]: ...
    def __reversed__(self) -> Iterator[str]: ...
    def __copy__(self) -> EntryKeys: ...
    def __deepcopy__(self, _memo: object, /) -> EntryKeys: ...
    def keys(self) -> KeysView[str]: ...
    def popitem(self) -> tuple[str, None]: ...
    def discard(self, name: str) -> None: ...
    def copy(self) -> EntryKeys: ...
    @property
    def _fingerprint(self) -> str: ...

@final
class KeyIterator(Iterator[str]):
    def __iter__(self) -> KeyIterator: ...
    def __next__(self) -> str: ...

@final
class EntryIterator(Iterator[Any]):
    def __new__(
        cls,
        module: Module,
        keys: EntryKeys,
        parameters: dict[str, Any],
        yields: Literal["values", "items"],
        reversed: bool,
    ) -> EntryIterator: ...
    def __iter__(self) -> EntryIterator: ...
    def __next__(self) -> Any: ...

@final
class TensorGroup:
    """Tensors of one dtype and device, and the place of each in one *slab*: a contiguous tensor that holds them all.

    Made by ``group_tensors``. It knows where the tensors lay when it was made. It keeps the tensors alive, but not
    their memory. So it must be used before one of them is moved (by ``tensor.data = ...``, ``resize_``, ``set_``), also
    on another thread. Positions and lengths count elements of the slab, so they hold for a slab of any dtype. *n* is
    the number of tensors; every method takes **O(n)** time at most.

    Attributes
    ----------
    indices
        int64 of shape ``[n]``: which tensors of the list these are, ascending.
    offsets
        int64 of shape ``[n]``: at which element of the slab each begins. A tensor that is listed twice has one place.
        Each place begins at a multiple of 16 to 64 bytes, so that none lies on more cache lines than it must.
    length
        The number of elements of the slab: those of the tensors, and gaps for alignment.
    largest
        The bytes of the largest of the tensors.
    dtype, device
        Of the tensors.
    overlapping
        Whether different tensors share memory. They get places of their own.

    Examples
    --------
    ``[p.to(torch.float64) for p in parameters]`` in place, for a million of them:

    >>> import torch
    >>> from pdrs._core import complete_move, group_tensors
    >>> parameters = [torch.nn.Parameter(torch.full((2, 3), float(n))) for n in range(4)]
    >>> groups, unusual = group_tensors(parameters)
    >>> for group in groups:
    ...     slab = group.slab()
    ...     if slab is None:
    ...         slab = torch.empty(group.length, dtype=group.dtype)
    ...         group.gather(slab)
    ...     complete_move([(group, slab.to(torch.float64))])
    >>> unusual, parameters[3].dtype, parameters[3][0].tolist()
    ([], torch.float64, [3.0, 3.0, 3.0])

    """

    @property
    def indices(self) -> NDArray[np.int64]: ...
    @property
    def offsets(self) -> NDArray[np.int64]: ...
    @property
    def length(self) -> int: ...
    @property
    def largest(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def overlapping(self) -> bool: ...
    def __len__(self) -> int: ...
    def gather(self, out: Tensor, start: int = 0) -> None:
        """Copy a part of the slab together: from element ``start`` on, as much as ``out`` holds.

        The GIL is released meanwhile. Large work is shared by as many threads as torch may use. Gaps become zeros.

        Parameters
        ----------
        out
            A contiguous tensor on the CPU, of the group's dtype, that shares no memory with the tensors.
        start
            Where the part begins.

        Raises
        ------
        TypeError
            If ``out`` is no tensor.
        ValueError
            If it is not as described, or reaches beyond the slab. Nothing has been changed.
        """
    def scatter(self, block: Tensor, start: int = 0) -> None:
        """Copy a part of the slab back into the tensors: what ``gather`` does, the other way round.

        The tensors change behind autograd's back, as under ``torch.no_grad()``; their versions are counted up, so that
        a backward pass that needs the old values raises. Tensors that overlap are written one after another.

        Raises
        ------
        TypeError
            If ``block`` is no tensor.
        ValueError
            As for ``gather``, and if a tensor is expanded (several of its elements share memory) or was made in
            inference mode. Nothing has been changed.
        """
    def views(self, slab: Tensor, *, detached: bool = False, door: _Door | None = None) -> list[Tensor]:
        """Return new tensors that are views of ``slab``: of the classes and with the ``requires_grad`` of the old ones.

        Parameters
        ----------
        slab, door
            As for :func:`slab_views`, of ``length`` elements or more. If its dtype cannot have gradients, none of the
            new tensors requires them.
        detached
            Whether to make plain tensors that do not require gradients, whatever the old ones are.

        Returns
        -------
        list
            The new tensors, in the order of ``indices``. What was one tensor before is one tensor again.
        """
    def blocks(self, block_bytes: int) -> list[tuple[int, int]]:
        """Cut the slab into blocks that are carried one at a time.

        Parameters
        ----------
        block_bytes
            The size of a block: a multiple of 64.

        Returns
        -------
        list
            ``(start, stop)``, ascending: the elements of the slab in the block. Every element of every tensor is in one
            block. Gaps at the edges are in none.
        """
    def slab(self) -> Tensor | None:
        """Return the slab as a flat tensor that shares its memory, if the tensors already lie in one.

        They must lie in one allocation, each in its place. Writing to the result is not seen by the tensors' version
        counters.
        """

def all_kept(
    parameters: list[dict[str, Any]], buffers: list[dict[str, Any]], keeps: Callable[[Tensor], bool]
) -> bool: ...
def are_functions_own(module: Module, method: int) -> bool: ...
def can_take_over(source: dict[Any, Any], parameter: type[Parameter], sorted: bool) -> bool: ...
def clear_entries(keys: EntryKeys, parameters: dict[str, Any]) -> list[str]: ...
def collect_parameters(dicts: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]: ...
def complete_move(
    slabs: list[tuple[TensorGroup, Tensor]],
    *,
    buffers: list[tuple[dict[str, Any], str, Tensor]] = ...,
    undo: list[Callable[[], None]] | None = None,
) -> None:
    """Make the data of each tensor its place in a slab, as ``tensor.data = view`` does, and set buffers.

    If something fails, nothing has been changed: whatever torch might refuse is looked at before the first tensor is
    changed. The tensors stay the same objects. Afterwards they lie elsewhere, and the groups are of no more use.

    Parameters
    ----------
    slabs
        Groups, each with its slab: as for :func:`slab_views`, of ``length`` elements or more.
    buffers
        Dictionaries, and the values that they get under a name.
    undo
        A list that is cleared when all has been done.

    Raises
    ------
    TypeError
        If a slab is no tensor.
    ValueError
        If a slab is not as described or requires gradients. If a tensor was made in inference mode, so that it cannot
        become a view of it. If a tensor requires gradients that the dtype of the slab cannot have. If this has been
        done before.
    RuntimeError
        In inference mode: views made there could never be trained.
    MemoryError
        If there is no room for the views.
    """

def get_entry(module: Module, key: object) -> Any | None: ...
def group_tensors(
    tensors: list[Any], *, keep_strides: bool = True, narrowest: int | None = None
) -> tuple[list[TensorGroup], list[tuple[int, str]]]:
    """Put tensors into groups of one dtype and device, and give each its place in the slab of its group.

    Parameters
    ----------
    tensors
        Tensors or Parameters, each any number of times.
    keep_strides
        Whether elements get the order in memory that ``tensor.to`` gives them: that of the tensor, without gaps.
        Otherwise they lie in C order, as ``torch.nn.utils.parameters_to_vector`` gives them.
    narrowest
        The size in bytes of the narrowest elements that a slab with these places will have. It is needed if they are
        narrower than the tensors' own: the places stay aligned for those.

    Returns
    -------
    groups
        In the order of their first tensors.
    unusual
        ``(index, why)`` of each tensor that must be left to torch. Such a tensor is of a subclass, a conjugate or
        negative view, or of a dtype that DLPack does not know. Or it has no plain memory: it is sparse, quantized,
        meta, fake, or inside a function transform.

    Raises
    ------
    TypeError
        If something in the list is no tensor.
    RuntimeError
        If this torch does not offer what is needed.

    Cost: **O(n)**, about a fifth of what ``torch.cat`` takes for small tensors.
    """

def in_step(keys: EntryKeys, parameters: dict[str, Any]) -> bool: ...
def insert_all(keys: EntryKeys, parameters: dict[str, Any], names: list[str], values: list[Any]) -> None: ...
def is_own(module: Module, method: int) -> bool: ...
def load_matching(
    parameters: dict[str, Any], state: dict[str, Any], prefix: str, largest: int, whole: bool
) -> tuple[list[str], int]: ...
def not_copied_yet(parameters: dict[str, Any], memo: dict[int, Any]) -> list[Any]: ...
def place_copies(
    target: dict[str, Any], parameters: dict[str, Any], originals: list[Any], copies: list[Any], memo: dict[int, Any]
) -> list[str]: ...
def pop_end(module: Module, last: bool) -> tuple[str, Any] | None: ...
def pop_entry(module: Module, key: object) -> Any | None: ...
def prepare(names: list[Any], values: list[Any], parameter: type[Parameter], tensor: type[Tensor]) -> list[int]: ...
def save_parameters(
    parameters: dict[str, Any], destination: dict[str, Any], prefix: str, parameter: type[Parameter]
) -> None: ...
def set_entry(module: Module, key: object, value: object, parameter: type[Parameter]) -> bool: ...
def slab_views(
    slab: Tensor,
    offsets: NDArray[np.int64] | list[int],
    shapes: list[Any],
    *,
    requires_grad: bool | None = None,
    door: _Door | None = None,
) -> list[Tensor]:
    """Return new tensors that are contiguous views of ``slab``.

    Parameters
    ----------
    slab
        A contiguous tensor of any dtype, on the CPU or a CUDA device. The views keep it alive; it must not be resized.
    door
        How views are made; by default ``"from_blob"`` (torch 2.14 and later) or ``"dlpack"``. Each view has a storage
        of its own over the memory of the slab. So nothing takes it for tied to another, and ``torch.save`` of one
        writes its own bytes only. ``record_stream`` of such a tensor does nothing; all streams of a CUDA device are
        recorded for the slab instead.
    offsets
        At which element of the slab each begins.
    shapes
        A tuple, list or ``torch.Size`` for each.
    requires_grad
        Makes Parameters, which require gradients or do not; without it, plain tensors.

    Raises
    ------
    TypeError
        If ``slab`` is no tensor.
    ValueError
        If a view would reach beyond the slab, or the slab is not as described.
    RuntimeError
        In inference mode: views made there could never be trained.
    """

def take_over(keys: EntryKeys, parameters: dict[str, Any], source: dict[str, Any]) -> None: ...
def unexpected_keys(
    state: Iterable[str],
    prefix: str,
    local: tuple[dict[str, Any], dict[str, Any]],
    modules: Mapping[str, Any],
    extra_state: str,
) -> list[str]: ...
def unzip(pairs: list[Any]) -> tuple[list[Any], list[Any]] | None: ...
def use_native_slots(class_: type[Module], parameter: type[Parameter]) -> None: ...
def walk_modules(
    modules: list[Module], usual_applies: tuple[Any, ...] | None = None
) -> tuple[list[Module], list[Module], list[dict[str, Any]], list[tuple[Module, dict[str, Any]]]]: ...
def watch_functions(
    methods: list[str], in_instances: list[list[str]], look: Callable[[type], int], hooks: dict[int, Any]
) -> None: ...

@final
class Lock:
    """A lock that its holder may take again; native code takes it without a detour through Python."""

    def __new__(cls) -> Lock: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self, class_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
    def change(self) -> Stay:
        """Return a context to plan and make a change in: an error in another one on the same thread."""
    def read(self) -> Stay:
        """Return a context to read things in that belong together: a change on the same thread is an error then."""
    @staticmethod
    def before_fork() -> None: ...
    @staticmethod
    def after_fork_in_parent() -> None: ...
    @staticmethod
    def after_fork_in_child() -> None:
        """Give back what is held by threads that this process has not, unless they were making a change."""

@final
class Stay:
    """Holds a :class:`Lock`, and lets rows stay where they are, except for what its holder does."""

    def __enter__(self) -> None: ...
    def __exit__(
        self, class_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class Places:
    """The table and the row of each of many names, in the order in which they were asked for.

    A name that is not there has -1 and -1. *m* is the number of places.
    """

    @staticmethod
    def of(tables: NDArray[np.int64], rows: NDArray[np.int64]) -> Places:
        """Make some of the numbers of tables and rows. **O(m)**.

        Raises ValueError if there are more of one than of the other, or a number is too large or negative.
        """
    @staticmethod
    def of_ids(ids: NDArray[np.uint64]) -> Places:
        """Make some of ids, as they stand in packed names. **O(m)**. Raises ValueError if one is too large."""
    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> tuple[int, int]: ...
    @property
    def tables(self) -> NDArray[np.int64]:
        """The table of each, in a new array. **O(m)**."""
    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each, in a new array. **O(m)**."""
    @property
    def ids(self) -> NDArray[np.uint64]:
        """The id of each, in a new array. **O(m)**. Raises ValueError if a name is missing."""
    def only_table(self) -> int:
        """Return the table that all lie in; -1 if there are several, if a name is missing, or if there is no place."""
    def is_complete(self) -> bool:
        """Whether no name is missing. **O(m)**."""
    def missing(self) -> NDArray[np.int64]:
        """Return the positions of the names that are missing, ascending. **O(m)**."""
    def found(self) -> Places:
        """Return the places without those that are missing. **O(m)**."""
    def by_table(self) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Return number, positions and rows for each table that names lie in, both ascending by table. **O(m)**.

        Positions ascend within a table. Missing names are left out.
        """

@final
class RowIndex:
    """Names in order, the table and the row of each, and which rows of each table are free.

    A free row is given again before a table grows, the lowest first. What changes many names is planned first: a plan
    refuses what cannot be, and reserves all memory. ``commit`` then does it in one step, and cannot fail.
    *n* is the number of names, *m* of those that are given; costs are amortised. Any number of threads may use it.
    """

    def __new__(cls) -> RowIndex: ...
    @staticmethod
    def of(names: Iterable[str], places: Places, used: Sequence[int]) -> RowIndex:
        """Make an index of names with places, and of a table for each number of rows that were ever given. **O(n)**.

        Rows below that number which no name has are free.

        Raises
        ------
        ValueError
            If a name is listed twice; if there are not as many places; or if a place is missing, outside, or another
            name's.
        KeyError
            If a name is empty.
        """
    @staticmethod
    def of_one_table(names: Iterable[str]) -> RowIndex:
        """Make an index of names of which the n-th has row n of the only table. **O(n)**.

        Raises ValueError if a name is listed twice, and KeyError if one is empty.
        """
    @staticmethod
    def of_ids(index: IndexMap, used: Sequence[int]) -> RowIndex:
        """Make an index of ids: the table in the upper bits, 40 bits for the row. **O(n)**; no name is hashed."""
    @staticmethod
    def of_bytes(packed: NDArray[np.uint8]) -> RowIndex:
        """Make an index of packed names, in memory. **O(n)**. Raises ValueError if they are damaged."""
    def sorted_by_bucket(
        self, tables: Sequence[_TableTuple], patterns: Sequence[str], buckets: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint64], list[NDArray[np.int64]]]:
        """Return the names in the order of their buckets, packed, with rows that ascend. **O(n + buckets)**.

        Also how many names each bucket has, and for each table and each row in the packed names, the row in the table.
        The numbers of used rows of ``tables`` do not matter.
        """
    @staticmethod
    def of_packed(packed: NDArray[np.uint8], error: type[Exception], path: str, origin: str) -> RowIndex | None:
        """Make an index that looks names up where they were packed, until one changes. **O(tables)**.

        None if they have no table of words. If names turn out to be damaged later, an ``error(path, message)`` is
        raised, whose message begins with ``origin``.
        """
    @staticmethod
    def joined(dictionaries: list[tuple[RowIndex, str, int, int]], singles: RowIndex | None) -> RowIndex | None:
        """Make an index that looks the names of many dictionaries up where they were packed, until one changes.

        **O(tables)**. None if one of the indices is not one of :meth:`of_packed`, if a prefix begins another, or if a
        single tensor has the name of an entry.

        Parameters
        ----------
        dictionaries
            The index of each, in order. The prefix of its names. The number of its first table among all tables. And
            how many single tensors stand immediately before it.
        singles
            The names of the tensors that are in no dictionary. Their places have the numbers among all tables.
        """
    @property
    def moves(self) -> int:
        """A number that changes when a name that was there gets another row or goes. No two indices have the same."""
    @property
    def inserts(self) -> int:
        """A number that changes when names are added, entries are set, or the order changes."""
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __reversed__(self) -> Iterator[str]: ...
    def __copy__(self) -> RowIndex: ...
    def __deepcopy__(self, memo: object, /) -> RowIndex: ...
    def find(self, name: str) -> tuple[int, int] | None:
        """Return the table and the row of a name, or None if it is not there. **O(1)**."""
    def places(self, names: Iterable[str] = ...) -> Places:
        """Return the places of names; by default of all, in order. **O(m)**, several times less than ``m`` look-ups."""
    def entries(self, *, reverse: bool = False) -> Iterator[tuple[str, int, int]]:
        """Iterate over name, table and row, in order. RuntimeError if names come or go, or their order changes.

        A row that moves meanwhile is given as it is then.
        """
    def names(self) -> list[str]:
        """Return all names in order. **O(n)**."""
    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those names that are not there, in order, each once. **O(m)**."""
    def select(self, mask: Tensor | NDArray[np.bool_] | Sequence[bool]) -> list[str]:
        """Return the names, in order, at whose places a mask is true; see ``IndexMap.select``. **O(n)**."""
    def with_prefix(self, prefix: str) -> list[str]:
        """Return the names that begin so, in order. **O(n)**."""
    def below(self, prefix: str) -> RowIndex:
        """Return an index of the names that begin so and go on, without their beginning. **O(n)**."""
    def names_of(self, table: int, rows: NDArray[np.int64]) -> list[str | None]:
        """Return the name that each of some rows of a table has now, None for a free one. **O(n + m)**.

        Raises IndexError for a row that the table has never given.
        """
    def copy(self) -> RowIndex:
        """Return another index with the same names, places and free rows. **O(n)**; no name is hashed."""
    def add_table(self) -> int:
        """Add a table without rows and return its number. **O(1)**."""
    def pop_table(self) -> None:
        """Remove the last table. **O(1)**. ValueError if it has names, or if there is none."""
    @property
    def table_count(self) -> int:
        """The number of tables. **O(1)**."""
    def used(self, table: int) -> int:
        """Return how many rows a table has given: one more than the largest. **O(1)**."""
    def count(self, table: int) -> int:
        """Return how many rows of a table belong to names. **O(1)**."""
    def free(self, table: int) -> NDArray[np.int64]:
        """Return the rows that a table has given and that belong to no name, ascending. **O(free)**."""
    def next(self, table: int, count: int) -> NDArray[np.int64]:
        """Return the rows that the next ``count`` names of a table would get. **O(count)**."""
    def reused(self, table: int, count: int) -> int:
        """Return how many of the next ``count`` rows belonged to a name before. **O(1)**."""
    def is_taken(self, table: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of some rows of a table belong to names; no row outside of it does. **O(m)**."""
    def capacity_for(self, table: int, count: int, capacity: int) -> int:
        """Return the capacity of a table of ``capacity`` when ``count`` more rows are to be given. **O(1)**."""
    def plan_insert(self, names: Iterable[str], tables: NDArray[np.int64]) -> RowPlan:
        """Plan that each of some distinct names lies in the table that is listed for it. **O(m)**.

        A name that lies there already keeps its row. Others get the next rows, in the order of the list. New names go
        to the end, in order.

        Raises
        ------
        KeyError
            If a name is empty.
        ValueError
            If a name is listed twice, or there are not as many tables.
        IndexError
            If there is no such table.
        """
    def plan_remove(self, names: Iterable[str]) -> RowPlan:
        """Plan to remove distinct names. **O(m)** if their rows ascend, otherwise **O(m log m)**.

        Raises KeyError if one is not there, or is listed twice.
        """
    def plan_clear(self) -> RowPlan:
        """Plan to remove all names. Tables keep the rows that they have given, all free then. **O(n)**."""
    def plan_places(self, places: Places, used: Sequence[int]) -> RowPlan:
        """Plan other places for all names, in order, and other numbers of rows that the tables have given. **O(n)**.

        Raises ValueError for what :meth:`of` refuses, or if there are not as many numbers as tables.
        """
    def plan_rename(self, old: str, new: str) -> RowPlan:
        """Plan another name for an entry, which keeps its row and its place in the order. **O(1)**.

        Raises KeyError if ``old`` is not there or ``new`` is empty, and ValueError if ``new`` is there.
        """
    def plan_move_to_end(self, name: str, last: bool) -> RowPlan:
        """Plan to move a name behind, or in front of, all others. **O(1)**. KeyError if it is not there."""
    def commit(self, plan: RowPlan) -> None:
        """Do what was planned. **O(m)**, or **O(n)** if the plan is one for all names.

        Raises RuntimeError if the index has changed since, or the plan is another's; nothing has changed then.
        """

@final
class RowIterator(Iterator[Any]):
    def __iter__(self) -> RowIterator: ...
    def __next__(self) -> Any: ...

@final
class RowPlan:
    """A change of a :class:`RowIndex` that has been planned, and what will come of it."""

    @property
    def places(self) -> Places:
        """Where each name will lie that was listed, or, of ``plan_places``, each name in order."""
    @property
    def new(self) -> NDArray[np.int64]:
        """Of ``plan_insert``: the positions of the names that get a new row. **O(m)**."""
    @property
    def freed(self) -> Places:
        """The rows that belong to names before, and are free afterwards."""

def in_one_step(calls: list[Callable[[], object]]) -> None:
    """Call functions written in C, in order, up to the first that fails; no signal is looked at between them."""

def map_over(memory: Any, file: int, offset: int, length: int) -> None:
    """Map bytes of a file over the beginning of anonymous private memory; the rest stays zero. Unix only."""

def pop_end_entry_row(stacked: Any, last: bool) -> tuple[str, Tensor] | None: ...
def pop_entry_row(stacked: Any, name: str) -> Tensor | None: ...
def set_entry_row(stacked: Any, name: str, value: Any, group: int) -> bool: ...
def use_huge_pages(tensor: Tensor, now: bool = False) -> None:
    """Ask Linux for huge pages for the memory of a large plain tensor on the CPU, best before it is written to.

    With ``now``, memory that was written to moves to huge pages before this returns, where Linux can do that. It takes
    as long as to copy it.
    """

def zero_row(tensors: list[Tensor], row: int) -> list[Tensor]: ...
def zero_rows(tensor: Tensor, rows: NDArray[np.int64]) -> bool: ...
def zero_row_of_state(table: Tensor, state: dict[str, Any], row: int) -> bool: ...

@final
class RowRule:
    """The formula of an optimizer, and its numbers for one step; the meaning of each is that in torch's optimizer.

    ``kind`` is one of ``"sgd"``, ``"adagrad"``, ``"row_wise_adagrad"``, ``"adam"`` and ``"rmsprop"``.
    """

    def __new__(
        cls,
        kind: str,
        *,
        lr: float,
        eps: float = 0.0,
        decay: float = 0.0,
        shrink: float = 1.0,
        log_decay: float | None = None,
        maximize: bool = False,
        size: tuple[float, float] | None = None,
        beta1: float = 0.0,
        beta2: float = 0.0,
        amsgrad: bool = False,
        momentum: float = 0.0,
        gain: float = 1.0,
        nesterov: bool = False,
        alpha: float = 0.0,
        centered: bool = False,
    ) -> Self: ...

@final
class RowStep:
    """The tensors of a step by row, and which rows of them it writes."""

    @staticmethod
    def plan(
        rule: RowRule,
        table: Tensor,
        full: list[Tensor],
        single: list[Tensor],
        rows: Tensor | None,
        gradients: Tensor,
        frozen: Tensor | None = None,
        seed: int | None = None,
    ) -> RowStep | None:
        """Sort the rows; None if a tensor is to be left to torch. **O(k)** for ``k`` rows.

        Raises
        ------
        ValueError
            If a row is listed that the table does not have.

        """

def write_row_steps(steps: list[RowStep], counts: list[Tensor], threads: int) -> None:
    """Write the rows of all steps, or raise RuntimeError and write none. **O(k)**; the GIL is released.

    1 is added to ``counts``, which are float32 on the CPU.
    """

def sum_repeated_rows(rows: Tensor, gradients: Tensor) -> bool:
    """Add up what a gradient has for a row that it lists several times, at the first place; the others become zeros.

    False, and nothing is done, if it is to be left to torch.
    """

@final
class SafetensorsHeader:
    """The header of a safetensors file. Each byte of the data belongs to exactly one tensor.

    Parameters
    ----------
    header
        The JSON text, without the 8 bytes before it.
    file_bytes
        The size of the whole file.

    Raises
    ------
    ValueError
        If the header is damaged; it says what is wrong, and where.

    Cost: **O(n)**, two to four times that of a ``dict`` of the names.
    """

    def __new__(cls, header: NDArray[np.uint8], file_bytes: int) -> SafetensorsHeader: ...
    @staticmethod
    def size(prefix: bytes, file_bytes: int) -> int:
        """Return the size of the header, from the first 8 bytes of a file; ValueError if it exceeds the file."""
    def __len__(self) -> int:
        """Return the number of tensors. **O(1)**."""
    @property
    def metadata(self) -> dict[str, str]:
        """The texts of the metadata."""
    def entry(self, name: str) -> tuple[str, tuple[int, ...], int, int] | None:
        """Return dtype, shape, first byte in the file and end of a tensor; None if there is none. **O(1)**."""
    def names(self) -> list[str]:
        """Return all names in the order of the header. **O(n)**."""
    def names_ending(self, ending: str) -> list[str]:
        """Return the names with an ending, in the order of the header. **O(n)**."""
    def kinds(self) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
        """Return the distinct pairs of dtype and shape, and the number of each tensor's. **O(n)**."""
    def stack(self, prefix: str) -> SafetensorsStack:
        """Make tensors rows of tables. Takes the names that begin with a prefix and go on, without it. **O(n)**."""

@final
class SafetensorsStack:
    """Tables whose rows are tensors of a safetensors file."""

    def tables(self) -> list[tuple[str, tuple[int, ...], int, int | None]]:
        """Return dtype, shape of a row, number of rows, and first byte in the file of each table.

        The first byte is None if the rows are not adjacent in the file. Then they must be copied.
        """
    def index(self) -> IndexMap:
        """Return the names in the order of the header, with ids: the table in the upper bits, 40 bits for the row."""
    def add_names(
        self, index: IndexMap, numbers: list[int], first_rows: list[int], listed: tuple[ShardIndex, int] | None
    ) -> None:
        """Add the names to an index that may have others, with ids of larger tables. **O(n)**.

        Parameters
        ----------
        index
            The index that gets the names.
        numbers, first_rows
            For each table, the number of the larger table that it is a part of, and its first row there.
        listed
            A shard index, and the number of this shard: names that it does not list are left out.
        """
    def spans(self, gap: int) -> list[tuple[int, int]]:
        """Return the parts of the file that must be copied; between them are more than ``gap`` bytes."""
    def copy_block(self, block: NDArray[np.uint8], start: int, targets: list[NDArray[np.uint8]]) -> None:
        """Copy rows from a block of the file, which begins at byte ``start``, into tables.

        ``targets`` are the bytes of each table that must be copied, and empty for the others.
        """

@final
class ShardIndex:
    """The index of a sharded safetensors file: which name is in which shard.

    Parameters
    ----------
    text
        The JSON text of the file ``model.safetensors.index.json``.

    Raises
    ------
    ValueError
        If it is damaged or has no ``weight_map``.

    Cost: **O(n)**, as for a header.
    """

    def __new__(cls, text: bytes) -> ShardIndex: ...
    def __len__(self) -> int:
        """Return the number of names. **O(1)**."""
    @property
    def shards(self) -> list[str]:
        """The file names, in the order of their first tensors."""
    @property
    def metadata(self) -> str:
        """The value of ``metadata`` as JSON; empty if there is none."""
    def counts(self) -> list[int]:
        """Return the number of names in each shard. **O(n)**."""
    def names(self) -> list[str]:
        """Return all names in order. **O(n)**."""
    def names_ending(self, ending: str) -> list[str]:
        """Return the names with an ending, in order. **O(n)**."""
    def find(self, name: str) -> int | None:
        """Return the number of the shard that a name is in, or None if it is not listed. **O(1)**."""
    def missing(self, headers: list[SafetensorsHeader]) -> tuple[int, str] | None:
        """Return a number of a shard and the first name that its header lacks. **O(n)**.

        ``headers`` are those of all shards.
        """
    def kinds(self, headers: list[SafetensorsHeader]) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
        """Return the distinct pairs of dtype and shape, and the number of each name's, in order. **O(n)**.

        ``headers`` are those of all shards.
        """

def shard_lines(names: list[str], range: tuple[int, int], file: str) -> NDArray[np.uint8]:
    """Return the lines of an index which say that some names are in a file. Each begins with a comma. **O(m)**."""

def safetensors_entries(
    names: list[str],
    kinds: Sequence[tuple[str, Sequence[int]]],
    kind_of: NDArray[np.uint32],
    range: tuple[int, int],
    start: int,
) -> tuple[NDArray[np.uint8], int]:
    """Return the header entries of adjacent tensors, and where the data after them begin. **O(m)**.

    Parameters
    ----------
    names
        Distinct names; this is not checked.
    kinds, kind_of
        Distinct pairs of dtype and shape, and the number of each name's.
    range
        Which of the names: the first, and the one after the last.
    start
        Where the data of the first begin.

    Returns
    -------
    tuple
        The entries, each of which begins with a comma, and the end of the data.

    Raises
    ------
    ValueError
        If a dtype is unknown, or a name has half of a surrogate pair.
    """

def safetensors_shards(
    names: list[str],
    kinds: Sequence[tuple[str, Sequence[int]]],
    kind_of: NDArray[np.uint32],
    header_bytes: int,
    data_bytes: int,
) -> list[tuple[int, int]]:
    """Cut tensors into shards whose headers and data have at most so many bytes. **O(n)**.

    Returns the number of tensors of each shard, and the size of its header entries in bytes. A shard of one tensor may
    be larger. The arguments are those of ``safetensors_entries``; ValueError if a name is ``"__metadata__"``.
    """

def sort_tensors(values: list[Any]) -> tuple[NDArray[np.int64], list[int]]: ...

_TableTuple = tuple[str, int, bool, int]

def apply_names(old: NDArray[np.uint8], delta: NDArray[np.uint8]) -> NDArray[np.uint8]: ...
def changed_rows(old: NDArray[np.uint8], new: NDArray[np.uint8], row_bytes: int) -> NDArray[np.int64]: ...
def crc32(data: NDArray[np.uint8], start: int = 0) -> int: ...
def delete_entry(module: Module, key: object) -> bool: ...
def diff_names(old: NDArray[np.uint8], new: NDArray[np.uint8]) -> NDArray[np.uint8]: ...

@final
class Headers:
    """Writes what a rank tells the others in front of the data for them, and reads what they tell."""

    def __new__(cls, rank: int, ranks: int) -> Self: ...
    def message(
        self,
        call: Sequence[int],
        status: int,
        has_failed: bool,
        payload: Sequence[int] | NDArray[np.int64],
        data: NDArray[np.uint8] | None,
        give: Sequence[int] | None,
        room: int,
    ) -> tuple[NDArray[np.uint8], list[int], NDArray[np.int64]]:
        """Return the message, how many bytes of it are for each rank, and what this rank tells itself."""

    def message_of_sums(
        self,
        call: Sequence[int],
        payload: Sequence[int],
        rows: NDArray[np.int64],
        given: NDArray[np.float32] | NDArray[np.float64],
        give: Sequence[int],
        room: int,
    ) -> tuple[tuple[NDArray[np.uint8], list[int], NDArray[np.int64]], NDArray[np.uint8]]:
        """Return what :meth:`message` does for sums of rows, and the bytes of the sums for this rank."""

    def read(
        self, windows: NDArray[np.uint8], call: Sequence[int], told: NDArray[np.int64]
    ) -> tuple[bool, bool, list[bool]]:
        """Write what the others have told to ``told``; return whether one differs, has failed, and sends later."""

    def read_and_receive(
        self,
        windows: NDArray[np.uint8],
        call: Sequence[int],
        told: NDArray[np.int64],
        own: NDArray[np.uint8],
        take: Sequence[int],
        rows: tuple[int, NDArray[np.int64]] | None,
        into: NDArray[np.uint8],
    ) -> tuple[bool, bool, list[bool], bool]:
        """Do :meth:`read`, and receive all bytes, or rows by number, if ``take`` have come; say whether they have."""

    def receive(
        self,
        windows: NDArray[np.uint8],
        own: NDArray[np.uint8],
        take: Sequence[int],
        later: Sequence[bool],
        of_later: NDArray[np.uint8],
        into: NDArray[np.uint8],
    ) -> None:
        """Write ``take[r]`` bytes of each rank ``r``, one behind the other."""

@final
class KnownRows:
    """A bounded cache from names to the rank that owns them and their row there."""

    def __new__(cls, limit: int) -> Self: ...
    def __len__(self) -> int:
        """Return how many names are held, some of them twice, and some that were forgotten."""

    def add(self, request: Request, rows: NDArray[np.uint32]) -> None: ...
    def forget(self, owner: int) -> None: ...

@final
class Request:
    """What a batch of names asks the ranks for: rows of known names, and the text of others."""

    def __new__(
        cls, names: Iterable[str], known: KnownRows, world_size: int, first: int = 0, shards: int | None = None
    ) -> Self: ...
    def __len__(self) -> int: ...
    @property
    def asks(self) -> bool:
        """Whether there are new names."""

    def counts(self) -> NDArray[np.int64]: ...
    def payload(self, generation: int) -> tuple[NDArray[np.int64], list[int]]:
        """Return ``[ranks, 4]``, with the counts and a number, and the bytes of the message for each rank."""

    def message(self) -> NDArray[np.uint8]: ...
    def new_names(self) -> list[str]: ...
    def place(self, rows: NDArray[np.uint32]) -> tuple[NDArray[np.int64] | None, list[int], bool]: ...

def answer_asked(
    message: NDArray[np.uint8], counts: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], list[int]]:
    """Return the reply to all ranks, the rows that go to them, and how many go to each.

    ``rows`` has the row of each name of :func:`asked_names`, or -1.
    """

def asked_bytes(counts: NDArray[np.int64]) -> list[int]:
    """Return how many bytes each rank asks with."""

def asked_names(message: NDArray[np.uint8], counts: NDArray[np.int64]) -> list[str]:
    """Return the new names that all ranks ask for, those of the first rank first."""

def hash_names(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return the XXH3 hash (64 bits, seed 0) of the UTF-8 of each name: the same in every process and version.

    Surrogates are encoded as Python's ``surrogatepass`` does. **O(m)** for ``m`` names.
    """

def copy_rows(table: NDArray[np.uint8], row_bytes: int, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Copy rows of a table, by their numbers, to where there is room for them; -1 stands for a row of zeros.

    Raises ValueError if the table has no such row, or there is not just as much room.
    """

def names_by_bucket(packed: NDArray[np.uint8], buckets: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]: ...
def reorder_names(
    packed: NDArray[np.uint8],
    order: NDArray[np.uint64],
    tables: Sequence[_TableTuple],
    patterns: Sequence[str],
    ids: NDArray[np.uint64],
) -> NDArray[np.uint8]: ...
def pack_names(
    index: RowIndex | list[str],
    tables: Sequence[_TableTuple],
    patterns: Sequence[str],
    places: Places | None = None,
) -> NDArray[np.uint8]: ...
def searchable_size(packed: NDArray[np.uint8]) -> int: ...
def words_behind(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]: ...
def names_without_words(packed: NDArray[np.uint8]) -> NDArray[np.uint8]: ...
def check_words(packed: NDArray[np.uint8]) -> None: ...
def unpack_header(packed: NDArray[np.uint8]) -> tuple[int, list[_TableTuple], list[str]]: ...
def unpack_names(
    packed: NDArray[np.uint8], prefix: str | None = None
) -> tuple[IndexMap, list[_TableTuple], list[str]]: ...
