"""Chains of layers, and repeated layers. Knows no family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from pyro_invflows.core import latents as noise
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import is_constant, sum_rightmost
from pyro_invflows.core.foreign import hidden_tensors, inner_modules, may_hide_tensors, uncached
from pyro_invflows.core.inverted import Inverted
from pyro_invflows.core.kinds import Elementwise, VolumePreserving
from pyro_invflows.core.parts import _clear, _evaluate, _evaluate_inverse, _log_det, _trace
from pyro_invflows.core.recompute import recompute
from pyro_invflows.support.checks import described
from pyro_invflows.support.modes import in_functorch, is_any_autocast

__all__ = ["Chain", "stack"]


def _adds_nothing(part: Transform, x: Tensor, extra: int, total: Tensor | None) -> bool:
    """Whether a part's log-det is zeros that would not even broadcast the sum so far."""
    if total is None or not isinstance(part, VolumePreserving):
        return False
    shape = part._log_det_shape(x)
    return total.shape == shape[: len(shape) - extra]


class Chain(Bijection, nn.ModuleList):
    """Applies layers from left to right, as one layer.

    The parts may be ours or foreign transforms, modules or not; composes and chains inside are flattened. Each
    part is evaluated once in a forward or inverse pass, log-det included.

    **Forward**, **Inverse**: the parts', in turn. **Log-det**: the sum, from the same pass.
    **Identity**: the empty chain.

    Args:
        parts: Transforms, first one first. ``layer.inv`` is taken as ``Inverted(layer)`` where it has parameters.
        recompute: Keep no activations for the backward pass, but rebuild them there by inverting part by part:
            memory no longer grows with depth, a training step takes about half as long again. First derivatives
            only. The log-det is computed with every pass. The backward pass raises
            :class:`~pyro_invflows.errors.ReconstructionError` where rounding made the inversion lose the input.
            Under ``torch.func``, autocast, while compiling, and where a part
            holds a trainable tensor that is not its own parameter or buffer, the plain path is taken.

    Shape:
        What the parts make of it; event dimension as in ``ComposeTransform``.

    Raises:
        TypeError: if a part is not a transform (condition a conditional one first, or give it to ``Flow``).
        ValueError: if neighbours do not fit, naming the pair; with ``recompute``, if a part changes the dimension
            or has no exact log-det.

    Differs from ``ComposeTransform``: a module; one pass for y and log-det; shapes are checked when built.

    Example:
        >>> chain = Chain([Orthogonal(4), affine_coupling(4), Baird((4,))])
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(chain.inv(chain(x).clone()), x, atol=1e-5), len(chain)
        (True, 3)
    """

    def __init__(self, parts: Iterable[Transform] = (), *, recompute: bool = False, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.recompute = bool(recompute)
        self._foreign: dict[int, Transform] = {}
        for i, part in enumerate(_flatten(parts)):
            if isinstance(part, nn.Module):
                self.add_module(str(i), part)
            else:
                self._foreign[i] = uncached(part)
                for j, module in enumerate(inner_modules(part)):
                    self.add_module(f"inner_{i}_{j}", module)
        self._length = i + 1 if (self._modules or self._foreign) else 0
        self._hiding = [i for i, part in enumerate(self.parts) if may_hide_tensors(part)]
        self._draws_forward, self._draws_inverse, self._only_own_sample = noise.noise_flags(self)
        # A compose knows how event dimensions add up.
        compose = ComposeTransform(list(self.parts))
        self._domain = compose.domain if is_constant(compose.domain) else None
        self._codomain = compose.codomain if is_constant(compose.codomain) else None
        self._bounded = any(
            isinstance(leaf, Elementwise) and not inverse and leaf.codomain is not constraints.real
            for leaf, inverse in self._leaves(inverse=False)
        )
        self.trace_event({})
        if self.recompute:
            for part in self.parts:
                if not part.bijective or not getattr(part, "exact", True):
                    raise ValueError(
                        f"Chain(recompute=True) rebuilds activations by inversion, which {type(part).__name__} does "
                        "not allow: it changes the dimension or has no exact log-det. Put it outside."
                    )

    # ------------------------------------------------------------------ a read-only list of parts

    @property
    def parts(self) -> tuple[Transform, ...]:
        """The parts, first one first."""
        modules, foreign = self._modules, self._foreign
        return tuple(foreign[i] if i in foreign else modules[str(i)] for i in range(self._length))  # type: ignore[misc]

    def __len__(self) -> int:
        return self._length

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
        raise TypeError("A Chain does not change its parts; build a new one: Chain([*chain, part]).")

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = __add__ = _immutable

    # ------------------------------------------------------------------ shapes

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return ComposeTransform(list(self.parts)).domain if self._domain is None else self._domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return ComposeTransform(list(self.parts)).codomain if self._codomain is None else self._codomain

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return all(part.bijective for part in self.parts)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return noise.is_exact(self)

    def _leaves(self, inverse: bool) -> Iterator[tuple[Transform, bool]]:
        for part in reversed(self.parts) if inverse else self.parts:
            yield from noise.leaves(part, inverse)

    @property
    def sign(self) -> Any:
        sign = 1
        for part in self.parts:
            sign = sign * part.sign
        return sign

    @property
    def batch_shape(self) -> torch.Size:
        event_dim = self.domain.event_dim
        shapes = []
        for part in self.parts:
            shape = getattr(part, "batch_shape", torch.Size())
            shapes.append(shape[: max(len(shape) - (event_dim - part.domain.event_dim), 0)])
            event_dim += part.codomain.event_dim - part.domain.event_dim
        return torch.broadcast_shapes(*shapes) if shapes else torch.Size()

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        sizes = dict(sizes)
        previous = None
        event_dim = (self.codomain if inverse else self.domain).event_dim
        for i, part in reversed(list(enumerate(self.parts))) if inverse else enumerate(self.parts):
            try:
                sizes = _trace(part, sizes, inverse)
            except (ValueError, RuntimeError) as error:
                where = "the input" if previous is None else f"part {previous} ({type(self.parts[previous]).__name__})"
                raise ValueError(f"Chain: part {i} ({type(part).__name__}) does not fit {where}: {error}") from error
            change = part.codomain.event_dim - part.domain.event_dim
            event_dim += -change if inverse else change
            sizes = {axis: n for axis, n in sizes.items() if axis >= -event_dim}
            previous = i
        return sizes

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        for part in reversed(self.parts) if inverse else self.parts:
            shape = part.inverse_shape(shape) if inverse else part.forward_shape(shape)
        return torch.Size(shape)

    def _check(self, value: Tensor, inverse: bool) -> None:
        if not isinstance(value, Tensor):
            self._refuse_kind(value)
        # each part checks its own input; only what no part sees is left
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if value.dim() < event_dim:
            self._event_shape(value.shape, event_dim, inverse)

    # ------------------------------------------------------------------ noise

    def latents(self, y: Tensor) -> dict[str, Tensor]:
        """Return all the randomness that made ``y``, from ``y`` alone: ``{"base": z, name: e, ...}``.

        Each e is the noise that a :class:`~pyro_invflows.ConcatNoise` injected, coloured as it was. Together with
        :meth:`from_latents` this is a bijection; the elements of all latents are as many as those of y.

        Raises:
            ValueError: if a ``ConcatNoise`` has no name or shares it, or if the chain holds a
                :class:`~pyro_invflows.Slice`: what that dropped is not in y.
        """
        return noise.latents(self, y)

    def from_latents(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Return the ``y`` that the latents make.

        Side inputs: noise that is not given is drawn, so any part may be supplied; batch dimensions broadcast.

        Raises:
            ValueError: if ``"base"`` is missing, a name is unknown, or as in :meth:`latents`.
        """
        return noise.from_latents(self, latents)

    # ------------------------------------------------------------------ hooks

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        rebuilt = recompute(self, x, inverse=False) if self._recomputes() else None
        return self._walk(x) if rebuilt is None else rebuilt

    def _walk(self, x: Tensor) -> tuple[Tensor, Any]:
        steps = []
        for part in self.parts:
            y, aux = _evaluate(part, x)
            steps.append((part, x, y, aux))
            x = y
        return x, steps

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        rebuilt = recompute(self, y, inverse=True) if self._recomputes() else None
        if rebuilt is not None:
            return rebuilt
        steps = []
        for part in reversed(self.parts):
            x, aux = _evaluate_inverse(part, y)
            steps.append((part, x, y, aux))
            y = x
        return y, steps[::-1]

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        # What lies between is rebuilt by the direction that draws nothing, or it would be of another sample.
        if not self._draws_forward:
            if not self._bounded or self._draws_inverse or self._only_own_sample:
                return self._evaluate(x)[1]
            # Seen from x, every point on the way is within reach; only the way back from y tells whether y is. Where it
            # is not, x stands for a border that recomputation could not find again.
            with torch.no_grad():
                back, steps = self._evaluate_inverse(y)
                unreachable = self._log_det(back, y, steps) == math.inf
            return self._log_det(x, y, self._walk(x)[1]).masked_fill(unreachable, math.inf)
        if not (self._draws_inverse or self._only_own_sample):
            return self._evaluate_inverse(y)[1]
        raise ValueError(
            "Chain: the log-det of a chain that both injects and drops noise is known only for the last point that it "
            "sampled or inverted: what was dropped is not in y, what was injected not in x. Use call_and_ladj, "
            "inv_and_ladj or a distribution's log_prob."
        )

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        if isinstance(aux, Tensor):  # it is known already
            return aux
        total: Tensor | None = None
        event_dim = self.domain.event_dim
        for part, part_x, part_y, part_aux in aux:
            extra = event_dim - part.domain.event_dim
            if not _adds_nothing(part, part_x, extra, total):
                term = sum_rightmost(_log_det(part, part_x, part_y, part_aux), extra)
                total = term if total is None else total + term
            event_dim += part.codomain.event_dim - part.domain.event_dim
        return torch.zeros_like(x) if total is None else total

    def _recomputes(self) -> bool:
        return (
            self.recompute
            and not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and not is_any_autocast()
            and not in_functorch()
        )

    def _foreign_tensors(self) -> list[Tensor | None]:
        parts = self.parts if self._hiding else ()
        return [tensor for i in self._hiding for tensor in hidden_tensors(parts[i])]

    def clear_cache(self) -> None:
        super().clear_cache()
        for part in self.parts:
            _clear(part)

    def __repr__(self) -> str:
        lines = [f"  ({i}): " + repr(part).replace("\n", "\n  ") for i, part in enumerate(self.parts)]
        extra = ["  recompute=True"] if self.recompute else []
        return "Chain(" + "".join(f"\n{line}" for line in extra + lines) + ("\n)" if extra + lines else ")")


def _flatten(parts: Iterable[Transform]) -> Iterator[Transform]:
    if isinstance(parts, Transform) and not isinstance(parts, (Chain, ComposeTransform)):
        raise TypeError("Chain needs a list of transforms, not a single one; write Chain([transform]).")
    if not isinstance(parts, (Iterable, ComposeTransform)):
        raise TypeError(f"Chain: expected a list of transforms, got {described(parts)}")
    for part in parts.parts if isinstance(parts, ComposeTransform) else parts:
        if not isinstance(part, Transform):
            raise TypeError(f"Chain: expected a transform, got {described(part)}")
        if isinstance(part, ComposeTransform) or (isinstance(part, Chain) and not part.recompute):
            yield from _flatten(part.parts)
        elif isinstance(part, _InverseTransform) and inner_modules(part):
            yield Inverted(part.inv)
        else:
            yield part


def stack(repeats: int, factory: Callable[..., Transform], *args: Any, **kwargs: Any) -> Chain:
    """Build a :class:`Chain` of ``repeats`` layers, each made by ``factory(*args, **kwargs)``.

    The counterpart of Pyro's ``iterated``, at half its cost in a guide: ``partial(stack, 4, affine_coupling)``.

    Args:
        repeats: Number of layers.
        factory: Called once for each layer.
        *args: Passed to the factory, usually ``input_dim``.
        **kwargs: Passed to the factory.

    Raises:
        TypeError: if ``repeats`` is not an int, or ``factory`` a layer or anything else that cannot be called.
        ValueError: if ``repeats`` is below 1.

    Example:
        >>> chain = stack(2, diagonal, 3)
        >>> len(chain)
        2
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise TypeError(f"stack: repeats must be an int, but got {repeats!r}; it comes first: stack(4, factory, dim).")
    if repeats < 1:
        raise ValueError(f"stack: repeats must be at least 1, but got {repeats}.")
    if isinstance(factory, (Transform, ConditionalTransform)) or not callable(factory):
        raise TypeError(
            "stack: factory must be a function that builds a new layer at each call, as in stack(4, affine_coupling, "
            f"input_dim), but got {type(factory).__name__}."
        )
    return Chain([factory(*args, **kwargs) for _ in range(repeats)])
