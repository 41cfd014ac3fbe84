"""The modes that torch is currently in. This is the only module that reads torch's private state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._higher_order_ops import while_loop
from torch.autograd import forward_ad

__all__ = [
    "compiled_loop",
    "derivative_levels",
    "forward_levels",
    "functorch_level",
    "holds_anywhere",
    "in_forward_mode",
    "in_functorch",
    "is_any_autocast",
    "is_tracing",
    "saves_through_hooks",
]

#: Whether a ``torch.func`` transform is active, so that tensors may have hidden batch dimensions or tangents.
in_functorch = torch._C._are_functorch_transforms_active
#: Whether autocast is on for some device.
is_any_autocast = torch._C._is_any_autocast_enabled
#: Whether ``torch.jit.trace`` is recording.
is_tracing = torch._C._is_tracing


def functorch_level() -> int:
    """Return the number of active ``torch.func`` transforms; while compiling, whether there is one."""
    if torch.compiler.is_compiling():  # the compiler does not count them
        return int(in_functorch())
    return torch._C._functorch.maybe_current_level() or 0


def holds_anywhere(mask: Tensor) -> bool:
    """Whether a mask has a true entry, also in batch dimensions that ``vmap`` hides."""
    while torch._C._functorch.is_functorch_wrapped_tensor(mask):
        mask = torch._C._functorch.get_unwrapped(mask)
    return bool(mask.any())


def compiled_loop(
    body: Callable[..., tuple[Tensor, ...]], carried: tuple[Tensor, ...], bound: int
) -> tuple[Tensor, ...]:
    """Put a loop into the graph being compiled: ``carried = body(*carried)`` while ``carried[0]`` has a true entry.

    Args:
        body: Returns tensors with the shapes and dtypes of its arguments.
        carried: A mask, and everything else that a round passes on to the next.
        bound: Maximum number of rounds.
    """

    def goes_on(count: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
        return (count < bound) & mask.any()

    def counted(count: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        return count + 1, *body(*carried)

    start = torch.zeros((), dtype=torch.int64, device=carried[0].device)
    # clones, because nothing that is carried may share memory with anything else
    return while_loop(goes_on, counted, (start, *(t.clone() for t in carried)))[1:]


def forward_levels() -> int:
    """Return the number of nested forward-mode derivatives being taken: 2 in ``jacfwd(jacfwd(f))``.

    Only the innermost one sees an autograd function's ``jvp``; the others treat its result as a constant. The same
    holds for torch's ``slogdet`` and ``solve``, whatever mode the outer derivative is taken in.
    """
    return _count_levels(TransformType.Jvp) or int(in_forward_mode())


def derivative_levels() -> int:
    """Return the number of nested derivatives that ``torch.func`` is taking, in any mode."""
    return _count_levels(TransformType.Jvp, TransformType.Grad)


def _count_levels(*kinds: TransformType) -> int:
    if not in_functorch():
        return 0
    if torch.compiler.is_compiling():  # the compiler cannot inspect the stack: assume the most demanding case
        return 2
    return sum(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack())


def in_forward_mode() -> bool:
    """Whether ``torch.autograd.forward_ad`` is active, so that tensors may carry tangents."""
    return forward_ad._current_level >= 0


def saves_through_hooks() -> bool:
    """Whether autograd passes the tensors that it saves to hooks, as in activation checkpointing and offloading.

    Checkpointing runs the same code twice and requires that the same tensors be saved both times.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
