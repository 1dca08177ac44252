"""Where tensors lie, and tensors that are views of a slab, against torch.

The bugs that this hunts: a dtype, a stride or a bit of a tensor that gets lost on the way through DLPack; memory that
is freed too early or never; a tensor that a failed call has changed; a view that autograd, ``torch.save`` or
``deepcopy`` treats unlike any other tensor.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import subprocess
import sys
import threading
import warnings
import weakref
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from pdrs._core import complete_move, group_tensors, slab_views
from tensors import SUPPORTED, TORCH, bytes_of, gathered, group_of, layouts

STABLE_ABI = TORCH >= (2, 14)
NEEDS_STABLE_ABI = pytest.mark.skipif(not STABLE_ABI, reason="torch has it from 2.14 on")
DOORS = [
    pytest.param("from_blob", marks=NEEDS_STABLE_ABI),
    "dlpack",
]
ALL_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_arrives_as_it_is_or_is_left_to_torch(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some dtypes are experimental, others deprecated.
        tensor = torch.empty(3, dtype=dtype)
    groups, unusual = group_tensors([tensor])
    if dtype not in SUPPORTED:
        assert groups == []
        assert [index for index, _ in unusual] == [0]
        return
    raw = torch.arange(3 * dtype.itemsize, dtype=torch.uint8)
    tensor = (raw % 2 if dtype == torch.bool else raw).view(dtype)
    group = group_of([tensor, tensor.clone()])
    slab = gathered(group)
    assert group.dtype == dtype
    for view in group.views(slab):
        assert view.dtype == dtype
        assert view.shape == tensor.shape
        assert bytes_of(view) == bytes_of(tensor)


@given(st.lists(layouts(), max_size=6))
def test_views_have_the_values_and_strides_that_to_gives(tensors: list[torch.Tensor]) -> None:
    if not tensors:
        assert group_tensors(tensors) == ([], [])
        return
    group = group_of(tensors)
    for tensor, view in zip(tensors, group.views(gathered(group).double()), strict=True):
        expected = tensor.double()
        assert torch.equal(view, expected)
        assert view.stride() == expected.stride()


@given(st.lists(layouts(), min_size=1, max_size=6), st.sampled_from([1, 2, 4]))
def test_places_are_aligned_for_the_narrowest_dtype(tensors: list[torch.Tensor], narrowest: int) -> None:
    group = group_of(tensors, narrowest=narrowest)
    assert all(offset * narrowest % 16 == 0 for offset in group.offsets)


def test_what_is_listed_twice_or_overlaps_is_found_among_many_in_no_order() -> None:
    tensors = [torch.full((16,), float(n)) for n in range(200)]
    Random(0).shuffle(tensors)
    assert not group_of(tensors).overlapping
    twice = group_of([*tensors, tensors[7]])
    assert len(set(twice.offsets.tolist())) == 200
    assert twice.offsets[200] == twice.offsets[7]
    assert not twice.overlapping
    assert group_of([*tensors, tensors[7][15:]]).overlapping


def test_groups_come_by_dtype_in_the_order_of_the_list() -> None:
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.int8), torch.ones(5), torch.ones((), dtype=torch.int8)]
    groups, unusual = group_tensors(tensors)
    assert [group.dtype for group in groups] == [torch.float32, torch.int8]
    assert [group.indices.tolist() for group in groups] == [[0, 2], [1, 3]]
    assert [group.device for group in groups] == [torch.device("cpu")] * 2
    assert [group.largest for group in groups] == [20, 2]
    assert [len(group) for group in groups] == [2, 2]
    assert unusual == []


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def without_memory() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.ones(2).as_subclass(Subclass), "is a Subclass"),
        (lambda: torch.nn.UninitializedParameter(), "is a UninitializedParameter"),
        (fake, "is a FakeTensor"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.eye(2).to_sparse(), "storage"),
        (lambda: torch.eye(2).to_sparse_csr(), "storage"),
        (lambda: torch.eye(2).to_mkldnn(), "storage"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "has no plain memory"),
        (without_memory, "has elements but no memory"),
        (lambda: torch._efficientzerotensor(3), "has elements but no memory"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "negative"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag[0], "negative"),
        (lambda: Parameter(torch.ones(1, dtype=torch.complex64).conj().imag), "negative"),
    ],
)
def test_what_memory_does_not_tell_is_left_to_torch(make: Any, why: str) -> None:
    plain = torch.ones(2)
    (group,), unusual = group_tensors([plain, make(), plain + 1])
    assert group.indices.tolist() == [0, 2]
    ((index, reason),) = unusual
    assert index == 1
    assert why in reason


NEIGHBOURS: list[Any] = [
    lambda: torch.randn(2, 3),
    lambda: torch.randn(2, 3),
    lambda: torch.randn(3, 2),
    lambda: torch.randn(3, 2).t(),
    lambda: torch.randn(6),
    lambda: torch.randn(2, 3, dtype=torch.float64),
    lambda: torch.randn(()),
    lambda: torch.randn(1),
    lambda: torch.ones(1, dtype=torch.complex64).conj().imag,
    lambda: torch.randn(2, 0),
    lambda: torch.randn(2, 3, dtype=torch.complex64),
    lambda: torch.randn(2, 3, dtype=torch.complex64).conj(),
    lambda: torch.randint(9, (2, 3), dtype=torch.uint8),
    lambda: torch.empty(2, 3, dtype=torch.uint4),
    lambda: torch.randn(2, 3, device="meta"),
    lambda: torch.randn(2, 3).as_subclass(Subclass),
    without_memory,
    lambda: torch.ones(3),
]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_found_of_a_tensor_does_not_depend_on_the_one_before(seed: int) -> None:
    tensors = [make() for make in Random(seed).choices(NEIGHBOURS, k=300)]
    alone = [group_tensors([tensor]) for tensor in tensors]
    groups, unusual = group_tensors(tensors)
    assert unusual == [(at, why) for at, (_, left) in enumerate(alone) for _, why in left]
    assert sorted(at for group in groups for at in group.indices.tolist()) == [
        at for at, (found, _) in enumerate(alone) if found
    ]
    for group in groups:
        slab = torch.empty(group.length, dtype=group.dtype)
        group.gather(slab)
        for at, view in zip(group.indices.tolist(), group.views(slab), strict=True):
            assert torch.equal(view, tensors[at])
            assert view.stride() == tensors[at].stride()


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize"])
def test_tensors_inside_function_transforms_are_left_to_torch(transform: str) -> None:
    seen = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(group_tensors([tensor]))
        return tensor.sum()

    getattr(torch.func, transform)(look)(torch.ones(3) if transform != "vmap" else torch.ones(2, 3))
    (groups, unusual), *_ = seen
    assert groups == []
    assert len(unusual) == 1


def test_what_is_unusual_is_found_among_tensors_that_are_alike() -> None:
    complexes = torch.randn(3, 2, dtype=torch.complex64)
    parts = [complexes[0].imag, complexes[1].imag.neg(), complexes[2].conj().imag, complexes[2].imag]
    parts[1] = torch.empty_strided((2,), (2,)).copy_(parts[1])
    narrow = [torch.zeros(3, dtype=dtype) for dtype in (torch.uint8, torch.uint8)]
    narrow.insert(1, torch.zeros(3, dtype=torch.uint8).view(torch.uint4))
    memory = [torch.ones(2), torch.ones(2), torch.ones(2)]
    memory[1].untyped_storage().resize_(0)
    conjugates = [complexes[0], complexes[1].conj(), complexes[2]]
    for tensors, at in ((parts, 2), (narrow, 1), (memory, 1), (conjugates, 1)):
        (group,), unusual = group_tensors(tensors)
        assert [index for index, _ in unusual] == [at]
        usual = [tensor for index, tensor in enumerate(tensors) if index != at]
        assert group.indices.tolist() == [index for index in range(len(tensors)) if index != at]
        slab = gathered(group)
        for offset, tensor in zip(group.offsets.tolist(), usual, strict=True):
            assert torch.equal(slab[offset : offset + tensor.numel()], tensor)


def test_something_that_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"tensors\[1\]: expected a Tensor, got NoneType"):
        group_tensors([torch.ones(2), None])
    with pytest.raises(TypeError, match="list"):
        group_tensors((torch.ones(2),))
    with pytest.raises(ValueError, match="narrowest must be 1, 2, 4, 8 or 16 bytes, got 3"):
        group_tensors([], narrowest=3)


def test_moved_parameters_are_the_same_leaves_with_the_same_values() -> None:
    parameters = [Parameter(torch.randn(shape)) for shape in [(3,), (2, 3), (), (0, 2), (2, 2, 2), (1, 1, 1, 2)]]
    parameters[1].data = torch.randn(3, 2).t()
    parameters.append(parameters[0])
    before = [parameter.detach().clone() for parameter in parameters]
    group = group_of(parameters)
    slab = gathered(group)
    complete_move([(group, slab)])
    slab_end = slab.data_ptr() + slab.nbytes
    for parameter, value in zip(parameters, before, strict=True):
        assert type(parameter) is Parameter
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert torch.equal(parameter, value)
        assert not parameter.numel() or slab.data_ptr() <= parameter.data_ptr() < slab_end
    assert parameters[1].stride() == (1, 2)
    sum((parameter**2).sum() for parameter in parameters[:-1]).backward()
    torch.optim.SGD(parameters[:-1], lr=0.25).step()
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value / 2)
    assert torch.equal(slab[:3], before[0] / 2)


@pytest.mark.parametrize("door", DOORS)
def test_new_views_have_class_and_requires_grad_of_the_old(door: Any) -> None:
    shared = Parameter(torch.randn(2))
    tensors = [
        *(Parameter(torch.randn(2, 3)), Parameter(torch.randn(3), requires_grad=False)),
        *(torch.randn(4), torch.randn(4, requires_grad=True), shared, Parameter(torch.randn(1)), shared),
    ]
    group = group_of(tensors)
    views = group.views(gathered(group), door=door)
    assert views[4] is views[6]
    assert views[4] is not shared
    for tensor, view in zip(tensors, views, strict=True):
        assert type(view) is type(tensor)
        assert view.requires_grad == tensor.requires_grad
        assert view.is_leaf
        assert torch.equal(view, tensor)
    for view in group.views(gathered(group), detached=True, door=door):
        assert type(view) is torch.Tensor
        assert not view.requires_grad
        assert not view._is_view()
    for view in group.views(gathered(group).int(), door=door):
        assert view.dtype == torch.int32
        assert not view.requires_grad


@pytest.mark.parametrize("door", DOORS)
def test_views_of_a_slab_that_begins_inside_its_storage(door: Any) -> None:
    slab = torch.arange(10.0)[2:]
    one, two, none = slab_views(slab, np.array([0, 3, 8]), [(3,), (1, 5), (0, 4)], requires_grad=True, door=door)
    assert one.tolist() == [2, 3, 4]
    assert two.tolist() == [[5, 6, 7, 8, 9]]
    assert none.shape == (0, 4)
    assert type(one) is Parameter
    assert one.requires_grad
    (scalar,) = slab_views(slab, [7], [torch.Size([])], door=door)
    assert type(scalar) is torch.Tensor
    assert scalar.item() == 9
    slab[7] = 11
    assert scalar.item() == 11


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("offset", "shape"), [(6, (3,)), (9, ()), (-1, (1,)), (0, (2**40, 2**40)), (2**62, (2,))])
def test_a_view_that_would_reach_beyond_the_slab_is_refused(door: Any, offset: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"beyond the slab|offsets of 0 or more"):
        slab_views(torch.zeros(8), [offset], [shape], door=door)


@pytest.mark.parametrize(
    ("slab", "error", "why"),
    [
        (None, TypeError, "expected a Tensor, got NoneType"),
        (torch.zeros(8).as_subclass(Subclass), ValueError, "expected a plain tensor as slab, but it is a Subclass"),
        (torch.zeros(16)[::2], ValueError, "contiguous slab"),
        (torch.zeros(8, requires_grad=True), ValueError, "does not require gradients"),
        (torch.zeros(7), ValueError, "slab of 8 elements or more, got 7"),
        (torch.zeros(8, dtype=torch.int64), ValueError, r"tensors\[1\] requires gradients"),
        (torch.zeros(8, device="meta"), ValueError, "plain tensor as slab"),
    ],
    ids=str,
)
def test_a_refused_slab_changes_nothing(slab: Any, error: type[Exception], why: str) -> None:
    tensors = [torch.ones(4), Parameter(torch.ones(4))]
    before = [tensor.data_ptr() for tensor in tensors]
    with pytest.raises(error, match=why):
        complete_move([(group_of(tensors), slab)])
    assert [tensor.data_ptr() for tensor in tensors] == before


def test_an_inference_tensor_among_others_is_refused_and_nothing_changes() -> None:
    with torch.inference_mode():
        inference = torch.ones(4)
    tensors = [torch.ones(4), torch.ones(4), inference, torch.ones(4)]
    before = [tensor.data_ptr() for tensor in tensors]
    group = group_of(tensors)
    with pytest.raises(ValueError, match=r"tensors\[2\] was made in inference mode"):
        complete_move([(group, gathered(group))])
    assert [tensor.data_ptr() for tensor in tensors] == before


def test_no_views_are_made_in_inference_mode() -> None:
    parameter = Parameter(torch.ones(4))
    group = group_of([parameter])
    slab = gathered(group)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"torch.inference_mode\(False\)"):
            complete_move([(group, slab)])
        with torch.inference_mode(False):
            complete_move([(group, slab)])
        made = torch.ones(4)
    with pytest.raises(ValueError, match="not made in inference mode"):
        group.views(made)
    (parameter * 2).sum().backward()
    assert parameter.grad is not None


def test_a_group_whose_tensors_have_moved_is_of_no_more_use() -> None:
    group = group_of([torch.ones(4)])
    slab = gathered(group)
    complete_move([(group, slab)])
    for use in (group.gather, group.scatter, lambda slab: complete_move([(group, slab)])):
        with pytest.raises(ValueError, match="have moved since they were grouped"):
            use(torch.zeros(4))
    with pytest.raises(ValueError, match="have moved since they were grouped"):
        group.slab()
    assert slab.tolist() == [1] * 4


def test_an_unknown_door_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="'from_blob' or 'dlpack', got \"window\""):
        slab_views(torch.zeros(2), [0], [(2,)], door="window")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_views_keep_the_slab_alive_and_the_last_one_frees_it(door: Any, elsewhere: bool) -> None:
    memory = np.zeros(64, dtype=np.float32)
    alive = weakref.ref(memory)
    slab = torch.from_numpy(memory)
    views = slab_views(slab, np.arange(0, 64, 16), [(16,)] * 4, requires_grad=True, door=door)
    slab.data = torch.zeros(1)  # Whoever holds the slab may point it elsewhere.
    del slab, memory

    def drop_all() -> None:
        while views:
            assert alive() is not None
            views.pop()

    if elsewhere:
        thread = threading.Thread(target=drop_all)
        thread.start()
        thread.join()
    else:
        drop_all()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("door", DOORS)
def test_a_view_without_elements_keeps_no_slab_alive(door: Any) -> None:
    memory = np.zeros(64, dtype=np.float32)
    alive = weakref.ref(memory)
    shapes = [(16,), (0, 3), (48,), (2, 0, 1, 5), (0,)]
    views = slab_views(torch.from_numpy(memory), [0, 16, 16, 64, 64], shapes, requires_grad=True, door=door)
    del memory
    assert [tuple(view.shape) for view in views] == shapes
    nothing = [view for view in views if not view.numel()]
    del views
    gc.collect()
    assert alive() is None
    assert [view.untyped_storage().data_ptr() for view in nothing] == [0, 0, 0]
    assert [(view + 1).sum().item() for view in nothing] == [0, 0, 0]


def test_a_group_does_not_keep_tensors_alive_in_a_cycle() -> None:
    tensor = torch.ones(2)
    tensor.group = group_of([tensor])
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert alive() is None


class MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc counts what is allocated")
@pytest.mark.parametrize("door", DOORS)
def test_many_rounds_leave_no_memory_behind(door: Any) -> None:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    shapes = [(4,), (1, 2, 2)]
    parameters = [Parameter(torch.zeros(shapes[number % 2])) for number in range(1000)]

    def work() -> int:
        group = group_of(parameters)
        slab = gathered(group)
        group.views(slab, door=door)
        complete_move([(group, slab)])
        group_tensors([Parameter(torch.zeros(2)).data.conj(), torch.zeros(1, device="meta")])
        del group
        gc.collect()
        info = mallinfo()
        return int(info.uordblks + info.hblkhd)

    for _ in range(3):
        before = work()
    for _ in range(20):
        after = work()
    # A byte lost per entry and round would be 20 kB.
    assert after - before < 10_000


def saved(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def test_one_entry_is_saved_and_copied_without_the_slab() -> None:
    parameters = [Parameter(torch.randn(256)) for _ in range(1000)]
    group = group_of(parameters)
    complete_move([(group, gathered(group))])
    assert saved(parameters[7]) < 4 * 1024
    copied = copy.deepcopy(parameters[7])
    assert torch.equal(copied, parameters[7])
    assert type(copied) is Parameter
    assert copied.untyped_storage().nbytes() == 1024


def test_tensors_in_a_slab_are_found_there() -> None:
    parameters = [Parameter(torch.randn(size)) for size in (3, 0, 16, 5)]
    group = group_of(parameters)
    assert group.slab() is None
    made = gathered(group)
    complete_move([(group, made)])
    again = group_of(parameters)
    slab = again.slab()
    assert slab is not None
    assert slab.data_ptr() == made.data_ptr()
    assert torch.equal(slab, made)
    assert group_of(parameters[2:]).slab() is not None
    assert group_of(parameters[::-1]).slab() is None
    del slab, made, group, again
    parameters[2].data = parameters[2].clone()
    assert group_of(parameters).slab() is None


@pytest.mark.parametrize("door", DOORS)
def test_rows_of_one_storage_are_found_there(door: Any) -> None:
    table = torch.randn(6, 16)
    rows = list(table.unbind())
    slab = group_of(rows).slab()
    assert slab is not None
    assert slab.data_ptr() == table.data_ptr()
    assert slab.shape == (96,)
    inner = group_of(rows[2:4]).slab()
    assert inner is not None
    assert torch.equal(inner, table[2:4].flatten())
    assert group_of([rows[0], rows[2]]).slab() is None
    assert group_of([row.t() for row in torch.randn(2, 4, 4)], keep_strides=False).slab() is None
    views = slab_views(table, [0, 16], [(16,), (16,)], door=door)
    assert group_of(views).slab() is not None


def test_neighbours_by_chance_are_no_slab() -> None:
    memory = np.zeros(32, dtype=np.float32)
    halves = [torch.from_numpy(memory[:16]), torch.from_numpy(memory[16:])]
    assert halves[0].data_ptr() + 64 == halves[1].data_ptr()
    assert group_of(halves).slab() is None


def test_memory_that_was_a_slab_once_is_none_any_more() -> None:
    memory = np.zeros(32, dtype=np.float32)
    views = slab_views(torch.from_numpy(memory), [0, 16], [(16,), (16,)])
    assert group_of(views).slab() is not None
    del views
    halves = [torch.from_numpy(memory[:16]), torch.from_numpy(memory[16:])]
    assert group_of(halves).slab() is None


def test_the_garbage_collector_goes_on_as_before() -> None:
    for enabled in (True, False):
        try:
            gc.enable() if enabled else gc.disable()
            slab_views(torch.zeros(4), [0], [(4,)])
            with pytest.raises(ValueError, match="beyond"):
                slab_views(torch.zeros(4), [0], [(5,)])
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


OTHER_TABLE = """
import ctypes, torch
pointer_of, make = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
real = pointer_of(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
newer = (ctypes.c_uint64 * 7)(2, {previous})
torch.Tensor.__dlpack_c_exchange_api__ = make(ctypes.addressof(newer), b"dlpack_exchange_api", None)
try:
    from pdrs._core import group_tensors
    print(len(group_tensors([torch.ones(2)])[0]))
except ImportError as error:
    print(error)
"""


def test_another_major_version_of_dlpack_is_refused_by_name() -> None:
    said = run(OTHER_TABLE.format(previous=0))
    assert f"torch 2.10 to 2.15 offer it, but torch {torch.__version__} has another major version" in said


def test_a_newer_table_leads_to_the_one_that_is_known() -> None:
    assert run(OTHER_TABLE.format(previous="real")) == "1\n"


def test_a_torch_without_the_exchange_api_is_refused_by_name() -> None:
    code = (
        "import torch\n"
        "torch.Tensor.__dlpack_c_exchange_api__ = None\n"
        "try: import pdrs\n"
        "except ImportError as error: print(error)"
    )
    assert "has no __dlpack_c_exchange_api__" in run(code)


def test_a_torch_without_the_stable_abi_has_the_other_door() -> None:
    code = (
        "import torch; torch.__file__ = '/nowhere/torch/__init__.py'\n"
        "from pdrs._core import slab_views\n"
        "for door in ('dlpack', None, 'from_blob'):\n"
        "    try: print(slab_views(torch.zeros(2), [0], [(2,)], door=door)[0].tolist())\n"
        "    except RuntimeError as error: print(error)"
    )
    lines = run(code).splitlines()
    assert lines[:2] == ["[0.0, 0.0]"] * 2
    assert "from 2.14 on" in lines[2]


def test_views_that_outlive_the_interpreter_do_no_harm() -> None:
    run(
        "import torch, sys; from pdrs._core import slab_views\n"
        "sys.views = slab_views(torch.zeros(4), [0, 2], [(2,), (2,)], requires_grad=True)"
    )
