"""What the state of an optimizer begins with for a new row: a number, or the value of the row.

It is known for torch's own optimizers. For any other, it is found by a trial. An optimizer of its class, with the same
options, steps on a small parameter without a gradient. What it puts into its state first is what new rows begin with.
This need not be zeros. The averages of ScheduleFree and the slow weights of Lookahead begin with the value, a sum of
squares with a small number. If the trial does not tell, the optimizer is refused, and the user can say what it is:
``attach_optimizer(optimizer, initial_state={"z": "value"})``.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import ASGD, Adagrad, Optimizer, Rprop

from pdrs._rows.by_row import ByRow

__all__ = ["Beginning", "as_pair", "beginning", "declare", "is_declared", "is_known", "options"]

Beginning = complex | Literal["value"]

# So many steps make what an optimizer does not make in the first one.
_STEPS = 4
# What users have said, and what optimizers were seen to do: by dtype and shape of a row, for each key a beginning, or
# None where there is none for each row.
_declared: WeakKeyDictionary[Any, dict[str, Beginning]] = WeakKeyDictionary()
_is_used = False
_seen: WeakKeyDictionary[Any, dict[Any, dict[str, Beginning | None]]] = WeakKeyDictionary()


def is_known(optimizer: Any) -> bool:
    """Whether an optimizer is of one of torch's own classes, or ours, and of no subclass."""
    return type(optimizer).__module__.startswith(("torch.optim.", "pdrs.optim"))


def declare(optimizer: Any, begins: Mapping[str, Beginning]) -> None:
    """Note what a user says of an optimizer; ValueError or TypeError if that cannot be."""
    for key, begin in begins.items():
        if isinstance(begin, str):
            if begin != "value":
                raise ValueError(f'expected a number or "value" for the state {key!r}, got {begin!r}')
        elif not isinstance(begin, int | float | complex):
            raise TypeError(f'expected a number or "value" for the state {key!r}, got {type(begin).__name__}')
    if begins:
        global _is_used
        _is_used = True
        _declared.setdefault(optimizer, {}).update(begins)


def is_declared(optimizer: Any) -> bool:
    """Whether a user has said what the state of an optimizer begins with. Asked in each insertion: nearly free."""
    return _is_used and optimizer in _declared


def options(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    """Return the parameter group that has a parameter."""
    for group in optimizer.param_groups:
        if any(one is parameter for one in group["params"]):
            return group  # type: ignore[no-any-return]
    raise LookupError("the optimizer has no such parameter")


def beginning(optimizer: Any, parameter: Tensor, key: str) -> Beginning | None:
    """Return what a state by row begins with; None if it is not by row, though it has the shape for it.

    Raises
    ------
    RuntimeError
        If it cannot be told.
    """
    declared = _declared.get(optimizer, {})
    if key in declared:
        return declared[key]
    if is_known(optimizer):
        return _of_torchs(optimizer, parameter, key)
    kind = parameter.dtype, parameter.shape[1:]
    seen = _seen.setdefault(optimizer, {})
    known = seen.get(kind)
    if known is None or known.get(key) not in (0.0, "value"):  # a number may have come from options that have changed
        try:
            known = seen[kind] = _ask(optimizer, parameter, key)
        except Exception as error:  # any that somebody's code may raise
            raise _unknown(optimizer, key) from error
    if key not in known:
        raise _unknown(optimizer, key)
    return known[key]


def _unknown(optimizer: Any, key: str) -> RuntimeError:
    return RuntimeError(
        f"cannot tell what the state '{key}' of {type(optimizer).__name__} begins with for a new name: say so by "
        f'attach_optimizer(optimizer, initial_state={{"{key}": 0.0}}), or {{"{key}": "value"}} if it begins as '
        "a copy of the parameter"
    )


def _of_torchs(optimizer: Any, parameter: Tensor, key: str) -> Beginning:
    if isinstance(optimizer, ByRow):
        return optimizer.beginning(parameter, key)
    if key == "sum" and isinstance(optimizer, Adagrad):
        return as_pair(options(optimizer, parameter)["initial_accumulator_value"], parameter)
    if key == "step_size" and isinstance(optimizer, Rprop):
        return as_pair(options(optimizer, parameter)["lr"], parameter)
    # The average is the value until averaging begins.
    return "value" if key == "ax" and isinstance(optimizer, ASGD) else 0.0


def as_pair(number: float | Tensor, parameter: Tensor) -> complex:
    """Return a number as torch's optimizers have it for complex parameters, which they treat as pairs of real ones."""
    return complex(float(number), float(number)) if parameter.is_complex() else float(number)


class _Recording(dict[str, Any]):
    """The state of a parameter, which remembers what each key was set to first."""

    def __init__(self, begun: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}
        self.update(begun or {})

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.detach().clone() if isinstance(value, Tensor) else value
        super().__setitem__(key, value)

    def update(self, *others: Any, **more: Any) -> None:
        for key, value in dict(*others, **more).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]


def _ask(optimizer: Any, parameter: Tensor, key: str) -> dict[str, Beginning | None]:
    # A number of rows that no other dimension has, and values that differ from each other and from zero.
    rows = next(number for number in (3, 5, 7, 11, 13, 17, 19, 23) if number not in parameter.shape[1:])
    with torch.inference_mode(False), torch.no_grad(), _undisturbed():
        shape = (rows, *parameter.shape[1:])
        values = torch.rand(shape, device=parameter.device).add_(0.5)
        values = torch.where(torch.rand_like(values) < 0.5, values, -values).to(parameter.dtype)
        values.view(-1)[:1].abs_().neg_()
        sample = Parameter(values.clone())
        fresh = _made_like(optimizer, parameter, sample)
        recording: defaultdict[Any, _Recording] = defaultdict(_Recording)
        recording.update({one: _Recording(begun) for one, begun in fresh.state.items()})
        fresh.state = recording
        if callable(getattr(fresh, "train", None)):  # which ScheduleFree asks for
            fresh.train()
        for _ in range(_STEPS):
            _step(fresh, sample)
            if key in recording[sample]:
                break
        return {
            name: _classify(first, recording[sample].get(name), values)
            for name, first in recording[sample].first.items()
            if isinstance(first, Tensor) and not _is_unclear(first, recording[sample].get(name), values)
        }


def _made_like(optimizer: Any, parameter: Tensor, sample: Parameter) -> Any:
    """Return a new optimizer of the same class and options, around a new one of what it wraps."""
    group = options(optimizer, parameter)
    wanted = list(inspect.signature(type(optimizer).__init__).parameters.values())
    first, others = wanted[1], wanted[2:]
    known = {**vars(optimizer), **optimizer.defaults, **group}
    chosen = {one.name: known[one.name] for one in others if one.name in known and one.kind not in (2, 4)}
    if any(one.kind == inspect.Parameter.VAR_KEYWORD for one in wanted):
        chosen |= {name: value for name, value in optimizer.defaults.items() if name != first.name}
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise TypeError("the optimizer does not take its parameters first")

    def like(value: Any) -> Any:
        return _made_like(value, parameter, sample) if isinstance(value, Optimizer) else deepcopy(value)

    wrapped = vars(optimizer).get(first.name)
    made = like(wrapped) if isinstance(wrapped, Optimizer) else [sample]
    return type(optimizer)(made, **{name: like(value) for name, value in chosen.items()})


def _step(fresh: Any, sample: Parameter) -> None:
    """Step without a gradient, as on a row that is not in the batch, and without the hooks of steps."""
    step = type(fresh).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    for gradient in (
        torch.zeros_like(sample),
        torch.sparse_coo_tensor(
            torch.zeros((1, 0), dtype=torch.int64, device=sample.device),
            sample.new_zeros((0, *sample.shape[1:])).detach(),
            sample.shape,
            check_invariants=False,
        ),
    ):
        sample.grad = gradient
        for arguments in ((), (lambda: torch.zeros(()),)):
            try:
                step(fresh, *arguments)
                return
            except (TypeError, RuntimeError) as error:
                failed: Exception = error
    raise failed


def _is_unclear(first: Tensor, later: Any, values: Tensor) -> bool:
    return _is_by_row(first, values) and _classify(first, later, values) is None


def _classify(first: Tensor, later: Any, values: Tensor) -> Beginning | None:
    if not _is_by_row(first, values):
        return None
    # `empty_like(p)` is filled later; it is full of NaN here.
    for one in (first, later):
        if isinstance(one, Tensor) and one.shape == first.shape and not one.is_sparse:
            if one.shape == values.shape and torch.equal(one.to(values.dtype), values):
                return "value"
            number = one.reshape(-1)[0]
            if bool((one == number).all()):
                return complex(number.item()) if one.is_complex() else float(number.item())
    return 0.0 if first.is_sparse and first._nnz() == 0 else None


def _is_by_row(state: Tensor, table: Tensor) -> bool:
    return state.dim() == table.dim() and len(state) == len(table)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep random numbers and settings as they are, whatever an optimizer does."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)  # which fills `torch.empty` with NaN
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
