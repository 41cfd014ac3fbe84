"""The interface between a log-determinant and the layer that uses it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["LogDet"]


class LogDet:
    r"""Computes or estimates :math:`\log\det(I + J)` for the Jacobian J of a contraction.

    To write an estimator, derive a class from this one and define ``__call__``; pass an instance to
    :class:`~pyro_invflows.ContractiveResidual` as its ``log_det``.

    Attributes:
        exact: Whether every call returns the same number, free of bias. It becomes the layer's ``exact``.

    Example:
        >>> from pyro_invflows import logdet
        >>> class FirstTerm(logdet.LogDet):
        ...     '''The first term of the power series: the trace of J, estimated with one random probe.'''
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
            linearisation: A :class:`~pyro_invflows.networks.Linearisation` of the contraction g at the points x. It
                has the ``value`` g(x) ``(*B, *E)``, the product ``vjp(v)`` of the transposed Jacobian with a v shaped
                like x, the full ``jacobian()`` ``(*B, E, E)`` and the ``reduced_jacobian()`` M, which may be smaller,
                with :math:`\det(I + M) = \det(I + J)`. All have a graph if autograd is recording.
            event_dim: Number of dimensions of E.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(linearisation, event_dim) -> log-det.")
