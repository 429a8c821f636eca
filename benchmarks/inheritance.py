"""What inheritance saves: families against their members from scratch, at equal held-out loss.

``python benchmarks/inheritance.py --quick --data FILE`` takes minutes, ``--full`` hours on a core.
``--quick`` runs the arms that decide, as ``--full`` was tuned; ``--arms`` asks for others. Results
are kept as they come; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click
from ending import run
from inheritance.arms import ARMS
from inheritance.report import Facts, write
from inheritance.runner import DECAY, Book, Key, run_all
from inheritance.scale import SCALES, Scale
from inheritance.text import Text, cut

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 101


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs of one call share."""

    name: str
    scale: Scale
    text: Text
    optimizer: str
    decay: float
    book: Book
    work: Path
    jobs: int
    device: str

    def key(
        self,
        arm: str,
        kappa: float,
        seed: int,
        tuned: tuple[float, float],
        members: tuple[int, int] | None = None,
    ) -> Key:
        """Return the settings of one run."""
        lr, init = tuned
        return Key(
            scale=self.name,
            arm=arm,
            kappa=kappa,
            seed=seed,
            lr=lr,
            init=init,
            optimizer=self.optimizer,
            text=self.text.digest,
            members=members,
            decay=self.decay,
        )

    def run(self, keys: list[Key]) -> None:
        """Run what is not done yet."""
        run_all(keys, self.text, self.book, self.work, say, jobs=self.jobs, device=self.device)

    def tune(self, arm: str) -> tuple[float, float]:
        """Return the learning rate and init with which ``arm`` serves the family's middle best.

        The family up to its middle member stands for the whole, on a seed that is not reported on
        and the half of the held-out text that chooses.
        """
        middle = (len(self.scale.shapes) + 1) // 2
        part = (middle - 1 if ARMS[arm].strategy == "scratch" else 0, middle)
        choices = [(lr, init) for lr in self.scale.rates for init in self.scale.inits]
        if len(choices) == 1:
            return choices[0]
        keys = {c: self.key(arm, 1.0, TUNING_SEED, c, part) for c in choices}
        self.run(list(keys.values()))
        return min(choices, key=lambda c: self.book.families[keys[c]][-1].choosing)


def say(line: str) -> None:
    """Tell of progress."""
    click.echo(line, err=True)


@click.command()
@click.option("--quick", "name", flag_value="quick", default=True, help="Minutes; the default.")
@click.option("--full", "name", flag_value="full", help="Hours on one core.")
@click.option("--gpu", "name", flag_value="gpu", help="d6..d12 at nanochat's widths, on one GPU.")
@click.option("--tiny", "name", flag_value="tiny", hidden=True)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text in UTF-8; several are read as one.",
)
@click.option("--arms", help="Names with commas between.  [the scale's own]")
@click.option("--seeds", type=click.IntRange(min=1), help="How many.")
@click.option("--first-seed", default=1, show_default=True, help="They count from it.")
@click.option("--optimizer", default="adamw", show_default=True, help="Of every arm.")
@click.option(
    "--decay",
    type=click.FloatRange(0, 1),
    default=DECAY,
    show_default=True,
    help="Share of every member's steps in which its rate falls.",
)
@click.option("--rates", help="Peak learning rates that are tried, at width 32.  [the scale's own]")
@click.option("--jobs", default=1, show_default=True, help="Processes, of one thread each.")
@click.option("--work", type=click.Path(path_type=Path), help="For runs under way.")
@click.option("--out", type=click.Path(path_type=Path), help="Results, without suffix.")
@click.option("--report-only", is_flag=True, help="Run nothing; report what is there.")
def main(  # noqa: PLR0913 -- a command's options
    *,
    name: str,
    data: tuple[Path, ...],
    arms: str | None,
    seeds: int | None,
    first_seed: int,
    optimizer: str,
    decay: float,
    rates: str | None,
    jobs: int,
    work: Path | None,
    out: Path | None,
    report_only: bool,
) -> None:
    """Run the benchmark and write its report as Markdown, JSON and SVG."""
    scale = _tried(SCALES[name], rates)
    work = work or Path(tempfile.gettempdir()) / "arskit-inheritance"
    text = cut(list(data), work)
    out = out or RESULTS / f"inheritance-{name}-{data[0].stem}"
    chosen = arms.split(",") if arms else list(scale.arms or ARMS)
    unknown = [a for a in chosen if a not in ARMS]
    if unknown:
        raise click.UsageError(f"no arm named {unknown[0]!r}; there are {', '.join(ARMS)}")
    device = "cuda" if name == "gpu" else "cpu"
    book = Book(out.with_suffix(".jsonl"))
    bench = Bench(name, scale, text, optimizer, decay, book, work, jobs, device)
    numbers = range(first_seed, first_seed + (seeds or scale.seeds))
    tuned = _tuned(bench, chosen)
    keys = [
        bench.key(arm, kappa, seed, tuned[ARMS[arm].like or arm])
        for seed in numbers
        for arm in ARMS
        if arm in chosen
        for kappa in ARMS[arm].ladder(scale)
    ]
    if not report_only:
        bench.run(keys)
    facts = Facts(
        command=f"python benchmarks/inheritance.py {shlex.join(_arguments())}",
        scale=name,
        text=text.name,
        characters=text.characters,
        optimizer=optimizer,
        tuned=tuned,
    )
    for line in write(out, facts, scale, {k: f for k in keys if (f := bench.book.families.get(k))}):
        click.echo(line)


def _tried(scale: Scale, rates: str | None) -> Scale:
    try:
        return replace(scale, rates=tuple(map(float, rates.split(",")))) if rates else scale
    except ValueError:
        raise click.UsageError(f"--rates {rates!r} is not numbers with commas between") from None


def _tuned(bench: Bench, chosen: list[str]) -> dict[str, tuple[float, float]]:
    """Tune each arm that does not take another's settings over."""
    owners = dict.fromkeys(ARMS[arm].like or arm for arm in chosen)
    return {arm: bench.tune(arm) for arm in owners}


def _arguments() -> list[str]:
    """Return the command line, its paths shortened to their names."""
    given, places = sys.argv[1:], ("--work", "--out")
    kept = [
        a
        for before, a in zip(["", *given], given, strict=False)
        if a != "--report-only" and a not in places and before not in places
    ]
    return [Path(a).name if "/" in a else a for a in kept]


if __name__ == "__main__":
    run(main)
