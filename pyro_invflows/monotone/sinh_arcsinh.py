"""Skewness and tail weight of one variable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_invflows.monotone.base import MonotoneFunction, bounded
from pyro_invflows.support.checks import positive_number

__all__ = ["SinhArcsinh"]


@dataclass(frozen=True)
class SinhArcsinh(MonotoneFunction):
    r"""Changes skewness and tail weight: the sinh-arcsinh function, through the origin with slope 1.

    .. math:: y = \frac{1}{p} \left( \sinh v + \tanh(\kappa) (\cosh v - 1) \right), \qquad v = p \operatorname{asinh} x.

    Two raw parameters per element: the skewness :math:`\kappa` and the logarithm of the tail weight p, both bounded
    smoothly. For large :math:`|x|`, :math:`|y|` grows like :math:`|x|^p`, and :math:`e^{2 \kappa}` times as fast on the
    right as on the left. It is the function of Jones and Pewsey, :math:`\sinh(p \operatorname{asinh} x + \kappa)`,
    shifted and scaled.

    Args:
        max_skewness: Bound on :math:`|\kappa|`.
        max_log_tail: Bound on :math:`|\log p|`.

    References:
        Jones and Pewsey (2009), *Sinh-arcsinh distributions*, Eq. 1.
    """

    max_skewness: float = 2.0
    max_log_tail: float = 1.0

    num_parameters = 2
    raw_names = "skewnesses, then logarithms of tail weights"

    def __post_init__(self) -> None:
        for name in ("max_skewness", "max_log_tail"):
            object.__setattr__(self, name, positive_number(getattr(self, name), name, "SinhArcsinh"))

    def _parameters(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the skewness and the logarithm of the tail weight."""
        skewness, log_tail = raw.unbind(-2)
        return bounded(skewness, self.max_skewness), bounded(log_tail, self.max_log_tail)

    @staticmethod
    def _log_slope(u: Tensor, v: Tensor, skewness: Tensor) -> Tensor:
        """Return the log-slope for ``u = asinh x`` and ``v = p u``."""
        rising, falling = F.logsigmoid(2 * skewness) + v, F.logsigmoid(-2 * skewness) - v
        size = u.abs()
        # log cosh u = |u| + log(1 + exp(-2 |u|)) - log 2
        return torch.logaddexp(rising, falling) - size - F.softplus(-2 * size) + math.log(2.0)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        skewness, log_tail = self._parameters(raw)
        u = torch.asinh(x)
        v = log_tail.exp() * u
        # with A = sigmoid(2 k), B = 1 - A, the law is (A (e^v - 1) - B (e^-v - 1)) / p: two terms of the same sign
        rising = torch.sigmoid(2 * skewness) * torch.expm1(v)
        falling = torch.sigmoid(-2 * skewness) * torch.expm1(-v)
        return (rising - falling) * (-log_tail).exp(), self._log_slope(u, v, skewness)

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        skewness, log_tail = self._parameters(raw)
        # Reflect, so that y is not negative. Then w = e^v - 1 solves A w^2 + (1 - z) w - z = 0 with z = p y, and one of
        # the two forms of the root has no cancellation.
        side = torch.where(y < 0, -1.0, 1.0).to(y.dtype)
        z = log_tail.exp() * (side * y)
        kappa = side * skewness
        a, b = torch.sigmoid(2 * kappa), torch.sigmoid(-2 * kappa)
        root = torch.hypot(z + a - b, 2 * (a * b).sqrt())
        near = z < 1
        small = torch.where(near, z, 0.5)  # any harmless value if the other form is used
        w = torch.where(near, 2 * small / ((1 - small) + root), (z - 1 + root) / (2 * a))
        v = side * torch.log1p(w.clamp_max(torch.finfo(w.dtype).max))
        u = v * (-log_tail).exp()
        return torch.sinh(u), self._log_slope(u, v, skewness)
