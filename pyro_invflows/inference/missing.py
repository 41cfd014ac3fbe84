"""Missing modes: what other Gaussians see of the evidence that a guide does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_invflows.inference.gaussian import Gaussian
from pyro_invflows.inference.importance import importance

__all__ = ["missed_evidence", "mixture_weights"]

LogDensity = Callable[[Tensor], Tensor]


def mixture_weights(
    value: LogDensity, draws: Tensor, log_q: LogDensity, witnesses: Sequence[Gaussian], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return draws, half of them a guide's and half of the witnesses', and log-weights against that mixture.

    Args:
        value: From points ``(n, D)`` to the potential U.
        draws: Draws of the guide ``(n, D)``.
        log_q: The guide's log-density, at any point: at draws of the witnesses too, hence the inverse of a flow.
        witnesses: Gaussians found on other paths.
        generator: Source of the witnesses' draws.
    """
    each = max(1, len(draws) // len(witnesses))
    x = torch.cat([draws, *(witness.sample(each, generator) for witness in witnesses)])
    log_guide = log_q(x)
    log_guide = torch.where(torch.isfinite(log_guide), log_guide, -math.inf)
    log_others = torch.stack([witness.log_prob(x) for witness in witnesses]).logsumexp(0)
    share = len(draws) / len(x)
    log_others = log_others + math.log((1 - share) / len(witnesses))
    return x, -value(x) - torch.logaddexp(log_guide + math.log(share), log_others)


def missed_evidence(mixture_log_weights: Tensor, guide_log_weights: Tensor) -> float:
    """Return by how many nats the evidence that the mixture sees exceeds the guide's own: log 2 for half the mass."""
    return importance(mixture_log_weights).log_evidence - importance(guide_log_weights).log_evidence
