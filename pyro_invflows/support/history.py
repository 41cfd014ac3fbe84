"""The record of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["History"]


@dataclass
class History:
    """The record of a run of :func:`~pyro_invflows.fit`.

    Attributes:
        losses: Mean negative log-likelihood of each step's batch, in nats.
        validation: Mean negative log-likelihood of the held-out rows after each epoch, in nats.
        seconds: Wall-clock time of all epochs, those before a resumption included.
        skipped: Number of steps that were skipped because the loss or a gradient was not finite.
        best_epoch: Index into ``validation`` of the epoch whose parameters were kept; None without held-out rows.
        reason: Why training stopped: ``"max_epochs"``, ``"patience"``, ``"seconds"``, ``"callback"``, ``"not finite"``
            (no step of the last hundred was finite) or ``"no parameters"`` (there was nothing to train).
    """

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0
    best_epoch: int | None = None
    reason: str = ""

    def plot(self, axis: Any = None) -> Any:
        """Draw losses and validation scores over the steps; return the matplotlib axes.

        Args:
            axis: Axes to draw on; by default a new figure's.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("History.plot needs matplotlib: pip install matplotlib.") from error
        axis = plt.subplots(layout="constrained")[1] if axis is None else axis
        count, window = len(self.losses), max(1, len(self.losses) // 200)
        means = [sum(part) / len(part) for i in range(0, count, window) if (part := self.losses[i : i + window])]
        axis.plot([min(window * (i + 1), count) for i in range(len(means))], means, label="training batches")
        epochs = max(len(self.validation), 1)
        steps = [count * (i + 1) / epochs for i in range(len(self.validation))]
        if steps:
            axis.plot(steps, self.validation, label="held-out rows")
        if self.best_epoch is not None:
            axis.plot(steps[self.best_epoch], self.validation[self.best_epoch], "o", label="kept")
        axis.set(xlabel="step", ylabel="negative log-likelihood (nats)")
        axis.legend()
        return axis
