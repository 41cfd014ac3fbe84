"""Maximum likelihood: it learns, keeps the best parameters, resumes exactly, and runs on several processes."""

from __future__ import annotations

import itertools
import math
import os
import sys
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch.multiprocessing.spawn import spawn

import pyro_invflows as pf
from pyro_invflows import flows

SMALL = {"num_layers": 1, "hidden_dims": [8]}
QUIET = {"progress": False}


def curved(count, seed=0):
    """Draw ``(x, x^2 + e)``, whose negative log-likelihood is known."""
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return torch.stack([x, x**2 + 0.3 * e], dim=-1)


ENTROPY = math.log(2 * math.pi * math.e) + math.log(0.3)


def small_flow(seed=0, context_dim=0):
    torch.manual_seed(seed)
    return flows.neural_spline_flow(2, context_dim, **SMALL).double()


def score(flow, data, context=None):
    with torch.no_grad():
        return -(flow() if context is None else flow(context)).log_prob(data).mean().item()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_it_comes_close_to_the_truth_on_new_data():
    flow = flows.neural_spline_flow(2, num_layers=1, hidden_dims=[32]).double()
    before = score(flow.initialize(curved(3000)), curved(3000, 1))
    history = pf.fit(flow, curved(3000), max_epochs=20, batch_size=128, **QUIET)
    truth = -dist.Normal(0.0, 1.0).log_prob(curved(3000, 1)[:, 0]).mean()
    x, y = curved(3000, 1).T
    truth = (truth - dist.Normal(x**2, 0.3).log_prob(y).mean()).item()
    assert truth == pytest.approx(ENTROPY, abs=0.05)
    assert score(flow, curved(3000, 1)) - truth < 0.1 < 0.5 * (before - truth)
    assert history.reason == "max_epochs"
    assert len(history.validation) == 20
    assert len(history.losses) == 20 * (2700 // 128)


def test_it_learns_a_density_given_a_context():
    data = curved(2000)
    flow = flows.neural_spline_flow(1, 1, num_layers=1, hidden_dims=[16]).double()
    held_out = curved(500, 1)
    pf.fit(
        flow,
        data[:, 1:],
        data[:, :1],
        validation=(held_out[:, 1:], held_out[:, :1]),
        batch_size=64,
        max_epochs=12,
        **QUIET,
    )
    truth = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.3)
    assert score(flow, held_out[:, 1:], held_out[:, :1]) < truth + 0.15


def test_the_best_parameters_are_restored():
    data, held_out = curved(60), curved(200, 1)
    flow = small_flow()
    history = pf.fit(flow, data, validation=held_out, batch_size=20, learning_rate=0.05, patience=5, **QUIET)
    best = min(history.validation)
    assert history.reason == "patience"
    assert history.validation[history.best_epoch] == best < history.validation[-1]
    assert len(history.validation) == history.best_epoch + 1 + 5
    assert score(flow, held_out) == pytest.approx(best, rel=1e-12)


def test_an_interruption_leaves_the_best_parameters():
    flow, held_out = small_flow(), curved(100, 1)
    seen = []

    def interrupt(history):
        seen[:] = history.validation
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pf.fit(flow, curved(200), validation=held_out, callback=interrupt, **QUIET)
    assert score(flow, held_out) == pytest.approx(min(seen), rel=1e-12)


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(averaging, tmp_path):
    settings = {"batch_size": 32, "max_epochs": 6, "averaging": averaging, **QUIET}
    data = curved(200)

    def run(callback=None, checkpoint=None):
        flow = small_flow()
        history = pf.fit(flow, data, callback=callback, checkpoint=checkpoint, **settings)
        return flow.state_dict(), history

    expected, whole = run()
    path = tmp_path / "run.pt"
    _, part = run(lambda history: len(history.validation) == 3, path)
    assert part.reason == "callback"
    torch.manual_seed(5)  # the seed of the split and of the order is in the checkpoint
    flow = flows.neural_spline_flow(2, **SMALL).double()
    resumed = pf.fit(flow, data, checkpoint=path, **settings)
    assert same(flow.state_dict(), expected)
    assert (resumed.losses, resumed.validation) == (whole.losses, whole.validation)
    # a run that is complete is only loaded
    again = pf.fit(small_flow(1), data, checkpoint=path, **settings)
    assert again.losses == whole.losses
    for changed, change in {
        "batch_size": {"batch_size": 16},
        "data": {"data": curved(200, 1)},
        "validation": {"validation": 0.3},  # rows that were trained on would be held out
        "layers": {"flow": flows.neural_spline_flow(2, num_layers=1, hidden_dims=[9]).double()},
    }.items():
        given = {"flow": small_flow(1), "data": data, "checkpoint": path, **settings} | change
        before = {name: tensor.clone() for name, tensor in given["flow"].state_dict().items()}
        with pytest.raises(ValueError, match=f"with other {changed}"):
            pf.fit(**given)
        assert same(given["flow"].state_dict(), before)


@pytest.mark.parametrize("content", [b"", b"no archive", {"weight": torch.zeros(2)}])
def test_another_file_is_not_taken_for_a_checkpoint(content, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other\.pt exists, but is not a checkpoint of fit"):
        pf.fit(small_flow(), curved(50), checkpoint=path, **QUIET)
    assert path.read_bytes() == before


def test_more_patience_or_time_goes_on_with_a_run(tmp_path):
    settings = {"validation": curved(200, 1), "batch_size": 20, "learning_rate": 0.05, "averaging": 0.0, **QUIET}

    def run(name, **change):
        return pf.fit(small_flow(), curved(60), checkpoint=tmp_path / name, **settings | change)

    short = run("stepwise", patience=2, max_epochs=40)
    assert short.reason == "patience"
    long = run("stepwise", patience=6, max_epochs=40)
    whole = run("whole", patience=6, max_epochs=40)
    assert len(long.validation) > len(short.validation)
    assert long.validation == whole.validation


def test_the_seed_decides_everything():
    def run(seed):
        flow = small_flow()
        pf.fit(flow, curved(100), max_epochs=2, generator=torch.Generator().manual_seed(seed), **QUIET)
        return flow.state_dict()

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_without_held_out_rows_the_last_parameters_stay():
    history = pf.fit(small_flow(), curved(100), validation=0, max_epochs=2, averaging=0.0, **QUIET)
    assert (history.validation, history.best_epoch, len(history.losses)) == ([], None, 2)


def test_seconds_and_callbacks_stop_it():
    history = pf.fit(small_flow(), curved(100), batch_size=10, seconds=1e-6, **QUIET)
    assert (history.reason, len(history.losses), len(history.validation)) == ("seconds", 1, 1)
    history = pf.fit(small_flow(), curved(100), callback=lambda history: True, **QUIET)
    assert (history.reason, len(history.validation)) == ("callback", 1)


def test_a_flow_without_parameters_is_initialised_and_scored():
    flow, data = flows.gaussian(2).double(), curved(100)
    history = pf.fit(flow, data, validation=data, **QUIET)
    assert (history.reason, history.losses) == ("no parameters", [])
    assert history.validation == [pytest.approx(score(flow, data))]


def test_training_modes_are_left_as_they_were():
    flow = small_flow()
    flow.transforms[0].eval()
    before = [module.training for module in flow.modules()]
    pf.fit(flow, curved(50), max_epochs=1, **QUIET)
    assert [module.training for module in flow.modules()] == before
    assert len(set(before)) == 2


def test_no_row_is_both_trained_on_and_held_out():
    class Seen(torch.nn.Module):
        """A normal density that records the rows it is asked about."""

        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.rows = {True: set(), False: set()}

        def forward(self):
            module, normal = self, dist.Normal(self.mean, 1.0).to_event(1)

            class Recorded:
                event_shape = (2,)

                def log_prob(self, value):
                    module.rows[torch.is_grad_enabled()] |= {tuple(row) for row in value.tolist()}
                    return normal.log_prob(value)

            return Recorded()

    flow, data = Seen(), curved(200)
    pf.fit(flow, data, max_epochs=4, averaging=0.0, batch_size=18, **QUIET)
    trained, scored = flow.rows[True], flow.rows[False]
    assert (len(trained), len(scored)) == (180, 20)
    assert trained | scored == {tuple(row) for row in data.tolist()}


def test_initialize_can_be_switched_off():
    flow = small_flow()
    pf.fit(flow, curved(50) + 7, max_epochs=1, initialize=False, **QUIET)
    assert not flow.transforms[-1].mean.any()


# ---------------------------------------------------------------------- steps that are not finite


class Fragile(pf.Diagonal):
    """A diagonal layer whose log-det is infinite in some calls."""

    def __init__(self, bad):
        super().__init__(2)
        self.bad, self.calls = bad, itertools.count()

    def _log_det(self, x, y, aux):
        broken = torch.is_grad_enabled() and next(self.calls) in self.bad
        return super()._log_det(x, y, aux) + (math.inf if broken else 0.0)


def fragile(bad):
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    return pf.Flow(base, [pf.orthogonal(2), Fragile(bad), pf.diagonal(2)]).double()


def test_steps_that_are_not_finite_are_skipped_and_counted():
    flow = fragile({1, 4, 5})
    history = pf.fit(flow, curved(100), batch_size=45, max_epochs=4, averaging=0.0, **QUIET)
    assert history.skipped == 3
    assert [i for i, loss in enumerate(history.losses) if not math.isfinite(loss)] == [1, 4, 5]
    assert all(p.isfinite().all() for p in flow.parameters())


def test_a_loss_that_is_never_finite_names_the_layer():
    class Broken(Fragile):
        def _log_det(self, x, y, aux):
            return super()._log_det(x, y, aux) * math.nan

    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    flow = pf.Flow(base, [pf.orthogonal(2), Broken(()), pf.diagonal(2)]).double()
    with pytest.raises(ValueError, match=r"layer 1, Broken\(.*the log-det is not finite"):
        pf.fit(flow, curved(40), validation=0, **QUIET)


class LosesValues(pf.Diagonal):
    """A diagonal layer whose inverse is NaN in some steps, or always: values that the base would refuse."""

    def __init__(self, bad):
        super().__init__(2)
        self.bad, self.calls = bad, itertools.count()

    def _inverse_aux(self, y):
        x, aux = super()._inverse_aux(y)
        lost = self.bad is None or (torch.is_grad_enabled() and next(self.calls) in self.bad)
        return (x * math.nan if lost else x), aux


def losing(bad):
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    return pf.Flow(base, [pf.orthogonal(2), LosesValues(bad), pf.diagonal(2)]).double()


def test_values_that_the_base_would_refuse_are_skipped_and_counted():
    flow = losing({1, 3})
    history = pf.fit(flow, curved(100), validation=0, batch_size=50, max_epochs=3, averaging=0.0, **QUIET)
    assert history.skipped == 2
    assert all(p.isfinite().all() for p in flow.parameters())
    with pytest.raises(ValueError, match="within the support"):  # validation is as it was
        flow().log_prob(torch.full((1, 2), math.nan, dtype=torch.float64))


@pytest.mark.parametrize("steps", [3, 40])
def test_values_that_are_never_finite_name_the_layer(steps):
    with pytest.raises(ValueError, match=rf"first {min(steps, 10)} steps.*layer 1, LosesValues\(.*the result is not"):
        pf.fit(losing(None), curved(40), validation=0, max_epochs=steps, **QUIET)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def test_gradients_that_are_never_finite_name_their_parameters():
    class Broken(pf.Diagonal):
        def _log_det(self, x, y, aux):
            return NanGradient.apply(super()._log_det(x, y, aux))

    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    flow = pf.Flow(base, [Broken(2), pf.affine_coupling(2, [4])]).double()
    with pytest.raises(ValueError, match=r"not the gradients of transforms\.0\.log_scale\. "):
        pf.fit(flow, curved(40), validation=0, **QUIET)


class Scored(torch.nn.Module):
    """A density with one parameter, whose held-out scores are given."""

    def __init__(self, scores):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.scores = iter(scores)

    def forward(self):
        module = self

        class Density:
            event_shape = (2,)

            def log_prob(self, value):
                if torch.is_grad_enabled():
                    return -((module.weight - 1) ** 2).expand(len(value))
                return torch.full((len(value),), -next(module.scores), dtype=torch.float64)

        return Density()


def test_a_score_that_is_not_finite_is_never_the_best():
    flow, seen = Scored([2.0, 1.0, -math.inf, math.nan, 3.0]), []
    history = pf.fit(
        flow, curved(50), max_epochs=5, averaging=0.0, callback=lambda _: seen.append(flow.weight.item()), **QUIET
    )
    assert history.best_epoch == 1
    assert flow.weight.item() == seen[1]


def test_without_a_finite_score_the_start_is_kept_and_said_so():
    flow = Scored([math.nan] * 3)
    with pytest.warns(UserWarning, match="no score of the held-out rows was finite"):
        history = pf.fit(flow, curved(50), max_epochs=3, averaging=0.0, **QUIET)
    assert history.best_epoch is None
    assert flow.weight.item() == 0.0


def test_it_gives_up_when_no_step_is_finite_any_more():
    history = pf.fit(fragile(set(range(1, 10_000))), curved(20), validation=0, max_epochs=500, **QUIET)
    assert (history.reason, history.skipped) == ("not finite", 100)


# ---------------------------------------------------------------------- bad input


def damaged():
    data = curved(10)
    data[3, 1], data[5, 0] = math.nan, math.inf
    return data


def bounded_flow():
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    return pf.Flow(base, [pf.affine_coupling(2, [4]), pf.Interval(0.0, 1.0)]).double()


def elementwise_flow():
    return pf.Flow(dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0), [pf.baird(2)]).double()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: {"data": damaged()}, r"2 of 10 of data hold NaN or infinity \(numbers 3, 5\)"),
        (lambda: {"validation": damaged()}, "of the rows of validation hold NaN"),
        (lambda: {"context": curved(10)}, "no conditional parts, so it takes no context"),
        (lambda: {"flow": small_flow(0, 3)}, "conditional parts, so it needs a context"),
        (lambda: {"flow": small_flow(0, 2), "context": curved(9)}, "one row for each of the 10 of data, but has 9"),
        (lambda: {"flow": small_flow(0, 3), "context": curved(10)}, "context"),
        (lambda: {"flow": small_flow(0, 2), "context": damaged()}, "2 of 10 of context hold"),
        (lambda: {"data": torch.zeros(10, 3)}, r"data must have the shape \(N, 2\)"),
        (lambda: {"data": torch.zeros(0, 2)}, "at least one row"),
        (lambda: {"validation": torch.zeros(4, 3)}, r"the rows of validation must have the shape \(M, 2\)"),
        (lambda: {"validation": (curved(4), curved(4))}, "rows alone, because the flow is not conditional"),
        (lambda: {"flow": small_flow(0, 2), "context": curved(10), "validation": curved(4)}, "a pair"),
        (lambda: {"validation": 1.0}, r"a fraction in \[0, 1\)"),
        (lambda: {"data": curved(1)}, "leaves none to train on"),
        (lambda: {"batch_size": 0}, "batch_size must be at least 1"),
        (lambda: {"learning_rate": -1.0}, "learning_rate"),
        (lambda: {"seconds": 0.0}, "seconds"),
        (lambda: {"averaging": 1.0}, "averaging must be at least 0 and below 1"),
        (lambda: {"weight_decay": math.nan}, "weight_decay must be at least 0 and finite"),
        (lambda: {"validation": curved(4).float()}, "the rows of validation must be torch.float64"),
        (lambda: {"flow": bounded_flow(), "data": curved(10)}, r"must lie in the support of the flow.*of data do not"),
        (lambda: {"flow": elementwise_flow()}, r"its batch shape is \(2,\).*base.to_event\(1\)"),
    ],
)
def test_bad_input(arguments, message):
    given = {"flow": small_flow(), "data": curved(10), **QUIET} | arguments()
    before = {name: tensor.clone() for name, tensor in given["flow"].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pf.fit(**given)
    assert same(given["flow"].state_dict(), before)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="data must be a floating point tensor"):
        pf.fit(small_flow(), torch.zeros(5, 2, dtype=torch.long), **QUIET)
    for validation in ((), None, "0.1", curved(4).numpy()):
        with pytest.raises(TypeError, match="validation must be a fraction, or held-out rows as tensors"):
            pf.fit(small_flow(), curved(10), validation=validation, **QUIET)


def test_data_with_a_graph_are_constants():
    data = curved(50).requires_grad_() * 2
    pf.fit(small_flow(), data, max_epochs=2, **QUIET)


# ---------------------------------------------------------------------- optional tools


@pytest.mark.parametrize("installed", [False, True])
def test_the_progress_bar_is_optional(monkeypatch, installed):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    pf.fit(small_flow(), curved(50), max_epochs=2, progress=True)


def test_the_history_draws_itself():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axis = pf.fit(small_flow(), curved(50), max_epochs=3, **QUIET).plot()
    assert [line.get_label() for line in axis.lines] == ["training batches", "held-out rows", "kept"]
    matplotlib.pyplot.close(axis.figure)


# ---------------------------------------------------------------------- several processes


def layers():
    torch.manual_seed(3)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    parts = [pf.act_norm(2), pf.affine_coupling(2, [8]), pf.act_norm(2), pf.whitening(2)]
    return pf.Flow(base, parts).double()


SEVERAL = {"batch_size": 17, "max_epochs": 5, "averaging": 0.9, **QUIET}


def trained(rank, wrapped, path=None):
    """Train for 50 steps; each process starts elsewhere, with another seed."""
    flow = layers()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * rank)
    module = torch.nn.parallel.DistributedDataParallel(flow) if wrapped else flow
    torch.manual_seed(rank)
    history = pf.fit(module, curved(190), checkpoint=path, **SEVERAL)
    assert len(history.losses) == 50
    return flow.state_dict(), history.losses, history.validation


def _train_a_share(rank, path):
    sys.path[:] = [p for p in sys.path if p]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        checkpoint = os.path.join(path, f"checkpoint{rank}")
        results = [trained(rank, False, checkpoint), trained(rank, True)]
        torch.save(results, os.path.join(path, f"{rank}.pt"))
        # only the first process has a checkpoint to go on from
        _, losses, _ = trained(rank, False, checkpoint)
        assert losses == results[0][1]
        # the first process decides; one held-out row and batches of one row leave the other without any
        small = {"validation": curved(1, 1), "batch_size": 1, "max_epochs": 3, **QUIET}
        history = pf.fit(layers(), curved(4), callback=lambda h: rank == 1, **small)
        assert (history.reason, len(history.losses)) == ("max_epochs", 12)
        history = pf.fit(layers(), curved(4), callback=lambda h: rank == 0, **small)
        assert (history.reason, len(history.losses)) == ("callback", 4)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spawn(_train_a_share, args=(str(tmp_path),), nprocs=2)
    state, losses, validation = trained(0, False)
    for rank in range(2):
        for other_state, other_losses, other_validation in torch.load(tmp_path / f"{rank}.pt"):
            for key, value in state.items():
                torch.testing.assert_close(other_state[key], value, rtol=0, atol=1e-6)
            assert other_losses == pytest.approx(losses, abs=1e-6)
            assert other_validation == pytest.approx(validation, abs=1e-6)
    assert [os.path.exists(tmp_path / f"checkpoint{rank}") for rank in range(2)] == [True, False]
