"""Networks that can return to their start."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Network", "restart"]


def restart(module: nn.Module) -> None:
    """Give a module's parameters new starting values.

    A module with a method ``reset_parameters`` is in charge of all that it holds; of any other the children are
    restarted. Parameters that belong to neither keep their values.
    """
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for child in module.children():
        restart(child)


class Network(nn.Sequential):
    """Layers in a row, which know how they started.

    Args:
        *layers: As in ``nn.Sequential``.
        zero_output: Start with zeros in the last layer, hence with an output of zero for every input.
    """

    def __init__(self, *layers: Any, zero_output: bool = False) -> None:
        super().__init__(*layers)
        self.zero_output = zero_output
        self._zero()

    def reset_parameters(self) -> None:
        """Draw all layers anew; zeros in the last one, if it started with them."""
        for layer in self:
            restart(layer)
        self._zero()

    def _zero(self) -> None:
        if self.zero_output:
            for parameter in self[-1].parameters():
                nn.init.zeros_(parameter)
