"""`default`, `similarity` and `residual` against exact, unprojected sums in float64, and against autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leaveout.corpus import render
from leaveout.readout.forms import Triples
from leaveout.readout.logits import map_width
from leaveout.readout.model import Readout
from leaveout.readout.settings import Channel, SignatureSettings, resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import Window
from leaveout.readout.whitening import whitening_matrices

from .conftest import GH, assert_close
from .oracle import (
    Slow,
    label_moments,
    layer_norm_back,
    residual_at,
    rms_back,
    row_positions,
    target_places,
    unit,
    whitening,
    windows_of,
)
from .tiny import make_model, make_readout

EXACT = {"bytes_per_row": None, "short_bytes": None, "storage": "float32", "window": 32, "stride": 24}
ROWS = slice(0, 6)  # most of them of several windows


def signed(readout, settings, tokenised, rows):
    """The engine's vectors and whitening matrices of the rows, and the windows."""
    windows = [window for row in tokenised(settings, rows[ROWS]) for window in row.windows]
    signer = Signer(readout, settings)
    if settings.whitens:
        signer.whitening = whitening_matrices(signer, windows)
    return signer.rows(windows, len(rows[ROWS])).numpy(), signer.whitening, windows


def slow_positions(slow, settings, tokenised, tokenizer, rows):
    """Per row and window, the oracle's target positions."""
    found = []
    for row, tokens in zip(rows[ROWS], tokenised(settings, rows[ROWS]), strict=True):
        places = target_places(tokens.offsets, render(row, tokenizer).responses)
        found.append(row_positions(slow, tokens.ids, places, settings.window, settings.stride))
    return found


def precision(family):
    """The norms of all other families round to float32 inside, whatever the model's dtype."""
    return "float64" if family in ("gpt_neox", "gpt2", "phi") else "float32"


def turned(matrix, root, kind):
    """The engine's whitening matrix E (L + d)^-1/2, once it is seen to be that: E E^T = 1, and matrix E^T the symmetric
    root of the oracle, with directions of falling moments, whose columns are therefore of rising length.
    """
    matrix = np.asarray(matrix, np.float64)
    lengths = np.sqrt((matrix**2).sum(0))
    assert (np.diff(lengths) >= -1e-6 * lengths[:-1]).all()
    directions = matrix / lengths
    assert np.abs(directions @ directions.T - np.eye(len(matrix))).max() < 1e-6
    assert_close(matrix @ directions.T, root, kind)
    return matrix


def flat(nested):
    return [position for row in nested for window in row for position in window]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("family", "vocabulary"), [("gpt_neox", 523), ("gemma2", 523), ("phi", 4500)])
def test_whitened_gh_equals_the_exact_product(family, vocabulary, temperature, tokenizer, tokenised, rows):
    lm = make_model(family, spread=0.15, vocabulary=vocabulary)  # one of more tokens than one piece of the head
    readout = Readout(lm, tokenizer, None, cap=getattr(lm.config, "final_logit_softcapping", None))
    settings = resolve_settings(GH, temperature=temperature, **EXACT)
    found, matrices, _ = signed(readout, settings, tokenised, rows)
    slow = Slow(readout.lm)
    nested = slow_positions(slow, settings, tokenised, tokenizer, rows)
    g_moment, _ = label_moments(slow, flat(nested), temperature)
    h_moment = sum(np.outer(at.h, at.h) for at in flat(nested))
    left, right = (whitening(moment / len(flat(nested)), 0.1) for moment in (g_moment, h_moment))
    left, right = (
        turned(matrices[f"{name}.damping-0.1"], root, precision(family)) for name, root in (("gh0", left), ("h", right))
    )
    for vector, row in zip(found, nested, strict=True):
        wanted = sum(
            np.outer(left.T @ slow.weight.T @ residual_at(slow, at, temperature), right.T @ at.h) for at in flat([row])
        )
        assert_close(vector, wanted.ravel(), precision(family))


def test_similarity_equals_the_exact_product(tokenizer, tokenised, rows):
    readout = make_readout("gpt2", tokenizer, spread=0.15)
    settings = resolve_settings("similarity", **EXACT)
    found, _, _ = signed(readout, settings, tokenised, rows)
    slow, n_windows = Slow(readout.lm), 0
    for row, tokens, vector in zip(rows[ROWS], tokenised(settings, rows[ROWS]), found, strict=True):
        places = target_places(tokens.offsets, render(row, tokenizer).responses)
        total = 0.0
        for start, end in windows_of(len(tokens.ids), settings.window, settings.stride):
            inside = [place - start for place in places if start < place < end]
            n_windows += bool(inside)
            if inside:
                at = slow.positions(tokens.ids[start:end], inside)
                total += unit(sum(np.outer(residual_at(slow, one) @ slow.weight, one.h) for one in at).ravel())
        assert_close(vector, unit(total), "float64")
    assert n_windows > len(found) + 5


# family -> where its output projections and the final norm are; how that norm is pulled back, its epsilon.
LLAMA = "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"
PLACES = {
    "llama": (LLAMA, "model.norm", rms_back, "rms_norm_eps"),
    "olmo": (LLAMA, "model.norm", layer_norm_back, None),
    "olmo2": (LLAMA, "model.norm", rms_back, "rms_norm_eps"),
    "gemma2": (LLAMA, "model.norm", rms_back, "rms_norm_eps"),
    "gpt_neox": (
        ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        "gpt_neox.final_layer_norm",
        layer_norm_back,
        "layer_norm_eps",
    ),
    "gpt2": (
        ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
        "transformer.ln_f",
        layer_norm_back,
        "layer_norm_epsilon",
    ),
}


class SlowResidual(Slow):
    """Adds the residual channel's factors."""

    def __init__(self, lm):
        taps, self.final, self.formula, eps = PLACES[lm.config.model_type]
        layers = range(lm.config.num_hidden_layers)
        self.taps = [name.format(layer) for layer in layers for name in taps]
        self.eps = 1e-5 if eps is None else getattr(lm.config, eps)
        super().__init__(lm, [*self.taps, self.final])

    def left(self, at, tap, g):
        """g [..., hidden] at the output of the final norm, as it is at the output of a projection."""
        module = self.lm.get_submodule(self.final)
        weight = getattr(module, "weight", None)
        weight = np.ones(len(at.h)) if weight is None else weight.detach().numpy()
        if self.lm.config.model_type == "gemma2":
            weight = 1 + weight
        return self.formula(at.inputs[self.final], g, weight, self.eps)


# Blocks of the model by preset: enough that a choice among them is one.
CASES = [("residual", family, 2) for family in PLACES] + [("default", family, 4) for family in PLACES]


@pytest.mark.parametrize(("preset", "family", "n_blocks"), CASES)
def test_preset_equals_the_exact_product(preset, family, n_blocks, tokenizer, tokenised, rows):
    """All channels, each side with its own damping, at the blocks that are nearest, divided by the row's length."""
    readout = make_readout(family, tokenizer, spread=0.3, num_hidden_layers=n_blocks)
    channels = resolve_settings(preset).channels
    narrow = tuple(replace(channel, left_width=channel.left_width and 24) for channel in channels)
    settings = resolve_settings(preset, **EXACT, channels=narrow)
    found, matrices, _ = signed(readout, settings, tokenised, rows)
    slow = SlowResidual(readout.lm)
    nested = slow_positions(slow, settings, tokenised, tokenizer, rows)
    maps = {key: by.matrix().numpy() for key, by in Signer(readout, settings).maps.items() if key.startswith("rh")}
    roots = [
        root
        for number, channel in enumerate(settings.channels)
        for root in (
            [head_roots(slow, flat(nested), channel, matrices, f"rh{number}", maps[f"rh{number}"])]
            if channel.kind == "rh"
            else [residual_roots(slow, flat(nested), channel, matrices, tap) for tap in taps_of(slow, channel)]
        )
    ]
    used = {name for names, *_ in roots for name in names}
    assert used == matrices.keys()
    assert max(len(windows) for windows in nested) > 2  # so that tokens, not windows, are counted
    for vector, row in zip(found, nested, strict=True):
        positions, parts = flat([row]), []
        for _, tap, left, right in roots:
            total = 0.0
            for at in positions:
                r = residual_at(slow, at, settings.temperature)
                g = r @ maps["rh0"] if tap is None else slow.left(at, tap, r @ slow.weight)
                total += np.outer(left.T @ g, right.T @ (at.h if tap is None else at.inputs[tap]))
            parts.append(total.ravel() / len(positions) ** settings.length_power)
        for part, wanted in zip(np.split(vector, np.cumsum([part.size for part in parts])[:-1]), parts, strict=True):
            assert_close(part, wanted, precision(family))


def dampings(channel):
    assert channel.whiten_left and channel.whiten_right and channel.weight == 1
    return channel.damping if channel.left_damping is None else channel.left_damping, channel.damping


def head_roots(slow, positions, channel, matrices, key, sketch):
    """Names of the whitening matrices of an rh channel, no tap, and the matrices by the oracle."""
    left, right = dampings(channel)
    names, weight = (f"{key}.damping-{left}", f"h.damping-{right}"), slow.weight
    slow.weight = sketch  # in the place of W
    moments = label_moments(slow, positions)[0], sum(np.outer(at.h, at.h) for at in positions)
    slow.weight = weight
    roots = [whitening(m / len(positions), d) for m, d in zip(moments, (left, right), strict=True)]
    kind = precision(slow.lm.config.model_type)
    return names, None, *(turned(matrices[name], root, kind) for name, root in zip(names, roots, strict=True))


def residual_roots(slow, positions, channel, matrices, tap):
    """The same for an output projection, whose moment of labels passes the final norm at each position."""
    left, right = dampings(channel)
    place = f"{tap.split('.')[2]}.{'mlp' if '.mlp.' in tap else 'attention'}"
    names = f"g.final.damping-{left}", f"a.{place}.damping-{right}"
    kind = precision(slow.lm.config.model_type)
    left_moment = label_moments(slow, positions, back=lambda at: slow.left(at, tap, np.eye(len(at.h))))[0]
    right_moment = sum(np.outer(at.inputs[tap], at.inputs[tap]) for at in positions)
    roots = [whitening(m / len(positions), d) for m, d in ((left_moment, left), (right_moment, right))]
    return names, tap, *(turned(matrices[name], root, kind) for name, root in zip(names, roots, strict=True))


def taps_of(slow, channel):
    """Names of the output projections of a channel: of all blocks, or of those nearest to its depths."""
    n_blocks = slow.lm.config.num_hidden_layers
    blocks: list[int] = list(range(n_blocks))
    if channel.depths is not None:  # halfway between two blocks: the even one
        places = [depth * (n_blocks - 1) for depth in channel.depths]
        blocks = [
            min(range(n_blocks), key=lambda block, place=place: (abs(block - place), block % 2)) for place in places
        ]
    taps = [tap for block in dict.fromkeys(blocks) for tap in slow.taps[2 * block : 2 * block + 2]]
    return [tap for tap in taps if ("mlp" if ".mlp." in tap else "attention") in channel.outputs]


def test_labels_are_drawn_where_the_final_norm_is_of_another_kind(tokenizer, tokenised, rows, monkeypatch):
    """Moments of drawn labels lie within 5 sigma of what is expected, and are not that."""
    readout = make_readout("gpt_neox", tokenizer, spread=0.15)
    channel = Channel("residual", whiten_left=True, depths=(1.0,), outputs=("mlp",))
    monkeypatch.setattr("leaveout.readout.whitening.Scaling.of", lambda *_: None)
    settings = SignatureSettings((channel,), **EXACT)
    matrices = signed(readout, settings, tokenised, rows)[1]
    slow = SlowResidual(readout.lm)
    positions = flat(slow_positions(slow, settings, tokenised, tokenizer, rows))
    assert_drawn(slow, positions, taps_of(slow, channel)[0], matrices["g.final.damping-0.1"].numpy(), 0.1)


def assert_drawn(slow, positions, tap, root, damping):
    """The moment behind a whitening matrix, whose labels are drawn, lies within 5 sigma of its expectation."""
    mean, variance = label_moments(slow, positions, back=lambda at: slow.left(at, tap, np.eye(len(at.h))))
    damped = np.linalg.inv(root @ root.T) * len(positions)
    drawn = damped - damping * np.trace(damped) / (1 + damping) / len(damped) * np.eye(len(damped))
    sigmas = (drawn - mean) / np.sqrt(variance)
    assert np.sqrt((sigmas**2).mean()) > 0.3 and np.abs(sigmas).max() < 5  # neither exact nor another distribution


def test_left_and_right_factors_have_their_own_damping(tokenizer, tokenised, rows):
    """Left: `left_damping`, or `damping` where there is none; right: `damping`. One matrix per vectors and damping."""
    readout = make_readout("gpt_neox", tokenizer, spread=0.15)
    channels = (
        Channel("rh", left_width=24, whiten_left=True, whiten_right=True, damping=0.2, left_damping=0.7),
        Channel("gh", whiten_left=True, whiten_right=True, damping=0.3, left_damping=2.0),
        Channel("gh", whiten_left=True, whiten_right=True, damping=0.3),
        Channel("gh", whiten_right=True, damping=0.2, left_damping=9.0),
    )
    settings = SignatureSettings(channels, **EXACT)
    found, matrices, _ = signed(readout, settings, tokenised, rows)
    slow = Slow(readout.lm)
    nested = slow_positions(slow, settings, tokenised, tokenizer, rows)
    n = len(flat(nested))
    g, h = label_moments(slow, flat(nested))[0] / n, sum(np.outer(at.h, at.h) for at in flat(nested)) / n
    slow.weight = Signer(readout, settings).maps["rh0"].matrix().numpy()  # the sketch in the place of W
    r, sketch = label_moments(slow, flat(nested))[0] / n, slow.weight
    wanted = {
        "rh0.damping-0.7": whitening(r, 0.7),
        "gh1.damping-2.0": whitening(g, 2.0),
        "gh2.damping-0.3": whitening(g, 0.3),
        "h.damping-0.2": whitening(h, 0.2),
        "h.damping-0.3": whitening(h, 0.3),
    }
    assert matrices.keys() == wanted.keys()
    wanted = {name: turned(matrices[name], matrix, "float64") for name, matrix in wanted.items()}
    used = [("rh0.damping-0.7", "h.damping-0.2"), ("gh1.damping-2.0", "h.damping-0.3")]
    used += [("gh2.damping-0.3", "h.damping-0.3"), (None, "h.damping-0.2")]
    weight = readout.weight.numpy()
    for vector, row in zip(found, nested, strict=True):
        parts = [
            sum(
                np.outer(
                    wanted.get(left, np.eye(32)).T @ (sketch if number == 0 else weight).T @ residual_at(slow, at),
                    wanted[right].T @ at.h,
                )
                for at in flat([row])
            ).ravel()
            for number, (left, right) in enumerate(used)
        ]
        assert_close(vector, np.concatenate(parts), "float64")


@pytest.mark.parametrize("n_bytes", [None, 300])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_length_power_divides_rows_by_their_learned_tokens(power, n_bytes, tokenizer, tokenised, rows):
    """Rows of several windows, whose overlaps count once; a row of triples is divided by the root on either side."""
    readout = make_readout("gpt2", tokenizer, spread=0.15)
    plain = resolve_settings(GH, **{**EXACT, "bytes_per_row": n_bytes})
    sums, matrices, windows = signed(readout, plain, tokenised, rows)
    signer = Signer(readout, replace(plain, length_power=power))
    signer.whitening = matrices
    found = signer.rows(windows, len(sums)).numpy()
    tokens = tokenised(plain, rows[ROWS])
    spans = [render(row, tokenizer).responses for row in rows[ROWS]]
    counts = np.array([len(target_places(one.offsets, span)) for one, span in zip(tokens, spans, strict=True)])
    assert max(len(one.windows) for one in tokens) > 2 and counts.max() > 1.4 * counts.min()
    assert isinstance(signer.form, Triples) == (n_bytes is not None)
    assert_close(found, sums / counts[:, None] ** (power if n_bytes is None else power / 2), "float64")
    lengths = [signer.form.lengths(torch.tensor(vectors)) for vectors in (found, sums)]
    assert_close(lengths[0], lengths[1].numpy() / counts**power, "float64")


def test_maps_that_are_one_matrix_are_multiplied_once(tokenizer):
    """W for gh channels and the residual channel; what each of them gets is as if it were alone."""
    readout = make_readout("llama", tokenizer, spread=0.15)
    settings = SignatureSettings((Channel("gh"), Channel("rh", left_width=8), Channel("gh", 0.5), Channel("residual")))
    signer, windows = Signer(readout, settings), [Window(0, 0, [0, 40, 300, 41, 500, 77], list(range(5)))]
    multiplied, residuals = [], signer.head.residuals

    class Counted:
        def __init__(self, residual):
            self.residual = residual

        def __matmul__(self, matrix):
            multiplied.append(matrix)
            return self.residual @ matrix

    signer.head.residuals = lambda *args: ((piece, Counted(residual)) for piece, residual in residuals(*args))
    raw = signer.positions(windows).raw
    assert [map_width(one) for one in multiplied] == [32, 8]
    for name, channel in {"gh0": Channel("gh"), "g.final": Channel("residual")}.items():
        alone = Signer(readout, SignatureSettings((channel,))).positions(windows).raw
        assert torch.equal(raw[name], alone[name]) and raw[name].abs().max() > 0
    assert torch.equal(raw["gh2"], raw["gh0"]) and not torch.equal(raw["g.final"], raw["gh0"])


@pytest.mark.parametrize("tied", [False, True])
def test_unprojected_rh_is_the_gradient_of_the_head(tied, tokenizer, tokenised, rows):
    """Autograd's gradient of the summed loss, for W itself and, through W^T, for gh."""
    readout = make_readout("gpt_neox", tokenizer, spread=0.15, tied=tied)
    settings = SignatureSettings((Channel("rh", 2.0), Channel("gh")), **EXACT)
    found, _, windows = signed(readout, settings, tokenised, rows)
    fits = replace(settings, channels=(Channel("rh", 2.0, left_width=readout.vocabulary), Channel("gh")))
    assert np.array_equal(signed(readout, fits, tokenised, rows)[0], found)
    split = readout.vocabulary * readout.hidden_size
    for number, vector in enumerate(found):
        weight = readout.weight.detach().clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for window in [window for window in windows if window.row == number]:
            ids = torch.tensor([window.ids])
            with torch.no_grad():
                hidden = readout.lm.base_model(ids).last_hidden_state[0, window.positions]
            targets = ids[0, [position + 1 for position in window.positions]]
            loss = loss + F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
        loss.backward()
        assert_close(vector[:split], 2 * weight.grad.flatten(), "float64")
        assert_close(vector[split:], (weight.detach().t() @ weight.grad).flatten(), "float64")


@pytest.mark.parametrize("projection", ["countsketch", "orthogonal"])
def test_whitened_then_projected_factors(projection, tokenizer, tokenised, rows):
    """Sides are whitened first and projected after; the vector of projected sides is P^T (exact) Q."""
    readout = make_readout("gpt2", tokenizer, spread=0.15)
    exact = resolve_settings(GH, **EXACT)
    whole, matrices, windows = signed(readout, exact, tokenised, rows)
    channel = replace(exact.channels[0], left_width=12, right_width=20, projection=projection)
    signer = Signer(readout, replace(exact, channels=(channel,)))
    signer.whitening = matrices
    left, right = (side.sketch.numpy() for side in (signer.parts[0].left, signer.parts[0].right))
    assert left.shape == (32, 12) and right.shape == (32, 20)
    wanted = left.T @ whole.reshape(-1, 32, 32) @ right
    assert_close(signer.rows(windows, len(whole)), wanted.reshape(len(whole), -1), "float64")


def test_whitened_rh_uses_the_moment_of_projected_residuals(tokenizer, tokenised, rows):
    readout = make_readout("gpt_neox", tokenizer, spread=0.15)
    channel = Channel("rh", left_width=24, whiten_left=True, damping=0.3)
    settings = SignatureSettings((channel,), **EXACT)
    found, matrices, _ = signed(readout, settings, tokenised, rows)
    slow = Slow(readout.lm)
    nested = slow_positions(slow, settings, tokenised, tokenizer, rows)
    slow.weight = Signer(readout, settings).maps["rh0"].matrix().numpy()  # the sketch in the place of W
    moment, _ = label_moments(slow, flat(nested))
    root = whitening(moment / len(flat(nested)), 0.3)
    root = turned(matrices["rh0.damping-0.3"], root, "float64")
    wanted = [
        sum(np.outer(root.T @ slow.weight.T @ residual_at(slow, at), at.h) for at in flat([row])).ravel()
        for row in nested
    ]
    assert_close(found, wanted, "float64")


def test_positions_draw_labels_from_the_model(tokenizer):
    """Drawn labels follow the softmax at the settings' temperature: chi-square over one position drawn many times."""
    readout = make_readout("llama", tokenizer, spread=0.1)
    settings = resolve_settings("residual", temperature=2.0, **EXACT)
    signer, ids = Signer(readout, settings), [0, 40, 50, 60]
    windows = [Window(n, 0, ids, [2]) for n in range(4000)]
    drawn = torch.cat(
        [
            signer.positions(windows[start : start + 500], redraw=torch.Generator().manual_seed(start)).target
            for start in range(0, 4000, 500)
        ]
    )
    p = torch.softmax(readout.lm(torch.tensor([ids])).logits[0, 2].detach() / 2, 0).numpy()
    expected = 4000 * p
    common = expected > 5
    counts = np.append(np.bincount(drawn, minlength=len(p))[common], 0.0)
    counts[-1] = 4000 - counts.sum()
    expected = np.append(expected[common], 4000 * p[~common].sum())
    statistic, k = ((counts - expected) ** 2 / expected).sum(), len(counts)
    assert k > 50 and abs(statistic - (k - 1)) < 5 * np.sqrt(2 * (k - 1))
