"""Buffers that follow from the settings of a module: kept for use at each call, but neither saved nor lost."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

__all__ = ["HoldsConstants"]


class HoldsConstants(nn.Module):
    """A module with constants: buffers that are known from its settings, so that a state need not hold them.

    torch moves them like any other buffer and promises nothing more. ``to_empty`` leaves them uninitialised, on the way
    from the meta device as elsewhere, and ``load_state_dict(..., assign=True)`` leaves them where, and in the dtype,
    that they were. So they are filled again whenever the module is moved or loaded. A subclass says what they are, and
    its ``reset_parameters`` calls :meth:`fill_constants`.
    """

    def _constants(self, like: Tensor) -> Mapping[str, Tensor]:
        """Return the constants by name, in the dtype and on the device of ``like``. A subclass defines it."""
        raise NotImplementedError(f"{type(self).__name__} must define _constants(like) -> tensors by name.")

    def fill_constants(self) -> None:
        """Make the constants, in the dtype and on the device of the module's own parameters."""
        own = chain(self._parameters.values(), self._buffers.values())
        like = next(tensor for tensor in own if tensor is not None and tensor.is_floating_point())
        for name, value in self._constants(like).items():
            old = self._buffers.get(name)
            fits = old is not None and (old.dtype, old.device) == (value.dtype, value.device)
            if old is None or not fits or old.is_inference():
                self.register_buffer(name, value, persistent=False)
            else:
                old.copy_(value)  # in place, for whoever holds it: shared memory, a captured graph

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.fill_constants()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fill_constants()
