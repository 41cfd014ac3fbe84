"""What structures ask of their parts, foreign ones included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform, Transform
from torch.distributions.transforms import ReshapeTransform, _InverseTransform

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.foreign import alone

__all__ = []


def _evaluate(part: Transform, x: Tensor) -> tuple[Tensor, Any]:
    """Return y and aux of any transform; a foreign one's is itself, as it was evaluated."""
    if not isinstance(part, Bijection):
        own = alone(part)
        return own(x), own
    if part._forward_hooks or part._forward_pre_hooks:  # they fire only through the module's own call
        y = part(x)
        return y, part._aux(x, y)
    return part._evaluate(x)


def _evaluate_inverse(part: Transform, y: Tensor) -> tuple[Tensor, Any]:
    if isinstance(part, Bijection):
        return part._evaluate_inverse(y)
    own = alone(part)
    return own.inv(y), own


def _log_det(part: Transform, x: Tensor, y: Tensor, aux: Any) -> Tensor:
    return part._log_det(x, y, aux) if isinstance(part, Bijection) else aux.log_abs_det_jacobian(x, y)


def _clear(transform: Transform) -> None:
    if hasattr(transform, "clear_cache"):
        transform.clear_cache()


def _trace(part: Transform, sizes: Mapping[int, int], inverse: bool) -> dict[int, int]:
    """Follow known event sizes through any transform; what cannot be known is forgotten."""
    if isinstance(part, Bijection):
        return part.trace_event(sizes, inverse)
    if isinstance(part, _InverseTransform):
        return _trace(part.inv, sizes, not inverse)
    if isinstance(part, IndependentTransform):
        return _trace(part.base_transform, sizes, inverse)
    if isinstance(part, ReshapeTransform):
        here, there = (part.out_shape, part.in_shape) if inverse else (part.in_shape, part.out_shape)
        for axis, n in sizes.items():
            if -len(here) <= axis and here[axis] != n:
                raise ValueError(f"ReshapeTransform expects {here[axis]} elements along dim {axis}, but got {n}.")
        return {i - len(there): n for i, n in enumerate(there)}
    source = (part.codomain if inverse else part.domain).event_dim
    method = part.inverse_shape if inverse else part.forward_shape
    if all(axis in sizes for axis in range(-source, 0)) and source:
        shape = method(torch.Size(sizes[axis] for axis in range(-source, 0)))
        return {i - len(shape): n for i, n in enumerate(shape)}
    keeps = Transform.inverse_shape if inverse else Transform.forward_shape
    return dict(sizes) if getattr(method, "__func__", None) is keeps else {}
