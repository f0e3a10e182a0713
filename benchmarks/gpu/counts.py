"""How often is a device given work for a batch of rows, and how often does the host wait for it? Counted, without a device.

    python benchmarks/gpu/counts.py                                   # the leaveout of this checkout: `after`
    python benchmarks/gpu/counts.py --source DIR --commit HASH        # another one, DIR/leaveout: `before`

A random Llama of 24 layers on the device of the tests (`tests/fake_device.py`), in bfloat16; rows of 200 to 300 tokens, two
thirds learned. `benchmarks/results/gpu_counts.json` holds the launches and waits of the trunk and of everything, for a
batch and for 16,384 tokens, by preset. A launch is an operation of torch: some are several kernels. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULT = BENCHMARKS / "results" / "gpu_counts.json"
TOKENS = 16_384


def counts(preset: str, n_tokens: int, layers: int) -> dict[str, Any]:
    """Of one pass over rows of so many tokens in all, after one that makes what is made once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fake_device import DEVICE, counting
    from leaveout.readout.model import Readout, verify_readout
    from leaveout.readout.settings import resolve_settings
    from leaveout.readout.signature import Signer
    from leaveout.readout.tokens import Window

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=1500, num_hidden_layers=layers, bos_token_id=0, eos_token_id=0, **sizes)
    torch.manual_seed(0)
    readout = verify_readout(Readout(LlamaForCausalLM(config).bfloat16().eval().to(DEVICE), Words(1500), None))
    signer = Signer(readout, resolve_settings(preset))
    sides = (side for part in signer.parts for side in (part.left, part.right))
    signer.whitening = {side.whiten: torch.eye(side.size, device=DEVICE) for side in sides if side.whiten}
    lengths = [200 + 7 * (row % 15) for row in range(n_tokens // 250)]
    windows = [
        Window(row, 0, torch.randint(1500, (n,)).tolist(), list(range(n // 3, n - 1))) for row, n in enumerate(lengths)
    ]
    passes, hidden = [], readout.hidden
    readout.hidden = lambda ids: passes.append(ids.shape) or hidden(ids)  # type: ignore[method-assign]
    signer.encoded(windows, len(windows))
    passes.clear()
    with counting() as found:
        signer.encoded(windows, len(windows))
    trunk = {kind: found.below("readout/model.py", kind) - head(found, kind) for kind in ("launches", "waits")}
    per, share = len(passes), sum(lengths) / TOKENS
    out: dict[str, Any] = {"batches": per, "tokens": sum(lengths), "launches of all over the trunk's": 0.0}
    for kind in ("launches", "waits", "copies"):
        out[f"{kind} a batch"] = round(found.total(kind) / per, 1)
        out[f"{kind} for {TOKENS:,} tokens"] = round(found.total(kind) / share)
    for kind, count in trunk.items():
        out[f"{kind} of the trunk a batch"] = round(count / per, 1)
    out["launches of all over the trunk's"] = round(found.launches / trunk["launches"], 3)
    out["waits of leaveout itself a batch"] = round((found.waits - trunk["waits"]) / per, 1)
    places: dict[str, int] = {}
    for line, count in found.by_line("launches").items():
        name = line.split(":")[0] + " " + line.split()[-1]
        places[name] = places.get(name, 0) + count
    largest = sorted(places.items(), key=lambda item: -item[1])[:12]
    return out | {"places a batch": {name: round(count / per, 1) for name, count in largest}}


def head(found: Any, kind: str) -> int:
    """What of the model is its head."""
    return sum(count for line, count in found.by_line(kind).items() if line.endswith((" logits", " slope")))


class Words:
    """Stands for a tokenizer: no text is read."""

    is_fast = True

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="directory of another leaveout, that of --commit")
    parser.add_argument("--commit", help="hash of that one")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args(argv)
    sys.path[:0] = [str(args.source or BENCHMARKS.parent / "src"), str(BENCHMARKS), str(BENCHMARKS.parent / "tests")]
    from provenance import provenance

    found: dict[str, Any] = {preset: counts(preset, args.tokens, args.layers) for preset in ("default", "paper")}
    found |= provenance(0) | ({"commit": args.commit, "dirty": False} if args.commit else {})
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {"question": (__doc__ or "").splitlines()[0], "layers": args.layers}
    result["before" if args.source else "after"] = found
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
