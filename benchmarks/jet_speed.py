"""How long does one training step of a jet take, per direction, on one core?

    python benchmarks/jet_speed.py --degree 3 --directions 128 --dtype complex64 --json OUT
    python benchmarks/jet_speed.py --model gpt2 --directions 8 --json OUT     # about a million parameters
    python benchmarks/jet_speed.py --all --json OUT                           # the table of docs/evidence/jets.md

Times whole steps (forward, backward, optimizer) in CPU seconds, the median over repeats. `matmul_share` is the part of
this core's peak matrix rate (a large real product between the repeats, same precision, median) that the run's own
matrix products reach when all of its time is counted: 2 p (p + 1) real multiply-adds per real one of the plain run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.jets import Jet, Space, install
from leaveout.training.loop import PaperAdam
from leaveout.training.memory import kept_memory
from leaveout.training.microgpt import MicroGPT
from provenance import provenance

ALL = (
    *itertools.product(["microgpt"], ["complex64"], [1, 2, 3, 6], [64, 128, 256]),
    *itertools.product(["microgpt"], ["complex128"], [1, 2, 3, 6], [64, 128, 256]),
    ("gpt2", "complex64", 3, 8),
)
"""Model, number type, degree, directions of each row of the table in docs/evidence/jets.md."""

LENGTHS = (7, 6, 8, 7, 5, 7, 9, 6, 8, 7)
"""Tokens of the documents: the lengths of names, mean 7.0 (a name of six letters and its end sign)."""


def microgpt(space: Space | None, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], Callable[[Tensor], Tensor]]:
    model = MicroGPT().to(dtype)
    batches = [torch.randint(0, 27, (1, n + 1)) for n in LENGTHS]
    return model, batches, lambda ids: F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])


def gpt2(space: Space | None, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], Callable[[Tensor], Tensor]]:
    """GPT-2 shape: width 128, 4 layers, vocabulary 1000; 0.93 million parameters, 8 x 64 tokens a step."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=1000, n_positions=64, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
        activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(dtype)
    batches = [torch.randint(0, 1000, (8, 65)) for _ in range(1)]

    def loss(ids: Tensor) -> Tensor:
        inputs = ids[:, :-1]
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return model, batches, loss


MODELS = {"microgpt": microgpt, "gpt2": gpt2}


class CountMatmuls(torch.utils._python_dispatch.TorchDispatchMode):
    """Real multiply-adds of all matrix products of a plain run."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left = args[1] if name.startswith(("add", "badd")) else args[0]
            self.multiply_adds += out.numel() * left.shape[-1]
        return out


def peak_rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a 1024 x 1024 real product, best of several."""
    a = torch.randn(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 1024**3 / best


def step(loss: Callable[[Tensor], Tensor], ids: Tensor, weight: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (loss(ids) * weight).backward()
    optimizer.step()


def measure(name: str, degree: int, directions: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    space = Space(degree, directions, dtype)
    model, batches, loss = MODELS[name](space, space.real_dtype)
    optimizer = PaperAdam(model.parameters())
    with CountMatmuls() as counted:
        for ids in batches:
            step(loss, ids, 1.0, optimizer)
    plain_start = time.process_time()
    for ids in batches:
        step(loss, ids, 1.0, optimizer)
    plain = (time.process_time() - plain_start) / len(batches)
    install(model, {n: space.constant(p) for n, p in model.named_parameters()})
    weight = _random_weight(space)
    optimizer = PaperAdam(model.parameters())
    for ids in batches[:2]:
        step(loss, ids, weight, optimizer)
    times, peaks = [], [peak_rate(space.real_dtype)]
    for _ in range(repeats):
        start = time.process_time()
        for ids in batches:
            step(loss, ids, weight, optimizer)
        times.append((time.process_time() - start) / len(batches))
        peaks.append(peak_rate(space.real_dtype))
    assert all(isinstance(p, Jet) and bool(p.h.isfinite().all()) for p in model.parameters())
    typical, peak = statistics.median(times), statistics.median(peaks)
    needed = 2 * degree * (degree + 1) * counted.multiply_adds / len(batches)
    return {
        "model": name, "parameters": sum(p.numel() for p in model.parameters()), "degree": degree,
        "directions": directions, "dtype": str(dtype).removeprefix("torch."),
        "us_per_step_per_direction": typical / directions * 1e6,
        "spread": [min(times) / directions * 1e6, max(times) / directions * 1e6],
        "plain_us_per_step": plain * 1e6, "peak_gflops": 2 * peak / 1e9,
        "matmul_share": needed * directions / typical / peak, "repeats": repeats,
    }  # fmt: skip


def _random_weight(space: Space) -> Jet:
    h = torch.zeros(space.degree, space.directions, dtype=space.dtype)
    h[0] = torch.randn(space.directions, dtype=space.dtype) * 0.03
    return space.jet(torch.ones(()), h)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every row of the table in docs/evidence/jets.md")
    parser.add_argument("--model", choices=sorted(MODELS), default="microgpt")
    parser.add_argument("--degree", type=int, nargs="+", default=[3])
    parser.add_argument("--directions", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", nargs="+", choices=["complex64", "complex128"], default=["complex64"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = itertools.product([args.model], args.dtype, args.degree, args.directions)
    rows = []
    for name, dtype, degree, directions in ALL if args.all else wanted:
        with kept_memory(torch.device("cpu")):
            row = measure(name, degree, directions, getattr(torch, dtype), args.repeats)
        rows.append(row)
        print(
            f"{name} degree {degree} directions {directions} {dtype}: "
            f"{row['us_per_step_per_direction']:.0f} us/step/direction, "
            f"{row['matmul_share']:.0%} of the matmul peak ({row['peak_gflops']:.0f} Gflop/s)",
            file=sys.stderr,
        )
    result = {**rows[0], "rows": rows, **provenance(0)} if len(rows) > 1 else {**rows[0], **provenance(0)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
