"""LULinear: any invertible matrix, its determinant, strong weights, shapes with a batch of matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import scatter
from torch.autograd.functional import jacobian

import pyro_invflows as pf
from pyro_invflows import linalg

F64 = torch.float64


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def matrix(d, seed=0):
    return torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def strong(d, size, seed=0, dtype=F64):
    """Return a layer whose entries are U(-size, size) / sqrt(D), with a permutation and negative signs."""
    torch.manual_seed(seed)
    layer = pf.lu_linear(d).to(dtype)
    scatter(layer, size / d**0.5)
    layer.permutation.copy_(torch.randperm(d))
    layer.sign_of_scale.copy_(torch.randn(d).sign())
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", [1, 2, 5, 33, 70])
def test_any_invertible_matrix(d, bias):
    w = matrix(d, seed=d)
    layer = pf.LULinear.from_matrix(w, bias=bias)
    assert layer.triangles.dtype == F64
    close(layer.matrix, w, 1e-12)
    x = torch.randn(4, d, dtype=F64)
    y, ladj = pf.call_and_ladj(layer, x)
    close(y, x @ w.T, 1e-11)
    close(ladj, torch.linalg.slogdet(w)[1].expand(4), 1e-11)
    back, inverse = pf.inv_and_ladj(layer, y.detach().clone())
    close(back, torch.linalg.solve(w, y.detach().T).T, 1e-8)
    close(inverse, -ladj, 1e-11)


def test_matrices_that_need_a_pivot_or_a_sign():
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    for w in (
        swap,
        -torch.eye(3, dtype=F64),
        torch.eye(5, dtype=F64).flip(0) * 1e-8,
        torch.eye(4, dtype=F64)[[2, 0, 3, 1]],
    ):
        layer = pf.LULinear.from_matrix(w)
        close(layer.matrix / w.abs().max(), w / w.abs().max(), 1e-12)
        close(layer.inv(layer(w).detach().clone()), w, 1e-12)
    assert pf.LULinear.from_matrix(swap).permutation.tolist() == [1, 0]


def test_pivoting_keeps_the_lower_factor_small():
    layer = pf.LULinear.from_matrix(matrix(40))
    assert layer.triangles.tril(-1).abs().max() <= 1
    _, lower, upper = torch.linalg.lu(matrix(40))
    close(layer.triangles.tril(-1), lower.tril(-1), 1e-12)
    close(layer.triangles.triu(1), upper.triu(1), 1e-12)


def test_starts_as_the_identity_exactly():
    x = torch.randn(7, 6)
    for layer, value in (
        (pf.lu_linear(6), x),
        (pf.lu_linear(6, bias=False), x),
        (pf.lu_linear(6, dim=-3), x.reshape(1, 6, 7, 1)),
    ):
        for run in (pf.call_and_ladj, pf.inv_and_ladj):
            image, ladj = run(layer, value)
            assert torch.equal(image, value)
            assert not ladj.any()


@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("d", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_strong_weights(d, size, dtype):
    """The log-det is exact however ill-conditioned the matrix; y is reproduced as exactly as it is computed."""
    layer = strong(d, size, dtype=dtype)
    reference = copy.deepcopy(layer).double()
    y = torch.randn(6, d, dtype=dtype)
    with torch.no_grad():
        x, ladj = pf.inv_and_ladj(layer, y)
        again = layer(x.clone())
        lower, upper = reference.triangles.tril(-1).abs() + torch.eye(d), reference.triangles.triu(1).abs()
        upper = upper + reference.triangles.diagonal().exp().diag()
        # the rounding error of a triangular solve and of a product (Higham 2002, Theorem 8.5)
        bound = (x.abs().double() @ upper.T @ lower.T)[:, reference.permutation] + reference.bias.abs()
    eps = torch.finfo(dtype).eps
    assert ((again - y).abs() <= 4 * (d + 2) * eps * (bound + 1)).all()
    if size == 1.0:  # beyond that, a determinant of the matrix is not known any better
        expected = -torch.linalg.slogdet(jacobian(reference, torch.zeros(d, dtype=F64)))[1]
        close(ladj.double(), expected.expand(6), 1e-4 if dtype == torch.float32 else 1e-10)
    close(ladj, -layer.triangles.detach().diagonal().sum().expand(6), 10 * eps)


@pytest.mark.parametrize("direction", [pf.call_and_ladj, pf.inv_and_ladj])
def test_first_and_second_derivatives(direction):
    layer = strong(4, 1.0, seed=3)
    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(
            _Run(layer, direction), {f"layer.{n}": v for n, v in zip(names, values, strict=True)}, (x,)
        )

    inputs = (x, *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


class _Run(torch.nn.Module):
    def __init__(self, layer, direction):
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, x):
        return self.direction(self.layer, x)


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ((), (3,)),
        ((4,), ()),
        ((4,), (4,)),
        ((4,), (3, 4)),
        ((4,), (3, 1)),
        ((2, 1), (5, 2, 3)),
        ((2, 1, 1), (2, 3, 5)),
        ((1,), (3, 2)),
        ((0,), (3, 1)),
        ((2, 3), (0, 1, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("unitriangular", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_solving_for_rows(batch, rows, upper, unitriangular):
    n = 4
    whole = torch.randn(*batch, n, n, dtype=F64)
    y = torch.randn(*rows, n, dtype=F64)
    triangle = whole.triu() if upper else whole.tril()
    if unitriangular:
        triangle = triangle - triangle.diagonal(dim1=-2, dim2=-1).diag_embed() + torch.eye(n, dtype=F64)
    expected = torch.linalg.inv(triangle) @ y.unsqueeze(-1)
    actual = linalg.solve_for_rows(whole, y, upper=upper, unitriangular=unitriangular)
    close(actual, expected.squeeze(-1), 1e-9)


@pytest.mark.parametrize("dim", [-1, -3])
@pytest.mark.parametrize("rows", [(), (4,), (3, 4), (3, 1)], ids=str)
def test_a_batch_of_contexts_equals_a_loop(dim, rows):
    torch.manual_seed(1)
    conditional = scatter(pf.conditional_lu_linear(5, 2, dim=dim), 0.5).double()
    context = torch.randn(4, 2, dtype=F64)
    x = torch.randn(*rows, 5, *((2, 3) if dim == -3 else ()), dtype=F64)
    layer = conditional.condition(context).with_cache(0)
    assert layer.matrix.shape == (4, 5, 5)
    wide = x.expand(torch.broadcast_shapes(x.shape[:dim], (4,)) + x.shape[dim:])
    for run in (pf.call_and_ladj, pf.inv_and_ladj):
        image, ladj = run(layer, x)
        for i in range(4):
            alone = run(conditional.condition(context[i]), wide.select(dim - 1, i))
            close(image.select(dim - 1, i), alone[0], 1e-9)
            close(ladj[..., i], alone[1], 1e-9)
