"""Series arithmetic: laws, and numpy polynomials and fits as oracles."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from leaveout.jets import Series
from leaveout.jets import series as S
from leaveout.jets.products import matmul
from oracles.agreement import assert_close, taylor_by_fit

degrees = st.integers(1, 6)
shapes = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0)])
kinds = st.sampled_from([torch.complex128, torch.float64])
seeds = st.integers(0, 2**16)


def random_series(shape, degree, kind=torch.complex128, directions=2, seed=0, low=0.5):
    g = torch.Generator().manual_seed(seed)
    c = low + torch.rand(shape, generator=g, dtype=torch.float64)
    return Series(c, 0.3 * torch.randn(degree, directions, *shape, generator=g, dtype=kind))


def whole(a, direction=0):
    return torch.cat([a.c.to(a.h.dtype).unsqueeze(0), a.h[:, direction]])


def same(a, b):
    assert_close(a.c, b.c, "exact")
    assert_close(a.h, b.h, "exact")


@settings(max_examples=40, deadline=None)
@given(degrees, shapes, kinds, seeds)
def test_functions_invert_each_other(degree, shape, kind, seed):
    a = random_series(shape, degree, kind, seed=seed)
    same(S.exp(S.log(a)), a)
    same(S.square(S.sqrt(a)), a)
    same(S.multiply(S.divide(a, S.exp(a)), S.exp(a)), a)
    same(S.multiply(S.rsqrt(a), S.sqrt(a)), Series(torch.ones_like(a.c), torch.zeros_like(a.h)))
    same(S.power(S.power(a, 2.5), 0.4), a)


@settings(max_examples=40, deadline=None)
@given(degrees, shapes, kinds, seeds)
def test_functions_satisfy_their_identities(degree, shape, kind, seed):
    a = random_series(shape, degree, kind, seed=seed)
    one = Series(torch.ones_like(a.c), torch.zeros_like(a.h))
    same(S.add(S.square(S.sin(a)), S.square(S.cos(a))), one)
    twice = S.multiply(a, 2.0)
    same(S.tanh(a), S.add(S.multiply(S.sigmoid(twice), 2.0), -1.0))
    same(S.divide(one, S.add(S.exp(S.multiply(a, -1.0)), 1.0)), S.sigmoid(a))


@settings(max_examples=40, deadline=None)
@given(degrees, shapes, kinds, seeds)
def test_multiplication_is_a_ring(degree, shape, kind, seed):
    a, b, c = (random_series(shape, degree, kind, seed=seed + i) for i in range(3))
    same(S.multiply(a, b), S.multiply(b, a))
    same(S.multiply(S.multiply(a, b), c), S.multiply(a, S.multiply(b, c)))
    same(S.multiply(a, S.add(b, c)), S.add(S.multiply(a, b), S.multiply(a, c)))
    same(S.square(a), S.multiply(a, Series(a.c.clone(), a.h.clone())))


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_multiply_is_the_product_of_polynomials(degree):
    a, b = random_series((4,), degree, seed=1), random_series((4,), degree, seed=2)
    product = whole(S.multiply(a, b))
    for i in range(4):
        wanted = np.convolve(whole(a)[:, i].numpy(), whole(b)[:, i].numpy())[: degree + 1]
        assert_close(product[:, i], torch.from_numpy(wanted), "exact")


BROADCASTS = [((3,), (2, 3)), ((2, 1), (2, 3)), ((), (2, 3)), ((1, 3), (2, 1)), ((4, 1, 3), (2, 1))]


@pytest.mark.parametrize("shapes", BROADCASTS)
def test_binary_operations_broadcast_like_torch(shapes):
    a, b = random_series(shapes[0], 3, seed=1), random_series(shapes[1], 3, seed=2)
    shape = torch.broadcast_shapes(*shapes)
    wide = [Series(s.c.expand(shape), S.aligned(s.h, len(shape)).expand(3, 2, *shape).contiguous()) for s in (a, b)]
    for operation in (S.multiply, S.divide, S.add):
        same(operation(a, b), operation(*wide))
        same(operation(a, b.c), operation(wide[0], b.c.expand(shape)))
        same(operation(a.c, b), operation(a.c.expand(shape), wide[1]))


PRODUCTS = [((5, 4), (4, 3)), ((2, 5, 4), (2, 4, 3)), ((4, 20, 7), (4, 7, 9)), ((120, 100), (100, 130))]


@pytest.mark.parametrize("kind", [torch.complex128, torch.float64])
@pytest.mark.parametrize("shapes", PRODUCTS)
def test_matmul_is_the_convolution_of_products(shapes, kind):
    a, b = random_series(shapes[0], 3, kind, seed=1), random_series(shapes[1], 3, kind, seed=2)
    left, right = whole(a, 1), whole(b, 1)
    wanted = torch.stack([sum(left[i] @ right[k - i] for i in range(k + 1)) for k in range(4)])
    assert_close(whole(matmul(a, b), 1), wanted, "exact")
    turned = Series(b.c.mT.contiguous(), b.h.mT.contiguous()).map(lambda t: t.mT)
    assert_close(whole(matmul(a, turned), 1), wanted, "exact")
    assert_close(whole(matmul(a.map(lambda t: t.mT.contiguous().mT), b), 1), wanted, "exact")
    shared = torch.stack([a.c.to(kind) @ right[k] for k in range(4)])
    assert_close(whole(matmul(a.c, b), 1), shared, "exact")
    assert_close(whole(matmul(a, b.c), 1), torch.stack([left[k] @ b.c.to(kind) for k in range(4)]), "exact")


FUNCTIONS = {
    "exp": (S.exp, torch.exp), "log": (S.log, torch.log), "sqrt": (S.sqrt, torch.sqrt), "rsqrt": (S.rsqrt, torch.rsqrt),
    "tanh": (S.tanh, torch.tanh), "sigmoid": (S.sigmoid, torch.sigmoid), "erf": (S.erf, torch.erf),
    "sin": (S.sin, torch.sin), "cos": (S.cos, torch.cos), "square": (S.square, torch.square),
    "power": (lambda a: S.power(a, -1.7), lambda x: x**-1.7), "cube": (lambda a: S.power(a, 3.0), lambda x: x**3),
    "divide": (lambda a: S.divide(1.0, a), lambda x: 1 / x),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_agrees_with_a_fit(name):
    series, plain = FUNCTIONS[name]
    a = random_series((5,), 4, torch.float64, seed=3)
    line = whole(a)
    wanted = taylor_by_fit(lambda z: plain(sum(line[k] * z**k for k in range(5))), 4)
    assert_close(whole(series(a)), wanted, "fit")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_homogeneous_in_complex_z(name):
    """f(a(w z)) has coefficients w^k f_k, for complex w: carries the real-line oracle over to complex directions."""
    series, _ = FUNCTIONS[name]
    a = random_series((5,), 4, torch.float64, seed=3)
    turn = torch.polar(torch.tensor(0.8, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64))
    factors = torch.stack([turn**k for k in range(1, 5)]).view(4, 1, 1)
    turned = series(Series(a.c, a.h * factors))
    assert_close(turned.h, series(a).h * factors, "exact")


def test_sqrt_of_zero_is_zero_only_without_a_series():
    a = Series(torch.zeros(2, dtype=torch.float64), torch.zeros(3, 1, 2, dtype=torch.complex128))
    assert torch.equal(S.sqrt(a).h, a.h)
    a.h[0, 0, 1] = 1
    root = S.sqrt(a).h
    assert bool((root[:, :, 0] == 0).all()) and not bool(root[:, :, 1].isfinite().all())


def test_erf_slope_is_the_gauss_curve():
    x = torch.tensor([0.3], dtype=torch.float64)
    assert math.isclose(S.taylor_erf(x, 1)[1].item(), 2 / math.sqrt(math.pi) * math.exp(-0.09), rel_tol=1e-14)
