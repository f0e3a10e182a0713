"""Is leaveout right on a GPU, how fast is it there, and how much memory does it take? One command, no network.

    python benchmarks/gpu/run.py [--model DIR] [--out DIR] [--seconds 300]
    python benchmarks/gpu/run.py --dry-run            # the same on the CPU, with tiny sizes

DIR holds a small causal language model, stories260K say (`benchmarks/corpora.py` gets it); without it, a random one of two
small layers is made here. Models of the shapes of OLMo-2 1B and 7B are made at random on the device itself. Stages:

    machine      what the card does at best: products, copies, launches, eigenvectors
    signatures   rows and scores of every preset against those of the CPU in float32; bfloat16; twice the same
    index        built and asked from end to end, on both; what the doctor says
    shape ...    tokens a second and peak memory of a forward pass, and of rows, for each of the two shapes

`DIR/gpu.json` is written anew after each stage, with date and card; a stage that fails says so there, and the others go on.
The exit status is 1 if a stage failed or a score on the device is off by more than `TOLERANCE` of their length.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "src")]  # leaveout need not be installed on the machine

from leaveout.projection import CountSketch  # noqa: E402
from leaveout.readout.doctor import doctor  # noqa: E402
from leaveout.readout.forms import low_rank  # noqa: E402
from leaveout.readout.index import Index  # noqa: E402
from leaveout.readout.model import Readout, load_readout, verify_readout  # noqa: E402
from leaveout.readout.settings import resolve_settings  # noqa: E402
from leaveout.readout.signature import Signer  # noqa: E402
from leaveout.readout.tokens import Window  # noqa: E402
from leaveout.readout.whitening import whitening_matrices  # noqa: E402
from measuring import tiny  # noqa: E402
from provenance import provenance  # noqa: E402

TOLERANCE = 1e-3
"""Of scores in float32: products of a GPU are sums in another order; TF32, which would give 1e-3 and more, is off."""

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass
class Card:
    """Where things run, until when, and in which sizes."""

    device: str
    until: float
    dry: bool
    model: str | None

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, task: Callable[[], object], repeats: int = 3) -> float:
        """The median of some repeats, after one that does not count."""
        found = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            task()
            self.wait()
            found.append(time.perf_counter() - began)
        return sorted(found[1:])[repeats // 2]

    def peak(self, task: Callable[[], object]) -> float:
        """Gigabytes that a task needs beside what is there; 0 on a CPU, where nobody counts."""
        if not self.cuda:
            task()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def readout(self, device: str, dtype: torch.dtype = torch.float32) -> Readout:
        """The small model, in another place or dtype each time: none shares tensors with another."""
        small = tiny(0) if self.model is None else load_readout(self.model)
        return load_readout(small.lm.to(device=device, dtype=dtype), small.tokenizer)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the length of what is wanted."""
    found, wanted = (x.double().cpu() for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------- the card


def machine(card: Card) -> dict[str, Any]:
    n, device = 256 if card.dry else 8192, card.device
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    half, other = a.bfloat16(), b.bfloat16()
    host = torch.empty(2**20 if card.dry else 2**28, dtype=torch.uint8)
    there, pinned = host.to(device), host.pin_memory() if card.cuda else host
    one = torch.ones(8, device=device)
    square = torch.randn(64, 64, device=device, dtype=torch.float64)
    left, right = torch.randn(64, 256, device=device), torch.randn(64, 512, device=device)
    sketch = CountSketch.make(1000 if card.dry else 100_352, 1024, 0, "gpu").to(torch.device(device), torch.float32)
    wide = torch.rand(16 if card.dry else 125, len(sketch.buckets), device=device)
    return {
        "float32 TFLOP/s": 2 * n**3 / card.seconds(lambda: a @ b) / 1e12,
        "bfloat16 TFLOP/s": 2 * n**3 / card.seconds(lambda: half @ other) / 1e12,
        "memory TB/s": 2 * a.nbytes / card.seconds(lambda: b.copy_(a)) / 1e12,
        "copy to the device GB/s": host.nbytes / card.seconds(lambda: there.copy_(host)) / 1e9,
        "copy of pinned memory GB/s": host.nbytes / card.seconds(lambda: there.copy_(pinned)) / 1e9,
        "microseconds a launch": 1e3 * card.seconds(lambda: [one.add_(1) for _ in range(1000)]),
        "eigenvectors of 64 x 64 ms": 1e3 * card.seconds(lambda: torch.linalg.eigh(square @ square.T)),
        "24 triples of 64 positions ms": 1e3 * card.seconds(lambda: low_rank(left, right, 24)),
        "count sketch ms": 1e3 * card.seconds(lambda: sketch(wide)),
        "count sketch twice the same": bool(torch.equal(sketch(wide), sketch(wide))),
    }


# ---------------------------------------------------------------- right?


def random_windows(vocabulary: int, count: int, longest: int, seed: int = 0) -> list[Window]:
    """Rows of one window: random tokens, of which the last two thirds are learned."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 4, longest, (count,), generator=chance).tolist()
    ids = [torch.randint(vocabulary, (length,), generator=chance).tolist() for length in lengths]
    return [Window(row, 0, ids[row], list(range(n // 3, n - 1))) for row, n in enumerate(lengths)]


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "default, 1 KB": ("default", {"bytes_per_row": 1024}),
    "residual": ("residual", {}),
    "paper": ("paper", {}),
    "similarity": ("similarity", {}),
}


def scores(signer: Signer, rows: Tensor) -> Tensor:
    """Products of all rows with all, as a search takes them: on the CPU."""
    rows = rows.float().cpu()
    return signer.form.products(rows, rows)


def signatures(card: Card) -> dict[str, Any]:
    here, there = card.readout("cpu"), card.readout(card.device)
    half = card.readout(card.device, torch.bfloat16)
    count = 6 if card.dry else 48
    windows = random_windows(here.vocabulary, count, min(200, here.context))
    out: dict[str, Any] = {}
    for name, (preset, changes) in FORMS.items():
        settings = resolve_settings(preset, **changes)
        signers = [Signer(readout, settings) for readout in (here, there, half)]
        found: dict[str, Any] = {}
        if settings.whitens:
            signers[0].whitening = whitening_matrices(signers[0], windows)
            own = whitening_matrices(signers[1], windows)
            found["whitening"] = max(distance(own[key], value) for key, value in signers[0].whitening.items())
            for signer in signers[1:]:
                signer.whitening = {key: value.to(card.device) for key, value in signers[0].whitening.items()}
        wanted = scores(signers[0], signers[0].rows(windows, count))
        first, again, rough = (signer.rows(windows, count) for signer in (signers[1], signers[1], signers[2]))
        found["scores"] = distance(scores(signers[1], first), wanted)
        found["scores in bfloat16"] = distance(scores(signers[2], rough), wanted)
        out[name] = found | {"twice the same": bool(torch.equal(first, again))}
    worst = max(found["scores"] for found in out.values())
    if worst > TOLERANCE:
        raise ArithmeticError(f"scores on {card.device} are off by {worst:.1e}: {json.dumps(out)}")
    return out


def index(card: Card) -> dict[str, Any]:
    animals, friends = ("dog", "cat", "bird", "fish"), ("Tom", "Lily", "Ben", "a ball")
    rows = [
        {"prompt": "Once upon a time ", "response": f"there was a little {a} who liked to play with {b}."}
        for a in animals
        for b in friends
    ]
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for preset in ("default", "paper"):
            devices = dict.fromkeys(("cpu", card.device))
            made = {d: Index.build(card.readout(d), rows, Path(place) / preset / d, preset) for d in devices}
            wanted = torch.from_numpy(made["cpu"].score(rows[:3]))
            found = torch.from_numpy(made[card.device].score(rows[:3]))
            pairs = [made[d].explain(rows[0], made[d].ids[1]).score for d in ("cpu", card.device)]
            out[preset] = {"scores": distance(found, wanted), "explained": abs(pairs[1] / pairs[0] - 1)}
    out["doctor"] = {check.name: check.passed for check in doctor(card.readout(card.device)).checks}
    return out


# ---------------------------------------------------------------- fast?


class Words:
    """Stands for the tokenizer of a random model: no text is read."""

    is_fast = True

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def shaped(card: Card, name: str) -> Readout:
    """A random OLMo-2 of this shape in bfloat16, made on the device."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    shape, vocabulary = (TINY_SHAPE, 1000) if card.dry else (SHAPES[name], 100_352)
    config = Olmo2Config(vocab_size=vocabulary, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, **shape)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(card.device):
            lm = Olmo2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    return verify_readout(Readout(lm, Words(vocabulary), None))


def trunk(card: Card, readout: Readout) -> dict[str, Any]:
    blocks = sum(p.numel() for name, p in readout.lm.named_parameters() if ".layers." in name)
    out: dict[str, Any] = {}
    for tokens in (256,) if card.dry else (1024, 4096, 16_384, 65_536):
        ids = torch.randint(readout.vocabulary, (tokens // 256, 256), device=card.device)
        memory = card.peak(lambda ids=ids: readout.hidden(ids))
        seconds = card.seconds(lambda ids=ids: readout.hidden(ids))
        out[f"{tokens} tokens"] = {
            "tokens/s": tokens / seconds, "TFLOP/s": 2 * blocks * tokens / seconds / 1e12, "peak GB": memory,
        }  # fmt: skip
    return out


def rows(card: Card, readout: Readout) -> dict[str, Any]:
    count = 3 if card.dry else 24
    windows = random_windows(readout.vocabulary, count, 60 if card.dry else 400)
    tokens = sum(len(window.ids) for window in windows)
    out: dict[str, Any] = {}
    for preset in ("paper", "default"):
        signer = Signer(readout, resolve_settings(preset))
        sides = (side for part in signer.parts for side in (part.left, part.right))
        # Identities take the time of the matrices that a pass over a sample would give.
        signer.whitening = {side.whiten: torch.eye(side.size, device=card.device) for side in sides if side.whiten}
        memory = card.peak(lambda signer=signer: signer.rows(windows, count))
        seconds = card.seconds(lambda signer=signer: signer.rows(windows, count), 1)
        vectors = signer.rows(windows, count)
        stored = card.seconds(lambda signer=signer, vectors=vectors: signer.codec.encode(vectors), 1)
        out[preset] = {
            "tokens/s": tokens / seconds, "rows/s": count / seconds, "peak GB": memory,
            "bytes a row": signer.codec.row_bytes, "encoding ms a row": 1e3 * stored / count,
        }  # fmt: skip
    return out


def speed(card: Card, name: str) -> dict[str, Any]:
    readout = shaped(card, name)
    out = {"trunk": trunk(card, readout)}
    return out | {"rows": rows(card, readout) if card.left > 60 or card.dry else "no time"}


# ---------------------------------------------------------------- all


def carry_out(card: Card, out: Path, result: dict[str, Any]) -> None:
    """Every stage in turn, each kept when it is done."""
    stages: dict[str, Callable[[Card], dict[str, Any]]] = {
        "machine": machine, "signatures": signatures, "index": index,
        **{f"shape {name}": partial(speed, name=name) for name in (("1B",) if card.dry else SHAPES)},
    }  # fmt: skip
    for name, stage in stages.items():
        began = time.monotonic()
        try:
            found = stage(card) if card.left > 20 or card.dry else {"left out": "no time"}
        except Exception as error:  # the others go on
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        result["stages"][name] = {"seconds": round(time.monotonic() - began, 1), **found}
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)
        card.free()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a small causal language model; default: a random one")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="directory of gpu.json")
    parser.add_argument("--seconds", type=float, default=300, help="no stage begins with less than 20 of them left")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    args = parser.parse_args(argv)
    card = Card("cpu" if args.dry_run else args.device, time.monotonic() + args.seconds, args.dry_run, args.model)
    if card.cuda and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --dry-run tries everything on the CPU")
    name = torch.cuda.get_device_name() if card.cuda else "CPU"
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"question": (__doc__ or "").splitlines()[0], "card": name, "dry": card.dry, "cores": os.cpu_count()}
    result |= {"stages": {}, **provenance(0)}
    carry_out(card, args.out, result)
    return int(any("error" in found for found in result["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
