"""What packages add by the entry-point group `leaveout.plugins`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import leaveout
from command import run_command
from leaveout import Index, Recipe, TrainingRun, attribute, load_readout, plugins
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.jets import Space, tensor
from leaveout.methods.registry import parse
from leaveout.readout.families import find_taps
from leaveout.readout.settings import Channel
from readout.tiny import make_model, make_tokenizer


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a package with entry points, of one module, for the time of a test."""

    def install(name: str, entries: dict[str, str], code: str = "") -> None:
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (tmp_path / f"{name}.py").write_text(code)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
        (folder / "entry_points.txt").write_text(f"[leaveout.plugins]\n{lines}")
        sys.modules.pop(name, None)  # another test's
        plugins._by_hook.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._by_hook.cache_clear()
    yield install
    plugins._by_hook.cache_clear()


def how_to(page: str) -> tuple[list[str], dict[str, str]]:
    """Snippets of Python on a page of docs/how-to, and the entries that it names."""
    text = (Path(__file__).parents[1] / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL), dict(re.findall(r'^"(.*?)" = "(.*?)"$', text, re.M))


def test_entry_is_found_under_its_hook_and_loads(package):
    package("added", {"method.of-mine": "added:score", "rule.aten.sinc.default": "added:rule"}, "score, rule = 7, 8\n")
    assert plugins.load(plugins.found("method")["of-mine"]) == 7
    assert plugins.load(plugins.found("rule")["aten.sinc.default"]) == 8
    assert "of-mine" not in plugins.found("family")


def test_entry_without_a_hook_is_refused(package):
    package("stray", {"methods.of-mine": "stray:score"})
    with pytest.raises(
        MismatchError, match=r"'methods.of-mine' \(stray:score\) names no hook: .* did you mean 'method'"
    ):
        plugins.found("method")


def test_two_packages_with_one_name_are_refused(package):
    package("first", {"family.opt": "first:opt"})
    package("second", {"family.opt": "second:opt"})
    with pytest.raises(MismatchError, match=r"the family 'opt' \(first:opt and second:opt\): uninstall one"):
        plugins.found("family")


@pytest.mark.parametrize(
    ("code", "told"),
    [("import a_package_that_is_not_there", "ModuleNotFound"), ("raise SystemExit(3)", "SystemExit: 3")],
)
def test_package_that_does_not_import_is_named(package, code, told):
    package("broken", {"method.of-mine": "broken:score"}, f"{code}\n")
    with pytest.raises(UnsupportedError, match=rf"'method.of-mine' \(broken:score\) does not import \({told}"):
        plugins.load(plugins.found("method")["of-mine"])


def test_rule_of_another_package_is_used_by_jets(package, monkeypatch):
    """Both snippets of the page are run; the series is compared with one made of operations that have rules."""
    (code, use), entries = how_to("own-rule")
    package("my_package", entries, code)
    monkeypatch.setattr(tensor, "TABLE", dict(tensor.TABLE))
    x = Space(2, 1).jet(torch.tensor([0.4, -1.2]), torch.ones(2, 1, 2))
    x.requires_grad_()
    found, wanted = torch.sinc(x), (x * torch.pi).sin() / (x * torch.pi)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)]
    for a, b in ((found, wanted), slopes):
        assert torch.allclose(a.c, b.c) and torch.allclose(a.h, b.h)
    exec(use, {})


def test_method_of_another_package_is_judged_by_its_name(package, tmp_path, monkeypatch, capsys):
    """The page's function and its line of packaging, in a folder of their own, through the command line of a new process
    and of this one."""
    snippets, entries = how_to("own-method")
    package("my_package", entries, snippets[0])
    names = [a + b for a in ("an", "bo", "ci") for b in ("na", "ri", "so", "tu")]
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "recipe.yaml").write_text("kind: microgpt\ndata: names.txt\n")
    run = TrainingRun.train(tmp_path / "recipe.yaml", tmp_path / "run")
    source = Path(leaveout.__file__).parents[1]
    asked = ["run", "--query", "anri", "--query", "bona", "--method", "letter-pairs"]
    judge = ["evaluate", *asked, "--method", "random", "--subsets", "4", "--qld", "0", "--no-ceiling", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "leaveout.cli", *judge], check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(source)])}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["method"] for line in lines} == {"letter-pairs", "random"}
    monkeypatch.chdir(tmp_path)
    code, _, said = run_command(monkeypatch, capsys, "attribute", *asked, "--out", "scores.npy")
    assert code == 0, said
    scores = np.load(tmp_path / "scores.npy")
    texts = [row.text for row in run.recipe.examples]
    assert texts[scores[0].argmax()] == "anri" and texts[scores[1].argmax()] == "bona"
    assert scores[0, texts.index("bori")] == np.float32(1 / 3)


def test_method_says_what_it_takes(package, tmp_path):
    """What the page's second snippet declares is refused before anything is scored."""
    snippets, entries = how_to("own-method")
    package("my_package", entries, snippets[1])
    run = TrainingRun.train(Recipe.microgpt(["ana", "bo"], n=2), tmp_path / "run")
    with pytest.raises(UnsupportedError, match="letter-pairs takes no microgpt recipe, only causal-lm: leave it out"):
        attribute(run, ["ana"], "letter-pairs")


def test_methods_that_cannot_be_used_are_refused(package, tmp_path):
    code = "import numpy as np\nword = 'no function'\ndef short(scorer, at):\n    return np.zeros((1, 5))\n"
    package("mine", {"method.word": "mine:word", "method.short": "mine:short"}, code)
    run = TrainingRun.train(Recipe.microgpt(["ana", "bo"], n=2), tmp_path / "run")
    for name, error, message in (
        ("word", UnsupportedError, r"'word' \(mine:word\) is 'no function': make it a function \(scorer, at\)"),
        (
            "short",
            MismatchError,
            r"The scores of short have the shape \(1, 5\): give \[query, example\], here \[1, 2\]",
        ),
        ("shirt", ValueError, "did you mean 'short'"),
    ):
        with pytest.raises(error, match=message):
            attribute(run, ["ana"], name)


@pytest.mark.parametrize("scores", ["[[1.0], [1.0, 2.0]]", "torch.ones(1, 2, requires_grad=True)"])
def test_scores_that_are_no_array_are_refused(scores, package, tmp_path):
    package("mine", {"method.odd": "mine:odd"}, f"import torch\ndef odd(scorer, at):\n    return {scores}\n")
    run = TrainingRun.train(Recipe.microgpt(["ana", "bo"], n=2), tmp_path / "run")
    with pytest.raises(FormatError, match="The scores of odd are no array of numbers"):
        attribute(run, ["ana"], "odd")


def test_method_with_a_checkpoint_in_its_name_is_refused(package):
    package("mine", {"method.odd@start": "mine:odd"})
    with pytest.raises(MismatchError, match=r"'odd@start' \(mine:odd\) has an @, behind which a checkpoint stands"):
        parse("random")


def test_rule_that_is_no_function_is_refused(package, monkeypatch):
    package("mine", {"rule.aten.sinc.default": "mine:sinc"}, "sinc = 3\n")
    monkeypatch.setattr(tensor, "TABLE", dict(tensor.TABLE))
    with pytest.raises(UnsupportedError, match=r"The rule of aten.sinc.default \(mine:sinc\) is 3: make it a function"):
        torch.sinc(Space(2, 1).jet(torch.tensor([0.4]), torch.ones(2, 1, 1)))


def test_method_by_the_name_of_a_built_in_is_refused(package):
    package("mine", {"method.bm25": "mine:score"})
    with pytest.raises(MismatchError, match="'bm25' is leaveout's own, and mine:score adds one of the same name"):
        parse("random")


def test_family_of_another_package_gives_the_layers_of_its_models(package, tmp_path):
    (code,), entries = how_to("own-family")
    lm, tokenizer = make_model("phi", spread=0.1, dtype=torch.float32), make_tokenizer()
    assert (
        "are not known"
        in Index.build(lm, ["a b", "c d"], tmp_path / "without", "residual", tokenizer).info()["notes"][0]
    )
    package("my_package", entries, code)
    index = Index.build(lm, ["a b", "c d"], tmp_path / "with", "residual", tokenizer)
    blocks = [f"residual1/{block}.{output}" for block in (0, 1) for output in ("attention", "mlp")]
    assert not index.info().get("notes") and set(blocks) < {part.name for part in index.signer.parts}
    taps, final_norm = find_taps(index.signer.readout, Channel("residual"))
    assert [tap.projection for tap in taps[:2]] == [lm.model.layers[0].self_attn.dense, lm.model.layers[0].mlp.fc2]
    assert final_norm is lm.model.final_layernorm and np.isfinite(index.score(["a b"])).all()
    other = Index.open(tmp_path / "without", lm, tokenizer)
    for ask in (lambda: other.score(["a b"]), lambda: other.append(["e f"])):
        with pytest.raises(MismatchError, match="have other parts than this phi model has now"):
            ask()
    with pytest.raises(MismatchError, match="holds an index with other parts"):
        Index.build(lm, ["a b", "c d"], tmp_path / "without", "residual", tokenizer)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Family('layers', 'norm', 'self_attn.dense', 'mlp.fc2')", "names what the model lacks: .*norm"),
        (
            "Family('layers', 'final_layernorm', 'self_attn.dense', 'mlp.fc1')",
            r"mlp.fc1 of a phi model is a Linear with",
        ),
        ("Family('layers', 'final_layernorm', 'self_attn', 'mlp.fc2')", r"self_attn of a phi model is a PhiAttention"),
        ("('layers', 'norm')", r"The family 'phi' \(mine:phi\) is \('layers', 'norm'\): make it a Family"),
    ],
)
def test_family_that_does_not_fit_the_model_is_refused(family, message, package):
    package("mine", {"family.phi": "mine:phi"}, f"from leaveout.readout.families import Family\nphi = {family}\n")
    with pytest.raises(UnsupportedError, match=message):
        find_taps(load_readout(make_model("phi"), make_tokenizer()), Channel("residual"))


def test_family_that_leaveout_knows_is_not_replaced(package):
    package("mine", {"family.llama": "mine:llama"})
    with pytest.raises(MismatchError, match="leaveout knows the family 'llama', and mine:llama adds it again"):
        find_taps(load_readout(make_model("llama"), make_tokenizer()), Channel("residual"))


def test_family_whose_layers_get_flattened_rows_is_refused(package, tmp_path):
    """OPT gives its second linear layer [rows x tokens, size]."""
    code = "from leaveout.readout.families import Family\n"
    code += "opt = Family('decoder.layers', 'decoder.final_layer_norm', 'self_attn.out_proj', 'fc2')\n"
    package("mine", {"family.opt": "mine:opt"}, code)
    config = OPTConfig(
        vocab_size=523, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"Linear of this model gets numbers of shape \(\d+, 64\), and \[2 rows"):
        Index.build(OPTForCausalLM(config), ["a b", "c d"], tmp_path / "idx", "residual", make_tokenizer())
