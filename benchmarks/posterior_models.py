"""The posteriors of a folder of data as Pyro models, each with the way from its sites to the reference draws.

The folder holds ``NAME.json``, the data of a model, and ``NAME.npz``, its reference draws (``draws``, chains x draws x
parameters, and ``names``). Models broadcast over leading dimensions and use no plates, so that every guide and sampler
of Pyro can run them with vectorised particles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints

__all__ = ["MODELS", "Flat", "Posterior", "flat", "load", "log_density", "unconstrained"]

F64 = torch.float64


class Flat(dist.ImproperUniform):
    """A flat prior that initialisation can sample: from uniform(-2, 2) in unconstrained coordinates."""

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        change = biject_to(self.support)
        shape = change.inverse_shape(torch.Size(sample_shape) + self.batch_shape + self.event_shape)
        return change(4 * torch.rand(shape, dtype=F64) - 2)


def flat(support: constraints.Constraint = constraints.real, event_shape: tuple[int, ...] = ()) -> Flat:
    return Flat(support, torch.Size(), torch.Size(event_shape))


@dataclass
class Posterior:
    """A model with reference draws.

    Args:
        name: Of the data set and the model.
        model: The Pyro model, without arguments.
        names: Of the reference's parameters.
        draws: Reference draws ``(n, parameters)``.
        to_reference: From the values of the sites, with any batch dimensions, to those parameters.
        from_reference: From the parameters to the values of the sites.
    """

    name: str
    model: Callable[[], None]
    names: list[str]
    draws: Tensor
    to_reference: Callable[[Mapping[str, Tensor]], Tensor]
    from_reference: Callable[[Tensor], dict[str, Tensor]]


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float), dtype=F64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def one() -> Tensor:
    return torch.ones((), dtype=F64)


def last(value: Tensor) -> Tensor:
    """Return a scalar site with an event dimension of size 1, to broadcast with a vector."""
    return value.unsqueeze(-1)


# ---------------------------------------------------------------------- models


def regression(design: Tensor, y: Tensor, beta: dist.Distribution, sigma: dist.Distribution) -> Callable[[], None]:
    def model() -> None:
        b, s = pyro.sample("beta", beta), pyro.sample("sigma", sigma)
        pyro.sample("y", dist.Normal(b @ design.mT, last(s)).to_event(1), obs=y)

    return model


def flat_regression(columns: list[Any], y: Any, sigma: dist.Distribution | None = None) -> Callable[[], None]:
    design = torch.stack([tensor(c) for c in columns], -1)
    beta = flat(constraints.independent(constraints.real, 1), (len(columns),))
    return regression(design, tensor(y), beta, flat(constraints.positive) if sigma is None else sigma)


def half_cauchy(scale: float) -> dist.Distribution:
    return dist.HalfCauchy(scale * one())


def normals(size: int, scale: float) -> dist.Distribution:
    return dist.Normal(zeros(size), scale).to_event(1)


def group(mean: Tensor, sd: Tensor, size: int) -> dist.Distribution:
    """Return the normal distribution of the members of a group, as one vector."""
    return dist.Normal(mean + zeros(size), sd).to_event(1)


def kidiq(d: Mapping[str, Any]) -> Callable[[], None]:
    hs, iq = tensor(d["mom_hs"]), tensor(d["mom_iq"])
    return flat_regression([torch.ones_like(hs), hs, iq, hs * iq], d["kid_score"], half_cauchy(2.5))


def mesquite(d: Mapping[str, Any]) -> Callable[[], None]:
    logs = [tensor(d[k]).log() for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    group = tensor(d["group"])
    return flat_regression([torch.ones_like(group), *logs, group], tensor(d["weight"]).log())


def nes(d: Mapping[str, Any]) -> Callable[[], None]:
    age = tensor(d["age_discrete"])
    ages = [(age == k).double() for k in (2, 3, 4)]
    rest = [tensor(d[k]) for k in ("educ1", "gender", "income")]
    columns = [torch.ones_like(age), tensor(d["real_ideo"]), tensor(d["race_adj"]), *ages, *rest]
    return flat_regression(columns, d["partyid7"])


def autoregression(d: Mapping[str, Any]) -> Callable[[], None]:
    y, order = tensor(d["y"]), d["K"]
    lags = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(zeros(), 10.0))
        beta = pyro.sample("beta", normals(order, 10.0))
        sigma = pyro.sample("sigma", half_cauchy(2.5))
        pyro.sample("y", dist.Normal(last(alpha) + beta @ lags.mT, last(sigma)).to_event(1), obs=y[order:])

    return model


def blr(d: Mapping[str, Any]) -> Callable[[], None]:
    design = tensor(d["X"])
    return regression(design, tensor(d["y"]), normals(design.shape[1], 10.0), dist.HalfNormal(10 * one()))


def garch(d: Mapping[str, Any]) -> Callable[[], None]:
    y, first = tensor(d["y"]), d["sigma1"]

    def model() -> None:
        mu = pyro.sample("mu", flat())
        alpha0 = pyro.sample("alpha0", flat(constraints.positive))
        # a flat beta1 in (0, 1 - alpha1) is a uniform share of that interval, whose length counts for alpha1
        alpha1 = pyro.sample("alpha1", dist.Beta(one(), 2 * one()))
        share = pyro.sample("share", dist.Uniform(zeros(), 1.0))
        beta1 = share * (1 - alpha1)
        variances = [(first**2 * torch.ones_like(mu))]
        for past in y[:-1]:
            variances.append(alpha0 + alpha1 * (past - mu) ** 2 + beta1 * variances[-1])
        pyro.sample("y", dist.Normal(last(mu), torch.stack(variances, -1).sqrt()).to_event(1), obs=y)

    return model


def mixture(d: Mapping[str, Any]) -> Callable[[], None]:
    y = tensor(d["y"])

    def model() -> None:
        mu = pyro.sample("mu", flat(dist.constraints.ordered_vector, (2,)))
        pyro.factor("prior", dist.Normal(zeros(2), 2.0).to_event(1).log_prob(mu))
        sigma = pyro.sample("sigma", dist.HalfNormal(2 * torch.ones(2, dtype=F64)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5 * one(), 5 * one()))
        parts = dist.Normal(mu.unsqueeze(-2), sigma.unsqueeze(-2)).log_prob(y.unsqueeze(-1))
        weights = torch.stack([theta.log(), torch.log1p(-theta)], -1).unsqueeze(-2)
        pyro.factor("y", (parts + weights).logsumexp(-1).sum(-1))

    return model


def diamonds(d: Mapping[str, Any]) -> Callable[[], None]:
    x, y = tensor(d["X"])[:, 1:], tensor(d["Y"])
    centred = x - x.mean(0)

    def model() -> None:
        b = pyro.sample("b", normals(x.shape[1], 1.0))
        intercept = pyro.sample("Intercept", dist.StudentT(3 * one(), 8.0, 10.0))
        sigma = pyro.sample("sigma", flat(constraints.positive))
        pyro.factor("prior", dist.StudentT(3 * one(), 0.0, 10.0).log_prob(sigma))
        pyro.sample("y", dist.Normal(last(intercept) + b @ centred.mT, last(sigma)).to_event(1), obs=y)

    return model


def rats(d: Mapping[str, Any]) -> Callable[[], None]:
    rat, count = torch.as_tensor(d["rat"]) - 1, d["N"]
    x, y = tensor(d["x"]) - d["xbar"], tensor(d["y"])

    def model() -> None:
        means = [pyro.sample(f"mu_{k}", dist.Normal(zeros(), 100.0)) for k in ("alpha", "beta")]
        sds = [pyro.sample(f"sigma_{k}", flat(constraints.positive)) for k in ("y", "alpha", "beta")]
        alpha = pyro.sample("alpha", group(last(means[0]), last(sds[1]), count))
        beta = pyro.sample("beta", group(last(means[1]), last(sds[2]), count))
        pyro.sample("y", dist.Normal(alpha[..., rat] + beta[..., rat] * x, last(sds[0])).to_event(1), obs=y)

    return model


def glmm(d: Mapping[str, Any]) -> Callable[[], None]:
    year, counts = tensor(d["year"]), tensor(d["C"])
    powers = torch.stack([year, year**2, year**3], -1)

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Uniform(zeros() - 20, 20.0))
        betas = [
            pyro.sample(f"beta{k}", dist.Uniform(zeros() - 10, high)) for k, high in ((1, 10.0), (2, 20.0), (3, 10.0))
        ]
        sigma = pyro.sample("sigma", dist.Uniform(zeros(), 5.0))
        eps = pyro.sample("eps", dist.Normal(zeros(len(year)), last(sigma)).to_event(1))
        rate = last(alpha) + torch.stack(betas, -1) @ powers.mT + eps
        pyro.sample("C", dist.Poisson(rate.exp()).to_event(1), obs=counts)

    return model


def schools(d: Mapping[str, Any], centred: bool) -> Callable[[], None]:
    y, sigma = tensor(d["y"]), tensor(d["sigma"])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(zeros(), 5.0))
        tau = pyro.sample("tau", half_cauchy(5.0))
        if centred:
            theta = pyro.sample("theta", group(last(mu), last(tau), len(y)))
        else:
            theta = last(mu) + last(tau) * pyro.sample("eta", normals(len(y), 1.0))
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    return model


MODELS: dict[str, Callable[[Mapping[str, Any]], Callable[[], None]]] = {
    "eight_schools-eight_schools_centered": lambda d: schools(d, True),
    "eight_schools-eight_schools_noncentered": lambda d: schools(d, False),
    "kidiq-kidscore_interaction": kidiq,
    "mesquite-logmesquite": mesquite,
    "garch-garch11": garch,
    "arK-arK": autoregression,
    "sblrc-blr": blr,
    "nes2000-nes": nes,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "diamonds-diamonds": diamonds,
    "rats_data-rats_model": rats,
    "GLMM_Poisson_data-GLMM_Poisson_model": glmm,
}


# ---------------------------------------------------------------------- reference draws


def load(folder: Path, name: str) -> Posterior:
    """Load the data and the reference draws of one posterior."""
    data = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        names = [str(n) for n in file["names"]]
        draws = tensor(file["draws"]).flatten(0, 1)
    derived, original = _derived(name)

    def to_reference(sites: Mapping[str, Tensor]) -> Tensor:
        sites = {**sites, **derived(sites)}
        columns = []
        for n in names:
            site, _, index = n.partition("[")
            columns.append(sites[site][..., int(index[:-1]) - 1] if index else sites[site])
        return torch.stack(columns, -1)

    def from_reference(values: Tensor) -> dict[str, Tensor]:
        grouped: dict[str, Any] = {}
        for n, column in zip(names, values.unbind(-1), strict=True):
            site, _, index = n.partition("[")
            if index:
                grouped.setdefault(site, []).append(column)
            else:
                grouped[site] = column
        sites = {k: torch.stack(v, -1) if isinstance(v, list) else v for k, v in grouped.items()}
        return original(sites)

    return Posterior(name, MODELS[name](data), names, draws, to_reference, from_reference)


def _derived(name: str) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, Tensor]]]:
    """Return how the reference's parameters follow from the sites, and the sites from the parameters."""
    if name.endswith("noncentered"):
        return (
            lambda s: {"theta": last(s["mu"]) + last(s["tau"]) * s["eta"]},
            lambda s: {"mu": s["mu"], "tau": s["tau"], "eta": (s["theta"] - last(s["mu"])) / last(s["tau"])},
        )
    if name.startswith("garch"):
        return (
            lambda s: {"beta1": s["share"] * (1 - s["alpha1"])},
            lambda s: {**{k: s[k] for k in ("mu", "alpha0", "alpha1")}, "share": s["beta1"] / (1 - s["alpha1"])},
        )
    return (lambda s: {}), dict


# ---------------------------------------------------------------------- densities, independent of the library


def _sites(model: Callable[[], None]) -> list[Any]:
    trace = poutine.trace(model).get_trace()
    return [site for site in trace.nodes.values() if site["type"] == "sample" and not site["is_observed"]]


def unconstrained(posterior: Posterior, sites: Mapping[str, Tensor]) -> Tensor:
    """Return values of the sites ``(n, ...)`` as rows of unconstrained coordinates, in the order of the model."""
    parts = [biject_to(s["fn"].support).inv(sites[s["name"]]) for s in _sites(posterior.model)]
    return torch.cat([p.reshape(len(p), -1) for p in parts], -1)


def log_density(model: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    """Return the log joint density of one vector of unconstrained coordinates; ``torch.vmap`` it for many."""
    found = [(s["name"], biject_to(s["fn"].support), s["value"].shape) for s in _sites(model)]
    shapes = [change.inverse_shape(shape) for _, change, shape in found]

    def log_p(x: Tensor) -> Tensor:
        values, total = {}, x.new_zeros(())
        for (name, change, _), shape, part in zip(found, shapes, x.split([s.numel() for s in shapes]), strict=True):
            u = part.reshape(shape)
            values[name] = change(u)
            total = total + change.log_abs_det_jacobian(u, values[name]).sum()
        with pyro.validation_enabled(False):
            return total + poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum()

    return log_p
