"""What the commands share: the options that set settings, and what is made of them."""

from __future__ import annotations

import gc
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ars_kit.errors import ConfigError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

    from ars_kit.host import Host, Kind
    from ars_kit.settings import Settings


class Terminated(KeyboardInterrupt):
    """SIGTERM came: an end like the one of Ctrl-C, but for the exit code, 143."""


@contextmanager
def clearing_up() -> Iterator[None]:
    """Let SIGTERM end what is being done as Ctrl-C does, so that nothing of it is left behind.

    A second one ends the process at once.

    Raises:
        Terminated: it came.
    """

    def end(_: int, __: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    ("--document-mask", "data.document_mask", "No attention from one document to another."),
    ("--iterations", "train.iterations", "Of the first member and of each later one: 100,50."),
    ("--tokens", "train.tokens", "Tokens per member; overrides --iterations."),
    ("--batch-size", "train.batch_size", "Sequences per optimizer step."),
    ("--accumulation", "train.accumulation", "Micro-batches per optimizer step."),
    ("--precision", "train.precision", "auto, fp32 or bf16."),
    ("--device", "train.device", "auto, cpu, cuda or mps."),
    ("--compile", "train.compile", "Compile the decoder layers; slow to begin, then faster."),
    ("--memory", "train.memory", "Recipe: auto, full, lean or tiny."),
    ("--trainable", "train.trainable", "all, or lora:r=16: adapters, merged in the end."),
    ("--lr", "train.lr", "Peak learning rate."),
    ("--schedule", "train.schedule", "wsd, cosine or constant."),
    ("--optimizer", "optimizer.name", "A wrapper (ars) or a base optimizer (adamw)."),
    ("--base-optimizer", "optimizer.base", "The optimizer that a wrapper is put around."),
    ("--seed", "family.seed", "Seed of weights, data order and every draw."),
    ("--price-per-hour", "run.price_per_hour", "Price of the machine in dollars."),
    (
        "--controls",
        "run.controls",
        "Also train these beside it: scratch,no-growth,one-long-run,no-ars.",
    ),
    ("--heldout-every", "run.heldout_every", "Steps between points of the held-out curve."),
)
SWITCHES = frozenset({"train.compile", "data.document_mask"})
"""Settings whose flag takes no value."""
MANY: tuple[tuple[str, str, str], ...] = (
    ("--gate", "optimizer.gates", "Add a damping gate, NAME:key=value. Repeatable."),
    ("--no-gate", "optimizer.without", "Leave a damping gate out. Repeatable."),
    ("--eval", "run.evaluators", "Evaluator, NAME:key=value. Repeatable."),
    ("--tracker", "run.trackers", "Tracker, NAME:key=value. Repeatable."),
)
SHELVES: Mapping[str, tuple[Kind, ...]] = {
    "family.strategy": ("strategies",),
    "data.source": ("data_sources",),
    "optimizer.name": ("wrappers", "optimizers"),
    "optimizer.base": ("optimizers",),
    "optimizer.gates": ("gates",),
    "optimizer.without": ("gates",),
    "run.evaluators": ("evaluators",),
    "run.trackers": ("trackers",),
}
"""Where the names are that a setting chooses among."""


class SettingOption(click.Option):
    """An option for a setting: its help names the default, which only the settings know."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the flag and its help, with the embedded default's value."""
        from ars_kit.settings import Settings, spelled

        record = super().get_help_record(ctx)
        default = Settings().flat()[self.key]
        if record is None or self.show_default or default in (None, (), False):
            return record
        return record[0], f"{record[1]}  [default: {spelled(default)}]"

    @property
    def key(self) -> str:
        """The setting, as ``section.key``."""
        return str(self.name).replace("__", ".")

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 -- click's interface
        incomplete: str,
    ) -> list[CompletionItem]:
        """Return what fits so far: an installed name, a listed value, or a path."""
        from typing import get_args

        from click.shell_completion import CompletionItem

        from ars_kit.settings import keys

        host = make_host() if self.key in SHELVES else None
        names = [n for kind in SHELVES.get(self.key, ()) for n in host.names(kind)] if host else []
        names += [name for name in get_args(keys()[self.key]) if isinstance(name, str)]
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        if self.key in {"data.source", "family.base"}:
            found.append(CompletionItem(incomplete, type="file"))
        return found


def _option(flag: str, key: str, text: str, **form: Any) -> Callable[[F], F]:
    return click.option(flag, key.replace(".", "__"), help=text, cls=SettingOption, **form)


def over_the_run(*flags: str) -> Callable[[F], F]:
    """Return what adds some of :data:`FLAGS` to a command whose other settings are the run's."""

    def added(command: F) -> F:
        for flag, key, text in reversed(FLAGS):
            if flag in flags:
                command = _option(flag, key, text, metavar="VALUE", show_default="the run's")(
                    command
                )
        return command

    return added


def run_options(command: F) -> F:
    """Add every option that sets a setting."""
    for flag, key, text in reversed(MANY):
        name = key.replace(".", "__")
        command = click.option(
            flag, name, multiple=True, metavar="TEXT", help=text, cls=SettingOption
        )(command)
    for flag, key, text in reversed(FLAGS):
        form: dict[str, Any] = {"metavar": "VALUE"}
        if key in SWITCHES:
            form = {"is_flag": True, "default": None}
        command = _option(flag, key, text, **form)(command)
    command = click.option(
        "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting."
    )(command)
    return click.option(
        "--config", "file", type=click.Path(path_type=Path), help="Settings file (run.toml)."
    )(command)


class Amount(click.FloatRange):
    """A number of 0 or more, or above 0; click's own ranges let NaN and infinity through."""

    def __init__(self, *, above: bool = False) -> None:
        super().__init__(min=0, min_open=above)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("checkpoints"),
    show_default=True,
    envvar="ARSKIT_OUT",
    help="Run folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@contextmanager
def importing() -> Iterator[None]:
    """Import without collecting garbage meanwhile, nor looking at what was imported ever again.

    Modules live as long as the process. To walk through those of torch and transformers time and
    again is a fifth of what importing them takes.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def make_host() -> Host:
    """Return the installed plugins but those that ``ARSKIT_WITHOUT`` names."""
    from ars_kit.host import Host

    without = os.environ.get("ARSKIT_WITHOUT", "")
    return Host.installed(name.strip() for name in without.split(",") if name.strip())


def tell_of(host: Host) -> None:
    """Name on stderr the plugins that were put aside."""
    for line in host.complaints():
        click.echo(f"arskit: {line}", err=True)


def find_models(names: Sequence[str], out: Path) -> None:
    """Look for members, ``best`` and directories, before torch is imported.

    Where the best was chosen before members that are there by now, stderr says so.

    Raises:
        ConfigError: there is none of a name.
        IntegrityError: the record of the best, or the lineage, is damaged.
    """
    from ars_kit.outcome import newer_than_best
    from ars_kit.store import find

    for name in names:
        find(name, out)
    if "best" in names and (newer := newer_than_best(out)):
        click.echo(
            f"arskit: best was chosen before {', '.join(newer)}; to choose again: arskit select "
            f"--out {shlex.quote(str(out))}",
            err=True,
        )


def cache_folder() -> Path:
    """Return where prepared text is kept: ``ARSKIT_CACHE``, or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ARSKIT_CACHE") or Path(home) / "arskit")


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Resolve the options of :func:`run_options`, the environment and the settings file."""
    from ars_kit.resolving import resolve

    return resolve(overrides(options), os.environ, options["file"])


def settings_of_run(out: Path, options: Mapping[str, Any]) -> Settings:
    """Return a folder's own settings, with the options of :func:`run_options` over them.

    Raises:
        ConfigError: there is no run, or a settings file besides.
    """
    from ars_kit.outcome import frozen_settings

    if options["file"]:
        raise ConfigError("the settings are those of the folder's run.toml; drop --config")
    return frozen_settings(out, overrides(options))


def overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command's options set, by ``section.key``."""
    flags: dict[str, Any] = {}
    for assignment in options.get("assignments", ()):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"cannot read --set {assignment!r}; write --set section.key=value")
        flags[key.strip()] = value.strip()
    for name, value in options.items():
        if "__" in name and value not in (None, ()):
            flags[name.replace("__", ".")] = list(value) if isinstance(value, tuple) else value
    return flags


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Somebody who reads a pipe wants whole lines, however wide.
    return Console(stderr=stderr, width=None if stream.isatty() else 200)


def figure(value: Any) -> str:
    """Return a figure as a table shows it; a dash was not measured."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def echo_json(value: Any) -> None:
    """Print a result as JSON."""
    click.echo(json.dumps(value, indent=2, default=str))
