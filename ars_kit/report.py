"""A finished member in words and figures: its line in the family's table, and its model card."""

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
