"""Commands about a run's members: status, verify, evaluate, select."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ars_kit.cli.options import (
    Amount,
    cache_folder,
    echo_json,
    figure,
    find_models,
    importing,
    json_option,
    make_console,
    make_host,
    out_option,
    over_the_run,
    overrides,
)
from ars_kit.errors import IntegrityError

WIDE = 8
"""Columns of figures that a table of models may have before it is turned on its side."""


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
@click.option(
    "--data", "data__source", help="Judge on other text: a path, hf:owner/name, or a source."
)
@click.option(
    "--eval", "run__evaluators", multiple=True, help="Evaluator, NAME:key=value. Repeatable."
)
@over_the_run("--device")
@click.option("--fresh", is_flag=True, help="Measure again what is in the cache.")
@out_option
@json_option
def evaluate(names: tuple[str, ...], out: Path, as_json: bool, fresh: bool, **options: Any) -> None:
    """Judge members, d10..d18, 'best', or any model directory."""
    from ars_kit.schema import parse_choice

    host, models = make_host(), expand(names)
    find_models(models, out)
    for evaluator in options["run__evaluators"]:
        host.check("evaluators", parse_choice(evaluator))

    with importing():
        from ars_kit.display import JudgingDisplay
        from ars_kit.evaluating import evaluate as judge

    display = JudgingDisplay(make_console(stderr=True))
    with display.showing():
        found = judge(
            models,
            host,
            out,
            cache_folder(),
            overrides(options),
            watcher=display,
            fresh=fresh,
        )
    if as_json:
        echo_json(found)
        return
    _print_figures(found)


def _print_figures(found: list[dict[str, Any]]) -> None:
    """Print a row for each model, or a column where there are more figures than fit; and texts."""
    from ars_kit.display import table

    headings = list(dict.fromkeys(k for f in found for k in f if k not in {"notes", "files"}))
    rows = [[figure(f.get(h)) for h in headings] for f in found]
    if len(headings) > WIDE:
        headings, *rows = map(list, zip(headings, *rows, strict=True))
    if headings != ["model_id"]:
        make_console().print(table(headings, rows, names=1))
    notes = dict.fromkeys(f"{k}: {v}" for f in found for k, v in f["notes"].items())
    for note in notes:
        click.echo(note)
    for f in found:
        for name, text in f.get("files", {}).items():
            click.echo(f"\n{f['model_id']}, {name}:\n{text.rstrip()}")


@click.command()
@click.option(
    "--metric",
    default="bits_per_byte",
    show_default=True,
    help="Figure that decides, or several by weight: FIGURE:WEIGHT,FIGURE:WEIGHT.",
)
@click.option(
    "--prefer",
    type=click.Choice(["lowest", "highest"]),
    help="Which end of it wins, where that is not known.",
)
@click.option("--max-params", type=Amount(), help="Parameters at most.")
@click.option("--min-tokens-per-second", type=Amount(), help="Tokens decoded per second at least.")
@click.option(
    "--require",
    multiple=True,
    metavar="CONDITION",
    help="Another condition, FIGURE<=NUMBER or FIGURE>=NUMBER. Repeatable.",
)
@out_option
@json_option
def select(out: Path, as_json: bool, **options: Any) -> None:
    """Choose the best member and record it under the name 'best'."""
    from ars_kit.choosing import select as choose
    from ars_kit.rules import Limit, Rule, parse_aims, parse_limit

    limits = [parse_limit(text) for text in options["require"]]
    if options["max_params"] is not None:
        limits.append(Limit("parameters", most=True, bound=options["max_params"]))
    if options["min_tokens_per_second"] is not None:
        least = options["min_tokens_per_second"]
        limits.append(Limit("decode_tokens_per_second", most=False, bound=least))
    rule = Rule(parse_aims(options["metric"], options["prefer"]), tuple(limits))
    record = choose(out, rule, cache_folder())
    if as_json:
        echo_json(record)
        return
    click.echo(record["words"])
    for name, why in record["left_out"].items():
        click.echo(f"left out: {name}, {why}")


def expand(names: tuple[str, ...]) -> list[str]:
    """Turn ranges such as d10..d18 into names; anything else stands for itself."""
    from ars_kit.roster import parse_depths

    expanded: list[str] = []
    for name in names:
        is_range = ".." in name and name.startswith("d") and "/" not in name
        expanded += [f"d{n}" for n in parse_depths(name)] if is_range else [name]
    return expanded
