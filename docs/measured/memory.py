"""What fits a device, foreseen and measured."""

from __future__ import annotations

from measured.tables import read, table

CARDS = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 141}
SPARED = 2e9
"""Bytes of a card that are left to its driver and the allocator."""


def fits(name: str) -> str:
    """Return what a 7B model takes under each recipe, and which cards hold it."""
    rows = []
    for r in (r for r in read(name)["rows"] if r["parameters"] > 1e9):
        holds = ["yes" if r["peak"] <= size * 1e9 - SPARED else "no" for size in CARDS.values()]
        parts = [f"{r[k] / 1e9:.1f}" for k in ("weights", "gradients", "states", "rest", "peak")]
        rows.append([f"`{r['recipe']}`", *parts, *(f"{h} (predicted)" for h in holds)])
    parts = ["weights", "gradients", "moments", "rest", "**peak, GB**"]
    return table(["recipe", *parts, *CARDS], rows)


def measured(name: str) -> str:
    """Return prediction and measurement of the models that were run, side by side."""
    tree = read(name)
    rows = [
        [
            f"{r['model']}, {r['parameters']:,} parameters",
            f"{r['sequences']} x {r['length']}",
            f"`{r['recipe']}`",
            f"{r['peak'] / 1e6:.1f}",
            f"{r['measured'] / 1e6:.1f}",
            f"{r['peak'] / r['measured'] - 1:+.1%}",
        ]
        for r in tree["rows"]
        if r["measured"] is not None
    ]
    heads = ["model", "tokens", "recipe", "predicted, MB", "measured, MB", "difference"]
    where = ", ".join(f"{k} {v}" for k, v in tree["environment"].items())
    return f"{table(heads, rows)}\n\n{where}"
