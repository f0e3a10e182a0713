"""Does the engine reproduce a reference run of microgpt? Checks any file of the golden form (METHODS A5).

    python benchmarks/microgpt_reference.py FILE.npz [--dtype complex64] [--json OUT]

FILE.json beside it names documents, queries and alphabet; the deleted documents are in the name of the array
`params_without_...`. Prints the largest difference per degree; exits 1 if one is over tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from leaveout.jets import Space, install, restore
from leaveout.training.microgpt import MicroGPT, encode, flat, load_flat
from leaveout.training.optimizers import PaperAdam
from leaveout.training.provenance import provenance

TOLERANCE = {torch.complex128: 1e-10, torch.complex64: 1e-4}
PLAIN_TOLERANCE = 1e-12


def train(model: MicroGPT, about: dict[str, Any], weights: list[Any]) -> None:
    """One document a step, learning rate 0.01 falling linearly to 0; weights[i] multiplies the loss of document i."""
    n = len(about["documents"])
    optimizer = PaperAdam(model.parameters())
    for step, document in enumerate(about["documents"]):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / n)
        optimizer.zero_grad()
        (loss_of(model, document, about) * weights[step]).backward()
        optimizer.step()


def loss_of(model: MicroGPT, document: str, about: dict[str, Any]) -> Any:
    x, y = encode(document, about["alphabet"])
    return F.cross_entropy(model(x[None])[0], y)


def plain(data: Any, about: dict[str, Any], without: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and query losses of the run without some documents."""
    model = fresh(data, torch.float64)
    train(model, about, [0.0 if i in without else 1.0 for i in range(len(about["documents"]))])
    losses = [loss_of(model, q, about).item() for q in about["queries"]]
    return flat(model).numpy(), np.array(losses)


def fresh(data: Any, dtype: torch.dtype) -> MicroGPT:
    model = MicroGPT().to(dtype)
    load_flat(model, torch.from_numpy(data["init"]).to(dtype))
    return model


def jets(data: Any, about: dict[str, Any], dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Series of the parameters [degree + 1, parameters] and of the query losses [queries, degree + 1]."""
    space = Space(data["coefficients"].shape[0] - 1, 1, dtype)
    model = fresh(data, space.real_dtype)
    replaced = install(model, {name: space.constant(p) for name, p in model.named_parameters()})
    psi = torch.from_numpy(data["psi"])
    weights = []
    for value in psi:
        h = torch.zeros(space.degree, 1, dtype=dtype)
        h[0] = -value
        weights.append(space.jet(torch.ones(()), h))
    train(model, about, weights)
    series = torch.cat([p.coefficients()[:, 0].reshape(space.degree + 1, -1) for p in model.parameters()], 1)
    losses = [loss_of(model, q, about).coefficients()[:, 0] for q in about["queries"]]
    restore(model, replaced)
    return series.detach().numpy(), torch.stack(losses).detach().numpy()


def compare(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Largest differences from the file; coefficients relative to the largest of their degree when it is above 1."""
    data, about = np.load(path), json.loads(path.with_suffix(".json").read_text())
    series, losses = jets(data, about, dtype)
    out: dict[str, Any] = {"file": path.name, "dtype": str(dtype).removeprefix("torch."), "tolerance": TOLERANCE[dtype]}
    out["parameters"] = [difference(a, b, dtype) for a, b in zip(series, data["coefficients"], strict=True)]
    out["losses"] = [difference(a, b, dtype) for a, b in zip(losses.T, data["loss_coefficients"].T, strict=True)]
    name = next(n for n in data.files if n.startswith("params_without_"))
    without = [int(i) for i in re.findall(r"\d+", name)]
    runs = (("plain", [], "params_plain", "loss_plain"), ("without", without, name, "loss_without"))
    for label, ids, key, loss_key in runs:
        params, query_losses = plain(data, about, ids)
        out[label] = max(float(abs(params - data[key]).max()), float(abs(query_losses - data[loss_key]).max()))
    worst = max(*out["parameters"], *out["losses"])
    out["ok"] = worst <= TOLERANCE[dtype] and max(out["plain"], out["without"]) <= PLAIN_TOLERANCE
    return out


def difference(a: np.ndarray, b: np.ndarray, dtype: torch.dtype) -> float:
    """Absolute in double precision; relative to the largest entry in single precision."""
    scale = float(abs(b).max()) if dtype == torch.complex64 else 1.0
    return float(abs(a - b).max()) / scale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=["complex128", "complex64"], default="complex128")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = compare(args.file, getattr(torch, args.dtype))
    print(f"{result['file']}, {result['dtype']}: largest difference (tolerance {result['tolerance']:g})")
    for k, (p, loss) in enumerate(zip(result["parameters"], result["losses"], strict=True)):
        print(f"  degree {k}: parameters {p:.2e}  losses {loss:.2e}")
    print(f"  trained plainly {result['plain']:.2e}, without the deleted documents {result['without']:.2e}")
    if args.json:
        args.json.write_text(json.dumps({**result, **provenance(0)}, indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
