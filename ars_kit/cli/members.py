"""Commands about a run's members: status, verify, evaluate, select."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ars_kit.cli.options import (
    cache_folder,
    echo_json,
    figure,
    json_option,
    make_console,
    make_host,
    out_option,
)
from ars_kit.errors import IntegrityError


def names_in_run(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Complete the members of the run folder."""
    from ars_kit.lineage import standing

    known = [*standing(Path(ctx.params.get("out") or "checkpoints")), "best"]
    return [name for name in known if name.startswith(incomplete)]


@click.command()
@out_option
@json_option
def status(out: Path, as_json: bool) -> None:
    """Show how far a run is, from its folder alone."""
    from ars_kit.display import table
    from ars_kit.outcome import status as read_status

    rows = read_status(out)
    if as_json:
        echo_json(rows)
        return
    cells = [
        [
            "/".join(name for name in (r.get("control"), r["model_id"]) if name),
            r["state"],
            str(r["steps"]),
            figure(r.get("final_loss", r.get("last_loss"))),
            figure(r.get("heldout_loss")),
        ]
        for r in rows
    ]
    make_console().print(table(["member", "state", "steps", "loss", "held-out loss"], cells))


@click.command()
@out_option
@json_option
def verify(out: Path, as_json: bool) -> None:
    """Recompute every hash of every member and of the lineage."""
    from ars_kit.store import verify as check

    names, problems = check(out)
    if as_json:
        echo_json({"members": names, "problems": problems})
    else:
        for problem in problems:
            click.echo(problem)
    if problems:
        raise IntegrityError(f"{out} is not what was committed; problems: {len(problems)}")
    if as_json:
        return
    if names:
        count = "1 member is" if len(names) == 1 else f"{len(names)} members are"
        click.echo(f"{count} what was committed: {', '.join(names)}")
    else:
        click.echo(f"no member is committed in {out} yet")


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=names_in_run)
@click.option("--data", help="Judge on other text: a path, hf:owner/name, or a source.")
@click.option("--eval", "evaluators", multiple=True, help="Evaluator, NAME:key=value. Repeatable.")
@out_option
@json_option
def evaluate(
    names: tuple[str, ...],
    data: str | None,
    evaluators: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Judge members, d10..d18, 'best', or any model directory."""
    from ars_kit.display import table
    from ars_kit.runs import evaluate as judge

    overrides: dict[str, Any] = {}
    if data:
        overrides["data.source"] = data
    if evaluators:
        overrides["run.evaluators"] = list(evaluators)
    figures = judge(expand(names), make_host(), out, cache_folder(), overrides)
    if as_json:
        echo_json(figures)
        return
    headings = list(figures[0])
    make_console().print(table(headings, [[figure(f.get(h)) for h in headings] for f in figures]))


@click.command()
@click.option("--metric", default="heldout_loss", show_default=True, help="Figure to minimise.")
@out_option
@json_option
def select(metric: str, out: Path, as_json: bool) -> None:
    """Choose the best member and record it under the name 'best'."""
    from ars_kit.outcome import select as choose

    record = choose(out, metric)
    if as_json:
        echo_json(record)
    else:
        click.echo(f"{record['member']}: {record['rule']}, {record['value']:.4f}")


def expand(names: tuple[str, ...]) -> list[str]:
    """Turn ranges such as d10..d18 into names; anything else stands for itself."""
    from ars_kit.roster import parse_depths

    expanded: list[str] = []
    for name in names:
        is_range = ".." in name and name.startswith("d") and "/" not in name
        expanded += [f"d{n}" for n in parse_depths(name)] if is_range else [name]
    return expanded
