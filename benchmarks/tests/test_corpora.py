"""The corpora are fetched once, compared, and looked for where the reader said."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest


@pytest.fixture
def corpora(script, tmp_path, monkeypatch):
    module = script("corpora")
    monkeypatch.setenv("LEAVEOUT_DATA", str(tmp_path))
    good = module.Source("MIT", "https://here/a.json", hashlib.sha256(b'["one"]').hexdigest())
    monkeypatch.setattr(module, "SOURCES", {"a/rows.json.gz": good})
    return module


def test_a_missing_file_is_fetched_packed_and_compared(corpora, monkeypatch, capsys, tmp_path):
    assert corpora.main([]) == 1 and "missing" in capsys.readouterr().out
    monkeypatch.setattr(corpora, "_read", lambda address: b'["one"]')
    assert corpora.main(["--fetch"]) == 0 and "here " in capsys.readouterr().out
    assert corpora.read_json("a/rows.json.gz") == ["one"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["rows.json.gz"]
    monkeypatch.setattr(corpora, "_read", lambda address: pytest.fail("was there"))
    assert corpora.main(["--fetch"]) == 0


def test_another_version_of_a_file_is_said(corpora, capsys, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.json.gz").write_bytes(gzip.compress(json.dumps(["two"]).encode()))
    assert corpora.main([]) == 1 and "differs  a/rows.json.gz" in capsys.readouterr().out


def test_without_a_connection_the_command_says_so_and_goes_on(corpora, monkeypatch, capsys):
    def fail(address):
        raise OSError("no network")

    monkeypatch.setattr(corpora, "_read", fail)
    assert corpora.main(["--fetch"]) == 1
    assert "a/rows.json.gz: no network" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"corpora\.py --fetch, or set LEAVEOUT_DATA"):
        corpora.data("a/rows.json.gz")
