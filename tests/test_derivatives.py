"""Second derivatives in any combination of modes are right, or raise an error."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import SMALL, scatter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from pyro_invflows import call_and_ladj, inv_and_ladj, linalg
from pyro_invflows.solvers import implicit_gradient, tanh_root, triangular_tanh_root
from pyro_invflows.support.errors import ReconstructionError

# torch's own logsigmoid, in forward mode under vmap
pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")

WEIGHTS = torch.linspace(0.5, 1.5, 200, dtype=torch.float64)


def mixed(value):
    """Reduce everything to one number, none of whose second derivatives vanishes by chance."""
    flat = value.reshape(-1)
    return (WEIGHTS[: flat.numel()] * flat).sin().sum()


def gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def by_differences(function, x, direction):
    """Return the derivative of the gradient along a direction, by finite differences."""
    step = 1e-5 * direction
    return (gradient(function, x + step) - gradient(function, x - step)) / 2e-5


def dual_of_gradient(function, x, direction):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), direction)
        (found,) = torch.autograd.grad(function(dual), dual, create_graph=True)
        return forward_ad.unpack_dual(found).tangent.detach()


def gradient_of_dual(function, x, direction):
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        change = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
        return torch.autograd.grad(change, x)[0]


def along(function, direction):
    return lambda x: jvp(function, (x,), (direction,))[1]


#: Each returns the Hessian times a direction.
MODES = {
    "forward over forward": lambda f, x, v: jacfwd(along(f, v))(x),
    "forward over forward, jacobians": lambda f, x, v: jacfwd(jacfwd(f))(x) @ v,
    "forward over forward, mapped": lambda f, x, v: vmap(jacfwd(along(f, v)))(torch.stack([x, x + 0.1]))[0],
    "forward over reverse": lambda f, x, v: along(grad(f), v)(x),
    "reverse over forward": lambda f, x, v: grad(along(f, v))(x),
    "reverse over reverse": lambda f, x, v: jacrev(grad(f))(x) @ v,
    "dual numbers over autograd": dual_of_gradient,
    "autograd over dual numbers": gradient_of_dual,
}


@pytest.mark.parametrize("run", [call_and_ladj, inv_and_ladj], ids=["forward", "inverse"])
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_second_derivatives_of_layers(case, dim, run):
    dim = dim if len(case.event(dim)) == 1 else case.dims[0]
    layer, x = case.build(dim), case.points(dim, ())
    x = x if run is call_and_ladj else layer(x).detach()

    def density(flat):
        value, ladj = run(layer, flat.reshape(x.shape))
        return mixed(value) + mixed(ladj)

    start, direction = x.reshape(-1), WEIGHTS[: x.numel()].flip(0)
    expected = by_differences(density, start, direction)
    for name, mode in MODES.items():
        if "autograd" in name and run is inv_and_ladj and "first order inverse" in case.tags:
            with pytest.raises(NotImplementedError, match=r"first derivatives only|forward-mode derivatives need"):
                mode(density, start, direction)
            continue
        found = mode(density, start, direction)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


C = torch.tensor([0.3, -1.2], dtype=torch.float64)
STRICT = torch.tensor([[0.0, 1.5], [0.0, 0.0]], dtype=torch.float64)


def conv_kernel(x):
    return torch.cat([x, x.sin(), x.cos()]).reshape(1, 1, 3, 3)


#: Functions of a vector (3,) or of a matrix (3, 2) or (3, 3) made of one, with derivatives written by hand.
FUNCTIONS = {
    "log_abs_det": lambda x: linalg.log_abs_det(torch.outer(x, x.cos()) + torch.diag(x.exp())),
    "log_abs_det, large": lambda x: (
        linalg.log_abs_det(torch.outer(x, x.cos()).repeat(70, 70) / 70 + x.exp().repeat(70).diag() + torch.eye(210))
        / 70
    ),
    "solve": lambda x: linalg.solve(torch.outer(x, x.cos()) + torch.diag(x.exp()), x.unsqueeze(-1)),
    "spectral_norm": lambda x: linalg.spectral_norm(torch.stack([x, x * x + 1], -1)),
    "spectral_norm, complex": lambda x: linalg.spectral_norm(torch.complex(torch.outer(x, x + 1), x.diag())),
    "spectral_norm_bound": lambda x: linalg.spectral_norm_bound(torch.outer(x, x.exp()) + 3 * torch.diag(x)),
    "convolution_norm_bound": lambda x: linalg.convolution_norm_bound(conv_kernel(x)),
    "tanh_root": lambda x: tanh_root(2 * x, x.exp()),
    "triangular_tanh_root": lambda x: triangular_tanh_root(C * x[0], STRICT * x[1], (x[:2] - 1).exp()),
    "implicit_gradient, dense": lambda x: implicit_gradient(
        lambda z: z + 0.5 * torch.sin(z.flip(-1)) * x - (C * 0.5).sum() * x,
        _root(x.detach(), lambda z, x: z + 0.5 * torch.sin(z.flip(-1)) * x - (C * 0.5).sum() * x),
        order=2,
    ),
    "implicit_gradient, elementwise": lambda x: implicit_gradient(
        lambda z: z**3 + z - x.exp(),
        _root(x.detach(), lambda z, x: z**3 + z - x.exp()),
        structure="elementwise",
        order=2,
    ),
}


def _root(x, residual):
    z = torch.zeros_like(x)
    for _ in range(60):
        z = z - 0.2 * residual(z, x)
    return z


X = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_of_functions(name):
    def function(x):
        return mixed(FUNCTIONS[name](x))

    expected = by_differences(function, X, V)
    for mode_name, mode in MODES.items():
        found = mode(function, X, V)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda text, n=mode_name: f"{n}: {text}")


@pytest.mark.parametrize("run", [call_and_ladj, inv_and_ladj], ids=["forward", "inverse"])
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_the_backward_pass_uses_the_parameters_of_the_forward_pass(case, dim, run):
    """functional_call has put the module's own ones back by then."""
    layer = case.build(dim)
    other = scatter(copy.deepcopy(layer), 0.3)
    new = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    x = case.points(dim, (3,))
    x = x if run is call_and_ladj else other(x).detach()

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return run(self.layer, x)

    def total_and_gradients(value, ladj, tensors):
        total = mixed(value) + mixed(ladj)
        grads = torch.autograd.grad(total, tensors, materialize_grads=True) if total.requires_grad else ()
        return total, *grads

    expected = total_and_gradients(*run(other, x.clone()), list(other.parameters()))
    found = functional_call(Whole(), {f"layer.{name}": p for name, p in new.items()}, (x,))
    if (
        case.name == "chain_recompute"
    ):  # it rebuilds activations by the modules as they are then, and sees that it fails
        with pytest.raises(ReconstructionError):
            total_and_gradients(*found, list(new.values()))
        return
    torch.testing.assert_close(total_and_gradients(*found, list(new.values())), expected, rtol=1e-9, atol=1e-9)
