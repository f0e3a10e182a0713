"""Language models that are trained from scratch on the public rows for minutes, each made once in a working directory.

neox   GPT-NeoX in the shape of Pythia: hidden 128, 4 layers, the 512 tokens of stories260K, untied, 0.92 million parameters
olmo   OLMo-2: hidden 256, 4 layers, 20,480 tokens of its own, untied, 14.7 million parameters
small olmo  the same with hidden 128 and 4,096 tokens, 2.1 million parameters
qwen   Qwen3: hidden 128, 6 layers, 4,096 tokens of its own, tied, 1.7 million parameters
gemma  Gemma-2: hidden 160, 5 layers, 4,096 tokens of its own, tied, 2.4 million parameters
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from corpora import data
from leaveout.corpus import Corpus, Row
from leaveout.readout.model import load_readout
from leaveout.training.loop import RunOptions
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.train import train_plain
from public_rows import LONGEST, groups, split_rows


@dataclass(frozen=True)
class Shape:
    """A model that is trained from scratch: its tokenizer and untrained form, rows a group, epochs, and longest row."""

    name: str
    tokenizer: Callable[[], Any]
    untrained: Callable[[int], Any]  # of the size of the vocabulary
    rows: int
    epochs: int
    rate: float
    longest: int = LONGEST


def _stories_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(data("stories260K/config.json").parent))


def _own_tokenizer(tokens: int) -> Any:
    """Byte pairs of the shared corpora."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [prompt + answer for pairs in groups(0).values() for prompt, answer in pairs]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=["<end>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _neox(vocabulary: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
            max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def _olmo(hidden: int, vocabulary: int) -> Any:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=4, num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32, intermediate_size=4 * hidden, max_position_embeddings=128,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _qwen(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, intermediate_size=384, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _gemma(vocabulary: int) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocabulary, hidden_size=160, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
            head_dim=40, intermediate_size=480, max_position_embeddings=128, sliding_window=128,
            query_pre_attn_scalar=40, tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


NEOX = Shape("neox", _stories_tokenizer, _neox, rows=250, epochs=8, rate=2e-3)
OLMO = Shape("olmo", partial(_own_tokenizer, 20480), partial(_olmo, 256), rows=600, epochs=3, rate=1e-3, longest=48)
SMALL_OLMO = Shape("small-olmo", partial(_own_tokenizer, 4096), partial(_olmo, 128), rows=600, epochs=3, rate=2e-3)
GEMMA = Shape("gemma", partial(_own_tokenizer, 4096), _gemma, rows=600, epochs=3, rate=2e-3, longest=64)
QWEN = Shape("qwen", partial(_own_tokenizer, 4096), _qwen, rows=600, epochs=3, rate=2e-3, longest=64)


def untrained_model(work: Path, shape: Shape, seed: int) -> Path:
    """The directory of a model with random weights and its tokenizer, made once."""
    place = work / f"{shape.name}-start"
    if not (place / "config.json").exists():
        tokenizer = shape.tokenizer()
        torch.manual_seed(seed)
        tokenizer.save_pretrained(place)
        shape.untrained(len(tokenizer)).save_pretrained(place)
    return place


def pretrained(work: Path, shape: Shape, rows: Sequence[Row], seed: int) -> tuple[Path, float]:
    """The directory of the model after training from scratch, made once; and the CPU seconds it took."""
    place, start = work / shape.name, untrained_model(work, shape, seed)
    if (place / "seconds.json").exists():
        return place, float(json.loads((place / "seconds.json").read_text()))
    texts = tuple(Corpus.open([{"id": row.id, "text": row.text} for row in rows]))
    recipe = Recipe(
        "causal-lm", texts, model=str(start), epochs=shape.epochs, batch_size=32, order="shuffled",
        schedule="cosine", warmup=20, optimizer=OptimizerSettings("adamw", shape.rate, betas=(0.9, 0.99)),
        max_tokens=shape.longest, seed=seed,
    )  # fmt: skip
    began = time.process_time()
    parameters = train_plain(recipe, options=RunOptions(directory=work / f"{shape.name}-work", progress=True))
    seconds = time.process_time() - began
    model = load_readout(str(start))
    model.lm.load_state_dict(parameters, strict=False)
    model.lm.save_pretrained(place)  # type: ignore[operator]
    model.tokenizer.save_pretrained(place)
    (place / "seconds.json").write_text(json.dumps(seconds))
    return place, seconds


def pretrained_on_groups(work: Path, shape: Shape, seed: int, without: Sequence[str]) -> tuple[Path, float]:
    """The same, trained on the first rows of all groups but some."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(untrained_model(work, shape, seed)))
    found = {name: pairs for name, pairs in groups(seed).items() if name not in without}
    rows, _ = split_rows(found, (shape.rows, 0), 0, lambda text: len(tokenizer(text)["input_ids"]), seed, shape.longest)
    return pretrained(work, shape, rows, seed)
