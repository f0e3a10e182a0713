"""Loading models without noise, for everything that loads one."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from leaveout.errors import FormatError, UnsupportedError


def load_causal_lm(name: str, **options: Any) -> tuple[Any, Any]:
    """A causal language model by its directory or name, and its tokenizer; options are those of `from_pretrained`.

    Raises: UnsupportedError for what does not load; FormatError for a checkpoint that lacks weights, which would be random.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = {key: value for key, value in options.items() if key != "dtype"}
    shown = "/".join([name, *([options["gguf_file"]] if "gguf_file" in options else [])])
    place = name if Path(name).exists() or hub_answers() else downloaded_before(name, options.get("revision"))
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(place, **own)
    except ImportError as error:
        raise UnsupportedError(f"{shown} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"{shown} does not load as a causal language model with its tokenizer: {_first_line(error)}"
        ) from error
    model, facts = loaded
    if absent := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in facts[kind]):
        raise FormatError(f"{name} lacks the weights {absent[0]!r}, which would be random: give a whole model.")
    return model, tokenizer


def hub_answers() -> bool:
    """Whether the address of the model hub is known here; with a proxy, which looks it up itself, this is not asked."""
    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def downloaded_before(name: str, revision: str | None) -> str:
    """The directory of a model that was once loaded from the hub. Asking the hub without a connection takes a minute.

    Raises: UnsupportedError if there is none.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        raise UnsupportedError(
            f"{name} does not load: there is no such directory, it was not downloaded before, and the hub can't be reached; "
            "check the name or the connection."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


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
