"""``arskit run`` and ``arskit plan``."""

from __future__ import annotations

import gc
import os
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ars_kit.cli.options import (
    cache_folder,
    echo_json,
    importing,
    json_option,
    make_console,
    make_host,
    out_option,
    run_options,
    settings_from,
    settings_of_run,
    tell_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ars_kit.controls import Control
    from ars_kit.host import Host
    from ars_kit.plan import RunPlan
    from ars_kit.trainee import Stop

SPARE_RESULTS = ("converged at", "skipped", "final loss", "tokens/s", "parent", "perplexity",
                 "damping", "seconds")  # fmt: skip
"""Columns of the final table that a narrow terminal goes without; report.md has them all."""


@click.command()
@run_options
@out_option
@click.option("--resume", is_flag=True, help="Go on with the folder's own settings.")
@click.option("--restart", is_flag=True, help="Throw away the folder's run and start anew.")
@json_option
def run(out: Path, resume: bool, restart: bool, as_json: bool, **options: Any) -> None:
    """Train the family, or go on where it was stopped."""
    from ars_kit.checking import check_choices

    host, console = make_host(), make_console(stderr=True)
    settings = settings_of_run(out, options) if resume else settings_from(options)
    check_choices(settings, host)

    with importing():
        from ars_kit.controls import plan_controls, with_curve
        from ars_kit.display import Display, fitted
        from ars_kit.fitting import fitted_plan, require_fit
        from ars_kit.plan import estimate, plan_run
        from ars_kit.report import COLUMNS, markdown_table, row_of
        from ars_kit.reporting import write_report
        from ars_kit.runs import check_folder, execute
        from ars_kit.texts import open_texts
        from ars_kit.trainee import Stop

    plan = fitted_plan(with_curve(plan_run(settings, host)), host, out)
    require_fit(plan, host)
    settings = plan.settings
    controls = plan_controls(plan, host)  # what cannot be is said now
    main_process = os.environ.get("RANK", "0") == "0"
    display = Display(plan, console)
    if main_process:
        tell_of(host)
        check_folder(out, settings, host, restart=restart)
        # Text that cannot be had is said before anything is timed or trained.
        open_texts(settings, host, cache_folder(), display.preparing)
        display.plan = plan = estimate(plan)
        _print_plan(plan, out, console, plan_controls(plan, host))
    _settle(plan.device)
    stop = Stop()
    with stop.listening():
        with display.showing() if main_process else nullcontext():
            metrics, best = execute(
                plan,
                host,
                out,
                cache_folder(),
                watcher=display,
                progress=display.preparing if main_process else None,
                restart=restart,
                stop=stop,
            )
        planned = plan_controls(plan, host, metrics)
        trained = {c.name: _train(c, host, out, console, stop) for c in planned}
    if not main_process:
        return
    if trained:
        write_report(out)  # again, now that there is something to compare with
    if as_json:
        echo_json({"best": best, "members": metrics, **({"controls": trained} if controls else {})})
        return
    result = make_console()
    if result.is_terminal:
        headings = [heading for _, heading, _ in COLUMNS]
        result.print(fitted(result, headings, [row_of(m) for m in metrics], SPARE_RESULTS))
    else:
        click.echo(markdown_table(metrics))
    if best is None:
        click.echo(f"\nNo held-out loss was measured. Members lie in {out}/.")
        return
    click.echo(
        f"\nBest by held-out loss: {best}. "
        f"Members lie in {out}/, the report is {out}/report.html.\n"
        f"Next: arskit evaluate {best} --out {shlex.quote(str(out))}\n"
        f"      arskit verify --out {shlex.quote(str(out))}"
    )


def _settle(device: str) -> None:
    from ars_kit.heap import keep_freed_memory

    # What was imported lives as long as this process: no collection need look at it again.
    gc.freeze()
    if device == "cpu":
        keep_freed_memory()


def _train(
    control: Control, host: Host, out: Path, console: Console, stop: Stop
) -> list[dict[str, Any]]:
    from ars_kit.display import Display, say
    from ars_kit.runs import train_control

    members, steps = control.plan.members, sum(m.steps for m in control.plan.members)
    names = members[0].name if len(members) == 1 else f"{members[0].name} to {members[-1].name}"
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        say(console, f"control {control.name}: {names}, {steps:,} steps, by {control.source}")
    display = Display(control.plan, console)
    with display.showing() if main_process else nullcontext():
        return train_control(control, host, out, cache_folder(), watcher=display, stop=stop)


@click.command()
@run_options
@out_option
@json_option
def plan(out: Path, as_json: bool, **options: Any) -> None:
    """Show what a run would train, its time, memory, disk and cost."""
    from ars_kit.checking import check_choices

    host, settings = make_host(), settings_from(options)
    check_choices(settings, host)

    with importing():
        from ars_kit.controls import plan_controls, with_curve
        from ars_kit.fitting import fitted_plan
        from ars_kit.plan import estimate, plan_run
        from ars_kit.store import free_bytes

    laid_out = with_curve(plan_run(settings, host))
    made = estimate(fitted_plan(laid_out, host, out, look=True))
    controls = plan_controls(made, host)
    tell_of(host)
    if as_json:
        planned = {c.name: c.record() | {"estimated_seconds": c.plan.seconds} for c in controls}
        more = {"controls": planned} if controls else {}
        echo_json({**made.facts(), **more, "available_disk_bytes": free_bytes(out)})
    else:
        _print_plan(made, out, make_console(), controls)


def _print_plan(
    plan: RunPlan, out: Path, console: Console, controls: Sequence[Control] = ()
) -> None:
    from ars_kit.display import duration, fitted, parent_of, say
    from ars_kit.durable import byte_count
    from ars_kit.store import free_bytes

    rows = [
        [
            m.name,
            parent_of(m, plan),
            str(m.config.num_hidden_layers),
            str(m.config.hidden_size),
            f"{m.parameters:,}",
            f"{m.steps:,}",
            f"{m.tokens:,}",
            f"{m.planned_flops:.2e}",
            duration(m.seconds),
        ]
        for m in plan.members
    ]
    headings = ("member", "parent", "layers", "width", "parameters", "steps", "tokens", "FLOPs")
    spare = ("width", "layers", "parent", "FLOPs")
    console.print(fitted(console, [*headings, "time (est.)"], rows, spare))
    train, base = plan.settings.train, plan.settings.family.base
    fits = "fits" if plan.memory_bytes <= plan.memory_available else "does NOT fit"
    free = free_bytes(out)
    room = "fits" if plan.disk_bytes <= free else "does NOT fit"
    say(
        console,
        (f"The base is {base}.\n" if base else "")
        + f"One iteration is {train.steps_per_iteration} optimizer step(s) of "
        f"{train.batch_size * plan.settings.data.sequence_length} tokens.\n"
        f"Estimated: {duration(plan.seconds)} and {plan.cost:.4f} $ at "
        f"{plan.settings.run.price_per_hour} $ per hour (from {plan.speed_source}); "
        f"{byte_count(plan.memory_bytes)} of memory, {fits} in "
        f"{byte_count(plan.memory_available)} on {plan.device}; "
        f"{byte_count(plan.disk_bytes)} of disk, {room} in {byte_count(free)} at {out}.",
    )
    peaks = ", ".join(f"{name} {byte_count(f.peak)}" for name, f in plan.footprints.items())
    for m in plan.members:
        if m.trainable_parameters < m.parameters:
            say(
                console,
                f"Of {m.name} {m.trainable_parameters:,} parameters train ({train.trainable}).",
            )
    say(console, f"Memory recipe: {plan.recipe.name}{f' (peaks: {peaks})' if peaks else ''}.")
    for control in controls:
        steps = sum(m.steps for m in control.plan.members)
        flops = sum(m.planned_flops for m in control.plan.members)
        say(
            console,
            f"Control {control.name}: {steps:,} steps, {flops:.2e} FLOPs "
            f"({control.source}), {duration(control.plan.seconds)} (est.).",
        )
