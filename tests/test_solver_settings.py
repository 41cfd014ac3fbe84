"""Layers that solve equations: their solver's settings; passing the default solver changes nothing."""

from __future__ import annotations

import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from cases import scatter

import pyro_invflows as pf
from pyro_invflows.solvers import Anderson, Bisection, FixedPoint, Newton, Settings, Sweeps

F64 = torch.float64


class Case:
    """A layer that solves equations: its default solver, its class and factory, and settings with which it fails."""

    def __init__(self, default, cls, factory, *args, size=5.0, failing=None, **kwargs):
        self.default, self.cls, self.factory, self.size = default, cls, factory, size
        self.args, self.kwargs = args, kwargs
        self.failing = failing or {"max_steps": 0}

    def make(self, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            args = [arg() if callable(arg) else arg for arg in self.args]
            return scatter(self.factory(*args, **self.kwargs, **settings).double(), self.size)


def contraction(dim):
    torch.manual_seed(0)
    net = pf.networks.ContractiveMLP(dim, (8,))
    return scatter(net)


class Steep(pf.Elementwise):
    """Elementwise, and one-way: the inverse is left out."""

    def _function(self, x):
        return x + x**3

    def _log_slope(self, x, y):
        return (1 + 3 * x**2).log()


CASES = {
    "planar": Case(Newton(), pf.Planar, pf.planar, 3),
    # its last resort, back-substitution, cannot fail
    "sylvester": Case(Newton(), pf.Sylvester, pf.sylvester, 6, 4, size=3.0, failing={"atol": 0.0, "rtol": 0.0}),
    # exact up to rounding without any sweep
    "generalized_sylvester": Case(
        Sweeps(),
        pf.GeneralizedSylvester,
        pf.generalized_sylvester,
        6,
        [16],
        size=0.7,
        failing={"max_steps": 1, "atol": 0.0, "rtol": 0.0},
    ),
    "bottleneck": Case(Newton(), pf.LowRankResidual, pf.low_rank_residual, 9),
    "sandwich": Case(Newton(), pf.LowRankResidual, pf.low_rank_residual, 9, form="sandwich"),
    "contractive, small": Case(Newton(), pf.ContractiveResidual, pf.contractive_residual, 4, [8]),
    "contractive, large": Case(Anderson(memory=15), pf.ContractiveResidual, pf.contractive_residual, 40, [8]),
    "dense": Case(Newton(), pf.NumericalInverse, pf.numerical_inverse, lambda: pyro_transforms.Planar(3), size=0.0),
    "elementwise": Case(Bisection(), pf.NumericalInverse, pf.numerical_inverse, Steep, size=0.0),
    "triangular": Case(
        Newton(),
        pf.NumericalInverse,
        pf.numerical_inverse,
        lambda: pyro_transforms.affine_autoregressive(3, hidden_dims=[6]),
        size=0.5,
        structure="triangular",
        failing={"atol": 0.0, "rtol": 0.0},
    ),
}
ALL = [pytest.param(case, id=name) for name, case in CASES.items()]


def points(layer, count=20):
    size = layer.input_dim or 3
    torch.manual_seed(1)
    return 3 * torch.randn(count, size, dtype=F64)


@pytest.mark.parametrize("case", ALL)
def test_the_default_solver_changes_nothing(case):
    plain, given = case.make(), case.make(solver=case.default)
    y = plain(points(plain)).detach()
    assert torch.equal(given.inv(y.clone()), plain.inv(y.clone()))
    with torch.no_grad():
        assert torch.equal(given.inv(y.clone()), plain.inv(y.clone()))
    torch.testing.assert_close(plain(plain.inv(y.clone())), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["bottleneck", "sandwich"])
def test_the_fixed_point_stands_behind_the_default_solver(form, monkeypatch):
    layers = [CASES[form].make(solver=Newton()), CASES["contractive, small"].make(solver=Newton(max_halvings=3))]
    monkeypatch.setattr(Newton, "default_max_steps", 0)
    monkeypatch.setattr("pyro_invflows.solvers.contractive._BLIND_STEPS", 0)
    monkeypatch.setattr("pyro_invflows.solvers.contractive._CHORD_STEPS", 0)
    for layer in layers:
        x = points(layer)
        torch.testing.assert_close(layer.inv(layer(x).detach().clone()), x, rtol=1e-6, atol=1e-6)


def test_a_bound_leaves_newtons_method_alone():
    """Without the cheaper steps in front, which would solve these rows on their own."""
    for name in ("bottleneck", "sandwich"):
        plain, bounded = CASES[name].make(), CASES[name].make(max_steps=1)
        y = plain(points(plain)).detach()
        with pytest.raises(pf.ConvergenceError, match=r"LowRankResidual.* after 1 steps"):
            bounded.inv(y)
        torch.testing.assert_close(CASES[name].make(max_steps=50).inv(y), plain.inv(y), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", ALL)
def test_single_settings_are_those_of_the_solver(case):
    single = {"atol": 1e-3, "rtol": 0.25, "max_steps": 77, "on_failure": "warn"}
    one, other = case.make(**single), case.make(solver=type(case.default)(**single, **_extra(case.default)))
    if case.cls is pf.ContractiveResidual:
        small = case.default == Newton()
        assert one.solvers[0 if small else 1] == other.solvers[0 if small else 1]
    else:
        assert one.solver == other.solver
    y = one(points(one)).detach()
    assert torch.equal(one.inv(y.clone()), other.inv(y.clone()))


def _extra(solver):
    return {"memory": solver.memory} if isinstance(solver, Anderson) else {}


@pytest.mark.parametrize("case", ALL)
def test_on_failure(case):
    layer = case.make(**case.failing)
    y = case.make()(points(layer)).detach()
    with pytest.raises(pf.ConvergenceError):
        layer.inv(y.clone())
    assert case.make(**case.failing, on_failure="nan").inv(y.clone()).isnan().any()
    with pytest.warns(pf.ConvergenceWarning):
        case.make(**case.failing, on_failure="warn").inv(y.clone())


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("single", [{"atol": 1e-3}, {"rtol": 1e-3}, {"max_steps": 3}, {"on_failure": "raise"}], ids=str)
def test_a_solver_and_settings_beside_it_are_refused(case, single):
    ((name, value),) = single.items()
    with pytest.raises(ValueError, match=rf"got both: {name}={value!r}\. Write solver=\w+\({name}={value!r}\)"):
        case.make(solver=case.default, **single)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("solver", [Settings(), Newton, "newton", 3, Settings(max_steps=3)], ids=repr)
def test_what_is_no_solver_is_refused(case, solver):
    with pytest.raises(TypeError, match=rf"{case.cls.__name__}.*solver must be solvers\.\w+\(\.\.\.\).*, but got"):
        case.make(solver=solver)


@pytest.mark.parametrize("name", ["planar", "generalized_sylvester", "bottleneck", "dense", "elementwise"])
def test_a_solver_for_something_else_is_refused(name):
    other = Newton() if name in ("generalized_sylvester", "elementwise") else Sweeps()
    with pytest.raises(TypeError, match=rf"but got {type(other).__name__}\("):
        CASES[name].make(solver=other)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("bad", [{"atol": -1.0}, {"rtol": -1.0}, {"max_steps": -1}, {"on_failure": "ignore"}], ids=str)
def test_bad_settings(case, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        case.make(**bad)


def test_iresnet_passes_settings_on():
    chain = pf.iresnet(4, num_blocks=2, rtol=1e-3, on_failure="nan")
    assert [part.solver for part in chain[::2]] == 2 * [Newton(rtol=1e-3, on_failure="nan")]
    assert {part.solver for part in pf.iresnet(4, solver=Newton(polish=2))[::2]} == {Newton(polish=2)}


@pytest.mark.parametrize("form", ["bottleneck", "sandwich"])
def test_tolerances_below_rounding_are_not_passed_over(form):
    """The cheap steps, which stop at rounding error, must not ignore them either."""
    layer = CASES[form].make(atol=0.0, rtol=0.0)
    with pytest.raises(pf.ConvergenceError, match=r"accepted: 0 \+ 0"):
        layer.inv(points(layer))


def test_the_fixed_point_by_itself_takes_as_many_steps_as_the_bound_needs():
    layer = pf.ContractiveResidual(contraction(40), solver=FixedPoint()).double()
    plain = pf.ContractiveResidual(layer.net)
    y = torch.randn(3, 40, dtype=F64)
    torch.testing.assert_close(layer.inv(y.clone()), plain.inv(y.clone()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "steps"), [(FixedPoint(), 100), (Anderson(), 100), (Newton(), 50), (Bisection(), 100)], ids=str
)
def test_where_nobody_bounds_the_steps_the_solver_does(solver, steps):
    assert solver.max_steps is None
    assert solver.bound() == steps
    assert solver.bound(7) == 7
    assert type(solver)(max_steps=3).bound(7) == 3
    if isinstance(solver, Bisection):
        solution = solver(lambda x: torch.where(x > 0.3, 1.0, -1.0).to(F64), torch.zeros(2, dtype=F64))
    else:
        solution = solver(lambda x: x.abs() + 1, torch.zeros(2, 1, dtype=F64))
    assert not solution.converged.any()
    assert solution.num_steps.max() <= steps


def test_sweeps_end_after_as_many_as_there_are_unknowns():
    y = 100 * torch.randn(50, 7, dtype=F64)

    def residual(x, y):
        return x + 5 * torch.nn.functional.pad(torch.sin(x), (1, -1)) - y

    def sweep(residual, x, r, state, args, seeking):
        x = x - r
        return x, residual(x, *args), state

    solution = Sweeps()(residual, y, y, sweep=sweep)
    assert solution.converged.all()
    assert solution.num_steps.max() <= 7 + 1  # and one to polish
    expected = [y[:, 0]]
    for i in range(1, 7):
        expected.append(y[:, i] - 5 * torch.sin(expected[-1]))
    torch.testing.assert_close(solution.value, torch.stack(expected, -1), rtol=1e-9, atol=1e-9)
    assert not Sweeps(max_steps=3)(residual, y, y, sweep=sweep).converged.all()
    with pytest.raises(ValueError, match="polish"):
        Sweeps(polish=-1)
