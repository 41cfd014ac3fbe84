r"""Whitening: an affine layer that takes its mean and covariance from data instead of from a gradient.

The five methods, and how they differ, are in Kessy, Lewin and Strimmer (2018), *Optimal whitening and decorrelation*.
Statistics are kept in float64 and merged pairwise (Chan, Golub and LeVeque 1983), so that a stream of batches ends
where one pass over all rows would. On a device without float64 they stay on the CPU.
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
from pyro_invflows.linalg import correlations, covariance_roots, oas_weight, triangular_root
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.precision import at_least_single

__all__ = ["Whitening", "whitening"]

_METHODS = ("zca", "pca", "cholesky", "zca-cor", "pca-cor")


class Whitening(Bijection):
    r"""Colours independent noise with the mean and covariance of data; its inverse whitens.

    .. math:: y = \mu + A e, \qquad A A^T = \Sigma.

    Invertible while :math:`\Sigma` has full rank, which shrinkage sees to. Choose it to take location, scale and all
    correlations out of a flow's hands: next to data, or to colour injected noise
    (:func:`~pyro_invflows.whitened_noise`).

    :math:`\mu` and :math:`\Sigma` come from data, by explicit calls only; scoring and sampling never change them.
    :meth:`fit` does all at once. :meth:`observe` adds a batch to the running statistics and leaves the map alone;
    :meth:`adapt` sets the map from them. Where ``torch.distributed`` is initialised, each ``fit`` and ``observe`` adds
    the rows of **all** processes, and every process must call it.

    **Forward**, **Inverse**: one matrix product, O(D^2); no gradient goes through the factorisation, so isotropic
    covariances are safe. **Log-det**: log det A, once a pixel. **Identity**: the start, exactly.

    ``adapt`` costs O(D^3) (two decompositions), ``observe`` O(D^2) a row. The statistics are kept in float64; where the
    layer moves to a device that has none (``"mps"``), they stay on the CPU, and rows are copied there.

    Args:
        input_dim: D.
        method: What A is among the roots of :math:`\Sigma`, with :math:`\Sigma = U \Lambda U^T`, the variances V and
            the correlations :math:`P = G \Theta G^T`:

            * ``"zca"``: :math:`\Sigma^{1/2}`; whitened data stay closest to the data;
            * ``"pca"``: :math:`U \Lambda^{1/2}`, largest eigenvalue first, diagonal of U positive;
            * ``"cholesky"``: the lower triangular factor of :math:`\Sigma` (the paper factors the precision instead);
            * ``"zca-cor"``: :math:`V^{1/2} P^{1/2}`; whitened data stay closest to the standardised data;
            * ``"pca-cor"``: :math:`V^{1/2} G \Theta^{1/2}`.
        shrinkage: Weight :math:`\rho` by which the correlations shrink, in :math:`\Sigma = (1 - \rho) S + \rho\,
            \mathrm{diag}(S)`, with the sample covariance S (divided by N - 1): a number in [0, 1], or ``"oas"``, the
            oracle approximating choice for the correlation matrix, which needs nothing but S and N and vanishes as
            1/N. The variances are those of the data, and another unit of a column changes nothing but its own scale.
            Shrinkage keeps data of deficient rank invertible, and :meth:`adapt` warns when it had to. A column that is
            constant says nothing about its scale: it keeps the scale 1; rows without any spread leave A = I.
        trainable: Make :math:`\mu` and the triangular factor parameters. :meth:`fit` and :meth:`adapt` set their start.
        dim: Axis of the D elements; with ``dim=-3`` every pixel counts as a row.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3`` ``(*B, D, H, W)``, every pixel alike.

    Raises:
        ValueError: for an unknown method or shrinkage; in ``fit`` and ``observe`` for no rows at all, and rows that are
            not finite or whose squares are not (the statistics then stay as they were); in ``adapt`` before any row was
            observed, or, with ``shrinkage=0``, for a covariance of deficient rank (a constant column is one).

    References:
        Kessy, Lewin and Strimmer (2018), *Optimal whitening and decorrelation*, Table 1; Schaefer and Strimmer (2005),
        *A shrinkage approach to large-scale covariance matrix estimation*, Table 2, target D, for variances that stay;
        Chen, Wiesel, Eldar and Hero (2010), *Shrinkage algorithms for MMSE covariance estimation*, Eq. 23, for OAS.

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
    # a hypernetwork has no business with statistics of data
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
            # below the diagonal: that of the factor L in A = L Q; on it: the logarithms of L's diagonal
            self.triangle = nn.Parameter(torch.empty(input_dim, input_dim))
            self.register_buffer("rotation", torch.empty(input_dim, input_dim))  # Q
        else:
            self.register_buffer("mean", torch.empty(input_dim))
            self.register_buffer("colouring", torch.empty(input_dim, input_dim))  # A
            self.register_buffer("whitening", torch.empty(input_dim, input_dim))  # A^-1
            self.register_buffer("log_scale", torch.empty(()))  # log det A
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the map to the identity and forget all statistics."""
        self.reset_statistics()
        eye = torch.eye(self.input_dim, dtype=torch.float64, device=self.statistics.mean.device)
        self._set_map(torch.zeros_like(self.statistics.mean), eye, eye)

    # ------------------------------------------------------------------ from data

    def fit(self, data: Tensor) -> Whitening:
        """Forget all statistics, take those of ``data`` ``(*N, D)`` and set the map from them."""
        self.statistics.replace(*self.statistics.of(self._rows, data))
        self._adapt()
        return self

    def observe(self, batch: Tensor) -> Whitening:
        """Add a batch ``(*N, D)`` to the running statistics. The map changes only in :meth:`adapt`."""
        self.statistics.merge(*self.statistics.of(self._rows, batch))
        return self

    def adapt(self) -> Whitening:
        """Set the map from all rows observed since the start, or since :meth:`reset_statistics`.

        Call it between steps: autograd refuses a backward pass through what was computed with the map before.
        """
        self._adapt()
        return self

    def _adapt(self) -> None:
        self._set_map(self.statistics.mean, *self._roots())

    def reset_statistics(self) -> None:
        """Forget all rows observed so far, as before a new window of a distribution that drifts."""
        self.statistics.reset()

    @property
    def covariance(self) -> Tensor:
        """The sample covariance (N - 1) of the rows observed so far, ``(D, D)``, like all statistics in float64."""
        return self.statistics.covariance()

    @property
    def matrix(self) -> Tensor:
        """The matrix A, ``(D, D)``."""
        return self._triangle() @ self.rotation if self.trainable else self.colouring

    def _rows(self, data: Tensor) -> Tensor:
        """Check data and return it as rows ``(N, D)`` of float64."""
        if not isinstance(data, Tensor) or not data.is_floating_point():
            kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(f"Whitening needs a floating point tensor of data, but got {kind}.")
        self.check_event(data.shape, inverse=True)
        rows = _double(data.detach().movedim(self.dim, -1).reshape(-1, self.input_dim))
        # a sum is not finite where a row is not, and far cheaper than looking at each element
        if rows.numel() and not rows.sum().isfinite():
            bad = int((~rows.isfinite()).any(-1).sum())
            if bad:
                raise ValueError(
                    f"Whitening needs finite rows, but {bad} of {len(rows)} hold NaN or infinity. Nothing was added "
                    "to the statistics; leave those rows out."
                )
        return rows

    def _roots(self) -> tuple[Tensor, Tensor]:
        """Return A and its inverse for the rows observed."""
        count, d = self.statistics.count.item(), self.input_dim
        if count < 1:
            raise ValueError("Whitening has observed no rows yet: call observe(batch) before adapt(), or fit(data).")
        raw, spread = self.statistics.covariance(), self.statistics.spread()
        constant = d - int(spread.sum())
        if constant == d and self.shrinkage != 0:  # nothing is known about the scale
            warnings.warn(
                f"Whitening: the {count:.0f} rows observed have no spread, so only their mean is used and A = I.",
                stacklevel=4,  # fit or adapt was called there
            )
            return (eye := torch.eye(d, dtype=raw.dtype, device=raw.device)), eye
        scale, matrix = correlations(raw, spread)
        eigenvalues = torch.linalg.eigvalsh(matrix)
        limit = d * torch.finfo(raw.dtype).eps * eigenvalues[-1]
        missing = int((eigenvalues <= limit).sum())
        if self.shrinkage == "oas":
            # constant columns are no evidence that others are uncorrelated
            weight = oas_weight(count, d - constant, matrix.square().sum() - constant)
            if missing:  # however many rows: enough to tell the missing directions from rounding
                weight = torch.maximum(weight, 10 * limit)
        else:
            weight = raw.new_tensor(float(self.shrinkage))
        rank = d - constant - missing
        if (constant and not weight) or not (1 - weight) * eigenvalues[0] + weight > limit:
            raise ValueError(
                f"Whitening with shrinkage={self.shrinkage:g} needs a covariance of full rank, but that of the "
                f"{count:.0f} rows observed has rank {rank} of {d}. Observe more rows, leave out constant columns, or "
                "use more shrinkage."
            )
        if rank < d:
            fills = [f"{constant} constant column(s) keep the scale 1"] if constant else []
            if missing:
                fills.append(f"a shrinkage of the correlations by {weight.item():.2g} fills the missing directions")
            warnings.warn(
                f"Whitening: the covariance of the {count:.0f} rows observed has rank {rank} of {d}; "
                f"{', and '.join(fills)}.",
                stacklevel=4,  # fit or adapt was called there
            )
        matrix = (1 - weight) * matrix
        matrix.diagonal().fill_(1.0)
        return covariance_roots(scale, matrix, self.method)

    @torch.no_grad()
    def _set_map(self, mean: Tensor, colouring: Tensor, whitening: Tensor) -> None:
        _copy(self.mean, mean)
        if self.trainable:
            # every root of the covariance is its triangular one, rotated: A = L Q
            factor = triangular_root(colouring)
            _copy(self.triangle, factor.tril(-1) + factor.diagonal().log().diag())
            _copy(self.rotation, torch.linalg.solve_triangular(factor, colouring, upper=False))
        else:
            _copy(self.colouring, colouring)
            _copy(self.whitening, whitening)
            _copy(self.log_scale, torch.linalg.slogdet(colouring)[1])

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
        """Make A and its inverse agree to the last digit again, where their new dtype has more digits."""
        if self.trainable:
            q, r = torch.linalg.qr(_double(self.rotation))
            _copy(self.rotation, q * r.diagonal().sign())
        else:
            colouring = _double(self.colouring)
            scale = torch.linalg.vector_norm(colouring, dim=-1, keepdim=True)  # rows may have units of their own
            _copy(self.whitening, torch.linalg.inv(colouring / scale) / scale.mT)
            _copy(self.log_scale, torch.linalg.slogdet(colouring)[1])

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
        # centred first: W y - W mu would lose the small difference of large numbers
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

    def extra_repr(self) -> str:
        parts = [f"{self.input_dim}, method={self.method!r}, shrinkage={self.shrinkage!r}"]
        if self.trainable:
            parts.append("trainable=True")
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        return ", ".join(parts)


# ---------------------------------------------------------------------- statistics


def _double(value: Tensor) -> Tensor:
    """Bring to float64: on the CPU, where the device has none."""
    return (value.cpu() if lacks_float64(value.device) else value).double()


def _on_cpu(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="cpu") if value.is_meta else value.cpu()


def _copy(target: Tensor, value: Tensor) -> None:
    """Copy, possibly to another device; rounded before that, which may lack the wider dtype."""
    target.copy_(value.to(target.dtype))


class _Moments(nn.Module):
    """Count, mean and scatter (sum of centred outer products) of rows; in float64, whatever the layer's dtype.

    Where the layer's device has no float64, they stay on the CPU.
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

    @torch.no_grad()
    def of(self, as_rows: Callable[[Tensor], Tensor], data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and scatter of ``data``; together with the data of all other processes, if there are."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return self._of_all_processes(as_rows, data)
        rows = as_rows(data)
        if not len(rows):
            raise ValueError("Whitening needs at least one row of data, but got none.")
        return self._of_rows(rows)

    def _of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = rows.mean(0)
        centred = rows - mean
        # the mean is rounded; corrected by the mean of what is left, or rows that are all equal would show a spread
        rest = centred.mean(0)
        scatter = torch.addmm(torch.outer(rest, rest), centred.mT, centred, beta=-float(len(rows)))
        return self.count.new_tensor(float(len(rows))), mean + rest, scatter

    def _of_all_processes(self, as_rows: Callable[[Tensor], Tensor], data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        error: Exception | None = None
        count, mean, scatter = torch.zeros_like(self.count), torch.zeros_like(self.mean), torch.zeros_like(self.scatter)
        try:
            rows = as_rows(data)
            if len(rows):
                count, mean, scatter = self._of_rows(rows)
        except (TypeError, ValueError) as refused:  # all must refuse together, or the others would wait for ever
            error = refused
        sums = torch.cat([torch.stack([count.new_tensor(float(error is not None)), count]), count * mean])
        torch.distributed.all_reduce(sums)
        if error is not None:
            raise error
        if sums[0] > 0:
            raise ValueError(f"Whitening: {sums[0]:.0f} other processes refused their data; nothing was added.")
        if sums[1] < 1:
            raise ValueError("Whitening needs at least one row of data, but all processes together got none.")
        total = sums[2:] / sums[1]
        delta = mean - total
        scatter = scatter + count * torch.outer(delta, delta)
        torch.distributed.all_reduce(scatter)
        return sums[1], total, scatter

    @torch.no_grad()
    def merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Add the statistics of another set of rows (Chan, Golub and LeVeque 1983, Eq. 2.1)."""
        total = self.count + count
        delta = mean - self.mean
        step = delta * (self.count * count / total).sqrt()
        self.replace(total, self.mean + delta * (count / total), (self.scatter + scatter).addr_(step, step))

    @torch.no_grad()
    def replace(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Take these statistics instead.

        Raises:
            ValueError: if they overflowed; nothing changes then.
        """
        if not scatter.sum().isfinite():
            raise ValueError(
                "Whitening: the rows are finite, but so large that their squares are not. Nothing was added to the "
                "statistics; rescale the data."
            )
        self.count.copy_(count)
        self.mean.copy_(mean)
        self.scatter.copy_(scatter)

    def reset(self) -> None:
        """Forget everything."""
        for buffer in (self.count, self.mean, self.scatter):
            buffer.zero_()

    def spread(self) -> Tensor:
        """Return, for each column, whether its values differ by more than the rounding of their mean."""
        rounding = 16 * torch.finfo(self.mean.dtype).eps * self.mean
        return self.covariance().diagonal() > rounding.square()

    def covariance(self) -> Tensor:
        """Return the sample covariance; zero where there are fewer than two rows."""
        return self.scatter / (self.count - 1).clamp_min(1.0)


def whitening(
    input_dim: int,
    *,
    method: str = "zca",
    shrinkage: float | str = "oas",
    trainable: bool = False,
    dim: int = -1,
) -> Whitening:
    """Build a :class:`Whitening`, at first the identity."""
    return Whitening(input_dim, method=method, shrinkage=shrinkage, trainable=trainable, dim=dim)
