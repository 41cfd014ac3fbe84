"""Importance weights: smoothed, and judged, by a generalised Pareto distribution fitted to their tail (PSIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = ["Importance", "importance", "smoothed"]


@dataclass(frozen=True)
class Importance:
    """The verdict of importance weights on a guide.

    Attributes:
        khat: Shape of the generalised Pareto distribution fitted to the largest weights; below 0.7 they are usable.
        ess: Effective sample size of the smoothed weights.
        log_evidence: Logarithm of the mean smoothed weight; ``log_evidence_se`` is its standard error.
        elbo: Mean of the finite log-weights; ``elbo_se`` is its standard error.
        kl: ``log_evidence - elbo``: the divergence of the guide from the posterior, at least.
        lost_share: Share of the draws at which the model is not finite.
    """

    khat: float
    ess: float
    log_evidence: float
    log_evidence_se: float
    elbo: float
    elbo_se: float
    kl: float
    lost_share: float


def smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    """Return log-weights whose largest are replaced by quantiles of the fitted Pareto tail, and k-hat.

    Their scale is kept. k-hat is infinite where fewer than 5 weights are in the tail.

    References:
        Vehtari et al. (2024), *Pareto smoothed importance sampling*, Section 2.3.
    """
    log_weights = torch.where(torch.isfinite(log_weights), log_weights.double(), -math.inf)
    shift = log_weights.max()
    if not torch.isfinite(shift):
        return log_weights, math.inf
    w = log_weights - shift
    n = len(w)
    size = min(n - 1, math.ceil(min(0.2 * n, 3 * math.sqrt(n))))
    order = w.argsort()
    cutoff = max(w[order[n - size - 1]].item(), math.log(torch.finfo(torch.float64).tiny))
    tail = order[n - size :]
    tail = tail[w[tail] > cutoff]
    if len(tail) < 5:
        return log_weights, math.inf
    khat, sigma = map(float, fit_generalized_pareto(w[tail].exp() - math.exp(cutoff)))
    if not math.isfinite(khat):
        return log_weights, math.inf
    p = (torch.arange(len(tail), dtype=torch.float64) + 0.5) / len(tail)
    quantiles = -sigma * torch.log1p(-p) if abs(khat) < 1e-8 else sigma * torch.expm1(-khat * torch.log1p(-p)) / khat
    w = w.clone()
    w[tail] = torch.log(quantiles + math.exp(cutoff)).clamp(max=0.0)
    return w + shift, khat


def importance(log_weights: Tensor) -> Importance:
    """Judge draws of a guide by their log-weights ``log p(x, data) - log q(x)``, ``(n,)``."""
    n = len(log_weights)
    finite = log_weights[torch.isfinite(log_weights)].double()
    if not len(finite):
        return Importance(math.inf, 0.0, -math.inf, math.inf, -math.inf, math.inf, math.inf, 1.0)
    w, khat = smoothed(log_weights)
    log_evidence = w.logsumexp(0).item() - math.log(n)
    relative = (w - log_evidence).exp()
    elbo = finite.mean().item()
    return Importance(
        khat=khat,
        ess=math.exp(2 * w.logsumexp(0).item() - (2 * w).logsumexp(0).item()),
        log_evidence=log_evidence,
        log_evidence_se=(relative.std() / math.sqrt(n)).item(),
        elbo=elbo,
        elbo_se=(finite.std() / math.sqrt(len(finite))).item() if len(finite) > 1 else math.inf,
        kl=log_evidence - elbo,
        lost_share=1 - len(finite) / n,
    )
