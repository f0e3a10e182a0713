"""Language models for both engines: one loader, one identity, and the checks that a model passes before it is used.

model = load_model("owner/name"); model.identity(); model.refuse_changes()
"""

from leaveout.models.checks import ROUNDING, evaluating, length_limit, refuse_hooks, refuse_look_ahead, runs
from leaveout.models.devices import Fetched, find_device, free_memory, full_precision, sent
from leaveout.models.identity import adapter_places, difference, is_adapted, plain_module, settled_module
from leaveout.models.language_model import LanguageModel, load_model
from leaveout.models.places import (
    ModelOptions,
    Offload,
    load_context,
    load_tokenizer,
    quiet_transformers,
    source_digest,
)

__all__ = [
    "ROUNDING",
    "Fetched",
    "LanguageModel",
    "ModelOptions",
    "Offload",
    "adapter_places",
    "difference",
    "evaluating",
    "find_device",
    "free_memory",
    "full_precision",
    "is_adapted",
    "length_limit",
    "load_context",
    "load_model",
    "load_tokenizer",
    "plain_module",
    "quiet_transformers",
    "refuse_hooks",
    "refuse_look_ahead",
    "runs",
    "sent",
    "settled_module",
    "source_digest",
]
