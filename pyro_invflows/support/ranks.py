"""The processes of ``torch.distributed``: who takes which rows, and sums over all of them."""

from __future__ import annotations

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
        """Return this process's share of rows, or of their numbers."""
        return values[self.rank :: self.count] if self.several else values

    def agreed(self, seed: Tensor) -> int:
        """Return the first process's number."""
        if self.several:
            seed = seed.to(self.device)
            torch.distributed.broadcast(seed, 0)
        return int(seed)

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
