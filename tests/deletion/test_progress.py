"""The bar of measurements moves while a task is under way, whoever works on it."""

from __future__ import annotations

import numpy as np
import torch

from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.progress import Progress, progress
from leaveout.deletion.run import TrainingRun
from leaveout.training import loop
from leaveout.training.loop import DONE, RunOptions
from leaveout.training.recipe import Recipe
from leaveout.training.train import train_batch

NAMES = ["anna", "bob", "eve", "kim", "lena", "max"]


def test_parts_of_tasks_are_counted(tmp_path):
    for name, part in (("a", "0.5"), ("b/3", "0.25"), ("c", "")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / DONE).write_text(part)
    with progress("runs", tmp_path, {"a": 8, "b": 4, "c": 2, "d": 1}, False) as told:
        assert told.bar.total == 15
        told.show()
        assert told.bar.n == 5.0
        told.add(3)
        assert told.bar.n == 8.0
        told.finished = 0
        told.show()
        assert told.bar.n == 8.0  # it never goes back


def test_runs_tell_which_part_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "TELL", 0.0)
    told = []
    true = RunOptions.tell

    def watched(self, part):
        true(self, part)
        told.append(float((tmp_path / DONE).read_text()))

    monkeypatch.setattr(RunOptions, "tell", watched)
    recipe = Recipe.microgpt(NAMES, n=6)
    weights = 1 - np.eye(6)[:4]
    train_batch(recipe, torch.from_numpy(weights), RunOptions(tmp_path, batched=True), together=2)
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 12
    assert told[5] == 0.5  # two rounds


def test_measuring_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "TELL", 0.0)
    monkeypatch.setattr("leaveout.deletion.progress.LOOK", 0.01)
    seen = []
    true = Progress.show
    monkeypatch.setattr(Progress, "show", lambda self: (true(self), seen.append(self.bar.n))[0])
    run = TrainingRun.train(Recipe.microgpt(NAMES, n=6), tmp_path / "run")
    run.measure(retrain=6, queries=["nina"], settings=MeasureSettings(progress=True))
    assert seen[-1] == 6 and any(n not in (0, 6) for n in seen)
    assert "retrainings: 100%" in capsys.readouterr().err and not (tmp_path / "run" / "work").exists()
