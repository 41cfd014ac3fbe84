"""Scale and shift of one variable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_invflows.monotone.base import MonotoneFunction, bounded
from pyro_invflows.support.checks import positive_number

__all__ = ["Additive", "Affine"]


@dataclass(frozen=True)
class Affine(MonotoneFunction):
    r"""Scales and shifts.

    .. math:: y = e^{s} x + t, \qquad s = m \tanh(\tilde s / m).

    Two raw parameters per element: the log-scale and the shift.

    Args:
        max_log_scale: Bound m on the log-scale.

    References:
        Dinh et al. (2017), *Density estimation using Real NVP*, Eq. 8; the bound follows Ardizzone et al. (2019),
        *Analyzing inverse problems with invertible neural networks*.
    """

    max_log_scale: float = 2.0

    num_parameters = 2
    raw_names = "log-scales, then shifts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_log_scale", positive_number(self.max_log_scale, "max_log_scale", "Affine"))

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        raw_scale, shift = raw.unbind(-2)
        log_scale = bounded(raw_scale, self.max_log_scale)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        raw_scale, shift = raw.unbind(-2)
        log_scale = bounded(raw_scale, self.max_log_scale)
        return (y - shift) * (-log_scale).exp(), log_scale

    @torch.no_grad()
    def root(self, y: Tensor, raw: Tensor) -> Tensor:
        m = self.max_log_scale
        raw_scale, shift = raw.unbind(-2)
        minus_log_scale = torch.rsub(torch.sigmoid(raw_scale if m == 2 else raw_scale * (2 / m)), m, alpha=2 * m)
        return minus_log_scale.exp_() * (y - shift)


@dataclass(frozen=True)
class Additive(MonotoneFunction):
    """Shifts: ``y = x + t``, one raw parameter per element.

    References:
        Dinh et al. (2015), *NICE: non-linear independent components estimation*, Eq. 9.
    """

    num_parameters = 1
    raw_names = "shifts"

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, None]:
        return x + raw.squeeze(-2), None

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, None]:
        return y - raw.squeeze(-2), None
