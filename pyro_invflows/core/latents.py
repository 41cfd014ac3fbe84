"""What changes the dimension of an event: the interface of such layers, and the walks that restore their noise.

A chain's structure is read off as a flat list of leaves, each with the direction that it is run in, through nested
chains, :class:`~pyro_invflows.Inverted` and torch's own wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform, Transform
from torch.distributions.transforms import _InverseTransform

from pyro_invflows.core.bijection import Bijection

__all__ = ["NoiseInjection", "from_latents", "is_exact", "latents", "leaves", "noise_flags"]


class NoiseInjection(Bijection):
    """A layer that draws noise forwards and drops it backwards; what the walks need to know of it."""

    bijective = False
    _draws_forward = True
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


def leaves(transform: Transform, inverse: bool = False) -> Iterator[tuple[Transform, bool]]:
    """Yield the transforms that any transform is made of, in the order of a pass, each with its own direction."""
    if isinstance(transform, Bijection):
        yield from transform._leaves(inverse)
    elif isinstance(transform, _InverseTransform):
        yield from leaves(transform.inv, not inverse)
    elif isinstance(transform, IndependentTransform):
        yield from leaves(transform.base_transform, inverse)
    elif isinstance(transform, ComposeTransform):
        for part in reversed(transform.parts) if inverse else transform.parts:
            yield from leaves(part, inverse)
    else:
        yield transform, inverse


def is_exact(transform: Transform) -> bool:
    """Whether a transform's log-det is exact and repeatable: no estimator, and no noise dropped forwards."""
    return not any(
        (isinstance(leaf, NoiseInjection) and inverse) or not getattr(leaf, "exact", True)
        for leaf, inverse in leaves(transform)
    )


class NoiseFlags(NamedTuple):
    """What a transform does with noise."""

    draws_forward: bool
    draws_inverse: bool
    only_own_sample: bool


def noise_flags(transform: Transform) -> NoiseFlags:
    """Return whether a transform draws noise forwards, backwards, or refuses anything but its own sample.

    Raises:
        ValueError: if it drops some noise with ``score="data"`` and some with ``score="sample"``.
    """
    noisy = [(leaf, inverse) for leaf, inverse in leaves(transform) if isinstance(leaf, NoiseInjection)]
    scores = {leaf.score for leaf, inverse in noisy if inverse}
    if len(scores) > 1:
        raise ValueError(
            'A chain cannot hold both Slice(score="data") and Slice(score="sample"): one bounds the density from '
            "below, the other from above, so that together they bound nothing. Use the same score."
        )
    return NoiseFlags(any(not inverse for _, inverse in noisy), "data" in scores, "sample" in scores)


def _named(transform: Transform) -> list[str]:
    """Return the names of the noise that a transform injects, all checked."""
    names = []
    for leaf, inverse in leaves(transform):
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


def _step(leaf: Transform, value: Tensor, inverse: bool) -> Tensor:
    if not isinstance(leaf, Bijection):
        return leaf.inv(value) if inverse else leaf(value)
    return (leaf._evaluate_inverse if inverse else leaf._evaluate)(value)[0]


def latents(transform: Transform, y: Tensor) -> dict[str, Tensor]:
    """Return all the randomness that made ``y``: the point of the base and each injected noise, by name."""
    _named(transform)
    found: dict[str, Tensor] = {}
    for leaf, inverse in leaves(transform, inverse=True):
        if isinstance(leaf, NoiseInjection):
            leaf._check(y, inverse=True)
            y, found[str(leaf.name)] = leaf.split(y)
        else:
            y = _step(leaf, y, inverse)
    return {"base": y, **dict(reversed(found.items()))}


def from_latents(transform: Transform, given: Mapping[str, Tensor]) -> Tensor:
    """Return the ``y`` that these latents make; noise that is not given is drawn."""
    names = _named(transform)
    if "base" not in given:
        raise ValueError("from_latents needs latents['base'], the point of the base distribution.")
    unknown = sorted(set(given) - {"base", *names})
    if unknown:
        raise ValueError(f"from_latents: nothing is called {', '.join(unknown)}; the noise here is {names}.")
    y = given["base"]
    for leaf, inverse in leaves(transform):
        if isinstance(leaf, NoiseInjection) and leaf.name in given:
            leaf._check(y, inverse=False)
            y = leaf.join(y, given[str(leaf.name)])
        else:
            y = _step(leaf, y, inverse)
    return y
