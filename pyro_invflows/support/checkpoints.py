"""A state in a file, and a fingerprint of the tensors that it belongs to."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["fingerprint", "read_state", "write_state"]

#: What ``torch.load`` raises for a file that it did not write.
_NOT_A_STATE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, struct.error)


def fingerprint(*tensors: Tensor | None) -> str:
    """Return a short text that differs if the values, the shape or the dtype of a tensor differ."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, in one piece or not at all."""
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    beside.replace(path)


def read_state(path: Path, owner: str) -> dict[str, Any]:
    """Read a state of which ``"run"`` is a part.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except _NOT_A_STATE:
        state = None
    if not isinstance(state, dict) or "run" not in state:
        raise ValueError(f"{owner}: {path} exists, but is not a checkpoint of {owner}. Give the name of another file.")
    return state
