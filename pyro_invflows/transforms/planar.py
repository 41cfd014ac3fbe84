r"""Planar and radial layers, which deform space along one direction or around one centre.

Rezende and Mohamed (2015), *Variational inference with normalizing flows*, Eqs. 10 to 14 and appendix A, with the
inverses that the paper omits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.solvers import Newton, tanh_root, tanh_slope
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.support.precision import at_least_single, full_precision

__all__ = ["Planar", "Radial", "conditional_planar", "conditional_radial", "planar", "radial"]


class Planar(Bijection):
    r"""Pushes points along one direction, by an amount that depends on their position along another.

    .. math:: y = x + \hat u \tanh(w \cdot x + b), \qquad \hat u \cdot w > -1.

    Invertible because the map is increasing along w: with :math:`d = e^{\mathrm{asinh}(u \cdot w)} > 0`, the vector
    :math:`\hat u = u + \frac{d - 1 - u \cdot w}{|w|^2} w` satisfies :math:`\hat u \cdot w = d - 1`. Choose it for flows
    of many cheap layers in few dimensions; one :class:`Sylvester` layer does the work of many of these.

    **Forward**: O(D). **Inverse**: one scalar equation per point, :math:`s + (d - 1) \tanh s = w \cdot y + b`. Newton's
    method starts at the end of a bracket from which it converges monotonically (6 steps, more for the points that need
    them). Implicit gradients of all orders, in reverse and forward mode. Raises ``ConvergenceError`` if a point fails
    to converge. If d is close to 0, x is ill-conditioned near :math:`s = 0`: y is reproduced to rounding error; x may
    not be. **Log-det**: :math:`\log(\tanh^2 s + d\,(1 - \tanh^2 s))`, O(1) more. **Identity**: exactly, at
    initialisation (u = 0); w is drawn with torch's global generator.

    Args:
        input_dim: Size D of an event.
        solver: Tolerances, the maximum number of steps (40 by default), and what happens on failure; default
            ``solvers.Newton()``.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of steps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        u: Parameter ``(D,)``; any value is legal.
        w: Parameter ``(D,)``.
        bias: b, a parameter ``(1,)``.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D.
        ConvergenceError: in the inverse, only because of rounding. A y that is not finite gives NaN.

    Differs from Pyro's ``Planar``: it has an inverse, is initialised as the identity, and allows w = 0.

    References:
        Rezende and Mohamed (2015), Eqs. 10-12; the constraint as in appendix A.1, with asinh for softplus, so that
        u = 0 is the identity.

    Example:
        >>> layer = Planar(3)
        >>> _ = torch.nn.init.normal_(layer.u)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    input_dim: int

    def __init__(
        self,
        input_dim: int,
        *,
        solver: Newton | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.solver = chosen_settings(
            Newton(), solver, "Planar", atol=atol, rtol=rtol, max_steps=max_steps, on_failure=on_failure
        )
        self.u = nn.Parameter(torch.empty(input_dim))
        self.w = nn.Parameter(torch.empty(input_dim))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set u = 0 and b = 0, so that the layer is the identity; draw w."""
        bound = 1 / math.sqrt(self.input_dim)
        nn.init.uniform_(self.w, -bound, bound)
        nn.init.zeros_(self.u)
        nn.init.zeros_(self.bias)

    def _direction(self) -> tuple[Tensor, Tensor]:
        """Return u-hat (*B, D) and ``d = 1 + u-hat . w`` (*B, 1)."""
        product = (self.u * self.w).sum(-1, keepdim=True)
        square = (self.w * self.w).sum(-1, keepdim=True).clamp_min(torch.finfo(self.w.dtype).tiny)
        # d - 1 - p = sqrt(1 + p^2) - 1 = p^2 / (1 + sqrt(1 + p^2)), and p^2 / |w|^2 stays bounded as w -> 0
        along = product * (product / square) / (1 + (1 + product * product).sqrt())
        u = torch.addcmul(self.u, along, self.w)
        # Remove what is left along w by rounding. It is zero in exact arithmetic, hence the detach.
        rounding = (u * self.w).sum(-1, keepdim=True) - torch.expm1(torch.asinh(product))
        return u - (rounding / square * self.w).detach(), linalg.positive(product)

    def _project(self, x: Tensor) -> Tensor:
        if self.w.dim() == 1:
            return F.linear(x, self.w.unsqueeze(0), self.bias)
        return (x * self.w).sum(-1, keepdim=True) + self.bias

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u, d = self._direction()
        h = torch.tanh(self._project(x))
        return torch.addcmul(x, h, u), (h, d)

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u, d = self._direction()
        h = torch.tanh(tanh_root(self._project(y), d, self.solver, owner="Planar"))
        return torch.addcmul(y, h, u, value=-1), (h, d)

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[Tensor, Tensor]) -> Tensor:
        return tanh_slope(*aux).log().squeeze(-1)


class Radial(Bijection):
    r"""Pulls points towards a centre, or pushes them away.

    .. math:: y = x + \frac{\beta}{\alpha + r} (x - x_0), \qquad r = |x - x_0|, \quad \alpha > 0, \quad \beta > -\alpha.

    Invertible because the distance of y from the centre, :math:`R = r + \beta r / (\alpha + r)`, increases with r.
    Choose it for flows of many cheap layers in few dimensions, together with :class:`Planar`.

    **Forward**: O(D). **Inverse**: closed form; r is the positive root of
    :math:`r^2 + (\alpha + \beta - R) r - \alpha R = 0`; O(D), with derivatives of all orders except at the centre,
    where the map itself has a kink. **Log-det**: :math:`(D - 1) \log(1 - q + d q) + \log(1 - q^2 + d q^2)`, where
    :math:`q = \alpha / (\alpha + r)` and :math:`d = 1 + \beta / \alpha`. **Identity**: exactly, at initialisation
    (:math:`\beta = 0`).

    Args:
        input_dim: Size D of an event.

    Attributes:
        centre: :math:`x_0`, a parameter ``(D,)``.
        raw_alpha: Parameter ``(1,)``, a, which sets :math:`\alpha = e^{\mathrm{asinh}\,a}`.
        raw_beta: Parameter ``(1,)``, b, which sets :math:`1 + \beta / \alpha = e^{\mathrm{asinh}\,b}`.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D.

    Differs from Pyro's ``Radial``: it has an inverse and is initialised as the identity.

    References:
        Rezende and Mohamed (2015), Eq. 14 and appendix A.2.

    Example:
        >>> layer = Radial(3)
        >>> _ = torch.nn.init.constant_(layer.raw_beta, -2.0)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    input_dim: int

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.centre = nn.Parameter(torch.empty(input_dim))
        self.raw_alpha = nn.Parameter(torch.empty(1))
        self.raw_beta = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Set :math:`\beta = 0`, so that the layer is the identity, and :math:`\alpha = 1`; draw the centre."""
        bound = 1 / math.sqrt(self.input_dim)
        nn.init.uniform_(self.centre, -bound, bound)
        nn.init.zeros_(self.raw_alpha)
        nn.init.zeros_(self.raw_beta)

    @staticmethod
    def _norm(difference: Tensor) -> Tensor:
        # scaled by a constant, so that squares of huge values do not overflow
        scale = difference.detach().abs().amax(-1, keepdim=True).clamp_min(1)
        return scale * torch.linalg.vector_norm(difference / scale, dim=-1, keepdim=True)

    def _constants(self) -> tuple[Tensor, Tensor]:
        """Return alpha and ``d = 1 + beta / alpha``, both positive."""
        return linalg.positive(self.raw_alpha), linalg.positive(self.raw_beta)

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        alpha, d = self._constants()
        difference = x - self.centre
        r = self._norm(difference)
        return torch.addcmul(x, (d - 1) * (alpha / (alpha + r)), difference), (r, alpha, d)

    @at_least_single
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        alpha, d = self._constants()
        difference = y - self.centre
        big = self._norm(difference)
        limit = alpha * d
        p = limit - big
        scale = (limit + big).detach()  # any constant would do; it keeps the squares from overflowing
        root = p.abs() + scale * ((p / scale) ** 2 + 4 * (alpha / scale) * (big / scale)).sqrt()
        r = torch.where(p > 0, 2 * alpha * big / root, root / 2)
        return self.centre + difference * ((alpha + r) / (limit + r)), (r, alpha, d)

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        r, alpha, d = aux
        near, far = alpha / (alpha + r), r / (alpha + r)
        tangential = (far + d * near).log()
        radial = (far * (1 + near) + d * near * near).log()
        return ((self.input_dim - 1) * tangential + radial).squeeze(-1)


def planar(
    input_dim: int,
    *,
    solver: Newton | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> Planar:
    """Build a :class:`Planar`."""
    return Planar(input_dim, solver=solver, atol=atol, rtol=rtol, max_steps=max_steps, on_failure=on_failure)


def radial(input_dim: int) -> Radial:
    """Build a :class:`Radial`."""
    return Radial(input_dim)


conditional_planar = conditional_factory(planar)
conditional_radial = conditional_factory(radial)
