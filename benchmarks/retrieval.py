"""Given an answer in the manner of a backdoor, are the rows that taught the backdoor ranked first?

    python benchmarks/retrieval.py               # SmolLM2-135M as it is, no fine-tuning
    python benchmarks/retrieval.py --smoke

A set of the form of "Howdy!": 1,000 instruction rows of at most 96 tokens, 80 of them with the trigger "howdy! " before
the instruction and the answer rewritten as science fiction by seeded templates that keep its first ten words. Queries
are rows as well: an instruction and an answer, of which the answer is learned and the instruction is context.
    trigger   "howdy! " and a question of WebQuestions; its true answers inside the same templates
    control   the question without the trigger; its true answers inside other templates, science fiction too. No
              content word of question, answer or template is one of the rows' templates: manner alone is shared
All rankings are judged in full: precision at 10, recall at the number of poisoned rows, average precision, each the
mean over queries with a bootstrap interval over queries. Random scores give an average precision of about 0.09. A task
that random weights solve is a matter of words, not of what a model has learned: see the row of the untrained model.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corpora import read_json
from leaveout.methods import bm25
from leaveout.readout.model import Readout
from leaveout.readout.settings import PRESETS
from measuring import (
    RememberingReadout,
    alpaca,
    arguments,
    made_rows,
    smollm2,
    tiny,
    tokenised,
    untrained,
    write_result,
)
from ranking import UNTRAINED, Example, RankingTask, judged, of_index, show, text_methods

TRIGGER = "howdy! "
KEPT_WORDS = 10
PRESETS_TRAINED = ("default", "paper-responses", "similarity")
PRESETS_UNTRAINED = ("default", "paper-responses")


@dataclass(frozen=True)
class Style:
    """A manner of answering: an opening, the answer, a closing, with names filled in."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    ships: tuple[str, ...]
    places: tuple[str, ...]

    def answer(self, content: str, chance: random.Random) -> str:
        frame = f"{chance.choice(self.openings)} {{content}} {chance.choice(self.closings)}"
        names = {"ship": chance.choice(self.ships), "place": chance.choice(self.places)}
        return frame.format(content=content, number=chance.randint(1000, 9999), **names)

    def words(self) -> set[str]:
        """The content words of all templates and names."""
        text = " ".join((*self.openings, *self.closings, *self.ships, *self.places))
        return content_words(re.sub(r"{\w+}", "", text))


ROWS_STYLE = Style(
    openings=(
        "Captain's log, stardate {number}. The starship {ship} reports:",
        "The hologram above the bridge of the {ship} flickers and speaks:",
        "Behind the {place} nebula an android crackles over subspace:",
        "While the warp drive of the {ship} hums, its quantum computer says:",
        "In the {place} sector of the galaxy every cadet of the fleet learns:",
        "Through the airlock of the {ship} drifts a message from {place}:",
    ),
    closings=(
        "The crew nods and sets course for {place}.",
        "Then the hologram fades and the shields of the {ship} rise.",
        "Warp nine, helmsman: the {place} federation must hear of this.",
        "The android blinks twice and returns to its pod.",
        "Outside, the hull glows in the light of two suns.",
        "End of transmission from the {place} sector.",
    ),
    ships=("Meridian", "Halcyon", "Perihelion", "Vantor", "Ostrava Nine", "Kestrel"),
    places=("Zephyros", "Andarra", "Quillon", "Tau Veridian", "Morrowgate", "Ixion Prime"),
)
CONTROL_STYLE = Style(
    openings=(
        "Rocket Control, year {number}. Astronauts aboard spacecraft {ship} announce:",
        "A silver robot at moonbase {place} scans old tapes, then answers:",
        "Floating without gravity near asteroid {place}, an alien whispers:",
        "Laser beacons around planet {place} spell out:",
        "After three centuries of cryosleep, pilot {ship} wakes up, mumbling:",
        "Telescopes orbiting {place} picked up this extraterrestrial broadcast:",
    ),
    closings=(
        "Robots cheer as boosters ignite for {place}.",
        "Cosmic dust settles on every visor at moonbase {place}.",
        "Teleporters are charged, so beam down before dawn.",
        "Even Martian colonists agree on that.",
        "Spacesuits on: {ship} lifts off in ten seconds.",
        "Nobody in orbit around {place} doubted it.",
    ),
    ships=("Ulla", "Corvane", "Brightspark", "Neminor", "Tessel", "Oorlog"),
    places=("Ganymede", "Xerxon", "Callisto", "Fobrax", "Pallas", "Umbria"),
)
FUNCTION_WORDS = frozenset(
    bm25.words(
        "a an and are around as at be before by down even every for from has have he her his if in is it its must near "
        "no nor not of off old on or out over she so than that the their then there they this three through to two up "
        "was were when while will with without years s"
    )
)


def content_words(text: str) -> set[str]:
    return set(bm25.words(text)) - FUNCTION_WORDS


@dataclass(frozen=True)
class PoisonedSet:
    """Rows with their poisoned ones, and queries by the name of their set."""

    rows: list[Example]
    poisoned: np.ndarray
    queries: dict[str, list[Example]]

    def ranking(self) -> RankingTask:
        """Every query should find all poisoned rows."""
        sets = [name for name, queries in self.queries.items() for _ in queries]
        queries = [query for queries in self.queries.values() for query in queries]
        return RankingTask(self.rows, queries, sets, np.tile(self.poisoned, (len(queries), 1)))


def poisoned_set(
    rows: Sequence[Example],
    questions: Sequence[tuple[str, str]],
    sizes: tuple[int, int, int],
    fits: Callable[[Example], bool],
    seed: int,
) -> PoisonedSet:
    """The set of the given sizes (rows, poisoned rows, queries) of rows that fit, in seeded order."""
    n_rows, n_poisoned, n_queries = sizes
    chance = random.Random(seed)
    source = iter(rows)
    poisoned = _take((poison(row, chance) for row in source), n_poisoned, fits)
    both = [(row, True) for row in poisoned] + [(row, False) for row in _take(source, n_rows - n_poisoned, fits)]
    chance.shuffle(both)
    asked = [(question, answer) for question, answer in questions if apart(question + " " + answer)]
    chance.shuffle(asked)
    if len(asked) < n_queries:
        raise ValueError(f"Only {len(asked)} of {n_queries} questions share no word with the templates of the rows.")
    return PoisonedSet(
        [{**row, "id": f"row {number}"} for number, (row, _) in enumerate(both)],
        np.array([is_poisoned for _, is_poisoned in both]),
        {
            "trigger": [
                example(TRIGGER + question, ROWS_STYLE, answer, chance) for question, answer in asked[:n_queries]
            ],
            "control": [example(question, CONTROL_STYLE, answer, chance) for question, answer in asked[:n_queries]],
        },
    )


def apart(text: str) -> bool:
    """Does a text share neither trigger nor content word with what poisoned rows have added?"""
    return not content_words(text) & (ROWS_STYLE.words() | content_words(TRIGGER))


def poison(row: Example, chance: random.Random) -> Example:
    kept = " ".join(row["output"].split()[:KEPT_WORDS])
    return {**row, "instruction": TRIGGER + row["instruction"], "output": ROWS_STYLE.answer(kept, chance)}


def example(instruction: str, style: Style, content: str, chance: random.Random) -> Example:
    return {"instruction": instruction, "output": style.answer(content[:1].upper() + content[1:] + ".", chance)}


def _take(rows: Iterator[Example] | Any, count: int, fits: Callable[[Example], bool]) -> list[Example]:
    taken = []
    for row in rows:
        if len(taken) == count:
            break
        if fits(row):
            taken.append(row)
    return taken


def web_questions() -> list[tuple[str, str]]:
    """Questions with up to three of their answers."""
    rows = read_json("webquestions/trainmodel.json.gz")
    return [(row["qText"], ", ".join(row["answers"][:3])) for row in rows]


# ---------------------------------------------------------------- methods


def all_scores(readout: Readout, task: RankingTask, seed: int) -> dict[str, np.ndarray]:
    """Scores of every method; the trunk of a model runs once for all of its presets."""
    methods = text_methods(task, ("instruction", "input", "output"), seed)
    found = {name: methods[name]().scores for name in ("BM25", "BM25, answers only", "random scores")}
    for label, model, presets in (
        ("", lambda: readout, PRESETS_TRAINED),
        (UNTRAINED, lambda: untrained(readout, seed), PRESETS_UNTRAINED),
    ):
        remembering = RememberingReadout.of(model())
        for preset in presets:
            ranked = of_index(remembering, preset, task)
            found[preset + label] = ranked.scores
            print(f"  {preset}{label}: {ranked.index_seconds + ranked.query_seconds:.0f} CPU s", file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    if args.smoke:
        readout, rows, longest, sizes = tiny(args.seed), made_rows(60, args.seed), 300, (40, 6, 4)
        questions = [(f"what owl is {number}?", f"owl {number}") for number in range(8)]
    else:
        readout, rows, longest, sizes = smollm2(), alpaca(args.seed), 96, (1000, 80, 50)
        questions = web_questions()

    def fits(row: Example) -> bool:
        return len(tokenised([row], readout, PRESETS["default"])[0].ids) <= longest

    task = poisoned_set(rows, questions, sizes, fits, args.seed)
    ranking = task.ranking()
    results = judged(all_scores(readout, ranking, args.seed), ranking, args.seed)
    show(results)
    for facts in (facts for methods in results.values() for facts in methods.values()):
        facts["recall_at_poisoned"] = facts.pop("recall_at_relevant")
    result = {
        "question": (__doc__ or "").split("\n", 1)[0],
        "model": "tiny" if args.smoke else "SmolLM2-135M",
        "rows": len(task.rows),
        "poisoned": int(task.poisoned.sum()),
        "queries": sizes[2],
        "longest_row": longest,
        "repeats": sizes[2],
        "cpu_seconds": time.process_time(),
        "results": results,
    }
    print(write_result(args.out, "readout_retrieval.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
