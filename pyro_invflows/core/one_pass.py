"""Value and log-det of any transform in one pass."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform

from pyro_invflows.core.bijection import Bijection, InverseView
from pyro_invflows.core.foreign import as_bijection

__all__ = ["call_and_ladj", "inv_and_ladj", "with_one_pass"]


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate any transform and the log-det of its Jacobian together.

    The method of the same name, for foreign transforms too, and those inside torch's wrappers.

    Args:
        transform: Any torch ``Transform``.
        x: A point, or a batch of points, of its domain.

    Returns:
        ``(y, log|dy/dx|)``.

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
        ``(x, log|dx/dy|)``: the negative of the forward log-det at x.

    Raises:
        TypeError: if ``transform`` is not a transform.
    """
    return with_one_pass(transform, "inv_and_ladj").inv_and_ladj(y)


def with_one_pass(transform: Transform, owner: str = "with_one_pass") -> Bijection | InverseView:
    """Return a transform that has the two methods; one that does not have them enters through the door."""
    return transform if isinstance(transform, (Bijection, InverseView)) else as_bijection(transform, owner)
