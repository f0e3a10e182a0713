"""Labelled examples: what is no class, or not like the other examples, is told with its place and value."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from leaveout.cli import app
from leaveout.deletion.run import TrainingRun
from leaveout.errors import FormatError
from leaveout.training.examples import read_arrays
from leaveout.training.queries import Query, query_function, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain

from .test_recipe import points

X = np.arange(24, dtype="float32").reshape(6, 4) / 24
Y = np.array([0, 1, 2, 0, 1, 2])


def with_value(array, place, value):
    out = array.copy()
    out[place] = value
    return out


WHOLE = "but classes are whole numbers from 0"
WRONG = {
    "half": ({"x": X, "y": Y + 0.5}, f"d.npz, example 0: the label is 0.5, {WHOLE}"),
    "one half": ({"x": X, "y": with_value(Y.astype(float), 3, 1.25)}, f"example 3: the label is 1.25, {WHOLE}"),
    "minus one": (
        {"x": X, "y": np.where(Y > 0, 1, -1)},
        "example 0: the label is -1, .*of two classes -1 and 1, give 0",
    ),
    "nan": ({"x": X, "y": with_value(Y.astype(float), 2, np.nan)}, "example 2: the label is nan"),
    "infinite": ({"x": X, "y": with_value(Y.astype(float), 2, np.inf)}, "example 2: the label is inf"),
    "column": ({"x": X, "y": Y[:, None]}, r"has y \[6, 1\]: it must be \[examples\].*y\[:, 0\]"),
    "one-hot": ({"x": X, "y": np.eye(3)[Y]}, r"has y \[6, 3\]: .*one-hot: y.argmax\(1\)"),
    "text": ({"x": X, "y": np.array(list("abcabc"))}, "example 0: the label is 'a', .*numpy.unique"),
    "objects": ({"x": X, "y": np.array(["a", 1, 2, 0, 1, 2], dtype=object)}, "holds Python objects"),
    "no y": ({"x": X}, "has no array 'y', it has x"),
    "no x": ({"features": X, "y": Y}, "has no array 'x', it has features, y"),
    "short": ({"x": X, "y": Y[:5]}, r"has x \[6, 4\] and y \[5\]: both need one entry"),
    "one label": ({"x": X, "y": np.array(1)}, r"has x \[6, 4\] and y \[\]"),
    "flat": ({"x": X[:, 0], "y": Y}, r"has x \[6\] of float32: it must be numbers \[examples, features\]"),
    "text features": ({"x": X.astype(str), "y": Y}, "it must be numbers"),
    "missing feature": ({"x": with_value(X, (4, 2), np.nan), "y": Y}, r"example 4: the feature \[2\] is nan"),
    "units": ({"x": X, "y": Y, "group": np.arange(5)}, r"x \[6, 4\] and group \[5\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_told_in_one_sentence(name, tmp_path):
    arrays, message = WRONG[name]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(FormatError, match=message) as found:
        read_arrays(tmp_path / "d.npz", "group" if name == "units" else None)
    assert str(tmp_path / "d.npz") in str(found.value)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"kind": "classifier", "data": "d.npz", "batch_size": 3}))
    if name != "units":
        with pytest.raises(FormatError, match=message):
            Recipe.from_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_npz_is_told(content, tmp_path):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(FormatError, match=r"d.npz is not an .npz file with arrays x and y"):
        read_arrays(tmp_path / "d.npz")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(FormatError, match=r"one.npy is not an .npz file"):
        read_arrays(tmp_path / "one.npy")


@pytest.mark.parametrize("labels", [Y, Y.astype(float), Y.astype("uint8"), Y > 0, Y.astype(">i4")])
def test_labels_that_are_whole_numbers_from_zero_are_classes(labels, tmp_path):
    np.savez(tmp_path / "d.npz", x=X.astype(">f4"), y=labels)
    recipe = Recipe("classifier", read_arrays(tmp_path / "d.npz")[0])
    task = task_of(recipe)
    features, classes = task.encode(recipe.examples)
    assert classes.tolist() == labels.astype(int).tolist() and np.array_equal(features.numpy(), X)


ROW = torch.zeros(4)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((ROW, 0.5), f"Example 3 of the recipe: the label is 0.5, {WHOLE}"),
        ((ROW, torch.tensor(-1)), "the label is -1"),
        ((ROW, torch.tensor([1])), r"the label is \[1\]"),
        ((ROW, torch.tensor([0.0, 1.0])), r"the label is \[0.0, 1.0\].*give the place of the one"),
        ((ROW, "cat"), "the label is 'cat'"),
        ((ROW, None), "the label is None"),
        ((torch.zeros(5), 1), r"the features have the shape \[5\], but the recipe's are \[4\]"),
        ((torch.full((4,), torch.nan), 1), r"Example 3 of the recipe: the feature \[0\] is nan"),
        (ROW, "is Tensor: an example of a classifier is a pair"),
        ((ROW, 1, 2), "is tuple: an example of a classifier is a pair"),
    ],
)
def test_wrong_examples_from_python_are_told(example, message):
    with pytest.raises(FormatError, match=message):
        Recipe("classifier", (*points(3), example))


QUERIES = [
    ((ROW, 3), "the label is 3, but the model has 3 classes, 0 to 2"),
    ((ROW, 1.5), "the label is 1.5"),
    ((torch.zeros(5), 1), r"the features have the shape \[5\], but the recipe's are \[4\]"),
    ((ROW * torch.nan, 1), r"the feature \[0\] is nan"),
]


@pytest.mark.parametrize(("query", "message"), QUERIES)
@pytest.mark.parametrize("model", [{"hidden": [3]}, lambda: nn.Linear(4, 3)])
def test_wrong_queries_are_told(query, message, model):
    recipe = Recipe("classifier", points(), model=model)
    with pytest.raises(FormatError, match=f"A query: {message}"):
        query_losses(recipe, train_plain(recipe), [query])
    asked = [Query(points(1)[0]), Query(query, source="q.npz, example 1")]
    with pytest.raises(FormatError, match=f"^q.npz, example 1: {message}"):
        query_function(task_of(recipe), asked)


def test_a_model_of_more_classes_than_were_seen_may_be_asked_for_them():
    recipe = Recipe("classifier", points(), model=lambda: nn.Linear(4, 7))
    assert query_losses(recipe, train_plain(recipe), [(ROW, 6)]).shape == (1,)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(4, 2), "`model` gives 2 logits, but the examples have labels up to 2"),
        (lambda: nn.Linear(5, 3), r"`model` fails for 1 example alone, whose features have the shape \[4\]"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), r"`model` gives \[3\] for 1 example: .*\[1, classes\]"),
    ],
)
def test_a_model_that_is_no_classifier_of_the_examples_is_told(model, message):
    with pytest.raises(FormatError, match=message):
        task_of(Recipe("classifier", points(), model=model))


def test_commands_name_file_and_example(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    np.savez(tmp_path / "q.npz", x=X[:2], y=[0, 3])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"kind": "classifier", "data": "d.npz", "batch_size": 3}))
    CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")])
    found = CliRunner().invoke(
        app, ["measure", str(tmp_path / "run"), "--retrain", "2", "--queries", str(tmp_path / "q.npz")]
    )
    assert found.exit_code != 0
    assert f"{tmp_path / 'q.npz'}, example 1: the label is 3" in str(found.exception) + found.stderr


def test_values_of_custom_examples_are_no_labels(tmp_path):
    """A regression's targets used to be cut to whole numbers, and a tensor's second number taken for a label."""
    rows = tuple((torch.randn(4), torch.tensor(0.5 + i)) for i in range(4))

    def loss(model, batch):
        return (model(batch[0])[:, 0] - batch[1]) ** 2

    recipe = Recipe("custom", rows, model=lambda: nn.Linear(4, 1), loss=loss, optimizer=OptimizerSettings("sgd", 0.01))
    run = TrainingRun.train(recipe, tmp_path / "run")
    assert run.ids_where("id = '2'") == ["2"]
    alone = Recipe(
        "custom", tuple(torch.randn(4) for _ in range(3)), model=lambda: nn.Linear(4, 1),
        loss=lambda model, batch: model(batch[0])[:, 0] ** 2, optimizer=OptimizerSettings("sgd", 0.01),
    )  # fmt: skip
    assert len(TrainingRun.train(alone, tmp_path / "alone").parameters) == 2
