"""Files with a tensor for each name: written as other tools read them, and read as other tools write them.

The bugs that this hunts: a row under the name of another, a name that is lost between two shards, shards of two saves
that are mixed, a file that pdrs alone can read, an index that makes pdrs open files elsewhere, a pickle that is run, a
damaged file that is believed.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pdrs
from archives import Parts
from pdrs import CheckpointError
from states import State

SD = pdrs.StackedParameterDict
MAX_SHARD = 5_000_000_000


def same(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].detach(), tensor.detach()), name


def index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index.json")


def save(source: nn.Module | dict[str, Any], path: Path, limit: int = MAX_SHARD) -> list[Path]:
    """Save a tensor for each name; return the files that hold them."""
    module = source if isinstance(source, nn.Module) else State(source)
    size = pdrs.save(module, path, layout="named", max_shard_size=limit)
    files = [path] if path.exists() else [path.with_name(name) for name in shards_of(path)]
    assert size == sum(file.stat().st_size for file in files)
    return files


def shards_of(path: Path) -> list[str]:
    return sorted(set(json.loads(index_of(path).read_bytes())["weight_map"].values()))


def opened(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    return dict(pdrs.open(path, prefix=prefix).items())


def theirs(path: Path) -> dict[str, torch.Tensor]:
    """Load as the Hugging Face tools do: one file, or all the shards that an index lists."""
    if path.exists():
        return safetensors.torch.load_file(path)
    weight_map = json.loads(index_of(path).read_bytes())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        loaded = safetensors.torch.load_file(path.with_name(shard))
        assert {name for name, file in weight_map.items() if file == shard} == set(loaded)
        found.update(loaded)
    return found


def rows(count: int, *shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count * int(torch.Size(shape).numel()), dtype=torch.float32).view(count, *shape)


@pytest.fixture
def sd() -> pdrs.StackedParameterDict:
    """Give one of several tables, with rows that are free, out of order and frozen."""
    made = SD.from_tensor([f"a.{n}" for n in range(40)], rows(40, 3))
    made.update([(f"b.{n}", torch.full((2, 2), float(n), dtype=torch.float64)) for n in range(10)])
    made.update([(f"c.{n}", torch.full((5,), float(n), dtype=torch.bfloat16)) for n in range(3)])
    made["frozen"] = nn.Parameter(torch.arange(3), requires_grad=False)
    made['\u20ac "quoted"\\\n'] = torch.tensor(2.5)
    made["none"] = torch.empty(0, 4)
    made.drop(["a.3", "a.17", "b.0"])
    made["late"] = torch.full((3,), -1.0)
    return made


# -- written for other tools -------------------------------------------------------------------------------------------


def test_each_name_has_a_tensor_that_safetensors_loads(tmp_path: Path, sd: pdrs.StackedParameterDict) -> None:
    path = tmp_path / "model.safetensors"
    assert pdrs.save(sd, path, layout="named", metadata={"note": "a"}) == path.stat().st_size
    same(safetensors.torch.load_file(path), sd.named_state_dict())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "a"}
    parts = Parts.of(path)
    assert all(parts.offsets(name)[0] % row.itemsize == 0 for name, row in sd.items())
    assert parts.names[:9] == [f"b.{n}" for n in range(1, 10)], "wider elements first, then as in the dictionary"


@pytest.mark.parametrize("limit", [1, 64, 100, 500, 10_000])
def test_shards_have_the_hugging_face_layout(tmp_path: Path, sd: pdrs.StackedParameterDict, limit: int) -> None:
    path = tmp_path / "model.safetensors"
    files = save(sd, path, limit)
    same(theirs(path), sd.named_state_dict())
    same(opened(path), sd.named_state_dict())
    expected = {"model.safetensors"}
    if len(files) > 1:
        count = len(files)
        expected = {f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)} | {index_of(path).name}
        index = json.loads(index_of(path).read_bytes())
        assert index["metadata"] == {"total_size": sum(row.nbytes for row in sd.values())}
        assert list(index) == ["metadata", "weight_map"]
        for file in files:
            parts = Parts.of(file)
            assert len(parts.names) == 1 or sum(map(len, parts.tensors.values())) <= limit
    assert set(os.listdir(tmp_path)) == expected
    assert (len(files) > 1) == (limit < 10_000)


@pytest.mark.slow
def test_shards_are_cut_before_the_header_is_too_large(tmp_path: Path) -> None:
    # Each name takes some 4,000 bytes: a quote takes two.
    names = ['"' * 2000 + f"\u20ac{n}" for n in range(30_000)]
    files = save(SD.from_tensor(names, rows(30_000, 2)), tmp_path / "m.safetensors")
    assert len(files) == 2
    assert all(int.from_bytes(file.read_bytes()[:8], "little") <= 100_000_000 for file in files)
    found = theirs(tmp_path / "m.safetensors")
    assert len(found) == len(names)
    assert torch.equal(torch.stack([found[name] for name in names]), rows(30_000, 2))


@pytest.mark.parametrize("limit", [500_000, MAX_SHARD])
@pytest.mark.slow
def test_headers_and_the_index_are_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    names = [f'{n}\u20ac"' for n in range(120_000)]
    sizes: list[int] = []
    really = os.write

    def write(descriptor: int, data: Any) -> int:
        sizes.append(really(descriptor, data))
        return sizes[-1]

    monkeypatch.setattr(os, "write", write)
    files = save(SD.from_tensor(names, rows(120_000, 2)), tmp_path / "m.safetensors", limit)
    assert len(files) == (1 if limit == MAX_SHARD else 2)
    assert max(sizes) < 6_500_000 < 9_000_000 < sum(sizes)
    assert sum(sizes) == sum(path.stat().st_size for path in tmp_path.iterdir())
    found = theirs(tmp_path / "m.safetensors")
    assert len(found) == len(names)
    assert torch.equal(torch.stack([found[name] for name in names]), rows(120_000, 2))


def test_modules_are_written_with_the_rows_that_are_in_them(tmp_path: Path, sd: pdrs.StackedParameterDict) -> None:
    model = nn.Module()
    model.linear = nn.Linear(3, 4, dtype=torch.bfloat16)
    model.register_buffer("seen", torch.tensor(7))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    model.stacked = nn.Sequential(sd)
    model.plain = pdrs.ParameterDict({f"p{n}": torch.full((2,), float(n)) for n in range(50)})
    model.tied = model.linear.weight
    expected = model.state_dict()
    for key in [key for key in expected if key.startswith("stacked.")]:
        del expected[key]
    expected.update({f"stacked.0.{name}": row for name, row in sd.named_state_dict().items()})
    save(model, tmp_path / "m.safetensors")
    same(safetensors.torch.load_file(tmp_path / "m.safetensors"), expected)
    again = SD()
    again.load_state_dict(opened(tmp_path / "m.safetensors", "stacked.0."))
    same(again.named_state_dict(), sd.named_state_dict())


def test_tensors_of_any_layout_are_written(tmp_path: Path) -> None:
    base = rows(6, 4)
    tensors = {"t": base.t(), "step": base[::2], "same": base, "zero": torch.zeros(1).expand(6, 4), "one": base[0]}
    tensors |= {f"small{n}": base[n % 6] for n in range(100)}
    save(tensors, tmp_path / "m.safetensors")
    same(safetensors.torch.load_file(tmp_path / "m.safetensors"), tensors)
    save({}, tmp_path / "none.safetensors")
    assert safetensors.torch.load_file(tmp_path / "none.safetensors") == {}


def test_what_is_no_tensor_and_what_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    for value, said in (
        (3, "expected a dense tensor for 'x', got int"),
        (torch.eye(2).to_sparse(), "'x' is of layout torch.sparse_coo, and a file holds dense tensors with memory"),
        (torch.empty(2, device="meta"), "'x' is a Tensor on the meta device"),
        (torch.zeros(2, dtype=torch.complex128), "no dtype like torch.complex128, of which 'x' is"),
    ):
        with pytest.raises(TypeError, match=said):
            save({"a": torch.zeros(2), "x": value}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="'__metadata__'"):
        save({"__metadata__": torch.zeros(2)}, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_no_unicode_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    names = ["a", "\ud7ff\ue000\U00010000", "b.\udfff", "c\ud800"]
    tensors = {name: torch.zeros(2) for name in names}
    said = r"^expected names of valid Unicode, got 'b\.\\udfff', which has a surrogate$"
    path = tmp_path / "m.safetensors"
    for size in (8, 1000):
        for module in (State(tensors), pdrs.ParameterDict(tensors), pdrs.StackedParameterDict(tensors)):
            with pytest.raises(ValueError, match=said):
                save(module, path, size)
    assert os.listdir(tmp_path) == []


def test_large_tables_are_written_and_read_in_blocks(tmp_path: Path) -> None:
    # More than a block of 64 MB in a file, and rows that are not adjacent.
    values = rows(6000, 4000)
    sd = SD.from_tensor([f"{n}" for n in range(6000)], values)
    sd.update((f"small{n}", torch.full((3,), float(n))) for n in range(50))
    sd.drop(["77", "3000"])
    assert len(save(sd, tmp_path / "m.safetensors", 80_000_000)) == 2
    same(theirs(tmp_path / "m.safetensors"), sd.named_state_dict())
    same(opened(tmp_path / "m.safetensors"), sd.named_state_dict())


# -- saved again -------------------------------------------------------------------------------------------------------


def test_another_save_replaces_all_files_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"mine")
    for round_, limit in enumerate([10**9, 40, 40, 20, 10**9, 40]):
        tensors = {f"{n}": torch.full((4,), float(round_)) for n in range(8)}
        files = save(tensors, path, limit)
        same(theirs(path), tensors)
        same(opened(path), tensors)
        left = {file.name for file in files} | ({index_of(path).name} if len(files) > 1 else set())
        assert set(os.listdir(tmp_path)) == left | {"model-of-mine.safetensors"}


@pytest.mark.parametrize("fails_at", range(12))
@pytest.mark.parametrize("limit", [40, 10**9])
def test_a_failure_at_any_file_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, limit: int
) -> None:
    path = tmp_path / "model.safetensors"
    old = {f"{n}": torch.zeros(4) for n in range(8)}
    save(old, path, limit)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    calls = 0
    really = os.replace

    def replace(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise OSError(28, "No space left on device")
        really(*paths)

    monkeypatch.setattr(os, "replace", replace)
    new = {name: tensor + 1 for name, tensor in old.items()}
    if fails_at >= 5:  # four shards and the index
        pdrs.save(State(new), path, layout="named", max_shard_size=40)
        same(theirs(path) if limit == 40 else opened(index_of(path)), new)
        return
    with pytest.raises(OSError, match="No space left"):
        pdrs.save(State(new), path, layout="named", max_shard_size=40)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    same(opened(path), old)


# -- read --------------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_what_safetensors_wrote_is_stacked_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    kinds = [
        (torch.float32, (3,)),
        (torch.float32, ()),
        (torch.float64, (2, 2)),
        (torch.int8, (1,)),
        (torch.int64, (0,)),
    ]
    chosen = data.draw(st.lists(st.tuples(st.text(min_size=1, max_size=5), st.sampled_from(kinds)), max_size=20))
    tensors = {
        name: (torch.arange(int(torch.Size(shape).numel())) + n).to(dtype).view(shape)
        for n, (name, (dtype, shape)) in enumerate(chosen)
        if name != "__metadata__"
    }
    safetensors.torch.save_file(tensors, path)
    made = pdrs.open(path)
    same(dict(made.items()), tensors)
    assert all(table.requires_grad == table.is_floating_point() for table in made.parameters())
    # What is the prefix itself has no name without it.
    part = {name[1:]: tensor for name, tensor in tensors.items() if name.startswith("a") and name != "a"}
    if part:
        same(opened(path, "a"), part)


def test_a_stacked_file_can_be_trained_and_grown_and_stays_what_it_is(tmp_path: Path) -> None:
    names = [f"{n:06}" for n in range(20_000)]
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(dict(zip(names, rows(20_000, 16).unbind(), strict=True)), path)
    before = path.read_bytes()
    made = pdrs.open(path)
    assert torch.equal(made.table((16,)).detach(), rows(20_000, 16))
    made.gather(["000007", "000009"]).sum().backward()
    torch.optim.SGD(made.parameters(), lr=1.0).step()
    assert torch.equal(made["000007"].detach(), rows(20_000, 16)[7] - 1)
    made["new"] = torch.ones(16)
    made.drop(["000000"])
    assert path.read_bytes() == before


def test_rows_that_are_not_adjacent_are_copied_into_a_table(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for n in range(300):
        tensors[f"layer.{n}.weight"] = torch.full((300, 200), float(n))
        tensors[f"layer.{n}.bias"] = torch.full((3,), float(-n))
    shuffled = list(tensors.items())
    random.Random(0).shuffle(shuffled)
    # 72 MB, which is more than a block.
    pdrs.save(State(dict(shuffled)), tmp_path / "m")
    made = pdrs.open(tmp_path / "m")
    assert list(made) == [name for name, _ in shuffled]
    same(dict(made.items()), tensors)
    same(opened(tmp_path / "m", "layer.7"), {k[7:]: v for k, v in tensors.items() if k[:7] == "layer.7"})


def test_the_empty_name_is_refused(tmp_path: Path) -> None:
    save({"": torch.zeros(2), "ab": torch.zeros(2)}, tmp_path / "m")
    torch.save({"": torch.zeros(2), "ab": torch.zeros(2)}, tmp_path / "t")
    for name in ("m", "t"):
        with pytest.raises(CheckpointError, match="a tensor has the empty name"):
            pdrs.open(tmp_path / name)


def damaged(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        pdrs.open(path)
    assert caught.value.path == str(path)
    return caught.value.what


def test_damaged_files_are_refused_and_the_error_says_where(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save({"x": torch.zeros(4), "y": torch.zeros(4)}, good)
    data = good.read_bytes()
    bad = tmp_path / "bad"
    assert damaged(bad, b"") == "the file is empty: it may not have been downloaded, or copied, to its end"
    outside = 'tensor "y": it ends at 32 of the data, of which the file has only 31 bytes (byte 94)'
    assert damaged(bad, data[:-1]) == outside
    assert damaged(bad, data + b"\0").startswith("the data from 32 to 33 belong to no tensor")
    for old, new, said in (
        (b"[4]", b"[5]", 'tensor "x": it lies at 0 to 16 of the data, but needs 20'),
        (b'"y"', b'"x"', 'tensor "x": the name is listed twice'),
        (b"F32", b"Q32", "tensor \"x\": the dtype 'Q32' is unknown"),
        (data[:8], (1 << 60).to_bytes(8, "little"), "the header is said to have 1152921504606846976 bytes"),
        (data[:8], b"\xff" * 8, "the header is said to have 18446744073709551615 bytes"),
        (data, b"hello, this is a text", "it is a text, which begins 'hello, this is a text'"),
    ):
        assert damaged(bad, data.replace(old, new, 1)).startswith(said)
    for cut in range(len(data)):
        if cut < 300 or cut % 97 == 0:
            damaged(bad, data[:cut])


def test_any_flipped_bit_of_the_header_is_refused_or_gives_tensors_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    save({"x": torch.ones(4), "y": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    end = data.index(b"}}") + 2
    for bit in range(8 * end):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = opened(path)
        except CheckpointError:
            continue
        assert sum(tensor.nbytes for tensor in found.values()) == 32


def test_a_dtype_that_torch_does_not_have_is_not_loaded(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + b"123")
    for options in ({}, {"device": "cpu"}, {"names": ["x"]}):
        with pytest.raises(CheckpointError, match="dtype F6_E2M3, which torch does not have"):
            pdrs.open(tmp_path / "f", **options)
    with pytest.raises(CheckpointError, match="dtype F6_E2M3, which torch does not have"):
        pdrs.load(tmp_path / "f", nn.Linear(2, 2))


# -- shards ------------------------------------------------------------------------------------------------------------


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, Any] | None = None) -> Path:
    for shard, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / shard)
    path = folder / "model.safetensors.index.json"
    listed = {name: shard for shard, tensors in shards.items() for name in tensors}
    path.write_text(json.dumps({"metadata": {}, "weight_map": listed if weight_map is None else weight_map}))
    return path


def test_shards_are_read_in_the_order_of_their_index(tmp_path: Path) -> None:
    shards = {
        "b.safetensors": {"x": torch.ones(2), "z": torch.ones(3)},
        "a.safetensors": {"y": torch.zeros(2), "w": torch.zeros(4, dtype=torch.int32)},
    }
    path = sharded(tmp_path, shards)
    everything = shards["b.safetensors"] | shards["a.safetensors"]
    for place in (path, tmp_path / "model.safetensors"):
        assert list(pdrs.open(place)) == ["x", "z", "y", "w"]
        same(opened(place), everything)
        assert list(pdrs.open(place, names=["y", "x"])) == ["y", "x"]
        module = pdrs.ParameterDict()
        pdrs.load(place, module)
        same(dict(module), everything)


def test_tensors_that_the_index_does_not_list_are_not_there(tmp_path: Path) -> None:
    shards = {"a": dict(zip("xyz", rows(3, 2), strict=True)), "b": {"v": torch.full((2,), 8.0)}}
    path = sharded(tmp_path, shards, {"x": "a", "z": "a", "v": "b"})
    made = pdrs.open(path)
    same(dict(made.items()), {"x": rows(3, 2)[0], "z": rows(3, 2)[2], **shards["b"]})
    made["new"] = torch.full((2,), 9.0)  # gets the row that has no name
    assert made.table((2,)).tolist() == [[0, 1], [9, 9], [4, 5], [8, 8]]


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    shards = {"a": {"x": torch.ones(2)}}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "secret")
    for weight_map, said in (
        ({"x": "a", "y": "a"}, "the shard 'a' has no tensor 'y'"),
        ({"x": "b"}, "the shard 'b' is not there"),
        ({"x": "../secret"}, "'../secret' is no file in the folder of the index"),
        ({"x": str(tmp_path / "secret")}, "is no file in the folder of the index"),
        ({"x": ".."}, "is no file in the folder of the index"),
        ({"x": "a\0"}, "is no file in the folder of the index"),
        ({"x": 3}, "the index names something that is no file"),
        ([], "the index has no 'weight_map'"),
    ):
        path = sharded(elsewhere, shards, weight_map)
        with pytest.raises(CheckpointError, match=said):
            pdrs.open(path)
    for text, said in (
        ("", "cannot be read"),
        ("[1]", "has no 'weight_map'"),
        ('{"weight_map": {"x": "a", "x": "a"}}', "a name is listed twice"),
        ("[" * 100_000, "cannot be read"),
        ("\udcff", "cannot be read"),
    ):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointError, match=said):
            pdrs.open(path)


# -- torch's own files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_state_dicts_that_torch_saved_are_read(tmp_path: Path, new: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "m", _use_new_zipfile_serialization=new)
    assert list(pdrs.open(tmp_path / "m")) == list(model.state_dict())
    same(opened(tmp_path / "m"), model.state_dict())
    same(opened(tmp_path / "m", "0."), model[0].state_dict())


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo run > evil",)


def test_nothing_in_a_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "zip")
    torch.save({"x": Evil()}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    (tmp_path / "plain").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("zip", "legacy", "plain"):
        with pytest.raises(CheckpointError, match=r"refuses it|cannot read it"):
            pdrs.open(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_files_of_torch_that_hold_something_else_or_are_cut_off_are_refused(tmp_path: Path) -> None:
    for value, said in (
        ({"model": {"x": torch.ones(1)}}, "expected a state dict of tensors by name, found dict at 'model'"),
        ({3: torch.ones(1)}, "found Tensor at 3"),
        (torch.ones(1), "expected a state dict, found a Tensor"),
    ):
        torch.save(value, tmp_path / "m")
        with pytest.raises(CheckpointError, match=said):
            pdrs.open(tmp_path / "m")
    torch.save({"x": torch.ones(100)}, tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for cut in (2, 4, 100, 500, len(data) - 1):
        damaged(tmp_path / "m", data[:cut])


def test_a_pickled_module_is_refused_with_what_torch_has_against_it(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"refuses it: .*GLOBAL torch\.nn.*Linear.*save a state dict"):
        pdrs.open(tmp_path / "m.pt")


@pytest.mark.parametrize("is_zip", [False, True])
def test_damaged_files_of_torch_are_refused_or_read(is_zip: bool, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3), "y": torch.zeros(2)}, tmp_path / "m", _use_new_zipfile_serialization=is_zip)
    good = (tmp_path / "m").read_bytes()
    generator = random.Random(0)
    refused = 0
    for turn in range(400):
        data = bytearray(good)
        if turn == 0 and is_zip:
            data[data.rindex(b"PK\5\6") - 16] ^= 3  # disks of the zip archive
        elif turn % 4 == 0:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(generator.choice([1, 2, 8])):
                data[generator.randrange(len(data))] = generator.randrange(256)
        (tmp_path / "m").write_bytes(data)
        try:
            pdrs.open(tmp_path / "m", verify=True)
        except CheckpointError as error:
            refused += str(error).startswith(f"{tmp_path / 'm'}: ")
    assert refused > 100
