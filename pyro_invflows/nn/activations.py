"""Activations that no slope of which exceeds 1, and what is known about the slopes of torch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LipSwish", "Sine", "value_and_slope"]


class LipSwish(nn.Module):
    r"""The swish, scaled so that its slope never exceeds 1: :math:`x\, \sigma(\beta x) / 1.1`, with learned beta > 0.

    Its second derivative vanishes nowhere for long, so that a log-determinant can be trained; 0 stays 0.

    References:
        Chen et al. (2019), *Residual flows for invertible generative modeling*, section 3.3.
    """

    #: The largest slope: that of the swish is 1.0998
    lipschitz = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))

    def _beta(self) -> Tensor:
        return F.softplus(self.raw_beta).clamp_min(1e-6)  # frozen() divides by it

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and its derivative."""
        beta = self._beta()
        s = torch.sigmoid(beta * x)
        value = x * s * (1 / 1.1)
        return value, torch.addcmul(s * (1 / 1.1), beta * value, 1 - s)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self._beta() * x) * (1 / 1.1)

    @torch.no_grad()
    def frozen(self) -> Callable[[Tensor], Tensor]:
        """Return the function with beta as a number, for the loops of a solver; no gradient to beta."""
        beta = self._beta().item()
        factor = 1 / (1.1 * beta)
        return lambda x: F.silu(beta * x) * factor


class Sine(nn.Module):
    """The sine: its slope reaches 1 and -1 again and again, however large the weights before it have become."""

    lipschitz = 1.0

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and its derivative."""
        return torch.sin(x), torch.cos(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def value_and_slope(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an elementwise activation's value and derivative at x, with their graph."""
    own = getattr(activation, "value_and_slope", None)
    if own is not None:
        return own(x)
    if type(activation) is nn.Tanh:
        h = torch.tanh(x)
        return h, 1 - h * h
    value, slope, *_ = torch.func.jvp(activation, (x,), (torch.ones_like(x),))
    return value, slope
