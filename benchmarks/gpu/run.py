"""Is leaveout right on a GPU, how fast is it there, and how much memory does it take? One command, no network.

    python benchmarks/gpu/run.py [--model DIR] [--out DIR] [--seconds 440] [--stages machine signatures ...]
    python benchmarks/gpu/run.py --device cpu --tiny            # the same on the CPU, with tiny sizes

DIR holds a small causal language model, stories260K say (`benchmarks/corpora.py` gets it); without it, a random one of two
small layers is made here. Models of the shapes of OLMo-2 1B, 7B and 32B (6 of its 64 blocks) are made at random on the device
itself. Stages, in this order; an early run takes those down to `training`, in about 150 s:

    machine      what the card does at best: products, copies, launches, eigenvectors
    signatures   rows and scores of every preset against those of the CPU in float32; bfloat16; twice the same
    index        built and asked from end to end, on both; what the doctor says
    training     plain runs, many weightings at once, reverse mode and jets against the CPU
    shape ...    tokens a second, launches, waits, costliest kernels and peak memory of a forward pass, and of rows
    search       rows a second of both stored forms, on the CPU and on the device
    streaming    one block of the 32B shape from pinned memory while another is computed
    training speed   jets of microgpt by directions and degree beside one core, reverse mode, retrainings

`DIR/gpu.json` is written anew after each stage, with date and card; a stage that fails says so there, and the others go on.
The exit status is 1 if a stage failed or something on the device is off by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from card import BENCHMARKS, Card, distance, random_windows  # noqa: E402
from leaveout.metrics import spearman  # noqa: E402
from leaveout.projection import CountSketch  # noqa: E402
from leaveout.readout.codec import tensors  # noqa: E402
from leaveout.readout.doctor import doctor  # noqa: E402
from leaveout.readout.forms import low_rank  # noqa: E402
from leaveout.readout.index import Index  # noqa: E402
from leaveout.readout.model import Readout, verify_readout  # noqa: E402
from leaveout.readout.settings import resolve_settings  # noqa: E402
from leaveout.readout.signature import Signer  # noqa: E402
from leaveout.readout.whitening import whitening_matrices  # noqa: E402
from leaveout.readout.wide import idle_root  # noqa: E402
from provenance import provenance  # noqa: E402
from training_stages import training, training_speed  # noqa: E402

TOLERANCE = 1e-3
"""Of scores in float32: products of a GPU are sums in another order; TF32, which would give 1e-3 and more, is off."""

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "32B": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 6, "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
NEEDED = {"1B": 45, "7B": 75, "32B": 75}  # seconds, or the shape is left out
BLOCKS = {"1B": 16, "7B": 32, "32B": 64}  # of the whole models
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


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

    def in_tf32() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    out = {"torch": torch.__version__, "device": card.device}
    if card.cuda:
        about = torch.cuda.get_device_properties(0)
        widened = card.seconds(lambda: torch.mm(half, other, out_dtype=torch.float32))
        out |= {"memory GB": about.total_memory / 1e9, "processors": about.multi_processor_count}
        out |= {
            "bfloat16 to float32 TFLOP/s": 2 * n**3 / widened / 1e12,
            "TF32 TFLOP/s": 2 * n**3 / card.seconds(in_tf32) / 1e12,
        }
    return out | {
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
        rounded = scores(signers[2], rough)
        found["scores in bfloat16"] = distance(rounded, wanted)
        found["their rank correlation"] = float(np.mean(spearman(rounded.numpy(), wanted.numpy())))
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
    for tokens in (256,) if card.dry else (1024, 16_384, 65_536):
        ids = torch.randint(readout.vocabulary, (tokens // 256, 256), device=card.device)
        memory = card.peak(lambda ids=ids: readout.hidden(ids))
        seconds = card.seconds(lambda ids=ids: readout.hidden(ids))
        out[f"{tokens} tokens"] = {
            "tokens/s": tokens / seconds, "TFLOP/s": 2 * blocks * tokens / seconds / 1e12, "peak GB": memory,
            **card.kernels(lambda ids=ids: readout.hidden(ids)),
        }  # fmt: skip
    return out


def rows(card: Card, readout: Readout) -> dict[str, Any]:
    """Rows as a build makes them, their codes included, but for the statistics pass."""
    count = 3 if card.dry else 192
    windows = random_windows(readout.vocabulary, count, 60 if card.dry else 400)
    tokens = sum(len(window.ids) for window in windows)
    out: dict[str, Any] = {"rows": count, "tokens": tokens}
    for preset in ("paper", "default"):
        if card.left < 45 and not card.dry:
            out[preset] = "no time"
            continue
        signer = Signer(readout, resolve_settings(preset))
        sides = (side for part in signer.parts for side in (part.left, part.right))
        # Identities take the time of the matrices that a pass over a sample would give.
        signer.whitening = {
            side.whiten: idle_root(side.size, torch.device(card.device), signer.dtype) for side in sides if side.whiten
        }
        memory = card.peak(lambda signer=signer: signer.encoded(windows, count))
        seconds = card.seconds(lambda signer=signer: signer.encoded(windows, count), 1)
        out[preset] = {
            "tokens/s": tokens / seconds, "rows/s": count / seconds, "peak GB": memory, "bytes a row": signer.codec.row_bytes,
            **card.kernels(lambda signer=signer: signer.encoded(windows, count)),
        }  # fmt: skip
        del signer
        card.free()
    return out


def speed(card: Card, name: str) -> dict[str, Any]:
    if card.left < NEEDED.get(name, 0) and not card.dry:
        return {"left out": "no time"}
    readout = shaped(card, name)
    out = {"blocks": readout.lm.config.num_hidden_layers, "of": BLOCKS[name], "trunk": trunk(card, readout)}  # type: ignore[union-attr]
    found = out | {"rows": rows(card, readout)}
    best = max(one["tokens/s"] for one in found["trunk"].values())
    for preset in ("paper", "default"):
        if isinstance(found["rows"][preset], dict):
            found["rows"][preset]["of the trunk's best rate"] = found["rows"][preset]["tokens/s"] / best
    return found


# ---------------------------------------------------------------- search, streaming


def search(card: Card) -> dict[str, Any]:
    """Stored rows scored against one query and sixteen; the same codes on the CPU and on the device."""
    readout = card.readout("cpu")
    count = 200 if card.dry else 20_000
    windows = random_windows(readout.vocabulary, 40, min(200, readout.context))
    signer = Signer(readout, resolve_settings("default", bytes_per_row=2048, short_bytes=512))
    signer.whitening = whitening_matrices(signer, windows)
    vectors = signer.rows(windows, 40)
    repeated = vectors[torch.arange(count) % 40]
    arrays = signer.codec.encode(repeated)
    out: dict[str, Any] = {"rows": count, "bytes a row": signer.codec.row_bytes}
    for n_queries in (1, 16):
        wanted: Any = None
        for device in dict.fromkeys(("cpu", card.device)):
            score = signer.codec.scorer_on(vectors[:n_queries], torch.device(device))
            there = {name: x.to(device) for name, x in tensors(arrays, slice(None)).items()}  # as a search keeps them
            seconds = card.seconds(lambda score=score, there=there: score(there))
            found = score(there).cpu()
            wanted = found if wanted is None else wanted
            same = distance(found, wanted)
            out[f"{n_queries} queries, {device}"] = {"rows/s": count / seconds, "scores": same}
    return out


def streaming(card: Card) -> dict[str, Any]:
    """A block of the 32B shape copied from pinned memory while another one works on a wave of tokens."""
    width, inner, tokens = (64, 128, 256) if card.dry else (5120, 27_648, 65_536)
    host = [torch.randn(inner, width, dtype=torch.bfloat16) for _ in range(3)]
    pinned = [x.pin_memory() for x in host] if card.cuda else host
    there = [x.to(card.device) for x in host]
    states = torch.randn(tokens, width, dtype=torch.bfloat16, device=card.device)

    def compute() -> Tensor:
        found = states
        for up in there:
            found = (found @ up.T) @ up * 1e-4
        return found

    def copy() -> None:
        for x in pinned:
            x.to(card.device, non_blocking=True)

    def both() -> None:
        if card.cuda:
            other = torch.cuda.Stream()
            with torch.cuda.stream(other):
                copy()
        else:
            copy()
        compute()

    return {"GB": sum(x.nbytes for x in pinned) / 1e9, "tokens": tokens, "computing s": card.seconds(compute),
            "copying s": card.seconds(copy), "both s": card.seconds(both)}  # fmt: skip


# ---------------------------------------------------------------- all


def carry_out(card: Card, out: Path, result: dict[str, Any], wanted: Sequence[str]) -> None:
    """Every stage in turn, or those that are wanted, each kept when it is done."""
    stages: dict[str, Callable[[Card], dict[str, Any]]] = {
        "machine": machine, "signatures": signatures, "index": index, "training": training,
        **{f"shape {name}": partial(speed, name=name) for name in (("1B",) if card.dry else SHAPES)},
        "search": search, "streaming": streaming, "training speed": training_speed,
    }  # fmt: skip
    for name, stage in stages.items():
        if wanted and name not in wanted:
            continue
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
    parser.add_argument("--seconds", type=float, default=440, help="no stage begins with less than 20 of them left")
    parser.add_argument("--stages", nargs="+", default=(), help="only these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as on a CPU")
    args = parser.parse_args(argv)
    card = Card(args.device, time.monotonic() + args.seconds, args.tiny, args.model)
    if card.cuda and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --device cpu --tiny tries everything on the CPU")
    name = torch.cuda.get_device_name() if card.cuda else "CPU"
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"question": (__doc__ or "").splitlines()[0], "card": name, "dry": card.dry, "cores": os.cpu_count()}
    result |= {"stages": {}, **provenance(0)}
    carry_out(card, args.out, result, args.stages)
    return int(any("error" in found for found in result["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
