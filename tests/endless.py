"""Tasks that take longer than any test waits, for workers that import nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path


def begin():
    return os.environ["PLACE"]


def compute(place, task):
    """Says who it is, and computes for longer than any test waits."""
    (Path(place) / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        sum(range(1000))


def told(place, task):
    if task:
        (Path(place) / str(os.getpid())).touch()
        time.sleep(60)
    return task
