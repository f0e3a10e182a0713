"""What do whole sources, and blocks of alike rows, do when they leave: plain sums of scores, leverage, or Woodbury on the set?

    python benchmarks/coherent_sets.py --banks stories neox --work bench/banks      # 46 retrainings a bank
    python benchmarks/coherent_sets.py --smoke

On the banks of `bank_truths.py`, at the parameters after a third of training: the model is retrained without each of ten
sources (20 rows), blocks of 5, 10, 20 and 40 rows that are alike by BM25, and the 5 and 10 best rows of eight queries by
`default`. Predictions are sums over the set: of `default`'s products as they are; each over 1 - h, where h is the row's leverage;
and of rows that leave together by Woodbury (`readout/groups.py`), beside plain sums of EK-FAC and of `influence`. Each
prediction's unit is fitted on the bank's random halves, so that a slope of 1 would be right; slope and correlation are over all
pairs of a query and a set of a kind. The factor of `CURVATURE` was chosen on stories and neox, at 1 / 2 of 1 / 4 to 1.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_truths import HALVES, TRUTHS, JudgedBank, judged, make_truth
from leaveout.corpus.chat import chosen_template
from leaveout.evaluation.truth import values_without
from leaveout.methods import bm25
from leaveout.methods.scorer import Scorer, as_row
from leaveout.methods.signatures import readout_of, trained_part
from leaveout.metrics import bootstrap_interval, spearman
from leaveout.readout.groups import CURVATURE
from leaveout.readout.index import Index
from measuring import arguments, write_result
from refined import AT, scores_of

SIZES, BLOCKS = (5, 10, 20, 40), 5
TOPS, ASKED = (5, 10), 8
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the largest eigenvalue of the curvature, 1 / CURVATURE among them


def gram_of(bank: JudgedBank) -> tuple[np.ndarray, np.ndarray]:
    """Products of `default`, [query, row] and [row, row]."""
    scorer = Scorer(bank.run, bank.queries)
    readout = readout_of(scorer, AT)
    template = chosen_template(bank.run.recipe.template, readout.tokenizer)
    rows = [
        replace(trained_part(as_row(row), readout.tokenizer, template, bank.run.recipe.max_tokens), id=str(i), unit=str(i))
        for i, row in enumerate(scorer.rows)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(readout, rows, Path(place) / "index", "default", template=template)
        every = np.arange(len(rows))
        vectors, lengths = index.directions(every), index.lengths_of(every).astype(np.float64)
        gram = index.form.products(vectors, vectors).double().numpy() * np.outer(lengths, lengths)
        return index.score([as_row(row) for row in scorer.query_rows]).astype(np.float64), gram


def sets_of(bank: JudgedBank, scores: np.ndarray, seed: int) -> list[tuple[str, np.ndarray]]:
    """Kinds of sets, and which rows they hold."""
    rows = [as_row(row) for row in bank.run.recipe.examples]
    n, chance = len(rows), np.random.default_rng(seed)
    alike = bm25.score([row.text for row in rows], [row.text for row in rows])
    groups = [row.meta["group"] for row in rows]

    def first(order: np.ndarray, size: int) -> np.ndarray:
        return np.isin(np.arange(n), order[:size])

    found = [("source", np.array([own == group for own in groups])) for group in sorted(set(groups))]
    for size in (size for size in SIZES if size < n):
        for centre in chance.choice(n, min(BLOCKS, n), replace=False):
            order = np.argsort(-alike[centre], kind="stable")
            found.append((f"block of {size}", first(np.r_[centre, order[order != centre]], size)))
    for query in chance.choice(len(scores), min(ASKED, len(scores)), replace=False):
        found += [(f"best {size}", first(np.argsort(-scores[query], kind="stable"), size)) for size in TOPS if size < n]
    return found


def predicted(scores: np.ndarray, gram: np.ndarray, sets: np.ndarray, how: str, share: float) -> np.ndarray:
    """Effects [query, set], in the unit of the scores."""
    curvature = gram / len(gram) * share / np.linalg.eigvalsh(gram / len(gram))[-1]
    out = np.empty((len(scores), len(sets)))
    for number, chosen in enumerate(sets.astype(bool)):
        own = curvature[np.ix_(chosen, chosen)]
        weights = np.ones(len(own))
        if how == "leverage":
            weights = 1 / (1 - np.minimum(np.diag(own), 0.95))
        elif how == "Woodbury":
            values, axes = np.linalg.eigh(own)
            weights = axes @ ((axes.T @ weights) / (1 - np.minimum(values, 0.95)))
        out[:, number] = scores[:, chosen] @ weights
    return out


def bank_facts(name: str, work: Path, truths: Path, seed: int) -> dict[str, Any]:
    bank = judged(name, work, truths)
    scores, gram = gram_of(bank)
    kinds, chosen = zip(*sets_of(bank, scores, seed), strict=True)
    sets, base = np.array(chosen, float), bank.run.bank.base(bank.queries)[:, None]
    effects = values_without(bank.run, bank.queries, sets) - base
    halves, half_effects = bank.truth.removed.astype(float), bank.truth.values - base
    ways = {"plain sum": ("plain", 0.0), "leverage": ("leverage", 1.0)}
    ways |= {f"Woodbury, {share:g}": ("Woodbury", share) for share in SHARES}
    pairs = {
        way: (predicted(scores, gram, sets, *how), predicted(scores, gram, halves, *how)) for way, how in ways.items()
    }
    for method in [] if name == "smoke" else [f"ek-fac@{AT}", f"influence@{AT}"]:
        found = scores_of(bank, method, work)[0].astype(np.float64)
        pairs[f"plain sum, {method}"] = found @ sets.T, found @ halves.T
    lines = []
    for way, (own, on_halves) in pairs.items():
        own = own * float((on_halves * half_effects).sum() / (on_halves**2).sum())
        at = {kind: np.array(kinds) == kind for kind in dict.fromkeys(kinds)}
        lines.append({
            "way": way,
            "rank correlation over sets": bootstrap_interval(spearman(own, effects), seed)._asdict(),
            "kinds": {
                kind: {
                    "sets": int(some.sum()),
                    "slope": float((own[:, some] * effects[:, some]).sum() / (own[:, some] ** 2).sum()),
                    "correlation": float(np.corrcoef(own[:, some].ravel(), effects[:, some].ravel())[0, 1]),
                }
                for kind, some in at.items()
            },
        })  # fmt: skip
    return {"bank": name, "queries": len(scores), "share_used": 1 / CURVATURE, "ways": lines}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--banks", nargs="+", choices=list(HALVES), default=["stories", "neox"])
    parser.add_argument("--work", type=Path, help="where the banks' runs are; default: a temporary directory")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work, truths = args.work or Path(scratch), TRUTHS
        banks = []
        for name in ["smoke"] if args.smoke else args.banks:
            if args.smoke:
                truths = Path(scratch)
                make_truth(name, work / name, 1, truths)
            banks.append(bank_facts(name, work / name, truths, args.seed))
        result = {"question": (__doc__ or "").split("\n", 1)[0], "repeats": banks[0]["queries"], "banks": banks}
        print(write_result(args.out, "coherent_sets.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
