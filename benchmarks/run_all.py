"""All tables and pictures of the README and the docs, from one command: `make bench`.

    python benchmarks/run_all.py [--work bench] [--jobs 2] [--only NAME ...]

Steps that measure a rate run alone, then the others on --jobs cores, one thread each, the longest first. A step that has
finished leaves a mark in --work, with the seconds it took, and is not run again; a step that was killed goes on from what it
kept there (and its seconds are those of the last go). Remove --work to start anew. Seconds are written to
results/bench_steps.json. Needs the corpora: see corpora.py. A failed step does not stop the others: its log is named at
the end, and exit is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from corpora import folder

ROOT = Path(__file__).resolve().parents[1]
NAMES = os.path.relpath(folder() / "names" / "names.txt", ROOT)  # no result names a directory of this machine
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Step:
    """A script with its arguments; {work} is the directory `place` (default: its own), alone: it measures time.

    Steps of one place use what the earlier ones kept there, and run one after another.
    """

    script: str
    arguments: str = ""
    alone: bool = False
    place: str = ""


STEPS = {
    "jet speed": Step("jet_speed", f"--all --repeats 3 --json {RESULTS}/jets_speed.json", alone=True),
    "retraining": Step("loo_retraining", f"--data {NAMES} --json {RESULTS}/jets_loo_retraining.json", alone=True),
    "store": Step("store_speed", alone=True),
    "scale": Step("scale_speed", alone=True),
    "search": Step("search_speed", alone=True),
    "search, what is usual": Step("search_speed", "--part usual --work {work}", alone=True),
    "search, a million rows": Step("search_speed", "--part million --repeats 3 --work {work}", alone=True),
    "index cost": Step("index_cost", "--repeats 1", alone=True),
    "index cost by length": Step("index_cost", "--lengths 20 50 100 200 400 1000 2000 4000 --repeats 1", alone=True),
    "streaming": Step("streaming", "--work {work}", alone=True),
    "truth bank": Step("truth_bank", alone=True),
    "influence, olmo": Step("influence", "--bank olmo --subsets 36 --qld 0 --exact 4 --work {work}", place="olmo"),
    "backdoor": Step("backdoor", "--work {work}"),
    "influence, qwen": Step("influence", "--bank qwen --subsets 48 --work {work}", place="qwen"),
    "influence, neox": Step("influence", "--bank neox --work {work}", place="neox"),
    "priors, neox": Step("influence_priors", "--bank neox --work {work}", place="neox"),
    "figure 1": Step(
        "figure1", f"--data {NAMES} --directions 8 --json {RESULTS}/jets_figure1.json --picture docs/evidence/figure1.png"
    ),
    "influence, gemma": Step(
        "influence", "--bank gemma --subsets 30 --qld 0 --exact 10 --no-variants --work {work}", place="gemma"
    ),
    "influence, stories": Step("influence", "--bank stories --work {work}", place="stories"),
    "priors, stories": Step("influence_priors", "--bank stories --work {work}", place="stories"),
    "accuracy, documents": Step(
        "deletion_accuracy",
        f"--names {NAMES} --json {RESULTS}/deletion_accuracy_documents.json --work {{work}}", place="documents",
    ),
    "regimes": Step(
        "regimes",
        f"--names {NAMES} --accuracy {RESULTS}/deletion_accuracy_documents.json --json {RESULTS}/deletion_regimes.json "
        "--picture docs/evidence/regimes.png --work {work}", place="documents",
    ),
    "selection": Step("selection", "--picture docs/evidence/selection.png --work {work}"),
    "selection, olmo": Step("selection", "--model OLMo-2 --picture docs/evidence/selection_olmo.png --work {work}"),
    "domains": Step("domains", "--work {work}"),
    **{
        f"coverage, {case}": Step("coverage", f"--cases {case} --work {{work}}")
        for case in ("names", "digits", "lora", "cnn", "prose", "smollm2")
    },
    "accuracy, letters": Step(
        "deletion_accuracy",
        f"--names {NAMES} --units letters --json {RESULTS}/deletion_accuracy_letters.json --work {{work}}",
    ),
    "choices": Step("prior_choices", f"--names {NAMES} --json {RESULTS}/deletion_prior_choices.json --work {{work}}"),
    "strong sets": Step("strong_sets", f"--names {NAMES} --json {RESULTS}/strong_sets.json --work {{work}}"),
    "bank truths": Step("bank_truths", "--work {work}", place="banks"),
    "codes, lds": Step("codes", "--part lds --work {work}", place="banks"),
    "lengths": Step("lengths", "--work {work}", place="banks"),
    "refined": Step("refined", "--work {work}", place="banks"),
    "coherent sets": Step("coherent_sets", "--work {work}", place="banks"),
    "learned rows": Step("learned_rows", "--work {work}", place="banks"),
    "preferences": Step("preferences", "--work {work}", place="preferences"),
    "controls": Step("controls", "--work {work}"),
    "codes, recall": Step("codes", "--part recall"),
    "retrieval": Step("retrieval"),
    "usual": Step("usual", "--work {work}"),
    "planted fact": Step("planted_fact"),
    "figure 2": Step("figure2", f"--data {NAMES} --json {RESULTS}/jets_figure2.json --picture docs/evidence/figure2.png"),
}  # fmt: skip


def carry_out(name: str, work: Path) -> bool:
    """Runs a step unless it is marked as done; whether it is done now."""
    step, own = STEPS[name], work / name.replace(", ", "-").replace(" ", "-")
    done, place = own.with_suffix(".done"), work / (step.place or own.name)
    if done.exists():
        return True
    place.mkdir(parents=True, exist_ok=True)
    began = time.time()
    # Relative to the root, so that no result names a directory of this machine.
    arguments = step.arguments.format(work=os.path.relpath(place, ROOT)).split()
    with own.with_suffix(".log").open("a") as log:
        command = [sys.executable, f"benchmarks/{step.script}.py", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(started.pid, 0)  # with the seconds of this child alone
    started.returncode = code = os.waitstatus_to_exitcode(status)
    seconds = {"wall": time.time() - began, "cpu": usage.ru_utime + usage.ru_stime, "began": began, "alone": step.alone}
    print(f"{name}: {'FAILED' if code else 'done'}, {seconds['wall']:.0f} s, {seconds['cpu']:.0f} CPU s", flush=True)
    if not code:
        done.write_text(json.dumps(seconds))
    return not code


def write_seconds(work: Path) -> None:
    """Seconds of the steps that are done, and on two cores: those alone one by one, the rest shared out."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(work.glob("*.done"))}
    alone = sum(step["cpu"] for step in found.values() if step["alone"])
    rest = sum(step["cpu"] for step in found.values() if not step["alone"])
    result = {"all": len(STEPS), "steps": found, "cpu_seconds_alone": alone, "cpu_seconds_of_the_rest": rest}
    (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
    (ROOT / RESULTS / "bench_steps.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{alone:.0f} CPU s alone, {rest:.0f} CPU s of other steps")


def one_after_another(names: Sequence[str], work: Path) -> dict[str, bool]:
    return {name: carry_out(name, work) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "bench", help="logs, marks, and what steps keep")
    parser.add_argument("--jobs", type=int, default=2, help="steps at a time, of those that do not measure time")
    parser.add_argument("--only", nargs="+", choices=sorted(STEPS), metavar="NAME", help=", ".join(STEPS))
    args = parser.parse_args(argv)
    work = args.work.resolve()
    wanted = [name for name in STEPS if args.only is None or name in args.only]
    fine = one_after_another([name for name in wanted if STEPS[name].alone], work)
    chains: dict[str, list[str]] = {}
    for name in wanted:
        if not STEPS[name].alone:
            chains.setdefault(STEPS[name].place or name, []).append(name)
    with ThreadPoolExecutor(args.jobs) as pool:
        for part in pool.map(lambda names: one_after_another(names, work), chains.values()):
            fine |= part
    write_seconds(work)
    for command in ("tables.py", "scale_cost.py", "influence_picture.py --picture docs/evidence/influence.png"):
        ended = subprocess.run([sys.executable, *f"benchmarks/{command}".split()], check=False, cwd=ROOT)
        fine[command] = ended.returncode == 0
    failed = [name for name, good in fine.items() if not good]
    if failed:
        print(f"failed: {', '.join(failed)}; logs are in {work}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
