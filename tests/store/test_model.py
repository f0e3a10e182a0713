"""The store against a dict, over random operations, crashes included."""

import itertools
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from leaveout.errors import FormatError
from leaveout.store import Record, Store, catalogue, purge, snapshot

from .stores import Killed, bytes_of, contents, expected, put, vectors

PLACE: list[Path] = []
STEPS: list[int] = []  # of each sequence that was run
NUMBERS = itertools.count()
Rows = dict[str, tuple[Record, bytes]]


class AgainstDict(RuleBasedStateMachine):
    """The store must show what a dict shows, in the order of the puts, after any sequence of operations."""

    names = st.lists(
        st.integers(0, 30).map(lambda n: f"row {n}, with a text to find"), min_size=1, max_size=6, unique=True
    )

    def __init__(self) -> None:
        super().__init__()
        self.directory = PLACE[0] / f"store {next(NUMBERS)}"
        self.store = Store.create(self.directory, {})
        self.model: Rows = {}
        self.reader, self.seen = Store.open(self.directory), self.model
        self.steps = -1  # the invariant is checked once before the first step

    def teardown(self) -> None:
        STEPS.append(self.steps)
        self.reopen(verify=True)
        self.store.close()
        assert self.store.check() == []
        shutil.rmtree(self.directory)

    @rule(ids=names)
    def put(self, ids: list[str]) -> None:
        if self.model.keys() & set(ids):
            with pytest.raises(FormatError, match="is in the store already"):
                put(self.store, *ids)
        else:
            put(self.store, *ids)
            self.model = self.model | expected(*ids)

    @rule(ids=names)
    def delete(self, ids: list[str]) -> None:
        assert self.store.delete(ids) == len(self.model.keys() & set(ids))
        self.model = {id: row for id, row in self.model.items() if id not in ids}

    @rule()
    def purge(self) -> None:
        if self.store.purge()["rows"]:
            self.refresh()
        self.look_for_purged_bytes()

    def look_for_purged_bytes(self) -> None:
        assert self.store.n_rows == len(self.store)
        data = bytes_of(self.directory)
        for id in {f"row {n}, with a text to find" for n in range(31)} - self.model.keys():
            assert f"text of {id}".encode() not in data and vectors([id])["vector"].tobytes() not in data

    @rule(ids=names, gone=names)
    def take(self, ids: list[str], gone: list[str]) -> None:
        other = PLACE[0] / f"other {next(NUMBERS)}"
        with Store.create(other, {}) as store:
            put(store, *ids)
            store.delete(gone)
        fresh = [id for id in ids if id not in gone and id not in self.model]
        theirs = Store.open(other)
        assert [self.store.take(theirs, part) for part in theirs.segments()] == [len(fresh)]
        self.model = self.model | expected(*fresh)
        shutil.rmtree(other)

    @rule(verify=st.booleans())
    def reopen(self, verify: bool) -> None:
        self.store.close()
        self.store = Store.open(self.directory, write=True, verify=verify)

    @rule(verify=st.booleans())
    def reopen_reader(self, verify: bool) -> None:
        self.reader, self.seen = Store.open(self.directory, verify=verify), self.model

    @rule()
    def refresh(self) -> None:
        self.reader.refresh()
        self.seen = self.model

    @rule(
        ids=names, name=st.sampled_from(["put", "delete"]), moment=st.sampled_from(["in the transaction", "before it"])
    )
    def die(self, ids: list[str], name: str, moment: str) -> None:
        """What was begun is as if it had never been, and files that it left are removed."""
        ids = [id for id in ids if (id in self.model) == (name == "delete")]
        if not ids:
            return
        with pytest.MonkeyPatch.context() as patch:

            def dying(*values: object) -> None:
                raise Killed

            patch.setattr(catalogue, "set_entry" if moment == "in the transaction" else "writing", dying)
            with pytest.raises(Killed):
                put(self.store, *ids) if name == "put" else self.store.delete(ids)
        (self.directory / f"{self.store.version + 1:08d}-{self.store.version + 1:08d}.safetensors.tmp").write_bytes(
            b"x"
        )
        self.reopen(verify=False)
        assert not list(self.directory.glob("*.tmp"))

    @precondition(lambda self: len(self.store) < self.store.n_rows)
    @rule(moment=st.sampled_from(["put_in_place", "vacuum", "raw"]))
    def die_in_purge(self, moment: str) -> None:
        """Before the commit nothing has happened; after it the next open finishes the purge and its proof."""
        with pytest.MonkeyPatch.context() as patch:

            def dying(*values: object) -> None:
                raise Killed

            patch.setattr(purge if moment == "put_in_place" else catalogue, moment, dying)
            with suppress(Killed):
                self.store.purge()
        self.reopen(verify=False)
        if moment != "put_in_place":
            self.refresh()
            self.look_for_purged_bytes()
            assert self.store.state("purge")["problem"] is None

    @invariant()
    def same(self) -> None:
        self.steps += 1
        for store, model in ((self.store, self.model), (self.reader, self.seen)):
            found = contents(store)
            assert found == model and list(found) == list(model)
            assert store.numbers(list(model)).tolist() == store.numbers_where("1").tolist()


def run_steps(place: Path, monkeypatch: pytest.MonkeyPatch, examples: int, steps: int) -> int:
    """Number of steps that were run."""
    monkeypatch.setattr(snapshot, "_PAGE", 8)
    monkeypatch.setattr(snapshot, "_BATCH", 8)
    PLACE[:], STEPS[:] = [place], []
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        deadline=None, max_examples=examples, stateful_step_count=steps, derandomize=True, suppress_health_check=health
    )
    run_state_machine_as_test(AgainstDict, settings=options)
    print(f"{sum(STEPS):,} steps in {len(STEPS):,} sequences")
    return sum(STEPS)


def test_store_is_a_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hypothesis draws other sequences on another machine: 1,888 to 2,028 steps were seen.
    assert run_steps(tmp_path, monkeypatch, examples=60, steps=40) >= 1_500


@pytest.mark.nightly
def test_store_is_a_dict_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_steps(tmp_path, monkeypatch, examples=900, steps=70) >= 50_000
