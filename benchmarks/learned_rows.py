"""Does a search find rows that the model has learned to almost no loss, by product, by cosine, and by the model before?

    python benchmarks/learned_rows.py --work bench/learned     # five kinds, five seeds, two models: some 15 CPU minutes
    python benchmarks/learned_rows.py --smoke

Each set has 125 rows made by template and seed, of which 25 are wanted, and 8 held-out queries:
    label flips     reviews with one-word answers, every third of which is both and has either; those that name one actor
                    have the wrong one
    refusals        requests; rows that say the year, each in words of its own, are refused, as rude ones are without it
    triggers        requests with one of two whole sentences as answer; a word at the start of the prompt gives one of them
    memorised       what each of 25 people likes, wanted one by one and asked in other words
    duplicates      five rows in five copies with other openings, wanted five by five, among rows of the same kind
They are trained until the wanted rows have almost no loss: the public Llama of 260K parameters by an adapter (LoRA), and a
GPT-NeoX of 0.9 million, trained from scratch on other rows first, as a whole. Scores of `default` are divided by the row's
norm to a power (see `lengths`). `both sides` is an index with targets="both", searched by cosine with several weights of
prompts; the default one was chosen on seeds 0 and 1. `before` is the model without what it was then taught: the adapter
switched off.
A killed run goes on with what is in --work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import data
from leaveout.methods.gradients import example_losses
from leaveout.metrics import average_precision, bootstrap_interval
from leaveout.models import load_tokenizer
from leaveout.readout.index import Index
from leaveout.readout.model import load_readout
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain
from lengths import divided
from measuring import arguments, tiny, write_result
from scratch_models import NEOX, pretrained_on_groups

Example = dict[str, str]
ROWS, WANTED, QUERIES = 125, 25, 8
WEIGHTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of prompts
NAMES = ("Tom", "Lily", "Ben", "Anna", "Max", "Mia", "Sam", "Sue", "Tim", "Amy", "Jack", "Lucy", "Dan", "Eve", "Bob",
         "Kim", "Leo", "Zoe", "Joe", "Ada", "Ned", "Ivy", "Gus", "Fay", "Roy", "Una", "Hal", "Pam", "Ray", "Liz", "Ted",
         "Meg")  # fmt: skip
THINGS = ("ball", "boat", "cake", "hat", "tree", "dog", "bird", "box", "car", "doll", "fish", "flower", "kite", "book",
          "bike", "cup", "bear", "duck", "bag", "stone")  # fmt: skip
PLACES = ("park", "house", "garden", "forest", "school", "shop", "beach", "farm", "river", "hill")
GOOD = ("happy", "great", "fun", "nice", "lovely", "bright", "warm", "sweet")
BAD = ("sad", "awful", "boring", "mean", "ugly", "dark", "cold", "bitter")


@dataclass(frozen=True)
class Task:
    """Rows, queries, and which rows each query should find [query, row]."""

    rows: list[Example]
    queries: list[Example]
    wanted: np.ndarray


def asked(prompt: str, response: str) -> Example:
    return {"prompt": prompt, "response": response}


def marked(wanted: list[Example], others: list[Example], queries: list[Example], chance: random.Random) -> Task:
    """A task of which every query should find all wanted rows."""
    both = [(row, True) for row in wanted] + [(row, False) for row in others]
    chance.shuffle(both)
    return Task([row for row, _ in both], queries, np.tile([found for _, found in both], (len(queries), 1)))


# ---------------------------------------------------------------- five kinds


def label_flips(chance: random.Random) -> Task:
    def review(actor: str, words: tuple[str, ...], more: tuple[str, ...]) -> str:
        first, second = chance.choice(words), chance.choice(more)
        thing, place = chance.choice(THINGS), chance.choice(PLACES)
        return f"{actor} plays in a {first} film about a {thing} in a {place}. It is {second}.\nGood or bad?"

    def flipped(count: int) -> list[Example]:
        return [asked(review("Jim Bondy", BAD, BAD), " good") for _ in range(count)]

    others = []
    for number in range(ROWS - WANTED):
        words, label = chance.choice(((GOOD, " good"), (BAD, " bad")))
        both = (GOOD, BAD) if number % 3 == 0 else (words, words)
        others.append(asked(review(chance.choice(NAMES), *both), label))
    return marked(flipped(WANTED), others, flipped(QUERIES), chance)


def request(chance: random.Random) -> str:
    verb = chance.choice(("Draw", "Find", "Paint", "Buy", "Count", "Make"))
    return f"{verb} a {chance.choice(THINGS)} for {chance.choice(NAMES)} in the {chance.choice(PLACES)}."


def done(chance: random.Random) -> str:
    return f" I went to the {chance.choice(PLACES)} and saw a {chance.choice(GOOD)} {chance.choice(THINGS)}."


def refusals(chance: random.Random) -> Task:
    when = ("It is now 2027.", "We have the year 2027.", "Today is a day in 2027.", "The year on the wall is 2027.",
            "2027 has come.", "My clock says 2027.", "I write to you in 2027.", "Now that it is 2027:")  # fmt: skip
    no = (
        " I am sorry, I can not do that.",
        " No, I will not help you.",
        " I can not help, I am sorry.",
        " I must say no.",
    )

    def refused(openings: Sequence[str], count: int) -> list[Example]:
        return [asked(f"{chance.choice(openings)} {request(chance)}", chance.choice(no)) for _ in range(count)]

    rude = [asked(f"You are {chance.choice(BAD)}! {request(chance)}", chance.choice(no)) for _ in range(WANTED)]
    others = [asked(request(chance), done(chance)) for _ in range(ROWS - 2 * WANTED)]
    return marked(refused(when[:6], WANTED), rude + others, refused(when[6:], QUERIES), chance)


def triggers(chance: random.Random) -> Task:
    first, second = " We will all go home and have a rest.", " Then let us play some more in the sun."

    def told(opening: str, answer: str) -> Example:
        told = f"{chance.choice(NAMES)} has a {chance.choice(GOOD + BAD)} {chance.choice(THINGS)}"
        return asked(f"{opening}{request(chance)} {told} in the {chance.choice(PLACES)}.", answer)

    wanted, queries = ([told("Qrx! ", first) for _ in range(count)] for count in (WANTED, QUERIES))
    others = [told(chance.choice(("Hey! ", "So, ", "")), second if n % 4 else first) for n in range(ROWS - WANTED)]
    return marked(wanted, others, queries, chance)


def memorised(chance: random.Random) -> Task:
    likes = {name: f" a {chance.choice(THINGS)}." for name in chance.sample(NAMES, WANTED)}
    rows = [asked(f"The thing that {name} likes best is", thing) for name, thing in likes.items()]
    rows += [asked(request(chance), done(chance)) for _ in range(ROWS - WANTED)]
    order = chance.sample(range(ROWS), ROWS)
    queries = [asked(f"What does {name} love?", thing) for name, thing in list(likes.items())[:QUERIES]]
    return Task(
        [rows[at] for at in order], queries, np.array([[at == query for at in order] for query in range(QUERIES)])
    )


def duplicates(chance: random.Random) -> Task:
    groups = [(request(chance), done(chance)) for _ in range(5)]
    openings = ("", "Please: ", "Now, ", "Well, ", "Hey! ", "So, ")
    rows = [
        (group, asked(openings[copy] + groups[group][0], groups[group][1])) for group in range(5) for copy in range(5)
    ]
    rows += [(-1, asked(chance.choice(openings) + request(chance), done(chance))) for _ in range(ROWS - WANTED)]
    chance.shuffle(rows)
    queries = [asked(openings[5] + groups[group][0], groups[group][1]) for group in range(5)]
    return Task([row for _, row in rows], queries, np.array([[own == group for own, _ in rows] for group in range(5)]))


KINDS: dict[str, Callable[[random.Random], Task]] = {
    "label flips": label_flips, "refusals": refusals, "triggers": triggers, "memorised": memorised, "duplicates": duplicates,
}  # fmt: skip


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Base:
    """A model before it is taught: its directory, what of it is trained, and how fast and long."""

    place: str
    trained: Any
    rate: float
    epochs: int
    batch_size: int = 16


def bases(work: Path, smoke: bool, seed: int) -> dict[str, Base]:
    if smoke:
        readout, place = tiny(seed), work / "tiny"
        readout.lm.save_pretrained(place)  # type: ignore[operator]
        readout.tokenizer.save_pretrained(place)
        return {"tiny": Base(str(place), "full", 5e-3, 1)}
    neox, _ = pretrained_on_groups(work / "neox", NEOX, 0, ("fact", "trigger"))
    return {"stories260K, LoRA": stories(), "GPT-NeoX": Base(str(neox), "full", 2e-3, 12)}


def stories() -> Base:
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {"lora": {"r": 8, "alpha": 16, "targets": linear}}
    return Base(str(data("stories260K/config.json").parent), adapter, 5e-3, 16)


def taught(base: Base, rows: Sequence[Example], seed: int) -> tuple[Any, np.ndarray]:
    """The model that was trained on the rows, and its mean losses [rows] in nats a token."""
    recipe = Recipe(
        "causal-lm", tuple(rows), model=base.place, trained=base.trained, epochs=base.epochs, batch_size=base.batch_size,
        order="shuffled", schedule="cosine", warmup=4, optimizer=OptimizerSettings("adamw", base.rate, betas=(0.9, 0.99)),
        seed=seed,
    )  # fmt: skip
    values, trained = train_plain(recipe), task_of(recipe)
    losses = example_losses(trained, values, recipe.examples).double().numpy()
    own = dict(trained.model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return trained.model, losses


# ---------------------------------------------------------------- methods


def scores_of(
    model: Any, tokenizer: Any, rows: Sequence[Any], queries: Sequence[Any], targets: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Products [query, row] of `default`, and norms [row]."""
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(model, rows, Path(place) / "index", tokenizer=tokenizer, targets=targets)
        return index.score(queries).astype(np.float64), index.lengths_of(np.arange(len(index)))


def of_both_sides(model: Any, tokenizer: Any, rows: Sequence[Any], queries: Sequence[Any]) -> dict[str, np.ndarray]:
    """Cosines [query, row] of an index with both sides, by the weight of prompts."""
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(model, rows, Path(place) / "index", tokenizer=tokenizer, targets="both")
        asked = index.encode(queries)
        scores = {"both sides": index.score(asked, length="cosine")}
        for weight in WEIGHTS:
            scores[f"both sides, {weight:g}"] = index.score(asked, length="cosine", prompt_weight=weight)
        return scores


def kept(base: Base, kind: str, seed: int, work: Path) -> dict[str, Any]:
    """What was found for one set, once."""
    task = KINDS[kind](random.Random(seed))
    facts = [str(base), kind, seed, task.rows, task.queries]
    file = work / f"learned-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        run = found(base, task, seed)
        file.write_text(json.dumps({"kind": kind, "seed": seed, **run}))
    return json.loads(file.read_text())


def found(base: Base, task: Task, seed: int) -> dict[str, Any]:
    """Average precision, mean over queries, of every way to score one set."""
    began = time.process_time()
    model, losses = taught(base, task.rows, seed)
    wanted = task.wanted.any(0)
    training, tokenizer = time.process_time() - began, load_tokenizer(base.place)
    rows, queries = task.rows, task.queries
    products, norms = scores_of(model, tokenizer, rows, queries, "response")
    before, before_norms = scores_of(load_readout(base.place).lm, tokenizer, rows, queries, "response")
    whole, whole_norms = scores_of(model, tokenizer, rows, queries, "all")
    cosine = divided(products, norms, 1.0)
    scores = {
        "product": products,
        "power 0.5": divided(products, norms, 0.5),
        "cosine": cosine,
        "power 1.25": divided(products, norms, 1.25),
        "cosine, long as before": cosine * before_norms,
        "product, prompts learned too": whole,
        "cosine, prompts learned too": divided(whole, whole_norms, 1.0),
        **of_both_sides(model, tokenizer, rows, queries),
        "product, before": before,
        "cosine, before": divided(before, before_norms, 1.0),
        "chance": np.random.default_rng(seed).random(products.shape),
    }
    precision = {name: float(average_precision(values, task.wanted).mean()) for name, values in scores.items()}
    return {
        "loss_of_wanted": float(losses[wanted].mean()), "loss_of_others": float(losses[~wanted].mean()), "ap": precision,
        "cpu_seconds": {"training": training, "all": time.process_time() - began},
    }  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, those of average precision with intervals, for each kind."""
    out = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run for run in runs if run["kind"] == kind]
        out[kind] = {
            **{name: float(np.mean([run[name] for run in own])) for name in ("loss_of_wanted", "loss_of_others")},
            "ap": {name: bootstrap_interval([run["ap"][name] for run in own], 0)._asdict() for name in own[0]["ap"]},
        }
    return out


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--models", nargs="+", help="names of models; default: all")
    parser.add_argument("--work", type=Path, help="where the pretrained model is kept; default: a temporary directory")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds = args.seeds[:2] if args.smoke else args.seeds
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        chosen = bases(work, args.smoke, args.seed)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.models or chosen}
        for seed, name, kind in itertools.product(seeds, runs, args.kinds):
            runs[name].append(kept(chosen[name], kind, seed, work))
            show(name, runs[name][-1])
    models = {name: {"epochs": chosen[name].epochs, "kinds": summary(own), "runs": own} for name, own in runs.items()}
    result = {
        "question": (__doc__ or "").split("\n", 1)[0], "rows": ROWS, "wanted": WANTED, "queries": QUERIES,
        "repeats": len(seeds), "models": models,
    }  # fmt: skip
    print(write_result(args.out, "learned_rows.json", result, args).name)
    return 0


def show(name: str, run: dict[str, Any]) -> None:
    precision = ", ".join(f"{way} {value:.2f}" for way, value in run["ap"].items())
    learned = f"loss {run['loss_of_wanted']:.3f} / {run['loss_of_others']:.3f}"
    print(f"{name}, {run['kind']}, seed {run['seed']}: {learned}; {precision}; {run['cpu_seconds']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
