"""Subclasses of ParameterDict: what they override is called as by torch's class, no more and no less.

The bugs that this hunts: a fast path that goes round an override, an override that is called twice, a method that asks
another method than torch's does and so sees translated keys twice.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs

Kind = type[nn.ParameterDict]

OVERRIDES = [
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__reversed__", "__len__", "keys"),
    *("values", "items", "update", "pop", "popitem", "get", "setdefault", "copy", "fromkeys", "clear", "extra_repr"),
]

CALLS: dict[str, Callable[[Kind, nn.ParameterDict], Any]] = {
    "the constructor": lambda kind, pd: list(kind({"y": TENSOR, "x": TENSOR})._parameters),
    "pd[k]": lambda kind, pd: pd["a"].tolist(),
    "pd[k] = new": lambda kind, pd: pd.__setitem__("z", TENSOR),
    "pd[k] = old": lambda kind, pd: pd.__setitem__("a", TENSOR),
    "del pd[k]": lambda kind, pd: pd.__delitem__("a"),
    "k in pd": lambda kind, pd: "a" in pd,
    "len": lambda kind, pd: len(pd),
    "bool": lambda kind, pd: bool(pd),
    "iter": lambda kind, pd: list(iter(pd)),
    "list": lambda kind, pd: list(pd),
    "reversed": lambda kind, pd: list(reversed(pd)),
    "keys": lambda kind, pd: list(pd.keys()),
    "values": lambda kind, pd: [value.tolist() for value in pd.values()],
    "items": lambda kind, pd: [(key, value.tolist()) for key, value in pd.items()],
    "update with a dict": lambda kind, pd: pd.update({"y": TENSOR, "x": TENSOR}),
    "update with pairs": lambda kind, pd: pd.update([("y", TENSOR), ("x", TENSOR)]),
    "update with an OrderedDict": lambda kind, pd: pd.update(OrderedDict(y=TENSOR, x=TENSOR)),
    "update with its like": lambda kind, pd: pd.update(kind([("y", TENSOR), ("x", TENSOR)])),
    "update with itself": lambda kind, pd: pd.update(pd),
    "update of a plain one": lambda kind, pd: list(kind.__mro__[1](pd)),
    "pop": lambda kind, pd: pd.pop("a").tolist(),
    "popitem": lambda kind, pd: pd.popitem()[0],
    "get": lambda kind, pd: pd.get("a").tolist(),
    "get a default": lambda kind, pd: pd.get("z", 5),
    "setdefault": lambda kind, pd: pd.setdefault("a", TENSOR).tolist(),
    "setdefault of a new key": lambda kind, pd: pd.setdefault("z", TENSOR).tolist(),
    "clear": lambda kind, pd: pd.clear(),
    "copy": lambda kind, pd: list(pd.copy()),
    "fromkeys": lambda kind, pd: list(pd.fromkeys(["y", "x"], TENSOR)),
    "|": lambda kind, pd: list(pd | kind([("z", TENSOR)])),
    "|=": lambda kind, pd: list(pd.__ior__(kind([("z", TENSOR)]))),
    "dict | pd": lambda kind, pd: list({"z": TENSOR} | pd),
    "dict": lambda kind, pd: list(dict(pd)),
    "OrderedDict": lambda kind, pd: list(OrderedDict(pd)),
    "**": lambda kind, pd: list({**pd}),
    "repr": lambda kind, pd: repr(pd),
    "setattr": lambda kind, pd: setattr(pd, "a", Parameter(TENSOR)),
    "delattr": lambda kind, pd: delattr(pd, "a"),
    "state_dict": lambda kind, pd: list(pd.state_dict()),
    "load_state_dict": lambda kind, pd: pd.load_state_dict(dict(b=TENSOR, a=TENSOR)),
    "named_parameters": lambda kind, pd: [name for name, _ in pd.named_parameters()],
    "to": lambda kind, pd: list(pd.double()._parameters),
    "deepcopy": lambda kind, pd: list(copy.deepcopy(pd)._parameters),
    "copy.copy": lambda kind, pd: list(copy.copy(pd)._parameters),
}
TENSOR = torch.zeros(1)


def recording(kind: Kind, method: str, log: list[Any]) -> Kind:
    """Make a subclass that overrides ``method``: it notes the call and calls super."""

    def override(self: nn.ParameterDict, *arguments: Any) -> Any:
        log.append((method, [one if isinstance(one, str) else type(one).__mro__[-2] for one in arguments]))
        return getattr(super(recorder, self), method)(*arguments)

    recorder = type("Recorder", (kind,), {method: override})
    return recorder


@pytest.mark.parametrize("call", CALLS)
def test_an_override_is_called_as_often_and_with_the_same_as_by_torch(call: str) -> None:
    for method in OVERRIDES:
        seen = []
        for kind in (nn.ParameterDict, pdrs.ParameterDict):
            log: list[Any] = []
            recorder = recording(kind, method, log)
            pd = recorder([("b", TENSOR), ("a", torch.ones(1))])
            result = CALLS[call](recorder, pd)
            seen.append((log, result, list(pd._parameters)))
        assert seen[0] == seen[1], f"{method} overridden"


class TupleKeys:
    """Keys that are tuples of str, kept as one str: what users of heterogeneous graphs do."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._inside(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._inside(key), value)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(self._inside(key))

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._inside(key))

    def __iter__(self) -> Iterator[Any]:
        return map(self._outside, super().__iter__())

    def keys(self) -> list[Any]:
        return [self._outside(key) for key in super().keys()]  # noqa: SIM118 - as users write it

    def items(self) -> list[tuple[Any, Any]]:
        return [(self._outside(key), value) for key, value in super().items()]

    @staticmethod
    def _inside(key: Any) -> str:
        return "__".join(key) if isinstance(key, tuple) else key

    @staticmethod
    def _outside(key: str) -> Any:
        return tuple(key.split("__")) if "__" in key else key


def test_a_subclass_may_translate_its_keys(kind: Kind) -> None:
    class Edges(TupleKeys, kind):
        pass

    likes, knows = ("user", "likes", "item"), ("user", "knows", "user")
    pd = Edges([(likes, torch.zeros(1)), ("plain", torch.ones(1))])
    pd.update({knows: torch.ones(2)})
    assert list(pd) == list(pd.keys()) == [likes, "plain", knows]
    assert [key for key, _ in pd.items()] == [likes, "plain", knows]
    assert [value.shape[0] for value in pd.values()] == [1, 1, 2]
    assert likes in pd
    assert pd.get(("no", "such", "edge")) is None
    assert pd.setdefault(knows) is pd[knows]
    assert list(pd.state_dict()) == ["user__likes__item", "plain", "user__knows__user"]
    assert list(pd.copy()) == ["user__likes__item", "plain", "user__knows__user"]
    assert list(Edges(pd)) == [likes, "plain", knows]
    assert pd.pop(likes).shape == (1,)
    assert pd.popitem()[0] == "user__knows__user"
    assert list(pd) == ["plain"]
    assert "plain" in repr(pd)


def test_a_subclass_may_lower_its_keys(kind: Kind) -> None:
    class Lowered(kind):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key.lower(), value)

        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(key.lower())

        def __contains__(self, key: str) -> bool:
            return super().__contains__(key.lower())

    pd = Lowered({"Left": torch.zeros(1)})
    pd.update([("RIGHT", torch.ones(1))])
    assert list(pd) == ["left", "right"]
    assert "LEFT" in pd
    assert pd["Left"] is pd.left
    assert pd.get("rIGHT") is pd["right"]
    pd |= {"Third": torch.ones(1)}
    assert list(pd) == ["left", "right", "third"]


def test_a_subclass_may_compute_its_values(kind: Kind) -> None:
    class Positive(kind):
        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(key).exp()

    pd = Positive({"a": torch.zeros(1), "b": torch.zeros(1)})
    assert [value.item() for value in pd.values()] == [1, 1]
    assert dict(pd)["a"].item() == 1
    assert pd.get("a").item() == 1
    assert [value.item() for _, value in pd.items()] == [1, 1]
    assert pd.copy()["a"].item() == 1
    assert pd.pop("a").item() == 1
    assert pd.popitem()[1].item() == 1


def test_a_subclass_with_a_constructor_of_its_own(kind: Kind) -> None:
    class Table(kind):
        scale = 2.0

        def __init__(self, rows: int) -> None:
            super().__init__({f"row{n}": torch.full((1,), self.scale * n) for n in range(rows)})
            self.rows = rows
            self.register_buffer("mean", torch.zeros(1))

        def forward(self) -> torch.Tensor:
            return torch.cat(list(self.values()))

    pd = Table(3)
    assert pd.forward().tolist() == [0, 2, 4]
    assert copy.deepcopy(pd).rows == 3
    assert type(copy.deepcopy(pd)) is Table
    assert type(pd.copy()) in (nn.ParameterDict, pdrs.ParameterDict)
    assert list(nn.Sequential(pd).state_dict()) == ["0.row0", "0.row1", "0.row2", "0.mean"]


def test_a_subclass_may_set_attributes_before_super(kind: Kind) -> None:
    class Early(kind):
        def __init__(self) -> None:
            with pytest.raises(AttributeError, match="cannot assign parameters before Module"):
                self.early = Parameter(torch.zeros(1))
            super().__init__({"x": torch.zeros(1)})

    assert list(Early()) == ["x"]


def test_a_subclass_may_use_slots_of_the_class_dynamically(kind: Kind) -> None:
    class Plain(kind):
        pass

    pd = Plain({"a": torch.zeros(1)})
    assert "a" in pd
    Plain.__contains__ = lambda self, key: key == "always"
    assert "a" not in pd
    assert "always" in pd
    assert pd.get("a", 5) == 5
    del Plain.__contains__
    assert "a" in pd


def test_two_bases_are_joined(kind: Kind) -> None:
    class Mixin:
        def __setitem__(self, key: str, value: Any) -> None:
            self.__dict__.setdefault("written", []).append(key)
            super().__setitem__(key, value)

    class Joined(Mixin, kind):
        pass

    pd = Joined({"b": torch.zeros(1), "a": torch.zeros(1)})
    assert pd.written == ["a", "b"]
    assert list(pd) == ["a", "b"]
