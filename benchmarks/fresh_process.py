"""Figures that are measured in a process of their own, where nothing else has shaped the heap."""

from __future__ import annotations

import os
import subprocess
import sys

TIMEOUT_SECONDS = 300


def figures(script: str, *arguments: str | int, **environment: str) -> tuple[float, ...]:
    """Run a script and return the figures that it prints, separated by spaces.

    Parameters
    ----------
    script
        The ``__file__`` of a module.
    **environment
        Variables of the environment to set besides those that are.
    """
    finished = subprocess.run(
        [sys.executable, os.path.abspath(script), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        timeout=TIMEOUT_SECONDS,
        check=True,
        text=True,
    )
    return tuple(map(float, finished.stdout.split()))
