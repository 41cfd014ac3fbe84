"""Conformance checks for any transform: one of this library, of yours or of anyone else.

:func:`check_bijection` runs all of them and raises a readable :class:`BrokenPromiseError` that names the promise. Each
check can also be called alone. They compare results with independent answers (an autodiff Jacobian, finite differences,
fresh clones), never with the transform's own cache.
"""

from __future__ import annotations

import copy
import io
import operator
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.distributions import Transform, biject_to

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.one_pass import call_and_ladj, inv_and_ladj
from pyro_invflows.support.checks import is_int

__all__ = [
    "BrokenPromiseError",
    "check_batch",
    "check_bijection",
    "check_copies",
    "check_fresh_data",
    "check_gradients",
    "check_log_det",
    "check_round_trip",
    "check_shapes",
    "jacobian_log_det",
    "sample_domain",
]


class BrokenPromiseError(AssertionError):
    """A transform does not do what an invertible layer promises."""


def sample_domain(
    transform: Transform,
    batch_shape: Iterable[int] = (3,),
    *,
    event_shape: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw points from a transform's domain: standard normal draws, mapped into it by ``biject_to``.

    The points are on the device of the transform's first parameter.

    Args:
        transform: Any transform.
        batch_shape: Shape of the batch.
        event_shape: Shape of one event; by default inferred from the transform (``trace_event`` or ``input_dim``).
        dtype: Dtype of the points; by default that of the first parameter, else float64.
        generator: Source of randomness; by default torch's global CPU generator.

    Raises:
        ValueError: if the event shape cannot be inferred.
    """
    event_dim = transform.domain.event_dim
    if event_shape is None:
        sizes = transform.trace_event({}) if isinstance(transform, Bijection) else {}
        input_dim: Any = getattr(transform, "input_dim", None)  # Pyro's layers
        if not sizes and event_dim < 2 and is_int(input_dim):
            sizes = {-1: operator.index(input_dim)}
        if not all(axis in sizes for axis in range(-event_dim, 0)):
            raise ValueError(
                f"The event shape of {type(transform).__name__} cannot be inferred; pass event_shape, or points x."
            )
        axes = range(min(sizes, default=0), 0) if event_dim == 0 else range(-event_dim, 0)
        event_shape = [sizes.get(axis, 1) for axis in axes]
    first = next(_parameters(transform), None)
    if dtype is None:
        dtype = torch.float64 if first is None else first.dtype
    # independent of the default device
    source = torch.device("cpu") if generator is None else generator.device
    noise = torch.randn((*batch_shape, *event_shape), dtype=torch.float64, generator=generator, device=source)
    return biject_to(transform.domain)(noise if first is None else noise.to(first.device)).to(dtype)


def jacobian_log_det(function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Return ``log|det|`` of the autodiff Jacobian of ``function`` at each event of ``x``.

    Events are taken one at a time, with an unbatched factorisation each, so the result does not depend on batching.
    With ``event_dim=0``, one randomly weighted sum gives the derivatives of all elements; if an output depends on more
    than its own input, they come out wrong.
    """
    if event_dim == 0:
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf)
        weights = torch.rand_like(y) + 0.5
        return (torch.autograd.grad((weights * y).sum(), leaf)[0] / weights).abs().log()
    batch = x.shape[: x.dim() - event_dim]
    out = [
        torch.linalg.slogdet(_jacobian(function, event))[1]
        for event in x.detach().reshape(-1, *x.shape[x.dim() - event_dim :])
    ]
    return torch.stack(out).reshape(batch) if out else x.new_zeros(batch)


def _jacobian(function: Callable[[Tensor], Tensor], event: Tensor) -> Tensor:
    event = event.clone().requires_grad_()
    y = function(event)
    rows = []
    for i in range(y.numel()):
        (row,) = torch.autograd.grad(y.reshape(-1)[i], event, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(event).reshape(-1) if row is None else row.reshape(-1))
    return torch.stack(rows)


def check_shapes(transform: Transform, x: Tensor) -> None:
    """y, x and log-det have the shapes, dtype, device and range that the transform promises."""
    y = transform(x)
    back = transform.inv(y.clone())
    ladj = transform.log_abs_det_jacobian(x, y)
    batch = y.shape[: y.dim() - transform.codomain.event_dim]
    for what, said, shape in (
        ("forward_shape", transform.forward_shape(x.shape), y.shape),
        ("inverse_shape", transform.inverse_shape(y.shape), back.shape),
        ("the batch shape of the log-det", batch, ladj.shape),
    ):
        _promise(said == shape, transform, "shapes", f"{what} is {tuple(said)}, but the value has {tuple(shape)}")
    for what, value in (("y", y), ("x", back), ("the log-det", ladj)):
        same = value.dtype == x.dtype and value.device == x.device
        kind = f"{value.dtype} on {value.device}"
        _promise(same, transform, "dtype and device", f"the input is {x.dtype} on {x.device}, but {what} is {kind}")
    outside = ~transform.codomain.check(y)
    count = int(outside.sum())
    _promise(not count, transform, "codomain", f"{count} of {outside.numel()} outputs outside {transform.codomain}")


def check_round_trip(transform: Transform, x: Tensor, *, atol: float | None = None, rtol: float | None = None) -> None:
    """The inverse works on data that the layer did not just produce, both ways round.

    If x cannot be recovered to the tolerance because the map is ill-conditioned, the residual in y must be at rounding
    level instead. In float64 this exception is not made, or a map that is not one-to-one would pass.
    """
    atol, rtol = _tolerances(x, atol, rtol)
    y = transform(x).detach().clone()
    try:
        back = transform.inv(y)
    except (KeyError, NotImplementedError) as error:
        raise _broken(transform, "inverse", f"cannot invert data that it did not just produce: {error!r}") from error
    if back.shape != x.shape:
        raise _broken(transform, "round trip", f"inv(f(x)) has the shape {tuple(back.shape)}, x has {tuple(x.shape)}")
    again = transform(back.detach().clone())
    scale = _largest(y)
    _close(transform, "round trip", "f(inv(y)) - y", again, y, (atol + rtol * scale, 0.0))
    # If the map is ill-conditioned in low precision, no method can recover x better than the rounding of y allows.
    rounding = 64 * torch.finfo(y.dtype).eps * (1 + scale)
    if y.dtype == torch.float64 or not _largest(again - y) <= rounding:
        _close(transform, "round trip", "inv(f(x)) - x", back, x, (atol, rtol))


def check_log_det(transform: Transform, x: Tensor, *, atol: float | None = None, rtol: float | None = None) -> None:
    """The log-det equals that of the autodiff Jacobian, in both directions and in the one-pass functions."""
    tolerances = _tolerances(x, atol, rtol)
    event_dim = transform.domain.event_dim
    if transform(x).numel() != x.numel():
        raise ValueError(
            f"{type(transform).__name__} changes the number of elements of an event, so it has no square Jacobian to "
            "compare with; call the other checks one by one."
        )

    def fresh(event: Tensor) -> Tensor:
        return _fresh(transform)(event)

    y = transform(x).detach()
    one_y, one = call_and_ladj(transform, x.clone())
    back, inverse = inv_and_ladj(transform, y.clone())
    expected = jacobian_log_det(fresh, x, event_dim)
    separate = transform.log_abs_det_jacobian(x.clone(), y.clone())
    for what, actual, wanted in (
        ("log-det - Jacobian's", separate, expected),
        ("call_and_ladj - Jacobian's", one, expected),
        ("call_and_ladj's y - f(x)", one_y, y),
        ("inv_and_ladj + Jacobian's", inverse, -jacobian_log_det(fresh, back, event_dim)),
        ("inv_and_ladj's x - inv(y)", back, transform.inv(y.clone())),
    ):
        _close(transform, "log-det", what, actual, wanted, tolerances)


def check_gradients(transform: Transform, x: Tensor) -> None:
    """Gradients reach input and parameters in both directions, and (in float64) agree with finite differences."""
    parameters = [p for p in _parameters(transform) if p.requires_grad and p.numel()]
    names = ["the input", *_parameter_names(transform, parameters)]
    y = transform(x).detach()
    for way, start, run in (("log_prob", y, inv_and_ladj), ("rsample", x, call_and_ladj)):
        leaf = start.clone().requires_grad_()
        out, ladj = run(transform, leaf)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
        loss = (weights * out * out).sum() + ladj.sum()
        grads = torch.autograd.grad(loss, [leaf, *parameters], allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is None or not grad.isfinite().all():
                state = "no gradient reaches" if grad is None else "the gradient is not finite for"
                raise _broken(transform, "gradients", f"{state} {name} through {way}")
    if x.dtype != torch.float64:
        return
    for what, start, run in (("the forward map", x, call_and_ladj), ("the inverse", y, inv_and_ladj)):
        # gradcheck perturbs the parameters in place, so the function need not take them; fast_mode tries one random
        # direction, which keeps the cost independent of the number of parameters.
        inputs = (start.clone().requires_grad_(), *parameters)
        try:
            torch.autograd.gradcheck(
                lambda v, *_, r=run: r(transform, v.clone()), inputs, atol=1e-6, rtol=1e-5, fast_mode=True
            )
        except GradcheckError as error:
            raise _broken(transform, "gradients", f"gradcheck of {what} fails: {error}") from error


def check_copies(transform: Transform, x: Tensor) -> None:
    """After use, a transform can be copied, pickled and saved; copies share nothing, and the size has not changed."""
    size = _saved_size(transform)
    y = transform(x)
    if y.requires_grad:
        y.sum().backward()
    for p in _parameters(transform):
        p.grad = None
    transform.inv(y)
    reference = transform(x.clone()).detach()
    try:
        twins = {"deepcopy": copy.deepcopy(transform), "pickle": pickle.loads(pickle.dumps(transform))}
    except Exception as error:
        raise _broken(transform, "copies", f"cannot be copied after use: {error!r}") from error
    own = {p.data_ptr() for p in _parameters(transform) if p.numel()}
    for how, twin in twins.items():
        same = torch.equal(twin(x.clone()), reference)
        _promise(same, transform, "copies", f"a {how} computes different values")
        shared = own & {p.data_ptr() for p in _parameters(twin) if p.numel()}
        _promise(not shared, transform, "copies", f"a {how} shares parameters")
    grown = _saved_size(transform)
    _promise(grown == size, transform, "copies", f"its saved size grows from {size} to {grown} bytes through use")
    if isinstance(transform, nn.Module):
        buffer = io.BytesIO()
        torch.save(transform.state_dict(), buffer)
        buffer.seek(0)
        twins["deepcopy"].load_state_dict(torch.load(buffer, weights_only=True))
        try:
            hash(transform)
        except TypeError as error:
            raise _broken(transform, "copies", f"it is not hashable: {error}") from error
    _promise(type(transform).__name__ in repr(transform), transform, "copies", f"its repr is {transform!r}")


def check_fresh_data(transform: Transform, x: Tensor) -> None:
    """Results follow the current data and parameters, whatever a cache holds."""
    parameters = [p for p in _parameters(transform) if p.requires_grad and p.numel()]
    if parameters:
        _check_fresh_parameters(transform, x, parameters)
    with torch.no_grad():
        sample = transform(x)
        other = transform(x.flip(0).clone()).clone() if x.dim() else sample.clone()
        sample.copy_(other)
        back, expected = transform.inv(sample), transform.inv(other)
    same = torch.allclose(back, expected, rtol=1e-4, atol=1e-4)
    _promise(same, transform, "fresh data", "a sample edited in place inverts to the point it came from before")


def _check_fresh_parameters(transform: Transform, x: Tensor, parameters: list[Tensor]) -> None:
    y = transform(x).detach().clone()
    try:
        for _ in range(2):
            back = transform.inv(y)
            (back.sum() + transform.log_abs_det_jacobian(back, y).sum()).backward()
    except RuntimeError as error:
        raise _broken(transform, "fresh data", f"cannot train twice on the same tensor: {error}") from error
    for p in parameters:
        p.grad = None
    with torch.no_grad():
        transform(x)
    kept_graph = transform(x).requires_grad
    _promise(kept_graph, transform, "fresh data", "a call under no_grad leaves the next one without gradient")
    old = [p.detach().clone() for p in parameters]
    transform(x)
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 + 0.1 * torch.rand_like(p))
        after, expected = transform(x).detach(), _fresh(transform)(x.clone()).detach()
        same = torch.equal(after, expected)
        _promise(same, transform, "fresh data", "the same input gives the old output after a change of parameters")
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, old, strict=True):
                p.copy_(value)


def check_batch(transform: Transform, x: Tensor) -> None:
    """A row's result does not depend on the rest of its batch; scoring changes neither the state nor the data."""
    state = {k: v.clone() for k, v in transform.state_dict().items()} if isinstance(transform, nn.Module) else {}
    given = x.clone()
    y = transform(given).detach()
    _promise(torch.equal(given, x), transform, "batch", "a call writes to the x that it was given")
    atol, rtol = _tolerances(x, None, None)
    tolerances = atol + rtol * _largest(y), rtol
    given = y.clone()
    together, ladj = inv_and_ladj(transform, given)
    _promise(torch.equal(given, y), transform, "batch", "scoring writes to the data that it was given")
    for i in range(y.shape[0] if y.dim() > transform.codomain.event_dim else 0):
        alone, ladj_alone = inv_and_ladj(transform, y[i : i + 1].clone())
        _close(transform, "batch", f"row {i} in its batch - alone", together[i : i + 1], alone, tolerances)
        _close(transform, "batch", f"log-det of row {i} in its batch - alone", ladj[i : i + 1], ladj_alone, tolerances)
    now = transform.state_dict() if isinstance(transform, nn.Module) else {}
    for name, value in state.items():
        same = torch.equal(value, now[name])
        _promise(same, transform, "batch", f"scoring changed {name}")


def check_bijection(
    transform: Transform,
    x: Tensor | None = None,
    *,
    event_shape: Iterable[int] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """Check that a transform keeps every promise of an invertible layer.

    Run this at parameters far from their initial values: near the identity, much is right by accident.

    Args:
        transform: Any torch transform. Parameters keep their values; their gradients are cleared.
        x: Points of its domain ``(*B, *E)`` with at least one batch dimension; by default three random ones.
        event_shape: Shape of one event, for random points of a transform from which it cannot be inferred.
        atol: Absolute tolerance of round trips and log-dets; default 1e-9 in float64, 1e-4 in float32.
        rtol: Relative tolerance; default likewise.
        seed: Seed of the random points; torch's global generator is left unchanged.

    Raises:
        BrokenPromiseError: if a promise is broken; it names the promise, the transform and the numbers.
        TypeError: if ``transform`` is not a torch ``Transform``.
        ValueError: if there are no points; if the layer was conditioned on a batch of contexts, or carries their graph.

    Example:
        >>> check_bijection(Baird((4,)))
        >>> from pyro.distributions.transforms import Planar
        >>> check_bijection(Planar(4))
        Traceback (most recent call last):
        ...
        pyro_invflows.testing.BrokenPromiseError: Planar breaks the promise 'inverse': ...
    """
    if not isinstance(transform, Transform):
        raise TypeError(f"check_bijection needs a torch Transform, but got {type(transform).__name__}.")
    if _is_conditioned(transform):
        raise ValueError(
            f"check_bijection needs a layer whose tensors are leaves without batch dimensions, but this "
            f"{type(transform).__name__} was conditioned on a context. Condition it on a single context, under "
            "torch.no_grad()."
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        if x is None:
            x = sample_domain(transform, event_shape=event_shape)
        if not x.numel():
            raise ValueError(f"check_bijection needs at least one point, but x has the shape {tuple(x.shape)}.")
        check_round_trip(transform, x, atol=atol, rtol=rtol)
        try:
            check_shapes(transform, x)
        except NotImplementedError as error:
            raise _broken(transform, "log-det", f"it has none: {error!r}") from error
        check_log_det(transform, x, atol=atol, rtol=rtol)
        check_gradients(transform, x)
        check_fresh_data(transform, x)
        check_batch(transform, x)
        check_copies(transform, x)


# ---------------------------------------------------------------------- helpers


def _is_conditioned(transform: Transform) -> bool:
    """Whether a layer was conditioned on a batch of contexts, or carries their graph."""
    if not isinstance(transform, torch.nn.Module):
        return False
    tensors = (*transform.parameters(), *transform.buffers())
    return any(t.grad_fn for t in tensors) or any(getattr(m, "_batch_shape", ()) for m in transform.modules())


def _fresh(transform: Transform) -> Transform:
    """Return the transform with an empty cache."""
    if hasattr(transform, "clear_cache"):
        transform.clear_cache()
        return transform
    try:
        return copy.deepcopy(transform)
    except RuntimeError:  # a foreign cache that cannot be copied
        return transform


def _parameters(transform: Transform) -> Iterator[Tensor]:
    if isinstance(transform, nn.Module):
        yield from transform.parameters()


def _parameter_names(transform: Transform, parameters: list[Tensor]) -> list[str]:
    names = {id(p): n for n, p in transform.named_parameters()} if isinstance(transform, nn.Module) else {}
    return [names[id(p)] for p in parameters]


def _saved_size(transform: Transform) -> int:
    buffer = io.BytesIO()
    try:
        torch.save(transform, buffer)
    except Exception as error:
        raise _broken(transform, "copies", f"torch.save fails: {error!r}") from error
    return buffer.getbuffer().nbytes


def _tolerances(x: Tensor, atol: float | None, rtol: float | None) -> tuple[float, float]:
    default = 1e-9 if x.dtype == torch.float64 else 1e-4
    return (default if atol is None else atol), (default if rtol is None else rtol)


def _largest(value: Tensor) -> float:
    return value.detach().abs().max().item() if value.numel() else 0.0


def _close(
    transform: Transform, promise: str, what: str, actual: Tensor, expected: Tensor, tolerances: tuple[float, float]
) -> None:
    shapes = f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    _promise(actual.shape == expected.shape, transform, promise, shapes)
    atol, rtol = tolerances
    error = (actual.detach() - expected.detach()).abs()
    bad = ~(error <= atol + rtol * expected.detach().abs())
    if bad.any():
        raise _broken(
            transform,
            promise,
            f"|{what}| reaches {error[bad].max().item():.3g} (allowed {atol:.1g} + {rtol:.1g} relative) in "
            f"{int(bad.sum())} of {bad.numel()} elements",
        )


def _promise(kept: bool, transform: Transform, promise: str, what: str) -> None:
    if not kept:
        raise _broken(transform, promise, what)


def _broken(transform: Transform, promise: str, what: str) -> BrokenPromiseError:
    return BrokenPromiseError(f"{type(transform).__name__} breaks the promise '{promise}': {what}.")
