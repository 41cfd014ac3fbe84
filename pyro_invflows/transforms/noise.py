r"""Layers that change the dimension: one injects noise; its inverse drops elements.

Injection is the map :math:`(x, e) \mapsto [x, e]` with a random second argument, so its density is exact:
:math:`p(y) = p(x)\,p(e)`. Dropping elements gives a marginal density; what was dropped must be inferred, so only a
bound is available. Both are in Nielsen, Jaini, Hoogeboom, Winther and Welling (2020), *SurVAE flows*, section 3, as
inference and generative slicing; injection is also in Huang, Dinh and Courville (2020), *Augmented normalizing flows*.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain as concatenate
from typing import Any

import torch
from pyro.distributions import ConditionalDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution, constraints

from pyro_invflows.core.distribution_module import refuse_gradients
from pyro_invflows.core.events import sum_rightmost
from pyro_invflows.core.flow import Flow
from pyro_invflows.core.foreign import as_bijection
from pyro_invflows.core.inverted import Inverted
from pyro_invflows.core.latents import ONLY_OWN_SAMPLE, NoiseInjection, is_exact
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.modes import is_any_autocast
from pyro_invflows.transforms.whitening import Whitening

__all__ = ["ConcatNoise", "Slice", "inject_noise", "whitened_noise"]


class ConcatNoise(NoiseInjection):
    r"""Appends elements drawn from a noise distribution.

    .. math:: y = [x, e], \qquad e \sim p(e) \text{ or } p(e \mid x).

    Invertible as a function of x and e, because y holds both. Choose it to let a flow grow, from a small base to data
    of a larger dimension. Each forward pass draws new noise, with torch's global generator.

    The density is **exact**. The inverse, ``layer.inv`` or :class:`~pyro_invflows.Inverted`, is a :class:`Slice`, whose
    density is a bound.

    **Forward**: draws one sample of the noise. **Inverse**: drops e, at no cost. **Log-det**: :math:`-\log p(e)`, where
    e is read from y, so that :math:`\log p(y) = \log p(x) + \log p(e)` as for any other layer. **Identity**: never,
    because the event grows.

    Compose it by a list, :class:`~pyro_invflows.Chain` or :class:`~pyro_invflows.Flow`, never by torch's
    ``ComposeTransform``, which evaluates its parts again for the log-det and so draws different noise.

    Args:
        noise: A :class:`~pyro_invflows.Flow`, or a distribution with ``rsample`` whose support is all real vectors. A
            distribution is turned into a flow: its arguments become buffers, so that ``.to()`` moves them. The noise
            must have the dtype of the input. A flow with conditional parts is conditioned on x; its parts must accept a
            batch of contexts, as those of this library do. Pyro's would draw the same noise for all contexts, so they
            are refused.
        dim: Axis that grows: -1 for vectors, -3 for the channels of images. For images, noise with a one-dimensional
            event is drawn for each pixel; otherwise its event is an image ``(k, H, W)``.
        name: Key of the noise in :meth:`Chain.latents`.
        input_dim: Size n of an event of the input along ``dim``, if it is to be checked.

    Attributes:
        noise: The noise as a :class:`~pyro_invflows.Flow`, with its parameters and buffers.

    Shape:
        ``(*B, n) -> (*B, n + k)``; with ``dim=-3``, ``(*B, n, H, W) -> (*B, n + k, H, W)``; log-det ``(*B,)``.

    Raises:
        TypeError: if the noise is neither a distribution nor a flow; if it cannot be rebuilt; if it has parameters,
            which a copy would detach (pass a ``Flow(..., trainable_base=True)`` instead); in a call, if it has another
            dtype than the input.
        ValueError: if the support of the noise is not all real vectors; if it has no ``rsample``; if only a bound of
            its density is known (a flow that holds a :class:`Slice`); if its event does not fit.

    References:
        Nielsen et al. (2020), *SurVAE flows*, section 3; Huang et al. (2020), *Augmented normalizing flows*, Eq. 4.

    Example:
        >>> noise = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> layer = ConcatNoise(noise)
        >>> x = torch.randn(5, 3)
        >>> y = layer(x)
        >>> y.shape, torch.equal(layer.inv(y.clone()), x)
        (torch.Size([5, 5]), True)
        >>> torch.allclose(layer.log_abs_det_jacobian(x, y), -noise.log_prob(y[:, 3:]))
        True
    """

    def __init__(
        self,
        noise: Flow | Distribution,
        *,
        dim: int = -1,
        name: str | None = None,
        input_dim: int | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        if name is not None and (not isinstance(name, str) or name in ("", "base")):
            raise ValueError(
                "ConcatNoise: name must be a non-empty string other than 'base', the key of the base, but got "
                f"{name!r}."
            )
        self.name = name
        self.noise = _as_flow(noise)
        event = self._probe()
        self.noise_dim = event[0]
        #: Sizes of the noise's event after ``dim``; empty if the noise is drawn for each pixel.
        self.noise_spatial = tuple(event[1:])
        self.pixelwise = len(event) == 1 and self.dim != -1

    def _probe(self) -> torch.Size:
        """Return the event shape of the noise; raise an error if the noise cannot be injected."""
        if self.noise.is_conditional:
            if self.input_dim is None:
                widths = [getattr(part, "context_dim", None) for part in self.noise.transforms]
                self.input_dim = next((width for width in widths if width), None)
            if self.input_dim is None:
                raise ValueError(
                    "ConcatNoise: the width of the context must be known for conditional noise, but its parts do not "
                    "tell it; give input_dim."
                )
            d = self.noise(torch.zeros(self.input_dim, dtype=self._noise_dtype(), device=self._noise_tensor().device))
        else:
            d = self.noise()
        self._accept_density(d)
        if d.batch_shape or len(d.event_shape) not in (1, -self.dim):
            raise ValueError(
                "ConcatNoise: the noise must have no batch shape and "
                f"{' or '.join(sorted({'1', str(-self.dim)}))} event dimension(s) for dim={self.dim}, but got the "
                f"batch shape {tuple(d.batch_shape)} and the event shape {tuple(d.event_shape)}. Use .to_event(n)."
            )
        if self.noise.is_conditional and len(d.event_shape) != 1:
            raise ValueError(
                "ConcatNoise: noise that is conditional on x must have a one-dimensional event, drawn for each pixel, "
                f"but got the event shape {tuple(d.event_shape)}."
            )
        return d.event_shape

    def _accept_density(self, d: TransformedDistribution) -> None:
        """Check that the noise is a reparametrised density on all real vectors; record whether it is exact."""
        transform = as_bijection(d.transforms[0])
        # a layer with all real vectors as its domain and codomain maps the base's support onto an unknown set
        support = [transform.codomain, d.base_dist.support if _is_real(transform.domain) else transform.codomain]
        if not all(map(_is_real, support)):
            raise ValueError(
                "ConcatNoise: the support of the noise must be all real vectors, but got "
                f"{next(s for s in support if not _is_real(s))}. Use a distribution with real support, or a Flow that "
                "maps onto it, for example by Interval(low, high).inv."
            )
        if any(isinstance(leaf, NoiseInjection) and inverse for leaf, inverse in transform.leaves()):
            raise ValueError(
                "ConcatNoise: the density of the noise must be known, but the flow holds a Slice, which has only a "
                "bound of it. Use noise without a Slice."
            )
        if not d.has_rsample:
            raise ValueError(
                "ConcatNoise: the noise must have rsample, so that gradients pass through it, but "
                f"{type(d.base_dist).__name__} does not. Use a reparametrised distribution, such as Normal."
            )
        self.exact = is_exact(transform)  # False if a layer of the noise estimates its log-det

    def _noise_tensor(self) -> Tensor:
        """Return a tensor with the dtype and device of the noise."""
        tensors = concatenate(self.noise.base.parameters(), self.noise.base.buffers(), self.noise.parameters())
        return next((t for t in tensors if t.is_floating_point()), torch.empty(()))

    def _noise_dtype(self) -> torch.dtype:
        return self._noise_tensor().dtype

    # ------------------------------------------------------------------ shapes and checks

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        sizes = dict(sizes)
        for axis, size in enumerate(self.noise_spatial, start=self.dim + 1):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{type(self).__name__}: the noise's event has {size} elements along dim {axis}, so the input must "
                    f"have as many, but got {sizes[axis]}."
                )
        known = sizes.pop(self.dim, None)
        if known is not None and inverse:
            known -= self.noise_dim
            if known < 1:
                raise ValueError(
                    f"{type(self).__name__}: the output (the input of a Slice) includes {self.noise_dim} elements of "
                    f"noise along dim {self.dim}, so it must have more than that, but got {known + self.noise_dim}."
                )
        kept = self.input_dim if known is None else known
        if kept is not None:
            if self.input_dim not in (None, kept):
                raise ValueError(
                    f"{type(self).__name__} adds noise to events with {self.input_dim} elements along dim {self.dim}, "
                    f"but got {kept}" + (f" and {self.noise_dim} of noise." if inverse else ".")
                )
            sizes[self.dim] = kept if inverse else kept + self.noise_dim
        return sizes

    def _check(self, value: Tensor, inverse: bool) -> None:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            super()._check(value, inverse)  # raises
        self.check_event(value.shape, inverse)
        dtype = self._noise_dtype()
        if dtype != value.dtype and not is_any_autocast():
            raise TypeError(
                f"{type(self).__name__}: input and noise must have the same dtype, but got {value.dtype} and {dtype}. "
                f"Convert the layer with .to({value.dtype}) or the input with .to({dtype})."
            )

    # ------------------------------------------------------------------ hooks

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Split y into x and e."""
        return y.split_with_sizes((y.shape[self.dim] - self.noise_dim, self.noise_dim), dim=self.dim)  # type: ignore[return-value]

    def join(self, x: Tensor, noise: Tensor) -> Tensor:
        """Join x and e into y; batch dimensions broadcast."""
        if not isinstance(noise, Tensor) or noise.dtype != x.dtype:
            kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"{type(self).__name__}: the noise must be a tensor of {x.dtype}, as x is, but got {kind}.")
        event = (self.noise_dim, *x.shape[x.dim() + self.dim + 1 :])
        if noise.shape[noise.dim() + self.dim :] != event:
            raise ValueError(
                f"{type(self).__name__}: events of the noise must have the shape {event}, but got a tensor of shape "
                f"{tuple(noise.shape)}."
            )
        try:
            batch = torch.broadcast_shapes(x.shape[: self.dim], noise.shape[: self.dim])
        except RuntimeError:
            raise ValueError(
                f"{type(self).__name__}: the batch dimensions of noise and x must broadcast, but got "
                f"{tuple(noise.shape[: self.dim])} and {tuple(x.shape[: self.dim])}."
            ) from None
        x, noise = (value.expand(*batch, *value.shape[self.dim :]) for value in (x, noise))
        return torch.cat([x, noise], dim=self.dim)

    def _given(self, x: Tensor) -> Distribution:
        """Return the distribution of the noise, conditioned on x if it is conditional; per pixel if pixelwise."""
        context = x.movedim(self.dim, -1) if self.pixelwise else x
        d = self.noise(context) if self.noise.is_conditional else self.noise()
        part: Distribution | None = d
        while part is not None:  # values are drawn or already checked, and torch's check of each element fails in vmap
            part._validate_args = False
            part = getattr(part, "base_dist", None)
        return d

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.score == "sample":
            raise ValueError(ONLY_OWN_SAMPLE)
        d = self._given(x)
        if self.noise.is_conditional:
            e = d.rsample()
        else:
            e = d.rsample(x.shape[: self.dim] + (x.shape[x.dim() + self.dim + 1 :] if self.pixelwise else ()))
        # keep e itself in the aux: the memos of the noise's layers know it, so that scoring e inverts none of them
        return torch.cat([x, e.movedim(-1, self.dim) if self.pixelwise else e], dim=self.dim), (d, e)

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        x, e = self.split(y)
        return x, (None, e.movedim(self.dim, -1) if self.pixelwise else e)

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        return self._inverse_aux(y)[1]

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        d, e = aux
        log_prob = (self._given(x) if d is None else d).log_prob(e)
        return -sum_rightmost(log_prob, -self.dim - 1 if self.pixelwise else 0)

    def extra_repr(self) -> str:
        parts = [f"noise_dim={self.noise_dim}"]
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        if self.name is not None:
            parts.append(f"name={self.name!r}")
        if self.input_dim is not None:
            parts.insert(0, f"input_dim={self.input_dim}")
        return ", ".join(parts)


class Slice(Inverted):
    r"""Drops elements; the inverse draws them from a noise distribution. The inverse of :class:`ConcatNoise`.

    .. math:: x = [y, e] \mapsto y, \qquad \log p(y) \approx \log p([y, e]) - \log r(e \mid y).

    Invertible only approximately: e is lost, and the ``noise`` r takes the place of the posterior of e given y.
    Choose it to let a flow shrink, for example after a :class:`ConcatNoise` in a guide.

    The density is a **bound**. Its direction depends on the e at which it is evaluated, which ``score`` determines:

    * ``score="data"`` draws a new e for each score. The result is in expectation **below** the log-density, whatever
      was sampled before. Use it for maximum likelihood. ``FlowDistribution.log_prob(y, num_particles=K)`` draws K
      samples of e, for a tighter bound.
    * ``score="sample"`` uses the e that was actually dropped. The result is in expectation **above** the log-density,
      so that the ELBO of a guide remains a lower bound. It raises an error for anything but the last point that was
      sampled, as the same tensor. A change of the base, or of neighbouring layers in a plain list, goes unnoticed (a
      :class:`~pyro_invflows.Chain` does notice changes of its parts): after an optimiser step, sample again before you
      score, as ``SVI`` does.

    ``kl_divergence`` of two flows that share a ``Slice`` raises ``NotImplementedError``, because the divergence of
    their bases includes that of the dropped elements. torch's own rule for two plain ``TransformedDistribution``
    returns this value nevertheless; it is an upper bound.

    **Forward**: drops e, at no cost. **Inverse**: draws one sample of the noise.
    **Log-det**: :math:`\log r(e \mid y)`. **Identity**: never, because the event shrinks.

    Args:
        noise: r, as in :class:`ConcatNoise`; a flow with conditional parts is conditioned on the elements kept.
        dim: Axis that shrinks.
        name: A name for the noise.
        score: ``"data"`` or ``"sample"``.
        input_dim: Number of elements that are **kept**, if it is to be checked.

    Attributes:
        layer: The :class:`ConcatNoise` that this layer inverts; ``layer.noise`` holds the parameters of r.

    Shape:
        ``(*B, n + k) -> (*B, n)``; with ``dim=-3``, ``(*B, n + k, H, W) -> (*B, n, H, W)``; log-det ``(*B,)``.

    Raises:
        TypeError: as in :class:`ConcatNoise`.
        ValueError: if the score is unknown; as in :class:`ConcatNoise`; with ``score="sample"``, for anything but the
            layer's own last sample.

    References:
        Nielsen et al. (2020), *SurVAE flows*, Eq. 9 and Table 2; Burda et al. (2016), *Importance weighted
        autoencoders*, for several particles.

    Example:
        >>> layer = Slice(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        >>> layer(torch.randn(5, 3)).shape, layer.inv(torch.randn(5, 1)).shape, layer.exact
        (torch.Size([5, 1]), torch.Size([5, 3]), False)
    """

    layer: ConcatNoise

    def __init__(
        self,
        noise: Flow | Distribution,
        *,
        dim: int = -1,
        name: str | None = None,
        score: str = "data",
        input_dim: int | None = None,
        cache_size: int = 1,
    ) -> None:
        if score not in ("data", "sample"):
            raise ValueError(f"Slice: score must be 'data' or 'sample', but got {score!r}.")
        layer = ConcatNoise(noise, dim=dim, name=name, input_dim=input_dim, cache_size=cache_size)
        layer.score = score
        super().__init__(layer, cache_size=cache_size)

    @property
    def score(self) -> str:
        """``"data"`` or ``"sample"``."""
        return self.layer.score

    def extra_repr(self) -> str:
        return f"score={self.score!r}"


def _as_flow(noise: Any) -> Flow:
    """Return the noise as a Flow."""
    if isinstance(noise, Flow):
        return noise
    if not isinstance(noise, Distribution):
        hint = " Pass it as a Flow." if isinstance(noise, ConditionalDistribution) else ""
        raise TypeError(f"ConcatNoise: noise must be a Flow or a distribution, but got {type(noise).__name__}.{hint}")
    refuse_gradients(
        noise, "ConcatNoise", "Pass a Flow(noise, [], trainable_base=True), which learns its own copies of them."
    )
    if isinstance(noise, TransformedDistribution):
        return Flow(noise.base_dist, noise.transforms)
    return Flow(noise, [])


def _is_real(constraint: Any) -> bool:
    while hasattr(constraint, "base_constraint"):  # constraints.independent, and the supports of mixtures
        constraint = constraint.base_constraint
    return constraint is constraints.real


def whitened_noise(
    noise_dim: int, *, method: str = "zca", shrinkage: float | str = "oas", trainable: bool = False
) -> Flow:
    """Build noise whose mean and covariance come from data: standard normal, coloured by a :class:`Whitening`.

    Initially the noise is standard normal. To adapt it, recover the injected noise e with ``chain.latents(y)``, pass it
    to ``noise.transforms[0].observe(e)``, and call ``noise.transforms[0].adapt()``.

    Args:
        noise_dim: Number k of elements of the noise.
        method: As in :class:`Whitening`.
        shrinkage: As in :class:`Whitening`.
        trainable: As in :class:`Whitening`.

    Example:
        >>> noise = whitened_noise(3)
        >>> noise().sample((5,)).shape, type(noise.transforms[0]).__name__
        (torch.Size([5, 3]), 'Whitening')
    """
    noise_dim = positive_int(noise_dim, "noise_dim", "whitened_noise")
    # validation is not needed, and is impossible on the meta device
    base = Independent(Normal(torch.zeros(noise_dim), torch.ones(noise_dim), validate_args=False), 1)
    return Flow(base, [Whitening(noise_dim, method=method, shrinkage=shrinkage, trainable=trainable)])


def inject_noise(
    input_dim: int,
    noise_dim: int,
    *,
    method: str = "zca",
    shrinkage: float | str = "oas",
    trainable: bool = False,
    dim: int = -1,
    name: str | None = None,
) -> ConcatNoise:
    """Build a :class:`ConcatNoise` that injects :func:`whitened_noise`.

    Args:
        input_dim: Size of an event of the input along ``dim``.
        noise_dim: Number of elements that are added.
        method: As in :class:`Whitening`.
        shrinkage: As in :class:`Whitening`.
        trainable: As in :class:`Whitening`.
        dim: As in :class:`ConcatNoise`.
        name: As in :class:`ConcatNoise`.

    Example:
        >>> layer = inject_noise(3, 2, name="e")
        >>> layer(torch.randn(5, 3)).shape
        torch.Size([5, 5])
    """
    noise = whitened_noise(noise_dim, method=method, shrinkage=shrinkage, trainable=trainable)
    return ConcatNoise(noise, dim=dim, name=name, input_dim=input_dim)
