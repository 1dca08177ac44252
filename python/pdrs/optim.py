r"""Optimizers that step on the rows of a batch and on no others, and clipping for sparse gradients.

They have the names, arguments and states of ``torch.optim``. What has a dense gradient is stepped on by torch's own
kernels. A sparse gradient is stepped on by row: repeated rows are summed up, and each row and its state are read and
written once. Rows that no sparse gradient lists stay as they are, and so do frozen rows.

An optimizer made of the parameters of a :class:`pdrs.StackedParameterDict` follows its names as if attached by
``attach_optimizer``. ``gather`` then returns rows with a sparse gradient, unless told otherwise. ``docs/training.md``
says which optimizer to take when, and has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pdrs._rows.clipping import clip_grad_norm_, clip_grad_value_
from pdrs._rows.row_optimizer import ROW_STEPS, ROW_SUM, RowOptimizer

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop", "RowWiseAdagrad", "clip_grad_norm_", "clip_grad_value_"]


class SGD(RowOptimizer, torch.optim.SGD):
    """Stochastic gradient descent, by row: as :class:`torch.optim.SGD`, with momentum for sparse gradients, too.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused
        As for :class:`torch.optim.SGD`. Weight decay and momentum concern the rows that a gradient lists.
        ``foreach``, ``differentiable`` and ``fused`` concern dense gradients. By default these take the fused
        kernels.
    lazy_decay
        Whether a row makes up for the weight decay of the steps that it missed. Not with momentum.
    stochastic_rounding
        Whether rows of bfloat16 are rounded to one of their neighbours at random, so that small steps count on
        average. The numbers come from torch's generator.

    Raises
    ------
    ValueError
        If an option is out of its range, or if ``lazy_decay`` is asked for with momentum.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.ones(2, 2))
    >>> optimizer = pdrs.optim.SGD(sd.parameters(), lr=0.5)
    >>> sd.gather(["b", "c"], missing="insert").sum().backward()
    >>> optimizer.step()
    >>> {name: row.tolist() for name, row in sd.items()}
    {'a': [1.0, 1.0], 'b': [0.5, 0.5], 'c': [-0.5, -0.5]}

    """

    _peer: ClassVar[type[Optimizer]] = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        lazy_decay: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._row_options = {"lazy_decay": lazy_decay, "stochastic_rounding": stochastic_rounding}
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["lazy_decay"] and group["momentum"]:
            raise ValueError("lazy_decay=True is for SGD without momentum, got momentum: take AdamW, or leave it out")

    def _counts_steps(self) -> bool:
        return False

    def _full_states(self, group: dict[str, Any]) -> list[str]:
        return ["momentum_buffer"] if group["momentum"] else []

    def _shrink(self, group: dict[str, Any]) -> float:
        return 1 - float(group["lr"]) * float(group["weight_decay"]) if group["lazy_decay"] else 1.0

    def _numbers(self, group: dict[str, Any], state: dict[str, Any], count: int) -> dict[str, Any]:
        is_begun = state.get("momentum_buffer") is not None
        return {
            "kind": "sgd",
            "lr": float(group["lr"]),
            "decay": 0.0 if group["lazy_decay"] else float(group["weight_decay"]),
            "maximize": group["maximize"],
            "momentum": group["momentum"],
            # As in torch, the first momentum of a table is the gradient itself.
            "gain": 1.0 - group["dampening"] if is_begun else 1.0,
            "nesterov": group["nesterov"],
        }


class Adagrad(RowOptimizer, torch.optim.Adagrad):
    """Adagrad, by row: as :class:`torch.optim.Adagrad` with sparse gradients, and in one pass.

    Parameters
    ----------
    params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize, differentiable, fused
        As for :class:`torch.optim.Adagrad`. Weight decay goes with sparse gradients, too, and concerns the rows that
        they list. ``foreach``, ``differentiable`` and ``fused`` concern dense gradients.
    stochastic_rounding
        As for :class:`SGD`.

    Raises
    ------
    ValueError
        If an option is out of its range.

    """

    _peer: ClassVar[type[Optimizer]] = torch.optim.Adagrad
    _begins: ClassVar[Mapping[str, str]] = {"sum": "initial_accumulator_value"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        self._row_options = {"stochastic_rounding": stochastic_rounding}
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )

    def _full_states(self, group: dict[str, Any]) -> list[str]:
        return ["sum"]

    def _numbers(self, group: dict[str, Any], state: dict[str, Any], count: int) -> dict[str, Any]:
        return {"kind": "adagrad", **_adagrad_numbers(group, count)}


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one sum for each row: a state of 4 bytes per name, whatever the width.

    It is the exact row-wise Adagrad of FBGEMM. The mean of the squares of a row's gradient is added to the row's sum,
    and the row's learning rate is divided by the root of this. A row is what the first dimension counts, of dense
    layers, too.

    Parameters
    ----------
    params
        Parameters, or groups of them with options.
    lr
        The learning rate.
    lr_decay
        The learning rate of step ``t`` is ``lr / (1 + (t - 1) * lr_decay)``.
    weight_decay
        So much of the value is added to the gradient.
    initial_accumulator_value
        What sums begin with.
    eps
        Is added to the root.
    maximize
        Whether the objective is maximized.
    stochastic_rounding
        As for :class:`SGD`.

    Raises
    ------
    ValueError
        If an option is out of its range.

    """

    _begins: ClassVar[Mapping[str, str]] = {ROW_SUM: "initial_accumulator_value"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, option in options.items():
            if not float(option) >= 0.0:
                raise ValueError(f"expected {name} >= 0, got {option}")
        super().__init__(params, {**options, "maximize": maximize, "stochastic_rounding": stochastic_rounding})

    def _full_states(self, group: dict[str, Any]) -> list[str]:
        return []

    def _row_states(self, group: dict[str, Any], state: dict[str, Any]) -> list[str]:
        return [ROW_SUM]

    def _numbers(self, group: dict[str, Any], state: dict[str, Any], count: int) -> dict[str, Any]:
        return {"kind": "row_wise_adagrad", **_adagrad_numbers(group, count)}

    def begins_with_zeros(self) -> bool:
        """Whether all states by row do, and have the shape of the table."""
        return False


class Adam(RowOptimizer, torch.optim.Adam):
    """Adam, lazily by row: as :class:`torch.optim.SparseAdam` for sparse gradients, as Adam for dense ones.

    The moments of a row change only in steps whose gradient lists it.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused
        As for :class:`torch.optim.Adam`. Weight decay concerns the rows that a gradient lists. ``foreach`` and
        ``fused`` concern dense gradients; ``capturable`` and ``differentiable`` go with these alone.
    decoupled_weight_decay
        Whether weight decay shrinks the values, as in AdamW, and is no part of the gradient.
    per_row_steps
        Whether the bias of the moments is corrected by the number of steps of each row, and not of the table. A name
        that comes late then begins with steps as large as the first names had. Takes 4 bytes for each row.
    lazy_decay
        Whether a row makes up for the decoupled weight decay of the steps that it missed. Takes 4 bytes for each row.
    stochastic_rounding
        As for :class:`SGD`.

    Raises
    ------
    ValueError
        If an option is out of its range, or if ``lazy_decay`` is asked for without decoupled weight decay.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> model = torch.nn.ModuleDict({"names": sd, "dense": torch.nn.Linear(2, 1)})
    >>> optimizer = pdrs.optim.Adam(model.parameters(), lr=0.1)
    >>> sd.gather(["b"]).sum().backward()
    >>> sd.table((2,)).grad.is_sparse
    True
    >>> optimizer.step()
    >>> sd["a"].tolist(), [round(number, 4) for number in sd["b"].tolist()]
    ([0.0, 0.0], [-0.1, -0.1])

    """

    _peer: ClassVar[type[Optimizer]] = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        per_row_steps: bool = False,
        lazy_decay: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._row_options = {
            "per_row_steps": per_row_steps,
            "lazy_decay": lazy_decay,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["lazy_decay"] and not group["decoupled_weight_decay"]:
            raise ValueError(
                "lazy_decay=True is for decoupled weight decay: take AdamW, or decoupled_weight_decay=True"
            )

    def _full_states(self, group: dict[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]

    def _row_states(self, group: dict[str, Any], state: dict[str, Any]) -> list[str]:
        return [*([ROW_STEPS] if group["per_row_steps"] else []), *super()._row_states(group, state)]

    def _shrink(self, group: dict[str, Any]) -> float:
        return 1 - float(group["lr"]) * float(group["weight_decay"]) if group["decoupled_weight_decay"] else 1.0

    def _numbers(self, group: dict[str, Any], state: dict[str, Any], count: int) -> dict[str, Any]:
        beta1, beta2 = map(float, group["betas"])
        lr = float(group["lr"])
        bias1, bias2 = 1 - beta1**count, math.sqrt(1 - beta2**count)
        # SparseAdam adds eps to the root before its bias is corrected, Adam and AdamW after that.
        size = (lr / bias1, bias2) if group["decoupled_weight_decay"] else (lr * bias2 / bias1, 1.0)
        return {
            "kind": "adam",
            "lr": lr,
            "size": None if group["per_row_steps"] else size,
            "eps": group["eps"],
            "decay": 0.0 if group["decoupled_weight_decay"] else float(group["weight_decay"]),
            "maximize": group["maximize"],
            "beta1": beta1,
            "beta2": beta2,
            "amsgrad": group["amsgrad"],
        }


class AdamW(Adam, torch.optim.AdamW):
    """Adam with decoupled weight decay, lazily by row: see :class:`Adam`, and :class:`torch.optim.AdamW`.

    A row shrinks by ``1 - lr * weight_decay`` in each step whose gradient lists it. With ``lazy_decay=True`` it also
    makes up for the steps that it missed.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused
        As for :class:`torch.optim.AdamW`.
    per_row_steps, lazy_decay, stochastic_rounding
        As for :class:`Adam`.

    """

    _peer: ClassVar[type[Optimizer]] = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        per_row_steps: bool = False,
        lazy_decay: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._row_options = {
            "per_row_steps": per_row_steps,
            "lazy_decay": lazy_decay,
            "stochastic_rounding": stochastic_rounding,
        }
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


class RMSprop(RowOptimizer, torch.optim.RMSprop):
    """RMSprop, lazily by row: as :class:`torch.optim.RMSprop`, which refuses sparse gradients.

    The means of a row change only in steps whose gradient lists it.

    Parameters
    ----------
    params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        As for :class:`torch.optim.RMSprop`. Weight decay concerns the rows that a gradient lists.
    stochastic_rounding
        As for :class:`SGD`.

    """

    _peer: ClassVar[type[Optimizer]] = torch.optim.RMSprop

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        stochastic_rounding: bool = False,
    ) -> None:
        self._row_options = {"stochastic_rounding": stochastic_rounding}
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )

    def _full_states(self, group: dict[str, Any]) -> list[str]:
        average = ["grad_avg"] if group["centered"] else []
        return ["square_avg", *average, *(["momentum_buffer"] if group["momentum"] else [])]

    def _numbers(self, group: dict[str, Any], state: dict[str, Any], count: int) -> dict[str, Any]:
        return {
            "kind": "rmsprop",
            "lr": float(group["lr"]),
            "eps": group["eps"],
            "decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
            "alpha": group["alpha"],
            "momentum": group["momentum"],
            "centered": group["centered"],
        }


def _adagrad_numbers(group: dict[str, Any], count: int) -> dict[str, Any]:
    return {
        "lr": float(group["lr"]) / (1 + (count - 1) * group["lr_decay"]),
        "eps": group["eps"],
        "decay": float(group["weight_decay"]),
        "maximize": group["maximize"],
    }
