"""What was removed from a StackedParameterDict is gone: from its store, from files, pickles and optimizers.

The bugs that this hunts: the values of a name that was removed, in whatever way, which stay in a free row, in the state
that an optimizer has for it, in its gradient, or in a file; a name that is gone though its removal raised; a removal
that leaves a mask for the next name.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from observed import frozen_names, rows_in_use

SD = pdrs.StackedParameterDict
SECRET = 1234.5678
BYTES = struct.pack("<f", SECRET) * 3


def secret(shape: tuple[int, ...] = (4,)) -> Tensor:
    return torch.full(shape, SECRET)


def with_secret() -> SD:
    sd = SD({"a": torch.zeros(4), "b": torch.ones(4), "secret": secret(), "z": torch.ones(4), "other": torch.ones(3)})
    sd.compact()
    return sd


def move(sd: SD) -> None:
    sd["secret"] = torch.zeros(5)


def load_others(sd: SD) -> None:
    sd.load_state_dict(SD({"a": torch.zeros(4), "q": torch.ones(4), "n": torch.ones(4)}).state_dict())


def load_same_room(sd: SD) -> None:
    others = SD({name: torch.zeros(len(row)) for name, row in sd.items() if name != "secret"})
    others["new"] = torch.zeros(4)
    sd.load_state_dict(others.state_dict())


def shrink(sd: SD) -> None:
    sd.drop(["secret"])
    sd.compact()


def grow(sd: SD) -> None:
    sd.pop("secret")
    sd.reserve(20, shape=(4,))


def regroup(sd: SD) -> None:
    sd.param_groups(by={"secret": {}})
    sd.pop("secret")


def update(sd: SD) -> None:
    sd.update([("secret", torch.zeros(6)), ("x", torch.zeros(4))])


WAYS: dict[str, Callable[[SD], Any]] = {
    "pop": lambda sd: sd.pop("secret"),
    "popitem": lambda sd: [sd.popitem() for _ in range(3)],
    "popitem first": lambda sd: [sd.popitem(last=False) for _ in range(4)],
    "del": lambda sd: sd.__delitem__("secret"),
    "drop": lambda sd: sd.drop(["b", "secret"]),
    "clear": lambda sd: sd.clear(),
    "move": move,
    "update": update,
    "load others": load_others,
    "load same room": load_same_room,
    "compact": shrink,
    "grow": grow,
    "groups": regroup,
}


def trained(sd: SD, optimizer: str | None, sparse: bool) -> torch.optim.Optimizer | None:
    """Give a dictionary gradients, masks, and state of an optimizer, all of which have the secret."""
    made: torch.optim.Optimizer | None = None
    if optimizer is not None:
        options: dict[str, Any] = {"lr": 1e-12}
        if optimizer == "SGD":
            options["momentum"] = 0.9
        made = getattr(torch.optim, optimizer)(sd.parameters(), **options)
        sd.attach_optimizer(made)
        for _ in range(2):
            sd.zero_grad()
            (sd.gather(["secret", "a"], sparse=sparse) * SECRET).sum().backward()
            made.step()
    (sd.gather(["secret", "a"], sparse=sparse) * SECRET).sum().backward()
    return made


def everything(sd: SD, optimizer: torch.optim.Optimizer | None, folder: Path) -> dict[str, bytes]:
    """Return what others get of a dictionary."""
    found: dict[str, bytes] = {}
    for layout in ("archive", "named"):
        pdrs.save(sd, folder / layout, layout=layout)
        found[layout] = (folder / layout).read_bytes()
    pdrs.save(torch.nn.ModuleDict({"w": sd}), folder / "module")
    found["archive of a module"] = (folder / "module").read_bytes()
    objects = {"torch.save of a state dict": sd.state_dict(), "torch.save": sd, "torch.save of a copy": deepcopy(sd)}
    for name, one in objects.items():
        buffer = io.BytesIO()
        torch.save(one, buffer)
        found[name] = buffer.getvalue()
    found["pickle"] = pickle.dumps(sd)
    for name, table in sd.named_parameters():
        found[name] = table.detach().numpy().tobytes()
        if table.grad is not None:
            gradient = table.grad._values() if table.grad.is_sparse else table.grad
            found[f"{name}.grad"] = gradient.numpy()[..., :].tobytes()
        if optimizer is not None:
            for key, value in optimizer.state.get(table, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    found[f"{name} {key}"] = (value._values() if value.is_sparse else value).numpy().tobytes()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_what_was_removed_is_in_no_file_and_in_no_table(way: str, tmp_path: Path) -> None:
    sd = with_secret()
    assert all(BYTES in data for name, data in everything(sd, None, tmp_path).items() if name != "float32_3")
    WAYS[way](sd)
    assert [name for name, data in everything(sd, None, tmp_path).items() if BYTES in data] == []


@pytest.mark.parametrize(
    ("optimizer", "sparse"), [("Adam", False), ("SGD", False), ("SGD", True), ("SparseAdam", True), ("Adagrad", False)]
)
@pytest.mark.parametrize("way", ["pop", "popitem", "del", "drop", "clear", "move", "groups"])
def test_nor_is_its_gradient_or_what_an_optimizer_knows_of_it(
    way: str, optimizer: str, sparse: bool, tmp_path: Path
) -> None:
    sd = SD({"a": torch.zeros(4), "b": torch.ones(4), "secret": secret()})
    made = trained(sd, optimizer, sparse)
    assert made is not None
    row, table = int(sd.indices(["secret"])), sd.table((4,))
    WAYS[way](sd)
    assert not table[row].any()
    if table.grad is not None:
        assert not table.grad.to_dense()[row].any()
    for key, value in made.state[table].items():
        if isinstance(value, Tensor) and value.dim():
            assert not value.to_dense()[row].any(), key
    assert [name for name, data in everything(sd, made, tmp_path).items() if BYTES in data] == []


def test_a_delta_has_nothing_of_what_was_removed(tmp_path: Path) -> None:
    sd = with_secret()
    sd["secret"] = torch.zeros(4)
    pdrs.save(sd, tmp_path / "0")
    sd["secret"] = secret()
    sd["b"] = torch.full((4,), 3.0)
    del sd["secret"]
    pdrs.save(sd, tmp_path / "1", since=tmp_path / "0")
    assert BYTES not in (tmp_path / "1").read_bytes()
    assert pdrs.open(tmp_path / "1")["b"].tolist() == [3.0] * 4


DTYPES = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64, torch.complex64, torch.uint16, torch.int64,
    torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["pop", "popitem", "del", "drop", "clear", "move"])
def test_rows_of_every_dtype_are_cleared(way: str, dtype: torch.dtype) -> None:
    trainable = dtype.is_floating_point or dtype.is_complex
    rows = torch.ones(3, 4).to(dtype)
    sd = SD.from_tensor(["a", "b", "secret"], rows, requires_grad=trainable)
    if trainable:
        sd.table((4,)).grad = rows.clone()
    if way == "move":
        sd["secret"] = torch.nn.Parameter(torch.zeros(5).to(dtype), requires_grad=trainable)
    else:
        WAYS[way](sd)
    table = next(sd.parameters())
    assert not table.detach()[2].view(torch.uint8).any()
    assert table.grad is None or not table.grad[2].view(torch.uint8).any()


@pytest.mark.parametrize("rows", ["large", "with gaps", "inference"])
@pytest.mark.parametrize("way", ["pop", "drop"])
def test_rows_that_torch_must_clear_are_cleared(way: str, rows: str) -> None:
    given = secret((3, 20_000)) if rows == "large" else secret((3, 4))
    if rows == "with gaps":
        given = secret((4, 3)).t()
    if rows == "inference":
        with torch.inference_mode():
            given = given.clone()
            sd = SD.from_tensor(["a", "b", "secret"], given)
    else:
        sd = SD.from_tensor(["a", "b", "secret"], given)
    WAYS[way](sd)
    table = next(sd.parameters()).detach()
    assert not table[2].any()
    assert (table[0] == SECRET).all()


def test_a_name_that_comes_after_a_frozen_one_is_trained() -> None:
    for way in ("pop", "drop", "del"):
        sd = with_secret()
        sd.freeze(["secret"])
        WAYS[way](sd)
        sd["next"] = torch.zeros(4)
        assert frozen_names(sd) == set(), way


def test_free_rows_that_an_optimizer_has_moved_since_are_cleared_before_they_are_saved(tmp_path: Path) -> None:
    sd = with_secret()
    loss = (sd.gather(["secret"]) * SECRET).sum()
    del sd["secret"]
    loss.backward()  # which still brings a gradient for its row
    torch.optim.SGD(sd.parameters(), lr=1.0).step()
    assert sd.table((4,))[2].any()
    data = everything(sd, None, tmp_path)
    assert struct.pack("<f", -SECRET) * 3 not in data["archive"]
    assert not sd.state_dict()["float32_4"][2].any()
    assert not pickle.loads(pickle.dumps(sd)).table((4,))[2].any()


@pytest.mark.parametrize("way", ["pop", "popitem", "del", "drop", "clear"])
def test_a_removal_that_fails_removes_nothing(way: str) -> None:
    sd = SD({"a": torch.zeros(4), "b": torch.ones(4), "secret": secret()})
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.0)
    sd.attach_optimizer(optimizer)
    sd.gather(["secret"], sparse=True).sum().backward()
    table = sd.table((4,))
    optimizer.state[table]["history"] = [torch.zeros(3, 4)]  # nobody knows which of these numbers belong to the row
    before = {name: row.tolist() for name, row in sd.items()}
    with pytest.raises(RuntimeError, match="history"):
        WAYS[way](sd)
    assert {name: row.tolist() for name, row in sd.items()} == before
    assert {name: gradient.tolist() for name, gradient in sd.named_grads()} == {"secret": [1.0] * 4}
    assert rows_in_use(sd) == {"float32_4": 3}
    del optimizer.state[table]["history"]
    WAYS[way](sd)
    assert "secret" not in sd


def test_norms_of_rows_of_eight_bits_are_those_of_their_values() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        sd = SD.from_tensor(["a", "b"], torch.tensor([[3.0, 4.0], [0.0, 1.0]]).to(dtype))
        assert sd.norms().tolist() == [5.0, 1.0]
