"""What several hand-written derivatives share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_invflows.support.modes import derivative_levels, in_forward_mode, in_functorch, is_any_autocast, is_tracing

__all__ = [
    "first_order_only",
    "gradients_with_graph",
    "in_reverse_mode_only",
    "outside_inference_mode",
    "steps_with_graph",
]


def in_reverse_mode_only() -> bool:
    """Whether a graph is being built for the backward pass and for nothing else.

    There a hand-written function without forward mode and ``torch.func`` will do; under autocast it would have to
    follow its rules.
    """
    if torch.compiler.is_compiling() or in_functorch():
        return False
    if is_any_autocast() or in_forward_mode() or is_tracing():
        return False
    return torch.is_grad_enabled()


def steps_with_graph() -> int:
    """Return how many Newton steps from a constant root bring every derivative that may be asked for.

    Each step that keeps its graph doubles the order up to which derivatives are right, plus one: 1, 3, 7. Counted are
    those that ``torch.func`` is taking and one more by autograd outside of it; never fewer than two steps.
    """
    return max(2, (derivative_levels() + 1).bit_length())


def gradients_with_graph(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a hand-written function in a way that can be differentiated again.

    For a backward pass that finds gradients enabled. Not cheap: it evaluates the function once more.

    Args:
        function: The same by torch's own operations, of the same inputs; returns a tensor or a tuple of them.
        inputs: As saved, with the graph that made them.
        grads: Of the outputs.
    """
    # views, so that an input that was computed from another does not count twice
    views = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t in views if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(function(*views), wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in views)


def outside_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method differentiate inside itself although its caller is in inference mode, which records nothing.

    There it runs under ``no_grad`` instead, on copies of its tensors.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return method(self, *args)
        with torch.inference_mode(False), torch.no_grad():
            return method(self, *(a.clone() if isinstance(a, Tensor) else a for a in args))

    return run


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

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> None:
        raise NotImplementedError(ctx.message)
