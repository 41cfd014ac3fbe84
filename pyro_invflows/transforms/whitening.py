r"""Whitening: an affine layer whose mean and covariance are estimated from data instead of learned by gradients.

Kessy, Lewin and Strimmer (2018), *Optimal whitening and decorrelation*, compare the methods that whiten. The
statistics are kept in float64 and merged pairwise (Chan, Golub and LeVeque 1983), so that a stream of batches gives the
same result as one pass over all rows. On a device without float64 they stay on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.linalg import correlations, covariance_roots, oas_weight, triangular_root
from pyro_invflows.support.checks import floating_tensor
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.moments import (
    Moments,
    double,
    finite_rows,
    has_spread,
    moments,
    refuse_overflow,
    rounded_copy,
)
from pyro_invflows.support.precision import at_least_single

__all__ = ["Whitening", "whitening"]

_METHODS = ("zca", "pca", "cholesky", "zca-cor", "pca-cor", "diagonal")


class Whitening(Bijection):
    r"""Colours independent noise with the mean and covariance of data; its inverse whitens.

    .. math:: y = \mu + A e, \qquad A A^T = \Sigma.

    Invertible if :math:`\Sigma` has full rank; shrinkage takes care of that. Choose it to relieve a flow of location,
    scale and all correlations, as the layer next to the data, or to colour injected noise
    (:func:`~pyro_invflows.whitened_noise`).

    :math:`\mu` and :math:`\Sigma` are estimated from data, by explicit calls only; scoring and sampling never change
    them. :meth:`observe` adds a batch to the running statistics without changing the map; :meth:`adapt` sets the map
    from the statistics; :meth:`fit` does both for a whole data set. If ``torch.distributed`` is initialised, each
    ``fit`` and ``observe`` adds the rows of **all** processes, and every process must call it.

    **Forward**, **Inverse**: one matrix product, O(D^2). No gradient passes through a decomposition, so equal
    eigenvalues of :math:`\Sigma` do no harm. **Log-det**: log det A, times the number of pixels of an image.
    **Identity**: exactly, at initialisation.

    ``adapt`` costs O(D^3) (two decompositions), ``observe`` O(D^2) per row. The statistics are kept in float64. If the
    layer is moved to a device without float64 (``"mps"``), they stay on the CPU, and rows are copied there.

    Args:
        input_dim: Size D of an event along ``dim``.
        method: Which root A of :math:`\Sigma` to use. With :math:`\Sigma = U \Lambda U^T`, the diagonal matrix V of
            variances and the correlations :math:`P = G \Theta G^T`, it is

            * ``"zca"``: :math:`\Sigma^{1/2}`; whitened data stay closest to the data;
            * ``"pca"``: :math:`U \Lambda^{1/2}`, largest eigenvalue first, diagonal of U positive;
            * ``"cholesky"``: the lower triangular factor of :math:`\Sigma` (the paper factorises the precision);
            * ``"zca-cor"``: :math:`V^{1/2} P^{1/2}`; whitened data stay closest to the standardised data;
            * ``"pca-cor"``: :math:`V^{1/2} G \Theta^{1/2}`;
            * ``"diagonal"``: :math:`V^{1/2}`, the standard deviations alone. The inverse standardises each column and
              leaves the correlations as they are.
        shrinkage: Weight :math:`\rho` in :math:`\Sigma = (1 - \rho) S + \rho\, \mathrm{diag}(S)`, by which the
            correlations shrink; S is the sample covariance (with N - 1). Either a number in [0, 1], or ``"oas"``, the
            oracle approximating shrinkage of the correlation matrix, which depends only on S and N and tends to zero
            as 1/N. The variances are not shrunk, and rescaling a column of the data only rescales that column of y.
            Shrinkage makes A invertible even if S has deficient rank; :meth:`adapt` warns if this was necessary.
            A constant column carries no information about its scale and gets the scale 1; if all rows are equal, A = I.
        trainable: Whether :math:`\mu` and the triangular factor of A are parameters; :meth:`fit` and :meth:`adapt` set
            their values.
        dim: Axis of the D elements: -1 for vectors, -3 for the channels of images, where every pixel counts as a row.

    Attributes:
        mean: :math:`\mu`, ``(D,)``, a parameter if trainable, else a buffer.
        triangle: Parameter ``(D, D)``, if trainable. With A = L Q, L lower triangular and Q orthogonal, it holds the
            entries of L below the diagonal, and on the diagonal the logarithms of those of L.
        rotation: Q, a buffer ``(D, D)``, if trainable.
        colouring: A, a buffer ``(D, D)``, if not trainable.
        whitening: :math:`A^{-1}`, a buffer ``(D, D)``, if not trainable.
        log_scale: log det A, a scalar buffer, if not trainable.
        statistics: Module with the buffers ``count``, ``mean`` ``(D,)`` and ``scatter`` ``(D, D)`` of the rows
            observed so far, in float64.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is treated alike;
        log-det ``(*B,)``.

    Raises:
        TypeError: in ``fit`` and ``observe``, if the data are not a floating point tensor.
        ValueError: if the method or shrinkage is unknown; in ``fit`` and ``observe``, if there are no rows, or if rows
            or their squares are not finite (the statistics then stay as they were); in ``adapt``, if no rows have been
            observed, or, with ``shrinkage=0``, if the covariance has deficient rank (as with a constant column).

    References:
        Kessy, Lewin and Strimmer (2018), *Optimal whitening and decorrelation*, Table 1; Schaefer and Strimmer (2005),
        *A shrinkage approach to large-scale covariance matrix estimation*, Table 2, target D, which keeps the
        variances; Chen, Wiesel, Eldar and Hero (2010), *Shrinkage algorithms for MMSE covariance estimation*, Eq. 23,
        for OAS.

    Example:
        >>> data = torch.randn(1000, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.3]]) + 5.0
        >>> layer = Whitening(3, shrinkage=0.0).fit(data)
        >>> torch.allclose(torch.cov(layer.inv(data).T), torch.eye(3), atol=1e-4)
        True
        >>> torch.allclose(layer(layer.inv(data).clone()), data, atol=1e-4)
        True
    """

    input_dim: int
    colouring: Tensor
    whitening: Tensor
    rotation: Tensor
    log_scale: Tensor
    # statistics of data are not for a hypernetwork to set
    conditionable = False

    def __init__(
        self,
        input_dim: int,
        *,
        method: str = "zca",
        shrinkage: float | str = "oas",
        trainable: bool = False,
        dim: int = -1,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        if method not in _METHODS:
            raise ValueError(f"Whitening: method must be one of {', '.join(_METHODS)}, but got {method!r}.")
        number = isinstance(shrinkage, (int, float)) and not isinstance(shrinkage, bool)
        if not (0 <= shrinkage <= 1 if number else shrinkage == "oas"):  # type: ignore[operator]
            raise ValueError(f"Whitening: shrinkage must be a number in [0, 1] or 'oas', but got {shrinkage!r}.")
        self.method = method
        self.shrinkage = shrinkage
        self.trainable = bool(trainable)
        self.statistics = _Moments(input_dim)
        self.mean: Tensor
        if trainable:
            self.mean = nn.Parameter(torch.empty(input_dim))
            # below the diagonal: the entries of L in A = L Q; on the diagonal: the logarithms of those of L
            self.triangle = nn.Parameter(torch.empty(input_dim, input_dim))
            self.register_buffer("rotation", torch.empty(input_dim, input_dim))  # Q
        else:
            self.register_buffer("mean", torch.empty(input_dim))
            self.register_buffer("colouring", torch.empty(input_dim, input_dim))  # A
            self.register_buffer("whitening", torch.empty(input_dim, input_dim))  # A^-1
            self.register_buffer("log_scale", torch.empty(()))  # log det A
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the map to the identity and discard the statistics."""
        self.reset_statistics()
        eye = torch.eye(self.input_dim, dtype=torch.float64, device=self.statistics.mean.device)
        self._set_map(torch.zeros_like(self.statistics.mean), eye, eye)

    # ------------------------------------------------------------------ from data

    def fit(self, data: Tensor) -> Whitening:
        """Replace the statistics by those of ``data`` ``(*N, D)``, set the map from them, and return the layer."""
        self.statistics.replace(*self.statistics.of(self._rows, data))
        self._adapt()
        return self

    def observe(self, batch: Tensor) -> Whitening:
        """Add a batch ``(*N, D)`` to the running statistics, and return the layer. Only :meth:`adapt` sets the map."""
        self.statistics.merge(*self.statistics.of(self._rows, batch))
        return self

    def adapt(self) -> Whitening:
        """Set the map from all rows observed so far, or since :meth:`reset_statistics`, and return the layer.

        Call it between optimiser steps: autograd raises an error in a backward pass through values that were computed
        with the previous map.
        """
        self._adapt()
        return self

    def _adapt(self) -> None:
        self._set_map(self.statistics.mean, *self._roots())

    def reset_statistics(self) -> None:
        """Discard the statistics of all rows observed so far, for example if the distribution of the data drifts."""
        self.statistics.reset()

    @property
    def covariance(self) -> Tensor:
        """The sample covariance (with N - 1) of the rows observed so far, ``(D, D)``, in float64."""
        return self.statistics.covariance()

    @property
    def matrix(self) -> Tensor:
        """The matrix A, ``(D, D)``."""
        return self._triangle() @ self.rotation if self.trainable else self.colouring

    def _rows(self, data: Tensor) -> Tensor:
        """Check the data and return them as rows ``(N, D)`` in float64."""
        floating_tensor(data, "data", "Whitening")
        self.check_event(data.shape, inverse=True)
        return finite_rows(data, self.dim, "Whitening")

    def _roots(self) -> tuple[Tensor, Tensor]:
        """Return A and its inverse for the rows observed."""
        count, d = self.statistics.count.item(), self.input_dim
        if count < 1:
            raise ValueError(
                "Whitening: adapt() needs statistics, but has observed no rows yet. Call observe(batch) first, or "
                "fit(data) instead."
            )
        raw, spread = self.statistics.covariance(), self.statistics.spread()
        constant = d - int(spread.sum())
        if constant == d and self.shrinkage != 0:  # nothing is known about the scale
            warnings.warn(
                f"Whitening: the {count:.0f} rows observed have no spread, so only their mean is used, with A = I.",
                stacklevel=4,  # the caller of fit or adapt
            )
            return (eye := torch.eye(d, dtype=raw.dtype, device=raw.device)), eye
        scale, matrix = correlations(raw, spread)
        if self.method == "diagonal":
            matrix = torch.eye(d, dtype=raw.dtype, device=raw.device)
        eigenvalues = torch.linalg.eigvalsh(matrix)
        limit = d * torch.finfo(raw.dtype).eps * eigenvalues[-1]
        missing = int((eigenvalues <= limit).sum())
        if self.shrinkage == "oas":
            # without the constant columns, which do not show that the others are uncorrelated
            weight = oas_weight(count, d - constant, matrix.square().sum() - constant)
            if missing:  # for any number of rows, enough to lift the missing directions above rounding error
                weight = torch.maximum(weight, 10 * limit)
        else:
            weight = raw.new_tensor(float(self.shrinkage))
        rank = d - constant - missing
        if (constant and not weight) or not (1 - weight) * eigenvalues[0] + weight > limit:
            raise ValueError(
                f"Whitening: with shrinkage={self.shrinkage:g}, the covariance must have full rank, but that of the "
                f"{count:.0f} rows observed has rank {rank} of {d}. Observe more rows, leave out constant columns, or "
                "use more shrinkage."
            )
        if rank < d:
            fills = [f"{constant} constant column(s) keep the scale 1"] if constant else []
            if missing:
                fills.append(f"shrinking the correlations by {weight.item():.2g} fills the missing directions")
            warnings.warn(
                f"Whitening: the covariance of the {count:.0f} rows observed has rank {rank} of {d}; "
                f"{', and '.join(fills)}.",
                stacklevel=4,  # the caller of fit or adapt
            )
        matrix = (1 - weight) * matrix
        matrix.diagonal().fill_(1.0)
        return covariance_roots(scale, matrix, self.method)

    @torch.no_grad()
    def _set_map(self, mean: Tensor, colouring: Tensor, whitening: Tensor) -> None:
        rounded_copy(self.mean, mean)
        if self.trainable:
            # every root of the covariance is a rotation of the triangular one: A = L Q
            factor = triangular_root(colouring)
            rounded_copy(self.triangle, factor.tril(-1) + factor.diagonal().log().diag())
            rounded_copy(self.rotation, torch.linalg.solve_triangular(factor, colouring, upper=False))
        else:
            rounded_copy(self.colouring, colouring)
            rounded_copy(self.whitening, whitening)
            rounded_copy(self.log_scale, torch.linalg.slogdet(colouring)[1])

    def _apply(self, fn: Any, recurse: bool = True) -> Whitening:
        before = torch.finfo(self.mean.dtype).eps
        super()._apply(fn, recurse)
        if torch.finfo(self.mean.dtype).eps < before:
            self._sharpen()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = state_dict.get(f"{prefix}mean")
        if loaded is not None and torch.finfo(self.mean.dtype).eps < torch.finfo(loaded.dtype).eps:
            self._sharpen()

    @torch.no_grad()
    def _sharpen(self) -> None:
        """Make A and its inverse consistent again to all digits, after a change to a more precise dtype."""
        if self.trainable:
            q, r = torch.linalg.qr(double(self.rotation))
            rounded_copy(self.rotation, q * r.diagonal().sign())
        else:
            colouring = double(self.colouring)
            scale = torch.linalg.vector_norm(colouring, dim=-1, keepdim=True)  # rows may differ in their units
            rounded_copy(self.whitening, torch.linalg.inv(colouring / scale) / scale.mT)
            rounded_copy(self.log_scale, torch.linalg.slogdet(colouring)[1])

    # ------------------------------------------------------------------ hooks

    def _triangle(self) -> Tensor:
        return self.triangle.tril(-1) + self.triangle.diagonal().exp().diag()

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, None]:
        rows = x if self.dim == -1 else x.movedim(self.dim, -1)
        y = linear(rows, self.matrix, self.mean)
        return (y if self.dim == -1 else y.movedim(-1, self.dim)), None

    @at_least_single
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, None]:
        # centred first, because W y - W mu would cancel if mu is large
        rows = (y if self.dim == -1 else y.movedim(self.dim, -1)) - self.mean
        if self.trainable:
            flat = rows.reshape(-1, self.input_dim)
            flat = torch.linalg.solve_triangular(self._triangle().mT, flat, upper=True, left=False) @ self.rotation
            x = flat.reshape(rows.shape)
        else:
            x = linear(rows, self.whitening)
        return (x if self.dim == -1 else x.movedim(-1, self.dim)), None

    def _aux(self, x: Tensor, y: Tensor) -> None:
        return None

    def _log_det(self, x: Tensor, y: Tensor, aux: None) -> Tensor:
        pixels = x.shape[x.dim() + self.dim + 1 :].numel()
        log_scale = self.triangle.diagonal().sum() if self.trainable else self.log_scale
        return (log_scale * pixels).expand(self.log_det_shape(x))

    @at_least_single
    def _adjoint(self, gradient: Tensor, inverse: bool) -> Tensor:
        """Return ``J^{-T} g``; ``J^T g`` in the inverse direction."""
        rows = gradient if self.dim == -1 else gradient.movedim(self.dim, -1)
        if inverse:
            rows = linear(rows, self.matrix.mT)
        elif self.trainable:
            flat = rows.reshape(-1, self.input_dim) @ self.rotation.mT
            flat = torch.linalg.solve_triangular(self._triangle(), flat, upper=False, left=False)
            rows = flat.reshape(rows.shape)
        else:
            rows = linear(rows, self.whitening.mT)
        return rows if self.dim == -1 else rows.movedim(-1, self.dim)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return linear_path_gradient(self, value, inverse, lambda: self._adjoint(gradient, inverse))

    def extra_repr(self) -> str:
        parts = [f"{self.input_dim}, method={self.method!r}, shrinkage={self.shrinkage!r}"]
        if self.trainable:
            parts.append("trainable=True")
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        return ", ".join(parts)


# ---------------------------------------------------------------------- statistics


def _on_cpu(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="cpu") if value.is_meta else value.cpu()


class _Moments(nn.Module):
    """Count, mean and scatter (sum of centred outer products) of rows, in float64 whatever the layer's dtype.

    If the layer's device has no float64, they stay on the CPU.

    Attributes:
        count: Number of rows, a scalar buffer.
        mean: Mean of the rows, a buffer ``(D,)``.
        scatter: Sum of the outer products of the centred rows, a buffer ``(D, D)``.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        device = torch.get_default_device()
        zeros = partial(torch.zeros, dtype=torch.float64, device="cpu" if lacks_float64(device) else device)
        self.register_buffer("count", zeros(()))
        self.register_buffer("mean", zeros(size))
        self.register_buffer("scatter", zeros(size, size))

    def _apply(self, fn: Any, recurse: bool = True) -> _Moments:
        if lacks_float64(fn(torch.empty(0, device=self.count.device)).device):
            fn = _on_cpu
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def of(self, as_rows: Callable[[Tensor], Tensor], data: Tensor) -> Moments:
        """Return the statistics of ``data``, together with those of all other processes, if any."""
        return moments(lambda: as_rows(data), self.mean, "Whitening")

    @torch.no_grad()
    def merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Add the statistics of another set of rows (Chan, Golub and LeVeque 1983, Eq. 2.1)."""
        total = self.count + count
        delta = mean - self.mean
        step = delta * (self.count * count / total).sqrt()
        self.replace(total, self.mean + delta * (count / total), (self.scatter + scatter).addr_(step, step))

    @torch.no_grad()
    def replace(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Replace the statistics by others.

        Raises:
            ValueError: if these have overflowed; the statistics then stay as they were.
        """
        refuse_overflow(scatter, "Whitening")
        self.count.copy_(count)
        self.mean.copy_(mean)
        self.scatter.copy_(scatter)

    def reset(self) -> None:
        """Set all statistics to zero."""
        for buffer in (self.count, self.mean, self.scatter):
            buffer.zero_()

    def spread(self) -> Tensor:
        """Return, for each column, whether its values differ by more than the rounding of their mean."""
        return has_spread(self.mean, self.covariance().diagonal())

    def covariance(self) -> Tensor:
        """Return the sample covariance, or zeros if there are fewer than two rows."""
        return self.scatter / (self.count - 1).clamp_min(1.0)


def whitening(
    input_dim: int,
    *,
    method: str = "zca",
    shrinkage: float | str = "oas",
    trainable: bool = False,
    dim: int = -1,
) -> Whitening:
    """Build a :class:`Whitening`; it is initially the identity."""
    return Whitening(input_dim, method=method, shrinkage=shrinkage, trainable=trainable, dim=dim)
