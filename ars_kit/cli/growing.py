"""``arskit grow``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ars_kit.cli.options import (
    echo_json,
    find_models,
    importing,
    json_option,
    make_host,
    out_option,
)


@click.command()
@click.argument("checkpoint")
@click.option("--to", required=True, help="d14 for 14 layers, or a directory whose shape to take.")
@click.option(
    "--strategy",
    default="progressive",
    show_default=True,
    help="Inheritance strategy, NAME or NAME:key=value.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    show_default="CHECKPOINT-to-TO",
    help="Directory to write; must not exist.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of every new parameter.")
@out_option
@json_option
def grow(checkpoint: str, to: str, out: Path, as_json: bool, **options: Any) -> None:
    """Grow one checkpoint, a member or any model directory, into a new directory."""
    from ars_kit.schema import parse_choice
    from ars_kit.store import locate

    host, choice = make_host(), parse_choice(options["strategy"])
    host.check("strategies", choice)
    find_models([checkpoint], out)

    with importing():
        from ars_kit.growing import Growth, grow_checkpoint, target_config

    source = locate(checkpoint, out)
    config = target_config(source, to)
    target = options["into"] or Path(f"{source.name}-to-{Path(to).name}")
    facts = grow_checkpoint(Growth(source, config, host, choice, target, options["seed"]))
    if as_json:
        echo_json(facts)
        return
    layers, width, parameters = facts["layers"], facts["width"], facts["parameters"]
    click.echo(
        f"{target}: layers {layers[0]} -> {layers[1]}, width {width[0]} -> {width[1]}, parameters "
        f"{parameters[0]:,} -> {parameters[1]:,}, {facts['inherited_share']:.0%} inherited.\n"
        f"Largest change of a logit: {facts['logits_difference']:.3g}, the largest logit being "
        f"{facts['largest_logit']:.3g} ({facts['preserves']})."
    )
