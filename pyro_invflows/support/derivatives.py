"""Helpers for hand-written derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_invflows.support.modes import derivative_levels, in_forward_mode, in_functorch, is_any_autocast, is_tracing

__all__ = [
    "depends_on_more",
    "first_order_only",
    "gradients_with_graph",
    "in_plain_eager_mode",
    "in_reverse_mode_only",
    "may_differentiate",
    "outside_inference_mode",
    "steps_with_graph",
]


def in_plain_eager_mode() -> bool:
    """Whether operations run eagerly and unchanged, outside of every mode.

    Then an autograd function may do without forward mode and ``torch.func``. Autocast counts as a mode, because under
    it the function would have to follow autocast's casting rules.
    """
    if torch.compiler.is_compiling() or in_functorch():
        return False
    return not (is_any_autocast() or in_forward_mode() or is_tracing())


def in_reverse_mode_only() -> bool:
    """Whether autograd is recording for a backward pass, outside of every other mode."""
    return in_plain_eager_mode() and torch.is_grad_enabled()


def may_differentiate(*tensors: Tensor) -> bool:
    """Whether a derivative with respect to one of the tensors may be requested; if not, a graph only costs time."""
    return in_functorch() or in_forward_mode() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def depends_on_more(value: Tensor, x: Tensor) -> bool:
    """Whether the autograd graph of a value has a leaf other than x."""
    if value.grad_fn is None:
        return False
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not x:
            return True
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return False


def steps_with_graph() -> int:
    """Return how many recorded Newton steps, from a constant root, give every derivative that may be requested.

    After n steps that keep their graph, derivatives are right up to order ``2^n - 1``. The order needed is the number
    of derivatives that ``torch.func`` is taking, plus one by autograd outside of it. At least two steps are taken.
    """
    return max(2, (derivative_levels() + 1).bit_length())


def gradients_with_graph(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a hand-written function so that they can be differentiated again.

    For a backward pass that runs with gradients enabled. Expensive: it evaluates the function once more.

    Args:
        function: The same function of the same inputs, written in torch operations; returns a tensor or a tuple.
        inputs: The saved inputs, with the graph that produced them.
        grads: Gradients of the outputs.
    """
    # views, so that an input that was computed from another one is not counted twice
    views = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t in views if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(function(*views), wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in views)


def outside_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method use autograd internally even if its caller is in inference mode, which records nothing.

    In that case the method runs under ``no_grad`` instead, on clones of its tensor arguments.
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
    """Return the results unchanged, except that differentiating them raises ``NotImplementedError``.

    For a backward pass whose own derivative would be wrong or zero. Costs nothing unless a graph is being built.

    Args:
        results: Gradients; some may be None.
        anchors: The tensors that the results truly depend on; a further derivative is with respect to one of these.
        message: Text of the error.
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
