"""microgpt, the character model of arXiv 2604.07328: 4,192 parameters on names, one document a step.

One layer, width 16, four heads, context 16, RMSNorm without weights (also right after the embedding, none before the
head), no biases, exact GELU, untied head. Parameters have the names, shapes and order of the paper's code, so that a
flat parameter vector means the same in both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        return self.lm_head(self.block(rms_norm(x)))


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(rms_norm(x))
        return x + self.fc2(F.gelu(self.fc1(rms_norm(x))))

    def attend(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = (w(x).view(n, tokens, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.wo(mixed.transpose(1, 2).reshape(n, tokens, width))


def rms_norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def encode(document: str, alphabet: str, context: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and targets [tokens] of one document, with the sign after the alphabet before and behind it."""
    mark = len(alphabet)
    ids = torch.tensor([mark, *(alphabet.index(ch) for ch in document), mark])[: context + 1]
    return ids[:-1], ids[1:]


def load_flat(model: MicroGPT, flat: Tensor) -> None:
    """Set all parameters from one vector [parameters] in the order of `model.parameters()`."""
    start = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()


def flat(model: MicroGPT) -> Tensor:
    """All parameters as one vector [parameters]."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
