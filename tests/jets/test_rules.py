"""Every rule, forward and backward, against a polynomial fit through ordinary real evaluations."""

import pytest
import torch
import torch.nn.functional as F

from leaveout.errors import UnsupportedError
from leaveout.jets import Jet, Space, tensor
from leaveout.training.formulas import plain_attention
from oracles.agreement import assert_close, taylor_by_fit

DEGREE = 3


def line(c, h, z):
    return c + sum(h[k] * z ** (k + 1) for k in range(len(h)))


def P(*shape, positive=False):
    """An input that carries a series: its shape (and whether it must stay positive)."""
    return ("series", shape, positive)


def fixed(*shape):
    return torch.randn(*shape, dtype=torch.float64)


LABELS = torch.tensor([1, -100, 0, 2])
MASK = torch.rand(3, 4) > 0.5


def attended(q, k, v):
    """By groups, with a query that may look at nothing."""
    seen = torch.tensor([[True, True, False], [False] * 3, [False, True, True]])
    with plain_attention():
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


CASES = {
    # moving
    "view": (lambda x: x.view(2, 6).reshape(3, 4).flatten() * 1, P(3, 4)),
    "expand": (lambda x: x.expand(2, 3, 4) * 2, P(3, 1)),
    "transpose": (lambda x: x.transpose(-1, 0).permute(1, 2, 0) * 1, P(2, 3, 4)),
    "t": (lambda x: x.t() * 1, P(3, 4)),
    "squeeze": (lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze(-1).squeeze() + x.unsqueeze(1).squeeze((0, 1)), P(1, 4)),
    "slice": (lambda x: x[:, 1:3] * x[0, 2] + x.select(1, 0).unsqueeze(1), P(3, 4)),
    "split": (lambda x: torch.cat([a * a for a in x.split(2, -1)] + list(x.split_with_sizes([1, 3], 1)), 1), P(3, 4)),
    "unbind": (lambda x: torch.stack([a * b for a, b in zip(x.unbind(0), x.chunk(3, 0), strict=True)], 1), P(3, 4)),
    "diagonal": (lambda x: x.diagonal(0, -2, -1) ** 2, P(2, 3, 3)),
    "index": (lambda x: x[torch.tensor([2, 0, 2])] * x[:, torch.tensor([0, 0, 1, 3])], P(3, 4)),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 3, 0])) ** 2, P(3, 4)),
    "gather": (lambda x: x.gather(1, torch.tensor([[3, 3], [0, 1], [2, 2]])) ** 2, P(3, 4)),
    "cat": (lambda x, y: torch.cat([x, torch.ones(3, 1), y], -1) ** 2, P(3, 4), P(3, 2)),
    "pad": (lambda x: F.pad(x, (1, 2), value=0.5) ** 2, P(3, 4)),
    "flip_roll": (lambda x: x.flip(-1) * x.roll(1, 0), P(3, 4)),
    "tril": (lambda x: x.tril() * x.triu(1) + x.tril(), P(4, 4)),
    "cumsum": (lambda x: x.cumsum(-1) ** 2, P(3, 4)),
    "masked_fill": (lambda x: x.masked_fill(MASK, 2.0) ** 2, P(3, 4)),
    "where": (lambda x, y: torch.where(MASK, x * y, y) + torch.where(MASK, x, 0.0), P(3, 4), P(3, 4)),
    "new": (lambda x: x * torch.ones_like(x) + torch.zeros_like(x) + x.new_zeros(4) + torch.full_like(x, 2.0), P(3, 4)),
    "scatter": (lambda x, y: x.scatter_add(1, torch.tensor([[3, 3], [0, 1], [2, 2]]), y) ** 2, P(3, 4), P(3, 2)),
    "index_add": (lambda x, y: x.index_add(0, torch.tensor([2, 2]), y, alpha=0.5) ** 2, P(3, 4), P(2, 4)),
    # adding and multiplying
    "add": (lambda x, y: (x + y) + 2 * x - y - 1 + torch.add(x, y, alpha=2) + (3 - x), P(3, 4), P(4)),
    "mul": (lambda x, y: x * y * fixed_34 * 2, P(3, 4), P(1, 4)),
    "div": (lambda x, y: x / y + fixed_34 / y + x / 3 + 1 / y + y.reciprocal(), P(3, 4), P(3, 4, positive=True)),
    "integers": (lambda x: x / torch.tensor([3, 7, 11]) + x * torch.tensor([3, 7, 11]) + x.div(torch.tensor(7)), P(2, 3)),
    "neg": (lambda x: -x * x, P(3)),
    "mm": (lambda x, y: (x @ y) @ fixed_34.t()[:, :2] + x @ fixed_42, P(3, 4), P(4, 4)),
    "bmm": (lambda x, y: x @ y, P(2, 3, 4), P(2, 4, 3)),
    "bmm_wide": (lambda x, y: x @ y, P(3, 9, 8), P(3, 8, 7)),
    "baddbmm": (lambda x, y, b: torch.baddbmm(b, x, y, beta=0.5, alpha=2.0), P(2, 3, 4), P(2, 4, 3), P(2, 3, 3)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w) + F.linear(x, w.t(), b), P(3, 4), P(4, 2), P(2)),
    "vdot": (lambda x, v: torch.vdot(x, v) * x, P(4), P(4)),
    "attention": (attended, P(2, 4, 3, 5), P(2, 2, 3, 5), P(2, 2, 3, 5)),
    "mv_dot": (lambda x, v: (x @ v) * v.dot(v), P(3, 4), P(4)),
    "sum_mean": (lambda x: x.sum() * x.mean(-1) + x.sum((0, 1)) + x.mean(0, keepdim=True).sum(-1), P(3, 4)),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.3) + torch.addcdiv(x, x, y, value=0.2),
                P(4), P(4, positive=True)),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3) ** 2, P(4), P(4)),
    "in_place": (lambda x, y: change_in_place(x * 1, y), P(4), P(4)),
    "in_place_view": (lambda x, y: change_a_view(x * 1, y), P(3, 4), P(4)),
    "index_put": (lambda x, y: (x * 1).index_put((torch.tensor([0, 2]),), y) ** 2, P(3, 4), P(2, 4)),
    # functions
    "exp_log": (lambda x: x.exp() + x.log() + x.log1p() + x.expm1(), P(4, positive=True)),
    "pow": (lambda x: x**2 + x**3 + x.pow(0.5) + x.pow(-1.5) + x**0, P(4, positive=True)),
    "roots": (lambda x: x.sqrt() + x.rsqrt(), P(4, positive=True)),
    "tanh": (lambda x: x.tanh() + x.sigmoid() + x.erf() + x.sin() + x.cos(), P(5)),
    "gelu": (F.gelu, P(5)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), P(5)),
    "silu": (F.silu, P(5)),
    "softplus": (lambda x: F.softplus(x) + F.logsigmoid(x), P(5)),
    "norm": (lambda x: torch.linalg.vector_norm(x) + x.norm(dim=-1).sum(), P(3, 4)),
    # layers
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 2], [2, 1]]), w) ** 2, P(4, 3)),
    "embedding_padding": (lambda w: F.embedding(torch.tensor([0, 2, 1]), w, padding_idx=2) ** 2, P(4, 3)),
    "softmax": (lambda x: x.softmax(-1) + x.softmax(0) + x.log_softmax(1), P(3, 4)),
    "masked_softmax": (lambda x: x.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1), P(4, 4)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b) ** 2, P(3, 4), P(4), P(4)),
    "layer_norm_plain": (lambda x: F.layer_norm(x, (3, 4)) ** 2, P(2, 3, 4)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w) ** 2, P(3, 4), P(4)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b) ** 2, P(2, 4, 3), P(4), P(4)),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, bn_mean, bn_var, w, b) ** 2, P(2, 4, 3, 2), P(4), P(4)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1) ** 2, P(2, 4, 5, 6), P(6, 4, 3, 3), P(6)),
    "conv2d_groups": (lambda x, w: F.conv2d(x, w, groups=2, dilation=2) ** 2, P(1, 4, 5, 5), P(2, 2, 2, 2)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1) ** 2, P(2, 4, 7), P(6, 4, 3), P(6)),
    "conv1d_groups": (lambda x, w: F.conv1d(x, w, groups=2, dilation=2) ** 2, P(1, 4, 6), P(2, 2, 2)),
    "conv2d_fixed_input": (lambda w, b: F.conv2d(image, w, b, padding=1) ** 2, P(3, 2, 3, 3), P(3)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2) ** 2, P(2, 3, 4, 4)),
    "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)) ** 2, P(2, 3, 4, 5)),
    "adaptive_to_one": (lambda x: F.adaptive_avg_pool2d(x, 1) ** 2, P(2, 3, 4, 4)),
    "dropout_off": (lambda x: F.dropout(x, 0.5, training=False) ** 2, P(4)),
    # losses
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS), P(4, 3)),
    "cross_entropy_each": (lambda x: F.cross_entropy(x, LABELS, reduction="none"), P(4, 3)),
    "cross_entropy_sum": (lambda x: F.cross_entropy(x, LABELS, reduction="sum", weight=class_weights), P(4, 3)),
    "cross_entropy_weighted": (lambda x: F.cross_entropy(x, LABELS, weight=class_weights), P(4, 3)),
    "cross_entropy_images": (lambda x: F.cross_entropy(x, LABELS.clamp(min=0).view(2, 1, 2)), P(2, 3, 1, 2)),
    "mse": (lambda x, y: F.mse_loss(x, y) + F.mse_loss(x, fixed_34, reduction="none"), P(3, 4), P(3, 4)),
    "mse_sum": (lambda x, y: F.mse_loss(x, y, reduction="sum"), P(3, 4), P(3, 4)),
    # kinks
    "relu": (lambda x: x.relu() + F.leaky_relu(x, 0.1) + x.abs() + F.relu6(x), P(3, 4)),
    "clamp": (lambda x: x.clamp(-0.5, 0.7) + F.hardtanh(x) + x.clamp(min=0.1) + x.clamp_max(0.3), P(3, 4)),
    "max_pool": (lambda x: F.max_pool2d(x, 2) ** 2, P(2, 3, 4, 4)),
    "maximum": (lambda x, y: torch.maximum(x, y) + torch.minimum(x, fixed_34), P(3, 4), P(3, 4)),
    "max": (lambda x: x.amax(-1) ** 2 + x.max(-1).values + x.min(1).values + x.amin(1), P(3, 4)),
    "compare": (lambda x: torch.where(x > 0, x, 0.1 * x) * (x < 2) * x.sign(), P(3, 4)),
}  # fmt: skip
fixed_34, fixed_42 = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
bn_mean, bn_var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
image = torch.randn(2, 2, 5, 4, dtype=torch.float64)
class_weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def change_in_place(x, y):
    x = (x * 1).add_(y, alpha=2).sub_(0.5).mul_(2.0).lerp_(y, 0.2).div_(3.0).neg_()
    z = (y * 1).mul_(y).addcmul_(y, y, value=0.1)
    return x + z.addcdiv_(y, y * y + 3, value=0.5) + (y * 1).exp_() + (y * 1).tanh_() + (y * 1).sigmoid_()


def change_a_view(x, y):
    x[0] = y
    x[:, 1:3].mul_(2.0)
    x.view(-1)[5:7].add_(1.0)
    return x * x


def evaluate(f, inputs):
    """The output, and the gradient of a fixed weighted sum of it in every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    return out, [g if g is not None else torch.zeros_like(x) for g, x in zip(grads, inputs, strict=True)]


def random_lines(specs):
    out = []
    for _, shape, positive in specs:
        c = torch.randn(*shape, dtype=torch.float64)
        c = 0.7 + c.abs() if positive else torch.where(c.abs() < 0.05, c + 0.1, c)
        out.append((c, 0.2 * torch.randn(DEGREE, *shape, dtype=torch.float64)))
    return out


USED, RAN = set(), set()


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    class Recording(dict):
        def get(self, key, default=None):
            if key in self:
                USED.add(key)
            return super().get(key, default)

    monkeypatch.setattr(tensor, "TABLE", Recording(tensor.TABLE))


@pytest.mark.parametrize("name", CASES)
def test_rule_agrees_with_a_fit(name):
    f, *specs = CASES[name]
    RAN.add(name)
    lines = random_lines(specs)
    turn = torch.polar(torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    turns = torch.stack([torch.ones_like(turn), turn])  # direction 1 is direction 0 turned by a complex number
    space = Space(DEGREE, 2, torch.complex128)
    jets = []
    for c, h in lines:
        powers = torch.stack([turns**k for k in range(1, DEGREE + 1)]).view(DEGREE, 2, *[1] * c.dim())
        jets.append(space.jet(c.clone(), h.unsqueeze(1) * powers))
    out, grads = evaluate(f, jets)
    results = [out, *grads]

    def plain(z):
        out, grads = evaluate(f, [line(c, h, z) for c, h in lines])
        return torch.cat([out.reshape(-1), *(g.reshape(-1) for g in grads)])

    wanted = taylor_by_fit(plain, DEGREE, radius=0.02 if name in SHARP else 0.1, points=8 if name in SHARP else 14)
    actual = torch.cat([all_coefficients(r) for r in results], 2)
    assert_close(actual[:, 0], wanted.to(torch.complex128), "fit")
    powers = torch.stack([turn**k for k in range(DEGREE + 1)])[:, None]
    assert_close(actual[:, 1], actual[:, 0] * powers, "exact")


SHARP = {"relu", "clamp", "max_pool", "maximum", "max", "compare"}  # the fit must stay on one side of every kink


def all_coefficients(r):
    if isinstance(r, Jet):
        return r.detach().coefficients().reshape(DEGREE + 1, 2, -1)
    out = torch.zeros(DEGREE + 1, 2, r.numel(), dtype=torch.complex128)
    out[0] = r.detach().reshape(-1)
    return out


UNTESTED = {
    # torch reaches these only from other layouts or callers; the rule is one that a tested row uses.
    "_reshape_alias", "reshape", "lift_fresh", "narrow", "chunk", "true_divide.Tensor", "cudnn_batch_norm",
    # Only GPUs have it: see test_the_rms_norm_of_gpus_is_that_of_its_parts.
    "_fused_rms_norm", "_fused_rms_norm_backward",
    "sgn", "new_empty", "new_empty_strided", "empty_strided", "new_ones", "new_full", "rsub.Tensor",
    "maximum.out", "alias", "mean", "sub.Scalar", "where.ScalarSelf", "where.ScalarOther", "masked_fill.Tensor",
    "clamp_min",
}  # fmt: skip
ELSEWHERE = {"_fused_adam_", "_fused_adamw_", "_foreach_norm.Scalar", "_foreach_mul_.Tensor"}  # test_training_step.py


def test_casts_keep_the_precision_of_the_run():
    space = Space(2, 1)
    x = space.jet(torch.tensor([1 / 3], dtype=torch.float64), torch.ones(2, 1, 1) / 7)
    assert torch.equal(x.float().double().c, x.c) and torch.equal(x.to(torch.float16).h, x.h)
    assert x.long().dtype == torch.int64 and space.nonsmooth == {"_to_copy": 1}


def test_writing_into_a_view_with_copied_coefficients_is_refused():
    space = Space(1, 1)
    x = space.jet(torch.zeros(2, 2), torch.zeros(1, 1, 2, 2).mT.contiguous().mT)
    with pytest.raises(UnsupportedError, match="does not share its coefficients"):
        x.view(4).add_(1.0)


def test_writing_a_series_into_an_ordinary_tensor_is_refused():
    x = Space(1, 1).constant(torch.ones(3))
    with pytest.raises(UnsupportedError, match=r"mul_.Tensor would write a series into an ordinary tensor"):
        torch.ones(3, dtype=torch.float64).mul_(x)


def test_unknown_operation_names_itself_the_module_and_what_to_do():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(UnsupportedError, match=r"linalg_svd.*in module Odd, .*add one row to leaveout"):
        Odd()(Space(1, 1).constant(torch.eye(2)))


def test_reading_a_number_out_is_refused():
    with pytest.raises(UnsupportedError, match="Python number"):
        Space(1, 1).constant(torch.ones(())).item()


@pytest.mark.parametrize(("weighted", "eps"), [(True, None), (False, 0.1)])
def test_the_rms_norm_of_gpus_is_that_of_its_parts(weighted, eps):
    space, ops = Space(3, 2), torch.ops.aten
    x, w, g = (
        space.jet(torch.randn(*shape, dtype=torch.float64), torch.randn(3, 2, *shape, dtype=torch.complex128))
        for shape in ((3, 4), (4,), (3, 4))
    )
    inputs = [torch.nn.Parameter(x), torch.nn.Parameter(w)] if weighted else [torch.nn.Parameter(x)]
    plain = F.rms_norm(inputs[0], (4,), *(inputs[1:] or [None]), eps)
    given = w if weighted else None
    found, rstd = tensor.TABLE[ops._fused_rms_norm.default](None, (x, [4], given, eps), {})
    assert_close(found.coefficients(), plain.detach().coefficients(), "exact")
    wanted = torch.autograd.grad(plain, inputs, g)
    back = tensor.TABLE[ops._fused_rms_norm_backward.default](None, (g, x, [4], rstd, given, [True, weighted]), {})
    for one, other in zip(back, [*wanted, None], strict=False):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one.coefficients(), other.coefficients(), "exact")


@pytest.mark.parametrize("name", ["conv3d", "batch_norm", "norm"])
def test_uncovered_variants_say_so(name):
    jet = lambda *shape: Space(1, 1).constant(torch.ones(*shape))  # noqa: E731
    calls = {
        "conv3d": (lambda: F.conv3d(jet(1, 1, 2, 2, 2), torch.ones(1, 1, 1, 1, 1).double()), "two dimensions and not"),
        "batch_norm": (lambda: F.batch_norm(jet(2, 1), None, None, training=True), "model.eval"),
        "norm": (lambda: torch.linalg.vector_norm(jet(2), 1), "order 1"),
    }
    call, message = calls[name]
    with pytest.raises(UnsupportedError, match=message):
        call()


def test_nonsmooth_operations_are_counted():
    space = Space(2, 1)
    x = space.constant(torch.ones(1, 1, 2, 2))
    F.max_pool2d(x.relu().relu(), 2).abs()
    assert space.nonsmooth == {"relu": 2, "max_pool2d_with_indices": 1, "abs": 1}


def test_dropout_draws_the_mask_of_the_plain_run():
    x = torch.ones(100, dtype=torch.float64)
    torch.manual_seed(5)
    plain = F.dropout(x, 0.3, training=True)
    torch.manual_seed(5)
    jet = F.dropout(Space(1, 1).jet(x, x.expand(1, 1, 100)), 0.3, training=True)
    assert torch.equal(jet.c, plain) and torch.equal(jet.h[0, 0].real, plain)


def test_piecewise_constants_are_those_of_the_constant_term():
    c = torch.tensor([[0.4, -1.6, 2.5]], dtype=torch.float64)
    x = Space(1, 1).jet(c, torch.ones(1, 1, 1, 3))
    y = torch.zeros_like(c)
    for f in (torch.floor, torch.ceil, torch.round, torch.sign, torch.argmax, torch.argmin,
              torch.isnan, torch.isinf):  # fmt: skip
        assert torch.equal(f(x), f(c))
    assert torch.equal(x >= y, c >= y) and torch.equal(x <= y, c <= y) and torch.equal(x != y, c != y)
    assert torch.equal(x != 0.4, c != 0.4)


def test_every_rule_is_exercised():
    """Runs last: each row of the table was used by a case above, or is named as the twin of one that was."""
    if set(CASES) != RAN:
        pytest.skip("only a part of the cases ran")
    names = {op.name().removeprefix("aten::") for op in tensor.TABLE if op not in USED}
    names = {name.removesuffix(".default") for name in names}
    plain = {name for name in names if not name.endswith("_") and "_." not in name}
    missing = sorted(plain - UNTESTED - ELSEWHERE)
    assert not missing, f"rules without a case: {missing}"
