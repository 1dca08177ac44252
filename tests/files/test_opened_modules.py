"""Looking names up in the archive of a module, where each part has its own table of names.

The bugs that this hunts: an entry that is found under the prefix of another part, or hidden by one; a row of another
part's table; parts in another order; an index that is made although nothing has changed; a file that is refused when
it is opened for what is found only when all names are read, or the other way round.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Linear, Module, ModuleDict, Parameter

import pdrs
from archives import Parts
from pdrs.checkpoint import verify

SD = pdrs.StackedParameterDict


def rows(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start * 2.0, (start + count) * 2).reshape(count, 2)


def words(count: int = 50, start: int = 0) -> SD:
    return SD.from_tensor([f"n{at}" for at in range(count)], rows(count, start))


def mixed(start: int = 0) -> SD:
    """Give names of several tables, in another order than their rows."""
    sd = words(40, start)
    sd.update({"a.b": torch.ones(3), "whole": Parameter(torch.arange(2), requires_grad=False), "é\ud800": rows(1)[0]})
    sd.drop(["n3", "n30"])
    sd.move_to_end("n9", last=False)
    return sd


def one() -> Module:
    return ModuleDict({"words": mixed(), "head": Linear(2, 3)})


def only() -> Module:
    return ModuleDict({"words": mixed()})


def behind() -> Module:
    return ModuleDict({"a": Linear(2, 3), "words": mixed(), "z": Linear(3, 2)})


def many() -> Module:
    """Give prefixes that sort in another order than the parts come, and single tensors between them."""
    parts: dict[str, Module] = {}
    for at, name in enumerate(["words", "word", "words2", "b", "日", "é", "a", "zz"]):
        parts[name] = mixed(100 * at) if at % 2 else words(20, 100 * at)
        if at % 3:
            parts[f"linear{at}"] = Linear(2, 1)
    parts["empty"], parts["deep"] = SD(), ModuleDict({"words": words(5, 7), "empty": SD()})
    return ModuleDict(parts)


def within() -> Module:
    """Give dictionaries in another one that has no entries of its own."""
    return ModuleDict({"outer": pdrs.ParameterDict({"inner": words(), "mixed": mixed()}), "b": Linear(1, 2)})


def around() -> Module:
    """Give a dictionary with a module in it, whose tensors are no entries."""
    return ModuleDict({"outer": pdrs.ParameterDict({"x": torch.ones(2), "inner": Linear(2, 2)}), "words": mixed()})


def nested() -> Module:
    """Give a dictionary whose prefix begins that of another."""
    return ModuleDict({"outer": pdrs.ParameterDict({"x": torch.ones(2), "inner": words()}), "b": Linear(1, 2)})


MADE = pytest.mark.parametrize("make", [one, only, behind, many, within, around, nested])
SEARCHED = pytest.mark.parametrize("make", [one, only, behind, many])


def entries(module: Module) -> dict[str, list[Any]]:
    """Return the values of all names of a module, in order, without the help of a file."""
    found = {key: value.tolist() for key, value in module._parameters.items()}
    for name, child in module.named_children():
        below = content(child) if isinstance(child, SD) else entries(child)
        found.update({f"{name}.{key}": value for key, value in below.items()})
    return found


def content(sd: SD) -> dict[str, list[Any]]:
    return {name: row.tolist() for name, row in sd.items()}


def saved(module: Module, folder: Path) -> Path:
    pdrs.save(module, folder / "module", sync=False)
    return folder / "module"


def is_in_memory(sd: SD) -> bool:
    """Whether there is an index, which has memory for each name."""
    return sys.getsizeof(sd._index) > sys.getsizeof(SD()._index) + 8


@MADE
def test_each_name_is_found_in_the_file(make: Callable[[], Module], tmp_path: Path) -> None:
    module = make()
    expected = entries(module)
    found = pdrs.open(saved(module, tmp_path))
    assert is_in_memory(found) == (make is nested)
    assert len(found) == len(expected)
    others = ["", ".", "n1", "words", "words.", "words.nope", "head.nope", "word.n", "é.n1 ", "empty.n1", "~", "\0"]
    assert [name in found for name in others] == [False] * len(others)
    assert [found.get(name) for name in others] == [None] * len(others)
    shuffled = random.Random(0).sample([*expected, *others], len(expected) + len(others))
    assert found.isin(shuffled).tolist() == [name in expected for name in shuffled]
    for name, value in expected.items():
        assert found[name].tolist() == value
    assert list(reversed(found)) == [*expected][::-1]
    assert found.keys(prefix="words") == [name for name in expected if name.startswith("words")]
    assert is_in_memory(found) == (make is nested)
    assert list(found) == list(expected)
    assert list(content(found).items()) == list(expected.items())


@MADE
def test_names_of_several_parts_are_gathered_together(make: Callable[[], Module], tmp_path: Path) -> None:
    module = make()
    expected = {name: value for name, value in entries(module).items() if len(value) == 2 and type(value[0]) is float}
    found = pdrs.open(saved(module, tmp_path))
    names = random.Random(1).sample([*expected] * 3, 3 * len(expected))
    assert found.gather(names).tolist() == [expected[name] for name in names]
    assert found.gather(found.lookup(names)).tolist() == [expected[name] for name in names]
    assert found.gather([*names, "words.nope"], missing="skip").shape == (len(names), 2)
    with pytest.raises(pdrs.MissingEntryError, match=r"words\.nope"):
        found.gather([*names, "words.nope"])
    assert is_in_memory(found) == (make is nested)


def test_what_opening_makes_does_not_depend_on_the_number_of_names(tmp_path: Path) -> None:
    def made(count: int, **options: Any) -> int:
        module = ModuleDict({"words": words(count), "more": words(count, 5), "head": Linear(2, 3)})
        path = saved(module, tmp_path)
        del module
        before = sys.getallocatedblocks()
        found = pdrs.open(path, **options)
        blocks = sys.getallocatedblocks() - before
        assert len(found) in (10, count, 2 * count + 2)
        return blocks

    asked = [f"n{at}" for at in range(10)]
    for options in (
        {},
        {"prefix": "w"},
        {"prefix": "words."},
        {"names": [f"more.{name}" for name in asked]},
        {"names": asked, "prefix": "words."},
        {"names": [name.removeprefix("n") for name in asked], "prefix": "words.n"},
    ):
        made(100, **options)
        assert abs(made(100, **options) - made(20_000, **options)) < 200


CHANGES: dict[str, Callable[[SD], Any]] = {
    "set": lambda sd: sd.__setitem__("words.n5", torch.full((2,), 9.0)),
    "set a new one": lambda sd: sd.__setitem__("words.fresh", torch.full((2,), 9.0)),
    "pop": lambda sd: sd.pop("words.n5"),
    "popitem": SD.popitem,
    "drop": lambda sd: sd.drop([name for name in sd if name.endswith("5")]),
    "rename": lambda sd: sd.rename("words.n5", "fresh"),
    "move_to_end": lambda sd: sd.move_to_end("words.n5"),
    "compact": SD.compact,
    "freeze": lambda sd: sd.freeze(["words.n5"]),
    "move": SD.double,
}


@pytest.mark.parametrize("change", CHANGES)
@SEARCHED
def test_a_change_does_what_it_does_in_memory(make: Callable[[], Module], change: str, tmp_path: Path) -> None:
    path = saved(make(), tmp_path)
    found, model = pdrs.open(path), pdrs.open(path)
    model = copy.deepcopy(model)
    assert is_in_memory(model)
    held, walk, version = found.lookup(["words.n1"]), iter(found), found.layout_version
    names = list(model)
    seen = [next(walk) for _ in range(3)]
    CHANGES[change](found)
    assert found.gather(["words.n1"]).tolist() == model.gather(["words.n1"]).tolist()
    if found.layout_version == version:
        assert found.gather(held).tolist() == model.gather(["words.n1"]).tolist()
    CHANGES[change](model)
    assert list(content(found).items()) == list(content(model).items())
    if list(found) == names and change in ("set", "freeze"):
        assert seen + list(walk) == names
    assert {key: tuple(table.shape) for key, table in found.tables().items()} == {
        key: tuple(table.shape) for key, table in model.tables().items()
    }


@MADE
def test_copies_and_files_of_what_was_opened_are_the_same(make: Callable[[], Module], tmp_path: Path) -> None:
    module = make()
    path, expected = saved(module, tmp_path), entries(module)
    for again in (copy.copy, copy.deepcopy, SD.copy, lambda sd: pickle.loads(pickle.dumps(sd))):
        assert content(again(pdrs.open(path))) == expected
    pdrs.save(pdrs.open(path), tmp_path / "again", sync=False)
    assert list(content(pdrs.open(tmp_path / "again")).items()) == list(expected.items())
    verify(tmp_path / "again")
    filled = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.zero_()
    pdrs.load(path, filled)
    assert entries(filled) == expected
    assert content(pdrs.open(path, device="cpu", verify=True)) == expected


@pytest.mark.parametrize("prefix", ["", "w", "words", "words.", "words.n", "words.n1", "linear", "linear1.", "deep."])
def test_a_prefix_takes_what_begins_with_it(prefix: str, tmp_path: Path) -> None:
    module = many()
    path = saved(module, tmp_path)
    expected = {
        name.removeprefix(prefix): value
        for name, value in entries(module).items()
        if name.startswith(prefix) and name != prefix
    }
    found = pdrs.open(path, prefix=prefix)
    assert list(content(found).items()) == list(expected.items())
    names = random.Random(2).sample([*expected], len(expected) // 2 + 1)
    chosen = pdrs.open(path, prefix=prefix, names=names)
    assert list(content(chosen).items()) == [(name, expected[name]) for name in names]
    for bad in (["nope"], [*names, "nope"], [*names, ""]):
        with pytest.raises(pdrs.MissingEntryError, match="1 of"):
            pdrs.open(path, prefix=prefix, names=bad)
    with pytest.raises(ValueError, match="expected each name once"):
        pdrs.open(path, prefix=prefix, names=[*names, names[0]])


def test_names_below_a_prefix_within_a_dictionary(tmp_path: Path) -> None:
    path = saved(one(), tmp_path)
    assert content(pdrs.open(path, prefix="words.n1", names=["2", "9"])) == {"2": [24.0, 25.0], "9": [38.0, 39.0]}
    for names in ([], ["2"]):
        with pytest.raises(KeyError, match=r"no name in the checkpoint is longer than 'words\.x'"):
            pdrs.open(path, prefix="words.x", names=names)
    # The prefix itself is the name of an entry, which is left out.
    with pytest.raises(pdrs.MissingEntryError, match="1 of 1 names"):
        pdrs.open(path, prefix="words.n1", names=[""])


def test_deltas_of_a_module_open_as_it_does(tmp_path: Path) -> None:
    module = many()
    saved(module, tmp_path)
    with torch.no_grad():
        module["word"]["n1"].fill_(5.0)
        module["linear1"].bias.fill_(6.0)
    pdrs.save(module, tmp_path / "second", since=tmp_path / "module", sync=False)
    found = pdrs.open(tmp_path / "second")
    assert not is_in_memory(found), "no name has changed"
    assert content(found) == entries(module)
    module["word"]["fresh"] = torch.ones(2)
    pdrs.save(module, tmp_path / "third", since=tmp_path / "second", sync=False)
    found = pdrs.open(tmp_path / "third")
    assert is_in_memory(found)
    assert list(content(found).items()) == list(entries(module).items())
    assert content(pdrs.open(tmp_path / "third", prefix="words.")) == content(SD(module["words"]))


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(path: Path, tensor: str, at: int, data: bytes) -> Path:
    """Write an archive of which bytes of packed names are others; a negative place counts from the end."""
    start, stop = Parts.of(path).offsets(tensor)
    begin = start + at if at >= 0 else stop + at
    content = bytearray(path.read_bytes())
    content[begin : begin + len(data)] = data
    bad = path.parent / "bad"
    bad.write_bytes(content)
    return bad


def two() -> Module:
    return ModuleDict({"one": SD.from_tensor(["aa", "bb"], rows(2)), "two": SD.from_tensor(["cc", "dd"], rows(2, 9))})


def test_damage_is_told_with_the_part_that_has_it(tmp_path: Path) -> None:
    path = saved(two(), tmp_path)
    # Behind the counts, the record of a table, and its label, are the ends of the names and their text.
    bad = damaged(path, "two._extra_state", 56 + 32 + 16 + 2 * 8, b"\xc0")
    for read in (list, lambda found: found.keys(prefix=""), SD.copy, lambda found: found.pop("one.aa")):
        found = pdrs.open(bad)
        assert found["one.aa"].tolist() == [0.0, 1.0]
        assert found["two.dd"].tolist() == [20.0, 21.0]
        with pytest.raises(pdrs.CheckpointError, match=r"bad: the tensor 'two\._extra_state': the packed names are"):
            read(found)
    bad = damaged(path, "one._extra_state", 56 + 32 + 16 + 2 * 8, b"bbbb")
    with pytest.raises(pdrs.CheckpointError, match=r"'one\._extra_state'.*\"bb\" is listed twice"):
        pdrs.open(bad).pop("one.bb")
    for check in (verify, lambda path: pdrs.open(path, verify=True)):
        with pytest.raises(pdrs.CheckpointError):
            check(bad)


def test_an_id_cannot_lead_to_a_table_of_another_part(tmp_path: Path) -> None:
    module = two()
    module["one"].move_to_end("aa")  # so that ids are listed
    path = saved(module, tmp_path)
    bad = damaged(path, "one._extra_state", 56 + 32 + 16, (1 << 40).to_bytes(8, "little"))
    found = pdrs.open(bad)
    assert ["one.bb" in found, "one.aa" in found] == [False, True]
    assert found.isin(["one.bb", "one.aa", "two.cc"]).tolist() == [False, True, True]
    with pytest.raises(pdrs.CheckpointError, match=r"'one\._extra_state'"):
        list(found)
    with pytest.raises(pdrs.CheckpointError, match="a name lies in a table or a row that is not there"):
        found["fresh"] = torch.ones(2)


def test_a_tensor_with_the_name_of_an_entry_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    module = ModuleDict({"words": words(3), "other": Linear(2, 1, bias=False)})
    path = saved(module, tmp_path)
    content = path.read_bytes().replace(b'"other.weight"', b'"words.n1"    ')
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(pdrs.CheckpointError, match="as that of a tensor, or in two dictionaries"):
        pdrs.open(tmp_path / "bad")
