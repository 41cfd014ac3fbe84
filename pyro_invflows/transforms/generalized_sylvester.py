r"""Generalized Sylvester layers: autoregressive layers of :class:`~pyro_invflows.monotone.TanhBump`, rotated.

Hoogeboom et al. (2020), *The convolution exponential and generalized Sylvester flows*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import ContextLayer
from pyro_invflows.monotone import TanhBump
from pyro_invflows.networks import masked_network
from pyro_invflows.networks.dense import default_hidden_dims
from pyro_invflows.solvers import Sweeps
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.constants import HoldsConstants
from pyro_invflows.support.precision import at_least_single, full_precision
from pyro_invflows.transforms.autoregressive import Autoregressive

__all__ = ["GeneralizedSylvester", "conditional_generalized_sylvester", "generalized_sylvester"]


class GeneralizedSylvester(HoldsConstants, Autoregressive):
    r"""Pushes points by an autoregressive network, in rotated coordinates.

    .. math:: y = x + W^T f(W x), \qquad f_i(v) = \frac{d_i - 1}{a_i} \tanh(a_i v_i + t_i) + u_i,

    where W is orthogonal, and a masked network computes :math:`a_i, d_i > 0`, :math:`t_i` and :math:`u_i` from the
    coordinates of v before i (and from a context). Smooth bounds keep :math:`|\log a_i| < 2` and
    :math:`|\log d_i| < 3`. Invertible because the Jacobian of :math:`v + f(v)` is triangular with the diagonal
    :math:`1 + (d_i - 1) \tanh' > 0`. Choose it where :class:`Sylvester` is not flexible enough.

    It is the :class:`Autoregressive` layer of :class:`~pyro_invflows.monotone.TanhBump` between a rotation and its
    inverse.

    **Forward**: one evaluation of the network, and two rotations in compact WY form. **Inverse**: exact, one coordinate
    at a time, as in :class:`Autoregressive`: the products together cost one evaluation of the network, and each
    coordinate is one scalar root. The residual is checked; rows whose rounding error exceeds the tolerance are refined
    by sweeps. First derivatives in reverse mode, by one triangular solve (second derivatives raise
    ``NotImplementedError``); with ``order=2``, under ``torch.func`` and while compiling, D differentiable sweeps
    instead, with derivatives of all orders. If the network has large weights, x is ill-conditioned: y is reproduced to
    the tolerance; x may not be. **Log-det**: :math:`\sum_i \log(\tanh^2 + d_i (1 - \tanh^2))`, O(D) more.
    **Identity**: exactly, at initialisation; W is drawn with torch's global generator.

    Args:
        input_dim: Size D of an event.
        hidden_dims: Widths of the network's hidden layers; by default two of ``min(max(64, 3 D), 256)``.
        num_reflections: Number k of Householder reflections in W; the default is that of
            :class:`~pyro_invflows.Orthogonal`.
        context_dim: Width of the context that the network also takes (see :class:`~pyro_invflows.Conditional`); while
            the layer is not conditioned, the network receives zeros instead.
        activation: Constructor of the network's activations.
        order: Highest order of derivatives of the inverse, 1 or 2; with 2, the inverse takes D differentiable sweeps.
        solver: Tolerances, the maximum number of sweeps (D by default), and what happens on failure; default
            ``solvers.Sweeps()``.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of sweeps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        vectors: Reflection vectors of W as rows, a parameter ``(k, D)``.
        hypernet: The masked network, from ``(*B, D + context_dim)`` to log a, log d, t and u before the bounds,
            ``(*B, 4 D)``; its last layer starts at zero.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.
        triangle: Constant mask, a buffer; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D, or ``order`` is neither 1 nor 2.
        ConvergenceError: in the inverse, if rounding keeps a row above the tolerance. A y that is not finite gives
            NaN.

    References:
        Hoogeboom et al. (2020), Eqs. 9-11, where :math:`\gamma s_1 s_2 = d - 1` lies in (-1, 1); here it lies in
        (-0.95, 19).

    Example:
        >>> layer = GeneralizedSylvester(3)
        >>> _ = torch.nn.init.normal_(layer.hypernet[-1].weight, std=0.1)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    input_dim: int
    triangle: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        num_reflections: int | None = None,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.Tanh,
        order: int = 1,
        solver: Sweeps | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        owner = "GeneralizedSylvester"
        input_dim = positive_int(input_dim, "input_dim", owner)
        if order not in (1, 2):
            raise ValueError(f"{owner}: order must be 1 or 2, but got {order!r}.")
        hidden = default_hidden_dims(max(64, 3 * input_dim)) if hidden_dims is None else hidden_dims
        function = TanhBump(max_log_steepness=2.0, max_log_slope=3.0)
        super().__init__(
            function,
            masked_network(
                input_dim,
                hidden,
                function.num_parameters,
                context_dim=context_dim,
                activation=activation,
                zero_output=True,
            ),
            context_dim=context_dim,
            input_dim=input_dim,
            solver=solver,
            atol=atol,
            rtol=rtol,
            max_steps=max_steps,
            on_failure=on_failure,
            cache_size=cache_size,
        )
        self.order = order
        k = input_dim - input_dim % 2 if num_reflections is None else num_reflections
        self.num_reflections = positive_int(k, "num_reflections", owner, minimum=0)
        self.vectors = nn.Parameter(torch.empty(k, input_dim))
        self._draw_reflections()

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        return {"triangle": linalg.triangle_mask(self.num_reflections, like)}

    def reset_parameters(self) -> None:
        """Reset the network, so that the layer is the identity; draw W."""
        super().reset_parameters()
        self._draw_reflections()

    def _draw_reflections(self) -> None:
        self.fill_constants()
        nn.init.normal_(self.vectors, std=self.input_dim**-0.5)

    def _rotate(self, x: Tensor, transpose: bool = False) -> Tensor:
        return linalg.householder_product(self.vectors, x, mask=self.triangle, transpose=transpose)

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self._rotate(x, transpose=True)
        z, log_slope = self._push(v)
        return x + self._rotate(z - v), log_slope

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self._rotate(y, transpose=True)
        if self.order == 2 and torch.is_grad_enabled():
            v = self._sweep_with_graph(z.expand(*self.context_of(z).shape[:-1], -1) if self.context_dim else z)
            log_slope = self._push(v)[1]
        else:
            v, log_slope = super()._inverse_aux(z)
        return y + self._rotate(v - z), log_slope

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return ContextLayer._path_gradient(self, value, gradient, inverse)  # the layer's Jacobian is not triangular

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, num_reflections={self.num_reflections}{context}"


def generalized_sylvester(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_reflections: int | None = None,
    context_dim: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
    order: int = 1,
    solver: Sweeps | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> GeneralizedSylvester:
    """Build a :class:`GeneralizedSylvester`; the arguments are those of the class."""
    return GeneralizedSylvester(
        input_dim,
        hidden_dims,
        num_reflections=num_reflections,
        context_dim=context_dim,
        activation=activation,
        order=order,
        solver=solver,
        atol=atol,
        rtol=rtol,
        max_steps=max_steps,
        on_failure=on_failure,
    )


conditional_generalized_sylvester = conditional_factory(
    generalized_sylvester, "its network also reads a context, from which a hypernetwork sets its rotation"
)
