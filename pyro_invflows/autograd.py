"""What several hand-written derivatives share: a clear error in place of a wrong second derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order_only"]


def first_order_only(
    results: Sequence[Tensor | None], anchors: Sequence[Tensor | None], message: str
) -> tuple[Tensor | None, ...]:
    """Return the results as they are, but so that a derivative of them raises ``NotImplementedError``.

    For the backward pass of a function whose own derivative would be wrong or zero. Costs nothing where no graph is
    being built.

    Args:
        results: Gradients, some perhaps None.
        anchors: What they truly depend on: whoever asks for a derivative asks for one of these.
        message: The error's text.
    """
    live = [t for t in anchors if t is not None and t.requires_grad]
    if not torch.is_grad_enabled() or not live:
        return tuple(results)
    return _FirstOrderOnly.apply(message, len(results), *results, *live)


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(None if t is None else t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(ctx.message)
