"""Digests: equal content gives equal digests, in any process; whatever a function can read is content."""

import collections
import enum
import functools
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import leaveout
from leaveout.corpus import Corpus
from leaveout.deletion.run import TrainingRun
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.training.digest import _installed, digest_of
from leaveout.training.queries import Query
from leaveout.training.recipe import DIGEST, OptimizerSettings, Recipe

from .test_recipe import points

SCALE = 2.0


def helper(x):
    return x * SCALE


def deep(x):
    return helper(x) if x.dim() else deep(x[None])


def made_by(power, shift=0.0, *, sign=1.0):
    def loss(model, batch, shift=shift, *, sign=sign):
        return sign * (model(batch[0]).sum(1) - batch[1]).abs() ** power + shift

    return loss


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, model, batch):
        return self.weight * (model(batch[0]).sum(1) - batch[1]) ** 2

    def method(self, model, batch):
        return self(model, batch)


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, model, batch):
        return self.weight * model(batch[0]).sum(1)


class Heavier(Weighted):
    pass


class Net(nn.Module):
    def __init__(self, gain=1.0, width=2):
        super().__init__()
        self.gain, self.linear = gain, nn.Linear(width, 1)
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.gain * self.linear(x) + self.offset


def net(gain=1.0, weight=0.5, offset=0.0, hook=None, activation=None):
    made = Net(gain)
    with torch.no_grad():
        made.linear.weight.fill_(weight)
        made.linear.bias.zero_()
        made.offset.fill_(offset)
    if hook is not None:
        made.register_forward_hook(hook)
    return made if activation is None else nn.Sequential(made, activation)


def changed_global(scale):
    space = {}
    exec(f"SCALE = {scale}\ndef inner(x):\n    return x * SCALE\ndef loss(m, b):\n    return inner(m(b[0]))", space)
    return space["loss"]


def returning(text):
    return eval(f"lambda model, batch: {text}")


def with_attribute(value):
    def loss(model, batch):
        return loss.scale * model(batch[0]).sum(1)

    loss.scale = value
    return loss


def mode(value):
    return enum.Enum("Mode", {"HIGH": value}).HIGH


class Constant(dict):
    def __getitem__(self, key):
        return 1.0


Pair = collections.namedtuple("Pair", "one two")


def shared(*order):
    parts = [net(), nn.ReLU(), net()]
    return nn.Sequential(*(parts[i] for i in order))


# Two makers of one value each: equal inside a row, different between rows.
VALUES = {
    "closure": [lambda: made_by(2), lambda: made_by(3)],
    "default": [lambda: made_by(2), lambda: made_by(2, shift=1.0)],
    "keyword default": [lambda: made_by(2), lambda: made_by(2, sign=-1.0)],
    "type of a number": [lambda: made_by(2), lambda: made_by(2.0), lambda: made_by(True)],
    "partial": [lambda: functools.partial(F.huber_loss, delta=1.0), lambda: functools.partial(F.huber_loss, delta=2.0),
                lambda: functools.partial(F.mse_loss, delta=2.0)],
    "partial of a closure": [lambda: functools.partial(made_by(2), shift=1.0), lambda: functools.partial(made_by(3), shift=1.0)],
    "callable object": [lambda: Weighted(1.0), lambda: Weighted(2.0), lambda: Heavier(1.0)],
    "slots": [lambda: Slotted(1.0), lambda: Slotted(2.0)],
    "bound method": [lambda: Weighted(1.0).method, lambda: Weighted(2.0).method],
    "array in an object": [lambda: Weighted(np.arange(5000)), lambda: Weighted(np.r_[np.arange(4999), 0])],
    "tensor in a closure": [lambda: made_by(torch.arange(3)), lambda: made_by(torch.arange(3).float())],
    "global constant": [lambda: changed_global(1.0), lambda: changed_global(2.0)],
    "lambdas on one line": [lambda: (lambda m, b: m(b[0]) + 1, lambda m, b: m(b[0]) - 1)[0],
                            lambda: (lambda m, b: m(b[0]) + 1, lambda m, b: m(b[0]) - 1)[1]],
    "constant of a lambda": [lambda: returning("m + 1"), lambda: returning("m + 2"), lambda: returning("m + 1.0")],
    "name of a lambda": [lambda: returning("batch.sin()"), lambda: returning("batch.cos()")],
    "lambda in a lambda": [lambda: returning("(lambda x: x + 1)(batch)"), lambda: returning("(lambda x: x + 2)(batch)")],
    "weights": [net, lambda: net(weight=0.6)],
    "plain buffer": [net, lambda: net(offset=1.0)],
    "attribute of a module": [net, lambda: net(gain=2.0)],
    "hook": [net, lambda: net(hook=lambda m, a, out: out * 2), lambda: net(hook=lambda m, a, out: out * 3)],
    "setting of an installed module": [lambda: net(activation=nn.GELU("none")), lambda: net(activation=nn.GELU("tanh")),
                                       lambda: net(activation=nn.LeakyReLU(0.1)), lambda: net(activation=nn.LeakyReLU(0.2))],
    "module in a closure": [lambda: made_by(net()), lambda: made_by(net(weight=0.7))],
    "set": [lambda: {"a", "b", "c"}, lambda: {"a", "b"}],
    "list and tuple": [lambda: made_by([0, 1]), lambda: made_by((0, 1))],
    "order of a mapping": [lambda: made_by({"a": 1, "b": 2}), lambda: made_by({"b": 2, "a": 1})],
    "attribute of a function": [lambda: with_attribute(1), lambda: with_attribute(2)],
    "value of an enumeration": [lambda: made_by(mode(0.1)), lambda: made_by(mode(0.2))],
    "kind of a mapping": [lambda: {"a": 1}, lambda: Constant(a=1), lambda: collections.OrderedDict(a=1),
                          lambda: collections.defaultdict(int, a=1), lambda: collections.defaultdict(float, a=1)],
    "kind of a tuple": [lambda: (1, 2), lambda: Pair(1, 2), lambda: torch.Size([1, 2])],
    "kind of an array": [lambda: np.eye(2), lambda: np.eye(2).view(np.recarray),
                         lambda: np.ma.array(np.eye(2), mask=np.eye(2) > 0)],
    "mask of an array": [lambda: np.ma.array([1, 2], mask=[False, True]), lambda: np.ma.array([1, 2], mask=[False, False])],
    "fields of an array": [lambda: np.zeros(2, "i4,i4"), lambda: np.zeros(2, [("f1", "i4"), ("f0", "i4")])],
    "module that stands twice": [lambda: shared(0, 1), lambda: shared(0, 1, 0), lambda: shared(0, 1, 0, 1),
                                 lambda: shared(0, 1, 2)],
    "lazy conjugate": [lambda: torch.tensor([1 + 2j]), lambda: torch.tensor([1 + 2j]).conj()],
    "lazy negative": [lambda: torch.tensor([2.0]), lambda: torch.tensor([1 + 2j]).conj().imag],
    "pattern": [lambda: made_by(re.compile("a")), lambda: made_by(re.compile("b"))],
    "keys": [lambda: {1: "a"}, lambda: {"1": "a"}],
    "bytes and text": [lambda: b"a", lambda: "a", lambda: Path("a")],
    "class": [lambda: Weighted, lambda: Slotted, lambda: nn.Linear, lambda: nn.Conv2d],
    "library": [lambda: torch.nn, lambda: np],
    "recursive": [lambda: deep, lambda: helper],
    "generator of torch": [lambda: torch.Generator().manual_seed(1), lambda: torch.Generator().manual_seed(2)],
    "generator of Python": [lambda: random.Random(1), lambda: random.Random(2)],
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_what_a_value_holds_is_in_its_digest(name):
    makers = VALUES[name]
    digests = [digest_of(make(), "x") for make in makers]
    assert digests == [digest_of(make(), "x") for make in makers]
    assert len(set(digests)) == len(makers)


def test_two_lambdas_on_one_line_are_two_recipes():
    losses = (lambda m, b: b[1] * 1.0, lambda m, b: b[1] * 2.0)
    one, two = [Recipe("custom", points(), model=nn.Identity, loss=loss) for loss in losses]
    assert one.hash() != two.hash() and one.difference(two.digests()) == "it differs in `loss`"


def test_a_function_does_not_depend_on_where_it_stands(tmp_path):
    """Lines above it, its file and comments inside it are not content."""
    text = "SCALE = 3\ndef loss(model, batch):\n    return model(batch[0]) * SCALE\n"
    found = []
    for name, source in (
        ("one", text),
        ("two", "import os\n\n\n" + text.replace("    return", "    # so\n    return")),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        space = {"__name__": name}
        exec(compile(source, str(tmp_path / f"{name}.py"), "exec"), space)
        found.append(digest_of(space["loss"], "x"))
    assert found[0] == found[1]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from jets.test_digest import VALUES, digest_of
print([digest_of(make(), "x") for name in sorted(VALUES) for make in VALUES[name]])
"""


def test_digests_are_equal_in_another_process():
    """Also where texts hash otherwise, so that sets come in another order."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1])]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    mine = [digest_of(make(), "x") for name in sorted(VALUES) for make in VALUES[name]]
    assert run.stdout.strip() == str(mine)


USER = """
import helpers, package
from leaveout.training.digest import digest_of
def through(m, b): return helpers.scaled(m(b))
def package_of(m, b): return package.losses.value(m(b))
def imported(m, b):
    from package.losses import value
    return value(m(b))
def imports(m, b):
    import helpers
    return helpers.scaled(m(b))
def handed_on(m, b): return getattr(helpers, "scaled")(m(b))
names = ("through", "package_of", "imported", "imports", "handed_on")
print(*(digest_of(globals()[name], "x") for name in names))
"""


IN_EACH = """
import runpy, sys
for place in sys.argv[1:]:
    for name in {"helpers", "others", "package", "package.losses"} & set(sys.modules):
        del sys.modules[name]
    sys.path.insert(0, place)
    runpy.run_path(place + "/user.py", run_name="__main__")
    sys.path.remove(place)
"""


def test_other_files_of_the_users_own_count(tmp_path):
    """A function that calls those of other files, whichever way it comes to them."""
    files = {
        "helpers.py": "from others import FACTOR\ndef scaled(x): return 2 * x * FACTOR\n",
        "others.py": "FACTOR = 2\n",
        "package/__init__.py": "from . import losses\n",
        "package/losses.py": "def value(x): return x * 2\n",
        "user.py": USER,
    }
    by_helpers, by_package = {"through", "imports", "handed_on"}, {"package_of", "imported"}
    wanted = {"user.py": set(), "helpers.py": by_helpers, "others.py": by_helpers, "package/losses.py": by_package}
    places = [tmp_path / str(number) for number in range(len(wanted))]
    for place, changed in zip(places, wanted, strict=True):
        (place / "package").mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_text(content.replace("2", "3") if name == changed else content)
    command = [sys.executable, "-B", "-c", IN_EACH, *map(str, places)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain, *found = (line.split() for line in shown.splitlines())
    names = ("through", "package_of", "imported", "imports", "handed_on")
    for one, changed in zip(found, list(wanted.values())[1:], strict=True):
        assert {name for name, a, b in zip(names, plain, one, strict=True) if a != b} == changed


def test_a_directory_beside_an_installed_one_is_not_installed():
    package = Path(leaveout.__file__).parent
    assert _installed(str(package / "errors.py")) and not _installed(f"{package}_mine/loss.py")


def test_how_settings_are_written_does_not_count():
    """A list or a tuple, and names in any order: from a file or in Python."""
    one = small(model={"hidden": [4]}, trained=["0.*", "1.*"])
    assert one.hash() == small(model={"hidden": (4,)}, trained=("0.*", "1.*")).hash()
    rows = tuple(Corpus.open([{"text": "ab"}]))
    loras = [{"lora": {"r": 2, "targets": ["q"]}}, {"lora": {"targets": ("q",), "r": 2}}]
    assert len({Recipe("custom", rows, model=nn.Identity, loss=deep, trained=t).hash() for t in loras}) == 1


def test_a_tensor_without_numbers_is_refused():
    with pytest.raises(UnsupportedError, match=r"x holds a torch\.Tensor, whose content cannot be hashed"):
        digest_of(torch.zeros(2, device="meta"), "x")


@pytest.mark.parametrize("held", [threading.Lock(), (i for i in ()), sys.stdout])
def test_what_cannot_be_read_is_refused_with_advice(held):
    recipe = Recipe("custom", points(), model=nn.Identity, loss=functools.partial(made_by(2), shift=held))
    kind = type(held).__name__
    with pytest.raises(UnsupportedError, match=f"`loss` of the recipe .*shift.* holds a .*{kind}.*give `version=`"):
        recipe.hash()
    one, two = recipe.with_(version="1"), recipe.with_(version="2")
    assert one.hash() == one.hash() != two.hash()
    with pytest.raises(UnsupportedError, match=r"The query 'q' .*holds a"):
        _ = Query(functools.partial(made_by(2), shift=held), name="q").digest
    assert Query(lambda m: held, version="1").digest != Query(lambda m: held, version="2").digest


def test_two_functions_never_share_measurements():
    rows = [Query(functools.partial(made_by(p), batch=None)) for p in (2, 3)] + [Query(made_by(p)) for p in (2, 3)]
    measures = [Query("a", lambda logits, targets, p=p: logits.sum() * p) for p in (2, 3)]
    assert len({q.digest for q in [*rows, *measures]}) == 6


def test_a_tokenizer_that_was_used_is_the_same():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"_": 0, "a": 1, "b": 2}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="_", pad_token="_")
    before = digest_of(lambda: tokenizer, "x")
    tokenizer(["a", "a b a"], truncation=True, max_length=2, padding=True)
    assert digest_of(lambda: tokenizer, "x") == before
    tokenizer.add_tokens(["c"])
    assert digest_of(lambda: tokenizer, "x") != before


def small(**changes):
    return Recipe("classifier", points(), optimizer=OptimizerSettings("sgd", 0.1), batch_size=3, **changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": functools.partial(nn.Linear, 4, 3, bias=False)}, "`model`"),
        ({"seed": 1}, "`seed`"),
        ({"lr": 0.2}, "`optimizer`"),
        ({"examples": points(seed=1)}, "`examples`"),
        ({"epochs": 2, "batch_size": 2}, "`epochs`, `batch_size`"),
    ],
)
def test_a_mismatch_says_which_field_differs(changes, field, tmp_path):
    recipe = small(model=functools.partial(nn.Linear, 4, 3))
    TrainingRun.train(recipe, tmp_path / "run")
    with pytest.raises(MismatchError, match=f"another recipe.*it differs in {field}. Restore"):
        TrainingRun.train(recipe.with_(**changes), tmp_path / "run")
    other = TrainingRun.train(recipe.with_(**changes), tmp_path / "other")
    with pytest.raises(MismatchError, match=f"bank of another recipe: it differs in {field}. Restore"):
        other.bank.merge(tmp_path / "run" / "bank")


def test_a_run_of_other_rules_is_not_taken_for_a_new_one(tmp_path, monkeypatch):
    recipe = small()
    before = recipe.hash()
    TrainingRun.train(recipe, tmp_path / "run")
    monkeypatch.setattr("leaveout.training.recipe.DIGEST", DIGEST + 1)
    assert recipe.hash() != before
    with pytest.raises(MismatchError, match=r"hashed recipes by other rules. Restore it, or train into a new"):
        TrainingRun.train(recipe, tmp_path / "run")


def test_rows_differ_by_their_content():
    rows = Corpus.open([{"text": "ab"}, {"prompt": "a", "completion": "b"}, {"text": "ab", "id": "1"}])
    assert len({digest_of(row, "x") for row in rows}) == 3
