"""The cumulative distribution function of a mixture, as an increasing function of one variable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_invflows.monotone.base import MonotoneFunction, bounded
from pyro_invflows.solvers import bracketed_newton
from pyro_invflows.support.checks import positive_int, positive_number
from pyro_invflows.support.derivatives import may_differentiate, steps_with_graph

__all__ = ["MixtureCDF"]

#: In derivatives of the inverse, log-slopes are clamped from below to this.
_LEAST_LOG_SLOPE = -60.0


@dataclass(frozen=True)
class MixtureCDF(MonotoneFunction):
    r"""Applies the distribution function of a mixture of logistics, then the logit, then an affine function.

    .. math::
        y = e^{\alpha} \operatorname{logit}\Big( \sum_k \pi_k \,\sigma\big((x - \mu_k) e^{-s_k}\big) \Big) + \beta.

    3K + 2 raw parameters per element: K logits of :math:`\pi`, K locations, K log-scales, :math:`\alpha` and
    :math:`\beta`; the log-scales and :math:`\alpha` are bounded smoothly. Raw locations and log-scales are multiplied
    by factors between 1/2 and 1, one per component: with equal factors, components with equal parameters would remain
    equal in training. Infinitely differentiable. Between two distant components the slope may be close to 0, and x is
    ill-conditioned there.

    **Forward**: O(K) per element. **Inverse**: Newton's method, bracketed by the components' own quantiles at the level
    of y; usually 5 to 10 evaluations. Derivatives of the inverse, up to third order, by Newton steps with a graph.

    Args:
        num_components: K, at least 1.
        max_log_scale: Bound on :math:`|s_k|` and :math:`|\alpha|`.

    References:
        Ho et al. (2019), *Flow++: improving flow-based generative models with variational dequantization and
        architecture design*, Eqs. 8-10.
    """

    num_components: int = 8
    max_log_scale: float = 3.0

    raw_names = "logits of weights, locations, log-scales, then alpha and beta"

    def __post_init__(self) -> None:
        k = positive_int(self.num_components, "num_components", "MixtureCDF")
        object.__setattr__(self, "num_components", k)
        object.__setattr__(self, "max_log_scale", positive_number(self.max_log_scale, "max_log_scale", "MixtureCDF"))

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        return 3 * self.num_components + 2

    def _parameters(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return log pi, mu and s, each (*B, K, E), alpha and beta (*B, E)."""
        k = self.num_components
        logits, location, log_scale, affine = raw.split_with_sizes((k, k, k, 2), -2)
        alpha, beta = affine.unbind(-2)
        gain = torch.linspace(0.5, 1.0, k, dtype=raw.dtype, device=raw.device).unsqueeze(-1)
        # the component with the largest factor for its location has the smallest for its scale
        log_scale = bounded(log_scale * gain.flip(0), self.max_log_scale)
        return _log_softmax(logits), location * gain, log_scale, bounded(alpha, self.max_log_scale), beta

    @staticmethod
    def _logit(x: Tensor, log_pi: Tensor, mu: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit of the distribution function F, and its log-slope."""
        most = 0.99 * torch.finfo(x.dtype).max
        z = ((x.unsqueeze(-2) - mu) * (-log_scale).exp()).clamp(-most, most)
        log_below, log_above = F.logsigmoid(z), F.logsigmoid(-z)
        below, above = log_pi + log_below, log_pi + log_above
        # The slope is f / F + f / (1 - F): averages of sigmoid(-z) / scale and sigmoid(z) / scale over the components,
        # weighted by their shares of F and of 1 - F. Nothing cancels, however large |x| is.
        left = _log_sum_exp(_log_softmax(below) + log_above - log_scale)
        right = _log_sum_exp(_log_softmax(above) + log_below - log_scale)
        return _log_sum_exp(below) - _log_sum_exp(above), torch.logaddexp(left, right)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_pi, mu, log_scale, alpha, beta = self._parameters(raw)
        value, log_slope = self._logit(x, log_pi, mu, log_scale)
        return torch.addcmul(beta, alpha.exp(), value), log_slope + alpha

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_pi, mu, log_scale, alpha, beta = self._parameters(raw)
        most = 0.99 * torch.finfo(y.dtype).max
        level = ((y - beta) * (-alpha).exp()).clamp(-most, most)
        with torch.no_grad():
            # at the smallest quantile no component exceeds the level, so neither does the mixture
            quantiles = torch.addcmul(mu, log_scale.exp(), level.unsqueeze(-2)).clamp(-most, most)
            low, high = quantiles.amin(-2), quantiles.amax(-2)
            start = torch.clamp((log_pi.exp() * quantiles).sum(-2), low, high)
            x = bracketed_newton(
                lambda x: self._logit(x, log_pi, mu, log_scale), level.expand_as(start), low, high, start
            ).value
        value, log_slope = self._logit(x, log_pi, mu, log_scale)
        if may_differentiate(y, raw):
            for _ in range(steps_with_graph()):
                step = (value - level) * (-log_slope.clamp_min(_LEAST_LOG_SLOPE)).exp()
                x = x - (step - step.detach())  # x is the root already: only the step's derivatives are needed
                value, log_slope = self._logit(x, log_pi, mu, log_scale)
        return x, log_slope + alpha


# torch's own logsumexp and log_softmax cannot be differentiated by autograd over dual numbers


def _log_sum_exp(value: Tensor) -> Tensor:
    """Return the log of the sum of exponentials over the components."""
    most = value.detach().amax(-2, keepdim=True)
    return (value - most).exp().sum(-2).log() + most.squeeze(-2)


def _log_softmax(value: Tensor) -> Tensor:
    """Return ``value`` minus its log-sum-exp over the components, without cancellation between large numbers."""
    shifted = value - value.detach().amax(-2, keepdim=True)
    return shifted - shifted.exp().sum(-2, keepdim=True).log()
