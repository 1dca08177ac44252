"""Names that are found in the file of an archive, until one changes: `pdrs.open` reads none of them.

The bugs that this hunts: a name that is not found in the file, or another's row; an index that is made although nothing
has changed; a Lookup, an iterator or a version that does not survive the first change; a damaged file that crashes, or
that is refused without its name.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch.nn import Parameter

import pdrs
from archives import Parts
from pdrs.checkpoint import verify

SD = pdrs.StackedParameterDict
ODD = ["a", "\0", "\ud800", "é", "e\u0301", "日本", "😀", "a.b.c", " ", "x" * 1_000_000]


def rows(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start * 2.0, (start + count) * 2).reshape(count, 2)


def plain() -> SD:
    return SD.from_tensor([f"n{at}" for at in range(500)], rows(500))


def mixed() -> SD:
    """Give names of several tables, in another order than their rows."""
    sd = SD.from_tensor([*ODD, *(f"n{at}" for at in range(300))], rows(310))
    sd.drop([f"n{at}" for at in range(0, 300, 7)])
    sd.update({"new": torch.ones(2), "wide": torch.ones(3), "whole": Parameter(torch.arange(2), requires_grad=False)})
    sd.move_to_end("n1", last=False)
    return sd


MADE = pytest.mark.parametrize("make", [plain, mixed, SD, lambda: SD({"only": torch.ones(2)})])


def opened(sd: SD, folder: Path) -> SD:
    pdrs.save(sd, folder / "names", sync=False)
    return pdrs.open(folder / "names")


def content(sd: SD) -> dict[str, list[Any]]:
    return {name: row.tolist() for name, row in sd.items()}


@MADE
def test_each_name_is_found_in_the_file(make: Callable[[], SD], tmp_path: Path) -> None:
    sd = make()
    found = opened(sd, tmp_path)
    others = ["", "n", "n500", "nope", "\udfff", "x" * 999_999]
    assert len(found) == len(sd)
    assert [name in found for name in [*sd, *others]] == [True] * len(sd) + [False] * len(others)
    assert [found.get(name) for name in others] == [None] * len(others)
    for name, row in sd.items():
        assert found[name].tolist() == row.tolist()
    assert found.isin([*others, *sd]).tolist() == [False] * len(others) + [True] * len(sd)
    assert list(found) == list(sd)
    assert list(reversed(found)) == list(reversed(sd))
    assert content(found) == content(sd)
    assert found.keys(prefix="n1") == sd.keys(prefix="n1")
    for name in others:
        with pytest.raises(KeyError):
            found[name]


@MADE
def test_many_names_are_gathered_as_from_memory(make: Callable[[], SD], tmp_path: Path) -> None:
    sd = make()
    found = opened(sd, tmp_path)
    wanted = [name for name, row in sd.items() if row.shape == (2,) and row.dtype == torch.float32]
    wanted = [*reversed(wanted), *wanted[::3]]
    if not wanted:
        return
    for names in (wanted, tuple(wanted), iter(wanted)):
        again = list(names)
        assert torch.equal(found.gather(again), sd.gather(wanted))
    assert torch.equal(found.gather(found.lookup(wanted)), sd.gather(wanted))
    assert torch.equal(found.gather([*wanted, "nope"], missing="zero"), sd.gather([*wanted, "nope"], missing="zero"))
    assert found.gather([*wanted, "nope"], missing="skip").shape == (len(wanted), 2)
    with pytest.raises(pdrs.MissingEntryError, match="nope"):
        found.gather([*wanted, "nope"])
    with pytest.raises(TypeError, match="names must be str, got int"):
        found.gather([*wanted, 5])
    found.gather(wanted, sparse=True).sum().backward()
    assert found.table((2,), torch.float32).grad is not None


@MADE
def test_repr_reads_no_names_but_those_that_it_shows(make: Callable[[], SD], tmp_path: Path) -> None:
    sd = make()
    found = opened(sd, tmp_path)
    before = sys.getsizeof(found._index)
    assert repr(found) == repr(sd)
    assert sys.getsizeof(found._index) == before
    with pytest.raises(IndexError, match="there is no table 99"):
        found._index.count(99)


def test_to_open_and_to_look_up_makes_no_index(tmp_path: Path) -> None:
    def made(count: int) -> list[int]:
        sd = SD.from_tensor([f"name.{at}" for at in range(count)], rows(count))
        names = [f"name.{at}" for at in range(0, count, count // 100)]
        pdrs.save(sd, tmp_path / "names", sync=False)
        del sd
        before = sys.getallocatedblocks()
        found = pdrs.open(tmp_path / "names")
        blocks = sys.getallocatedblocks() - before
        values = found.gather(names), found.indices(names), found[names[3]], names[5] in found, len(found)
        sizes = [blocks, sys.getsizeof(found._index)]
        assert len(values) == 5
        found["new"] = torch.ones(2)
        assert sys.getsizeof(found._index) > 8 * count, "the first change makes one"
        return sizes

    made(100)
    few, many = made(100), made(50_000)
    assert many[1] == few[1]
    assert abs(many[0] - few[0]) < 200


CHANGES: dict[str, Callable[[SD], Any]] = {
    "set": lambda sd: sd.__setitem__("n5", torch.full((2,), 9.0)),
    "set a new one": lambda sd: sd.__setitem__("fresh", torch.full((2,), 9.0)),
    "update": lambda sd: sd.update({"n5": torch.full((2,), 9.0), "fresh": torch.ones(2)}),
    "insert": lambda sd: sd.insert(["fresh", "n5", "fresher"], shape=(2,)),
    "scatter": lambda sd: sd.scatter(["n5", "n8"], torch.ones(2, 2)),
    "scatter new ones": lambda sd: sd.scatter(["n5", "fresh"], torch.ones(2, 2), missing="insert"),
    "pop": lambda sd: sd.pop("n5"),
    "popitem": lambda sd: sd.popitem(),
    "popitem first": lambda sd: sd.popitem(last=False),
    "del": lambda sd: sd.__delitem__("n5"),
    "drop": lambda sd: sd.drop(["n5", "n8"]),
    "retain": lambda sd: sd.retain(["n5", "n8"]),
    "rename": lambda sd: sd.rename("n5", "fresh"),
    "move_to_end": lambda sd: sd.move_to_end("n5"),
    "clear": SD.clear,
    "compact": SD.compact,
    "reserve": lambda sd: sd.reserve(2000, shape=(2,)),
    "freeze": lambda sd: sd.freeze(["n5"]),
    "groups": lambda sd: sd.param_groups(by={"n1": {"lr": 0.1}}),
    "load": lambda sd: sd.load_state_dict(plain().state_dict()),
    "load by name": lambda sd: sd.load_state_dict(dict(plain().named_state_dict()), strict=False),
    "move": SD.double,
    "copy": SD.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda sd: pickle.loads(pickle.dumps(sd)),
    "state_dict": SD.state_dict,
    "unstack": SD.unstack,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [plain, mixed])
def test_a_change_does_what_it_does_in_memory(make: Callable[[], SD], change: str, tmp_path: Path) -> None:
    def outcome(sd: SD) -> list[Any]:
        held = sd.lookup(["n2", "n9"])
        before = sd.layout_version
        try:
            CHANGES[change](sd)
        except Exception as error:
            return [type(error), str(error), content(sd)]
        try:
            kept = sd.gather(held).tolist()
        except KeyError as error:
            kept = [str(error)]
        return [kept, content(sd), sd.layout_version == before, [tuple(one.shape) for one in sd.tables().values()]]

    sd = make()
    sd.compact()  # an archive leaves free rows at the end out
    expected, found = outcome(copy.deepcopy(sd)), outcome(opened(sd, tmp_path))
    if change in ("set a new one", "update", "insert", "scatter new ones", "reserve"):
        expected.pop(), found.pop()  # the room of a table in a file is that which it had
    assert found == expected


def test_an_iterator_goes_on_when_names_come_into_memory_and_ends_when_they_change(tmp_path: Path) -> None:
    sd = opened(mixed(), tmp_path)
    expected = list(sd)
    for reverse in (False, True):
        for read in (SD.copy, lambda sd: sd.freeze(["n5"])):
            sd = opened(mixed(), tmp_path)
            walk = reversed(sd) if reverse else iter(sd)
            seen = [next(walk) for _ in range(20)]
            read(sd)
            seen += walk
            assert seen == (expected[::-1] if reverse else expected)
    sd = opened(mixed(), tmp_path)
    walk = iter(sd)
    next(walk)
    sd["fresh"] = torch.ones(2)
    with pytest.raises(RuntimeError, match="changed during iteration"):
        next(walk)


def test_an_opened_dictionary_is_saved_again_and_has_successors(tmp_path: Path) -> None:
    sd = mixed()
    found = opened(sd, tmp_path)
    pdrs.save(found, tmp_path / "again")
    assert content(pdrs.open(tmp_path / "again")) == content(sd)
    verify(tmp_path / "again")
    found["n5"] = torch.full((2,), 7.0)
    pdrs.save(found, tmp_path / "delta", since=tmp_path / "names")
    found.pop("n8")
    found["fresh"] = torch.ones(2)
    pdrs.save(found, tmp_path / "third", since=tmp_path / "delta")
    for name in ("delta", "third"):
        verify(tmp_path / name)
    assert content(pdrs.open(tmp_path / "third")) == content(found)
    pdrs.save(pdrs.open(tmp_path / "third"), tmp_path / "fourth", since=tmp_path / "third")
    assert (tmp_path / "fourth").stat().st_size < 8192
    assert content(pdrs.open(tmp_path / "fourth")) == content(found)


def test_threads_look_up_while_another_makes_the_first_change(tmp_path: Path) -> None:
    sd = plain()
    names = list(sd)
    for _ in range(5):
        found, failed = opened(sd, tmp_path), list[BaseException]()

        def look(found: SD = found, failed: list[BaseException] = failed) -> None:
            try:
                for at in range(60):
                    assert torch.equal(found.gather(names[at:]), sd.gather(names[at:]))
                    assert found[names[at]].tolist() == sd[names[at]].tolist()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        found["fresh"] = torch.ones(2)
        for thread in threads:
            thread.join()
        assert not failed
        assert len(found) == 501


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(folder: Path, at: int, data: bytes, sd: SD) -> Path:
    """Write an archive of which bytes of the packed names are others; a negative place counts from the end."""
    pdrs.save(sd, folder / "good", sync=False)
    parts = Parts.of(folder / "good")
    start, stop = parts.offsets("_extra_state")
    content = bytearray((folder / "good").read_bytes())
    begin = start + at if at >= 0 else stop + at
    content[begin : begin + len(data)] = data
    (folder / "bad").write_bytes(content)
    return folder / "bad"


@pytest.mark.parametrize("fill", [bytes(8), b"\xff" * 8, (1).to_bytes(8, "little"), (2**31).to_bytes(8, "little")])
def test_damaged_words_hide_names_and_nothing_else(fill: bytes, tmp_path: Path) -> None:
    sd = plain()
    words = len(sd) + len(sd) // 3 + 1
    for first, count in ((0, words), (0, words // 2), (7, 1)):
        path = damaged(tmp_path, 8 * (first - words), fill * count, sd)
        if path.read_bytes() == (tmp_path / "good").read_bytes():
            continue  # A word without a name stays one.
        found = pdrs.open(path)
        for name, row in sd.items():
            assert name not in found or found[name].tolist() == row.tolist()
        there = [name for name in sd if name in found]
        if there:
            assert torch.equal(found.gather(there), sd.gather(there))
        assert list(found) == list(sd)
        for check in (lambda path=path: verify(path), lambda path=path: pdrs.open(path, verify=True)):
            with pytest.raises(pdrs.CheckpointError, match=r"bad: the tensor '_extra_state'"):
                check()
        found["fresh"] = torch.ones(2)  # whoever reads all names needs no words
        assert content(found) == content(sd) | {"fresh": [1.0, 1.0]}


def test_a_search_goes_on_behind_names_with_the_same_upper_half(tmp_path: Path) -> None:
    sd = plain()
    words = len(sd) + len(sd) // 3 + 1
    for name in ("n7", "n499"):
        upper = xxhash.xxh3_64_intdigest(name.encode()) >> 32 << 32
        # Each word has the upper half of this name's hash, and they have all numbers in turn.
        fill = b"".join((upper | at % len(sd) + 1).to_bytes(8, "little") for at in range(words))
        found = pdrs.open(damaged(tmp_path, -8 * words, fill, sd))
        assert found[name].tolist() == sd[name].tolist()
        assert found.gather([name, name]).tolist() == [sd[name].tolist()] * 2
        assert [other for other in sd if other in found] == [name]
        assert found.isin(list(sd)).sum() == 1


@pytest.mark.parametrize("end", [0, 1, 3, 2**40, 2**64 - 1])
def test_a_name_that_ends_elsewhere_is_found_when_all_are_read(end: int, tmp_path: Path) -> None:
    sd = SD.from_tensor(["aa", "bb", "cc", "dd"], rows(4))
    # Behind the counts, the record of a table, and its label.
    path = damaged(tmp_path, 56 + 32 + 16 + 8, end.to_bytes(8, "little"), sd)
    found = pdrs.open(path)
    for name, row in sd.items():
        assert name not in found or found[name].tolist() == row.tolist()
    if end == 3:  # a name more, which contradicts nothing but the words and the checksum
        assert list(found) == ["aa", "b", "bcc", "dd"]
        return
    for read in (list, SD.copy, lambda found: found.update({"x": torch.ones(2)}), SD.state_dict):
        with pytest.raises(pdrs.CheckpointError, match="bad: the tensor '_extra_state': the packed names are damaged"):
            read(pdrs.open(path))


def test_ids_that_cannot_be_hide_their_names(tmp_path: Path) -> None:
    sd = SD.from_tensor(["aa", "bb", "cc"], rows(3))
    sd.move_to_end("aa")  # so that ids are listed
    for number in (7, 1 << 40, 1 << 63, 2**64 - 1):
        path = damaged(tmp_path, 56 + 32 + 16, number.to_bytes(8, "little"), sd)
        found = pdrs.open(path)
        assert [name in found for name in ("aa", "bb", "cc")] == [True, False, True]
        with pytest.raises(pdrs.CheckpointError, match="a name lies in a table or a row that is not there"):
            found["fresh"] = torch.ones(2)
        with pytest.raises(pdrs.CheckpointError) as caught:
            list(found)
        assert caught.value.path == str(path)
    # Another's row contradicts only itself, and is refused when all names are read.
    path = damaged(tmp_path, 56 + 32 + 16, (2).to_bytes(8, "little"), sd)
    with pytest.raises(pdrs.CheckpointError, match="two names have one row"):
        pdrs.open(path)["fresh"] = torch.ones(2)


def test_names_that_are_listed_twice_are_refused_when_all_are_read(tmp_path: Path) -> None:
    sd = SD.from_tensor(["aa", "bb", "cc"], rows(3))
    path = damaged(tmp_path, 56 + 32 + 16 + 3 * 8, b"bbbb", sd)
    with pytest.raises(pdrs.CheckpointError, match='"bb" is listed twice'):
        pdrs.open(path)["fresh"] = torch.ones(2)
    with pytest.raises(pdrs.CheckpointError):
        verify(path)


def test_a_name_that_is_no_text_is_refused_when_it_is_read(tmp_path: Path) -> None:
    sd = SD.from_tensor(["aa", "bb", "cc"], rows(3))
    path = damaged(tmp_path, 56 + 32 + 16 + 3 * 8, b"\xc0", sd)
    for read in (list, lambda found: list(found.items()), lambda found: found.keys(prefix=""), SD.copy):
        found = pdrs.open(path)
        assert found["bb"].tolist() == sd["bb"].tolist()
        with pytest.raises(pdrs.CheckpointError, match="bad: the tensor '_extra_state': the packed names are damaged"):
            read(found)
