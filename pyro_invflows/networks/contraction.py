r"""Networks that are contractions, by construction: their bound holds at any weights, at every call.

A weight A acts as :math:`A \min(1, c / |A|)` with a spectral norm that is never under-estimated
(:func:`~pyro_invflows.linalg.spectral_norm_bound`), computed from the weight as it is: in training and evaluation,
right after ``load_state_dict``, after any optimiser's step, before any other call. Nothing is kept from call to call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.networks.activations import LipSwish, value_and_slope
from pyro_invflows.networks.dense import dense_network
from pyro_invflows.networks.linearisation import Linearisation
from pyro_invflows.networks.network import Network, restart
from pyro_invflows.support.checks import activation_constructor, is_int, positive_int, widths
from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.modes import functorch_level

__all__ = [
    "ContractiveMLP",
    "Conv2dContraction",
    "LinearContraction",
    "contractive_conv_network",
    "held_weights",
    "lipschitz_bound",
]


class _Weights(NamedTuple):
    """What a contraction computed from its parameters, and how."""

    owner: nn.Module  # kept alive: its id is the key
    value: Any
    with_graph: bool
    level: int  # of torch.func


_HELD: ContextVar[dict[int, _Weights] | None] = ContextVar("held_weights", default=None)


@contextmanager
def held_weights(store: dict[int, _Weights] | None = None) -> Iterator[dict[int, _Weights]]:
    """Within this context, contractions compute their weights once, not at every call.

    For the loops of a solver. The parameters must not change inside. Each thread has its own. Weights that carry a
    graph serve where none is wanted, too, but not the other way round.

    Args:
        store: What an earlier context yielded, to go on with its weights.
    """
    store = {} if store is None else store
    if torch.compiler.is_compiling():
        yield store
        return
    token = _HELD.set(store)
    try:
        yield store
    finally:
        _HELD.reset(token)


def _hold(module: nn.Module, compute: Callable[[], Any]) -> Any:
    held = None if torch.compiler.is_compiling() else _HELD.get()
    if held is None:
        return compute()
    level = functorch_level()
    known = held.get(id(module))
    if known is None or known.level != level or (torch.is_grad_enabled() and not known.with_graph):
        known = held[id(module)] = _Weights(module, compute(), torch.is_grad_enabled(), level)
    return known.value


def hold_weights_of(network: nn.Module) -> None:
    """Within :func:`held_weights`, compute the weights of all contractions in a network now, with their graph."""
    for module in network.modules():
        contracted = getattr(module, "contracted", None)
        if contracted is not None:
            _hold(module, contracted)


def check_lipschitz(lipschitz: float, owner: str, *, below_one: bool = True) -> float:
    """Check a Lipschitz constant."""
    if isinstance(lipschitz, bool) or not isinstance(lipschitz, (int, float)):
        raise TypeError(f"{owner}: lipschitz must be a number, but got {lipschitz!r}.")
    if not lipschitz > 0 or (below_one and not lipschitz < 1) or not lipschitz < float("inf"):
        limits = "strictly between 0 and 1" if below_one else "positive and finite"
        raise ValueError(
            f"{owner}: lipschitz must be {limits}, but got {lipschitz!r}. 0.9 to 0.99 are usual; at 1 the inverse "
            "would neither be unique nor reached."
        )
    return float(lipschitz)


def contract(weight: Tensor, lipschitz: float, norm: Tensor) -> Tensor:
    """Return ``weight * min(1, lipschitz / norm)``, with room for the rounding of the product."""
    smaller = min(weight.shape[0], weight[0].numel())
    room = 1 + torch.finfo(weight.dtype).eps * (1 + smaller**0.5)
    return weight * (lipschitz / (norm * room).clamp_min(lipschitz)).to(weight.dtype)


class LinearContraction(nn.Module):
    r"""A linear layer with a Lipschitz constant that holds by construction: :math:`y = \min(1, c / |A|) A x + b`.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        lipschitz: c, between 0 and 1.
        bias: Whether b is learned.

    Raises:
        ValueError: if ``lipschitz`` is not strictly between 0 and 1.

    Example:
        >>> from pyro_invflows.networks import LinearContraction
        >>> layer = LinearContraction(3, 5, lipschitz=0.9)
        >>> _ = torch.nn.init.normal_(layer.weight, std=100.0)
        >>> bool(torch.linalg.matrix_norm(layer.contracted(), 2) <= 0.9)
        True
    """

    def __init__(self, in_features: int, out_features: int, lipschitz: float = 0.97, *, bias: bool = True) -> None:
        super().__init__()
        self.lipschitz = check_lipschitz(lipschitz, "LinearContraction")
        in_features = positive_int(in_features, "in_features", "LinearContraction")
        out_features = positive_int(out_features, "out_features", "LinearContraction")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Linear`` does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def contracted(self) -> Tensor:
        """Return the matrix that acts, ``(out_features, in_features)``."""
        compute_tensors(self)
        return contract(self.weight, self.lipschitz, linalg.spectral_norm_bound(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _hold(self, self.contracted), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, lipschitz={self.lipschitz}"


class Conv2dContraction(nn.Module):
    """A convolution, stride 1, that keeps the resolution and whose operator norm is bounded for images of any size.

    The norm is that of the convolution itself, not of its kernel as a matrix
    (:func:`~pyro_invflows.linalg.convolution_norm_bound`).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, odd.
        lipschitz: Bound on the operator norm, between 0 and 1.
        bias: Whether a bias is learned.

    Raises:
        ValueError: if ``lipschitz`` is not strictly between 0 and 1, or the kernel's side is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        lipschitz: float = 0.97,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.lipschitz = check_lipschitz(lipschitz, "Conv2dContraction")
        if not is_int(kernel_size) or kernel_size < 1 or not kernel_size % 2:
            raise ValueError(f"Conv2dContraction: kernel_size must be odd, but got {kernel_size!r}.")
        kernel_size = int(kernel_size)
        in_channels = positive_int(in_channels, "in_channels", "Conv2dContraction")
        out_channels = positive_int(out_channels, "out_channels", "Conv2dContraction")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv2d`` does."""
        nn.Conv2d.reset_parameters(self)  # type: ignore[arg-type]

    def contracted(self) -> Tensor:
        """Return the kernel that acts, ``(out_channels, in_channels, k, k)``."""
        compute_tensors(self)
        return contract(self.weight, self.lipschitz, linalg.convolution_norm_bound(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _hold(self, self.contracted), self.bias, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{size}, lipschitz={self.lipschitz}"


class ContractiveMLP(nn.Module):
    r"""A multi-layer perceptron g whose Lipschitz constant, in x, holds by construction.

    .. math:: g(x) = \min\Bigl(1, \frac{c}{\prod_i |W_i|}\Bigr) W_L \phi(\cdots \phi(W_1 x + b_1) \cdots) + b_L.

    Only the product of the norms is bounded, by a factor on the last matrix: single matrices may be as large as they
    like, so that steep features remain possible where each layer's own bound would flatten them. A context shifts the
    biases, by a network of its own, so that one bound serves every context.

    Args:
        input_dim: Width of x and of g(x).
        hidden_dims: Hidden widths.
        lipschitz: c, strictly between 0 and 1.
        activation: Constructor of the activations, elementwise with slopes of at most 1.
        context_dim: Width of the context; 0 for none.
        context_hidden_dims: Hidden widths of the context's network.

    Shape:
        ``(*B, input_dim) -> (*B, input_dim)``; the context ``(*B, context_dim)`` broadcasts.

    Raises:
        ValueError: if ``lipschitz`` is out of range or the activation is steeper than 1.

    Example:
        >>> from pyro_invflows.networks import ContractiveMLP
        >>> net = ContractiveMLP(3, [16, 16], lipschitz=0.9)
        >>> net(torch.zeros(5, 3)).abs().max().item()  # starts at zero
        0.0
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        lipschitz: float = 0.97,
        activation: Callable[[], nn.Module] = LipSwish,
        context_dim: int = 0,
        context_hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self.lipschitz = check_lipschitz(lipschitz, "ContractiveMLP")
        input_dim = positive_int(input_dim, "input_dim", "ContractiveMLP")
        hidden_dims = widths(hidden_dims, "ContractiveMLP", minimum=1)
        sizes = [input_dim, *hidden_dims, input_dim]
        self.layers: Any = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.activations = nn.ModuleList(make_activations(activation, len(hidden_dims), "ContractiveMLP"))
        self.context_dim = positive_int(context_dim, "context_dim", "ContractiveMLP", minimum=0)
        self.hypernet: nn.Module | None = None
        if context_dim:
            self.hypernet = dense_network(context_dim, context_hidden_dims, sum(sizes[1:]), zero_output=True)
        self._zero()

    def reset_parameters(self) -> None:
        """Draw all layers and activations anew; zeros in the last layer, hence g = 0, whatever the context."""
        for module in self.children():
            restart(module)
        self._zero()

    def _zero(self) -> None:
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def contracted(self) -> list[Tensor]:
        """Return the matrices that act; the product of their spectral norms is at most ``lipschitz``."""
        return contract_product(self._own("weight"), self.lipschitz)[0]

    def _own(self, name: str) -> list[Tensor]:
        """Return the weights or the biases: the linear layers themselves are not called."""
        for layer in self.layers:
            compute_tensors(layer)
        return [getattr(layer, name) for layer in self.layers]

    def _biases(self, context: Tensor | None) -> list[Tensor]:
        biases = self._own("bias")
        if context is None or self.hypernet is None:
            return biases
        shifts = self.hypernet(context).split([b.shape[-1] for b in biases], dim=-1)
        return [b + shift for b, shift in zip(biases, shifts, strict=True)]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        weights = _hold(self, self.contracted)
        for i, (weight, bias) in enumerate(zip(weights, self._biases(context), strict=True)):
            x = affine(x if not i else self.activations[i - 1](x), weight, bias)
        return x

    def linearise(self, x: Tensor, context: Tensor | None = None) -> Linearisation:
        """Return the value at x together with the Jacobian there, in closed form."""
        weights = _hold(self, self.contracted)
        slopes: list[Tensor | None] = []
        for i, (weight, bias) in enumerate(zip(weights, self._biases(context), strict=True)):
            if i:
                x, slope = value_and_slope(self.activations[i - 1], x)
                slopes.append(slope)
            x = affine(x, weight, bias)
        return _MLPLinearisation(x, weights, [*slopes, None])


class _MLPLinearisation(Linearisation):
    """Products of weights and slopes."""

    def __init__(self, value: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> None:
        self.value, self.weights, self.slopes = value, weights, slopes

    def vjp(self, v: Tensor) -> Tensor:
        for weight, slope in zip(reversed(self.weights), reversed(self.slopes), strict=True):
            v = (v if slope is None else v * slope) @ weight
        return v

    def jacobian(self) -> Tensor:
        return linalg.cyclic_product(self.weights, self.slopes)

    def reduced_jacobian(self) -> Tensor:
        return linalg.cyclic_product(self.weights, self.slopes, linalg.narrowest(self.weights))


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``W x + b``, where b may have batch dimensions that x has not."""
    if bias is None or bias.dim() == 1:
        return F.linear(x, weight, bias)
    return F.linear(x, weight) + bias


def contract_product(weights: Sequence[Tensor], lipschitz: float) -> tuple[list[Tensor], list[Tensor]]:
    """Scale the last matrix so that the product of the spectral norms is at most ``lipschitz``.

    Returns:
        The matrices, and bounds on the norms that they had.
    """
    norms = linalg.spectral_norm_bounds(weights)
    product = norms[0] if lacks_float64(norms[0].device) else norms[0].double()  # three large norms overflow in single
    for norm in norms[1:]:
        product = product * norm
    # rounding, never downwards; that of the other matrices to their own dtype included
    product = product * (1 + 4 * len(weights) * torch.finfo(norms[0].dtype).eps)
    return [*weights[:-1], contract(weights[-1], lipschitz, product)], norms


def contractive_conv_network(
    channels: int,
    hidden_channels: Sequence[int] = (32, 32),
    *,
    lipschitz: float = 0.97,
    activation: Callable[[], nn.Module] = LipSwish,
) -> nn.Sequential:
    """Build a convolutional contraction: 3 x 3, 1 x 1, ..., 3 x 3 kernels, whose bounds multiply to ``lipschitz``.

    Args:
        channels: Channels of the input and output.
        hidden_channels: Channels of the hidden layers.
        lipschitz: Bound on the whole, strictly between 0 and 1.
        activation: Constructor of the activations, with slopes of at most 1.

    Returns:
        ``nn.Sequential``, ``(N, channels, H, W) -> (N, channels, H, W)``; zero at the start.

    Raises:
        ValueError: if ``lipschitz`` is out of range or the activation is steeper than 1.
    """
    check_lipschitz(lipschitz, "contractive_conv_network")
    channels = positive_int(channels, "channels", "contractive_conv_network")
    hidden = widths(hidden_channels, "contractive_conv_network", "hidden_channels", minimum=1)
    sizes = [channels, *hidden, channels]
    activations = make_activations(activation, len(hidden), "contractive_conv_network")
    count = len(sizes) - 1
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise(sizes)):
        if i:
            layers.append(activations[i - 1])
        layers.append(Conv2dContraction(n, m, 3 if i in (0, count - 1) else 1, lipschitz ** (1 / count)))
    return Network(*layers, zero_output=True)


# ---------------------------------------------------------------------- what is known of other modules

#: Largest slopes of torch's own elementwise modules and of maps that only rearrange.
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
    # beyond its threshold torch takes x for it: a jump of exp(-threshold) / beta
    nn.Softplus: lambda m: 1.0 if m.threshold >= 20 else math.inf,
    nn.Softshrink: lambda m: 1.0,
    nn.Softsign: lambda m: 1.0,
    nn.Tanh: lambda m: 1.0,
    nn.Tanhshrink: lambda m: 1.0,
}


def make_activations(constructor: Callable[[], nn.Module], count: int, owner: str) -> list[nn.Module]:
    """Build activations, elementwise with slopes of at most 1, or say why not."""
    activation_constructor(constructor, owner)
    activations = [constructor() for _ in range(count)]
    for activation in activations:
        elementwise = type(activation) in _SLOPES or hasattr(activation, "value_and_slope")
        if not isinstance(activation, nn.Module) or not elementwise:
            raise ValueError(
                f"{owner}: {type(activation).__name__} is not a known elementwise activation. Take one of torch's "
                "own, networks.LipSwish or networks.Sine, or a module with an attribute 'lipschitz' and a method "
                "value_and_slope(x)."
            )
        lipschitz_bound(activation, owner=owner)
    return activations


def lipschitz_bound(module: nn.Module, *, owner: str = "lipschitz_bound", path: str = "") -> float:
    """Return a bound on a network's Lipschitz constant that holds by construction.

    Known are this library's contractions, ``nn.Sequential`` of known modules, torch's elementwise activations, and any
    module with an attribute ``lipschitz``, its author's promise.

    Args:
        module: The network.
        owner: Whom an error names.
        path: Where the module stands, for the error.

    Raises:
        ValueError: naming the first layer that is no contraction, or steeper than 1.
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
            "module an attribute 'lipschitz', if you can promise one."
        )
    if bound > 1:
        raise ValueError(
            f"{owner}: {where} may stretch by {bound:.4g}, but a contraction needs slopes of at most 1. Take "
            "networks.LipSwish for a swish, or scale the module."
        )
    return bound
