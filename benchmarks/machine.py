"""What the figures were measured with: the machine, the versions, the command."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy
import torch

# What the tests' stand-in for a GPU calls itself: it is there to be right, and says nothing about time.
FAKE_GPU = "Fake CUDA device"


def describe(command: str) -> dict[str, str]:
    """Describe this machine and this run; no paths of this host."""
    import pdrs  # which may have to be installed after it is known whether there is a GPU

    name = gpu()
    return {
        "CPU": f"{_cpu_model()}, {_cores()} cores",
        **({} if name is None else {"GPU": name}),
        "memory": f"{_memory_bytes() / 2**30:.0f} GiB",
        "OS": f"{_system()}, {platform.system()} {_kernel_version()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **_version("tensordict"),
        **_version("fbgemm-gpu-cpu"),
        "numpy": numpy.__version__,
        "pdrs": pdrs.__version__,
        "command": command,
    }


def _version(package: str) -> dict[str, str]:
    """Return the version of what not every suite needs."""
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def gpu() -> str | None:
    """Return the name of the GPU, or None if there is no real one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return None if name == FAKE_GPU else name


def _cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kernel_version() -> str:
    # Without what a build of the kernel is called, which says more of the host than of its speed.
    release = platform.release()
    numbers = re.match(r"\d+(\.\d+)*", release)
    return numbers[0] if numbers else release


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.platform(terse=True)
