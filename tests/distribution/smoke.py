"""Use an installed pdrs a little: what a wheel must do in an environment that has never seen the sources.

Run by the Python of that environment: ``python tests/distribution/smoke.py``. It says what it used, or fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import files, version
from pathlib import Path

import torch

import pdrs

NAME = "pdrs-torch"


def main() -> None:
    """Import, train, save, open, and run the command line."""
    package = Path(pdrs.__file__).resolve().parent
    assert Path(sys.prefix).resolve() in package.parents, f"pdrs comes from {package}, not from this environment"
    assert pdrs.__version__ == version(NAME)
    assert (package / "py.typed").is_file()
    assert any(file.name == "LICENSE" for file in files(NAME) or [])

    pd = pdrs.ParameterDict({"a": torch.zeros(3), "b": torch.ones(3)})
    optimizer = torch.optim.SGD(pd.parameters(), lr=0.5)
    (pd["a"] + 2 * pd["b"]).sum().backward()
    optimizer.step()
    assert pd["a"].tolist() == [-0.5] * 3
    assert pd.popitem(last=False)[0] == "a"

    sd = pdrs.StackedParameterDict({"x": torch.zeros(2), "y": torch.ones(2)})
    sd.gather(["y", "new"], missing="insert").sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pdrs.save(sd, path)
        opened = pdrs.open(path)
        assert list(opened) == ["x", "y", "new"]
        assert opened["y"].tolist() == [1, 1]
        shown = subprocess.run([sys.executable, "-m", "pdrs", "inspect", str(path)], check=True, stdout=subprocess.PIPE)
    assert b"new" in shown.stdout
    assert pdrs.IndexMap.from_names(["p", "q"])["q"] == 1
    print(f"{NAME} {pdrs.__version__} works, with Python {sys.version.split()[0]} and torch {torch.__version__}")


if __name__ == "__main__":
    main()
