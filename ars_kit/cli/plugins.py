"""``arskit plugins``: list, show, new, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ars_kit.cli.options import echo_json, json_option, make_console, make_host, tell_of
from ars_kit.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from ars_kit.conformance import Check
    from ars_kit.host import Kind, Listing


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
    made.columns[2].no_wrap = False
    make_console().print(made)
    tell_of(host)


def _offered(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names that plugins offer."""
    names = {name for shelf in make_host().shelves.values() for name in shelf}
    return sorted(name for name in names if name.startswith(incomplete))


@plugins.command("show")
@click.argument("name", shell_complete=_offered)
@json_option
def plugins_show(name: str, as_json: bool) -> None:
    """Show an offer's settings with their meaning."""
    from ars_kit.host import SINGULAR
    from ars_kit.schema import did_you_mean

    host = make_host()
    kinds = [kind for kind in SINGULAR if name in host.shelves[kind]]
    if not kinds:
        known = sorted({n for shelf in host.shelves.values() for n in shelf})
        aside = "".join(f". {line}" for line in host.complaints())
        raise ConfigError(f"no plugin offers {name!r}{did_you_mean(name, known)}{aside}")
    found = [_described(SINGULAR[kind], host.listing(kind, name)) for kind in kinds]
    if as_json:
        echo_json(found)
        return
    for offer in found:
        click.echo(f"{name}: {offer['kind']}, {offer['summary']}")
        click.echo(f"from {offer['distribution']} {offer['version']}")
        click.echo(f"\n{offer['description']}\n")
        for setting in offer["settings"]:
            default = "required" if setting["required"] else f"default {setting['default']}"
            click.echo(f"  {setting['name']} ({setting['type']}, {default})")
            if setting["meaning"]:
                click.echo(f"      {setting['meaning']}")


def _described(kind: str, listing: Listing) -> dict[str, Any]:
    import inspect

    from ars_kit.schema import signature_of

    doc = inspect.getdoc(listing.offer.make) or ""
    return {
        "kind": kind,
        "name": listing.offer.name,
        "summary": listing.offer.summary,
        "distribution": listing.plugin.distribution,
        "version": listing.plugin.version,
        "description": doc.partition("\nArgs:")[0].strip(),
        "settings": [
            {
                "name": setting.name,
                "type": setting.type_name,
                "required": setting.required,
                "default": setting.default,
                "meaning": setting.doc,
            }
            for setting in signature_of(listing.offer.make).values()
        ],
    }


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
@json_option
def plugins_new(kind: str, name: str, into: Path, as_json: bool) -> None:
    """Begin a package of your own: KIND is gate or strategy, NAME what it will be called."""
    from ars_kit.kinds import KINDS
    from ars_kit.scaffold import write_package

    shelf = make_host().shelves[KINDS[kind].shelf] if kind in KINDS else {}
    if name in shelf:
        owner = shelf[name][0].plugin
        raise ConfigError(f"a {kind} {name!r} is offered by plugin {owner}; choose another name")
    made = write_package(kind, name, into)
    if as_json:
        echo_json({"kind": kind, "name": name, "package": str(made)})
    else:
        click.echo(made)


@plugins.command("check")
@click.argument("name", shell_complete=_offered)
@json_option
def plugins_check(name: str, as_json: bool) -> None:
    """Check that a gate or a strategy, or all of a distribution, keep the rules of their kind."""
    from dataclasses import asdict

    from ars_kit.conformance import check_offers
    from ars_kit.testing import check_gate, check_strategy

    findings = []
    checks: dict[Kind, Check] = {"gates": check_gate, "strategies": check_strategy}
    for finding in check_offers(make_host(), name, checks):
        findings.append(finding)
        if not as_json:
            click.echo(finding)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    failed = sum(finding.problem is not None for finding in findings)
    if failed:
        raise PluginError(f"{failed} of {len(findings)} offers of {name!r} failed")
