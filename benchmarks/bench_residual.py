"""Measure contractive residual layers side by side with normflows' residual flow and Picard iteration.

``python benchmarks/bench_residual.py --output FILE`` writes a markdown table of ratios: medians and quartiles over the
rounds of one run, in which the contestants take turns (see ``timing.py``), with two threads. It takes about three
minutes; ``--short`` runs few rounds. The checkerboard's figure, which is not a timing, is read from the file that
``checkerboard.py`` wrote to the same folder.

The sandwich form has the widths and layers of normflows' network (D, k, k, D). The bottleneck form, whose nearest
equivalent is (D, k, D), has an activation after its last layer; it is included for comparison.

normflows' training step does what its documentation prescribes: forward, backward and ``update_lipschitz`` with five
iterations, without which its bound would be that of the initial weights.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import normflows as nf
import torch
from normflows.utils import update_lipschitz
from report import Figure, shown, write
from timing import Contestant, race
from torch import Tensor, nn

from pyro_invflows import Chain, ContractiveResidual, LowRankResidual, call_and_ladj, iresnet
from pyro_invflows.networks import LinearContraction
from pyro_invflows.solvers import Anderson, FixedPoint
from pyro_invflows.transforms.contractive_residual import _MEMORY

BATCH, CONSTANT = 256, 0.97


def scattered(module: nn.Module, size: float = 0.3) -> nn.Module:
    """Move all parameters away from their initial values, so that the contraction does something."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return module


def pair(dim: int, form: str) -> tuple[LowRankResidual, Any]:
    """Return our layer and normflows' with the same widths."""
    torch.manual_seed(0)
    ours = LowRankResidual(dim, form=form, lipschitz=CONSTANT)
    k = ours.hidden_dim
    widths = [dim, k, dim] if form == "bottleneck" else [dim, k, k, dim]
    theirs = nf.flows.Residual(nf.nets.LipschitzMLP(widths, lipschitz_const=CONSTANT), reverse=False)
    scattered(ours)
    scattered(theirs.iresblock.nnet)
    update_lipschitz(theirs, 200)  # their bound holds for these weights from here on
    return ours, theirs


def training(rounds: int) -> list[Figure]:
    """Time a training step."""
    figures = []
    for dim in (64, 256, 784):
        for form in ("sandwich", "bottleneck"):
            ours, theirs = pair(dim, form)
            x = torch.randn(BATCH, dim)

            def contestant(
                module: nn.Module,
                run: Callable[[Tensor], tuple[Tensor, Tensor]],
                after: Callable[[], None],
                x: Tensor = x,
            ) -> Contestant:
                def step(_: Any) -> None:
                    y, ladj = run(x)
                    (0.5 * y.square().sum(-1) - ladj).mean().backward()
                    after()

                return Contestant(step, lambda: module.zero_grad())

            timing = race(
                {
                    "normflows": contestant(theirs, theirs, lambda t=theirs: update_lipschitz(t, 5)),
                    "ours": contestant(ours, lambda x, o=ours: call_and_ladj(o, x), lambda: None),
                },
                rounds=rounds,
                repeats=5,
            )
            figures.append(
                Figure(
                    f"training step, D {dim}, batch {BATCH}, {form}: normflows' Residual of the same widths over ours "
                    "(exact log-det)",
                    shown(timing, "normflows", "ours"),
                    ">= 2" if form == "sandwich" else "",
                    timing.ratio("normflows", "ours") >= 2 if form == "sandwich" else None,
                )
            )
    return figures


@torch.no_grad()
def inverses(rounds: int) -> list[Figure]:
    """Time the inverse and measure its error."""
    figures = []
    for dim in (64, 256, 784):
        for form in ("sandwich", "bottleneck"):
            ours, theirs = pair(dim, form)
            x = torch.randn(BATCH, dim)
            y, their_y = ours(x).clone(), theirs.iresblock.forward(x)
            error = (ours._inverse(y) - x).abs().max().item()
            their_error = (theirs.iresblock._inverse_fixed_point(their_y) - x).abs().max().item()
            double = scattered(LowRankResidual(dim, form=form, lipschitz=CONSTANT)).double()
            double_error = (double._inverse(double(x.double()).clone()) - x.double()).abs().max().item()
            timing = race(
                {
                    "ours": Contestant(lambda _, o=ours, y=y: o._inverse(y)),
                    "normflows": Contestant(lambda _, t=theirs, y=their_y: t.iresblock._inverse_fixed_point(y)),
                },
                rounds=rounds,
                repeats=5,
            )
            figures.append(
                Figure(
                    f"inverse, D {dim}, batch {BATCH}, {form}: ours over normflows'",
                    f"{shown(timing, 'ours', 'normflows', 2)}; errors {error:.1e} float32, {double_error:.1e} float64, "
                    f"theirs {their_error:.1e} float32",
                    "<= 1.5, <= 2e-6, <= 1e-12" if form == "sandwich" else "<= 2e-6, <= 1e-12",
                    (form != "sandwich" or timing.ratio("ours", "normflows") <= 1.5)
                    and error <= 2e-6
                    and double_error <= 1e-12,
                )
            )
    return figures


@torch.no_grad()
def evaluations() -> list[Figure]:
    """Count the evaluations of g where the bound is active: linear g with eigenvalues spread over [-c, c]."""
    figures = []
    for dim in (64, 256):
        torch.manual_seed(0)
        q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
        g = LinearContraction(dim, dim, CONSTANT).double()
        g.weight.copy_(q @ torch.diag(torch.linspace(-1, 1, dim, dtype=torch.float64)) @ q.T)
        y = torch.randn(BATCH, dim, dtype=torch.float64)
        counts = []
        for solver in (FixedPoint(atol=1e-6, rtol=0.0, max_steps=2000), Anderson(memory=_MEMORY, atol=1e-6, rtol=0.0)):
            calls: list[int] = []
            handle = g.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            ContractiveResidual(g, solver=solver).inv(y.clone())
            handle.remove()
            counts.append(len(calls))
        ratio = counts[0] / counts[1]
        figures.append(
            Figure(
                f"evaluations of g to 1e-6 where the bound of {CONSTANT} binds, D {dim}: Picard over ours",
                f"{ratio:.1f} ({counts[0]} over {counts[1]})",
                ">= 5",
                ratio >= 5,
            )
        )
    return figures


def kept_bytes(chain: Chain, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the parameters."""
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in chain.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, ladj = call_and_ladj(chain, x)
        loss = y.square().sum() - ladj.sum()
    kept = sum(seen.values())
    loss.backward()
    return kept


def memory() -> list[Figure]:
    """Compare what chains of 16 and of 2 blocks keep."""
    x = torch.randn(BATCH, 64)
    kept = {
        (blocks, recompute): kept_bytes(scattered(iresnet(64, num_blocks=blocks, recompute=recompute)), x)  # type: ignore[arg-type]
        for blocks in (2, 16)
        for recompute in (False, True)
    }
    ratio, plain = kept[16, True] / kept[2, True], kept[16, False] / kept[2, False]
    return [
        Figure(
            "bytes kept for backward, 16 blocks over 2, D 64, recompute=True, parameters aside",
            f"{ratio:.3f} ({kept[16, True]} over {kept[2, True]}); plain {plain:.1f}",
            "<= 1.1",
            ratio <= 1.1,
        )
    ]


def checkerboard(folder: Path) -> list[Figure]:
    """Read the bits from the table in the output folder."""
    source = folder / "checkerboard.md"
    found = re.search(r"this flow.*\| ([0-9.]+) \|", source.read_text()) if source.exists() else None
    return [
        Figure(
            "checkerboard, parameters as in 4 blocks of width 128, bits",
            found[1] if found else "not measured: run checkerboard.py",
            "<= 5.05",
            found is not None and float(found[1]) <= 5.05,
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/residual.md"))
    parser.add_argument("--short", action="store_true", help="few rounds")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rounds = 3 if arguments.short else 25
    figures = [*training(rounds), *inverses(rounds), *evaluations(), *memory(), *checkerboard(arguments.output.parent)]
    write(figures, arguments.output, rounds)


if __name__ == "__main__":
    main()
