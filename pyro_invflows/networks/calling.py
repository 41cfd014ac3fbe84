"""Calls of networks that may work in place, with tensors that must stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["call_network", "out_of_place"]


def call_network(network: nn.Module, *inputs: Tensor, owner: str) -> Tensor:
    """Return ``network(*inputs)``, but never write to the inputs, which may be the caller's tensors.

    A network that begins in place (``nn.ReLU(inplace=True)``) receives copies. One that writes to its input in a way
    that cannot be seen from its modules is refused, once it has done so.

    Args:
        network: Any module.
        *inputs: The network's inputs.
        owner: Name used in error messages.

    Raises:
        ValueError: if the network wrote to an input.
    """
    if _begins_in_place(network):
        return network(*(value.clone() for value in inputs))
    if torch.compiler.is_compiling():
        return network(*inputs)
    try:
        versions = [value._version for value in inputs]
    except RuntimeError:  # inference tensors have no version
        return network(*inputs)
    result = network(*inputs)
    if versions != [value._version for value in inputs]:
        raise ValueError(
            f"{owner}: the network must not write to its input, which may be a view of your data, but it did, and the "
            "data are changed now. Let it begin with an operation that is not in place, or with x = x.clone()."
        )
    return result


def _begins_in_place(module: nn.Module) -> bool | None:
    """Whether a module that works in place stands before the first one with parameters; None where there is neither.

    In the order of registration, which is that of the calls in ``nn.Sequential``. At every call: modules may be
    exchanged.
    """
    if module.__dict__.get("inplace"):
        return True
    if module._parameters:
        return False
    for child in module._modules.values():
        if child is not None:
            begins = _begins_in_place(child)
            if begins is not None:
                return begins
    return None


def out_of_place(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return an activation as a function that leaves its argument as it is."""
    if getattr(activation, "inplace", False):
        return lambda x: activation(x.clone())
    return activation
