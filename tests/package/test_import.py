"""What ``import pdrs`` costs beside ``import torch``.

The bugs that this hunts: one import or decorator that pulls in ``torch._dynamo``, which takes longer than torch itself
and ten times the memory of pdrs; ordinary work that does so later, unseen.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COUNT = """
import json, sys
import torch
before = set(sys.modules)
import pdrs
print(json.dumps(sorted(set(sys.modules) - before)))
"""

USE = """
import json, pickle, copy, sys, tempfile
import torch
before = set(sys.modules)
import pdrs
pd = pdrs.ParameterDict({"a": torch.zeros(3), "b": torch.ones(2, 2)})
pd.update({"c": torch.zeros(1)})
pd["a"].sum().backward()
sd = pd.to(torch.float64).half().stack()
sd["d"] = torch.zeros(3)
sd.gather(["a"]).sum().backward()
pd.load_state_dict(copy.deepcopy(pd).state_dict())
pickle.loads(pickle.dumps(pdrs.to(pd, torch.float32)))
with tempfile.TemporaryDirectory() as folder:
    pdrs.save(sd, folder + "/a.safetensors")
    pdrs.open(folder + "/a.safetensors").unstack()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def modules_of(program: str) -> list[str]:
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    modules: list[str] = json.loads(output)
    return modules


def test_importing_pdrs_imports_little_beside_torch() -> None:
    modules = modules_of(COUNT)
    assert "pdrs.stacked" in modules
    own = [name for name in modules if name.split(".")[0] == "pdrs"]
    assert len(modules) - len(own) <= 10, sorted(set(modules) - set(own))


@pytest.mark.parametrize("program", [COUNT, USE], ids=["import", "use"])
@pytest.mark.slow
def test_neither_import_nor_ordinary_use_loads_the_compiler(program: str) -> None:
    heavy = {"sympy", "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes"}
    assert not heavy.intersection(modules_of(program))
