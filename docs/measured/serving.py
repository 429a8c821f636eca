"""How fast the server is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measured.tables import how, read, spread, table


def speed(name: str) -> str:
    """Return what clients of each server saw."""
    tree = read(name)
    rows = []
    for checkpoint in tree["checkpoints"]:
        size = f"{checkpoint['parameters'] / 1e6:.0f}M"
        rows += [[size, *_served(row)] for row in checkpoint["rows"]]
    heads = ["model", "clients", "server", "tokens/s", "first token, ms", "between tokens, ms"]
    heads += ["tokens per CPU-second", "times transformers serve"]
    return table(heads, rows)


def proxy(name: str) -> str:
    """Return what the way through the server to vLLM costs."""
    rows = []
    for checkpoint in read(name)["checkpoints"]:
        size = f"{checkpoint['parameters'] / 1e6:.0f}M"
        for row in checkpoint["rows"]:
            share, later = (row.get(key) for key in ("ratio", "later_seconds"))
            rows.append([size, *_served(row)[:-2], spread(share, 1, 2), spread(later, 1000, 1)])
    heads = ["model", "clients", "server", "tokens/s", "first token, ms", "between tokens, ms"]
    heads += ["share of vLLM's own tokens/s", "first token later, ms"]
    return table(heads, rows)


def _served(row: dict[str, Any]) -> list[str]:
    return [
        str(row["clients"]),
        row["server"].replace("generate()", "`generate()`"),
        spread(row["tokens_per_second"], 1, 0),
        spread(row.get("first_token_seconds"), 1000, 0),
        spread(row.get("between_tokens_seconds"), 1000, 1),
        spread(row["tokens_per_cpu_second"], 1, 0),
        spread(row.get("ratio"), 1, 1),
    ]


def _learned(checkpoint: Mapping[str, Any]) -> str:
    """Return what a checkpoint's weights are."""
    steps = checkpoint.get("trained_steps")
    return f"{steps} steps trained" if steps else "random weights"


def conditions(name: str) -> str:
    """Return what servers were measured on, and how."""
    tree = read(name)
    facts = tree["facts"]
    lines = [
        f"{c['parameters']:,} parameters (Qwen2, {_learned(c)}): answers of {c['tokens']} tokens; "
        + ", ".join(f"{n} requests of {k} clients" for k, n in c["requests"].items())
        + f"; {c['rounds']} rounds, every server once in each, in an order drawn anew"
        for c in tree["checkpoints"]
    ]
    lines += [
        "each server held to 1 core, the clients on what is left"
        if facts["cores"] == 1
        else f"each server held to {facts['cores']} cores",
        *how(facts),
    ]
    return "\n".join(f"- {line}" for line in lines)
