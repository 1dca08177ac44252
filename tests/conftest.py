"""What all tests share.

Those marked ``cuda`` run on a GPU or under the fake CUDA runtime (see fake_cuda/README.md). Those marked ``gpu`` run on
a GPU only, and are left out where there is none: the same test without the mark does the same on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import distributed

import pdrs
from fake_cuda import control

# The same examples in every run of CI, so that a failure there is that of the change; new ones everywhere else.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

pytest_plugins = ["fake_cuda.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Explain the markers to pytest."""
    config.addinivalue_line("markers", "gpu: needs the kernels of a real GPU, which the fake runtime has not")
    config.addinivalue_line("markers", "slow: takes seconds; `pytest -m 'not slow'` leaves it out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none."""
    if torch.cuda.is_available() and not control.inside():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(params=[torch.nn.ParameterDict, pdrs.ParameterDict], ids=["torch", "pdrs"])
def kind(request: pytest.FixtureRequest) -> type[torch.nn.ParameterDict]:
    """Give the class under test: torch's own, and ours, which must do the same."""
    return request.param


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """Let ``torch.distributed`` believe in a group of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
