"""How well methods keep training stable: every method through every provocation, seed by seed.

``python benchmarks/stability.py --quick`` takes minutes, ``--full`` the better part of an hour on
one core. Results are kept as they come; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from ending import run
from stability.methods import Method, installed_methods
from stability.provocations import PROVOCATIONS
from stability.report import Facts, environment, table_of, write
from stability.runner import Book, Key, run_all
from stability.task import SIZES, Size, Text, file_text, library_text, model_config

from ars_kit.models import count_parameters

RESULTS = Path(__file__).parent / "results"
TUNING_SEEDS = (101, 102, 103)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
QUICK = ("clip", "zclip", "skipstep", "stable-spam", "ars")
QUICK_STEPS = 150
LARGE = 1_000_000
"""Parameters from which on a GPU is worth its way."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs of one call share."""

    model: str
    size: Size
    methods: dict[str, Method]
    book: Book
    jobs: int
    device: str

    def key(self, method: str, provocation: str, seed: int, lr: float, text: Text) -> Key:
        """Return the settings of one run."""
        code = self.methods[method].code
        return Key(
            model=self.model,
            steps=self.size.steps,
            method=method,
            code=code,
            provocation=provocation,
            seed=seed,
            lr=lr,
            text=text.digest,
            torch=torch.__version__,
            device=self.device,
        )

    def run(self, keys: list[Key], text: Text) -> None:
        """Run what is not done yet."""
        run_all(keys, self.size, text, self.book, say, jobs=self.jobs)

    def keys(
        self,
        methods: list[str],
        provocations: list[str],
        seeds: Sequence[int],
        lr: float,
        text: Text,
    ) -> list[Key]:
        """Return all runs, seed after seed, so that what stands at any time is comparable."""
        return [
            self.key(method, provocation, seed, lr, text)
            for seed in seeds
            for provocation in provocations
            for method in methods
            if provocation in (self.methods[method].only or provocations)
        ]

    def tune(self, text: Text) -> dict[float, float | None]:
        """Return the mean held-out loss of AdamW with clip by learning rate, on clean data."""
        keys = {
            lr: [self.key("clip", "clean", seed, lr, text) for seed in TUNING_SEEDS] for lr in RATES
        }
        self.run([key for row in keys.values() for key in row], text)
        found: dict[float, float | None] = {}
        for lr, row in keys.items():
            scores = [self.book.outcomes[key].score for key in row]
            living = [s for s in scores if s is not None]
            found[lr] = math.fsum(living) / len(living) if len(living) == len(scores) else None
        return found


def say(line: str) -> None:
    """Tell of progress."""
    click.echo(line, err=True)


@click.command()
@click.option("--full/--quick", default=False, help="Every method and provocation, or a few.")
@click.option("--model", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--seeds", default=None, help="How many, from 1 on.  [5; 2 if quick]", type=int)
@click.option("--steps", type=click.IntRange(min=1), help="In place of the size's own.")
@click.option("--methods", help="Names with commas between.")
@click.option("--provocations", help="Names with commas between.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tuning-text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--lr", type=float, help="In place of tuning one.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: a GPU where there is one, for models of a million parameters and more.",
)
@click.option("--jobs", default=1, show_default=True, help="Processes, of one thread each.")
@click.option("--out", type=click.Path(path_type=Path), help="Results, without suffix.")
@click.option("--report-only", is_flag=True, help="Run nothing; report what is there.")
def main(  # noqa: PLR0913 -- a command's options
    *,
    full: bool,
    model: str,
    seeds: int | None,
    steps: int | None,
    methods: str | None,
    provocations: str | None,
    text: Path | None,
    tuning_text: Path | None,
    lr: float | None,
    device: str,
    jobs: int,
    out: Path | None,
    report_only: bool,
) -> None:
    """Run the benchmark and write its report as Markdown, JSON and SVG.

    The learning rate is tuned on other seeds and another text than those reported on. Without
    --text and --tuning-text these are two halves of the standard library's documentation.
    """
    size = SIZES[model]
    size = replace(size, steps=steps or (size.steps if full else min(size.steps, QUICK_STEPS)))
    known, notices = installed_methods()
    for notice in notices:
        say(notice)
    chosen = _chosen("method", methods, list(known), list(known) if full else list(QUICK))
    provoked = _chosen("provocation", provocations, list(PROVOCATIONS), list(PROVOCATIONS))
    numbers = range(1, (seeds or (5 if full else 2)) + 1)
    out = out or RESULTS / f"stability-{model}{'' if full else '-quick'}"
    book = Book(out.with_suffix(".jsonl"))
    parameters = count_parameters(model_config(size))
    device = _device(device, parameters)
    if report_only:
        known, aged = _as_measured(known, book, model, size.steps, device)
        notices += aged
    bench = Bench(model, size, known, book, jobs, device)
    read = file_text(text) if text else library_text(0)
    lr = lr or size.lr
    tuning: dict[float, float | None] = {}
    other = ""
    if lr is None:
        tuned_on = file_text(tuning_text) if tuning_text else library_text(1)
        other, tuning = tuned_on.name, bench.tune(tuned_on)
        lr = min((r for r in tuning if tuning[r] is not None), key=lambda r: tuning[r] or 0.0)
    keys = bench.keys(chosen, provoked, numbers, lr, read)
    if not report_only:
        bench.run(keys, read)
    facts = Facts(
        command=f"python benchmarks/stability.py {shlex.join(_arguments())}",
        model=model,
        size=size,
        parameters=parameters,
        text=read.name,
        seeds=list(numbers),
        lr=lr,
        tuning_text=other,
        tuning_seeds=TUNING_SEEDS,
        tuning=tuning,
        notices=notices,
        environment=environment(device),
    )
    for bar in write(out, facts, table_of(bench.book.outcomes, keys), known):
        word = {True: "met", False: "NOT MET", None: "-"}[bar.met]
        click.echo(f"{word:8}{bar.claim}: {bar.figures}")


def _device(wanted: str, parameters: int) -> str:
    """Return the kind of device that runs train on.

    Raises:
        click.BadParameter: a GPU was asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise click.BadParameter("torch sees no GPU here", param_hint="--device")
    if wanted == "auto":
        return "cuda" if there and parameters >= LARGE else "cpu"
    return wanted


def _as_measured(
    methods: dict[str, Method], book: Book, model: str, steps: int, device: str
) -> tuple[dict[str, Method], list[str]]:
    """Return the methods with the code that the book has most of, and what is not current."""
    found = {
        name: replace(m, code=book.code_of(name, m.code, model, steps, device))
        for name, m in methods.items()
    }
    aged = []
    for name, m in found.items():
        now = methods[name].code
        if m.code != now:
            equal, both = book.compared(name, m.code, now)
            again = f", of which {both} runs were repeated, {equal} equal to the last bit"
            aged.append(
                f"{name}: measured with code {m.code}, the code installed is {now}"
                + (again if both else "")
            )
    return found, aged


def _arguments() -> list[str]:
    """Return the command line, its paths shortened to their names."""
    given = (a for a in sys.argv[1:] if a != "--report-only")
    return [Path(a).name if "/" in a else a for a in given]


def _chosen(what: str, given: str | None, known: list[str], default: list[str]) -> list[str]:
    if given is None:
        return [name for name in known if name in default]
    names = given.split(",")
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no {what} {name!r}; there are {', '.join(known)}")
    return [name for name in known if name in names]


if __name__ == "__main__":
    run(main)
