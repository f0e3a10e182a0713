"""Tiny models with random weights, a tokenizer trained on the texts below, and rows for both."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from leaveout.corpus import Corpus, Row
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import SignatureSettings, resolve_settings

TEXTS = (
    "The ferry left the harbour before dawn, and nobody on the quay had noticed that the pilot was missing.",
    "Copper conducts heat better than iron does; silver conducts it better still, but costs far too much.",
    "When the orchard flooded in April, they rowed between the apple trees and counted the drowned beehives.",
    "A prime number has exactly two divisors, which is why one is not prime and two is the only even prime.",
    "“Très bien,” said the naïve façade painter in Zürich, sipping an espresso ☕ beside the 漢字 sign.",
    "Please reply in short sentences. Yes. The parcel weighs 3.5 kg and arrives on 12 May at 09:40.",
    "def area(width, height):\n    return width * height  # in square metres\n",
    "Rain again. The old clock of the town hall struck thirteen, and the mayor laughed until he cried.",
)
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
NEOX = {key: value for key, value in COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "gemma"), COMMON),
    "mistral": {**COMMON, "sliding_window": 64},
    "gemma2": {**COMMON, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": {**COMMON, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gpt_neox": NEOX,
    "gpt2": GPT2,
    "phi": NEOX,  # its head has a bias
    "granite": {**COMMON, "logits_scaling": 4.0},
    "cohere": {**COMMON, "logit_scale": 0.5},
}
SPECIAL = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
UNKNOWN = ("phi", "granite", "cohere")  # families whose layers the engine does not know
TAPS = [name for name in FAMILIES if name not in UNKNOWN]


def make_tokenizer(bos: bool = True, extra: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens, with a chat template; `bos`: it begins every text with <s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, extra], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT)


def make_model(
    family: str = "llama",
    tied: bool = False,
    spread: float = 0.3,
    vocabulary: int = 523,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A model whose every parameter is random: weights of standard deviation `spread`, norms and biases as well."""
    config = AutoConfig.for_model(
        family,
        **{**FAMILIES[family], **SPECIAL, "vocab_size": vocabulary, "tie_word_embeddings": tied, **changes},
    )
    lm = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(spread * noise)
            else:
                parameter.add_(0.3 * noise)
    return lm.to(dtype).eval()


def make_readout(family: str = "llama", tokenizer: Any = None, **options: Any) -> Readout:
    return load_readout(make_model(family, **options), tokenizer or make_tokenizer())


def rows_of(raw: list[Any]) -> list[Row]:
    return list(Corpus.open(raw))


def built(model, corpus, path, preset="default", tokenizer=None, **options):
    """`Index.build`, with single settings of signatures among its options."""
    names = {field.name for field in fields(SignatureSettings)}
    changes = {name: options.pop(name) for name in list(options) if name in names}
    return Index.build(model, corpus, path, resolve_settings(preset, **changes), tokenizer, **options)
