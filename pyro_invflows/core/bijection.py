"""The base class of every layer.

A layer is a :class:`torch.distributions.Transform` **and** a :class:`torch.nn.Module`. Its author writes three
hooks (:class:`Bijection`), or fewer with the classes of :mod:`pyro_invflows.core.kinds`. Shapes and checks come from
:mod:`pyro_invflows.core.shaped`, the memo from :mod:`pyro_invflows.core.memo`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from pyro_invflows.core import memo
from pyro_invflows.core.memo import FORWARD, INVERSE
from pyro_invflows.core.path_gradient import path_gradient_by_inversion, start_gradient
from pyro_invflows.core.shaped import Shaped
from pyro_invflows.networks.network import restart
from pyro_invflows.support.computed import compute_tensors

__all__ = ["Bijection", "InverseView"]


class Bijection(Shaped):
    r"""An invertible layer: a torch ``Transform`` that is also an ``nn.Module``.

    **How to write one**: define the three hooks below, and check the layer with
    :func:`~pyro_invflows.testing.check_bijection`. ``aux`` is whatever makes the log-det cheap (a scale, a slope, a
    factorisation), or ``None``. Sampling alone never computes a log-det. A log-det after a pass in either direction
    reuses the aux of that pass and evaluates no network again. ``_log_det`` always receives an aux.

    **Must define**::

        def _forward_aux(self, x):  ...  # -> y, aux
        def _inverse_aux(self, y):  ...  # -> x, aux      the same aux, evaluated at x
        def _log_det(self, x, y, aux):  ...  # -> log|det dy/dx|, of shape self.log_det_shape(x)

    **May override**:

    * ``domain``, ``codomain``: constraints, if they are not all real vectors; ``sign``, if it is known.
    * ``bijective``, ``exact``: False if the layer is not one-to-one, or if its log-det is an estimate or a bound.
    * ``conditionable``, ``amortised``: whether a hypernetwork may set the layer's own parameters, and which ones.
    * :meth:`_aux`: the aux when only x and y are known; by default, the aux of a forward pass at x.
    * :meth:`_check`: further checks of an input; call ``super()._check(value, inverse)`` first.
    * :meth:`trace_event`: if the event shape changes, or more is known about it than ``input_dim``.
    * :meth:`reset_parameters`: restores the initial state, constants included. Every layer with parameters of its own
      has one.
    * :meth:`_path_gradient`: how a gradient of log q is carried along, if there is a way that does not invert; correct
      for every layer by default.
    * ``fit(data)``: sets what is computed from data, which are values of the layer's output; returns self.
      :meth:`Flow.initialize <pyro_invflows.Flow.initialize>` calls it.
    * ``extra_repr``, ``_apply``, ``_load_from_state_dict``: as in any module; call ``super()``.

    An author may call :meth:`log_det_shape`, :meth:`check_event`, ``batch_shape``, ``forward_shape``,
    ``inverse_shape``, and :func:`~pyro_invflows.core.events.sum_rightmost`. The layers of this library also use
    :class:`~pyro_invflows.support.constants.HoldsConstants` (buffers that follow from the settings),
    :func:`~pyro_invflows.networks.calling.call_network` (a sub-network that may work in place), the decorators of
    :mod:`pyro_invflows.support.precision` (half precision, autocast) and
    :func:`~pyro_invflows.core.conditional.conditional_factory`.

    **For structures only**, which are made of other layers: see :class:`~pyro_invflows.core.structure.Structure`. They
    define :meth:`named_parts` and :meth:`leaves`, override ``batch_shape``, ``_shape`` and ``_copied_state``, and call
    :meth:`evaluate` and :meth:`evaluate_inverse` of their parts. ``draws_forward`` and ``draws_inverse`` say in which
    directions a pass draws noise; ``opaque`` says that the layer depends on more than the memo can see; ``label`` is
    the layer's name in error messages.

    **Never override**: ``__call__``, ``forward``, ``_call``, ``_inverse``, ``_inv_call``, ``log_abs_det_jacobian``,
    ``call_and_ladj``, ``inv_and_ladj``, ``path_gradient``, ``with_cache``, ``__getstate__``.

    ======================================  =============  ========================  ======================
    method                                  checks         memo                      log-det
    ======================================  =============  ========================  ======================
    ``layer(x)``                            x              read, then filled         no
    ``layer.inv(y)``                        y              read, then filled         no
    ``log_abs_det_jacobian(x, y)``          x, on a miss   read and used up          of the forward map
    ``call_and_ladj(x)``                    x, on a miss   read and used up          of the forward map
    ``inv_and_ladj(y)``                     y, on a miss   read and used up          of the inverse map
    ``path_gradient(x, g)``                 x              no                        of the forward map
    ``evaluate(x)``, ``evaluate_inverse``   x or y         no                        only its aux
    hooks                                   no             no                        ``_log_det`` only
    ======================================  =============  ========================  ======================

    All tensors of a layer must be parameters or buffers: the memo, recomputation and ``.to()`` look nowhere else. Its
    computations must broadcast over leading batch dimensions of its own parameters, so that
    :class:`~pyro_invflows.Conditional` can amortise it.

    **The memo.** A layer remembers its last evaluation. The entry may answer a call in the opposite direction, for the
    very same tensor object, as long as nothing that it depends on has changed: parameters, buffers, ``requires_grad``,
    modes, autocast, tensor versions, the steps of any optimiser. The log-det uses the entry up; a sample that is never
    scored stays in memory until the next call or ``clear_cache()``.

    Apart from rounding (in half precision, or where an activation saturates) and from random sub-networks (dropout),
    no value depends on whether the memo was warm. The autograd graph does: ``t.inv(y)`` of a ``y`` that this layer has
    just produced returns the very ``x`` it came from, whose graph does not pass through ``y`` (as with torch's own
    cache), so that a derivative with respect to that ``y`` silently lacks this path. To get it, differentiate with
    respect to ``y.detach().requires_grad_()``, call ``y.retain_grad()`` before scoring, or use ``cache_size=0``. There
    is one known gap: an in-place edit through ``.data`` between sampling and scoring the same tensor object goes
    unnoticed.

    Args:
        input_dim: Size of an event along ``dim``; ``None`` accepts any size.
        dim: The (negative) axis that the layer acts along; it determines the number of event dimensions.
        cache_size: 1 to remember the last evaluation, 0 to remember nothing.
    """

    bijective = True
    #: Whether the log-det is exact and repeatable; False for an estimate or a bound.
    exact = True
    #: Whether a hypernetwork may set the layer's parameters (see Conditional).
    conditionable = True
    #: Names of the layer's own parameters that a hypernetwork may set; None for all of them.
    amortised: tuple[str, ...] | None = None
    #: Whether a pass in this direction draws noise. If so, the memo does not answer it, or a density would depend on
    #: whether the memo was warm; the memo may still serve the log-det.
    draws_forward = False
    draws_inverse = False
    #: Whether the layer depends on more than its parameters and buffers; then nothing is remembered.
    opaque = False

    def __init__(self, input_dim: int | None = None, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        self._memo: memo.Entry | None = None
        self._kept: tuple[tuple[nn.Module, ...], tuple[nn.Module | None, ...]] | None = None

    # ------------------------------------------------------------------ must define

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError(f"{type(self).__name__} must define _forward_aux(x) -> y, aux.")

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError(f"{type(self).__name__} must define _inverse_aux(y) -> x, aux.")

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _log_det(x, y, aux).")

    # ------------------------------------------------------------------ may override

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        """Return the aux when only ``x`` and ``y`` are known."""
        return self.evaluate(x)[1]

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value on the other side, the log-det in that direction, and the gradient of log q there.

        Called with gradients enabled, with a value that has all batch dimensions, and its gradient, a constant of the
        same shape. The value returned keeps its graph; of the two others only the numbers count. By default, the
        output is detached, passed back and differentiated; :mod:`pyro_invflows.core.path_gradient` has what
        elementwise and linear layers do instead.
        """
        return path_gradient_by_inversion(self, value, gradient, inverse)

    def reset_parameters(self) -> None:
        """Restore the initial state, that of a newly built layer; random initial values are drawn anew.

        By default, this resets all parts and sub-networks: a module with a ``reset_parameters`` is responsible for all
        that it holds; any other module is searched for such modules. Parameters of foreign modules without one keep
        their values. A layer with parameters of its own resets these too, and calls ``super().reset_parameters()``
        if it has sub-networks.
        """
        inherited = type(self).reset_parameters is Bijection.reset_parameters
        if inherited and any(parameter is not None for parameter in self._parameters.values()):
            raise NotImplementedError(
                f"{type(self).__name__} has parameters of its own, so it must define reset_parameters()."
            )
        for child in self.children():
            restart(child)

    # ------------------------------------------------------------------ for structures

    def named_parts(self) -> Iterator[tuple[str, Bijection, int]]:
        """Yield the parts of a structure: attribute name, layer, and number of extra dimensions.

        Extra dimensions are event dimensions of the whole but batch dimensions of the part.
        """
        return iter(())

    def leaves(self, inverse: bool = False) -> Iterator[tuple[Bijection, bool]]:
        """Yield the innermost layers of a structure, in the order of a pass, each with whether it runs inverted."""
        yield self, inverse

    def evaluate(self, x: Tensor) -> tuple[Tensor, Any]:
        """Check x and return y and the aux; the memo is neither read nor filled."""
        return self._run(self._forward_aux, x, inverse=False)

    def evaluate_inverse(self, y: Tensor) -> tuple[Tensor, Any]:
        """Check y and return x and the aux; the memo is neither read nor filled."""
        return self._run(self._inverse_aux, y, inverse=True)

    def _run(self, hook: Any, value: Tensor, inverse: bool) -> tuple[Tensor, Any]:
        """Check ``value`` and run a hook; name the parameter if dtypes clash inside a sub-network."""
        self._check(value, inverse)
        if self._forward_pre_hooks:  # these run only when the module is called, not for inverses and log-dets
            compute_tensors(self)
        if torch.compiler.is_compiling():
            return hook(value)
        try:
            if self.__dict__.get("_pyro_samples"):  # all reads within one evaluation must see the same draw
                with self._pyro_context:
                    result = hook(value)
            else:
                result = hook(value)
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError):
                for name, tensor in self.named_parameters():
                    if tensor.dtype != value.dtype and tensor.is_floating_point():
                        try:
                            self._refuse_dtype(value, name, tensor)
                        except TypeError as clearer:
                            raise clearer from error
            raise
        if not isinstance(result, tuple) or len(result) != 2:  # a batch of two rows would be unpacked silently
            name = "_inverse_aux must return (x, aux)" if inverse else "_forward_aux must return (y, aux)"
            raise TypeError(f"{type(self).__name__}.{name}; return None as the aux if there is none.")
        return result

    # ------------------------------------------------------------------ never override

    def __call__(self, x: Tensor) -> Tensor:
        # Transform.__call__ precedes nn.Module's in the method resolution order and would skip forward hooks.
        return super(Transform, self).__call__(x)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        entry = memo.recall(self, x, FORWARD)
        if entry is not None:
            return entry.y
        y, aux = self.evaluate(x)
        memo.remember(self, x, y, aux, FORWARD, answers=not self.draws_inverse)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        entry = memo.recall(self, y, INVERSE)
        if entry is not None:
            return entry.x
        x, aux = self.evaluate_inverse(y)
        memo.remember(self, x, y, aux, INVERSE, answers=not self.draws_forward)
        return x

    def _call(self, x: Tensor) -> Tensor:
        return self.evaluate(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.evaluate_inverse(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log|det dy/dx|``, whose shape is the broadcast of the batch shapes of input and parameters."""
        entry = memo.recall_pair(self, x, y)
        if entry is not None:
            self._memo = None
            return self._log_det(x, y, entry.aux)
        self._check(x, inverse=False)
        if self._forward_pre_hooks:
            compute_tensors(self)
        return self._log_det(x, y, self._aux(x, y))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` and ``log|det dy/dx|`` in one pass."""
        entry = memo.recall(self, x, FORWARD)
        if entry is None:
            y, aux = self.evaluate(x)
        else:
            self._memo, y, aux = None, entry.y, entry.aux
        return y, self._log_det(x, y, aux)

    def inv_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` and ``log|det dx/dy|`` in one pass."""
        entry = memo.recall(self, y, INVERSE)
        if entry is None:
            x, aux = self.evaluate_inverse(y)
        else:
            self._memo, x, aux = None, entry.x, entry.aux
        return x, -self._log_det(x, y, aux)

    def path_gradient(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Carry the gradient of a log-density along: the path gradient of a sample, in the pass that draws it.

        If x has the log-density q and ``gradient`` is :math:`g = \nabla_x \log q(x)`, then y has the gradient
        :math:`J^{-T} (g - \nabla_x \log|\det J|)`, the parameters held fixed. A variational objective whose sample y is
        given the gradient ``gradient_y - d log p/dy`` drops the score of q, whose expectation is 0 ("sticking the
        landing").

        Args:
            x: A point, or a batch of points.
            gradient: The gradient of its log-density, of the same shape; treated as a constant.

        Returns:
            y, with its graph to x and to the parameters; ``log|det dy/dx|`` and the gradient at y, constants.

        Raises:
            ValueError: if scoring y would draw noise, as for a :class:`~pyro_invflows.Slice`.

        References:
            Roeder et al. (2017), *Sticking the landing*; Vaitl et al. (2022), *Gradients should stay on path*.
        """
        return start_gradient(self, x, gradient, inverse=False)

    def one_pass(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Return the value on the other side and the log-det in that direction; no memo is read or filled."""
        if inverse:
            x, aux = self.evaluate_inverse(value)
            return x, -self._log_det(x, value, aux)
        y, aux = self.evaluate(value)
        return y, self._log_det(value, y, aux)

    @property
    def inv(self) -> Transform:
        """The inverse, as a transform that is not a module; :class:`~pyro_invflows.Inverted` is one."""
        return InverseView(self)  # not kept: a cycle would keep a conditioned layer and its graph alive

    def clear_cache(self) -> None:
        """Forget the last evaluation."""
        self._memo = self._kept = None

    def with_cache(self, cache_size: int = 1) -> Bijection:
        """Return a shallow copy with the given cache size; parameters and modules are shared."""
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, but got {cache_size!r}.")
        if cache_size == self._cache_size:
            return self
        new = copy.copy(self)
        new._cache_size = cache_size
        return new

    def _copied_state(self) -> dict[str, Any]:
        """Return the attributes that a copy starts with."""
        return self.__dict__ | {"_memo": None, "_kept": None}

    def __getstate__(self) -> dict[str, Any]:
        return self._copied_state()

    # Written out, because torch.nn.utils.parametrize makes __getstate__ raise on the modules that it changes.
    def __copy__(self) -> Bijection:
        new = type(self).__new__(type(self))
        new.__dict__.update(self._copied_state())
        return new

    def __deepcopy__(self, known: dict[int, Any]) -> Bijection:
        new = known[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self._copied_state(), known))
        return new

    def _apply(self, fn: Any, recurse: bool = True) -> Bijection:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class InverseView(_InverseTransform):
    """The type of ``layer.inv``: torch's inverse transform, with the two one-pass methods."""

    _inv: Any

    def __init__(self, layer: Bijection) -> None:  # made at each use, hence without the parents' constructors
        self._inv, self._cache_size = layer, layer._cache_size

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` and ``log|det dx/dy|`` in one pass."""
        return self._inv.inv_and_ladj(y)

    def inv_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` and ``log|det dy/dx|`` in one pass."""
        return self._inv.call_and_ladj(x)

    def path_gradient(self, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x``, ``log|det dx/dy|`` and the gradient of the log-density of x."""
        return start_gradient(self._inv, y, gradient, inverse=True)

    def leaves(self, inverse: bool = False) -> Iterator[tuple[Bijection, bool]]:
        """Yield the innermost layers, as :meth:`Bijection.leaves` does."""
        return self._inv.leaves(not inverse)
