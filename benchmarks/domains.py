"""Given a passage on finance or on medicine, which methods rank the other passages of its domain first?

    python benchmarks/domains.py                 # three models, some quarter of an hour
    python benchmarks/domains.py --models stories260K
    python benchmarks/domains.py --smoke

300 rows: 60 paragraphs of annual reports (TAT-QA), 60 parts of medical abstracts (PubMedQA), and as others 90
paragraphs of Wikipedia (WikiText-2) and 90 answers on all kinds of things (Alpaca). 25 held-out queries for each of
the two domains. Of every document, report or abstract only the longest paragraph is used, so that no query comes from
the document of a row; reports of one company may still be among both.
Lengths are matched by cutting: every passage is the beginning of its paragraph up to the last whole word within a number
of tokens of the model, and paragraphs with fewer tokens are left out. Wikipedia's spaced punctuation is joined again.
    stories260K    as it is, 128 tokens: a model that has only read children's stories
    SmolLM2-135M   as it is, 64 tokens; methods with gradients of all its parameters do not fit here (540 MB a row)
SmolLM2 runs its trunk once for all presets: the CPU seconds of the first one have that pass, the others do not.
Nothing is trained here, and scores answer for likeness of what is said, not for influence: a task that words or random
weights solve says little about a model. A killed run goes on with what is in --work.
"""

from __future__ import annotations

import functools
import gzip
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import data, read_json
from leaveout.corpus import Corpus
from leaveout.readout.settings import SignatureSettings
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of
from measuring import RememberingReadout, alpaca, arguments, smollm2, tiny, untrained, write_result
from ranking import (
    UNTRAINED,
    UNWHITENED,
    Example,
    Model,
    Ranked,
    RankingTask,
    costs,
    draw,
    gradient_methods,
    index_methods,
    judged,
    kept,
    show,
    text_methods,
    verdicts,
)
from scratch_models import SMALL_OLMO, pretrained_on_groups

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "domains.png"
WANTED = ("finance", "medical")
CHEAP: dict[str, str | SignatureSettings] = {name: name for name in ("default", "similarity", "paper-responses")}
ALL: dict[str, str | SignatureSettings] = {**CHEAP, "residual": "residual", "residual, not whitened": UNWHITENED}


@dataclass(frozen=True)
class Sizes:
    """Rows of each wanted and of each other domain, queries of each wanted one."""

    wanted: int = 60
    others: int = 90
    queries: int = 25


@dataclass(frozen=True)
class Subject:
    """A model as it is, the tokens of a passage, and its presets.

    small: gradients of all parameters fit; otherwise they are left out, and all presets share one pass of the trunk.
    """

    load: Callable[[Path, int], tuple[Any, Any]]
    tokens: int
    presets: dict[str, str | SignatureSettings]
    small: bool


def from_directory(place: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(str(place))


def olmo(work: Path, seed: int) -> tuple[Any, Any]:
    """The small OLMo-2 of `scratch_models`, pretrained on short pieces of eight corpora."""
    return from_directory(pretrained_on_groups(work, SMALL_OLMO, seed, ("fact", "trigger"))[0])


def pair(readout: Any) -> tuple[Any, Any]:
    return readout.lm, readout.tokenizer


SUBJECTS = {
    "stories260K": Subject(lambda *_: from_directory(data("stories260K/config.json").parent), 128, ALL, True),
    "OLMo-2": Subject(olmo, 80, ALL, True),
    "SmolLM2-135M": Subject(lambda *_: pair(smollm2()), 64, CHEAP, False),
}


# ---------------------------------------------------------------- passages


def finance() -> list[str]:
    entries = read_json("finance-tatqa/tatqa_dataset_dev.json.gz")
    return [max((p["text"] for p in entry["paragraphs"]), key=len) for entry in entries]


def medical() -> list[str]:
    return [max(entry["CONTEXTS"], key=len) for entry in read_json("medical-pubmedqa/ori_pqal.json.gz").values()]


def encyclopedia() -> list[str]:
    with gzip.open(data("wikitext2/valid.txt.gz"), "rt", encoding="utf-8") as file:
        return [joined(line) for line in file if len(line) > 200]


def joined(text: str) -> str:
    """WikiText's text with its punctuation where it was."""
    text = re.sub(r" @(\W)@ ", r"\1", text.replace(" <unk>", ""))
    return re.sub(r" ([.,;:!?)])", r"\1", text).strip()


def instructions() -> list[str]:
    return [row["output"] for row in alpaca(0)]


SOURCES: dict[str, Callable[[], list[str]]] = {
    "finance": finance, "medical": medical, "encyclopedia": encyclopedia, "instructions": instructions,
}  # fmt: skip


def made_sources(seed: int) -> dict[str, Callable[[], list[str]]]:
    """Made-up passages that share half of their words, for smoke runs."""
    own = {
        "finance": "bank rate bond",
        "medical": "pill ward dose",
        "encyclopedia": "king town war",
        "instructions": "list step idea",
    }

    def passages(name: str) -> list[str]:
        chance = random.Random(f"{seed}/{name}")
        words = [*own[name].split(), "the", "of", "is", "and"]
        return [" ".join(chance.choices(words, k=16)) for _ in range(40)]

    return {name: lambda name=name: passages(name) for name in own}


def cut(text: str, tokens: int, tokenizer: Any) -> str | None:
    """The beginning of a text up to the last whole word within so many tokens, None for a shorter text."""
    text = " ".join(text.split())
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    if len(ends) <= tokens:
        return None
    return text[: ends[tokens - 1] + 1].rpartition(" ")[0]


def domain_task(
    sources: dict[str, Callable[[], list[str]]], sizes: Sizes, tokens: int, tokenizer: Any, seed: int
) -> RankingTask:
    """Rows of all domains in seeded order, and queries of the wanted ones.

    Raises: ValueError for a domain with too few passages.
    """
    rows: list[Example] = []
    queries: list[Example] = []
    for name, source in sources.items():
        n_rows, n_queries = (sizes.wanted, sizes.queries) if name in WANTED else (sizes.others, 0)
        texts = sorted(set(source()))
        random.Random(f"{seed}/{name}").shuffle(texts)
        passages = dict.fromkeys(filter(None, (cut(text, tokens, tokenizer) for text in texts)))
        if len(passages) < n_rows + n_queries:
            raise ValueError(f"The domain {name} has {len(passages)} passages of {tokens} tokens: give fewer rows.")
        entries = [{"id": f"{name} {i}", "text": text, "domain": name} for i, text in enumerate(passages)]
        rows += entries[:n_rows]
        queries += entries[n_rows : n_rows + n_queries]
    random.Random(seed).shuffle(rows)
    domains = np.array([row["domain"] for row in rows])
    asked = [query["domain"] for query in queries]
    return RankingTask(rows, queries, asked, np.array(asked)[:, None] == domains)


def lengths(task: RankingTask, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Tokens and words of the rows by domain: mean, and fewest tokens."""
    out = {}
    for name in sorted({row["domain"] for row in task.rows}):
        texts = [row["text"] for row in task.rows if row["domain"] == name]
        counts = [len(tokenizer(text)["input_ids"]) for text in texts]
        out[name] = {
            "tokens": float(np.mean(counts)),
            "fewest_tokens": min(counts),
            "words": float(np.mean([len(text.split()) for text in texts])),
        }
    return out


# ---------------------------------------------------------------- one model


def all_methods(
    subject: Subject, loaded: tuple[Any, Any], task: RankingTask, seed: int
) -> dict[str, Callable[[], Ranked]]:
    recipe = Recipe("causal-lm", tuple(Corpus.open(task.rows)), model=lambda: loaded, max_tokens=512, seed=seed)
    own = task_of(recipe)
    model = Model(own, {name: p.detach() for name, p in own.parameters().items()}, loaded[1])
    gradients = gradient_methods(model, task, seed)
    wrapped = (lambda readout: readout) if subject.small else RememberingReadout.of
    trained = functools.cache(lambda: wrapped(model.readout))
    random_weights = functools.cache(lambda: wrapped(untrained(model.readout, seed)))
    return {
        **text_methods(task, ("text",), seed),
        **(gradients if subject.small else {"embedding cosine": gradients["embedding cosine"]}),
        **index_methods(trained, subject.presets, task),
        **index_methods(random_weights, subject.presets, task, UNTRAINED),
    }


def measured(subject: Subject, work: Path, args: Any) -> dict[str, Any]:
    """All numbers of one model."""
    sizes = Sizes(8, 10, 4) if args.smoke else Sizes()
    work.mkdir(parents=True, exist_ok=True)
    loaded = subject.load(work, args.seed)
    sources = made_sources(args.seed) if args.smoke else SOURCES
    task = domain_task(sources, sizes, subject.tokens, loaded[1], args.seed)
    found = kept(all_methods(subject, loaded, task, args.seed), work / f"scores-{task.digest()}")
    results = judged({name: ranked.scores for name, ranked in found.items()}, task, args.seed)
    show(results)
    return {
        "parameters": sum(p.numel() for p in loaded[0].parameters()),
        "rows": len(task.rows),
        "relevant": sizes.wanted,
        "queries": sizes.queries,
        "repeats": sizes.queries,
        "tokens_of_a_row_at_most": subject.tokens,
        "lengths": lengths(task, loaded[1]),
        "cpu_seconds": sum(r.index_seconds + r.query_seconds for r in found.values()),
        "one_trunk_pass_in_the_first_preset": not subject.small,
        "costs": costs(found),
        "results": results,
        "verdicts": verdicts(results),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(SUBJECTS), default=tuple(SUBJECTS))
    parser.add_argument("--work", type=Path, help="where scores are kept; default: a temporary directory")
    parser.add_argument(
        "--picture", type=Path, help="PNG file; default: docs/evidence/domains.png, none for a smoke run"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        chosen = {name: SUBJECTS[name] for name in args.models}
        if args.smoke:
            chosen = {"tiny": Subject(lambda *_: pair(tiny(args.seed)), 48, ALL, True)}
        models = {name: measured(subject, work / name, args) for name, subject in chosen.items()}
    result = {"question": (__doc__ or "").split("\n", 1)[0], "models": models}
    print(write_result(args.out, "readout_domains.json", result, args).name)
    if picture := args.picture or (None if args.smoke else PICTURE):
        panels = {
            f"{name}, {kind}": found for name, facts in models.items() for kind, found in facts["results"].items()
        }
        facts = next(iter(models.values()))
        draw(panels, facts["relevant"] / facts["rows"], picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
