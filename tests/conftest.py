"""What all tests share; those marked ``cuda`` run on a GPU or under the fake CUDA runtime (see fake_cuda/README.md)."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

import pdrs

# The same examples in every run of CI, so that a failure there is that of the change; new ones everywhere else.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

pytest_plugins = ["fake_cuda.plugin"]


@pytest.fixture(params=[torch.nn.ParameterDict, pdrs.ParameterDict], ids=["torch", "pdrs"])
def kind(request: pytest.FixtureRequest) -> type[torch.nn.ParameterDict]:
    """Give the class under test: torch's own, and ours, which must do the same."""
    return request.param
