"""Solvers: convergence, failure, independence of rows, and the gradient of a root."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import pyro_invflows as pf
from pyro_invflows.solvers import (
    Anderson,
    Bisection,
    FixedPoint,
    Newton,
    Settings,
    Status,
    Sweeps,
    dense_jacobian,
    finish,
    implicit_gradient,
    plain_tanh_root,
    solve_tanh,
    solve_triangular_tanh,
    tanh_root,
    triangular_tanh_root,
)
from pyro_invflows.support.errors import ConvergenceError, ConvergenceWarning

tanh_module = sys.modules[solve_tanh.__module__]

WHOLE = [FixedPoint(), Anderson(), Newton()]
NAMES = [type(solver).__name__ for solver in WHOLE]


def contraction(seed=0, size=3, strength=0.3):
    generator = torch.Generator().manual_seed(seed)
    a = strength * torch.randn(size, size, dtype=torch.float64, generator=generator)
    return lambda x, y: x + torch.tanh(x @ a.to(x.dtype)) - y


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("solver", WHOLE, ids=NAMES)
def test_converges_and_keeps_the_shape(solver, batch, dtype, gather):
    f, y = contraction(), torch.randn(*batch, 3, dtype=dtype)
    solution = solver(f, y, y, gather=gather)
    assert solution.value.shape == y.shape
    assert solution.value.dtype == dtype
    assert solution.status.shape == solution.num_steps.shape == solution.residual.shape == torch.Size(batch)
    assert solution.converged.all()
    assert not solution.value.requires_grad
    atol, rtol = solver.tolerances(dtype)
    assert (f(solution.value, y).abs().amax(-1) <= atol + rtol * y.abs().amax(-1)).all()


@pytest.mark.parametrize("solver", WHOLE, ids=NAMES)
def test_matrix_events_are_not_flattened(solver):
    y = torch.randn(4, 2, 3, dtype=torch.float64)
    seen = []

    def f(x, y):
        seen.append(x.shape[-2:])
        return x + 0.3 * torch.sin(x.mT).mT - y

    assert solver(f, y, y, event_dim=2).converged.all()
    assert set(seen) == {torch.Size((2, 3))}


@pytest.mark.parametrize("solver", WHOLE, ids=NAMES)
@pytest.mark.parametrize("gather", [True, False])
def test_a_bad_row_neither_spoils_nor_slows_the_others(solver, gather):
    f, y = contraction(), torch.randn(6, 3, dtype=torch.float64)
    alone = solver(f, y, y, gather=gather)
    bad = torch.cat([y[:2], torch.full((1, 3), torch.nan, dtype=y.dtype), y[2:4], 1e8 + y[:1], y[4:]])
    good = [0, 1, 3, 4, 6, 7]
    solution = solver(f, bad, bad, gather=gather)
    torch.testing.assert_close(solution.value[good], alone.value, rtol=1e-12, atol=1e-12)
    assert (solution.num_steps[good] - alone.num_steps).abs().max() <= 1  # gathered products round differently
    assert solution.status[2] == Status.NONFINITE
    assert solution.num_steps[2] == 0
    assert solution.converged[good].all()


def test_rows_that_are_done_are_not_evaluated():
    sizes = []

    def f(x, y):
        sizes.append(x.shape[0])
        return x + 0.9 * torch.sin(x) - y

    y = torch.zeros(64, 3, dtype=torch.float64)
    y[0] = 2.0
    assert FixedPoint()(f, y, y).converged.all()
    assert sizes[-1] == 1


def test_anderson_is_faster_than_the_fixed_point_and_newton_needs_no_contraction():
    f, y = contraction(strength=0.5), torch.randn(20, 3, dtype=torch.float64)
    steps = {type(s).__name__: s(f, y, y).num_steps.max() for s in WHOLE}
    assert steps["Newton"] < steps["Anderson"] < steps["FixedPoint"]
    far = contraction(strength=3.0, seed=1)
    newton, picard = Newton()(far, y, y), FixedPoint()(far, y, y)
    assert newton.converged.any()
    assert not picard.converged.all()


def test_newton_is_damped_where_the_plain_step_cycles():
    # s + 20 tanh s, started far to the right: the undamped step diverges
    y = torch.tensor([[15.0]], dtype=torch.float64)
    f = lambda x, y: x + 20 * torch.tanh(x) - y  # noqa: E731
    assert Newton()(f, y, y).converged.all()
    assert not Newton(max_halvings=0, max_steps=30)(f, y, y).converged.all()


def test_newton_on_numbers():
    y = torch.linspace(-3, 3, 7, dtype=torch.float64)
    solution = Newton()(lambda x, y: x**3 + x - y, y, y, event_dim=0)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value**3 + solution.value, y)


@pytest.mark.parametrize("gather", [True, False])
def test_newton_halves_only_the_steps_that_need_it(gather):
    """A row that would cycle without damping, among easy ones, which must not be evaluated again."""
    sizes = []

    def f(x, y):
        sizes.append(x.shape[0])
        return x + 20 * torch.tanh(x) - y

    y = torch.linspace(0.1, 1.0, 50, dtype=torch.float64).unsqueeze(-1)
    easy = Newton()(f, y / 21, y, step=lambda x, r, y: r / (1 + 20 / torch.cosh(x) ** 2), gather=gather)
    assert easy.converged.all()
    assert len(sizes) == 1 + easy.num_steps.max()  # no step was halved, polishing included
    y[7] = 15.0
    start = torch.where(y == 15.0, y, y / 21)
    alone = Newton()(f, start[7:8], y[7:8], step=lambda x, r, y: r / (1 + 20 / torch.cosh(x) ** 2))
    sizes.clear()
    both = Newton()(f, start, y, step=lambda x, r, y: r / (1 + 20 / torch.cosh(x) ** 2), gather=gather)
    assert both.converged.all()
    torch.testing.assert_close(both.value[7], alone.value[0])
    if gather:
        assert sizes.count(50) <= 1 + easy.num_steps.max()
        assert sizes.count(1) >= alone.num_steps.max() - easy.num_steps.max()


def test_newton_takes_a_structured_step():
    y = torch.randn(5, 3, dtype=torch.float64)
    scale = torch.rand(5, 3, dtype=torch.float64) + 1
    solution = Newton()(
        lambda x, y, scale: scale * x**3 + x - y, y, y, scale, step=lambda x, r, y, scale: r / (3 * scale * x**2 + 1)
    )
    assert solution.converged.all()


def test_newton_survives_a_singular_jacobian():
    y = torch.ones(2, 2, dtype=torch.float64)
    solution = Newton()(lambda x, y: x**3 - y, torch.zeros(2, 2, dtype=torch.float64), y, scale=y)
    assert solution.status.shape == (2,)


def test_failures_raise_warn_or_become_nan():
    y = torch.randn(8, 2, dtype=torch.float64)
    y[3:] *= 1e-3
    f = lambda x, y: 3 * x**3 + 0.1 * x - y  # noqa: E731

    def run(how):
        solver = FixedPoint(max_steps=20, on_failure=how)
        return finish(solver(f, y, y), "SomeLayer", solver, given=y)

    with pytest.raises(ConvergenceError) as caught:
        run("raise")
    message = str(caught.value)
    for part in ("SomeLayer", "of 8 rows", "of the batch", "after 20 steps", "worst residual", "accepted", "float64"):
        assert part in message
    failed = ~caught.value.solution.converged
    assert failed.any()
    with pytest.warns(ConvergenceWarning, match="SomeLayer"):
        assert run("warn").shape == y.shape
    value = run("nan")
    assert torch.equal(value.isnan().any(-1), failed)


def test_data_that_is_not_finite_gives_nan_and_no_error():
    f, y = contraction(), torch.randn(3, 3, dtype=torch.float64)
    y[1, 0] = torch.inf
    value = finish(Newton()(f, y, y), "Layer", Newton(), given=y)
    assert torch.equal(value.isnan().any(-1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bisection(dtype):
    y = torch.randn(200, dtype=dtype) * 10.0 ** torch.randint(-3, 6, (200,)).to(dtype)
    for f in (lambda x: x**3 + x - y, lambda x: -x - x**5 - y, lambda x: torch.sinh(x) - y, lambda x: x**3 - y):
        solution = Bisection()(f, torch.zeros_like(y), scale=y)
        assert solution.converged.all()
        assert solution.num_steps.max() <= 40
    bracketed = Bisection()(
        lambda x: torch.tanh(x) - 0.5, torch.zeros(1, dtype=dtype), low=-torch.ones(1), high=torch.ones(1)
    )
    torch.testing.assert_close(bracketed.value, torch.full((1,), 0.5, dtype=dtype).atanh())


def test_bisection_never_returns_the_end_of_a_bracket():
    y = torch.tensor([0.5, 2.0, -1.5, torch.nan], dtype=torch.float64)
    solution = Bisection()(lambda x: torch.tanh(x) - y, torch.zeros_like(y), scale=y)
    assert solution.status.tolist() == [
        Status.CONVERGED,
        Status.NO_BRACKET,
        Status.NO_BRACKET,
        Status.NONFINITE,
    ]
    with pytest.raises(ConvergenceError, match="outside the range"):
        finish(solution, "Layer", Bisection(), given=y)
    jump = Bisection()(lambda x: torch.where(x > 0.3, x + 1, x - 1), torch.zeros(1, dtype=torch.float64))
    assert jump.status.item() == Status.MAX_STEPS  # a jump over zero is no root


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e300, 2.0])
def test_a_bad_element_leaves_the_other_brackets_alone(bad):
    y = 2 * torch.rand(20, dtype=torch.float64) - 1
    f = lambda y: lambda x: torch.tanh(x) - y  # noqa: E731
    alone = Bisection()(f(y), torch.zeros_like(y), scale=y)
    more = torch.cat([y[:7], torch.tensor([bad], dtype=torch.float64), y[7:]])
    solution = Bisection()(f(more), torch.zeros_like(more), scale=more)
    good = [i for i in range(21) if i != 7]
    assert torch.equal(solution.value[good], alone.value)
    assert torch.equal(solution.num_steps[good], alone.num_steps)
    assert solution.converged[good].all()
    assert not solution.converged[7]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Settings(on_failure="ignore"), "on_failure"),
        (lambda: Newton(atol=-1.0), "atol"),
        (lambda: Newton(rtol=float("nan")), "rtol"),
        (lambda: Newton(max_steps=1.5), "max_steps"),
        (lambda: Newton(polish=-1), "polish"),
        (lambda: Anderson(memory=0), "memory"),
        (lambda: FixedPoint(damping=0.0), "damping"),
        (lambda: Bisection(max_growth=-1), "max_growth"),
        (lambda: Bisection(shrink=0.0), "shrink"),
        (lambda: implicit_gradient(lambda x: x, torch.zeros(1), structure="banded"), "structure"),
        (lambda: implicit_gradient(lambda x: x, torch.zeros(1), structure="iterative", order=2), "order"),
        (lambda: implicit_gradient(lambda x: x, torch.zeros(1), structure="autoregressive"), "diagonal"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        Newton().max_steps = 3  # type: ignore[misc]


# ---------------------------------------------------------------------- gradients


def implicit(y, a, **kwargs):
    f = lambda x: x + torch.tanh(x @ a) - y  # noqa: E731
    x = finish(Newton()(lambda x, y: x + torch.tanh(x @ a) - y, y.detach(), y.detach()), "test", Newton())
    return implicit_gradient(f, x, **kwargs)


@pytest.fixture
def problem():
    a = (0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True), a


def test_implicit_gradient_finds_every_parameter(problem):
    assert gradcheck(implicit, problem, check_forward_ad=True)
    assert gradcheck(lambda y, a: implicit(y, a, structure="iterative"), problem)
    assert gradcheck(lambda y, a: implicit(y, a, structure="iterative", solver=FixedPoint()), problem)
    assert gradcheck(lambda y, a: implicit(y, a, order=2), problem)


def test_second_order_is_right_or_refused(problem):
    assert gradgradcheck(lambda y, a: implicit(y, a, order=2), problem)
    y, a = problem
    (grad,) = torch.autograd.grad(implicit(y, a).sum(), a, create_graph=True)
    for target in problem:
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            torch.autograd.grad(grad.sum(), target, retain_graph=True)


def test_autoregressive_sweeps_are_exact(problem):
    def root(y, a):
        residual = lambda x, y: 2 * x + torch.tanh(x @ torch.tril(a, -1).mT) - y  # noqa: E731
        x = Newton()(residual, y.detach(), y.detach()).value
        return implicit_gradient(
            lambda x: residual(x, y), x, structure="autoregressive", diagonal=lambda x: torch.full_like(x, 2.0)
        )

    assert gradcheck(root, problem)


def test_elementwise_structure():
    y = torch.randn(5, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def root(y, b, order):
        x = Bisection()(lambda x: x**3 + b * x - y, torch.zeros_like(y)).value
        return implicit_gradient(lambda x: x**3 + b * x - y, x, structure="elementwise", event_dim=0, order=order)

    assert gradcheck(lambda y, b: root(y, b, 1), (y, b), check_forward_ad=True)
    assert gradgradcheck(lambda y, b: root(y, b, 2), (y, b))


def test_implicit_gradient_under_torch_func(problem):
    y, a = problem
    expected = torch.autograd.functional.jacobian(implicit, (y, a))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        for i in (0, 1):
            torch.testing.assert_close(jacobian(implicit, i)(y, a), expected[i])
    torch.testing.assert_close(torch.func.vmap(lambda y: implicit(y, a))(y[:, None])[:, 0], implicit(y, a))


def test_nothing_to_differentiate_leaves_no_graph(problem):
    y, a = (t.detach() for t in problem)
    assert not implicit(y, a).requires_grad


def test_a_backward_solve_that_fails_raises(problem):
    y, a = problem
    x = implicit(y, a, structure="iterative", solver=FixedPoint(max_steps=1))
    with pytest.raises(ConvergenceError, match="backward pass"):
        x.sum().backward()


def test_dense_jacobian():
    x = torch.randn(4, 3, dtype=torch.float64)
    jacobian = dense_jacobian(lambda x: x.cumsum(-1) ** 2, x)
    expected = torch.func.vmap(torch.func.jacrev(lambda x: x.cumsum(-1) ** 2))(x)
    torch.testing.assert_close(jacobian, expected)


# ---------------------------------------------------------------------- s + T tanh(s) = c


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scalar_root_at_every_scale(dtype):
    c = torch.randn(3000, dtype=dtype) * 10.0 ** (12 * torch.rand(3000) - 8).to(dtype)
    c = torch.cat([c, torch.tensor([0.0, -0.0, 1e30, -1e30], dtype=dtype)])
    d = 10.0 ** (16 * torch.rand(3004) - 8).to(dtype)
    solution = solve_tanh(c, d)
    assert solution.converged.all()
    assert solution.num_steps.max() <= 24
    size = 1 + c.abs() + (d - 1).abs()
    assert (solution.residual <= 4 * torch.finfo(dtype).eps * size).all()


def triangular_system(m, rows, off, dtype, seed=0):
    """T_ii over (-0.95, 3), off-diagonals of R1 and R2 at off / sqrt(m)."""
    g = torch.Generator().manual_seed(seed)
    d = torch.linspace(0.05, 4, m, dtype=torch.float64)[torch.randperm(m, generator=g)]
    upper = [(torch.randn(m, m, dtype=torch.float64, generator=g) * off / m**0.5).triu(1) for _ in range(2)]
    product = (upper[1] + torch.eye(m, dtype=torch.float64)) @ (upper[0] + torch.diag(d - 1))
    s = 2 * torch.randn(rows, m, dtype=torch.float64, generator=g)
    c = s + torch.tanh(s) @ product.mT
    return c.to(dtype), product.triu(1).to(dtype), d.to(dtype), s.to(dtype)


def test_newton_steps_then_back_substitution():
    c, strict, d, s = triangular_system(16, 1024, 0.5, torch.float64)
    newton = solve_triangular_tanh(c, strict, d, cheap_steps=0)
    assert newton.converged.all()
    assert (newton.num_steps <= 8).double().mean() >= 0.95
    torch.testing.assert_close(newton.value, s, rtol=0, atol=1e-11)
    # without a Newton step, back-substitution alone solves it
    alone = solve_triangular_tanh(c, strict, d, Newton(max_steps=0), cheap_steps=0)
    assert (alone.num_steps == 1).all()
    torch.testing.assert_close(alone.value, s, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("off", [0.5, 2.0, 10.0, 40.0])
@pytest.mark.parametrize("m", [1, 2, 16])
def test_every_legal_triangular_system_converges(m, off, dtype):
    # s itself is ill-conditioned at the larger scales: what must hold is the equation, relative to its terms
    c, strict, d, _ = triangular_system(m, 300, off, dtype)
    solution = solve_triangular_tanh(c, strict, d)
    assert solution.converged.all()
    product = strict + torch.diag(d - 1)
    residual = solution.value + torch.tanh(solution.value) @ product.mT - c
    size = 1 + c.abs() + product.abs().sum(-1)
    assert (residual.abs() <= 64 * torch.finfo(dtype).eps * size).all()


def test_a_bad_row_of_a_triangular_system():
    c, strict, d, s = triangular_system(8, 20, 0.5, torch.float64)
    alone = solve_triangular_tanh(c, strict, d)
    c[3, 2], c[7] = torch.nan, 1e200
    solution = solve_triangular_tanh(c, strict, d)
    good = [i for i in range(20) if i not in (3, 7)]
    torch.testing.assert_close(solution.value[good], s[good], rtol=0, atol=1e-12)
    assert torch.equal(solution.num_steps[good], alone.num_steps[good])
    assert solution.converged[[*good, 7]].all()
    assert not solution.converged[3]


def test_hard_rows_of_a_triangular_system_take_the_others_no_further():
    c, strict, d, _ = triangular_system(8, 40, 2.0, torch.float64)
    alone = [solve_triangular_tanh(row, strict, d) for row in c[:, None]]
    together = solve_triangular_tanh(c, strict, d)
    steps = torch.cat([s.num_steps for s in alone])
    assert steps.max() >= steps.min() + 6  # some rows are much harder than others
    # gathered products round differently, which may move a row by one round of three steps
    assert (together.num_steps - steps).abs().max() <= 3
    assert (together.num_steps == steps).double().mean() >= 0.9
    product = strict + torch.diag(d - 1)
    residual = together.value + torch.tanh(together.value) @ product.mT - c
    assert residual.abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [1e-3, 1e-7, 1e-10])
def test_the_last_step_does_not_leave_the_root_where_the_slope_nearly_vanishes(gap, dtype):
    d = torch.tensor([gap, 1.3, 2.7, 4.0], dtype=torch.float64)
    strict = 0.3 * torch.randn(4, 4, dtype=torch.float64).triu(1)
    s = torch.randn(5000, 4, dtype=torch.float64) * torch.logspace(-8, 0, 5000, dtype=torch.float64)[:, None]
    product = strict + torch.diag(d - 1)
    c = (s + torch.tanh(s) @ product.mT).to(dtype)
    solution = solve_triangular_tanh(c, strict.to(dtype), d.to(dtype))
    assert solution.converged.all()
    product = product.to(dtype)
    residual = solution.value + torch.tanh(solution.value) @ product.mT - c
    assert (residual.abs() <= 10 * torch.finfo(dtype).eps * (1 + c.abs() + product.abs().sum(-1))).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200, 1e-300])
def test_a_bad_element_leaves_the_other_scalar_roots_alone(bad):
    c, d = torch.randn(30, dtype=torch.float64), 3 * torch.rand(30, dtype=torch.float64) + 0.01
    alone = solve_tanh(c, d)
    c, d = (
        torch.cat([c, torch.tensor([bad], dtype=torch.float64)]),
        torch.cat([d, torch.tensor([1e-8], dtype=torch.float64)]),
    )
    solution = solve_tanh(c, d)
    torch.testing.assert_close(solution.value[:30], alone.value, rtol=1e-14, atol=1e-14)
    assert torch.equal(solution.num_steps[:30], alone.num_steps)
    assert solution.num_steps[30] <= 24
    assert solution.status[30] == (Status.CONVERGED if math.isfinite(bad) else Status.NONFINITE)
    assert solution.converged[:30].all()


def test_hard_scalar_roots_go_on_alone(monkeypatch):
    sizes = []
    plain = tanh_module._scalar_steps

    def counted(s, *args):
        sizes.append(s.numel())
        return plain(s, *args)

    monkeypatch.setattr(tanh_module, "_scalar_steps", counted)
    c, d = torch.randn(100, dtype=torch.float64), torch.full((100,), 2.0, dtype=torch.float64)
    c[3], d[3] = 12168.926429673438, 12553.019604896032
    assert solve_tanh(c, d).converged.all()
    assert sizes[0] == 100
    assert len(sizes) > 1
    assert set(sizes[1:]) == {1}


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_gradients_of_the_roots(batch):
    c = torch.randn(2, *(1 for _ in batch), 4, dtype=torch.float64, requires_grad=True)
    d = (2 * torch.rand(*batch, 4, dtype=torch.float64) + 0.05).requires_grad_()
    strict = torch.randn(*batch, 4, 4, dtype=torch.float64, requires_grad=True)

    def root(c, strict, d):
        return triangular_tanh_root(c, strict.triu(1), d)

    assert gradcheck(root, (c, strict, d), check_forward_ad=True)
    assert gradgradcheck(root, (c, strict, d))
    assert gradcheck(tanh_root, (c, d), check_forward_ad=True)
    assert gradgradcheck(tanh_root, (c, d))


def test_vmap_of_the_roots():
    c = torch.randn(3, 4, dtype=torch.float64)
    d = 2 * torch.rand(3, 4, dtype=torch.float64) + 0.05
    strict = torch.randn(3, 4, 4, dtype=torch.float64).triu(1)
    expected = triangular_tanh_root(c, strict, d)
    mapped = torch.func.vmap(triangular_tanh_root)(c, strict, d)
    torch.testing.assert_close(mapped, expected)
    across = torch.func.vmap(lambda s, d: triangular_tanh_root(c, s, d))(strict, d)
    torch.testing.assert_close(across[1], triangular_tanh_root(c, strict[1], d[1]))
    torch.testing.assert_close(torch.func.vmap(tanh_root, (None, 0))(c, d)[2], tanh_root(c, d[2]))


@pytest.mark.parametrize("on_failure", ["warn", "nan"])
@pytest.mark.parametrize(
    "build",
    [
        lambda how: pf.planar(2, solver=Newton(max_steps=1, **how)),
        lambda how: pf.sylvester(2, solver=Newton(max_steps=0, atol=0, rtol=0, **how)),
        lambda how: pf.generalized_sylvester(2, [4], solver=Sweeps(max_steps=0, atol=0, rtol=0, **how)),
        lambda how: pf.low_rank_residual(2, solver=Newton(max_steps=1, **how)),
        lambda how: pf.contractive_residual(2, [4], solver=Anderson(max_steps=1, **how)),
        lambda how: pf.contractive_residual(2, [4], solver=Newton(max_steps=1, **how)),
        lambda how: pf.NumericalInverse(pf.planar(2), solver=Newton(max_steps=1, **how)),
        lambda how: pf.NumericalInverse(pf.baird(2), solver=Bisection(max_steps=0, **how)),
    ],
)
def test_data_that_are_not_finite_give_nan_though_other_rows_fail(build, on_failure):
    torch.manual_seed(0)
    layer = build({"on_failure": on_failure}).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    y = torch.tensor([[1.3, -0.4], [torch.nan, 0.1], [0.2, torch.inf]], dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = layer.inv(y)
    assert (x[1:].isnan() if layer.domain.event_dim else x[~y.isfinite()].isnan()).all()
    if on_failure == "warn":
        assert x[0].isfinite().all()
        assert [w.category for w in caught] == [ConvergenceWarning]
    else:
        assert x[0].isnan().any()


def test_no_warning_on_success():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tanh_root(torch.randn(5), torch.tensor(0.1))


@pytest.mark.parametrize("d", [2.0**23, 2.0**24, 3e7, 1e8, 1e12, 1e-12])
def test_scalar_roots_of_slopes_beyond_the_precision(d):
    """Where ``d - 1`` rounds to d, the slope must not round to nothing."""
    c = torch.tensor([-3.0, -0.5, 1e-3, 0.7, 40.0]) * max(d, 1.0)
    s = solve_tanh(c, torch.full_like(c, d)).value
    assert s.isfinite().all()
    residual = s.double() + (d - 1) * s.double().tanh() - c.double()
    assert (residual.abs() <= 8 * torch.finfo(torch.float32).eps * (1 + d + c.double().abs())).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_plain_tanh_root_is_the_root(dtype):
    d = torch.logspace(-6, 6, 97, dtype=dtype).unsqueeze(-1)
    s = torch.cat([torch.logspace(-6, 3, 40, dtype=dtype), torch.zeros(1, dtype=dtype)])
    for sign in (1, -1):
        c = (sign * s + (d - 1) * torch.tanh(sign * s)).expand(97, 41).contiguous()
        d_all = d.expand_as(c)
        root, h = plain_tanh_root(c, d_all)
        torch.testing.assert_close(h, torch.tanh(root), rtol=0, atol=0)
        size = 1 + (d - 1).abs() + c.abs()
        assert ((root + (d - 1) * torch.tanh(root) - c).abs() <= 8 * torch.finfo(dtype).eps * size).all()
    assert plain_tanh_root(torch.full((3,), torch.nan), torch.ones(3))[0].isnan().all()
