"""microgpt, the character model of arXiv 2604.07328: 4,192 parameters on names, one document a step.

One layer, width 16, four heads, context 16, RMSNorm without weights (also right after the embedding, none before the
head), no biases, exact GELU, untied head. Parameters have the names, shapes and order of the paper's code, so that a
flat parameter vector means the same in both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.errors import FormatError

EPS = 1e-5


class MicroGPT(nn.Module):
    """Shapes: ids [examples, tokens] -> logits [examples, tokens, vocabulary]."""

    def __init__(self, vocabulary: int = 27, width: int = 16, heads: int = 4, context: int = 16) -> None:
        super().__init__()
        self.heads, self.context = heads, context
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.block = Block(width, heads)
        for p in self.parameters():
            nn.init.normal_(p, std=0.08)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next character at each place."""
        examples, tokens = ids.shape
        x = self.wte(ids) + self.wpe.weight[:tokens]
        x = self.block(rms_norm(x.view(examples * tokens, -1)), tokens)
        return self.lm_head(x).view(examples, tokens, -1)


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the stream; tokens of all examples are rows of one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """Shapes: x [examples * tokens, width] -> alike."""
        x = x + self.attend(rms_norm(x), tokens)
        return x + self.fc2(F.gelu(self.fc1(rms_norm(x))))

    def attend(self, x: Tensor, tokens: int) -> Tensor:
        """Causal attention of each example's tokens over its own. Shapes: x [examples * tokens, width] -> alike."""
        width = x.shape[1] // self.heads
        q, k, v = (
            w(x).view(-1, tokens, self.heads, width).transpose(1, 2).flatten(0, 1) for w in (self.wq, self.wk, self.wv)
        )
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        scores = torch.bmm(q / width**0.5, k.mT).masked_fill(future, float("-inf"))
        mixed = torch.bmm(scores.softmax(-1), v)
        return self.wo(mixed.view(-1, self.heads, tokens, width).transpose(1, 2).reshape(x.shape))


def rms_norm(x: Tensor) -> Tensor:
    """Rows scaled to a mean square of 1, without weights."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def encode(document: str, alphabet: str, context: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and targets [tokens] of one document, with the sign after the alphabet before and behind it."""
    mark = len(alphabet)
    if unknown := sorted(set(document) - set(alphabet)):
        raise FormatError(f"{document!r} has the character {unknown[0]!r}, which the training documents do not have.")
    ids = torch.tensor([mark, *(alphabet.index(ch) for ch in document), mark])[: context + 1]
    return ids[:-1], ids[1:]


def load_flat(model: MicroGPT, flat: Tensor) -> None:
    """Set all parameters from one vector [parameters] in the order of `model.parameters()`."""
    start = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()
