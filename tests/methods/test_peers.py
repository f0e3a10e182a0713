"""TRAK through dattri, TrackStar through bergson, Z0-Inf by name: against formulas written out from slow gradients.

In the tests marked `peers` the packages themselves run (`make peers-check`). In the others stand-ins of a few lines take
their places, so that what goes into them and comes out of them is checked everywhere.
"""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from leaveout.corpus import Corpus
from leaveout.deletion.run import TrainingRun
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.evaluation import EvaluationSettings, evaluate
from leaveout.methods import trackstar, trak
from leaveout.methods.gradient_dot import GradientDot
from leaveout.methods.registry import score_methods
from leaveout.methods.scorer import take_snapshots
from leaveout.methods.trackstar import TrackStar
from leaveout.methods.trak import Trak
from leaveout.methods.z0_inf import Z0Inf
from leaveout.training.queries import as_queries
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import IGNORED, task_of
from methods.slow import PROMPTED, RECIPES, SGD, slow_gradients, slow_losses, slow_product

LM = RECIPES["causal-lm"]


@pytest.fixture(scope="module")
def setting():
    """Task and parameters of each recipe; the parameters are not those of the task's own model."""
    out = {}
    for name, recipe in RECIPES.items():
        task, generator = task_of(recipe), torch.Generator().manual_seed(1)
        own = {key: p.detach() for key, p in task.model.named_parameters()}
        out[name] = (
            task,
            {key: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in own.items()},
        )
    return out


def assert_close(found, wanted, tolerance=1e-4):
    """float32 sums of a few thousand products: 1e-4 of the largest score."""
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


# --- TRAK --------------------------------------------------------------------------------------------------------


def trak_formula(name, parameters, rows, n_queries, damping, width, project):
    """The log-odds of exp(-loss) have the gradient -g / (1 - p)."""
    losses = torch.stack(slow_losses(name, parameters, rows)).detach()
    grads = torch.stack(
        [torch.cat([g.flatten() for g in each.values()]) for each in slow_gradients(name, parameters, rows)]
    )
    p = torch.exp(-losses)
    features = -grads / (1 - p)[:, None] / grads.shape[1] ** 0.5
    phi = project(features)
    gram = phi.T @ phi + damping * features.square().sum() / width * torch.eye(phi.shape[1], dtype=phi.dtype)
    return (phi[:n_queries] @ torch.linalg.solve(gram, phi.T) * (1 - p)).numpy()


class UnprojectedTrak:
    """dattri's classes in a few lines, without a projection: one row at a time, scores [train, query]."""

    def __init__(self, log_odds, model, checkpoint):
        assert [name for name, _ in model.named_parameters()] == list(checkpoint)
        self.log_odds, self.named = log_odds, checkpoint

    def get_param(self):
        return torch.cat([p.flatten() for p in self.named.values()]), None

    def get_grad_loss_func(self, in_dims):
        return lambda _, batch: torch.stack([self.gradient(example) for example in zip(*batch, strict=True)])

    def gradient(self, example):
        return torch.cat([g.flatten() for g in torch.func.grad(self.log_odds)(self.named, example).values()])

    def attributor(self, task, correct_probability_func, projector_kwargs, regularization):
        phis, weights = [], []

        def cache(batches):
            examples = [example for batch in batches for example in zip(*batch, strict=True)]
            phis.extend(self.gradient(example) for example in examples)
            weights.extend(1 - correct_probability_func(self.named, example) for example in examples)

        def attribute(batches):
            asked = [self.gradient(example) for batch in batches for example in zip(*batch, strict=True)]
            size = len(asked[0])
            phi, queries = torch.stack(phis) / size**0.5, torch.stack(asked) / size**0.5
            gram = phi.T @ phi + regularization * torch.eye(size, dtype=phi.dtype)
            return (queries @ torch.linalg.solve(gram, phi.T) * torch.stack(weights)).T

        return SimpleNamespace(cache=cache, attribute=attribute)


@pytest.mark.parametrize("name", ["classifier", "microgpt"])
def test_trak_hands_over_log_odds_probabilities_and_damping(name, setting, monkeypatch):
    """With rows of unequal length in two batches, and queries of which each helps itself most."""
    task, parameters = setting[name]
    rows = RECIPES[name].examples

    def build(*args, **kwargs):
        made = UnprojectedTrak(*args, **kwargs)
        names.Attributor = made.attributor
        return made

    names = SimpleNamespace(Task=build, Attributor=None)
    monkeypatch.setattr(trak, "package", lambda: names)
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    found = Trak(task, parameters, width=100, damping=0.3, memory=8 * 4 * size).score(rows[:2], rows)
    assert_close(found, trak_formula(name, parameters, rows, 2, 0.3, 100, lambda x: x))
    assert found.argmax(1).tolist() == [0, 1] and (np.diag(found) > 0).all()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when dattri opens its compiler
@pytest.mark.parametrize("name", RECIPES)
def test_trak_is_its_formula_with_the_projection_of_dattri(name, setting):
    from dattri.func.projection import random_project

    task, parameters = setting[name]
    rows, width = RECIPES[name].examples, 7

    def project(x):
        return random_project(x, len(x), width, 32, proj_seed=5, proj_type="normal")(x)

    def score(**changes):
        return Trak(task, parameters, width=width, damping=0.3, seed=5, **changes).score(rows[:2], rows)

    found = score()
    assert_close(found, trak_formula(name, parameters, rows, 2, 0.3, width, project), 1e-3)
    assert_close(score(memory=1), found)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradient_dot_is_that_of_dattri(setting):
    """An implementation by others: its TracIn with the rate 1 and no projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    task, parameters = setting["classifier"]
    rows = RECIPES["classifier"].examples

    def loss(values, example):
        logits = torch.func.functional_call(task.model, values, (example[0][None],))
        return torch.nn.functional.cross_entropy(logits, example[1][None])

    model = task_of(RECIPES["classifier"]).model
    model.load_state_dict(parameters)
    peer = TracInAttributor(
        AttributionTask(loss, model, model.state_dict()),
        torch.ones(1),
        False,
        projector_kwargs={"proj_type": "identity"},
    )
    loader = [
        torch.utils.data.DataLoader(list(part), batch_size=4, collate_fn=task.encode) for part in (rows, rows[:2])
    ]
    assert_close(GradientDot(task, parameters).score(rows[:2], rows), peer.attribute(*loader).detach().T.numpy())


# --- TrackStar ---------------------------------------------------------------------------------------------------


def layers_of(parameters):
    """Names of the linear layers of the small Llama below its head, as in `model.base_model`."""
    return [name[len("model.") : -len(".weight")] for name in parameters if "proj" in name]


SETTINGS = (5, 0.3, True, False)  # none of them the adapter's own


class Unprojected:
    """bergson's pipeline in a few lines: what is on disk is opened again, and gradients of layers are multiplied."""

    supported_modules = (torch.nn.Linear,)

    def __init__(self, index, pipeline):
        self.index, self.pipeline = index, pipeline

    def execute(self):
        from datasets import load_from_disk
        from transformers import AutoModelForCausalLM, AutoTokenizer

        preprocess, index = self.pipeline.preprocess_cfg, self.index
        given = index.projection_dim, preprocess.inversion_cfg.damping_factor, preprocess.unit_normalize
        assert (*given, self.pipeline.mix_hessians) == SETTINGS and self.pipeline.stats_sample_size is None
        AutoTokenizer.from_pretrained(self.index.model)
        model = AutoModelForCausalLM.from_pretrained(self.index.model, dtype=torch.float32)
        left_out = (self.index.filter_modules or "").split(",")
        weights = [
            layer.weight
            for name, layer in model.base_model.named_modules()
            if isinstance(layer, torch.nn.Linear) and name not in left_out
        ]

        def gradients(path):
            rows = load_from_disk(path).to_list()
            assert max(row["length"] for row in rows) <= self.index.token_batch_size
            for row in rows:
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction=self.index.loss_reduction
                )
                yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

        query, train = (torch.stack(list(gradients(data.dataset))) for data in (self.pipeline.query, self.index.data))
        Path(self.index.run_path).mkdir()
        np.save(f"{self.index.run_path}/scores.npy", (train @ query.T).numpy())
        random.seed(0)
        print("steps", file=sys.stdout)


@pytest.fixture
def unprojected(monkeypatch):
    names = dict.fromkeys(
        (
            "TrackstarIndexConfig",
            "TrackstarConfig",
            "DataConfig",
            "QuerySetConfig",
            "PreprocessConfig",
            "InversionConfig",
        ),
        SimpleNamespace,
    )

    class Stored:
        def __init__(self, path):
            self.values = np.load(path.with_suffix(".npy"))

        def __getitem__(self, key):
            return self.values[key]

        def is_written(self):
            return True

    everything = SimpleNamespace(**names, Trackstar=Unprojected, LayerAdapter=Unprojected, load_scores=Stored)
    monkeypatch.setattr(trackstar, "package", lambda: everything)


@pytest.mark.parametrize("trained", ["full", ("*mlp*", "*lm_head*")])
def test_trackstar_hands_over_model_tokens_and_layers(trained, unprojected, capsys):
    """Prompts are not learned, layers that are not trained are left out, and scores come back [query, train]."""
    recipe = LM.with_(trained=trained)
    task = task_of(recipe)
    generator = torch.Generator().manual_seed(1)
    everything = {key: p.detach().clone() for key, p in task.model.named_parameters()}
    parameters = {
        key: everything[key] + 0.1 * torch.randn(everything[key].shape, generator=generator) for key in task.trained
    }
    before = {key: p.clone() for key, p in everything.items()}
    grads = slow_gradients("causal-lm", {**everything, **parameters}, recipe.examples)
    names = [f"model.{name}.weight" for name in layers_of(everything) if f"model.{name}.weight" in task.trained]
    assert len(names) == (14 if trained == "full" else 6)
    wanted = np.array([[slow_product(a, b, names) for b in grads] for a in grads[:2]])
    state = random.getstate()
    assert_close(TrackStar(task, parameters, *SETTINGS).score(recipe.examples[:2], recipe.examples), wanted, 1e-3)
    assert state == random.getstate() and capsys.readouterr() == ("", "")
    assert all(torch.equal(p, before[key]) for key, p in task.model.named_parameters())


def test_trackstar_refuses_what_bergson_cannot_open(unprojected, setting):
    task, parameters = setting["microgpt"]
    rows = RECIPES["microgpt"].examples
    with pytest.raises(UnsupportedError, match="needs a causal-lm recipe"):
        TrackStar(task, parameters).score(rows, rows)
    task = task_of(LM.with_(trained=("*embed*",)))
    parameters = {name: dict(task.model.named_parameters())[name].detach() for name in task.trained}
    with pytest.raises(UnsupportedError, match="No linear layer below the head is trained"):
        TrackStar(task, parameters).score(LM.examples, LM.examples)


@pytest.mark.peers
@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackstar_is_its_formula_with_the_projections_of_bergson(unit_length, setting):
    from bergson.collector.collector import create_module_projection_matrix

    (task, parameters), rows, width = setting["causal-lm"], LM.examples, 3

    def projected(grads, name):
        weight = torch.stack([each[f"model.{name}.weight"] for each in grads])
        left, right = (
            create_module_projection_matrix(
                name, side, width, size, torch.float32, torch.device("cpu"), "rademacher", "jl", None
            )
            for side, size in zip(("left", "right"), weight.shape[1:], strict=True)
        )
        return (left @ weight @ right.T).flatten(1).double()

    grads = slow_gradients("causal-lm", parameters, rows)
    parts = []
    for name in layers_of(parameters):
        x = projected(grads, name)
        values, vectors = torch.linalg.eigh(x.T @ x / len(rows))
        parts.append(x @ vectors / (values.clamp_min(0) + 0.2 * values.mean()).sqrt())
    whitened = torch.cat(parts, 1)
    if unit_length:
        whitened = whitened / whitened.norm(dim=1, keepdim=True)
    found = TrackStar(task, parameters, width, damping=0.2, unit_length=unit_length, mixed=False).score(rows[:2], rows)
    assert_close(found, (whitened[:2] @ whitened.T).numpy(), 1e-3)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bergson_leaves_the_log_alone():
    for name in [name for name in sys.modules if name.partition(".")[0] == "bergson"]:
        del sys.modules[name]
    root, mine = logging.getLogger(), logging.NullHandler()
    root.addHandler(mine)
    before, level = list(root.handlers), root.level
    trackstar.package()
    assert root.handlers == before and root.level == level
    root.removeHandler(mine)


# --- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, package, module, more",
    [
        (Trak, "dattri", "algorithm.trak", r"==0\.3\.0 \(other versions scale projections otherwise\)"),
        (TrackStar, "bergson", "cli.commands", r"==\d"),
    ],
)
def test_a_missing_package_is_named_with_its_command(method, package, module, more, setting, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.{module}", None)
    with pytest.raises(UnsupportedError, match=rf"needs the package {package}: pip install {package}{more}"):
        method(*setting["causal-lm"]).score(LM.examples, LM.examples)


def test_no_rows_wrong_parameters_and_custom_losses(unprojected, setting, monkeypatch):
    monkeypatch.setattr(trak, "package", lambda: None)
    task, parameters = setting["causal-lm"]
    for method in (Trak, TrackStar):
        assert method(task, parameters).score([], LM.examples).shape == (0, 6)
        assert method(task, parameters).score(LM.examples, []).shape == (6, 0)
        with pytest.raises(MismatchError, match="give this task's own"):
            method(task, setting["classifier"][1]).score(LM.examples, LM.examples)
    custom = Recipe(
        "custom",
        tuple(torch.randn(4, 2)),
        model=lambda: torch.nn.Linear(2, 1),
        loss=lambda m, b: m(b[0]).square().sum(1),
    )
    task = task_of(custom)
    with pytest.raises(UnsupportedError, match="TRAK needs probabilities"):
        Trak(task, dict(task.model.named_parameters())).score(custom.examples, custom.examples)


# --- by name -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return TrainingRun.train(Recipe.microgpt(["anna", "bo", "evelyn", "kim", "lena", "otto"], n=6), tmp_path / "run")


def test_z0_inf_by_name_shares_the_snapshots_of_tracin(run, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "leaveout.methods.scorer.take_snapshots",
        lambda recipe, steps, options: taken.append(steps) or take_snapshots(recipe, steps, options),
    )
    found = score_methods(run, as_queries(["anna", "kim"]), ["tracin", "z0-inf"])
    n_steps = len(run.recipe.batches())
    assert taken == [[round(n_steps * part / 4 + 0.49) for part in (1, 2, 3, 4)]]
    made = take_snapshots(run.recipe, taken[0])
    wanted = Z0Inf(task_of(run.recipe), made).score(["anna", "kim"], run.recipe.examples)
    np.testing.assert_array_equal(found["z0-inf"].scores, wanted)


def test_z0_inf_is_judged(run):
    settings = EvaluationSettings(subsets=8, second_order=False, removal_queries=0)
    (line,) = evaluate(run, ["anna", "kim"], ["z0-inf"], settings=settings).lines()
    assert line["method"] == "z0-inf" and -1 <= line["lds"]["mean"] <= 1


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["trak", "trackstar"])
def test_peers_by_name(name, tmp_path):
    recipe = LM.with_(examples=tuple(Corpus.open(PROMPTED)), units=(), optimizer=SGD)
    run = TrainingRun.train(recipe, tmp_path / "run")
    asked = as_queries(PROMPTED)
    found = score_methods(run, asked, [name, f"{name}@start"])
    assert found[name].scores.shape == (2, 2) and np.isfinite(found[name].scores).all()
    assert not np.allclose(found[name].scores, found[f"{name}@start"].scores, rtol=1e-3)
