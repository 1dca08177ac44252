"""Entries that were moved or copied together: views of one block of memory, which nobody can tell from other tensors.

The bugs that this hunts: a dtype, a stride or a bit of a tensor that gets lost on the way through DLPack; memory that
is freed too early or never; a tensor that is taken for one like its neighbour; a torch for which none of this is made.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs
from tensors import SUPPORTED, blocks, bytes_of, layouts, of_bytes

PD = pdrs.ParameterDict
ALL_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def fixed(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)


# -- values and strides ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_entries_of_every_dtype_are_copied_bit_by_bit_or_left_to_torch(dtype: torch.dtype) -> None:
    if dtype in SUPPORTED:
        pd = PD({name: fixed(of_bytes(128, dtype)) for name in "abc"})
        copied = copy.deepcopy(pd)
        assert {value.dtype for value in copied.values()} == {dtype}
        assert [bytes_of(value) for value in copied.values()] == [bytes_of(pd["a"])] * 3
        assert blocks(list(copied.values())) == 1
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some dtypes are experimental, others deprecated.
        made = []
        for kind in (nn.ParameterDict, PD):
            try:
                pd = copy.deepcopy(kind({"a": fixed(torch.empty(3, dtype=dtype)), "b": torch.ones(3)}))
                made.append((pd["a"].dtype, pd["a"].shape, pd["b"].tolist()))
            except (RuntimeError, NotImplementedError) as error:
                made.append(str(error).splitlines()[0])
    assert made[0] == made[1]


@given(st.lists(layouts(), max_size=6))
def test_moved_entries_have_the_values_and_strides_that_to_gives(tensors: list[Tensor]) -> None:
    pd = PD((str(at), Parameter(tensor)) for at, tensor in enumerate(tensors)).double()
    for tensor, entry in zip(tensors, pd.values(), strict=True):
        expected = tensor.double()
        assert torch.equal(entry, expected)
        assert entry.stride() == expected.stride()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([torch.float16, torch.float64]))
def test_moved_entries_are_aligned_in_any_dtype(sizes: list[int], dtype: torch.dtype) -> None:
    pd = PD((str(at), torch.ones(size)) for at, size in enumerate(sizes)).to(dtype)
    assert all(entry.data_ptr() % 16 == 0 for entry in pd.values())


def test_an_entry_with_two_names_has_one_place_among_many_in_no_order() -> None:
    rows = torch.arange(200.0 * 16).view(200, 16)
    tensors = [Parameter(row.clone()) for row in rows]
    Random(0).shuffle(tensors)
    expected = [tensor.tolist() for tensor in tensors]
    pd = PD((str(at), tensor) for at, tensor in enumerate([*tensors, tensors[7]])).double()
    assert pd["200"] is pd["7"]
    assert len({entry.data_ptr() for entry in pd.values()}) == 200
    assert [entry.tolist() for entry in pd.values()] == [*expected, expected[7]]
    assert blocks(list(pd.parameters())) == 1


class Subclass(Parameter):
    pass


NEIGHBOURS: list[Callable[[], Tensor]] = [
    lambda: torch.randn(2, 3),
    lambda: torch.randn(2, 3),
    lambda: torch.randn(3, 2),
    lambda: torch.randn(3, 2).t(),
    lambda: torch.randn(6),
    lambda: torch.randn(2, 3, dtype=torch.float64),
    lambda: torch.randn(()),
    lambda: torch.randn(1),
    lambda: torch.randn(1, dtype=torch.complex64).conj().imag,
    lambda: torch.randn(2, dtype=torch.complex64).imag,
    lambda: torch.randn(2, 0),
    lambda: torch.randn(2, 3, dtype=torch.complex64),
    lambda: torch.randn(2, 3, dtype=torch.complex64).conj(),
    lambda: torch.randint(9, (2, 3), dtype=torch.uint8),
    lambda: torch.randint(9, (2, 3), dtype=torch.uint8).view(torch.float8_e5m2),
    lambda: torch.randn(2, 3, device="meta"),
    lambda: Subclass(torch.randn(2, 3)),
]
WAYS: dict[str, Callable[[Any], Any]] = {
    "double": lambda pd: pd.double(),
    "complex": lambda pd: pd.to(torch.complex128),
    "deepcopy": copy.deepcopy,
}


def described(tensor: Tensor) -> Any:
    kind = type(tensor), tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad, tensor.is_leaf
    if tensor.is_meta:
        return kind
    values = tensor.detach().resolve_conj().resolve_neg()
    return kind, tensor.stride(), bytes_of(values)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_what_becomes_of_an_entry_does_not_depend_on_the_one_before(seed: int, way: str) -> None:
    torch.manual_seed(seed)
    tensors = [make() for make in Random(seed).choices(NEIGHBOURS, k=300)]
    entries = [
        (str(at), one if isinstance(one, Parameter) else Parameter(one, one.dtype.itemsize > 1))
        for at, one in enumerate(tensors)
    ]
    alone = [described(WAYS[way](nn.ParameterDict([copy.deepcopy(entry)]))[entry[0]]) for entry in entries]
    together = WAYS[way](PD(entries))
    assert [described(value) for value in together.values()] == alone


# -- memory ------------------------------------------------------------------------------------------------------------


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


def allocated() -> int:
    """Return how many bytes are allocated."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


counts_memory = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc counts what is allocated"
)
BLOCK = 16 << 20


@counts_memory
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("way", [PD.double, copy.deepcopy], ids=["double", "deepcopy"])
def test_entries_keep_their_block_alive_and_the_last_one_frees_it(way: Callable[[PD], PD], elsewhere: bool) -> None:
    rows = torch.ones(BLOCK // 8 // 4096, 4096).unbind()
    pd = way(PD((str(at), row) for at, row in enumerate(rows)))
    entries = list(pd.values())
    del pd, rows
    size = sum(entry.nbytes for entry in entries)
    assert blocks(entries) == 1
    before = allocated()

    def drop_all() -> None:
        while len(entries) > 1:
            entries.pop()
        assert before - allocated() < size / 2
        assert entries.pop().sum() == 4096
        # How many bytes go at once, and not how many are left: what else is freed does not matter.
        assert before - allocated() > size * 0.9

    if elsewhere:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                drop_all()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert failures == []
    else:
        drop_all()


@counts_memory
def test_an_entry_without_elements_keeps_no_block_alive() -> None:
    shapes = [(0, 3), (2, 0, 1, 5), (0,)]
    pd = PD([("large", torch.ones(BLOCK // 8)), *((str(shape), torch.ones(shape)) for shape in shapes)]).double()
    before = allocated()
    del pd["large"]
    assert before - allocated() > BLOCK * 0.9
    assert [tuple(entry.shape) for entry in pd.values()] == shapes
    assert [entry.untyped_storage().data_ptr() for entry in pd.values()] == [0, 0, 0]
    assert [(entry + 1).sum().item() for entry in pd.values()] == [0, 0, 0]


@counts_memory
def test_many_rounds_leave_no_memory_behind() -> None:
    shapes = [(4,), (1, 2, 2)]
    pd = PD((str(at), torch.zeros(shapes[at % 2])) for at in range(1000))
    pd["conjugate"] = Parameter(torch.zeros(2, dtype=torch.complex64).conj())
    pd["meta"] = Parameter(torch.zeros(1, device="meta"))

    def work() -> int:
        for _ in range(10):
            pd.double()
            pd.float()
            copy.deepcopy(pd)
        gc.collect()
        return allocated()

    work()
    sizes = [work() for _ in range(4)]
    # A byte lost per entry and round would be 10 kB each time. What is made once does not come again.
    assert min(after - before for before, after in pairwise(sizes)) < 8_000, sizes


def test_neighbours_by_chance_are_moved_like_any_others() -> None:
    memory = np.arange(32, dtype=np.float32)
    halves = [torch.from_numpy(memory[:16]), torch.from_numpy(memory[16:])]
    assert halves[0].data_ptr() + 64 == halves[1].data_ptr()
    pd = PD((str(at), half) for at, half in enumerate(halves))
    expected = [half.tolist() for half in halves]
    for way in (PD.double, copy.deepcopy, PD.float):
        pd = way(pd)
        assert [entry.tolist() for entry in pd.values()] == expected
        assert [entry.untyped_storage().nbytes() for entry in pd.values()] == [entry.nbytes for entry in pd.values()]


# -- other torches -----------------------------------------------------------------------------------------------------


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
    import pdrs
    print(pdrs.ParameterDict({{"a": torch.ones(2)}}).double()["a"].tolist())
except ImportError as error:
    print(error)
"""


def test_another_major_version_of_dlpack_is_refused_by_name() -> None:
    said = run(OTHER_TABLE.format(previous=0))
    assert f"torch 2.10 to 2.15 offer it, but torch {torch.__version__} has another major version" in said


def test_a_newer_table_leads_to_the_one_that_is_known() -> None:
    assert run(OTHER_TABLE.format(previous="real")) == "[1.0, 1.0]\n"


def test_a_torch_without_the_exchange_api_is_refused_by_name() -> None:
    code = (
        "import torch\n"
        "torch.Tensor.__dlpack_c_exchange_api__ = None\n"
        "try: import pdrs\n"
        "except ImportError as error: print(error)"
    )
    assert "has no __dlpack_c_exchange_api__" in run(code)


@pytest.mark.slow
def test_all_of_this_holds_for_a_torch_without_the_stable_abi() -> None:
    # From 2.14 on, torch has two ways to make a view. Without its library at hand, the older one is taken.
    code = (
        "import sys, torch; torch.__file__ = '/nowhere/torch/__init__.py'\n"
        "import pytest\n"
        f"sys.exit(pytest.main([{__file__!r}, '-q', '-p', 'no:cacheprovider', '-k', 'entr or rounds or neighbours']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout


def test_entries_that_outlive_the_interpreter_do_no_harm() -> None:
    said = run(
        "import torch, sys, pdrs\n"
        "sys.entries = list(pdrs.ParameterDict({'a': torch.zeros(2), 'b': torch.zeros(2)}).double().values())\n"
        "print('done')"
    )
    assert said == "done\n"
