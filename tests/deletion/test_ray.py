"""Measurements by workers of a Ray cluster: the same numbers as by processes, also when a node dies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CLUSTER = """
import sys
from pathlib import Path
import numpy as np, ray, torch
from ray.cluster_utils import Cluster
from leaveout.deletion import run as module
from leaveout.deletion.bank import Bank
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.measurements import MeasureSettings
from leaveout.training.recipe import Recipe

torch.set_num_threads(1)
names, out = sys.argv[1].split(","), Path(sys.argv[2])
recipe, queries = Recipe.microgpt(names, n=len(names)).with_(steps=8), names[:2]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False)
module.JETS_TOGETHER, module.RUNS_TOGETHER = 2, 3  # many tasks
adds, add = [], Bank.add

def counted(*args):
    adds.append(args[1].kind)
    if adds.count("retraining") == 2:
        cluster.remove_node(nodes[1], allow_graceful=False)
    return add(*args)

Bank.add = counted
data = {}
for backend in ("ray", "processes"):
    run = TrainingRun.train(recipe, out / backend)
    settings = MeasureSettings(workers=2, backend=backend, check=False)
    run.measure(16, 2, retrain=24, design="random", queries=queries, settings=settings)
    data[backend] = run.bank.measurements(queries)
assert len(adds) == 32, adds
a, b = data["ray"], data["processes"]
assert np.array_equal(a.retrainings.x, b.retrainings.x) and np.array_equal(a.retrainings.y, b.retrainings.y)
assert sum(len(block.psi) for block in a.jets) == 16 and len(a.retrainings) == 12  # units in no step do not count
assert all(np.array_equal(p.c, q.c) for p, q in zip(a.jets, b.jets, strict=True))
print("fine")
"""


@pytest.mark.ray
def test_ray_measures_the_same_though_a_node_dies(tmp_path):
    """Two nodes of one CPU each, one killed in the middle; in a process of its own, as Ray leaves threads and files."""
    pytest.importorskip("ray", reason="ray is not installed")
    names = "ada,bela,cora,dina,edda,fina,gala,hana,ida,jana,kaya,lena"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_DEDUP_LOGS": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", CLUSTER, names, str(tmp_path)],
        check=False, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert ended.returncode == 0 and "fine" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-3000:]
