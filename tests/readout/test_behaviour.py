"""Why this answer and not that one: differences of signatures, of gradients and of explanations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leaveout import Behaviour, Channel, Contrast, Corpus, Probe, SignatureSettings, load_readout
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.readout.codec import SCORED
from leaveout.readout.forms import Triples
from leaveout.readout.opened import weighted
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import tokenise

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


# ---------------------------------------------------------------- measures: functions of logits, probes

PLAIN = SignatureSettings(
    channels=(Channel("rh"), Channel("gh"), Channel("residual", outputs=("mlp",))), length_power=0.0
)


def likely(logits, targets):
    return -torch.nn.functional.cross_entropy(logits, targets)


def odd(logits, targets):
    """Of no use, but of all positions together, and not linear."""
    return (logits[:, 7].mean() * logits[0, targets[0]]).tanh() + logits[-1, 3] ** 2


def test_a_measure_that_is_the_likelihood_asks_as_the_text_does(index):
    found = index.score([A, Behaviour([A], measure=likely), Behaviour([A, B], [1, -1], likely), Contrast(A, B)])
    size = np.abs(found[0]).max()
    np.testing.assert_allclose(found[1], found[0], atol=1e-3 * size)
    np.testing.assert_allclose(found[2], found[3], atol=1e-3 * size)
    one, other = (index.explain(q, "row 3") for q in (A, Behaviour([A], measure=likely)))
    np.testing.assert_allclose(other.pairs, one.pairs, atol=1e-5 * np.abs(one.pairs).max())


@pytest.fixture(scope="module")
def plain(tokenizer):
    """A signer whose parts are neither whitened nor projected, its model, and the ids and targets of a text."""
    readout = load_readout(make_model("llama", spread=0.1), tokenizer)
    signer = Signer(readout, PLAIN)
    tokens = tokenise(next(iter(Corpus.open([A]))), 0, tokenizer, PLAIN, readout.context)
    return signer, readout, tokens.windows[0]


def entries(signer, measure, window):
    """The summed outer product of each part, by its name."""
    at = signer.asking(measure).positions([window])
    return {part.name: at_left.t() @ at_right for part in signer.parts
            for at_left, at_right in [signer.factors(at, part)]}  # fmt: skip


@pytest.mark.parametrize(
    "measure", [odd, Probe(np.arange(32.0)), Probe(np.arange(32.0) - 3, block=0), Probe(np.ones(32), 1)]
)
def test_parts_are_derivatives_of_the_measure_by_autograd(plain, measure):
    """Of the head, of a map of the last hidden state, and of the output projections whose path to the measure is direct:
    through the whole model, derivatives by torch."""
    signer, readout, window = plain
    lm, found, n = readout.lm, entries(signer, measure, window), len(window.positions)
    ids, at = torch.tensor([window.ids]), torch.tensor(window.positions)
    last, head = lm.base_model(input_ids=ids, output_hidden_states=True), lm.get_output_embeddings()
    extra = torch.eye(32, dtype=torch.float64, requires_grad=True)
    hidden = last.last_hidden_state[0, at].double() @ extra.t()
    block = measure.block if isinstance(measure, Probe) else None
    kept = []
    if isinstance(measure, Probe):
        if block is not None:
            hook = lm.base_model.layers[block].register_forward_hook(lambda module, args, out: kept.append(out))
            lm.base_model(input_ids=ids)
            hook.remove()
        states = hidden if block is None else (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0, at]
        value = (states.double() @ torch.tensor(measure.direction).double()).mean()
    else:
        value = measure(head(hidden.to(head.weight.dtype)), ids[0, at + 1])
    last_tap = 1 if block is None else block
    wanted = [head.weight, extra, lm.base_model.layers[last_tap].mlp.down_proj.weight]
    by_torch = torch.autograd.grad(value, wanted, allow_unused=True)
    for name, exact in zip(("rh0", "gh1", f"residual2/{last_tap}.mlp"), by_torch, strict=True):
        exact = torch.zeros_like(found[name]) if exact is None else exact.to(found[name])
        torch.testing.assert_close(found[name] / n, exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max()) + 1e-12)
    if block == 0:
        assert not found["residual2/1.mlp"].any() and found["residual2/0.mlp"].any()


@pytest.mark.parametrize("measure", [odd, Probe(np.arange(32.0)), Probe(np.arange(32.0) - 3, block=0)])
def test_reranking_takes_the_whole_derivative_of_a_measure(index, measure):
    """Gradients of all parameters by torch, of the measure and of one row's mean-root loss."""
    readout = index.readout
    lm, names = readout.lm, dict(readout.lm.named_parameters())
    found = {
        hit.id: hit.score
        for hit in index.search([Behaviour([A], measure=measure)], k=16, rerank=16, length="product")[0]
    }

    def pieces(query):
        window = index.tokenised([query])[0].windows[0]
        return torch.tensor([window.ids]), torch.tensor(window.positions)

    def slope(value):
        return torch.autograd.grad(value, list(names.values()), allow_unused=True)

    ids, at = pieces(A)
    if isinstance(measure, Probe):
        states = lm(input_ids=ids, output_hidden_states=True).hidden_states[1 if measure.block == 0 else -1]
        value = (states[0, at] @ torch.from_numpy(measure.direction)).mean()
    else:
        value = measure(lm(input_ids=ids).logits[0, at], ids[0, at + 1])
    asked = slope(value)
    for number in (3, 8):
        row_ids, row_at = pieces(ROWS[number])
        loss = torch.nn.functional.cross_entropy(lm(input_ids=row_ids).logits[0, row_at], row_ids[0, row_at + 1])
        loss = loss * len(row_at) ** 0.5  # as `default` counts rows
        exact = -sum(float((a * b).sum()) for a, b in zip(asked, slope(loss), strict=True) if a is not None)
        assert found[f"row {number}"] == pytest.approx(exact, rel=2e-2, abs=2e-3 * max(map(abs, found.values())))


def test_rows_that_raise_a_measure_stand_first(index):
    """A step of gradient descent on the first row raises it, one on the last lowers it."""
    lm, asked = index.readout.lm, Behaviour([A], measure=odd)
    hits = index.search([asked], k=16, rerank=16)[0]
    assert hits[0].score > 0 > hits[-1].score
    window = index.tokenised([A])[0].windows[0]

    def value():
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([window.ids])).logits[0, window.positions]
            return float(odd(logits, torch.tensor(window.ids)[torch.tensor(window.positions) + 1]))

    before, kept = value(), {name: p.detach().clone() for name, p in lm.named_parameters()}
    for hit, sign in ((hits[0], 1), (hits[-1], -1)):
        row = index.tokenised([hit.row])[0].windows[0]
        logits = lm(input_ids=torch.tensor([row.ids])).logits[0, row.positions]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids)[torch.tensor(row.positions) + 1])
        slopes = torch.autograd.grad(loss, list(lm.parameters()))
        with torch.no_grad():
            for p, slope in zip(lm.parameters(), slopes, strict=True):
                p -= 1e-3 * slope
        assert sign * (value() - before) > 0
        with torch.no_grad():
            for name, p in lm.named_parameters():
                p.copy_(kept[name])


def test_measures_that_cannot_be_asked_are_refused(index, tokenizer, tmp_path):
    def asked(measure):
        return index.encode([Behaviour([A], measure=measure)])

    with pytest.raises(ValueError, match=r"The measure of a behaviour gives \[9, 523\], and one number was wanted"):
        asked(lambda logits, targets: logits[:1].repeat(9, 1))
    with pytest.raises(ValueError, match="The measure of a behaviour gives float, and one number was wanted"):
        asked(lambda logits, targets: 1.0)
    with pytest.raises(ValueError, match="The measure of a behaviour does not depend on the logits"):
        asked(lambda logits, targets: targets.float().mean())
    with pytest.raises(MismatchError, match="The probe has 16 numbers and the hidden states of this model 32"):
        asked(Probe(np.ones(16)))
    with pytest.raises(ValueError, match="The model has blocks 0 to 1: block 2 is not one of them"):
        asked(Probe(np.ones(32), block=2))
    with pytest.raises(UnsupportedError, match="A function of logits takes those of a whole text, and one has"):
        index.encode([Behaviour([" ".join(TEXTS) * 2], measure=odd)])
    with pytest.raises(FormatError, match="A query has a signature that is not finite"):
        asked(lambda logits, targets: logits.sum() * float("nan"))
    for wrong in (np.zeros(32), [1.0, np.inf], np.ones((2, 32))):
        with pytest.raises(ValueError, match=r"The direction of a probe has the shape .*: give one finite number"):
            Probe(wrong)
    with pytest.raises(
        TypeError, match=r"block is 0\.5: give the number of a block, or None for the last hidden state"
    ):
        Probe(np.ones(32), block=0.5)
    with pytest.raises(TypeError, match="measure is 'loss': give a function of logits and targets, or a Probe"):
        Behaviour([A], measure="loss")
    head = built(make_model("llama"), ROWS[:2], tmp_path / "head", SignatureSettings((Channel("rh"),)), tokenizer)
    with pytest.raises(UnsupportedError, match="No part of this index has a gradient of the last hidden states"):
        head.encode([Behaviour([A], measure=Probe(np.ones(32)))])
    phi = built(make_model("phi"), ROWS[:2], tmp_path / "phi", "similarity", tokenizer)
    with pytest.raises(
        UnsupportedError, match="The layers of a phi model are not known, so that no block has a number"
    ):
        phi.encode([Behaviour([A], measure=Probe(np.ones(32), block=0))])
