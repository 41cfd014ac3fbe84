"""The flow of the guide: every coordinate decides over every other, and training reaches a skew target."""

from __future__ import annotations

import math

import pytest
import torch
from cases import scatter

from pyro_invflows.inference.gaussian import Gaussian
from pyro_invflows.inference.posterior_flow import binary_code_couplings, draw, posterior_flow, train_flow

F64 = torch.float64


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_the_flow_starts_as_the_identity_and_inverts(dim):
    flow, x = posterior_flow(dim), torch.randn(6, dim, dtype=F64)
    torch.testing.assert_close(flow(x), x)
    scatter(flow, 0.3)
    y, ladj = flow.call_and_ladj(x)
    jacobian = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(flow.inv(y.clone()), x)


@pytest.mark.parametrize("dim", [2, 5, 9])
def test_every_pair_of_coordinates_meets_in_some_coupling(dim):
    """By the Jacobians of the couplings between their permutations, not by the masks that built them."""
    layers = binary_code_couplings(dim, (8,))
    met = torch.eye(dim, dtype=torch.bool)
    for i in range(0, len(layers), 4):
        enter, first, second, leave = layers[i : i + 4]
        for coupling in (first, second):
            scatter(coupling, 1.0)
            x = torch.randn(dim)
            jacobian = torch.autograd.functional.jacobian(lambda x, c=coupling, a=enter, b=leave: b(c(a(x))), x)
            met |= jacobian != 0
    assert met.all()


class Banana:
    """x_1 ~ N(0, 1), x_2 | x_1 ~ N(x_1^2, 1/4): the evidence is 1."""

    def value_and_grad(self, x):
        a, b = x.unbind(1)
        r = 2 * (b - a**2)
        u = 0.5 * a**2 + 0.5 * r**2 + math.log(2 * math.pi) - math.log(2)
        return u, torch.stack([a - 4 * a * r, 2 * r], 1)

    def value(self, x):
        return self.value_and_grad(x)[0]


def test_training_reaches_a_banana():
    torch.manual_seed(0)
    flow, generator = posterior_flow(2), torch.Generator().manual_seed(0)
    scale = torch.diag(torch.tensor([1.0, 1.5], dtype=F64))
    around = Gaussian(torch.tensor([0.0, 1.0], dtype=F64), scale)
    target = Banana()
    x, log_q = draw(flow, around, 2000, generator)
    torch.testing.assert_close(log_q, around.log_prob(x))
    before = (-target.value(x) - log_q).mean()
    rounds = train_flow(target, flow, around, generator=generator, max_steps=500)
    x, log_q = draw(flow, around, 4000, generator)
    after = (-target.value(x) - log_q).mean()
    assert before < -0.5
    assert -0.05 < after < 0.01  # the ELBO is at most the log-evidence, which is 0
    assert abs(rounds[-1].log_evidence) < 0.1
    assert (x.var(0) - torch.tensor([1.0, 2.25])).abs().max() < 0.3
