"""What a model would be without some of its data: predictions with standard deviations, what real retrainings say of
them, and curves over the share removed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.deletion.noise import quantile
from leaveout.errors import choices, needs
from leaveout.metrics import pearson, spearman
from leaveout.tables import Table, Tabular, shorten
from leaveout.words import agreement_told, retrained_told

SAME_RUN, NEW_RUN = "same run", "new run"
MEANS = {
    SAME_RUN: "Without means the same run: weight 0 in the same batches.",
    NEW_RUN: "Without means a new run: rows gone, batches packed anew, another order. The value with all data is the mean "
    "of runs, and the interval is that of one run without the set.",
}
"""What "without" means, in a sentence."""
UNCERTAIN = "cannot tell from zero"
A_SEED = "not distinguishable from a new seed"
NEVER = "never trained on"
UNTESTED = "No held-out retraining has tested these intervals, which may be too narrow: `leaveout measure RUN --heldout 16` does."
OUTSIDE = "outside of what was tested"
UNITS = {"loss": "nats", "logit": "logits", "margin": "logits"}
"""The unit of what a query measures, where it has one."""
POWER = 2 * (1.959964 + 0.841621) ** 2
"""Runs with and runs without a set that show an effect of one run's deviation, at 95 % and a power of .8: so many of each."""


@dataclass(frozen=True)
class Prediction(Tabular):
    """Predicted values of queries without deletion sets; `print` shows them as a table.

    base     values under the model trained on everything [query, set]; of new runs the mean of those with all data
    effect   predicted change [query, set], in the unit of the query (nats for a loss; positive: the loss rises); of new
             runs the mean over orders
    std      its standard deviation [query, set], times `factor`
    factor   what held-out retrainings say that it is multiplied by [query, set]
    outside  whether a set is larger, more alike, or takes more of a query's help than all that were held out [query, set]
    untrained   the units of each set that are in no step: nothing changes without them in the same run; where new runs draw
                other rows the error is unknown
    never    whether a set holds nothing but such units
    meaning  SAME_RUN or NEW_RUN: what "without" means
    run_std  standard deviation of one run's value between orders [query, set], 0 for the same run; known with `freedom`
             degrees of freedom. Intervals of a new run hold both: they are those of one run without the set.
    measures what each query measures: `loss`, `probability`, `logit`, `margin`, or the name of a function
    chosen   the query that each set was chosen for, by name; "" where it was for none
    runs     new runs whose mean the intervals are of
    heldout  how many held-out retrainings the intervals were tested by; None where all sets were measured themselves
    """

    queries: tuple[str, ...]
    without: tuple[str, ...]
    base: np.ndarray
    effect: np.ndarray
    std: np.ndarray
    estimator: str
    factor: np.ndarray
    outside: np.ndarray
    untrained: tuple[tuple[str, ...], ...] = ()
    never: tuple[bool, ...] = ()
    meaning: str = SAME_RUN
    run_std: np.ndarray | float = 0.0
    freedom: float = math.inf
    measures: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    heldout: int | None = None
    runs: int = 1

    @property
    def mean(self) -> np.ndarray:
        """Predicted values [query, set]."""
        return self.base + self.effect

    @property
    def uncertain(self) -> np.ndarray:
        """Where the 95 % interval of the effect holds zero [query, set]."""
        return np.abs(self.effect) < self.reach()

    @property
    def drowned(self) -> np.ndarray:
        """Where it does because runs differ more than the prediction is wrong [query, set]."""
        return self.uncertain & (self.run_std > self.std)

    @property
    def seeds(self) -> np.ndarray:
        """Runs with and as many runs without a set that would show the predicted effect [query, set]: at 95 %, power .8."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.ceil(POWER * np.square(self.run_std / np.abs(self.effect)))

    def reach(self, level: float = 0.95, runs: int | None = None) -> np.ndarray:
        """Half the width of the central interval [query, set]; of new runs that of the mean of so many (default: `self.runs`)."""
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        noise = np.square(self.run_std) / (self.runs if runs is None else runs)
        both = np.square(self.std) + noise
        with np.errstate(divide="ignore", invalid="ignore"):
            # Welch and Satterthwaite: only the noise was estimated by few.
            freedom = np.where(noise > 0, self.freedom * np.square(both / noise), np.inf)
        return quantile((1 + level) / 2, freedom) * np.sqrt(both)

    def interval(self, level: float = 0.95, runs: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the central interval of the predicted value, both [query, set]; runs: see `reach`."""
        reach = self.reach(level, runs)
        return self.mean - reach, self.mean + reach

    def lines(self) -> Iterator[dict[str, Any]]:
        """One JSON object per query and deletion set; an unknown standard deviation is null."""
        reach, drowned, seeds = self.reach(), self.drowned, self.seeds
        run_std = np.broadcast_to(self.run_std, self.std.shape)
        for i, query in enumerate(self.queries):
            for j, without in enumerate(self.without):
                known, never = bool(np.isfinite(self.std[i, j])), bool(self.never and self.never[j])
                measure = self.measures[i] if self.measures else "loss"
                line: dict[str, Any] = {
                    "query": query, "measure": measure, "unit": UNITS.get(measure, ""), "without": without,
                    "meaning": self.meaning, "base": float(self.base[i, j]),
                    "predicted": float(self.mean[i, j]), "effect": float(self.effect[i, j]),
                    "std": 0.0 if never else float(self.std[i, j]) if known else None,
                    "reach": float(reach[i, j]) if known else None, "estimator": self.estimator,
                    "verdict": NEVER if never else A_SEED if drowned[i, j] else UNCERTAIN if self.uncertain[i, j]
                    else "rises" if self.effect[i, j] > 0 else "falls",
                }  # fmt: skip
                if self.heldout is not None:
                    line["heldout"] = self.heldout
                if self.runs > 1:
                    line["runs"] = self.runs
                if self.meaning == NEW_RUN:
                    line["run_std"] = float(run_std[i, j])
                if line["verdict"] == A_SEED and np.isfinite(seeds[i, j]):
                    line["seeds"] = int(seeds[i, j])
                if self.chosen and self.chosen[j]:
                    line["chosen_for"] = self.chosen[j]
                if self.outside[i, j]:
                    line["outside"] = OUTSIDE
                if self.untrained and self.untrained[j]:
                    line["never_trained_on"] = list(self.untrained[j])
                yield line

    def own_lines(self) -> list[dict[str, Any]]:
        """The lines without those of a set that was chosen for another query."""
        return [line for line in self.lines() if line.get("chosen_for", line["query"]) == line["query"]]

    def table(self, all_pairs: bool = False) -> Table:
        """What was found in a sentence or two, and a row a query and set; `all_pairs`: also for sets that were chosen for another
        query."""
        return prediction_table([*self.lines()] if all_pairs else self.own_lines())


@dataclass(frozen=True, kw_only=True)
class Verification(Prediction):
    """A prediction with the values of really retrained models, and what they say about it.

    actual    values [query, set], of new runs the mean of `runs`
    measured  whether a set was measured before it was predicted [set], so that its actual value proves nothing
    """

    actual: np.ndarray
    measured: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """Whether the actual value lies in the 95 % interval [query, set]."""
        low, high = self.interval()
        return (low <= self.actual) & (self.actual <= high)

    @property
    def new(self) -> np.ndarray:
        """Whether a set was not measured before it was predicted [set]; only these prove anything."""
        return ~self.measured

    def lines(self) -> Iterator[dict[str, Any]]:
        """Those of the prediction, with the actual values."""
        inside = self.inside
        for (i, j), line in zip(np.ndindex(inside.shape), super().lines(), strict=True):
            known = bool(np.isfinite(self.std[i, j]))
            yield line | {
                "actual": float(self.actual[i, j]), "inside": bool(inside[i, j]) if known else None,
                "already_measured": bool(self.measured[j]),
            }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Agreement of predicted and actual effects, over the sets that were not measured before.

        pearson, spearman  over deletion sets, mean over queries; None with fewer than 3 sets
        relative_error     median of |predicted - actual| / |actual| over all pairs
        coverage           share of actual values inside the 95 % interval, where it is finite; None if nowhere
        sets, already_measured  how many sets prove something, and how many do not
        """
        new = self.new
        actual, predicted = (self.actual - self.base)[:, new], self.effect[:, new]
        known = np.isfinite(self.std)[:, new]  # an infinite interval covers everything and says nothing
        return {
            **agreement(predicted, actual),
            "coverage": float(self.inside[:, new][known].mean()) if known.any() else None,
            "queries": len(self.queries),
            "sets": int(new.sum()),
            "already_measured": int((~new).sum()),
        }

    def table(self, all_pairs: bool = False) -> Table:
        found = super().table(all_pairs)
        return replace(found, notes=[*found.notes, *agreement_told(self.summary())])


def agreement(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float | None]:
    """Pearson and Spearman over sets, mean over queries, and the median relative error; both arrays [query, set]."""
    out: dict[str, float | None] = {"pearson": None, "spearman": None}
    if actual.shape[1] >= 3:
        out["pearson"] = _known_mean(list(pearson(predicted, actual)))
        out["spearman"] = _known_mean(list(spearman(predicted, actual)))
    some = np.abs(actual) > 0
    errors = np.abs(predicted - actual)[some] / np.abs(actual)[some]
    return {**out, "relative_error": float(np.median(errors)) if len(errors) else None}


def _known_mean(values: list[float]) -> float | None:
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else None


def prediction_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The table of lines of a prediction (`Prediction.lines`): the effects first, and the real ones if there are any."""
    units, proven = {line["unit"] for line in lines}, bool(lines) and "actual" in lines[0]
    one = next(iter(units)) if len(units) == 1 else ""
    effect, rows = f"effect{one and f' ({one})'} [95 % interval]", []
    of_runs = bool(lines) and all("run_std" in line for line in lines)
    for line in lines:
        unit = "" if one or not line["unit"] else f" {line['unit']}"
        row = (shorten(line["query"], 40), line["without"], f"{_effect(line)}{unit}")
        if of_runs:
            row += ("unknown" if line["std"] is None else line["std"], line["run_std"])
        verdict = ", ".join(line[key] for key in ("verdict", "outside") if key in line) + seeds_of(line)
        if proven:
            inside = "" if line["std"] is None else ", inside" if line["inside"] else ", outside"
            inside = ", measured before" if line.get("already_measured") else inside
            rows.append((*row, f"{line['actual'] - line['base']:+.3g}{unit}{inside}", line["base"], verdict))
        else:
            rows.append((*row, line["base"], line["predicted"], verdict))
    more = ["retrained", "all data"] if proven else ["all data", "without it"]
    notes = meanings_told(lines)
    if any(line.get("heldout") == 0 and line["std"] for line in lines):
        notes.append(UNTESTED)
    deviations = ["sd of the mean", "sd of runs"] if of_runs else []
    headers, said = ["query", "left out", effect, *deviations, *more, "verdict"], told(lines)
    if len({line["query"] for line in lines}) == 1:  # named once
        headers, rows, said = headers[1:], [row[1:] for row in rows], f"{_named(lines[0]['query'])}: {said}"
    return Table(headers, rows, said, notes)


def _named(query: str) -> str:
    """A query at the head of a sentence: in quotation marks, unless it is one word."""
    name = shorten(query, 60)
    return name if name.isalnum() else f"“{name}”"


def meanings_told(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What "without" means in lines of a prediction, in a sentence each."""
    found: list[str] = []
    for meaning, runs in dict.fromkeys((line["meaning"], line.get("runs", 1)) for line in lines):
        said = MEANS[meaning]
        found.append(said if runs == 1 else said.replace("of one run", f"of the mean of {runs} runs"))
    return found


def _effect(line: Mapping[str, Any]) -> str:
    half = reach(line)
    if half is None:
        return f"{line['effect']:+.3g} (error unknown)"
    return f"{line['effect']:+.3g} [{line['effect'] - half:+.3g}, {line['effect'] + half:+.3g}]"


def told(lines: Sequence[Mapping[str, Any]]) -> str:
    """What lines of a prediction say, in a sentence or two: the effect, or how many can be told from zero and the largest of
    them; and how many retrained values lie where they were predicted."""
    if not lines:
        return "Nothing was asked."
    clear = [line for line in lines if line["verdict"] in ("rises", "falls") and line["std"] is not None]
    first = sentence(lines[0])
    if len(lines) > 1:
        first = f"{len(clear)} of {len(lines)} effects can be told from zero."
        if clear:
            largest = max(clear, key=lambda line: (line["unit"] == clear[0]["unit"], abs(line["effect"])))
            several = len({line["query"] for line in lines}) > 1
            of = f", of “{shorten(largest['query'], 40)}”" if several else ""
            first += f" The largest{of}: {sentence(largest, brief=True)}"
    return f"{first} {retrained_told(lines)}" if "actual" in lines[0] else first


def sentence(line: Mapping[str, Any], brief: bool = False) -> str:
    """One line of a prediction in words, with its unit where it has one; `brief`: without the base."""
    what, unit = line["measure"], f" {line['unit']}" if line["unit"] else ""
    half, effect = reach(line), line["effect"]
    if line["verdict"] == NEVER:
        return f"Nothing would change: the run was never trained on {line['without']}."
    if half is None:
        return (
            f"Without {line['without']} the {what} would be about {line['predicted']:.3g}{unit}, with an unknown error."
        )
    ends = f"95 % interval {effect - half:+.3g} to {effect + half:+.3g}"
    outside = f", {line['outside']}" if line.get("outside") else ""
    if line["verdict"] == A_SEED:
        return (
            f"Without {line['without']} the {what} of a new run would change by less than runs differ: {A_SEED}"
            f"{seeds_of(line)} ({ends}{unit}{outside})."
        )
    if line["verdict"] == UNCERTAIN:
        return (
            f"Without {line['without']} the {what} would hardly change, as far as can be told ({ends}{unit}{outside})."
        )
    change = f"{'rise' if effect > 0 else 'fall'} by {abs(effect):.3g}{unit}"
    base = "" if brief else f", from {line['base']:.3g} to {line['predicted']:.3g}"
    return f"Without {line['without']} the {what} would {change} ({ends}{outside}){base}."


def reach(line: Mapping[str, Any]) -> float | None:
    """Half the width of the 95 % interval of a line, None where the standard deviation is unknown."""
    return line["reach"]


def seeds_of(line: Mapping[str, Any]) -> str:
    """How many runs would show the effect of a line, in words; "" where it is not drowned by noise."""
    return f" ({line['seeds']:,} runs each way would show it)" if "seeds" in line else ""


def meaning_of(name: str | None, measured: bool) -> str:
    """What "without" means: as asked (same-run, new-run), else a new run where the noise of runs was measured.

    Raises: ValueError for another name.
    """
    if name is None:
        return NEW_RUN if measured else SAME_RUN
    meanings = {"same-run": SAME_RUN, "new-run": NEW_RUN}
    if name not in meanings:
        raise ValueError(f"meaning is {name!r}: {choices(name, meanings)}")
    return meanings[name]


@dataclass(frozen=True)
class Curve(Tabular):
    """A prediction at shares [points] removed of one deletion set; `prediction` has one column a share."""

    without: str
    shares: np.ndarray
    prediction: Prediction

    def table(self) -> Table:
        found = self.prediction.table()
        headers = ["share left out" if header == "left out" else header for header in found.headers]
        return replace(found, headers=headers, title=f"Without {self.without}")


def require_plots() -> None:
    """Raises: UnsupportedError without matplotlib (extra `plots`)."""
    needs("matplotlib", "A curve", extra="plots")


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#806000")  # told apart by who sees no red or green
DASHES = ("-", "--", "-.", ":")


def draw_curves(curves: list[Curve], path: Path) -> None:
    """A picture of the curves with their 95 % bands: one panel per query, at most eight, below each other.

    Raises: UnsupportedError without matplotlib (extra `plots`).
    """
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = curves[0].prediction
    queries = asked.queries[:8]
    figure, axes = pyplot.subplots(len(queries), figsize=(5.4, 3 * len(queries)), squeeze=False)
    for i, (panel, query) in enumerate(zip(axes[:, 0], queries, strict=True)):
        for n, curve in enumerate(curves):
            low, high = curve.prediction.interval()
            colour, shares = COLOURS[n % len(COLOURS)], 100 * curve.shares
            dashes = DASHES[n % len(DASHES)]
            panel.plot(
                shares, curve.prediction.mean[i], dashes, color=colour, label=f"without {shorten(curve.without, 40)}"
            )
            panel.fill_between(shares, low[i], high[i], color=colour, alpha=0.15, linewidth=0)
        measure = asked.measures[i] if asked.measures else "loss"
        unit = UNITS.get(measure)
        panel.set(ylabel=f"{measure} ({unit})" if unit else measure, title=shorten(query, 48), xlim=(0, 100))
        panel.locator_params(axis="y", nbins=5)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, labelcolor="linecolor")
    axes[-1][0].set_xlabel("% left out, with the 95 % interval")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
