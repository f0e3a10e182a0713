"""Signatures written out a second time: one row, one window and one position at a time, in float64.

Nothing is shared with the engine: text positions come from sets of characters, hidden states and logits from plain
forward passes of a float64 model over one window without padding, pull-backs from formulas, and whitening from sums
over the whole vocabulary. Only the random tables of the projections are the engine's, as data.
Source: arXiv 2604.16197 for the signature of the `paper` preset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Position:
    """One target position: its token, hidden state h, u = W h + b, logits z, and the inputs of watched modules."""

    target: int
    h: np.ndarray
    u: np.ndarray
    z: np.ndarray
    inputs: dict[str, np.ndarray]


class Slow:
    """A float64 model with its head taken apart."""

    def __init__(self, lm, watched=()):
        self.lm = lm
        self.watched = {name: lm.get_submodule(name) for name in watched}
        head = lm.get_output_embeddings()
        self.weight = head.weight.detach().double().numpy()
        self.bias = 0.0 if head.bias is None else head.bias.detach().double().numpy()
        self.cap = getattr(lm.config, "final_logit_softcapping", None)

    def slope(self, u):
        """dz / du of the soft-capped logits z = cap tanh(u / cap)."""
        return np.ones_like(u) if self.cap is None else 1 / np.cosh(u / self.cap) ** 2

    def positions(self, ids, places):
        """The target positions of one window; `places` are the indices of the target tokens."""
        seen = {}

        def keep(name):
            return lambda module, args: seen.__setitem__(name, args[0][0].double().numpy())

        modules = {**self.watched, "head": self.lm.get_output_embeddings()}
        handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
        with torch.no_grad():
            z = self.lm(input_ids=torch.tensor([ids])).logits[0].double().numpy()
        for handle in handles:
            handle.remove()
        return [
            Position(
                ids[place],
                seen["head"][place - 1],
                self.weight @ seen["head"][place - 1] + self.bias,
                z[place - 1],
                {name: seen[name][place - 1] for name in self.watched},
            )
            for place in places
        ]


def target_places(offsets, spans):
    """Indices of the tokens, the first excepted, that have a character in a span."""
    learned = {character for start, end in spans for character in range(start, end)}
    return [index for index, (start, end) in enumerate(offsets) if index and learned & set(range(start, end))]


def windows_of(n_tokens, length, stride):
    """[start, end) of windows every `stride` tokens until the last token is inside."""
    found = [(0, min(length, n_tokens))]
    while found[-1][1] < n_tokens:
        start = found[-1][0] + stride
        found.append((start, min(start + length, n_tokens)))
    return found


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def one_hot(index, size):
    return np.eye(1, size, index)[0]


def unit(x):
    length = np.sqrt((x * x).sum())
    return x / length if length > 1e-8 else np.zeros_like(x)


# The paper's signature.


def truncated_residual(z, target, tau=0.1, support=256, mass=0.92, minimum=4):
    """r = p - e_y over the kept entries, as {token: value}."""
    s = z / tau
    kept = sorted(range(len(s)), key=lambda v: -s[v])[:support]
    if target not in kept:
        kept[-1] = target
    p = softmax(np.array([s[v] for v in kept]))
    prefix, total = 0, 0.0
    while prefix < minimum or total < mass:
        total += p[prefix]
        prefix += 1
    chosen = {v: q for n, (v, q) in enumerate(zip(kept, p, strict=True)) if n < prefix or v == target}
    scale = sum(chosen.values())
    others = sum(q for v, q in chosen.items() if v != target)  # 1 - p_y would lose all digits
    return {v: q / scale if v != target else -others / scale for v, q in chosen.items()}


def sketch(x, buckets, signs, width):
    """CountSketch of {coordinate: value}."""
    out = np.zeros(width)
    for index, value in x.items():
        out[buckets[index]] += signs[index] * value
    return out


def paper_row(slow, ids, places, tables, weights=(1.0, 0.3)):
    """tables: (buckets, signs, width) for "r", "g" and "h"."""
    total = 0.0
    for start, end in windows_of(len(ids), 256, 206):
        inside = [place - start for place in places if start < place < end]
        if not inside:
            continue
        rh = gh = 0.0
        for at in slow.positions(ids[start:end], inside):
            r = truncated_residual(at.z, at.target)
            g = sum(value * slow.weight[v] for v, value in r.items())
            h_hat = unit(sketch(dict(enumerate(at.h)), *tables["h"]))
            rh = rh + np.outer(unit(sketch(r, *tables["r"])), h_hat)
            gh = gh + np.outer(unit(sketch(dict(enumerate(g)), *tables["g"])), h_hat)
        total = total + unit(np.concatenate([weights[0] * rh.ravel(), weights[1] * gh.ravel()]))
    return unit(total)


# Exact, unprojected signatures.


def residual_at(slow, at, temperature=1.0):
    """Gradient of the token's loss (at that temperature, up to its factor) with respect to u."""
    return slow.slope(at.u) * (softmax(at.z / temperature) - one_hot(at.target, len(at.z)))


def row_positions(slow, ids, places, window, stride):
    """All target positions of a row as a list per window, each target in the first window that predicts it."""
    done, found = set(), []
    for start, end in windows_of(len(ids), window, stride):
        inside = [place for place in places if start < place < end and place not in done]
        done |= set(inside)
        if inside:
            found.append(slow.positions(ids[start:end], [place - start for place in inside]))
    return found


def label_moments(slow, positions, temperature=1.0, back=None):
    """Sum over positions of E_y g_y g_y^T, y from the model, and the variance of each entry of a drawn sum.

    `back(at)` is a matrix that the row vector g is multiplied with, such as the pull-back through norms.
    """
    mean = variance = 0.0
    for at in positions:
        p, slope = softmax(at.z / temperature), slow.slope(at.u)[:, None]
        g = (p[:, None] * slope * slow.weight).sum(0) - slope * slow.weight  # one row per label
        g = g if back is None else g @ back(at)
        first = (g * p[:, None]).T @ g
        mean = mean + first
        variance = variance + ((g * g) * p[:, None]).T @ (g * g) - first**2
    return mean, variance


def whitening(moment, damping):
    """(M + damping mean-eigenvalue)^(-1/2)."""
    u, s, _ = np.linalg.svd(moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment)))
    return (u / np.sqrt(s)) @ u.T


def rms_back(x, g, weight, eps):
    """Gradient at the input of y = w x / sqrt(mean x^2 + eps); g [..., hidden] is the one at y."""
    n, rms = len(x), np.sqrt((x * x).mean() + eps)
    wg = weight * g
    return wg / rms - np.multiply.outer(wg @ x, x) / (n * rms**3)


def layer_norm_back(x, g, weight, eps):
    """Gradient at the input of y = w (x - mean) / sqrt(var + eps) + b."""
    centred = x - x.mean()
    sd = np.sqrt((centred * centred).mean() + eps)
    wg, unit_x = weight * g, centred / sd
    along = np.multiply.outer((wg * unit_x).mean(-1), unit_x)
    return (wg - wg.mean(-1)[..., None] - along) / sd
