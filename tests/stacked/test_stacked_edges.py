"""``StackedParameterDict`` where something around it is unusual: strides, devices, modes, hooks, threads, damage.

The bugs that this hunts: rows that silently share memory, state of optimizers that begins with a wrong number, damaged
names that are taken for entries, tables that can never be trained because of the mode that they were made in, a mask
that masks nothing, a refusal that leaves a trace, and copies that another thread has changed half way.
"""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import parametrize, prune

import pdrs
from observed import assert_consistent, frozen_names
from pdrs import StackedParameterDict


class Doubled(torch.nn.Module):
    def forward(self, table: Tensor) -> Tensor:
        return table * 2


def two(*shape: int, dtype: torch.dtype = torch.float32) -> StackedParameterDict:
    return StackedParameterDict.from_tensor(["a", "b"], torch.ones(2, *shape, dtype=dtype))


# -- strides -----------------------------------------------------------------------------------------------------------


def test_a_table_in_another_order_than_c_can_be_unstacked() -> None:
    rows = torch.arange(6.0).reshape(2, 3).t()
    sd = StackedParameterDict.from_tensor(["a", "b", "c"], rows)
    assert {name: row.tolist() for name, row in sd.unstack().items()} == {"a": [0, 3], "b": [1, 4], "c": [2, 5]}


@pytest.mark.parametrize(
    "rows",
    [
        torch.arange(3.0).unfold(0, 2, 1),
        torch.zeros(9).as_strided((2, 2, 2), (3, 2, 1)),
        torch.zeros(1, 2).expand(2, 2),
    ],
    ids=["unfolded", "strided", "expanded"],
)
def test_rows_that_overlap_are_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match=r"values with memory of their own, got a view in which they overlap"):
        StackedParameterDict.from_tensor(["a", "b"], rows)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(4, 6)[:2, ::2],
        torch.zeros(3, 2, 5).permute(1, 2, 0),
        torch.zeros(2, 0),
        torch.zeros(2, 1).expand(2, 1),
        torch.zeros(9).as_strided((2, 2), (2, 5)),
    ],
    ids=["sliced", "permuted", "empty", "of one", "interlaced"],
)
def test_rows_with_gaps_between_them_are_taken(rows: Tensor) -> None:
    assert StackedParameterDict.from_tensor(["a", "b"], rows).gather(["b"]).shape[1:] == rows.shape[1:]


# -- devices and modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
def test_tensors_on_two_devices_for_one_new_table_are_refused_and_leave_no_trace(devices: tuple[str, str]) -> None:
    sd = StackedParameterDict()
    pairs = [(device, torch.ones(2, device=device)) for device in devices]
    with pytest.raises(ValueError, match=r"expected a tensor on cpu for 'meta', as others that go to its new table"):
        sd.update(pairs)
    assert (len(sd), list(sd.parameters())) == (0, [])


@pytest.mark.parametrize("make", ["from_shapes", "load_state_dict"])
def test_a_table_that_is_made_in_inference_mode_can_be_trained(make: str) -> None:
    saved = two(2).state_dict()
    with torch.inference_mode():
        if make == "from_shapes":
            sd = StackedParameterDict.from_shapes({"a": (2,), "b": (2,)}, init=torch.nn.init.ones_)
        else:
            sd = StackedParameterDict()
            sd.load_state_dict(saved)
    assert not sd.table((2,)).is_inference()
    (sd["a"] * sd["b"]).sum().backward()
    assert sd.table((2,)).grad.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("change", ["grow", "compact", "backward"])
def test_sparse_gradients_stay_on_their_device_whatever_the_default_one_is(change: str) -> None:
    sd = two(2, 2)
    total = sd.gather(["b"], sparse=True).sum()
    if change != "backward":
        total.backward()
    value = torch.ones(2, 2)
    with torch.device("meta"):
        if change == "grow":
            sd["c"] = value
        elif change == "compact":
            del sd["a"]
            sd.compact()
        else:
            total.backward()
    assert sd.table((2, 2)).grad.device.type == "cpu"
    assert dict(sd.named_grads())["b"].tolist() == [[1, 1], [1, 1]]


# -- optimizers and hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda tables: torch.optim.Rprop(tables, lr=0.1), "step_size"),
        (lambda tables: torch.optim.Adagrad(tables, initial_accumulator_value=0.1), "sum"),
    ],
    ids=["Rprop", "Adagrad"],
)
def test_state_of_a_new_complex_row_begins_as_torch_begins_it(make: Callable[..., Any], key: str) -> None:
    sd = two(2, dtype=torch.complex64)
    optimizer = make(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(["a"]).abs().sum().backward()
    optimizer.step()
    del sd["a"]
    sd.update({"c": torch.ones(2, dtype=torch.complex64), "d": torch.ones(2, dtype=torch.complex64)})
    state = optimizer.state[sd.table((2,), torch.complex64)][key]
    begun = torch.full((2,), complex(0.1, 0.1))
    assert torch.equal(state[sd.indices(["c", "d"])], torch.stack([begun, begun]))


def test_a_hook_of_the_users_sees_the_gradient_of_the_new_size() -> None:
    sd = two(2)
    table = sd.table((2,))
    optimizer = torch.optim.SGD([table], lr=1.0)
    table.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    total = sd.gather(["a", "a", "b"]).sum()
    sd["c"] = torch.ones(2)
    total.backward()
    assert {name: row.tolist() for name, row in sd.items()} == {"a": [-1, -1], "b": [0, 0], "c": [1, 1]}


def test_a_hook_of_the_users_sees_the_gradient_behind_the_mask() -> None:
    sd = two(2)
    seen = []
    sd.table((2,)).register_post_accumulate_grad_hook(lambda table: seen.append(table.grad.tolist()))
    sd.freeze(["a"])
    sd.gather(["a", "b"]).sum().backward()
    assert seen == [[[0, 0], [1, 1]]]


def parametrized(sd: StackedParameterDict) -> StackedParameterDict:
    parametrize.register_parametrization(sd, "float32_2", Doubled())
    return sd


def pruned(sd: StackedParameterDict) -> StackedParameterDict:
    prune.l1_unstructured(sd, "float32_2", amount=1)
    return sd


def replica(sd: StackedParameterDict) -> StackedParameterDict:
    table = sd.table((2,))
    made: StackedParameterDict = sd._replicate_for_data_parallel()
    made.float32_2 = table * 2
    return made


WRITES: dict[str, tuple[str, Callable[[StackedParameterDict], object]]] = {
    "set an old name": ("set names", lambda sd: sd.__setitem__("a", torch.full((2,), 7.0))),
    "set old names and a new one": (
        "set names",
        lambda sd: sd.update({"a": torch.full((2,), 7.0), "new": torch.ones(3)}),
    ),
    "set a new name, in the row of one that is gone": (
        "insert names",
        lambda sd: sd.__setitem__("new", Parameter(torch.ones(2))),
    ),
    "scatter": ("write rows", lambda sd: sd.scatter(["a"], torch.full((1, 2), 7.0))),
    "scatter and insert": (
        "write rows",
        lambda sd: sd.scatter(["new", "a"], torch.full((2, 2), 7.0), missing="insert"),
    ),
    "freeze": ("freeze names", lambda sd: sd.freeze(["a"])),
    "load by name": (
        "load the layout of a ParameterDict",
        lambda sd: sd.load_state_dict({name: torch.full((2,), 7.0) for name in sd}, strict=False),
    ),
}


@pytest.mark.parametrize(("what", "write"), WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("compute", [parametrized, pruned, replica])
def test_what_would_be_lost_in_a_computed_table_is_not_written(compute: Any, what: str, write: Any) -> None:
    sd = StackedParameterDict.from_tensor(["a", "b", "gone"], torch.arange(1.0, 7).reshape(3, 2))
    del sd["gone"]
    sd = compute(sd)
    before = [(name, row.tolist()) for name, row in sd.items()]
    with pytest.raises(
        RuntimeError, match=rf"'float32_2' is computed from other tensors \(by .*\): {what} before that"
    ):
        write(sd)
    assert [(name, row.tolist()) for name, row in sd.items()] == before


@pytest.mark.parametrize(("what", "write"), WRITES.values(), ids=WRITES)
def test_what_would_be_written_to_a_stand_in_for_a_table_is_not_written(what: str, write: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self, sd: StackedParameterDict) -> None:
            super().__init__()
            self.sd = sd

        def forward(self) -> None:
            write(self.sd)

    sd = StackedParameterDict.from_tensor(["a", "b", "gone"], torch.arange(1.0, 7).reshape(3, 2))
    del sd["gone"]
    before = [(name, row.tolist()) for name, row in sd.items()]
    stand_in = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"stands in for the table 'float32_2', as in .*: {what} before that"):
        torch.func.functional_call(Model(sd), {"sd.float32_2": stand_in}, ())
    assert [(name, row.tolist()) for name, row in sd.items()] == before
    assert not stand_in.any()
    write(sd)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 3, 2)], ids=["neighbours", "others"])
@pytest.mark.parametrize("names", [["c", "a"], ["b", "c"]], ids=["scattered", "in a row"])
def test_rows_of_a_table_can_be_scattered_into_it(names: list[str], rows: slice) -> None:
    sd = StackedParameterDict.from_tensor(["a", "b", "c", "d"], torch.arange(8.0).reshape(4, 2))
    values = sd.table((2,)).detach()[rows]
    wanted = {name: row.tolist() for name, row in sd.items()} | dict(zip(names, values.tolist(), strict=True))
    sd.scatter(names, values)
    assert {name: row.tolist() for name, row in sd.items()} == wanted


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_values_that_are_not_dense_are_refused(make: Any) -> None:
    sd = two(2)
    before = [row.tolist() for row in sd.values()]
    with pytest.raises(
        TypeError, match=r"dense tensor of values, got one with the layout torch\._?(sparse_coo|mkldnn)"
    ):
        sd.scatter(["b", "a"], make(torch.ones(2, 2)))
    assert [row.tolist() for row in sd.values()] == before


def test_values_without_memory_are_left_to_torch() -> None:
    sd = two(2)
    sd.scatter(["b", "a"], torch._efficientzerotensor((2, 2)))
    assert [row.tolist() for row in sd.values()] == [[0, 0], [0, 0]]

    def scattered(values: Tensor) -> Tensor:
        sd.scatter(["b", "a"], values)
        return values.sum()

    with pytest.raises(RuntimeError, match="in-place operation"):
        torch.func.grad(scattered)(torch.ones(2, 2))


def test_a_list_that_gives_other_names_than_lie_in_it_is_asked_for_them_everywhere() -> None:
    class Names(list[str]):
        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

    sd, names = two(2), Names(["b"])
    assert sd.lookup(names).names == ("a",)
    assert sd.indices(names).tolist() == [0]
    assert torch.equal(sd.gather(names)[0], sd["a"])
    sd.scatter(names, torch.full((1, 2), 7.0))
    assert sd["a"].tolist() == [7, 7]
    sd.drop(names)
    assert list(sd) == ["b"]


def test_a_mask_from_before_a_parametrization_masks_the_original() -> None:
    sd = two(2)
    sd.freeze(["a"])
    parametrize.register_parametrization(sd, "float32_2", Doubled())
    sd.gather(["a", "b"]).sum().backward()
    assert sd.parametrizations.float32_2.original.grad.tolist() == [[0, 0], [2, 2]]


def test_compiled_expressions_are_refused_before_anything_moves() -> None:
    sd = two(2)
    with pytest.raises(TypeError, match=r"expected regular expressions as str.*got re\.compile\('b'\)"):
        sd.param_groups(by={re.compile("b"): {}})
    assert list(sd.state_dict()) == ["float32_2", "_extra_state"]


def test_new_names_of_another_shape_than_those_beside_them_are_not_inserted() -> None:
    sd = two(2)
    with pytest.raises(ValueError, match=r"got float32 of shape \[2\], and new ones of float32 of shape \[3\]"):
        sd.gather(["a", "new"], missing="insert", shape=(3,))
    with pytest.raises(ValueError, match=r"got float32 of shape \[2\], and new ones of float64 of shape \[2\]"):
        sd.gather(["a", "new"], missing="insert", dtype=torch.float64)
    assert (list(sd), len(list(sd.parameters()))) == (["a", "b"], 1)


@pytest.mark.parametrize("change", ["insert", "remove"])
def test_an_init_that_changes_the_dictionary_is_refused(change: str) -> None:
    sd = two(2)
    act = (lambda: sd.gather(["new"], missing="insert")) if change == "insert" else (lambda: sd.pop("b"))

    def init(_: Tensor) -> None:
        act()

    with pytest.raises(
        RuntimeError, match=r"the dictionary is being changed.* init, may read it, and cannot change it"
    ):
        sd.gather(["a", "new"], missing="insert", init=init)
    assert_consistent(sd)


@pytest.mark.parametrize(
    "call",
    [
        lambda sd: sd.reserve(1, shape=3),
        lambda sd: sd.table(3),
        lambda sd: sd.gather(["new"], missing="insert", shape=3),
        lambda sd: sd.gather(["a", "new"], missing="insert", shape=3),
    ],
    ids=["reserve", "table", "gather", "gather beside another"],
)
def test_a_number_is_no_shape(call: Callable[[StackedParameterDict], Any]) -> None:
    with pytest.raises(TypeError, match=r"^expected the shape of an entry, such as \(3,\), got the number 3$"):
        call(two(2))


@pytest.mark.parametrize("count", ["a", 1.5, None])
def test_what_is_no_number_of_names_is_not_reserved(count: Any) -> None:
    with pytest.raises(TypeError, match=rf"^expected a number of names, got {count!r}$"):
        two(2).reserve(count)


def test_a_name_moves_to_a_group_that_keeps_less_state() -> None:
    sd = StackedParameterDict({name: torch.ones(2) for name in ("w", "x.bias", "y.bias", "z.bias")})
    optimizer = torch.optim.Adam(sd.param_groups(by={"bias$": {"amsgrad": True}}))
    sd.attach_optimizer(optimizer)
    sd.gather(list(sd)).pow(2).sum().backward()
    optimizer.step()
    (target,), (source,) = (group["params"] for group in optimizer.param_groups)
    assert "max_exp_avg_sq" in optimizer.state[source]
    moment = optimizer.state[source]["exp_avg"][sd.indices(["z.bias"])]
    sd.param_groups(by={"[xy].bias$": {"amsgrad": True}})
    assert sorted(optimizer.state[target]) == ["exp_avg", "exp_avg_sq", "step"]
    assert moment.all()
    assert torch.equal(optimizer.state[target]["exp_avg"][sd.indices(["z.bias"])], moment)
    sd.zero_grad()
    sd.gather(list(sd)).sum().backward()
    optimizer.step()


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [[], ["a", "b"]], ids=["an empty dictionary", "one that has them"])
@pytest.mark.parametrize("prefix", ["", "words."])
def test_names_that_are_damaged_at_the_beginning_are_no_entries(there: list[str], prefix: str) -> None:
    state = {prefix + key: value for key, value in two(2).state_dict().items()}
    state[f"{prefix}_extra_state"] = torch.zeros_like(state[f"{prefix}_extra_state"])
    sd = StackedParameterDict.from_tensor(there, torch.zeros(len(there), 2))
    module = torch.nn.ModuleDict({"words": sd}) if prefix else sd
    with pytest.raises(RuntimeError, match=r"While loading the names of .*: they are damaged"):
        module.load_state_dict(state)
    assert list(sd) == there
    assert all(row.tolist() == [0, 0] for row in sd.values())


def test_half_of_a_surrogate_pair_in_the_name_of_an_attribute_is_named(tmp_path: Any) -> None:
    module = torch.nn.Module()
    module.register_parameter("x\ud800", Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"^expected names of valid Unicode, got 'x\\ud800', which has a surrogate$"):
        pdrs.save(module, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_parametrized_dictionary_can_be_copied() -> None:
    sd = two(2)
    parametrize.register_parametrization(sd, "float32_2", Doubled())
    copied = copy.deepcopy(sd)
    with torch.no_grad():
        sd.parametrizations.float32_2.original.zero_()
    assert copied.gather(["a"]).tolist() == [[2, 2]]


def test_a_copy_of_a_module_refers_to_one_copy() -> None:
    sd = two(2)
    sd.other = torch.nn.ModuleList([sd])  # a cycle
    copied, again = copy.deepcopy((sd, sd))
    assert copied is again is copied.other[0]
    assert copied is not sd


@pytest.mark.parametrize("way", ["copy", "deepcopy", "update"])
def test_a_copy_has_the_rows_of_its_names_while_another_thread_changes_them(way: str) -> None:
    values = [torch.full((2,), float(number)) for number in range(100)]
    sd = StackedParameterDict({str(number): value for number, value in enumerate(values)})
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for number, value in enumerate(values):
                del sd[str(number)]
                sd[str(number)] = value

    thread = threading.Thread(target=change)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(100):
            made = StackedParameterDict()
            if way == "update":
                made.update(sd)
            else:
                made = sd.copy() if way == "copy" else copy.deepcopy(sd)
            assert {name: row.tolist() for name, row in made.items()} == {name: [float(name)] * 2 for name in made}
            assert_consistent(made)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda sd: sd.pop("a"), lambda sd: sd.popitem(), lambda sd: sd.drop(["a", "b"]), lambda sd: sd.freeze(["a"])],
    ids=["pop", "popitem", "drop", "freeze"],
)
def test_a_gradient_from_inference_mode_is_cleared(change: Callable[[StackedParameterDict], Any], sparse: bool) -> None:
    sd = two(2)
    with torch.inference_mode():
        gradient = torch.ones(2, 2)
        sd.table((2,)).grad = gradient.to_sparse(1) if sparse else gradient
    before = set(sd)
    change(sd)
    gone = [name for name in before if name not in sd] or ["a"]
    cleared = [["a", "b"].index(name) for name in gone]
    left = sd.table((2,)).grad.to_dense()
    assert (left.sum(1) == 0).nonzero()[:, 0].tolist() == sorted(cleared)
    assert_consistent(sd)


@pytest.mark.filterwarnings("error")
def test_names_of_a_parametrized_table_go_without_a_warning() -> None:
    sd = two(2)
    parametrize.register_parametrization(sd, "float32_2", Doubled())
    sd.pop("a")
    del sd["b"]
    assert len(sd) == 0


def test_all_names_unfrozen_leave_no_mask_of_names_that_have_gone() -> None:
    sd = two(2)
    sd.freeze(["a"])
    del sd["a"]
    sd.unfreeze()
    assert not sd.table((2,))._backward_hooks, "what masks gradients is still asked"
    sd["new"] = torch.ones(2)
    assert frozen_names(sd) == set()


def test_sparse_momentum_moves_with_names_to_another_group() -> None:
    sd = StackedParameterDict.from_tensor([f"n{at}" for at in range(4)], torch.zeros(4, 2))
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.1, momentum=0.9)
    sd.attach_optimizer(optimizer)
    values = torch.arange(1.0, 5.0)[:, None].expand(4, 2)
    (sd.gather(list(sd), sparse=True) * values).sum().backward()
    optimizer.step()
    sd.param_groups(by={"n[12]": {"lr": 0.1}})
    for name, expected in zip(sd, [1.0, 2.0, 3.0, 4.0], strict=True):
        momentum = optimizer.state[sd[name]._base]["momentum_buffer"].to_dense()[sd.indices([name])]
        assert momentum.tolist() == [[expected] * 2]


def test_the_state_of_a_complex_table_that_is_loaded_begins_as_that_of_torch() -> None:
    sd = StackedParameterDict({"a": torch.zeros(2, dtype=torch.complex64)})
    optimizer = torch.optim.Adagrad(sd.parameters(), initial_accumulator_value=0.5)
    sd.attach_optimizer(optimizer)
    other = StackedParameterDict(
        {"a": torch.zeros(2, dtype=torch.complex64), "b": torch.zeros(3, dtype=torch.complex64)}
    )
    sd.load_state_dict(other.state_dict())
    assert optimizer.state[sd["b"]._base]["sum"].tolist() == [[0.5 + 0.5j] * 3]


UNUSUAL_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", UNUSUAL_DTYPES, ids=str)
def test_rows_of_a_dtype_that_torch_cannot_index_in_place_can_be_written_and_moved(dtype: torch.dtype) -> None:
    def row(number: int) -> Parameter:
        return Parameter(torch.full((3,), number).to(dtype), requires_grad=False)

    sd = StackedParameterDict([(name, row(at)) for at, name in enumerate("abcd")])
    sd.update([("a", row(9)), ("c", row(8)), ("new", row(4))])
    sd.drop(["b", "new"])
    sd.scatter(["a", "d"], torch.full((2, 3), 7).to(dtype))
    sd.update([("e", row(5)), ("f", row(6))])
    sd.drop(["a"])
    sd.compact()
    assert {name: one.float().tolist() for name, one in sd.items()} == {
        name: [float(number)] * 3 for name, number in {"c": 8, "d": 7, "e": 5, "f": 6}.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_batch_of_unknown_names_only_has_the_shape_of_a_frozen_table(dtype: torch.dtype) -> None:
    sd = StackedParameterDict.from_tensor(["a"], torch.ones(1, 2, dtype=dtype), requires_grad=False)
    zeros = sd.gather(["q"], missing="zero")
    assert (zeros.dtype, zeros.tolist()) == (dtype, [[0, 0]])
    assert sd.gather(["q"], missing="zero", shape=(2,)).dtype == dtype
    assert sd.gather(["q"], missing="skip").shape == (0, 2)
    assert sd.gather([]).shape == (0, 2)
    with pytest.raises(ValueError, match="no table requires gradients"):
        sd.gather(["q"], missing="insert")


def test_the_shape_of_a_result_of_no_names_is_asked_for_as_that() -> None:
    sd = StackedParameterDict({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="pass shape=, the shape of an entry, because 2 tables"):
        sd.gather([])
    assert sd.gather([], shape=(3,)).shape == (0, 3)


def test_the_table_of_a_shape_is_found_whether_it_is_trained_or_not() -> None:
    sd = two(3)
    table = sd.table((3,))
    sd.requires_grad_(False)
    assert sd.table((3,)) is table
    sd["c"] = Parameter(torch.zeros(3))
    assert sd.table((3,), requires_grad=True) is not table
    assert sd.table((3,), requires_grad=False) is table

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = two(3)

        def forward(self, rows: Tensor) -> Tensor:
            return torch.nn.functional.embedding(rows, self.words.table((3,)))

    model = Model()
    stand_ins = {name: table.detach() + 1 for name, table in model.named_parameters()}
    assert torch.func.functional_call(model, stand_ins, (torch.tensor([0]),)).tolist() == [[2.0, 2.0, 2.0]]


def test_names_in_several_tables_are_gathered_on_the_meta_device() -> None:
    sd = two(3).to("meta")
    sd["frozen"] = Parameter(torch.zeros(3, device="meta"), requires_grad=False)
    assert sd.gather(["a", "frozen", "b"]).shape == (3, 3)
    assert sd.gather(["a", "missing"], missing="zero").shape == (2, 3)


@pytest.mark.parametrize("call", ["fromkeys", "gather", "scatter_", "drop"])
def test_an_array_without_a_dimension_is_no_list_of_names(call: str) -> None:
    sd, names = two(3), np.array("ab")
    calls: dict[str, Callable[[], Any]] = {
        "fromkeys": lambda: StackedParameterDict.fromkeys(names, torch.zeros(3)),
        "gather": lambda: sd.gather(names),
        "scatter_": lambda: sd.scatter(names, torch.zeros(2, 3)),
        "drop": lambda: sd.drop(names),
    }
    with pytest.raises(TypeError, match=r"iterat|iterable"):
        calls[call]()
    assert list(sd) == ["a", "b"]


def test_a_name_that_is_to_be_dropped_twice_is_said_to_be_listed_twice() -> None:
    sd = two(3)
    with pytest.raises(ValueError, match="'a' is listed twice"):
        sd.drop(["a", "b", "a"])
    with pytest.raises(pdrs.MissingEntryError, match="1 of 2 names are not in the dictionary: 'c'"):
        sd.drop(["a", "c"])
    assert list(sd) == ["a", "b"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: StackedParameterDict.from_tensor(["a"], torch.zeros(1, 2, dtype=torch.int64)),
        lambda: StackedParameterDict.from_tensor(["a"], torch.zeros(1, 2, dtype=torch.bool), requires_grad=True),
        lambda: StackedParameterDict.from_shapes({"a": (2,)}, dtype=torch.int64),
        lambda: StackedParameterDict.fromkeys(["a"], torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["from_tensor", "trainable", "from_shapes", "fromkeys"],
)
def test_integers_that_would_be_trained_are_refused_with_a_way_out(make: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"can require gradients, got torch.\w+: .*(trainable|requires_grad)=False"):
        make()


def test_names_of_a_computed_table_are_not_put_into_groups() -> None:
    sd = two(3)
    parametrize.register_parametrization(sd, "float32_3", Doubled())
    with pytest.raises(RuntimeError, match=r"computed from other tensors .*: put names into groups before that"):
        sd.param_groups(by={"a": {}})
    with pytest.raises(RuntimeError, match=r"computed from other tensors .*: insert names, reserve rows or compact"):
        sd.reserve(100)
    assert len(list(sd.parameters())) == 1


@pytest.mark.parametrize("make", [pdrs.ParameterDict, lambda sd: pdrs.ParameterDict() | sd])
@pytest.mark.parametrize("names", [["xy", "zw"], ["a", "b"]])
def test_a_parameter_dict_takes_no_names_of_a_stacked_one_for_pairs(make: Callable[..., Any], names: list[str]) -> None:
    sd = StackedParameterDict.from_tensor(names, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"expected a mapping or pairs, got a StackedParameterDict: pass its unstack"):
        make(sd)
    assert list(make(sd.unstack())) == names
