r"""Sylvester layers: several planar layers at once, whose inverse is solved in as many dimensions.

van den Berg et al. (2018), *Sylvester normalizing flows for variational inference*. The paper has no inverse, and the
fixed-point iteration of public implementations diverges for some legal parameters. Here the inverse is the root of a
triangular system.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.solvers import (
    Newton,
    tanh_slope,
    triangular_tanh_root,
)
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.constants import HoldsConstants
from pyro_invflows.support.precision import at_least_single, full_precision

__all__ = ["Sylvester", "conditional_sylvester", "sylvester"]


class Sylvester(HoldsConstants, Bijection):
    r"""Pushes points within a learned subspace, by a network with one hidden layer and triangular weights.

    .. math:: y = x + Q R_1 \tanh(R_2 Q^T x + b), \qquad T = R_2 R_1, \quad T_{ii} > -1,

    where Q is a D x m matrix with orthonormal columns and :math:`R_1, R_2` are upper triangular. Invertible because the
    Jacobian within the subspace, :math:`I + T\,\mathrm{diag}(\tanh')`, is triangular with a positive diagonal.
    Choose it where :class:`Planar` would need many layers: it has m hidden units in one layer.

    **Forward**: O(D m) per point after O(D m^2) once, with Q in compact WY form. **Inverse**: the root of :math:`s +
    T \tanh(s) = R_2 Q^T y + b` in m dimensions: diagonal Newton steps for all points, triangular Newton steps for those
    that need them, and back-substitution for those that are left, so that it converges for all legal parameters.
    Implicit gradients of all orders, in reverse and forward mode. If some :math:`1 + T_{ii} \tanh'` is close to 0, x is
    ill-conditioned: y is reproduced to rounding error; x may not be. **Log-det**:
    :math:`\sum_i \log(\tanh^2 s_i + d_i (1 - \tanh^2 s_i))`, O(m) more. **Identity**: exactly, at initialisation
    (:math:`R_1 = 0`); Q and :math:`R_2` are drawn with torch's global generator.

    Any values of the parameters are legal. To set the triangular matrices themselves, use :meth:`set_triangles`.

    Args:
        input_dim: Size D of an event.
        hidden_dim: Number m of hidden units, between 1 and D; default ``min(D, 32)``.
        num_reflections: Number k of Householder reflections in Q; the default, m, is enough for every Q.
        solver: Tolerances, the maximum number of triangular Newton steps (8 by default), and what happens on failure;
            default ``solvers.Newton()``.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of steps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        vectors: Reflection vectors of Q as rows, a parameter ``(k, D)``.
        weight: Parameter ``(m, m)``. Its strict upper triangle is that of :math:`R_1`, its strict lower triangle that
            of :math:`R_2^T`, and its diagonal a sets :math:`1 + T_{ii} = d_i = e^{\mathrm{asinh}\,a_i}`.
        raw_scale: Parameter ``(m,)``, r, which sets the diagonal of :math:`R_2` to :math:`e^{\mathrm{asinh}\,r_i}`.
        bias: b, a parameter ``(m,)``.
        triangle: Constant mask, a buffer; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``.

    Raises:
        ValueError: if ``hidden_dim`` is not between 1 and D, or an event does not have the size D.
        ConvergenceError: in the inverse, only because of rounding. A y that is not finite gives NaN.

    Differs from Pyro's ``Sylvester``: it has an inverse, its log-det is correct, T_ii may exceed 1, and it solves one
    triangular system instead of looping over the reflections.

    References:
        van den Berg et al. (2018), Eqs. 10-14 and 17.

    Example:
        >>> layer = Sylvester(5, 2)
        >>> _ = torch.nn.init.normal_(layer.weight)
        >>> x = torch.randn(7, 5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    input_dim: int
    triangle: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | None = None,
        *,
        num_reflections: int | None = None,
        solver: Newton | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        input_dim = self.input_dim
        m = min(input_dim, 32) if hidden_dim is None else positive_int(hidden_dim, "hidden_dim", "Sylvester")
        if m > input_dim:
            raise ValueError(
                f"Sylvester: hidden_dim must be between 1 and input_dim, but got hidden_dim={m} and "
                f"input_dim={input_dim}; more directions than dimensions cannot be orthonormal."
            )
        k = m if num_reflections is None else positive_int(num_reflections, "num_reflections", "Sylvester", minimum=0)
        self.hidden_dim, self.num_reflections = m, k
        self.solver = chosen_settings(
            Newton(), solver, "Sylvester", atol=atol, rtol=rtol, max_steps=max_steps, on_failure=on_failure
        )
        self.vectors = nn.Parameter(torch.empty(k, input_dim))
        self.weight = nn.Parameter(torch.empty(m, m))
        self.raw_scale = nn.Parameter(torch.empty(m))
        self.bias = nn.Parameter(torch.empty(m))
        self.reset_parameters()

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        return {"triangle": linalg.triangle_mask(self.num_reflections, like)}

    def reset_parameters(self) -> None:
        """Set R_1 = 0 and b = 0, so that the layer is the identity; draw Q and R_2."""
        self.fill_constants()
        nn.init.normal_(self.vectors, std=self.input_dim**-0.5)
        nn.init.normal_(self.weight, std=0.1 * self.hidden_dim**-0.5)
        with torch.no_grad():
            self.weight.tril_(-1)
        nn.init.zeros_(self.raw_scale)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def set_triangles(self, upper1: Tensor, upper2: Tensor) -> None:
        """Set the parameters so that R_1 and R_2 are the given matrices, up to the signs of hidden units.

        Args:
            upper1: R_1, ``(m, m)``.
            upper2: R_2, ``(m, m)``.

        Raises:
            ValueError: if a matrix is not finite and upper triangular, if R_2 has a zero on its diagonal, or if a
                product of two corresponding diagonal entries is not above -1.
        """
        m = self.hidden_dim
        for name, matrix in (("upper1", upper1), ("upper2", upper2)):
            if matrix.shape != (m, m) or not torch.equal(matrix, matrix.triu()) or not matrix.isfinite().all():
                raise ValueError(
                    f"Sylvester.set_triangles: {name} must be a finite upper triangular ({m}, {m}) matrix."
                )
        first, second = upper1.diagonal(), upper2.diagonal()
        if (second == 0).any() or not (first * second > -1).all():
            raise ValueError(
                "Sylvester.set_triangles: the diagonal of upper2 must not hold zeros, and its products with that of "
                f"upper1 must be above -1, but got the products {(first * second).tolist()}."
            )
        # tanh is odd, so negating a unit's row of R_2, its bias and its column of R_1 changes nothing
        sign = second.sign()
        diagonal = torch.diag(linalg.positive_inverse(1 + first * second))
        self.weight.copy_((upper1 * sign).triu(1) + (upper2 * sign.unsqueeze(-1)).triu(1).mT + diagonal)
        self.raw_scale.copy_(linalg.positive_inverse(second.abs()))
        self.bias.mul_(sign)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return ``Q R_1`` and ``Q R_2^T`` (*B, D, m), R_1, R_2 (*B, m, m), and ``d = 1 + diag T`` (*B, m)."""
        frame = linalg.thin_frame(self.vectors, self.hidden_dim, mask=self.triangle)
        upper1, upper2, raw = linalg.split_triangles(self.weight)
        d = linalg.positive(raw)
        first = upper1 + torch.diag_embed((d - 1) * linalg.positive(-self.raw_scale))
        second = upper2 + torch.diag_embed(linalg.positive(self.raw_scale))
        return frame @ first, frame @ second.mT, first, second, d

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, into, _, _, d = self._matrices()
        h = torch.tanh(linalg.rows_times(x, into) + self.bias)
        return x + linalg.rows_times(h, out.mT), (h, d)

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, into, first, second, d = self._matrices()
        c = linalg.rows_times(y, into) + self.bias
        s = triangular_tanh_root(c, (second @ first).triu(1), d, self.solver, owner="Sylvester")
        h = torch.tanh(s)
        return y - linalg.rows_times(h, out.mT), (h, d)

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[Tensor, Tensor]) -> Tensor:
        return tanh_slope(*aux).log().sum(-1)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, hidden_dim={self.hidden_dim}, num_reflections={self.num_reflections}"


def sylvester(
    input_dim: int,
    hidden_dim: int | None = None,
    *,
    num_reflections: int | None = None,
    solver: Newton | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> Sylvester:
    """Build a :class:`Sylvester`."""
    return Sylvester(
        input_dim,
        hidden_dim,
        num_reflections=num_reflections,
        solver=solver,
        atol=atol,
        rtol=rtol,
        max_steps=max_steps,
        on_failure=on_failure,
    )


conditional_sylvester = conditional_factory(sylvester)
