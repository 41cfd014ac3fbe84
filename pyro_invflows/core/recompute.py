"""Backward passes that rebuild activations by inverting a chain part by part, instead of keeping them.

A single autograd function does so. Its inputs are all tensors that the chain's result depends on: the value, and each
of the ``parameters()`` and ``buffers()`` that requires a gradient. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import sum_rightmost
from pyro_invflows.core.rebind import rebind
from pyro_invflows.core.structure import evaluate_part
from pyro_invflows.support.derivatives import first_order_only
from pyro_invflows.support.errors import ReconstructionError

__all__ = ["recompute"]

_FIRST_ORDER = (
    "Chain(recompute=True) gives first derivatives only: its gradients cannot be differentiated again. Use "
    "recompute=False."
)


def recompute(chain: Any, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """Evaluate a chain, keeping only its input and output for the backward pass.

    Args:
        chain: A layer with ``parts``.
        value: The input of the pass.
        inverse: Whether to run the inverse pass.

    Returns:
        The output and the log-det of the **forward** map; None if only the ordinary pass gives right gradients.
    """
    named = {
        name: tensor
        for tensors in (chain.named_parameters(remove_duplicate=False), chain.named_buffers(remove_duplicate=False))
        for name, tensor in tensors
        if tensor.requires_grad
    }
    # A conditioned layer's tensors are part of the context's graph. The inner backward passes must stop at them, or the
    # path to the context would count twice. A tensor with several names (a context) is cut once.
    outer = list({id(tensor): tensor for tensor in named.values()}.values())
    inner = [tensor if tensor.is_leaf else tensor.detach().requires_grad_() for tensor in outer]
    twins = {id(tensor): twin for tensor, twin in zip(outer, inner, strict=True)}
    cut = {name: twins[id(tensor)] for name, tensor in named.items() if not tensor.is_leaf}
    twin = rebind(chain, cut) if cut else chain
    placed = {id(t) for t in (*twin.parameters(), *twin.buffers())}
    if any(id(t) not in placed for t in inner):
        return None  # a computed tensor inside a sub-network (functional_call puts them there)
    out, ladj = _Recompute.apply(twin, inner, inverse, value, *outer)
    return out, -ladj if inverse else ladj


class _Recompute(torch.autograd.Function):
    """Inputs: the value, then the tensors. Outputs: the result of the pass, and the log-det in its direction."""

    @staticmethod
    def forward(
        ctx: Any, chain: Any, inner: list[Tensor], inverse: bool, value: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = value
        total: Tensor | None = None
        for _, part, extra in _walk(chain, inverse):
            out, ladj = _step(part, out, inverse)
            ladj = sum_rightmost(ladj, extra)
            total = ladj if total is None else total + ladj
        if out is value:
            out = value.clone()
        total = torch.zeros_like(value) if total is None else total
        ctx.chain, ctx.inner, ctx.inverse = chain, inner, inverse
        # Rows out of reach, whose input cannot be rebuilt: they get no gradient.
        ctx.lost = total.isinf()
        ctx.save_for_backward(value, out, *tensors)
        return out, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_ladj: Tensor) -> tuple[Any, ...]:
        value, current, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(tensors)
        current = current.detach()
        source, target = ctx.chain.domain.event_dim, ctx.chain.codomain.event_dim
        source, target = (target, source) if ctx.inverse else (source, target)
        grad = grad.masked_fill(_over_events(ctx.lost, target), 0.0)
        grad_ladj = grad_ladj.masked_fill(ctx.lost, 0.0)
        with torch.no_grad():
            for _, part, extra in reversed(_walk(ctx.chain, ctx.inverse)):
                current, _ = part.evaluate(current) if ctx.inverse else part.evaluate_inverse(current)
                new = _part_gradients(part, current, ctx, extra, grad, grad_ladj)
                grad = torch.zeros_like(current) if new[0] is None else new[0]
                for i, g in enumerate(new[1:]):
                    if g is not None:
                        old = grads[i]
                        grads[i] = g if old is None else old + g
        _compare(ctx.chain, value, current, source, ctx.lost)
        results: Sequence[Tensor | None] = [grad.sum_to_size(value.shape), *grads]
        results = first_order_only(results, (value, *tensors), _FIRST_ORDER)
        return None, None, None, *results


def _part_gradients(
    part: Bijection, source: Tensor, ctx: Any, extra: int, grad: Tensor, grad_ladj: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of one part with respect to its input and to every tensor of the chain."""
    with torch.enable_grad():
        source = source.detach().requires_grad_()
        out, ladj = _step(part, source, ctx.inverse)
        ladj = sum_rightmost(ladj, extra)
        outputs, weights = [out], [grad.sum_to_size(out.shape)]
        if ladj.requires_grad:
            outputs.append(ladj)
            weights.append(grad_ladj.sum_to_size(ladj.shape))
        return torch.autograd.grad(outputs, [source, *ctx.inner], weights, allow_unused=True)


def _walk(chain: Any, inverse: bool) -> list[tuple[str, Bijection, int]]:
    parts = list(chain.named_parts())
    return parts[::-1] if inverse else parts


def _step(part: Bijection, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return the value and the log-det in one direction, without filling the part's memo.

    An entry there would keep the very activation that recomputation saves.
    """
    if inverse:
        x, aux = part.evaluate_inverse(value)
        return x, -part._log_det(x, value, aux)
    y, aux = evaluate_part(part, value)
    return y, part._log_det(value, y, aux)


def _over_events(rows: Tensor, event_dim: int) -> Tensor:
    """Extend a mask of rows by event dimensions, to broadcast over their elements."""
    return rows[(..., *(None,) * event_dim)]


def _compare(chain: Any, given: Tensor, rebuilt: Tensor, event_dim: int, exempt: Tensor) -> None:
    """Raise an error if the rebuilt input differs from the given one: the gradients would be those of another point.

    Errors are relative to the largest element of their event, but at least to the median of these over all events.
    """
    tolerance = torch.finfo(given.dtype).eps ** 0.5
    given = given.detach()
    size = given.abs()
    if event_dim and size.numel():
        size = size.amax(tuple(range(-event_dim, 0)), keepdim=True)
    size = size.clamp_min(size.nanmedian()) if size.numel() else size
    error = (rebuilt - given).abs() / size.clamp_min(torch.finfo(given.dtype).tiny)
    lost = ~(error <= tolerance) & ~(given.isnan() & rebuilt.isnan()) & ~_over_events(exempt, event_dim)
    if lost.any():
        raise ReconstructionError(
            f"Chain(recompute=True) with {len(chain)} parts rebuilt its input with an error of "
            f"{error[lost].max().item():.2g} (relative to the size of x; at most {tolerance:.2g} is accepted) in "
            f"{lost.double().mean().item():.2%} of the elements, so its gradients would be wrong. Use float64, smaller "
            "weights or recompute=False."
        )
