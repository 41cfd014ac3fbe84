"""What changes the dimension of an event: the interface of such layers, and the walks that restore their noise.

A structure is read off as a flat list of leaves (:meth:`~pyro_invflows.Bijection.leaves`), each with the direction that
it is run in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from pyro_invflows.core.bijection import Bijection, InverseView

__all__ = ["ONLY_OWN_SAMPLE", "NoiseInjection", "from_latents", "is_exact", "latents", "noise_flags"]

#: Why a point cannot be inverted.
ONLY_OWN_SAMPLE = (
    'Slice(score="sample") scores nothing but the last point that it, or the chain that holds it, sampled itself, as '
    "the same tensor, in the same gradient mode and with the same parameters: of any other point it does not know what "
    'was dropped. Use score="data" for data.'
)


class NoiseInjection(Bijection):
    """A layer that draws noise forwards and drops it backwards; what the walks need to know of it."""

    bijective = False
    draws_forward = True
    #: Key of the noise in ``latents``.
    name: str | None = None
    #: How the inverse of this layer is scored where it stands inverted: a fresh draw, or only its own sample.
    score: str = "data"

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was given and the noise that was injected, from the output."""
        raise NotImplementedError

    def join(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the output for a given noise."""
        raise NotImplementedError


def is_exact(layer: Bijection) -> bool:
    """Whether a layer's log-det is exact and repeatable: no estimator, and no noise dropped forwards."""
    return not any((isinstance(leaf, NoiseInjection) and inverse) or not leaf.exact for leaf, inverse in layer.leaves())


class NoiseFlags(NamedTuple):
    """What a layer does with noise."""

    draws_forward: bool
    draws_inverse: bool
    only_own_sample: bool


def noise_flags(layer: Bijection | InverseView) -> NoiseFlags:
    """Return whether a layer draws noise forwards, backwards, or refuses anything but its own sample.

    Raises:
        ValueError: if it drops some noise with ``score="data"`` and some with ``score="sample"``.
    """
    noisy = [(leaf, inverse) for leaf, inverse in layer.leaves() if isinstance(leaf, NoiseInjection)]
    scores = {leaf.score for leaf, inverse in noisy if inverse}
    if len(scores) > 1:
        raise ValueError(
            'A chain cannot hold both Slice(score="data") and Slice(score="sample"): one bounds the density from '
            "below, the other from above, so that together they bound nothing. Use the same score."
        )
    return NoiseFlags(any(not inverse for _, inverse in noisy), "data" in scores, "sample" in scores)


def _named(layer: Bijection) -> list[str]:
    """Return the names of the noise that a layer injects, all checked."""
    names = []
    for leaf, inverse in layer.leaves():
        if not isinstance(leaf, NoiseInjection):
            continue
        if inverse:
            raise ValueError(
                "latents: the chain holds a Slice. What that drops is not in y, so it cannot be restored from it."
            )
        if leaf.name is None:
            raise ValueError(
                f"latents: every {type(leaf).__name__} needs a name, the key of its noise, but one has none. Build it "
                'with name="...".'
            )
        if leaf.name in names:
            raise ValueError(f"latents: names must be unique, but {leaf.name!r} appears twice.")
        names.append(leaf.name)
    return names


def latents(layer: Bijection, y: Tensor) -> dict[str, Tensor]:
    """Return all the randomness that made ``y``: the point of the base and each injected noise, by name."""
    _named(layer)
    found: dict[str, Tensor] = {}
    for leaf, inverse in layer.leaves(inverse=True):
        if isinstance(leaf, NoiseInjection):
            leaf._check(y, inverse=True)
            y, found[str(leaf.name)] = leaf.split(y)
        else:
            y, _ = leaf.evaluate_inverse(y) if inverse else leaf.evaluate(y)
    return {"base": y, **dict(reversed(found.items()))}


def from_latents(layer: Bijection, given: Mapping[str, Tensor]) -> Tensor:
    """Return the ``y`` that these latents make; noise that is not given is drawn."""
    names = _named(layer)
    if "base" not in given:
        raise ValueError("from_latents needs latents['base'], the point of the base distribution.")
    unknown = sorted(set(given) - {"base", *names})
    if unknown:
        raise ValueError(f"from_latents: nothing is called {', '.join(unknown)}; the noise here is {names}.")
    y = given["base"]
    for leaf, inverse in layer.leaves():
        if isinstance(leaf, NoiseInjection) and leaf.name in given:
            leaf._check(y, inverse=False)
            y = leaf.join(y, given[str(leaf.name)])
        else:
            y, _ = leaf.evaluate_inverse(y) if inverse else leaf.evaluate(y)
    return y
