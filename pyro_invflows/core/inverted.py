"""The inverse of a layer, as a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_invflows.core import latents as noise
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.foreign import alone, hidden_tensors, inner_modules
from pyro_invflows.core.parts import _clear, _evaluate, _evaluate_inverse, _log_det, _trace
from pyro_invflows.support.checks import described

__all__ = ["Inverted"]


class Inverted(Bijection):
    """The inverse of a layer, as a layer: a module with the same parameters.

    torch's ``layer.inv`` is no module, so its parameters miss the optimiser and ``.to()``. Use this one inside a
    :class:`Chain`, a module or a guide.

    **Forward**: the layer's inverse. **Inverse**: its forward. **Log-det**: minus the layer's. **Identity**: where
    the layer is.

    Args:
        layer: Any transform; one of this library keeps its one-pass evaluation.

    Raises:
        TypeError: if it is not a transform.

    Example:
        >>> layer = Diagonal(3)
        >>> inverted = Inverted(layer)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(inverted(x), layer.inv(x)), inverted.layer is layer
        (True, True)
    """

    def __init__(self, layer: Transform, *, cache_size: int = 1) -> None:
        if not isinstance(layer, Transform):
            kind, conditional = type(layer).__name__, hasattr(layer, "condition") and not isinstance(layer, type)
            hint = f"{kind}. Invert the layer that it conditions: Conditional(Inverted(layer), ...)."
            raise TypeError(f"Inverted: expected a transform, got {hint if conditional else described(layer)}")
        super().__init__(cache_size=cache_size)
        self.layer = layer
        for i, module in enumerate([] if isinstance(layer, nn.Module) else inner_modules(layer)):
            self.add_module(f"inner_{i}", module)
        self._draws_forward, self._draws_inverse, self._only_own_sample = noise.noise_flags(self)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.codomain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.domain

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return self.layer.bijective

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return noise.is_exact(self)

    @property
    def sign(self) -> Any:
        return self.layer.sign

    @property
    def batch_shape(self) -> torch.Size:
        return getattr(self.layer, "batch_shape", torch.Size())

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        return _trace(self.layer, sizes, not inverse)

    def _leaves(self, inverse: bool) -> Iterator[tuple[Transform, bool]]:
        return noise.leaves(self.layer, not inverse)

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        return self.layer.forward_shape(shape) if inverse else self.layer.inverse_shape(shape)

    def _check(self, value: Tensor, inverse: bool) -> None:
        if isinstance(self.layer, Bijection):
            self.layer._check(value, not inverse)

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        return _evaluate_inverse(self.layer, x)

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        return _evaluate(self.layer, y)

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        return self.layer._aux(y, x) if isinstance(self.layer, Bijection) else alone(self.layer)

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        return -_log_det(self.layer, y, x, aux)

    def _foreign_tensors(self) -> list[Tensor | None]:
        return hidden_tensors(self.layer)

    def clear_cache(self) -> None:
        super().clear_cache()
        _clear(self.layer)

    def extra_repr(self) -> str:
        return "" if isinstance(self.layer, nn.Module) else repr(self.layer)
