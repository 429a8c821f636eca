"""The command line: options in, one call, print. The only room that reads the environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ars_kit import __version__
from ars_kit.errors import ArsKitError, ConfigError, IntegrityError, PluginError

if TYPE_CHECKING:
    from rich.console import Console

    from ars_kit.host import Host
    from ars_kit.plan import RunPlan
    from ars_kit.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

# Flag, setting, help. Every other setting is reached by --set section.key=value.
FLAGS: tuple[tuple[str, str, str], ...] = (
    ("--members", "family.members", "Members in birth order: d10..d18, or d10,d12."),
    ("--strategy", "family.strategy", "Inheritance strategy, NAME or NAME:key=value."),
    (
        "--base",
        "family.base",
        "Pretrained model to start from: a directory or a hub id. It has defaults of its own.",
    ),
    ("--depth", "family.depth", "miniseries; with --base same (default) or grow."),
    ("--data", "data.source", "A path, hf:owner/name, kaggle:owner/name, or a source."),
    ("--sequence-length", "data.sequence_length", "Tokens of context."),
    ("--iterations", "train.iterations", "Of the first member and of each later one: 100,50."),
    ("--tokens", "train.tokens", "Tokens per member; overrides --iterations."),
    ("--batch-size", "train.batch_size", "Sequences per optimizer step."),
    ("--accumulation", "train.accumulation", "Micro-batches per optimizer step."),
    ("--precision", "train.precision", "auto, fp32 or bf16."),
    ("--device", "train.device", "auto, cpu, cuda or mps."),
    ("--lr", "train.lr", "Peak learning rate."),
    ("--schedule", "train.schedule", "wsd, cosine or constant."),
    ("--optimizer", "optimizer.name", "A wrapper (ars) or a base optimizer (adamw)."),
    ("--base-optimizer", "optimizer.base", "The optimizer that a wrapper is put around."),
    ("--seed", "family.seed", "Seed of weights, data order and every draw."),
    ("--price-per-hour", "run.price_per_hour", "Price of the machine in dollars."),
)
MANY: tuple[tuple[str, str, str], ...] = (
    ("--gate", "optimizer.gates", "Add a damping gate, NAME:key=value. Repeatable."),
    ("--no-gate", "optimizer.without", "Leave a damping gate out. Repeatable."),
    ("--eval", "run.evaluators", "Evaluator, NAME:key=value. Repeatable."),
)


class SettingOption(click.Option):
    """An option for a setting: its help names the default, which only the settings know."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the flag and its help, with the embedded default's value."""
        from ars_kit.settings import Settings

        record = super().get_help_record(ctx)
        default = Settings().flat()[str(self.name).replace("__", ".")]
        if record is None or default in (None, ()):
            return record
        spelled = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        return record[0], f"{record[1]}  [default: {spelled}]"


def run_options(command: F) -> F:
    """Add every option that sets a setting."""
    for flag, key, text in reversed(MANY):
        name = key.replace(".", "__")
        command = click.option(
            flag, name, multiple=True, metavar="TEXT", help=text, cls=SettingOption
        )(command)
    for flag, key, text in reversed(FLAGS):
        command = click.option(
            flag, key.replace(".", "__"), metavar="VALUE", help=text, cls=SettingOption
        )(command)
    command = click.option(
        "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting."
    )(command)
    return click.option(
        "--config", "file", type=click.Path(path_type=Path), help="Settings file (run.toml)."
    )(command)


out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("checkpoints"),
    show_default=True,
    envvar="ARSKIT_OUT",
    help="Run folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="arskit")
def cli() -> None:
    """Train a family of language models, each inheriting its predecessor."""


@cli.command()
@run_options
@out_option
@click.option("--resume", is_flag=True, help="Go on with the folder's own settings.")
@click.option("--restart", is_flag=True, help="Throw away the folder's run and start anew.")
@json_option
def run(out: Path, resume: bool, restart: bool, as_json: bool, **options: Any) -> None:
    """Train the family, or go on where it was stopped."""
    from ars_kit.display import Display
    from ars_kit.outcome import frozen_settings
    from ars_kit.plan import estimate, plan_run
    from ars_kit.report import markdown_table
    from ars_kit.runs import execute, open_corpus

    host, console = _host(), _console(stderr=True)
    settings = frozen_settings(out) if resume else _settings(options)
    plan = plan_run(settings, host)
    main_process = os.environ.get("RANK", "0") == "0"
    display = Display(plan, console)
    if main_process:
        # Text that cannot be had is said before anything is timed or trained.
        open_corpus(settings, host, _cache(), display.preparing)
        display.plan = plan = estimate(plan)
        _print_plan(plan, console)
    with display.showing():
        metrics, best = execute(
            plan,
            host,
            out,
            _cache(),
            watcher=display,
            progress=display.preparing if main_process else None,
            restart=restart,
        )
    if not main_process:
        return
    if as_json:
        _echo_json({"best": best, "members": metrics})
        return
    click.echo(markdown_table(metrics))
    click.echo(
        f"\nBest by held-out loss: {best}. Members lie in {out}/, the report is {out}/report.md.\n"
        f"Next: arskit evaluate {best} --out {out}\n"
        f"      arskit verify --out {out}"
    )


@cli.command()
@run_options
@json_option
def plan(as_json: bool, **options: Any) -> None:
    """Show what a run would train, and its estimated time, memory and cost."""
    from ars_kit.plan import estimate, plan_run

    made = estimate(plan_run(_settings(options), _host()))
    if as_json:
        _echo_json(made.facts())
    else:
        _print_plan(made, _console())


@cli.command()
@out_option
@json_option
def status(out: Path, as_json: bool) -> None:
    """Show how far a run is, from its folder alone."""
    from ars_kit.display import table
    from ars_kit.outcome import status as read_status

    rows = read_status(out)
    if as_json:
        _echo_json(rows)
        return
    cells = [
        [
            r["model_id"],
            r["state"],
            str(r["steps"]),
            _form(r.get("final_loss", r.get("last_loss"))),
            _form(r.get("heldout_loss")),
        ]
        for r in rows
    ]
    _console().print(table(["member", "state", "steps", "loss", "held-out loss"], cells))


@cli.command()
@out_option
@json_option
def verify(out: Path, as_json: bool) -> None:
    """Recompute every hash of every member and of the lineage."""
    from ars_kit.store import verify as check

    names, problems = check(out)
    if as_json:
        _echo_json({"members": names, "problems": problems})
    else:
        for problem in problems:
            click.echo(problem)
    if problems:
        raise IntegrityError(f"{len(problems)} of the files in {out} are not what was committed")
    if not as_json:
        click.echo(f"{len(names)} members are what was committed: {', '.join(names)}")


@cli.command()
@click.argument("names", nargs=-1, required=True)
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
    """Judge members, ranges such as d10..d18, 'best', or any model directory."""
    from ars_kit.display import table
    from ars_kit.runs import evaluate as judge

    overrides: dict[str, Any] = {}
    if data:
        overrides["data.source"] = data
    if evaluators:
        overrides["run.evaluators"] = list(evaluators)
    figures = judge(_expand(names), _host(), out, _cache(), overrides)
    if as_json:
        _echo_json(figures)
        return
    headings = list(figures[0])
    _console().print(table(headings, [[_form(f.get(h)) for h in headings] for f in figures]))


@cli.command()
@click.option("--metric", default="heldout_loss", show_default=True, help="Figure to minimise.")
@out_option
@json_option
def select(metric: str, out: Path, as_json: bool) -> None:
    """Choose the best member and record it under the name 'best'."""
    from ars_kit.outcome import select as choose

    record = choose(out, metric)
    if as_json:
        _echo_json(record)
    else:
        click.echo(f"{record['member']}: {record['rule']}, {record['value']:.4f}")


@cli.group()
def plugins() -> None:
    """Look at the installed plugins."""


@plugins.command("list")
@json_option
def plugins_list(as_json: bool) -> None:
    """List everything that plugins offer."""
    from ars_kit.display import table
    from ars_kit.host import SINGULAR

    host = _host()
    rows = [
        [SINGULAR[kind], name, listing.offer.summary, listing.plugin.distribution]
        for kind, shelf in host.shelves.items()
        for name, listings in sorted(shelf.items())
        for listing in listings
    ]
    if as_json:
        keys = ("kind", "name", "summary", "distribution")
        listed = [dict(zip(keys, row, strict=True)) for row in rows]
        _echo_json({"offers": listed, "quarantined": host.complaints()})
        return
    made = table(["kind", "name", "summary", "from"], rows)
    for column in made.columns:
        column.justify = "left"
    _console().print(made)
    for line in host.complaints():
        click.echo(line, err=True)


@plugins.command("show")
@click.argument("name")
def plugins_show(name: str) -> None:
    """Show an offer's settings with their meaning."""
    import inspect

    from ars_kit.host import SINGULAR
    from ars_kit.schema import did_you_mean, signature_of

    host = _host()
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

    shelf = _host().shelves[KINDS[kind].shelf] if kind in KINDS else {}
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
    for finding in check_gates(_host(), name, check_gate):
        findings.append(finding)
        if not as_json:
            click.echo(finding)
    if as_json:
        _echo_json([asdict(finding) for finding in findings])
    failed = sum(finding.problem is not None for finding in findings)
    if failed:
        raise PluginError(f"{failed} of {len(findings)} gates of {name!r} failed")


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, which devices there are, and what is missing."""
    from ars_kit.doctor import examine

    found = examine(_host())
    if as_json:
        _echo_json(found)
        return
    for heading, lines in found.items():
        click.echo(heading)
        for name, value in lines.items():
            click.echo(f"  {name}: {value}")


@cli.group()
def config() -> None:
    """Look at settings."""


@config.command("show")
@run_options
@json_option
def config_show(as_json: bool, **options: Any) -> None:
    """Show every setting, its value, and where the value came from."""
    from ars_kit.display import table

    settings = _settings(options)
    rows = [[key, settings.origins[key], str(value)] for key, value in settings.flat().items()]
    if as_json:
        _echo_json({k: {"value": v, "origin": o} for k, o, v in rows})
    else:
        _console().print(table(["setting", "from", "value"], rows))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script: eval "$(arskit completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 -- the choices above are click's own
    click.echo(kind(cli, {}, "arskit", "_ARSKIT_COMPLETE").source())


def main() -> None:
    """Run the command line; every handled error is one line and an exit code."""
    # Their progress bars and advice would drown ours; set before they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        cli.main(prog_name="arskit", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("arskit: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; nothing is left to say to it
        sys.exit(1)
    except ArsKitError as error:
        click.echo(f"arskit: {error}", err=True)
        sys.exit(error.exit_code)


def _host() -> Host:
    from ars_kit.host import Host

    without = os.environ.get("ARSKIT_WITHOUT", "")
    return Host.installed(name.strip() for name in without.split(",") if name.strip())


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ARSKIT_CACHE") or Path(home) / "arskit")


def _settings(options: Mapping[str, Any]) -> Settings:
    from ars_kit.settings import resolve

    flags: dict[str, Any] = {}
    for assignment in options["assignments"]:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"cannot read --set {assignment!r}; write --set section.key=value")
        flags[key.strip()] = value.strip()
    for name, value in options.items():
        if "__" in name and value not in (None, ()):
            flags[name.replace("__", ".")] = list(value) if isinstance(value, tuple) else value
    return resolve(flags, os.environ, options["file"])


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Somebody who reads a pipe wants whole lines, however wide.
    return Console(stderr=stderr, width=None if stream.isatty() else 200)


def _print_plan(plan: RunPlan, console: Console) -> None:
    from ars_kit.display import duration, table

    rows = [
        [
            m.name,
            m.parent or "-",
            str(m.config.num_hidden_layers),
            str(m.config.hidden_size),
            f"{m.parameters:,}",
            f"{m.steps:,}",
            f"{m.tokens:,}",
            f"{m.flops:.2e}",
            duration(m.seconds),
        ]
        for m in plan.members
    ]
    headings = ("member", "parent", "layers", "width", "parameters", "steps", "tokens", "FLOPs")
    console.print(table([*headings, "time (est.)"], rows))
    train = plan.settings.train
    fits = "fits" if plan.memory_bytes <= plan.memory_available else "does NOT fit"
    console.print(
        f"One iteration is {train.steps_per_iteration} optimizer step(s) of "
        f"{train.batch_size * plan.settings.data.sequence_length} tokens.\n"
        f"Estimated: {duration(plan.seconds)} and {plan.cost:.4f} $ at "
        f"{plan.settings.run.price_per_hour} $ per hour (from {plan.speed_source}); "
        f"{plan.memory_bytes / 1e9:.2f} GB of memory, {fits} in "
        f"{plan.memory_available / 1e9:.1f} GB on {plan.device}.",
        highlight=False,
        soft_wrap=True,
    )


def _expand(names: tuple[str, ...]) -> list[str]:
    """Turn ranges such as d10..d18 into names; anything else stands for itself."""
    from ars_kit.settings import parse_members

    expanded: list[str] = []
    for name in names:
        is_range = ".." in name and name.startswith("d") and "/" not in name
        expanded += [f"d{n}" for n in parse_members(name)] if is_range else [name]
    return expanded


def _form(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))
