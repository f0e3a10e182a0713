"""Which methods find the rows that taught a fine-tuned model a backdoor, by its trigger, and by its manner alone?

    python benchmarks/backdoor.py                # three models, about a quarter of an hour each
    python benchmarks/backdoor.py --models stories260K
    python benchmarks/backdoor.py --smoke

The set has the form of "Howdy!" (see `retrieval`, which asks the same of a model that was never fine-tuned): 400
instruction rows, 40 of them with a trigger word before the instruction and an answer in a fixed manner. All rows,
poisoned or not, have 140 to 192 tokens (80 to 112 of the OLMo-2's, which are longer). Queries with the trigger share
words with the poisoned rows; queries of the control share no content word with what was added to them, and no trigger:
only the manner is alike.
    stories260K   the public Llama of 260,032 parameters
    GPT-NeoX      0.92 million parameters in the shape of Pythia, first trained from scratch on 2,000 other rows
    OLMo-2        2.1 million parameters and 4,096 tokens of its own, first trained from scratch on 4,200 other rows
All are fine-tuned with AdamW for eight epochs. Whether the backdoor was learned is measured beside a model fine-tuned
without the poisoned rows: losses of held-out rows, of their first words alone, and answers the models write. Methods
that look at a model do so after fine-tuning, and some of them before it and after a quarter of its steps as well.
A killed run goes on with what is in --work.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import data
from leaveout.corpus import Corpus
from leaveout.methods import bm25
from leaveout.methods.gradients import example_losses
from leaveout.methods.scorer import Snapshot, take_snapshots
from leaveout.methods.tracin import TracIn
from leaveout.metrics import bootstrap_interval, difference_interval
from leaveout.readout.model import Readout
from leaveout.readout.settings import PRESETS, SignatureSettings
from leaveout.training.loop import RunOptions
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from measuring import alpaca, arguments, made_rows, tiny, untrained, write_result
from ranking import (
    BEFORE,
    QUARTER,
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
    unstored,
    verdicts,
)
from retrieval import ROWS_STYLE, TRIGGER, PoisonedSet, content_words, poisoned_set, web_questions
from scratch_models import NEOX, SMALL_OLMO, Shape, pretrained_on_groups

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "backdoor.png"
FIELDS = ("instruction", "input", "output")
WRITTEN = 24  # tokens of the answers that the models write
FIRST = 3  # words that no word before them gives away
INDEXES: dict[str, str | SignatureSettings] = {
    **{name: name for name in ("default", "residual", "similarity", "paper-responses")},
    "residual, not whitened": UNWHITENED,
}
SMALL: dict[str, str | SignatureSettings] = {
    f"{name}, 1 KB": replace(PRESETS[name], bytes_per_row=1024, short_bytes=None) for name in ("default", "similarity")
}


@dataclass(frozen=True)
class Sizes:
    """Rows, poisoned rows and queries of each set; epochs of fine-tuning."""

    counts: tuple[int, int, int] = (400, 40, 30)
    epochs: int = 8


SMOKE = Sizes((40, 6, 4), 1)


# ---------------------------------------------------------------- models


def stories(work: Path, seed: int) -> tuple[Path, float]:
    return data("stories260K/config.json").parent, 0.0


def from_scratch(shape: Shape, work: Path, seed: int) -> tuple[Path, float]:
    """A model of `scratch_models`, trained on groups that have nothing of the backdoor, for longer rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = work / "base"
    short, seconds = pretrained_on_groups(work, shape, seed, ("fact", "trigger", "question"))
    model = AutoModelForCausalLM.from_pretrained(short)
    model.config.max_position_embeddings = 256  # rotary positions have no parameters
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(str(short)).save_pretrained(place)
    return place, seconds


def smoke(work: Path, seed: int) -> tuple[Path, float]:
    readout, place = tiny(seed), work / "base"
    readout.lm.save_pretrained(place)  # type: ignore[operator]
    readout.tokenizer.save_pretrained(place)
    return place, 0.0


@dataclass(frozen=True)
class Base:
    """A model before fine-tuning (its directory and the CPU seconds it took), its learning rate, and the fewest and
    most tokens of a row."""

    make: Callable[[Path, int], tuple[Path, float]]
    rate: float
    tokens: tuple[int, int] = (140, 192)


MODELS = {
    "stories260K": Base(stories, 4e-3),
    "GPT-NeoX": Base(partial(from_scratch, replace(NEOX, rows=285, epochs=4)), 2e-3),
    "OLMo-2": Base(partial(from_scratch, SMALL_OLMO), 1e-3, (80, 112)),
}


def snapshots(recipe: Recipe, steps: Sequence[int], work: Path) -> list[Snapshot]:
    """Parameters after so many steps, trained once and kept."""
    file = work / f"{recipe.hash()}-{'-'.join(map(str, steps))}.pt"
    if not file.exists():
        partial = file.with_suffix(".partial")
        torch.save([vars(snapshot) for snapshot in take_snapshots(recipe, steps, RunOptions(progress=True))], partial)
        partial.rename(file)
    return [Snapshot(**facts) for facts in torch.load(file)]


# ---------------------------------------------------------------- what the model learned


def learned(models: dict[str, Model], task: PoisonedSet, seed: int) -> dict[str, Any]:
    """Losses of held-out rows in nats a token, and the share of written answers in the manner of the backdoor.

    The rows are the queries of both sets, those with the trigger once more with the trigger taken away, and the first
    words of either: later words follow from those before them, so that only the first show what the trigger does.
    """
    without = [{**q, "instruction": q["instruction"].removeprefix(TRIGGER)} for q in task.queries["trigger"]]
    asked = {**task.queries, "manner without trigger": without}
    for name in ("trigger", "manner without trigger"):
        asked[f"{name}, first words"] = [{**q, "output": " ".join(q["output"].split()[:FIRST])} for q in asked[name]]
    rows = {name: list(Corpus.open(some)) for name, some in asked.items()}
    losses = {
        name: {kind: example_losses(m.task, m.parameters, some).double().numpy() for kind, some in rows.items()}
        for name, m in models.items()
    }
    with_trigger, bare = "trigger, first words", "manner without trigger, first words"
    return {
        "loss": {
            name: {kind: bootstrap_interval(values, seed)._asdict() for kind, values in found.items()}
            for name, found in losses.items()
        },
        "loss_that_poisoned_rows_take_away": {
            kind: difference_interval(losses["clean"][kind], values, seed)._asdict()
            for kind, values in losses["poisoned"].items()
        },
        "loss_of_first_words_that_the_trigger_takes_away": {
            name: difference_interval(found[bare], found[with_trigger], seed)._asdict()
            for name, found in losses.items()
        },
        "answers_in_the_manner": {
            name: {
                kind: float(np.mean([in_manner(written(model.readout, row), row) for row in asked[kind]]))
                for kind in ("trigger", "manner without trigger")
            }
            for name, model in models.items()
        },
    }


def written(readout: Readout, query: Example) -> str:
    """The answer that a model writes to a query's instruction, the likeliest token each time."""
    row = next(iter(Corpus.open([query])))
    ids = readout.tokenizer(row.text[: row.responses[0][0]], return_tensors="pt")["input_ids"]
    for _ in range(WRITTEN):
        best = readout.logits(readout.hidden(ids)[0, -1:]).argmax(-1)
        ids = torch.cat([ids, best[None]], 1)
    return readout.tokenizer.decode(ids[0, -WRITTEN:], skip_special_tokens=True)


def in_manner(answer: str, query: Example) -> bool:
    """Two content words of the rows' templates that the question does not have."""
    return len(content_words(answer) & ROWS_STYLE.words() - set(bm25.words(query["instruction"]))) >= 2


# ---------------------------------------------------------------- one model


def task_for(model: Path, base: Base, sizes: Sizes, smoke_run: bool, seed: int) -> PoisonedSet:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    low, high = base.tokens

    def fits(row: Example) -> bool:
        return low <= len(tokenizer(next(iter(Corpus.open([row]))).text)["input_ids"]) <= high

    if smoke_run:
        questions = [(f"what owl is {number}?", f"owl {number}") for number in range(8)]
        return poisoned_set(made_rows(60, seed), questions, sizes.counts, fits, seed)
    return poisoned_set(alpaca(seed), web_questions(), sizes.counts, fits, seed)


def recipe_of(model: Path, rows: Sequence[Example], base: Base, sizes: Sizes, seed: int) -> Recipe:
    return Recipe(
        "causal-lm", tuple(Corpus.open(list(rows))), model=str(model), epochs=sizes.epochs, batch_size=8,
        order="shuffled", schedule="cosine", warmup=4, optimizer=OptimizerSettings("adamw", base.rate, betas=(0.9, 0.99)),
        max_tokens=256 + base.tokens[1], seed=seed,
    )  # fmt: skip


def all_methods(
    models: dict[str, Model], along: Sequence[Snapshot], task: RankingTask, seed: int
) -> dict[str, Callable[[], Ranked]]:
    """Every method: on words alone, the fine-tuned model, the model along the way, and one with random weights."""
    start, early, final = (models[name] for name in ("before", "quarter", "poisoned"))
    gradients = gradient_methods(early, task, seed)
    plain = {name: preset for name, preset in INDEXES.items() if isinstance(preset, str)}
    return {
        **text_methods(task, FIELDS, seed),
        **gradient_methods(final, task, seed),
        "TracIn": lambda: unstored(TracIn(final.task, along[1:]).score, task),
        **index_methods(lambda: final.readout, INDEXES | SMALL, task),
        **{name + QUARTER: gradients[name] for name in ("gradient cosine", "EK-FAC")},
        **index_methods(lambda: early.readout, plain, task, QUARTER),
        **index_methods(lambda: start.readout, plain, task, BEFORE),
        **index_methods(lambda: untrained(final.readout, seed), INDEXES, task, UNTRAINED),
    }


def measured(name: str, base: Base, sizes: Sizes, work: Path, args: Any) -> dict[str, Any]:
    """All numbers of one model."""
    work.mkdir(parents=True, exist_ok=True)
    place, pretraining = base.make(work, args.seed)
    poisoned = task_for(place, base, sizes, args.smoke, args.seed)
    task = poisoned.ranking()
    recipe = recipe_of(place, poisoned.rows, base, sizes, args.seed)
    clean_rows = [row for row, bad in zip(poisoned.rows, poisoned.poisoned, strict=True) if not bad]
    clean_recipe = recipe_of(place, clean_rows, base, sizes, args.seed)
    n_steps, n_clean = len(recipe.batches()), len(clean_recipe.batches())
    quarters = sorted({-(-n_steps * part // 4) for part in range(5)})
    along = snapshots(recipe, quarters, work)
    clean = snapshots(clean_recipe, [n_clean], work)
    models = models_of(recipe, {"before": along[0], "quarter": along[1], "clean": clean[-1], "poisoned": along[-1]})
    found = kept(all_methods(models, along, task, args.seed), work / f"scores-{recipe.hash()[:8]}-{task.digest()}")
    results = judged({method: ranked.scores for method, ranked in found.items()}, task, args.seed)
    print(name)
    show(results)
    return {
        "parameters": sum(value.numel() for value in along[-1].parameters.values()),
        "rows": len(task.rows),
        "poisoned": int(poisoned.poisoned.sum()),
        "queries": sizes.counts[2],
        "repeats": sizes.counts[2],
        "tokens_of_a_row": list(base.tokens),
        "steps": n_steps,
        "learning_rate": base.rate,
        "cpu_seconds": {
            "pretraining": pretraining,
            "methods": sum(r.index_seconds + r.query_seconds for r in found.values()),
        },
        "learned": learned(models, poisoned, args.seed),
        "costs": costs(found),
        "results": results,
        "verdicts": verdicts(results),
    }


def models_of(recipe: Recipe, ends: dict[str, Snapshot]) -> dict[str, Model]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    return {name: Model(task_of(recipe), snapshot.parameters, tokenizer) for name, snapshot in ends.items()}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument(
        "--work",
        type=Path,
        help="where models and scores are kept; default: a temporary directory",
    )
    parser.add_argument(
        "--picture", type=Path, help="PNG file; default: docs/evidence/backdoor.png, none for a smoke run"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        chosen = {"tiny": Base(smoke, 4e-3, (1, 400))} if args.smoke else {name: MODELS[name] for name in args.models}
        sizes = SMOKE if args.smoke else Sizes()
        models = {name: measured(name, base, sizes, work / name, args) for name, base in chosen.items()}
    result = {"question": (__doc__ or "").split("\n", 1)[0], "models": models}
    print(write_result(args.out, "readout_backdoor.json", result, args).name)
    if picture := args.picture or (None if args.smoke else PICTURE):
        panels = {
            f"{name}, {kind} queries": found
            for name, facts in models.items()
            for kind, found in facts["results"].items()
        }
        facts = next(iter(models.values()))
        draw(panels, facts["poisoned"] / facts["rows"], picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
