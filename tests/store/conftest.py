"""Stores for the tests of the store."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from leaveout.store import Store, catalogue, snapshot

from .stores import put


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def small_and_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, so that a few rows fill several; no waiting for the disk, as nothing here cuts the power."""
    monkeypatch.setattr(snapshot, "_PAGE", 2)
    monkeypatch.setattr(snapshot, "_BATCH", 2)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(catalogue, "SYNCHRONOUS", "OFF")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "store"
    with Store.create(path, {"width": 16}) as store:
        put(store, "a", "b", "c", source="web")
        put(store, "d", "e", source="books", year=1999)
        store.put_side("whitening", {"mean": np.arange(3.0), "scale": np.array(2.0)})
        store.set_state("cursor", {"rows": 5})
        store.delete(["b"])
    return path


@pytest.fixture
def filled(path: Path, template: Path) -> Iterator[Store]:
    """Two segments a-c and d-e with b deleted, one side, one state; open for writing."""
    with Store.open(shutil.copytree(template, path), write=True) as store:
        yield store
