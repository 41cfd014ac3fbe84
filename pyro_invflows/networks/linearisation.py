"""Linearisations of a function at a batch of points: its value, and products with its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_invflows.support.derivatives import depends_on_more
from pyro_invflows.support.modes import in_functorch, is_tracing

__all__ = ["Linearisation", "linearise"]


class Linearisation:
    """The value of a function g at x ``(*B, *E)`` and its Jacobian J there, with a graph if autograd is recording.

    Attributes:
        value: g(x), ``(*B, *E)``.
    """

    value: Tensor

    def vjp(self, v: Tensor) -> Tensor:
        """Return ``J^T v``, shaped like v."""
        raise NotImplementedError

    def jacobian(self) -> Tensor:
        """Return J with the event flattened, ``(*B, E, E)``."""
        raise NotImplementedError

    def reduced_jacobian(self) -> Tensor:
        """Return a matrix M, possibly smaller than J, with ``det(I + M) = det(I + J)``."""
        return self.jacobian()


class _Traced(Linearisation):
    """Computed by automatic differentiation, for any function that acts on each row separately."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> None:
        self.event_dim = event_dim
        self._functional = in_functorch() or torch.compiler.is_compiling()
        self._graph = torch.is_grad_enabled()
        if self._functional:
            self.value, self._pullback, *_ = torch.func.vjp(function, x)
            return
        self._alone = not (self._graph and x.requires_grad)
        with torch.enable_grad():
            self.x = x.detach().requires_grad_() if self._alone else x
            self._traced = function(self.x)
        # the leaf made here must not make the value look differentiable to the caller
        self._frozen = not self._graph or (self._alone and not depends_on_more(self._traced, self.x))
        self.value = self._traced.detach() if self._frozen else self._traced

    def vjp(self, v: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and is_tracing():
            raise NotImplementedError(
                "linearise: torch.jit.trace (JitTrace_ELBO) cannot record derivatives. Use a network with a Jacobian "
                "in closed form (networks.ContractiveMLP), Trace_ELBO, or torch.compile."
            )
        if self._functional:
            return self._pullback(v)[0]
        if not self._traced.requires_grad:  # g is constant
            return torch.zeros_like(v)
        graph = torch.is_grad_enabled() and not self._frozen
        (out,) = torch.autograd.grad(self._traced, self.x, v, retain_graph=True, create_graph=graph, allow_unused=True)
        return torch.zeros_like(v) if out is None else out

    def jacobian(self) -> Tensor:
        batch = self.value.shape[: self.value.dim() - self.event_dim]
        event = self.value.shape[len(batch) :]
        eye = torch.eye(event.numel(), dtype=self.value.dtype, device=self.value.device)
        bases = [e.reshape(event).expand(self.value.shape) for e in eye]
        if torch.compiler.is_compiling():  # one product in the graph instead of E
            rows = torch.vmap(self.vjp, out_dims=len(batch))(torch.stack(bases))
        else:
            rows = torch.stack([self.vjp(basis) for basis in bases], dim=len(batch))
        return rows.flatten(len(batch) + 1)


def linearise(function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int = 1) -> Linearisation:
    """Linearise any function at x by automatic differentiation.

    Args:
        function: ``(*B, *E) -> (*B, *E)``; each row of the result must depend on the same row of x only.
        x: The points.
        event_dim: Number of dimensions of E.
    """
    return _Traced(function, x, event_dim)
