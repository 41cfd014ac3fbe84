"""Maximum likelihood: a loop over ``-flow(context).log_prob(x)`` with early stopping, and a record of what it saw."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_invflows.core.faults import first_fault
from pyro_invflows.support.checks import positive_int, positive_number, real_number
from pyro_invflows.support.optimisers import decaying_adam, default_decay
from pyro_invflows.support.ranks import Ranks
from pyro_invflows.support.rows import Rows, distribution_of, held_out, split

__all__ = ["History", "fit"]

#: Number of rows from which layers are initialised, at most.
_INITIAL_ROWS = 65_536
#: Rows scored at once on held-out data.
_SCORED_ROWS = 4096
#: Training is given up after so many steps in a row that were not finite; sooner if none ever was.
_LOST, _NEVER = 100, 10


@dataclass
class History:
    """The record of a run of :func:`fit`.

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


def fit(
    flow: nn.Module,
    data: Tensor,
    context: Tensor | None = None,
    *,
    validation: float | Tensor | tuple[Tensor, Tensor] = 0.1,
    batch_size: int = 512,
    learning_rate: float = 5e-3,
    max_epochs: int = 100,
    seconds: float | None = None,
    patience: int | None = 20,
    clip: float | None = 5.0,
    weight_decay: float | None = None,
    averaging: float = 0.995,
    initialize: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callback: Callable[[History], Any] | None = None,
    generator: torch.Generator | None = None,
) -> History:
    r"""Train a flow by maximum likelihood, in place.

    It minimises the mean of ``-flow(context).log_prob(data)`` with AdamW, a learning rate that falls as a half cosine
    over the whole run, clipped gradients and an exponential moving average of the parameters. After each epoch the
    averaged parameters are scored on held-out rows. At the end the flow holds those with the best score; if training is
    interrupted (Ctrl-C), it holds the best ones so far.

    If ``torch.distributed`` is initialised, every process calls ``fit`` with the same data. Each takes its share of the
    rows of every batch; gradients and scores are summed over all processes, so that the result is that of one process
    with the whole batch. Process 0 sets the parameters at the start, the seed and the clock, and writes the checkpoint.
    A flow in ``DistributedDataParallel`` averages its gradients itself.

    Args:
        flow: A :class:`~pyro_invflows.Flow`, or any module that returns a distribution when it is called, with the
            context if there is one.
        data: Rows ``(N, *E)``, where E is an event of the flow. They may stay on another device than the flow; batches
            are copied.
        context: ``(N, context_dim)``, if the flow is conditional.
        validation: Fraction of the rows to hold out, or held-out rows ``(M, *E)`` (with a context, a pair of rows and
            contexts). With 0, nothing is held out; the parameters are those of the last step, averaged.
        batch_size: Number of rows per step, over all processes. Rows that do not fill a batch are left out; these
            differ from epoch to epoch.
        learning_rate: Initial learning rate.
        max_epochs: Maximum number of passes through the data.
        seconds: Maximum time of the training; if it is reached before the last epoch, the learning rate falls over this
            time instead.
        patience: Number of epochs without a better score after which training stops; None for no early stopping.
        clip: Maximum norm of all gradients together; larger gradients are scaled down. None for no clipping.
        weight_decay: Decay of the weights of all dense and convolutional layers (of no other parameters), which
            prevents overfitting when there are few rows. By default ``(11000 / N) ** 2`` for N rows to train on, at
            most 1, so that it matters below about 20 000 rows.
        averaging: Decay of the moving average, per step; 0 for none. It starts lower, so that the first steps fade.
        initialize: Whether to call ``flow.initialize`` first, if the flow has that method, with at most 65 536 of the
            rows. False continues the training of a flow.
        checkpoint: File that receives the whole state after each epoch. If it exists, the run goes on from there: on
            one process, bit for bit as if it had never stopped. This also sets torch's global generator of the CPU.
        progress: Whether to show a progress bar, where tqdm is installed.
        callback: Called after each epoch with the :class:`History` so far; training stops if it returns something true.
        generator: Source of the seed for the split and for the order of the rows; default torch's global generator.

    Returns:
        The record of the run: losses, validation scores, seconds, and the reason why training stopped.

    Raises:
        TypeError: if data are not floating point tensors.
        ValueError: if rows are not finite; if data, context and held-out rows do not fit each other or the flow; if a
            setting is out of range; if the checkpoint is that of another run; or if the loss is not finite from the
            start: the message names the first layer whose result was not.

    Example:
        >>> from pyro_invflows import flows
        >>> flow = flows.neural_spline_flow(2, num_layers=2, hidden_dims=[16])
        >>> data = torch.randn(400, 2).exp()
        >>> history = fit(flow, data, max_epochs=5, progress=False)
        >>> history.reason, len(history.validation), history.validation[-1] < history.validation[0]
        ('max_epochs', 5, True)
    """
    settings = _Settings(
        positive_int(batch_size, "batch_size", "fit"),
        positive_number(learning_rate, "learning_rate", "fit"),
        positive_int(max_epochs, "max_epochs", "fit"),
        None if seconds is None else positive_number(seconds, "seconds", "fit"),
        None if patience is None else positive_int(patience, "patience", "fit"),
        math.inf if clip is None else positive_number(clip, "clip", "fit"),
        None if weight_decay is None else real_number(weight_decay, "weight_decay", "fit"),
        real_number(averaging, "averaging", "fit"),
    )
    if settings.weight_decay is not None and settings.weight_decay < 0:
        raise ValueError(f"fit: weight_decay must be at least 0, but got {weight_decay!r}.")
    if not 0 <= settings.averaging < 1:
        raise ValueError(f"fit: averaging must be at least 0 and below 1, but got {averaging!r}.")
    inner = flow.module if isinstance(flow, DistributedDataParallel) else flow
    rows = Rows(data, context).checked(inner, "data", "context")
    given = held_out(validation, context is not None)
    if isinstance(given, Rows):
        given = given.checked(inner, "the rows of validation", "the contexts of validation", rows)
    ranks = Ranks(next((t.device for t in inner.parameters()), rows.data.device))
    run = _Run(flow, inner, rows, given, settings, ranks)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path)
    else:
        device = torch.device("cpu") if generator is None else generator.device
        seed = ranks.agreed(torch.randint(2**62, (), generator=generator, device=device))
        run.begin(seed, initialize and hasattr(inner, "initialize"))
    training = flow.training
    bar = _progress_bar(settings.max_epochs, progress and ranks.rank == 0)
    try:
        run.train(path, bar, callback)
    finally:
        if bar is not None:
            bar.close()
        run.restore()
        flow.train(training)
    return run.history


class _Settings(NamedTuple):
    batch_size: int
    learning_rate: float
    max_epochs: int
    seconds: float | None
    patience: int | None
    clip: float
    weight_decay: float | None
    averaging: float


# ---------------------------------------------------------------------- the loop


class _Run:
    """One run of :func:`fit`: the state that a checkpoint holds, and the loop."""

    def __init__(
        self,
        flow: nn.Module,
        inner: nn.Module,
        rows: Rows,
        validation: Rows | float,
        settings: _Settings,
        ranks: Ranks,
    ) -> None:
        self.flow, self.inner, self.settings, self.ranks = flow, inner, settings, ranks
        self.all_rows, self.validation = rows, validation
        self.parameters = [p for p in inner.parameters() if p.requires_grad]
        self.history = History()
        self.best: dict[str, Any] = {}
        self.lost = 0  # steps in a row, up to now, that were not finite

    def begin(self, seed: int, initialize: bool) -> None:
        """Split the rows, fit the layers that are fitted to data, and prepare what trains the flow."""
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.rows, self.held_out = split(self.all_rows, self.validation, self.generator)
        chosen = torch.randperm(len(self.rows.data), generator=self.generator)[:_INITIAL_ROWS]
        self.ranks.copy_from_first(self.inner)
        if initialize:
            start = self.rows.take(self.ranks.share(chosen), self.ranks.device)
            self.inner.initialize(*(t for t in start if t is not None))  # type: ignore[operator]
        self.batch = min(self.settings.batch_size, len(self.rows.data))
        self.epoch_steps = len(self.rows.data) // self.batch
        decay = self.settings.weight_decay
        decay = default_decay(len(self.rows.data)) if decay is None else decay
        self.optimiser = decaying_adam(self.inner, self.settings.learning_rate, decay) if self.parameters else None
        self.average = AveragedModel(self.inner, multi_avg_fn=self._move) if self.settings.averaging else None

    def train(self, path: Path | None, bar: Any, callback: Callable[[History], Any] | None) -> None:
        """Run epochs until there is a reason to stop."""
        history = self.history
        self.clock = time.perf_counter() - history.seconds
        if bar is not None:
            bar.update(len(history.validation))
        while not history.reason:
            history.reason = self._epoch() if self.parameters else "no parameters"
            self._validate()
            history.seconds = time.perf_counter() - self.clock
            history.reason = history.reason or self._reason()
            if bar is not None:
                bar.update()
                bar.set_postfix(loss=_last(history.losses), validation=_last(history.validation))
            if callback is not None and callback(history):
                history.reason = history.reason or "callback"
            if path is not None and self.ranks.rank == 0:
                self.save(path)

    def _epoch(self) -> str:
        """Take the steps of one epoch; return a reason to stop at once, or nothing."""
        self.flow.train()
        order = torch.randperm(len(self.rows.data), generator=self.generator)
        for index in order[: self.epoch_steps * self.batch].split(self.batch):
            elapsed = self._step(index)
            if self.lost >= _LOST:
                return "not finite"
            if self.settings.seconds is not None and elapsed >= self.settings.seconds:
                return "seconds"
        return ""

    def _step(self, index: Tensor) -> float:
        """Take one step; return the seconds since the start, on the first process's clock."""
        assert self.optimiser is not None
        rows = self.rows.take(self.ranks.share(index), self.ranks.device)
        self.optimiser.zero_grad()
        loss = -distribution_of(self.flow, rows.context).log_prob(rows.data).sum() / len(index)
        by_itself = self.flow is not self.inner  # DistributedDataParallel takes means over the processes
        (loss * self.ranks.count if by_itself else loss).backward()
        elapsed = loss.new_tensor(time.perf_counter() - self.clock if self.ranks.rank == 0 else 0.0)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        loss, elapsed, *sums = self.ranks.total([loss.detach(), elapsed, *([] if by_itself else gradients)])
        for gradient, whole in zip(gradients, sums, strict=False):
            gradient.copy_(whole)
        self._set_rate(float(elapsed))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip, foreach=True)
        self.history.losses.append(float(loss))
        if math.isfinite(self.history.losses[-1]) and norm.isfinite():
            self.optimiser.step()
            self.lost = 0
            if self.average is not None:
                self.average.update_parameters(self.inner)
        else:
            self._skip(rows)
        return float(elapsed)

    def _skip(self, rows: Rows) -> None:
        self.history.skipped += 1
        self.lost += 1
        if self.history.skipped == len(self.history.losses) == _NEVER:
            with torch.no_grad():
                fault = first_fault(distribution_of(self.inner, rows.context), rows.data)
            if not fault:
                names = [
                    n for n, p in self.inner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
                ]
                fault = f"The density is finite, but not the gradients of {', '.join(names[:3])}."
            raise ValueError(
                f"fit: the loss must be finite, but none of the first {_NEVER} steps was. {fault} "
                "Rescale the data (is the flow initialised from them?), or lower the learning rate."
            )

    def _set_rate(self, elapsed: float) -> None:
        """Let the learning rate fall as a half cosine, over the steps or the seconds."""
        assert self.optimiser is not None
        settings = self.settings
        done = len(self.history.losses) / (settings.max_epochs * self.epoch_steps)
        if settings.seconds is not None:
            done = max(done, elapsed / settings.seconds)
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _move(self, averages: Any, current: Any, count: Tensor | int) -> None:
        """Move the averages towards the current parameters, faster in the first steps."""
        decay = min(self.settings.averaging, (1 + float(count)) / (10 + float(count)))
        get_ema_multi_avg_fn(decay)(averages, current, count)

    # ------------------------------------------------------------------ held-out rows

    def _chosen(self) -> nn.Module:
        """Return the flow with the parameters that count."""
        return self.inner if self.average is None else self.average.module

    @torch.no_grad()
    def _validate(self) -> None:
        """Score the held-out rows; keep the parameters if the score is the best so far."""
        chosen, history = self._chosen(), self.history
        if self.held_out is not None:
            chosen.eval()
            total = torch.zeros((), dtype=torch.float64)
            for index in self.ranks.share(torch.arange(len(self.held_out.data))).split(_SCORED_ROWS):
                rows = self.held_out.take(index, self.ranks.device)
                total -= distribution_of(chosen, rows.context).log_prob(rows.data).sum().double().cpu()
            history.validation.append(float(self.ranks.total([total])[0]) / len(self.held_out.data))
            score = history.validation[-1]
            if history.best_epoch is not None and not score < history.validation[history.best_epoch]:
                return
            if math.isfinite(score):
                history.best_epoch = len(history.validation) - 1
        self.best = {name: tensor.detach().clone() for name, tensor in chosen.state_dict().items()}

    def _reason(self) -> str:
        history, settings = self.history, self.settings
        if len(history.losses) >= settings.max_epochs * self.epoch_steps:
            return "max_epochs"
        stale = len(history.validation) - 1 - (history.best_epoch or 0)
        if self.held_out is not None and settings.patience is not None and stale >= settings.patience:
            return "patience"
        return ""

    def restore(self) -> None:
        """Give the flow the best parameters."""
        if self.best:
            self.inner.load_state_dict(self.best)

    # ------------------------------------------------------------------ checkpoints

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on."""
        settings = self.settings._replace(seconds=None, patience=None)._asdict()
        return {"shape of the data": list(self.all_rows.data.shape), **settings}

    def save(self, path: Path) -> None:
        """Write the whole state, in one piece or not at all."""
        state = {
            "run": self._identity(),
            "seed": self.seed,
            "generator": self.generator.get_state(),
            "global generator": torch.get_rng_state(),
            "history": asdict(self.history),
            "lost": self.lost,
            "flow": self.inner.state_dict(),
            "best": self.best,
            "average": None if self.average is None else self.average.state_dict(),
            "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
        }
        beside = path.with_name(path.name + ".part")
        torch.save(state, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True, map_location="cpu")
        changed = [name for name, value in self._identity().items() if saved["run"].get(name) != value]
        if changed:
            raise ValueError(
                f"fit: the checkpoint {path} is that of a run with other {', '.join(changed)}. Give the same data and "
                "settings, or another file."
            )
        self.begin(saved["seed"], initialize=False)
        self.generator.set_state(saved["generator"])
        torch.set_rng_state(saved["global generator"])
        self.history, self.lost, self.best = History(**saved["history"]), saved["lost"], saved["best"]
        more = self.settings.seconds is None or self.settings.seconds > self.history.seconds
        if self.history.reason == "callback" or (self.history.reason == "seconds" and more):
            self.history.reason = ""
        self.inner.load_state_dict(saved["flow"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        if self.optimiser is not None:
            self.optimiser.load_state_dict(saved["optimiser"])


def _last(values: list[float]) -> str:
    return f"{values[-1]:.3f}" if values else "-"


def _progress_bar(epochs: int, wanted: bool) -> Any:
    """Return a tqdm bar, or None where it is not wanted or not installed."""
    if wanted:
        try:
            from tqdm.auto import tqdm

            return tqdm(total=epochs, desc="fit", unit="epoch", disable=None)
        except ImportError:
            pass
    return None
