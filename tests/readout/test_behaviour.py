"""Why this answer and not that one: differences of signatures, of gradients and of explanations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leaveout import Behaviour, Contrast
from leaveout.readout.codec import SCORED
from leaveout.readout.forms import Triples
from leaveout.readout.opened import weighted

from .conftest import assert_close
from .test_index import IN_FULL, TRIPLES
from .tiny import TEXTS, built, make_model

ROWS = [{"id": f"row {n}", "text": TEXTS[n % 8][n:]} for n in range(16)]
A, B = ({"prompt": TEXTS[1][:20], "response": TEXTS[n][:30]} for n in (3, 4))
FORMS = {"in full": IN_FULL, "stored": {}, "triples": TRIPLES, "none": {**TRIPLES, "long": "none"}}


@pytest.fixture(scope="module", params=FORMS)
def index(request, tokenizer, tmp_path_factory):
    lm = make_model("llama", spread=0.1, dtype=torch.float32)
    return built(lm, ROWS, tmp_path_factory.mktemp("index") / "index", "default", tokenizer, **FORMS[request.param])


def test_scores_are_those_of_the_answer_less_those_of_the_other(index):
    of_a, of_b = index.score([A, B], length="cosine")
    found = index.score([TEXTS[2], Contrast(A, B), Contrast(B, A)], length="cosine")
    rounded = (
        1e-4 if index.long is None or index.long.name == "whole" else 2e-2
    )  # queries to 7 bits, each by its own scale
    assert len(index.tokenised([A, B])[0].ids) <= SCORED // 2, "more triples than a scan takes"
    size = np.abs([of_a, of_b]).max()
    np.testing.assert_allclose(found[1], of_a - of_b, atol=rounded * size)
    np.testing.assert_allclose(found[2], -found[1], atol=1e-4 * size)
    assert_close(found[0], index.score([TEXTS[2]], length="cosine")[0], "model float32")


def test_what_both_sides_share_takes_no_room():
    """Sides of 60 large triples that both have and 4 small ones of their own: more than are scored, and 8 that differ."""
    form, chance = Triples(((80, 90), (70, 75))), torch.Generator().manual_seed(2)

    def triples(count, size):
        sides = [size * torch.randn(1, count, n, generator=chance) for both in form.sizes for n in both]
        return [(sides[0], sides[1]), (sides[2], sides[3])]

    shared, own, other, rows = triples(60, 1.0), triples(4, 0.2), triples(4, 0.2), form.joined(triples(SCORED, 1.0))
    a, b = (
        form.joined(
            [tuple(torch.cat(x, 1) for x in zip(*both, strict=True)) for both in zip(shared, some, strict=True)]
        )
        for some in (own, other)
    )
    found = weighted(form, torch.cat([a, b, a]), [Contrast("a", "b"), "a"])
    assert form.rank(found) == SCORED
    wanted = form.products(rows.double(), torch.cat([a, b, a]).double())[0]
    np.testing.assert_allclose(form.products(rows, found)[0], [wanted[0] - wanted[1], wanted[2]], rtol=1e-3, atol=0.05)
    heaviest = sum((u.norm(dim=2) * v.norm(dim=2)).topk(8).values.sum() for u, v in form.factors(found[:1]))
    everything = sum((u.norm(dim=2) * v.norm(dim=2)).sum() for u, v in form.factors(found[:1]))
    assert heaviest > 0.999 * everything  # 8 triples of each part hold the difference


def test_rows_that_favour_the_answer_stand_first_and_those_of_the_other_last(index):
    hits = index.search([Contrast(A, B), Contrast(A, B).swapped], k=16)
    assert [hit.id for hit in hits[0][:5]] == [hit.id for hit in hits[1][:-6:-1]]
    assert hits[0][0].score > 0 > hits[0][-1].score
    assert index.encode([Contrast(A, B)]).texts[0].split(" rather than ")[1].endswith(B["response"])


def test_explanations_have_both_answers_and_sum_to_the_score(index):
    found = index.explain(Contrast(A, B), "row 3")
    one, other = (index.explain(side, "row 3") for side in (A, B))
    np.testing.assert_allclose(found.pairs, np.concatenate([one.pairs, -other.pairs]), rtol=1e-9)
    assert found.query_tokens == one.query_tokens + other.query_tokens
    assert abs(found.score - found.stored_score) < 0.1 * max(abs(one.score), abs(other.score))


def test_reranking_takes_the_difference_of_gradients(index):
    of = [{hit.id: hit.score for hit in hits} for hits in index.search([A, B, Contrast(A, B)], k=16, rerank=16)]
    size = max(map(abs, of[0].values()))
    assert all(abs(of[2][id] - of[0][id] + of[1][id]) < 2e-3 * size for id in of[0])


def test_contrasts_need_two_different_texts_or_rows():
    with pytest.raises(ValueError, match="Both answers of a contrast are the same, so that nothing tells them apart"):
        Contrast(A, dict(A))
    for same in ({"text": TEXTS[0], "id": "other"}, TEXTS[0]):
        with pytest.raises(ValueError, match="Both answers of a contrast are the same"):
            Contrast({"text": TEXTS[0], "id": "one"}, same)
    with pytest.raises(TypeError, match="A side of a contrast is of type int: give a text, or a row as a dict"):
        Contrast("a", 3)


# ---------------------------------------------------------------- behaviours of many texts

SHOWN, OTHERS = [A, {"prompt": TEXTS[1][:20], "response": TEXTS[7][:25]}], [B, TEXTS[6][:30], TEXTS[2][:20]]


def test_a_behaviour_is_the_mean_of_some_texts_less_that_of_others(index):
    asked = Behaviour.between(SHOWN, OTHERS, name="says so")
    parts = index.score([*SHOWN, *OTHERS], length="cosine")
    wanted = parts[:2].mean(0) - parts[2:].mean(0)
    found = index.score([asked, asked.swapped, Behaviour(OTHERS)], length="cosine")
    rounded = 0.01 if index.long is None or index.long.name == "whole" else 0.03  # 64 triples of some 30 of each text
    size = np.abs(parts).max()
    np.testing.assert_allclose(found[0], wanted, atol=rounded * size)
    np.testing.assert_allclose(found[1], -found[0], atol=1e-3 * size)
    np.testing.assert_allclose(found[2], parts[2:].mean(0), atol=rounded * size)
    assert index.encode([asked, asked.swapped]).texts == ("says so", "not says so")
    assert index.encode([Behaviour(OTHERS)]).texts[0].endswith(" and 2 more")


def test_a_behaviour_is_explained_reranked_and_selected_by(index):
    asked = Behaviour([A, B, SHOWN[1]], [2.0, -0.5, 1.0])
    found, parts = index.explain(asked, "row 3"), [index.explain(text, "row 3").pairs for text in asked.rows]
    np.testing.assert_allclose(
        found.pairs, np.concatenate([w * p for w, p in zip((2.0, -0.5, 1.0), parts, strict=True)])
    )
    best = index.search([A, B, SHOWN[1], asked], k=16, rerank=16)
    of = [{hit.id: hit.score for hit in hits} for hits in best]
    size = max(map(abs, of[3].values()))
    assert all(abs(of[3][id] - 2 * of[0][id] + 0.5 * of[1][id] - of[2][id]) < 2e-3 * size for id in of[0])
    assert [hit.id for hit in index.select([asked], 5, length="cosine")] == [
        hit.id for hit in index.search([asked], 5)[0]
    ]


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        ([], None, "A behaviour has 0 texts and 0 weights: give one weight for each text"),
        (["a", "b"], [1.0], "A behaviour has 2 texts and 1 weights"),
        (["a", "b"], [1.0, np.nan], "A weight of a behaviour is not finite"),
        (["a", "b"], [0.0, 0.0], "The weights of a behaviour are zero, or cancel"),
        (["a", {"text": "a", "id": "other"}], [1.0, -1.0], "The weights of a behaviour are zero, or cancel"),
    ],
)
def test_a_behaviour_that_asks_nothing_is_refused(rows, weights, message):
    with pytest.raises(ValueError, match=message):
        Behaviour(rows, weights)
    with pytest.raises(TypeError, match="A text of a behaviour is of type float: give a text, or a row as a dict"):
        Behaviour([0.5])
    with pytest.raises(TypeError, match=r"rows is 'a': give a list of texts or rows\."):
        Behaviour("a")
