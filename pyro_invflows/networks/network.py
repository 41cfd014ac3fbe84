"""Networks that can be reset to their initial state."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Network", "restart"]


def restart(module: nn.Module) -> None:
    """Give a module's parameters new initial values.

    A module with a method ``reset_parameters`` is responsible for all that it holds; of any other module, the children
    are restarted. Parameters for which no module is responsible keep their values.
    """
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for child in module.children():
        restart(child)


class Network(nn.Sequential):
    """An ``nn.Sequential`` that can be reset.

    Args:
        *layers: As in ``nn.Sequential``.
        zero_output: Initialise the last layer with zeros, so that the output is zero for every input.
    """

    def __init__(self, *layers: Any, zero_output: bool = False) -> None:
        super().__init__(*layers)
        self.zero_output = zero_output
        self._zero()

    def reset_parameters(self) -> None:
        """Draw all layers anew; with ``zero_output``, set the last one to zero."""
        for layer in self:
            restart(layer)
        self._zero()

    def _zero(self) -> None:
        if self.zero_output:
            for parameter in self[-1].parameters():
                nn.init.zeros_(parameter)
