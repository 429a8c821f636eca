"""What each export format costs and gives."""

from __future__ import annotations

from typing import Any

from measured.tables import how, read, spread, table


def formats(name: str) -> str:
    """Return what each format costs and gives."""
    rows = []
    for checkpoint in read(name)["checkpoints"]:
        trained = f"{checkpoint['training']} steps" if checkpoint["training"] else "not"
        for r in checkpoint["formats"]:
            speed = r["tokens_per_cpu_second"]
            rows.append(
                [
                    f"{checkpoint['parameters'] / 1e6:.0f}M, {trained} trained",
                    r["format"],
                    f"{r['bytes'] / 1e6:.1f} MB",
                    *(spread(speed[rows], 1, 0) for rows in ("1", "8")),
                    _parity(r["parity"]),
                ]
            )
    heads = ["model", "format", "size", "tokens per CPU-second, batch 1", "batch 8", "parity"]
    return table(heads, rows)


def conditions(name: str) -> str:
    """Return what formats were measured on, and how."""
    tree = read(name)
    rounds = {c["formats"][0]["tokens_per_cpu_second"]["1"]["rounds"] for c in tree["checkpoints"]}
    turns = f"decoding alone, in turns, {' and '.join(map(str, sorted(rounds)))} rounds; one thread"
    return "\n".join(f"- {line}" for line in [turns, *how(tree["facts"])])


def _parity(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["refused"]:
        return f"**refused**: {found['refused']}"
    if "agreement" in found:
        return (
            f"loss {found['loss']:.3f}, the model's {found['loss_of_the_model']:.3f}; "
            f"{found['agreement']:.1%} of the most likely tokens"
        )
    return f"logits differ by {found['largest_difference']:.0e} of {found['largest_logit']:.0f}"
