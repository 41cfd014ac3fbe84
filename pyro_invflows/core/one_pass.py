"""Value and log-det of any transform in one pass."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform

from pyro_invflows.core.bijection import Bijection, InverseView
from pyro_invflows.core.foreign import as_bijection

__all__ = ["call_and_ladj", "inv_and_ladj", "with_one_pass"]


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate any transform and the log-det of its Jacobian together.

    As the method of the same name, but also for foreign transforms and for layers inside torch's wrappers.

    Args:
        transform: Any torch ``Transform``.
        x: A point, or a batch of points, of its domain.

    Returns:
        ``y`` and ``log|det dy/dx|``; the log-det has the batch shape.

    Raises:
        TypeError: if ``transform`` is not a transform.
    """
    return with_one_pass(transform, "call_and_ladj").call_and_ladj(x)


def inv_and_ladj(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Invert any transform and evaluate the log-det of the inverse's Jacobian together.

    Args:
        transform: Any torch ``Transform``.
        y: A point, or a batch of points, of its codomain.

    Returns:
        ``x`` and ``log|det dx/dy|``, which is minus the forward log-det at x; it has the batch shape.

    Raises:
        TypeError: if ``transform`` is not a transform.
    """
    return with_one_pass(transform, "inv_and_ladj").inv_and_ladj(y)


def with_one_pass(transform: Transform, owner: str = "with_one_pass") -> Bijection | InverseView:
    """Return the transform itself if it has the two methods, else the layer that ``as_bijection`` makes of it."""
    return transform if isinstance(transform, (Bijection, InverseView)) else as_bijection(transform, owner)
