"""Preference and weighted rows in an index, beside what autograd takes of their own loss, written out in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leaveout import Index, MismatchError, Refinement, UnsupportedError
from leaveout.readout.settings import Channel, SignatureSettings
from leaveout.words import words_of

from .conftest import assert_close
from .test_index import IN_FULL, TRIPLES
from .tiny import TEXTS, built, make_model

HEAD = SignatureSettings((Channel("rh"),), length_power=0.5, **IN_FULL)  # rows are gradients of the head's matrix
ASK, SAY = {"role": "user", "content": TEXTS[5]}, {"role": "assistant", "content": TEXTS[6]}
DENY = {"role": "assistant", "content": TEXTS[2]}
PAIRS = [
    {"prompt": TEXTS[0][:30], "chosen": TEXTS[1], "rejected": TEXTS[2][:40]},
    {"chosen": TEXTS[3] + " Yes.", "rejected": TEXTS[3] + " No, never.", "weight": 0.25},
    {"prompt": [ASK, SAY, ASK], "chosen": [SAY], "rejected": [DENY]},
    {"chosen": [ASK, DENY], "rejected": [ASK, SAY], "weight": -2},
    {"prompt": " ".join(TEXTS[:4]), "chosen": " ".join(TEXTS[5::-1]), "rejected": " " + TEXTS[4]},
]
PLAIN = [
    {"text": TEXTS[7]},
    {"prompt": TEXTS[1], "completion": TEXTS[2], "weight": -1.5},
    {"text": TEXTS[4], "weight": 0},
]
ROWS = [{"id": f"row {n}", **row} for n, row in enumerate([*PAIRS, *PLAIN])]
QUERIES = [TEXTS[1], {"prompt": TEXTS[0], "response": TEXTS[6]}]


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1)


@pytest.fixture(scope="module")
def reference():
    return make_model("llama", spread=0.1, seed=1)


def likelihood(lm, tokenizer, before, answer):
    """log p of an answer, and how many tokens it has; its first token is the first that is not the prompt's."""
    ids = [
        tokenizer(text, add_special_tokens=not text.startswith("<s>")).input_ids for text in (before, before + answer)
    ]
    start = next(i for i in range(len(ids[1])) if ids[0][: i + 1] != ids[1][: i + 1])
    logits = lm(input_ids=torch.tensor([ids[1]])).logits[0, start - 1 : -1]
    target = torch.tensor(ids[1][start:])
    return -F.cross_entropy(logits, target, reduction="sum"), len(target)


def texts_of(row, tokenizer):
    """The prompt and the answers of a row, chats by the template."""
    if "text" in row:
        return "", [row["text"]]
    if "completion" in row:
        return row["prompt"], [row["completion"]]
    if isinstance(row["chosen"], str):
        before = row.get("prompt", TEXTS[3])
        return before, [row[side].removeprefix(before) for side in ("chosen", "rejected")]
    chats = [[*row.get("prompt", [ASK]), row[side][-1]] for side in ("chosen", "rejected")]
    before = tokenizer.apply_chat_template(chats[0][:-1], tokenize=False, add_generation_prompt=True)
    return before, [tokenizer.apply_chat_template(chat, tokenize=False).removeprefix(before) for chat in chats]


def loss_of(row, lm, reference, tokenizer, beta):
    """The loss that a row is indexed with; reference None: the model itself, as it is."""
    before, answers = texts_of(row, tokenizer)
    found = [likelihood(lm, tokenizer, before, answer) for answer in answers]
    weight = row.get("weight", 1)
    if len(found) == 1:
        return -weight * found[0][0] / found[0][1] ** 0.5
    with torch.no_grad():
        held = [likelihood(reference or lm, tokenizer, before, answer)[0] for answer in answers]
    margin = (found[0][0] - held[0]) - (found[1][0] - held[1])
    return -weight * F.logsigmoid(beta * margin)


def gradients(rows, lm, reference, tokenizer, beta=0.1):
    """Gradients [rows, vocabulary * hidden] of the head's matrix."""
    head = lm.lm_head.weight
    losses = (loss_of(row, lm, reference, tokenizer, beta) for row in rows)
    return np.stack([torch.autograd.grad(loss, head)[0].flatten().numpy() for loss in losses])


@pytest.fixture(scope="module")
def query_gradients(lm, tokenizer):
    rows = [{"text": QUERIES[0]}, {"prompt": QUERIES[1]["prompt"], "completion": QUERIES[1]["response"]}]
    return gradients(rows, lm, None, tokenizer)


@pytest.mark.parametrize("referred", [False, True], ids=["itself", "reference"])
def test_rows_are_gradients_of_their_own_loss(referred, lm, reference, query_gradients, tokenizer, tmp_path):
    other, beta = (reference, 0.5) if referred else (None, 0.1)
    options = {"reference": (other, tokenizer), "beta": beta} if referred else {}
    index = Index.build(lm, ROWS, tmp_path / "index", HEAD, tokenizer, **options)
    wanted = gradients(ROWS, lm, other, tokenizer, beta)
    assert_close(index.score(QUERIES), query_gradients @ wanted.T, "float32")
    anew = index.form.products(index.encoded_anew(np.arange(len(ROWS))), index.encode(QUERIES).vectors)
    assert_close(anew.T, query_gradients @ wanted.T, "float32")  # from their texts, without the reference model
    lengths = np.linalg.norm(wanted, axis=1)
    cosines = query_gradients @ np.divide(wanted, lengths[:, None], out=0 * wanted, where=lengths[:, None] > 0).T
    assert_close(index.score(QUERIES, length="cosine"), cosines, "float32")
    if referred:
        factors = lengths / np.linalg.norm(gradients(ROWS, lm, None, tokenizer), axis=1).clip(1e-9)
        assert np.ptp(factors[:5]) > 0.5, "the reference changes nothing"


@pytest.mark.parametrize("options", [{}, TRIPLES, {**TRIPLES, "long": "none"}], ids=["stored", "triples", "none"])
def test_explanations_and_whole_models_see_both_sides(options, lm, reference, tokenizer, tmp_path):
    """A preference row as a row and as a query; its tokens are those of both sides."""
    lm = make_model("llama", spread=0.1, dtype=torch.float32)
    other = (reference.float(), tokenizer)
    index = built(lm, ROWS, tmp_path / "index", "default", tokenizer, reference=other, **options)
    reference.double()
    scores = index.score([PAIRS[0], TEXTS[1]], length="product")
    rounded = 0.25 if options else 0.03  # of few triples
    for at, query in enumerate([PAIRS[0], TEXTS[1]]):
        for number in (0, 2, 6):
            found = index.explain(query, f"row {number}", length="product")
            assert abs(found.score - scores[at, number]) < rounded * np.abs(scores[at]).max()
            assert abs(found.pairs.sum() - found.score) < 1e-6 * np.abs(scores[at]).max()
    found = index.explain(TEXTS[1], "row 0")
    middle = (
        found.row_tokens.index("###") if "###" in found.row_tokens else len(index.tokenised([PAIRS[0]])[0].ids) // 2
    )
    assert np.abs(found.row_weights[:middle]).sum() > 0 and np.abs(found.row_weights[middle:]).sum() > 0
    (hits,) = index.search([TEXTS[1]], 8, rerank=8, length="product")
    model = dict(lm.named_parameters())
    query = -likelihood(lm, tokenizer, "", TEXTS[1])[0] / likelihood(lm, tokenizer, "", TEXTS[1])[1]
    ahead = torch.autograd.grad(query, [*model.values()])
    wanted = {}
    for row in ROWS:
        grads = torch.autograd.grad(loss_of(row, lm, reference.float(), tokenizer, 0.1), [*model.values()])
        wanted[row["id"]] = sum(float((a * b).sum()) for a, b in zip(ahead, grads, strict=True))
    reference.double()
    size = max(map(abs, wanted.values()))
    np.testing.assert_allclose([hit.score for hit in hits], [wanted[hit.id] for hit in hits], atol=2e-3 * size)
    with pytest.raises(UnsupportedError, match="this index has preference or weighted rows: rerank without refine"):
        index.search([TEXTS[1]], 2, refine=Refinement(rates=0.1))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft with transformers 5
def test_a_model_without_its_adapters_is_a_reference(tokenizer, tmp_path):
    """The same as the base model given apart, whose weights are the same; workers, appending and another reference."""
    peft = pytest.importorskip("peft")
    base = make_model("llama", spread=0.1)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    lm = peft.get_peft_model(make_model("llama", spread=0.1), settings)
    one = Index.build(lm, ROWS[:4], tmp_path / "one", HEAD, tokenizer, reference="base", workers=2)
    two = Index.build(lm, ROWS, tmp_path / "two", HEAD, tokenizer, reference=(base, tokenizer))
    plain = Index.build(lm, ROWS, tmp_path / "plain", HEAD, tokenizer)
    assert one.append(ROWS[4:]).added == 4
    assert_close(one.score(QUERIES), two.score(QUERIES), "float32")
    assert np.abs(one.score(QUERIES) - plain.score(QUERIES)).max() > 0.01 * np.abs(plain.score(QUERIES)).max()
    assert one.info()["preferences"] == {"beta": 0.1, "reference": "base"}
    assert plain.info()["preferences"] == {"beta": 0.1, "reference": None}
    with pytest.raises(MismatchError, match="holds preference rows against a reference model: give the same"):
        two.append(["a new text"])
    assert two.append(["a new text"], reference=(base, tokenizer)).added == 1
    with pytest.raises(MismatchError, match="another reference model: use the same settings to resume"):
        Index.build(lm, ROWS, tmp_path / "two", HEAD, tokenizer)
    with pytest.raises(MismatchError, match=r"beta = 0\.1, not 0\.2: use the same settings"):
        Index.build(lm, ROWS, tmp_path / "plain", HEAD, tokenizer, beta=0.2)
    with pytest.raises(
        UnsupportedError, match="The reference is `base`, the model without its adapters, and it has none"
    ):
        Index.build(base, ROWS, tmp_path / "none", HEAD, tokenizer, reference="base")
    with pytest.raises(ValueError, match="beta is 0: give a positive number"):
        Index.build(base, ROWS, tmp_path / "none", HEAD, tokenizer, beta=0)


def test_unit_lengths_keep_the_sign(lm, tokenizer, tmp_path):
    """In `similarity` a row is a direction: of a pair that of its windows, rejected ones turned round."""
    turned = {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    index = built(lm, [PAIRS[0], turned, PAIRS[0] | {"weight": -3}], tmp_path / "index", "similarity", tokenizer)
    (scores,) = index.score([TEXTS[1]])
    np.testing.assert_allclose(scores, scores[0] * np.array([1, -1, -1]), atol=1e-2 * abs(scores[0]))


@pytest.mark.parametrize("targets", ["response", "all"])
def test_shown_answers_have_labels_and_the_prompt_is_there_once(targets, lm, tokenizer, tmp_path):
    same = {"id": "same", "prompt": "Who came? ", "chosen": "Ann came.", "rejected": "Nobody."}
    chat = {"id": "chat", "prompt": [ASK], "chosen": [SAY], "rejected": [DENY]}
    index = built(
        lm, [same, chat, {"id": "text", "text": TEXTS[7]}], tmp_path / "idx", tokenizer=tokenizer, targets=targets
    )
    wanted = "Who came? \n\n### Chosen:\nAnn came.\n\n### Rejected:\nNobody."
    shown = {hit.id: hit.text for hit in index.search([TEXTS[1]], 3)[0]}
    assert shown["same"] == wanted and shown["text"] == TEXTS[7]
    for id in shown:
        why = index.explain(TEXTS[1], id)
        words, place = words_of(why.row_tokens)
        assert len(place) == len(why.row_tokens) == why.pairs.shape[1]
        assert "".join(words).split() == shown[id].split()  # a tokenizer may keep no spaces
    assert shown["chat"].count(TEXTS[5]) == 1 and shown["chat"].index("Chosen") < shown["chat"].index(TEXTS[6])
