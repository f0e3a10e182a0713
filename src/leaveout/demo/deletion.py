"""The demo's second half: train a small character model on words of six sources, predict it without each, and retrain it.

Two runs train the same model on the same words. In `by-source` a source is a unit, so that six things can be left out;
in `by-word` each word is one, so that any set of words can. Both are measured by jets and by retrainings, of which
none leaves out one source alone: those are predicted first and retrained afterwards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.predict import Verification, prediction_table, told
from leaveout.deletion.run import TrainingRun
from leaveout.report import heading, interval_chart, verdict
from leaveout.tables import Table
from leaveout.training.recipe import Recipe

HERE = Path(__file__).parent
RECIPE = "kind: microgpt\ndata: words.txt\nepochs: 2\n"


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    words    of each source; directions, retrainings: (by source, by word); heldout: retrainings for calibration
    checked  single words that are also retrained
    """

    words: int = 100
    directions: tuple[int, int] = (16, 32)
    retrainings: tuple[int, int] = (12, 96)
    heldout: tuple[int, int] = (8, 16)
    checked: int = 24


def run_deletion(out: Path, workers: int = 1, scale: Scale | None = None) -> tuple[dict[str, Any], list[str]]:
    """Trains, measures, predicts and retrains under `out` (what is there already is not done again).

    Returns: the summaries, and the sections of the report.
    """
    scale = scale or Scale()
    given = json.loads((HERE / "words.json").read_text(encoding="utf-8"))
    words = {source: found[: scale.words] for source, found in given["words"].items()}
    queries = [query for found in given["queries"].values() for query in found]
    source_of = {query: source for source, found in given["queries"].items() for query in found}
    _write_recipes(out, words)
    by_source = _measured(out, "by-source", 0, scale, workers)
    sources = by_source.verify(queries, [[source] for source in words], settings=_settings(workers))
    by_word = _measured(out, "by-word", 1, scale, workers)
    whole, single = _verify_words(by_word, queries, words, scale, workers)
    own = [line for line in sources.lines() if line["without"] == source_of[line["query"]]]
    print("Words that were not trained on, without their own source:")
    print(prediction_table(own))
    summaries = {
        "sources as units": sources.summary(),
        "words as units, without a source": whole.summary(),
        "words as units, without a word": single.summary(),
    }
    lines = [(name, *(_short(found[key]) for key in KEYS)) for name, found in summaries.items()]
    print(Table(["all queries and sets", *HEADERS], lines, "Predicted against retrained"))
    return summaries, [*_sections(own, lines, scale), *_top_words(by_word, queries)]


KEYS = ("sets", "pearson", "relative_error", "coverage")
HEADERS = ("sets", "correlation", "median relative error", "inside the interval")


def _short(value: Any) -> Any:
    return "unknown" if value is None else value


def _settings(workers: int, sizes: tuple[int, ...] = ()) -> MeasureSettings:
    """No stability check: it costs as much as all these jets, and `leaveout doctor` calls the recipe stable."""
    return MeasureSettings(workers, sizes=sizes, check=False, progress=True)


def _write_recipes(out: Path, words: dict[str, list[str]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    listed = [(word, source) for source, found in words.items() for word in found]
    (out / "words.txt").write_text("".join(f"{word}\n" for word, _ in listed), encoding="utf-8")
    (out / "by-word.yaml").write_text(RECIPE, encoding="utf-8")
    source_of = dict(listed)
    units = {id: source_of[id.split(":")[1]] for id in Recipe.from_yaml(out / "by-word.yaml").ids}
    (out / "units.json").write_text(json.dumps(units, indent=0), encoding="utf-8")
    (out / "by-source.yaml").write_text(RECIPE + "units: units.json\n", encoding="utf-8")


def _measured(out: Path, name: str, place: int, scale: Scale, workers: int) -> TrainingRun:
    print(f"{name}: training and measuring", file=sys.stderr)
    run = TrainingRun.train(out / f"{name}.yaml", out / name, progress=True)
    settings = _settings(workers, (2, 3) if place == 0 else ())
    run.measure(scale.directions[place], settings=settings)
    n, held = scale.retrainings[place], scale.heldout[place]
    if place == 0:
        run.measure(retrain=n, design="random", heldout=_other_sets(run, n, held, settings), settings=settings)
    else:
        run.measure(retrain=n, heldout=held, settings=settings)
    return run


def _other_sets(run: TrainingRun, fitted: int, n: int, settings: MeasureSettings) -> list[list[str]]:
    """The next n sets of the random design that are not among those that are fitted."""
    rows = run.design("random", 20 * (fitted + n), settings)
    known = {row.tobytes() for row in rows[:fitted]}
    new = dict.fromkeys(row.tobytes() for row in rows if row.tobytes() not in known)
    found = [np.frombuffer(row) for row in new][:n]
    names = np.array(run.recipe.unit_names)
    return [names[row > 0].tolist() for row in found]


def _verify_words(
    run: TrainingRun, queries: Sequence[str], words: dict[str, list[str]], scale: Scale, workers: int
) -> tuple[Verification, Verification]:
    """Sets of all words of a source, then sets of one word each."""
    ids = {id.split(":")[1]: id for id in run.recipe.ids}
    whole = [[ids[word] for word in found] for found in words.values()]
    alone = {run.recipe.unit_names[int(row.argmax())] for row in run.bank.vectors_of("heldout") if row.sum() == 1}
    chosen = np.random.default_rng(0).choice(sorted(set(ids.values()) - alone), scale.checked, replace=False)
    found = run.verify(queries, [*whole, *([str(id)] for id in chosen)], settings=_settings(workers))
    return _part(found, slice(0, len(whole))), _part(found, slice(len(whole), None))


def _part(found: Verification, sets: slice) -> Verification:
    arrays = {name: getattr(found, name)[:, sets] for name in ("base", "effect", "std", "actual", "factor", "outside")}
    marks = {name: getattr(found, name)[sets] for name in ("without", "untrained", "never", "measured")}
    return replace(found, **arrays, **marks)


def _sections(own: list[dict[str, Any]], lines: list[tuple[Any, ...]], scale: Scale) -> list[str]:
    note = (
        "A character model of some 4,000 parameters was trained on words of six sources. Each query is a word that it has not "
        f"seen. From {scale.directions[0]} jets, and retrainings without two or three sources at a time (never one alone), "
        "its loss was predicted for training without the source that it belongs to; then the model was retrained."
    )
    more = (
        "A set counts as inside if the retrained value lies in the 95 % interval. With words as units, a whole source is far "
        "from anything that was measured: expect its effect to be underestimated, and intervals that are too narrow. Choose as "
        "units what you want to leave out, and hold out retrainings of such sets."
    )
    return [
        heading("What would it do without one source?", note),
        verdict(told(own)),
        interval_chart(own),
        prediction_table(own).plain().html(),
        heading("All predictions against retraining", more),
        Table(["", *HEADERS], lines).html(),
    ]


def _top_words(run: TrainingRun, queries: Sequence[str]) -> list[str]:
    """The words whose removal is predicted to raise a query's loss most."""
    found = run.predict(queries, [[id] for id in run.recipe.ids])
    rows = []
    for query, effects in zip(queries, found.effect, strict=True):
        best = np.argsort(-effects)[:5]
        named = ", ".join(f"{found.without[i].split(':')[1]} ({effects[i]:+.3f})" for i in best)
        rows.append((query, named))
    note = (
        "Predicted rise of the loss in nats when one word is left out, of all words; these were not retrained. Rows found by "
        "search are left out in the same way from a model that was trained on them: leaveout predict RUN --without ID,ID."
    )
    return [heading("Which single words hold a query up?", note), Table(["query", "words"], rows).html()]
