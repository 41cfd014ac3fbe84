"""The base class of every layer.

A layer is a :class:`torch.distributions.Transform` **and** a :class:`torch.nn.Module`. Its author writes three
hooks (:class:`Bijection`), or fewer with the classes of :mod:`pyro_invflows.core.kinds`; shapes, checks, copying and
the memo that spares a second evaluation belong to the base class.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_invflows.core.events import event_constraint, negative_axis
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.modes import in_functorch, is_any_autocast

__all__ = ["Bijection"]

_FORWARD, _INVERSE = "forward", "inverse"


class _Entry(NamedTuple):
    """One remembered evaluation. Immutable: a thread sees a whole entry or none."""

    x: Tensor
    y: Tensor
    aux: Any
    direction: str
    flags: tuple[Any, ...]
    # Held as objects, not as ids: an id can be reused once its tensor is gone.
    tensors: tuple[Tensor | None, ...]


_optimiser_steps: int | None = None


def _watch_optimisers() -> None:
    """Count the steps of all optimisers from now on.

    Fused ones, and several of Pyro's, change parameters without a new tensor version.
    """
    global _optimiser_steps
    if _optimiser_steps is None:
        _optimiser_steps = 0
        register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _optimiser_steps
    _optimiser_steps += 1  # type: ignore[operator]


class Bijection(TransformModule):
    r"""An invertible layer: a torch ``Transform`` that is also an ``nn.Module``.

    **Must define** (three hooks; ``aux`` is whatever makes the log-det cheap, or ``None``)::

        def _forward_aux(self, x):  ...  # -> y, aux
        def _inverse_aux(self, y):  ...  # -> x, aux      the same aux, evaluated at x
        def _log_det(self, x, y, aux):  ...  # -> log|det dy/dx|

    **May override**: ``domain``, ``codomain``, :meth:`_aux` (the aux when only x and y are known; default: the
    forward's at x), :meth:`trace_event` where the event shape changes.

    **Never override**: ``__call__``, ``forward``, ``_call``, ``_inverse``, ``_inv_call``,
    ``log_abs_det_jacobian``, ``with_cache``, ``__getstate__``.

    A layer's tensors are its ``parameters()`` and ``buffers()``, always: the memo, recomputation and ``.to()``
    look nowhere else. Its mathematics broadcasts over leading batch dimensions of its own parameters, which is
    what lets :class:`~pyro_invflows.Conditional` amortise it.

    **The memo.** torch and Pyro ask for ``t.inv(y)`` and ``t.log_abs_det_jacobian(x, y)`` in separate calls, and
    variational inference scores the sample it just drew. The last evaluation is therefore remembered and may
    answer the opposite direction once, for the very same tensor object, while nothing it depends on has changed:
    parameters, buffers, ``requires_grad``, modes, autocast, tensor versions, the steps of any optimiser. The log-det
    uses it up; a sample that is never scored stays until the next call or ``clear_cache()``.

    Apart from rounding (what half precision or a saturated activation lost) and from sub-networks that are random
    (dropout), no value depends on whether the memo was warm. What autograd can see does: ``t.inv(y)`` of a ``y`` that
    this layer just produced returns the very ``x`` it came from, whose graph does not pass through ``y`` (as with
    torch's own cache), so that a derivative with respect to that ``y`` silently lacks this path. Differentiate with
    respect to ``y.detach().requires_grad_()``, call ``y.retain_grad()`` before scoring, or use ``cache_size=0``. The
    one known hole: an in-place edit through ``.data`` between sampling and scoring the same tensor object cannot be
    seen.

    Args:
        input_dim: Event size along ``dim``; ``None`` accepts any size.
        dim: The (negative) axis that the layer acts along; it sets the event dimension.
        cache_size: 1 remembers the last evaluation, 0 nothing.
    """

    bijective = True
    #: Whether the log-det is exact and repeatable (estimators and bounds say False).
    exact = True
    # Directions in which a pass draws noise. There the memo never answers, or a density would depend on whether it was
    # warm; it may still serve the log-det.
    _draws_forward = False
    _draws_inverse = False
    # Whether nothing but the layer's own last sample can be inverted: then the entry is no cache but the only answer,
    # so that it is kept whatever the cache size, and not used up.
    _only_own_sample = False
    #: Whether a hypernetwork may set the layer's parameters (see Conditional).
    conditionable = True
    #: The layer's own parameters that it may set; None for all of them.
    amortised: tuple[str, ...] | None = None
    #: Event size along ``dim`` that is required of the input; None where any size will do.
    input_dim: int | None = None
    dim: int = -1

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(self, input_dim: int | None = None, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        owner = type(self).__name__
        if input_dim is not None:
            self.input_dim = positive_int(input_dim, "input_dim", owner)
        self.dim = negative_axis(dim, owner)
        if dim != -1:
            self.domain = self.codomain = event_constraint(-dim)
        self._batch_shape = torch.Size()
        self._memo: _Entry | None = None
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
        return self._evaluate(x)[1]

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        """Follow known event sizes ``{negative axis: size}`` through the layer.

        Raises:
            ValueError: if a known size is not the one that the layer needs.
        """
        sizes = dict(sizes)
        if self.input_dim is not None:
            known = sizes.setdefault(self.dim, self.input_dim)
            if known != self.input_dim:
                raise ValueError(
                    f"{type(self).__name__} works on events with {self.input_dim} elements along dim {self.dim}, "
                    f"but got {known}."
                )
        return sizes

    def _leaves(self, inverse: bool) -> Iterator[tuple[Transform, bool]]:
        """Yield the layers that a structure is made of, in the order of a pass, each with its own direction."""
        yield self, inverse

    # ------------------------------------------------------------------ shapes and checks

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the layer's own parameters: ``()``, or that of the context it was conditioned on."""
        return self._batch_shape

    def _event_shape(self, shape: torch.Size, event_dim: int, inverse: bool) -> tuple[int, ...]:
        """Check the event part of ``shape`` and return the event shape on the other side."""
        if len(shape) < event_dim:
            raise ValueError(
                f"{type(self).__name__} works on events with {event_dim} dimension(s), but got the shape "
                f"{tuple(shape)}."
            )
        if not event_dim:
            return ()
        other = (self.domain if inverse else self.codomain).event_dim
        plain = type(self).trace_event is Bijection.trace_event and other == event_dim
        if plain and self.input_dim in (None, shape[self.dim]):  # most layers; a Flow asks at each call
            return tuple(shape[-event_dim:])
        sizes = self.trace_event({i - event_dim: n for i, n in enumerate(shape[-event_dim:])}, inverse)
        return tuple(sizes[i] for i in range(-other, 0))

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        event_dim = (self.codomain if inverse else self.domain).event_dim
        event = self._event_shape(shape, event_dim, inverse)
        batch, own = shape[: len(shape) - event_dim], self.batch_shape
        return torch.Size((torch.broadcast_shapes(batch, own) if own else batch) + event)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of ``self(x)`` for x of ``shape``; raises ``ValueError`` on a wrong event size."""
        return self._shape(shape, inverse=False)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of ``self.inv(y)`` for y of ``shape``; raises ``ValueError`` on a wrong event size."""
        return self._shape(shape, inverse=True)

    def _log_det_shape(self, x: Tensor) -> torch.Size:
        """Return the broadcast of the batch shapes of the input and of the parameters."""
        batch = x.shape[: x.dim() - self.domain.event_dim]
        return torch.broadcast_shapes(batch, self.batch_shape) if self.batch_shape else batch

    def _check(self, value: Tensor, inverse: bool) -> None:
        """Refuse, at almost no cost, a value that cannot be an event of this layer."""
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            self._refuse_kind(value)
        for own in (self._parameters, self._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.dtype != value.dtype and tensor.is_floating_point():
                    self._refuse_dtype(value, name, tensor)
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if event_dim and (
            value.dim() < event_dim or (self.input_dim is not None and value.shape[self.dim] != self.input_dim)
        ):
            self._event_shape(value.shape, event_dim, inverse)

    def _refuse_kind(self, value: Any) -> NoReturn:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, int):  # what Pyro's guides call an init_transform_fn with
            raise TypeError(
                f"{type(self).__name__} needs a floating point tensor, but got the int {value}. Where a function is "
                "wanted that builds a layer from its size, give that function and not a layer, for example "
                "partial(stack, 4, affine_coupling)."
            )
        raise TypeError(
            f"{type(self).__name__} needs a floating point tensor, but got {kind}. Convert it first, for example with "
            "x.float() or torch.as_tensor."
        )

    def _refuse_dtype(self, value: Tensor, name: str, tensor: Tensor) -> None:
        if is_any_autocast():
            return
        raise TypeError(
            f"{type(self).__name__}: input and parameters must have the same dtype, but the input is "
            f"{value.dtype} and '{name}' is {tensor.dtype}. Convert the layer with .to({value.dtype}) or the input "
            f"with .to({tensor.dtype})."
        )

    def _run(self, hook: Any, value: Tensor, inverse: bool) -> tuple[Tensor, Any]:
        """Check ``value`` and run a hook; a dtype clash inside a sub-network is named, not left to a matmul."""
        self._check(value, inverse)
        if self._forward_pre_hooks:  # run by the module's own call alone, which inverses and log-dets are not
            compute_tensors(self)
        if torch.compiler.is_compiling():
            return hook(value)
        try:
            if self.__dict__.get("_pyro_samples"):  # all reads in one evaluation see one draw
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
        if not isinstance(result, tuple) or len(result) != 2:  # a batch of two would be unpacked without a word
            name = "_inverse_aux must return (x, aux)" if inverse else "_forward_aux must return (y, aux)"
            raise TypeError(f"{type(self).__name__}.{name}, with aux None where there is none.")
        return result

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return y and aux, checked, without looking at the memo."""
        return self._run(self._forward_aux, x, inverse=False)

    def _evaluate_inverse(self, y: Tensor) -> tuple[Tensor, Any]:
        """Return x and aux, checked, without looking at the memo."""
        return self._run(self._inverse_aux, y, inverse=True)

    # ------------------------------------------------------------------ never override

    def __call__(self, x: Tensor) -> Tensor:
        # Transform.__call__ precedes nn.Module's in the method resolution order and would skip forward hooks.
        return super(Transform, self).__call__(x)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        entry = self._memo
        if (
            entry is not None
            and entry.direction == _INVERSE
            and entry.x is x
            and not self._draws_forward
            and self._is_fresh(entry)
        ):
            return entry.y
        y, aux = self._evaluate(x)
        self._remember(x, y, aux, _FORWARD)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        entry = self._memo
        if (
            entry is not None
            and entry.direction == _FORWARD
            and entry.y is y
            and not self._draws_inverse
            and self._is_fresh(entry)
        ):
            return entry.x
        x, aux = self._evaluate_inverse(y)
        self._remember(x, y, aux, _INVERSE)
        return x

    def _call(self, x: Tensor) -> Tensor:
        return self._evaluate(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._evaluate_inverse(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log|det dy/dx|``, of the broadcast of the batch shapes of the input and the parameters."""
        entry = self._memo
        if entry is not None and entry.x is x and entry.y is y and self._is_fresh(entry):
            self._use_up()
            return self._log_det(x, y, entry.aux)
        self._check(x, inverse=False)
        if self._forward_pre_hooks:
            compute_tensors(self)
        return self._log_det(x, y, self._aux(x, y))

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = self._take(x, _INVERSE) or self._evaluate(x)
        return y, self._log_det(x, y, aux)

    def _inv_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, aux = self._take(y, _FORWARD) or self._evaluate_inverse(y)
        return x, -self._log_det(x, y, aux)

    # ------------------------------------------------------------------ the memo

    def _take(self, value: Tensor, direction: str) -> tuple[Tensor, Any] | None:
        """Use up the entry that the other direction left for ``value``, if there is one."""
        if torch.compiler.is_compiling():
            return None
        entry = self._memo
        if entry is None or entry.direction != direction:
            return None
        if self._draws_inverse if direction == _FORWARD else self._draws_forward:
            return None
        asked, answer = (entry.y, entry.x) if direction == _FORWARD else (entry.x, entry.y)
        if asked is not value or not self._is_fresh(entry):
            return None
        self._use_up()
        return answer, entry.aux

    def _use_up(self) -> None:
        if not self._only_own_sample:
            self._memo = None

    def _remember(self, x: Tensor, y: Tensor, aux: Any, direction: str) -> None:
        if torch.compiler.is_compiling():  # asked first, before a tensor or an attribute is touched
            return
        if (self._cache_size == 0 and not self._only_own_sample) or in_functorch():
            return
        _watch_optimisers()
        stamp = self._stamp(x, y)
        self._memo = None if stamp is None else _Entry(x, y, aux, direction, *stamp)

    def _is_fresh(self, entry: _Entry) -> bool:
        if torch.compiler.is_compiling() or in_functorch():
            return False
        if (entry.y if entry.direction == _FORWARD else entry.x).retains_grad:
            return False  # the caller wants the gradient of what it asks about, which the answer's graph bypasses
        stamp = self._stamp(entry.x, entry.y)
        if (
            stamp is not None
            and stamp[0] == entry.flags
            and len(stamp[1]) == len(entry.tensors)
            and all(map(operator.is_, stamp[1], entry.tensors))
        ):
            return True
        self._memo = None
        return False

    def _stamp(self, x: Tensor, y: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]] | None:
        """Return everything an evaluation depends on besides its input, or None where it cannot be known."""
        kept = self._kept
        if kept is None:
            # Walking parameters() costs several times more than reading the dicts of a kept list of modules.
            # Not the layer itself: a cycle would keep every conditioned copy alive until the garbage collector runs.
            modules = tuple(self.modules())
            kept = self._kept = modules[1:], tuple(child for m in modules for child in m._modules.values())
        tensors: list[Tensor | None] = self._foreign_tensors()
        children: list[nn.Module | None] = []
        flags: list[Any] = [torch.is_grad_enabled(), _optimiser_steps]
        if is_any_autocast():
            flags.append(None if x.is_meta else torch.get_autocast_dtype(x.device.type))
        for module in (self, *kept[0]):
            attributes = module.__dict__
            flags.append(attributes["training"])
            tensors += attributes["_parameters"].values()
            tensors += attributes["_buffers"].values()
            if attributes["_modules"]:
                children += attributes["_modules"].values()
            if attributes.get("_pyro_samples"):  # a Bayesian module draws its parameters anew
                return None
        if len(children) != len(kept[1]) or not all(map(operator.is_, children, kept[1])):
            self._kept = None  # a module was exchanged: list them again
            return self._stamp(x, y)
        try:
            flags += x._version, x.requires_grad, y._version, y.requires_grad
            for tensor in tensors:
                if tensor is not None:  # .half() and other swaps of the data bump no version
                    flags += tensor._version, tensor.requires_grad, tensor.data_ptr()
        except RuntimeError:  # inference tensors have no version
            return None
        return tuple(flags), tuple(tensors)

    def _foreign_tensors(self) -> list[Tensor | None]:
        """Return the tensors of transforms inside that are no modules."""
        return []

    def clear_cache(self) -> None:
        """Forget the last evaluation."""
        self._memo = None
        self._kept = None

    def with_cache(self, cache_size: int = 1) -> Bijection:
        """Return a shallow copy with the given cache size; parameters and modules are shared."""
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, but got {cache_size!r}.")
        if cache_size == self._cache_size:
            return self
        new = copy.copy(self)
        new._cache_size = cache_size
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_inv"] = state["_memo"] = state["_kept"] = None
        return state

    # Written out: torch.nn.utils.parametrize makes the __getstate__ of the modules that it changes refuse.
    def __copy__(self) -> Bijection:
        new = type(self).__new__(type(self))
        new.__dict__.update(Bijection.__getstate__(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Bijection:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(Bijection.__getstate__(self), memo))
        return new

    def _apply(self, fn: Any, recurse: bool = True) -> Bijection:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        parts = [] if self.input_dim is None else [str(self.input_dim)]
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        return ", ".join(parts)
