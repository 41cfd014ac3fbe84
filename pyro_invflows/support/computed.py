"""Tensors that a module's own call computes: pruned ones, and weights normalised by torch's older functions."""

from __future__ import annotations

from typing import Any

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


def computed_names(module: nn.Module) -> dict[str, tuple[str, str]]:
    """Return the names of the tensors that are not a module's own but computed from others.

    Each with the function of torch that computes it, and the one that undoes this.
    """
    own = "torch.nn.utils."
    names = {}
    parametrised: Any = module._modules.get("parametrizations") or {}
    for name, originals in parametrised.items():
        # an original is the list's own; what is below belongs to the parametrisation
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
