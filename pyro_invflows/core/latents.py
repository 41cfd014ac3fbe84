"""The interface of layers that inject or drop noise, and the functions that recover the noise from an output.

A structure is read as a flat list of leaves (:meth:`~pyro_invflows.Bijection.leaves`), each with its own direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from pyro_invflows.core.bijection import Bijection, InverseView

__all__ = ["ONLY_OWN_SAMPLE", "NoiseInjection", "from_latents", "is_exact", "latents", "noise_flags"]

#: Text of the error for a point that cannot be inverted.
ONLY_OWN_SAMPLE = (
    'Slice(score="sample") can score only the last point that it, or the chain that holds it, sampled itself: the same '
    "tensor, in the same gradient mode and with the same parameters. For any other point it does not know what was "
    'dropped. Use score="data" for data.'
)


class NoiseInjection(Bijection):
    """The interface of a layer that draws noise in its forward pass and drops it in its inverse pass."""

    bijective = False
    draws_forward = True
    #: Key of the noise in ``latents``.
    name: str | None = None
    #: How the inverted layer is scored: ``"data"``, by a fresh draw; ``"sample"``, only on its own last sample.
    score: str = "data"

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Split an output into the input and the noise that was injected."""
        raise NotImplementedError

    def join(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the output for a given input and noise."""
        raise NotImplementedError


def is_exact(layer: Bijection) -> bool:
    """Whether a layer's log-det is exact and repeatable: no estimate, and nothing dropped in the forward pass."""
    return not any((isinstance(leaf, NoiseInjection) and inverse) or not leaf.exact for leaf, inverse in layer.leaves())


class NoiseFlags(NamedTuple):
    """What a layer does with noise."""

    draws_forward: bool
    draws_inverse: bool
    only_own_sample: bool


def noise_flags(layer: Bijection | InverseView) -> NoiseFlags:
    """Return whether a layer draws noise forwards, draws noise backwards, and can score only its own sample.

    Raises:
        ValueError: if it drops some noise with ``score="data"`` and some with ``score="sample"``.
    """
    noisy = [(leaf, inverse) for leaf, inverse in layer.leaves() if isinstance(leaf, NoiseInjection)]
    scores = {leaf.score for leaf, inverse in noisy if inverse}
    if len(scores) > 1:
        raise ValueError(
            'A chain cannot hold both Slice(score="data") and Slice(score="sample"): one bounds the density from '
            "below, the other from above, so that together they bound nothing. Use the same score for all."
        )
    return NoiseFlags(any(not inverse for _, inverse in noisy), "data" in scores, "sample" in scores)


def _named(layer: Bijection) -> list[str]:
    """Check the names of the noise that a layer injects, and return them."""
    names = []
    for leaf, inverse in layer.leaves():
        if not isinstance(leaf, NoiseInjection):
            continue
        if inverse:
            raise ValueError(
                "latents: every latent must be a function of y, but the chain holds a Slice, which drops some. Leave "
                "the Slice out."
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
    """Return the latents of ``y`` by name: the point of the base and each injected noise."""
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
    """Return the ``y`` that has these latents; noise that is not given is drawn."""
    names = _named(layer)
    if "base" not in given:
        raise ValueError("from_latents needs latents['base'], the point of the base distribution.")
    unknown = sorted(set(given) - {"base", *names})
    if unknown:
        raise ValueError(f"from_latents: expected the keys 'base' and any of {names}, but got {', '.join(unknown)}.")
    y = given["base"]
    for leaf, inverse in layer.leaves():
        if isinstance(leaf, NoiseInjection) and leaf.name in given:
            leaf._check(y, inverse=False)
            y = leaf.join(y, given[str(leaf.name)])
        else:
            y, _ = leaf.evaluate_inverse(y) if inverse else leaf.evaluate(y)
    return y
