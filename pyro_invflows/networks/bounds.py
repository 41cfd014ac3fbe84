"""What is known about the Lipschitz constants of modules: torch's, this library's and those that declare one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from pyro_invflows.support.checks import activation_constructor

__all__ = ["check_lipschitz", "lipschitz_bound", "make_activations"]


def check_lipschitz(lipschitz: float, owner: str, *, below_one: bool = True) -> float:
    """Check a Lipschitz constant."""
    if isinstance(lipschitz, bool) or not isinstance(lipschitz, (int, float)):
        raise TypeError(f"{owner}: lipschitz must be a number, but got {lipschitz!r}.")
    if not lipschitz > 0 or (below_one and not lipschitz < 1) or not lipschitz < float("inf"):
        limits = "strictly between 0 and 1" if below_one else "positive and finite"
        raise ValueError(
            f"{owner}: lipschitz must be {limits}, but got {lipschitz!r}. Typical values are 0.9 to 0.99; at 1 "
            "the inverse need not be unique, and the iteration for it need not converge."
        )
    return float(lipschitz)


#: Largest slopes of torch's elementwise modules.
_SLOPES: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.CELU: lambda m: 1.0 if m.alpha > 0 else math.inf,
    nn.ELU: lambda m: max(1.0, abs(m.alpha)),
    nn.GELU: lambda m: 1.1290,
    nn.Hardtanh: lambda m: 1.0,
    nn.Identity: lambda m: 1.0,
    nn.LeakyReLU: lambda m: max(1.0, abs(m.negative_slope)),
    nn.LogSigmoid: lambda m: 1.0,
    nn.Mish: lambda m: 1.0885,
    nn.ReLU: lambda m: 1.0,
    nn.ReLU6: lambda m: 1.0,
    nn.SELU: lambda m: 1.7581,
    nn.Sigmoid: lambda m: 0.25,
    nn.SiLU: lambda m: 1.0999,
    # beyond its threshold torch returns x: a jump of exp(-threshold) / beta
    nn.Softplus: lambda m: 1.0 if m.threshold >= 20 else math.inf,
    nn.Softshrink: lambda m: 1.0,
    nn.Softsign: lambda m: 1.0,
    nn.Tanh: lambda m: 1.0,
    nn.Tanhshrink: lambda m: 1.0,
}


def make_activations(constructor: Callable[[], nn.Module], count: int, owner: str) -> list[nn.Module]:
    """Build activations; raise an error unless they are elementwise with slopes of at most 1."""
    activation_constructor(constructor, owner)
    activations = [constructor() for _ in range(count)]
    for activation in activations:
        elementwise = type(activation) in _SLOPES or hasattr(activation, "value_and_slope")
        if not isinstance(activation, nn.Module) or not elementwise:
            raise ValueError(
                f"{owner}: {type(activation).__name__} is not a known elementwise activation. Use one of torch's, "
                "networks.LipSwish or networks.Sine, or a module with an attribute 'lipschitz' and a method "
                "value_and_slope(x)."
            )
        lipschitz_bound(activation, owner=owner)
    return activations


def lipschitz_bound(module: nn.Module, *, owner: str = "lipschitz_bound", path: str = "") -> float:
    """Return a bound on a network's Lipschitz constant that holds by construction.

    Known contractions are those of this library, ``nn.Sequential`` of known modules, torch's elementwise activations,
    and any module with an attribute ``lipschitz``, which its author vouches for.

    Args:
        module: The network.
        owner: Name used in error messages.
        path: Path of the module inside the network, for error messages.

    Raises:
        ValueError: if a module is not a known contraction, or its constant may exceed 1; the first one is named.
    """
    where = f"'{path}' ({type(module).__name__})" if path else type(module).__name__
    declared = getattr(module, "lipschitz", None)
    if declared is not None:
        bound = check_lipschitz(declared, f"{owner}: {where}", below_one=False)
    elif type(module) in _SLOPES:
        bound = _SLOPES[type(module)](module)
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        bound = 1.0
        for name, child in module.named_children():
            bound *= lipschitz_bound(child, owner=owner, path=f"{path}.{name}" if path else name)
    else:
        raise ValueError(
            f"{owner}: {where} is not a known contraction. Use networks.LinearContraction, "
            "networks.Conv2dContraction, networks.ContractiveMLP or activations with slopes of at most 1, or give the "
            "module an attribute 'lipschitz', if you can vouch for one."
        )
    if bound > 1:
        raise ValueError(
            f"{owner}: the Lipschitz constant of {where} must be at most 1, but may be {bound:.4g}. Use "
            "networks.LipSwish in place of a swish, or scale the module down."
        )
    return bound
