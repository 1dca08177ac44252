"""Moves on the CPU: conversions, to_empty, share_memory, and what must go torch's way; as of torch's class.

The bugs that this hunts: a move that changes a value, loses an identity, a tie, a gradient, a hook or a version that
torch keeps; one that moves half; one that goes past an override, a switch or a mode of torch's; a slab that is none.
"""

from __future__ import annotations

import copy
import multiprocessing
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import pdrs

Kind = type[nn.ParameterDict]
Build = Callable[[Kind], nn.Module]
Act = Callable[[nn.Module], Any]
KINDS: tuple[Kind, Kind] = (nn.ParameterDict, pdrs.ParameterDict)

CONVERSIONS: dict[str, Act] = {
    "to(float64)": lambda module: module.to(torch.float64),
    "to(float16)": lambda module: module.to(torch.float16),
    "to(float32)": lambda module: module.to(torch.float32),
    "to(cpu)": lambda module: module.to("cpu"),
    "to(device, dtype)": lambda module: module.to(torch.device("cpu"), torch.bfloat16, non_blocking=True),
    "to(tensor)": lambda module: module.to(torch.zeros(1, dtype=torch.float64)),
    "to(channels_last)": lambda module: module.to(memory_format=torch.channels_last),
    "to(complex)": lambda module: module.to(torch.complex64),
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "bfloat16": lambda module: module.bfloat16(),
    "cpu": lambda module: module.cpu(),
    "type": lambda module: module.type(torch.float64),
    "type by name": lambda module: module.type("torch.DoubleTensor"),
}


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Give everything that a module holds, each name with its tensor; gradients, too."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter
        yield f"{name}.grad", parameter.grad
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            yield f"{path}.{name} (buffer)", buffer


def looks(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Describe all of a tensor but its values."""
    if tensor is None:
        return None
    strides = tensor.stride() if tensor.layout == torch.strided and not is_lazy(tensor) else None
    shape = None if is_lazy(tensor) else tuple(tensor.shape)
    kinds = (type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_leaf)
    return (*kinds, shape, strides, tensor.is_quantized)


def version_of(tensor: Tensor | None) -> int:
    if tensor is None or is_lazy(tensor):
        return 0
    try:
        return tensor._version
    except RuntimeError:  # It was made in inference mode.
        return 0


def is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedTensorMixin)


def same_values(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or is_lazy(one) or one.is_meta:
        return True
    if one.dtype != two.dtype:
        return False
    if isinstance(one, TwoTensor):
        return same_values(one.a, two.a) and same_values(one.b, two.b)
    if one.layout != torch.strided:
        return same_values(one.to_dense(), two.to_dense())
    if one.is_quantized:
        return torch.equal(one.int_repr(), two.int_repr())
    if one.dtype.itemsize == 1:
        one, two = one.view(torch.uint8), two.view(torch.uint8)
    return torch.equal(one.resolve_conj(), two.resolve_conj())


def outcome(act: Act, module: nn.Module) -> tuple[str, ...]:
    """Do something, and tell which error it raised and which warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        try:
            act(module)
            error = None
        except Exception as raised:
            error = f"{type(raised).__name__}: {str(raised).splitlines()[0]}"
        finally:
            torch.set_warn_always(False)
    return (str(error), *sorted({str(each.message) for each in caught}))


def facts_of(module: nn.Module, tensors: list[tuple[str, Tensor | None]]) -> dict[str, Any]:
    """Describe what a module holds now, beside what it held before."""
    now = list(tensors_of(module))
    places = {id(tensor): place for place, (_, tensor) in reversed(list(enumerate(now)))}
    return {
        "names": [name for name, _ in now],
        "kept": [one is two for (_, one), (_, two) in zip(tensors, now, strict=True)],
        "ties": [places[id(tensor)] for _, tensor in now if tensor is not None],
        "looks": [looks(tensor) for _, tensor in now],
        "versions": [version_of(two) for (_, one), (_, two) in zip(tensors, now, strict=True) if one is two],
    }


def assert_same(build: Build, *acts: Act, values: bool = True) -> nn.Module:
    """Do something to a module with torch's class and to one with ours; all must be as in torch's. Give ours.

    If there is an error, it must be torch's, ours must be as it was, and nothing more is done.
    """
    torch.manual_seed(0)
    theirs = build(nn.ParameterDict)
    torch.manual_seed(0)
    ours = build(pdrs.ParameterDict)
    for act in acts:
        their_tensors, our_tensors = list(tensors_of(theirs)), list(tensors_of(ours))
        before = facts_of(ours, our_tensors)
        their_outcome, our_outcome = outcome(act, theirs), outcome(act, ours)
        assert our_outcome == their_outcome
        if their_outcome[0] != "None":
            assert facts_of(ours, our_tensors) == before
            break
        their_facts, our_facts = facts_of(theirs, their_tensors), facts_of(ours, our_tensors)
        for what, fact in their_facts.items():
            assert our_facts[what] == fact, what
        if values:
            for (name, one), (_, two) in zip(tensors_of(theirs), tensors_of(ours), strict=True):
                assert same_values(one, two), name
    return ours


def with_grad(parameter: Parameter, gradient: Tensor | None = None) -> Parameter:
    parameter.grad = torch.randn_like(parameter) if gradient is None else gradient
    return parameter


def plain(kind: Kind) -> nn.Module:
    return kind([(f"n{size}", torch.randn(size, 3)) for size in range(5)])


def with_gradients(kind: Kind) -> nn.Module:
    return kind([(f"n{at}", with_grad(Parameter(torch.randn(4)))) for at in range(4)])


def with_some_gradients(kind: Kind) -> nn.Module:
    pd = plain(kind)
    with_grad(pd["n2"])
    with_grad(pd["n4"])
    return pd


def with_sparse_gradients(kind: Kind) -> nn.Module:
    pd = with_some_gradients(kind)
    pd["n3"].grad = torch.eye(3).to_sparse()
    pd["n3"].grad = torch.sparse_coo_tensor([[0, 2]], torch.randn(2, 3), (3, 3), check_invariants=True)
    return pd


def tied(kind: Kind) -> nn.Module:
    shared = with_grad(Parameter(torch.randn(3)))
    pd = kind([("a", shared), ("b", torch.randn(2)), ("c", shared), ("d", torch.randn(1)), ("e", shared)])
    other = kind([("x", shared), ("y", pd["b"])])
    parent = nn.Module()
    parent.own = shared
    parent.first, parent.second, parent.again = pd, other, pd
    return parent


def with_tied_gradients(kind: Kind) -> nn.Module:
    gradient = torch.randn(2)
    return kind([(name, with_grad(Parameter(torch.randn(2)), gradient)) for name in "abc"])


def name_of(dtype: torch.dtype) -> str:
    return f"of {dtype}".replace("torch.", "")


def with_wider_gradients(kind: Kind) -> nn.Module:
    pd = kind([(f"n{at}", torch.randn(3).bfloat16()) for at in range(3)])
    pd["n1"].grad_dtype = torch.float32
    pd["n1"].grad = torch.randn(3)
    return pd


def mixed_dtypes(kind: Kind) -> nn.Module:
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
    pd = kind([(name_of(dtype), Parameter(torch.randn(3, 2).to(dtype))) for dtype in dtypes])
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.int8, torch.float8_e4m3fn):
        pd[name_of(dtype)] = Parameter(torch.randn(5).abs().mul(3).to(dtype), requires_grad=False)
    pd["frozen"] = Parameter(torch.randn(3), requires_grad=False)
    return pd


def not_contiguous(kind: Kind) -> nn.Module:
    base = torch.randn(4, 6)
    image = torch.randn(2, 3, 4, 5)
    return kind(
        [
            ("transposed", torch.randn(3, 5).t()),
            ("channels last", image.to(memory_format=torch.channels_last)),
            ("image", image),
            ("expanded", torch.randn(3, 1).expand(3, 4)),
            ("sliced", base[:, 1:4]),
            ("stepped", base[::2]),
            ("row", torch.randn(4, 4)[1]),
            ("scalar", torch.randn(())),
            ("no size", torch.randn(0, 3)),
            ("one", torch.randn(1, 1, 1)),
        ]
    )


def overlapping(kind: Kind) -> nn.Module:
    flat = torch.randn(10)
    return kind([("low", flat[:6]), ("high", flat[4:]), ("all", flat), ("again", flat), ("apart", torch.randn(2))])


def with_nones_and_buffers(kind: Kind) -> nn.Module:
    pd = plain(kind)
    pd.register_parameter("none", None)
    pd.register_buffer("mean", torch.randn(3))
    pd.register_buffer("count", torch.tensor(3))
    pd.register_buffer("passing", torch.randn(2, 2).t(), persistent=False)
    pd.register_buffer("nothing", None)
    pd.register_buffer("twin", pd["n2"])
    pd.register_buffer("lone", Parameter(torch.randn(2)))
    pd.register_buffer("learnt", torch.randn(2, requires_grad=True))
    return pd


def nested(kind: Kind) -> nn.Module:
    inner = kind([("w", torch.randn(2)), ("deeper", kind([("v", torch.randn(3)), ("linear", nn.Linear(2, 3))]))])
    outer = kind([("inner", inner), ("own", with_grad(Parameter(torch.randn(4)))), ("plain", 5)])
    return nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"pd": outer, "norm": nn.BatchNorm1d(3)}), inner)


def empty(kind: Kind) -> nn.Module:
    return kind()


class Tagged(Parameter):
    """A Parameter that a user made a class of."""


def unusual(kind: Kind) -> nn.Module:
    pd = kind([("a", with_grad(Parameter(torch.randn(2)))), ("b", torch.randn(3))])
    pd["tagged"] = Tagged(torch.randn(2))
    pd["tagged"].grad = torch.randn(2)
    pd["sparse"] = Parameter(torch.eye(3).to_sparse())
    pd["two"] = Parameter(TwoTensor(torch.randn(2), torch.randn(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Quantized tensors are deprecated, but there.
        quantized = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    pd["quantized"] = Parameter(quantized, requires_grad=False)
    pd["conjugate"] = Parameter(torch.randn(2, dtype=torch.complex64).conj())
    pd["z"] = torch.randn(4)
    pd.register_buffer("sparse_buffer", torch.eye(2).to_sparse())
    pd.register_buffer("dense_buffer", torch.randn(2))
    return pd


def lazy(kind: Kind) -> nn.Module:
    pd = kind([("a", torch.randn(2))])
    pd["lazy"] = nn.UninitializedParameter()
    pd["b"] = torch.randn(2)
    return pd


BUILDS: dict[str, Build] = {
    build.__name__.replace("_", " "): build
    for build in (
        plain,
        with_gradients,
        with_some_gradients,
        with_sparse_gradients,
        tied,
        with_tied_gradients,
        with_wider_gradients,
        mixed_dtypes,
        not_contiguous,
        overlapping,
        with_nones_and_buffers,
        nested,
        empty,
        unusual,
        lazy,
    )
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_does_what_it_does_to_torchs_class(build: str, conversion: str) -> None:
    assert_same(BUILDS[build], CONVERSIONS[conversion])


@pytest.mark.parametrize("build", [name for name in BUILDS if name not in ("unusual", "lazy")])
def test_to_empty_makes_room_as_in_torchs_class(build: str) -> None:
    assert_same(BUILDS[build], lambda module: module.to_empty(device="cpu"), values=False)


@pytest.mark.parametrize("recurse", [True, False])
def test_to_empty_recurses_where_asked(recurse: bool) -> None:
    def parameters(kind: Kind) -> tuple[nn.Module, list[int]]:
        module = kind([("inner", kind({"w": torch.randn(2)})), ("own", torch.randn(4))])
        return module, [each.data_ptr() for each in module.parameters()]

    for kind in KINDS:
        module, before = parameters(kind)
        module.to_empty(device="cpu", recurse=recurse)
        after = [each.data_ptr() for each in module.parameters()]
        assert [one != two for one, two in zip(before, after, strict=True)] == [True, recurse]


@pytest.mark.parametrize("build", ["plain", "with gradients", "tied", "with nones and buffers", "nested", "unusual"])
@pytest.mark.parametrize("there", ["to", "back"])
def test_the_meta_device_takes_all_as_it_does_of_torchs_class(build: str, there: str) -> None:
    def act(module: nn.Module) -> None:
        module.to("meta")
        if there == "back":
            module.to_empty(device="cpu")

    assert_same(BUILDS[build], act, values=False)


def test_data_is_not_copied_out_of_the_meta_device() -> None:
    assert_same(lambda kind: plain(kind).to("meta"), lambda module: module.to("cpu"))


def test_a_device_that_is_not_there_is_refused_in_torchs_words(kind: Kind) -> None:
    pd = plain(kind)
    pointers = [each.data_ptr() for each in pd.values()]
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA|mps|MPS"):
        pd.to("mps" if torch.cuda.is_available() else "cuda")
    assert [each.data_ptr() for each in pd.values()] == pointers


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_dtype_of_no_gradients_is_refused_in_torchs_words(dtype: torch.dtype) -> None:
    assert_same(plain, lambda module: module.to(dtype))
    assert_same(plain, lambda module: module.type(dtype))


def test_frozen_entries_become_integers_by_type() -> None:
    assert_same(lambda kind: plain(kind).requires_grad_(False), lambda module: module.type(torch.int32))


# ---- slabs -----------------------------------------------------------------------------------------------------------


def addresses(tensors: list[Tensor]) -> tuple[int, int]:
    """Give the first address of contiguous tensors, and the one behind the last."""
    return min(each.data_ptr() for each in tensors), max(each.data_ptr() + each.nbytes for each in tensors)


def test_entries_lie_in_one_slab_after_a_move() -> None:
    pd = pdrs.ParameterDict([(f"n{at}", with_grad(Parameter(torch.randn(16)))) for at in range(1000)])
    pd.double()
    for tensors in ([each for each in pd.values()], [each.grad for each in pd.values()]):
        start, end = addresses(tensors)
        assert end - start == 1000 * 16 * 8


def test_the_memory_of_gradients_goes_with_them() -> None:
    pd = pdrs.ParameterDict([(f"n{at}", with_grad(Parameter(torch.randn(16)))) for at in range(10)]).double()
    first, last = (pd[name].grad for name in ("n0", "n9"))
    parameters = addresses(list(pd.values()))
    assert not parameters[0] <= first.data_ptr() < parameters[1]
    assert not parameters[0] <= last.data_ptr() < parameters[1]


def test_each_entry_in_a_slab_is_saved_by_itself() -> None:
    pd = pdrs.ParameterDict([(f"n{at}", torch.randn(4)) for at in range(100)]).double()
    assert pd["n5"].untyped_storage().nbytes() == 32


def test_a_move_to_what_is_there_touches_nothing() -> None:
    pd = with_gradients(pdrs.ParameterDict).to(torch.float64)
    pd["integer"] = Parameter(torch.arange(3), requires_grad=False)
    pd["n"] = with_grad(Parameter(torch.randn(3, dtype=torch.float64)))
    facts = [(tensor.data_ptr(), tensor._version) for _, tensor in tensors_of(pd) if tensor is not None]
    pd.to(torch.float64).to("cpu").double().cpu()
    pdrs.to(pd, "cpu", torch.float64)
    assert [(tensor.data_ptr(), tensor._version) for _, tensor in tensors_of(pd) if tensor is not None] == facts


def test_only_what_must_move_moves() -> None:
    pd = pdrs.ParameterDict([("a", torch.randn(2)), ("b", torch.randn(2, dtype=torch.float64)), ("c", torch.randn(2))])
    there = pd["b"].data_ptr()
    pd.double()
    assert pd["b"].data_ptr() == there


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.10
def test_the_work_of_torch_does_not_grow_with_the_number_of_entries() -> None:
    counts = []
    for size in (10, 1000):
        pd = pdrs.ParameterDict([(f"n{at}", torch.randn(2)) for at in range(size)])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            pd.double()
        copies = [event for event in profile.events() if event.name == "aten::copy_"]
        counts.append(len(copies))
    # One of all values; the others are of the empty tensors by which torch's function is asked.
    assert counts[0] == counts[1] <= 5


def test_large_and_small_entries_convert_alike_across_pieces() -> None:
    sizes = [1000, 3, 30_000, 77, 40_000, 5]  # in elements; 32,768 are converted at a time
    assert_same(lambda kind: kind([(str(at), torch.randn(size)) for at, size in enumerate(sizes)]), nn.Module.half)
    assert_same(
        lambda kind: kind([(str(at), torch.randn(size, 5).t()) for at, size in enumerate(sizes)]), nn.Module.double
    )


# ---- share_memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["plain", "with some gradients", "tied", "mixed dtypes", "nested", "overlapping"])
def test_share_memory_shares_as_of_torchs_class(build: str) -> None:
    module = assert_same(BUILDS[build], lambda module: module.share_memory())
    assert all(tensor.is_shared() for _, tensor in tensors_of(module) if tensor is not None)


def test_buffers_stay_the_same_objects_when_they_are_shared() -> None:
    assert_same(with_nones_and_buffers, lambda module: module.share_memory())


def test_shared_entries_stay_where_they_are() -> None:
    pd = pdrs.ParameterDict([(f"n{at}", torch.randn(5)) for at in range(100)]).share_memory()
    pointers = [each.data_ptr() for each in pd.values()]
    pd["new"] = torch.randn(5)
    pd.share_memory()
    assert [each.data_ptr() for each in pd.values()][:100] == pointers, "another process may see them there"
    assert pd["new"].is_shared()


def test_what_shared_memory_with_an_entry_still_does_when_it_is_shared(kind: Kind) -> None:
    flat = torch.zeros(4)
    pd = kind([("low", flat[:2]), ("high", flat[2:]), ("alone", torch.zeros(2)), ("whole", torch.zeros(2))])
    outside = pd["whole"].detach()
    pd.share_memory()
    flat.fill_(3)
    outside.fill_(4)
    assert pd["low"].tolist() == pd["high"].tolist() == [3, 3]
    assert pd["whole"].tolist() == [4, 4]
    assert pd["alone"].is_shared()


def add_one(pd: nn.ParameterDict) -> None:
    with torch.no_grad():
        for value in pd.values():
            value += 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_another_process_writes_to_shared_entries(kind: Kind, method: str) -> None:
    pd = kind([(f"n{at}", torch.zeros(3)) for at in range(20)])
    pd["n3"].grad = torch.zeros(3)
    pd.share_memory()
    child = multiprocessing.get_context(method).Process(target=add_one, args=(pd,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [value.tolist() for value in pd.values()] == [[1, 1, 1]] * 20


# ---- what hangs on Parameters ----------------------------------------------------------------------------------------


def test_hooks_stay(kind: Kind) -> None:
    pd = kind({"a": torch.ones(2), "b": torch.ones(2)})
    seen = []
    pd["a"].register_hook(lambda gradient: seen.append(gradient.dtype))
    pd["b"].register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.dtype))
    pd.double()
    (pd["a"] * pd["b"]).sum().backward()
    assert seen == [torch.float64] * 2


def squares(pd: nn.ParameterDict) -> Tensor:
    return torch.stack([(value**2).sum() for value in pd.values()]).sum()


@pytest.mark.parametrize("conversion", ["to(float64)", "to(float32)", "half", "cpu"])
def test_a_graph_from_before_the_move_gives_what_it_gives_with_torchs_class(conversion: str) -> None:
    def act(module: nn.Module) -> None:
        loss = squares(module)
        CONVERSIONS[conversion](module)
        loss.backward()

    assert_same(plain, act)
    assert_same(with_gradients, act)


def test_a_gradient_with_a_graph_moves(kind: Kind) -> None:
    pd = kind({"a": torch.full((2,), 3.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That backward(create_graph=True) makes a cycle.
        squares(pd).backward(create_graph=True)
    pd.double()
    assert pd["a"].grad.dtype == torch.float64
    assert pd["a"].grad.requires_grad
    pd["a"].grad = None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_made_before_the_move_goes_on(make: Any) -> None:
    results = []
    for kind in KINDS:
        torch.manual_seed(0)
        pd = plain(kind)
        optimizer = make(pd.parameters(), lr=0.1)
        pd.double()
        for _ in range(3):
            optimizer.zero_grad()
            squares(pd).backward()
            optimizer.step()
        results.append(torch.cat([value.detach().flatten() for value in pd.values()]))
    assert results[0].abs().sum() > 0
    assert torch.equal(*results)


def test_a_moved_entry_outlives_its_dictionary_and_the_others() -> None:
    pd = pdrs.ParameterDict([(f"n{at}", torch.full((3,), float(at))) for at in range(10)]).double()
    kept = pd.pop("n7")
    del pd
    assert kept.tolist() == [7, 7, 7]


def test_a_moved_dictionary_is_copied_and_saved_as_any() -> None:
    pd = not_contiguous(pdrs.ParameterDict).double()
    other = copy.deepcopy(pd)
    for name, value in pd.items():
        assert torch.equal(other[name], value)
        assert other[name].stride() == value.stride()


# ---- what must go torch's way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["overwrite", "swap"])
@pytest.mark.parametrize("build", ["with gradients", "tied", "with nones and buffers"])
def test_switches_of_torch_are_obeyed(switch: str, build: str) -> None:
    name = f"{switch}_module_params_on_conversion"
    getattr(torch.__future__, f"set_{name}")(True)
    try:
        assert_same(BUILDS[build], lambda module: module.double())
    finally:
        getattr(torch.__future__, f"set_{name}")(False)


def from_inference_mode(kind: Kind) -> nn.Module:
    pd = plain(kind)
    with torch.inference_mode():
        made = Parameter(torch.randn(3))
        buffer = torch.randn(2)
    pd["made there"] = made
    pd["after"] = with_grad(Parameter(torch.randn(2)))
    pd.register_buffer("buffer", buffer)
    return pd


@pytest.mark.parametrize("act", [nn.Module.double, nn.Module.cpu, nn.Module.share_memory])
def test_entries_from_inference_mode_move_as_in_torchs_class(act: Act) -> None:
    assert_same(from_inference_mode, act)


def test_a_move_in_inference_mode_does_what_torch_does() -> None:
    def act(module: nn.Module) -> None:
        with torch.inference_mode():
            module.double()

    assert_same(plain, act)
    assert_same(with_nones_and_buffers, act)


def test_a_move_under_a_fake_mode_is_left_to_torch() -> None:
    outcomes = []
    for kind in (nn.ParameterDict, *KINDS):  # torch cannot swap the first fake tensors of a process.
        with FakeTensorMode():
            pd = with_gradients(kind)
            done = outcome(nn.Module.double, pd)
            outcomes.append((done, [looks(tensor) for _, tensor in tensors_of(pd)]))
    assert outcomes[1] == outcomes[2]


class Counts(TorchDispatchMode):
    """Counts the operations of torch that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Listens(TorchFunctionMode):
    """Counts the functions of torch that a function mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counts, Listens])
def test_modes_see_what_they_see_of_torchs_class(mode: type[Counts] | type[Listens]) -> None:
    seen = []
    for kind in KINDS:
        pd = with_gradients(kind)
        with mode() as listener:
            pd.double()
        seen.append(listener.calls)
    assert len(seen[0]) >= 8
    assert seen[0] == seen[1]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_no_move(device: str) -> None:
    def act(module: nn.Module) -> None:
        with torch.device(device):
            module.double().share_memory()

    assert_same(with_some_gradients, act)
    with torch.device(device):
        assert_same(
            lambda kind: kind({"a": torch.ones(2, device="cpu")}),
            lambda module: module.half().to_empty(device="cpu"),
            values=False,
        )


def test_a_move_inside_a_function_transform_does_what_torch_does(kind: Kind) -> None:
    pd = kind({"a": torch.full((2,), 3.0)})

    def square(x: Tensor) -> Tensor:
        pd.double()
        return (x * pd["a"]).sum()

    # Not `torch.func.grad`, in which torch itself cannot move a module.
    assert torch.func.vmap(square)(torch.ones(4, 2)).tolist() == [6] * 4
    assert pd["a"].dtype == torch.float64


def test_a_traced_move_is_traced_as_of_torchs_class() -> None:
    def nodes(kind: Kind) -> list[str]:
        pd = kind({"a": torch.ones(2), "b": torch.ones(2)}).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That tracing is deprecated.
            traced = torch.jit.trace(lambda x: x * pd.double()["a"], torch.ones(2), check_trace=False)
        return [node.kind() for node in traced.graph.nodes()]

    assert nodes(pdrs.ParameterDict) == nodes(nn.ParameterDict)


def test_a_function_of_the_users_is_called_for_each(kind: Kind) -> None:
    seen = []

    def function(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor * 2

    pd = with_some_gradients(kind)
    values = [value.detach().clone() for value in pd.values()]
    pd._apply(function)
    assert seen == [(0, 3), (1, 3), (2, 3), (2, 3), (3, 3), (4, 3), (4, 3)]
    for value, before in zip(pd.values(), values, strict=True):
        assert torch.equal(value, before * 2)


def test_an_override_of_apply_is_called_wherever_it_is() -> None:
    for kind in KINDS:

        class Loud(kind):
            calls = 0

            def _apply(self, fn: Any, recurse: bool = True) -> Any:
                type(self).calls += 1
                return super()._apply(fn, recurse)

        loud = Loud({"a": torch.ones(2)})
        outer = kind({"inner": kind({"loud": loud}), "b": torch.ones(2)})
        outer.double()
        pdrs.to(outer, torch.float16)
        pdrs.to(loud, torch.float16)
        assert loud.calls == 3
        assert loud["a"].dtype == torch.float16


def test_an_override_by_an_attribute_is_called(kind: Kind) -> None:
    seen = []
    inner = kind({"a": torch.ones(2)})
    inner._apply = lambda fn: seen.append(fn)
    outer = kind({"inner": inner, "b": torch.ones(2)})
    outer.double()
    pdrs.to(outer, torch.float16)
    pdrs.to(inner, torch.float16)
    assert len(seen) == 3
    assert inner["a"].dtype == torch.float32


# ---- errors ----------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> list[tuple[Any, ...]]:
    """Give what must be as before after a move that failed."""
    return [
        (name, id(tensor), None if tensor is None or is_lazy(tensor) else (looks(tensor), pointer_of(tensor)))
        for name, tensor in tensors_of(module)
    ]


def pointer_of(tensor: Tensor) -> int:
    return tensor.a.data_ptr() if isinstance(tensor, TwoTensor) else 0 if tensor.is_sparse else tensor.data_ptr()


class TooLittleError(RuntimeError):
    """What a test lets torch raise."""


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("build", ["mixed dtypes", "with nones and buffers", "with gradients", "nested"])
def test_an_allocation_that_fails_leaves_all_as_it_was(build: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = BUILDS[build](pdrs.ParameterDict)
    module = module[1]["pd"] if build == "nested" else module
    before = state_of(module)
    copy_of = copy.deepcopy(module)
    real, calls = torch.empty, 0

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise TooLittleError
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", fails)
    try:
        module.double()
    except TooLittleError:
        assert state_of(module) == before
        for (name, one), (_, two) in zip(tensors_of(module), tensors_of(copy_of), strict=True):
            assert same_values(one, two), name
    else:
        assert calls < nth
    monkeypatch.undo()
    module.double()
    assert all(value.dtype == torch.float64 for value in module.parameters() if value.dtype.is_floating_point)


@pytest.mark.parametrize("nth", range(1, 8))
def test_an_unusual_entry_that_fails_leaves_all_as_it_was(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(Parameter):
        calls = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "to":
                cls.calls += 1
                if cls.calls == nth:
                    raise TooLittleError
            return super().__torch_function__(func, types, args, kwargs or {})

    pd = pdrs.ParameterDict([("a", with_grad(Parameter(torch.randn(2)))), ("b", torch.randn(3))])
    for at in range(3):
        pd[f"stubborn {at}"] = Stubborn(torch.randn(2))
        pd[f"two {at}"] = Parameter(TwoTensor(torch.randn(2), torch.randn(2)))
        pd[f"two {at}"].grad = TwoTensor(torch.randn(2), torch.randn(2))
        pd[f"sparse {at}"] = Parameter(torch.eye(3).to_sparse())
    pd.register_buffer("wants gradients".replace(" ", "_"), torch.randn(2, requires_grad=True))
    pd.register_buffer("stubborn_buffer", Stubborn(torch.randn(2)))
    before = state_of(pd)
    values = [tensor if tensor is None else tensor.detach().clone() for _, tensor in tensors_of(pd)]
    try:
        pd.to(torch.float64)
    except TooLittleError:
        assert Stubborn.calls == nth
        assert [each[:2] for each in state_of(pd)] == [each[:2] for each in before]
        for (name, tensor), value in zip(tensors_of(pd), values, strict=True):
            if tensor is not None:
                assert tensor.dtype == torch.float32
                assert same_values(tensor.detach(), value), name
        Stubborn.calls = 100
        pd.to(torch.float64)
    assert all(value.dtype == torch.float64 for value in pd.parameters())


# ---- pdrs.to ---------------------------------------------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(3, 4),
    "no bias": lambda: nn.Linear(3, 4, bias=False),
    "Conv2d": lambda: nn.Conv2d(2, 3, 3),
    "BatchNorm": lambda: nn.BatchNorm2d(3),
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "Embedding": lambda: nn.Embedding(5, 3),
    "Transformer": lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.PReLU(), nn.GRU(2, 2)])}),
    "shared": lambda: shared_submodules(),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "lazy": lambda: nn.LazyLinear(3),
    "dictionary": lambda: nn.Sequential(pdrs.ParameterDict({"to": torch.randn(2), "a.b": torch.randn(2)})),
}


def shared_submodules() -> nn.Module:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(2, 2))
    model[3].weight = layer.weight
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        ((torch.float64,), {}),
        (("cpu",), {}),
        (("cpu", torch.float16), {}),
        ((), {"dtype": torch.bfloat16, "non_blocking": True}),
        ((torch.zeros(1, dtype=torch.float64),), {}),
        ((), {"memory_format": torch.channels_last}),
        ((torch.complex64,), {}),
        (("meta",), {}),
        ((torch.int64,), {}),
        ((5, "x"), {}),
        ((), {"nonsense": 1}),
        (("no device",), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", MODULES)
def test_pdrs_to_does_what_module_to_does(module: str, arguments: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    theirs = MODULES[module]()
    torch.manual_seed(0)
    ours = MODULES[module]()
    args, kwargs = arguments
    their_tensors, our_tensors = list(tensors_of(theirs)), list(tensors_of(ours))
    one = outcome(lambda module: module.to(*args, **kwargs), theirs)
    two = outcome(lambda module: pdrs.to(module, *args, **kwargs), ours)
    assert two == one
    assert facts_of(theirs, their_tensors) == facts_of(ours, our_tensors)
    for (name, left), (_, right) in zip(tensors_of(theirs), tensors_of(ours), strict=True):
        assert same_values(left, right), name


def test_a_recurrent_network_works_after_pdrs_to() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(2, 1, 3, dtype=torch.float64)
    other = copy.deepcopy(lstm).double()
    assert pdrs.to(lstm, torch.float64) is lstm
    assert torch.equal(lstm(x)[0], other(x)[0])


def test_a_module_with_a_to_of_its_own_is_moved_by_it() -> None:
    class Proud(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            return "my way"

    assert pdrs.to(Proud(1, 1), torch.float64) == "my way"


def test_pdrs_to_moves_scripted_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That TorchScript is deprecated.
        scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(scripted, nn.Linear(2, 2))
    pdrs.to(model, torch.float64)
    pdrs.to(scripted, torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_pdrs_to_lays_a_whole_model_into_one_slab_in_order() -> None:
    model = pdrs.to(
        nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.Linear(4, 1)), torch.float64
    )
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert pointers == sorted(pointers)
    start, end = addresses(list(model.parameters()))
    assert end - start < sum(parameter.nbytes for parameter in model.parameters()) + 64 * len(pointers)


# ---- at random -------------------------------------------------------------------------------------------------------

ENTRIES: dict[str, Callable[[], Any]] = {
    "float": lambda: torch.randn(2, 3),
    "double": lambda: torch.randn(3, dtype=torch.float64),
    "half": lambda: torch.randn(5).half(),
    "complex": lambda: torch.randn(2, dtype=torch.complex64),
    "integer": lambda: Parameter(torch.arange(4), requires_grad=False),
    "frozen": lambda: Parameter(torch.randn(2), requires_grad=False),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0),
    "transposed": lambda: torch.randn(3, 2).t(),
    "expanded": lambda: torch.randn(2, 1).expand(2, 3),
    "stepped": lambda: torch.randn(6)[::2],
    "graded": lambda: with_grad(Parameter(torch.randn(3))),
    "sparsely graded": lambda: with_grad(Parameter(torch.randn(3, 3)), torch.eye(3).to_sparse()),
    "tagged": lambda: Tagged(torch.randn(2)),
    "two": lambda: Parameter(TwoTensor(torch.randn(2), torch.randn(2))),
    "module": lambda: nn.BatchNorm1d(2),
    "number": lambda: 5,
    "meta": lambda: Parameter(torch.randn(2, device="meta")),
}
STEPS = ["to(float64)", "to(float16)", "to(cpu)", "half", "double", "float", "bfloat16", "share_memory"]


@settings(deadline=None, max_examples=60)
@given(
    entries=st.lists(st.sampled_from([*ENTRIES, "tie"]), max_size=8),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_mixture_goes_any_way_as_in_torchs_class(entries: list[str], steps: list[str], seed: int) -> None:
    def build(kind: Kind) -> nn.Module:
        torch.manual_seed(seed)
        pd = kind()
        for at, entry in enumerate(entries):
            made = next(iter(pd.parameters()), torch.ones(2)) if entry == "tie" else ENTRIES[entry]()
            pd[f"{at} {entry}"] = made
        return nn.Sequential(pd, kind(dict(list(pd.items())[:3])))

    if "share_memory" in steps:
        entries = [entry for entry in entries if entry not in ("two", "meta", "sparsely graded")]  # torch crashes.
    acts = {**CONVERSIONS, "share_memory": nn.Module.share_memory}
    assert_same(build, *(acts[step] for step in steps))


# ---- threads, staging ------------------------------------------------------------------------------------------------


def test_threads_move_dictionaries_at_once() -> None:
    dictionaries = [
        pdrs.ParameterDict([(f"n{at}", torch.full((5,), float(at))) for at in range(2000)]) for _ in range(4)
    ]
    errors = []

    def back_and_forth(pd: pdrs.ParameterDict) -> None:
        try:
            for _ in range(5):
                pd.double()
                pd.float()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=back_and_forth, args=(pd,)) for pd in dictionaries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for pd in dictionaries:
        assert torch.equal(torch.stack(list(pd.values()))[:, 0], torch.arange(2000.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_bytes": 0}, "multiple of 64, 1024 or more, got 0"),
        ({"block_bytes": 960}, "multiple of 64, 1024 or more, got 960"),
        ({"block_bytes": 1000}, "multiple of 64, 1024 or more, got 1000"),
        ({"block_bytes": -1024}, "got -1024"),
        ({"blocks": 0}, "blocks to be 1 or more, got 0"),
    ],
)
def test_set_staging_refuses_what_cannot_work(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pdrs.set_staging(**arguments)


@pytest.mark.parametrize("arguments", [{"block_bytes": 8e6}, {"blocks": 2.0}, {"blocks": None}])
def test_set_staging_refuses_what_is_no_int(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"expected {next(iter(arguments))} to be an int, got "):
        pdrs.set_staging(**arguments)


def test_pdrs_to_says_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        pdrs.to({"weight": torch.zeros(1)}, torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_pin_memory_needs_cuda() -> None:
    pd = plain(pdrs.ParameterDict)
    with pytest.raises(RuntimeError, match="expected a CUDA device"):
        pd.pin_memory()
