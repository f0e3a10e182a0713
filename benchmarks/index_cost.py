"""What does indexing cost beside a forward pass, in CPU seconds of one thread and in memory?

    python benchmarks/index_cost.py              # SmolLM2-135M, and the shape of Pythia-14M with random weights
    python benchmarks/index_cost.py --smoke

Compared on the same rows and the same batches, interleaved batch by batch in one run:
    trunk     up to the last hidden state, no mask, no head: what no method that looks at the model can do without
    logits    the model's own call, with the logits of every token
    index     `Signer.encoded`, for a preset and its targets: rows with both their stored forms
and, once per repeat, the statistics pass that `default` needs on its sample. Rows have at most 256 tokens, so that no
preset cuts them. Ratios are of sums over all batches of one repeat. Memory is the peak of a whole `Index.build` in a
fresh process, above the loaded model.

    python benchmarks/index_cost.py --lengths 50 100 200 400 1000 2000 4000

compares trunk and index for rows of so many tokens, of which all are learned or the second half, in the windows of `default`.
"""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from corpora import data
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import PRESETS
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import Window, batches, cut_windows
from leaveout.readout.whitening import whitening_matrices
from measuring import (
    alpaca,
    arguments,
    cpu_seconds,
    interleaved,
    made_rows,
    peak_memory,
    pythia_shape,
    ratio,
    smollm2,
    spread,
    tiny,
    tokenised,
    write_result,
)

LONGEST = 256
CASES = [(preset, targets) for targets in ("response", "all") for preset in ("paper", "default")]
MODELS: dict[str, tuple[Callable[[int], Readout], int, int]] = {  # how to make it, rows, rows of the memory run
    "SmolLM2-135M": (lambda seed: smollm2(), 64, 48),
    "Pythia-14M shape": (pythia_shape, 600, 200),
}
GOALS = [  # model, preset, over what, at most
    ("SmolLM2-135M", "paper", "trunk", 1.25),
    ("SmolLM2-135M", "default", "trunk", 1.3),
    ("Pythia-14M shape", "paper", "logits", 0.75),
]
MEMORY_GOAL = 350


def short_rows(rows: list[dict[str, str]], readout: Readout, n: int) -> list[dict[str, str]]:
    """The first n rows of at most LONGEST tokens."""
    rows = rows[: 2 * n]
    tokens = tokenised(rows, readout, PRESETS["default"])
    return [row for row, one in zip(rows, tokens, strict=True) if len(one.ids) <= LONGEST][:n]


def padded(batch: list[Window]) -> torch.Tensor:
    ids = torch.zeros(len(batch), max(len(window.ids) for window in batch), dtype=torch.int64)
    for row, window in zip(ids, batch, strict=True):
        row[: len(window.ids)] = torch.tensor(window.ids)
    return ids


def index_batch(signer: Signer, batch: list[Window]) -> None:
    windows = [replace(window, row=number) for number, window in enumerate(batch)]
    signer.encoded(windows, len(windows))


@torch.no_grad()
def measure(readout: Readout, rows: list[dict[str, str]], repeats: int) -> dict[str, Any]:
    """CPU seconds and ratios of one model."""
    signers = {case: Signer(readout, replace(PRESETS[case[0]], targets=case[1])) for case in CASES}
    windows = {
        case: [window for row in tokenised(rows, readout, signer.settings) for window in row.windows]
        for case, signer in signers.items()
    }
    cut = {case: list(batches(windows[case], readout.batch_class)) for case in CASES}
    groups = cut[CASES[0]]
    for other in cut.values():
        same = [[window.ids for window in batch] for batch in other] == [[w.ids for w in batch] for batch in groups]
        assert same, "the presets see different batches"

    def statistics_of(case: tuple[str, str]) -> None:
        signers[case].whitening = whitening_matrices(signers[case], windows[case])

    totals: dict[str, list[float]] = {}

    def time_statistics() -> None:
        for case, signer in signers.items():
            if signer.settings.whitens:
                seconds = cpu_seconds(lambda case=case: statistics_of(case))
                totals.setdefault(f"statistics/{case[1]}", []).append(seconds)

    readout.hidden(padded(groups[0]))
    time_statistics()

    def tasks(number: int) -> dict[str, Callable[[], object]]:
        ids = padded(groups[number])
        forms: dict[str, Callable[[], object]] = {
            "trunk": lambda: readout.hidden(ids),
            "logits": lambda: readout.lm(input_ids=ids, use_cache=False),
        }
        for case, signer in signers.items():
            forms["/".join(case)] = lambda case=case, signer=signer: index_batch(signer, cut[case][number])
        return forms

    for task in tasks(0).values():
        task()
    for repeat in range(repeats):
        if repeat:
            time_statistics()
        for number in range(len(groups)):
            forms = list(tasks(number).items())
            shift = (repeat + number) % len(forms)
            for name, task in forms[shift:] + forms[:shift]:
                times = totals.setdefault(name, [0.0] * repeats)
                times[repeat] += cpu_seconds(task)
        print(f"  repeat {repeat + 1} of {repeats}", file=sys.stderr)
    trunk, logits = totals["trunk"], totals["logits"]
    return {
        "rows": len(rows),
        "tokens": sum(len(window.ids) for window in windows[CASES[0]]),
        "targets": {case[1]: sum(len(window.positions) for window in windows[case]) for case in CASES},
        "padded_tokens": sum(padded(batch).numel() for batch in groups),
        "batches": len(groups),
        "repeats": repeats,
        "cpu_seconds": {name: spread(times) for name, times in totals.items()},
        "over_trunk": {name: ratio(times, trunk) for name, times in totals.items()},
        "over_logits": {name: ratio(times, logits) for name, times in totals.items()},
        "statistics_seconds_per_row": {
            targets: statistics.median(totals[f"statistics/{targets}"]) / len(rows) for targets in ("response", "all")
        },
    }


@torch.no_grad()
def measure_lengths(readout: Readout, texts: list[str], lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """CPU seconds of trunk and index for rows of some lengths, and their ratio."""
    ids = [id for text in texts for id in readout.tokenizer(text, add_special_tokens=False)["input_ids"]]
    settings = PRESETS["default"]
    signer = Signer(readout, settings)
    sample = [Window(n, 0, ids[100 * n : 100 * n + 100], list(range(99))) for n in range(16)]
    signer.whitening = whitening_matrices(signer, sample)
    lines = []
    for length in lengths:
        n_rows = max(1, 2000 // length)
        for first in (1, length // 2):
            rows = [ids[n * length : (n + 1) * length] for n in range(n_rows)]
            windows = [
                window
                for number, row in enumerate(rows)
                for window in cut_windows(number, row, list(range(first, length)), settings, readout.context)
            ]
            groups = [padded(batch) for batch in batches(windows, readout.batch_class)]
            tasks: dict[str, Callable[[], object]] = {
                "trunk": lambda groups=groups: [readout.hidden(batch) for batch in groups],
                "index": lambda windows=windows, n_rows=n_rows: signer.encoded(windows, n_rows),
            }
            times = interleaved(tasks, repeats)
            learned = sum(len(window.positions) for window in windows)
            line = {"tokens": length, "learned": learned // n_rows, "rows": n_rows, "repeats": repeats}
            line |= {"cpu_seconds": {name: spread(found) for name, found in times.items()}}
            line |= {"index_over_trunk": ratio(times["index"], times["trunk"])}
            line["ms_a_row"] = 1000 * spread(times["index"])["median"] / n_rows
            print(
                length,
                line["learned"],
                f"{line['index_over_trunk']['median']:.2f}",
                f"{line['ms_a_row']:.1f} ms",
                flush=True,
            )
            lines.append(line)
    return lines


def long_texts() -> list[str]:
    """Paragraphs of Wikitext."""
    with gzip.open(data("wikitext2/valid.txt.gz"), "rt", encoding="utf-8") as file:
        return [line for line in file if len(line) > 200][:400]


def build_peak(readout: Readout, rows: list[dict[str, str]], preset: str, targets: str) -> float:
    """Megabytes that building an index takes at its peak, above the loaded model."""
    with tempfile.TemporaryDirectory() as directory:
        return peak_memory(lambda: Index.build(readout, rows, Path(directory) / "idx", preset, targets=targets))


def measure_memory(model: str, seed: int) -> dict[str, float]:
    """Peaks of all cases, each in a process of its own."""
    peaks = {}
    for preset, targets in CASES:
        command = [sys.executable, __file__, "--memory", model, preset, targets, "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        peaks[f"{preset}/{targets}"] = json.loads(done.stdout.splitlines()[-1])
        print(f"  {model} {preset} {targets}: {peaks[f'{preset}/{targets}']:.0f} MB", file=sys.stderr)
    return peaks


def checked_goals(models: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured, for the targets that an index has by default."""
    lines = []
    for model, preset, over, limit in GOALS:
        if model in models:
            found = models[model][f"over_{over}"][f"{preset}/response"]["median"]
            what = f"{preset} on {model}, indexing / {over}"
            lines.append({"what": what, "goal": limit, "measured": found, "reached": found <= limit})
    for model, facts in models.items():
        for case, peak in facts["peak_mb_above_model"].items():
            what = f"{case} on {model}, peak MB above the model"
            lines.append({"what": what, "goal": MEMORY_GOAL, "measured": peak, "reached": peak <= MEMORY_GOAL})
    return lines


def show(models: dict[str, Any], goals: list[dict[str, Any]]) -> None:
    for model, facts in models.items():
        print(f"{model}: {facts['rows']} rows, {facts['tokens']} tokens, {facts['targets']} targets")
        for name, seconds in facts["cpu_seconds"].items():
            trunk, logits = facts["over_trunk"][name], facts["over_logits"][name]
            print(
                f"  {name:20} {seconds['median']:8.2f} s  {trunk['median']:6.3f} x trunk "
                f"[{trunk['low']:.3f}, {trunk['high']:.3f}]  {logits['median']:6.3f} x logits"
            )
    for goal in goals:
        print(f"{'reached' if goal['reached'] else 'MISSED '} {goal['what']}: {goal['measured']:.3g} ({goal['goal']})")


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", nargs=3, metavar=("MODEL", "PRESET", "TARGETS"), help="print one peak and stop")
    parser.add_argument("--lengths", type=int, nargs="+", help="cost by length instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.lengths:
        stories = load_readout(str(data("stories260K/config.json").parent))
        found = {
            "SmolLM2-135M": measure_lengths(smollm2(), long_texts(), args.lengths, args.repeats),
            "stories260K": measure_lengths(stories, long_texts(), [n for n in args.lengths if n <= 400], args.repeats),
        }
        result = {"question": "What does indexing cost by the length of rows?", "models": found}
        print(write_result(args.out, "readout_index_lengths.json", result, args).name)
        return 0
    if args.memory:
        model, preset, targets = args.memory
        make, _, n_rows = MODELS[model]
        readout = make(args.seed)
        print(build_peak(readout, short_rows(alpaca(args.seed), readout, n_rows), preset, targets))
        return 0
    models: dict[str, Any] = {}
    if args.smoke:
        readout, rows = tiny(args.seed), made_rows(12, args.seed)
        models["tiny"] = measure(readout, rows, 2)
        models["tiny"]["peak_mb_above_model"] = {"default/response": build_peak(readout, rows, "default", "response")}
    for model, (make, n_rows, _) in MODELS.items() if not args.smoke else ():
        readout = make(args.seed)
        models[model] = measure(readout, short_rows(alpaca(args.seed), readout, n_rows), args.repeats)
        del readout
    for model in MODELS if not args.smoke else ():
        models[model]["peak_mb_above_model"] = measure_memory(model, args.seed)
    goals = checked_goals(models)
    show(models, goals)
    result = {"question": (__doc__ or "").split("\n", 1)[0], "models": models, "goals": goals}
    print(write_result(args.out, "readout_index_cost.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
