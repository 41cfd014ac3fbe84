"""Tensors that a module's own call computes: pruned ones, and weights normalised by torch's older functions."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["compute_tensors", "computed_names"]


def compute_tensors(module: nn.Module) -> None:
    """Compute a module's pruned and normalised tensors anew, as its own call would.

    ``torch.nn.utils.prune`` and ``torch.nn.utils.weight_norm`` keep the originals as parameters and compute the tensor
    itself in a hook, which only the module's call runs. Whoever reads the tensors of a module without calling it must
    call this first.

    Raises:
        ValueError: for ``torch.nn.utils.spectral_norm``, which changes its state whenever it computes.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (BasePruningMethod, WeightNorm)):
            hook(module, ())
        elif isinstance(hook, SpectralNorm):
            raise ValueError(
                f"{type(module).__name__}: the tensor {hook.name!r} must not change from call to call, or a density "
                "would not be repeatable, but torch.nn.utils.spectral_norm estimates its norm anew each time. Undo it "
                f"with torch.nn.utils.remove_spectral_norm(module, {hook.name!r}); contractions bound their norm "
                "themselves."
            )


def computed_names(module: nn.Module) -> dict[str, str]:
    """Return the tensors of a module that its own call computes, each with the function of torch that undoes this."""
    undo: dict[type, tuple[str, str]] = {
        BasePruningMethod: ("_tensor_name", "torch.nn.utils.prune.remove"),
        SpectralNorm: ("name", "torch.nn.utils.remove_spectral_norm"),
        WeightNorm: ("name", "torch.nn.utils.remove_weight_norm"),
    }
    return {
        getattr(hook, attribute): function
        for hook in module._forward_pre_hooks.values()
        for kind, (attribute, function) in undo.items()
        if isinstance(hook, kind)
    }
