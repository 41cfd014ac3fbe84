"""Flows: a base distribution and layers as one module, and a distribution that scores in one pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from pyro.distributions import ConditionalDistribution, TransformedDistribution
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, constraints, transform_to

from pyro_invflows.base import Bijection, call_and_ladj, inv_and_ladj, sum_rightmost
from pyro_invflows.checks import positive_int
from pyro_invflows.compose import Chain
from pyro_invflows.latents import NoiseInjection, leaves, noise_flags

__all__ = ["Flow", "FlowDistribution"]


class FlowDistribution(TransformedDistribution):
    """A ``TransformedDistribution`` that evaluates every layer once to score, and once to sample and score.

    It gives the same numbers as ``TransformedDistribution`` wherever the density is exact, and has its constructor.

    Example:
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> d = FlowDistribution(base, [affine_coupling(3)])
        >>> x, log_prob = d.rsample_and_log_prob((5,))
        >>> torch.allclose(log_prob, d.log_prob(x.clone()), atol=1e-5)
        True
    """

    # No __init__ and no state of its own: expand(), plates and to_event() rebuild the parent.

    def log_prob(self, value: Tensor, *, num_particles: int = 1) -> Tensor:
        """Return the log-density of ``value`` ``(*S, *B, *E)``, of shape ``(*S, *B)``.

        Where a :class:`~pyro_invflows.Slice` makes it a lower bound, ``num_particles`` draws of what was dropped
        tighten it: their log-mean-exp (Burda et al. 2016). Where a layer estimates its log-det, that many estimates are
        averaged. Elsewhere it changes nothing.

        Raises:
            ValueError: if ``num_particles`` is below 1, or above it with ``Slice(score="sample")``, or with both a
                ``Slice`` and an estimated log-det, whose log-mean-exp would be no bound.
        """
        if self._validate_args:
            self._validate_sample(value)
        positive_int(num_particles, "num_particles", "log_prob")
        if num_particles > 1 and any(noise_flags(transform).only_own_sample for transform in self.transforms):
            raise ValueError(
                'log_prob: Slice(score="sample") knows one value of what it dropped, so num_particles must be 1.'
            )
        draws, estimates = any(map(_draws_to_score, self.transforms)), any(map(_estimates, self.transforms))
        if num_particles > 1 and (draws or estimates):
            if draws and estimates:
                raise ValueError(
                    "log_prob: a Slice needs the log-mean-exp of its particles, an estimated log-det their mean; with "
                    "both, num_particles must be 1. Take logdet.Exact() for the bound."
                )
            shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
            scores = self._score(value.expand(num_particles, *shape))
            return scores.logsumexp(0) - math.log(num_particles) if draws else scores.mean(0)
        return self._score(value)

    def _score(self, value: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        total: Tensor | float = 0.0
        for transform in reversed(self.transforms):
            value, ladj = inv_and_ladj(transform, value)
            total = total + sum_rightmost(ladj, event_dim - transform.codomain.event_dim)
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
        return total + sum_rightmost(_log_prob(self.base_dist, value), event_dim - len(self.base_dist.event_shape))

    def rsample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Draw a reparametrised sample and return it with its log-density, at one evaluation a layer.

        With ``Slice(score="data")`` the score draws afresh, as :meth:`log_prob` does.
        """
        if any(map(_draws_to_score, self.transforms)):
            value = self.rsample(torch.Size(sample_shape))
            return value, self._score(value)
        value = self.base_dist.rsample(torch.Size(sample_shape))
        total = _log_prob(self.base_dist, value)
        event_dim = self._base_event_dim()
        total = sum_rightmost(total, event_dim - len(self.base_dist.event_shape))
        for transform in self.transforms:
            value, ladj = call_and_ladj(transform, value)
            total = total - sum_rightmost(ladj, event_dim - transform.domain.event_dim)
            event_dim += transform.codomain.event_dim - transform.domain.event_dim
        return value, total

    def _base_event_dim(self) -> int:
        """Event dimensions of the whole, counted on the base's side."""
        event_dim = len(self.event_shape)
        for transform in reversed(self.transforms):
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
        return event_dim


def _draws_to_score(transform: Transform) -> bool:
    """Whether a score draws what a Slice dropped. A layer knows it; the walk is for foreign wrappers."""
    return transform._draws_inverse if isinstance(transform, Bijection) else noise_flags(transform).draws_inverse


def _estimates(transform: Transform) -> bool:
    """Whether some layer's log-det is an estimate."""
    return any(
        not isinstance(leaf, NoiseInjection) and not getattr(leaf, "exact", True) for leaf, _ in leaves(transform)
    )


def _log_prob(base: Distribution, value: Tensor) -> Tensor:
    """Return ``base.log_prob(value)``; torch's ``Independent`` fails on empty batches."""
    if isinstance(base, Independent):
        return sum_rightmost(_log_prob(base.base_dist, value), base.reinterpreted_batch_ndims)
    return base.log_prob(value)


class Flow(nn.Module, ConditionalDistribution):
    """A base distribution and layers as one module.

    ``flow()`` is the distribution, ``flow(context)`` (or ``flow.condition(context)``) the conditioned one. The
    base's arguments become buffers, or parameters, so that ``.to()``, ``.parameters()``, ``state_dict()`` and
    ``pyro.module`` act on the whole.

    Args:
        base: The base distribution. It is rebuilt at each call from its arguments (:attr:`arg_constraints`), also
            inside ``Independent`` and mixtures.
        transforms: Transforms and conditional transforms, the one next to the base first.
        trainable_base: Make the base's arguments parameters, in unconstrained form.

    Raises:
        TypeError: if the base cannot be rebuilt from its arguments, or a part is no transform.
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
        self.base = _Rebuilt(base, trainable_base)
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
        if self._shapes is None:
            return FlowDistribution(self.base(), [self.transforms])
        new = FlowDistribution.__new__(FlowDistribution)  # as torch's own expand() does
        new.base_dist, new.transforms = self.base(), [self.transforms]
        Distribution.__init__(new, *self._shapes, validate_args=False)
        new._validate_args = FlowDistribution._validate_args
        return new

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
            for part in self.transforms
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


#: Arguments that say the same thing; the first that a distribution has is kept.
_ALTERNATIVES = ({"scale_tril", "covariance_matrix", "precision_matrix"}, {"logits", "probs"})


class _Rebuilt(nn.Module):
    """A distribution's class, and its arguments as buffers or parameters."""

    def __init__(self, base: Distribution, trainable: bool) -> None:
        super().__init__()
        if not isinstance(base, Distribution):
            raise TypeError(f"Flow needs a distribution as its base, but got {type(base).__name__}.")
        self.kind = type(base)
        takes_flag = "validate_args" in inspect.signature(type(base).__init__).parameters
        self.unchecked = {"validate_args": False} if takes_flag else {}
        self.validates = base._validate_args
        self.constants: dict[str, Any] = {}
        self.constraints: dict[str, constraints.Constraint] = {}
        self.names: list[str] = []
        try:
            self._read(base, trainable)
            rebuilt = self()
            same = rebuilt.batch_shape == base.batch_shape and rebuilt.event_shape == base.event_shape
        except Exception as error:
            raise TypeError(self._refusal(base)) from error
        if not same:
            raise TypeError(self._refusal(base))

    @staticmethod
    def _refusal(base: Distribution) -> str:
        return (
            f"Flow cannot rebuild its base, a {type(base).__name__}, from its arguments. Use a distribution whose "
            "constructor takes what its arg_constraints name (Normal, StudentT, Uniform, MultivariateNormal, ...), "
            "made independent with .to_event(n), or use TransformedDistribution."
        )

    def _read(self, base: Distribution, trainable: bool) -> None:
        if isinstance(base, Independent):
            self.names = ["base_distribution", "reinterpreted_batch_ndims"]
            self.base_distribution = _Rebuilt(base.base_dist, trainable)
            self.constants["reinterpreted_batch_ndims"] = base.reinterpreted_batch_ndims
            return
        signature = inspect.signature(type(base).__init__).parameters
        names = [name for name in signature if name not in ("self", "validate_args")]
        for group in _ALTERNATIVES:
            given = [name for name in names if name in group]
            if len(given) > 1:
                keep = next(
                    (n for n in ("scale_tril", "logits", *given) if n in given and n in base.__dict__), given[0]
                )
                names = [name for name in names if name not in given or name == keep]
        for name in names:
            value = getattr(base, name, getattr(base, f"_{name}", None))
            if isinstance(value, Distribution):
                self.add_module(name, _Rebuilt(value, trainable))
            elif isinstance(value, Tensor):
                self._register(name, value.detach().clone(), base.arg_constraints.get(name), trainable)
            elif signature[name].default is inspect.Parameter.empty or value is not None:
                self.constants[name] = value
            else:
                continue
            self.names.append(name)

    def _register(self, name: str, value: Tensor, constraint: constraints.Constraint | None, trainable: bool) -> None:
        if not trainable or constraint is None or not value.is_floating_point():
            self.register_buffer(name, value)
            return
        self.constraints[name] = constraint
        self.register_parameter(name, nn.Parameter(transform_to(constraint).inv(value).contiguous()))

    def forward(self) -> Distribution:
        arguments = {}
        for name in self.names:
            value = self.constants[name] if name in self.constants else getattr(self, name)
            if name in self.constraints:
                value = transform_to(self.constraints[name])(value)
            arguments[name] = value() if isinstance(value, _Rebuilt) else value
        # The arguments were checked when the flow was built; checking them at each call costs more than a layer. Values
        # are checked as by the distribution that was given.
        rebuilt = self.kind(**arguments, **self.unchecked)  # type: ignore[arg-type]
        rebuilt._validate_args = self.validates
        return rebuilt

    def extra_repr(self) -> str:
        return self.kind.__name__
