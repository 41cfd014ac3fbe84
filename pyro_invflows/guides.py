"""A guide for any Pyro model with continuous latent sites that fits itself and says how far to trust it."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor
from torch.distributions import biject_to

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.chain import Chain
from pyro_invflows.inference.gaussian import Gaussian, fit_gaussian, fixed_normals
from pyro_invflows.inference.importance import Importance, importance, smoothed
from pyro_invflows.inference.missing import missed_evidence, mixture_weights
from pyro_invflows.inference.posterior_flow import draw, learn_draws, posterior_flow, train_flow
from pyro_invflows.inference.potential import Potential
from pyro_invflows.inference.start import bfgs_paths, choose, newton, starting_points
from pyro_invflows.linalg.triangular import solve_for_rows
from pyro_invflows.support.checks import positive_int, positive_number

__all__ = ["AutoInvertibleFlow", "Diagnostics"]

#: Evidence found elsewhere, in nats, above which a mode is missing.
_MISSED = 0.1


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """The result of ``fit``'s checks; printed, it is a report.

    Attributes:
        weights: k-hat, effective sample size, evidence, ELBO, divergence and share of lost draws, on fresh draws.
        missed: Nats of evidence that Gaussians from the other paths of the start see and the guide does not; near 0, or
            modes are missing.
        rounds: The same as ``weights``, after each round of the flow's training; empty if the Gaussian was good enough.
        seconds: CPU time of the calling thread, in total.
        vectorised: How the model was evaluated: ``"vmap"`` or ``"loop"``.
        dim: Number of unconstrained coordinates.
    """

    weights: Importance
    missed: float
    rounds: tuple[Importance, ...]
    seconds: float
    vectorised: str
    dim: int

    def __str__(self) -> str:
        w = self.weights
        lines = [
            f"{self.dim} coordinates, {self.seconds:.1f} s, model evaluated by {self.vectorised}, "
            + (f"{len(self.rounds)} round(s) of the flow" if self.rounds else "a Gaussian, no flow trained"),
            f"ELBO {w.elbo:.3f} +- {w.elbo_se:.3f}, log-evidence {w.log_evidence:.3f} +- {w.log_evidence_se:.3f}",
            f"KL from the posterior: at least {w.kl:.3f} nats",
            f"k-hat {w.khat:.2f}, effective sample size {w.ess:.0f}",
            f"evidence missed, as far as other paths show: {self.missed:.3f} nats",
        ]
        if self.missed > _MISSED:
            lines.append("WARNING: part of the posterior is missing.")
        if w.lost_share:
            lines.append(f"WARNING: the model is not finite at {w.lost_share:.1%} of the draws; try float64.")
        return "\n".join(lines)


class _Around(Bijection):
    """Maps whitened coordinates to the model's: ``y = loc + scale x``, with buffers that ``fit`` sets."""

    loc: Tensor
    scale: Tensor

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__(len(gaussian.loc))
        self.register_buffer("loc", gaussian.loc.clone())
        self.register_buffer("scale", gaussian.scale.clone())

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, None]:
        return self.loc + x @ self.scale.mT, None

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, None]:
        return solve_for_rows(self.scale, y - self.loc, upper=False), None

    def _log_det(self, x: Tensor, y: Tensor, aux: None) -> Tensor:
        return self.scale.diagonal().log().sum().expand(x.shape[:-1])


class AutoInvertibleFlow(AutoContinuous):
    """A guide for continuous latent sites: a Gaussian bent by a flow that inverts anywhere.

    ``fit`` finds it without tuning: descents from several starts, Newton, a choice among Gaussians by their ELBO, the
    best Gaussian on fixed draws, then a flow trained by path gradients, and a check for what is missing. If a mode is
    missing, the flow learns it from draws of the Gaussians that see it, and is trained once more. Without ``fit`` it is
    an ordinary guide for ``SVI``.

    Args:
        model: A Pyro model.
        init_loc_fn: Values of the sites for the prototype, and the centre of a guide that is not fitted.

    Attributes:
        diagnostics: The :class:`Diagnostics` of the last ``fit``, or None.

    Raises:
        ValueError: from ``fit``, if the model has a discrete latent site or none at all, subsamples its data, has
            supports that depend on other sites, or is not finite at any start.

    Example:
        >>> import pyro
        >>> def model():
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([1.0, 3.0, 2.0]))
        >>> guide = AutoInvertibleFlow(model).fit(seed=0, progress=False)
        >>> abs(guide.diagnostics.weights.kl) < 0.02  # the posterior is Gamma(8, 4)
        True
    """

    def __init__(self, model: Callable[..., Any], *, init_loc_fn: Callable[..., Any] = init_to_feasible) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._plain_model = (model,)  # Pyro's copy of the model draws from each site, also where its value is given
        self.diagnostics: Diagnostics | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept: Any = (self.__dict__["_model"], self.__dict__["master"])
        state = dict(super().__getstate__())
        self._model, self.master = kept  # Pyro takes the model from the original as well
        state.update(_model=None, master=None, _plain_model=None)
        return state

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        self._latent_dtype = loc.dtype
        self._plate_nesting = max([0, *(-frame.dim for frame in self._prototype_frames.values())])
        start = Gaussian(loc.double(), 0.1 * torch.eye(self.latent_dim, dtype=torch.float64))
        self.flow = Chain([*posterior_flow(self.latent_dim), _Around(start)])

    def get_base_dist(self) -> Any:
        return dist.Normal(torch.zeros(self.latent_dim, dtype=torch.float64), 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Chain:
        return self.flow

    def _unpack_latent(self, latent: Tensor) -> Any:
        latent = latent.to(self._latent_dtype)
        if latent.dim() == 2:  # the batch stands left of the plates
            latent = latent.reshape(len(latent), *(1,) * self._plate_nesting, self.latent_dim)
        return super()._unpack_latent(latent)

    def fit(
        self,
        *args: Any,
        seconds: float | None = None,
        max_steps: int = 3500,
        num_particles: int = 64,
        tol: float = 0.01,
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> AutoInvertibleFlow:
        """Fit the guide to the model's posterior, given the model's own arguments, and return it.

        Args:
            *args: Positional arguments of the model.
            seconds: CPU time of the calling thread after which the training of the flow stops.
            max_steps: Maximum number of steps of the flow's training.
            num_particles: Number of draws per step.
            tol: Divergence from the posterior, in nats, at which training stops.
            seed: Seed of the draws; by default it comes from torch's generator.
            progress: Whether to print the report at the end.
            **kwargs: Keyword arguments of the model.
        """
        if self._plain_model is None:
            raise ValueError("fit: copies of a guide do not hold the model. Build AutoInvertibleFlow(model) again.")
        budget = math.inf if seconds is None else positive_number(seconds, "seconds", "fit")
        positive_int(num_particles, "num_particles", "fit", minimum=2)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        generator, begin = torch.Generator().manual_seed(seed), time.thread_time()

        def elapsed() -> float:
            return (time.thread_time() - begin) / budget

        potential = Potential(self._plain_model[0], args, kwargs)
        if potential.subsampled:
            raise ValueError(
                "fit: the model subsamples its data, so its density is random. Fit it to all data, or use SVI."
            )
        if self.prototype_trace is None:
            with pyro.validation_enabled(False):
                self._setup_prototype(*args, **kwargs)
        self._check_supports(potential, generator)
        around, witnesses = _start(potential, generator, elapsed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = posterior_flow(potential.dim)
        x, log_q = draw(flow, around, 2000, generator)
        result, rounds = importance(-potential.value(x) - log_q), []
        train = functools.partial(
            train_flow,
            potential,
            generator=generator,
            num_particles=num_particles,
            max_steps=max_steps,
            tol=tol,
            elapsed=elapsed,
        )
        if not (result.kl < tol / 2 and result.khat < 0.7 and not result.lost_share):
            rounds = train(flow, around)
        self._hold(flow, around)
        weights, missed, seen = self._check(potential, witnesses, 2000, generator)
        if missed > _MISSED and elapsed() < 1:
            flow, around = _learned(seen, generator, seed)
            rounds += train(flow, around, lr=3e-3)  # gentle, or one mode wins before the weights of both are settled
            before = {name: value.clone() for name, value in self.flow.state_dict().items()}
            self._hold(flow, around)
            again = self._check(potential, witnesses, 2000, generator)
            if again[1] < missed:
                weights, missed, seen = again
            else:
                self.flow.load_state_dict(before)
        self.diagnostics = Diagnostics(
            weights, missed, tuple(rounds), time.thread_time() - begin, potential.mode, potential.dim
        )
        if progress:
            print(self.diagnostics)
        return self

    def _hold(self, flow: Chain, around: Gaussian) -> None:
        """Take the parameters of a flow around a Gaussian, in place, because Pyro's store holds the guide's own."""
        self.flow.load_state_dict(Chain([*flow, _Around(around)]).state_dict())

    def _check_supports(self, potential: Potential, generator: torch.Generator) -> None:
        x = torch.randn(3, potential.dim, generator=generator, dtype=torch.float64)
        own = self._constrain(x)
        for name, value in potential.constrain(x).items():
            if not torch.allclose(own[name].reshape(value.shape), value, rtol=1e-4, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"fit: the support of {name!r} depends on another site, which this guide cannot follow. Sample a "
                    "site with a fixed support, such as a share in (0, 1), and compute the value from it."
                )

    def _check(
        self, potential: Potential, witnesses: list[Gaussian], n: int, generator: torch.Generator
    ) -> tuple[Importance, float, Tensor]:
        """Weigh fresh draws of the guide, and look for evidence that it misses.

        Returns:
            What the weights say; the missed evidence; draws of the posterior, as far as guide and witnesses see it.
        """
        with torch.no_grad():
            base = self.get_base_dist()
            e = torch.randn(n, potential.dim, generator=generator, dtype=torch.float64)
            x, ladj = self.flow.call_and_ladj(e)
            log_weights = -potential.value(x) - (base.log_prob(e) - ladj)

            def log_q(x: Tensor) -> Tensor:
                e, ladj = self.flow.inv_and_ladj(x)
                return base.log_prob(e) + ladj

            everywhere, mixed = mixture_weights(potential.value, x, log_q, witnesses, generator)
            shares = (smoothed(mixed)[0] - mixed[torch.isfinite(mixed)].max()).exp().nan_to_num(0.0)
            seen = everywhere[torch.multinomial(shares, n, replacement=True, generator=generator)]
        return importance(log_weights), missed_evidence(mixed, log_weights), seen

    def _constrain(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sites' values at points ``(n, D)``, each with n in front."""
        values = ((site, biject_to(site["fn"].support)(u)) for site, u in self._unpack_latent(x))
        return {site["name"]: value.reshape(len(x), *site["value"].shape) for site, value in values}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_samples: int = 4000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of each site's elements, from draws; the first dimension is that of ``quantiles``."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        values = self._constrain(self.get_posterior().sample((num_samples,)))
        return {
            name: value.quantile(torch.as_tensor(quantiles, dtype=value.dtype), 0) for name, value in values.items()
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each site's elements, from draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}


def _learned(draws: Tensor, generator: torch.Generator, seed: int) -> tuple[Chain, Gaussian]:
    """Return a new flow around the Gaussian of some draws, trained on these by maximum likelihood."""
    covariance = draws.mT.cov() + 1e-9 * draws.var(0).diag()
    around = Gaussian(draws.mean(0), torch.linalg.cholesky(covariance))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chain = posterior_flow(draws.shape[1])
    learn_draws(chain, solve_for_rows(around.scale, draws - around.loc, upper=False), generator=generator)
    return chain, around


def _start(
    potential: Potential, generator: torch.Generator, elapsed: Callable[[], float]
) -> tuple[Gaussian, list[Gaussian]]:
    """Return the Gaussian that the flow bends, and the witnesses."""
    starts = starting_points(8, potential.dim, generator)
    paths = bfgs_paths(potential.value_and_grad, starts, noise=potential.noise, expired=lambda: elapsed() > 0.2)
    if not torch.isfinite(paths.u).any():
        raise ValueError(
            "fit: the model's log-density is not finite at any start: the origin of the unconstrained space and points "
            "around it. Check the data for NaN and the likelihood's support, and scale parameters to units near 1."
        )
    lowest = paths.u.argsort()[:4]
    ends = newton(potential, paths.x[lowest], expired=lambda: elapsed() > 0.35)
    relabelled = [dataclasses.replace(c, path=int(lowest[c.path])) for c in ends.candidates]
    candidates = [*paths.candidates, *relabelled]
    candidates = [
        c for c in candidates if torch.isfinite(c.gaussian.loc).all() and torch.isfinite(c.gaussian.scale).all()
    ]
    if not candidates:
        raise ValueError("fit: no path found a point with positive curvature; the posterior may not be proper.")
    best, witnesses = choose(potential.value, candidates, generator=generator)
    n = max(256, 6 * potential.dim)
    draws = fixed_normals(n + n % 2, potential.dim, generator)
    around = fit_gaussian(potential.value_and_grad, best, draws, noise=potential.noise, expired=lambda: elapsed() > 0.5)
    return around, witnesses
