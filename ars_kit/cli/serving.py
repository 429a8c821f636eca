"""``arskit serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ars_kit.cli.members import expand, names_in_run
from ars_kit.cli.options import cache_folder, make_host, out_option


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=names_in_run)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, or an engine, NAME or NAME:key=value.",
)
@click.option(
    "--host",
    "address",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any but this machine's own needs a key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--api-key", envvar="ARSKIT_API_KEY", help="What clients must present as Bearer.")
@click.option("--cors-origin", "origins", multiple=True, help="Web page that may ask. Repeatable.")
@click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer, at most.")
@click.option(
    "--slots",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Sequences a model works on at once.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=128,
    show_default=True,
    help="Sequences that may wait for a model; more are told to come again.",
)
@click.option(
    "--deadline",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds a request may take.",
)
@click.option(
    "--drain",
    "drain_seconds",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that requests may go on after SIGTERM.",
)
@out_option
def serve(names: tuple[str, ...], engine: str, api_key: str | None, **options: Any) -> None:
    """Serve members, d10..d18, 'best', or any model directory, as OpenAI's API."""
    from ars_kit.schema import parse_choice
    from ars_kit_serving.serve import Serving
    from ars_kit_serving.serve import serve as run

    host, choice = make_host(), parse_choice(engine)
    if choice.name != "auto":
        host.listing("servers", choice.name)
    out: Path = options.pop("out")
    serving = Serving(
        names=expand(names),
        out=out,
        host=host,
        engine=choice,
        cache=cache_folder() / "engines",
        key=api_key,
        say=lambda line: click.echo(line, err=True),
        **options,
    )
    run(serving, lambda url: click.echo(f"{url}/v1"))
