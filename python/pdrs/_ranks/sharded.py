"""``pdrs.distributed.ShardedParameterDict``: a named table whose names are spread over the ranks."""

from __future__ import annotations

import functools
import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from pdrs._core import hash_names
from pdrs._ranks.exchange import Call, Line, group_of
from pdrs._ranks.initial_values import Initial, values_of
from pdrs._ranks.known_rows import KnownRows
from pdrs._ranks.plan import GENERATION, Plan, Request, exchange_requests
from pdrs._ranks.rows_op import exchange_rows
from pdrs._rows.gather import Missing, check_missing, takes_rows
from pdrs._rows.gather_op import gather_rows
from pdrs._rows.insert import as_shape
from pdrs._rows.step_warnings import owner_of
from pdrs._torch.names import Names, listed
from pdrs._torch.untraced import untraced
from pdrs.stacked import StackedParameterDict

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pdrs._rows.table import Table

__all__ = ["ShardedParameterDict", "dictionary_of", "joined_norm", "norm_over_ranks"]

# What all backends send.
_WIRES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_by_local: weakref.WeakValueDictionary[int, ShardedParameterDict] = weakref.WeakValueDictionary()


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_step(
    method: Callable[Concatenate[ShardedParameterDict, _P], _R],
) -> Callable[Concatenate[ShardedParameterDict, _P], _R]:
    """Let a call that fails on this rank alone be the last one. torch.compile leaves it alone."""

    @untraced
    def call(self: ShardedParameterDict, /, *arguments: _P.args, **named: _P.kwargs) -> _R:
        with self._line.ranks.in_step():
            return method(self, *arguments, **named)

    return functools.wraps(method)(call)


class ShardedParameterDict(Module):
    """A named table that is spread over the ranks of a process group: each name, its row and its state on one rank.

    A hash of the name says which rank owns it. An owner holds its names in :attr:`local`, and nothing of the others.
    :meth:`gather` brings the rows that a rank asks for, and takes their gradients back. The optimizer is an ordinary
    one: each rank steps on the rows that it owns.

    All ranks must call :meth:`plan`, :meth:`gather`, :meth:`scatter`, :meth:`drop` and :meth:`total` equally often, in
    the same order and from one thread. The result of a gather must be part of the loss on all ranks or on none, also if
    a rank has asked for no names. Ranks that do not are told so: each of these calls, and each backward pass, begins
    with a message that says what a rank is about to do.

    Parameters
    ----------
    shape
        The shape of a row. A dictionary has rows of one shape and dtype. Make several dictionaries for several.
    mesh_or_group
        A process group, or a ``DeviceMesh`` with one dimension. The default is the group of all processes. Without
        ``torch.distributed``, this process is the only rank.
    seed
        An integer, the same on all ranks. New rows depend on it, on the name, and on nothing else.
    init
        What new rows begin with: :func:`normal` or :func:`uniform`. The default is zeros.
    dtype, device
        Of the rows. The defaults are those of torch.
    average
        Whether gradients are divided by the number of ranks. The default is True, as in DDP: a loss that is a mean over
        the batch of a rank then gives the gradients of the mean over all batches. With False, gradients are added up.
    wire
        The dtype in which rows and gradients are sent, such as ``torch.bfloat16``. The default is their own. It also
        rounds what stays on a rank, so that a row is the same for all ranks.
    reserve
        How many rows a rank has room for at first.
    known_names
        For how many names a rank remembers the row, so that it sends 4 bytes instead of the name.
    timeout
        How many seconds to wait for a rank that does not come, and for what it sends. It must be more than what one
        rank may do alone, such as writing a checkpoint.

    Raises
    ------
    TypeError
        If ``init`` is another function. What it writes would depend on the number of ranks.
    OutOfStepError
        If the ranks have other options.

    Notes
    -----
    Use ``torch.nn.parallel.DistributedDataParallel(pdrs.distributed.leave_out(model))`` for the rest of a model.

    Examples
    --------
    >>> import torch, pdrs.distributed
    >>> words = pdrs.distributed.ShardedParameterDict((2,), init=pdrs.distributed.normal(0.1))
    >>> optimizer = torch.optim.Adam(words.parameters())
    >>> words.attach_optimizer(optimizer)
    >>> words.gather(["a", "b", "a"], missing="insert").sum().backward()
    >>> optimizer.step()
    >>> list(words), words.total()
    (['a', 'b'], 2)

    """

    def __init__(
        self,
        shape: Sequence[int],
        mesh_or_group: Any = None,
        *,
        seed: int = 0,
        init: Initial | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        average: bool = True,
        wire: torch.dtype | None = None,
        reserve: int = 1,
        known_names: int = 1 << 20,
        timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if init is not None and not isinstance(init, Initial):
            raise TypeError(f"expected init from pdrs.distributed.normal or uniform, got {init!r}")
        if not isinstance(seed, int):
            raise TypeError(f"expected an int as seed, got {type(seed).__name__}")
        if wire not in (None, *_WIRES) or (wire is not None and dtype is not None and not dtype.is_floating_point):
            raise TypeError(f"expected wire to be one of {', '.join(map(str, _WIRES))}, for such rows, got {wire!r}")
        self._shape = as_shape(shape)
        self._width = math.prod(self._shape)
        self._seed, self._init, self._average, self._wire = seed, init, bool(average), wire
        self._line = Line(group_of(mesh_or_group, timeout))
        # Keys of a state dict say whose shard it is: distributed checkpoints take what has one key for copies.
        self._local_name = f"rank_{self.rank}_of_{self.world_size}"
        self.add_module(self._local_name, StackedParameterDict())
        self.local.reserve(max(1, reserve), shape=self._shape, dtype=dtype, device=device)
        self._known = KnownRows(known_names)
        self._plans = self._gathers = self._others = 0
        self._seen = torch.zeros(self._capacity(), dtype=torch.int64, device="cpu")
        self._layout = self.local.layout_version
        self._looked_for_ddp, self._table_id = False, id(self._table())
        _by_local[id(self.local)] = self
        options = f"shape={list(self._shape)}, {seed=}, {init=}, dtype={self._table().dtype}, {average=}, {wire=}"
        told = self._line.meet(self._line.call("ShardedParameterDict", 0, options), [0, 0, 0, self._generation()])
        self._generations = told[:, GENERATION].copy()

    # -- names ---------------------------------------------------------------------------------------------------------

    # torch.jit.script compiles other properties.
    __jit_unused_properties__ = ("local", "group", "rank", "world_size", "sent_bytes")

    @property
    def local(self) -> StackedParameterDict:
        """The names, rows and state that this rank owns. Change its names by the methods of this class."""
        return self._modules[self._local_name]  # type: ignore[return-value]

    @property
    def group(self) -> Any:
        """The process group; None if there is none."""
        return self._line.ranks.group

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self._line.ranks.rank

    @property
    def world_size(self) -> int:
        """The number of ranks of the group."""
        return self._line.ranks.size

    @property
    def sent_bytes(self) -> int:
        """The bytes that this rank has sent to others so far: headers, names, rows and gradients."""
        return self._line.sent_bytes

    def __len__(self) -> int:
        """Return the number of names that this rank owns. See :meth:`total`."""
        return len(self.local)

    def __bool__(self) -> bool:
        """Return True, as for any Module."""
        return True

    def __contains__(self, name: object) -> bool:
        """Return whether this rank owns a name and has it."""
        return name in self.local

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names that this rank owns."""
        return iter(self.local)

    def total(self) -> int:
        """Return the number of names on all ranks. All ranks must call it."""
        told = self._line.meet(self._next_call("total"), len(self.local))
        return int(told[:, 1].sum())

    def extra_repr(self) -> str:
        """Return what it was made with."""
        return f"shape={list(self._shape)}, rank={self.rank}, world_size={self.world_size}, seed={self._seed}"

    def attach_optimizer(self, optimizer: Optimizer, *, initial_state: Mapping[str, Any] | None = None) -> None:
        """Let the state of an optimizer follow the names: see :meth:`pdrs.StackedParameterDict.attach_optimizer`."""
        self.local.attach_optimizer(optimizer, initial_state=initial_state)

    def detach_optimizer(self, optimizer: Optimizer) -> None:
        """Stop what :meth:`attach_optimizer` began."""
        self.local.detach_optimizer(optimizer)

    # -- rows ----------------------------------------------------------------------------------------------------------

    @_in_step
    def plan(self, names: Names, missing: Missing = "error") -> Plan:
        """Find out who has the rows of names. All ranks must call it. **O(m)** for ``m`` names.

        The plan may be made before the step that needs it. If names have gone meanwhile, :meth:`gather` makes it again,
        on all ranks.

        Parameters
        ----------
        names
            A list, array or other iterable of ``str``: what this rank asks for. It may be empty, and list names twice.
        missing
            What happens to names that no rank has. ``"error"`` raises on all ranks. ``"skip"`` leaves their rows out.
            ``"zero"`` gives rows of zeros without a gradient. ``"insert"`` inserts them.

        Returns
        -------
        Plan
            For :meth:`gather`.

        Raises
        ------
        KeyError
            If names are missing on any rank and ``missing`` is ``"error"``, on all ranks. Also if a name is empty.
        OutOfStepError
            If the ranks call different things, or a rank does not come.
        RuntimeError
            If another rank has failed. After an error, some names may have been inserted; they have initial values.
        """
        self._plans += 1
        plan = self._planned(names, missing, self._line.call("plan", self._plans, f"missing={missing!r}"))
        plan.number = self._plans
        return plan

    @_in_step
    def gather(self, names: Names | Plan, missing: Missing = "error", *, sparse: bool | None = None) -> Tensor:
        """Return the rows of many names as one differentiable tensor. All ranks must call it. **O(m)**.

        Gradients go back to the owners in the backward pass, and add up there.

        Parameters
        ----------
        names
            As for :meth:`plan`, or a plan.
        missing
            As for :meth:`plan`. A plan has its own.
        sparse
            Whether the gradients of tables are sparse. The default is whether an optimizer of ``pdrs.optim`` is
            attached. It must be the same on all ranks.

        Returns
        -------
        torch.Tensor
            ``[len(names), *shape]``. With ``missing="skip"`` there may be fewer rows.

        Raises
        ------
        KeyError, OutOfStepError, RuntimeError
            As for :meth:`plan`.
        """
        self._gathers += 1
        number = self._gathers
        plan = names if isinstance(names, Plan) else None
        table = self._table()
        if sparse is None:
            sparse = takes_rows(self.local, table)
        has_gradients = torch.is_grad_enabled() and table.requires_grad
        options = f"gradients={has_gradients}, sparse={sparse}"
        if plan is None:
            plan = self._planned(names, missing, self._line.call("gather", number, f"missing={missing!r}, {options}"))
        else:
            plan = self._fresh(plan, self._line.call("gather", number, f"plan {plan.number}, {options}"))
        table = self._table()
        self._see(plan.rows, number)
        rows = plan.rows if table.is_cpu else plan.rows.to(table.device)
        own = gather_rows(table, rows, sparse)
        come = exchange_rows(
            own.reshape(len(own), self._width),
            self._line,
            plan.give,
            plan.take,
            self._wire,
            self.world_size if self._average else 1,
            self._line.call("rows of gather", number),
            self._line.call("backward of gather", number),
        )
        if plan.has_absent:
            come = torch.cat([come, come.new_zeros(1, come.shape[1])])
        place = plan.place if table.is_cpu else plan.place.to(table.device)
        return come.index_select(0, place).view(len(place), *self._shape)

    @_in_step
    @torch.no_grad()
    def scatter(self, names: Names, values: Tensor, *, missing: Literal["error", "insert"] = "error") -> None:
        """Copy values into the rows of many names. All ranks must call it. **O(m)**.

        If a name is listed twice, the last value counts, and that of the highest rank.

        Parameters
        ----------
        names
            As for :meth:`plan`.
        values
            ``[len(names), *shape]``, of the dtype of the rows.
        missing
            ``"error"`` raises on all ranks if names are missing. ``"insert"`` inserts them.

        Raises
        ------
        TypeError, ValueError
            If the values do not fit the names. The other ranks raise RuntimeError, and nothing has changed.
        KeyError, OutOfStepError, RuntimeError
            As for :meth:`plan`.
        """
        call = self._next_call("scatter", f"missing={missing!r}")
        failure: Exception | None = None
        try:
            names = listed(names)
            self._check_values(names, values, missing)
        except (TypeError, ValueError) as error:
            failure = error
        plan = self._planned(names, missing, call, failure)
        table = self._table()
        last = np.empty(sum(plan.take), np.int64)
        last[plan.place.numpy()] = np.arange(len(values))
        given = values.detach().to(table.device)[torch.from_numpy(last).to(table.device)]
        come = self._line.exchange(given.reshape(len(given), self._width), plan.take, plan.give, call)
        come = come.view(len(come), *self._shape)
        rows, at = plan.rows.to(table.device), 0
        for count in plan.give:
            table.index_copy_(0, rows[at : at + count], come[at : at + count])
            at += count

    @_in_step
    def drop(self, names: Names, *, missing: Literal["error", "skip"] = "error") -> None:
        """Remove names, on their owners. All ranks must call it. **O(n + m)** for the ``n`` names of a rank.

        Parameters
        ----------
        names
            As for :meth:`plan`. Several ranks may list the same name.
        missing
            ``"error"`` raises on all ranks if names are missing. ``"skip"`` ignores them.

        Raises
        ------
        KeyError, OutOfStepError, RuntimeError
            As for :meth:`plan`. Also as for :meth:`pdrs.StackedParameterDict.drop`, on all ranks.
        """
        call = self._next_call("drop", f"missing={missing!r}")
        failure: Exception | None = None
        if missing not in ("error", "skip"):
            failure = ValueError(f"missing must be 'error' or 'skip', got {missing!r}")
        plan = self._planned(names, missing, call, failure)
        try:
            self._drop(
                [name for name in self.local.names_of(np.unique(plan.rows.numpy()).tolist()) if name is not None]
            )
        except Exception as error:
            failure = error
        self._line.meet(self._line.call("end of drop", call.number), 0, 0, failure)

    def evict(self, *, older_than: int) -> int:
        """Remove the names of this rank that nobody has gathered in the last ``older_than`` gathers. **O(n)**.

        It sends nothing, so ranks may call it at any time between steps. Later plans are told that rows have gone.

        Returns
        -------
        int
            How many names were removed.

        Raises
        ------
        ValueError
            If ``older_than`` is below 1.
        RuntimeError
            As for :meth:`pdrs.StackedParameterDict.drop`.
        """
        if older_than < 1:
            raise ValueError(f"expected older_than >= 1, got {older_than}")
        if not len(self.local):
            return 0
        self._follow_layout()
        is_old = self._seen[self.local.indices().cpu()] <= self._gathers - older_than
        count = int(is_old.sum())
        if count:
            self._drop(is_old)
        return count

    # -- what is done together -----------------------------------------------------------------------------------------

    def _planned(self, names: Any, missing: Missing, call: Call, failure: Exception | None = None) -> Plan:
        request = None
        while True:
            if failure is None:
                try:
                    if request is None:
                        self._refuse_copies()
                        check_missing(missing, None)
                        names = list(
                            listed(names)
                        )  # A plan may have to be made again, when the caller's list is another.
                    request = Request(names, self._known, self.world_size)
                except Exception as error:
                    failure = error
            payload = 0 if request is None else request.payload(self._generation())
            asks = request is not None and bool(request.new_names)
            told = self._line.meet(call, payload, int(asks), failure)
            if not self._forget(told[:, GENERATION]):
                break
        assert request is not None
        plan = exchange_requests(
            self._line, request, told, self._known, missing, lambda asked: self._answer(asked, missing), call
        )
        plan.names = names
        return plan

    def _fresh(self, plan: Plan, call: Call) -> Plan:
        """Meet for a gather by a plan; all ranks make the plan again if rows of any have gone."""
        failure: Exception | None = None
        if plan.dictionary != self._line.dictionary:
            failure = ValueError("the plan is of another dictionary")
        told = self._line.meet(call, [0, 0, 0, self._generation()], 0, failure)
        if not self._forget(told[:, GENERATION]) and (plan.generations == self._generations).all():
            return plan
        fresh = self._planned(plan.names, plan.missing, self._line.call("new plan of gather", call.number))
        fresh.number = plan.number
        for each in Plan.__slots__:
            setattr(plan, each, getattr(fresh, each))
        return plan

    def _answer(self, names: list[str], missing: Missing) -> NDArray[np.int64]:
        """Return the own rows of names, or -1, and insert them if that is asked for."""
        if not names:
            return np.empty(0, np.int64)
        if missing == "insert":
            new = self.local.insert(names, init=self._initialise)
            if new:
                self._see(self.local.indices(new).cpu(), self._gathers)
            rows = self.local.indices(names).cpu().numpy()
        else:
            there = np.asarray(self.local.isin(names))
            rows = np.full(len(names), -1)
            rows[there] = (
                self.local.indices([name for name, one in zip(names, there, strict=True) if one]).cpu().numpy()
            )
        if len(rows) and rows.max() >= 2**32 - 1:
            raise RuntimeError("a rank can have 2**32 - 2 rows: use more ranks")
        return rows

    def _initialise(self, rows: Tensor, names: list[str]) -> None:
        if self._init is not None:
            rows.copy_(values_of(self._init, hash_names(names), self._seed, self._shape, rows.dtype))

    def _generation(self) -> int:
        return self.local.layout_version

    def _forget(self, generations: NDArray[np.int64]) -> bool:
        """Forget the rows of ranks whose rows have gone; True if there are any. It is the same on all ranks."""
        stale = np.flatnonzero(generations != self._generations)
        for owner in stale.tolist():
            self._known.forget(owner)
        self._generations = generations.copy()
        return bool(len(stale))

    def _next_call(self, operation: str, options: str = "") -> Call:
        self._others += 1
        return self._line.call(operation, self._others, options)

    # -- the rows of this rank -----------------------------------------------------------------------------------------

    def _table(self) -> Tensor:
        return self.local.table(self._shape)

    def _capacity(self) -> int:
        return len(self._table())

    def _see(self, rows: Tensor, number: int) -> None:
        """Note that rows have been used in a gather."""
        self._follow_layout()
        capacity = self._capacity()
        if len(self._seen) < capacity:
            self._seen = torch.cat([self._seen, self._seen.new_full((capacity - len(self._seen),), number)])
        self._seen[rows] = number

    def _follow_layout(self) -> None:
        """Let all ages begin again if someone else has moved rows, such as ``local.compact()``."""
        if self.local.layout_version != self._layout:
            self._layout = self.local.layout_version
            self._seen = torch.full((self._capacity(),), self._gathers, dtype=torch.int64, device="cpu")

    def _last_seen(self) -> dict[str, Tensor]:
        """Return in which gather each row was last used, ``[capacity]``, for each table."""
        self._see(torch.empty(0, dtype=torch.int64), self._gathers)
        return {self.local._tables[0].attribute: self._seen}

    def _with_seen(self, seen: dict[str, Tensor], gathers: int, layout: int) -> dict[str, Any]:
        """Return the attributes that it has after :meth:`_last_seen` of such a number of gathers is loaded."""
        return {"_seen": seen[self.local._tables[0].attribute], "_gathers": gathers, "_layout": layout}

    def _table_like(self, shape: tuple[int, ...], dtype: torch.dtype) -> Table:
        """Return the table for rows of a shape and dtype; ValueError if it can have none."""
        table = self.local._tables[0]
        own = self._table()
        if tuple(own.shape[1:]) != shape or own.dtype != dtype:
            raise ValueError(
                f"expected rows of {own.dtype} {list(own.shape[1:])}, as the dictionary has, got {dtype} {list(shape)}"
            )
        return table

    def _drop(self, names: list[str] | Tensor) -> None:
        self._follow_layout()
        self.local.drop(names)
        self._layout = self.local.layout_version

    def _check_values(self, names: Sequence[str], values: Any, missing: str) -> None:
        if missing not in ("error", "insert"):
            raise ValueError(f"missing must be 'error' or 'insert', got {missing!r}")
        if not isinstance(values, Tensor) or values.layout != torch.strided:
            raise TypeError(f"expected a dense tensor of values, got {type(values).__name__}")
        if tuple(values.shape) != (len(names), *self._shape):
            raise ValueError(f"expected values of shape {[len(names), *self._shape]}, got {list(values.shape)}")
        if values.dtype != self._table().dtype:
            raise TypeError(f"expected values of {self._table().dtype}, as the rows have, got {values.dtype}")

    # -- what must not happen to it ------------------------------------------------------------------------------------

    def _refuse_copies(self) -> None:
        """Raise RuntimeError if DDP or FSDP2 has taken the table for its own."""
        table = self._table()
        if id(table) != self._table_id and not _is_in_fsdp2(self.local):
            self._table_id = id(table)
        if hasattr(table, "placements") or id(table) != self._table_id:
            raise RuntimeError(
                "FSDP2 has sharded a table that is sharded by name: pass ignored_params=pdrs.distributed.ignored_params"
                "(model) to fully_shard"
            )
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        wrapped = [] if active is None else [active]
        if not self._looked_for_ddp:
            self._looked_for_ddp = True
            wrapped += [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
        for one in wrapped:
            if any(parameter is table for parameter in one.__dict__.get("_module_parameters", ())):
                self._looked_for_ddp = False  # so that it looks again if this is caught
                raise RuntimeError(
                    "DDP has overwritten the rows of this rank with those of rank 0: wrap pdrs.distributed.leave_out"
                    "(model) instead of the model"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Raise TypeError: a copy would not be known to the other ranks."""
        raise TypeError("a ShardedParameterDict cannot be copied: make another one on all ranks")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise TypeError: a process group cannot be pickled."""
        raise TypeError("a ShardedParameterDict cannot be pickled: save the state_dict() of each rank")


def dictionary_of(parameter: Tensor) -> ShardedParameterDict | None:
    """Return the dictionary that a Parameter is the table of."""
    found = owner_of(parameter)
    known = None if found is None else _by_local.get(id(found[0]))
    return known if known is not None and found is not None and known.local is found[0] else None


def _is_in_fsdp2(module: Module) -> bool:
    """Whether FSDP2 has sharded a module around this one; its forward pass puts other Parameters in place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    found = [one for one in gc.get_objects() if issubclass(type(one), fsdp.FSDPModule)]
    return any(each is module for one in found for each in one.modules())


def norm_over_ranks(words: ShardedParameterDict, norm: float, norm_type: float) -> float:
    """Return the p-norm of numbers on all ranks, from that of the numbers on each. All ranks must call it."""
    bits = int(np.float64(norm).view(np.int64))
    told = words._line.meet(words._next_call("clip_grad_norm_", f"norm_type={norm_type}"), [bits, 0, 0, 0])
    return joined_norm(told[:, 1].copy().view(np.float64).tolist(), norm_type)


def joined_norm(norms: Sequence[float], norm_type: float) -> float:
    """Return the p-norm of numbers, from those of parts of them."""
    return float(np.linalg.norm(np.array(norms), norm_type))
