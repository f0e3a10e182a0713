"""Rows of training data, streamed from JSONL, JSON, Parquet, Hugging Face datasets or a Python list.

A row has exactly one form: `text`, whose beginning may be given as `prompt_text`; `prompt` (or `prompt_text`) and
`completion` (or `response`); `instruction`, `input` and `output`; or chat `messages`. Its other fields are metadata.
A bad row stops the reading, unless `skip_bad` counts and lists it.

Conventions: only a newline ends a line of JSONL, blank lines are not rows, a byte order mark at the start of a file is
not text, and text is never normalised. Spans count characters. Ids may repeat here: the index refuses that.
"""

from leaveout.corpus.behaviour import Behaviour, Contrast, Probe
from leaveout.corpus.chat import render
from leaveout.corpus.rows import Row
from leaveout.corpus.sources import Corpus

__all__ = ["Behaviour", "Contrast", "Corpus", "Probe", "Row", "render"]
