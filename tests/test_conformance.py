"""Every promise, for every row of the registry."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from cases import ALL, DTYPES, SMALL, WITH_DIMS, image_base
from torch.distributions.transforms import ComposeTransform, IndependentTransform

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.testing import check_bijection, jacobian_log_det

BATCHES = [(), (5,), (2, 0, 3), (2, 3)]


def event_ladj(layer, ladj, event_dim):
    """Sum an elementwise log-det over the event."""
    extra = event_dim - layer.domain.event_dim
    return ladj.flatten(ladj.dim() - extra).sum(-1) if extra else ladj


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "dim"), WITH_DIMS)
def test_keeps_every_promise(case, dim, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    layer = case.build(dim, dtype)
    check_bijection(layer, case.points(dim, dtype=dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize(("case", "dim"), WITH_DIMS)
def test_any_batch(case, dim, batch, dtype):
    layer, x = case.build(dim, dtype).with_cache(0), case.points(dim, batch, dtype)
    y, ladj = call_and_ladj(layer, x)
    assert y.shape == layer.forward_shape(x.shape)
    assert y.shape[: len(batch)] == batch
    back, inverse = inv_and_ladj(layer, y)
    assert back.shape == x.shape == layer.inverse_shape(y.shape)
    assert ladj.shape == inverse.shape == case.batch_of(x.shape, layer)
    assert layer.log_abs_det_jacobian(x, y).shape == ladj.shape
    assert y.dtype == back.dtype == ladj.dtype == dtype
    if batch == (2, 3):  # a loop over the batch gives the same
        for i in range(2):
            for j in range(3):
                alone, ladj_alone = call_and_ladj(layer, x[i, j])
                torch.testing.assert_close(y[i, j], alone, rtol=1e-4, atol=1e-4 * (1 + alone.abs().max().item()))
                torch.testing.assert_close(ladj[i, j], ladj_alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("case", "dim"), WITH_DIMS)
def test_log_det_against_the_jacobian(case, dim):
    layer, x = case.build(dim, seed=7), case.points(dim, (2,), seed=8)
    expected = jacobian_log_det(layer._call, x, layer.domain.event_dim)
    torch.testing.assert_close(call_and_ladj(layer, x)[1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_gradcheck_of_every_entry(case, dim):
    layer, x = case.build(dim), case.points(dim, (2,)).requires_grad_()
    parameters = [p for p in layer.parameters() if 0 < p.numel() <= 30]
    y = layer(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, *_: call_and_ladj(layer, v), (x, *parameters))
    assert torch.autograd.gradcheck(lambda v, *_: inv_and_ladj(layer, v), (y, *parameters))


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_second_order_is_right_or_refused(case, dim):
    layer, x = case.build(dim), case.points(dim, (2,)).requires_grad_()
    y = layer(x).detach().requires_grad_()
    if "first order" in case.tags:
        out, ladj = call_and_ladj(layer, x)
        (grad,) = torch.autograd.grad(out.sum() + ladj.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(grad.sum(), x)
        return
    inputs = [p for p in layer.parameters() if 0 < p.numel() <= 8]
    assert torch.autograd.gradgradcheck(lambda v, *_: call_and_ladj(layer, v), (x, *inputs))
    if "first order inverse" in case.tags:
        x = layer.inv(y)
        (grad,) = torch.autograd.grad(x.square().sum(), y, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match="first derivatives only"):
            torch.autograd.grad(grad.sum(), y)
        return
    assert torch.autograd.gradgradcheck(lambda v, *_: inv_and_ladj(layer, v), (y, *inputs))


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_meta_device(case, dim):
    layer, x = case.build(dim).to("meta"), case.points(dim).to("meta")
    y = x.new_empty(layer.forward_shape(x.shape))
    for run, start in ((call_and_ladj, x), (inv_and_ladj, y)):
        out, ladj = run(layer, start)
        assert out.device.type == ladj.device.type == "meta"
        assert out.shape[0] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_cuda_device(case, dim):
    layer, x = case.build(dim), case.points(dim)
    expected = [t.detach() for t in call_and_ladj(layer, x)]
    out = call_and_ladj(layer.to("cuda"), x.to("cuda"))
    for a, b in zip(out, expected, strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_functorch(case, dim):
    layer, x = case.build(dim), case.points(dim, (4,))
    y = layer(x).detach()
    for run, start in ((call_and_ladj, x), (inv_and_ladj, y)):
        expected, ladj = run(layer, start)
        mapped, mapped_ladj = torch.vmap(lambda v, r=run: r(layer, v), randomness="error")(start)
        torch.testing.assert_close(mapped, expected)
        torch.testing.assert_close(mapped_ladj, ladj)
        jacobian = torch.func.jacrev(lambda v, r=run: r(layer, v)[0])(start[0])
        whole = torch.linalg.slogdet(jacobian.reshape(start[0].numel(), -1))[1]
        torch.testing.assert_close(event_ladj(layer, ladj, start.dim() - 1)[0], whole)
        if "first order" not in case.tags:  # autograd functions without a forward-mode rule are allowed there
            forward = torch.func.jacfwd(lambda v, r=run: r(layer, v)[0])(start[0])
            torch.testing.assert_close(forward, jacobian)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_inference_mode_gives_the_same(case, dim):
    """Layers that use autograd internally must work although inference mode records nothing."""
    layer, x = case.build(dim), case.points(dim)
    y = layer(x).detach()
    for run, start in ((call_and_ladj, x), (inv_and_ladj, y)):
        expected = run(layer, start.clone())
        with torch.inference_mode():
            got = run(layer, start.clone())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.clone(), b.detach())
    layer(x.clone().requires_grad_()).sum().backward()  # leaves nothing behind


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_functional_call(case, dim):
    layer, x = case.build(dim), case.points(dim)
    new = {k: v + 0.25 for k, v in layer.named_parameters()}
    other = case.build(dim)
    other.load_state_dict(new, strict=False)
    layer(x)  # warm
    torch.testing.assert_close(torch.func.functional_call(layer, new, (x,)), other(x))


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_inside_torch_distributions(case, dim, cache_size):
    layer = case.build(dim).with_cache(cache_size)
    base = image_base(case.event(dim))
    event_dim = len(base.event_shape)
    reference = None
    for transforms in (
        [layer],
        [ComposeTransform([layer])],
        ComposeTransform([ComposeTransform([]), layer], cache_size=cache_size),
        [IndependentTransform(layer, event_dim - layer.domain.event_dim)],
        [layer.inv.inv],
        [pf.Inverted(pf.Inverted(layer))],
        [pf.Chain([layer])],
    ):
        for kind in (torch.distributions.TransformedDistribution, dist.TransformedDistribution, pf.FlowDistribution):
            d = kind(base, transforms)
            torch.manual_seed(3)
            y = d.rsample((4,))
            fresh = d.log_prob(y.detach().clone())
            assert fresh.shape == (4,)
            torch.testing.assert_close(d.log_prob(y), fresh)
            torch.testing.assert_close(d.log_prob(y[1].detach()), fresh[1])
            if reference is None:
                reference = y, fresh
            torch.testing.assert_close(y, reference[0])
            torch.testing.assert_close(fresh, reference[1])
    inverse = torch.distributions.TransformedDistribution(d, [layer.inv])  # back to the base
    x = torch.full(base.event_shape, 0.3, dtype=torch.float64)
    torch.testing.assert_close(inverse.log_prob(x), base.log_prob(x))


@pytest.mark.parametrize("case", ALL)
def test_a_point_far_out_inverts(case):
    """Twenty times the usual spread still inverts to a residual at rounding level."""
    dim = case.dims[-1]
    layer = case.build(dim)
    y = layer(case.points(dim)).detach()
    if layer.codomain in (torch.distributions.constraints.real, torch.distributions.constraints.real_vector):
        y = 20 * y
    x = layer.inv(y.clone())
    torch.testing.assert_close(layer(x.detach().clone()), y, rtol=1e-9, atol=1e-9)


#: Their inverses solve equations to a tolerance that half precision could not reach.
SOLVED = {
    "Planar",
    "Radial",
    "Sylvester",
    "AffineAutoregressive",
    "Autoregressive",
    "SplineAutoregressive",
    "GeneralizedSylvester",
    "LowRankResidual",
    "ContractiveResidual",
    "NumericalInverse",
}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_both_directions_under_autocast(case, dim, half):
    layer, x = case.build(dim, torch.float32), case.points(dim, dtype=torch.float32)
    y = layer(x).detach().clone()
    expected = [r.detach() for r in inv_and_ladj(layer, y.clone())]
    with torch.autocast("cpu", dtype=half):
        for run, value in ((call_and_ladj, x), (inv_and_ladj, y)):
            results = run(layer, value.clone().requires_grad_())
            assert all(r.isfinite().all() for r in results)
        if case.layer in SOLVED:
            torch.testing.assert_close([r.detach() for r in results], expected, rtol=1e-4, atol=1e-5)
            assert layer.inv(y.to(half)).dtype == torch.float32
        (results[0].float().sum() + results[1].float().sum()).backward()  # under autocast, as some users do
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    if case.conditional is not None:
        conditional, context = case.conditional(dim, 2), torch.randn(3, 2)
        with torch.autocast("cpu", dtype=half):
            layer = conditional.condition(context.to(half))
            assert layer.inv(y.clone()).isfinite().all()
