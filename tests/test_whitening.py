"""Whitening: textbook matrices, streams, degenerate data, several processes."""

from __future__ import annotations

import copy
import os
import sys
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch.multiprocessing.spawn import spawn

import pyro_invflows as pf

METHODS = ("zca", "pca", "cholesky", "zca-cor", "pca-cor")
F64 = torch.float64


def correlated(n, d, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, dtype=F64, generator=generator) / d**0.5 + torch.eye(d, dtype=F64)
    scale = torch.linspace(0.5, 3.0, d, dtype=F64)
    return (torch.randn(n, d, dtype=F64, generator=generator) @ mix) * scale + offset


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def power(matrix, exponent):
    """A power of a symmetric matrix, by its singular values: not the factorisation that the layer uses."""
    u, s, vh = torch.linalg.svd(matrix)
    return (u * s**exponent) @ vh


# ---------------------------------------------------------------------- what it is


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_inverse_whitens(method, trainable):
    data = correlated(400, 7, offset=3.0)
    layer = pf.whitening(7, method=method, shrinkage=0.0, trainable=trainable).double().fit(data)
    white = layer.inv(data).detach()
    close(torch.cov(white.T), torch.eye(7, dtype=F64), 1e-8)
    close(white.mean(0), torch.zeros(7, dtype=F64), 1e-8)
    close(layer.matrix @ layer.matrix.T, torch.cov(data.T), 1e-10)
    close(layer(white), data, 1e-10)
    base = dist.Normal(torch.zeros(7, dtype=F64), 1.0).to_event(1)
    gaussian = dist.MultivariateNormal(data.mean(0), torch.cov(data.T))
    close(dist.TransformedDistribution(base, [layer]).log_prob(data), gaussian.log_prob(data), 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_equals_its_textbook_matrix(method):
    """Kessy, Lewin and Strimmer (2018), Table 1, computed differently than in the layer."""
    data = correlated(300, 5)
    layer = pf.whitening(5, method=method, shrinkage=0.0).double().fit(data)
    w, sigma = layer.whitening, torch.cov(data.T)
    scale = sigma.diagonal().sqrt()
    correlation = sigma / scale.outer(scale)
    close(w @ layer.colouring, torch.eye(5, dtype=F64), 1e-12)
    if method == "zca":
        close(w, power(sigma, -0.5), 1e-10)
    elif method == "zca-cor":
        close(w, power(correlation, -0.5) @ (1 / scale).diag(), 1e-10)
    elif method == "cholesky":
        close(layer.colouring.triu(1), torch.zeros(5, 5, dtype=F64), 0)
        close(layer.colouring, torch.linalg.cholesky(sigma), 1e-10)
    else:
        target = sigma if method == "pca" else correlation
        rows = w if method == "pca" else w @ scale.diag()
        # its rows are eigenvectors over the root of the eigenvalue, from the largest to the smallest
        eigenvalues = 1 / rows.square().sum(-1)
        close(rows @ target, eigenvalues.unsqueeze(-1) * rows, 1e-10)
        assert (eigenvalues.diff() < 0).all()
        assert (rows.diagonal() > 0).all()


def test_zca_stays_closest_to_the_data_and_pca_compresses_most():
    """Each method has the optimal value of the criterion that defines it (Kessy et al., section 4)."""
    data = correlated(1000, 6)
    centred = data - data.mean(0)
    standardised = centred / centred.std(0)
    closeness, standard, compression = {}, {}, {}
    for method in METHODS:
        white = pf.whitening(6, method=method, shrinkage=0.0).double().fit(data).inv(data)
        closeness[method] = (white - centred).square().sum().item()
        standard[method] = (white - standardised).square().sum().item()
        compression[method] = (white.T @ centred / 999).square().sum(-1)[0].item()
    assert min(closeness, key=closeness.get) == "zca"
    assert min(standard, key=standard.get) == "zca-cor"
    assert max(compression, key=compression.get) == "pca"


def test_images_take_every_pixel_as_a_row():
    images = correlated(60, 3, offset=1.0).reshape(5, 4, 3, 3).movedim(-1, 1)  # (5, 3, 4, 3)
    layer = pf.whitening(3, dim=-3, shrinkage=0.0).double().fit(images)
    flat = pf.whitening(3, shrinkage=0.0).double().fit(images.movedim(1, -1).reshape(-1, 3))
    close(layer.colouring, flat.colouring, 1e-12)
    white, ladj = pf.inv_and_ladj(layer, images)
    close(torch.cov(white.movedim(1, -1).reshape(-1, 3).T), torch.eye(3, dtype=F64), 1e-10)
    close(
        ladj,
        torch.full((5,), -12 * 0.5 * torch.logdet(torch.cov(images.movedim(1, 0).flatten(1))).item()).to(F64),
        1e-6,
    )
    assert pf.whitening(3, dim=-2).double().fit(images.movedim(1, -2)[0]).statistics.count == 12


def test_oas_equals_its_formula_and_nearly_scikit_learn():
    sklearn = pytest.importorskip("sklearn.covariance")
    data = correlated(80, 40)
    scale, correlation = data.std(0), torch.corrcoef(data.T)
    q, p, n = (correlation @ correlation).trace(), 40, 80
    rho = ((1 - 2 / p) * q + p**2) / ((n + 1 - 2 / p) * (q - p))
    expected = torch.cov(data.T) * (1 - rho + rho * torch.eye(p, dtype=F64))
    layer = pf.whitening(40).double().fit(data)
    close(layer.matrix @ layer.matrix.T, expected, 1e-10)
    theirs = sklearn.OAS().fit((data / scale).numpy())  # leaves the 2 / p terms out
    assert abs(theirs.shrinkage_ - rho.item()) < 0.02 * rho.item()


UNITS = torch.tensor([1e3, 1e-3, 1.0, 1e2, 1e-2, 10.0], dtype=F64)


@pytest.mark.parametrize("shrinkage", ["oas", 0.3, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_units_of_columns_do_not_matter(method, shrinkage):
    data = correlated(30, 6)
    plain = pf.whitening(6, method=method, shrinkage=shrinkage).double().fit(data)
    layer = pf.whitening(6, method=method, shrinkage=shrinkage).double().fit(data * UNITS)
    covariance = plain.matrix @ plain.matrix.T
    close(covariance.diagonal(), data.var(0), 1e-12)  # variances stay those of the data
    close(layer.matrix @ layer.matrix.T / UNITS.outer(UNITS), covariance, 1e-11)
    white, expected = layer.inv(data * UNITS), plain.inv(data)
    if method in ("zca", "pca"):  # whose choice among the roots does see the units
        close(white.square().sum(-1), expected.square().sum(-1), 1e-10)
        orthogonal = layer.matrix.T @ layer.matrix if method == "pca" else layer.matrix - layer.matrix.T
        orthogonal = orthogonal - orthogonal.diagonal().diag()
        size = layer.matrix.norm(dim=0)
        assert (orthogonal.abs() <= 1e-9 * (size.outer(size) if method == "pca" else size.max())).all()
    else:
        close(white, expected, 1e-11)
    if not shrinkage:
        close(torch.cov(white.T), torch.eye(6, dtype=F64), 1e-11)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "power", "tolerance"), [(F64, 3, 1e-9), (torch.float32, 1, 2e-4)])
def test_units_cost_no_digits(method, trainable, dtype, power, tolerance):
    """Variances from 1e-18 to 1e18, which no eigendecomposition of a covariance survives; float32 too."""
    units = UNITS**power
    data = correlated(200, 6)
    data = data - data.mean(0)
    layer = pf.whitening(6, method=method, shrinkage=0.0, trainable=trainable).to(dtype).fit(data * units)
    white, ladj = pf.inv_and_ladj(layer, (data * units).to(dtype))
    close(torch.cov(white.detach().T), torch.eye(6, dtype=dtype), tolerance)
    close(layer(white).detach().double() / units, data, 10 * tolerance)
    expected = -0.5 * torch.logdet(torch.cov(data.T)) - units.log().sum()
    close(ladj.detach().double(), expected.expand(200), 1e-4 if dtype == torch.float32 else 1e-9)
    wide = layer.double()  # which makes A and its inverse agree to the last digit
    close(wide.inv(wide(white.double().detach()).clone()).detach(), white.double().detach(), 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_column_keeps_the_scale_one(method):
    """This holds whatever the units of the other columns, which come out as they do without it."""
    data = 1e-3 * correlated(50, 3)
    layer, without = (pf.whitening(d, method=method).double() for d in (4, 3))
    with pytest.warns(UserWarning, match=r"rank 3 of 4; 1 constant column\(s\) keep the scale 1\.$"):
        layer.fit(torch.cat([data, torch.full((50, 1), 0.1, dtype=F64)], -1))
    without.fit(data)
    covariance = layer.matrix @ layer.matrix.T
    close(covariance[:3, :3], without.matrix @ without.matrix.T, 1e-15)
    close(covariance[3], torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64), 1e-12)
    assert layer.mean[3] == 0.1


@pytest.mark.parametrize("method", METHODS)
def test_trainable_starts_where_the_fixed_one_is_and_learns(method):
    data = correlated(200, 4, offset=-1.0)
    fixed = pf.whitening(4, method=method).double().fit(data)
    layer = pf.whitening(4, method=method, trainable=True).double().fit(data)
    close(layer.matrix, fixed.matrix, 1e-12)
    close(layer.inv(data), fixed.inv(data), 1e-10)
    assert {name for name, _ in layer.named_parameters()} == {"mean", "triangle"}
    other = correlated(200, 4, seed=5)
    base = dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1)
    optimiser = torch.optim.LBFGS(layer.parameters(), line_search_fn="strong_wolfe", max_iter=200, tolerance_change=0.0)

    def loss():
        optimiser.zero_grad()
        value = -dist.TransformedDistribution(base, [layer]).log_prob(other).mean()
        value.backward()
        return value

    for _ in range(3):
        optimiser.step(loss)
    # maximum likelihood of a Gaussian divides by N
    close((layer.matrix @ layer.matrix.T).detach(), torch.cov(other.T, correction=0), 1e-4)
    assert not list(fixed.parameters())


# ---------------------------------------------------------------------- streams


def test_a_stream_equals_one_fit():
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 513, (1000,), generator=generator).tolist()
    sizes[:3] = 1, 512, 1
    data = correlated(sum(sizes), 6, offset=100.0)
    stream, whole = pf.whitening(6).double(), pf.whitening(6).double().fit(data)
    for batch in data.split(sizes):
        stream.observe(batch)
    assert torch.equal(stream.matrix, torch.eye(6, dtype=F64))  # only adapt changes the map
    stream.adapt()
    assert stream.statistics.count == sum(sizes)
    close(stream.mean, whole.mean, 1e-10)
    close(stream.covariance, whole.covariance, 1e-10)
    close(stream.matrix, whole.matrix, 1e-10)
    close(stream.covariance, torch.cov(data.T), 1e-9)


def test_order_and_grouping_do_not_matter():
    data = correlated(600, 4)
    one, two = pf.whitening(4).double(), pf.whitening(4).double()
    one.observe(data[:1]).observe(data[1:]).adapt()
    two.observe(data[300:].reshape(10, 30, 4)).observe(data[:300]).adapt()
    close(one.matrix, two.matrix, 1e-12)
    two.reset_statistics()
    with pytest.raises(ValueError, match="no rows yet"):
        two.adapt()
    two.observe(data[:50]).adapt()
    close(two.matrix, pf.whitening(4).double().fit(data[:50]).matrix, 1e-12)
    one.fit(data[:50])  # forgets what was observed before
    close(two.matrix, one.matrix, 1e-12)


def test_statistics_stay_in_double_precision():
    data = correlated(2000, 3).float() + 1e3
    layer = pf.whitening(3, shrinkage=0.0)
    for batch in data.split(7):
        layer.observe(batch)
    layer.double().float().half().float()
    assert layer.statistics.scatter.dtype == F64
    assert layer.adapt().mean.dtype == torch.float32
    close(layer.covariance, torch.cov(data.double().T), 1e-9)
    twin = pf.whitening(3)
    twin.load_state_dict(layer.state_dict())
    close(twin.covariance, layer.covariance, 0)
    # a wider dtype removes inconsistencies of the narrower one, whether the layer is converted or loaded
    for trainable in (False, True):
        layer = pf.whitening(3, trainable=trainable).fit(data)
        loaded = pf.whitening(3, trainable=trainable).double()
        loaded.load_state_dict(layer.state_dict())
        for wide in (loaded, layer.double()):
            x = torch.randn(50, 3, dtype=F64)
            close(wide.inv(wide(x).detach().clone()).detach(), x, 1e-10)
            close(pf.call_and_ladj(wide, x)[1][0].detach(), torch.linalg.slogdet(wide.matrix.detach())[1], 1e-12)


# ---------------------------------------------------------------------- hard data

DEGENERATE = {
    "rank one": lambda: (
        torch.linspace(-1, 2, 50, dtype=F64).unsqueeze(-1) * torch.tensor([1.0, -2.0, 0.5, 3.0]).to(F64)
    ),
    "constant column": lambda: torch.cat([correlated(50, 3), torch.full((50, 1), 7.0, dtype=F64)], -1),
    "fewer rows than columns": lambda: correlated(3, 4),
    "single row": lambda: correlated(1, 4),
    "all rows equal": lambda: torch.full((9, 4), 2.5, dtype=F64),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("shrinkage", ["oas", 0.1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_stay_invertible_and_it_says_so(name, method, shrinkage, trainable):
    data = DEGENERATE[name]()
    layer = pf.whitening(4, method=method, shrinkage=shrinkage, trainable=trainable).double()
    with pytest.warns(UserWarning, match=r"no spread|has rank [0-3] of 4"):
        layer.fit(data)
    x = torch.randn(20, 4, dtype=F64)
    y, ladj = pf.call_and_ladj(layer, x)
    assert y.isfinite().all()
    close(layer.inv(y.detach().clone()), x, 1e-6)
    close(ladj[0], torch.linalg.slogdet(layer.matrix)[1], 1e-9)
    white = layer.inv(data)
    assert white.isfinite().all()
    close(white.mean(0), torch.zeros(4, dtype=F64), 1e-9)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_diagonal_method_standardises_and_leaves_the_correlations(trainable):
    data = correlated(200, 5, offset=3.0)
    layer = pf.whitening(5, method="diagonal", trainable=trainable).double().fit(data)
    close(layer.matrix, data.std(0).diag(), 1e-12)
    close(layer.mean, data.mean(0), 1e-12)
    white, ladj = pf.inv_and_ladj(layer, data)
    close(white, (data - data.mean(0)) / data.std(0), 1e-12)
    close(torch.corrcoef(white.T), torch.corrcoef(data.T), 1e-12)
    close(ladj, -data.std(0).log().sum().expand(200), 1e-12)
    close(layer.statistics.covariance(), torch.cov(data.T), 1e-12)  # these are complete


def test_the_diagonal_method_needs_no_full_rank():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shrinkage in ("oas", 0.0, 0.5):
            for name in ("rank one", "fewer rows than columns"):
                data = DEGENERATE[name]()
                layer = pf.whitening(4, method="diagonal", shrinkage=shrinkage).double().fit(data)
                close(layer.matrix, data.std(0).diag(), 1e-12)
    data = DEGENERATE["constant column"]()
    with pytest.warns(UserWarning, match=r"1 constant column\(s\) keep the scale 1"):
        layer = pf.whitening(4, method="diagonal").double().fit(data)
    close(layer.matrix, torch.cat([data[:, :3].std(0), torch.ones(1, dtype=F64)]).diag(), 1e-12)


def test_the_warning_points_at_the_call():
    for call in (
        lambda layer: layer.fit(torch.zeros(5, 3)),
        lambda layer: layer.observe(torch.zeros(5, 3)).adapt(),
        lambda layer: layer.fit(torch.eye(3)[:2]),
    ):
        with pytest.warns(UserWarning, match="spread|rank") as caught:
            call(pf.whitening(3))
        assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("name", DEGENERATE)
def test_without_shrinkage_they_are_refused(name):
    layer = pf.whitening(4, shrinkage=0).double()
    layer.observe(DEGENERATE[name]())
    with pytest.raises(ValueError, match=r"has rank \d of 4.*more shrinkage"):
        layer.adapt()
    assert torch.equal(layer.matrix, torch.eye(4, dtype=F64))


@pytest.mark.parametrize("size", [1, 17, 1000])
def test_equal_rows_have_no_spread_whatever_their_value(size):
    """The mean of equal numbers is rounded; the remainder must not count as a covariance."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e6):
        row = scale * torch.randn(3, dtype=F64, generator=generator)
        layer = pf.whitening(3).double()
        for batch in row.expand(1000, 3).split(size):
            layer.observe(batch)
        with pytest.warns(UserWarning, match="no spread"):
            layer.adapt()
        assert torch.equal(layer.matrix, torch.eye(3, dtype=F64))
        close(layer.mean, row, 1e-15 * scale)


def test_missing_directions_are_filled_however_many_rows_there_are():
    """The default weight vanishes as 1/N, but not below the level of rounding errors."""
    layer = pf.whitening(4).double().observe(DEGENERATE["rank one"]())
    held = layer.statistics
    held.replace(held.count * 1e15, held.mean, held.scatter * 1e15)
    with pytest.warns(UserWarning, match="has rank 1 of 4"):
        layer.adapt()
    x = torch.randn(20, 4, dtype=F64)
    close(layer.inv(layer(x).clone()), x, 1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_large_offset_costs_no_digits(dtype):
    data = correlated(500, 5)
    shifted = (data + 1e6).to(dtype)
    exact = torch.cov((shifted.double() - 1e6).T)
    layer = pf.whitening(5, shrinkage=0.0).to(dtype)
    for batch in shifted.split(64):
        layer.observe(batch)
    layer.adapt()
    close(layer.covariance, exact, 1e-7)
    white = layer.inv(shifted)
    assert white.isfinite().all()
    # the mean is a float32 next to 1e6, good to 0.03; a constant shift, which does not affect the covariance
    close(torch.cov(white.T), torch.eye(5, dtype=dtype), 1e-8 if dtype == F64 else 1e-3)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_at_isotropic_covariance(method, trainable):
    """Equal eigenvalues, where gradients of eigh and svd are NaN."""
    d = 4
    rows = torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)]) * 2.0
    layer = pf.whitening(d, method=method, shrinkage=0.0, trainable=trainable).double().fit(rows)
    close(layer.matrix @ layer.matrix.T, (8 / 7) * torch.eye(d, dtype=F64), 1e-12)
    x = torch.randn(3, d, dtype=F64, requires_grad=True)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda v, *_: pf.call_and_ladj(layer, v), (x, *parameters))
    assert torch.autograd.gradcheck(lambda v, *_: pf.inv_and_ladj(layer, v), (x, *parameters))


def test_scoring_and_sampling_change_no_state():
    layer = pf.whitening(4).fit(correlated(100, 4).float())
    layer.train()
    before = copy.deepcopy(layer.state_dict())
    flow = pf.Flow(dist.Normal(torch.zeros(4), 1.0).to_event(1), [layer])
    y = flow().rsample((50,))
    flow().log_prob(y + 100.0)
    layer.log_abs_det_jacobian(y, layer(y))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_adapting_makes_the_memo_miss(trainable, inference):
    layer = pf.whitening(3, trainable=trainable).fit(correlated(50, 3).float())
    chain = pf.Chain([layer])
    x = torch.randn(5, 3)
    y, z = layer(x), chain(x)
    layer.observe(correlated(500, 3, seed=2).float())
    with torch.inference_mode(inference):
        layer.adapt()
    for transform, value in ((layer, y), (chain, z)):
        back = transform.inv(value)
        assert (back - x).abs().max() > 0.01
        torch.testing.assert_close(transform.with_cache(0)(back), value)


def test_adapting_under_a_pending_backward_pass_raises():
    """Values computed before have the gradients of the earlier map, or none."""
    layer = pf.whitening(3).double().fit(correlated(50, 3))
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    y = layer(x)
    layer.observe(correlated(50, 3, seed=2)).adapt()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer(x).sum().backward()
    close(x.grad, layer.matrix.sum(0).expand(5, 3), 1e-12)


def test_data_that_carry_a_graph_leave_none_behind():
    data = correlated(50, 3).requires_grad_()
    layer = pf.whitening(3).double().fit(data)
    assert not layer.mean.requires_grad
    assert layer.inv(data).requires_grad


# ---------------------------------------------------------------------- devices without float64


def to_mps(tensor):
    """What ``.to("mps")`` does, except for the device, which is not available for tests."""
    if tensor.dtype == F64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return tensor.clone()


@pytest.mark.parametrize("trainable", [False, True])
def test_statistics_stay_where_float64_is(trainable, monkeypatch):
    data = correlated(60, 3).float()
    expected = pf.whitening(3, trainable=trainable).fit(data)
    monkeypatch.setattr(sys.modules[pf.Whitening.__module__], "lacks_float64", lambda device: True)
    layer = pf.whitening(3, trainable=trainable).observe(data[:20])._apply(to_mps)
    layer.observe(data[20:]).adapt()
    assert layer.statistics.scatter.dtype == F64
    torch.testing.assert_close(layer.state_dict(), expected.state_dict())
    layer.half()._apply(lambda t: t.float() if t.dtype == torch.half else to_mps(t))


def test_statistics_stay_on_the_cpu(monkeypatch):
    """With the meta device in the place of one that has no float64."""
    monkeypatch.setattr(sys.modules[pf.Whitening.__module__], "lacks_float64", lambda device: device.type == "meta")
    layer = pf.whitening(3).fit(correlated(60, 3).float())
    covariance = layer.covariance
    with torch.device("meta"):
        fresh = pf.whitening(3)
    for module in (layer.to("meta"), fresh):
        assert module.mean.is_meta
        assert {t.device.type for t in module.statistics.buffers()} == {"cpu"}
    close(layer.covariance, covariance, 0)
    state = pf.whitening(3).fit(correlated(60, 3).float()).state_dict()
    layer.to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(layer.state_dict(), state)


# ---------------------------------------------------------------------- bad input


def test_bad_rows_are_refused_and_change_nothing():
    layer = pf.whitening(3).double().fit(correlated(40, 3))
    before = copy.deepcopy(layer.state_dict())
    for bad in (float("nan"), float("inf"), -float("inf")):
        batch = correlated(10, 3)
        batch[4, 1] = bad
        for call in (layer.observe, layer.fit):
            with pytest.raises(ValueError, match="1 of 10 hold NaN or infinity"):
                call(batch)
    for call in (layer.observe, layer.fit):
        with pytest.raises(ValueError, match="at least one row"):
            call(torch.zeros(0, 3, dtype=F64))
        with pytest.raises(ValueError, match="3 elements along dim -1"):
            call(torch.zeros(5, 4, dtype=F64))
        with pytest.raises(TypeError, match="floating point"):
            call(torch.zeros(5, 3, dtype=torch.long))
        with pytest.raises(TypeError, match="floating point"):
            call([[0.0, 1.0, 2.0]])
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    for call, huge in ((layer.observe, 1e200), (layer.fit, torch.tensor([[1e200], [-1e200]], dtype=F64))):
        with pytest.raises(ValueError, match="squares are not"):  # the data are finite, but their squares are not
            call(torch.ones(2, 3, dtype=F64) * huge)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.fit(correlated(9, 3) * 1e120).covariance.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ica"}, "method must be one of zca"),
        ({"shrinkage": -0.1}, r"shrinkage must be a number in \[0, 1\]"),
        ({"shrinkage": 1.5}, "shrinkage"),
        ({"shrinkage": float("nan")}, "shrinkage"),
        ({"shrinkage": "ledoit"}, "shrinkage"),
        ({"shrinkage": True}, "shrinkage"),
        ({"dim": 0}, "dim"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pf.whitening(3, **arguments)


def test_it_adapts_to_nothing_only_after_something():
    with pytest.raises(ValueError, match="observe"):
        pf.whitening(3).adapt()


@pytest.mark.parametrize("trainable", [False, True])
def test_it_refuses_a_hypernetwork(trainable):
    with pytest.raises(ValueError, match="Whitening cannot be conditioned"):
        pf.Conditional(pf.whitening(3, trainable=trainable), 2)
    # in a chain the other layers take the context, and this one stays unchanged
    layer = pf.whitening(3, trainable=trainable).fit(correlated(40, 3).float())
    conditional = pf.Conditional(pf.Chain([pf.shift(3), layer]), 2)
    conditioned = conditional.condition(torch.randn(5, 2))
    torch.testing.assert_close(conditioned[1].matrix, layer.matrix)
    assert conditioned(torch.randn(3)).shape == (5, 3)


# ---------------------------------------------------------------------- several processes


def _observe_a_half(rank, path, data):
    sys.path[:] = [p for p in sys.path if p]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        layer = pf.whitening(data.shape[1]).double()
        half = data[: len(data) // 3] if rank == 0 else data[len(data) // 3 :]
        steps = 4
        for i, batch in enumerate(half.tensor_split(steps)):
            if i == 2 and rank == 0:
                batch = batch[:0]  # an empty share is fine while somebody has rows
            layer.observe(batch)
        # one process meets a NaN: all refuse, none waits forever, nothing is added
        bad = half[:5].clone()
        if rank == 1:
            bad[0, 0] = float("nan")
        with pytest.raises(ValueError, match="hold NaN" if rank == 1 else "other processes refused"):
            layer.observe(bad)
        with pytest.raises(ValueError, match="at least one row"):
            layer.observe(half[:0])
        torch.save(layer.adapt().state_dict(), os.path.join(path, f"{rank}.pt"))
        torch.save(pf.whitening(data.shape[1]).double().fit(half).state_dict(), os.path.join(path, f"fit{rank}.pt"))
        alone = pf.whitening(data.shape[1]).double().fit(half if rank else half[:0])
        torch.save(alone.state_dict(), os.path.join(path, f"alone{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_statistics_of_one(tmp_path):
    data = correlated(301, 5, offset=50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spawn(_observe_a_half, args=(str(tmp_path), data), nprocs=2)
    first = data[:100].tensor_split(4)
    seen = torch.cat([first[0], first[1], first[3], data[100:]])
    for name, rows in (("", seen), ("fit", data), ("alone", data[100:])):
        expected = pf.whitening(5).double().fit(rows).state_dict()
        states = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        for key, value in expected.items():
            close(states[0][key], value, 1e-10 * max(1.0, value.abs().max().item()))
            assert torch.equal(states[0][key], states[1][key])
