"""The memo: one remembered evaluation per layer, which calls it may answer, and when it is stale.

torch and Pyro ask for ``t.inv(y)`` and ``t.log_abs_det_jacobian(x, y)`` in separate calls, and variational inference
scores the sample it just drew. Without a memo each step would evaluate every network again. The memo is only ever a
cache: no result depends on whether it was warm.

A layer holds one immutable entry in its attribute ``_memo``. Each look-up reads the attribute once, so that a second
thread can cause a miss at worst. The entry may answer a call in the opposite direction and the log-det, for the very
same tensor objects, as long as its stamp is current: the stamp holds everything that an evaluation depends on besides
its input.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_invflows.support.modes import in_functorch, is_any_autocast, saves_through_hooks

__all__ = ["FORWARD", "INVERSE", "Entry", "is_fresh", "new_entry", "recall", "recall_pair", "remember"]

FORWARD, INVERSE = "forward", "inverse"


class Stamp(NamedTuple):
    """Everything that an evaluation depends on besides its input."""

    flags: tuple[Any, ...]
    # held as objects, not as ids: an id can be reused once its tensor is gone
    tensors: tuple[Tensor | None, ...]


class Entry(NamedTuple):
    """One evaluation."""

    x: Tensor
    y: Tensor
    aux: Any
    direction: str
    answers: bool
    stamp: Stamp


def recall(layer: Any, value: Tensor, direction: str) -> Entry | None:
    """Return the entry that answers a call on ``value`` in ``direction``, or None."""
    if torch.compiler.is_compiling():  # checked first, before a tensor or an attribute is touched
        return None
    entry = layer._memo
    if entry is None or entry.direction == direction or not entry.answers:
        return None
    if (entry.x if direction == FORWARD else entry.y) is not value:
        return None
    if is_fresh(layer, entry):
        return entry
    layer._memo = None
    return None


def recall_pair(layer: Any, x: Tensor, y: Tensor) -> Entry | None:
    """Return the entry of the pair, whichever of the two was computed from the other, or None."""
    if torch.compiler.is_compiling():
        return None
    entry = layer._memo
    if entry is None or entry.x is not x or entry.y is not y:
        return None
    if is_fresh(layer, entry):
        return entry
    layer._memo = None
    return None


def remember(layer: Any, x: Tensor, y: Tensor, aux: Any, direction: str, answers: bool = True) -> None:
    """Remember an evaluation.

    Args:
        layer: The layer that was evaluated.
        x: The input of its forward map.
        y: The output of its forward map.
        aux: What its log-det needs.
        direction: ``FORWARD`` if y was computed from x, ``INVERSE`` if x was computed from y.
        answers: Whether the entry may answer a call in the opposite direction, and not only the log-det.
    """
    if torch.compiler.is_compiling():
        return
    if layer._cache_size:
        layer._memo = new_entry(layer, x, y, aux, direction, answers)


def new_entry(layer: Any, x: Tensor, y: Tensor, aux: Any, direction: str, answers: bool = True) -> Entry | None:
    """Return a stamped entry, or None if one could not tell when it is stale."""
    if torch.compiler.is_compiling() or in_functorch() or saves_through_hooks():
        return None
    if _optimiser_steps is None:
        _watch_optimisers()
    stamp = _stamp(layer, x, y)
    return None if stamp is None else Entry(x, y, aux, direction, answers, stamp)


def is_fresh(layer: Any, entry: Entry) -> bool:
    """Whether evaluating again would give the same result."""
    if torch.compiler.is_compiling() or in_functorch() or saves_through_hooks():
        return False
    if (entry.y if entry.direction == FORWARD else entry.x).retains_grad:
        return False  # the caller wants the gradient of this tensor, which the graph of the entry bypasses
    stamp = _stamp(layer, entry.x, entry.y)
    return (
        stamp is not None
        and stamp.flags == entry.stamp.flags
        and len(stamp.tensors) == len(entry.stamp.tensors)
        and all(map(operator.is_, stamp.tensors, entry.stamp.tensors))
    )


def _stamp(layer: Any, x: Tensor, y: Tensor) -> Stamp | None:
    """Return the current stamp, or None if it cannot be determined."""
    if layer.opaque:
        return None
    kept = layer._kept
    if kept is None:
        # Walking parameters() costs several times more than reading the dicts of a kept list of modules.
        # Without the layer itself: a cycle would keep every conditioned copy alive until the garbage collector runs.
        modules = tuple(layer.modules())
        kept = layer._kept = modules[1:], tuple(child for m in modules for child in m._modules.values())
    tensors: list[Tensor | None] = []
    children: list[nn.Module | None] = []
    flags: list[Any] = [torch.is_grad_enabled(), _optimiser_steps]
    if is_any_autocast():
        flags.append(None if x.is_meta else torch.get_autocast_dtype(x.device.type))
    for module in (layer, *kept[0]):
        attributes = module.__dict__
        flags.append(attributes["training"])
        if own := attributes["_parameters"]:
            tensors += own.values()
        if own := attributes["_buffers"]:
            tensors += own.values()
        if own := attributes["_modules"]:
            children += own.values()
        if attributes.get("_pyro_samples"):  # Bayesian: it draws its parameters anew in each evaluation
            return None
    if len(children) != len(kept[1]) or not all(map(operator.is_, children, kept[1])):
        layer._kept = None  # a module was replaced: list them again
        return _stamp(layer, x, y)
    try:
        flags += x._version, x.requires_grad, y._version, y.requires_grad
        for tensor in tensors:
            if tensor is not None:  # .half() and other swaps of the data do not bump the version
                flags += tensor._version, tensor.requires_grad, tensor.data_ptr()
    except RuntimeError:  # inference tensors have no version
        return None
    return Stamp(tuple(flags), tuple(tensors))


_optimiser_steps: int | None = None


def _watch_optimisers() -> None:
    """Count the steps of all optimisers from now on.

    Fused ones, and several of Pyro's, change parameters without a new tensor version.
    """
    global _optimiser_steps
    _optimiser_steps = 0
    register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _optimiser_steps
    _optimiser_steps += 1  # type: ignore[operator]
