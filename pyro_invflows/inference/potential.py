"""The log-density of a Pyro model on unconstrained coordinates, for many points at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

__all__ = ["ModelStructureError", "Potential"]

_CHANGED = (
    "The model must have the same latent sites in every run, but {names} appear in some runs only. Random control flow "
    "needs another method, such as one fit for each branch."
)


class ModelStructureError(ValueError):
    """The model's latent sites change from run to run."""


class _SoftCholesky(TorchFunctionMode):
    """A row whose Cholesky factorisation fails gets NaN, instead of stopping the whole batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.linalg.cholesky, torch.cholesky):
            factor, info = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
            return torch.where((info > 0)[..., None, None], math.nan, factor)
        return func(*args, **(kwargs or {}))


class Potential:
    r"""The potential :math:`U(x) = -\log p(x, \text{data})` of a Pyro model, for many points at once.

    The continuous latent sites lie one after the other in a vector x of D unconstrained coordinates, and the
    log-density includes the log-Jacobian of the maps to their supports. Supports are taken from the model
    at each point, so that they may depend on other sites. The result is float64, whatever the model computes in.

    The model is run by ``torch.vmap`` if that gives at three points what a loop gives, and one point after the other if
    not: ``mode`` says which. Rows that are not finite have the potential infinity and the gradient 0. A batch in which
    the model raises is halved until only the guilty rows are lost.

    Args:
        model: A Pyro model, with continuous latent sites only.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Attributes:
        dim: D.
        dtype: The dtype of the model's latent sites.
        slices: For each site its unconstrained shape, and where it begins and ends in x.
        mode: ``"vmap"`` or ``"loop"``.
        subsampled: Whether a plate draws a subsample, so that the log-density is random.
        noise: Relative rounding error of the log-density.
        lost: Number of rows so far that were not finite.
        rows: Number of rows so far.

    Raises:
        ValueError: if the model has no continuous latent sites, or if one is discrete; if the sites change from run to
            run.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None):
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        with pyro.validation_enabled(False), poutine.block(), _Origin():
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        samples = [site for site in trace.nodes.values() if site["type"] == "sample"]
        self.subsampled = any(_is_subsample(s) and len(s["value"]) < s["fn"].size for s in samples)
        self.slices: dict[str, tuple[torch.Size, int, int]] = {}
        self.dim = 0
        for site in filter(_is_latent, samples):
            shape = biject_to(site["fn"].support).inv(site["value"]).shape
            self.slices[site["name"]] = shape, self.dim, self.dim + shape.numel()
            self.dim += shape.numel()
        if not self.dim:
            raise ValueError("The model must have a continuous latent site, but it has none, so nothing is inferred.")
        self.dtype = next(site["value"].dtype for site in filter(_is_latent, samples))
        self.noise = 1e-14 if self.dtype == torch.float64 else 3e-7
        self.rows = self.lost = 0
        self._guard: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self.mode = self._choose_mode()

    def _run(self, x: Tensor) -> tuple[_Unpack, Any]:
        """Run the model at one point; return the handler, which holds the values, and the trace."""
        with poutine.block(), _Unpack(self.slices, x) as unpack:
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        unseen = self.slices.keys() - unpack.values.keys()
        if unseen:
            raise ModelStructureError(_CHANGED.format(names=sorted(unseen)))
        return unpack, trace

    def single(self, x: Tensor) -> Tensor:
        """Return the log-density of one point ``(D,)``."""
        unpack, trace = self._run(x)
        trace.compute_log_prob(lambda name, site: not _is_subsample(site))
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not _is_subsample(s)]
        return sum((s["log_prob_sum"] for s in sites), unpack.log_det)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sites' values at points ``(n, D)``, each with n in front."""
        with torch.no_grad(), pyro.validation_enabled(False):
            rows = [self._run(row)[0].values for row in x.to(self.dtype)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.slices}

    def log_density(self, x: Tensor) -> Tensor:
        """Return the log-density of points ``(n, D)``; it may be NaN or infinite."""
        self.rows += len(x)
        with pyro.validation_enabled(False):
            return self._halving(x.to(self.dtype))

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return U and its gradient at points ``(n, D)``: infinity and 0 where not finite."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            log_p = self.log_density(x)
            (gradient,) = torch.autograd.grad(log_p.sum(), x)
        good = torch.isfinite(log_p) & torch.isfinite(gradient).all(1)
        self.lost += int((~good).sum())
        return torch.where(good, -log_p, math.inf).detach(), torch.where(good[:, None], -gradient, 0.0)

    def value(self, x: Tensor, chunk: int = 1000) -> Tensor:
        """Return U at points ``(n, D)`` without gradients, infinity where not finite."""
        with torch.no_grad():
            log_p = torch.cat([self.log_density(part) for part in x.split(chunk)])
        good = torch.isfinite(log_p)
        self.lost += int((~good).sum())
        return torch.where(good, -log_p, math.inf)

    def hessian(self, x: Tensor) -> Tensor:
        """Return the Hessians of U at points ``(n, D)``, ``(n, D, D)``."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(-self.log_density(x).sum(), x, create_graph=True)
            if not gradient.requires_grad:  # a linear log-density
                return x.new_zeros(*x.shape, self.dim)
            columns = [
                torch.autograd.grad(gradient[:, i].sum(), x, retain_graph=True, materialize_grads=True)[0]
                for i in range(self.dim)
            ]
        return torch.stack(columns, 1)

    def _halving(self, x: Tensor) -> Tensor:
        try:
            with self._guard():
                return self._batch(x).to(torch.float64)
        except ModelStructureError:
            raise
        except (RuntimeError, ValueError, ArithmeticError):
            if self._guard is not _SoftCholesky:  # the mode costs 2 us an operation, so it waits for the first failure
                self._guard = _SoftCholesky
                return self._halving(x)
            if len(x) == 1:
                return x.to(torch.float64).sum(1) * 0 - math.inf
            half = len(x) // 2
            return torch.cat([self._halving(x[:half]), self._halving(x[half:])])

    def _batch(self, x: Tensor) -> Tensor:
        if self.mode == "vmap":
            return torch.vmap(self.single, randomness="different")(x)
        return torch.stack([self.single(row) for row in x]) if len(x) else x.sum(1)

    def _choose_mode(self) -> str:
        """Compare vmap with a loop at three points; prefer the loop where in doubt."""
        generator = torch.Generator().manual_seed(0)
        x = (torch.rand(3, self.dim, generator=generator, dtype=torch.float64) - 0.5).to(self.dtype)
        tolerance = math.sqrt(torch.finfo(self.dtype).eps)
        results = []
        for mode in ("loop", "vmap"):
            self.mode = mode
            try:
                with pyro.validation_enabled(False):
                    results.append(self._batch(x).detach())
            except ModelStructureError:
                raise
            except Exception:  # vmap refuses in many ways, and a model may fail at any point
                return "loop"
        alike = self.subsampled or torch.allclose(
            results[0], results[1], rtol=tolerance, atol=tolerance, equal_nan=True
        )
        return "vmap" if alike else "loop"


def _is_subsample(site: dict[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _is_latent(msg: dict[str, Any]) -> bool:
    return not (msg["is_observed"] or _is_subsample(msg))


class _Origin(Messenger):
    """Gives each latent site the value at the origin of the unconstrained space, without drawing from it."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not _is_latent(msg) or msg["done"]:
            return
        fn = msg["fn"]
        if fn.support.is_discrete:
            raise ValueError(
                f"The latent site {msg['name']!r} is discrete, but every latent site must be continuous. Sum it out, "
                "as in dist.MixtureSameFamily, or observe it."
            )
        transform = biject_to(fn.support)
        origin = torch.zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape), dtype=_dtype_of(fn))
        msg["value"], msg["done"] = transform(origin), True


class _Unpack(Messenger):
    """Gives each latent site its value from the unconstrained point, by the support that it has there."""

    def __init__(self, slices: dict[str, tuple[torch.Size, int, int]], x: Tensor):
        super().__init__()
        self.slices, self.x, self.log_det = slices, x, x.new_zeros(())
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not _is_latent(msg) or msg["done"]:
            return
        if msg["name"] not in self.slices:
            raise ModelStructureError(_CHANGED.format(names=[msg["name"]]))
        shape, start, stop = self.slices[msg["name"]]
        transform, u = biject_to(msg["fn"].support), self.x[start:stop].reshape(shape)
        value = transform(u)
        self.log_det = self.log_det + transform.log_abs_det_jacobian(u, value).sum()
        self.values[msg["name"]] = value
        msg["value"], msg["done"] = value, True


def _dtype_of(fn: Any) -> torch.dtype:
    """Return the dtype of a distribution's samples: that of its parameters, or the default."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for name in getattr(fn, "arg_constraints", {}):
        value = fn.__dict__.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.dtype
    return torch.get_default_dtype()
