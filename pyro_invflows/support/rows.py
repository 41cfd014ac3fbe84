"""Rows of data to train a distribution on: checks, scores, and rows that are held out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_invflows.support.checks import described, floating_tensor, real_number

__all__ = ["Rows", "device_of", "distribution_of", "held_out", "log_prob", "split"]

#: Number of rows that are checked at once for being in the support.
_CHECKED_ROWS = 65_536


class Rows(NamedTuple):
    """Rows of data, each an event of a distribution, with the context of each."""

    events: Tensor
    context: Tensor | None

    def take(self, index: Tensor, device: torch.device | None = None) -> Rows:
        """Return the rows of these numbers."""
        return Rows(*(None if t is None else t[index.to(t.device)].to(device) for t in self))  # type: ignore[arg-type]

    def checked(self, flow: nn.Module, name: str, context_name: str, like: Rows | None = None) -> Rows:
        """Check that the rows are finite, that they fit the flow and, if given, other rows."""
        conditional = getattr(flow, "is_conditional", None)
        if conditional is not None and conditional != (self.context is not None):
            what = "needs a context: fit(flow, data, context)" if conditional else "takes no context: fit(flow, data)"
            raise ValueError(f"fit: the flow has {'' if conditional else 'no '}conditional parts, so it {what}.")
        for tensor, said in ((self.events, name), (self.context, context_name)):
            if tensor is None:
                continue
            floating_tensor(tensor, said, "fit")
            if tensor.dim() < 1 or not len(tensor):
                raise ValueError(f"fit: {said} must have at least one row, but has the shape {tuple(tensor.shape)}.")
            if len(tensor) != len(self.events):
                raise ValueError(
                    f"fit: {said} must have one row for each of the {len(self.events)} of {name}, but has "
                    f"{len(tensor)}."
                )
            finite = tensor.isfinite().flatten(1).all(-1) if tensor.dim() > 1 else tensor.isfinite()
            if not finite.all():
                bad = (~finite).nonzero().flatten().tolist()
                numbers = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
                raise ValueError(
                    f"fit: the rows must be finite, but {len(bad)} of {len(tensor)} of {said} hold NaN or infinity "
                    f"(numbers {numbers}). Leave them out, or fill in their values."
                )
        if like is not None:
            self._check_alike(like, name, context_name)
        device = device_of(flow, self.events.device)
        with torch.no_grad():
            distribution = distribution_of(flow, None if self.context is None else self.context[:1].to(device))
        self._check_events(distribution, name)
        self._check_support(distribution, name, device)
        return Rows(*(None if t is None else t.detach() for t in self))  # type: ignore[arg-type]

    def _check_alike(self, like: Rows, name: str, context_name: str) -> None:
        for own, other, said in zip(self, like, (name, context_name), strict=True):
            if own is None or other is None:
                continue
            if own.shape[1:] != other.shape[1:]:
                raise ValueError(
                    f"fit: {said} must have the shape {_shape('M', other.shape[1:])}, as those to train on, but got "
                    f"{tuple(own.shape)}."
                )
            if own.dtype != other.dtype:
                raise ValueError(f"fit: {said} must be {other.dtype}, as those to train on, but got {own.dtype}.")

    def _check_events(self, distribution: Any, name: str) -> None:
        batch, event = (tuple(getattr(distribution, f"{kind}_shape", ())) for kind in ("batch", "event"))
        if any(size != 1 for size in batch):
            raise ValueError(
                f"fit: the flow must return one distribution for a row, but its batch shape is {batch}. If these are "
                f"the elements of an event, build the flow on base.to_event({len(batch)})."
            )
        if tuple(self.events.shape[1:]) != event:
            raise ValueError(
                f"fit: {name} must have the shape {_shape('N', event)}, N events of the flow, but got "
                f"{tuple(self.events.shape)}."
            )

    def _check_support(self, distribution: Any, name: str, device: torch.device) -> None:
        """Check that the density is not zero, because rows are scored without validation."""
        if not isinstance(distribution, Distribution):
            return
        with contextlib.suppress(NotImplementedError):  # some distributions do not know their support
            support: Any = distribution.support
            inside = [support.check(part.to(device)).cpu() for part in self.events.split(_CHECKED_ROWS)]
            outside = ~torch.cat([mask.flatten(1).all(-1) if mask.dim() > 1 else mask for mask in inside])
            if outside.any():
                bad = outside.nonzero().flatten()
                raise ValueError(
                    f"fit: the rows must lie in the support of the flow, {support}, but {len(bad)} of "
                    f"{len(outside)} of {name} do not, such as number {int(bad[0])}."
                )


def _shape(count: str, event: Sequence[int]) -> str:
    """Write the shape of so many events."""
    return f"({count}, {', '.join(map(str, event))})" if event else f"({count},)"


def held_out(validation: Any, conditional: bool) -> Rows | float:
    """Return the fraction, or the rows that were given."""
    if isinstance(validation, Tensor) and validation.dim():
        validation = (validation, None)
    if isinstance(validation, (tuple, list)) and validation:
        if len(validation) != 2 or (validation[1] is not None) != conditional:
            wanted = (
                "a pair (rows, contexts), because the flow is" if conditional else "rows alone, because the flow is not"
            )
            raise ValueError(
                f"fit: validation must be a fraction or {wanted} conditional, but got "
                f"{'rows alone' if validation[-1] is None else f'{len(validation)} items'}."
            )
        return Rows(*validation)
    if isinstance(validation, (int, float)):
        fraction = real_number(validation, "validation", "fit")
    else:
        raise TypeError(
            f"fit: validation must be a fraction, or held-out rows as tensors, but got {described(validation)}"
        )
    if not 0 <= fraction < 1:
        raise ValueError(f"fit: validation must be a fraction in [0, 1), or held-out rows, but got {validation!r}.")
    return fraction


def split(rows: Rows, validation: Rows | float, generator: torch.Generator) -> tuple[Rows, Rows | None]:
    """Return the rows to train on and those to validate with."""
    if isinstance(validation, Rows):
        return rows, validation
    if not validation:
        return rows, None
    count = max(1, round(validation * len(rows.events)))
    if count >= len(rows.events):
        raise ValueError(
            f"fit: {validation:g} of {len(rows.events)} rows leaves none to train on. Give more rows, or validation=0."
        )
    order = torch.randperm(len(rows.events), generator=generator)
    return rows.take(order[count:]), rows.take(order[:count])


def device_of(flow: nn.Module, default: torch.device) -> torch.device:
    """Return the device of a flow's parameters, or else of its buffers."""
    return next((t.device for t in itertools.chain(flow.parameters(), flow.buffers())), default)


def distribution_of(flow: nn.Module, context: Tensor | None) -> Any:
    """Return the distribution that a flow returns."""
    return flow() if context is None else flow(context)


def log_prob(flow: nn.Module, rows: Rows) -> Tensor:
    """Return the log-densities of rows. Without validation: a flow that diverges gives NaN instead of an error."""
    distribution = distribution_of(flow, rows.context)
    with _unvalidated(distribution):
        return distribution.log_prob(rows.events)


@contextlib.contextmanager
def _unvalidated(distribution: Any) -> Iterator[None]:
    """Switch off the validation of a distribution, and of those that it is built on."""
    inner: list[Any] = [distribution] if isinstance(distribution, Distribution) else []
    while inner and isinstance(getattr(inner[-1], "base_dist", None), Distribution):
        inner.append(inner[-1].base_dist)
    before = [d._validate_args for d in inner]
    for d in inner:
        d._validate_args = False
    try:
        yield
    finally:
        for d, value in zip(inner, before, strict=True):
            d._validate_args = value
