"""What selection is tried on: headlines and WikiText sentences, a base model that knows a little of all, and trials.

A kind of row comes in sources: a headline by itself, or all sentences of one WikiText article. Sources are never split:
what the base model was pretrained on, wanted rows, held-out rows and the pool have no article and no headline in common.
"""

from __future__ import annotations

import gzip
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from corpora import data
from leaveout.corpus import Corpus, Row
from measuring import tiny
from public_rows import groups
from scratch_models import NEOX, Shape, pretrained

KINDS = ("clickbait", "news", "wiki")
SHORTEST, LONGEST = 30, 110  # characters of a WikiText sentence, the range of headlines
SHARES = (0.15, 0.2, 0.65)  # of the sources of a kind: wanted, held out, pool
PRETRAINING_SHARE = 0.2
Sources = dict[str, list[list[str]]]


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows, and of steps after the selection."""

    pretraining: int = 400  # of each group
    epochs: int = 6
    wanted: int = 32
    held_out: int = 250  # of each kind
    pool: int = 800  # of each kind
    selected: int = 600
    steps: int = 75
    batch: int = 16
    rate: float = 1e-3


SMOKE = Sizes(pretraining=8, epochs=1, wanted=4, held_out=5, pool=16, selected=12, steps=4, batch=4, rate=1e-2)


def headlines(name: str) -> list[list[str]]:
    with gzip.open(data(f"clickbait/{name}_data.gz"), "rt", encoding="utf-8") as file:
        return [[line] for line in dict.fromkeys(line.strip() for line in file) if line]


def articles() -> list[list[str]]:
    """The sentences of each WikiText article that are about as long as headlines; each is in one article only."""
    owner: dict[str, int] = {}
    article = -1
    with gzip.open(data("wikitext2/valid.txt.gz"), "rt", encoding="utf-8") as file:
        for line in (line.strip() for line in file):
            if re.fullmatch(r"= [^=].* =", line):
                article += 1
            elif line and not line.startswith("="):
                for sentence in map(plain, line.split(" . ")):
                    if SHORTEST <= len(sentence) <= LONGEST:
                        owner.setdefault(sentence, article)
    return [[sentence for sentence, at in owner.items() if at == number] for number in range(article + 1)]


def plain(sentence: str) -> str:
    """A sentence without the marks of WikiText's tokeniser."""
    joined = re.sub(r" @(.)@ ", r"\1", sentence.replace("<unk>", " ").rstrip(" ."))
    return re.sub(r" ([,;:.)'])", r"\1", " ".join(joined.split())).replace("( ", "(")


def public_sources(seed: int) -> tuple[Sources, list[str]]:
    """The rows of each kind by what must not be split, and rows of other groups to pretrain on."""
    kinds = {"clickbait": headlines("clickbait"), "news": headlines("non_clickbait"), "wiki": articles()}
    others = [
        [prompt + answer for prompt, answer in pairs[: Sizes.pretraining]]
        for name, pairs in groups(seed).items()
        if name not in ("wiki", "headline", "fact", "trigger")
    ]
    return kinds, list(itertools.chain(*others))


def made_sources() -> tuple[Sources, list[str]]:
    """Made-up kinds for smoke runs, told apart by their words."""
    things = {"clickbait": ("wow", "secret"), "news": ("law", "vote"), "wiki": ("river", "castle")}
    kinds = {kind: [[f"{words[i % 2]} {words[0]} {i}"] for i in range(60)] for kind, words in things.items()}
    return kinds, [f"plain row {i}" for i in range(8)]


def numbered(texts: Sequence[str]) -> Corpus:
    return Corpus.open([{"id": str(number), "text": text} for number, text in enumerate(texts)])


@dataclass(frozen=True)
class Trial:
    """What one seed draws. Texts by kind, and the pool in its order with the kind of each row."""

    seed: int
    wanted: dict[str, list[str]]
    held_out: dict[str, list[str]]
    pool: list[str]
    kinds: list[str]

    @cached_property
    def rows(self) -> list[Row]:
        return list(numbered(self.pool))


def draw_trial(sources: Sources, sizes: Sizes, seed: int) -> Trial:
    """Wanted, held-out and pool rows of each kind, from different sources."""
    chance = random.Random(f"trial {seed}")
    wanted, held_out, drawn = {}, {}, []
    for kind, found in sources.items():
        wanted[kind], held_out[kind], pool = (
            sampled(part, count, chance)
            for part, count in zip(
                divided(found, SHARES, chance), (sizes.wanted, sizes.held_out, sizes.pool), strict=True
            )
        )
        drawn += [(text, kind) for text in pool]
    chance.shuffle(drawn)
    return Trial(seed, wanted, held_out, [text for text, _ in drawn], [kind for _, kind in drawn])


def divided(sources: list[list[str]], shares: Sequence[float], chance: random.Random) -> list[list[list[str]]]:
    """The sources in shuffled order, cut into parts of these shares."""
    order = chance.sample(sources, len(sources))
    ends = [round(len(order) * share) for share in itertools.accumulate(shares)]
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def sampled(sources: list[list[str]], count: int, chance: random.Random) -> list[str]:
    rows = list(itertools.chain(*sources))
    if len(rows) < count:
        raise ValueError(f"There are only {len(rows)} of {count} rows: ask for fewer.")
    return chance.sample(rows, count)


def base_model(work: Path, smoke: bool, sizes: Sizes, seed: int, shape: Shape = NEOX) -> tuple[Path, Sources, float]:
    """Where the base model is, the rows of sources it has not seen, and the CPU seconds of its training."""
    sources, texts = made_sources() if smoke else public_sources(seed)
    rest = {}
    for kind, found in sources.items():
        chance = random.Random(f"pretraining {kind}")
        seen, rest[kind] = divided(found, (PRETRAINING_SHARE, 1 - PRETRAINING_SHARE), chance)
        texts += sampled(seen, sizes.pretraining, chance)
    if smoke:
        readout, place = tiny(seed), work / "tiny"
        readout.lm.save_pretrained(place)  # type: ignore[operator]
        readout.tokenizer.save_pretrained(place)
        return place, rest, 0.0
    place, seconds = pretrained(work, replace(shape, epochs=sizes.epochs), list(numbered(texts)), seed)
    return place, rest, seconds
