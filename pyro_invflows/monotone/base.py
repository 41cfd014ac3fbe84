"""The base class of increasing functions of one variable, from which layers are built."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_invflows.support.derivatives import outside_inference_mode
from pyro_invflows.support.precision import HALF, is_autocast, without_autocast

__all__ = ["MonotoneFunction", "bounded", "evaluate"]


class MonotoneFunction:
    r"""An increasing function of one variable whose parameters are given as tensors.

    It acts on each of E elements separately, and knows nothing of layers, events or networks. A layer obtains the
    parameters (learned constants, or the output of a network that reads other elements) and calls the function.

    **How to write one**: define two methods and a number. :class:`~pyro_invflows.Monotone`,
    :class:`~pyro_invflows.Coupling` and :class:`~pyro_invflows.Autoregressive` then turn it into layers::

        class Scale(MonotoneFunction):
            num_parameters = 1

            def forward(self, x, raw):      # -> y, log dy/dx
                (log_scale,) = raw.unbind(-2)
                return x * log_scale.exp(), log_scale

            def inverse(self, y, raw):      # -> x, log dy/dx at x
                (log_scale,) = raw.unbind(-2)
                return y * (-log_scale).exp(), log_scale

    **Shapes**. x and y are ``(*B, E)``; ``raw`` is ``(*B, P, E)``, with the parameter axis in front of the element
    axis, so that sums over knots run over contiguous memory. The batch shapes of the two broadcast; the value returned
    has the broadcast shape, and the log-slope has a shape that broadcasts with it. A caller whose event has several
    dimensions flattens them into one axis of elements.

    **Parameters**. Any real numbers are allowed, and zeros give the identity. Scales and slopes are bounded smoothly.

    **Values**. Never NaN for finite arguments, and finite if the result can be represented. The log-slope is always
    that of the forward function, at x, and finite. It may be None if the slope is 1 everywhere. Each direction is
    increasing, up to rounding error.

    **Derivatives**. Of all orders, by autograd and ``torch.func``.

    Attributes:
        num_parameters: P, the number of raw parameters per element.
        domain: The set that x and y belong to; all real numbers by default.
        identity_outside: The bound beyond which the function is the identity: ``y = x`` for larger ``|x|``; None
            if there is no such bound.
        raw_names: Names of the parameters, in order, for error messages.
    """

    num_parameters: int
    domain: constraints.Constraint = constraints.real
    identity_outside: float | None = None
    raw_names: str = "its raw parameters"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return y and ``log dy/dx``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, raw) -> y, log_slope.")

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and ``log dy/dx`` there: the log-slope of the forward function."""
        raise NotImplementedError(f"{type(self).__name__} must define inverse(y, raw) -> x, log_slope.")

    @outside_inference_mode
    def root(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return only x, up to rounding error and without a graph. Override it if this can be faster than ``inverse``.

        For solvers, which check the result and may call it in inference mode. It need not be monotone in the last
        digit.
        """
        return self.inverse(y, raw)[0]


def bounded(raw: Tensor, bound: float) -> Tensor:
    r"""Return :math:`m \tanh(\mathrm{raw} / m)`: smoothly between -m and m, with slope 1 at 0."""
    # written with the sigmoid, which is several times faster than tanh on the CPU; at m = 2 the inner factor is 1
    half = torch.sigmoid(raw if bound == 2 else raw * (2 / bound)) - 0.5
    return half.mul_(2 * bound)


def evaluate(function: MonotoneFunction, value: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
    """Evaluate a function outside autocast and in at least float32; only the value is rounded back.

    Args:
        function: The function.
        value: x, or y if ``inverse`` is true.
        raw: Parameters of the function; a network may have computed them in half precision.
        inverse: Whether to evaluate the inverse.
    """
    run = function.inverse if inverse else function.forward
    if value.dtype == raw.dtype and value.dtype not in HALF and not is_autocast(value):
        return run(value, raw)
    wanted = torch.promote_types(value.dtype, raw.dtype)
    precise = torch.promote_types(wanted, torch.float32)
    with without_autocast(value):
        result, log_slope = run(value.to(precise), raw.to(precise))
    return result.to(wanted), log_slope
