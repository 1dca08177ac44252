"""The command line as ``python -m pdrs`` runs it, in this process: another one would take seconds to import torch."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[object]) -> int:
    """Run ``python -m pdrs`` with arguments, and return its exit code."""
    before = sys.argv
    sys.argv = ["pdrs", *map(str, arguments)]
    try:
        runpy.run_module("pdrs", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
