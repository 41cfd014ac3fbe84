"""Shallow copies of layers in which other tensors replace their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_invflows.core.bijection import Bijection

__all__ = ["rebind", "settled"]


def rebind(
    layer: Bijection, values: Mapping[str, Tensor], batch_shapes: Mapping[str, torch.Size] = {}, prefix: str = ""
) -> Bijection:
    """Return a shallow copy in which ``values``, as buffers, replace tensors of the layer and of its parts.

    A copy instead of ``functional_call``, which swaps tensors on the shared layer and so is not thread-safe.

    Args:
        layer: The layer; it is not changed.
        values: Tensors by the names that ``named_parameters()`` and ``named_buffers()`` give them.
        batch_shapes: New batch shapes of layers that receive a value, by their path; the others keep theirs.
        prefix: Path of ``layer`` in the names.
    """
    new = layer.__copy__()  # what copy.copy calls; the compiler cannot trace copy.copy itself
    for registry in ("_parameters", "_buffers", "_modules"):
        new.__dict__[registry] = dict(layer.__dict__[registry])
    new._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
    for name in (*layer._parameters, *layer._buffers):
        if prefix + name in values:
            new._parameters.pop(name, None)
            new._buffers[name] = values[prefix + name]
            new._non_persistent_buffers_set.add(name)
            new._batch_shape = batch_shapes.get(prefix, layer._batch_shape)
    for name, part, _ in layer.named_parts():
        new._modules[name] = rebind(part, values, batch_shapes, f"{prefix}{name}.")
    return new


def settled(module: nn.Module) -> nn.Module:
    """Register every parameter of a module with Pyro now, and replace every ``PyroSample`` by its draw.

    A distribution reads its layers only when it is scored. By then the model has ended: a ``PyroModule`` would not
    register its parameters, and would draw its random ones outside the trace.
    """
    members = [m for m in module.modules() if isinstance(m, PyroModule)]
    for member in members:
        for name in (*member._parameters, *member._pyro_params, *member._modules):
            getattr(member, name)
    return _drawn(module) if any(member._pyro_samples for member in members) else module


def _drawn(module: nn.Module) -> nn.Module:
    new = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        new.__dict__[registry] = dict(module.__dict__[registry])
    if isinstance(module, PyroModule):
        new.__dict__["_pyro_samples"] = {}
        new._buffers.update({name: getattr(module, name) for name in module._pyro_samples})
    new._modules.update({name: _drawn(child) for name, child in module._modules.items() if child is not None})
    return new
