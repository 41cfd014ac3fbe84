r"""Couplings: part of the input determines how the rest is transformed, element by element.

Dinh et al. (2015), *NICE*, for the additive form, Dinh et al. (2017), *Density estimation using Real NVP*, Eqs. 7 and
8, for the affine one, and Durkan et al. (2019), *Neural spline flows*, for splines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_invflows.core.events import negative_axis
from pyro_invflows.core.kinds import ContextLayer
from pyro_invflows.core.path_gradient import derivative, tracked
from pyro_invflows.monotone import MonotoneFunction, evaluate
from pyro_invflows.networks import conv_network, dense_network
from pyro_invflows.networks.calling import call_network
from pyro_invflows.networks.dense import default_hidden_dims
from pyro_invflows.support.checks import described, positive_int, widths

__all__ = ["Coupling", "coupling_network"]


class Coupling(ContextLayer):
    r"""Transforms part of the input by an increasing function, whose parameters a network computes from the other part.

    .. math:: y_1 = x_1, \qquad y_{2, i} = f(x_{2, i}; \theta_i(x_1)).

    Invertible for any network, because x_1 is passed on unchanged and f is increasing. Choose it for a function of your
    own, or one of :mod:`pyro_invflows.monotone` without a name as a coupling; :class:`AffineCoupling` and
    :class:`SplineCoupling` are the common ones.

    **Forward**, **Inverse**: one evaluation of the network, and one of the function; derivatives of all orders that
    both have. **Log-det**: the sum of the log-slopes, from the same evaluation. **Identity**: if the network's output
    is zero.

    Args:
        function: f, such as ``pyro_invflows.monotone.SinhArcsinh()``, with P parameters.
        split_dim: Number of elements (channels) of x_1; 0 is allowed.
        hypernet: Network from x_1 (followed by the context) to ``P (D - split_dim)`` elements: the first parameter of
            all elements, then the second one, and so on. It receives vectors ``(*B, split_dim)`` or, for another
            ``dim``, one flat batch ``(N, split_dim, *spatial)``. With ``None``, constants are learned instead; this
            needs ``split_dim=0`` and ``input_dim``. The network must not write to its input; one that begins with a
            module with ``inplace=True`` receives a copy.
        dim: Axis that is split: -1 for vectors, -2 for sequences ``(C, T)``, -3 for the channels of images.
        keep: ``"first"`` if x_1 holds the leading elements, ``"last"`` if it holds the trailing ones. If you alternate
            the two, no permutation is needed between couplings.
        context_dim: Width of the context that the network also takes (see :class:`~pyro_invflows.Conditional`); while
            the layer is not conditioned, the network receives zeros instead.
        input_dim: Size D of an event along ``dim``, if it is to be checked; needed for constants.

    Attributes:
        hypernet: The network, with its parameters; None if constants are learned.
        constants: The parameters of f, ``(P D,)`` in the order of the network's output; only without a network.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where the network may mix pixels;
        log-det ``(*B,)``.

    Raises:
        TypeError: if ``function`` is not a :class:`~pyro_invflows.monotone.MonotoneFunction`, or the network is not a
            module.
        ValueError: if ``split_dim`` leaves nothing to transform; if the network's output has the wrong shape, or the
            network writes to its input; if another argument is out of range.

    Example:
        >>> from pyro_invflows.monotone import SinhArcsinh
        >>> layer = Coupling(SinhArcsinh(), 1, torch.nn.Linear(1, 2 * 2))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        function: MonotoneFunction,
        split_dim: int,
        hypernet: nn.Module | None,
        *,
        dim: int = -1,
        keep: str = "first",
        context_dim: int = 0,
        input_dim: int | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim, dim=dim, cache_size=cache_size)
        input_dim, context_dim = self.input_dim, self.context_dim
        owner = type(self).__name__
        if not isinstance(function, MonotoneFunction):
            raise TypeError(
                f"{owner}: function must be one of pyro_invflows.monotone, such as Affine(), or derive from "
                f"MonotoneFunction, but got {described(function)}"
            )
        self.split_dim = split_dim = positive_int(split_dim, "split_dim", owner, minimum=0)
        if input_dim is not None and split_dim >= input_dim:
            raise ValueError(
                f"{owner}: split_dim must be below input_dim, so that something is left to transform, but got "
                f"split_dim={split_dim} and input_dim={input_dim}."
            )
        if not (hypernet is None or isinstance(hypernet, nn.Module)):
            raise TypeError(
                f"{owner}: hypernet must be a module, so that the layer owns its parameters, but got "
                f"{type(hypernet).__name__}. Wrap a function in a module that holds the parameters it uses."
            )
        if keep not in ("first", "last"):
            raise ValueError(f"{owner}: keep must be 'first' or 'last', but got {keep!r}.")
        self.function = function
        self.keep = keep
        self.hypernet = hypernet
        if hypernet is None:
            if split_dim or context_dim or input_dim is None:
                raise ValueError(
                    f"{owner} without a network learns constants: it needs split_dim=0, context_dim=0 and "
                    f"input_dim, but got split_dim={split_dim}, context_dim={context_dim}, input_dim={input_dim}."
                )
            self.constants = nn.Parameter(torch.empty(function.num_parameters * input_dim))
            nn.init.zeros_(self.constants)

    def reset_parameters(self) -> None:
        """Reset the network, if its modules have ``reset_parameters``; set constants to 0."""
        super().reset_parameters()
        if self.hypernet is None:
            nn.init.zeros_(self.constants)

    def _check(self, value: Tensor, inverse: bool) -> None:
        super()._check(value, inverse)
        if self.input_dim is None and value.shape[self.dim] <= self.split_dim:
            raise ValueError(
                f"{type(self).__name__} with split_dim={self.split_dim} needs more than that many elements along dim "
                f"{self.dim}, but got {value.shape[self.dim]}."
            )

    def _network(self, x1: Tensor, size: int) -> Tensor:
        """Return the network's output for ``size`` elements, ``(*batch, P * size, *spatial)``."""
        if self.hypernet is None:
            return self.constants.reshape(self.constants.shape + (1,) * (-self.dim - 1))
        owner, wanted = type(self).__name__, self.function.num_parameters * size
        if self.dim == -1 and not self.context_dim:
            raw = call_network(self.hypernet, x1, owner=owner)
            if raw.shape[-1] == wanted and raw.shape[:-1] == x1.shape[:-1]:
                return raw
        x1 = self.with_context(x1)
        batch, spatial = x1.shape[: self.dim], x1.shape[x1.dim() + self.dim + 1 :]
        if self.dim == -1:
            raw = call_network(self.hypernet, x1, owner=owner)
        else:  # a convolution takes exactly one batch dimension
            flat = x1.reshape(batch.numel(), *x1.shape[self.dim :])
            raw = call_network(self.hypernet, flat, owner=owner)
            raw = raw.reshape(*batch, *raw.shape[1:])
        if raw.shape != (*batch, wanted, *spatial):  # with a shape that broadcasts, the log-det would be wrong
            raise ValueError(
                f"{owner}: for an input of shape {tuple(x1.shape)} the network must return the shape "
                f"{(*batch, wanted, *spatial)}, but it returned {tuple(raw.shape)}. {self.function!r} takes "
                f"{self.function.num_parameters} for each of {size} elements: {self.function.raw_names}."
            )
        return raw

    def _evaluate_function(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
        """Return the value on the other side and the log-slopes, ``(*batch, elements)``."""
        kept, changed = self._halves(value)
        result, log_slope = self._change(kept, changed, inverse)
        return self._join(kept, result), log_slope

    def _change(self, kept: Tensor, changed: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
        """Return the changed half on the other side and the log-slopes, ``(*batch, elements)``."""
        size, parameters = changed.shape[self.dim], self.function.num_parameters
        raw = self._network(kept, size)
        if self.dim == -1:
            raw = raw.reshape(*raw.shape[:-1], parameters, size)
            return evaluate(self.function, changed, raw, inverse)
        # to the function, every element of every pixel is one more element
        shape = changed.shape[self.dim :]
        raw = raw.expand(*raw.shape[: self.dim + 1], *shape[1:])
        raw = raw.reshape(*raw.shape[: self.dim], parameters, shape.numel())
        flat = changed.reshape(*changed.shape[: self.dim], shape.numel())
        result, log_slope = evaluate(self.function, flat, raw, inverse)
        return result.reshape(*result.shape[:-1], *shape), log_slope

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._evaluate_function(x, inverse=False)

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._evaluate_function(y, inverse=True)

    def _aux(self, x: Tensor, y: Tensor) -> Tensor | None:
        if self.function.domain is constraints.real:
            return self.evaluate(x)[1]
        return self.evaluate_inverse(y)[1]  # only y shows that it is out of reach

    def _halves(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Split a value into the part that is kept and the part that is changed."""
        rest = value.shape[self.dim] - self.split_dim
        if self.keep == "first":
            kept, changed = value.split_with_sizes((self.split_dim, rest), dim=self.dim)
        else:
            changed, kept = value.split_with_sizes((rest, self.split_dim), dim=self.dim)
        return kept, changed

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        if self.batch_shape:  # a context may have brought new batch dimensions
            kept = kept.expand(*changed.shape[: self.dim], *kept.shape[self.dim :])
        return torch.cat([kept, changed] if self.keep == "first" else [changed, kept], dim=self.dim)

    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor | None) -> Tensor:
        if aux is None:
            return x.new_zeros(self.log_det_shape(x))
        total = aux.sum(-1).to(x.dtype)
        return total if self.hypernet is not None else total.expand(self.log_det_shape(x))

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Divide by the slopes, and take one vector product through the network."""
        # views of their own, so that a derivative with respect to one half does not walk through the other
        kept, changed = (half.view_as(half) for half in self._halves(tracked(value)))
        by_kept, by_changed = self._halves(gradient)
        result, log_slope = self._change(kept, changed, inverse)
        outputs, weights = [result], [by_changed]
        if log_slope is None:
            ladj = value.new_zeros(self.log_det_shape(value))
        else:
            slopes = -log_slope if inverse else log_slope
            ladj = slopes.sum(-1).to(value.dtype).expand(self.log_det_shape(value))
            own = derivative(slopes, changed)
            by_changed = by_changed if own is None else by_changed - own
            scale = (-slopes.detach()).exp()
            scale = scale.expand(*scale.shape[:-1], changed.shape[self.dim :].numel())
            by_changed = by_changed * scale.reshape(*scale.shape[:-1], *changed.shape[self.dim :])
            outputs, weights = [result, slopes], [by_changed, torch.ones_like(slopes)]
        if self.split_dim and self.hypernet is not None:
            (through,) = torch.autograd.grad(outputs, kept, weights, retain_graph=True, materialize_grads=True)
            by_kept = by_kept - through
        return self._join(kept, result), ladj, self._join(by_kept, by_changed.to(value.dtype))

    def _settings(self) -> list[str]:
        """Name what the function does not say."""
        parts = [] if self.input_dim is None else [str(self.input_dim)]
        parts.append(f"split_dim={self.split_dim}")
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        if self.keep != "first":
            parts.append("keep='last'")
        if self.context_dim:
            parts.append(f"context_dim={self.context_dim}")
        return parts

    def extra_repr(self) -> str:
        return ", ".join([repr(self.function), *self._settings()])


def coupling_network(
    num_parameters: int,
    input_dim: int,
    hidden_dims: Sequence[int] | None,
    split_dim: int | None,
    dim: int,
    context_dim: int,
    activation: Callable[[], nn.Module],
    owner: str,
) -> tuple[int, nn.Module | None]:
    """Check a factory's sizes; return ``split_dim`` and a network that starts at zero, or None for constants."""
    input_dim = positive_int(input_dim, "input_dim", owner)
    context_dim = positive_int(context_dim, "context_dim", owner, minimum=0)
    negative_axis(dim, owner)
    split_dim = input_dim // 2 if split_dim is None else positive_int(split_dim, "split_dim", owner, 0)
    hidden_dims = default_hidden_dims(10 * input_dim) if hidden_dims is None else widths(hidden_dims, owner)
    given, wanted = split_dim + context_dim, num_parameters * (input_dim - split_dim)
    if not given or wanted <= 0:
        return split_dim, None
    if dim == -1:
        return split_dim, dense_network(given, hidden_dims, wanted, activation=activation, zero_output=True)
    return split_dim, conv_network(
        given, hidden_dims, wanted, spatial_dims=-dim - 1, activation=activation, zero_output=True
    )
