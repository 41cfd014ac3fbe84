"""Rows of data to train a distribution on: checks, and rows that are held out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_invflows.support.checks import floating_tensor, real_number

__all__ = ["Rows", "distribution_of", "held_out", "split"]


class Rows(NamedTuple):
    """Rows of data, with the context of each."""

    data: Tensor
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
        for tensor, said in ((self.data, name), (self.context, context_name)):
            if tensor is None:
                continue
            floating_tensor(tensor, said, "fit")
            if tensor.dim() < 1 or not len(tensor):
                raise ValueError(f"fit: {said} must have at least one row, but has the shape {tuple(tensor.shape)}.")
            if len(tensor) != len(self.data):
                raise ValueError(
                    f"fit: {said} must have one row for each of the {len(self.data)} of {name}, but has {len(tensor)}."
                )
            finite = tensor.isfinite().flatten(1).all(-1) if tensor.dim() > 1 else tensor.isfinite()
            if not finite.all():
                bad = (~finite).nonzero().flatten().tolist()
                numbers = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
                raise ValueError(
                    f"fit: the rows must be finite, but {len(bad)} of {len(tensor)} of {said} hold NaN or infinity "
                    f"(numbers {numbers}). Leave them out, or fill in their values."
                )
        self._check_shapes(flow, name, context_name, like)
        return self

    def _check_shapes(self, flow: nn.Module, name: str, context_name: str, like: Rows | None) -> None:
        if like is not None:
            for own, other, said in zip(self, like, (name, context_name), strict=True):
                if own is not None and other is not None and own.shape[1:] != other.shape[1:]:
                    raise ValueError(
                        f"fit: {said} must have the shape (M, {', '.join(map(str, other.shape[1:]))}), as those to "
                        f"train on, but got {tuple(own.shape)}."
                    )
            return
        device = next((t.device for t in flow.parameters()), self.data.device)
        with torch.no_grad():
            first = None if self.context is None else self.context[:1].to(device)
            event = tuple(distribution_of(flow, first).event_shape)
        if tuple(self.data.shape[1:]) != event:
            raise ValueError(
                f"fit: {name} must have the shape (N, {', '.join(map(str, event))}), N events of the flow, but got "
                f"{tuple(self.data.shape)}."
            )


def held_out(validation: Any, conditional: bool) -> Rows | float:
    """Return the fraction, or the rows that were given."""
    if isinstance(validation, Tensor) and validation.dim():
        validation = (validation, None)
    if isinstance(validation, (tuple, list)):
        if len(validation) != 2 or (validation[1] is not None) != conditional:
            wanted = (
                "a pair (rows, contexts), because the flow is" if conditional else "rows alone, because the flow is not"
            )
            raise ValueError(
                f"fit: validation must be a fraction or {wanted} conditional, but got "
                f"{'rows alone' if validation[-1] is None else f'{len(validation)} items'}."
            )
        return Rows(*validation)
    fraction = real_number(validation, "validation", "fit")
    if not 0 <= fraction < 1:
        raise ValueError(f"fit: validation must be a fraction in [0, 1), or held-out rows, but got {validation!r}.")
    return fraction


def split(rows: Rows, validation: Rows | float, generator: torch.Generator) -> tuple[Rows, Rows | None]:
    """Return the rows to train on and those to validate with."""
    if isinstance(validation, Rows):
        return rows, validation
    if not validation:
        return rows, None
    count = max(1, round(validation * len(rows.data)))
    if count >= len(rows.data):
        raise ValueError(
            f"fit: {validation:g} of {len(rows.data)} rows leaves none to train on. Give more rows, or validation=0."
        )
    order = torch.randperm(len(rows.data), generator=generator)
    return rows.take(order[count:]), rows.take(order[:count])


def distribution_of(flow: nn.Module, context: Tensor | None) -> Any:
    """Return the distribution that a flow returns."""
    return flow() if context is None else flow(context)
