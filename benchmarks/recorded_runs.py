"""Does a recorded run of transformers' Trainer or trl's SFTTrainer train the same model again? And what does each setting cost?

    python benchmarks/recorded_runs.py --case gpt2|gpt2-sft|smollm2|smollm2-sft|settings [--smoke]

Each case adds its part to one result file. `gpt2` is a tiny GPT-2 with full training, `smollm2` SmolLM2-135M with LoRA (32
rows of at most 96 tokens, dropout .05, accumulation 2, warm-up, cosine, weight decay, clipping). A distance is that of the
trained parameters, divided by the length of the Trainer's whole movement. `settings` replays one run of the tiny GPT-2 with
one setting of the recipe left out at a time: how far a recipe that did not know it would have been.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

import leaveout as lo
from leaveout.training.recording import Recording
from leaveout.training.train import train_plain
from measuring import alpaca, arguments, made_rows, smollm2, tiny, write_result

NAME = "recorded_runs.json"
SETTINGS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "learning_rate": 2e-3,
    "warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 1.0, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "seed": 7,
}  # fmt: skip


def gpt2(tokenizer: Any, seed: int) -> Any:
    """A GPT-2 of two small layers with random weights and its usual dropout."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def texts(n: int, smoke: bool, seed: int) -> list[str]:
    """Instructions with their answers."""
    rows = made_rows(n, seed) if smoke else [r for r in alpaca(seed) if len(r["instruction"] + r["output"]) < 300][:n]
    return [f"{row['instruction']}\n{row['output']}" for row in rows]


def trainer_of(sft: bool, model: Any, tokenizer: Any, rows: list[str], limit: int, **changes: Any) -> Any:
    """A Trainer (or SFTTrainer) on these texts, of at most `limit` tokens each."""
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.decode([0])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    place = tempfile.mkdtemp()
    if sft:
        import datasets
        import trl

        given = {**SETTINGS, "max_length": limit, "bf16": False, "gradient_checkpointing": False, **changes}
        data = datasets.Dataset.from_list([{"text": text} for text in rows])
        return trl.SFTTrainer(model, trl.SFTConfig(place, **given), train_dataset=data, processing_class=tokenizer)
    data = [{"input_ids": tokenizer(text).input_ids[:limit]} for text in rows]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return transformers.Trainer(
        model, transformers.TrainingArguments(place, **{**SETTINGS, **changes}), train_dataset=data,  # type: ignore[arg-type]
        processing_class=tokenizer, data_collator=collate,
    )  # fmt: skip


def recorded(trainer: Any) -> tuple[Recording, float]:
    """The recording of a run, and the CPU seconds of the run."""
    began = time.process_time()
    with lo.recording(trainer) as run:
        trainer.train()
    return run, time.process_time() - began


def proof(run: Recording, seconds: float) -> dict[str, Any]:
    """How far the replay is."""
    began, recipe = time.process_time(), run.recipe
    found = run.replay()
    return {
        "distance": found.distance, "noise": found.noise, "equal": found.equal, "cause": found.cause, "steps": found.steps,
        "rows": len(recipe.examples), "longest_row": recipe.max_tokens,
        "micro_batches": sum(map(len, recipe.micro_batches())),
        "trained_parameters": sum(p.numel() for p in found.parameters.values()), "recorded_cpu_seconds": seconds,
        "replayed_cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def with_lora(model: Any) -> Any:
    """Adapters on the attention of every layer, with dropout."""
    import peft

    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model.train(), config)


def case_of(name: str, smoke: bool, seed: int) -> dict[str, Any]:
    """One run, recorded and replayed."""
    sft = name.endswith("sft")
    if name.startswith("gpt2"):
        tokenizer = tiny(seed).tokenizer
        trainer = trainer_of(sft, gpt2(tokenizer, seed), tokenizer, texts(30, smoke, seed), 64)
    else:
        start = tiny(seed) if smoke else smollm2()
        start.lm.is_quantized = start.lm.hf_quantizer = (
            None  # the file's numbers were unpacked at load: it trains like any other
        )
        torch.manual_seed(seed)
        trainer = trainer_of(sft, with_lora(start.lm), start.tokenizer, texts(32, smoke, seed), 96)
    return proof(*recorded(trainer))


def settings(smoke: bool, seed: int) -> dict[str, float]:
    """Distances of recipes that lack one thing that the Trainer does; and of the Trainer's other seeds from each other."""
    tokenizer = tiny(seed).tokenizer
    rows = texts(15 if smoke else 49, smoke, seed)

    def run_of(**changes: Any) -> Recording:
        return recorded(
            trainer_of(False, gpt2(tokenizer, seed), tokenizer, rows, 64, **{"num_train_epochs": 2, **changes})
        )[0]

    run = run_of()
    recipe, start = run.recipe, run._before
    assert isinstance(recipe.order, tuple)
    warm = tuple(min(1.0, (i + 1) / 2) if i < 2 else part for i, part in enumerate(recipe.schedule))
    short = [i for i, step in enumerate(recipe.micro_batches()) if len(step) == 1 or len(step[-1]) == 1]
    kept = {
        name: tuple(part for i, part in enumerate(getattr(recipe, name)) if i not in short)
        for name in ("order", "schedule", "loss_per")
    }
    changed: dict[str, Callable[[], lo.Recipe]] = {
        "as recorded": lambda: recipe,
        "loss per token of the step": lambda: recipe.with_(loss_per="token"),
        "loss per example": lambda: recipe.with_(loss_per="example"),
        "mean of micro-batches": lambda: recipe.with_(loss_per="micro-batch"),
        "no dropout": lambda: recipe.with_(dropout=None),
        "dropout of another seed": lambda: recipe.with_(dropout=8),
        "warm-up that starts above 0": lambda: recipe.with_(schedule=warm),
        "last batch of an epoch dropped": lambda: recipe.with_(**kept),
        "decay of biases and norms": lambda: recipe.with_(optimizer=replace(recipe.optimizer, undecayed=())),
        "no clipping": lambda: recipe.with_(clip_norm=None),
        "rows in the data's order": lambda: recipe.with_(order="given", batch_size=4, epochs=2),
    }
    found = {name: distance(train_plain(make()), run.after, start) for name, make in changed.items()}
    other = run_of(bf16=True)
    found["bfloat16 recorded, replayed in bfloat16"] = other.replay().distance
    found["bfloat16 recorded, replayed in float32"] = distance(
        train_plain(other.recipe.with_(autocast=None)), other.after, start
    )
    found["label smoothing .1 recorded, left out"] = distance(
        train_plain((smoothed := run_of(label_smoothing_factor=0.1)).recipe.with_(label_smoothing=0.0)),
        smoothed.after,
        start,
    )
    found["another seed of the Trainer"] = distance(run_of(seed=8).after, run.after, start)
    found["SGD, as recorded"] = (sgd := run_of(optim="sgd", learning_rate=0.3)).replay().distance
    found["SGD, loss per token of the step"] = distance(
        train_plain(sgd.recipe.with_(loss_per="token")), sgd.after, start
    )
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Of two trained models, as a part of how far the second moved from the start."""
    flat = [nn.utils.parameters_to_vector([p[name] for name in start]) for p in (one, other, start)]
    return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())


def main(given: list[str] | None = None) -> int:
    """Runs one case, and adds it to the result file."""
    parser = arguments(__doc__)
    cases = ("gpt2", "gpt2-sft", "smollm2", "smollm2-sft", "settings")
    parser.add_argument("--case", choices=cases, required=True)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    path = args.out / NAME
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases[args.case] = (
        settings(args.smoke, args.seed) if args.case == "settings" else case_of(args.case, args.smoke, args.seed)
    )
    print(json.dumps(cases[args.case], indent=1))
    write_result(args.out, NAME, {"cases": cases}, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
