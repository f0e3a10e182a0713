"""Runs of transformers' Trainer and of plain loops, recorded and replayed; and what is refused before training."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import leaveout as lo
from jets.test_recipe import points, tiny_gpt2
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.evaluation.truth import _reseeded, refuse_second_order
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain

WORDS = ["ann: a", "bob bob: b", "cy: cc", "dee: ddd", "eve: e", "fay: ff", "gus: g", "hal: h"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_gpt2(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def tokenizer(place):
    found = transformers.AutoTokenizer.from_pretrained(place)
    found.pad_token, found.eos_token = "_", "z"
    return found


class Words(torch.utils.data.Dataset):
    """Rows of tokens."""

    def __init__(self, tokenizer):
        self.rows = [
            {"id": w.split(":")[0], "kind": w[0] < "d", "input_ids": tokenizer(w).input_ids} for w in WORDS[:7]
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def arguments(tmp_path, **changes):
    given = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 0.01,
        "warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "seed": 7,
    }  # fmt: skip
    return TrainingArguments(str(tmp_path), **{**given, **changes})


def trainer_of(place, tokenizer, tmp_path, kind=Trainer, model=None, collator=None, dataset=None, **changes):
    loss = {"compute_loss_func": changes.pop("compute_loss_func")} if "compute_loss_func" in changes else {}
    return kind(
        model or transformers.AutoModelForCausalLM.from_pretrained(place), arguments(tmp_path, **changes),
        train_dataset=dataset or Words(tokenizer), processing_class=tokenizer,
        data_collator=collator or DataCollatorForLanguageModeling(tokenizer, mlm=False), **loss,
    )  # fmt: skip


def recorded(trainer):
    with lo.recording(trainer) as run:
        trainer.train()
    return run


CASES = {  # how far the replay may be, as a part of the whole movement
    "clipped": ({"max_grad_norm": 0.5}, 1e-5),
    "not clipped": ({"max_grad_norm": 0.0, "lr_scheduler_type": "polynomial"}, 1e-3),
    "sgd": ({"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 3}, 1e-6),
    "smoothed": ({"label_smoothing_factor": 0.1, "train_sampling_strategy": "sequential", "max_steps": 3}, 1e-5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_trainers_run_is_replayed(place, tokenizer, tmp_path, case):
    changes, most = CASES[case]
    trainer = trainer_of(place, tokenizer, tmp_path, **changes)
    run = recorded(trainer)
    proof = run.replay()
    assert proof.equal and proof.distance < most, proof
    theirs = dict(trainer.model.named_parameters())
    assert all(torch.equal(run.after[name], p.cpu()) for name, p in theirs.items())
    recipe = run.recipe
    assert recipe.ids[0] == "ann" and len(recipe.batches()) == trainer.state.global_step and recipe.dropout == 7
    assert recipe.optimizer.undecayed == "vectors" and recipe.examples[0].raw["kind"] is True


def test_a_recorded_run_is_measured_like_any_other(place, tokenizer, tmp_path):
    recipe = recorded(trainer_of(place, tokenizer, tmp_path / "t")).recipe.with_(dtype="float64")
    run = lo.TrainingRun.train(recipe, tmp_path / "run")
    wanted = train_plain(recipe)
    assert all(torch.equal(run.parameters[name], p) for name, p in wanted.items())
    refuse_second_order(run)  # its order is that of the recording, and its dropout has another seed
    other = _reseeded(run)
    assert other.dropout == 8 and other.batches() == recipe.batches()
    psi = torch.eye(7, dtype=torch.float64)[:2]
    jets = train_jets(recipe, psi, JetSettings(1, torch.float64))
    runs = train_batch(recipe, torch.cat([1 + 1e-6 * psi, 1 - 1e-6 * psi]))
    name = "transformer.h.0.mlp.c_fc.weight"
    differences = (runs[name][2:] - runs[name][:2]) / 2e-6
    assert (jets.coefficients[name][0] - differences).abs().max() < 1e-3 * differences.abs().max()


def test_checkpoints_are_noted_and_hold_the_recipes_model_at_their_step(place, tokenizer, tmp_path):
    run = recorded(trainer_of(place, tokenizer, tmp_path, save_strategy="steps", save_steps=3, max_steps=4))
    assert list(run.checkpoints) == [3, 4]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.checkpoints[3]).state_dict()
    ours = train_plain(run.recipe.first_steps(3))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.allclose(ours[name], theirs[name], atol=1e-5) and not torch.allclose(
        run.after[name], theirs[name], atol=1e-4
    )


def test_adapters_are_recorded_and_their_names_are_those_of_the_recipe(place, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], lora_dropout=0.2, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(place), config)
    run = recorded(trainer_of(place, tokenizer, tmp_path, model=model, learning_rate=0.05))
    proof = run.replay()
    assert proof.distance < 1e-4, proof
    assert len(run.recipe.trained) == 2 and run.recipe.trained == task_of(run.recipe).trained


def test_a_saved_run_is_trained_from_its_file_with_the_same_libraries(place, tokenizer, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(place), config)
    for model in (None, adapted):
        run = recorded(trainer_of(place, tokenizer, tmp_path / "t", model=model))
        path = run.save(tmp_path / f"saved-{model is None}")
        recipe = lo.Recipe.from_yaml(path)
        wanted = train_plain(run.recipe)
        assert recipe.batches() == run.recipe.batches() and recipe.ids == run.recipe.ids
        assert all(torch.equal(p, wanted[name]) for name, p in train_plain(recipe).items())
    text = path.read_text()
    path.write_text(text.replace(f"transformers: {transformers.__version__}", "transformers: 4.0.0"))
    with pytest.raises(MismatchError, match=r"was recorded with transformers 4\.0\.0, and here is"):
        lo.Recipe.from_yaml(path)


@pytest.mark.slow
def test_packed_runs_of_trl_are_replayed_with_their_masks(place, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    given = {name: value for name, value in arguments(tmp_path).to_dict().items() if name in (
        "num_train_epochs", "learning_rate", "report_to", "use_cpu", "disable_tqdm", "save_strategy", "seed"
    )}  # fmt: skip
    given |= {"per_device_train_batch_size": 1, "bf16": False, "gradient_checkpointing": False}
    rows = [{"text": word} for word in WORDS]
    for changes in ({"packing": True, "max_length": 24}, {"packing": False}):
        trainer = trl.SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(place), trl.SFTConfig(str(tmp_path), **given, **changes),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        run = recorded(trainer)
        assert run.recipe.packed is changes["packing"] and run.recipe.dropout == 7
        assert run.replay().distance < 1e-4, run.replay()


def test_what_bfloat16_changes_is_shown_by_its_cause(place, tokenizer, tmp_path):
    run = recorded(trainer_of(place, tokenizer, tmp_path, bf16=True))
    assert run.recipe.autocast == "bfloat16"
    assert "bfloat16, which rounds attention otherwise" in str(run.replay()) or run.replay().equal


def test_a_run_that_something_else_changes_is_not_equal_and_says_where(place, tokenizer, tmp_path):
    trainer = trainer_of(place, tokenizer, tmp_path, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
    weight = trainer.model.transformer.h[0].mlp.c_fc.weight
    weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(
        MismatchError, match=r"NOT equal, .* The gradient of step 0 had the length .* after equal losses"
    ):
        recorded(trainer).replay().require()
    trainer = trainer_of(place, tokenizer, tmp_path)
    trainer.model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, args, out: out * (1 + m.training))
    run = recorded(trainer)
    for module in run.start.modules():
        module._forward_hooks.clear()
    assert "The loss of step 0 was" in run.replay().cause


class OwnLoss(Trainer):
    """A Trainer with a loss of its own."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * 2


class Stream(torch.utils.data.IterableDataset):
    """Rows without an end."""

    def __iter__(self):
        yield {"input_ids": [1, 2, 3]}


def left(tokenizer):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def collated(rows):
        found = collate(rows)
        return {name: t.flip(1) for name, t in found.items()}

    return collated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": OwnLoss}, "OwnLoss has a loss of its own"),
        ({"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()}, "custom one"),
        ({"dataset": Stream(), "max_steps": 2}, "data set is a stream"),
        ({"optim": "adafactor"}, "The optimizer is adafactor: use one of adamw_torch"),
        ({"neftune_noise_alpha": 5.0}, "NEFTune adds noise"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_training(place, tokenizer, tmp_path, changes, message):
    trainer = trainer_of(place, tokenizer, tmp_path, **changes)
    with pytest.raises(UnsupportedError, match=message), lo.recording(trainer):
        pytest.fail("trained")
    assert "training_step" not in vars(trainer)


def test_what_shows_only_while_training_is_refused_by_the_recipe(place, tokenizer, tmp_path):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def growing(rows):
        batch = collate(rows)
        batch["input_ids"][0, 1] = len(asked) % 20
        asked.append(rows)
        return batch

    asked: list = []
    with pytest.raises(UnsupportedError, match="rows that the data set did not have when the recording began"):
        recorded(trainer_of(place, tokenizer, tmp_path, collator=growing)).recipe  # noqa: B018
    with pytest.raises(UnsupportedError, match="padded on the left"):
        recorded(trainer_of(place, tokenizer, tmp_path, collator=left(tokenizer))).recipe  # noqa: B018
    with lo.recording(trainer_of(place, tokenizer, tmp_path)) as run:
        pass
    with pytest.raises(UnsupportedError, match="No step was recorded"):
        run.recipe  # noqa: B018


def test_arguments_alone_give_the_batches_and_rates_of_the_trainer(place, tokenizer, tmp_path):
    for changes in (
        {},
        {"lr_scheduler_type": "linear", "data_seed": 3, "max_steps": 5},
        {"dataloader_drop_last": True},
    ):
        trainer = trainer_of(place, tokenizer, tmp_path, **changes)
        theirs = recorded(trainer).recipe
        ours = lo.Recipe.from_training_arguments(trainer.args, Words(tokenizer), (trainer.model, tokenizer))
        n = len(theirs.batches())
        assert ours.micro_batches() == theirs.micro_batches() and ours.ids == theirs.ids
        mine, other = ([r.rate(i, n) for i in range(n)] for r in (ours, theirs))
        assert mine == pytest.approx(other, rel=1e-6, abs=1e-12) and mine[0] == 0.0
        for name in ("clip_norm", "label_smoothing", "autocast", "max_tokens"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.optimizer == lo.OptimizerSettings(**{**vars(theirs.optimizer), "lr": 0.01})


def test_arguments_that_no_recipe_says_are_refused(tokenizer, tmp_path):
    rows = Words(tokenizer)
    for changes, message in (
        ({"lr_scheduler_type": "polynomial"}, "The schedule polynomial is none of a recipe's: record the run"),
        ({"train_sampling_strategy": "group_by_length"}, "sampler of train_sampling_strategy='group_by_length'"),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, "an earlier state back"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            lo.Recipe.from_training_arguments(arguments(tmp_path, **changes), rows, (None, tokenizer))
    with pytest.raises(UnsupportedError, match=r"of another transformers .*world_size"):
        lo.Recipe.from_training_arguments(SimpleNamespace(learning_rate=1.0), rows, (None, tokenizer))


def test_a_loop_of_ones_own_is_recorded_with_one_line_a_batch():
    def made():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(6, 3))

    model, rows = made().train(), points(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    with lo.recording(model, rows, optimizer, kind="classifier", clip_norm=1.0) as run:
        for step in range(5):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
            numbers = [step, 7 - step, 2]
            run.batch(numbers)
            x, y = torch.stack([rows[i][0] for i in numbers]), torch.tensor([rows[i][1] for i in numbers])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    proof = run.replay()
    assert proof.distance < 1e-6 and run.recipe.batches()[1] == (1, 6, 2) and run.recipe.dropout == 0, proof
    other = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    with lo.recording(made(), rows, other, kind="classifier") as run:
        pass
    assert run.problems == [] and not run.steps
    with pytest.raises(ValueError, match="needs `examples` and `optimizer`"), lo.recording(model):
        pass
