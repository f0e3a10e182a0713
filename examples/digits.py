"""Which handwritten digits, writers or classes made a classifier read an image as it does?

    python examples/digits.py [--n 500] [--out DIR]        (needs scikit-learn)

One training, seen with three kinds of units (the things that are left out together): single images, writers (made up
here: blocks of 25 images that follow each other) and classes. The queries are the two images that the model reads worst.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from showing import show
from torch import nn

from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.predict import Verification
from leaveout.deletion.run import TrainingRun
from leaveout.training.queries import Query, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe

BLOCK = 25


def perceptron() -> nn.Module:
    """64 pixels, 32 hidden units, 10 digits. GELU is smooth, so that power series of the training exist."""
    layers = {"hidden": nn.Linear(64, 32), "activation": nn.GELU(), "readout": nn.Linear(32, 10)}
    return nn.Sequential(OrderedDict(layers))


def make_recipe(images: torch.Tensor, labels: Sequence[int]) -> Recipe:
    """Everything the trained model depends on. An example is a pair (features, label); its id is its number."""
    examples = tuple(zip(images, labels, strict=True))
    optimizer = OptimizerSettings("sgd", lr=0.2, momentum=0.5)
    return Recipe(
        "classifier", examples, model=perceptron, optimizer=optimizer, batch_size=20, epochs=3, order="shuffled"
    )


def worst(run: TrainingRun, images: torch.Tensor, labels: Sequence[int], n: int = 2) -> list[int]:
    """The images, of those that were not trained on, whose labels the trained model finds least likely."""
    rows = list(zip(images, labels, strict=True))
    return query_losses(run.recipe, run.parameters, rows).argsort(descending=True)[:n].tolist()


def nearest(images: torch.Tensor, image: torch.Tensor, n: int) -> list[str]:
    """Ids of the training images with the least distance to an image."""
    return [str(i) for i in (images - image).flatten(1).norm(dim=1).argsort()[:n].tolist()]


def main(argv: Sequence[str] | None = None) -> list[Verification]:
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="how many images to train on")
    parser.add_argument("--retrain", type=int, default=150, help="retrainings to predict from, with images as units")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a directory that is removed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels / 16).float(), [int(d) for d in digits]
    recipe = make_recipe(images[: args.n], labels[: args.n])
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)

        # 1. Images as units: which images like this one matter?
        run = TrainingRun.train(recipe, out / "images")
        asked = worst(run, images[args.n :], labels[args.n :])
        queries = [
            Query((images[args.n + i], labels[args.n + i]), measure, f"a {labels[args.n + i]}: {measure}")
            for i in asked
            for measure in ("loss", "margin")  # margin: log p - log(1 - p) of the right class, negative if misread
        ]
        # Held-out retrainings calibrate the error bars; they should be of the kind that you ask about.
        near = [nearest(images[: args.n], images[args.n + i], k) for i in asked for k in (5, 10, 20, 40, 60)]
        run.measure(retrain=args.retrain, queries=queries, heldout=near[1::2])
        similar = run.verify(queries, near[::2])

        # 2. Writers as units. Few units: each is left out alone first, then random sets of the sizes given here. Without
        # `sizes` random sets hold at most 30 % of the units, and the halves below would be far outside of what is known.
        by_writer = recipe.grouped([f"writer {i // BLOCK}" for i in range(args.n)])
        writers = by_writer.unit_names
        run = TrainingRun.train(by_writer, out / "writers")
        sizes = MeasureSettings(sizes=(2, len(writers) // 2))
        run.measure(retrain=3 * len(writers), queries=queries, heldout=12, settings=sizes)
        pairs = [list(pair) for pair in zip(writers[::2], writers[1::2], strict=False)]
        halves = [list(writers[: len(writers) // 2]), list(writers[len(writers) // 2 :])]
        people = run.verify(queries, pairs + halves)

        # 3. Classes as units, and a share of one: what if the class counted less and less? Effects bend with the share,
        # so shares of every class are measured, and others held out.
        by_class = recipe.grouped([f"class {label}" for label in labels[: args.n]])
        run = TrainingRun.train(by_class, out / "classes")
        names = by_class.unit_names
        measured = [{name: share} for name in names for share in (0.25, 0.5, 0.75, 1)]
        held_out = [{name: share} for name in names for share in (0.4, 0.85)]
        run.measure(without=measured, heldout=held_out, queries=queries)
        shares = [{name: share} for name in names[:5] for share in (0.1, 0.6, 0.9)]
        classes = run.verify(queries, shares)

    show("Without the training images nearest to the query", similar)
    show("Without some writers", people)
    show("Without a share of a class", classes)
    return [similar, people, classes]


if __name__ == "__main__":
    main()
