"""Where a density that is not finite comes from."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution

from pyro_invflows.core.chain import Chain
from pyro_invflows.core.one_pass import inv_and_ladj

__all__ = ["first_fault"]


def first_fault(distribution: Distribution, value: Tensor) -> str:
    """Say which layer is the first, from the data to the base, whose result is not finite; nothing if all are."""
    if not isinstance(distribution, TransformedDistribution):
        return "" if distribution.log_prob(value).isfinite().all() else "The density itself is not finite."
    parts = [part for t in distribution.transforms for part in (t if isinstance(t, Chain) else [t])]
    for i, part in reversed(list(enumerate(parts))):
        value, ladj = inv_and_ladj(part, value)
        for tensor, said in ((value, "the result"), (ladj, "the log-det")):
            if not tensor.isfinite().all():
                name = str(part).splitlines()[0]
                return f"From the data to the base, the first fault is in layer {i}, {name}: {said} is not finite."
    if not distribution.base_dist.log_prob(value).isfinite().all():
        return "The results of all layers are finite; the density of the base is not."
    return ""
