r"""Residual layers ``x + g(x)`` with a contraction g: invertible whatever g looks like inside.

Behrmann et al. (2019), *Invertible residual networks*; Chen et al. (2019), *Residual flows for invertible generative
modeling*; Lu et al. (2021), *Implicit normalizing flows*, for chains of residual and inverted residual layers. There
the bound is an estimate, the log-determinant is sampled and the inverse stops early; here the bound is proved at every
call, and the low-rank layer's log-determinant is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import ContextLayer
from pyro_invflows.logdet import Exact, LogDet
from pyro_invflows.networks import (
    ContractiveMLP,
    Linearisation,
    LipSwish,
    contractive_conv_network,
    held_weights,
    linearise,
    lipschitz_bound,
)
from pyro_invflows.networks.calling import call_network
from pyro_invflows.networks.contraction import (
    hold_weights_of,
)
from pyro_invflows.solvers import Anderson, FixedPoint, Newton, finish, implicit_gradient
from pyro_invflows.solvers.contractive import finish_by_fixed_point, fixed_point_steps
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.support.checks import derivative_order, positive_int
from pyro_invflows.support.derivatives import outside_inference_mode
from pyro_invflows.support.precision import at_least_single, full_precision

__all__ = ["ContractiveResidual", "conditional_contractive_residual", "contractive_residual"]

#: Events of up to this size have a dense Jacobian in the inverse and its gradient.
_SMALL_EVENT = 32
#: Where the bound binds, a shorter memory takes twice the steps.
_MEMORY = 15
#: Bound on the accelerated steps; the fixed point goes on from there.
_ANDERSON_STEPS = 200


# ---------------------------------------------------------------------- any contraction


class ContractiveResidual(ContextLayer):
    r"""Moves points by any network that is a contraction.

    .. math:: y = x + g(x), \qquad \mathrm{Lip}(g) \le c < 1.

    Invertible because x is the fixed point of the contraction :math:`y - g(x)`. Choose it for a network of your own,
    wide or convolutional; :class:`LowRankResidual` is faster where a narrow one will do.

    **Forward**: one evaluation of the network. **Inverse**: Newton's method for events of up to 32 elements, else
    Anderson acceleration; the fixed point, which the bound makes converge, finishes the rows that these leave.
    Implicit gradient, its linear solve dense for small events and iterative else; first order in reverse mode, forward
    mode and ``torch.func`` for small events only; ``order=2`` for second derivatives there. **Log-det**: exact by
    default, in as few dimensions as the network is narrow; an estimator if you name one, from torch's generator. Which
    one runs never depends on ``training``. **Identity**: where g is zero, as at the start of
    :func:`contractive_residual`.

    Args:
        net: A contraction: ``networks.ContractiveMLP``, a ``Sequential`` of ``networks.LinearContraction``,
            ``networks.Conv2dContraction`` and activations with slopes of at most 1, or a module with an attribute
            ``lipschitz``, your promise. It maps ``(*B, D)`` to the same shape or, for other ``dim``, one flat batch of
            events, row by row.
        dim: -1 for vectors, -3 for images ``(C, H, W)``; sets the event dimension.
        input_dim: D, where it should be checked.
        log_det: ``logdet.Exact()`` (the default), ``logdet.RussianRoulette()``, ``logdet.PowerSeries()``, or an
            estimator of your own, derived from :class:`~pyro_invflows.logdet.LogDet`.
        order: Highest order of derivatives of the inverse, 1 or 2; 2 for small events only.
        solver: ``solvers.Newton(...)``, ``Anderson(...)`` or ``FixedPoint(...)``; default ``Newton()`` for events of up
            to 32 elements and ``Anderson(memory=15)`` for others. With ``max_steps`` given, no fixed point stands
            behind it.
        atol: Absolute tolerance, in place of a whole ``solver``; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Bound on the steps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3`` ``(*B, C, H, W)``.

    Raises:
        TypeError: if the network, the estimator or the solver is of another kind.
        ValueError: naming the layer, if the network is not known to be a contraction or its bound is not below 1.
        ConvergenceError: in the inverse, where ``max_steps`` was given, or tolerances below rounding. A y that is not
            finite gives NaN.

    References:
        Behrmann et al. (2019), theorem 1 and algorithm 1; Chen et al. (2019), section 3.1, for the estimators.

    Example:
        >>> from pyro_invflows.networks import LinearContraction, LipSwish
        >>> net = torch.nn.Sequential(LinearContraction(2, 8), LipSwish(), LinearContraction(8, 2))
        >>> layer = ContractiveResidual(net)
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        dim: int = -1,
        input_dim: int | None = None,
        log_det: LogDet | None = None,
        order: int = 1,
        solver: Newton | Anderson | FixedPoint | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        context_dim = int(getattr(net, "context_dim", 0))
        super().__init__(input_dim, context_dim=context_dim, dim=dim, cache_size=cache_size)
        owner = "ContractiveResidual"
        if not isinstance(net, nn.Module):
            raise TypeError(f"{owner}: net must be a module, but got {type(net).__name__}.")
        bound = lipschitz_bound(net, owner=owner)
        if bound >= 1:
            raise ValueError(
                f"{owner}: the network's Lipschitz bound must be below 1, but it is {bound:.4g}. At least one of its "
                "layers must be a strict contraction, such as networks.LinearContraction."
            )
        if log_det is not None and not isinstance(log_det, LogDet):
            raise TypeError(
                f"{owner}: log_det must be logdet.Exact(), PowerSeries(), RussianRoulette() or an instance of your own "
                f"class derived from logdet.LogDet, but got {log_det!r}."
            )
        self.net = net
        self.lipschitz = bound
        self.log_det = Exact() if log_det is None else log_det
        self.exact = self.log_det.exact
        self.order = derivative_order(order, owner)
        # for small events, and for others: the defaults differ
        self.solvers = tuple(
            chosen_settings(
                default,
                solver,
                owner,
                kinds=(Newton, Anderson, FixedPoint),
                atol=atol,
                rtol=rtol,
                max_steps=max_steps,
                on_failure=on_failure,
            )
            for default in (Newton(), Anderson(memory=_MEMORY))
        )
        if self.context_dim and dim != -1:
            raise ValueError(
                f"{owner}: a network with a context is for vectors (dim=-1), but got dim={dim}; give it context_dim=0 "
                "and condition other layers of the flow."
            )
        if self.order == 2 and dim == -1 and input_dim is not None and input_dim > _SMALL_EVENT:
            raise ValueError(f"{owner}: order=2 serves events of up to {_SMALL_EVENT} elements, but got {input_dim}.")

    # ------------------------------------------------------------------ the contraction

    def _call_net(self, x: Tensor, *context: Tensor) -> Tensor:
        if self.dim == -1:
            value = call_network(self.net, x, *context, owner="ContractiveResidual")
        else:
            flat = x.reshape(x.shape[: self.dim].numel(), *x.shape[self.dim :])
            value = call_network(self.net, flat, owner="ContractiveResidual")
            if value.shape == flat.shape:
                value = value.reshape(x.shape)
        if value.shape != x.shape:  # one that broadcasts would be no contraction
            raise ValueError(
                f"ContractiveResidual: the network must return the shape of its input, but for {tuple(x.shape)} it "
                f"returned {tuple(value.shape)}."
            )
        return value

    def _context(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.context_dim:
            return ()
        context = self.context_of(x)
        return (context.clone() if context.is_inference() else context,)

    def _expand(self, value: Tensor) -> Tensor:
        """Give a value the batch dimensions of the context."""
        if not self.batch_shape:
            return value
        batch = torch.broadcast_shapes(value.shape[: self.dim], self.batch_shape)
        return value.expand(*batch, *value.shape[self.dim :])

    def _linearise(self, x: Tensor) -> Linearisation:
        context = self._context(x)
        closed = getattr(self.net, "linearise", None)
        if closed is not None and self.dim == -1:
            return closed(x, *context)
        return linearise(lambda x: self._call_net(x, *context), x, -self.dim)

    # ------------------------------------------------------------------ hooks

    @at_least_single
    @outside_inference_mode
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[Linearisation | None, Any]]:
        x = self._expand(x)
        with held_weights() as store:
            if torch.is_grad_enabled() or hasattr(self.net, "linearise"):
                linearisation = self._linearise(x)
                return x + linearisation.value, (linearisation, store)
            # a graph would only cost memory
            return x + self._call_net(x, *self._context(x)), (None, store)

    @full_precision
    @outside_inference_mode
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[Linearisation | None, Any]) -> Tensor:
        linearisation, store = aux
        with held_weights(store):
            return self.log_det(self._linearise(self._expand(x)) if linearisation is None else linearisation, -self.dim)

    @full_precision
    @outside_inference_mode
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[None, Any]]:
        with held_weights() as store:
            if torch.compiler.is_compiling():
                # Compiled code breaks its graph here (fullgraph=True raises). No decorator: that imports the compiler.
                return torch.compiler.disable(self._solve_and_attach)(y, store), (None, store)
            return self._solve_and_attach(y, store), (None, store)

    def _solve_and_attach(self, y: Tensor, store: Any) -> Tensor:
        y = self._expand(y)
        event_dim = -self.dim
        small = y.shape[self.dim :].numel() <= _SMALL_EVENT
        if self.order == 2 and not small:
            raise ValueError(
                f"ContractiveResidual: order=2 serves events of up to {_SMALL_EVENT} elements, but got "
                f"{tuple(y.shape[self.dim :])}."
            )
        context = self._context(y)
        closed = small and self.dim == -1 and hasattr(self.net, "linearise")
        hold_weights_of(self.net)
        with torch.no_grad():
            x = self._solve(y, context, small, closed)

        def residual(x: Tensor) -> Tensor:
            with held_weights(store):  # the backward pass comes later
                return self._residual(x, y, *context)

        def jacobian(x: Tensor) -> Tensor:
            with held_weights(store):
                return self._jacobian(x, *context)

        return implicit_gradient(
            residual,
            x,
            structure="dense" if small else "iterative",
            event_dim=event_dim,
            order=self.order,
            jacobian=jacobian if closed else None,
            owner="ContractiveResidual",
        )

    def _residual(self, x: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        return x + self._call_net(x, *context) - y

    def _jacobian(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return dy/dx of a network in closed form, ``(*B, D, D)``."""
        product = self.net.linearise(x, *context).jacobian()  # type: ignore[operator]
        return product + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def _solve(self, y: Tensor, context: tuple[Tensor, ...], small: bool, closed: bool) -> Tensor:
        settings = self.solvers[0 if small else 1]
        own_bound = None  # Newton's
        if isinstance(settings, Anderson):
            own_bound = _ANDERSON_STEPS
        elif isinstance(settings, FixedPoint):
            own_bound = fixed_point_steps(self.lipschitz, y.dtype)
        solver = replace(settings, max_steps=settings.bound(own_bound))
        start = torch.where(y.isfinite(), y, 0)
        args = (y, *context)
        # rounding is that of the terms: |g| may exceed |y|
        how: dict[str, Any] = {"event_dim": -self.dim, "scale": y.abs() + self._call_net(start, *context).abs()}
        if closed and isinstance(solver, Newton):

            def step(x: Tensor, r: Tensor, y: Tensor, *context: Tensor) -> Tensor:
                return linalg.solve(self._jacobian(x, *context), r.unsqueeze(-1)).squeeze(-1)

            solution = solver(self._residual, start, *args, step=step, **how)
        else:
            solution = solver(self._residual, start, *args, **how)
        if settings.max_steps is None:
            solution = finish_by_fixed_point(solution, settings, self._residual, start, args, self.lipschitz, **how)
        return finish(solution, "ContractiveResidual", settings, given=y)

    def extra_repr(self) -> str:
        dim = "" if self.dim == -1 else f"dim={self.dim}, "
        return f"{dim}lipschitz={self.lipschitz:.4g}, log_det={self.log_det}"


def contractive_residual(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    dim: int = -1,
    lipschitz: float = 0.97,
    activation: Callable[[], nn.Module] = LipSwish,
    context_dim: int = 0,
    context_hidden_dims: Sequence[int] = (64, 64),
    log_det: LogDet | None = None,
    order: int = 1,
    solver: Newton | Anderson | FixedPoint | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> ContractiveResidual:
    """Build a :class:`ContractiveResidual` with its network, starting at the identity.

    Args:
        input_dim: D, or the channels of images.
        hidden_dims: Hidden widths (channels) of the network; default (64, 64), or (32, 32) channels.
        dim: -1 builds a :class:`~pyro_invflows.networks.ContractiveMLP`, -3 a convolutional contraction.
        lipschitz: Bound on the network's Lipschitz constant, strictly between 0 and 1.
        activation: Constructor of the activations.
        context_dim: Width of the context, which shifts the biases; vectors only.
        context_hidden_dims: Hidden widths of the network that reads the context.
        log_det: As in the class; the default is exact, also for images, whose size it limits.
        order: As in the class.
        solver: As in the class.
        atol: As in the class.
        rtol: As in the class.
        max_steps: As in the class.
        on_failure: As in the class.

    Raises:
        ValueError: if ``lipschitz`` is out of range, the activation is steeper than 1, ``dim`` is neither -1 nor -3, or
            images come with a context.
    """
    input_dim = positive_int(input_dim, "input_dim", "contractive_residual")
    net: nn.Module
    if dim == -1:
        net = ContractiveMLP(
            input_dim,
            (64, 64) if hidden_dims is None else hidden_dims,
            lipschitz=lipschitz,
            activation=activation,
            context_dim=context_dim,
            context_hidden_dims=context_hidden_dims,
        )
    elif dim == -3 and not context_dim:
        channels = (32, 32) if hidden_dims is None else hidden_dims
        net = contractive_conv_network(input_dim, channels, lipschitz=lipschitz, activation=activation)
    else:
        raise ValueError(
            f"contractive_residual: dim must be -1 (vectors) or -3 (images, without a context), but got dim={dim} and "
            f"context_dim={context_dim}."
        )
    return ContractiveResidual(
        net,
        dim=dim,
        input_dim=input_dim,
        log_det=log_det,
        order=order,
        solver=solver,
        atol=atol,
        rtol=rtol,
        max_steps=max_steps,
        on_failure=on_failure,
    )


conditional_contractive_residual = conditional_factory(
    contractive_residual, "a network that reads a context shifts its biases", hypernet=False
)
