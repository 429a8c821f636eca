"""Commands about this machine and its settings: doctor, config show, completion."""

from __future__ import annotations

from typing import Any

import click

from ars_kit.cli.options import (
    echo_json,
    json_option,
    make_console,
    make_host,
    run_options,
    settings_from,
)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, which devices, and what is missing."""
    from ars_kit.doctor import examine

    found = examine(make_host())
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
@json_option
def config_show(as_json: bool, **options: Any) -> None:
    """Show every setting, its value, and where the value came from."""
    from ars_kit.display import table

    settings = settings_from(options)
    rows = [[key, settings.origins[key], str(value)] for key, value in settings.flat().items()]
    if as_json:
        echo_json({k: {"value": v, "origin": o} for k, o, v in rows})
    else:
        make_console().print(table(["setting", "from", "value"], rows))


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
