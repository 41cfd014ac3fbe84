"""A distribution that scores in one pass through its layers, and also samples and scores in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, kl_divergence, register_kl
from torch.distributions import TransformedDistribution as Transformed

from pyro_invflows.core.bijection import Bijection, InverseView
from pyro_invflows.core.events import event_dims, sum_rightmost
from pyro_invflows.core.foreign import Foreign
from pyro_invflows.core.latents import NoiseInjection, noise_flags
from pyro_invflows.core.one_pass import with_one_pass
from pyro_invflows.support.checks import positive_int

__all__ = ["FlowDistribution"]


class FlowDistribution(TransformedDistribution):
    """A ``TransformedDistribution`` that evaluates every layer once to score, and once to sample and score.

    It has the constructor of ``TransformedDistribution``, and gives the same numbers wherever the density is exact.

    If two of them have the same layers (the same objects), their ``kl_divergence`` is that of their bases; layers that
    inject noise are allowed. It raises ``NotImplementedError`` if a layer drops elements, because these count in the
    divergence of the bases but not in that of the flows. (torch's rule for a plain ``TransformedDistribution`` does not
    check for such layers.)

    Example:
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> d = FlowDistribution(base, [affine_coupling(3)])
        >>> x, log_prob = d.rsample_and_log_prob((5,))
        >>> torch.allclose(log_prob, d.log_prob(x.clone()), atol=1e-5)
        True
    """

    # No __init__ and no state of its own: expand(), plates and to_event() rebuild the parent.

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return super().sample(_checked(sample_shape, "sample"))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return super().rsample(_checked(sample_shape, "rsample"))

    def log_prob(self, value: Tensor, *, num_particles: int = 1) -> Tensor:
        """Return the log-density of ``value`` ``(*S, *B, *E)``, of shape ``(*S, *B)``.

        If a :class:`~pyro_invflows.Slice` makes it a lower bound, the log-mean-exp over ``num_particles`` draws of the
        dropped elements tightens the bound (Burda et al. 2016). If a layer estimates its log-det, that many estimates
        are averaged. Otherwise ``num_particles`` has no effect.

        Raises:
            ValueError: if ``num_particles`` is below 1; if it is above 1 with ``Slice(score="sample")``, or with both a
                ``Slice`` and an estimated log-det, because the log-mean-exp of estimates is not a bound.
        """
        if self._validate_args and value.numel():  # torch's constraints fail on empty batches
            self._validate_sample(value)
        positive_int(num_particles, "num_particles", "log_prob")
        if num_particles == 1:
            return self._score(value)
        flags = [noise_flags(layer) for layer in self._layers()]
        if any(flag.only_own_sample for flag in flags):
            raise ValueError(
                'log_prob: num_particles must be 1 with Slice(score="sample"), which keeps one draw of what it dropped.'
            )
        draws, estimates = any(flag.draws_inverse for flag in flags), any(map(_estimates, self._layers()))
        if draws and estimates:
            raise ValueError(
                "log_prob: num_particles must be 1 with both a Slice and an estimated log-det: one needs the "
                "log-mean-exp of the particles, the other their mean. Use logdet.Exact() to get the bound."
            )
        if not (draws or estimates):
            return self._score(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        scores = self._score(value.expand(num_particles, *shape))
        if not draws:
            return scores.mean(0)
        # If all particles of a row are out of reach, the gradient of their logsumexp would be NaN.
        lost = (scores == -math.inf).all(0)
        mean = scores.masked_fill(lost, 0.0).logsumexp(0) - math.log(num_particles)
        return mean.masked_fill(lost, -math.inf)

    def rsample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Draw a reparametrised sample and return it with its log-density, in one evaluation per layer.

        With ``Slice(score="data")`` scoring draws the dropped elements afresh, as :meth:`log_prob` does.
        """
        shape = _checked(sample_shape, "rsample_and_log_prob")
        if any(noise_flags(layer).draws_inverse for layer in self._layers()):
            value = self.rsample(shape)
            return value, self._score(value)
        value = self.base_dist.rsample(shape)
        steps, extra = self._steps()
        total = sum_rightmost(_log_prob(self.base_dist, value), extra)
        for layer, extra in steps:
            value, ladj = layer.call_and_ladj(value)
            total = total - sum_rightmost(ladj, extra)
        return value, total

    def rsample_with_gradient(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a reparametrised sample; return it with its log-density and the gradient of that by the sample.

        One evaluation per layer, and no inverse (see :meth:`Bijection.path_gradient
        <pyro_invflows.Bijection.path_gradient>`). The sample keeps its graph to the parameters; the two others are
        constants.

        Raises:
            ValueError: if a layer drops elements, so that the density of a sample is not known.
        """
        noise = self.base_dist.rsample(_checked(sample_shape, "rsample_with_gradient"))
        steps, extra = self._steps()
        with torch.enable_grad():
            leaf = noise.detach().requires_grad_()
            log_prob = sum_rightmost(_log_prob(self.base_dist, leaf), extra)
            (gradient,) = torch.autograd.grad(log_prob.sum(), leaf, allow_unused=True, materialize_grads=True)
        value, total = noise, log_prob.detach()
        for layer, extra in steps:
            value, ladj, gradient = layer.path_gradient(value, gradient)
            total = total - sum_rightmost(ladj, extra)
        return value, total, gradient

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over all modules of the transforms, and of the base if it holds any, each once."""
        holder = nn.ModuleList(_modules(self))
        return (module for module in holder.modules() if module is not holder)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters of :meth:`modules`, each once.

        The base's arguments are plain tensors here; those that a ``Flow`` learns are in ``flow.parameters()``.
        """
        return nn.ModuleList(_modules(self)).parameters()

    def _score(self, value: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        steps, base_extra = self._steps()
        for layer, extra in reversed(steps):
            value, ladj = layer.inv_and_ladj(value)
            total = total + sum_rightmost(ladj, extra)
        return total + sum_rightmost(_log_prob(self.base_dist, value), base_extra)

    def _layers(self) -> list[Bijection | InverseView]:
        return [with_one_pass(transform) for transform in self.transforms]

    def _steps(self) -> tuple[list[tuple[Bijection | InverseView, int]], int]:
        """Return the layers, each with its number of extra dimensions, and the extra dimensions of the base.

        Extra dimensions are event dimensions of the whole but batch dimensions of the part.
        """
        layers = self._layers()
        counts = event_dims(layers)
        more = len(self.event_shape) - counts[-1]  # the base may have more than any layer
        steps = [(layer, more + n - layer.domain.event_dim) for layer, n in zip(layers, counts, strict=False)]
        return steps, more + counts[0] - len(self.base_dist.event_shape)


def _checked(sample_shape: Any, owner: str) -> torch.Size:
    """Check a sample shape, which must not be a number."""
    if hasattr(sample_shape, "__index__"):
        raise TypeError(f"{owner}: sample_shape must be a tuple, such as ({sample_shape},), but got {sample_shape!r}.")
    return torch.Size(sample_shape)


def _estimates(layer: Bijection | InverseView) -> bool:
    """Whether a layer's log-det contains an estimate."""
    return any(not isinstance(leaf, NoiseInjection) and not leaf.exact for leaf, _ in layer.leaves())


def _log_prob(base: Distribution, value: Tensor) -> Tensor:
    """Return ``base.log_prob(value)``; torch's ``Independent`` fails on empty batches."""
    if isinstance(base, Independent):
        return sum_rightmost(_log_prob(base.base_dist, value), base.reinterpreted_batch_ndims)
    return base.log_prob(value)


def _modules(distribution: Distribution) -> Iterator[nn.Module]:
    """Yield the modules that a distribution holds directly, or in its transforms or the distributions inside it."""
    for value in vars(distribution).values():
        if isinstance(value, Distribution):
            yield from _modules(value)
        elif isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list):
            for part in value:
                if isinstance(part, nn.Module):
                    yield part
                elif isinstance(part, Transform):
                    for leaf, _ in with_one_pass(part).leaves():
                        yield from leaf.children() if isinstance(leaf, Foreign) else [leaf]


@register_kl(FlowDistribution, FlowDistribution)
@register_kl(FlowDistribution, Transformed)
@register_kl(Transformed, FlowDistribution)
def _kl(p: Transformed, q: Transformed) -> Tensor:
    """Return the divergence of the bases, which bijections do not change.

    Nor does injected noise e, which has the same distribution on both sides: it adds E KL(r(e|x) || r(e|x)) = 0.
    Dropping elements can only lower the divergence, by an unknown amount.
    """
    remedy = "Estimate it: x = p.sample((n,)); (p.log_prob(x) - q.log_prob(x)).mean()."
    shared, others = ([leaf for t in d.transforms for leaf in with_one_pass(t).leaves()] for d in (p, q))
    if (p.transforms != q.transforms and shared != others) or p.event_shape != q.event_shape:
        raise NotImplementedError(
            f"kl_divergence of two flows is known only if both have the same layers (the same objects). {remedy}"
        )
    for leaf, inverse in shared:
        if isinstance(leaf, NoiseInjection):
            if inverse:
                raise NotImplementedError(
                    "kl_divergence of flows with a Slice is not known: the divergence of their bases counts what the "
                    f"Slice drops, and is only an upper bound. {remedy}"
                )
        elif not leaf.bijective:
            raise NotImplementedError(
                f"kl_divergence of flows with a {leaf.label}, which is not one-to-one, is not known: the "
                f"divergence of their bases is only an upper bound. {remedy}"
            )
    return kl_divergence(p.base_dist, q.base_dist)
