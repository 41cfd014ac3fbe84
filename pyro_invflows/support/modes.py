"""What torch is doing at the moment: the only place that reads its private state."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

__all__ = [
    "derivative_levels",
    "forward_levels",
    "functorch_level",
    "in_forward_mode",
    "in_functorch",
    "is_any_autocast",
    "is_tracing",
    "saves_through_hooks",
]

#: Whether a transform of ``torch.func`` is active: values may be batched or dual behind their shapes.
in_functorch = torch._C._are_functorch_transforms_active
#: Whether autocast is on for some device.
is_any_autocast = torch._C._is_any_autocast_enabled
#: Whether ``torch.jit.trace`` records.
is_tracing = torch._C._is_tracing


def functorch_level() -> int:
    """Return how many transforms of ``torch.func`` are active."""
    return torch._C._functorch.maybe_current_level() or 0


def forward_levels() -> int:
    """Return how many forward-mode derivatives are being taken, one of another: 2 in ``jacfwd(jacfwd(f))``.

    An autograd function's ``jvp`` is seen by the innermost of them alone: the others take its result for a constant.
    The same holds for torch's ``slogdet`` and ``solve``, and there the second derivative may be in any mode.
    """
    return _count_levels(TransformType.Jvp) or int(in_forward_mode())


def derivative_levels() -> int:
    """Return how many derivatives are being taken by ``torch.func``, one of another, in any mode."""
    return _count_levels(TransformType.Jvp, TransformType.Grad)


def _count_levels(*kinds: TransformType) -> int:
    if not in_functorch():
        return 0
    if torch.compiler.is_compiling():  # the compiler cannot look any closer: assume what needs most care
        return 2
    return sum(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack())


def in_forward_mode() -> bool:
    """Whether dual numbers of ``torch.autograd.forward_ad`` may be about."""
    return forward_ad._current_level >= 0


def saves_through_hooks() -> bool:
    """Whether autograd hands what it saves to hooks: activation checkpointing, offloading.

    Checkpointing runs the same code twice and must see the same tensors saved.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
