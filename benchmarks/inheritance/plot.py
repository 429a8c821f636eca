"""Two pictures: loss against what it cost, and each member's gap to scratch."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from inheritance.arms import ARMS
from inheritance.figures import Members, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "scratch": "#000000",
    "lineage": "#0072B2",
    "no-growth": "#D55E00",
    "prune": "#009E73",
    "jump": "#CC79A7",
    "late-lineage": "#56B4E9",
    "trunk": "#F0E442",
    "duplicate": "#E69F00",
    "distill": "#999999",
    "even-lineage": "#332288",
    "even-duplicate": "#882255",
    "cooled-last": "#117733",
    "exact-cooled-last": "#44AA99",
    "even-halves": "#AA4499",
}
"""Okabe and Ito's, and some of Tol's, which colour-blind eyes tell apart."""


def picture(results: Results, shown: Mapping[str, float]) -> str:
    """Return an SVG of both.

    Args:
        results: of one scale and text.
        shown: the budget at which each arm is drawn.
    """
    import matplotlib as mpl  # noqa: PLC0415 -- slow, and the runs need none of it

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    with plt.rc_context({"svg.hashsalt": "inheritance", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        _losses(left, results, shown)
        _gaps(right, results, shown)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return re.sub(r"[ \t]+$", "", file.getvalue(), flags=re.MULTILINE)


def _losses(axes: Axes, results: Results, shown: Mapping[str, float]) -> None:
    scratch = results.scratch
    sizes = sorted(next(iter(scratch.values())))
    points = [
        (
            _mean(m[i].flops for m in scratch.values()),
            _mean(m[i].reported for m in scratch.values()),
        )
        for i in sizes
    ]
    axes.plot(*zip(*points, strict=True), "o--", color=COLOURS["scratch"], label="scratch, each")
    for arm, kappa in shown.items():
        families = list(results.families[arm, kappa].values())
        order = sorted(families[0], key=lambda i: families[0][i].lineage_flops)
        points = [
            (
                _mean(f[i].lineage_flops for f in families),
                _mean(f[i].reported for f in families),
            )
            for i in order
        ]
        mark = "s" if ARMS[arm].members else "D"
        axes.plot(
            *zip(*points, strict=True),
            f"{mark}-",
            color=COLOURS[arm],
            markersize=4,
            label=f"{arm}, {kappa:g} x",
            linewidth=1,
        )
        if arm == "lineage":
            _curves(axes, families[0], order, arm)
    axes.set(
        xscale="log", xlabel="FLOPs of a member and its ancestors", ylabel="held-out nats a token"
    )
    top = max(m[0].reported for m in scratch.values())
    low = min(
        b.reported for fs in results.families.values() for f in fs.values() for b in f.values()
    )
    axes.set_ylim(low - 0.03 * (top - low), top + 0.15 * (top - low))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)


def _curves(axes: Axes, family: Members, order: Sequence[int], arm: str) -> None:
    """Draw the training loss between births, faint: it is noisy and of other text."""
    label: str | None = f"{arm}, its training loss"
    for i in order:
        born = family[i]
        before = born.lineage_flops - born.flops
        x = [before + flops for flops, _ in born.curve]
        losses = [loss for _, loss in born.curve]
        axes.plot(x, losses, color=COLOURS[arm], alpha=0.3, linewidth=0.8, label=label)
        label = None


def _gaps(axes: Axes, results: Results, shown: Mapping[str, float]) -> None:
    sigma = results.sigma("reported")
    axes.axhspan(-sigma, sigma, color="#000000", alpha=0.08, linewidth=0)
    axes.axhline(0, color="#000000", linewidth=0.8)
    names = [m.name for m in results.scale.members]
    arms = [arm for arm in shown if ARMS[arm].members]
    for n, arm in enumerate(arms):
        rung = results.rung(arm, shown[arm])
        if rung is None:
            continue
        x = [i + (n - len(arms) / 2) * 0.08 for i in rung.gaps]
        axes.errorbar(
            x,
            [g.mean or 0.0 for g in rung.gaps.values()],
            [g.half or 0.0 for g in rung.gaps.values()],
            fmt="s",
            color=COLOURS[arm],
            markersize=4,
            linewidth=1,
            label=f"{arm}, {shown[arm]:g} x",
        )
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_ylabel("nats worse than from scratch")
    if arms:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.grid(alpha=0.25, axis="y")


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
