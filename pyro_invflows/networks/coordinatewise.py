r"""The inverse of an autoregressive map with a masked network, one coordinate at a time, in about one evaluation.

The equations :math:`y_i = f(x_i; \theta_i(x_{<i}))` are solved one coordinate after the other. The hidden units of a
masked network are sorted by degree, so that coordinate i adds a slice of units to every layer, and each unit is
computed only once. The products are taken in blocks of coordinates: small ones inside a block, then one large one for
everything after it. The transposed linear system, which the gradient needs, has the same form in the opposite order.

This module knows tensors and networks, not layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_invflows.networks.activations import LipSwish, Sine, value_and_slope
from pyro_invflows.networks.calling import out_of_place
from pyro_invflows.networks.masked import MaskedLinear

__all__ = ["MaskedLayers", "masked_layers", "solve_by_coordinates", "transposed_solver"]

#: Number of coordinates whose products are taken together.
_BLOCK = 16

#: Elementwise activations, which may be applied to a subset of the units, in any layout.
_ELEMENTWISE = {
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    LipSwish,
    Sine,
}


class _Layout(NamedTuple):
    """The positions of each coordinate's units.

    Args:
        input_dim: D.
        num_outputs: P, the number of outputs for each coordinate.
        order: The coordinates in the order of dependence; None if that is 0 to D - 1.
        starts: For each layer of units, the first unit of each place in the order, and an end: D + 1 numbers. The first
            layer is the coordinates, the last one the outputs, where the P of one coordinate are adjacent.
    """

    input_dim: int
    num_outputs: int
    order: list[int] | None
    starts: list[list[int]]


class MaskedLayers(NamedTuple):
    """A masked network taken apart: see :func:`masked_layers`."""

    layout: _Layout
    linear: list[MaskedLinear]
    activations: list[nn.Module]


@functools.lru_cache(maxsize=256)
def _layout(degrees: tuple[tuple[int, ...], ...]) -> _Layout | None:
    """Return the layout of the layers with these degrees; None if it is not that of a masked network."""
    inputs, *hidden, outputs = degrees
    input_dim = sum(degree > 0 for degree in inputs)
    places = [degree - 1 for degree in inputs[:input_dim]]
    num_outputs = len(outputs) // max(input_dim, 1)
    if (
        sorted(places) != list(range(input_dim))
        or any(inputs[input_dim:])
        or list(outputs) != places * num_outputs
        or any(list(layer) != sorted(layer) for layer in hidden)
    ):
        return None
    order = sorted(range(input_dim), key=places.__getitem__)
    starts = [list(range(input_dim + 1))]
    for layer in hidden:
        # units that see nothing at all are computed with the first coordinate
        starts.append([0, *(sum(degree <= place for degree in layer) for place in range(input_dim))])
    starts.append([num_outputs * place for place in range(input_dim + 1)])
    return _Layout(input_dim, num_outputs, None if order == list(range(input_dim)) else order, starts)


def masked_layers(network: nn.Module) -> MaskedLayers | None:
    """Take a network apart that is made of masked linear layers, with elementwise activations between them.

    Returns:
        None for any other network, and where something computes tensors or watches calls (hooks, pruning,
        parametrisations), which an evaluation in parts would leave out.
    """
    children: list[Any] = list(network.children())
    linear, activations = children[::2], children[1::2]
    if type(network).forward is not nn.Sequential.forward or len(children) % 2 == 0:
        return None
    if any(type(layer) is not MaskedLinear for layer in linear) or any(
        type(a) not in _ELEMENTWISE for a in activations
    ):
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return None
    degrees = [linear[0].sources, *(layer.targets for layer in linear)]
    if any(layer.sources != sources for layer, sources in zip(linear, degrees, strict=False)):
        return None
    layout = _layout(tuple(degrees))
    return None if layout is None else MaskedLayers(layout, linear, activations)


def solve_by_coordinates(
    layers: MaskedLayers, y: Tensor, context: Tensor | None, invert: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return x with ``y_i = f(x_i; theta_i(x_<i))``, without a graph.

    Args:
        layers: The network of theta.
        y: ``(N, D)``.
        context: ``(N, C)``, if the network takes one.
        invert: ``(y_i, theta_i) -> x_i`` for one coordinate of all rows, ``(1, N)`` and ``(1, P, N)``; called in
            inference mode, where the many small operations cost less.
    """
    with torch.inference_mode():
        x = _solve(layers, y, context, invert)
    return x.clone()


def _solve(
    layers: MaskedLayers, y: Tensor, context: Tensor | None, invert: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """See :func:`solve_by_coordinates`."""
    layout = layers.layout
    weights, biases = _parameters(layers)
    rows = len(y)
    given = _in_order(y.t(), layout).contiguous()
    values = [torch.zeros_like(given)]
    values += [bias.unsqueeze(-1).repeat(1, rows) for bias in biases]  # a copy, for one row too: it is written to
    if context is not None:
        values[1].addmm_(weights[0][:, layout.input_dim :], context.t())
    weights[0] = _columns_in_order(weights[0], layout)
    functions = [out_of_place(activation) for activation in layers.activations]
    in_place = [torch.relu_ if type(activation) is nn.ReLU else None for activation in layers.activations]

    def activate(layer: int, place: int, units: Tensor) -> None:
        fast = in_place[layer]
        if fast is None:
            units.copy_(functions[layer](units))
        else:
            fast(units)

    targets = given.split(1)

    def close(place: int, theta: Tensor, x: Tensor) -> None:
        x.copy_(invert(targets[place], theta.unsqueeze(0)))

    _walk(weights, values, layout.starts, activate, close)
    return _in_order(values[0], layout, back=True).t()


@torch.no_grad()
def transposed_solver(
    layers: MaskedLayers, x: Tensor, context: Tensor | None, slope: Tensor, by_theta: Tensor
) -> Callable[[Tensor], Tensor]:
    r"""Return g -> v with :math:`J^T v = g`, where J is the Jacobian of :math:`f(x_i; \theta_i(x_{<i}))` at x.

    The function takes and returns ``(N, D)``. It holds everything it needs, so the parameters may change before the
    call.

    Args:
        layers: The network of theta.
        x: ``(N, D)``.
        context: ``(N, C)``, if the network takes one.
        slope: Derivative of f by its first argument, ``(N, D)``.
        by_theta: Derivative of f by theta, ``(N, P, D)``.
    """
    layout = layers.layout
    weights, biases = _parameters(layers)
    h = (x if context is None else torch.cat([x, context], -1)).t()
    slopes = []
    for weight, bias, activation in zip(weights, biases, layers.activations, strict=False):
        h, slope_h = value_and_slope(activation, torch.addmm(bias.unsqueeze(-1), weight, h))
        slopes.append(slope_h)
    with torch.inference_mode():  # where the many small operations cost less
        weights[0] = _columns_in_order(weights[0], layout)
        # From the last coordinate to the first, each unit depends on the units that it feeds: the same walk, with
        # layers, units and weights in the opposite order. Units that depend on no coordinate come last: left out.
        size = layout.input_dim
        coordinates, *hidden, outputs = layout.starts
        starts = [[s[-1] - s[min(size - place + 1, size)] for place in range(size + 1)] for s in reversed(hidden)]
        starts = [outputs, *starts, coordinates]
        weights = [weight.flip(0, 1).t() for weight in reversed(weights)]
        pieces = [
            torch.split(slope_h.flip(0)[: s[-1]], [b - a for a, b in pairwise(s)])
            for slope_h, s in zip(reversed(slopes), starts[1:-1], strict=True)
        ]
        slopes_of = _in_order(slope.t(), layout).flip(0).split(1)
        factors = _in_order(by_theta.permute(2, 1, 0), layout).flip(0, 1).unbind(0)

    def activate(layer: int, place: int, units: Tensor) -> None:
        units.mul_(pieces[layer][place])

    def solve(grad: Tensor) -> Tensor:
        with torch.inference_mode():
            solved = _in_order(grad.t(), layout).flip(0)  # starts as g
            rows = solved.split(1)
            values = [grad.new_zeros(len(weight), len(grad)) for weight in weights]
            values.insert(0, grad.new_zeros(weights[0].shape[1], len(grad)))

            def close(place: int, from_later: Tensor, to_earlier: Tensor) -> None:
                v = rows[place].sub_(from_later).div_(slopes_of[place])
                torch.mul(factors[place], v, out=to_earlier)

            _walk(weights, values, starts, activate, close)
            v = _in_order(solved.flip(0), layout, back=True).t()
        return v.clone()

    return solve


def _walk(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    starts: Sequence[Sequence[int]],
    activate: Callable[[int, int, Tensor], None],
    close: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Fill layers of units place by place, where the last layer determines the first.

    At each place of the order, every layer behind the first has units that need the layer before it up to this place
    (the second layer: up to the place before), and ``close`` computes the first layer's units from the last layer's.

    Args:
        weights: From each layer to the next, ``(n, m)``; zero where a unit does not need another one.
        values: The layers, ``(n, N)``, written to: all but the first one hold what is to be added to the products.
        starts: For each layer, the first unit of each place, and an end.
        activate: ``(layer, place, units)`` applies the activation in place; the layer counts from the second one.
        close: ``(place, last, first)`` writes the first layer's units.
    """
    places = len(starts[0]) - 1
    for begin in range(0, places, _BLOCK):
        end = min(begin + _BLOCK, places)
        block = [slice(s[begin], s[end]) for s in starts]
        if begin:
            for layer, weight in enumerate(weights):
                before, rows = slice(starts[layer][begin]), block[layer + 1]
                if rows.start < rows.stop:
                    values[layer + 1][rows].addmm_(weight[rows, before], values[layer][before])
        sources = [v[rows] for v, rows in zip(values, block, strict=True)]
        sizes = [[b - a for a, b in pairwise(s[begin : end + 1])] for s in starts]
        units = [v.split(n) for v, n in zip(sources, sizes, strict=True)]
        small = [
            weight[rows, columns].split(n)
            for weight, rows, columns, n in zip(weights, block[1:], block, sizes[1:], strict=False)
        ]
        last = len(weights) - 1
        for i in range(end - begin):
            for layer, pieces in enumerate(small):
                if sizes[layer + 1][i]:
                    target = units[layer + 1][i]
                    target.addmm_(pieces[i], sources[layer])
                    if layer < last:
                        activate(layer, begin + i, target)
            close(begin + i, units[-1][i], units[0][i])


def _parameters(layers: MaskedLayers) -> tuple[list[Tensor], list[Tensor]]:
    """Return the masked weights and the biases, those of the last layer coordinate by coordinate."""
    *inner, last = layers.linear
    weights = [layer.weight * layer.mask for layer in inner]
    weight, mask = (_by_coordinate(t, layers.layout) for t in (last.weight, last.mask))
    weights.append(torch.mul(weight, mask, out=weight.new_empty(weight.shape)).flatten(0, 1))
    biases: list[Tensor] = [layer.bias for layer in inner]
    biases.append(_by_coordinate(last.bias, layers.layout).flatten())
    return weights, biases


def _in_order(value: Tensor, layout: _Layout, back: bool = False) -> Tensor:
    """Bring the rows of ``(D, ...)`` into the order of the coordinates, or back."""
    if layout.order is None:
        return value
    index = torch.tensor(layout.order, device=value.device)
    return value[index.argsort() if back else index]


def _columns_in_order(weight: Tensor, layout: _Layout) -> Tensor:
    """Return the first layer's weights, the coordinates' in their order, the context's left out."""
    return _in_order(weight[:, : layout.input_dim].t(), layout).t()


def _by_coordinate(value: Tensor, layout: _Layout) -> Tensor:
    """Bring what belongs to the outputs, ``(P * D, ...)``, into the order of the coordinates, ``(D, P, ...)``."""
    return _in_order(value.unflatten(0, (layout.num_outputs, layout.input_dim)).transpose(0, 1), layout)
