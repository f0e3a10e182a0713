"""What would a model of names do without some of the names it learned from?

    python examples/names.py [NAMES.txt] [--n 200] [--out DIR]

Trains the character model of arXiv 2604.07328 twice: once with every name as a unit (the things that can be left out),
once with every first letter as one. Each time: train, plan what to measure, measure, predict, and prove it by
retraining. names.yaml is the first recipe for the command line.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from showing import show

from leaveout.deletion.plan import Budget
from leaveout.deletion.predict import Verification
from leaveout.deletion.run import TrainingRun
from leaveout.training.recipe import Recipe

HERE = Path(__file__).parent
QUERIES = ["max", "maxwell", "roxanne", "viktor", "wilma"]


def without_names(recipe: Recipe, out: Path, seconds: float) -> Verification:
    """Deletion sets of single documents: all names with an 'x', all that end with 'a', ..."""
    run = TrainingRun.train(recipe, out)  # trains once; the same call later reopens the directory
    names = {row.id: row.text for row in recipe.examples}
    letters = [[id for id, name in names.items() if letter in name] for letter in "xwzfkv"]
    endings = [[id for id, name in names.items() if name.endswith(end)] for end in ("a", "y", "er", "in", "ld")]
    sets = [ids for ids in letters + endings if ids]
    spend(run, sets, seconds)
    return run.verify(QUERIES, sets)


def without_letters(recipe: Recipe, out: Path, seconds: float) -> Verification:
    """The same training with one unit for each first letter: no name that starts with 'm', or with 'm' or 'r', ..."""
    by_letter = recipe.grouped([row.text[0] for row in recipe.examples])
    run = TrainingRun.train(by_letter, out)
    known = set(by_letter.unit_names)
    wanted = ("mr", "st", "ab", "bcd", "aeiou", "jkl", "mnr")
    sets = [letters for word in wanted if len(letters := [u for u in word if u in known]) > 1]
    spend(run, sets, seconds)
    return run.verify(QUERIES, sets)


def spend(run: TrainingRun, sets: list[list[str]], seconds: float) -> None:
    """Asks the planner what to measure within a number of seconds, and measures it."""
    # For a few named sets it is cheapest to retrain them. Here we want answers about sets that nobody has named yet.
    plan = run.plan(QUERIES, sets, Budget(seconds, examples=True, repeats=0))  # in the same run
    print(f"\nwhat {plan.budget:g} seconds can buy, best first\n{plan}")
    print(f"measuring: {plan.best.name}")
    run.measure(**plan.best.arguments)


def main(argv: Sequence[str] | None = None) -> list[Verification]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", type=Path, nargs="?", default=HERE / "names.txt", help="a text file, one name a line")
    parser.add_argument("--n", type=int, default=200, help="how many names to train on")
    parser.add_argument("--budget", type=float, default=10, help="seconds of measuring, for each of the two runs")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a directory that is removed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    recipe = Recipe.microgpt(args.names.read_text().split(), n=args.n)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        found = [
            without_names(recipe, out / "documents", args.budget),
            without_letters(recipe, out / "letters", args.budget),
        ]
    show("Without some names (loss of a name, nats per letter)", found[0])
    show("Without the names of some first letters", found[1])
    return found


if __name__ == "__main__":
    main()
