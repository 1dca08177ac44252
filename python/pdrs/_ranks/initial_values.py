"""What new rows begin with: a function of (seed, name, element), and of nothing else.

So a name begins with the same bits on any number of ranks, in any order and in any process. Values are made by
integer arithmetic and by the operations that IEEE 754 rounds exactly. No function of a mathematical library is called,
because these differ between machines in the last bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Initial", "normal", "uniform", "values_of"]

_Float = NDArray[np.float64]


class Initial(ABC):
    """A distribution of initial values; :func:`normal` and :func:`uniform` make one."""

    def __init__(self, described: str) -> None:
        self._described = described

    def __repr__(self) -> str:
        return self._described

    @abstractmethod
    def of(self, uniform: _Float) -> _Float:
        """Return values made of numbers that are uniform in the open interval from 0 to 1."""


class _Normal(Initial):
    def __init__(self, std: float, mean: float) -> None:
        super().__init__(f"normal(std={std!r}, mean={mean!r})")
        self._std, self._mean = std, mean

    def of(self, uniform: _Float) -> _Float:
        return _normal_quantile(uniform) * self._std + self._mean


class _Uniform(Initial):
    def __init__(self, low: float, high: float) -> None:
        super().__init__(f"uniform({low!r}, {high!r})")
        self._low, self._high = low, high

    def of(self, uniform: _Float) -> _Float:
        return uniform * (self._high - self._low) + self._low


def normal(std: float = 1.0, mean: float = 0.0) -> Initial:
    """Return a normal distribution of initial values, for :class:`ShardedParameterDict`.

    Parameters
    ----------
    std, mean
        The standard deviation, not negative, and the mean.

    Raises
    ------
    ValueError
        If ``std`` is negative, or a number is not finite.

    """
    std, mean = _finite("std", std), _finite("mean", mean)
    if std < 0:
        raise ValueError(f"expected std >= 0, got {std}")
    return _Normal(std, mean)


def uniform(low: float = 0.0, high: float = 1.0) -> Initial:
    """Return a uniform distribution of initial values, for :class:`ShardedParameterDict`.

    Parameters
    ----------
    low, high
        The bounds. Rounding to the dtype of the rows may give a bound itself.

    Raises
    ------
    ValueError
        If ``low`` is above ``high``, or a number is not finite.

    """
    low, high = _finite("low", low), _finite("high", high)
    if low > high:
        raise ValueError(f"expected low <= high, got {low} and {high}")
    return _Uniform(low, high)


def values_of(init: Initial, hashes: NDArray[np.uint64], seed: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return initial values ``[len(hashes), *shape]``. **O(values)**.

    Parameters
    ----------
    init
        The distribution.
    hashes
        The stable hash of each name.
    seed
        Any integer; its lowest 64 bits count.
    shape, dtype
        Of a row.
    """
    made = init.of(_uniform(hashes, seed, math.prod(shape)))
    return torch.from_numpy(made).to(dtype).view(len(hashes), *shape)


def _uniform(hashes: NDArray[np.uint64], seed: int, count: int) -> _Float:
    """Return numbers ``[len(hashes), count]`` by splitmix64, whose state begins with a mix of the seed and the name."""
    step = np.uint64(0x9E3779B97F4A7C15)
    begin = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + step)
    states = _mixed(hashes ^ begin)[:, None] + step * np.arange(1, count + 1, dtype=np.uint64)[None]
    # The middles of 2**52 equal parts, so that neither 0 nor 1 is among them.
    return ((_mixed(states) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mixed(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return what splitmix64 makes of states. Arrays of unsigned integers wrap around without a warning."""
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))


# The rational approximations of algorithm AS 241 (Wichura, 1988), PPND16: the highest power first.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip


def _normal_quantile(uniform: _Float) -> _Float:
    """Return the normal number that is above each share of all normal numbers."""
    centred = uniform - 0.5
    made = centred * _ratio(_CENTRE, 0.180625 - centred * centred)
    outside = np.abs(centred) > 0.425
    if outside.any():
        share = np.minimum(uniform, 1.0 - uniform)[outside]
        root = np.sqrt(-_log(share))
        far = np.where(root <= 5.0, _ratio(_MIDDLE, root - 1.6), _ratio(_TAIL, root - 5.0))
        made[outside] = np.copysign(far, centred[outside])
    return made


def _ratio(of: tuple[tuple[float, ...], tuple[float, ...]], at: _Float) -> _Float:
    above, below = (_polynomial(each, at) for each in of)
    return above / below


def _polynomial(factors: Sequence[float], at: _Float) -> _Float:
    made = np.full_like(at, factors[0])
    for factor in factors[1:]:
        made = made * at + factor
    return made


# 2 / (2k + 1): the series of log((1 + s) / (1 - s)) in s, the highest power first.
_LOG = tuple(2.0 / (2 * k + 1) for k in range(12, -1, -1))
_LOG_2 = 0.6931471805599453


def _log(numbers: _Float) -> _Float:
    """Return natural logarithms of positive numbers, by operations that are the same on all machines."""
    parts, exponents = np.frexp(numbers)
    small = parts < math.sqrt(0.5)
    parts = np.where(small, 2.0 * parts, parts)
    at = (parts - 1.0) / (parts + 1.0)
    return at * _polynomial(_LOG, at * at) + (exponents - small) * _LOG_2


def _finite(name: str, number: float) -> float:
    number = float(number)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number as {name}, got {number}")
    return number
