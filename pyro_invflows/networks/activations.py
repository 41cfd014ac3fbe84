"""Activations whose slope never exceeds 1, and the slope of any other activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invflows.networks.calling import out_of_place
from pyro_invflows.support.derivatives import gradients_with_graph, in_reverse_mode_only

__all__ = ["LipSwish", "Sine", "value_and_slope"]


class LipSwish(nn.Module):
    r"""The swish, scaled so that its slope never exceeds 1: :math:`x\, \sigma(\beta x) / 1.1`, with learned beta > 0.

    Its second derivative vanishes only at isolated points, so that a log-determinant can be trained. It maps 0 to 0.

    Attributes:
        raw_beta: Scalar; :math:`\beta = \mathrm{softplus}(` ``raw_beta`` :math:`)`, but at least 1e-6.

    References:
        Chen et al. (2019), *Residual flows for invertible generative modeling*, section 3.3.
    """

    #: Bound on the slope: the largest slope of the swish itself is 1.0998.
    lipschitz = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``raw_beta`` to 0.5."""
        nn.init.constant_(self.raw_beta, 0.5)

    def _beta(self) -> Tensor:
        return F.softplus(self.raw_beta).clamp_min(1e-6)  # frozen() divides by it

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the slope at x."""
        both = _SwishAndSlope.apply if in_reverse_mode_only() else _swish_and_slope
        return both(x, self._beta())

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self._beta() * x) * (1 / 1.1)

    @torch.no_grad()
    def frozen(self) -> Callable[[Tensor], Tensor]:
        """Return the function with beta held constant, for the loops of a solver; beta gets no gradient."""
        beta = self._beta()
        factor = (1.1 * beta).reciprocal()  # a tensor, because a Python number would be converted in every call
        return lambda x: F.silu(beta * x) * factor


def _swish_and_slope(x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(beta * x)
    value = x * s * (1 / 1.1)
    return value, torch.addcmul(s * (1 / 1.1), beta * value, 1 - s)


class _SwishAndSlope(torch.autograd.Function):
    r"""The same for reverse mode, in fewer operations: in narrow networks the overhead of each call counts.

    With :math:`z = \beta x`, :math:`r = \sigma (1 - \sigma) / 1.1` and :math:`q = r (2 + z (1 - 2 \sigma))`, the slope
    has the derivatives :math:`\beta q` with respect to x and :math:`x q` with respect to beta; the value has the
    derivative :math:`x^2 r` with respect to beta.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        z = beta * x
        s = torch.sigmoid(z)
        part = s * (1 / 1.1)
        r = part * (1 - s)
        slope = torch.addcmul(part, z, r)
        ctx.save_for_backward(x, beta, z, s, r, slope)
        return x * part, slope

    @staticmethod
    def backward(ctx: Any, to_value: Tensor, to_slope: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, z, s, r, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives may follow
            return gradients_with_graph(_swish_and_slope, (x, beta), (to_value, to_slope))
        change = to_slope * r * (2 + z * (1 - 2 * s))
        to_beta = torch.addcmul(change, to_value * x, r).mul_(x).sum() if ctx.needs_input_grad[1] else None
        return torch.addcmul(to_value * slope, change, beta), to_beta


class Sine(nn.Module):
    """The sine. Its slope oscillates between -1 and 1, so it never saturates, however large the weights are."""

    lipschitz = 1.0

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the slope at x."""
        return torch.sin(x), torch.cos(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def value_and_slope(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value and the slope of an elementwise activation at x, with their graph."""
    own = getattr(activation, "value_and_slope", None)
    if own is not None:
        return own(x)
    if type(activation) is nn.Tanh:
        h = torch.tanh(x)
        return h, 1 - h * h
    if type(activation) is nn.ReLU:
        h = torch.relu(x)
        return h, (h > 0).to(x.dtype)
    value, slope, *_ = torch.func.jvp(out_of_place(activation), (x,), (torch.ones_like(x),))
    return value, slope
