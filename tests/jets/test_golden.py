"""microgpt against the reference numbers (METHODS A5), through the benchmark that checks any file of that form.

The reference file is not part of the project; LEAVEOUT_GOLDEN names its directory, and without it a run of the same
form against the roots-of-unity engine takes its place.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCES

from leaveout.jets import roots
from leaveout.training.microgpt import MicroGPT, encode, flat, load_flat

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("microgpt_reference", ROOT / "benchmarks" / "microgpt_reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
GOLDEN = Path(os.environ.get("LEAVEOUT_GOLDEN", ROOT.parent / "shared" / "golden")) / "microgpt_20_steps.npz"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="LEAVEOUT_GOLDEN names no reference files")
ABOUT = {"documents": ["anna", "bob", "eve", "kim"], "queries": ["ann"], "alphabet": "abeimknovxyz", "BOS": 12}


@needs_golden
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_reference_run_is_reproduced(dtype):
    result = reference.compare(GOLDEN, dtype)
    assert result["ok"], result
    kind = TOLERANCES["exact" if dtype == torch.complex128 else "single"]
    assert max(*result["parameters"], *result["losses"]) <= kind and max(result["plain"], result["without"]) <= 1e-12


def write_reference(path, spoil=0.0):
    """A file of the golden form, made with ordinary training and complex copies."""
    model = MicroGPT().double()
    init = flat(model).numpy().copy()
    n = len(ABOUT["documents"])
    psi = torch.randn(n, dtype=torch.complex128) / n
    gradient = roots.Gradient(model, lambda m, batch: F.cross_entropy(m(batch[0])[0], batch[1]).unsqueeze(0))
    pairs = [encode(d, ABOUT["alphabet"]) for d in ABOUT["documents"]]
    batches = [(x[None], y) for x, y in pairs]
    adam = roots.Adam(betas=(0.85, 0.99), eps=1e-3, eps_inside=True)
    circle = roots.Circle(16, 0.1, schedule=lambda step: 0.01 * (1 - step / n))
    params = roots.train(gradient, batches, psi[:, None], adam, circle)
    x, y = encode(ABOUT["queries"][0], ABOUT["alphabet"])
    _, losses = gradient(params, (x[None], y), torch.ones(16, 1, dtype=torch.complex128))
    series = torch.cat([roots.coefficients(p, 0.1, 3).flatten(1) for p in params.values()], 1)
    loss = roots.coefficients(losses[:, 0], 0.1, 3)[None]
    data = {"init": init, "psi": psi.numpy(), "coefficients": series.numpy() + spoil, "loss_coefficients": loss.numpy()}
    load_flat(model, torch.from_numpy(init))
    data["params_plain"], data["loss_plain"] = reference.plain(data, ABOUT, [])
    data["params_without_2"], data["loss_without"] = reference.plain(data, ABOUT, [2])
    np.savez(path, **data)
    path.with_suffix(".json").write_text(json.dumps(ABOUT))
    return path


def test_reference_check_passes_and_fails(tmp_path, monkeypatch, capsys):
    good = write_reference(tmp_path / "good.npz")
    monkeypatch.setattr("sys.argv", ["microgpt_reference.py", str(good)])
    assert reference.main() == 0
    bad = write_reference(tmp_path / "bad.npz", spoil=1e-8)
    monkeypatch.setattr("sys.argv", ["microgpt_reference.py", str(bad), "--json", str(tmp_path / "out.json")])
    assert reference.main() == 1
    assert json.loads((tmp_path / "out.json").read_text())["parameters"][1] > 1e-9
    assert "degree 3" in capsys.readouterr().out
