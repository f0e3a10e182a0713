"""`targets="both"`: prompt and response of a row as two sides with codes and lengths of their own, weighed at search."""

import copy

import numpy as np
import pytest
import torch

from leaveout.corpus import Contrast, render
from leaveout.readout import learned, shortlist
from leaveout.readout.doctor import doctor
from leaveout.readout.forms import Triples
from leaveout.readout.index import Index
from leaveout.readout.settings import resolve_settings
from leaveout.readout.signature import Signer

from .conftest import assert_close, ranked
from .oracle import Slow, paper_row, target_places
from .test_index import IN_FULL, MANY_COMMITS, TRIPLES
from .test_paper import tables_of
from .tiny import TEXTS, built, make_model, make_readout

ROWS = [
    {"id": f"row {n}", "prompt": TEXTS[n % 8][: 40 + n], "completion": TEXTS[(n + 3) % 8][n:], "source": "ab"[n % 2]}
    for n in range(20)
] + [{"id": "row 20", "text": TEXTS[2]}, {"id": "row 21", "text": TEXTS[5], "source": "a"}]
QUERIES = [
    {"prompt": TEXTS[1], "completion": TEXTS[3]},
    {"prompt": "Tell me: " + TEXTS[6], "completion": TEXTS[5]},
    TEXTS[0],
]
FORMS = {"in full": IN_FULL, "stored": {}, "triples": TRIPLES, "none": {**TRIPLES, "long": "none"}}


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


def build(lm, tokenizer, place, rows=ROWS, **options):
    return built(lm, rows, place / "index", "default", tokenizer, **{"targets": "both", **MANY_COMMITS, **options})


@pytest.fixture(scope="module")
def exact(lm, tokenizer, tmp_path_factory):
    """The index in full, products [sides, query, row] and lengths [sides, row] of its unrounded sides in float64."""
    index = build(lm, tokenizer, tmp_path_factory.mktemp("exact"), **IN_FULL)
    rows, queries = (np.split(index.encode(some).vectors.double().numpy(), 2, axis=1) for some in (ROWS, QUERIES))
    return (
        index,
        np.stack([q @ r.T for q, r in zip(queries, rows, strict=True)]),
        np.stack([np.linalg.norm(r, axis=1) for r in rows]),
    )


def wanted(exact, length, weight):
    """Scores [query, row]: the weighted sum of both sides, of cosines each over its root mean square."""
    _, products, lengths = exact
    if length == "product":
        return (1 - weight) * products[0] + weight * products[1]
    total = 0.0
    for side, by, share in zip(products, lengths, (1 - weight, weight), strict=True):
        cosine = np.divide(side, by, out=np.zeros_like(side), where=by > 0)
        size = np.sqrt((cosine**2).sum(1, keepdims=True) / (by > 0).sum())
        total = total + share * np.divide(cosine, size, out=np.zeros_like(cosine), where=size > 0)
    return total


@pytest.fixture(scope="module", params=FORMS)
def index(request, lm, tokenizer, tmp_path_factory):
    return build(lm, tokenizer, tmp_path_factory.mktemp("index"), **FORMS[request.param])


def test_each_side_is_the_signature_of_its_tokens(rows, tokenised, tokenizer):
    """By the oracle of the paper's signature; a token across the seam belongs to the response."""
    readout = make_readout("llama", tokenizer, spread=0.3, dtype=torch.float32)
    slow, settings = Slow(copy.deepcopy(readout.lm).double()), resolve_settings("paper", targets="both")
    found = tokenised(settings)
    vectors = Signer(readout, settings).rows([window for row in found for window in row.windows], len(found)).numpy()
    for row, tokens, vector in zip(rows, found, vectors, strict=True):
        answer = target_places(tokens.offsets, render(row, tokenizer).responses)
        prompt = [at for at, (a, b) in enumerate(tokens.offsets) if at and a < b and at not in answer]
        for places, half in zip((answer, prompt), np.split(vector, 2), strict=True):
            if places:
                assert half @ paper_row(slow, tokens.ids, places, tables_of(readout)) >= 0.999999, row
            else:
                assert not half.any()


def test_a_row_passes_the_model_once(lm, tokenizer, tmp_path, monkeypatch):
    seen, hidden = [], Signer.passed
    monkeypatch.setattr(
        Signer, "passed", lambda self, batches: hidden(self, (seen.append(len(batch)) or batch for batch in batches))
    )
    index = build(lm, tokenizer, tmp_path)
    assert sum(seen) == len(ROWS) + index.info()["statistics"]["rows"]


def test_responses_alone_are_those_of_an_index_of_responses(exact, lm, tokenizer, tmp_path):
    """As are the statistics: both whiten by what training learned."""
    alone = build(lm, tokenizer, tmp_path, targets="response", **IN_FULL)
    assert alone.info()["statistics"]["digest"] == exact[0].info()["statistics"]["digest"]
    for length, asked in (("product", None), ("product", 0.0), ("cosine", 0.0)):
        found = exact[0].score(QUERIES, length=length, prompt_weight=asked)
        by = 1.0 if length == "product" else np.linalg.norm(found, axis=1, keepdims=True)
        other = alone.score(QUERIES, length=length)
        other_by = 1.0 if length == "product" else np.linalg.norm(other, axis=1, keepdims=True)
        assert_close(found / by, other / other_by, "model float32")


@pytest.mark.parametrize("length", ["product", "cosine"])
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
def test_scores_are_the_weighed_sum_of_both_sides(exact, length, weight):
    share = {"cosine": 0.7, "product": 0.0}[length] if weight is None else weight
    found = exact[0].score(QUERIES, length=length, prompt_weight=weight)
    assert_close(found, wanted(exact, length, share), "model float32")


def test_every_stage_honours_the_weight(index, exact):
    """All rows, some, by list, by group, by several workers, encoded anew; what is stored is near what is exact."""
    place, orders = {id: at for at, id in enumerate(index.ids)}, {}
    for length, weight in (("cosine", None), ("cosine", 0.2), ("product", 0.6)):
        scores = index.score(QUERIES, length=length, prompt_weight=weight)
        truth = wanted(exact, length, 0.7 if weight is None else weight)
        near = 0.97 if index.long is not None else 0.9  # short codes say how large the cosines of each side are
        assert all(np.corrcoef(a, b)[0, 1] > near for a, b in zip(scores, truth, strict=True))
        orders[weight] = [ranked(row).tolist() for row in scores]
        how = {"length": length, "prompt_weight": weight}
        for options in ({}, {"workers": 2}, {"where": "source = 'a'"}, {"exact": True}):
            kept = [at for at in range(22) if "where" not in options or (at % 2 == 0 and at < 20) or at == 21]
            for hits, row, order in zip(
                index.search(QUERIES, 22, **how, **options), scores, orders[weight], strict=True
            ):
                assert [place[hit.id] for hit in hits] == [at for at in order if at in kept]
                assert_close([hit.score for hit in hits], row[[at for at in order if at in kept]], "float32")
        for hits, order in zip(index.search(QUERIES, 2, group_by="source", **how), orders[weight], strict=True):
            assert place[hits[0].id] == order[0]
        if index.short is not None:
            for hits, row in zip(index.search(QUERIES, 3, shortlist=12, **how), scores, strict=True):
                assert_close([hit.score for hit in hits], row[[place[hit.id] for hit in hits]], "model float32")
        scales = index.scales(index.encode(QUERIES).vectors, length, weight).numpy()
        by = exact[2] if length == "cosine" else np.ones_like(exact[2])
        ratios = np.divide(exact[1], by[:, None], out=np.zeros_like(exact[1]), where=by[:, None] > 0)
        anew = (scales[:, :, None] * ratios).sum(0)
        for hits, row in zip(index.search(QUERIES, 5, reencode=22, **how), anew, strict=True):
            assert_close([hit.score for hit in hits], row[[place[hit.id] for hit in hits]], "model float32")
    assert orders[None] != orders[0.2]


def test_a_side_that_a_query_lacks_counts_for_nothing(exact):
    """A text has no prompt: its response decides, whatever the weight; so it is for an answer alone. An answer says nothing of
    the prompt before it.
    """
    index = exact[0]
    low, high = (index.score(QUERIES, length="cosine", prompt_weight=weight) for weight in (0.1, 0.9))
    assert_close(low[2] / 0.9, high[2] / 0.1, "float32")
    assert np.abs(low[0] / low[0].max() - high[0] / high[0].max()).max() > 0.05
    alone = index.score([*QUERIES, {**QUERIES[0], "completion": "Nothing."}], length="cosine", prompt_weight=1.0)
    assert not alone[2].any() and not alone[:, 20:].any()  # nor do rows have a prompt that are texts
    assert_close(alone[3], alone[0], "model float32")


def test_contrasts_with_one_prompt_ask_of_responses_alone(exact):
    index = exact[0]
    same = Contrast({"prompt": TEXTS[1], "completion": TEXTS[3]}, {"prompt": TEXTS[1], "completion": TEXTS[4]})
    other = Contrast({"prompt": TEXTS[1], "completion": TEXTS[3]}, {"prompt": TEXTS[0], "completion": TEXTS[3] + "!"})
    sides = index.encode([same, other]).vectors.chunk(2, 1)
    assert [side.any(1).tolist() for side in sides] == [[True, True], [False, True]]
    found = index.search([same], 22, length="product", prompt_weight=0.5, rerank=22)[0]
    assert len(found) == 22


def test_weights_that_mean_nothing_are_refused(exact, lm, tokenizer, tmp_path):
    alone = build(lm, tokenizer, tmp_path, ROWS[:20], targets="response")
    for ask in (
        lambda index, weight: index.search(QUERIES, prompt_weight=weight),
        lambda index, weight: index.score(QUERIES, prompt_weight=weight),
        lambda index, weight: index.select(QUERIES, prompt_weight=weight),
        lambda index, weight: index.explain(QUERIES[0], "row 3", prompt_weight=weight),
    ):
        with pytest.raises(ValueError, match="no prompts of their own to weigh: build it with targets='both'"):
            ask(alone, 0.0)
        for weight in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"prompt_weight is .*: give 0, responses alone, to 1"):
                ask(exact[0], weight)


def test_selections_and_explanations_honour_the_weight(exact):
    index, products, _ = exact
    hits = index.select(QUERIES[:2], 22, length="product", prompt_weight=1.0)
    asked = np.linalg.norm(np.split(index.encode(QUERIES[:2]).vectors.double().numpy(), 2, axis=1)[1], axis=1)
    found = np.sort((products[1, :2] / asked[:, None]).mean(0))[::-1]
    assert_close([hit.score for hit in hits], found, "model float32")
    for length, weight in (("cosine", None), ("product", 0.4)):
        score = wanted(exact, length, 0.7 if weight is None else weight)[0, 5]
        found = index.explain(QUERIES[0], "row 5", length=length, prompt_weight=weight)
        assert_close([found.pairs.sum(), found.score, found.stored_score], [score] * 3, "model float32")
        seam = [next(n for n, _ in enumerate(row) if "".join(row[: n + 1]).startswith(start))
                for row, start in ((found.query_tokens, TEXTS[1]), (found.row_tokens, ROWS[5]["prompt"]))]  # fmt: skip
        assert not found.pairs[: seam[0], seam[1] + 1 :].any() and not found.pairs[seam[0] + 1 :, : seam[1]].any()
        assert found.pairs[: seam[0], : seam[1]].any() and found.pairs[seam[0] + 1 :, seam[1] + 1 :].any()
    assert not index.explain(QUERIES[2], "row 21", prompt_weight=1.0).pairs.any()


def gradients(lm, tokenizer, rows, side, power):
    """Gradients [rows, parameters] in float64 of the loss of one side's tokens, over their count to a power."""
    found = []
    model = copy.deepcopy(lm).double()
    for row in rows:
        prompt = row.get("prompt", "") if isinstance(row, dict) else ""
        text = prompt + (row.get("completion", row.get("text", "")) if isinstance(row, dict) else row)
        encoded = tokenizer(text, return_offsets_mapping=True)
        places = [n for n, (a, b) in enumerate(encoded["offset_mapping"]) if n and a < b and (b <= len(prompt)) == side]
        model.zero_grad()
        if places:
            log_p = model(torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
            (-sum(log_p[n - 1, encoded["input_ids"][n]] for n in places) / len(places) ** power).backward()
        found.append(np.concatenate([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().numpy()
                                     for p in model.parameters()]))  # fmt: skip
    return np.stack(found)


def test_rerank_scores_each_side_through_the_whole_model(exact, lm, tokenizer):
    index, products, lengths = exact
    own, power = QUERIES[0], index.settings.length_power
    total = 0.0
    for side, weight in ((0, 0.4), (1, 0.6)):
        asked, rows = gradients(lm, tokenizer, [own], side, power)[0], gradients(lm, tokenizer, ROWS, side, power)
        half = np.split(index.encode([own]).vectors[0].double().numpy(), 2)[side]
        cosines = np.divide(products[side, 0], lengths[side], out=np.zeros(22), where=lengths[side] > 0)
        size = np.sqrt((cosines**2).sum() / (lengths[side] > 0).sum())
        along = rows @ asked * (half @ half) / (asked @ asked)  # as long as the index has it
        total = total + weight * np.divide(along, lengths[side], out=np.zeros(22), where=lengths[side] > 0) / size
    found = {hit.id: hit.score for hit in index.search([own], 22, rerank=22, prompt_weight=0.6)[0]}
    found = np.array([found[id] for id in index.ids])
    assert np.linalg.norm(found - total) < 2e-3 * np.linalg.norm(total)


def test_both_sides_share_the_bytes_of_a_row(index):
    stored = {name: array[0].nbytes for name, array in index.store.segments()[0].arrays().items()}
    settings = index.settings
    for name, n_bytes in (("long", settings.bytes_per_row and settings.bytes_per_row - settings.short_bytes),
                          ("short", settings.short_bytes)):  # fmt: skip
        own, other = (
            sum(size for key, size in stored.items() if key.startswith(f"{side}{name}.")) for side in ("", "prompt.")
        )
        assert own == other and (n_bytes is None or 2 * own <= n_bytes)
    assert stored["norms"] == stored["prompt.norms"] == 4 * len(index.signer.parts)
    assert index.plan_search().bytes == len(index) * 2 * (0 if index.long is None else index.long.row_bytes)
    assert index.form == (
        Triples(2 * index.side_form.sizes) if isinstance(index.form, Triples) else index.side_form.beside(2)
    )


def test_sides_stay_with_their_rows(lm, tokenizer, tmp_path):
    """After deletions, purges, appended rows, and a merge of parts; `check` finds nothing."""
    parts = [
        Index.build(lm, ROWS, tmp_path / "parts", "default", tokenizer, targets="both", shard=(n, 2), **MANY_COMMITS)
        for n in range(2)
    ]
    merged = Index.open(Index.merge(tmp_path / "parts", tmp_path / "all").path, lm, tokenizer)
    whole = np.concatenate([part.score(QUERIES, prompt_weight=0.5) for part in parts], 1)
    assert np.array_equal(merged.score(QUERIES, prompt_weight=0.5), whole)
    merged.delete(["row 2", "row 9"])
    merged.purge()
    assert np.array_equal(merged.score(QUERIES, prompt_weight=0.5), np.delete(whole, [2, 9], axis=1))
    merged.append([{**ROWS[2], "id": "again"}])
    assert_close(merged.score(QUERIES, prompt_weight=0.5)[:, -1], whole[:, 2], "one level")
    assert merged.check() == []


def test_alike_rows_are_alike_on_both_sides(lm, tokenizer, tmp_path):
    """Equal answers after other prompts are no near duplicates, nor is a text of a row with a prompt."""
    rows = [*ROWS[:4], {**ROWS[0], "id": "same"}, {**ROWS[0], "id": "asked", "prompt": ROWS[5]["prompt"]}]
    index = build(lm, tokenizer, tmp_path, [*rows, {"id": "text", "text": ROWS[0]["completion"]}])
    found = {hit.id for hit in index.search([ROWS[0]], 7, unique=0.95)[0]}
    assert found == {"row 0", "row 1", "row 2", "row 3", "asked", "text"}


def test_recall_is_measured_as_a_search_ranks(lm, tokenizer, tmp_path, monkeypatch):
    for name, value in (("LEAST", 20), ("QUERIES", 22), ("LISTS", (10, 15)), ("BEST", 5)):
        monkeypatch.setattr(shortlist, name, value)
    index = build(lm, tokenizer, tmp_path)
    table = index.store.state("recall")
    vectors = index.encode(ROWS).vectors
    asked = index.weighed(vectors, index.scales(vectors, "cosine", None))
    short = [scores for _, scores in index.scan_short(asked, length="cosine")]
    exact, short = index.score(ROWS, length="cosine"), np.concatenate(short).T
    held = []
    for own, (a, b) in enumerate(zip(exact, short, strict=True)):
        a[own] = b[own] = -np.inf
        held.append([np.isin(ranked(a)[:5], ranked(b)[:n]).mean() for n in (10, 15)])
    assert table["cosine"]["recall"] == np.mean(held, 0).round(4).tolist()


def test_doctor_says_how_well_both_sides_are_learned(exact, monkeypatch):
    index = exact[0]
    monkeypatch.setattr(learned, "LEARNED", 5.0)
    found = next(one for one in doctor(index).checks if one.name == "learned rows").detail
    assert "of 22 rows have less than 5 nats" in found and "of 20 prompts have less than 5 nats" in found
