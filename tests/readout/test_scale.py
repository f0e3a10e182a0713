"""Shards, roll-ups and scan workers: the same answers, or answers as near as their theory says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from leaveout.errors import FormatError, MismatchError
from leaveout.readout import parts
from leaveout.readout import scan as scan_module
from leaveout.readout.build import Pace
from leaveout.readout.index import Index
from leaveout.readout.parts import Shard, shard_of
from leaveout.store import Store

from .conftest import assert_close, ranked
from .test_codec import dense
from .test_index import CORPUS, MANY_COMMITS, contents
from .tiny import TEXTS, built, make_model

QUERIES = [TEXTS[0], TEXTS[5]]
# The same text again: under its own id, as a row without an id of its own, and once more in another shard.
REPEATED = [*CORPUS[:4], TEXTS[0], TEXTS[1], TEXTS[0], *CORPUS[4:8], TEXTS[0], TEXTS[1], *CORPUS[8:]]
RANKS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(lm, tokenizer, tmp_path_factory):
    """The model in a directory."""
    path = tmp_path_factory.mktemp("model") / "model"
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def paper(lm, tokenizer, tmp_path_factory):
    """An index of six segments whose rows are 24,576 numbers; leave it as it is."""
    return Index.build(lm, CORPUS, tmp_path_factory.mktemp("paper") / "index", "paper", tokenizer, **MANY_COMMITS)


def found(hits):
    return [[(hit.id, hit.score) for hit in row] for row in hits]


def ids(hits):
    return [[hit.id for hit in row] for row in hits]


def environment(**changes):
    """Variables of a process that finds the tests, and does not think that it is part of a job."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    return {name: value for name, value in os.environ.items() if name not in RANKS} | {"PYTHONPATH": paths} | changes


# Scan workers.


@pytest.mark.parametrize("options", [{}, {"where": "n > 7"}, {"group_by": "source"}, {"unique": True}])
def test_scan_workers_change_nothing(options, paper):
    queries, one = paper.encode(QUERIES), threading.active_count()
    assert found(paper.search(queries, 9, workers=3, **options)) == found(paper.search(queries, 9, **options))
    assert threading.active_count() == one
    with pytest.raises(ValueError, match="workers is 0: give a whole number of at least 1"):
        paper.search(queries, workers=0)


def test_scan_workers_are_at_work_at_the_same_time(paper, monkeypatch):
    both, real = threading.Barrier(2, timeout=20), scan_module.Scanner.scores

    def scores(*args):
        both.wait()  # passes only if two segments are scanned at once
        return real(*args)

    monkeypatch.setattr(scan_module.Scanner, "scores", scores)
    assert len(paper.search(QUERIES, 5, workers=2)[0]) == 5


# Roll-ups.


def by_hand(index, key, k):
    """Per query the best row of each group, from all scores."""
    scores, records = index.score(QUERIES), index.records(index.ids)
    for row in scores:
        best = {}
        for at in ranked(row):
            best.setdefault(key(records[at]), records[at].id)
        yield list(best.values())[:k]


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("page", [1, 256])
def test_groups_are_their_best_rows(page, k, paper, monkeypatch):
    monkeypatch.setattr("leaveout.readout.scan.PAGE", page)
    for field in ("group", "source"):
        wanted = list(by_hand(paper, lambda record, field=field: record.meta[field], k))
        assert ids(paper.search(QUERIES, k, group_by=field)) == wanted
    assert ids(paper.search(QUERIES, k, group_by="unit")) == list(by_hand(paper, lambda record: record.unit, k))


def test_rows_of_the_same_content_count_once(lm, tokenizer, tmp_path):
    index = Index.build(lm, REPEATED, tmp_path / "index", "paper", tokenizer, **MANY_COMMITS)
    assert ids(index.search(QUERIES, 20, unique=True)) == list(by_hand(index, lambda record: record.content_hash, 20))
    repeats = [id for id in index.ids if "-" in id]
    assert len(repeats) == 3 and not {*repeats} & {*ids(index.search(QUERIES, 20, unique=True))[0]}
    assert {*repeats} < {*ids(index.search(QUERIES, 40))[0]}


@pytest.mark.parametrize(("preset", "n_bytes"), [("paper", None), ("default", None), ("default", 4096)])
def test_alike_rows_count_once(preset, n_bytes, lm, tokenizer, tmp_path):
    """By the cosines of rows as they are stored."""
    rows = [row for n in range(4) for row in (CORPUS[n], {**CORPUS[n], "id": f"again {n}"})]
    rows += [{"id": f"near {n}", "text": f"{TEXTS[0]} {n}"} for n in range(30)] + CORPUS[4:]
    form = {"bytes_per_row": n_bytes, "storage": "float32"}
    index = built(lm, rows, tmp_path / "index", preset, tokenizer, **form, **MANY_COMMITS)
    if n_bytes is None:
        products = index.score([row["text"] for row in rows]).astype(np.float64)
    else:
        stored = [
            {name[5:]: a for name, a in part.arrays().items() if name[:5] == "long."} for part in index.store.segments()
        ]
        vectors = np.concatenate([dense(index.long.decode(arrays), index.long.sizes) for arrays in stored])
        products = vectors @ vectors.T
    length = np.sqrt(np.diag(products))
    cosines, scores = products / length / length[:, None], index.score(QUERIES, length="cosine")
    for threshold in (0.6, 0.95):
        for hits, row in zip(index.search(QUERIES, 6, unique=threshold), scores, strict=True):
            wanted = []
            for at in ranked(row):
                if all(cosines[at, other] <= threshold for other in wanted):
                    wanted.append(at)
            assert [hit.id for hit in hits] == [index.ids[at] for at in wanted[:6]]


def test_wrong_options_are_refused(paper):
    for options, sentence in [
        ({"group_by": "colour"}, r"group_by is 'colour': give one of unit, source, n, group"),
        ({"group_by": "source", "unique": True}, "group_by and unique both say which rows count as one"),
        ({"unique": 1.5}, "unique is 1.5: give True, or a cosine between 0 and 1"),
        ({"shortlist": 0}, "shortlist is 0: give a whole number of at least 1"),
        ({"shortlist": 9}, "shortlist is 9, k 10: give a list of at least k rows"),
        (
            {"shortlist": 20, "exact": True},
            "shortlist and exact both say which rows are scored exactly: give one of them",
        ),
        ({"reencode": -1}, "reencode is -1: give a whole number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            paper.search(QUERIES, **options)
        if not options.keys() & {"group_by", "unique"}:
            with pytest.raises(ValueError, match=sentence):
                paper.plan_search(**options)


# Shards.


def test_the_environment_says_which_shard(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no variable says which process this is: start it with torchrun or srun"):
        shard_of("auto")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert shard_of("auto").name == "shard-00003-of-00016"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shard_of("auto") == Shard(0, 2) and shard_of(None) == Shard(0, 1) and shard_of((1, 3)) == Shard(1, 3)
    for ask in ((3, 3), (-1, 2), "all"):
        with pytest.raises(ValueError, match="shard is"):
            shard_of(ask)


def test_shards_are_a_partition():
    for n, of in ((22, 3), (2, 5), (0, 2)):
        bounds = [Shard(number, of).bounds(n) for number in range(of)]
        assert [bounds[0][0], *(end for _, end in bounds)] == [first for first, _ in bounds] + [n]


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_merged_shards_are_the_index_of_one_process(preset, lm, tokenizer, tmp_path, monkeypatch):
    whole = Index.build(lm, REPEATED, tmp_path / "whole", preset, tokenizer, **MANY_COMMITS)
    for number in range(3):
        shard = Index.build(lm, REPEATED, tmp_path / "parts", preset, tokenizer, shard=(number, 3), **MANY_COMMITS)
        assert shard.path.name == f"shard-0000{number}-of-00003" and len(shard) in (9, 10)
    real, calls = Store.take, []

    def take(*args):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "take", take)
        Index.merge(tmp_path / "parts", tmp_path / "one")
    merged = Index.merge(tmp_path / "parts", tmp_path / "one")
    assert merged.check() == []
    merged = Index.open(merged.path, lm, tokenizer)
    assert contents(merged.path)[1:] == contents(whole.path)[1:]  # ids, texts, fields, statistics
    assert merged.fingerprint == whole.fingerprint
    assert_close(merged.score(QUERIES), whole.score(QUERIES), "one level")
    again = Index.build(lm, REPEATED, merged.path, preset, tokenizer)  # it counts as the finished index of these rows
    assert again.last_report.added == 0
    with pytest.raises(MismatchError, match="one holds a finished index: give a new directory"):
        Index.merge(tmp_path / "parts", tmp_path / "one")


SHARD = """
import sys
from leaveout.readout.build import Pace
from leaveout.readout.index import Index
from readout.test_scale import REPEATED
import torch
torch.set_num_threads(1)
Index.build(sys.argv[1], REPEATED, sys.argv[2], "default", shard="auto", pace=Pace(chunk_rows=4))
"""


def test_processes_that_start_together_build_one_index(model, tmp_path):
    """In the wrong order, and told who they are by torchrun or by Slurm; the same as shards built one by one."""
    told = [{"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}]
    command = [sys.executable, "-c", SHARD, model, str(tmp_path / "parts")]
    started = [subprocess.Popen(command, env=environment(**one), stderr=subprocess.PIPE, text=True) for one in told]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for number in range(2):
        Index.build(model, REPEATED, tmp_path / "alone", "default", shard=(number, 2), pace=Pace(chunk_rows=4))
    merged = [Index.merge(tmp_path / name, tmp_path / f"{name} merged") for name in ("parts", "alone")]
    assert contents(merged[0].path) == contents(merged[1].path) and len(merged[0]) == len(REPEATED)


def test_shards_that_do_not_belong_together_are_refused(lm, tokenizer, tmp_path, monkeypatch):
    def build(name, rows, number, **options):
        return Index.build(lm, rows, tmp_path / name, "paper", tokenizer, shard=(number, 2), **options)

    with pytest.raises(
        FormatError, match="none holds no index and no shards: give the directory that a build wrote to"
    ):
        Index.merge(tmp_path / "none", tmp_path / "one")
    build("part", CORPUS, 0)
    with pytest.raises(
        MismatchError, match="shard-00001-of-00002 is missing: run the build of that shard, or name its"
    ):
        Index.merge(tmp_path / "part", tmp_path / "one")
    build("part", CORPUS[:21], 1)
    with pytest.raises(
        MismatchError, match=r"shard-00001-of-00002 has another corpus than .*shard-00000-of-00002: build"
    ):
        Index.merge(tmp_path / "part", tmp_path / "one")
    assert not (tmp_path / "one").exists()
    shutil.rmtree(tmp_path / "part" / "shard-00001-of-00002")
    Store.create(tmp_path / "part" / "shard-00001-of-00002", Store.open(build("part", CORPUS, 0).path).settings).close()
    with pytest.raises(MismatchError, match="shard-00001-of-00002 is unfinished: run the command that built it again"):
        Index.merge(tmp_path / "part", tmp_path / "one")
    build("part", CORPUS, 1)
    shards = sorted((tmp_path / "part").iterdir())
    with pytest.raises(MismatchError, match="shard-00002-of-00009 does not belong to the other 2 shards: leave it out"):
        Index.merge([*shards, shutil.copytree(shards[0], tmp_path / "shard-00002-of-00009")], tmp_path / "one")
    same = [*CORPUS[:20], {**CORPUS[0], "text": "other"}]
    for number in range(2):
        build("same id", same, number)
    with pytest.raises(FormatError, match="The id 'row 0' of row 21 is that of an earlier row of another shard"):
        Index.merge(tmp_path / "same id", tmp_path / "two")
    monkeypatch.setattr(parts, "PATIENCE", 0.1)
    with pytest.raises(MismatchError, match=r"no statistics in .* after 0 s: start the process of shard 0 as well"):
        Index.build(lm, CORPUS, tmp_path / "late", "default", tokenizer, shard=(1, 2))


def test_indexes_of_a_development_version_are_refused(lm, tokenizer, tmp_path):
    """They do not say how their rows are stored."""
    index = built(lm, CORPUS[:2], tmp_path / "now", "similarity", tokenizer)
    settings = {name: value for name, value in index.store.settings.items() if name != "codec"}
    with Store.create(tmp_path / "then", settings) as store:
        store.take(index.store, index.store.segments()[0])
        store.set_state("complete", True)
    for ask in (
        lambda: Index.merge([tmp_path / "then", tmp_path / "now"], tmp_path / "one"),
        lambda: Index.merge([tmp_path / "now", tmp_path / "then"], tmp_path / "one"),
        lambda: built(lm, CORPUS[:2], tmp_path / "then", "similarity", tokenizer),
    ):
        with pytest.raises(MismatchError, match="does not say how its rows are stored: build it anew"):
            ask()


# Whitening that indexes share.


def whitening(path):
    return {name: values.tobytes() for name, values in (Store.open(path).side("whitening") or {}).items()}


def test_shards_whiten_alike(lm, tokenizer, tmp_path):
    """Each of them takes the matrices of the first, so that a query is encoded once for all."""
    shards = [Index.build(lm, CORPUS, tmp_path / "parts", "default", tokenizer, shard=(n, 3)) for n in range(3)]
    alone = [Index.build(lm, CORPUS[at : at + 7], tmp_path / f"alone {at}", "default", tokenizer) for at in (0, 7)]
    assert whitening(shards[0].path) and len({index.fingerprint for index in shards}) == 1
    assert all(whitening(index.path) == whitening(shards[0].path) for index in shards)
    assert len({index.fingerprint for index in alone}) == 2 and whitening(alone[0].path) != whitening(alone[1].path)


def test_indexes_of_other_whitening_are_not_merged(lm, tokenizer, tmp_path):
    one = Index.build(lm, CORPUS[:11], tmp_path / "one", "default", tokenizer)
    two = Index.build(lm, CORPUS[11:], tmp_path / "two", "default", tokenizer)
    sentence = "two has another whitening than .*one, so that their scores cannot be compared: build it again with the"
    with pytest.raises(
        MismatchError, match=rf"{sentence} statistics of that index \(--statistics\), or both as shards"
    ):
        Index.merge([one.path, two.path], tmp_path / "all")
    with pytest.raises(MismatchError, match=r"two has another whitening than .*one already: give a new directory"):
        Index.build(lm, CORPUS[11:], two.path, "default", tokenizer, statistics=one.path)
    with Store.open(two.path, write=True) as store:  # what is compared is the matrices, not what is said about them
        store.set_state("statistics", Store.open(one.path).state("statistics"))
    with pytest.raises(MismatchError, match="another whitening"):
        Index.merge([one.path, two.path], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("n_taken", [0, 1, 3])
def test_indexes_with_shared_statistics_become_one(n_taken, lm, tokenizer, tmp_path, monkeypatch):
    """The rows and scores of the index that was appended to; also after a kill."""
    first, second = CORPUS[:9], [CORPUS[2], *CORPUS[9:]]
    one = Index.build(lm, first, tmp_path / "one", "default", tokenizer, **MANY_COMMITS)
    two = Index.build(lm, second, tmp_path / "two", "default", tokenizer, statistics=one.path, **MANY_COMMITS)
    assert two.fingerprint == one.fingerprint
    two.delete([CORPUS[-1]["id"]])
    real, calls = Store.take, []

    def take(*args):
        calls.append(0)
        if len(calls) > n_taken:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "take", take)
        Index.merge([one.path, two.path], tmp_path / "all")
    with pytest.raises(MismatchError, match="all holds the unfinished index of other parts: give a new directory"):
        Index.merge([two.path, one.path], tmp_path / "all")
    merged = Index.merge([one.path, two.path], tmp_path / "all")
    report, merged = merged.last_report, Index.open(merged.path, lm, tokenizer)
    one.append([row for row in second if row["id"] != CORPUS[-1]["id"]])
    assert merged.ids == one.ids and merged.check() == [] and merged.fingerprint == one.fingerprint
    assert report.repeated == 1 and report.added == len(one) - sum(p.n_rows for p in one.store.segments()[:n_taken])
    assert_close(merged.score(QUERIES), one.score(QUERIES), "one level")


def test_indexes_that_do_not_belong_together_are_refused(lm, tokenizer, tmp_path):
    def build(name, rows, preset="paper", **options):
        return Index.build(lm, rows, tmp_path / name, preset, tokenizer, **options).path

    one, all_ = build("one", CORPUS[:4]), tmp_path / "all"
    for options, sentence in [
        ({"temperature": 0.5}, r"signature \(temperature = 0.5, not 0.1\)"),
        ({"units": "source"}, "units"),
    ]:
        other = build(str(options), CORPUS[4:6], **options)
        with pytest.raises(MismatchError, match=rf"has another {sentence} than .*one: build it again like that"):
            Index.merge([one, other], all_)
    with pytest.raises(ValueError, match="one is given twice: give every part once"):
        Index.merge([one, tmp_path / "one" / ".." / "one"], all_)
    with pytest.raises(ValueError, match="parts is empty"):
        Index.merge([], all_)
    Store.create(tmp_path / "bank", {"kind": "bank"}).close()
    with pytest.raises(MismatchError, match="bank holds a bank, not an index: give an index"):
        Index.merge([one, tmp_path / "bank"], all_)
    with pytest.raises(FormatError, match="nowhere is not a store"):
        Index.merge([one, tmp_path / "nowhere"], all_)
    same = build("same", [{**CORPUS[1], "text": "another"}])
    with pytest.raises(FormatError, match=r"The id 'row 1' in .*same is that of another row of an earlier part: give"):
        Index.merge([one, same], tmp_path / "clash")
    with pytest.raises(ValueError, match="one has no whitening: leave statistics out, or finish"):
        build("plain", CORPUS[:2], statistics=one)
    white = build("whitened", CORPUS[:2], "default")
    with Store.open(white, write=True) as store:
        store.put_side("whitening", {name: values * 2 for name, values in (store.side("whitening") or {}).items()})
    for use in (
        lambda: build("other", CORPUS[:3], "default", statistics=white),
        lambda: Index.merge([white], tmp_path / "copy"),
    ):
        with pytest.raises(
            FormatError, match=r"The whitening of .*whitened is damaged: restore that index from a copy"
        ):
            use()
    with pytest.raises(MismatchError, match="one was built with another signature than this index: give an index of"):
        build("white", CORPUS[:2], "default", statistics=one)
    damaged = build("damaged", CORPUS[4:6])
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(FormatError, match="is damaged"):
        Index.merge([one, damaged], tmp_path / "flipped")


# Ray.

CLUSTER = """
import sys
from pathlib import Path
import ray, torch
from ray.cluster_utils import Cluster
from leaveout.errors import UnsupportedError
from leaveout.readout.build import Pace
from leaveout.readout.index import Index
from leaveout.store import Store
from readout.test_index import CORPUS, contents
from readout.tiny import make_model, make_tokenizer

torch.set_num_threads(1)
model, out = sys.argv[1], Path(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False)

rows = [{**row, "id": f"{turn} {row['id']}"} for turn in range(12) for row in CORPUS]
small = {"pace": Pace(chunk_rows=2, commit_bytes=1)}
whole = Index.build(model, rows, out / "whole", **small)
asked = [row["text"] for row in CORPUS[:2]]
assert whole.search(asked, 5, workers=2, backend="ray") == whole.search(asked, 5)
assert whole.search(asked, 5, "id > '5'", workers=2, backend="ray") == whole.search(asked, 5, "id > '5'") != []
puts, real = [], Store.put

def put(*args):
    puts.append(0)
    if len(puts) == 10:
        cluster.remove_node(nodes[1], allow_graceful=False)
    return real(*args)

Store.put = put
index = Index.build(model, rows, out / "ray", workers=2, backend="ray", **small)
assert len(puts) == 132 and contents(index.path) == contents(whole.path) and index.check() == []
try:
    Index.build(make_model(), rows, out / "memory", tokenizer=make_tokenizer(), workers=2, backend="ray")
except UnsupportedError as error:
    assert "Ray workers load the model by themselves" in str(error)
else:
    raise AssertionError
print("fine")
"""


@pytest.mark.ray
def test_ray_builds_the_same_index_though_a_node_dies(model, tmp_path):
    """Two nodes of one CPU each, one killed in the middle; in a process of its own, as Ray leaves threads and files."""
    pytest.importorskip("ray", reason="ray is not installed")
    ended = subprocess.run(
        [sys.executable, "-c", CLUSTER, model, str(tmp_path)],
        check=False,
        env=environment(RAY_AUTH_MODE="disabled", RAY_worker_niceness="0"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0 and "fine" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-3000:]
