"""Commands about this machine and its settings: doctor, config show, completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ars_kit.cli.options import (
    echo_json,
    json_option,
    make_console,
    make_host,
    out_option,
    run_options,
    settings_from,
    settings_of_run,
)


@click.command()
@out_option
@json_option
def doctor(out: Path, as_json: bool) -> None:
    """Show what is installed, which devices and backends, and what is missing."""
    from ars_kit.doctor import examine

    found = examine(make_host(), out)
    if as_json:
        echo_json(found)
        return
    for heading, lines in found.items():
        click.echo(heading)
        for name, value in lines.items():
            click.echo(f"  {name}: {value}")


@click.group()
def config() -> None:
    """Look at settings."""


@config.command("show")
@run_options
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder whose run.toml to show from."
)
@json_option
def config_show(out: Path | None, as_json: bool, **options: Any) -> None:
    """Show every setting, its value, and where the value came from."""
    from ars_kit.display import table
    from ars_kit.settings import plain, spelled

    settings = settings_from(options) if out is None else settings_of_run(out, options)
    values, origins = settings.flat(), settings.origins
    if as_json:
        echo_json({k: {"value": plain(v), "origin": origins[k]} for k, v in values.items()})
        return
    rows = [[key, origins[key], spelled(value)] for key, value in values.items()]
    made = table(["setting", "from", "value"], rows)
    made.columns[2].justify, made.columns[2].no_wrap = "left", False
    make_console().print(made)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script: eval "$(arskit completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 -- the choices above are click's own
    click.echo(
        kind(
            click.get_current_context().find_root().command, {}, "arskit", "_ARSKIT_COMPLETE"
        ).source()
    )
