r"""Networks that are contractions by construction: their Lipschitz bound holds for any weights, in every call.

A weight A acts as :math:`A \min(1, c / |A|)`, where the spectral norm is never underestimated
(:func:`~pyro_invflows.linalg.spectral_norm_bound`) and is computed from the current weight in each call: in training
and evaluation, right after ``load_state_dict``, and after a step of any optimiser. No state is kept between calls.
"""

from __future__ import annotations

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
from pyro_invflows.networks.bounds import check_lipschitz, make_activations
from pyro_invflows.networks.dense import dense_network
from pyro_invflows.networks.linearisation import Linearisation
from pyro_invflows.networks.network import Network, restart
from pyro_invflows.support.checks import is_int, positive_int, widths
from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.modes import functorch_level

__all__ = [
    "ContractiveMLP",
    "Conv2dContraction",
    "LinearContraction",
    "contractive_conv_network",
    "held_weights",
]


class _Weights(NamedTuple):
    """The weights that a contraction computed from its parameters, and the modes that it did so in."""

    owner: nn.Module  # kept alive, because its id is the key
    value: Any
    with_graph: bool
    level: int  # number of active torch.func transforms


_HELD: ContextVar[dict[int, _Weights] | None] = ContextVar("held_weights", default=None)
#: The same while compiling, which cannot follow context variables and traces in one thread at a time.
_TRACED: list[dict[int, _Weights]] = []


@contextmanager
def held_weights(store: dict[int, _Weights] | None = None) -> Iterator[dict[int, _Weights]]:
    """Within this context, contractions compute their weights once instead of in every call.

    For the loops of a solver. The parameters must not change inside the context. Each thread has its own context.
    Weights with a graph are also used in calls that need none, but not the other way round.

    Args:
        store: What an earlier context yielded, to reuse its weights.
    """
    store = {} if store is None else store
    if torch.compiler.is_compiling():
        _TRACED.append(store)
        yield store
        _TRACED.pop()
        return
    token = _HELD.set(store)
    try:
        yield store
    finally:
        _HELD.reset(token)


def _hold(module: nn.Module, compute: Callable[[], Any]) -> Any:
    compiling = torch.compiler.is_compiling()
    held = (_TRACED[-1] if _TRACED else None) if compiling else _HELD.get()
    if held is None:
        return compute()
    level = functorch_level()
    known = held.get(id(module))
    # those computed within a transform may not leave it
    if known is None or known.level > level or (torch.is_grad_enabled() and not known.with_graph):
        known = _Weights(module, compute(), torch.is_grad_enabled(), level)
        if not (compiling and level):  # the compiler does not tell the levels apart
            held[id(module)] = known
    return known.value


def hold_weights_of(network: nn.Module) -> None:
    """Within :func:`held_weights`, compute the weights of all contractions in a network now, with their graph."""
    for module in network.modules():
        contracted = getattr(module, "contracted", None)
        if contracted is not None:
            _hold(module, contracted)


def contract(weight: Tensor, lipschitz: float, norm: Tensor) -> Tensor:
    """Return ``weight * min(1, lipschitz / norm)``, with a margin for the rounding of the product."""
    smaller = min(weight.shape[0], weight[0].numel())
    room = 1 + torch.finfo(weight.dtype).eps * (1 + smaller**0.5)
    return weight * (lipschitz / (norm * room).clamp_min(lipschitz)).to(weight.dtype)


class LinearContraction(nn.Module):
    r"""A linear layer whose Lipschitz constant is bounded by construction: :math:`y = \min(1, c / |A|) A x + b`.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        lipschitz: Bound c, strictly between 0 and 1.
        bias: Whether to learn the bias b.

    Attributes:
        weight: A, ``(out_features, in_features)``, unconstrained.
        bias: b, ``(out_features,)``; None without a bias.

    Shape:
        ``(*B, in_features) -> (*B, out_features)``.

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
        """Return the matrix that is applied to x, ``(out_features, in_features)``."""
        compute_tensors(self)
        return contract(self.weight, self.lipschitz, linalg.spectral_norm_bound(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _hold(self, self.contracted), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, lipschitz={self.lipschitz}"


class Conv2dContraction(nn.Module):
    """A convolution with stride 1 that keeps the resolution; its operator norm is bounded for images of any size.

    The bound is on the norm of the convolution itself, not of its kernel as a matrix
    (:func:`~pyro_invflows.linalg.convolution_norm_bound`).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side k of the kernel, odd.
        lipschitz: Bound on the operator norm, strictly between 0 and 1.
        bias: Whether to learn a bias.

    Attributes:
        weight: Kernel, ``(out_channels, in_channels, k, k)``, unconstrained.
        bias: ``(out_channels,)``; None without a bias.

    Shape:
        ``(N, in_channels, H, W) -> (N, out_channels, H, W)``.

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
        """Return the kernel that is applied, ``(out_channels, in_channels, k, k)``."""
        compute_tensors(self)
        return contract(self.weight, self.lipschitz, linalg.convolution_norm_bound(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _hold(self, self.contracted), self.bias, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{size}, lipschitz={self.lipschitz}"


class ContractiveMLP(nn.Module):
    r"""A multi-layer perceptron g whose Lipschitz constant with respect to x is bounded by construction.

    .. math:: g(x) = \min\Bigl(1, \frac{c}{\prod_i |W_i|}\Bigr) W_L \phi(\cdots \phi(W_1 x + b_1) \cdots) + b_L.

    Only the product of the norms is bounded, by a factor on the last matrix. A single matrix may be of any size, so
    that steep features remain possible which a bound on each layer would flatten. A context shifts the biases, through
    a network of its own, so that the bound is the same for every context.

    Args:
        input_dim: Width of x and of g(x).
        hidden_dims: Widths of the hidden layers.
        lipschitz: Bound c, strictly between 0 and 1.
        activation: Constructor of the activations, elementwise with slopes of at most 1.
        context_dim: Width of the context; 0 for none.
        context_hidden_dims: Widths of the hidden layers of the network that reads the context.

    Attributes:
        layers: L ``nn.Linear`` layers, unconstrained; layer i holds :math:`W_i` ``(n_i, n_{i-1})`` and :math:`b_i`
            ``(n_i,)``. The last one starts at zero.
        activations: The L - 1 activations, with their parameters if they have any.
        hypernet: Network from the context to the shifts of all biases, which start at zero; None without a context.

    Shape:
        ``(*B, input_dim) -> (*B, input_dim)``; the batch dimensions of the context ``(*B, context_dim)`` broadcast.

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
        """Draw all layers and activations anew; the last layer becomes zero, so that g = 0 for every context."""
        for module in self.children():
            restart(module)
        self._zero()

    def _zero(self) -> None:
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def contracted(self) -> list[Tensor]:
        """Return the matrices that are applied; the product of their spectral norms is at most ``lipschitz``."""
        return contract_product(self._own("weight"), self.lipschitz)[0]

    def _own(self, name: str) -> list[Tensor]:
        """Return the weights or the biases; the linear layers are never called."""
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
        """Return the value at x and the Jacobian there, in closed form."""
        weights = _hold(self, self.contracted)
        slopes: list[Tensor | None] = []
        for i, (weight, bias) in enumerate(zip(weights, self._biases(context), strict=True)):
            if i:
                x, slope = value_and_slope(self.activations[i - 1], x)
                slopes.append(slope)
            x = affine(x, weight, bias)
        return _MLPLinearisation(x, weights, [*slopes, None])


class _MLPLinearisation(Linearisation):
    """Computed from the weights and the slopes of the activations."""

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
    """Return ``W x + b``, where b may have batch dimensions that x lacks."""
    if bias is None or bias.dim() == 1:
        return F.linear(x, weight, bias)
    return F.linear(x, weight) + bias


def contract_product(weights: Sequence[Tensor], lipschitz: float) -> tuple[list[Tensor], list[Tensor]]:
    """Scale the last matrix so that the product of the spectral norms is at most ``lipschitz``.

    Returns:
        The matrices, and bounds on the norms that they had before.
    """
    norms = linalg.spectral_norm_bounds(weights)
    product = (
        norms[0] if lacks_float64(norms[0].device) else norms[0].double()
    )  # the product of three large norms overflows in float32
    for norm in norms[1:]:
        product = product * norm
    # round up, also for the rounding of the other matrices to their own dtype
    product = product * (1 + 4 * len(weights) * torch.finfo(norms[0].dtype).eps)
    return [*weights[:-1], contract(weights[-1], lipschitz, product)], norms


def contractive_conv_network(
    channels: int,
    hidden_channels: Sequence[int] = (32, 32),
    *,
    lipschitz: float = 0.97,
    activation: Callable[[], nn.Module] = LipSwish,
) -> nn.Sequential:
    """Build a convolutional contraction with 3 x 3, 1 x 1, ..., 3 x 3 kernels, bounded by ``lipschitz`` as a whole.

    Args:
        channels: Channels of the input and output.
        hidden_channels: Channels of the hidden layers.
        lipschitz: Bound on the whole network, shared equally by the layers; strictly between 0 and 1.
        activation: Constructor of the activations, elementwise with slopes of at most 1.

    Returns:
        ``nn.Sequential``, ``(N, channels, H, W) -> (N, channels, H, W)``; its output starts at zero.

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
