"""An ELBO whose gradient leaves out the score of the guide, which has mean 0 and only adds noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution

from pyro_invflows.core.events import sum_rightmost
from pyro_invflows.core.flow_distribution import FlowDistribution
from pyro_invflows.core.foreign import Foreign
from pyro_invflows.core.one_pass import with_one_pass

__all__ = ["PathELBO"]


class PathELBO(Trace_ELBO):
    r"""Pyro's ``Trace_ELBO`` with path gradients: the guide's density counts only through its sample.

    The gradient of the ELBO of a guide q with the sample :math:`z = z(\epsilon, \phi)` is

    .. math::
        \mathrm{E}\left[(\nabla_z \log p(z) - \nabla_z \log q_\phi(z))^T \, \frac{\partial z}{\partial \phi}\right]
        - \mathrm{E}\left[\nabla_\phi \log q_\phi(z)\right],

    where the last term, the score, is 0 but not so its estimate. Without it the gradient is still unbiased, and
    its variance vanishes as q approaches the posterior, whereas that of ``Trace_ELBO`` stays at that of the score.
    Choose it for any guide whose latent sites are continuous; flows train faster and end closer to the optimum.

    If the guide has one latent site, drawn from a flow of this library (``AutoNormalizingFlow`` with its layers, or
    ``pyro.sample("z", flow())``), the gradient comes from the pass that draws the sample: no layer is inverted. Other
    guides run a second time, with the sample fixed, and the score found there is subtracted; their distributions must
    be able to score a value that they have not just drawn.

    Arguments, plates, subsampling, ``vectorize_particles`` and the value of the loss are those of ``Trace_ELBO``.
    The model may hold parameters and must not need enumeration.

    Raises:
        ValueError: if the guide has a site without a reparametrised sample.
        NotImplementedError: if the guide is a ``GuideMessenger``.

    References:
        Roeder et al. (2017), *Sticking the landing: simple, lower-variance gradient estimators for variational
        inference*; Vaitl et al. (2022), *Gradients should stay on path*.

    Example:
        >>> import pyro
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z.prod(), 0.5), obs=torch.tensor(1.0))
        >>> flow = Flow(dist.Normal(torch.zeros(2), 1.0).to_event(1), [affine_coupling(2)])
        >>> def guide():
        ...     pyro.module("flow", flow)
        ...     pyro.sample("z", flow())
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), PathELBO(num_particles=2))
        >>> isinstance(svi.step(), float)
        True
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        if not torch.is_grad_enabled():  # the value alone is wanted
            return super()._get_trace(model, guide, args, kwargs)
        if isinstance(poutine.unwrap(guide), Messenger):
            raise NotImplementedError("PathELBO: expected a guide that is a function or an AutoGuide, not a messenger.")
        runs: list[Trace] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            # the recorder keeps the subsamples, which Pyro prunes from its own trace
            with poutine.trace() as recorder, _FlowDraws():
                result = guide(*args, **kwargs)
            runs.append(recorder.trace)
            return result

        model_trace, guide_trace = super()._get_trace(model, recorded, args, kwargs)
        latents = [site for site in guide_trace.nodes.values() if _is_latent(site)]
        for site in latents:
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"PathELBO: every site of the guide needs a reparametrised sample, but '{site['name']}' is drawn "
                    f"from {type(site['fn']).__name__}. Use Trace_ELBO, or enumerate a discrete site in the model."
                )
        if not (len(latents) == 1 and isinstance(latents[0]["fn"], _Drawn)):
            _subtract_scores(guide, guide_trace, latents, runs[-1], args, kwargs)
        return model_trace, guide_trace


class _FlowDraws(Messenger):
    """Draws every site whose distribution is a flow of this library together with the gradient of its density."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        flow = _as_flow(msg["fn"])
        if flow is not None:
            msg["fn"] = drawn = _Drawn(flow.base_dist, flow.transforms)
            msg["value"], msg["done"] = drawn.draw(), True


class _Drawn(FlowDistribution):
    """A flow that has drawn one sample, and knows the density of that and its gradient."""

    _draw: tuple[Tensor, ScoreParts] | None = None  # a copy, such as an expanded one, has drawn nothing

    def draw(self) -> Tensor:
        value, log_prob, gradient = self.rsample_with_gradient()
        path = sum_rightmost(value * gradient, len(self.event_shape))
        # as the entropy term: the value of log q, and the derivative of the path
        self._draw = value, ScoreParts(log_prob, 0, log_prob + (path - path.detach()))
        return value

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        if self._draw is not None and self._draw[0] is x:
            return self._draw[1]
        return super().score_parts(x, *args, **kwargs)


def _as_flow(distribution: Distribution) -> FlowDistribution | None:
    """Return a distribution as a flow if all its layers are of this library and can score without noise."""
    if not isinstance(distribution, TransformedDistribution) or not distribution.has_rsample:
        return None
    layers = [with_one_pass(transform) for transform in distribution.transforms]
    for layer in layers:
        for leaf, inverse in layer.leaves():
            if isinstance(leaf, Foreign) or (leaf.draws_forward if inverse else leaf.draws_inverse):
                return None
    if isinstance(distribution, FlowDistribution):
        return distribution
    return FlowDistribution(distribution.base_dist, distribution.transforms)


def _is_subsample(site: Any) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _is_latent(site: Any) -> bool:
    """Whether a site of the guide draws something: subsamples do not count, nor functions of other sites."""
    if site["type"] != "sample" or site["is_observed"] or _is_subsample(site):
        return False
    distribution = site["fn"]
    while not isinstance(distribution, (Delta, TransformedDistribution)) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return not isinstance(distribution, Delta)


def _subtract_scores(
    guide: Callable[..., Any], guide_trace: Trace, latents: list[Any], run: Trace, args: Any, kwargs: Any
) -> None:
    """Subtract from the entropy terms of the latents the density of the same sample as a function of parameters alone.

    Both have the same value, and the gradient of their difference is that of the path.
    """
    names = {site["name"] for site in latents}
    fixed = Trace()
    for name, site in run.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and (name in names or _is_subsample(site)):
            fixed.add_node(name, **{**site, "value": site["value"].detach()})
    scores = poutine.trace(poutine.replay(guide, trace=fixed)).get_trace(*args, **kwargs)
    for site in latents:
        if isinstance(site["fn"], _Drawn):  # its density was a constant
            site["fn"]._draw = None
            del site["score_parts"]
    guide_trace.compute_score_parts()
    scores.compute_log_prob(lambda name, site: name in names)
    for site in latents:
        parts = site["score_parts"]
        score = scores.nodes[site["name"]]["log_prob"]
        site["score_parts"] = parts._replace(entropy_term=parts.log_prob - (score - score.detach()))
