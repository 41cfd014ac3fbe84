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
from pyro_invflows.core.distribution_module import DistributionModule, refuse_gradients
from pyro_invflows.core.flow_distribution import FlowDistribution
from pyro_invflows.core.rebind import settled

__all__ = ["Flow"]


class Flow(nn.Module):
    """A base distribution and layers as one module.

    ``flow()`` is the distribution, ``flow(context)`` (or ``flow.condition(context)``) the conditioned one. The
    base's arguments become buffers, or parameters, so that ``.to()``, ``.parameters()``, ``state_dict()`` and
    ``pyro.module`` act on the whole.

    Args:
        base: The base distribution. It is rebuilt at each call from its arguments (:attr:`arg_constraints`), also
            inside ``Independent`` and mixtures. On the meta device, where torch has no values to check, make it with
            ``validate_args=False``.
        transforms: Transforms and conditional transforms, the one next to the base first.
        trainable_base: Make the base's arguments parameters of the flow, in unconstrained form. They start as copies
            of the base's values.

    Raises:
        TypeError: if the base cannot be rebuilt from its arguments, if these require gradients and ``trainable_base``
            is not set (the flow holds copies, so the caller's tensors would never be trained), or if a part is not a
            transform.
        ValueError: if base and layers do not fit; if a context is given to a flow without conditional parts, or
            missing in one with them.

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
        if isinstance(transforms, (Transform, ConditionalTransform)):
            transforms = [transforms]
        parts = list(transforms)
        if isinstance(base, Distribution) and not trainable_base:
            refuse_gradients(
                base,
                "Flow",
                "Flow(base, ..., trainable_base=True) learns copies of its own; TransformedDistribution(base, ...) "
                "keeps the tensors that it is given.",
            )
        self.base = DistributionModule(base, trainable_base)
        self.is_conditional = any(isinstance(part, ConditionalTransform) for part in parts)
        self.transforms: Chain | nn.ModuleList
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        if self.is_conditional:
            parts = [part if isinstance(part, ConditionalTransform) else Chain([part]) for part in parts]
            for part in parts:
                if not isinstance(part, nn.Module):
                    raise TypeError(f"Flow needs conditional transforms that are modules, but got {type(part)}.")
            self.transforms = nn.ModuleList(parts)
        else:
            self.transforms = parts[0] if len(parts) == 1 and isinstance(parts[0], Chain) else Chain(parts)
            # Base and layers fit, or this says so. Its shapes serve every call: torch's constructor walks them anew.
            base_now = self.base()
            whole = FlowDistribution(base_now, [self.transforms])
            if whole.base_dist is base_now:
                self._shapes = whole.batch_shape, whole.event_shape

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution, conditioned where a context is given."""
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
            ValueError: if no part takes a context.
        """
        if not self.is_conditional:
            raise ValueError(
                "This Flow has no conditional part, so it takes no context: call flow(). A layer becomes conditional "
                "as Conditional(layer, context_dim), or by its factory conditional_...(); context_dim=... alone will "
                "not do."
            )
        chain = Chain(
            part.condition(context) if isinstance(part, ConditionalTransform) else cast(Transform, part)
            for part in self._transforms_now()
        )
        d = FlowDistribution(self.base(), [chain])
        if d.batch_shape != torch.broadcast_shapes(context.shape[:-1], d.batch_shape):
            raise ValueError(
                f"Flow: for a context with the batch shape {tuple(context.shape[:-1])} the distribution has "
                f"{tuple(d.batch_shape)}: a conditional part has fewer event dimensions than the whole (build it with "
                f"Conditional(..., event_dim={len(d.event_shape)})), or is a foreign one that does not say which batch "
                "it was conditioned on (use the conditional_* factories here)."
            )
        return d

    def __getattr__(self, name: str) -> Any:
        if name in ("log_prob", "sample", "rsample", "rsample_and_log_prob"):
            raise AttributeError(f"A Flow is a module; its distribution is flow(), so call flow().{name}(...).")
        return super().__getattr__(name)

    def clear_cache(self) -> None:
        """Forget the layers' last evaluations."""
        for part in [self.transforms] if isinstance(self.transforms, Chain) else self.transforms:
            clear = getattr(part, "clear_cache", None)
            if clear is not None:
                clear()


# Registered, not inherited: the metaclass of Pyro's abstract class would clash with that of PyroModule[Flow].
ConditionalDistribution.register(Flow)
