"""What marks the optimizers that step on the rows of a table, and not on the whole of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ByRow"]


class ByRow:  # Not an ABC: whether an optimizer is one is asked in each insertion.
    """An optimizer that takes sparse gradients, and changes the rows that these list and no others."""

    param_groups: list[dict[str, Any]]
    # The parameters, by `id`, and how many there were in each group when they were noted.
    _held: tuple[list[int], set[int]] | None = None
    # Whether it is attached by itself: until somebody detaches it.
    follows = True

    @abstractmethod
    def follow(self) -> None:
        """Attach it to the dictionaries whose tables it has."""

    def holds(self, parameter: Tensor) -> bool:
        """Whether it has a parameter. **O(groups)**; where it seems to have none, **O(parameters)**."""
        counts = [len(group["params"]) for group in self.param_groups]
        # Another one may have taken the place of one that was noted.
        if self._held is None or self._held[0] != counts or id(parameter) not in self._held[1]:
            self._held = counts, {id(one) for group in self.param_groups for one in group["params"]}
        return id(parameter) in self._held[1]

    @abstractmethod
    def beginning(self, parameter: Tensor, key: str) -> complex:
        """Return what a state by row begins with for a new name."""

    @abstractmethod
    def begins_with_zeros(self) -> bool:
        """Whether all states by row do, and have the shape of the table."""
