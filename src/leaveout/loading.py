"""Loading models without noise, for everything that loads one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leaveout.errors import FormatError


def load_causal_lm(name: str, **options: Any) -> tuple[Any, Any]:
    """A causal language model by its directory or name, and its tokenizer; options are those of `from_pretrained`.

    Raises: FormatError for a checkpoint that lacks weights, which would be random.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = {key: value for key, value in options.items() if key != "dtype"}
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **own)
    model, facts = loaded
    if absent := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in facts[kind]):
        raise FormatError(f"{name} lacks the weights {absent[0]!r}, which would be random: give a whole model.")
    return model, tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice of transformers while a model loads: our own progress goes to stderr."""
    from transformers.utils import logging as transformers_logging

    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
