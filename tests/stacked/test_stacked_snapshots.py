"""What is read of a StackedParameterDict while another thread changes it: names and rows fit together.

The bugs that this hunts: tables that are read first and names later, or the other way round; a state dict, kept to be
written by another thread, whose rows get new names before they are written; a pickle of names and tables of different
times. No test depends on luck: the change comes where the reader is stopped.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from observed import At, read_names

SD = pdrs.StackedParameterDict
NAMES = [f"n{at}" for at in range(20)]


def numbered() -> SD:
    return SD({name: torch.full((3,), float(name[1:])) for name in NAMES})


def shuffle(sd: SD) -> None:
    """Let rows be freed, get other names, move and grow."""
    sd.drop(NAMES[:10])
    for name in reversed(NAMES[:10]):
        sd[name] = torch.full((3,), float(name[1:]))
    sd.pop("n15")
    sd["n15"] = torch.full((3,), 15.0)
    sd.drop(["n0", "n7"])
    sd.compact()
    sd.update([(name, torch.full((3,), float(name[1:]))) for name in ("n7", "n0", "n99")])


def fits(named: Mapping[str, Tensor], at_least: int = len(NAMES)) -> bool:
    assert len(named) >= at_least
    return all(value.tolist() == [float(name[1:])] * 3 for name, value in named.items())


def by_torch(state: Any) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = SD()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    return loaded.named_state_dict()


def shaped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value if key == "_extra_state" else value.view(-1, 3) for key, value in state.items()}


# What is kept, and how it is read later.
KEPT: dict[str, tuple[Callable[[SD], Any], Callable[[Any], Mapping[str, Tensor]]]] = {
    "state_dict": (SD.state_dict, by_torch),
    "state_dict of a module": (
        lambda sd: torch.nn.ModuleDict({"w": sd}).state_dict(),
        lambda state: by_torch({key.removeprefix("w."): value for key, value in state.items()}),
    ),
    "named_state_dict": (SD.named_state_dict, dict),
    "views of a state dict": (
        lambda sd: {key: value.view(-1) for key, value in sd.state_dict().items()},
        lambda state: by_torch(shaped(state)),
    ),
}


@pytest.mark.parametrize("change", [shuffle, SD.clear, lambda sd: [sd.popitem() for _ in range(20)]])
@pytest.mark.parametrize("kept", KEPT)
def test_what_is_kept_to_be_written_later_keeps_the_rows_of_its_names(kept: str, change: Callable[[SD], Any]) -> None:
    sd = numbered()
    keep, read = KEPT[kept]
    held = keep(sd)
    change(sd)
    assert fits(read(held))
    if change is shuffle:
        assert fits(sd.named_state_dict())


def test_a_table_is_copied_once_for_a_state_dict_and_only_while_it_is_kept() -> None:
    sd = numbered()
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(NAMES).sum().backward()
    gradient, address = sd.table((3,)).grad, sd.table((3,)).data_ptr()
    sd.state_dict()
    sd.pop("n0")
    assert sd.table((3,)).data_ptr() == address, "nobody has kept it"
    kept = sd.state_dict()
    with torch.no_grad():
        sd["n5"].fill_(-1)
    assert (kept["float32_3"] == -1).any(), "until a name goes, a state dict has the memory of the table, as torch's"
    sd["new"] = torch.zeros(3)
    assert sd.table((3,)).data_ptr() == address
    sd.pop("n1")
    moved = sd.table((3,)).data_ptr()
    assert moved != address
    assert sd.table((3,)).grad is gradient
    sd.pop("n2")
    assert sd.table((3,)).data_ptr() == moved
    sd["n3"] = torch.ones(5)
    assert kept["float32_3"].data_ptr() == address
    optimizer.step()


def stopped_at_each_step(read: Callable[[SD], Mapping[str, Tensor]], change: Callable[[SD], object]) -> None:
    """Read a dictionary again and again, each time with a change by another thread in another function."""
    read(numbered())  # what is done only once has been done
    sd = numbered()
    refusals = 0
    with At(events=("call",)) as steps:
        read(sd)
    for step in steps.firsts():
        sd = numbered()
        thread = threading.Thread(target=change, args=(sd,))

        def in_thread(thread: threading.Thread = thread) -> None:
            thread.start()
            thread.join(0.01)  # it goes on if it is let

        try:
            with At(step, in_thread, ("call",)):
                found = read(sd)
        except RuntimeError as refused:
            if "while it was pickled" not in str(refused):
                raise
            found = {}
        if thread.ident is not None:  # what frees things may be called now and then
            thread.join()
        # In the middle of the change ten names may be gone.
        assert not found or fits(found, len(NAMES) - 10), steps.places[step]
        assert fits(sd.named_state_dict())
        refusals += not found
    assert refusals <= 3, "a pickle that another thread may spoil anywhere"


def saved(sd: SD, folder: Path, layout: Any = "archive") -> Mapping[str, Tensor]:
    pdrs.save(torch.nn.ModuleDict({"w": sd}), folder / "file", layout=layout)
    return pdrs.open(folder / "file", prefix="w.").named_state_dict()


READS: dict[str, Callable[[SD, Path], Mapping[str, Tensor]]] = {
    "torch.save of a state dict": lambda sd, _: by_torch(sd.state_dict()),
    "torch.save of the module": lambda sd, _: pickled(sd, lambda one, file: torch.save(one, file)).named_state_dict(),
    "pdrs.save": saved,
    "pdrs.save by name": lambda sd, folder: saved(sd, folder, "named"),
    "copy": lambda sd, _: sd.copy().named_state_dict(),
    "deepcopy": lambda sd, _: copy.deepcopy(torch.nn.ModuleList([sd]))[0].named_state_dict(),
    "or": lambda sd, _: (sd | SD()).named_state_dict(),
    "ror": lambda sd, _: {} | sd.named_state_dict(),
    "constructor": lambda sd, _: SD(sd).named_state_dict(),
    "update": lambda sd, _: updated(sd).named_state_dict(),
    "named_state_dict": lambda sd, _: sd.named_state_dict(),
    "unstack": lambda sd, _: dict(sd.unstack().items()),
    "pickle": lambda sd, _: pickle.loads(pickle.dumps(sd)).named_state_dict(),
}


def pickled(sd: SD, write: Callable[[SD, io.BytesIO], None]) -> SD:
    buffer = io.BytesIO()
    write(sd, buffer)
    buffer.seek(0)
    loaded: SD = torch.load(buffer, weights_only=False)
    return loaded


def updated(sd: SD) -> SD:
    made = SD()
    made.update(sd)
    return made


@pytest.mark.parametrize("read", READS)
def test_names_and_rows_are_read_as_they_are_at_one_time(read: str, tmp_path: Path) -> None:
    stopped_at_each_step(lambda sd: READS[read](sd, tmp_path), shuffle)


@pytest.mark.parametrize("save", [pickle.dumps, lambda sd: torch.save(sd, io.BytesIO())], ids=["pickle", "torch.save"])
def test_a_pickle_of_tables_that_have_moved_meanwhile_is_refused(save: Callable[[Any], Any]) -> None:
    sd = numbered()

    class Compacting:
        def __reduce__(self) -> Any:
            shuffle(sd)
            return tuple, ()

    sd.__dict__.update({"training": Compacting()})  # which is pickled before the tables
    sd.__dict__.update({"_parameters": sd.__dict__.pop("_parameters")})
    with pytest.raises(RuntimeError, match=r"another thread has changed the dictionary while it was pickled"):
        save(sd)


def test_a_pickle_may_have_the_optimizer_and_handles_of_a_dictionary_too() -> None:
    sd = numbered()
    optimizer, handle = torch.optim.Adam(sd.parameters()), sd.lookup(["n3", "n1"])
    loaded, of, held = pickle.loads(pickle.dumps((sd, optimizer, handle)))
    assert of.param_groups[0]["params"][0] is loaded.table((3,))
    assert loaded.gather(held).tolist() == [[3.0] * 3, [1.0] * 3]
    loaded.freeze(["n3"])
    loaded.gather(held).sum().backward()
    assert loaded.table((3,)).grad[3].tolist() == [0.0] * 3


@pytest.mark.parametrize("view", [SD.items, SD.values])
def test_rows_that_move_while_they_are_iterated_over_are_looked_up_again(view: Callable[[SD], Any]) -> None:
    def dropped() -> SD:
        sd = numbered()
        sd.drop(["n0", "n1"])
        return sd

    sd = dropped()
    with At() as steps:
        assert len([*view(sd).__iter__()]) == 18
    for step in range(len(steps.places)):
        sd, seen = dropped(), []
        thread = threading.Thread(target=sd.compact)
        # It gets in where the iteration does not hold the lock, and elsewhere as soon as that is given back.
        with At(step, lambda thread=thread: (thread.start(), thread.join(0.01))):
            for one in view(sd):
                row = one[1] if isinstance(one, tuple) else one
                seen.append(row.tolist())
        thread.join()
        assert sorted(seen) == [[float(at)] * 3 for at in range(2, 20)], steps.places[step]


def test_extra_state_is_that_of_the_tables_beside_it() -> None:
    sd = numbered()
    state = sd.state_dict()
    shuffle(sd)
    names = read_names(state["_extra_state"])
    assert names.tables[0].used == len(names.rows) == len(state["float32_3"]) == 20


@pytest.mark.parametrize("read", [pdrs.ParameterDict.copy, pdrs.ParameterDict.stack, copy.deepcopy])
def test_a_parameter_dict_is_read_as_it_is_at_one_time(read: Callable[[Any], Any]) -> None:
    def made() -> pdrs.ParameterDict:
        pd = pdrs.ParameterDict((name, torch.full((3,), float(name[1:]))) for name in NAMES)
        pd["n0"] = pd.pop("n0")  # the order of the Parameters is not that of the names then
        return pd

    before, after = [*NAMES[1:], "n0"], [*NAMES[2:], "n0", "n1"]
    pd = made()
    with At() as steps:
        read(pd)
    orders = []
    for step in steps.chosen():
        pd = made()
        with At(step, lambda pd=pd: pd.update([("n1", pd.pop("n1"))])):
            found = read(pd)
        assert fits(dict(found.items())), steps.places[step]
        orders.append(list(found.keys()))
    assert all(order in (before, after) for order in orders)
    assert before in orders
