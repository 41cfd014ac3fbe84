"""A loop that ends when nothing is left to do, also under ``torch.func`` and in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_invflows.solvers.solution import is_blind
from pyro_invflows.support.modes import compiled_loop, holds_anywhere, in_functorch

__all__ = ["repeat"]


def repeat(body: Callable[..., tuple[Tensor, ...]], *carried: Tensor, bound: int) -> tuple[Tensor, ...]:
    """Repeat ``carried = body(*carried)`` while anything in ``carried[0]`` holds, at most ``bound`` times.

    While compiling the body is traced once. It must not break the graph there, and must write the transpose of a tensor
    from outside as ``transpose(-2, -1)``: the compiler evaluates an attribute such as ``.mT`` outside, and refuses the
    alias.

    Args:
        body: Returns tensors of the shapes and dtypes that it is given; no gradient passes through it.
        *carried: The mask of what is still to be done, then whatever else goes from one round to the next.
        bound: Number of rounds, where all of them are taken.
    """
    if torch.compiler.is_compiling() and not in_functorch():
        return compiled_loop(body, carried, bound)
    blind = is_blind(carried[0])
    for _ in range(bound):
        if not blind and not holds_anywhere(carried[0]):
            break
        carried = body(*carried)
    return carried
