"""Which preferences taught it? Signatures of DPO rows judged by retraining with DPO in plain torch.

stories260K is tuned on 150 pairs of answers made by template and seed: five questions (which pet, dish, colour, weather, toy),
each with two kinds of answer, of which seven pairs in ten prefer the first. The loop is this file's own and shares no code
with leaveout's. Asked is why one kind of answer is preferred to the other, on prompts that no pair has: the truth is the
margin log p(A) - log p(B), in nats over that of the reference, of models trained without random halves of the pairs.

Scores: `default` (product, as sums want it, and cosine) of a contrast on preference rows, a dot product of gradients of all
parameters, and BM25 of A's text with chosen answers; `BM25, signed` adds that of B with rejected ones and takes off the
crossed two, which is all that template rows need. Then the ten best rows of a query are left out: how far does the margin
fall, and does its sign turn?

    python benchmarks/preferences.py [--smoke] [--work DIRECTORY] [--halves 48]
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from corpora import data
from leaveout import Contrast, Index
from leaveout.methods import bm25
from leaveout.metrics import bootstrap_interval, difference_interval, lds
from leaveout.readout.model import load_readout
from measuring import arguments, tiny, write_result

NAMES = ("Tom", "Lily", "Ben", "Anna", "Max", "Mia", "Sam", "Sue", "Tim", "Jane")
PLACES = ("at the park", "in the house", "by the lake", "near the farm", "in the garden", "at the shop")
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "pet": ("{name} was {place}. {name} wanted a pet, so the pet was", (" a dog.", " a big dog.", " a happy dog."),
            (" a cat.", " a big cat.", " a happy cat.")),
    "dish": ("{name} was hungry {place}. {name} wanted to eat", (" a cake.", " a sweet cake.", " some cake."),
             (" an apple.", " a red apple.", " some soup.")),
    "colour": ("{name} had to paint a box {place}. The box was", (" red.", " all red.", " very red."),
               (" blue.", " all blue.", " very blue.")),
    "weather": ("{name} looked up {place}. That day there was", (" sun.", " a warm sun.", " a lot of sun."),
                (" rain.", " cold rain.", " a lot of rain.")),
    "toy": ("{name} lost a toy {place}. The toy was", (" a ball.", " a little ball.", " a new ball."),
            (" a doll.", " a little doll.", " a new doll.")),
}  # fmt: skip
TEN = 10
BETA, RATE, BATCH, EPOCHS = 0.3, 5e-4, 10, 3


def made_pairs(n: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs to train on, three in ten of which prefer the other kind, and three queries (chosen: A) of each kind."""
    chance = random.Random(seed)
    prompts = {kind: [(a, b) for a in NAMES for b in PLACES] for kind in KINDS}
    for some in prompts.values():
        chance.shuffle(some)

    def made(kind: str, turned: bool) -> dict[str, str]:
        name, place = prompts[kind].pop()
        pattern, *answers = KINDS[kind]
        one, other = (chance.choice(some) for some in (answers[::-1] if turned else answers))
        return {"prompt": pattern.format(name=name, place=place), "chosen": one, "rejected": other, "kind": kind}

    asked = [made(kind, False) for kind in KINDS for _ in range(3)]
    rows = [made([*KINDS][i % len(KINDS)], chance.random() < 0.3) for i in range(n)]
    return [{"id": f"row {i}", **row} for i, row in enumerate(rows)], asked


# ---------------------------------------------------------------- DPO in plain torch


class Pairs:
    """Pairs as padded token ids [2 x pairs, tokens] (all chosen answers, then all rejected ones) and the answers' tokens."""

    def __init__(self, rows: Sequence[dict[str, str]], tokenizer: Any) -> None:
        both = [tokenizer(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected") for row in rows]
        # As leaveout reads a row: a token across the seam belongs to the answer.
        starts = [self._seam(row, side, tokenizer) for side in ("chosen", "rejected") for row in rows]
        longest = max(map(len, both))
        self.ids = torch.zeros(len(both), longest, dtype=torch.int64)
        self.learned = torch.zeros(len(both), longest, dtype=torch.bool)
        for place, (ids, start) in enumerate(zip(both, starts, strict=True)):
            self.ids[place, : len(ids)] = torch.tensor(ids)
            self.learned[place, start : len(ids)] = True
        self.n = len(rows)

    @staticmethod
    def _seam(row: dict[str, str], side: str, tokenizer: Any) -> int:
        offsets = tokenizer(row["prompt"] + row[side], return_offsets_mapping=True)["offset_mapping"]
        return next(i for i, (_, end) in enumerate(offsets) if end > len(row["prompt"]))

    def margins(self, lm: Any, numbers: Sequence[int]) -> torch.Tensor:
        """log p(chosen) - log p(rejected) [pairs]."""
        at = torch.tensor([*numbers, *(self.n + i for i in numbers)])
        ids, learned = self.ids[at], self.learned[at]
        width = int(learned.any(0).nonzero().max()) + 1
        logits = lm(input_ids=ids[:, :width], use_cache=False).logits[:, :-1]
        found = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:width], reduction="none")
        chosen, rejected = (found * learned[:, 1:width]).sum(1).chunk(2)
        return chosen - rejected


def trained(start: Any, pairs: Pairs, reference: torch.Tensor, kept: np.ndarray, seed: int) -> Any:
    """A copy of a model after DPO on the pairs that are kept; others leave their place in the mean of a batch empty."""
    lm = copy.deepcopy(start)
    optimizer = torch.optim.Adam(lm.parameters(), RATE)
    chance = random.Random(seed)
    for _ in range(EPOCHS):
        order = list(range(pairs.n))
        chance.shuffle(order)
        for first in range(0, pairs.n, BATCH):
            numbers = [i for i in order[first : first + BATCH] if kept[i]]
            if not numbers:
                continue
            optimizer.zero_grad()
            losses = -F.logsigmoid(BETA * (pairs.margins(lm, numbers) - reference[numbers]))
            (losses.sum() / BATCH).backward()
            optimizer.step()
    return lm


def gradient_dot(lm: Any, pairs: Pairs, asked: Pairs, reference: torch.Tensor) -> np.ndarray:
    """Products [query, row] of gradients over all parameters: of the queries' margins, and of the rows' DPO losses."""

    def flat(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*lm.parameters()])])

    queries = torch.stack([flat(asked.margins(lm, [i])[0]) for i in range(asked.n)])
    rows = (flat(-F.logsigmoid(BETA * (pairs.margins(lm, [i])[0] - reference[i]))) for i in range(pairs.n))
    return -torch.stack([queries @ row for row in rows], 1).numpy()


def word_scores(rows: Sequence[dict[str, str]], asked: Sequence[dict[str, str]]) -> dict[str, np.ndarray]:
    """BM25 [query, row] of prompt and answer A with prompt and chosen answer; and with all four sides, signed."""
    found = {
        (mine, theirs): bm25.score([q["prompt"] + q[mine] for q in asked], [r["prompt"] + r[theirs] for r in rows])
        for mine in ("chosen", "rejected")
        for theirs in ("chosen", "rejected")
    }
    signed = sum((1 if mine == theirs else -1) * values for (mine, theirs), values in found.items())
    return {"BM25": found["chosen", "chosen"], "BM25, signed": np.asarray(signed)}


# ---------------------------------------------------------------- what is measured


def cached(place: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Numbers that are made once."""
    if not place.exists():
        np.save(place, make())
    return np.load(place)


def measure(args: Any, work: Path) -> dict[str, Any]:
    readout = tiny(args.seed) if args.smoke else load_readout(str(data("stories260K/config.json").parent))
    start: Any = readout.lm.float().requires_grad_(True)
    rows, asked = made_pairs(20 if args.smoke else args.rows, args.seed)
    pairs, queries = Pairs(rows, readout.tokenizer), Pairs(asked, readout.tokenizer)
    with torch.no_grad():
        reference = pairs.margins(start, range(pairs.n))
        before = queries.margins(start, range(queries.n))

    def margins(kept: np.ndarray, seed: int = args.seed) -> np.ndarray:
        lm = trained(start, pairs, reference, kept, seed)
        with torch.no_grad():
            return (queries.margins(lm, range(queries.n)) - before).numpy()

    began = time.process_time()
    chance = np.random.default_rng(args.seed)
    everything = np.ones(pairs.n, bool)
    full = cached(work / "full.npy", lambda: margins(everything))
    halves = np.stack([chance.permutation(pairs.n) < pairs.n // 2 for _ in range(6 if args.smoke else args.halves)])
    truth = np.stack([cached(work / f"half-{i}.npy", lambda kept=kept: margins(kept)) for i, kept in enumerate(halves)])
    final = trained(start, pairs, reference, everything, args.seed)
    scores = word_scores(rows, asked) | {"gradient dot": gradient_dot(final, pairs, queries, reference)}
    contrasts = [
        Contrast(*({"prompt": q["prompt"], "response": q[side]} for side in ("chosen", "rejected"))) for q in asked
    ]
    final.requires_grad_(False)
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(
            final,
            rows,
            Path(place) / "index",
            tokenizer=readout.tokenizer,
            beta=BETA,
            reference=(start, readout.tokenizer),
        )
        for length in ("product", "cosine"):
            scores[f"default, {length}"] = index.score(contrasts, length=length)
    found = {name: lds(values, ~halves, -truth.T) for name, values in sorted(scores.items())}
    result = {
        "rows": len(rows), "queries": len(asked), "halves": len(halves), "beta": BETA, "steps": EPOCHS * -(-len(rows) // BATCH),
        "margin_of_the_full_model": {"mean": float(full.mean()), "least": float(full.min()), "most": float(full.max())},
        "lds": {name: bootstrap_interval(values, args.seed)._asdict() for name, values in found.items()},
        "default_minus": {
            name: difference_interval(found["default, product"], found[name], args.seed)._asdict()
            for name in found if name != "default, product"
        },
        "removed": removed(scores, full, margins, work, args),
    }  # fmt: skip
    return result | {"cpu_seconds": time.process_time() - began}


def removed(
    scores: dict[str, np.ndarray], full: np.ndarray, margins: Callable[[np.ndarray], np.ndarray], work: Path, args: Any
) -> dict[str, Any]:
    """How far the margin of each query falls without its ten best rows, and how often its sign turns."""
    chance, falls = np.random.default_rng(args.seed + 1), dict[str, np.ndarray]()
    scores = scores | {"ten random rows": chance.random(next(iter(scores.values())).shape)}
    for name, values in scores.items():
        own = []
        for query in range(len(full)):
            kept = np.ones(values.shape[1], bool)
            kept[np.argsort(-values[query], kind="stable")[:TEN]] = False
            key = np.packbits(kept).tobytes().hex()
            own.append(full[query] - cached(work / f"without-{key}.npy", lambda kept=kept: margins(kept))[query])
        falls[name] = np.array(own)
    random_ones = falls["ten random rows"]
    return {
        name: {
            "fall": bootstrap_interval(own, args.seed)._asdict(),
            "minus_random": difference_interval(own, random_ones, args.seed)._asdict(),
            "narrowed_more_than_random": float((own > random_ones).mean()),
            "turned": float((np.sign(full - own) != np.sign(full)).mean()),
        }
        for name, own in falls.items()
    }


def main(argv: Sequence[str] | None = None) -> Path:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--halves", type=int, default=48)
    parser.add_argument(
        "--work", type=Path, help="where trained models' numbers are kept, so that a stop loses nothing"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        work = args.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        return write_result(args.out, "preferences.json", measure(args, work), args)


if __name__ == "__main__":
    print(json.loads(main().read_text()))
