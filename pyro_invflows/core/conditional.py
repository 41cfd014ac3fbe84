"""Amortised layers: one wrapper that lets a hypernetwork set any layer's parameters from a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from pyro.distributions import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.kinds import ContextLayer, Elementwise
from pyro_invflows.core.rebind import rebind
from pyro_invflows.networks import dense_network
from pyro_invflows.networks.calling import call_network
from pyro_invflows.networks.network import restart
from pyro_invflows.support.checks import described, positive_int
from pyro_invflows.support.computed import computed_names
from pyro_invflows.support.modes import is_any_autocast

__all__ = ["Conditional"]


class Conditional(nn.Module):
    r"""Lets a hypernetwork shift a layer's own parameters according to a context.

    .. math:: \theta(c) = \theta_0 + h(c).

    ``condition(context)`` evaluates the network once, eagerly, and returns a copy of the template whose own
    parameters are buffers with the context's batch dimensions in front. A sub-network of the template (that of a
    coupling) is not amortised but takes the context as extra input, if it was built with ``context_dim``. Inside a
    ``Chain`` every part takes what it can; parts without parameters, and foreign ones, stay as they are.

    At the start :math:`h = 0`: the conditioned layer is the template, whatever the context. A conditioned layer
    carries one graph: condition again for the next backward pass.

    Args:
        template: A layer of this library.
        context_dim: Width of the context.
        hidden_dims: Hidden widths of the hypernetwork.
        activation: Constructor of its activation.
        event_dim: Event dimensions of the whole that the layer will stand in, where they are more than its own: 3 for a
            layer along the last axis, or an elementwise one, of an image flow. The context's batch dimensions stand
            in front of these. Inside a ``Chain`` template this is known.

    Shape:
        Context ``(*B, context_dim)``; the conditioned layer has ``batch_shape`` B, which broadcasts with the batch of
        its input.

    Raises:
        TypeError: if the template is not a layer of this library.
        ValueError: if nothing in it can be conditioned, a parameter that a context would set is computed from others
            (by ``torch.nn.utils.parametrize``, ``prune`` or ``weight_norm``), or it was built with another
            ``context_dim``; in ``condition`` for a context of another width.

    Example:
        >>> layer = Conditional(Orthogonal(3), 2)
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> d = dist.ConditionalTransformedDistribution(base, [layer]).condition(torch.randn(7, 2))
        >>> d.sample((5,)).shape, d.log_prob(torch.randn(7, 3)).shape
        (torch.Size([5, 7, 3]), torch.Size([7]))
    """

    def __init__(
        self,
        template: Bijection,
        context_dim: int,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        event_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(template, Bijection):
            hint = " A foreign transform has no parameters that could be batched."
            hint = hint if isinstance(template, Transform) else ""
            raise TypeError(
                f"Conditional: expected a layer of this library as the template, got {described(template)}{hint}"
            )
        if not template.conditionable:
            raise ValueError(
                f"{type(template).__name__} cannot be conditioned: its parameters come from data. Use it as it is, "
                "next to layers that take the context."
            )
        self.context_dim = positive_int(context_dim, "context_dim", "Conditional")
        self.template = template
        own_event_dim = _event_dim(template)
        event_dim = own_event_dim if event_dim is None else positive_int(event_dim, "event_dim", "Conditional", 0)
        if event_dim < own_event_dim:
            raise ValueError(
                f"Conditional: {type(template).__name__} has {own_event_dim} event dimension(s), so event_dim must be "
                f"at least that, but got {event_dim}."
            )
        self._extra = event_dim - own_event_dim
        for name, width in _contexts(template):
            if width != context_dim:
                raise ValueError(
                    f"Conditional: the layer of '{name}' was built with context_dim={width}, but the context has "
                    f"{context_dim}."
                )
        for _, layer, _ in _layers(template):
            _refuse_computed(layer)
        self._shapes = {
            prefix: {name: parameter.shape for name, parameter in _parameters_of(layer)}
            for prefix, layer, _ in _layers(template)
        }
        sizes = self._sizes()
        if not sizes and not any(_contexts(template)):
            raise ValueError(
                f"{type(template).__name__} cannot be conditioned: it has no parameters of its own that a context "
                "could set. Couplings take a context when built with context_dim=...; use layers without parameters, "
                "and foreign transforms, as they are, next to layers that take the context."
            )
        self.hypernet = (
            dense_network(context_dim, hidden_dims, sum(sizes), activation=activation, zero_output=True)
            if sizes
            else None
        )

    inv = ConditionalTransformModule.inv

    def _sizes(self) -> list[int]:
        """Number of elements of each tensor that the hypernetwork sets."""
        return [shape.numel() for shapes in self._shapes.values() for shape in shapes.values()]

    def condition(self, context: Tensor) -> Bijection:
        """Return the layer for a context ``(*B, context_dim)``.

        Raises:
            TypeError: if the context is not a floating point tensor.
            ValueError: if its last dimension is not ``context_dim``, or the template has been parametrised or pruned.
        """
        if not isinstance(context, Tensor) or not context.is_floating_point():
            kind = context.dtype if isinstance(context, Tensor) else type(context).__name__
            raise TypeError(f"Conditional needs a floating point tensor as its context, but got {kind}.")
        if context.dim() < 1 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"Conditional needs a context of shape (*B, {self.context_dim}), but got {tuple(context.shape)}."
            )
        reference = next(self.parameters(), context)
        if reference.dtype != context.dtype:
            if not is_any_autocast():
                raise TypeError(
                    f"Conditional: context and parameters must have the same dtype, but got {context.dtype} and "
                    f"{reference.dtype}. Convert one of them."
                )
            context = context.to(reference.dtype)
        batch = context.shape[:-1]
        pieces: Iterator[Tensor] = iter(())
        if self.hypernet is not None:
            pieces = iter(call_network(self.hypernet, context, owner="Conditional").split(self._sizes(), dim=-1))
        values: dict[str, Tensor] = {}
        batch_shapes: dict[str, torch.Size] = {}
        for prefix, layer, extra in _layers(self.template, self._extra):
            # the event dimensions of the whole that the layer does not see stand behind the context's batch
            batch_shapes[prefix] = shape = torch.Size((*batch, *(1,) * extra))
            _refuse_computed(layer)
            for name, own_shape in self._shapes[prefix].items():
                values[prefix + name] = getattr(layer, name) + next(pieces).reshape(shape + own_shape)
            if isinstance(layer, ContextLayer) and layer.context_dim:
                values[f"{prefix}context"] = context.reshape((*shape, self.context_dim)) if extra else context
        return rebind(self.template, values, batch_shapes)

    def forward(self, context: Tensor) -> Bijection:
        """Return ``condition(context)``."""
        return self.condition(context)

    def reset_parameters(self) -> None:
        """Restore the start of the template and of the hypernetwork."""
        for module in self.children():
            restart(module)

    def clear_cache(self) -> None:
        """Forget the template's last evaluation."""
        self.template.clear_cache()


# Registered, not inherited: the metaclass of Pyro's abstract class would clash with that of PyroModule[Conditional].
ConditionalTransformModule.register(Conditional)


def _event_dim(layer: Bijection) -> int:
    """Return the event dimensions that a layer's own parameters line up with."""
    return max(layer.domain.event_dim, len(layer.shape) if isinstance(layer, Elementwise) else 0)


def _layers(layer: Bijection, extra: int = 0, prefix: str = "") -> Iterator[tuple[str, Bijection, int]]:
    """Walk a layer and the layers that it is made of, not their sub-networks.

    Each comes with its path and the number of event dimensions of the whole that its parameters do not line up with.
    """
    yield prefix, layer, extra
    for name, part, batch_dims in layer.named_parts():
        unseen = extra + batch_dims + part.domain.event_dim - _event_dim(part)
        yield from _layers(part, unseen, f"{prefix}{name}.")


def _parameters_of(layer: Bijection) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in layer._parameters.items():
        chosen = layer.amortised is None or name in layer.amortised
        if parameter is not None and layer.conditionable and chosen:
            yield name, parameter


def _refuse_computed(layer: Bijection) -> None:
    """Refuse a layer with a tensor that is computed from others, which no other value can replace."""
    for name, (function, undo) in computed_names(layer).items():
        if layer.amortised is None or name in layer.amortised:
            kind = type(layer).__name__.removeprefix("Parametrized")
            raise ValueError(
                f"Conditional: the parameters that a context sets must be the layer's own, but {name!r} of {kind} is "
                f"computed by {function}. Undo this with {undo}(layer, {name!r}), or use the layer as it is, next to "
                "layers that take the context."
            )


def _contexts(template: Bijection) -> Iterator[tuple[str, int]]:
    """Return the names under which layers take the context itself, with the width they were built for."""
    for prefix, layer, _ in _layers(template):
        if isinstance(layer, ContextLayer) and layer.context_dim:
            yield f"{prefix}context", layer.context_dim
