"""How many bytes does a row need: the same ranking as the exact product, judged by retraining and by recall?

    python benchmarks/codes.py --part lds --work bench/banks        # truth banks, kept in benchmarks/truth
    python benchmarks/codes.py --part recall                        # SmolLM2-135M, 2,000 rows, 200 queries, an hour
    python benchmarks/codes.py --smoke

`lds`: at each number of bytes, the LDS of all rows scored by the code (one stage), and with the best 1 % or 5 % scored
exactly (two stages), as shares of the LDS of the exact product, on the parameters after a third of training. Beside the
codes of the index stand, at no more bytes: codes of whole sides, the former form (a fixed number of triples in 4 bits),
random projections in int8, sign bits of them on both sides (SimHash), and principal components of other rows in int8.
`recall`: how many of the exact best ten stand first, and in the best 1, 2, 5 and 10 %, by the code.
Intervals are bootstrapped over queries. Two choices were made on 500 rows of the corpus of the recall part, shuffled
otherwise, so that the two may share rows and queries; none was made on a bank: how noise counts against what is left out
(`codec.NOISE`), and how far sides are cut (`codec.TRIPLES`).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bank_truths import HALVES, TRUTHS, judged, queries_of
from leaveout.methods.scorer import Scorer, as_row
from leaveout.methods.signatures import readout_of, trained_part
from leaveout.metrics import bootstrap_interval, lds
from leaveout.projection import Rotation
from leaveout.readout.codec import SCANNED, SCORED, Codec, Filled, filled
from leaveout.readout.forms import Triples, low_rank, pairs
from leaveout.readout.index import Index
from leaveout.readout.model import Readout
from leaveout.readout.settings import PRESETS
from leaveout.readout.signature import QUERY_RANK, ROW_RANK, Signer
from leaveout.readout.tokens import Window, batches
from leaveout.readout.whitening import whitening_matrices
from measuring import alpaca, arguments, made_rows, smollm2, tiny, tokenised, write_result
from public_rows import fitted, groups

KB = (1, 2, 4, 8, 16, 32)
PROJECTED = (1, 2)  # kilobytes at which projections are judged, too
LISTS = (0.01, 0.05)
SOME = 100  # rows that are encoded and scored at a time
PIECE = 8  # rows whose outer products exist at once
OTHERS = 300  # rows that principal components are learned from
LONGEST = 100  # tokens of the rows and queries of the recall part
CORPORA = ("dolly", "medical", "finance", "story")


@dataclass(frozen=True)
class Rows:
    """Rows and queries of one form, before they are rounded, and the exact scores [query, row]."""

    form: Triples
    ordered: tuple[tuple[bool, bool], ...]
    rows: Tensor
    queries: Tensor
    exact: np.ndarray
    others: Tensor  # rows that are neither


# ---------------------------------------------------------------- codes


def code_scores(found: Rows, codec: Codec) -> np.ndarray:
    """Scores [query, row] of stored rows."""
    score, scores = codec.scorer(found.queries), []
    for piece in found.rows.split(SOME):
        scores.append(score(codec.encode(piece.float()), slice(None)))
    return np.concatenate(scores).T


def old_scores(found: Rows, n_bytes: int) -> np.ndarray | None:
    """As rows were stored before: as many triples of every part, in 4.25 bits a number; blocks of 64 share a scale."""
    rank = int(n_bytes / 0.53125 // found.form.width(1))
    if rank == 0:
        return None
    scores = []
    for piece in found.rows.split(SOME):
        cut = found.form.joined([(u[:, :rank], v[:, :rank]) for u, v in found.form.factors(piece.float())])
        blocks = torch.nn.functional.pad(cut, (0, -cut.shape[1] % 64)).unflatten(1, (-1, 64))
        unit = (blocks.abs().amax(2, keepdim=True) / 7).clamp_min(1e-30)
        rounded = ((blocks / unit).round() * unit).flatten(1)[:, : cut.shape[1]]
        scores.append(found.form.products(rounded, found.queries))
    return torch.cat(scores).T.numpy()


def projections(found: Rows, width: int) -> tuple[Tensor, Tensor]:
    """Random projections of the outer products of rows and queries, `width` numbers shared by the parts by their size."""
    sizes = [left * right for left, right in found.form.sizes]
    shares = [max(1, min(size, width * size // sum(sizes))) for size in sizes]
    turned = [
        Rotation.make(size, 0, f"flat/{n}", share) for n, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]

    def projected(rows: Tensor) -> Tensor:
        return torch.cat([torch.cat(list(_flat(found.form, piece, turned)), 1) for piece in rows.split(PIECE)])

    return projected(found.rows), projected(found.queries)


def _flat(form: Triples, rows: Tensor, turned: list[Rotation]) -> Iterator[Tensor]:
    for (u, v), turn in zip(form.factors(rows), turned, strict=True):
        yield turn((u.transpose(1, 2) @ v).flatten(1))


def projected_scores(rows: Tensor, queries: Tensor, width: int) -> np.ndarray:
    """Of the first `width` numbers of projections, in int8."""
    rows, queries = rows[:, :width], queries[:, :width]
    unit = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (queries @ ((rows / unit).round() * unit).T).numpy()


def sign_scores(rows: Tensor, queries: Tensor) -> np.ndarray:
    """Cosines by the share of equal signs, times the lengths of the rows."""
    equal = (rows.sign() @ queries.sign().T).T / rows.shape[1]
    return (torch.sin(equal * torch.pi / 2) * rows.norm(dim=1)).numpy()


def component_scores(found: Rows, n_bytes: int) -> np.ndarray:
    """Principal components of other rows, as many as there are bytes, in int8."""
    gram = found.form.products(found.others, found.others).double()
    values, vectors = torch.linalg.eigh(gram)
    keep = min(n_bytes - 4, int((values > 1e-9 * values.max()).sum()))
    basis = vectors.flip(1)[:, :keep] / values.flip(0)[:keep].sqrt()
    rows, queries = (
        (found.form.products(x, found.others).double() @ basis).float() for x in (found.rows, found.queries)
    )
    return projected_scores(rows, queries, keep)


def all_codes(found: Rows, n_bytes: int, flat: tuple[Tensor, Tensor] | None) -> dict[str, np.ndarray]:
    """Scores of every kind of code at no more than so many bytes."""
    sizes = found.form.sizes
    out: dict[str, np.ndarray | None] = {}
    kinds: dict[str, Callable[[], Codec]] = {
        "code": lambda: filled(sizes, found.ordered, n_bytes, 0, SCORED),
        "code, short queries": lambda: filled(sizes, found.ordered, n_bytes, 0, SCANNED),
        "whole sides": lambda: Filled(sizes, sizes, n_bytes, 0, SCORED),
    }
    for name, make in kinds.items():
        try:
            out[name] = code_scores(found, make())
        except ValueError:  # not one triple fits
            out[name] = None
    out["triples in 4 bits"] = old_scores(found, n_bytes)
    if flat is not None:
        out["projection"] = projected_scores(*flat, n_bytes - 4)
        out["signs"] = sign_scores(*(x[:, : 8 * (n_bytes - 4)] for x in flat))
    if len(found.others) > 1:
        out["components"] = component_scores(found, n_bytes)
    return {name: scores for name, scores in out.items() if scores is not None}


def two_stage(found: Rows, scores: np.ndarray, share: float) -> np.ndarray:
    """The exact scores of each query's best rows, and the code's of all others."""
    length = max(1, round(share * scores.shape[1]))
    mixed = scores.copy()
    for query, row in enumerate(np.argsort(-scores, axis=1, kind="stable")[:, :length]):
        mixed[query, row] = found.exact[query, row]
    return mixed


# ---------------------------------------------------------------- by retraining


def bank_rows(name: str, work: Path, preset: str, truths: Path) -> tuple[Rows, Any]:
    """The rows of a bank at a third of training, and its truth."""
    bank = judged(name, work, truths)
    scorer = Scorer(bank.run, queries_of(bank.bank), 0)
    readout = readout_of(scorer, "third")
    limit, template = bank.run.recipe.max_tokens, bank.run.recipe.template
    rows = [trained_part(row, readout.tokenizer, template, limit) for row in map(as_row, scorer.rows)]
    seen = {row.text for row in rows} | {row.text for row in map(as_row, scorer.query_rows)}
    pairs_ = [pair for group in groups(7).values() for pair in group[:40]] if name != "smoke" else []
    others = [
        {"prompt": prompt, "response": " ".join(answer.split()[:30])}
        for prompt, answer in pairs_
        if prompt + answer not in seen
    ][:OTHERS]
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(readout, rows, Path(place) / "index", preset, template=template)
        encoded = index.encoded_anew(np.arange(len(rows)))
        queries = index.encode([as_row(row) for row in scorer.query_rows]).vectors
        signer = index.signer
        more = index.encode(others).vectors if others else encoded[:0]
    assert isinstance(signer.form, Triples), "the rows of this bank fit whole"
    exact = signer.form.products(encoded, queries).T.numpy()
    ordered = tuple((part.left.ordered, part.right.ordered) for part in signer.parts)
    return Rows(signer.form, ordered, encoded, queries, exact, more), bank.truth


def bank_lines(name: str, work: Path, preset: str, truths: Path, kilobytes: tuple[int, ...]) -> dict[str, Any]:
    """LDS of the exact product, and of every code with its share of that, at each number of bytes."""
    found, truth = bank_rows(name, work, preset, truths)
    whole = lds(found.exact, truth.removed, truth.values)
    lines = []
    for kb in kilobytes:
        flat = projections(found, 8 * 1024 * kb) if preset == "default" and kb in PROJECTED else None
        for code, scores in all_codes(found, 1024 * kb, flat).items():
            stages = {"one stage": scores, **{f"list {share:.0%}": two_stage(found, scores, share) for share in LISTS}}
            for stage, mixed in stages.items():
                by_query = lds(mixed, truth.removed, truth.values)
                lines.append({
                    "bytes": 1024 * kb, "code": code, "stage": stage, "lds": bootstrap_interval(by_query, 0)._asdict(),
                    "share": float(np.nanmean(by_query) / np.nanmean(whole)),
                    "difference": bootstrap_interval(by_query - whole, 0)._asdict(),
                })  # fmt: skip
    sizes = [list(size) for size in found.form.sizes]
    return {
        "bank": name, "preset": preset, "sizes": sizes, "exact": bootstrap_interval(whole, 0)._asdict(), "lines": lines,
    }  # fmt: skip


# ---------------------------------------------------------------- by recall


def recall_rows(readout: Readout, n: int, n_queries: int, smoke: bool) -> Rows:
    """Instruction rows cut to 100 tokens, and queries of four corpora; exact scores over all pairs of positions."""
    settings = PRESETS["default"]
    signer = Signer(readout, settings, QUERY_RANK)
    count = _counter(readout)
    if smoke:
        rows, sample, queries = made_rows(n, 1), made_rows(32, 2), made_rows(n_queries, 3)
    else:
        found = (
            fitted((f"{x['instruction']} {x['input']}".strip(), " " + x["output"]), count, LONGEST) for x in alpaca(1)
        )
        fine = (pair for pair in found if count(pair[0] + pair[1]) >= 60)
        kept = list(itertools.islice(fine, n + settings.sample_rows))
        rows, sample = ([{"prompt": a, "response": b} for a, b in part] for part in (kept[:n], kept[n:]))
        queries = []
        for name in CORPORA:
            pairs_ = (fitted(pair, count, 64) for pair in groups(5)[name])
            fine = (pair for pair in pairs_ if pair[1].strip() and count(pair[0] + pair[1]) >= 30)
            queries += [{"prompt": a, "response": b} for a, b in itertools.islice(fine, n_queries // len(CORPORA))]
    windows = [window for row in tokenised(sample, readout, settings) for window in row.windows]
    signer.whitening = whitening_matrices(signer, windows)
    form = signer.form
    if not isinstance(form, Triples):  # the smoke model's rows fit whole
        form = Triples(tuple((part.left.width, part.right.width) for part in signer.parts))
        signer.form = form
    asked = tokenised(queries, readout, settings)
    vectors = signer.rows([window for row in asked for window in row.windows], len(asked)).float()
    kept_rows = torch.empty(len(rows), form.width(ROW_RANK), dtype=torch.float16)
    exact = np.empty((len(asked), len(rows)), np.float32)
    windows = [window for row in tokenised(rows, readout, settings) for window in row.windows]
    assert len(windows) == len(rows), "a row has several windows"
    done = 0
    for batch in batches(windows, readout.batch_class):
        for window, row, scores in zip(batch, *rows_and_scores(signer, batch, form, vectors), strict=True):
            kept_rows[window.row], exact[:, window.row] = row.half(), scores
        done += len(batch)
        print(f"  {done} rows", file=sys.stderr, flush=True)
    ordered = tuple((part.left.ordered, part.right.ordered) for part in signer.parts)
    return Rows(form, ordered, kept_rows, vectors, exact, kept_rows[:0].float())


def rows_and_scores(
    signer: Signer, batch: list[Window], form: Triples, queries: Tensor
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Rows of the form, and their scores [query] of which nothing is left out, of windows that are whole rows."""
    positions, rank = signer.positions(batch), form.rank(queries)
    factors = [signer.factors(positions, part) for part in signer.parts]
    rows, scores = [], []
    for window, span in zip(batch, positions.spans, strict=True):
        by = len(window.positions) ** signer.settings.length_power
        row = torch.cat([low_rank(left[span], right[span], ROW_RANK) for left, right in factors])
        rows.append(form.divided(row[None], torch.tensor([by]))[0])
        total = torch.zeros(len(queries), dtype=torch.float64)
        for (left, right), (a, b) in zip(factors, form.factors(queries), strict=True):
            both = pairs(left[span], a.flatten(0, 1), right[span], b.flatten(0, 1)).sum(0)
            total += both.view(len(queries), rank).sum(1).double()
        scores.append((total / by).float().numpy())
    return rows, scores


def _counter(readout: Readout) -> Callable[[str], int]:
    return lambda text: len(readout.tokenizer(text)["input_ids"])


def recall_lines(found: Rows, kilobytes: tuple[int, ...]) -> list[dict[str, Any]]:
    """How many of the exact best ten of each query stand first by a code, and in its best shares."""
    n = found.exact.shape[1]
    best = np.argsort(-found.exact, axis=1, kind="stable")[:, :10]
    lines = []
    for kb in kilobytes:
        for code, scores in all_codes(found, 1024 * kb, None).items():
            place = np.empty_like(scores, dtype=np.int64)
            np.put_along_axis(place, np.argsort(-scores, axis=1, kind="stable"), np.arange(n)[None], axis=1)
            mine = np.take_along_axis(place, best, axis=1)
            shares = {"recall@10": 10 / n, **{f"in the best {share:.0%}": share for share in (0.01, 0.02, 0.05, 0.1)}}
            line = {name: bootstrap_interval((mine < share * n).mean(1), 0)._asdict() for name, share in shares.items()}
            lines.append({"bytes": 1024 * kb, "code": code, **line})
    return lines


# ---------------------------------------------------------------- all of it


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("lds", "recall"), default="lds")
    parser.add_argument("--banks", nargs="+", default=list(HALVES)[:5])
    parser.add_argument("--presets", nargs="+", default=["default", "residual"])
    parser.add_argument("--work", type=Path, help="where the banks' runs are; default: a temporary directory")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kilobytes = KB[:2] if args.smoke else KB
    result: dict[str, Any] = {"question": (__doc__ or "").split("\n", 1)[0], "part": args.part}
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        if args.part == "recall" or args.smoke:
            n, asked = (40, 8) if args.smoke else (args.rows, args.queries)
            found = recall_rows(tiny(0) if args.smoke else smollm2(), n, asked, args.smoke)
            result |= {"rows": n, "repeats": len(found.queries), "lines": recall_lines(found, kilobytes)}
        else:
            banks = []
            for name in args.banks:
                for preset in args.presets:
                    banks.append(bank_lines(name, work / name, preset, TRUTHS, kilobytes[:5]))
                    print(name, preset, banks[-1]["exact"], flush=True)
            result |= {"repeats": 30, "banks": banks}
    print(write_result(args.out, f"readout_codes_{args.part}.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
