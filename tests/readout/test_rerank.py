"""Scores through the whole model, beside gradients that autograd takes of the model's own loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leaveout import FormatError, MismatchError, Refinement, UnsupportedError
from leaveout.readout.rerank import read_moments, read_rates, summed_rates, whole_model

from .conftest import ranked
from .tiny import TEXTS, built, make_model

ROWS = [
    {
        "id": f"row {n}",
        "prompt": TEXTS[n % 8][: 9 + n],
        "response": TEXTS[(n + 3) % 8][n:],
        "source": ("web", "book")[n % 2],
    }
    for n in range(12)
]
QUERIES = [TEXTS[0], {"prompt": TEXTS[1], "response": TEXTS[3]}]


@pytest.fixture(scope="module")
def lm():
    return make_model("gemma2", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module")
def index(lm, tokenizer, tmp_path_factory):
    return built(lm, ROWS, tmp_path_factory.mktemp("rerank") / "index", "default", tokenizer, window=40, stride=20)


def gradients(lm, index, rows, power):
    """Gradients [rows, parameters] float64 of what the rows' responses lose, one row after another."""
    model, found = copy.deepcopy(lm).double(), []
    for row in index.tokenised(rows):
        total = 0.0
        for window in row.windows:
            logits = model(input_ids=torch.tensor([window.ids]), use_cache=False).logits[0]
            at = torch.tensor(window.positions)
            total = total + F.cross_entropy(logits[at], torch.tensor(window.ids)[at + 1], reduction="sum")
        grads = torch.autograd.grad(total / row.n_targets**power, [*model.parameters()])
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found).numpy()


@pytest.fixture(scope="module")
def exact(lm, index):
    """Products of gradients [query, row]; rows count as in the index, queries by their mean."""
    assert index.settings.length_power == 0.5 and max(len(row.windows) for row in index.tokenised(ROWS)) > 1
    return gradients(lm, index, QUERIES, 1) @ gradients(lm, index, ROWS, 0.5).T


def by_id(hits):
    return np.array([hit.score for hit in sorted(hits, key=lambda hit: int(hit.id.split()[1]))])


@pytest.mark.parametrize("length", ["product", "cosine"])
def test_scores_are_products_with_gradients_of_all_parameters(index, exact, length):
    wanted = exact if length == "product" else exact / index.lengths_of(np.arange(12))
    for hits, row in zip(index.search(QUERIES, k=12, rerank=12, length=length), wanted, strict=True):
        assert np.linalg.norm(by_id(hits) - row) < 2e-3 * np.linalg.norm(row)


def test_the_best_rows_so_far_are_ranked_anew(index, exact):
    for query, found in enumerate(index.search(QUERIES, k=2, rerank=5, length="product")):
        best = ranked(index.score(QUERIES)[query])[:5]
        assert [hit.id for hit in found] == [f"row {n}" for n in best[np.argsort(-exact[query, best])][:2]]
    found = index.search(QUERIES, k=2, rerank=5, group_by="source", where="id <> 'row 3'")
    assert all(len({hit.meta["source"] for hit in hits}) == len(hits) for hits in found)
    assert not any(hit.id == "row 3" for hits in found for hit in hits)
    assert str(index.plan_search(rerank=5)).startswith("All 12 rows are scored exactly")
    assert "10 scored through the whole model" in str(index.plan_search(rerank=5))  # never fewer than hits


def test_a_short_way_along_gradient_descent_changes_no_order(index):
    plain = index.search(QUERIES, k=12, rerank=12, length="product")
    refined = index.search(QUERIES, k=12, refine=Refinement(1e-6, "sgd", sample=4, steps=2), length="product")
    for a, b in zip(plain, refined, strict=True):
        np.testing.assert_allclose(by_id(b), 1e-6 * by_id(a), rtol=1e-2, atol=1e-8 * np.abs(by_id(a)).max())
    further = index.search(QUERIES, k=12, refine=Refinement(0.3, sample=4, steps=2), length="product")
    assert np.corrcoef(by_id(plain[0]), by_id(further[0]))[0, 1] < 0.999


def test_one_step_shrinks_a_query_by_its_own_curvature(lm, index):
    """x = f(a) g with a = g'Gg / g'g of the rows' mean loss: each a sum over the windows of its row."""
    model = copy.deepcopy(lm).double()
    query = gradients(lm, index, QUERIES[:1], 1)[0]
    parameters, direction = [*model.parameters()], torch.tensor(query / np.linalg.norm(query))

    def logits(by, window):
        with torch.no_grad():
            for p, x in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                p += by * x.view(p.shape)
            found = model(input_ids=torch.tensor([window.ids]), use_cache=False).logits[0, window.positions]
            for p, x in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                p -= by * x.view(p.shape)
        return found

    total = 0.0
    for row in index.tokenised(ROWS):
        for window in row.windows:
            change = (logits(1e-5, window) - logits(-1e-5, window)) / 2e-5
            p = logits(0, window).softmax(1)
            spread = (p * change.square()).sum(1) - (p * change).sum(1).square()
            total += float(spread.sum()) / row.n_targets / len(ROWS)
    assert sum(len(row.windows) for row in index.tokenised(ROWS)) > len(ROWS)
    plain, found = (
        by_id(index.search(QUERIES[:1], k=12, length="product", rerank=12, refine=refine)[0])
        for refine in (None, Refinement(1 / total, "sgd", sample=1000, steps=1))
    )
    np.testing.assert_allclose(found @ plain / (plain @ plain), -np.expm1(-1) / total, rtol=5e-3)


def test_deleted_rows_tell_nothing_of_curvature(lm, tokenizer, tmp_path):
    """A query refined by what is left is that of an index that never had the others."""
    some = built(lm, ROWS[:8], tmp_path / "some", "default", tokenizer)
    assert some.delete(["row 0", "row 3"]) == 2
    left = built(
        lm, [row for row in ROWS[:8] if row["id"] not in ("row 0", "row 3")], tmp_path / "l", "default", tokenizer
    )
    refine = Refinement(0.05, "sgd", sample=4, steps=2)
    found, wanted = (
        {hit.id: hit.score for hit in x.search(QUERIES[:1], refine=refine, length="product")[0]} for x in (some, left)
    )
    assert found == pytest.approx(wanted, rel=1e-3)
    some.delete([*wanted])
    assert some.search(QUERIES, refine=refine) == [[], []]
    assert left.search(QUERIES, refine=refine, where="source = 'film'") == [[], []]


def test_a_list_holds_all_that_is_to_be_reranked(index, monkeypatch):
    monkeypatch.setattr("leaveout.readout.shortlist.LEAST", 1)
    monkeypatch.setattr("leaveout.readout.shortlist.BEST", 0)
    assert index.plan_search(k=2).shortlist == 2
    plan = index.plan_search(k=2, rerank=6)
    assert (plan.shortlist, plan.reranked) == (6, 6)
    assert index.plan_search(k=2, shortlist=3, rerank=6).reranked == 3
    assert index.plan_search(k=2, reencode=6).anew == 6


def test_rates_beyond_all_numbers_are_refused(index):
    with pytest.raises(ValueError, match=r"rates is 1e-80, by which a query grows or shrinks beyond all numbers"):
        index.search(QUERIES[:1], k=2, refine=Refinement(1e-80, "sgd", sample=2, steps=1))
    assert len(index.search(QUERIES[:1], k=2, refine=Refinement(1e80, "sgd", sample=2, steps=1))[0]) == 2  # 1 / h


def test_narrow_types_are_taken_in_float32(tokenizer, tmp_path):
    lm = make_model("llama", spread=0.1, dtype=torch.bfloat16)
    index = built(lm, ROWS[:4], tmp_path / "index", "default", tokenizer)
    wanted = gradients(lm, index, QUERIES[:1], 1) @ gradients(lm, index, ROWS[:4], 0.5).T
    found = by_id(index.search(QUERIES[:1], k=4, rerank=4, length="product")[0])
    assert np.linalg.norm(found - wanted[0]) < 2e-3 * np.linalg.norm(wanted)
    assert next(lm.parameters()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_of_an_adapted_model_the_adapter_counts(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(make_model("llama", spread=0.1, dtype=torch.float32), config)
    index = built(adapted, ROWS[:4], tmp_path / "index", "default", tokenizer)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 8
    whole = []
    for tokens in index.tokenised([*QUERIES[:1], *ROWS[:4]]):
        window = tokens.windows[0]
        logits = adapted(input_ids=torch.tensor([window.ids]), use_cache=False).logits[0]
        at = torch.tensor(window.positions)
        loss = F.cross_entropy(logits[at], torch.tensor(window.ids)[at + 1], reduction="sum")
        grads = torch.autograd.grad(loss, [p for p in adapted.parameters() if p.requires_grad])
        whole.append(torch.cat([g.flatten() for g in grads]).double() / tokens.n_targets ** (0.5 if whole else 1))
    wanted = (torch.stack(whole[1:]) @ whole[0]).numpy()
    found = by_id(index.search(QUERIES[:1], k=4, rerank=4, length="product")[0])
    assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)


# ---------------------------------------------------------------- a trainer's checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that transformers.Trainer trained, and its last checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    place = tmp_path_factory.mktemp("trainer")
    told = transformers.TrainingArguments(
        str(place), max_steps=5, save_steps=5, logging_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        lr_scheduler_type="linear", weight_decay=0.1, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": list(range(n, n + 9)), "labels": list(range(n, n + 9))} for n in range(20)]
    trainer = transformers.Trainer(make_model("llama", spread=0.1, dtype=torch.float32), told, train_dataset=data)
    trainer.train()
    return trainer, place / "checkpoint-5"


@pytest.mark.filterwarnings("ignore")
def test_moments_of_a_trainer_are_those_of_its_parameters(trained):
    trainer, place = trained
    names = [name for name, _ in trainer.model.named_parameters()]
    moments, rates = read_moments(place, trainer.model, names), read_rates(place)
    assert moments.keys() == set(names)
    for name, p in trainer.model.named_parameters():
        kept = trainer.optimizer.state[p]
        torch.testing.assert_close(moments[name], kept["exp_avg_sq"] / (1 - 0.999**5), rtol=1e-6, atol=0)
    assert abs(rates / sum(0.01 * (1 - n / 5) for n in range(5)) - 1) < 0.35  # what it logged are rates of single steps


@pytest.mark.filterwarnings("ignore")
def test_a_search_is_refined_by_a_trainers_checkpoint(trained, tokenizer, tmp_path):
    trainer, place = trained
    index = built(trainer.model.eval(), ROWS[:6], tmp_path / "index", "default", tokenizer)
    refine = Refinement(optimizer=place, sample=4, steps=2)
    found = index.search(QUERIES, k=3, refine=refine)
    assert [len(hits) for hits in found] == [3, 3] and all(np.isfinite(hit.score) for hit in found[0])
    other = built(make_model("gpt2", dtype=torch.float32), ROWS[:6], tmp_path / "other", "default", tokenizer)
    with pytest.raises(MismatchError, match=r"parameters where the model has|second moments of the shape of"):
        other.search(QUERIES, refine=refine)


def test_rates_between_logs_are_their_mean(tmp_path):
    told = {
        "global_step": 10,
        "log_history": [{"step": 4, "learning_rate": 0.2}, {"step": 8, "learning_rate": 0.1}, {"step": 9}],
    }
    assert summed_rates(told, tmp_path) == pytest.approx(4 * 0.2 + 4 * 0.15 + 2 * 0.1)
    with pytest.raises(FormatError, match="has logged no learning rates above 0: give the sum"):
        summed_rates({"log_history": [{"step": 1, "loss": 2.0}]}, tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", ["nothing", "no tensors", "no json", "empty", "no groups", "a list", "a list of rates"])
def test_what_is_no_checkpoint_is_refused(index, tmp_path, bad):
    if bad != "nothing":
        torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    if bad == "empty":
        (tmp_path / "optimizer.pt").write_bytes(b"")
    if bad in ("no groups", "a list"):
        torch.save({"state": {}} if bad == "no groups" else [1.0], tmp_path / "optimizer.pt")
    if bad in ("no json", "a list of rates"):
        (tmp_path / "trainer_state.json").write_text("{" if bad == "no json" else "[0.1]")
        with pytest.raises(FormatError, match="is no checkpoint of a Trainer"):
            read_rates(tmp_path)
        return
    if bad == "no tensors":
        torch.save({"state": Refinement(1.0)}, tmp_path / "optimizer.pt")
    with pytest.raises(FormatError, match="is no checkpoint of a Trainer"):
        index.search(QUERIES, refine=Refinement(optimizer=tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_other_optimizers_and_without_rates(trained, tmp_path):
    trainer, _ = trained
    names = [name for name, _ in trainer.model.named_parameters()]
    many = {"state": {}, "param_groups": [{"params": [n]} for n in range(len(names))]}
    torch.save(many, tmp_path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"has \d+ groups of parameters where Trainer makes 2"):
        read_moments(tmp_path, trainer.model, names)
    with pytest.raises(FormatError, match="has logged no learning rates above 0"):
        summed_rates({"global_step": 3, "log_history": [{"step": 1, "learning_rate": 0.0}]}, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_given_rates_need_no_log(trained, tokenizer, tmp_path):
    trainer, place = trained
    (tmp_path / "optimizer.pt").write_bytes((place / "optimizer.pt").read_bytes())
    index = built(trainer.model.eval(), ROWS[:4], tmp_path / "index", "default", tokenizer)
    assert len(index.search(QUERIES[:1], k=2, refine=Refinement(0.01, tmp_path, sample=2, steps=1))[0]) == 2


def test_wrong_calls_are_one_sentence(index, monkeypatch):
    for arguments in ({}, {"optimizer": "sgd"}):
        with pytest.raises(ValueError, match="needs the sum of the run's learning rates: give rates"):
            Refinement(**arguments)
    for rates in (-1, "0.3", True):
        with pytest.raises(ValueError, match=f"rates is {rates!r}: give the sum of the run's learning rates"):
            Refinement(rates)
    with pytest.raises(TypeError, match="optimizer is 5: give sgd, or the directory of a checkpoint"):
        Refinement(0.3, 5)
    with pytest.raises(TypeError, match=r"refine is 0.3: give a Refinement, such as Refinement\(rates=0.05\)"):
        index.search(QUERIES, refine=0.3)
    with pytest.raises(ValueError, match="reencode and rerank both say how the best rows are scored once more"):
        index.search(QUERIES, reencode=3, rerank=3)
    with pytest.raises(TypeError, match="encoded already can't be reranked: give their texts or rows"):
        index.search(index.encode(QUERIES), rerank=3)
    monkeypatch.setattr(index.readout, "stream", object())
    with pytest.raises(UnsupportedError, match="its layers are streamed here: give offload none"):
        whole_model(index.readout)


def test_candidates_hold_as_many_groups_as_are_wanted(index):
    """The two best rows are of one source; the best row of the other is ranked besides. And the step's error is told."""
    best = [index.ids[n] for n in ranked(index.score(QUERIES[:1])[0])]
    sources = {record.id: record.meta["source"] for record in index.records(best)}
    web, book = ([id for id in best if sources[id] == source] for source in ("web", "book"))
    first, last = (web, book) if best.index(web[1]) < best.index(book[-1]) else (book, web)
    where = f"id IN ('{first[0]}', '{first[1]}', '{last[-1]}')"
    (hits,) = index.search(QUERIES[:1], k=2, rerank=2, group_by="source", where=where)
    assert {hit.meta["source"] for hit in hits} == {"web", "book"}
    (hits,) = index.search(QUERIES[:1], k=2, reencode=2, group_by="source", where=where)
    assert {hit.meta["source"] for hit in hits} == {"web", "book"}
    (hits,) = index.search(QUERIES[:1], rerank=3)
    assert 0 < hits.step_error < 0.1 and index.search(QUERIES[:1])[0].step_error is None
