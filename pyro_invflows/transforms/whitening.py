r"""Whitening: an affine layer that takes its mean and covariance from data instead of from a gradient.

The five methods, and how they differ, are in Kessy, Lewin and Strimmer (2018), *Optimal whitening and decorrelation*.
Statistics are kept in float64 and merged pairwise (Chan, Golub and LeVeque 1983), so that a stream of batches ends
where one pass over all rows would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.linalg import covariance_roots, oas_weight, triangular_root

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

    ``adapt`` costs O(D^3) (one eigendecomposition), ``observe`` O(D^2) a row.

    Args:
        input_dim: D.
        method: What A is among the roots of :math:`\Sigma`, with :math:`\Sigma = U \Lambda U^T`, the variances V and
            the correlations :math:`P = G \Theta G^T`:

            * ``"zca"``: :math:`\Sigma^{1/2}`; whitened data stay closest to the data;
            * ``"pca"``: :math:`U \Lambda^{1/2}`, largest eigenvalue first, diagonal of U positive;
            * ``"cholesky"``: the lower triangular factor of :math:`\Sigma` (the paper factors the precision instead);
            * ``"zca-cor"``: :math:`V^{1/2} P^{1/2}`; whitened data stay closest to the standardised data;
            * ``"pca-cor"``: :math:`V^{1/2} G \Theta^{1/2}`.
        shrinkage: Weight :math:`\rho` of the sphere in :math:`\Sigma = (1 - \rho) S + \rho\,(\mathrm{tr} S / D) I`,
            with the sample covariance S (divided by N - 1): a number in [0, 1], or ``"oas"``, the oracle approximating
            choice, which needs nothing but S and N and vanishes as 1/N. It keeps data of deficient rank invertible,
            and :meth:`adapt` warns when it had to; rows without any spread leave A = I. The sphere knows no units:
            where the scales of the columns differ by orders of magnitude it drowns the small ones, so divide them by
            their scales first, or take 0.
        trainable: Make :math:`\mu` and the triangular factor parameters. :meth:`fit` and :meth:`adapt` set their start.
        dim: Axis of the D elements; with ``dim=-3`` every pixel counts as a row.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3`` ``(*B, D, H, W)``, every pixel alike.

    Raises:
        ValueError: for an unknown method or shrinkage; in ``fit`` and ``observe`` for no rows at all, and rows that are
            not finite or whose squares are not (the statistics then stay as they were); in ``adapt`` before any row was
            observed, or, with ``shrinkage=0``, for a covariance of deficient rank.

    References:
        Kessy, Lewin and Strimmer (2018), *Optimal whitening and decorrelation*, Table 1; Chen, Wiesel, Eldar and Hero
        (2010), *Shrinkage algorithms for MMSE covariance estimation*, Eq. 23, for OAS.

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
        eye = torch.eye(self.input_dim, dtype=torch.float64)
        self._set_map(torch.zeros(self.input_dim, dtype=torch.float64), eye, eye)

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
        self._set_map(self.statistics.mean, *covariance_roots(self._shrunk(), self.method))

    def reset_statistics(self) -> None:
        """Forget all rows observed so far, as before a new window of a distribution that drifts."""
        self.statistics.reset()

    @property
    def covariance(self) -> Tensor:
        """The sample covariance (N - 1) of the rows observed so far, ``(D, D)`` in float64."""
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
        self._event_shape(data.shape, -self.dim, inverse=True)
        rows = data.detach().movedim(self.dim, -1).reshape(-1, self.input_dim).double()
        # a sum is not finite where a row is not, and far cheaper than looking at each element
        if rows.numel() and not rows.sum().isfinite():
            bad = int((~rows.isfinite()).any(-1).sum())
            if bad:
                raise ValueError(
                    f"Whitening needs finite rows, but {bad} of {len(rows)} hold NaN or infinity. Nothing was added "
                    "to the statistics; leave those rows out."
                )
        return rows

    def _shrunk(self) -> Tensor:
        """Return the covariance to be factored, of full rank."""
        count, d = self.statistics.count.item(), self.input_dim
        if count < 1:
            raise ValueError("Whitening has observed no rows yet: call observe(batch) before adapt(), or fit(data).")
        raw = self.statistics.covariance()
        eigenvalues = torch.linalg.eigvalsh(raw)
        limit = d * torch.finfo(raw.dtype).eps * eigenvalues[-1].clamp_min(0)
        rank = int((eigenvalues > limit).sum())
        trace = raw.trace()
        if not rank and self.shrinkage != 0:  # nothing is known about the scale
            warnings.warn(
                f"Whitening: the {count:.0f} rows observed have no spread, so only their mean is used and A = I.",
                stacklevel=4,  # fit or adapt was called there
            )
            return torch.eye(d, dtype=raw.dtype, device=raw.device)
        if self.shrinkage == "oas":
            weight = oas_weight(count, d, trace, raw.square().sum())
            if rank < d:  # however many rows: enough to tell the missing directions from rounding
                weight = torch.maximum(weight, 10 * limit * d / trace)
        else:
            weight = raw.new_tensor(float(self.shrinkage))
        if not (1 - weight) * eigenvalues[0] + weight * trace / d > limit:
            raise ValueError(
                f"Whitening with shrinkage={self.shrinkage:g} needs a covariance of full rank, but that of the "
                f"{count:.0f} rows observed has rank {rank} of {d}. Observe more rows, leave out constant columns, or "
                "use more shrinkage."
            )
        if rank < d:
            warnings.warn(
                f"Whitening: the covariance of the {count:.0f} rows observed has rank {rank} of {d}; a shrinkage of "
                f"{weight.item():.2g} of the mean variance fills the missing directions.",
                stacklevel=4,  # fit or adapt was called there
            )
        shrunk = (1 - weight) * raw
        shrunk.diagonal().add_(weight * trace / d)
        return shrunk

    @torch.no_grad()
    def _set_map(self, mean: Tensor, colouring: Tensor, whitening: Tensor) -> None:
        self.mean.copy_(mean)
        if self.trainable:
            # every root of the covariance is its triangular one, rotated: A = L Q
            factor = triangular_root(colouring)
            self.triangle.copy_(factor.tril(-1) + factor.diagonal().log().diag())
            self.rotation.copy_(torch.linalg.solve_triangular(factor, colouring, upper=False))
        else:
            self.colouring.copy_(colouring)
            self.whitening.copy_(whitening)
            self.log_scale.copy_(torch.linalg.slogdet(colouring)[1])

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
            q, r = torch.linalg.qr(self.rotation)
            self.rotation.copy_(q * r.diagonal().sign())
        else:
            self.whitening.copy_(torch.linalg.inv(self.colouring))
            self.log_scale.copy_(torch.linalg.slogdet(self.colouring)[1])

    # ------------------------------------------------------------------ hooks

    def _triangle(self) -> Tensor:
        return self.triangle.tril(-1) + self.triangle.diagonal().exp().diag()

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, None]:
        rows = x if self.dim == -1 else x.movedim(self.dim, -1)
        y = linear(rows, self.matrix, self.mean)
        return (y if self.dim == -1 else y.movedim(-1, self.dim)), None

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
        return (log_scale * pixels).expand(self._log_det_shape(x))

    def extra_repr(self) -> str:
        parts = [f"{self.input_dim}, method={self.method!r}, shrinkage={self.shrinkage!r}"]
        if self.trainable:
            parts.append("trainable=True")
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        return ", ".join(parts)


# ---------------------------------------------------------------------- statistics


class _Moments(nn.Module):
    """Count, mean and scatter (sum of centred outer products) of rows; in float64, whatever the layer's dtype."""

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(size, size, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> _Moments:
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
