"""One smooth bend of the line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_invflows.monotone.base import MonotoneFunction, bounded
from pyro_invflows.solvers import plain_tanh_root, tanh_root, tanh_slope
from pyro_invflows.support.checks import positive_number

__all__ = ["TanhBump"]

#: Beyond this, tanh of the root is 1 to rounding.
_SATURATED = 100.0


@dataclass(frozen=True)
class TanhBump(MonotoneFunction):
    r"""Bends the line once and shifts it; the slope tends to 1 on both sides.

    .. math:: y = x + \frac{d - 1}{a} \tanh(a x + t) + u, \qquad a, d > 0.

    The slope lies between 1 and d; it is d at :math:`a x + t = 0`. Four raw parameters per element: log a, log d, t and
    u; the first two are bounded smoothly. The function of :class:`~pyro_invflows.GeneralizedSylvester`.

    The inverse is one scalar root (usually six Newton steps), with implicit derivatives of all orders.

    Args:
        max_log_steepness: Bound on log a.
        max_log_slope: Bound on log d; at most 4.

    References:
        Hoogeboom et al. (2020), *The convolution exponential and generalized Sylvester flows*, Eqs. 9-11, with
        :math:`\gamma s_1 s_2 = d - 1`.
    """

    max_log_steepness: float = 2.0
    max_log_slope: float = 3.0

    num_parameters = 4
    raw_names = "log a, log d, t, then u"

    def __post_init__(self) -> None:
        for name in ("max_log_steepness", "max_log_slope"):
            object.__setattr__(self, name, positive_number(getattr(self, name), name, "TanhBump"))
        if self.max_log_slope > 4:
            raise ValueError(f"TanhBump: max_log_slope must be at most 4, but got {self.max_log_slope!r}.")

    def _parameters(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log a, d, t and u."""
        log_a, log_d, t, u = raw.unbind(-2)
        return bounded(log_a, self.max_log_steepness), bounded(log_d, self.max_log_slope).exp(), t, u

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_a, d, t, u = self._parameters(raw)
        h = torch.tanh(torch.addcmul(t, log_a.exp(), x))
        return x + (d - 1) * (-log_a).exp() * h + u, tanh_slope(h, d).log()

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_a, d, t, u = self._parameters(raw)
        # q = a x + t solves q + (d - 1) tanh q = a (y - u) + t
        target = torch.addcmul(t, log_a.exp(), y - u).clamp(-_SATURATED, _SATURATED)
        h = torch.tanh(tanh_root(target, d.expand_as(target), owner="TanhBump"))
        return y - u - (d - 1) * (-log_a).exp() * h, tanh_slope(h, d).log()

    @torch.no_grad()
    def root(self, y: Tensor, raw: Tensor) -> Tensor:
        raw_a, raw_d, t, u = raw.unbind(-2)
        a, d = _bounded_exp(raw_a, self.max_log_steepness), _bounded_exp(raw_d, self.max_log_slope)
        shifted = y - u
        target = torch.addcmul(t, a, shifted).clamp_(-_SATURATED, _SATURATED)
        _, h = plain_tanh_root(target, d.expand_as(target))
        return torch.addcdiv(shifted, (d - 1) * h, a, value=-1)


def _bounded_exp(raw: Tensor, bound: float) -> Tensor:
    """Return the exponential of :func:`bounded`, in fewer operations."""
    half = torch.sigmoid(raw if bound == 2 else raw * (2 / bound))
    return torch.rsub(half, -bound, alpha=-2 * bound).exp_()
