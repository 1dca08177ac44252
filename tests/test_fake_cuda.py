"""The fake CUDA runtime behaves as CUDA documents, and where CUDA leaves freedom, as badly as CUDA permits.

The bugs that this hunts: a test bed that is kinder than a GPU, so that a missing wait passes; one that is stricter, so
that right code fails; and one whose own races make either happen now and then.
"""

import pytest
import torch

pytestmark = pytest.mark.cuda(devices=2)


def test_tensor_goes_to_the_device_and_back():
    x = torch.arange(1000.0)
    y = x.cuda()
    assert y.device == torch.device("cuda:0")
    assert torch.equal(y.cpu(), x)


def test_copy_from_pinned_memory_reads_the_source_late(fake_cuda):
    source = torch.ones(1000).pin_memory()
    with fake_cuda.hold():
        target = torch.empty(1000, device="cuda")
        target.copy_(source, non_blocking=True)
        source.fill_(2)
    assert torch.equal(target.cpu(), torch.full((1000,), 2.0))
