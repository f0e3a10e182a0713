"""Checks of a model, or of an index and its model: a table of what passed and what did not."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leaveout.corpus import Row
from leaveout.errors import LeaveoutError
from leaveout.models import ModelOptions
from leaveout.readout.codec import TRIPLES, Filled
from leaveout.readout.families import find_taps
from leaveout.readout.index import Index
from leaveout.readout.learned import learned_corpus, learned_rows
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import Channel, SignatureSettings, resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import TokenisedRow, Window, batches, tokenise
from leaveout.readout.wide import idle_root
from leaveout.store.catalogue import CATALOGUE
from leaveout.tables import Check, Diagnosis

SAMPLE = (
    "The harbour master wrote the arrival time of every ship into a blue ledger, and at noon he rang the bell.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface.",
    "Dear Ms Okafor, thank you for your letter of 3 May; the spare part left our workshop this morning.",
    "Yes.",
)
ROW = (300, 200)  # tokens of the rows whose speed is measured, and how many of them are learned
ROWS = {"cpu": 1, "device": 48}  # how many are timed at once
INVARIANT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


def doctor(
    model: Any,
    tokenizer: Any = None,
    *,
    rows: Any = None,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Diagnosis:
    """What can be known of a model before an index is built on it, or of an index; prints as a table.

        found = doctor("EleutherAI/pythia-70m"); print(found); found.passed

    model   as in `Index.build`, like the other arguments; or an index, or its directory: its model, and its rows
    rows    anything that `Corpus.open` takes: has the model learned them to almost no loss? Of an index, its own rows
    Cost:   a few forward passes, and one for each of at most 64 rows.
    Raises: UnsupportedError, MismatchError if the model cannot be used at all, as when its head does not reproduce its
            logits; ValueError for rows beside an index.
    """
    index = _index_of(model, device)
    if index is not None and rows is not None:
        raise ValueError("An index has its own rows: leave rows out.")
    options = ModelOptions(dtype, device, revision, trust_remote_code)
    readout = load_readout(model, tokenizer, options) if index is None else index.unchanged()
    settings = resolve_settings(
        "default",
        bytes_per_row=None,
        short_bytes=None,
        storage="float32",
        channels=resolve_settings("similarity").channels,
    )
    signer = Signer(readout, settings)
    sample = [_tokens(readout, settings, number, text) for number, text in enumerate(SAMPLE)]
    learned = [] if rows is None else [learned_corpus(readout, rows)]
    return Diagnosis(
        (
            Check("head", True, "head(hidden states) reproduces the model's logits to rounding"),
            _tied(readout),
            _finite(readout, sample),
            *_invariance(signer, sample),
            _start_token(readout),
            _loss(signer, sample),
            _layers(readout, sample[0]),
            *_like_the_cpu(signer, sample),
            _speed(readout),
            _stored_bytes(readout),
            *(learned if index is None else [learned_rows(index)]),
        )
    )


def _index_of(model: Any, device: str) -> Index | None:
    """The index that is meant, if one is."""
    if isinstance(model, str | Path) and (Path(model) / CATALOGUE).is_file():
        return Index.open(model, device=device)
    return model if isinstance(model, Index) else None


def _tokens(readout: Readout, settings: SignatureSettings, number: int, text: str) -> TokenisedRow:
    row = Row(f"sample {number}", text, ((0, len(text)),), None, "", {}, "", number)
    if len(readout.tokenizer(text).input_ids) < 2:
        row = Row(row.id, text * 2, ((0, 2 * len(text)),), None, "", {}, "", number)
    return tokenise(row, number, readout.tokenizer, settings, readout.context)


def _tied(readout: Readout) -> Check:
    embeddings = readout.lm.get_input_embeddings().weight  # type: ignore[operator]
    tied = embeddings.data_ptr() == readout.weight.data_ptr()
    return Check(
        "tied head", None, "head and embeddings share one matrix" if tied else "head and embeddings are two matrices"
    )


def _finite(readout: Readout, rows: list[TokenisedRow]) -> Check:
    bad = [name for name, tensor in readout.lm.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        return Check(
            "finite weights", False, f"{bad[0]} and {len(bad) - 1} more hold NaN or infinity: get the weights again"
        )
    with torch.no_grad():
        finite = all(bool(torch.isfinite(readout.hidden(_ids(readout, row))).all()) for row in rows)
    detail = "weights and hidden states are finite" if finite else "hidden states overflow: load with dtype float32"
    return Check("finite numbers", finite, detail)


def _ids(readout: Readout, row: TokenisedRow) -> torch.Tensor:
    return torch.tensor([row.ids], device=readout.device)


def _invariance(signer: Signer, rows: list[TokenisedRow]) -> list[Check]:
    """Each row alone, then beside others of other lengths: the signature may not care."""
    windows = [window for row in rows for window in row.windows]
    limit = INVARIANT.get(signer.readout.weight.dtype, 0.1)
    alone = torch.cat([signer.window_rows([window])[0] for window in windows])
    same = torch.cat([signer.window_rows([window, window])[0][:1] for window in windows])
    padded = torch.empty_like(alone)
    numbered = [replace(window, row=number) for number, window in enumerate(windows)]
    for batch in batches(numbered, signer.readout.batch_class, signer.limits):
        padded[[window.row for window in batch]] = signer.window_rows(batch)[0]
    size = alone.norm(dim=1)
    checks = []
    for name, other, advice in (
        ("batch-size invariance", same, "use dtype float32"),
        ("padding invariance", padded, "this model lets padding reach its tokens, so index it with rows of one length"),
    ):
        difference = float(((alone - other).norm(dim=1) / size).max())
        passed = difference <= limit
        verdict = f"signatures differ by {difference:.1e} of their length (limit {limit:g})"
        checks.append(Check(name, passed, verdict if passed else f"{verdict}: {advice}"))
    return checks


def _start_token(readout: Readout) -> Check:
    start = getattr(readout.tokenizer, "bos_token", None)
    if not start:
        return Check("beginning of sequence", None, "the tokenizer has no beginning-of-sequence token")
    row = Row("sample", start + SAMPLE[0], ((0, len(start) + len(SAMPLE[0])),), None, "", {}, "", 0)
    settings = resolve_settings("default")
    ids = tokenise(row, 0, readout.tokenizer, settings, readout.context).ids
    doubled = ids[:2] == [readout.tokenizer.bos_token_id] * 2
    adds = readout.tokenizer(SAMPLE[0]).input_ids[0] == readout.tokenizer.bos_token_id
    how = "is added to every text" if adds else "is not added by the tokenizer"
    detail = f"{start!r} comes twice before a text that has it" if doubled else f"{start!r} {how}, and never doubled"
    return Check("beginning of sequence", not doubled, detail)


def _loss(signer: Signer, rows: list[TokenisedRow]) -> Check:
    """Plain English must be likelier than chance, or tokenizer and weights do not belong together."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            positions = signer.positions(row.windows)
            for piece, logits in signer.head.blocks(positions.hidden):
                target = positions.target[piece]
                total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
                count += len(target)
    loss, chance = total / count, math.log(signer.readout.vocabulary)
    detail = f"{loss:.2f} nats per token of English, chance is {chance:.2f}"
    passed = loss < 0.8 * chance
    return Check("loss", passed, detail if passed else f"{detail}: untrained weights, or a tokenizer of another model")


def _layers(readout: Readout, row: TokenisedRow) -> Check:
    channel = Channel("residual")
    try:
        if (found := find_taps(readout, channel)) is not None:
            Signer(readout, SignatureSettings((channel,))).positions(row.windows)
    except LeaveoutError as error:
        return Check("layers", False, str(error))
    if found is None:
        return Check(
            "layers",
            None,
            f"{readout.family} layers are not known: `default` looks at the readout alone, `residual` at rh and gh",
        )
    return Check("layers", None, f"{len(found[0])} output projections that the residual channel can take")


def _like_the_cpu(signer: Signer, rows: list[TokenisedRow]) -> list[Check]:
    """On another device: ten signatures beside those of the same model on the CPU."""
    readout = signer.readout
    if readout.device.type == "cpu":
        return []
    windows = [replace(window, row=number) for number, window in enumerate(_ten(rows))]
    there = signer.rows(windows, len(windows)).cpu()
    here = Readout(copy.deepcopy(readout.lm).cpu(), readout.tokenizer, None, scale=readout.scale, cap=readout.cap)
    wanted = Signer(here, signer.settings).rows(windows, len(windows))
    difference = float(((there - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
    limit = INVARIANT.get(readout.weight.dtype, 0.1)
    detail = f"ten signatures differ from the CPU's by {difference:.1e} of their length (limit {limit:g})"
    passed = difference <= limit
    return [Check(f"{readout.device.type} like the CPU", passed, detail if passed else f"{detail}: use the CPU")]


def _ten(rows: list[TokenisedRow]) -> list[Window]:
    """Ten windows: those of the rows, and the beginnings of the longest."""
    windows = [window for row in rows for window in row.windows]
    longest = max(windows, key=lambda window: len(window.ids))
    lengths = range(max(2, len(longest.ids) - 10 + len(windows)), len(longest.ids))
    cut = [
        replace(longest, ids=longest.ids[:n], positions=[p for p in longest.positions if p + 1 < n]) for n in lengths
    ]
    return (windows + cut)[:10]


@torch.no_grad()
def _speed(readout: Readout) -> Check:
    """How fast rows pass through the model and become rows of `default`, without the statistics pass."""
    length = min(ROW[0], readout.context)
    learned = length * ROW[1] // ROW[0]
    count = ROWS["cpu" if readout.device.type == "cpu" else "device"]
    ids = (torch.arange(count * length) * 7919 % readout.vocabulary).view(count, length)
    windows = [Window(n, 0, ids[n].tolist(), list(range(length - 1 - learned, length - 1))) for n in range(count)]
    signer = Signer(readout, resolve_settings("default"))
    sides = [side for part in signer.parts for side in (part.left, part.right)]
    device = signer.weight.device
    signer.whitening = {side.whiten: idle_root(side.size, device, signer.dtype) for side in sides if side.whiten}
    signer.encoded(windows[:1], 1)  # what is made once
    trunk = _seconds(readout, lambda: readout.hidden(ids.to(readout.device)))
    index = _seconds(readout, lambda: signer.encoded(windows, count))
    rate = count / index
    return Check(
        "speed",
        None,
        f"{count * length / trunk:,.0f} tokens a second through the model; `default` indexes {_digits(rate)} rows of {length} "
        f"tokens ({learned} learned) a second, {trunk / index:.0%} of that; "
        f"a million rows take {_digits(1e6 / rate / 3600)} hours",
    )


def _digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.5 else f"{x:.2g}"


def _seconds(readout: Readout, task: Callable[[], object]) -> float:
    began = time.perf_counter()
    task()
    if readout.device.type == "cuda":
        torch.cuda.synchronize(readout.device)
    return time.perf_counter() - began


def _stored_bytes(readout: Readout) -> Check:
    """What a row of `default` holds of this model, and what `bytes_per_row` would hold it whole."""
    signer = Signer(readout, resolve_settings("default"))
    long, short = signer.codec, signer.short
    n_bytes = long.row_bytes + (0 if short is None else short.row_bytes)
    stored = f"a row takes {n_bytes:,} bytes by default, a million {n_bytes / 1000:,.1f} GB"
    if not isinstance(long, Filled):
        return Check("bytes of a row", None, f"{stored}, and is held whole")
    held = f"room for {long.code_bytes // max(long.plane_bytes)} to {long.n_triples} singular triples at 1 bit"
    if long.kept == long.sizes:
        return Check("bytes of a row", None, f"{stored}: {held}")
    whole = replace(long, kept=long.sizes).bytes_for(TRIPLES) + (signer.settings.short_bytes or 0)
    enough = f"bytes_per_row={whole} has room for {TRIPLES} of every part"
    return Check("bytes of a row", None, f"{stored}: {held} of which sides are cut; {enough}")
