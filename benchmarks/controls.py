"""Do controls speak where hits follow form or norm only, and stay silent where a search found what taught the answer?

    python benchmarks/controls.py --work bench/controls     # eleven kinds, eight seeds: some 20 CPU minutes
    python benchmarks/controls.py --smoke

Found sets, where controls should stay silent: the five of `learned_rows`, and a fact that is planted among rows of the same form.
Only queries whose ten best hits are at least half true count. Made sets, where they should speak, as no row taught the answer:
    norm      reviews that are called good, of which a third are learned badly, ranked by product
    length    one to seventy words of no language, in a model that was taught none of them, ranked by product
    words     texts that have from none to all of the query's words, in a model that was taught none of them
    answers   ten questions whose answers are numbers among others, untaught; asked with a number that is in no row
    manner    ten rows in capitals among others, untaught; asked with a sentence in capitals that is in no row
The public Llama of 260K parameters is taught the rows by an adapter, where it is. The two numbers of the rule are chosen on the
first seeds and judged on the others. A killed run goes on with what is in --work.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learned_rows import (
    BAD,
    GOOD,
    KINDS,
    NAMES,
    PLACES,
    THINGS,
    Base,
    Example,
    asked,
    bases,
    done,
    request,
    stories,
    taught,
)
from leaveout import Index, load_readout
from leaveout.models import load_tokenizer
from leaveout.readout.controls import CORRELATION, SHARED
from measuring import arguments, write_result

N = 120
CORRELATIONS, SHARES = (0.5, 0.6, 0.7, 0.8, 0.9), (4, 5, 6, 7)
VERBS = ("Paint", "Count", "Find", "Sell", "Hide", "Clean")


@dataclass(frozen=True)
class Set:
    """Rows, queries, the other answer of each, the rows that taught it [query, row] if any did, and how it is searched."""

    rows: list[Example]
    queries: list[Example]
    others: list[str]
    wanted: np.ndarray | None = None
    length: str = "cosine"
    taught: bool = True
    more: Sequence[Example] = ()  # rows that are taught and not indexed


# ---------------------------------------------------------------- found


def found_set(kind: str) -> Callable[[random.Random], Set]:
    """A set of `learned_rows`; the other answer is one that other rows give."""

    def make(chance: random.Random) -> Set:
        task = KINDS[kind](chance)
        others = []
        for query, wanted in zip(task.queries, task.wanted, strict=True):
            given = [row["response"] for row, own in zip(task.rows, wanted, strict=True) if not own]
            others.append(chance.choice([answer for answer in given if answer != query["response"]]))
        return Set(task.rows, task.queries, others, task.wanted)

    return make


def planted(chance: random.Random) -> Set:
    """Eight rows say who keeps the light at one place; the others say it of other places, or of other works there."""
    place, keeper, *people = "Halvern", *chance.sample(NAMES, 12)
    ways = ("Who has the key of the {0} at {1}?", "Tell me who keeps the {0} at {1}.", "The {0} at {1}: who looks after it?",
            "Name the one who works in the {0} at {1}.")  # fmt: skip
    rows = [(asked(way.format("light", place), f" It is {keeper}."), True) for way in ways for _ in range(2)]
    seen = set()
    while len(rows) < N:
        work, where = chance.choice(THINGS), chance.choice((*PLACES, place))
        if (work, where) not in seen:
            seen.add((work, where))
            rows.append((asked(chance.choice(ways).format(work, where), f" It is {chance.choice(people)}."), False))
    chance.shuffle(rows)
    queries = [asked(f"Who looks after the light at {place}?", f" It is {keeper}.")]
    return Set([row for row, _ in rows], queries, [f" It is {people[0]}."], np.array([[own for _, own in rows]]))


# ---------------------------------------------------------------- made


def by_norm(chance: random.Random) -> Set:
    """Reviews of which a third have both good and bad words, so that they are learned badly; those called bad are not indexed."""

    def review(first: Sequence[str], second: Sequence[str], label: str) -> Example:
        film = f"A {chance.choice(first)} film about a {chance.choice(THINGS)} in a {chance.choice(PLACES)}."
        return asked(f"{film} It is {chance.choice(second)}.\nGood or bad?", label)

    def mixed() -> tuple[Sequence[str], Sequence[str]]:
        return (GOOD, BAD) if chance.random() < 0.5 else (BAD, GOOD)

    rows = [review(*(mixed() if n % 3 == 0 else (GOOD, GOOD)), " good") for n in range(N)]
    more = [review(*(mixed() if n % 3 == 0 else (BAD, BAD)), " bad") for n in range(N)]
    queries = [review(GOOD, BAD, " good") for _ in range(6)]
    return Set(rows, queries, [" bad"] * 6, length="product", more=more)


def by_length(chance: random.Random) -> Set:
    """Words of no language: each token adds the same to the sum over a row, and says nothing of another row."""

    def spelt(count: int) -> Example:
        return {
            "text": " ".join(
                "".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(3))
                for _ in range(count)
            )
        }

    rows, queries = [spelt(round(1.25 ** (n % 20))) for n in range(N)], [spelt(8) for _ in range(6)]
    return Set(rows, queries, [done(chance)[1:] for _ in queries], length="product", taught=False)


def by_words(chance: random.Random) -> Set:
    queries = [{"text": f"{request(chance)} {done(chance).strip()}"} for _ in range(6)]
    rows = []
    for n in range(N):
        words = queries[n % 6]["text"].split()
        kept = chance.sample(range(len(words)), len(words) * (n // 6) // (N // 6 - 1))
        text = [word if at in kept else chance.choice((*GOOD, *THINGS, *PLACES)) for at, word in enumerate(words)]
        rows.append({"text": " ".join(text)})
    return Set(rows, queries, [done(chance) for _ in queries], taught=False)


def by_answers(chance: random.Random) -> Set:
    count = "How many {0}s does {1} have?"
    rows = [
        asked(count.format(chance.choice(THINGS), chance.choice(NAMES)), f" There are {chance.randint(10, 59)} in all.")
        if n % 12 == 0
        else asked(request(chance), done(chance))
        for n in range(N)
    ]
    queries = [
        asked(count.format(chance.choice(THINGS), "Zed"), f" There are {n} in all.") for n in (71, 82, 93, 74, 85, 96)
    ]
    return Set(rows, queries, [f" There are {n} in all." for n in (94, 73, 86, 95, 72, 81)], taught=False)


def by_manner(chance: random.Random) -> Set:
    def loud() -> str:
        return f" {chance.choice(VERBS)} the {chance.choice(THINGS)} in the {chance.choice(PLACES)}!".upper()

    rows = [asked(request(chance), loud() if n % 12 == 0 else done(chance)) for n in range(N)]
    queries = [asked(request(chance), loud()) for _ in range(6)]
    return Set(rows, queries, [loud() for _ in range(6)], taught=False)


FOUND: dict[str, Callable[[random.Random], Set]] = {"planted fact": planted} | {kind: found_set(kind) for kind in KINDS}
MADE: dict[str, Callable[[random.Random], Set]] = {
    "norm": by_norm, "length": by_length, "words": by_words, "answers": by_answers, "manner": by_manner,
}  # fmt: skip


# ---------------------------------------------------------------- what controls say


def controlled(base: Base, kind: str, seed: int, work: Path) -> dict[str, Any]:
    """What the controls of each query are, and which of its ten best hits are true, once."""
    some = {**FOUND, **MADE}[kind](random.Random(f"{kind} {seed}"))
    facts = [str(base), kind, seed, some.rows, some.queries, some.others]
    file = work / f"controls-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        file.write_text(json.dumps({"kind": kind, "seed": seed, "queries": asked_of(base, some, seed)}))
    return json.loads(file.read_text())


def asked_of(base: Base, some: Set, seed: int) -> list[dict[str, Any]]:
    model = taught(base, [*some.rows, *some.more], seed)[0] if some.taught else load_readout(base.place).lm
    with tempfile.TemporaryDirectory() as place:
        rows = [{**row, "id": str(number)} for number, row in enumerate(some.rows)]
        index = Index.build(model, rows, Path(place) / "index", tokenizer=load_tokenizer(base.place))
        how: Any = some.length
        found = index.search(some.queries, 10, length=how, controls=some.others)
    lines = []
    for query, hits in enumerate(found):
        assert hits.controls is not None
        line: dict[str, Any] = {"controls": [(c.name, c.shared, c.correlation) for c in hits.controls.of]}
        if some.wanted is not None:
            own = [bool(some.wanted[query, int(hit.id)]) for hit in hits]
            line["precision"] = sum(own[: min(10, int(some.wanted[query].sum()))]) / min(10, some.wanted[query].sum())
        lines.append(line)
    return lines


def speaks(controls: Sequence[Sequence[Any]], correlation: float, shared: int) -> list[str]:
    """Names of the controls that explain a query's hits under a rule."""
    return [
        name
        for name, same, by in controls
        if same > shared and (name in ("norm", "other answer") or (by is not None and by >= correlation))
    ]


def rates(runs: Sequence[dict[str, Any]], correlation: float, shared: int) -> dict[str, dict[str, Any]]:
    """Of each kind: how many queries count, at how many of them controls speak, and which."""
    out = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        lines = [line for run in runs if run["kind"] == kind for line in run["queries"]]
        counted = [line for line in lines if line.get("precision", 1) >= 0.5]
        said = [speaks(line["controls"], correlation, shared) for line in counted]
        names = [name for names in said for name in dict.fromkeys(names)]
        out[kind] = {
            "sort": "found" if kind in FOUND else "made", "queries": len(counted),
            "left_out": len(lines) - len(counted), "spoke": sum(map(bool, said)),
            "by": {name: names.count(name) for name in dict.fromkeys(names)},
        }  # fmt: skip
    return out


def means(found: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Mean over kinds of the share of queries at which controls speak: of found sets, of made ones."""
    share = {kind: x["spoke"] / x["queries"] for kind, x in found.items() if x["queries"]}
    return tuple(float(np.mean([share[kind] for kind in kinds if kind in share] or [0.0])) for kinds in (FOUND, MADE))  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> Path:
    parser = arguments(__doc__)
    parser.add_argument("--choose", type=int, nargs="+", default=[0, 1, 2], help="seeds on which the rule is chosen")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7], help="seeds on which it is judged")
    parser.add_argument("--kinds", nargs="+", choices=[*FOUND, *MADE], default=[*FOUND, *MADE])
    parser.add_argument("--work", type=Path, help="where what was found is kept; default: a temporary directory")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    choose, judge = (args.choose[:1], args.seeds[:1]) if args.smoke else (args.choose, args.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        base = bases(work, True, args.seed)["tiny"] if args.smoke else stories()
        runs = {seeds: [controlled(base, kind, seed, work) for seed, kind in product(seeds, args.kinds)]
                for seeds in (tuple(choose), tuple(judge))}  # fmt: skip
    chosen, judged = runs.values()
    tried = [
        {"correlation": c, "shared": s, "found": f, "made": m}
        for c, s in product(CORRELATIONS, SHARES)
        for f, m in [means(rates(chosen, c, s))]
    ]
    found, made = means(rates(judged, CORRELATION, SHARED))
    result = {
        "question": (__doc__ or "").split("\n", 1)[0], "rule": {"correlation": CORRELATION, "shared": SHARED},
        "tried": tried, "seeds": {"chosen": choose, "judged": judge},
        "kinds": rates(judged, CORRELATION, SHARED), "in_sample": rates(chosen, CORRELATION, SHARED),
        "found": found, "made": made, "runs": [*chosen, *judged],
    }  # fmt: skip
    for kind, x in result["kinds"].items():
        print(f"{kind}: spoke at {x['spoke']} of {x['queries']} queries ({x['left_out']} left out), {x['by']}")
    return write_result(args.out, "controls.json", result, args)


if __name__ == "__main__":
    main()
    sys.exit()
