"""ActNorm: its start comes from data, by an explicit call and nothing else."""

from __future__ import annotations

import copy
import os
import pickle
import sys

import pyro.distributions as dist
import pytest
import torch
from torch.multiprocessing.spawn import spawn

import pyro_invflows as pf

F64 = torch.float64


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def rows(n, d, offset=3.0, dtype=F64):
    generator = torch.Generator().manual_seed(n + d)
    return (offset + torch.linspace(0.1, 20.0, d) * torch.randn(n, d, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_inverse_standardises(dtype):
    data = rows(50, 4)
    layer = pf.act_norm(4).to(dtype).fit(data)  # the statistics of the data as given, whatever the layer's dtype
    tolerance = 20 * torch.finfo(dtype).eps
    close(layer.log_scale.double(), data.std(0).log(), 3 * tolerance)
    assert (layer.bias.double() - data.mean(0)).abs().max() <= tolerance * data.mean(0).abs().max()
    if dtype == F64:
        white, ladj = pf.inv_and_ladj(layer, data)
        close(white.mean(0), torch.zeros(4, dtype=F64), 1e-12)
        close(white.var(0), torch.ones(4, dtype=F64), 1e-12)
        close(ladj, -data.std(0).log().sum().expand(50), 1e-12)
        close(layer(torch.zeros(4, dtype=F64)), data.mean(0), 1e-12)


@pytest.mark.parametrize(("dim", "shape"), [(-1, (5, 3, 2, 4)), (-2, (5, 3, 4, 2)), (-3, (5, 4, 3, 2))])
def test_every_axis(dim, shape):
    data = torch.randn(shape, dtype=F64) * 3 + 1
    layer = pf.act_norm(4, dim=dim).double().fit(data)
    white = layer.inv(data).movedim(dim, -1).reshape(-1, 4)
    close(white.mean(0), torch.zeros(4, dtype=F64), 1e-12)
    close(white.std(0), torch.ones(4, dtype=F64), 1e-12)


def test_a_large_offset_costs_no_digits():
    data = 1e8 + rows(1000, 3, offset=0.0)
    layer = pf.act_norm(3).double().fit(data)
    close(layer.log_scale, data.std(0).log(), 1e-7)
    close(layer.inv(data).mean(0), torch.zeros(3, dtype=F64), 1e-6)


def test_only_fit_changes_the_layer():
    layer = pf.act_norm(3).double()
    assert not layer.fitted
    before = copy.deepcopy(layer.state_dict())
    data = rows(20, 3)
    base = dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    flow = pf.Flow(base, [layer])
    flow().log_prob(data)
    flow().sample((5,))
    layer.train()(data)
    layer.eval().inv(data)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.fit(data) is layer
    assert layer.fitted
    assert layer.log_scale.requires_grad
    fitted = copy.deepcopy(layer.state_dict())
    flow().log_prob(100 * data)
    layer.train()(100 * data)
    assert all(torch.equal(value, fitted[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_does_not_forget_that_it_was_fitted(assign):
    layer = pf.act_norm(3).double().fit(rows(20, 3))
    with torch.no_grad():
        layer.bias.add_(1.0)  # trained since
    new = pf.act_norm(3).double()
    new.load_state_dict(layer.state_dict(), assign=assign)
    for other in (new, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).float().double()):
        assert other.fitted
        assert other.fitted.dtype == torch.bool
        close(other.inv(rows(7, 3)), layer.inv(rows(7, 3)), 1e-5)
    new.reset_parameters()
    assert not new.fitted
    assert torch.equal(new(rows(7, 3)), rows(7, 3))


def test_a_second_fit_starts_again():
    layer = pf.act_norm(3).double().fit(rows(20, 3))
    data = 7 * rows(30, 3, offset=-4.0)
    again, fresh = layer.fit(data), pf.act_norm(3).double().fit(data)
    assert torch.equal(again.log_scale, fresh.log_scale)
    assert torch.equal(again.bias, fresh.bias)


def test_constant_columns_keep_the_scale_1():
    data = rows(20, 4)
    data[:, 1] = 0.1
    with pytest.warns(UserWarning, match="ActNorm: 1 of 4 columns are constant in the 20 rows") as caught:
        layer = pf.act_norm(4).double().fit(data)
    assert [w.filename for w in caught] == [__file__]
    assert layer.log_scale[1] == 0
    close(layer.bias[1], torch.tensor(0.1, dtype=F64), 1e-15)
    close(layer.inv(data)[:, [0, 2, 3]].std(0), torch.ones(3, dtype=F64), 1e-12)


def test_bad_data_are_refused_and_change_nothing():
    layer = pf.act_norm(3).double().fit(rows(20, 3))
    before = copy.deepcopy(layer.state_dict())
    bad = rows(10, 3)
    bad[4, 1] = float("nan")
    bad[6, 2] = float("inf")
    for data, kind, message in (
        (bad, ValueError, "ActNorm: the rows must be finite, but 2 of 10 hold NaN or infinity"),
        (rows(1, 3), ValueError, "at least two rows, but got one"),
        (rows(20, 3)[:0], ValueError, "at least one row"),
        (rows(20, 2), ValueError, "3 elements along dim -1"),
        (torch.ones(4, 3, dtype=torch.long), TypeError, "floating point"),
        ([[1.0, 2.0, 3.0]], TypeError, "floating point"),
        (1e200 * rows(20, 3), ValueError, "squares are not"),
    ):
        with pytest.raises(kind, match=message):
            layer.fit(data)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_gradients_reach_the_parameters_but_not_the_data_that_fitted_them():
    data = rows(20, 3).requires_grad_()
    layer = pf.act_norm(3).double().fit(data)
    assert layer.bias.is_leaf
    layer.inv(rows(5, 3)).sum().backward()
    assert data.grad is None
    assert layer.log_scale.grad is not None
    assert layer.bias.grad is not None


def _fit_a_share(rank, path, data):
    sys.path[:] = [p for p in sys.path if p]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        layer = pf.act_norm(data.shape[1]).double().fit(data[:40] if rank == 0 else data[40:])
        bad = data.clone()
        bad[0, 0] = float("nan")
        with pytest.raises(ValueError, match="hold NaN" if rank == 1 else "other processes refused"):
            layer.fit(bad if rank == 1 else data)
        with pytest.raises(ValueError, match="at least two rows"):
            layer.fit(data[:rank])
        torch.save(layer.state_dict(), os.path.join(path, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_end_as_one(tmp_path):
    data = rows(101, 4, offset=50.0)
    spawn(_fit_a_share, args=(str(tmp_path), data), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in pf.act_norm(4).double().fit(data).state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(states[0][name], states[1][name])
