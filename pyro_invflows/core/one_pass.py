"""Two functions that evaluate any transform and its log-det in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform, Transform
from torch.distributions.transforms import _InverseTransform

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import sum_rightmost
from pyro_invflows.support.checks import described

__all__ = ["call_and_ladj", "inv_and_ladj"]


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate any transform and the log-det of its Jacobian together.

    A layer of this library takes one pass; a foreign one is asked through its own methods, also inside
    ``ComposeTransform``, ``IndependentTransform`` and ``.inv``.

    Args:
        transform: Any torch ``Transform``.
        x: A point, or a batch of points, of its domain.

    Returns:
        ``(y, log|dy/dx|)``.
    """
    if isinstance(transform, Bijection):
        return transform._call_and_ladj(x)
    if isinstance(transform, _InverseTransform):
        return inv_and_ladj(transform.inv, x)
    if isinstance(transform, IndependentTransform):
        y, ladj = call_and_ladj(transform.base_transform, x)
        return y, sum_rightmost(ladj, transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        return _compose_and_ladj(transform, x, inverse=False)
    _require_transform(transform, "call_and_ladj")
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inv_and_ladj(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Invert any transform and evaluate the log-det of the inverse's Jacobian together.

    Args:
        transform: Any torch ``Transform``.
        y: A point, or a batch of points, of its codomain.

    Returns:
        ``(x, log|dx/dy|)``: the negative of the forward log-det at x.
    """
    if isinstance(transform, Bijection):
        return transform._inv_and_ladj(y)
    if isinstance(transform, _InverseTransform):
        return call_and_ladj(transform.inv, y)
    if isinstance(transform, IndependentTransform):
        x, ladj = inv_and_ladj(transform.base_transform, y)
        return x, sum_rightmost(ladj, transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        return _compose_and_ladj(transform, y, inverse=True)
    _require_transform(transform, "inv_and_ladj")
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


def _require_transform(transform: object, owner: str) -> None:
    if not isinstance(transform, Transform):
        raise TypeError(f"{owner}: expected a transform, got {described(transform)}")


def _compose_and_ladj(compose: ComposeTransform, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Walk a torch compose once, in either direction."""
    step = inv_and_ladj if inverse else call_and_ladj
    event_dim = (compose.codomain if inverse else compose.domain).event_dim
    total: Tensor | None = None
    for part in reversed(compose.parts) if inverse else compose.parts:
        source, target = (part.codomain, part.domain) if inverse else (part.domain, part.codomain)
        value, ladj = step(part, value)
        ladj = sum_rightmost(ladj, event_dim - source.event_dim)
        total = ladj if total is None else total + ladj
        event_dim += target.event_dim - source.event_dim
    return value, torch.zeros_like(value) if total is None else total
