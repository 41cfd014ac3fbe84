"""Chains of layers, and chains of repeated layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, constraints

from pyro_invflows.core import latents as noise
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import event_dims, is_constant, sum_rightmost
from pyro_invflows.core.foreign import as_bijection, stands_for
from pyro_invflows.core.kinds import Elementwise, VolumePreserving
from pyro_invflows.core.path_gradient import push_gradient
from pyro_invflows.core.recompute import recompute
from pyro_invflows.core.structure import Structure, evaluate_part
from pyro_invflows.support.checks import described, is_int
from pyro_invflows.support.derivatives import in_reverse_mode_only

__all__ = ["Chain", "stack"]


class Chain(Structure, nn.ModuleList):
    """Applies layers from left to right, as one layer.

    The parts may be layers of this library or foreign transforms, modules or not; nested chains and
    ``ComposeTransform`` are flattened. A forward or inverse pass evaluates each part once, log-det included.

    **Forward**, **Inverse**: those of the parts, in turn. **Log-det**: the sum over the parts, from the same pass.
    **Identity**: the empty chain.

    Args:
        parts: Transforms, in the order of the forward pass. ``layer.inv`` becomes ``Inverted(layer)``.
        recompute: Keep no activations for the backward pass, but rebuild them by inverting the chain part by part:
            memory no longer grows with depth, and a training step takes about 1.5 times as long. First derivatives
            only. Every pass computes the log-det. The backward pass raises
            :class:`~pyro_invflows.errors.ReconstructionError` if rounding keeps the inversion from recovering the
            input. The option is ignored under ``torch.func`` and autocast, while compiling, and if a part holds a
            trainable tensor that is neither a parameter nor a buffer.

    Shape:
        As the parts determine; event dimensions as in ``ComposeTransform``. The log-det has the batch shape.

    Raises:
        TypeError: if a part is not a transform (condition a conditional one first, or pass it to ``Flow``).
        ValueError: if neighbouring parts do not fit (the message names both); with ``recompute``, if a part changes the
            dimension or has no exact log-det.

    Differs from ``ComposeTransform``: it is a module, takes one pass for y and log-det, and checks shapes when built.

    Example:
        >>> chain = Chain([Orthogonal(4), affine_coupling(4), Baird((4,))])
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(chain.inv(chain(x).clone()), x, atol=1e-5), len(chain)
        (True, 3)
    """

    def __init__(self, parts: Iterable[Transform] = (), *, recompute: bool = False, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.recompute = bool(recompute)
        for i, part in enumerate(_flatten(parts)):
            self.add_module(str(i), part)
        own = self.parts
        #: Event dimensions of the whole in front of each part, and behind the last.
        self._event_dims = event_dims(own)
        self._domain = self._codomain = None
        domain, codomain = self.domain, self.codomain
        self._domain = domain if is_constant(domain) else None
        self._codomain = codomain if is_constant(codomain) else None
        self.dim = -max(self._event_dims[0], 1)
        self.settle()
        self._bounded = any(
            isinstance(leaf, Elementwise) and not inverse and leaf.codomain is not constraints.real
            for leaf, inverse in self.leaves()
        )
        self.trace_event({})
        if self.recompute:
            for part in own:
                if not part.bijective or not part.exact:
                    raise ValueError(
                        f"Chain(recompute=True) rebuilds activations by inversion, which {part.label} does not allow: "
                        "it changes the dimension or has no exact log-det. Put it outside this chain."
                    )

    # ------------------------------------------------------------------ a read-only list of parts

    @property
    def parts(self) -> tuple[Bijection, ...]:
        """The parts, in the order of the forward pass."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def named_parts(self) -> Iterator[tuple[str, Bijection, int]]:
        for name, part, event_dim in zip(self._modules, self.parts, self._event_dims, strict=False):
            yield name, part, event_dim - part.domain.event_dim

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Chain(self.parts[index], recompute=self.recompute, cache_size=int(self._cache_size))  # type: ignore[arg-type]
        return self.parts[index]

    def __contains__(self, part: object) -> bool:
        return any(part is own for own in self.parts)

    def __bool__(self) -> bool:
        return True

    def _immutable(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A Chain cannot be changed; build a new one: Chain([*chain, part]).")

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = __add__ = _immutable

    # ------------------------------------------------------------------ shapes

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        if self._domain is not None:
            return self._domain
        return _widen(self[0].domain, self._event_dims[0]) if len(self) else constraints.real

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        if self._codomain is not None:
            return self._codomain
        return _widen(self[-1].codomain, self._event_dims[-1]) if len(self) else constraints.real

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        """Size that an event of the input must have along ``dim``; None if any size will do."""
        # first what is known of the output, and from there all that can be known of the input
        return self.trace_event(self.trace_event({}), inverse=True).get(self.dim)

    @property
    def sign(self) -> Any:
        sign = 1
        for part in self.parts:
            sign = sign * part.sign
        return sign

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        sizes = dict(sizes)
        previous = None
        # the event dimensions behind each part, in the direction of the walk
        behind = self._event_dims[:-1] if inverse else self._event_dims[1:]
        steps = list(zip(range(len(self)), self.parts, behind, strict=True))
        for i, part, event_dim in reversed(steps) if inverse else steps:
            try:
                sizes = part.trace_event(sizes, inverse)
            except (ValueError, RuntimeError) as error:
                where = "the input" if previous is None else f"part {previous} ({self.parts[previous].label})"
                raise ValueError(f"Chain: part {i} ({part.label}) does not fit {where}: {error}") from error
            # an axis in front of an event may mean another one to the next part; -1 is the same for elementwise parts
            sizes = {axis: n for axis, n in sizes.items() if axis >= -max(event_dim, 1)}
            previous = i
        return sizes

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        for part in reversed(self.parts) if inverse else self.parts:
            shape = part._shape(shape, inverse)
        return torch.Size(shape)

    def _check(self, value: Tensor, inverse: bool) -> None:
        if not isinstance(value, Tensor):
            self._refuse_kind(value)
        # each part checks its own input; here only the dimensions that no part sees
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if value.dim() < event_dim:
            self.check_event(value.shape, inverse)

    # ------------------------------------------------------------------ noise

    def latents(self, y: Tensor) -> dict[str, Tensor]:
        """Return all latents of ``y``, computed from ``y`` alone: ``{"base": z, name: e, ...}``.

        Each e is the noise that a :class:`~pyro_invflows.ConcatNoise` injected, exactly as it was injected (not
        standardised). Together with :meth:`from_latents` this is a bijection: the latents have as many elements as y.

        Raises:
            ValueError: if a ``ConcatNoise`` has no name, or that of another one; or if the chain holds a
                :class:`~pyro_invflows.Slice`, because y does not contain what that dropped.
        """
        return noise.latents(self, y)

    def from_latents(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Return the ``y`` that has these latents.

        Any part of the noise may be supplied, as a side input; the rest is drawn. Batch dimensions broadcast.

        Raises:
            ValueError: if ``"base"`` is missing or a name is unknown; also as in :meth:`latents`.
        """
        return noise.from_latents(self, latents)

    # ------------------------------------------------------------------ hooks

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        rebuilt = recompute(self, x, inverse=False) if self._recomputes() else None
        return self._walk(x) if rebuilt is None else rebuilt

    def _walk(self, x: Tensor) -> tuple[Tensor, Any]:
        steps = []
        for part in self.parts:
            y, aux = evaluate_part(part, x)
            steps.append((x, y, aux))
            x = y
        return x, steps

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        rebuilt = recompute(self, y, inverse=True) if self._recomputes() else None
        if rebuilt is not None:
            return rebuilt
        steps = []
        for part in reversed(self.parts):
            x, aux = part.evaluate_inverse(y)
            steps.append((x, y, aux))
            y = x
        return y, steps[::-1]

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        # Intermediate values are rebuilt in the direction that draws no noise; the other would give another sample.
        if not self.draws_forward:
            if not self._bounded or self.draws_inverse or self.only_own_sample:
                return super()._aux(x, y)
            # Starting from x, every value on the way is within reach; only the pass back from y shows whether y is. If
            # not, x is the preimage of a boundary value, which recomputation might not recover: hence the plain pass.
            with torch.no_grad():
                back, steps = self.evaluate_inverse(y)
                unreachable = self._log_det(back, y, steps) == math.inf
            return self._log_det(x, y, self._walk(x)[1]).masked_fill(unreachable, math.inf)
        if not (self.draws_inverse or self.only_own_sample):
            return self.evaluate_inverse(y)[1]
        raise ValueError(
            "Chain: the log-det of a chain that both injects and drops noise is known only for the last point that it "
            "sampled or inverted: y does not contain what was dropped, nor x what was injected. Use call_and_ladj, "
            "inv_and_ladj or a distribution's log_prob."
        )

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        if isinstance(aux, Tensor):  # recompute() has computed it already
            return aux
        total: Tensor | None = None
        for (_, part, extra), (part_x, part_y, part_aux) in zip(self.named_parts(), aux, strict=True):
            if not _adds_nothing(part, part_x, extra, total):
                term = sum_rightmost(part._log_det(part_x, part_y, part_aux), extra)
                total = term if total is None else total + term
        return torch.zeros_like(x) if total is None else total

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        steps = list(self.named_parts())
        total: Tensor | None = None
        for _, part, extra in reversed(steps) if inverse else steps:
            value, ladj, gradient = push_gradient(part, value, gradient, inverse)
            term = sum_rightmost(ladj, extra)
            total = term if total is None else total + term
        return value, torch.zeros_like(value) if total is None else total, gradient

    def _recomputes(self) -> bool:
        return self.recompute and not self.opaque and in_reverse_mode_only()

    def __repr__(self) -> str:
        lines = [f"  ({i}): " + repr(part).replace("\n", "\n  ") for i, part in enumerate(self.parts)]
        extra = ["  recompute=True"] if self.recompute else []
        return "Chain(" + "".join(f"\n{line}" for line in extra + lines) + ("\n)" if extra + lines else ")")


stands_for(ComposeTransform, lambda transform: Chain(transform.parts))


def _widen(constraint: constraints.Constraint, event_dim: int) -> constraints.Constraint:
    """Extend a constraint to events with ``event_dim`` dimensions."""
    extra = event_dim - constraint.event_dim
    return constraints.independent(constraint, extra) if extra else constraint


def _adds_nothing(part: Bijection, x: Tensor, extra: int, total: Tensor | None) -> bool:
    """Whether adding a part's log-det would change neither the values nor the shape of the sum so far."""
    if total is None or not isinstance(part, VolumePreserving):
        return False
    shape = part.log_det_shape(x)
    return total.shape == shape[: len(shape) - extra]


def _flatten(parts: Iterable[Transform]) -> Iterator[Bijection]:
    """Yield the parts as layers; nested chains are flattened, except those that recompute."""
    if isinstance(parts, Transform) and not isinstance(parts, (Chain, ComposeTransform)):
        raise TypeError("Chain needs a list of transforms, not a single one; write Chain([transform]).")
    if not isinstance(parts, (Iterable, ComposeTransform)):
        raise TypeError(f"Chain: expected a list of transforms, got {described(parts)}")
    for part in parts.parts if isinstance(parts, ComposeTransform) else parts:
        layer = as_bijection(part, owner="Chain")
        if isinstance(layer, Chain) and not layer.recompute:
            yield from layer.parts
        else:
            yield layer


def stack(
    repeats: int,
    factory: Callable[..., Transform],
    *args: Any,
    between: Callable[..., Transform] | None = None,
    **kwargs: Any,
) -> Chain:
    """Build a :class:`Chain` of ``repeats`` layers, each made by ``factory(*args, **kwargs)``.

    The counterpart of Pyro's ``iterated``, at half its cost in a guide: ``partial(stack, 4, affine_coupling)``.

    Args:
        repeats: Number of layers.
        factory: Called once for each layer.
        *args: Passed to the factory, usually ``input_dim``.
        between: Builds the layer between each two of these, ``repeats - 1`` in all. It is called with ``*args`` only,
            as in ``stack(4, affine_coupling, 8, between=permute)``.
        **kwargs: Passed to the factory.

    Raises:
        TypeError: if ``repeats`` is not an int, or if ``factory`` or ``between`` is a layer or is not callable.
        ValueError: if ``repeats`` is below 1.

    Example:
        >>> chain = stack(2, diagonal, 3, between=orthogonal)
        >>> print(*(type(layer).__name__ for layer in chain))
        Diagonal Orthogonal Diagonal
    """
    if not is_int(repeats):
        raise TypeError(f"stack: repeats must be an int, but got {repeats!r}; it comes first: stack(4, factory, dim).")
    if repeats < 1:
        raise ValueError(f"stack: repeats must be at least 1, but got {repeats}.")
    _check_factory(factory, "factory", "stack(4, affine_coupling, input_dim)")
    if between is not None:
        _check_factory(between, "between", "stack(4, affine_coupling, input_dim, between=permute)")
    parts: list[Transform] = []
    for i in range(repeats):
        if i and between is not None:
            parts.append(between(*args))
        parts.append(factory(*args, **kwargs))
    return Chain(parts)


def _check_factory(value: Any, name: str, example: str) -> None:
    if isinstance(value, (Transform, ConditionalTransform)) or not callable(value):
        raise TypeError(
            f"stack: {name} must be a function that builds a new layer at each call, as in {example}, but got "
            f"{type(value).__name__}."
        )
