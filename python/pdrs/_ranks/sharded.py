"""``pdrs.distributed.ShardedParameterDict``: a named table whose names are spread over the ranks."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from pdrs._core import KnownRows, Request, hash_names
from pdrs._ranks.ages import Ages
from pdrs._ranks.exchange import Call, Line, ranks_and_shards
from pdrs._ranks.initial_values import Initial, values_of
from pdrs._ranks.mesh import names_of_replicas, of_replicas, own_part, rows_of_replicas
from pdrs._ranks.owners import Owners
from pdrs._ranks.plan import GENERATION, Answer, Plan, exchange_requests, meet_with_request
from pdrs._ranks.rows_op import Come, Route, exchange_rows, meet_with_rows, received_rows
from pdrs._ranks.wrapped import Wrappers
from pdrs._rows.gather import Missing, check_missing, takes_rows
from pdrs._rows.gather_op import gather_rows
from pdrs._rows.insert import as_shape
from pdrs._rows.step_warnings import owner_of
from pdrs._rows.table import Table, parameter_of
from pdrs._torch.names import Names, listed
from pdrs._torch.untraced import untraced
from pdrs.stacked import StackedParameterDict

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["ShardedParameterDict", "dictionary_of", "joined_norm", "norm_over_ranks"]

# What all backends send.
_WIRES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_by_local: weakref.WeakValueDictionary[int, ShardedParameterDict] = weakref.WeakValueDictionary()


_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")


def _in_step(
    method: Callable[Concatenate[ShardedParameterDict, _P], _R],
) -> Callable[Concatenate[ShardedParameterDict, _P], _R]:
    """Let a call that fails on this rank alone be the last one, and take back the names that it has inserted.

    torch.compile leaves it alone.
    """

    @untraced
    def call(self: ShardedParameterDict, /, *arguments: _P.args, **named: _P.kwargs) -> _R:
        with self._line.ranks.in_step():
            self._inserted.clear()
            try:
                return method(self, *arguments, **named)
            except BaseException:
                self._remove_inserted()
                raise

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
        The shape of a row, or a list of shapes. Of several, the first is the default of methods.
    mesh_or_group
        A process group, or a ``DeviceMesh``. The default is the group of all processes. Without
        ``torch.distributed``, this process is the only rank. A mesh with two dimensions has replicas: the names are
        spread over its second dimension, and each rank along the first has the same names, rows and state.
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
        shape: Sequence[int] | Sequence[Sequence[int]],
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
        self._shapes = _as_shapes(shape)
        self._seed, self._init, self._average, self._wire = seed, init, bool(average), wire
        ranks, shards = ranks_and_shards(mesh_or_group, timeout)
        self._line = Line(ranks)
        self._owners = Owners(ranks.size, ranks.rank // shards * shards, shards, ranks.rank % shards)
        # Keys of a state dict say whose shard it is: distributed checkpoints take what has one key for copies.
        self._local_name = f"rank_{self._owners.shard}_of_{shards}"
        self.add_module(self._local_name, StackedParameterDict())
        for one in self._shapes:
            self.local.reserve(max(1, reserve), shape=one, dtype=dtype, device=device)
        self._known = {one: KnownRows(known_names) for one in self._shapes}
        self._inserted: list[str] = []
        self._plans = self._others = 0
        self._ages = Ages.of_new(self._shapes, self.local.layout_version)
        self._warned_of_shard = False
        self._wrappers = Wrappers(self.local, self._tables())
        _by_local[id(self.local)] = self
        options = (
            f"shapes={[list(one) for one in self._shapes]}, {shards=}, {seed=}, {init=}, dtype={self._table().dtype}, "
            f"{average=}, {wire=}"
        )
        told = self._line.meet(self._line.call("ShardedParameterDict", 0, options), [0, 0, 0, self._generation()])
        self._generations: list[int] = told[:, GENERATION].tolist()

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
        told = self._line.meet(self._next_call("total"), [len(self.local), 0, 0, 0])
        return int(told[: self._owners.shards, 1].sum())

    def extra_repr(self) -> str:
        """Return what it was made with."""
        shapes = [list(one) for one in self._shapes]
        shape = f"shape={shapes[0]}" if len(shapes) == 1 else f"shapes={shapes}"
        return f"{shape}, rank={self.rank}, world_size={self.world_size}, seed={self._seed}"

    def attach_optimizer(self, optimizer: Optimizer, *, initial_state: Mapping[str, Any] | None = None) -> None:
        """Let the state of an optimizer follow the names: see :meth:`pdrs.StackedParameterDict.attach_optimizer`."""
        self.local.attach_optimizer(optimizer, initial_state=initial_state)

    def detach_optimizer(self, optimizer: Optimizer) -> None:
        """Stop what :meth:`attach_optimizer` began."""
        self.local.detach_optimizer(optimizer)

    # -- rows ----------------------------------------------------------------------------------------------------------

    @_in_step
    def plan(self, names: Names, missing: Missing = "error", *, shape: Sequence[int] | None = None) -> Plan:
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
        shape
            The shape of the rows. The default is the first one of the dictionary. It must be the same on all ranks.

        Returns
        -------
        Plan
            For :meth:`gather`.

        Raises
        ------
        KeyError
            If names are missing on any rank and ``missing`` is ``"error"``, on all ranks. Also if a name is empty.
        ValueError
            If names have rows of another shape.
        OutOfStepError
            If the ranks call different things, or a rank does not come.
        RuntimeError
            If another rank has failed. New names are removed again.
        """
        self._plans += 1
        options = f"missing={missing!r}{self._said(shape)}"
        plan = self._planned(names, missing, self._line.call("plan", self._plans, options), shape=shape)
        plan.number = self._plans
        # If it has to be made again, the caller's list may be another.
        plan.names = list(plan.names)
        return plan

    @_in_step
    def gather(
        self,
        names: Names | Plan,
        missing: Missing = "error",
        *,
        shape: Sequence[int] | None = None,
        sparse: bool | None = None,
    ) -> Tensor:
        """Return the rows of many names as one differentiable tensor. All ranks must call it. **O(m)**.

        Gradients go back to the owners in the backward pass, and add up there.

        Parameters
        ----------
        names
            As for :meth:`plan`, or a plan.
        missing, shape
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
        KeyError, ValueError, OutOfStepError, RuntimeError
            As for :meth:`plan`.
        """
        self._ages.gathers = number = self._ages.gathers + 1
        plan = names if isinstance(names, Plan) else None
        table = self._table(shape if plan is None else plan.shape)
        if sparse is None:
            sparse = takes_rows(self.local, table)
        has_gradients = torch.is_grad_enabled() and table.requires_grad
        options = f"gradients={has_gradients}, sparse={sparse}"
        come: Come | None = None
        if plan is None:
            options = f"missing={missing!r}{self._said(shape)}, {options}"
            plan = self._planned(names, missing, self._line.call("gather", number, options), shape=shape)
            own = self._own_rows(plan, self._table(plan.shape), sparse)
        else:
            own, come = self._gathered(plan, table, number, options, sparse)
        divisor = self._owners.ranks if self._average else 1
        place = plan.place if plan.place is None or own.is_cpu else plan.place.to(own.device)
        route = Route(
            self._line,
            number,
            plan.give,
            plan.take,
            self._wire,
            divisor,
            self._owners,
            plan.counts,
            place,
            plan.has_absent,
        )
        rows = exchange_rows(own, route, come)
        return rows if len(plan.shape) == 1 else rows.view(plan.length, *plan.shape)

    def ahead(
        self,
        batches: Iterable[_T],
        missing: Missing = "error",
        *,
        names: Callable[[_T], Names] | None = None,
        shape: Sequence[int] | None = None,
    ) -> Iterator[tuple[_T, Plan]]:
        """Iterate over batches with their plans, each made before the step of the batch before. All ranks must use it.

        Parameters
        ----------
        batches
            Batches of this rank, such as a data loader. All ranks must have equally many.
        missing, shape
            As for :meth:`plan`.
        names
            Returns the names of a batch. By default a batch is a list of names.

        Yields
        ------
        tuple
            The batch, and the plan for :meth:`gather`.

        Raises
        ------
        OutOfStepError
            If a rank has fewer batches. Also as for :meth:`plan`.

        """
        number = self._next_call("ahead").number
        ready: tuple[_T, Plan] | None = None
        for batch in batches:
            plan = self.plan(batch if names is None else names(batch), missing, shape=shape)  # type: ignore[arg-type]
            if ready is not None:
                yield ready
            ready = batch, plan
        with self._line.ranks.in_step():
            self._line.meet(self._line.call("the end of its batches", number))
        if ready is not None:
            yield ready

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
            ``[len(names), *shape]``, with a shape of the dictionary and the dtype of the rows.
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
            _check_values(names, values, missing, self._shapes, self._table().dtype)
        except (TypeError, ValueError) as error:
            failure = error
        shape = self._shapes[0] if failure is not None else tuple(values.shape[1:])
        plan = self._planned(names, missing, call, failure, shape=shape)
        table = self._table(shape)
        last = np.empty(sum(plan.take), np.int64)
        last[slice(None) if plan.place is None else plan.place.numpy()] = np.arange(len(values))
        given = values.detach().to(table.device)[torch.from_numpy(last).to(table.device)]
        come = self._line.exchange(given.reshape(len(given), math.prod(shape)), plan.take, plan.give, call)
        if plan.counts is not None:
            come = of_replicas(self._line, self._owners, come, plan.counts, call)
        rows = plan.of_replicas.numpy()
        rows, back = np.unique(rows[::-1], return_index=True)
        kept = torch.from_numpy(len(come) - 1 - back).to(table.device)
        table.index_copy_(0, torch.from_numpy(rows).to(table.device), come[kept].view(len(kept), *shape))

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
        gone: list[str] = []

        def answer(asked: list[str]) -> NDArray[np.int64]:
            is_there = self.local.isin(asked).tolist()
            gone.extend(dict.fromkeys(name for name, one in zip(asked, is_there, strict=True) if one))
            return np.where(is_there, 0, -1)

        # Names of any shape. So they are sent as text: known rows are those of one shape.
        if self._planned(names, missing, call, failure, known=KnownRows(0), answer=answer).any_new:
            gone = names_of_replicas(self._line, self._owners, gone, call)
        try:
            if gone:
                self._drop(gone)
        except Exception as error:
            failure = error
        self._line.meet(self._line.call("end of drop", call.number), failure=failure)

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
        old: list[str] = []
        for shape in self._shapes:
            capacity = len(self._table(shape))
            seen = self._ages.of(shape, capacity, self._generation())[:capacity]
            names = self.local.names_of((seen <= self._ages.gathers - older_than).nonzero()[:, 0], shape=shape)
            old += [name for name in names if name is not None]
        if old:
            self._drop(old)
        return len(old)

    # -- what is done together -----------------------------------------------------------------------------------------

    def _planned(
        self,
        names: Any,
        missing: Missing,
        call: Call,
        failure: Exception | None = None,
        *,
        shape: Sequence[int] | None = None,
        known: KnownRows | None = None,
        answer: Answer | None = None,
    ) -> Plan:
        """Return the plan for names: ``known`` rows of them, and how this rank answers for new ones."""
        request, at = None, 0
        try:
            at = self._shapes.index(self._shapes[0] if shape is None else as_shape(shape))
        except (TypeError, ValueError):
            failure = failure or ValueError(f"expected a shape of the dictionary, {self._shapes}, got {shape!r}")
        shape = self._shapes[at]
        known = self._known[shape] if known is None else known
        while True:
            if failure is None:
                try:
                    if request is None:
                        self._wrappers.refuse(self._tables())
                        check_missing(missing, None)
                        names = listed(names)
                    request = Request(names, known, self._owners.ranks, self._owners.first, self._owners.shards)
                except Exception as error:
                    failure = error
            if request is None or failure is not None:
                self._line.meet(call, failure=failure)  # It raises, on all ranks.
            assert request is not None
            mail = meet_with_request(self._line, call, request, self._generation(), at)
            if not self._forget(mail.told[:, GENERATION].tolist()):
                break
        told = mail.told[:, 0].tolist()
        if set(told) <= {at << 1}:  # nobody asks for new names
            answer = None
        elif any(one >> 1 != at for one in told):
            shapes = [self._shapes[one >> 1] for one in told]
            raise self._line.ranks.agreed(ValueError(f"expected rows of one shape, got {shapes} of the ranks"))
        elif answer is None:
            answer = functools.partial(self._answer, missing=missing, shape=shape, call=call)
        plan = exchange_requests(self._line, request, mail, known, missing, answer, call)
        plan.names, plan.shape, plan.generations = names, shape, self._generations
        plan.of_replicas, plan.counts = plan.rows, None
        if self._owners.replicas > 1:
            plan.of_replicas, plan.counts = rows_of_replicas(self._line, self._owners, plan.rows, call)
        return plan

    def _own_rows(self, plan: Plan, table: Tensor, sparse: bool) -> Tensor:
        """Return the rows of a plan that this rank owns, ``[rows, elements]``, those that all replicas ask for."""
        self._ages.see(plan.of_replicas, plan.shape, table.shape[0], self._generation())
        own = gather_rows(table, plan.of_replicas if table.is_cpu else plan.of_replicas.to(table.device), sparse)
        return own if len(plan.shape) == 1 else own.view(len(own), math.prod(plan.shape))

    def _gathered(
        self, plan: Plan, table: Tensor, number: int, options: str, sparse: bool
    ) -> tuple[Tensor, Come | None]:
        """Meet for a gather by a plan, and return the own rows, and those that have come with what the ranks have told.

        All ranks make the plan again if rows of any have gone. Then none have come.
        """
        call = self._line.call("gather", number, f"plan {plan.number}, {options}")
        if plan.dictionary != self._line.dictionary:
            self._line.meet(call, failure=ValueError("the plan is of another dictionary"))
        generation = self._generation()
        if plan.generations[self.rank] != generation:
            mail = self._line.meet_with(None, None, call, [0, 0, 0, generation])
        else:
            own = self._own_rows(plan, table, sparse)
            sent = own_part(self._line, own.detach(), plan.counts)
            sent = sent if self._wire is None else sent.to(self._wire)
            place = plan.place if sent.dtype == own.dtype else None
            arriving = meet_with_rows(sent, self._line, plan.give, plan.take, call, generation, place=place)
            mail = arriving.mail
        if not self._forget(mail.told[:, GENERATION].tolist()) and plan.generations == self._generations:
            return own, received_rows(arriving, self._line, call)
        again = self._line.call("new plan of gather", call.number)
        fresh = self._planned(plan.names, plan.missing, again, shape=plan.shape)
        fresh.number = plan.number
        for each in Plan.__slots__:
            setattr(plan, each, getattr(fresh, each))
        return self._own_rows(plan, self._table(plan.shape), sparse), None

    def _answer(self, names: list[str], missing: Missing, shape: tuple[int, ...], call: Call) -> NDArray[np.int64]:
        """Return the own rows of names, or -1, and insert them if that is asked for. All ranks come here."""
        if missing == "insert":
            is_there = self.local.isin(names).tolist()
            new = [name for name, one in zip(names, is_there, strict=True) if not one]
            new = names_of_replicas(self._line, self._owners, new, call)
            self._inserted += self.local.insert(new, shape=shape, init=self._initialise) if new else []
            if self._inserted:
                rows_of_new = self.local.indices(self._inserted).cpu()
                self._ages.see(rows_of_new, shape, len(self._table(shape)), self._generation())
            rows = self.local.indices(names, shape=shape).cpu().numpy() if names else np.empty(0, np.int64)
        else:
            there = self.local.isin(names).numpy() if names else np.empty(0, np.bool_)
            asked = [name for name, one in zip(names, there.tolist(), strict=True) if one]
            rows = np.full(len(names), -1)
            rows[there] = self.local.indices(asked, shape=shape).cpu().numpy() if asked else 0
        if len(rows) and rows.max() >= 2**32 - 1:
            raise RuntimeError("a rank can have 2**32 - 2 rows: use more ranks")
        return rows

    def _initialise(self, rows: Tensor, names: list[str]) -> None:
        if self._init is not None:
            rows.copy_(values_of(self._init, hash_names(names), self._seed, tuple(rows.shape[1:]), rows.dtype))

    def _generation(self) -> int:
        return self.local.layout_version

    def _forget(self, generations: list[int]) -> bool:
        """Forget the rows of ranks whose rows have gone; True if there are any. It is the same on all ranks."""
        if generations == self._generations:
            return False
        for owner, (now, before) in enumerate(zip(generations, self._generations, strict=True)):
            for known in self._known.values() if now != before else ():
                known.forget(owner)
        self._generations = generations
        return True

    def _next_call(self, operation: str, options: str = "") -> Call:
        self._others += 1
        return self._line.call(operation, self._others, options)

    # -- the rows of this rank -----------------------------------------------------------------------------------------

    def _table(self, shape: Sequence[int] | None = None) -> Tensor:
        """Return the table of a shape; that of the first one for a shape that the dictionary does not have."""
        found = tuple(shape) if isinstance(shape, Sequence) else None
        return self.local.table(found if found in self._shapes else self._shapes[0])

    def _tables(self) -> list[Tensor]:
        return [self.local.table(shape) for shape in self._shapes]

    def _said(self, shape: Sequence[int] | None) -> str:
        """Return what a call says of a shape."""
        return "" if shape is None or shape == self._shapes[0] else f", {shape=}"

    def _remove_inserted(self) -> None:
        """Remove the names that a call has inserted before it failed."""
        names = [name for name in self._inserted if name in self.local]
        self._inserted.clear()
        if names:
            # A table that cannot be changed keeps them, with initial values.
            with suppress(Exception):
                self._drop(names)

    def _last_seen(self) -> dict[str, Tensor]:
        """Return in which gather each row was last used, ``[capacity]``, for each table."""
        found = {}
        for shape in self._shapes:
            seen = self._ages.of(shape, len(self._table(shape)), self._generation())
            found[self._table_like(shape, self._table().dtype).attribute] = seen
        return found

    def _with_seen(self, seen: dict[str, Tensor], gathers: int, layout: int) -> dict[str, Any]:
        """Return the attributes that it has after :meth:`_last_seen` of such a number of gathers is loaded."""
        by_shape = {shape: seen[self._table_like(shape, self._table().dtype).attribute] for shape in self._shapes}
        return {"_ages": Ages(by_shape, gathers, layout)}

    def _table_like(self, shape: tuple[int, ...], dtype: torch.dtype) -> Table:
        """Return the table for rows of a shape and dtype; ValueError if it can have none."""
        own = self._table().dtype
        if shape not in self._shapes or own != dtype:
            shapes = " or ".join(str(list(one)) for one in self._shapes)
            raise ValueError(f"expected rows of {own} {shapes}, as the dictionary has, got {dtype} {list(shape)}")
        parameter = self._table(shape)
        return next(one for one in self.local._tables if parameter_of(self.local, one) is parameter)

    def _drop(self, names: list[str] | Tensor) -> None:
        self._ages.follow(self._generation())
        self.local.drop(names)
        self._ages.moved(self._generation())

    # -- what must not happen to it ------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Warn, once, that a state dict has one shard: most programs save that of the first rank."""
        if self._owners.shards > 1 and not self._warned_of_shard:
            self._warned_of_shard = True
            warnings.warn(
                f"the state dict of this rank has its own names only, {len(self):,} of them, and those of the other "
                "ranks are not in it: save the state dict of each rank, or all of them with pdrs.distributed.save",
                UserWarning,
                stacklevel=4,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Raise TypeError: a copy would not be known to the other ranks."""
        raise TypeError("a ShardedParameterDict cannot be copied: make another one on all ranks")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise TypeError: a process group cannot be pickled."""
        raise TypeError("a ShardedParameterDict cannot be pickled: save the state_dict() of each rank")


def _as_shapes(shape: Any) -> list[tuple[int, ...]]:
    """Return the shapes that a shape or a list of shapes is.

    Raises
    ------
    ValueError
        If a shape is listed twice.
    """
    several = isinstance(shape, Sequence) and len(shape) > 0 and all(isinstance(one, Sequence) for one in shape)
    shapes = [as_shape(one) for one in shape] if several else [as_shape(shape)]
    if len(set(shapes)) < len(shapes):
        raise ValueError(f"expected different shapes, got {shapes}")
    return shapes


def _check_values(
    names: Sequence[str], values: Any, missing: str, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    if missing not in ("error", "insert"):
        raise ValueError(f"missing must be 'error' or 'insert', got {missing!r}")
    if not isinstance(values, Tensor) or values.layout != torch.strided:
        raise TypeError(f"expected a dense tensor of values, got {type(values).__name__}")
    if tuple(values.shape[1:]) not in shapes or len(values) != len(names):
        fitting = " or ".join(str([len(names), *shape]) for shape in shapes)
        raise ValueError(f"expected values of shape {fitting}, got {list(values.shape)}")
    if values.dtype != dtype:
        raise TypeError(f"expected values of {dtype}, as the rows have, got {values.dtype}")


def dictionary_of(parameter: Tensor) -> ShardedParameterDict | None:
    """Return the dictionary that a Parameter is the table of."""
    found = owner_of(parameter)
    known = None if found is None else _by_local.get(id(found[0]))
    return known if known is not None and found is not None and known.local is found[0] else None


def norm_over_ranks(words: ShardedParameterDict, norm: float, norm_type: float) -> float:
    """Return the p-norm of numbers on all ranks, from that of the numbers on each. All ranks must call it."""
    bits = int(np.float64(norm).view(np.int64))
    told = words._line.meet(words._next_call("clip_grad_norm_", f"norm_type={norm_type}"), [bits, 0, 0, 0])
    first = words._owners.first
    return joined_norm(told[first : first + words._owners.shards, 1].copy().view(np.float64).tolist(), norm_type)


def joined_norm(norms: Sequence[float], norm_type: float) -> float:
    """Return the p-norm of numbers, from those of parts of them."""
    return float(np.linalg.norm(np.array(norms), norm_type))
