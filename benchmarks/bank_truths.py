"""The truth of the banks that attribution is judged on, made once and kept: what retraining without random halves gives.

    python benchmarks/bank_truths.py --banks stories neox qwen gemma olmo --work bench/banks
    python benchmarks/bank_truths.py --smoke

benchmarks/truth/NAME.npz then says of a bank (see `influence_banks`) which rows every half lacks, and what each query loses
in both data orders, so that scores are judged without retraining anew: `read_truth`. Two retrainings per half are the
cost, 9 to 18 CPU minutes a bank; a killed run goes on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_banks import BANKS, TruthBank
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.evaluation.truth import Truth, second_order, subset_truth
from leaveout.metrics import noise_ceiling
from leaveout.training.queries import Query
from measuring import RESULTS, arguments, write_result

TRUTHS = Path(__file__).resolve().parent / "truth"
SIZES, SEED = (20, 3), 0  # rows and queries of each group
HALVES = {"stories": 64, "neox": 64, "qwen": 48, "gemma": 30, "olmo": 36, "smoke": 6}


@dataclass(frozen=True)
class JudgedBank:
    """A bank's run with its queries, and its truth."""

    bank: TruthBank
    run: TrainingRun
    truth: Truth

    @property
    def queries(self) -> list[Query]:
        return queries_of(self.bank)


def queries_of(bank: TruthBank) -> list[Query]:
    return [Query(row, name=row.id) for row in bank.queries]


def trained(name: str, work: Path) -> tuple[TruthBank, TrainingRun]:
    """The bank and its run, trained where it was not before."""
    work.mkdir(parents=True, exist_ok=True)
    bank = BANKS[name](work, (8, 2) if name == "smoke" else SIZES, SEED)
    return bank, TrainingRun.train(bank.recipe, work / f"run-{name}")


def make_truth(name: str, work: Path, workers: int, out: Path) -> dict[str, Any]:
    """Retrains without every half, in both orders, and writes what comes of it; the facts of the bank."""
    bank, run = trained(name, work)
    second, began = second_order(run), time.process_time()
    truth = subset_truth(
        run, queries_of(bank), HALVES[name], second=second, seed=SEED, settings=MeasureSettings(workers=workers)
    )
    assert truth.ceiling is not None
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out / f"{name}.npz",
        removed=np.packbits(truth.removed, axis=1),
        rows=np.array([row.content_hash for row in bank.recipe.examples]),
        queries=np.array([row.content_hash for row in bank.queries]),
        losses=np.stack(truth.orders).astype(np.float32),
    )
    return {
        "bank": name, "rows": len(bank.recipe.examples), "queries": len(bank.queries), "halves": len(truth.removed),
        "seed": SEED, "ceiling": truth.ceiling.ceiling._asdict(), "recipe": bank.recipe.hash(),
        "cpu_seconds_here": time.process_time() - began,
        "cpu_seconds": run.bank.info()["cpu_seconds"] + second.bank.info()["cpu_seconds"],
    }  # fmt: skip


def read_truth(name: str, bank: TruthBank, place: Path = TRUTHS) -> Truth:
    """The kept truth of a bank. Raises: ValueError if it is of other rows or queries."""
    with np.load(place / f"{name}.npz") as kept:
        for what, rows in (("rows", bank.recipe.examples), ("queries", bank.queries)):
            if kept[what].tolist() != [row.content_hash for row in rows]:
                raise ValueError(f"The kept truth of {name} is of other {what}: run bank_truths.py --banks {name}.")
        removed = np.unpackbits(kept["removed"], axis=1, count=len(kept["rows"])).astype(bool)
        first, second = kept["losses"].astype(np.float64)
    return Truth(removed, (first + second) / 2, noise_ceiling(first, second, SEED), (first, second))


def judged(name: str, work: Path, place: Path = TRUTHS) -> JudgedBank:
    """A bank trained in `work`, and its kept truth."""
    bank, run = trained(name, work)
    return JudgedBank(bank, run, read_truth(name, bank, place))


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--banks", nargs="+", choices=[name for name in HALVES if name != "smoke"], default=list(HALVES)[:5]
    )
    parser.add_argument("--work", type=Path, help="where runs are kept; default: a temporary directory")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        place = (args.out or Path(scratch)) if args.smoke else TRUTHS
        for name in ["smoke"] if args.smoke else args.banks:
            facts = make_truth(name, work / name, args.workers, place)
            if not args.smoke:
                read_truth(name, trained(name, work / name)[0])
            print(
                write_result(
                    args.out or RESULTS, f"truth_{name}.json", {**facts, "repeats": facts["queries"]}, args
                ).name
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
