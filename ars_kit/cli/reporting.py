"""Commands that look at finished runs: compare, report, lineage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ars_kit.cli.options import echo_json, json_option, make_console, out_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ars_kit.page import Table

SPARE = ("cost, $", "time (saved)", "control: FLOPs", "family's loss", "its FLOPs", "its loss")
"""Columns of what it took that a narrow terminal goes without; the report has them all."""


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--metric",
    default="bits_per_byte",
    show_default=True,
    help="Figure of metrics.json to set side by side.",
)
@json_option
def compare(runs: tuple[Path, ...], metric: str, as_json: bool) -> None:
    """Set run folders, and the controls they hold, side by side; the first is the family."""
    from ars_kit.comparison import compare as side_by_side
    from ars_kit.display import say
    from ars_kit.scenarios import scenarios
    from ars_kit.sections import cost_table, quality_table, reached_table

    found = side_by_side(runs)
    found.require(metric)
    planned = scenarios(found)
    if as_json:
        echo_json({**found.facts(), "scenarios": [s.facts() for s in planned]})
        return
    console = make_console()
    _show(quality_table(found, metric), console)
    _show(reached_table(found), console, SPARE)
    _show(cost_table(planned), console, ("measured on", "planned time"))
    for note in found.notes:
        say(console, f"- {note}.")


@click.command()
@out_option
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another run folder to compare with, such as another seed. Repeatable.",
)
@json_option
def report(out: Path, beside: tuple[Path, ...], as_json: bool) -> None:
    """Write report.md and report.html of a run, finished or not."""
    from ars_kit.reporting import write_report

    written = write_report(out, beside, lambda line: click.echo(line, err=True))
    if as_json:
        echo_json({"written": [str(path) for path in written]})
        return
    for path in written:
        click.echo(str(path))


@click.command()
@out_option
@json_option
def lineage(out: Path, as_json: bool) -> None:
    """Show who descends from whom, with the hashes that every figure is traced back by."""
    from ars_kit.kinship import drawn, lineage_facts
    from ars_kit.records import read_run

    run = read_run(out)
    if as_json:
        echo_json(lineage_facts(run))
        return
    click.echo(drawn(run))
    for control in run.controls:
        click.echo(f"\ncontrol {control.label}\n{drawn(control)}")
    for problem in run.problems:
        click.echo(problem, err=True)


def _show(table: Table, console: Console, spare: Sequence[str] = ()) -> None:
    from ars_kit.display import fitted, say

    if table.rows:
        say(console, f"{table.caption}\n")
        console.print(fitted(console, table.headings, table.rows, spare, names=table.names))
        say(console, "")
