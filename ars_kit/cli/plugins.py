"""``arskit plugins``: list, show, new, check."""

from __future__ import annotations

from pathlib import Path

import click

from ars_kit.cli.options import echo_json, json_option, make_console, make_host
from ars_kit.errors import ConfigError, PluginError


@click.group()
def plugins() -> None:
    """Look at the installed plugins."""


@plugins.command("list")
@json_option
def plugins_list(as_json: bool) -> None:
    """List everything that plugins offer."""
    from ars_kit.display import table
    from ars_kit.host import SINGULAR

    host = make_host()
    rows = [
        [SINGULAR[kind], name, listing.offer.summary, listing.plugin.distribution]
        for kind, shelf in host.shelves.items()
        for name, listings in sorted(shelf.items())
        for listing in listings
    ]
    if as_json:
        keys = ("kind", "name", "summary", "distribution")
        listed = [dict(zip(keys, row, strict=True)) for row in rows]
        echo_json({"offers": listed, "quarantined": host.complaints()})
        return
    made = table(["kind", "name", "summary", "from"], rows)
    for column in made.columns:
        column.justify = "left"
    make_console().print(made)
    for line in host.complaints():
        click.echo(line, err=True)


@plugins.command("show")
@click.argument("name")
def plugins_show(name: str) -> None:
    """Show an offer's settings with their meaning."""
    import inspect

    from ars_kit.host import SINGULAR
    from ars_kit.schema import did_you_mean, signature_of

    host = make_host()
    kinds = [kind for kind in SINGULAR if name in host.shelves[kind]]
    if not kinds:
        known = sorted({n for shelf in host.shelves.values() for n in shelf})
        raise ConfigError(f"no plugin offers {name!r}{did_you_mean(name, known)}")
    for kind in kinds:
        listing = host.listing(kind, name)
        click.echo(f"{name}: {SINGULAR[kind]}, {listing.offer.summary}")
        click.echo(f"from {listing.plugin.distribution} {listing.plugin.version}")
        doc = (inspect.getdoc(listing.offer.make) or "").partition("\nArgs:")[0].strip()
        click.echo(f"\n{doc}\n")
        for setting in signature_of(listing.offer.make).values():
            default = "required" if setting.required else f"default {setting.default}"
            click.echo(f"  {setting.name} ({setting.type_name}, {default})")
            if setting.doc:
                click.echo(f"      {setting.doc}")


@plugins.command("new")
@click.argument("kind")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="here",
    help="Directory to put the package in.",
)
def plugins_new(kind: str, name: str, into: Path) -> None:
    """Begin a package of your own: KIND is gate, NAME what it will be called."""
    from ars_kit.scaffold import KINDS, write_package

    shelf = make_host().shelves[KINDS[kind].shelf] if kind in KINDS else {}
    if name in shelf:
        owner = shelf[name][0].plugin
        raise ConfigError(f"a {kind} {name!r} is offered by plugin {owner}; choose another name")
    click.echo(write_package(kind, name, into))


@plugins.command("check")
@click.argument("name")
@json_option
def plugins_check(name: str, as_json: bool) -> None:
    """Check that a gate, or every gate of a distribution, keeps every gate's rules."""
    from dataclasses import asdict

    from ars_kit.conformance import check_gates
    from ars_kit.testing import check_gate

    findings = []
    for finding in check_gates(make_host(), name, check_gate):
        findings.append(finding)
        if not as_json:
            click.echo(finding)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    failed = sum(finding.problem is not None for finding in findings)
    if failed:
        raise PluginError(f"{failed} of {len(findings)} gates of {name!r} failed")
