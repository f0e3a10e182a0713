"""The directory of an index: a new one, an unfinished one that a build goes on with, or a finished one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from leaveout.corpus import Corpus
from leaveout.errors import FormatError, MismatchError, refuse_other_names
from leaveout.models import ModelOptions
from leaveout.readout.build import (
    BuildOptions,
    BuildReport,
    add_rows,
    add_whitening,
    corpus_digest,
    resume_point,
    set_whitening,
)
from leaveout.readout.model import Readout
from leaveout.readout.residual import FAMILIES, NORMS_BEHIND
from leaveout.readout.settings import Channel, SignatureSettings
from leaveout.readout.shards import Shard, copy_statistics
from leaveout.readout.signature import Signer
from leaveout.store import Store
from leaveout.store.catalogue import CATALOGUE

KIND = "readout index"
RULES = 2  # of what the same settings mean; 1 had other signatures for some models, see `refuse_former_rules`


def split_options(options: dict[str, Any]) -> tuple[ModelOptions, BuildOptions, dict[str, Any]]:
    """Options of the model, of the build, and the rest, which are settings of signatures."""
    groups = [{field.name for field in fields(kind)} for kind in (ModelOptions, BuildOptions)]
    given = [{name: value for name, value in options.items() if name in group} for group in groups]
    rest = {name: value for name, value in options.items() if name not in groups[0] | groups[1]}
    known = {field.name for kind in (ModelOptions, BuildOptions, SignatureSettings, Channel) for field in fields(kind)}
    refuse_other_names("option or setting", rest, sorted(known))
    return ModelOptions(**given[0]), BuildOptions(**given[1]), rest


def same_place(one: str, other: str | Path) -> bool:
    """Whether two paths name one existing place."""
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def wanted_settings(readout: Readout, signer: Signer, corpus: Corpus) -> dict[str, Any]:
    """What the store of an index says about itself."""
    return {
        "kind": KIND,
        "rules": RULES,
        "signature": signer.settings.to_dict(),
        "model": readout.identity(),
        "source": readout.source,
        "units": corpus.units,
        "corpus": corpus.name,
        "notes": [*readout.notes, *signer.notes],
        "low_rank": None if signer.rank is None else signer.low_rank.sizes,
    }


def open_or_create(path: Path, wanted: dict[str, Any]) -> Store:
    """The store to write to, new or unfinished or finished with the same settings.

    Raises: MismatchError naming the first setting that differs.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file: give a directory for the index.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return Store.create(path, wanted)
    if not (path / CATALOGUE).exists():
        raise FileExistsError(f"{path} holds files that are no index: give an empty or a new directory for the index.")
    store = Store.open(path, write=True)
    try:
        if store.settings.get("kind") == KIND:
            refuse_former_rules(store)
        for name, old, new in _differences(store.settings, wanted):
            if _is_bare(store):
                store.close()
                shutil.rmtree(path)
                return Store.create(path, wanted)
            if name == "adapters":
                raise MismatchError(
                    f"{path} holds an index of another adapter than the given model has at work: give that model to resume, "
                    "or another directory for a new index."
                )
            long = {"channels": "other channels", "template": "another chat template"}
            other = long.get(name, f"{name} = {old!r}, not {new!r}")
            raise MismatchError(
                f"{path} holds an index with {other}: use the same settings to resume, or another directory for a new index."
            )
    except BaseException:
        store.close()
        raise
    return store


def _is_bare(store: Store) -> bool:
    """Whether a build stopped before it kept anything, as at a bad first row: nothing is lost by beginning anew."""
    return not store.state("complete") and store.n_rows == 0 and store.side("whitening") is None


def refuse_former_rules(store: Store) -> None:
    """Refuses an index whose rows an earlier leaveout computed otherwise than the same settings say now.

    By rules 1, gradients were pulled back through norms behind projections, a residual channel was replaced or left out
    by another rule for unknown families, and a CountSketch was applied to a vocabulary that fits its width.
    """
    if store.settings.get("rules", 1) >= RULES:
        return
    model, channels = store.settings["model"], SignatureSettings.from_dict(store.settings["signature"]).channels
    other_family = model["family"] in NORMS_BEHIND or model["family"] not in FAMILIES
    if any(channel.kind == "residual" for channel in channels) and other_family:
        changed = f"the residual channel of a {model['family']} model"
    elif any(channel.kind == "rh" and (channel.left_width or 0) >= model["vocabulary"] for channel in channels):
        changed = "an rh channel as wide as the vocabulary"
    else:
        return
    raise MismatchError(
        f"{store.path} was built by an earlier leaveout, for which {changed} meant something else: build it anew."
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    for name in ("kind", "units"):
        if old.get(name) != new[name]:
            yield name, old.get(name), new[name]
    for group in ("signature", "model"):
        for name, value in new[group].items():
            if old[group].get(name) != value:
                yield name, old[group].get(name), value


def fill(
    store: Store, readout: Readout, signer: Signer, corpus: Corpus, options: BuildOptions, shard: Shard
) -> BuildReport:
    """Adds what is missing of the rows of a shard, and marks the store as finished."""
    if shard.number:
        copy_statistics(store, signer, shard)
    else:
        add_whitening(store, signer, corpus, options)
    set_whitening(signer, store)
    first, end = shard.bounds(len(corpus))
    first = max(first, resume_point(store, corpus))
    rows = (row for row in corpus if first <= row.number < end)
    report = add_rows(store, readout, signer, rows, end, options, append=False)
    add_skipped(report, corpus)
    if store.n_rows == 0 and shard.of == 1:
        raise FormatError(f"{corpus.name} has no rows to index: give a corpus with at least one row.")
    store.set_state("corpus", corpus_digest(corpus))
    store.set_state("complete", True)
    return report


def add_skipped(report: BuildReport, corpus: Corpus) -> None:
    """Adds the bad rows of the whole corpus to a report."""
    report.skipped += corpus.n_skipped
    report.messages = [*corpus.problems, *report.messages][:100]


def refuse_other_rows(store: Store, corpus: Corpus) -> None:
    """Raises: MismatchError if a finished index is not of this corpus."""
    if store.state("corpus") != corpus_digest(corpus):
        raise MismatchError(
            f"{store.path} is the finished index of other rows than {corpus.name} now holds: add rows with append, "
            "or build into another directory."
        )
