"""Runs programs under the fake CUDA runtime: ``python tests/fake_cuda/run.py [switches] PROGRAM [arguments]``.

PROGRAM is a Python file, ``-c CODE`` or ``-m MODULE``, as Python itself takes them.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda.build import DRIVER, RUNTIME, build  # The line above makes this file a program too.


def environment(
    *,
    devices: int = 1,
    memory_mb: int | None = None,
    latency_us: int | None = None,
    schedule: str | None = None,
    fail: str | None = None,
    trace: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return this process's environment with the fake runtime switched on.

    The switches are the FAKE_CUDA_ variables of README.md; `variables` are more of any kind.

    Raises
    ------
    CannotBuildError
        When the runtime cannot be built here.
    """
    folder = build()
    switches = {
        "DEVICES": devices,
        "MEMORY_MB": memory_mb,
        "LATENCY_US": latency_us,
        "SCHEDULE": schedule,
        "FAIL": fail,
        "TRACE": trace,
    }
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    preloads = [str(folder / RUNTIME), str(folder / DRIVER), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {
        **inherited,
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "LD_PRELOAD": os.pathsep.join(preloads),
        "FAKE_CUDA_RUNTIME": str(folder / RUNTIME),
        **{f"FAKE_CUDA_{name}": str(value) for name, value in switches.items() if value is not None},
        **(variables or {}),
    }


def run_python(*arguments: str, timeout: float = 120, **switches: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments under the fake runtime and return what it printed; see :func:`environment`."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**switches),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def main() -> None:
    """Replace this process by the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=__doc__.split("``")[1])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--memory-mb", type=int)
    parser.add_argument("--latency-us", type=int)
    parser.add_argument("--schedule", choices=["eager", "on_demand"])
    parser.add_argument("--fail", metavar="WHAT:NTH:ERROR[:late]")
    parser.add_argument("--trace", metavar="FILE")
    words = sys.argv[1:]
    switches = 0  # Each takes two words; the first word that is none starts the program.
    while switches < len(words) and words[switches].startswith("--"):
        switches += 2
    options = vars(parser.parse_args(words[:switches]))
    os.execve(sys.executable, [sys.executable, *words[switches:]], environment(**options))


if __name__ == "__main__":
    main()
