"""Initialising the layers of a flow from data, each from the values that reach it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import ConditionalTransform
from torch import Tensor

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import Conditional
from pyro_invflows.core.foreign import as_bijection

__all__ = ["fit_layers"]


@torch.no_grad()
def fit_layers(part: Any, y: Tensor, context: Tensor | None) -> Tensor:
    """Call ``fit`` on every layer of a part that has one, from its output to its input; return the values there.

    Args:
        part: A layer or a conditional transform.
        y: Values of its output.
        context: The context, if the part is conditional.
    """
    own = part.template if isinstance(part, Conditional) else _conditioned(part, context)
    values: Iterator[Bijection] | None = None
    for i, (layer, inverse) in enumerate(own.leaves(inverse=True)):
        fit = getattr(layer, "fit", None)
        if fit is not None and inverse:
            fit(y)
            values = None  # a conditioned layer holds copies, which are now out of date
        elif fit is not None:
            warnings.warn(
                f"Flow.initialize: Inverted({layer.label}) stays as it is, because fit() takes values of the layer's "
                f"output, but the data reach its input. Use {layer.label} without Inverted.",
                stacklevel=4,  # Flow.initialize was called there, and no_grad wraps both functions
            )
        if values is None:
            leaves = [leaf for leaf, _ in _conditioned(part, context).leaves(inverse=True)]
            values = iter(leaves[i:])
        now = next(values)
        y, _ = now.evaluate_inverse(y) if inverse else now.evaluate(y)
    return y


def _conditioned(part: Any, context: Tensor | None) -> Bijection:
    return as_bijection(part.condition(context)) if isinstance(part, ConditionalTransform) else part
