r"""Layers that change the dimension: injected noise, and its inverse, which drops elements.

Injection is a map :math:`(x, e) \mapsto [x, e]` whose second argument is drawn, so its density is exact:
:math:`p(y) = p(x)\,p(e)`. Dropping is a marginal, and what was dropped must be guessed: a bound. Both in Nielsen,
Jaini, Hoogeboom, Winther and Welling (2020), *SurVAE flows*, section 3, as inference and generative slicing;
injection also in Huang, Dinh and Courville (2020), *Augmented normalizing flows*.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain as concatenate
from typing import Any

import torch
from pyro.distributions import ConditionalDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution, constraints

from pyro_invflows.base import positive_int, sum_rightmost
from pyro_invflows.compose import Inverted
from pyro_invflows.flow import Flow
from pyro_invflows.latents import NoiseInjection
from pyro_invflows.transforms.whitening import Whitening

__all__ = ["ConcatNoise", "Slice", "inject_noise", "whitened_noise"]


class ConcatNoise(NoiseInjection):
    r"""Adds elements, drawn from a noise distribution.

    .. math:: y = [x, e], \qquad e \sim p(e) \text{ or } p(e \mid x).

    Invertible, as a pair with its noise, because x and e both stand in y. Choose it to let a flow grow: a small base,
    data of a larger dimension. Forwards it draws, from torch's global generator, anew at each call.

    Density: **exact**. Its inverse, ``layer.inv`` or :class:`~pyro_invflows.Inverted`, is a :class:`Slice`, whose
    density is a bound.

    **Forward**: one sample of the noise. **Inverse**: drops e; free. **Log-det**: :math:`-\log p(e)`, with e read off
    y: by itself it makes :math:`\log p(y) = \log p(x) + \log p(e)`. **Identity**: never, the event grows.

    It composes through a list, :class:`~pyro_invflows.Chain` or :class:`~pyro_invflows.Flow`, never through torch's
    ``ComposeTransform``: that runs its parts again for the log-det, which draws other noise.

    Args:
        noise: A :class:`~pyro_invflows.Flow`, kept as a module, or a distribution with ``rsample`` and real vectors as
            its support, of which a flow is made: its arguments become buffers, so that ``.to()`` reaches them. It must
            have the input's dtype. A flow with conditional parts is conditioned on x.
        dim: Axis that grows; -1 for vectors, -3 for the channels of images. Noise with a one-dimensional event is then
            drawn for each pixel; otherwise its event is the image ``(k, H, W)``.
        name: Key of the noise in :meth:`Chain.latents`.
        input_dim: n, where it should be checked.

    Shape:
        ``(*B, n) -> (*B, n + k)``; with ``dim=-3`` ``(*B, n, H, W) -> (*B, n + k, H, W)``.

    Raises:
        TypeError: if the noise is no distribution or flow, cannot be rebuilt, has parameters that a copy would cut off
            (give those as ``Flow(..., trainable_base=True)``), or, in a call, has another dtype than the input.
        ValueError: if its support is not all real vectors, it has no ``rsample``, or its event does not fit.

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
                f"ConcatNoise: name must be a non-empty string other than 'base', which the base has, but got {name!r}."
            )
        self.name = name
        self.noise = _as_flow(noise)
        event = self._probe()
        self.noise_dim = event[0]
        #: Sizes of the noise's event behind ``dim``; empty where it is drawn for each pixel.
        self.noise_spatial = tuple(event[1:])
        self.pixelwise = len(event) == 1 and self.dim != -1

    def _probe(self) -> torch.Size:
        """Return the noise's event shape; refuse noise that cannot be injected."""
        if self.noise.is_conditional:
            if self.input_dim is None:
                widths = [getattr(part, "context_dim", None) for part in self.noise.transforms]
                self.input_dim = next((width for width in widths if width), None)
            if self.input_dim is None:
                raise ValueError("ConcatNoise: the width of the noise's context cannot be known; give input_dim.")
            d = self.noise(torch.zeros(self.input_dim, dtype=self._noise_dtype(), device=self._noise_tensor().device))
        else:
            d = self.noise()
        transform = d.transforms[0]
        # a layer on all real vectors says nothing about the range of what goes in
        support = [transform.codomain, d.base_dist.support if _is_real(transform.domain) else transform.codomain]
        if not all(map(_is_real, support)):
            raise ValueError(
                "ConcatNoise needs noise on all real vectors, but its support is "
                f"{next(s for s in support if not _is_real(s))}. Give a distribution with real support, or a Flow that "
                "maps it there, for example through Interval(low, high).inv."
            )
        if not d.has_rsample:
            raise ValueError(
                f"ConcatNoise needs noise with rsample, so that gradients pass through it, but {type(d.base_dist)} has "
                "none."
            )
        if d.batch_shape or len(d.event_shape) not in (1, -self.dim):
            raise ValueError(
                f"ConcatNoise needs noise without a batch shape and with {' or '.join(sorted({'1', str(-self.dim)}))} "
                f"event dimension(s) for dim={self.dim}, but got batch {tuple(d.batch_shape)} and event "
                f"{tuple(d.event_shape)}. Use .to_event(n)."
            )
        if self.noise.is_conditional and len(d.event_shape) != 1:
            raise ValueError(
                "ConcatNoise: noise conditional on x has a one-dimensional event, drawn for each pixel, but got "
                f"{tuple(d.event_shape)}."
            )
        return d.event_shape

    def _noise_tensor(self) -> Tensor:
        """Return a tensor that has the noise's dtype and device."""
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
                    f"{type(self).__name__}: the noise's event has {size} elements along dim {axis}, but the input "
                    f"{sizes[axis]}."
                )
        known = sizes.pop(self.dim, None)
        if known is not None and inverse:
            known -= self.noise_dim
            if known < 1:
                raise ValueError(
                    f"{type(self).__name__} holds {self.noise_dim} elements of noise along dim {self.dim}, so its "
                    f"output has more than that, but got {known + self.noise_dim}."
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
        if not value.is_floating_point():
            super()._check(value, inverse)
        self._event_shape(value.shape, -self.dim, inverse)
        dtype = self._noise_dtype()
        if dtype != value.dtype and not torch._C._is_any_autocast_enabled():
            raise TypeError(
                f"{type(self).__name__}: input and noise must have the same dtype, but got {value.dtype} and {dtype}. "
                f"Convert the layer with .to({value.dtype}) or the input with .to({dtype})."
            )

    # ------------------------------------------------------------------ hooks

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and e from y."""
        return y.split_with_sizes((y.shape[self.dim] - self.noise_dim, self.noise_dim), dim=self.dim)  # type: ignore

    def join(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return y from x and e; batch dimensions broadcast."""
        event = self._noise_event(x)
        if noise.shape[noise.dim() + self.dim :] != event:
            raise ValueError(
                f"{type(self).__name__}: the noise has events of shape {tuple(event)}, but got the shape "
                f"{tuple(noise.shape)}."
            )
        batch = torch.broadcast_shapes(x.shape[: self.dim], noise.shape[: self.dim])
        x, noise = (value.expand(*batch, *value.shape[self.dim :]) for value in (x, noise))
        return torch.cat([x, noise], dim=self.dim)

    def _noise_event(self, x: Tensor) -> torch.Size:
        return torch.Size((self.noise_dim, *x.shape[x.dim() + self.dim + 1 :]))

    def _given(self, x: Tensor) -> Distribution:
        """Return the distribution of the noise, conditioned on x where it is conditional; per pixel if pixelwise."""
        context = x.movedim(self.dim, -1) if self.pixelwise else x
        d = self.noise(context) if self.noise.is_conditional else self.noise()
        part: Distribution | None = d
        while part is not None:  # the value was drawn or checked, and looking at each element stops vmap
            part._validate_args = False
            part = getattr(part, "base_dist", None)
        return d

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.score == "sample":
            raise ValueError(
                'Slice(score="sample") scores nothing but the last point that it, or the chain that holds it, sampled '
                "itself, as the same tensor, in the same gradient mode and with the same parameters: of any other "
                'point it does not know what was dropped. Use score="data" for data.'
            )
        d = self._given(x)
        if self.noise.is_conditional:
            e = d.rsample()
        else:
            e = d.rsample(x.shape[: self.dim] + (x.shape[x.dim() + self.dim + 1 :] if self.pixelwise else ()))
        # e itself stays in aux: the noise's own layers know it and need not be inverted to score it
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
    r"""Drops elements; backwards it draws them from a noise distribution. The inverse of :class:`ConcatNoise`.

    .. math:: x = [y, e] \mapsto y, \qquad \log p(y) \approx \log p([y, e]) - \log r(e \mid y).

    Invertible only as a guess: e is gone, and r, the ``noise``, stands in for the posterior of e given y. Choose it to
    let a flow shrink, for example behind a :class:`ConcatNoise` in a guide.

    Density: a **bound**, by the choice of e, so the layer is told which:

    * ``score="data"`` draws a fresh e for each score: in expectation **below** the log-density, whatever was sampled
      before. Maximum likelihood. ``FlowDistribution.log_prob(y, num_particles=K)`` draws K and closes in on it.
    * ``score="sample"`` takes the e that was truly dropped: in expectation **above** the log-density, so that the ELBO
      of a guide remains a bound. It raises on anything but the last point sampled.

    **Forward**: drops; free. **Inverse**: one sample of the noise. **Log-det**: :math:`\log r(e \mid y)`.
    **Identity**: never, the event shrinks.

    Args:
        noise: r, as in :class:`ConcatNoise`; a flow with conditional parts is conditioned on what is kept.
        dim: Axis that shrinks.
        name: A name for the noise.
        score: ``"data"`` or ``"sample"``.
        input_dim: Number of elements that are **kept**, where it should be checked.

    Shape:
        ``(*B, n + k) -> (*B, n)``; with ``dim=-3`` ``(*B, n + k, H, W) -> (*B, n, H, W)``.

    Raises:
        ValueError: for an unknown score; as :class:`ConcatNoise`; with ``score="sample"``, for anything but the layer's
            own last sample.

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
    """Return noise as a module."""
    if isinstance(noise, Flow):
        return noise
    if not isinstance(noise, Distribution):
        hint = " Give it as a Flow." if isinstance(noise, ConditionalDistribution) else ""
        raise TypeError(
            f"ConcatNoise needs a Flow or a distribution as its noise, but got {type(noise).__name__}.{hint}"
        )
    if _needs_grad(noise):
        raise TypeError(
            f"ConcatNoise makes a module of its noise, which would cut this {type(noise).__name__} off from its "
            "tensors that require gradients. Give a Flow(noise, [], trainable_base=True), which learns them itself."
        )
    if isinstance(noise, TransformedDistribution):
        return Flow(noise.base_dist, noise.transforms)
    return Flow(noise, [])


def _is_real(constraint: constraints.Constraint) -> bool:
    while hasattr(constraint, "base_constraint"):  # independent ones, and those of mixtures
        constraint = constraint.base_constraint
    return constraint is constraints.real


def _needs_grad(distribution: Distribution) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, Distribution) and _needs_grad(value)
        for value in vars(distribution).values()
    )


def whitened_noise(
    noise_dim: int, *, method: str = "zca", shrinkage: float | str = "oas", trainable: bool = False
) -> Flow:
    """Build noise of a given mean and covariance: standard normal, coloured by a :class:`Whitening`.

    It starts as standard normal noise. Restore what was injected with ``chain.latents(y)``, show it to
    ``noise.transforms[0].observe(e)`` and call ``noise.transforms[0].adapt()``.

    Args:
        noise_dim: k.
        method: As in :class:`Whitening`.
        shrinkage: As in :class:`Whitening`.
        trainable: As in :class:`Whitening`.

    Example:
        >>> noise = whitened_noise(3)
        >>> noise().sample((5,)).shape, type(noise.transforms[0]).__name__
        (torch.Size([5, 3]), 'Whitening')
    """
    positive_int(noise_dim, "noise_dim", "whitened_noise")
    base = Independent(Normal(torch.zeros(noise_dim), torch.ones(noise_dim)), 1)
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

    Example:
        >>> layer = inject_noise(3, 2, name="e")
        >>> layer(torch.randn(5, 3)).shape
        torch.Size([5, 5])
    """
    noise = whitened_noise(noise_dim, method=method, shrinkage=shrinkage, trainable=trainable)
    return ConcatNoise(noise, dim=dim, name=name, input_dim=input_dim)
