r"""Residual layers ``x + g(x)`` with a contraction g, which are invertible for any architecture of g.

Behrmann et al. (2019), *Invertible residual networks*; Chen et al. (2019), *Residual flows for invertible generative
modeling*; Lu et al. (2021), *Implicit normalizing flows*, for chains of residual and inverted residual layers. There
the Lipschitz bound is an estimate, the log-determinant is a random estimate, and the inverse stops early. Here the
bound is guaranteed in every call, and the log-determinant is exact unless an estimator is chosen.
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
from pyro_invflows.solvers.implicit import refuse_trace
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.support.checks import derivative_order, positive_int
from pyro_invflows.support.derivatives import outside_inference_mode
from pyro_invflows.support.precision import at_least_single, full_precision

__all__ = ["ContractiveResidual", "conditional_contractive_residual", "contractive_residual"]

#: For events of up to this size, the inverse and its gradient use a dense Jacobian.
_SMALL_EVENT = 32
#: The same while compiling: a compiled backward pass cannot solve iteratively.
_SMALL_COMPILED_EVENT = 256
#: Memory of Anderson acceleration. If the network attains its bound, a shorter one takes twice as many steps.
_MEMORY = 15
#: Maximum number of Anderson steps; the fixed-point iteration continues from there.
_ANDERSON_STEPS = 200


# ---------------------------------------------------------------------- any contraction


class ContractiveResidual(ContextLayer):
    r"""Moves points by the output of any network that is a contraction.

    .. math:: y = x + g(x), \qquad \mathrm{Lip}(g) \le c < 1.

    Invertible because x is the fixed point of the contraction :math:`x \mapsto y - g(x)`. Choose it for a network of
    your own, wide or convolutional; if a narrow network is enough, :class:`LowRankResidual` is faster.

    **Forward**: one evaluation of the network. **Inverse**: Newton's method for small events (up to 32 elements, or 256
    while compiling), Anderson acceleration for others. Rows that these do not solve are finished by a fixed-point
    iteration, which converges because of the bound. Implicit gradients, by a dense linear solve for small events and an
    iterative one for others; first order in reverse mode; forward mode, ``torch.func`` and second derivatives (with
    ``order=2``) for small events only. **Log-det**: exact by default, in as many dimensions as the narrowest layer of
    the network has; a random estimate, drawn with torch's global generator, if you choose an estimator. It never
    depends on ``training``.
    **Identity**: if g = 0, as in a layer newly built by :func:`contractive_residual`.

    Args:
        net: The contraction g: ``networks.ContractiveMLP``; a ``Sequential`` of ``networks.LinearContraction``,
            ``networks.Conv2dContraction`` and activations with slopes of at most 1; or any module with an attribute
            ``lipschitz``, a bound that you guarantee. It must map ``(*B, D)`` to the same shape, row by row; for
            another ``dim``, it receives one flat batch of events.
        dim: -1 for vectors, -3 for images ``(C, H, W)``; it determines the number of event dimensions.
        input_dim: Size D of an event along ``dim``, if it is to be checked.
        log_det: ``logdet.Exact()`` (the default), ``logdet.RussianRoulette()``, ``logdet.PowerSeries()``, or an
            estimator of your own, derived from :class:`~pyro_invflows.logdet.LogDet`.
        order: Highest order of derivatives of the inverse, 1 or 2; 2 for small events only.
        solver: ``solvers.Newton(...)``, ``Anderson(...)`` or ``FixedPoint(...)``; default ``Newton()`` for small events
            and ``Anderson(memory=15)`` for others. If ``max_steps`` is given, no fixed-point iteration follows.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of steps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        net: The contraction g, with its parameters.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, C, H, W) -> (*B, C, H, W)``; log-det ``(*B,)``.

    Raises:
        TypeError: if the network is not a module, or the estimator or the solver is not one of those above.
        ValueError: if the network is not known to be a contraction (the error names the part at fault), or its bound is
            not below 1; if the network returns another shape; with ``order=2``, if an event has more than 32 elements.
        ConvergenceError: in the inverse, if ``max_steps`` is given, or tolerances below rounding error. A y that is not
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
        # for small events, and for others, because the defaults differ
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
                f"{owner}: a network with a context is for vectors (dim=-1), but got dim={dim}. Build it with "
                "context_dim=0, and condition other layers of the flow."
            )
        if self.order == 2 and dim == -1 and input_dim is not None and input_dim > _SMALL_EVENT:
            raise ValueError(f"{owner}: order=2 is for events of up to {_SMALL_EVENT} elements, but got {input_dim}.")

    # ------------------------------------------------------------------ the contraction

    def _call_net(self, x: Tensor, *context: Tensor) -> Tensor:
        if self.dim == -1:
            value = call_network(self.net, x, *context, owner="ContractiveResidual")
        else:
            flat = x.reshape(x.shape[: self.dim].numel(), *x.shape[self.dim :])
            value = call_network(self.net, flat, owner="ContractiveResidual")
            if value.shape == flat.shape:
                value = value.reshape(x.shape)
        if value.shape != x.shape:  # a result that broadcasts would not come from a contraction
            raise ValueError(
                f"ContractiveResidual: the network must return the shape of its input, but for {tuple(x.shape)} it "
                f"returned {tuple(value.shape)}."
            )
        return value

    def _context(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.context_dim:
            return ()
        context = self.context_of(x)
        if not torch.compiler.is_compiling() and context.is_inference():
            context = context.clone()
        return (context,)

    def _expand(self, value: Tensor) -> Tensor:
        """Expand a value to the batch dimensions of the context."""
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
        refuse_trace("ContractiveResidual")
        y = self._expand(y)
        small = y.shape[self.dim :].numel() <= _SMALL_EVENT
        if self.order == 2 and not small:
            raise ValueError(
                f"ContractiveResidual: order=2 is for events of up to {_SMALL_EVENT} elements, but got "
                f"{tuple(y.shape[self.dim :])}."
            )
        if torch.compiler.is_compiling() and not small:
            small = y.shape[self.dim :].numel() <= _SMALL_COMPILED_EVENT
            if not small:  # the graph breaks, and fullgraph=True raises; not a decorator, which imports the compiler
                return torch.compiler.disable(self._solve_and_attach)(y, small)
        return self._solve_and_attach(y, small)

    def _solve_and_attach(self, y: Tensor, small: bool) -> tuple[Tensor, tuple[None, Any]]:
        context = self._context(y)
        closed = small and self.dim == -1 and hasattr(self.net, "linearise")
        with held_weights() as store:
            hold_weights_of(self.net)
            with torch.no_grad():
                x = self._solve(y, context, small, closed)
            x = implicit_gradient(
                lambda x: self._residual(x, y, *context),
                x,
                structure="dense" if small else "iterative",
                event_dim=-self.dim,
                order=self.order,
                jacobian=(lambda x: self._jacobian(x, *context)) if closed else None,
                owner="ContractiveResidual",
            )
            return x, (None, store)

    def _residual(self, x: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        return x + self._call_net(x, *context) - y

    def _jacobian(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return dy/dx in closed form, ``(*B, D, D)``."""
        product = self.net.linearise(x, *context).jacobian()  # type: ignore[operator]
        return product + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def _solve(self, y: Tensor, context: tuple[Tensor, ...], small: bool, closed: bool) -> Tensor:
        settings = self.solvers[0 if small else 1]
        own_bound = None  # that of Newton's method
        if isinstance(settings, Anderson):
            own_bound = _ANDERSON_STEPS
        elif isinstance(settings, FixedPoint):
            own_bound = fixed_point_steps(self.lipschitz, y.dtype)
        solver = replace(settings, max_steps=settings.bound(own_bound))
        start = torch.where(y.isfinite(), y, 0)
        args = (y, *context)
        # rounding errors scale with the terms, and |g| may exceed |y|
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
    """Build a :class:`ContractiveResidual` and its network; it is initially the identity.

    Args:
        input_dim: Size D of an event along ``dim``: of a vector, or the channels of images.
        hidden_dims: Widths of the network's hidden layers; default (64, 64), for images (32, 32) channels.
        dim: -1 builds a :class:`~pyro_invflows.networks.ContractiveMLP`, -3 a convolutional contraction.
        lipschitz: Bound on the network's Lipschitz constant, strictly between 0 and 1.
        activation: Constructor of the activations.
        context_dim: Width of the context, which shifts the biases; for vectors only.
        context_hidden_dims: Widths of the hidden layers of the network that reads the context.
        log_det: As in the class; the default is exact, also for images, which limits their size.
        order: As in the class.
        solver: As in the class.
        atol: As in the class.
        rtol: As in the class.
        max_steps: As in the class.
        on_failure: As in the class.

    Raises:
        ValueError: if ``lipschitz`` is out of range, the activation is steeper than 1, ``dim`` is neither -1 nor -3, or
            ``context_dim`` is given for images.
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
