r"""Path gradients: the gradient of a log-density, carried along with a sample through the layers.

With :math:`g = \nabla_x \log q(x)` at the input of a layer, that of its output is
:math:`J^{-T} (g - \nabla_x \log|\det J|)`. The density of a sample can so be differentiated with respect to the sample,
the parameters held fixed, in the pass that draws it (Vaitl et al. 2022, *Gradients should stay on path*).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_invflows.support.computed import compute_tensors

__all__ = [
    "derivative",
    "elementwise_path_gradient",
    "linear_path_gradient",
    "push_gradient",
    "start_gradient",
    "tracked",
]


def start_gradient(layer: Any, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Do the work of ``layer.path_gradient``: push a gradient, and leave no graph that the caller has no use for."""
    if gradient.shape != value.shape:
        raise ValueError(
            f"{layer.label}.path_gradient: the gradient must have the shape of the input, {tuple(value.shape)}, but "
            f"got {tuple(gradient.shape)}."
        )
    result, ladj, gradient = push_gradient(layer, value, gradient, inverse)
    wanted = torch.is_grad_enabled() and (value.requires_grad or any(p.requires_grad for p in layer.parameters()))
    return (result if wanted else result.detach()), ladj, gradient


def push_gradient(layer: Any, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Check and expand the value, run the hook with gradients enabled, and return two constants beside the result."""
    if layer.draws_forward if inverse else layer.draws_inverse:
        raise ValueError(
            f"{layer.label}.path_gradient: the density of the output must be known, but scoring it draws noise. Use "
            "the gradient of a log_prob instead."
        )
    layer._check(value, inverse)
    if layer.batch_shape:  # then every row has a gradient of its own
        shape = layer._shape(layer._shape(value.shape, inverse), not inverse)
        value = value if value.shape == shape else value.expand(shape)
    gradient = gradient.detach()
    gradient = gradient if gradient.shape == value.shape else gradient.expand(value.shape)
    if layer._forward_pre_hooks:
        compute_tensors(layer)
    bayesian = layer.__dict__.get("_pyro_samples")  # all reads within one evaluation must see the same draw
    with torch.enable_grad(), layer._pyro_context if bayesian else contextlib.nullcontext():
        result, ladj, gradient = layer._path_gradient(value, gradient, inverse)
    return result, ladj.detach(), gradient.detach()


def tracked(value: Tensor) -> Tensor:
    """Return a value that requires gradients: itself, or a new leaf."""
    return value if value.requires_grad else value.detach().requires_grad_()


def derivative(ladj: Tensor, value: Tensor) -> Tensor | None:
    """Return the gradient of the sum of ``ladj`` with respect to ``value``; None if it does not depend on it."""
    if not ladj.requires_grad:
        return None
    return torch.autograd.grad(ladj.sum(), value, retain_graph=True, allow_unused=True)[0]


def path_gradient_by_inversion(layer: Any, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Any, ...]:
    """Differentiate the density of the output, scored by the way back: right for every layer that can score."""
    result, ladj = layer.one_pass(value, inverse)
    end = result.detach().requires_grad_()
    start, ladj_back = layer.one_pass(end, not inverse)
    # log q of the output is that of the input plus ladj_back; only the gradient of the former is known
    outputs, weights = [start], [gradient]
    if ladj_back.requires_grad:
        outputs, weights = [start, ladj_back], [gradient, torch.ones_like(ladj_back)]
    (found,) = torch.autograd.grad(outputs, end, weights, allow_unused=True, materialize_grads=True)
    return result, ladj, found


def elementwise_path_gradient(layer: Any, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Any, ...]:
    """Divide by the slope: for layers with event dimension 0."""
    value = tracked(value)
    result, ladj = layer.one_pass(value, inverse)
    change = derivative(ladj, value)
    gradient = gradient if change is None else gradient - change
    return result, ladj, layer.sign * gradient * (-ladj.detach()).exp()


def linear_path_gradient(layer: Any, value: Tensor, inverse: bool, solve: Callable[[], Tensor]) -> tuple[Any, ...]:
    """Return the gradient that ``solve`` computes, :math:`J^{-T} g`: for layers with a constant Jacobian."""
    result, ladj = layer.one_pass(value, inverse)
    with torch.no_grad():
        return result, ladj, solve()
