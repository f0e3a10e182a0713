"""What benchmarks of ranking share: methods that score rows for queries, what they cost, their metrics, and a picture.

Every method gives scores [query, train], the CPU seconds of its index (what is computed of the rows alone and kept) and
of its queries, and the bytes that it keeps of a row. A method that keeps nothing has all its seconds at the queries.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leaveout.corpus import Corpus, Row
from leaveout.methods import bm25, random_scores
from leaveout.methods.ekfac import EkFac
from leaveout.methods.embedding import EmbeddingCosine
from leaveout.methods.gradient_dot import GradientDot
from leaveout.methods.gradients import unit_rows
from leaveout.methods.rapidin import RapidIn
from leaveout.metrics import (
    auprc_top_bottom,
    average_precision,
    bootstrap_interval,
    difference_interval,
    precision_at,
    recall_at,
)
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import PRESETS, Channel, SignatureSettings
from leaveout.training.tasks import Parameters, Task
from scale_speed import stored_bytes

Example = dict[str, str]
RAPIDIN_BYTES = 2 * 65536  # K = 65,536 numbers of float16
ENDS = (5, 10, 50)  # K of the paper's area over the K best and the K worst rows
UNTRAINED, BEFORE, QUARTER = ", untrained model", ", before fine-tuning", ", after a quarter of it"
UNWHITENED = replace(PRESETS["residual"], channels=(Channel("residual"),), length_power=0.0, unit_length=True)
"""Every layer as `residual` has it, for likeness."""


@dataclass(frozen=True)
class RankingTask:
    """Rows to rank, and queries with the name of their set and the rows that each should find [query, train]."""

    rows: list[Example]
    queries: list[Example]
    sets: list[str]
    relevant: np.ndarray

    def digest(self) -> str:
        """Twelve hex digits of the rows and queries."""
        return hashlib.sha256(json.dumps([self.rows, self.queries]).encode()).hexdigest()[:12]

    def parsed(self) -> tuple[list[Row], list[Row]]:
        """Queries and rows as the training engine reads them."""
        return list(Corpus.open(self.queries)), list(Corpus.open(self.rows))


@dataclass(frozen=True)
class Ranked:
    """Scores [query, train] of one method and what they cost; bytes_per_row is None where nothing is kept of a row."""

    scores: np.ndarray
    index_seconds: float
    query_seconds: float
    bytes_per_row: float | None = None


@dataclass(frozen=True)
class Model:
    """A language model at one set of parameters. Memory: the parameters twice."""

    task: Task
    parameters: Parameters
    tokenizer: Any

    @cached_property
    def readout(self) -> Readout:
        """The model of the task with these parameters in it: a task serves one Model at a time."""
        own = dict(self.task.model.named_parameters())
        with torch.no_grad():
            for name, value in self.parameters.items():
                own[name].copy_(value)
        return load_readout(self.task.model, self.tokenizer)


# ---------------------------------------------------------------- methods


def of_texts(score: Callable[..., np.ndarray], task: RankingTask, fields: Sequence[str]) -> Ranked:
    """A score that reads only the given fields of queries and rows."""
    began = time.process_time()
    queries, rows = ([" ".join(e[f] for f in fields if e.get(f)) for e in some] for some in (task.queries, task.rows))
    return Ranked(score(queries, rows), 0.0, time.process_time() - began)


def of_index(readout: Readout, preset: str | SignatureSettings, task: RankingTask) -> Ranked:
    """Scores of an index of the readout engine in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.process_time()
        index = Index.build(readout, task.rows, Path(directory) / "index", preset)
        built = time.process_time()
        assert index.ids == [row["id"] for row in task.rows]
        scores = index.score(task.queries)
        return Ranked(scores, built - began, time.process_time() - built, float(stored_bytes(index)))


def of_embeddings(model: Model, task: RankingTask) -> Ranked:
    baseline, (queries, rows) = EmbeddingCosine(model.task, model.parameters), task.parsed()
    began = time.process_time()
    kept = unit_rows(baseline.embeddings(rows))
    built = time.process_time()
    scores = (unit_rows(baseline.embeddings(queries)) @ kept.T).float().numpy()
    return Ranked(scores, built - began, time.process_time() - built, 4.0 * kept.shape[1])


def of_rapidin(model: Model, task: RankingTask, seed: int) -> Ranked:
    """RapidIn at its published width. Memory: `RAPIDIN_BYTES` a row and query."""
    baseline, (queries, rows) = RapidIn(model.task, model.parameters, seed=seed), task.parsed()
    began = time.process_time()
    kept = list(baseline.sketches(rows))
    built = time.process_time()
    asked = torch.cat(list(baseline.sketches(queries))).float()
    scores = torch.cat([asked @ chunk.float().T for chunk in kept], 1).numpy()
    return Ranked(scores, built - began, time.process_time() - built, 2.0 * kept[0].shape[1])


def unstored(score: Callable[[list[Row], list[Row]], np.ndarray], task: RankingTask) -> Ranked:
    """A score of rows that keeps nothing of them."""
    queries, rows = task.parsed()
    began = time.process_time()
    return Ranked(score(queries, rows), 0.0, time.process_time() - began)


def text_methods(task: RankingTask, fields: Sequence[str], seed: int) -> dict[str, Callable[[], Ranked]]:
    """Methods without a model; the last field is the one that is learned."""
    answers = fields[-1:]
    found = {
        "BM25": lambda: of_texts(bm25.score, task, fields),
        "BM25, answers only": lambda: of_texts(bm25.score, task, answers),
        "tf-idf cosine": lambda: of_texts(tfidf_cosine, task, fields),
        "words in the answer": lambda: of_texts(length_scores, task, answers),
        "random scores": lambda: of_texts(lambda q, c: random_scores.score(q, c, seed), task, fields),
    }
    return {name: method for name, method in found.items() if len(fields) > 1 or name != "BM25, answers only"}


def gradient_methods(model: Model, task: RankingTask, seed: int) -> dict[str, Callable[[], Ranked]]:
    """Methods that run the whole model forward, or forward and backward, on each row."""
    at = model.task, model.parameters
    together = len(task.queries)  # one pass over the rows
    return {
        "embedding cosine": lambda: of_embeddings(model, task),
        "gradient dot": lambda: unstored(GradientDot(*at).score, task),
        "gradient cosine": lambda: unstored(GradientDot(*at, cosine=True).score, task),
        "RapidIn": lambda: of_rapidin(model, task, seed),
        "EK-FAC": lambda: unstored(EkFac(*at, together=together, seed=seed).score, task),
    }


def index_methods(
    readout: Callable[[], Readout], presets: Mapping[str, str | SignatureSettings], task: RankingTask, label: str = ""
) -> dict[str, Callable[[], Ranked]]:
    """Presets of the readout engine by name and label; the model is made when the first of them runs."""
    return {name + label: lambda preset=preset: of_index(readout(), preset, task) for name, preset in presets.items()}


def tfidf_cosine(queries: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
    """Cosines [query, train] of word counts times log(rows / rows with the word); words that no row has are left out."""
    known = {word: column for column, word in enumerate(sorted({word for text in corpus for word in bm25.words(text)}))}

    def counts(texts: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(texts), len(known)), np.float32)
        for row, text in zip(found, texts, strict=True):
            for word in bm25.words(text):
                if word in known:
                    row[known[word]] += 1
        return found

    rows = counts(corpus)
    weights = np.log(len(rows) / (rows > 0).sum(0))
    left, right = (unit_rows(torch.from_numpy(x * weights)) for x in (counts(queries), rows))
    return (left @ right.T).float().numpy()


def length_scores(queries: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
    """The number of words of each row, whatever the query: what length alone finds."""
    return np.tile(np.array([len(bm25.words(text)) for text in corpus], np.float32), (len(queries), 1))


def kept(methods: Mapping[str, Callable[[], Ranked]], place: Path) -> dict[str, Ranked]:
    """The results of all methods; what the directory has is not made again, so that a killed run goes on."""
    place.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, method in methods.items():
        file = place / f"{name.replace(' ', '_')}.npz"
        if not file.exists():
            made = method()
            size = np.nan if made.bytes_per_row is None else made.bytes_per_row
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, scores=made.scores, numbers=np.array([made.index_seconds, made.query_seconds, size]))
            partial.rename(file)
            print(f"  {name}: {made.index_seconds:.1f} + {made.query_seconds:.1f} CPU s", file=sys.stderr, flush=True)
        with np.load(file) as saved:
            index_seconds, query_seconds, size = saved["numbers"].tolist()
            found[name] = Ranked(saved["scores"], index_seconds, query_seconds, None if np.isnan(size) else size)
    return found


# ---------------------------------------------------------------- metrics


def costs(found: Mapping[str, Ranked]) -> dict[str, dict[str, float | None]]:
    """What each method costs; bytes_of_rapidin_over_own is the ratio of RapidIn at K = 65,536 to the method's row."""
    return {
        name: {
            "bytes_per_row": r.bytes_per_row,
            "bytes_of_rapidin_over_own": None if r.bytes_per_row is None else RAPIDIN_BYTES / r.bytes_per_row,
            "index_cpu_seconds": r.index_seconds,
            "query_cpu_seconds": r.query_seconds,
        }
        for name, r in found.items()
    }


def judged(scores: Mapping[str, np.ndarray], task: RankingTask, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by set of queries and method, with paired differences of average precision.

    The differences are with BM25 and, for a method that has one, with its twin on a model with random weights: that of
    the same preset, at whatever parameters the method looks.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(task.sets):
        chosen = np.array([own == name for own in task.sets])
        truth = task.relevant[chosen]
        ap = {method: average_precision(found[chosen], truth) for method, found in scores.items()}
        result[name] = {}
        for method, found in scores.items():
            others = {"bm25": "BM25", "untrained": untrained_twin(method)}
            result[name][method] = metrics(found[chosen], truth, seed) | {
                f"average_precision_minus_{other}": difference_interval(ap[method], ap[twin], seed)._asdict()
                for other, twin in others.items()
                if twin in ap
            }
    return result


def metrics(scores: np.ndarray, relevant: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Metrics of scores [query, train], each the mean over queries with its bootstrap interval.

    Recall is at the number of relevant rows; an end of K rows that is longer than half of the rows is left out.
    """
    n_relevant = int(relevant.sum(1).max())
    values = {
        "precision_at_10": precision_at(scores, relevant, min(10, scores.shape[1])),
        "recall_at_relevant": recall_at(scores, relevant, n_relevant),
        "average_precision": average_precision(scores, relevant),
    } | {f"auprc_ends_{k}": auprc_top_bottom(scores, relevant, k) for k in ENDS if 2 * k <= scores.shape[1]}
    return {name: bootstrap_interval(value, seed)._asdict() for name, value in values.items()}


def untrained_twin(method: str) -> str:
    return method.removesuffix(BEFORE).removesuffix(QUARTER) + UNTRAINED


def verdicts(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, str]]]:
    """Where average precision lies against BM25 and the untrained twin, by intervals, of methods that have a twin."""
    out = {}
    for name, found in results.items():
        ap = {method: facts["average_precision"] for method, facts in found.items()}
        out[name] = {
            method: {"BM25": _side(own, ap["BM25"]), "untrained model": _side(own, ap[untrained_twin(method)])}
            for method, own in ap.items()
            if untrained_twin(method) in ap
        }
    return out


def _side(own: Mapping[str, float], other: Mapping[str, float]) -> str:
    if own["low"] > other["high"]:
        return "above"
    return "below" if own["high"] < other["low"] else "intervals overlap"


def show(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    for name, methods in results.items():
        print(f"{name} queries{'':24} P@10   recall   average precision")
        for method, facts in methods.items():
            ap = facts["average_precision"]
            print(
                f"  {method:36} {facts['precision_at_10']['mean']:.3f}  {facts['recall_at_relevant']['mean']:.3f}"
                f"    {ap['mean']:.3f} [{ap['low']:.3f}, {ap['high']:.3f}]"
            )


# ---------------------------------------------------------------- picture


def draw(panels: Mapping[str, Mapping[str, Mapping[str, Any]]], chance: float, path: Path) -> None:
    """Average precision with its interval, one panel for each set of queries, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(method for found in panels.values() for method in found))
    figure, axes = pyplot.subplots(
        1, len(panels), sharey=True, squeeze=False, figsize=(2.4 + 2.6 * len(panels), 0.6 + 0.2 * len(names))
    )
    for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
        shown = [(len(names) - 1 - i, found[n]["average_precision"]) for i, n in enumerate(names) if n in found]
        places, means = [y for y, _ in shown], [ap["mean"] for _, ap in shown]
        ends = [[ap["mean"] - ap["low"] for _, ap in shown], [ap["high"] - ap["mean"] for _, ap in shown]]
        axis.errorbar(means, places, xerr=ends, fmt="o", markersize=3, linewidth=1)
        axis.axvline(chance, color="black", linestyle=":", linewidth=1)
        axis.set(title=title, xlim=(0, 1.02), xlabel="average precision")
        axis.title.set_fontsize(9)
        axis.grid(axis="y", linewidth=0.3)
    axes[0][0].set_yticks(range(len(names)), names[::-1], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
