"""A finished family in words and tables: the model card of each member, the report of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COLUMNS: Sequence[tuple[str, str, str]] = (
    ("model_id", "member", "{}"),
    ("parent_model", "parent", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("final_loss", "final loss", "{:.4f}"),
    ("heldout_loss", "held-out loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("ars_damping_avg", "damping", "{:.4f}"),
    ("skipped_steps", "skipped", "{}"),
    ("convergence_iterations", "converged at", "{}"),
    ("training_time", "seconds", "{:.1f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("cost", "cost $", "{:.4f}"),
)
"""Field of metrics.json, heading, form."""


def row_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return a member's figures as the family table shows them; a dash was not measured."""
    return [
        "-" if metrics.get(key) is None else form.format(metrics[key]) for key, _, form in COLUMNS
    ]


def markdown_table(family: Sequence[Mapping[str, Any]]) -> str:
    """Return the family as a Markdown table."""
    lines = [
        "| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(row_of(m)) + " |" for m in family]
    return "\n".join(lines)


def report(family: Sequence[Mapping[str, Any]], best: str) -> str:
    """Return ``report.md``: what was measured in this run, and nothing else."""
    seconds = sum(m["training_time"] for m in family)
    cost = sum(m["cost"] for m in family)
    flops = sum(m["total_flops"] for m in family)
    first = family[0]
    winner = next(m for m in family if m["model_id"] == best)
    return f"""# A family of {len(family)}: {first["model_id"]} to {family[-1]["model_id"]}

{best} has the lowest held-out loss, {winner["heldout_loss"]:.4f} nats per token.
The family took {seconds:.1f} s of training, {flops:.3g} FLOPs and {cost:.4f} $
at {first["price_per_hour"]} $ per hour. Strategy {first["strategy"]}{descent(family)},
optimizer {first["optimizer"]} over {first["base_optimizer"]}, seed {first["seed"]}.

This run trained no control, so it says nothing about what inheritance or damping saved. For that,
train the same family with `--strategy scratch`, and with `--optimizer adamw`, into other folders.

{markdown_table(family)}

Device: {first["device"]}, {first["precision"]}. Data sha256 {first["data_hash"]}.
Versions: {", ".join(f"{k} {v}" for k, v in first["versions"].items())}.
"""


def descent(family: Sequence[Mapping[str, Any]]) -> str:
    """Say what became of the parents: one thing for all heirs, or who did what."""
    notes: dict[str, list[str]] = {}
    for m in family:
        if m["birth"].get("note"):
            notes.setdefault(m["birth"]["note"], []).append(m["model_id"])
    if len(notes) < 2:
        return "".join(f" ({note})" for note in notes)
    return " (" + "; ".join(f"{note}: {', '.join(names)}" for note, names in notes.items()) + ")"


def model_card(metrics: Mapping[str, Any], config: PretrainedConfig) -> str:
    """Return a member's README.md."""
    born = metrics["birth"]
    if metrics["parent_model"] is None:
        origin = "It started from fresh weights."
    elif "sources" in born:
        origin = f"It was not trained: {born['note']}."
    else:
        note = f" ({born['note']})" if born.get("note") else ""
        origin = (
            f"It continues {metrics['parent_model']}{note}: {born['inherited_share']:.1%} of its "
            f"parameters were inherited, and at birth its logits differed by at most "
            f"{born['birth_logits_difference']:.2g}."
        )
    figures = "\n".join(
        f"| {heading} | {value} |"
        for (_, heading, _), value in zip(COLUMNS, row_of(metrics), strict=True)
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ars-kit]
---

# {metrics["model_id"]}

A {config.model_type} with {config.num_hidden_layers} layers of width {config.hidden_size},
trained by ars-kit {metrics["versions"]["ars-kit"]}. {origin}

| figure | measured |
| --- | --- |
{figures}

Held-out loss is in nats per token on text that was never trained on. All figures, with seed,
data hash and versions, stand in `metrics.json`; each step's loss and damping in `history.jsonl`.
"""
