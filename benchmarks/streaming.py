"""What does it cost to leave a model's layers in their files, in memory and in CPU seconds of one thread?

    python benchmarks/streaming.py               # a random Llama of 6.4 GB and one of 2.2 GB, in bfloat16, written to --work
    python benchmarks/streaming.py --smoke

memory   the peak of resident memory of a fresh process that builds an index by streaming (checks at load, rows), mapped
         pages counted (VmHWM), over the bytes of the weights. With `default` but for its whitening, which takes the same
         memory and time however a model is loaded
time     CPU seconds of both ways for the last hidden states of the same batches, whole and streamed in fresh processes one
         after the other; the states must be equal bit for bit. Loading is told apart: it hashes and checks
index    whether both ways wrote the same index, of the smaller model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leaveout.models import ModelOptions
from leaveout.readout.index import Index
from leaveout.readout.model import load_readout
from leaveout.readout.settings import PRESETS
from measuring import arguments, cpu_seconds, made_rows, ratio, spread, write_result

TOKENS = 4096  # of the tokenizer, most of which no text has


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights: sizes of its states and of its middle, blocks, bytes of a file."""

    hidden: int
    middle: int
    blocks: int
    shard: int

    @property
    def parameters(self) -> int:
        return self.blocks * (4 * self.hidden**2 + 3 * self.hidden * self.middle) + 2 * TOKENS * self.hidden


LARGE, SMALL = Shape(2048, 5632, 62, 10**9), Shape(2048, 5632, 21, 10**9)
TINY = Shape(32, 64, 6, 100_000)


def write_model(place: Path, shape: Shape, seed: int) -> None:
    """A model in bfloat16 in several files, written a file at a time."""
    from transformers import LlamaConfig

    place.mkdir(parents=True)
    generator, where, held = torch.Generator().manual_seed(seed), dict[str, str](), dict[str, torch.Tensor]()

    def flush() -> None:
        name = f"model-{len(set(where.values())):05d}.safetensors"
        save_file(held, place / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, name))
        held.clear()

    for name, size in _sizes(shape):
        noise = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=generator)
        held[name] = noise.to(torch.bfloat16)
        if sum(tensor.nbytes for tensor in held.values()) >= shape.shard:
            flush()
    if held:
        flush()
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=shape.hidden,
        intermediate_size=shape.middle,
        num_hidden_layers=shape.blocks,
        num_attention_heads=max(2, shape.hidden // 128),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(place)
    _tokenizer().save_pretrained(place)


def _sizes(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    h, m = shape.hidden, shape.middle
    inside = {
        **{f"self_attn.{name}_proj": (h, h) for name in "qkvo"},
        **{"mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m)},
        **{"input_layernorm": (h,), "post_attention_layernorm": (h,)},
    }
    blocks = [(f"model.layers.{n}.{name}.weight", size) for n in range(shape.blocks) for name, size in inside.items()]
    return [
        ("model.embed_tokens.weight", (TOKENS, h)),
        *blocks,
        ("model.norm.weight", (h,)),
        ("lm_head.weight", (TOKENS, h)),
    ]


def _tokenizer() -> Any:
    """One whose tokens are bytes, and others that stand in no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters += [f"<{n}>" for n in range(TOKENS - len(letters))]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# ---------------------------------------------------------------- in a process of its own


def loading(task: argparse.Namespace) -> dict[str, Any]:
    memory = {} if task.offload == "none" else {"max_memory": task.max_memory}
    return {"dtype": "auto", "offload": task.offload, **memory}


def build(task: argparse.Namespace) -> dict[str, Any]:
    """An index of made-up rows."""
    rows = made_rows(task.rows, 0)
    plain = [replace(channel, whiten_left=False, whiten_right=False) for channel in PRESETS["default"].channels]
    settings = replace(PRESETS["default"], channels=tuple(plain))
    cpu = cpu_seconds(lambda: Index.build(str(task.place), rows, task.idx, settings, **loading(task)))
    arrays = hashlib.sha256()
    index = Index.open(task.idx)
    for segment in index.store.segments():
        for name, array in sorted(segment.arrays().items()):
            arrays.update(name.encode() + array.tobytes())
    return {
        "cpu": cpu,
        "digest": arrays.hexdigest(),
        "tokens": sum(record.extra["tokens"] for record in index.store.iter_rows()),
    }


def trunk(task: argparse.Namespace) -> dict[str, Any]:
    """The last hidden states of batches of 1,024 tokens."""
    started = time.process_time()
    readout = load_readout(str(task.place), options=ModelOptions(**loading(task)))
    readout.identity()
    load = time.process_time() - started
    chance, digest = random.Random(0), hashlib.sha256()
    length = min(128, task.tokens)
    many = [
        torch.tensor([[chance.randrange(TOKENS) for _ in range(length)] for _ in range(min(8, task.tokens // length))])
        for _ in range(max(1, task.tokens // 1024))
    ]
    states: list[torch.Tensor] = []
    cpu = cpu_seconds(lambda: states.extend(readout.hidden_of(many)))
    for one in states:
        digest.update(one.view(torch.int16).numpy().tobytes())
    stream = readout.stream
    return {
        "load": load,
        "cpu": cpu,
        "digest": digest.hexdigest(),
        "wave": None if stream is None else stream.wave_tokens,
    }


def peak() -> float:
    """Gigabytes of the largest resident memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e9


def child(task: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    before, began = peak(), time.monotonic()
    found = (build if task.task == "build" else trunk)(task)
    print(json.dumps({**found, "wall": time.monotonic() - began, "peak": peak(), "before": before}))
    return 0


def run(task: str, place: Path, offload: str, **options: Any) -> dict[str, Any]:
    """What one process says."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, __file__, "--task", task, "--place", str(place), "--offload", offload, *given]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


# ---------------------------------------------------------------- all of it


def measured(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    large, small = (TINY, TINY) if args.smoke else (LARGE, SMALL)
    memory = "20MB" if args.smoke else args.memory
    for place, shape in ((work / "large", large), (work / "small", small)):
        if not place.exists():
            write_model(place, shape, args.seed)
    rows = 4 if args.smoke else args.rows
    tokens = 512 if args.smoke else args.tokens
    weights = sum(file.stat().st_size for file in (work / "large").glob("*.safetensors")) / 1e9
    built = run("build", work / "large", "layers", max_memory=memory, rows=rows, idx=work / "idx-large")
    found: dict[str, list[dict[str, Any]]] = {"none": [], "layers": []}
    for repeat in range(1 if args.smoke else args.repeats):
        for offload in sorted(found, reverse=bool(repeat % 2)):
            found[offload].append(run("trunk", work / "small", offload, max_memory=memory, tokens=tokens))
    indexes = [
        run("build", work / "small", offload, max_memory=memory, rows=rows, idx=work / f"idx-small-{offload}")
        for offload in found
    ]
    whole, streamed = ([one["cpu"] for one in found[offload]] for offload in ("none", "layers"))
    return {
        "question": "What does it cost to leave a model's layers in their files?",
        "memory": {
            "blocks": large.blocks,
            "parameters": large.parameters,
            "weights_gb": weights,
            "max_memory": memory,
            "peak_gb": built["peak"],
            "of_which_before": built["before"],
            "share": built["peak"] / weights,
            "rows": rows,
            "tokens": built["tokens"],
            "cpu_seconds": built["cpu"],
            "wall_seconds": built["wall"],
        },
        "time": {
            "blocks": small.blocks,
            "parameters": small.parameters,
            "tokens": tokens,
            "wave": found["layers"][0]["wave"],
            "whole": spread(whole),
            "streamed": spread(streamed),
            "ratio": ratio(streamed, whole),
            "load_whole": spread([one["load"] for one in found["none"]]),
            "load_streamed": spread([one["load"] for one in found["layers"]]),
            "peak_whole_gb": found["none"][0]["peak"],
            "peak_streamed_gb": found["layers"][0]["peak"],
            "equal": len({one["digest"] for way in found.values() for one in way}) == 1,
        },
        "index": {"equal": len({one["digest"] for one in indexes}) == 1, "rows": rows},
        "repeats": args.repeats,
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="directory of models and indexes (9 GB; default: a temporary one)")
    parser.add_argument("--memory", default="1GB", help="what a streamed process may use for weights and what waits")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--task", choices=("build", "trunk"), help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--offload", help=argparse.SUPPRESS)
    parser.add_argument("--max-memory", help=argparse.SUPPRESS)
    parser.add_argument("--idx", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.task is not None:
        from leaveout.quantities import byte_count

        if args.task == "trunk":
            args.max_memory = byte_count(args.max_memory, "max_memory")
        return child(args)
    with tempfile.TemporaryDirectory() as place:
        work = args.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        result = measured(args, work)
    path = write_result(args.out, "streaming.json", result, args)
    print(json.dumps({name: result[name] for name in ("memory", "time", "index")}, indent=1))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
