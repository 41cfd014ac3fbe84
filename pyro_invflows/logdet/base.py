"""What every log-determinant promises to the layer that asks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["LogDet"]


class LogDet:
    r"""Computes or estimates :math:`\log\det(I + J)` for the Jacobian J of a contraction.

    For an estimator of your own, derive a class and define ``__call__``; give an instance to
    :class:`~pyro_invflows.ContractiveResidual` as its ``log_det``.

    Attributes:
        exact: Whether every call gives the same number, free of bias. It becomes the layer's ``exact``.

    Example:
        >>> from pyro_invflows import logdet
        >>> class FirstTerm(logdet.LogDet):
        ...     '''The trace of J alone, by one random probe: the first term of the power series.'''
        ...
        ...     def __call__(self, linearisation, event_dim=1):
        ...         v = torch.randn_like(linearisation.value)
        ...         return (linearisation.vjp(v) * v).flatten(-event_dim).sum(-1)
        >>> layer = contractive_residual(3, log_det=FirstTerm())
        >>> layer.exact, call_and_ladj(layer, torch.randn(5, 3))[1].shape
        (False, torch.Size([5]))
    """

    exact = False

    def __call__(self, linearisation: Any, event_dim: int = 1) -> Tensor:
        r"""Return ``log|det(I + J)|``, ``(*B,)``.

        Args:
            linearisation: g near the points x, a :class:`~pyro_invflows.networks.Linearisation`. It has the ``value``
                g(x) ``(*B, *E)``, the product ``vjp(v)`` of the transposed Jacobian with a v shaped like x, the whole
                ``jacobian()`` ``(*B, E, E)`` and the perhaps smaller ``reduced_jacobian()`` M with
                :math:`\det(I + M) = \det(I + J)`, all with a graph where autograd records.
            event_dim: Number of dimensions of E.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(linearisation, event_dim) -> log-det.")
