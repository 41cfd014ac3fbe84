"""Limitations of devices."""

from __future__ import annotations

import torch

__all__ = ["lacks_float64"]


def lacks_float64(device: torch.device) -> bool:
    """Whether a device does not support double precision."""
    return device.type == "mps"
