"""What the tables of every result share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def bars(name: str) -> str:
    """Return which bars were met."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [[b["claim"], words[b["met"]], b["figures"]] for b in read(name)["bars"]]
    return table(["bar", "met", "figures"], rows)


def spread(found: dict[str, Any] | None, factor: float, digits: int) -> str:
    """Return a median, and the lowest and highest of the rounds."""
    if found is None:
        return "-"
    middle, low, high = (
        f"{found[k] * factor:,.{digits}f}" for k in ("median", "lowest", "highest")
    )
    return f"{middle} ({low} to {high})"


def how(facts: dict[str, Any]) -> list[str]:
    """Return how a result in rounds was come by, in lines."""
    environment = ", ".join(f"{k} {v}" for k, v in facts["environment"].items())
    return ["median (lowest to highest) of the rounds", f"`{facts['command']}`", environment]


def environment(tree: Any) -> str:
    """Return the machine and the versions of a result."""
    facts = tree["environment"]
    machine = f"{facts['threads']} thread of a shared {facts['machine']} CPU"
    rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in {"threads", "machine"})
    return f"{machine}, {rest}"


def read(name: str) -> Any:
    """Return a benchmark's result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def figure(found: dict[str, Any]) -> str:
    """Return a mean and its half interval; nothing where nothing was measured."""
    if found["mean"] is None:
        return ""
    half = "" if found["half"] is None else f" ± {found['half']:.4f}"
    return f"{round(found['mean'], 4) + 0.0:+.4f}{half}"  # without a minus before zero


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
