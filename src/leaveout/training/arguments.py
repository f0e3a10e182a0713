"""transformers' TrainingArguments as fields of a recipe, and what of them no recipe can say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from leaveout.errors import UnsupportedError

OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "sgd": "sgd"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
ADVICE = "record the run that it makes (leaveout.recording)"


def refusals(args: Any) -> list[str]:
    """What of these arguments neither a recipe nor a recording can replay, one sentence each."""
    found = []
    if args.world_size > 1 or args.n_gpu > 1:
        found.append("The run is shared out over several devices: train on one (CUDA_VISIBLE_DEVICES=0).")
    if args.fp16:
        found.append("fp16 scales losses and skips steps: train in bf16 or float32.")
    if args.neftune_noise_alpha:
        found.append("NEFTune adds noise to embeddings: set neftune_noise_alpha to None.")
    if args.deepspeed or args.fsdp:
        found.append("DeepSpeed and FSDP share out the model: train on one device without them.")
    if _text(args.optim) not in OPTIMIZERS or args.optim_args:
        found.append(f"The optimizer is {_text(args.optim)}: use one of {', '.join(OPTIMIZERS)}, without optim_args.")
    if args.load_best_model_at_end:
        found.append("load_best_model_at_end puts an earlier state back at the end: set it to False.")
    return found


def common_fields(args: Any) -> dict[str, Any]:
    """Fields of a recipe that the arguments alone decide, but for the optimizer."""
    return {
        "clip_norm": args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
        "label_smoothing": args.label_smoothing_factor,
        "autocast": "bfloat16" if args.bf16 else None,
        "seed": args.seed,
        "dropout": args.seed,
    }


def optimizer_fields(args: Any) -> dict[str, Any]:
    """Fields of a recipe's optimizer."""
    name = OPTIMIZERS[_text(args.optim)]
    fields = {"name": name, "lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.weight_decay:
        fields["undecayed"] = "vectors"
    if name != "sgd":
        fields |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return fields


def run_fields(args: Any, examples: int) -> dict[str, Any]:
    """Fields of a recipe for a Trainer's run with these arguments on so many examples.

    Raises: UnsupportedError for what a recipe cannot say, and for arguments of a transformers that had others.
    """
    try:
        problems = refusals(args)
        if _text(args.lr_scheduler_type) not in SCHEDULES or args.lr_scheduler_kwargs:
            problems.append(f"The schedule {_text(args.lr_scheduler_type)} is none of a recipe's: {ADVICE}.")
        if (strategy := _text(args.train_sampling_strategy)) not in ("random", "sequential"):
            problems.append(
                f"The sampler of train_sampling_strategy={strategy!r} depends on the model's rows: {ADVICE}."
            )
        if problems:
            raise UnsupportedError(" ".join(problems))
        order = micro_batches(args, examples)
        fields = common_fields(args) | {
            "schedule": SCHEDULES[_text(args.lr_scheduler_type)], "warmup": args.get_warmup_steps(len(order)),
            "warmup_from_zero": True, "order": order, "loss_per": "token",
        }  # fmt: skip
        if _text(args.lr_scheduler_type) == "constant":
            fields["warmup"] = 0
        return fields
    except AttributeError as error:
        raise UnsupportedError(
            f"These TrainingArguments are of another transformers ({error}): make them anew with the one that is installed."
        ) from None


def micro_batches(args: Any, examples: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The micro-batches of each step, as transformers and accelerate draw them."""
    size, together = args.per_device_train_batch_size, args.gradient_accumulation_steps
    seed = args.seed if args.data_seed is None else args.data_seed
    ends = examples - examples % size if args.dataloader_drop_last else examples
    each = math.ceil(math.ceil(ends / size) / together)
    wanted = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * each)
    if not each:
        raise UnsupportedError(f"The {examples} examples fill no batch of {size}, and dataloader_drop_last is True.")
    steps: list[tuple[tuple[int, ...], ...]] = []
    for epoch in range(math.ceil(wanted / each)):
        numbers: Sequence[int] = range(examples)
        if _text(args.train_sampling_strategy) == "random":
            numbers = torch.randperm(examples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        parts = [tuple(numbers[i : i + size]) for i in range(0, ends, size)]
        steps += [tuple(parts[i : i + together]) for i in range(0, len(parts), together)]
    return tuple(steps[:wanted])


def _text(value: Any) -> str:
    """The name of a setting that may be an enum's."""
    return str(getattr(value, "value", value))
