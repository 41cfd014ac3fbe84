r"""Affine couplings: part of the input determines how the rest is scaled and shifted.

Dinh et al. (2015), *NICE*, for the additive form and Dinh et al. (2017), *Density estimation using Real NVP*,
Eqs. 7 and 8, for the affine one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.events import negative_axis
from pyro_invflows.core.kinds import ContextLayer
from pyro_invflows.networks import conv_network, dense_network
from pyro_invflows.networks.calling import call_network
from pyro_invflows.networks.dense import default_hidden_dims
from pyro_invflows.support.checks import positive_int, widths

__all__ = ["AffineCoupling", "affine_coupling", "conditional_affine_coupling"]


class AffineCoupling(ContextLayer):
    r"""Scales and shifts part of the input by the output of a network that reads the other part.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 \odot e^{s(x_1)} + t(x_1),

    where the network returns :math:`(\tilde s, t)`, and the log-scale is :math:`s = m \tanh(\tilde s / m)`. Invertible
    for any network, because x_1 is passed on unchanged. Choose it as the main layer of a flow, with a
    :class:`~pyro_invflows.Permute` or :class:`~pyro_invflows.Orthogonal` layer between two couplings.

    **Forward**, **Inverse**: one evaluation of the network; derivatives of all orders that the network has.
    **Log-det**: :math:`\sum s`, from the same evaluation. **Identity**: if the network's output is zero, as in a layer
    newly built by :func:`affine_coupling`.

    Args:
        split_dim: Number of elements (channels) of x_1; 0 is allowed.
        hypernet: Network from x_1 (followed by the context) to ``2 (D - split_dim)`` elements, the raw log-scales
            first, or to ``D - split_dim`` elements if ``scale=None``. It receives vectors ``(*B, split_dim)`` or, for
            another ``dim``, one flat batch ``(N, split_dim, *spatial)``. With ``None``, constants are learned instead;
            this needs ``split_dim=0`` and ``input_dim``. The network must not write to its input; one that begins with
            a module with ``inplace=True`` receives a copy.
        dim: Axis that is split: -1 for vectors, -3 for the channels of images.
        keep: ``"first"`` if x_1 holds the leading elements, ``"last"`` if it holds the trailing ones. If you alternate
            the two, no permutation is needed between couplings.
        scale: ``"tanh"`` bounds the log-scale smoothly on both sides; with ``None`` the layer only shifts, and
            preserves volume.
        context_dim: Width of the context that the network also takes (see :class:`~pyro_invflows.Conditional`); while
            the layer is not conditioned, the network receives zeros instead.
        max_log_scale: Bound m on the log-scale.
        input_dim: Size D of an event along ``dim``, if it is to be checked; needed for constants.

    Attributes:
        hypernet: The network, with its parameters; None if constants are learned.
        constants: The raw log-scales, then the shifts, a parameter ``(2 D,)``, or ``(D,)`` if ``scale=None``; only
            without a network.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where the network may mix pixels;
        log-det ``(*B,)``.

    Raises:
        TypeError: if the network is not a module.
        ValueError: if ``split_dim`` leaves nothing to transform; if the network's output has the wrong shape, or the
            network writes to its input; if another argument is out of range.

    Differs from Pyro's ``AffineCoupling``: the bound on the log-scale is smooth, images reach the network as images,
    and a one-dimensional event is allowed.

    References:
        Dinh et al. (2017), *Density estimation using Real NVP*, Eqs. 7-8; the bound after Ardizzone et al. (2019),
        *Analyzing inverse problems with invertible neural networks*.

    Example:
        >>> layer = AffineCoupling(1, torch.nn.Linear(1, 4))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        split_dim: int,
        hypernet: nn.Module | None,
        *,
        dim: int = -1,
        keep: str = "first",
        scale: str | None = "tanh",
        context_dim: int = 0,
        max_log_scale: float = 2.0,
        input_dim: int | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim, dim=dim, cache_size=cache_size)
        input_dim, context_dim = self.input_dim, self.context_dim
        self.split_dim = split_dim = positive_int(split_dim, "split_dim", "AffineCoupling", minimum=0)
        if input_dim is not None and split_dim >= input_dim:
            raise ValueError(
                f"AffineCoupling: split_dim must be below input_dim, so that something is left to transform, but got "
                f"split_dim={split_dim} and input_dim={input_dim}."
            )
        if scale not in ("tanh", None):
            raise ValueError(f"AffineCoupling: scale must be 'tanh' or None, but got {scale!r}.")
        if not (hypernet is None or isinstance(hypernet, nn.Module)):
            raise TypeError(
                f"AffineCoupling: hypernet must be a module, so that the layer owns its parameters, but got "
                f"{type(hypernet).__name__}. Wrap a function in a module that holds the parameters it uses."
            )
        if not max_log_scale > 0:
            raise ValueError(f"AffineCoupling: max_log_scale must be positive, but got {max_log_scale!r}.")
        if keep not in ("first", "last"):
            raise ValueError(f"AffineCoupling: keep must be 'first' or 'last', but got {keep!r}.")
        self.keep = keep
        self.scale = scale
        self.max_log_scale = float(max_log_scale)
        self.hypernet = hypernet
        if hypernet is None:
            if split_dim or context_dim or input_dim is None:
                raise ValueError(
                    "AffineCoupling without a network learns constants: it needs split_dim=0, context_dim=0 and "
                    f"input_dim, but got split_dim={split_dim}, context_dim={context_dim}, input_dim={input_dim}."
                )
            self.constants = nn.Parameter(torch.empty(input_dim if scale is None else 2 * input_dim))
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
                f"AffineCoupling with split_dim={self.split_dim} needs more than that many elements along dim "
                f"{self.dim}, but got {value.shape[self.dim]}."
            )

    def _network(self, x1: Tensor, wanted: int) -> Tensor:
        """Return the network's output, ``(*batch, wanted, *spatial)``."""
        if self.hypernet is None:
            return self.constants.reshape(self.constants.shape + (1,) * (-self.dim - 1))
        if self.dim == -1 and not self.context_dim:
            raw = call_network(self.hypernet, x1, owner="AffineCoupling")
            if raw.shape[-1] == wanted and raw.shape[:-1] == x1.shape[:-1]:
                return raw
        x1 = self.with_context(x1)
        batch, spatial = x1.shape[: self.dim], x1.shape[x1.dim() + self.dim + 1 :]
        if self.dim == -1:
            raw = call_network(self.hypernet, x1, owner="AffineCoupling")
        else:  # a convolution takes exactly one batch dimension
            flat = x1.reshape(batch.numel(), *x1.shape[self.dim :])
            raw = call_network(self.hypernet, flat, owner="AffineCoupling")
            raw = raw.reshape(*batch, *raw.shape[1:])
        if raw.shape != (*batch, wanted, *spatial):  # with a shape that broadcasts, the log-det would be wrong
            raise ValueError(
                f"AffineCoupling: for an input of shape {tuple(x1.shape)} the network must return the shape "
                f"{(*batch, wanted, *spatial)} ({'shifts' if self.scale is None else 'log-scales, then shifts'}), but "
                f"it returned {tuple(raw.shape)}."
            )
        return raw

    def _scale_and_shift(self, x1: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
        raw = self._network(x1, size if self.scale is None else 2 * size)
        if self.scale is None:
            return None, raw
        raw_scale, shift = raw.chunk(2, dim=self.dim)
        # m tanh(s / m), written with the sigmoid, which is several times faster than tanh on the CPU; at the default
        # m = 2 the inner factor is 1
        m = self.max_log_scale
        half = torch.sigmoid(raw_scale if m == 2 else raw_scale * (2 / m)) - 0.5
        return half.mul_(2 * m), shift

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x1, x2 = self._halves(x)
        log_scale, shift = self._scale_and_shift(x1, x2.shape[self.dim])
        y2 = x2 + shift if log_scale is None else torch.addcmul(shift, x2, log_scale.exp())
        return self._join(x1, y2), log_scale

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        y1, y2 = self._halves(y)
        log_scale, shift = self._scale_and_shift(y1, y2.shape[self.dim])
        x2 = y2 - shift if log_scale is None else (y2 - shift) * (-log_scale).exp()
        return self._join(y1, x2), log_scale

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
        total = aux.sum(tuple(range(self.dim, 0)))
        if self.hypernet is not None:
            return total
        pixels = x.shape[x.dim() + self.dim + 1 :].numel()
        return (total * pixels).expand(self.log_det_shape(x))

    def extra_repr(self) -> str:
        parts = [f"split_dim={self.split_dim}"]
        if self.input_dim is not None:
            parts.insert(0, str(self.input_dim))
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        if self.keep != "first":
            parts.append("keep='last'")
        if self.scale is None:
            parts.append("scale=None")
        if self.context_dim:
            parts.append(f"context_dim={self.context_dim}")
        return ", ".join(parts)


def affine_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    split_dim: int | None = None,
    dim: int = -1,
    keep: str = "first",
    scale: str | None = "tanh",
    context_dim: int = 0,
    max_log_scale: float = 2.0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> AffineCoupling:
    """Build an :class:`AffineCoupling` and its network; it is initially the identity.

    Args:
        input_dim: Size D of an event along ``dim``.
        hidden_dims: Widths (channels) of the network's hidden layers; by default two of ``min(10 * input_dim, 256)``.
        split_dim: As in the class; default ``input_dim // 2``.
        dim: -1 builds a dense network; -2, -3 and -4 a convolutional one with 1, 2 or 3 spatial dimensions.
        keep: As in the class.
        scale: As in the class.
        context_dim: As in the class.
        max_log_scale: As in the class.
        activation: Constructor of the network's activations.

    Raises:
        ValueError: if ``split_dim`` leaves nothing to transform.
    """
    input_dim = positive_int(input_dim, "input_dim", "affine_coupling")
    context_dim = positive_int(context_dim, "context_dim", "affine_coupling", minimum=0)
    negative_axis(dim, "affine_coupling")
    split_dim = input_dim // 2 if split_dim is None else positive_int(split_dim, "split_dim", "affine_coupling", 0)
    hidden_dims = default_hidden_dims(10 * input_dim) if hidden_dims is None else widths(hidden_dims, "affine_coupling")
    hypernet = None
    if split_dim + context_dim > 0 and split_dim < input_dim:
        out = (input_dim - split_dim) * (1 if scale is None else 2)
        if dim == -1:
            hypernet = dense_network(split_dim + context_dim, hidden_dims, out, activation=activation, zero_output=True)
        else:
            hypernet = conv_network(
                split_dim + context_dim,
                hidden_dims,
                out,
                spatial_dims=-dim - 1,
                activation=activation,
                zero_output=True,
            )
    return AffineCoupling(
        split_dim,
        hypernet,
        dim=dim,
        keep=keep,
        scale=scale,
        context_dim=context_dim,
        max_log_scale=max_log_scale,
        input_dim=input_dim,
    )


conditional_affine_coupling = conditional_factory(affine_coupling, "its network also reads a context", hypernet=False)
