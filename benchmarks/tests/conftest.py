"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    """Imports a script of the benchmarks by name; the number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    torch.set_num_threads(threads)


def numbers(value):
    """All floating-point numbers in a result."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value
