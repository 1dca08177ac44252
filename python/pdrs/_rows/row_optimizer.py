"""The step of the optimizers in ``pdrs.optim``: by row where the gradient is sparse, else by torch's own kernels.

A step has three parts. First all is planned, and whatever can fail does. Then torch steps on the parameters with dense
gradients. At last one native call writes the rows of all tables, and their states, so that an interrupt leaves all rows
of a step written, or none.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pdrs._core import RowRule, RowStep, use_huge_pages, write_row_steps
from pdrs._rows import step_warnings
from pdrs._rows.by_row import ByRow
from pdrs._rows.initial_state import as_pair
from pdrs._rows.optimizers import attached
from pdrs._rows.row_rules import step_by_torch
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs._rows.table import Table

__all__ = ["RowOptimizer"]

_HALF = (torch.bfloat16, torch.float16)
# The states that have one number for each row.
ROW_STEPS, ROW_DECAY, ROW_SUM = "row_steps", "row_decay", "sum"
# The sum of the logarithms of what values were multiplied by.
DECAY = "decay"


class RowOptimizer(ByRow, Optimizer):
    """What the optimizers have in common; the class of torch behind it in the order of bases is their peer."""

    # Torch's class of the same name, if there is one: it steps on what has dense gradients.
    _peer: ClassVar[type[Optimizer] | None] = None
    # The states by row whose beginning is an option, and the name of that.
    _begins: ClassVar[Mapping[str, str]] = {}

    # GradScaler is to take the scale away before the step: the native one, unlike torch's fused kernels, does not.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, _: bool) -> None:
        pass

    # -- what a class tells of itself ----------------------------------------------------------------------------------

    @abstractmethod
    def _full_states(self, group: dict[str, Any]) -> list[str]:
        """Return the keys of the states that have the shape of a table, in the order of the native rule."""

    def _row_states(self, group: dict[str, Any], state: dict[str, Any]) -> list[str]:
        """Return the keys of the states that have a number for each row, in the order of the native rule."""
        return [ROW_DECAY] if self._decays_lazily(group, state) else []

    def _counts_steps(self) -> bool:
        """Whether the number of the step is a state."""
        return True

    @abstractmethod
    def _numbers(self, group: dict[str, Any], state: dict[str, Any], count: int) -> dict[str, Any]:
        """Return the arguments of the native rule for the step with this number."""

    def _shrink(self, group: dict[str, Any]) -> float:
        """Return what values are multiplied by in this step, apart from the gradient."""
        return 1.0

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options that cannot be."""
        if group.get("stochastic_rounding") and any(one.dtype == torch.float16 for one in group["params"]):
            raise ValueError("stochastic_rounding is for rows of bfloat16, got a parameter of float16")

    # -- what torch calls ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; the dictionaries that they are tables of are followed."""
        self.defaults.update(self.__dict__.pop("_row_options", {}))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if _takes_fused_kernels(group):
            group["fused"] = True
        self.follow()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, option in self.defaults.items():
                group.setdefault(name, option)
        self.follow()

    def follow(self) -> None:
        """Attach it to the dictionaries whose tables it has, unless somebody has detached it."""
        for group in self.param_groups if self.follows else ():
            for parameter in group["params"]:
                found = step_warnings.owner_of(parameter)
                if found is not None and not any(one is self for one in attached(found[0])):
                    found[0].attach_optimizer(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of torch's class of the same name, too. States by row keep their dtype.

        torch gives states the dtype of the parameter. Those of rows with 16 bits have 32.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        ours = [one for group in self.param_groups for one in group["params"]]
        for number, parameter in zip(saved, ours, strict=True):
            state = self.state.get(parameter, {})
            for key, value in state_dict["state"].get(number, {}).items():
                held = state.get(key)
                is_wide = key == DECAY or parameter.dtype in _HALF
                if is_wide and isinstance(held, Tensor) and isinstance(value, Tensor) and held.shape == value.shape:
                    state[key] = value.detach().to(held.device, copy=True)
            if self._counts_steps() and state and not isinstance(state.get("step"), Tensor):
                state["step"] = torch.tensor(float(state.get("step", 0)))

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        # What torch's step asks for: which parameters of a group it is for.
        return super()._init_group({**group, "params": self._dense[id(group)]}, *lists)  # type: ignore[misc]

    @untraced
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on all parameters with a gradient: on the rows that it lists where it is sparse, else on the whole.

        Parameters
        ----------
        closure
            Computes the loss anew, and its gradients.

        Returns
        -------
        float or torch.Tensor or None
            What ``closure`` returned.

        Raises
        ------
        ValueError
            If a gradient lists rows that its parameter does not have.
        RuntimeError
            If a gradient is sparse and the options are ``differentiable`` or ``capturable``, or if it is sparse in
            more than the first dimension. Then nothing has changed.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = _Plan()
        dense = {id(group): self._plan_group(group, plan) for group in self.param_groups}
        if any(dense.values()) and self._peer is not None:
            self._dense = dense
            try:
                step: Any = self._peer.step
                (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
            finally:
                del self._dense
        plan.make()
        return loss

    def _plan_group(self, group: dict[str, Any], plan: _Plan) -> list[Tensor]:
        """Plan what is done by row, and return the parameters that are torch's."""
        dense = []
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if not gradient.is_sparse and not self._takes_all_rows(parameter):
                dense.append(parameter)
                continue
            self._plan_rows(group, parameter, gradient, plan)
        return dense

    def _takes_all_rows(self, parameter: Tensor) -> bool:
        """Whether a dense gradient is for the native step, too: if states are not as torch's class has them."""
        if self._peer is None:
            return True
        state: dict[str, Any] = self.state.get(parameter, {})
        if parameter.dtype in _HALF and type(parameter) in (Tensor, Parameter) and parameter.is_cpu:
            return bool(any(_is_wide(one, parameter) for one in state.values())) or _table_of(parameter) is not None
        return bool(state) and (ROW_STEPS in state or ROW_DECAY in state)

    def _decays_lazily(self, group: dict[str, Any], state: dict[str, Any]) -> bool:
        return bool(group.get("lazy_decay")) and (group["weight_decay"] != 0 or ROW_DECAY in state)

    def _plan_rows(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, plan: _Plan) -> None:
        # In a step all is out of the caches, and each operation of torch takes tens of microseconds: there are few.
        is_sparse = gradient.is_sparse
        if is_sparse and (group.get("differentiable") or group.get("capturable")):
            option = "differentiable" if group.get("differentiable") else "capturable"
            raise RuntimeError(f"{option}=True does not go with sparse gradients: make the optimizer without it")
        state = self.state[parameter]
        made = self._made_states(group, state, parameter)
        numbers = self._numbers(group, state, _count(state) + 1)
        if self._decays_lazily(group, state):
            numbers["log_decay"] = self._log_decay(group, made.get(DECAY, state.get(DECAY)), plan)
        else:
            numbers["shrink"] = self._shrink(group)
        held = {**state, **made} if made else state
        full = [held[key] for key in self._full_states(group)]
        single = [held[key] for key in self._row_states(group, held)]
        table = _table_of(parameter)
        frozen = table.frozen if table is not None else None
        seed = None
        if group.get("stochastic_rounding") and parameter.dtype == torch.bfloat16:
            seed = int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))
        # Not the Parameter: another thread may give it other memory meanwhile.
        values_of = parameter.detach()
        if values_of.dim() == 0:  # one row
            values_of, gradient = values_of.view(1), gradient.view(1)
            full, single = [one.view(1) for one in full], [one.view(1) for one in single]
        if table is not None and table.moved_to_huge_pages != values_of.data_ptr():
            # Once: a random row of a tensor on small pages takes several times as long to read.
            use_huge_pages(values_of, now=True)
            table.moved_to_huge_pages = values_of.data_ptr()
        rule = RowRule(**numbers)
        step = None
        if not is_sparse:
            step = RowStep.plan(rule, values_of, full, single, None, gradient, frozen, seed)
        elif gradient.shape == values_of.shape:
            indices, values = gradient._indices(), gradient._values()
            step = RowStep.plan(rule, values_of, full, single, indices, values, frozen, seed)
        if step is None:  # of unusual memory, or wrong
            rows, values = _rows_and_values(parameter, gradient)
            step = RowStep.plan(rule, values_of, full, single, rows, values, frozen, seed)
        if step is not None:
            plan.native.append(step)
        else:
            plan.writes += step_by_torch(numbers, values_of, full, single, rows, values, frozen, seed)
        if made:
            plan.states.append((state, made))
        if self._counts_steps():
            count = held["step"]
            if count.dtype == torch.float32 and count.is_cpu:
                plan.counts.append(count)
            else:
                plan.after.append((count.add_, 1))

    def _log_decay(self, group: dict[str, Any], total: Tensor, plan: _Plan) -> float:
        """Return the sum of the logarithms of what values shrink by, with that of this step, which is added to it."""
        shrink = self._shrink(group)
        if not shrink > 0:
            raise ValueError(
                f"lazy_decay=True expects lr * weight_decay below 1, got lr={float(group['lr'])} and "
                f"weight_decay={float(group['weight_decay'])}"
            )
        plan.after.append((total.add_, math.log(shrink)))
        return float(total) + math.log(shrink)

    def _made_states(self, group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Return the states that are still to be made, and those that are to have another dtype or layout."""
        made: dict[str, Any] = {}
        dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
        if self._counts_steps() and not isinstance(state.get("step"), Tensor):
            made["step"] = torch.tensor(float(state.get("step", 0)), device="cpu")
        if self._decays_lazily(group, state) and DECAY not in state:
            made[DECAY] = torch.zeros((), dtype=torch.float64, device="cpu")
        full = self._full_states(group)
        for key in [*full, *self._row_states(group, state)]:
            held = state.get(key)
            if held is not None and held.dtype in _HALF and _count(state) == 0:
                held = None  # torch's Adagrad has rounded what it begins with
            if held is None:
                shape = parameter.shape if key in full else _by_row(parameter)
                begin = self._begin(group, {**state, **made}, key)
                if key == ROW_STEPS:  # steps on all rows have gone before, or those of an optimizer that was loaded
                    begin = float(_count(state))
                of_rows = dtype if key in full else dtype.to_real()
                made[key] = huge_pages.full(shape, begin, dtype=of_rows, device=parameter.device)
            elif held.is_sparse:  # the momentum of torch's SGD
                made[key] = held.to_dense()
            elif held.dtype in _HALF:
                made[key] = held.to(torch.float32)
        return made

    # -- what the rows of names that come begin with -------------------------------------------------------------------

    def _begin(self, group: dict[str, Any], state: dict[str, Any], key: str) -> float:
        if key == ROW_DECAY:
            return float(state.get(DECAY, 0.0))
        option = self._begins.get(key)
        return 0.0 if option is None else float(group[option])

    def beginning(self, parameter: Tensor, key: str) -> complex:
        """Return what a state by row begins with for a new name."""
        for group in self.param_groups:
            if any(one is parameter for one in group["params"]):
                begin = self._begin(group, self.state.get(parameter, {}), key)
                return as_pair(begin, parameter) if key in self._full_states(group) else begin
        raise LookupError("the optimizer has no such parameter")

    def begins_with_zeros(self) -> bool:
        """Whether all states by row do, and have the shape of the table."""
        options = ("per_row_steps", "lazy_decay")
        return not self._begins and not any(group.get(each) for group in self.param_groups for each in options)


class _Plan:
    """What a step does at last, in one step of Python's."""

    def __init__(self) -> None:
        self.native: list[RowStep] = []
        # Numbers of steps, which are float32 on the CPU; and those that are not, with what is added to them.
        self.counts: list[Tensor] = []
        self.after: list[tuple[Callable[..., Any], float]] = []
        self.writes: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.states: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def make(self) -> None:
        if not (self.writes or self.states or self.after):
            if self.native:
                write_row_steps(self.native, self.counts, torch.get_num_threads())
            return
        changes = Changes()
        # First: it may fail, and nothing has been written then.
        changes.call(write_row_steps, self.native, self.counts, torch.get_num_threads())
        for function, arguments in self.writes:
            changes.call(function, *arguments)
        for state, made in self.states:
            changes.update(state, made)
        for function, argument in self.after:
            changes.call(function, argument)
        changes.make()


def _table_of(parameter: Tensor) -> Table | None:
    found = step_warnings.owner_of(parameter)
    return None if found is None else found[1]


def _rows_and_values(parameter: Tensor, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the rows that a gradient lists, ``[1, listed]``, or None if it is dense; and what it has for them."""
    if not gradient.is_sparse:
        return None, gradient.detach().contiguous()
    if gradient.sparse_dim() != 1 or gradient.shape != parameter.shape:
        raise RuntimeError(
            f"expected a gradient of shape {list(parameter.shape)} that is sparse in the first dimension, got one of "
            f"shape {list(gradient.shape)} that is sparse in {gradient.sparse_dim()}"
        )
    return gradient._indices().contiguous(), gradient._values().detach().contiguous()


def _count(state: dict[str, Any]) -> int:
    return int(state.get("step", 0))


def _by_row(parameter: Tensor) -> tuple[int, ...]:
    return (len(parameter), *[1] * (parameter.dim() - 1)) if parameter.dim() else ()


def _is_wide(state: object, parameter: Tensor) -> bool:
    return isinstance(state, Tensor) and state.dim() > 0 and state.dtype != parameter.dtype


def _takes_fused_kernels(group: dict[str, Any]) -> bool:
    """Whether torch's fused kernels are there for a group, and nobody has said anything about it."""
    if "fused" not in group or group["fused"] is not None or group.get("foreach") is not None:
        return False
    if group.get("differentiable"):
        return False
    return all(
        type(one) in (Tensor, Parameter) and one.is_floating_point() and one.device.type in ("cpu", "cuda")
        for one in group["params"]
    )
