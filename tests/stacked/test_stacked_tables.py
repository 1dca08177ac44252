"""Several tables of one shape and dtype, and what ``table`` gives then.

The bug that this hunts: a row that one table has for a name is looked up in another, where it is another name's, and
nobody notices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding

import pdrs

SD = pdrs.StackedParameterDict


def value(number: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((3,), number, dtype=dtype)


def frozen_entries(_: Path) -> SD:
    return SD({"v": value(2), "w": nn.Parameter(value(1), requires_grad=False)})


def an_update(_: Path) -> SD:
    sd = SD({"v": value(2), "w": value(0)})
    sd.update({"w": nn.Parameter(value(1), requires_grad=False)})
    return sd


def groups(_: Path) -> SD:
    sd = SD({"v": value(2), "w": value(1)})
    sd.param_groups(by={"w": {"lr": 0.1}}, lr=0.2)
    return sd


def another_dtype(_: Path) -> SD:
    return SD({"v": value(2), "w": value(1, torch.float64)}).float()


def a_state_dict(path: Path) -> SD:
    sd = SD()
    sd.load_state_dict(groups(path).state_dict())
    return sd


def an_archive(path: Path) -> SD:
    pdrs.save(frozen_entries(path), path / "f")
    return pdrs.open(path / "f")


def some_of_an_archive(path: Path) -> SD:
    pdrs.save(frozen_entries(path), path / "f")
    return pdrs.open(path / "f", names=["w", "v"])


def an_archive_of_a_model(path: Path) -> SD:
    pdrs.save(nn.ModuleDict({"a": SD({"v": value(2)}), "b": SD({"w": value(1)})}), path / "f")
    return pdrs.open(path / "f")


def another_dtype_of_a_file(path: Path) -> SD:
    pdrs.save(SD({"v": value(2), "w": value(1, torch.float64)}), path / "f")
    return pdrs.open(path / "f", dtype=torch.float32)


WAYS = [
    frozen_entries,
    an_update,
    groups,
    another_dtype,
    a_state_dict,
    an_archive,
    some_of_an_archive,
    an_archive_of_a_model,
    another_dtype_of_a_file,
]


@pytest.mark.parametrize("make", WAYS)
def test_a_table_is_refused_where_names_lie_in_several_and_the_error_names_the_cures(
    make: Callable[[Path], SD], tmp_path: Path
) -> None:
    sd = make(tmp_path)
    names = {name[-1]: name for name in sd}
    tables = [name for name, _ in sd.named_parameters()]
    assert len(tables) == 2
    with pytest.raises(ValueError, match=r"expected one table of float32 of shape \[3\] with names") as caught:
        sd.table((3,))
    assert all(repr(name) in str(caught.value) for name in tables)
    # Each of the cures.
    assert sd.gather([names["v"], names["w"]]).tolist() == [[2] * 3, [1] * 3]
    for key, number in (("v", 2), ("w", 1)):
        rows = sd.indices([names[key]])
        assert any(embedding(rows, sd.get_parameter(name)).tolist() == [[number] * 3] for name in tables)
    one = SD(sd.named_state_dict())
    assert embedding(one.indices([names["v"]]), one.table((3,))).tolist() == [[2] * 3]
    del sd[names["w"]]
    assert embedding(sd.indices([names["v"]]), sd.table((3,))).tolist() == [[2] * 3]


def test_of_frozen_and_other_entries_either_can_be_asked_for() -> None:
    sd = SD({"v": value(2), "w": nn.Parameter(value(1), requires_grad=False)})
    for trainable, name in ((True, "v"), (False, "w")):
        assert embedding(sd.indices([name]), sd.table((3,), requires_grad=trainable))[0].tolist() == sd[name].tolist()
    sd.clear()
    assert sd.table((3,)) is sd.table((3,), requires_grad=True), "without names, that which new ones get"


def test_what_torch_saved_of_tensors_and_parameters_opens_as_one_table_of_each_shape(tmp_path: Path) -> None:
    state = {
        "w": nn.Parameter(value(1), requires_grad=False),
        "v": nn.Parameter(value(2)),
        "b": value(3),
        "strided": torch.arange(6.0).view(3, 2)[:, 1],
        "buffer": nn.Buffer(value(5)),
        "square": torch.arange(4.0).view(2, 2),
        "turned": torch.arange(4.0).view(2, 2).t(),
        "count": torch.tensor(3),
    }
    torch.save(state, tmp_path / "mix.pt")
    sd = pdrs.open(tmp_path / "mix.pt")
    assert [name for name, _ in sd.named_parameters()] == ["float32_3", "float32_2x2", "int64_scalar_no_grad"]
    for name, expected in state.items():
        assert torch.equal(sd[name], expected), name
        table = sd.table(expected.shape, expected.dtype)
        rows = embedding(sd.indices([name]), table.reshape(len(table), -1))
        assert rows.tolist() == [expected.flatten().tolist()]
    pd = pdrs.ParameterDict()
    pdrs.load(tmp_path / "mix.pt", pd)
    assert all(torch.equal(pd[name], expected) for name, expected in state.items())
