"""Flows: a base distribution and layers as one module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from pyro.distributions import ConditionalDistribution
from pyro.distributions.conditional import ConditionalTransform
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_invflows.core.chain import Chain
from pyro_invflows.core.distribution_module import DistributionModule, kind_of, refuse_gradients
from pyro_invflows.core.flow_distribution import FlowDistribution
from pyro_invflows.core.initialize import fit_layers
from pyro_invflows.core.rebind import settled
from pyro_invflows.networks.network import restart
from pyro_invflows.support.checks import described, floating_tensor

__all__ = ["Flow"]


class Flow(nn.Module):
    """A base distribution and layers as one module.

    ``flow()`` returns the distribution, ``flow(context)`` (or ``flow.condition(context)``) the conditioned one. The
    base's arguments become buffers or parameters, so that ``.to()``, ``.parameters()``, ``state_dict()`` and
    ``pyro.module`` act on the whole.

    Args:
        base: The base distribution. Each call rebuilds it from its arguments (``arg_constraints``), also inside
            ``Independent`` and mixtures. On the meta device, which holds no values to validate, build it with
            ``validate_args=False``.
        transforms: Transforms and conditional transforms, beginning with the one next to the base.
        trainable_base: Make the base's arguments parameters of the flow, in unconstrained form. They start as copies
            of the base's values.

    Attributes:
        base: Module that holds the base's arguments under their own names, as buffers, or as unconstrained parameters
            if ``trainable_base``.
        transforms: The layers: a :class:`Chain`, or a ``ModuleList`` if one of them is conditional.

    Shape:
        Samples ``(*B, *E)``, where E is an event of the last layer; the log-density is ``(*B,)``.

    Raises:
        TypeError: if the base is not a distribution or cannot be rebuilt from its arguments; if these require gradients
            and ``trainable_base`` is not set (the flow holds copies, so the caller's tensors would never be trained);
            or if a part is not a transform.
        ValueError: if the base is discrete; if base and layers do not fit; if a context is given to a flow without
            conditional parts, or missing for a flow with them.

    Example:
        >>> flow = Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), [Orthogonal(3), affine_coupling(3)])
        >>> flow().sample((5,)).shape, flow().log_prob(torch.randn(5, 3)).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        base: Distribution,
        transforms: Transform | ConditionalTransform | Iterable[Transform | ConditionalTransform],
        *,
        trainable_base: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(transforms, Distribution) and not isinstance(base, Distribution):
            raise TypeError("Flow: the base distribution comes first, then the layers: Flow(base, layers).")
        if isinstance(transforms, (Transform, ConditionalTransform)) or not isinstance(transforms, Iterable):
            transforms = [transforms]
        parts: list[Any] = list(transforms)
        for part in parts:
            if not isinstance(part, (Transform, ConditionalTransform)):
                raise TypeError(f"Flow: expected a transform, got {described(part)}")
        _check_base(base, trainable_base)
        self.base = DistributionModule(base, trainable_base)
        self.is_conditional = any(isinstance(part, ConditionalTransform) for part in parts)
        self.transforms: Chain | nn.ModuleList
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        if self.is_conditional:
            parts = [part if isinstance(part, ConditionalTransform) else Chain([part]) for part in parts]
            for part in parts:
                if not isinstance(part, nn.Module):
                    raise TypeError(
                        f"Flow: expected conditional transforms that are modules, got {type(part).__name__}; derive it "
                        "from pyro.distributions.ConditionalTransformModule."
                    )
            self.transforms = nn.ModuleList(parts)
        else:
            self.transforms = parts[0] if len(parts) == 1 and isinstance(parts[0], Chain) else Chain(parts)
            # This raises if base and layers do not fit. The shapes are kept: torch's constructor would recompute them.
            base_now = self.base()
            _check_event(base_now, self.transforms)
            whole = FlowDistribution(base_now, [self.transforms])
            if whole.base_dist is base_now:
                self._shapes = whole.batch_shape, whole.event_shape

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution, conditioned if a context is given."""
        if context is not None:
            return self.condition(context)
        if self.is_conditional:
            raise ValueError("This Flow has conditional parts: call it with a context, flow(context).")
        transforms = self._transforms_now()
        if self._shapes is None:
            return FlowDistribution(self.base(), [transforms])
        new = FlowDistribution.__new__(FlowDistribution)  # as torch's own expand() does
        new.base_dist, new.transforms = self.base(), [transforms]
        Distribution.__init__(new, *self._shapes, validate_args=False)
        new._validate_args = FlowDistribution._validate_args
        return new

    def _transforms_now(self) -> Any:
        return settled(self.transforms) if isinstance(self, PyroModule) else self.transforms

    def condition(self, context: Tensor) -> FlowDistribution:
        """Return the distribution for a context ``(*B, context_dim)``; its batch shape is B.

        Raises:
            ValueError: if no part takes a context, or if its batch shape does not broadcast with the base's.
        """
        if not self.is_conditional:
            raise ValueError(
                "This Flow has no conditional part, so it takes no context: call flow(). A layer becomes conditional "
                "as Conditional(layer, context_dim), or by its factory conditional_...(); context_dim=... alone is "
                "not enough."
            )
        chain = Chain(
            part.condition(context) if isinstance(part, ConditionalTransform) else cast(Transform, part)
            for part in self._transforms_now()
        )
        base = self.base()
        _check_event(base, chain)
        try:
            d = FlowDistribution(base, [chain])
        except RuntimeError as error:
            batch = (base.batch_shape + base.event_shape)[: -chain.domain.event_dim or None]
            raise ValueError(
                f"Flow: the batch shapes of the base, {tuple(batch)}, and of the context, {tuple(context.shape[:-1])}, "
                "must broadcast. Give a context for each element of the base's batch, or a base without a batch shape."
            ) from error
        if d.batch_shape != torch.broadcast_shapes(context.shape[:-1], d.batch_shape):
            raise ValueError(
                "Flow: the batch shape of the distribution must include that of the context, "
                f"{tuple(context.shape[:-1])}, but is {tuple(d.batch_shape)}. Either a conditional part has fewer "
                f"event dimensions than the whole (build it with Conditional(..., event_dim={len(d.event_shape)})), or "
                "it is a foreign one that does not report the batch shape of its context (use a conditional_* factory "
                "of this library)."
            )
        return d

    def initialize(self, data: Tensor, context: Tensor | None = None) -> Flow:
        """Initialise the layers that are fitted to data, such as ``ActNorm`` and ``Whitening``; return the flow.

        The data pass through the flow once, from the last layer to the base. Every layer that has a method ``fit`` is
        fitted to the values that reach its output, and then passes them on. What a layer does with the processes of
        ``torch.distributed``, it does here as well: ``ActNorm`` and ``Whitening`` take the rows of all of them.

        In a :class:`Conditional`, the template is fitted as if the hypernetwork returned zeros, as a new one does; the
        values then pass through the layer that is conditioned on the context. A ``ConcatNoise`` drops its noise, which
        stays as it is; a ``Slice`` draws what it had dropped. A layer inside :class:`Inverted` is not fitted, with a
        warning, because the data reach its input.

        Args:
            data: ``(*N, *E)``, where E is an event of the flow.
            context: ``(*N, context_dim)``, if the flow is conditional.

        Raises:
            TypeError: if the data are not a floating point tensor of the layers' dtype.
            ValueError: if a context is missing or not needed; if a layer refuses the values that reach it (the layers
                behind it are then fitted already).

        Example:
            >>> flow = Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), [ActNorm(3), Orthogonal(3), ActNorm(3)])
            >>> data = 5.0 + 3.0 * torch.randn(1000, 3)
            >>> z = flow.initialize(data).transforms.inv(data)
            >>> torch.allclose(z.mean(0), torch.zeros(3), atol=1e-5), torch.allclose(z.std(0), torch.ones(3))
            (True, True)
        """
        floating_tensor(data, "data", "Flow.initialize")
        if self.is_conditional and context is None:
            raise ValueError(
                "Flow.initialize: a flow with conditional parts needs a context; call initialize(data, context)."
            )
        if context is not None and not self.is_conditional:
            raise ValueError("Flow.initialize: this flow has no conditional part; call initialize(data).")
        for part in reversed(self.transforms) if self.is_conditional else [self.transforms]:
            data = fit_layers(part, data, context)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("log_prob", "sample", "rsample", "rsample_and_log_prob"):
            raise AttributeError(f"A Flow is a module; its distribution is flow(), so call flow().{name}(...).")
        return super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Restore the initial state of all layers. The base keeps its arguments, even if they are trainable."""
        restart(self.transforms)

    def clear_cache(self) -> None:
        """Forget the layers' last evaluations."""
        for part in [self.transforms] if isinstance(self.transforms, Chain) else self.transforms:
            clear = getattr(part, "clear_cache", None)
            if clear is not None:
                clear()


def _check_base(base: Any, trainable: bool) -> None:
    """Refuse a base that layers cannot transform, or whose tensors require gradients that a copy would not get."""
    if not isinstance(base, Distribution):
        raise TypeError(f"Flow: expected a distribution as the base, got {type(base).__name__}.")
    try:
        discrete = base.support.is_discrete  # type: ignore[union-attr]
    except (NotImplementedError, AttributeError):  # a distribution need not define its support
        discrete = False
    if discrete:
        raise ValueError(
            f"Flow: the base must be continuous, because layers transform a density, but {kind_of(base)} is "
            "discrete. Use a continuous base, such as Normal."
        )
    if not trainable:
        refuse_gradients(
            base,
            "Flow",
            "Flow(base, ..., trainable_base=True) learns copies of its own; TransformedDistribution(base, ...) keeps "
            "the tensors that it was given.",
        )


def _check_event(base: Distribution, layers: Chain) -> None:
    """Refuse a base with fewer dimensions than an event of the layers."""
    event_dim = layers.domain.event_dim
    if len(base.batch_shape) + len(base.event_shape) < event_dim:
        sizes = layers.trace_event({}, inverse=True)
        known = [str(sizes.get(axis, "n")) for axis in range(-event_dim, 0)]
        raise ValueError(
            f"Flow: the layers work on events with {event_dim} dimension(s), but the base, {kind_of(base)}, has the "
            f"shape {tuple(base.batch_shape + base.event_shape)}. Give it the shape of an event, as in "
            f"Normal(torch.zeros({', '.join(known)}), 1.0).to_event({event_dim})."
        )


# Registered, not inherited: the metaclass of Pyro's abstract class would clash with that of PyroModule[Flow].
ConditionalDistribution.register(Flow)
