"""What all tests of the readout share: the tokenizer, rows of every form, and the table of tolerances."""

import numpy as np
import pytest
import torch

from leaveout.readout.settings import Channel, SignatureSettings
from leaveout.readout.tokens import tokenise

from .tiny import TEXTS, make_tokenizer, rows_of

torch.set_num_threads(1)  # as in a worker process, so that results are comparable bit for bit

# One whitened channel, for tests of what does not depend on which channels there are.
GH = SignatureSettings((Channel("gh", whiten_left=True, whiten_right=True),))

# name -> (relative, absolute): the largest difference that is rounding.
TOLERANCES = {
    "float64": (1e-9, 1e-12),  # both sides in float64, sums in another order
    "float32": (2e-5, 2e-6),  # stored as float32, or passed through norms that compute in float32; products of such
    "model float32": (2e-4, 2e-5),  # forward passes in float32, in batches of other shapes
    "float16": (5e-4, 5e-4),  # one rounding to 11 bits per stored number; absolute in units of the largest score
    "int8": (2e-3, 2e-3),  # 1/127 of a row's largest number, over sqrt(12), times up to 5 sigma; largest ~ length / 6
    "one level": (1e-3, 1e-3),  # rows in other batches: a number in ten thousand is rounded to the other side
    "explain": (1e-4, 1e-4),  # what the specification asks for
}


def assert_close(found, wanted, kind):
    relative, absolute = TOLERANCES[kind]
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    size = np.abs(wanted).max() if wanted.size else 0.0
    np.testing.assert_allclose(found, wanted, rtol=relative, atol=absolute * max(size, 1e-30))


def ranked(scores):
    """Positions of one query's scores, best first: at 12 binary digits behind the leading one, then by position."""
    mantissa, exponent = np.frexp(np.asarray(scores, np.float64))  # |mantissa| from 1/2 to 1
    rounded = np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**13 + 0.5) * 2.0 ** (exponent - 13.0)
    return np.array(sorted(range(len(rounded)), key=lambda at: (-rounded[at], at)), int)


RAW = [
    TEXTS[0],
    {"prompt": TEXTS[1], "completion": TEXTS[2]},
    {"prompt": "Count: one, tw", "completion": "o, three and " + TEXTS[3]},  # a token may lie across the seam
    {"text": TEXTS[4] + TEXTS[5], "prompt_text": TEXTS[4]},
    {"messages": [{"role": "user", "content": TEXTS[5]}, {"role": "assistant", "content": TEXTS[6]}]},
    {"instruction": TEXTS[7], "input": TEXTS[6], "output": TEXTS[5]},
    " ".join(TEXTS),
    {"prompt": " ".join(TEXTS), "completion": " ".join(TEXTS[::-1])},
]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def rows():
    """One row of each form, and long ones."""
    return rows_of(RAW)


@pytest.fixture(scope="session")
def tokenised(rows, tokenizer):
    """The tokens of rows by given settings."""
    return lambda settings, given=rows: [tokenise(row, n, tokenizer, settings, 512) for n, row in enumerate(given)]
