"""What packages add by the entry-point group `leaveout.plugins`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from leaveout import plugins
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.jets import Space, tensor


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
        plugins._by_hook.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._by_hook.cache_clear()
    yield install
    plugins._by_hook.cache_clear()


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


def test_package_that_does_not_import_is_named(package):
    package("broken", {"method.of-mine": "broken:score"}, "import a_package_that_is_not_there\n")
    with pytest.raises(UnsupportedError, match=r"'method.of-mine' \(broken:score\) does not import \(ModuleNotFound"):
        plugins.load(plugins.found("method")["of-mine"])


def test_rule_of_another_package_is_used_by_jets(package, monkeypatch):
    """Both snippets of the page are run; the series is compared with one made of operations that have rules."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "own-rule.md").read_text()
    code, use = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r'^"(.*?)" = "my_package:sinc"$', page, re.MULTILINE)
    package("my_package", {entry: "my_package:sinc"}, code)
    monkeypatch.setattr(tensor, "TABLE", dict(tensor.TABLE))
    x = Space(2, 1).jet(torch.tensor([0.4, -1.2]), torch.ones(2, 1, 2))
    x.requires_grad_()
    found, wanted = torch.sinc(x), (x * torch.pi).sin() / (x * torch.pi)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)]
    for a, b in ((found, wanted), slopes):
        assert torch.allclose(a.c, b.c) and torch.allclose(a.h, b.h)
    exec(use, {})
