"""Does "x usual" part questions about the rows of an index from questions about anything else?

SmolLM2-135M-Instruct as it is, nothing is trained. Two indexes of 300 rows: medical questions, each answered by the beginning of
its abstract (PubMedQA), and everyday instructions, each answered by the first half of its answer (Dolly). Asked are 40 rows of
each in other words (the question with the study's own conclusion; the instruction with the second half of its answer), and 40
texts each of the other corpus, of annual reports (TAT-QA) and of Wikipedia (WikiText-2). For each the best row's score in times
of the usual (`usual_best`), and what share is above a limit; and of questions about rows, whether the row itself is the best.

    python benchmarks/usual.py [--smoke] [--seed 0] [--work DIRECTORY]
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import read_json, read_text
from leaveout import Index
from leaveout.readout.search import find, usual_best, usual_scores
from leaveout.words import NOISE
from measuring import arguments, made_rows, smollm2, tiny, write_result

ROWS, ASKED, WORDS = 300, 40, 45  # rows of an index, questions of a kind, words of a passage
LIMITS = (1.0, 1.5, NOISE, 3.0)  # in times of the usual: NOISE is what `verdict` goes by

Pairs = list[tuple[dict[str, str], dict[str, str]]]  # a row, and a question about it


def cut(text: str, start: int = 0) -> str:
    return " " + " ".join(text.split()[start : start + WORDS])


def medical() -> Pairs:
    found = read_json("medical-pubmedqa/ori_pqal.json.gz")
    return [
        ({"prompt": one["QUESTION"], "response": cut(one["CONTEXTS"][0])},
         {"prompt": one["QUESTION"], "response": cut(one["LONG_ANSWER"])})
        for one in found.values()
    ]  # fmt: skip


def everyday() -> Pairs:
    pairs = []
    for one in read_json("alpaca/dolly_3k.json.gz"):
        half = len(one["output"].split()) // 2
        if 12 <= half <= WORDS and not one["input"]:
            asked = one["instruction"]
            whole = one["output"]
            first, second = cut(" ".join(whole.split()[:half])), cut(whole, half)
            pairs.append(({"prompt": asked, "response": first}, {"prompt": asked, "response": second}))
    return pairs


def reports() -> list[dict[str, str]]:
    found = read_json("finance-tatqa/tatqa_dataset_dev.json.gz")
    texts = [max((p["text"] for p in one["paragraphs"]), key=len) for one in found]
    return [{"text": cut(text).strip()} for text in texts if len(text.split()) > 20]


def wikipedia() -> list[dict[str, str]]:
    lines = [line.strip() for line in read_text("wikitext2/valid.txt.gz").splitlines()]
    joined = [re.sub(r" ([,.;:!?)'])", r"\1", line).replace(" @-@ ", "-") for line in lines if len(line) > 300]
    return [{"text": cut(line).strip()} for line in joined]


def judged(index: Index, asked: Sequence[dict[str, str]], ids: Sequence[str] | None) -> dict[str, Any]:
    """The best row of each question in times of the usual; `ids`: of the rows that the questions are about."""
    encoded = index.encode(asked)
    usual = usual_scores(index, encoded, usual_best(index), "cosine")
    found = find(index, encoded, 1)
    times = np.array([hits[0].score / each for hits, each in zip(found, usual, strict=True)])
    facts = {
        "questions": len(asked), "above": {str(limit): float((times > limit).mean()) for limit in LIMITS},
        "quartiles": np.quantile(times, [0.05, 0.25, 0.5, 0.75, 0.95]).round(3).tolist(),
    }  # fmt: skip
    if ids is None:
        return facts
    right = np.array([hits[0].id == id for hits, id in zip(found, ids, strict=True)])
    return {
        **facts,
        "row_is_best": float(right.mean()),
        "above_the_limit_and_best": float((right & (times > NOISE)).mean()),
        "above_the_limit_of_those_that_are_best": float((times > NOISE)[right].mean()) if right.any() else None,
    }


def main(argv: Sequence[str] | None = None) -> Path:
    parser = arguments(__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "usual", help="indexes are kept here"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    if args.smoke:
        args.work, made = args.out / "work", made_rows(240, args.seed)
        pairs: dict[str, Pairs] = {"made": [({**row, "output": cut(row["output"])}, row) for row in made[:120]]}
        other, count, asked, readout = {"others": made[120:]}, 60, 10, tiny(args.seed)
    else:
        pairs = {"medical": medical(), "everyday": everyday()}
        other, count, asked, readout = {"reports": reports(), "wikipedia": wikipedia()}, ROWS, ASKED, smollm2()
    for each in (*pairs.values(), *other.values()):
        chance.shuffle(each)
    results = {}
    for name, own in pairs.items():
        rows = [{**row, "id": f"{name} {n}"} for n, (row, _) in enumerate(own[:count])]
        index = Index.build(readout, rows, args.work / f"{name}-{args.seed}", "default")
        about = [f"{name} {n}" for n in range(asked)]
        results[name] = {"about its rows": judged(index, [question for _, question in own[:asked]], about)}
        for title, texts in other.items():
            results[name][title] = judged(index, texts[:asked], None)
        for title, theirs in pairs.items():
            if title != name:
                results[name][title] = judged(index, [question for _, question in theirs[:asked]], None)
    return write_result(args.out, "usual.json", {"rows": count, "limit": NOISE, "indexes": results}, args)


if __name__ == "__main__":
    main()
