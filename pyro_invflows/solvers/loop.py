"""A loop that ends when nothing is left to do, even under ``torch.func`` and in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_invflows.solvers.solution import is_blind
from pyro_invflows.support.modes import compiled_loop, holds_anywhere, in_functorch

__all__ = ["repeat"]


def repeat(body: Callable[..., tuple[Tensor, ...]], *carried: Tensor, bound: int) -> tuple[Tensor, ...]:
    """Repeat ``carried = body(*carried)`` while ``carried[0]`` has a true entry, at most ``bound`` times.

    While compiling, the body is traced once. It must not break the graph, and must transpose tensors from outside by
    ``transpose(-2, -1)``: the compiler evaluates an attribute such as ``.mT`` outside the loop, and rejects the alias.

    Args:
        body: Returns tensors with the shapes and dtypes of its arguments; no gradient passes through it.
        *carried: A mask of what is still to be done, then everything else that a round passes on to the next.
        bound: Maximum number of rounds; all of them are taken if values cannot be inspected.
    """
    if torch.compiler.is_compiling() and not in_functorch():
        return compiled_loop(body, carried, bound)
    blind = is_blind(carried[0])
    for _ in range(bound):
        if not blind and not holds_anywhere(carried[0]):
            break
        carried = body(*carried)
    return carried
