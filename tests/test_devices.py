"""Which device a process takes, on machines that this one only pretends to be."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest
import torch

from leaveout.executor import _Actor, run_tasks
from leaveout.models import find_device, free_memory


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name in ("LOCAL_RANK", "LEAVEOUT_WORKER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, 0),
        ({"LEAVEOUT_WORKER": "2"}, 2),
        ({"LEAVEOUT_WORKER": "4"}, 1),  # five workers, three devices
        ({"LOCAL_RANK": "1"}, 1),
        ({"LOCAL_RANK": "1", "LEAVEOUT_WORKER": "2"}, 1),  # workers of a rank stay on its device
    ],
)
def test_a_process_takes_the_device_of_its_number(three_gpus, monkeypatch, name, variables, wanted):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert find_device(name) == torch.device("cuda", wanted)


def test_a_single_device_is_that_of_every_process(three_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == torch.device("cuda")


def test_a_device_that_is_not_here_is_refused_with_the_last_one(three_gpus):
    with pytest.raises(ValueError, match="the last one here is cuda:2"):
        find_device("cuda:3")


def number(state, task):
    return os.environ["LEAVEOUT_WORKER"]


def test_workers_are_numbered():
    assert set(run_tasks(range(8), number, dict, 2)) <= {"0", "1"}


def test_free_memory_is_what_the_device_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 8 * 10**10))
    assert free_memory("cuda:1") == 5 * 10**9
    assert free_memory() > 10**6


@pytest.mark.parametrize(("gpus", "wanted"), [(False, 0), (True, 1)])
def test_an_actor_asks_for_a_gpu_where_the_model_is_on_one(gpus, wanted):
    ray = Mock()
    _Actor(ray, dict, number, gpus)
    assert ray.remote.return_value.options.call_args.kwargs["num_gpus"] == wanted
