"""Two hundred rows of every form, six kinds of tokenizers, and the characters behind their tokens, found anew.

The oracle walks through the text by what a token writes, and uses neither offsets nor the package.
"""

from __future__ import annotations

import json
import random
import re
import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENGLISH = tuple(
    re.findall(r"\S+", "the miller asked for flour, rain; a bell rang twice before 7:30 and nobody came to the gate")
)
OTHER = tuple(
    re.findall(
        r"\S+", "die Mühle stand still, weil das Rad fehlte; am Tor hing ein Schild: 磨坊 关闭 到 五月 ☕ 🧑\u200d🌾"
    )
)
CODE = (
    "def sum(items):\n    count = 0\n    for item in items:\n        if item  >  0:\n            count += 1\n\n    return count",
    "class Gate:\n\tdef open(self):\n\t\tself.state  =  'open'\n\n\tdef shut(self):\n\t\tpass\n",
    "if x:\n        return  1\nelse:\n    y = [ 1,  2 ]   # two\n",
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>Tools: {{ tools | tojson }}{{ eos_token }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is not none %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}


def make_rows(tool_calls: bool = True, n: int = 200) -> list[dict[str, Any]]:
    """Rows of all forms in turn, in two languages and code, with seams at and inside words and spaces."""
    draw = random.Random(5)
    return [_row(number, draw, tool_calls) | {"id": f"row {number}"} for number in range(n)]


def _words(draw: random.Random, n: int) -> str:
    chosen = [draw.choice(ENGLISH if draw.random() < 0.6 else OTHER) for _ in range(n)]
    return "".join(word + draw.choice([" ", " ", " ", "  ", "\n", " \n "]) for word in chosen).strip()


def _row(number: int, draw: random.Random, tool_calls: bool) -> dict[str, Any]:
    asked, told = _words(draw, draw.randint(1, 9)), _words(draw, draw.randint(1, 12))
    if number % 8 == 0:
        return {"text": told + draw.choice(["", "\n", "  "])}
    if number % 8 == 1:
        seam = draw.choice([(" ", ""), ("", " "), (" ", " "), ("", "  "), ("\n", "    "), ("  \n", ""), ("", "")])
        return {"prompt": asked + seam[0], "completion": seam[1] + told}
    if number % 8 in (2, 3):
        code = draw.choice(CODE)
        cut = draw.randrange(1, len(code) - 4)
        return {"prompt": code[:cut], "response": code[cut:]} if code[cut:].strip() else {"text": code}
    if number % 8 == 4:
        return {"instruction": asked, "input": draw.choice(["", _words(draw, 4)]), "output": told}
    if number % 8 == 5:
        text = asked + " " + told
        return {"text": text, "prompt_text": text[: draw.randrange(1, len(text) - 2)].rstrip()}
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    if number % 8 == 6:
        return {"messages": [{"role": "system", "content": _words(draw, 3)}, *turns, turns[0], turns[1]]}
    call = {"role": "assistant", "content": "A moment."}
    if tool_calls:
        call = call | {"content": draw.choice([None, "A moment."]), "tool_calls": [_call(asked)]}
    answer = {"role": "tool", "content": _words(draw, 3)}
    row = {"messages": [turns[0], call, answer, turns[1]]}
    return row | {"tools": [WEATHER]} if tool_calls else row


def _call(place: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"place": place}}}


def texts() -> list[str]:
    """What tokenizers are trained on."""
    rows = make_rows()
    return [str(value) for row in rows for value in row.values()] + [" ".join(ENGLISH), " ".join(OTHER), *CODE]


def make_tokenizer(kind: str, vocabulary: int = 700) -> PreTrainedTokenizerFast:
    """A tokenizer trained here: byte-level, trimmed, metaspace, unigram or wordpiece."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    wrapped = {"single": "<s> $A", "special_tokens": [("<s>", 0)]}
    common: dict[str, Any] = {"show_progress": False, "vocab_size": vocabulary}
    alphabet = sorted(set("".join(texts()) + string.printable) - {" "})
    if kind in ("byte-level", "trimmed"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        own = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(texts(), trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=own, **common))
        trim = processors.ByteLevel(trim_offsets=kind == "trimmed")
        made.post_processor = processors.Sequence([trim, processors.TemplateProcessing(**wrapped)])
    elif kind == "metaspace":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        latin = [char for char in alphabet if char < "\u0100"] + ["\u2581"]
        common |= {"initial_alphabet": latin, "limit_alphabet": len(latin)}
        made.train_from_iterator(texts(), trainers.BpeTrainer(special_tokens=SPECIAL + bytes_, **common))
        described = json.loads(made.to_str())  # bytes are tokens like others, not added ones
        described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in SPECIAL]
        made = Tokenizer.from_str(json.dumps(described))
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=[*alphabet, "\u2581"], **common
        )
        made.train_from_iterator(texts(), trainer)
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=300))
        made.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False, clean_text=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        own = sorted({char.lower() for char in alphabet})
        made.train_from_iterator(
            [text.lower() for text in texts()],
            trainers.WordPieceTrainer(special_tokens=SPECIAL, initial_alphabet=own, limit_alphabet=2000, **common),
        )
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


# ---------------------------------------------------------------- the oracle


def characters(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int] | None]:
    """The characters [start, end) that each token writes, None for tokens that the text does not have."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    added = set(tokenizer.get_added_vocab())
    first = 1 if pieces[0] == "<s>" and not text.startswith("<s>") else 0
    end = len(pieces) - (1 if pieces[-1] == "</s>" and not text.rstrip().endswith("</s>") else 0)
    kind = type(tokenizer.backend_tokenizer.pre_tokenizer).__name__
    walk = _walked_words if kind == "BertPreTokenizer" else _walked_bytes
    inside = walk([(piece, piece in added) for piece in pieces[first:end]], text, kind)
    return [None] * first + inside + [None] * (len(pieces) - end)


def _walked_bytes(pieces: list[tuple[str, bool]], text: str, kind: str) -> list[tuple[int, int] | None]:
    """By bytes: tokens write the text without gaps, but for a space before it and after special tokens."""
    owner = [place for place, char in enumerate(text) for _ in char.encode()]
    whole, at, spans = text.encode(), 0, []
    for number, (piece, added) in enumerate(pieces):
        written = piece.encode() if added else _bytes_of(piece, kind)
        begins = number == 0 or pieces[number - 1][1]
        if not added and kind == "Metaspace" and begins and whole[at : at + len(written)] != written:
            written = written.removeprefix(b" ")  # the space that Metaspace puts before a word
            if not written:
                spans.append((owner[at], owner[at] + 1))
                continue
        assert whole[at : at + len(written)] == written, (piece, whole[at : at + 20])
        spans.append((owner[at], owner[at + len(written) - 1] + 1))
        at += len(written)
    assert at == len(whole)
    return spans


def _bytes_of(piece: str, kind: str) -> bytes:
    if kind == "Metaspace":
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()
    return bytes(BYTE_OF[char] for char in piece)


def _byte_of() -> dict[str, int]:
    """The byte that a character stands for in byte-level tokens, as GPT-2 writes them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(rest)}


BYTE_OF = _byte_of()


def _walked_words(pieces: list[tuple[str, bool]], text: str, kind: str) -> list[tuple[int, int] | None]:
    """By words: white space belongs to no token."""
    at, spans = 0, []
    for piece, added in pieces:
        while text[at].isspace():
            at += 1
        written = piece if added else piece.removeprefix("##")
        assert text[at : at + len(written)].lower() == written.lower(), (piece, text[at : at + 20])
        spans.append((at, at + len(written)))
        at += len(written)
    return spans
