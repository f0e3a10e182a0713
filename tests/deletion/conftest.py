"""One small run for all tests of the deletion engine: 24 short names, a minute model."""

from __future__ import annotations

import pytest
import torch

from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.training.recipe import Recipe

NAMES = [a + b for a in ("an", "bo", "ci", "du", "el", "fa") for b in ("na", "ri", "so", "tu")]
QUERIES = ["anri", "bona", "citu"]
FAST = MeasureSettings(check=False)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recipe():
    return Recipe.microgpt(NAMES, n=24)


@pytest.fixture
def run(recipe, tmp_path):
    return TrainingRun.train(recipe, tmp_path / "run")


@pytest.fixture(scope="session")
def measured(recipe, tmp_path_factory):
    """A run with jets, retrainings, held-out sets and the exact first order; not to be changed."""
    run = TrainingRun.train(recipe, tmp_path_factory.mktemp("measured") / "run")
    run.measure(16, 2, retrain=40, heldout=6, gradient=True, queries=QUERIES, settings=FAST)
    return run
