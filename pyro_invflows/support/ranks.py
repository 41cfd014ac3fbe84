"""The processes of ``torch.distributed``: who takes which rows, and what all of them agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ranks"]


class Ranks:
    """The processes of ``torch.distributed``, or the only one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if self.several else 0
        self.count = torch.distributed.get_world_size() if self.several else 1

    def share(self, values: Any) -> Any:
        """Return this process's share of rows, or of their numbers; it may be empty."""
        return values[self.rank :: self.count] if self.several else values

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return, in every process, what a call in the first process returns; raise the ValueError that it raises."""
        if not self.several:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except ValueError as error:
                outcome[1] = str(error)
        torch.distributed.broadcast_object_list(outcome, 0, device=self.device)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def first_text(self, text: str) -> str:
        """Return the first text of all processes that is not empty."""
        if not self.several:
            return text
        texts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(texts, text)
        return next(filter(None, texts), "")

    def copy_from_first(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.several:
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over all processes, in one exchange."""
        if not self.several:
            return tensors
        flat = torch.cat([t.detach().flatten() for t in tensors]).to(self.device)
        torch.distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t).to(t) for part, t in zip(parts, tensors, strict=True)]
