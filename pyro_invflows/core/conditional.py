"""Amortised layers: a wrapper with a hypernetwork that sets a layer's parameters from a context."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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

__all__ = ["Conditional", "conditional_factory"]


class Conditional(nn.Module):
    r"""Shifts a layer's own parameters by the output of a hypernetwork that reads a context.

    .. math:: \theta(c) = \theta_0 + h(c).

    ``condition(context)`` evaluates the hypernetwork once, eagerly, and returns a copy of the template in which buffers
    with the context's batch dimensions in front replace the layer's own parameters. The sub-network of a layer (that
    of a coupling, say) is not amortised: it takes the context as additional input, if it was built with
    ``context_dim``. Inside a ``Chain`` this applies to every part; parts without parameters, and foreign parts,
    stay unchanged.

    Initially :math:`h = 0`, and the conditioned layer equals the template for every context. If you pass a hypernetwork
    of your own, its initial output is up to you (end it with a layer of small or zero weights). A conditioned layer
    carries one autograd graph: condition again for the next backward pass.

    Args:
        template: A layer of this library.
        context_dim: Width of the context.
        hidden_dims: Widths of the hidden layers of the hypernetwork that is built if none is given.
        activation: Constructor of its activation.
        hypernet: A hypernetwork of your own: any module from ``(*B, context_dim)`` to ``(*B, n)``, where n is the
            number of elements of all parameters that it sets (the error for a wrong size states it).
        event_dim: Event dimensions of the flow that will contain the layer, if it has more than the layer: 3 for an
            elementwise layer, or one along the last axis, in an image flow. The context's batch dimensions go in front
            of these. Inside a ``Chain`` template the number is known.

    Attributes:
        template: The layer; its parameters are :math:`\theta_0`.
        hypernet: The hypernetwork h; None if the template only has sub-networks that read the context.

    Shape:
        Context ``(*B, context_dim)``; the conditioned layer has the ``batch_shape`` B, which broadcasts with the batch
        dimensions of its input, and so does its log-det.

    Raises:
        TypeError: if the template is not a layer of this library, or the hypernetwork is not a module.
        ValueError: if nothing in the template can be conditioned; if a parameter to be set is computed from others (by
            ``torch.nn.utils.parametrize``, ``prune`` or ``weight_norm``); if the template was built with another
            ``context_dim``; if the hypernetwork's output has the wrong size; in ``condition``, if the context has
            another width.

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
        hypernet: nn.Module | None = None,
        event_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(template, Bijection):
            hint = " A foreign transform has no parameters that can be batched."
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
        if hypernet is not None:
            self._check_hypernet(hypernet)
        elif sum(sizes):
            hypernet = dense_network(context_dim, hidden_dims, sum(sizes), activation=activation, zero_output=True)
        self.hypernet = hypernet

    inv = ConditionalTransformModule.inv

    def _sizes(self) -> list[int]:
        """Return the number of elements of each tensor that the hypernetwork sets."""
        return [shape.numel() for shapes in self._shapes.values() for shape in shapes.values()]

    def _check_hypernet(self, hypernet: nn.Module) -> None:
        """Check a hypernetwork, as far as a trial run of a copy can."""
        kind = type(self.template).__name__
        if not isinstance(hypernet, nn.Module):
            raise TypeError(
                "Conditional: hypernet must be a module, so that its parameters are trained with the layer's, but got "
                f"{described(hypernet)}"
            )
        if not self._sizes():
            raise ValueError(
                f"Conditional: {kind} has no parameters of its own that a hypernetwork could set, because its network "
                "reads the context itself. Leave out hypernet=..."
            )
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                trial = copy.deepcopy(hypernet).eval()
                like = next((p for p in trial.parameters() if p.is_floating_point()), torch.empty(()))
                value = trial(like.new_zeros(1, self.context_dim))
        except Exception:  # it may need a real context; condition() checks again
            return
        self._check_output(value, torch.Size([1]))

    def _check_output(self, value: Any, batch: torch.Size) -> None:
        wanted = (*batch, sum(self._sizes()))
        if not isinstance(value, Tensor) or value.shape != wanted:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Conditional: the parameters of {type(self.template).__name__} that the hypernetwork sets have "
                f"{wanted[-1]} elements in all, so for a context of shape {(*batch, self.context_dim)} it must "
                f"return the shape {wanted}, but it returned {given}."
            )

    def condition(self, context: Tensor) -> Bijection:
        """Return the layer for a context ``(*B, context_dim)``.

        Raises:
            TypeError: if the context is not a floating point tensor.
            ValueError: if its last dimension is not ``context_dim``, the hypernetwork's output has another size, or the
                template has been parametrised or pruned.
        """
        if not isinstance(context, Tensor) or not context.is_floating_point():
            kind = context.dtype if isinstance(context, Tensor) else type(context).__name__
            raise TypeError(f"Conditional needs a floating point tensor as its context, but got {kind}.")
        if context.dim() < 1 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"Conditional needs a context of shape (*B, {self.context_dim}), but got {tuple(context.shape)}."
            )
        reference = context if self.hypernet is None else next(self.hypernet.parameters(), context)
        if reference.dtype != context.dtype:
            if not is_any_autocast():
                raise TypeError(
                    f"Conditional: context and parameters must have the same dtype, but got {context.dtype} and "
                    f"{reference.dtype}. Convert one of them."
                )
            context = context.to(reference.dtype)
        batch = context.shape[:-1]
        # without a hypernetwork, the tensors that it would set have no elements
        pieces: Iterator[Tensor] = iter([context.new_zeros((*batch, 0))] * len(self._sizes()))
        if self.hypernet is not None:
            value = call_network(self.hypernet, context, owner="Conditional")
            self._check_output(value, batch)
            pieces = iter(value.split(self._sizes(), dim=-1))
        values: dict[str, Tensor] = {}
        batch_shapes: dict[str, torch.Size] = {}
        for prefix, layer, extra in _layers(self.template, self._extra):
            # event dimensions of the whole that the layer does not see follow the context's batch dimensions
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
        """Restore the initial state of the template and of the hypernetwork."""
        for module in self.children():
            restart(module)

    def clear_cache(self) -> None:
        """Forget the template's last evaluation."""
        self.template.clear_cache()


# Registered, not inherited: the metaclass of Pyro's abstract class would clash with that of PyroModule[Conditional].
ConditionalTransformModule.register(Conditional)


def _event_dim(layer: Bijection) -> int:
    """Return the number of event dimensions that a layer's own parameters align with."""
    return max(layer.domain.event_dim, len(layer.shape) if isinstance(layer, Elementwise) else 0)


def _layers(layer: Bijection, extra: int = 0, prefix: str = "") -> Iterator[tuple[str, Bijection, int]]:
    """Yield a layer and the layers that it is made of, but not their sub-networks.

    Each comes with its path and the number of event dimensions of the whole that its parameters do not align with.
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
    """Refuse a layer with a tensor that is computed from others, and so cannot be replaced."""
    for name, (function, undo) in computed_names(layer).items():
        if layer.amortised is None or name in layer.amortised:
            kind = type(layer).__name__.removeprefix("Parametrized")
            raise ValueError(
                f"Conditional: the parameters that a context sets must be the layer's own, but {name!r} of {kind} is "
                f"computed by {function}. Undo this with {undo}(layer, {name!r}), or use the layer as it is, next to "
                "layers that take the context."
            )


def _contexts(template: Bijection) -> Iterator[tuple[str, int]]:
    """Yield the names of the buffers in which layers take the context, with the width that they were built for."""
    for prefix, layer, _ in _layers(template):
        if isinstance(layer, ContextLayer) and layer.context_dim:
            yield f"{prefix}context", layer.context_dim


#: Default widths of the hidden layers of the network that reads the context.
_CONTEXT_HIDDEN_DIMS = (64, 64)


def conditional_factory(
    factory: Callable[..., Bijection],
    how: str = "a hypernetwork sets its parameters from a context",
    *,
    hypernet: bool = True,
) -> Callable[..., Conditional]:
    """Return ``conditional_f`` for the factory ``f`` of a layer, as a function with its own signature.

    It takes ``input_dim``, ``context_dim``, and by keyword ``context_hidden_dims`` and the factory's own arguments. If
    the factory has an argument ``context_dim``, that is passed on: its layer's network also reads the context.

    Args:
        factory: Builds the layer from ``input_dim`` and keywords.
        how: How the context acts, for the docstring.
        hypernet: Whether the layer has parameters that a hypernetwork sets. If not, ``context_hidden_dims`` is passed
            to the factory, if it takes it.
    """
    name = f"conditional_{factory.__name__}"
    own = inspect.signature(factory, eval_str=True).parameters
    keyword, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    input_dim, *others = own.values()
    parameters = [input_dim, inspect.Parameter("context_dim", either, annotation=int)]
    if hypernet or "context_hidden_dims" in own:
        hidden_dims = inspect.Parameter(
            "context_hidden_dims", keyword, default=_CONTEXT_HIDDEN_DIMS, annotation=Sequence[int]
        )
        parameters.append(hidden_dims)
    taken = {parameter.name for parameter in parameters}
    parameters += [other.replace(kind=keyword) for other in others if other.name not in taken]
    keywords_known = [parameter.name for parameter in parameters if parameter.kind is keyword]

    def build(input_dim: int, context_dim: int, **keywords: Any) -> Conditional:
        for given in keywords:
            if given not in keywords_known:
                raise TypeError(
                    f"{name}() got an unexpected keyword argument {given!r}; it takes {', '.join(keywords_known)}."
                )
        hidden_dims = _CONTEXT_HIDDEN_DIMS
        if hypernet:
            hidden_dims = keywords.pop("context_hidden_dims", hidden_dims)
        if "context_dim" in own:
            keywords["context_dim"] = context_dim
        return Conditional(factory(input_dim, **keywords), context_dim, hidden_dims=hidden_dims)

    signature = inspect.Signature(parameters, return_annotation=Conditional)
    build.__name__ = build.__qualname__ = name
    build.__module__ = factory.__module__
    build.__signature__ = signature  # type: ignore[attr-defined]
    build.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": Conditional}
    build.__doc__ = _factory_doc(factory.__name__, how, keywords_known)
    return build


def _factory_doc(name: str, how: str, keywords: Sequence[str]) -> str:
    lines = [
        f"Build a conditional :func:`{name}`: {how}.",
        "",
        "Args:",
        f"    input_dim: As in :func:`{name}`.",
        "    context_dim: Width of the context.",
    ]
    for keyword in keywords:
        reader = keyword == "context_hidden_dims"
        what = (
            "Widths of the hidden layers of the network that reads the context." if reader else f"As in :func:`{name}`."
        )
        lines.append(f"    {keyword}: {what}")
    return "\n".join(lines)
