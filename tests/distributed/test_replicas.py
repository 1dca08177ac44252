"""Replicas on several ranks: each case of ``replicas_worker.py``, under torchrun, with 2 and 3 ranks.

The bugs that this hunts: ranks that train different names together without an error, and a rank that raises alone while
the others wait. Each rank is an interpreter of its own, because forked ones share the seed of ``hash``.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch was built without distributed"),
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo needs Unix"),
]

WORKER = Path(__file__).parent / "replicas_worker.py"
# All cases of one launch.
SECONDS = 150


def _cases() -> list[str]:
    functions = [node for node in ast.parse(WORKER.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    return [one.name for one in functions if any(ast.unparse(each) == "case" for each in one.decorator_list)]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Run all cases, and return what became of each on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("PYTHONHASHSEED", None)
    process = subprocess.Popen(
        [*launch, str(WORKER), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        output += f"\nstopped after {SECONDS} s"
    files = [folder / f"results-{rank}.json" for rank in range(request.param)]
    found = [json.loads(one.read_text("utf-8")) if one.exists() else {} for one in files]
    return [{"output": output[-4000:], **one} for one in found]


@pytest.mark.parametrize("case", _cases())
def test_on_all_ranks(results: list[dict[str, str]], case: str) -> None:
    for rank, of_rank in enumerate(results):
        assert case in of_rank, f"rank {rank} did not get there: {of_rank['output']}"
        assert of_rank[case] == "ok", f"rank {rank}: {of_rank[case]}"


def test_a_store_that_knows_nothing_of_names_is_no_reason_to_refuse_ddp() -> None:
    program = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
import pdrs

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 4))

    def forward(self, names):
        return self.words.gather(names)

dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
ddp = DistributedDataParallel(Model())
for _ in range(2):
    assert ddp(["a"]).shape == (1, 4)
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=SECONDS)
