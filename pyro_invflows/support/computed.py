"""Tensors that a module computes when it is called: pruned ones, and weights normalised by torch's older functions."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["compute_tensors", "computed_names"]


def compute_tensors(module: nn.Module) -> None:
    """Recompute a module's pruned and normalised tensors, as calling the module would.

    ``torch.nn.utils.prune`` and ``torch.nn.utils.weight_norm`` keep the original tensors as parameters and compute the
    ones in use in a pre-hook, which runs only when the module is called. Code that reads a module's tensors without
    calling the module must call this function first.

    Raises:
        ValueError: for ``torch.nn.utils.spectral_norm``, which changes its state every time it computes the tensor.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (BasePruningMethod, WeightNorm)):
            hook(module, ())
        elif isinstance(hook, SpectralNorm):
            raise ValueError(
                f"{type(module).__name__}: the tensor {hook.name!r} must be the same in every call, or densities would "
                "not be repeatable, but torch.nn.utils.spectral_norm estimates its norm anew in each call. Undo it "
                f"with torch.nn.utils.remove_spectral_norm(module, {hook.name!r}); contractions bound their own norm."
            )


def computed_names(module: nn.Module) -> dict[str, tuple[str, str]]:
    """Return the names of a module's tensors that are computed from other tensors.

    Each name maps to the torch function that computes the tensor and the one that undoes this.
    """
    own = "torch.nn.utils."
    names = {}
    parametrised: Any = module._modules.get("parametrizations") or {}
    for name, originals in parametrised.items():
        # the originals are the list's own parameters; those of its children belong to the parametrisation
        if list(originals.parameters(recurse=False)):
            names[name] = f"{own}parametrize", f"{own}parametrize.remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            names[hook._tensor_name] = f"{own}prune", f"{own}prune.remove"
        elif isinstance(hook, WeightNorm):
            names[hook.name] = f"{own}weight_norm", f"{own}remove_weight_norm"
        elif isinstance(hook, SpectralNorm):
            names[hook.name] = f"{own}spectral_norm", f"{own}remove_spectral_norm"
    return names
