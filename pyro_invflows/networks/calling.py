"""Calling networks that may work in place on tensors that must not change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["call_network", "out_of_place"]


def call_network(network: nn.Module, *inputs: Tensor, owner: str) -> Tensor:
    """Return ``network(*inputs)``, protecting the inputs, which may be the caller's tensors, from in-place writes.

    A network whose first operation is an in-place module (``nn.ReLU(inplace=True)``) receives clones. A write that the
    modules do not reveal is detected afterwards and raises an error.

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
            "data have changed. Let it start with an operation that is not in-place, or with x = x.clone()."
        )
    return result


def _begins_in_place(module: nn.Module) -> bool | None:
    """Whether an in-place module comes before the first module with parameters; None if there is neither.

    The order is that of registration, which in ``nn.Sequential`` is the order of the calls. Checked in every call,
    because modules may be replaced.
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
    """Return an activation as a function that does not change its argument."""
    if getattr(activation, "inplace", False):
        return lambda x: activation(x.clone())
    return activation
