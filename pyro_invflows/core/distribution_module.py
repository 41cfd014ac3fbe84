"""A distribution's class and arguments as a module."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints, transform_to

__all__ = ["DistributionModule", "kind_of", "refuse_gradients"]

#: Arguments that are alternatives to each other; only one of each set is kept.
_ALTERNATIVES = ({"scale_tril", "covariance_matrix", "precision_matrix"}, {"logits", "probs"})


class DistributionModule(nn.Module):
    """A distribution's class, and its arguments as buffers or parameters."""

    def __init__(self, base: Distribution, trainable: bool) -> None:
        super().__init__()
        self.kind = type(base)
        takes_flag = "validate_args" in inspect.signature(type(base).__init__).parameters
        self.unchecked = {"validate_args": False} if takes_flag else {}
        #: Whether values are checked; None if the base leaves it to torch's default.
        self.validates = vars(_innermost(base)).get("_validate_args")
        self.constants: dict[str, Any] = {}
        self.constraints: dict[str, constraints.Constraint] = {}
        self.names: list[str] = []
        try:
            self._read(base, trainable)
            rebuilt = self()
            same = rebuilt.batch_shape == base.batch_shape and rebuilt.event_shape == base.event_shape
        except Exception as error:
            raise TypeError(self._refusal(base)) from error
        if not same:
            raise TypeError(self._refusal(base))

    @staticmethod
    def _refusal(base: Distribution) -> str:
        return (
            f"Flow cannot rebuild its base, a {type(base).__name__}, from its arguments. Use a distribution whose "
            "constructor takes the arguments in its arg_constraints (Normal, StudentT, Uniform, MultivariateNormal, "
            "...), made independent with .to_event(n), or use TransformedDistribution."
        )

    def _read(self, base: Distribution, trainable: bool) -> None:
        if isinstance(base, Independent):
            self.names = ["base_distribution", "reinterpreted_batch_ndims"]
            self.base_distribution = DistributionModule(base.base_dist, trainable)
            self.constants["reinterpreted_batch_ndims"] = base.reinterpreted_batch_ndims
            return
        signature = inspect.signature(type(base).__init__).parameters
        names = [name for name in signature if name not in ("self", "validate_args")]
        for group in _ALTERNATIVES:
            given = [name for name in names if name in group]
            if len(given) > 1:
                keep = next(
                    (n for n in ("scale_tril", "logits", *given) if n in given and n in base.__dict__), given[0]
                )
                names = [name for name in names if name not in given or name == keep]
        for name in names:
            value = getattr(base, name, getattr(base, f"_{name}", None))
            if isinstance(value, Distribution):
                self.add_module(name, DistributionModule(value, trainable))
            elif isinstance(value, Tensor):
                self._register(name, value.detach().clone(), base.arg_constraints.get(name), trainable)
            elif signature[name].default is inspect.Parameter.empty or value is not None:
                self.constants[name] = value
            else:
                continue
            self.names.append(name)

    def _register(self, name: str, value: Tensor, constraint: constraints.Constraint | None, trainable: bool) -> None:
        if not trainable or constraint is None or not value.is_floating_point():
            self.register_buffer(name, value)
            return
        self.constraints[name] = constraint
        self.register_parameter(name, nn.Parameter(transform_to(constraint).inv(value).contiguous()))

    def forward(self) -> Distribution:
        arguments = {}
        for name in self.names:
            value = self.constants[name] if name in self.constants else getattr(self, name)
            if name in self.constraints:
                value = transform_to(self.constraints[name])(value)
            arguments[name] = value() if isinstance(value, DistributionModule) else value
        # The arguments were checked when the flow was built; checking them in each call would cost more than a layer.
        # Values are checked if the given distribution checks them.
        rebuilt = self.kind(**arguments, **self.unchecked)  # type: ignore[arg-type]
        rebuilt._validate_args = Distribution._validate_args if self.validates is None else self.validates
        return rebuilt

    def extra_repr(self) -> str:
        return self.kind.__name__


def kind_of(distribution: Distribution) -> str:
    """Return the name of a distribution's class for error messages, ignoring ``.to_event(n)``."""
    return type(_innermost(distribution)).__name__


def _innermost(distribution: Distribution) -> Distribution:
    """Return the distribution inside ``.to_event(n)``."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def refuse_gradients(distribution: Distribution, owner: str, remedy: str) -> None:
    """Refuse to copy a distribution whose tensors require gradients: they would never be trained.

    Args:
        distribution: The distribution to be copied into a module.
        owner: Name used in error messages.
        remedy: What to do instead, for the error message.

    Raises:
        TypeError: if a tensor of it, or of the distributions inside it, requires gradients.
    """
    if _needs_grad(distribution):
        raise TypeError(
            f"{owner} copies the arguments of the distribution that it is given, but this "
            f"{kind_of(distribution)} has tensors that require gradients, which would then never be trained. "
            f"{remedy}"
        )


def _needs_grad(distribution: Distribution) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, Distribution) and _needs_grad(value)
        for value in vars(distribution).values()
    )
