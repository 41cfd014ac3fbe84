"""The one registry: every exported layer has at least one row here, and every row runs every conformance test.

A new layer is one line. ``tags`` name what a row cannot do; the suite asserts that it then raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

import pyro_invflows as pf
from pyro_invflows.testing import sample_domain

DIMS = (1, 2, 5, 33)


@dataclass(frozen=True)
class Case:
    """One way to build one layer."""

    name: str
    layer: str  # the exported class that this row stands for
    make: Callable[[int], Transform]
    dims: tuple[int, ...] = DIMS
    event: Callable[[int], tuple[int, ...]] = lambda d: (d,)
    # builds Conditional layers, called with (input_dim, context_dim); None: the layer refuses
    conditional: Callable[[int, int], pf.Conditional] | None = None
    tags: frozenset[str] = field(default_factory=frozenset)

    def build(self, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transform:
        """Build the layer with U(-1, 1) added to every parameter, so that nothing is right only because it is zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = self.make(dim).to(dtype)
            scatter(layer)
        return layer

    def points(
        self, dim: int, batch: Iterable[int] = (3,), dtype: torch.dtype = torch.float64, seed: int = 1
    ) -> Tensor:
        """Draw points of the layer's domain, all dimensions of the event included."""
        generator = torch.Generator().manual_seed(seed)
        layer = self.make(dim)
        return sample_domain(layer, tuple(batch), event_shape=self.event(dim), dtype=dtype, generator=generator)

    def batch_of(self, shape: torch.Size, layer: Transform, inverse: bool = False) -> torch.Size:
        """Return the batch shape that the layer sees in a value of ``shape``."""
        side = layer.codomain if inverse else layer.domain
        return shape[: len(shape) - side.event_dim]


def scatter(module: torch.nn.Module, size: float = 1.0) -> torch.nn.Module:
    """Add U(-size, size) to every parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * (2 * torch.rand_like(parameter) - 1))
    return module


def image(dim: int) -> tuple[int, ...]:
    return (dim, 2, 3)


def image_base(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Distribution:
    return torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(shape, dtype=dtype), torch.ones((), dtype=dtype)), len(shape)
    )


def _mixed_chain(dim: int, recompute: bool = False) -> pf.Chain:
    parts = [
        pf.orthogonal(dim),
        pf.affine_coupling(dim, [8]),
        torch.distributions.transforms.AffineTransform(0.5, 2.0),
        pf.baird(dim),
        pf.permute(dim),
        pf.diagonal(dim).inv,
        pf.Chain([pf.svd_linear(dim), pf.prelu(dim)]),
    ]
    return pf.Chain(parts, recompute=recompute)


def _image_chain(dim: int) -> pf.Chain:
    return pf.Chain(
        [
            pf.pixel_shuffle(4 * dim).inv,
            pf.orthogonal(4 * dim, dim=-3),
            pf.affine_coupling(4 * dim, [4], dim=-3),
            pf.PixelShuffle(2),
            pf.Baird(),
            pf.diagonal(dim, dim=-3),
        ]
    )


def on_meta() -> bool:
    """Whether tensors are being made without values, so that layers fitted to data have to be loaded."""
    return torch.get_default_device().type == "meta"


def _negative_diagonal(dim: int) -> pf.Diagonal:
    """Return a layer with every other sign negative; the seed decides which."""
    signs = torch.arange(1, dim + 1) + torch.initial_seed() % 2
    return pf.diagonal(dim) if on_meta() else pf.Diagonal.from_matrix(torch.diag((-1.5) ** signs))


def _pivoted(dim: int) -> pf.LULinear:
    """Return a layer with a permutation and negative signs; the seed decides which."""
    if on_meta():
        return pf.lu_linear(dim)
    generator = torch.Generator().manual_seed(int(dim) + 1000 * torch.initial_seed())
    return pf.LULinear.from_matrix(torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0])


def _contraction(dim: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        pf.networks.LinearContraction(dim, 6, 0.98), torch.nn.Softplus(), pf.networks.LinearContraction(6, dim, 0.98)
    )


def fitted(layer: pf.ActNorm | pf.Whitening) -> pf.ActNorm | pf.Whitening:
    """Fit a layer to correlated rows with a nonzero mean, which depend on the seed."""
    if on_meta():
        return layer
    d = layer.input_dim
    generator = torch.Generator().manual_seed(d + 1000 * torch.initial_seed())
    rows = torch.randn(4 * d + 5, d, generator=generator) @ torch.randn(d, d, generator=generator) + 2.0
    return layer.fit(rows if layer.dim == -1 else rows[..., None, None])


# Layers that change the dimension of an event cannot keep the promises of a bijection (there is no Jacobian, and a pass
# may draw noise), so these have no row below. ``tests/test_noise.py`` checks what they promise instead, by this tag.
CHANGES_DIMENSION = {"ConcatNoise": "exact", "Slice": "bound"}

#: Abilities that a layer with an iterative inverse may lack; the suite asserts that it then raises an error.
FIRST_ORDER_INVERSE = frozenset({"first order inverse"})

CASES = [
    Case("sigmoid", "Sigmoid", pf.sigmoid),
    Case("tanh", "Tanh", pf.tanh),
    Case("leaky_relu", "LeakyReLU", lambda d: pf.leaky_relu(d, negative_slope=0.3)),
    Case("prelu", "PReLU", pf.prelu, conditional=pf.conditional_prelu),
    Case("prelu_shared", "PReLU", lambda d: pf.PReLU((), negative_slope=0.25)),
    Case("elu", "ELU", lambda d: pf.elu(d, alpha=1.5)),
    Case("selu", "SELU", pf.selu),
    Case("baird", "Baird", pf.baird, conditional=pf.conditional_baird),
    Case("spline", "Spline", pf.spline, conditional=pf.conditional_spline),
    Case("spline_shared", "Spline", lambda d: pf.Spline(num_bins=3, bound=2.0)),
    Case("sinh_arcsinh", "SinhArcsinh", pf.sinh_arcsinh, conditional=pf.conditional_sinh_arcsinh),
    Case(
        "monotone_mixture",
        "Monotone",
        lambda d: pf.Monotone(pf.monotone.MixtureCDF(num_components=3), d),
        dims=(1, 3),
        conditional=lambda d, c: pf.Conditional(pf.Monotone(pf.monotone.MixtureCDF(num_components=3), d), c),
    ),
    Case(
        "monotone_tanh_bump",
        "Monotone",
        lambda d: pf.Monotone(pf.monotone.TanhBump(), (d, 1)),
        dims=(2,),
        event=lambda d: (d, 3),
    ),
    Case("interval", "Interval", lambda d: pf.interval(d, low=-1.5, high=4.0)),
    Case("interval_each", "Interval", lambda d: pf.Interval(-torch.arange(1.0, d + 1), torch.linspace(0.5, 3.0, d))),
    Case("permute", "Permute", pf.permute),
    Case("permute_image", "Permute", lambda d: pf.permute(d, dim=-3), event=image),
    Case(
        "pixel_shuffle", "PixelShuffle", lambda d: pf.pixel_shuffle(4 * d), dims=(1, 2), event=lambda d: (4 * d, 2, 3)
    ),
    Case("shift", "Shift", pf.shift, conditional=pf.conditional_shift),
    Case(
        "shift_image",
        "Shift",
        lambda d: pf.shift(d, dim=-3),
        dims=(1, 2),
        event=image,
        conditional=lambda d, c: pf.conditional_shift(d, c, dim=-3),
    ),
    Case("diagonal", "Diagonal", pf.diagonal, conditional=pf.conditional_diagonal),
    Case("diagonal_negative", "Diagonal", _negative_diagonal),
    Case(
        "diagonal_image",
        "Diagonal",
        lambda d: pf.diagonal(d, bias=False, dim=-3),
        dims=(1, 2),
        event=image,
        conditional=lambda d, c: pf.conditional_diagonal(d, c, bias=False, dim=-3),
    ),
    Case("act_norm", "ActNorm", pf.act_norm, conditional=pf.conditional_act_norm),
    Case(
        "act_norm_image",
        "ActNorm",
        lambda d: fitted(pf.act_norm(d, dim=-3)),
        dims=(1, 2),
        event=image,
        conditional=lambda d, c: pf.conditional_act_norm(d, c, dim=-3),
    ),
    Case("orthogonal", "Orthogonal", pf.orthogonal, conditional=pf.conditional_orthogonal),
    Case("orthogonal_odd", "Orthogonal", lambda d: pf.orthogonal(d, num_reflections=3, bias=True)),
    Case(
        "orthogonal_image",
        "Orthogonal",
        lambda d: pf.orthogonal(d, bias=True, dim=-3),
        dims=(2, 5),
        event=image,
        conditional=lambda d, c: pf.conditional_orthogonal(d, c, bias=True, dim=-3),
    ),
    Case("svd_linear", "SVDLinear", pf.svd_linear, conditional=pf.conditional_svd_linear),
    Case(
        "svd_linear_image",
        "SVDLinear",
        lambda d: pf.svd_linear(d, dim=-3),
        dims=(2, 5),
        event=image,
        conditional=lambda d, c: pf.conditional_svd_linear(d, c, dim=-3),
    ),
    # not 33: as for the trainable whitening below; tests/test_lu.py has smaller entries
    Case("lu_linear", "LULinear", pf.lu_linear, dims=(1, 2, 5), conditional=pf.conditional_lu_linear),
    Case("lu_linear_pivoted", "LULinear", _pivoted, dims=(1, 2, 5)),
    Case(
        "lu_linear_image",
        "LULinear",
        lambda d: pf.lu_linear(d, dim=-3),
        dims=(2, 5),
        event=image,
        conditional=lambda d, c: pf.conditional_lu_linear(d, c, dim=-3),
    ),
    Case(
        "affine_coupling",
        "AffineCoupling",
        lambda d: pf.affine_coupling(d, [8, 8]),
        conditional=lambda d, c: pf.conditional_affine_coupling(d, c, hidden_dims=[8, 8]),
    ),
    Case("coupling_last", "AffineCoupling", lambda d: pf.affine_coupling(d, [8], keep="last")),
    Case("additive_coupling", "AffineCoupling", lambda d: pf.affine_coupling(d, [8], scale=None)),
    Case(
        "coupling_constants",
        "AffineCoupling",
        lambda d: pf.affine_coupling(d, split_dim=0),
        dims=(1, 5),
        conditional=lambda d, c: pf.Conditional(pf.affine_coupling(d, split_dim=0), c),
    ),
    Case(
        "coupling_sequence",
        "AffineCoupling",
        lambda d: pf.affine_coupling(d, [4], dim=-2),
        event=lambda d: (d, 3),
        dims=(1, 2),
    ),
    Case(
        "coupling_image",
        "AffineCoupling",
        lambda d: pf.affine_coupling(d, [4], dim=-3),
        dims=(1, 2, 5),
        event=image,
        conditional=lambda d, c: pf.conditional_affine_coupling(d, c, hidden_dims=[4], dim=-3),
    ),
    # a smooth network with bounded hidden units: steep splines are checked in test_coupling.py and test_monotone.py
    Case(
        "spline_coupling",
        "SplineCoupling",
        lambda d: pf.spline_coupling(d, [2], activation=torch.nn.Tanh),
        conditional=lambda d, c: pf.conditional_spline_coupling(d, c, hidden_dims=[2], activation=torch.nn.Tanh),
    ),
    Case(
        "spline_coupling_last",
        "SplineCoupling",
        lambda d: pf.spline_coupling(d, [4], num_bins=3, bound=2.0, keep="last", activation=torch.nn.Tanh),
        dims=(2, 5),
    ),
    Case(
        "spline_coupling_image",
        "SplineCoupling",
        lambda d: pf.spline_coupling(d, [1], num_bins=4, dim=-3, activation=torch.nn.Tanh),
        dims=(1, 2),
        event=image,
        conditional=lambda d, c: pf.conditional_spline_coupling(
            d, c, hidden_dims=[1], num_bins=4, dim=-3, activation=torch.nn.Tanh
        ),
    ),
    Case(
        "coupling_sinh_arcsinh",
        "Coupling",
        lambda d: pf.Coupling(
            pf.monotone.SinhArcsinh(), 1, pf.networks.dense_network(1, [8], 2 * (d - 1)), input_dim=d
        ),
        dims=(2, 5),
    ),
    Case(
        "affine_autoregressive",
        "AffineAutoregressive",
        lambda d: pf.affine_autoregressive(d, [8, 8]),
        conditional=lambda d, c: pf.conditional_affine_autoregressive(d, c, hidden_dims=[8, 8]),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "affine_autoregressive_reversed",
        "AffineAutoregressive",
        lambda d: pf.affine_autoregressive(d, [8], ordering=range(d)[::-1]),
        dims=(2, 5),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "spline_autoregressive",
        "SplineAutoregressive",
        lambda d: pf.spline_autoregressive(d, [8], num_bins=4),
        # not 33: after so many steep splines of each other x is too ill-conditioned to test in float32
        dims=(1, 2, 5),
        conditional=lambda d, c: pf.conditional_spline_autoregressive(d, c, hidden_dims=[8], num_bins=4),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "autoregressive",
        "Autoregressive",
        lambda d: pf.Autoregressive(pf.monotone.TanhBump(), pf.networks.masked_network(d, [8], 4)),
        dims=(1, 2, 5),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case("whitening", "Whitening", lambda d: fitted(pf.whitening(d))),
    Case("whitening_pca_cor", "Whitening", lambda d: fitted(pf.whitening(d, method="pca-cor", shrinkage=0.2))),
    Case("whitening_diagonal", "Whitening", lambda d: fitted(pf.whitening(d, method="diagonal")), dims=(1, 5)),
    Case(
        "whitening_trainable",
        "Whitening",
        lambda d: fitted(pf.whitening(d, method="cholesky", trainable=True)),
        # not 33: a triangle of that size with entries U(-1, 1) is too ill-conditioned to test the layer
        dims=(1, 2, 5),
    ),
    Case("whitening_trainable_zca", "Whitening", lambda d: fitted(pf.whitening(d, trainable=True)), dims=(2, 5)),
    Case("whitening_image", "Whitening", lambda d: fitted(pf.whitening(d, dim=-3)), dims=(1, 2), event=image),
    Case("planar", "Planar", pf.planar, conditional=pf.conditional_planar),
    Case("radial", "Radial", pf.radial, conditional=pf.conditional_radial),
    Case("sylvester", "Sylvester", pf.sylvester, conditional=pf.conditional_sylvester),
    Case("sylvester_full", "Sylvester", lambda d: pf.sylvester(d, d), (1, 5)),
    Case(
        "generalized_sylvester",
        "GeneralizedSylvester",
        lambda d: pf.generalized_sylvester(d, [8]),
        (1, 2, 5),
        conditional=lambda d, c: pf.conditional_generalized_sylvester(d, c, hidden_dims=[8]),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case("low_rank_linear", "LowRankLinear", pf.low_rank_linear, conditional=pf.conditional_low_rank_linear),
    Case(
        "numerical_inverse",
        "NumericalInverse",
        lambda d: pf.NumericalInverse(dist.transforms.planar(d)),
        (2, 5),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "low_rank_residual",
        "LowRankResidual",
        pf.low_rank_residual,
        conditional=pf.conditional_low_rank_residual,
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "low_rank_residual_sandwich",
        "LowRankResidual",
        lambda d: pf.low_rank_residual(d, 3, form="sandwich", activation=torch.nn.Tanh, order=2),
        conditional=lambda d, c: pf.conditional_low_rank_residual(d, c, hidden_dim=3, form="sandwich"),
    ),
    Case(
        "contractive_residual",
        "ContractiveResidual",
        lambda d: pf.contractive_residual(d, [8, 3]),
        conditional=lambda d, c: pf.conditional_contractive_residual(d, c, hidden_dims=[8]),
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "contractive_residual_order_2",
        "ContractiveResidual",
        lambda d: pf.ContractiveResidual(_contraction(d), order=2),
        (2, 5),
    ),
    Case(
        "contractive_residual_image",
        "ContractiveResidual",
        lambda d: pf.contractive_residual(d, [4], dim=-3),
        (1, 2),
        event=image,
        tags=FIRST_ORDER_INVERSE,
    ),
    Case(
        "inverted",
        "Inverted",
        lambda d: pf.Inverted(pf.svd_linear(d)),
        conditional=lambda d, c: pf.Conditional(pf.Inverted(pf.svd_linear(d)), c),
    ),
    Case("chain", "Chain", _mixed_chain, conditional=lambda d, c: pf.Conditional(_mixed_chain(d), c)),
    Case("chain_recompute", "Chain", lambda d: _mixed_chain(d, recompute=True), tags=frozenset({"first order"})),
    Case("chain_image", "Chain", _image_chain, dims=(1, 2), event=lambda d: (d, 2, 4)),
    Case("chain_empty", "Chain", lambda d: pf.Chain()),
]

ALL = [pytest.param(case, id=case.name) for case in CASES]
WITH_DIMS = [pytest.param(case, dim, id=f"{case.name}-{dim}") for case in CASES for dim in case.dims]
SMALL = [pytest.param(case, case.dims[min(1, len(case.dims) - 1)], id=case.name) for case in CASES]
CONDITIONAL = [pytest.param(case, id=case.name) for case in CASES if case.conditional is not None]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
