"""Constant buffers: computed from a module's settings, not saved, and restored whenever the module is moved."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

__all__ = ["HoldsConstants"]


class HoldsConstants(nn.Module):
    """A module with constants: buffers that follow from its settings, so that the ``state_dict`` need not hold them.

    torch moves them like any other buffer but does not keep their values: ``to_empty`` leaves them uninitialised, on
    leaving the meta device as elsewhere, and ``load_state_dict(..., assign=True)`` leaves them with their old device
    and dtype. They are therefore filled again whenever the module is moved or loaded. A subclass defines
    :meth:`_constants`, and its ``reset_parameters`` calls :meth:`fill_constants`.
    """

    def _constants(self, like: Tensor) -> Mapping[str, Tensor]:
        """Return the constants by name, with the dtype and device of ``like``. Subclasses must define this method."""
        raise NotImplementedError(f"{type(self).__name__} must define _constants(like) -> tensors by name.")

    def fill_constants(self) -> None:
        """Compute the constants, with the dtype and device of the module's own tensors."""
        own = chain(self._parameters.values(), self._buffers.values())
        like = next(tensor for tensor in own if tensor is not None and tensor.is_floating_point())
        for name, value in self._constants(like).items():
            old = self._buffers.get(name)
            fits = old is not None and (old.dtype, old.device) == (value.dtype, value.device)
            if old is None or not fits or old.is_inference():
                self.register_buffer(name, value, persistent=False)
            else:
                old.copy_(value)  # in place, because others may hold it: shared memory, a captured CUDA graph

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.fill_constants()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fill_constants()
