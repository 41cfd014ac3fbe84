r"""Jacobians of networks, as products of matrices and diagonal matrices, in as few dimensions as possible.

The Jacobian of a network is :math:`J = S_L W_L \cdots S_1 W_1` with diagonal :math:`S_i`, which differ from point to
point. By Sylvester's identity :math:`\det(I + A B) = \det(I + B A)`, the cyclic product may start at any layer without
changing the determinant of :math:`I + J`. Starting at the narrowest layer gives the smallest matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_invflows.linalg.lowrank import rows_times

__all__ = ["cyclic_product", "narrowest"]


def narrowest(weights: Sequence[Tensor]) -> int:
    """Return the number of matrices in front of the narrowest layer; 0 means the input."""
    widths = [weights[0].shape[-1], *(w.shape[-2] for w in weights[:-1])]
    return widths.index(min(widths))


def cyclic_product(weights: Sequence[Tensor], slopes: Sequence[Tensor | None], start: int = 0) -> Tensor:
    r"""Return :math:`S_k W_k \cdots S_1 W_1 S_L W_L \cdots S_{k+1} W_{k+1}` for ``start`` k.

    Args:
        weights: :math:`W_1, \dots, W_L`, each ``(n_i, n_{i-1})``.
        slopes: The diagonals ``(*B, n_i)``; None stands for the identity.
        start: Layer at which the cycle starts; 0 gives the Jacobian itself.

    Returns:
        ``(*B, n_start, n_start)``, in O(n_start * sum n_i n_{i-1}) per point.
    """
    slopes = [None if s is None else s.to(weights[0].dtype) for s in slopes]  # autocast may have rounded them
    factors: list[tuple[Tensor, Tensor | None]] = []
    for weight, slope in [*zip(weights, slopes, strict=True)][start:] + [*zip(weights, slopes, strict=True)][:start]:
        if factors and factors[-1][1] is None:  # no diagonal in between: one matrix for all points
            factors[-1] = weight @ factors[-1][0], slope
        else:
            factors.append((weight, slope))
    # transposed, so that each step multiplies the rows of all points by one matrix
    (weight, slope), *rest = factors
    product = weight.transpose(-2, -1)
    if rest and slope is not None and rest[0][0].shape[-2] <= slope.shape[:-1].numel():
        (weight, next_slope), *rest = rest
        product, slope = _sandwich(product, slope, weight.transpose(-2, -1)), next_slope
    for weight, next_slope in rest:
        product = rows_times(product if slope is None else product * slope.unsqueeze(-2), weight.transpose(-2, -1))
        slope = next_slope
    return (product if slope is None else product * slope.unsqueeze(-2)).transpose(-2, -1)


def _sandwich(left: Tensor, slope: Tensor, right: Tensor) -> Tensor:
    """Return ``left diag(slope) right`` for each point by a single product, without a copy of ``left`` per point."""
    outer = left.transpose(-2, -1).unsqueeze(-1) * right.unsqueeze(-2)  # (n, p, q)
    return (slope @ outer.flatten(-2)).unflatten(-1, outer.shape[-2:])
