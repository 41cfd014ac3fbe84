"""The base class of layers that are made of other layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_invflows.core import memo
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.latents import ONLY_OWN_SAMPLE, is_exact, noise_flags
from pyro_invflows.core.memo import FORWARD

__all__ = ["Structure", "evaluate_part"]


class Structure(Bijection):
    """A layer made of other layers, its parts.

    A subclass defines :meth:`named_parts` (the names are those of the sub-modules) and calls :meth:`settle` at the end
    of its constructor. It evaluates a part by :func:`evaluate_part` and ``part.evaluate_inverse(y)``, and takes its
    log-det from ``part._log_det(x, y, aux)``.
    """

    #: Whether only the structure's own last sample can be inverted (``Slice(score="sample")``).
    only_own_sample = False

    def settle(self) -> None:
        """Set the attributes of the whole that follow from its parts."""
        self.opaque = any(part.opaque for part in self.parts)
        self.draws_forward, self.draws_inverse, self.only_own_sample = noise_flags(self)
        # not a cache but the only possible answer: kept whatever the cache size, and not used up
        self._sample: memo.Entry | None = None

    @property
    def parts(self) -> tuple[Bijection, ...]:
        """The parts, in the order of the forward pass."""
        return tuple(part for _, part, _ in self.named_parts())

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return all(part.bijective for part in self.parts)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return is_exact(self)

    def leaves(self, inverse: bool = False) -> Iterator[tuple[Bijection, bool]]:
        for part in reversed(self.parts) if inverse else self.parts:
            yield from part.leaves(inverse)

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast of the parts' batch shapes, without dimensions that are event dimensions of the whole."""
        shapes = [(part.batch_shape, extra) for _, part, extra in self.named_parts()]
        return torch.broadcast_shapes(*(shape[: max(len(shape) - extra, 0)] for shape, extra in shapes))

    def evaluate(self, x: Tensor) -> tuple[Tensor, Any]:
        y, aux = super().evaluate(x)
        if self.only_own_sample:
            self._sample = memo.new_entry(self, x, y, aux, FORWARD)
        return y, aux

    def evaluate_inverse(self, y: Tensor) -> tuple[Tensor, Any]:
        if not self.only_own_sample:
            return super().evaluate_inverse(y)
        sample = self._sample
        if sample is None or sample.y is not y or not memo.is_fresh(self, sample):
            raise ValueError(ONLY_OWN_SAMPLE)
        return sample.x, sample.aux

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        sample = self._sample
        if sample is not None and sample.x is x and sample.y is y and memo.is_fresh(self, sample):
            return sample.aux
        return super()._aux(x, y)

    def clear_cache(self) -> None:
        """Forget the last evaluation, also of the parts."""
        super().clear_cache()
        self._sample = None
        for part in self.parts:
            part.clear_cache()

    def _copied_state(self) -> dict[str, Any]:
        return super()._copied_state() | {"_sample": None}


def evaluate_part(part: Bijection, x: Tensor) -> tuple[Tensor, Any]:
    """Return y and the aux of a part. A part with module hooks is called, because only a call runs them."""
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        y = part(x)
        return y, part._aux(x, y)
    return part.evaluate(x)
