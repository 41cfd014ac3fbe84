"""Maximum likelihood: a loop over ``-flow(context).log_prob(x)`` with early stopping, and a record of what it saw."""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_invflows.core.faults import first_fault
from pyro_invflows.support.checkpoints import fingerprint, read_state, write_state
from pyro_invflows.support.checks import positive_int, positive_number, real_number
from pyro_invflows.support.history import History
from pyro_invflows.support.optimisers import decaying_adam, default_decay
from pyro_invflows.support.ranks import Ranks
from pyro_invflows.support.rows import Rows, device_of, distribution_of, held_out, log_prob, split

__all__ = ["fit"]

#: Number of rows from which layers are initialised, at most.
_INITIAL_ROWS = 65_536
#: Rows scored at once on held-out data.
_SCORED_ROWS = 4096
#: Training is given up after so many steps in a row that were not finite; sooner if none ever was.
_LOST, _NEVER = 100, 10


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
    if settings.weight_decay is not None and not 0 <= settings.weight_decay < math.inf:
        raise ValueError(f"fit: weight_decay must be at least 0 and finite, but got {weight_decay!r}.")
    if not 0 <= settings.averaging < 1:
        raise ValueError(f"fit: averaging must be at least 0 and below 1, but got {averaging!r}.")
    inner = flow.module if isinstance(flow, DistributedDataParallel) else flow
    rows = Rows(data, context).checked(inner, "data", "context")
    given = held_out(validation, context is not None)
    if isinstance(given, Rows):
        given = given.checked(inner, "the rows of validation", "the contexts of validation", rows)
    ranks = Ranks(device_of(inner, rows.events.device))
    run = _Run(flow, inner, rows, given, settings, ranks)
    path = None if checkpoint is None else Path(checkpoint)
    saved = ranks.from_first(lambda: None if path is None or not path.exists() else read_state(path, "fit"))
    if saved is not None:
        run.load(saved, path)
    else:
        device = torch.device("cpu") if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        run.begin(ranks.from_first(lambda: int(seed)), initialize and hasattr(inner, "initialize"))
    modes = {module: module.training for module in flow.modules()}
    bar = _progress_bar(settings.max_epochs, progress and ranks.rank == 0)
    try:
        run.train(path, bar, callback)
    finally:
        if bar is not None:
            bar.close()
        run.restore()
        for module, mode in modes.items():
            module.training = mode
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
        chosen = torch.randperm(len(self.rows.events), generator=self.generator)[:_INITIAL_ROWS]
        self.ranks.copy_from_first(self.inner)
        if initialize:
            start = self.rows.take(self.ranks.share(chosen), self.ranks.device)
            self.inner.initialize(*(t for t in start if t is not None))  # type: ignore[operator]
        self.batch = min(self.settings.batch_size, len(self.rows.events))
        self.epoch_steps = len(self.rows.events) // self.batch
        decay = self.settings.weight_decay
        decay = default_decay(len(self.rows.events)) if decay is None else decay
        self.optimiser = decaying_adam(self.inner, self.settings.learning_rate, decay) if self.parameters else None
        self.average = AveragedModel(self.inner, multi_avg_fn=self._move) if self.settings.averaging else None
        self._keep()

    def train(self, path: Path | None, bar: Any, callback: Callable[[History], Any] | None) -> None:
        """Run epochs until there is a reason to stop."""
        history = self.history
        self.clock = time.perf_counter() - history.seconds
        if bar is not None:
            bar.update(len(history.validation))
        while not history.reason:
            history.reason = "no parameters" if self.optimiser is None else self._epoch(self.optimiser)
            self._validate()
            history.seconds = time.perf_counter() - self.clock
            history.reason = history.reason or self._reason()
            if bar is not None:
                bar.update()
                bar.set_postfix(loss=_last(history.losses), validation=_last(history.validation))
            if callback is not None:
                answer = bool(callback(history))
                if self.ranks.from_first(lambda answer=answer: answer):  # type: ignore[misc]
                    history.reason = history.reason or "callback"
            if path is not None and self.ranks.rank == 0:
                write_state(path, self.state())
        if self.held_out is not None and history.best_epoch is None:
            warnings.warn(
                "fit: no score of the held-out rows was finite, so the flow keeps the parameters that it had before "
                "the first step. Rescale the data (is the flow initialised from them?), or lower the learning rate.",
                stacklevel=3,
            )

    def _epoch(self, optimiser: torch.optim.Optimizer) -> str:
        """Take the steps of one epoch; return a reason to stop at once, or nothing."""
        self.flow.train()
        order = torch.randperm(len(self.rows.events), generator=self.generator)
        for index in order[: self.epoch_steps * self.batch].split(self.batch):
            elapsed = self._step(optimiser, index)
            if self.lost >= _LOST:
                return "not finite"
            if self.settings.seconds is not None and elapsed >= self.settings.seconds:
                return "seconds"
        return ""

    def _step(self, optimiser: torch.optim.Optimizer, index: Tensor) -> float:
        """Take one step; return the seconds since the start, on the first process's clock."""
        rows = self.rows.take(self.ranks.share(index), self.ranks.device)
        optimiser.zero_grad()
        loss = -log_prob(self.flow, rows).sum() / len(index)
        by_itself = self.flow is not self.inner  # DistributedDataParallel takes means over the processes
        (loss * self.ranks.count if by_itself else loss).backward()
        elapsed = loss.new_tensor(time.perf_counter() - self.clock if self.ranks.rank == 0 else 0.0)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        loss, elapsed, *sums = self.ranks.total([loss.detach(), elapsed, *([] if by_itself else gradients)])
        for gradient, whole in zip(gradients, sums, strict=False):
            gradient.copy_(whole)
        self._set_rate(optimiser, float(elapsed))
        norm = torch.nn.utils.get_total_norm(gradients)
        self.history.losses.append(float(loss))
        if math.isfinite(self.history.losses[-1]) and norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
            optimiser.step()
            self.lost = 0
            if self.average is not None:
                self.average.update_parameters(self.inner)
        else:
            self._skip(rows)
        return float(elapsed)

    def _skip(self, rows: Rows) -> None:
        self.history.skipped += 1
        self.lost += 1
        taken = len(self.history.losses)
        if self.history.skipped == taken and taken in (_NEVER, self.settings.max_epochs * self.epoch_steps):
            with torch.no_grad():
                fault = first_fault(distribution_of(self.inner, rows.context), rows.events)
            fault = self.ranks.first_text(fault)
            if not fault:
                names = [
                    n for n, p in self.inner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
                ]
                fault = f"The density is finite, but not the gradients of {', '.join(names[:3])}."
            raise ValueError(
                f"fit: the loss must be finite, but none of the first {taken} steps was. {fault} "
                "Rescale the data (is the flow initialised from them?), or lower the learning rate."
            )

    def _set_rate(self, optimiser: torch.optim.Optimizer, elapsed: float) -> None:
        """Let the learning rate fall as a half cosine, over the steps or the seconds."""
        settings = self.settings
        done = len(self.history.losses) / (settings.max_epochs * self.epoch_steps)
        if settings.seconds is not None:
            done = max(done, elapsed / settings.seconds)
        for group in optimiser.param_groups:
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
            for index in self.ranks.share(torch.arange(len(self.held_out.events))).split(_SCORED_ROWS):
                rows = self.held_out.take(index, self.ranks.device)
                total -= log_prob(chosen, rows).sum().cpu().double()
            history.validation.append(float(self.ranks.total([total])[0]) / len(self.held_out.events))
            score = history.validation[-1]
            best = math.inf if history.best_epoch is None else history.validation[history.best_epoch]
            if not (math.isfinite(score) and score < best):
                return
            history.best_epoch = len(history.validation) - 1
        self._keep()

    def _keep(self) -> None:
        """Take the parameters for the best so far."""
        self.best = {name: tensor.detach().clone() for name, tensor in self._chosen().state_dict().items()}

    def _reason(self) -> str:
        history, settings = self.history, self.settings
        if len(history.losses) >= settings.max_epochs * self.epoch_steps:
            return "max_epochs"
        return "patience" if self._is_stale() else ""

    def _is_stale(self) -> bool:
        """Whether there was no better score for longer than ``patience`` allows."""
        stale = len(self.history.validation) - 1 - (self.history.best_epoch or 0)
        patience = self.settings.patience
        return self.held_out is not None and patience is not None and stale >= patience

    def restore(self) -> None:
        """Give the flow the best parameters."""
        if self.best:
            self.inner.load_state_dict(self.best)

    # ------------------------------------------------------------------ checkpoints

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on."""
        settings = self.settings._replace(seconds=None, patience=None)._asdict()
        validation = self.validation
        return {
            "data": fingerprint(*self.all_rows),
            "validation": fingerprint(*validation) if isinstance(validation, Rows) else validation,
            **settings,
        }

    def state(self) -> dict[str, Any]:
        """Return the whole state."""
        return {
            "run": self.identity,
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

    def load(self, saved: dict[str, Any], path: Path | None) -> None:
        """Go on from a state that was saved."""
        changed = [name for name, value in self.identity.items() if saved["run"].get(name) != value]
        own = self.inner.state_dict()
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved["flow"].items()}:
            changed.append("layers")
        if changed:
            raise ValueError(
                f"fit: the checkpoint {path} is that of a run with other {', '.join(changed)}. Give the same data, the "
                "same flow and the same settings, or another file."
            )
        self.begin(saved["seed"], initialize=False)
        self.generator.set_state(saved["generator"])
        torch.set_rng_state(saved["global generator"])
        self.history, self.lost, self.best = History(**saved["history"]), saved["lost"], saved["best"]
        reason, seconds = self.history.reason, self.settings.seconds
        longer = seconds is None or seconds > self.history.seconds
        if reason == "callback" or (reason == "seconds" and longer) or (reason == "patience" and not self._is_stale()):
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
