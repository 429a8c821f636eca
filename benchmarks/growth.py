"""Cost against size: text, checkpoints, histories, families, growth, each over a range of sizes.

Each cost is measured at every size, with the exponent by which it grows from the second largest to
the largest: 1 is in proportion, 2 is four times for twice. A checkpoint's commit is set beside what
the same volume takes to write and sync the same bytes, its verification beside sha256 alone, in
turns and by the wall's clock; all else is timed by the processor's. ``--full`` goes to the largest
sizes: 1 GB of text, a checkpoint of 5 GB, 100 members.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import chosen, numbers, run

from ars_kit import models
from ars_kit.data import prepare
from ars_kit.durable import check_directory, commit_directory, sha256, sync
from ars_kit.growing import Growth, grow_checkpoint
from ars_kit.host import Host
from ars_kit.measure import peak_rss
from ars_kit.models import build
from ars_kit.outcome import status
from ars_kit.plan import plan_run
from ars_kit.reporting import write_report
from ars_kit.resolving import resolve
from ars_kit.runs import execute
from ars_kit.schema import Choice
from ars_kit.settings import to_toml
from ars_kit.shapes import embedded_config
from ars_kit.source import NamedSource
from ars_kit.store import RunFolder
from ars_kit.tokenizer import TrainBPE

PROPORTIONAL = 1.15
"""Largest exponent that still counts as growing in proportion."""
WORDS = ("the", "of", "and", "to", "is", "loss", "gate", "grows", "member", "state", "step", "text")
VOCABULARY = 1728
"""Words of the text that is made up."""
DEFAULT: dict[str, tuple[int, ...]] = {
    "text": (3, 10, 30),
    "checkpoint": (10, 100, 1000),
    "history": (10_000, 100_000, 1_000_000),
    "family": (3, 10, 30),
    "growth": (10, 24, 48),
}
FULL = {"text": (10, 100, 1000), "checkpoint": (10, 500, 5000), "family": (3, 30, 100)}
UNITS = {
    "text": "MB",
    "checkpoint": "MB",
    "history": "steps",
    "family": "members",
    "growth": "layers grown to, from 10",
}
NAMES = {
    "seconds": "all of it",
    "verify_seconds": "verify",
    "status_seconds": "status",
    "plan_seconds": "plan",
    "report_seconds": "report",
    "plain_seconds": "a plain write",
    "sha256_seconds": "sha256 alone",
}
FLOORS = {"seconds": "plain_seconds", "verify_seconds": "sha256_seconds"}
"""What a checkpoint's times are held against: a volume may itself slow down with size."""
Point = dict[str, float]


class Nobody:
    """Follows a family and says nothing."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


def text(megabytes: int, home: Path) -> Point:
    """Prepare text in a process of its own, whose largest resident memory is the peak."""
    folder = home / "texts"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for part in range(megabytes):
        # Word frequencies fall as in any language, so that a tokenizer has as much to do.
        numbers = draw.zipf(1.2, 260_000) % VOCABULARY
        words = [WORDS[n % 12] + WORDS[n // 12 % 12] * (n > 143) for n in numbers.tolist()]
        lines = [" ".join(words[i : i + 13]) for i in range(0, len(words), 13)]
        (folder / f"{part:04}.txt").write_text("\n".join(lines)[:1_000_000])
    found = json.loads(
        subprocess.run(  # noqa: S603 -- this very file
            [sys.executable, __file__, "--prepare", str(folder), "--cache", str(home / "cache")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    return {**found, "MB_per_second": megabytes / found["seconds"]}


def prepare_alone(folder: Path, cache: Path) -> Point:
    """Prepare a folder of text here; returns all threads' processor seconds and the peak."""
    host = Host.installed()
    begin = time.process_time()
    source = NamedSource(host, Choice("files", {"path": str(folder)}))
    prepare(source, tokenizer=TrainBPE(1024), cache=cache)
    return {"seconds": time.process_time() - begin, "peak_MB": peak_rss() / 1e6}


class Volume:
    """Ways to write and to read the same bytes in a folder."""

    def __init__(self, megabytes: int, home: Path) -> None:
        self.megabytes, self.home = megabytes, home
        self.block = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8).tobytes()
        (home / "scratch").mkdir()

    def files(self, folder: Path) -> None:
        """Write them, as one file."""
        with (folder / "weights").open("wb") as file:
            for _ in range(self.megabytes):
                file.write(self.block)

    def plain(self) -> None:
        """Write and sync them."""
        (self.home / "plain").mkdir()
        self.files(self.home / "plain")
        sync(self.home / "plain" / "weights")

    def committed(self) -> None:
        """Commit them."""
        target, scratch = self.home / "committed", self.home / "scratch"
        commit_directory(target, self.files, {}, scratch=scratch)

    def hashed(self) -> None:
        """Read and hash them."""
        sha256(self.home / "plain" / "weights")

    def verified(self) -> None:
        """Verify them."""
        if check_directory(self.home / "committed"):
            raise SystemExit("what was committed does not verify")

    def clear(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.home / "plain")
        shutil.rmtree(self.home / "committed")


def checkpoint(megabytes: int, home: Path) -> Point:
    """Commit and verify a file of so many bytes, in turns with plain ways to do the same."""
    volume = Volume(megabytes, home)
    found: dict[str, list[float]] = {}
    for turn in range(3):
        pairs = (volume.plain, volume.committed), (volume.hashed, volume.verified)
        # A volume's own cache favours who comes first.
        for call in (c for pair in pairs for c in (reversed(pair) if turn % 2 else pair)):
            took = _seconds(call, time.perf_counter)  # much of it waits for the volume
            found.setdefault(call.__name__, []).append(took)
        volume.clear()
    middle = {name: statistics.median(times) for name, times in found.items()}
    return {
        "seconds": middle["committed"],
        "plain_seconds": middle["plain"],
        "commit_over_plain": middle["committed"] / middle["plain"],
        "verify_seconds": middle["verified"],
        "sha256_seconds": middle["hashed"],
        "verify_over_sha256": middle["verified"] / middle["hashed"],
        "MB_per_second": megabytes / middle["committed"],
        "verify_MB_per_second": megabytes / middle["verified"],
    }


def history(steps: int, home: Path) -> Point:
    """Ask for the status and the report of a run whose member in training has so many steps."""
    settings = resolve({"family.members": "d2"}, {}, None)
    folder = RunFolder(home)
    folder.create()
    folder.write_text("run.toml", to_toml(settings))
    losses = (
        3
        + 3 * np.exp(-np.arange(steps) / (steps / 5))
        + np.random.default_rng(0).normal(0, 0.1, steps)
    )
    gates = dict.fromkeys(("gradient", "step_size", "guard", "surprise", "norm-memory"), 1.0)
    rows = [
        {"step": i, "loss": loss, **gates, "skipped": False, "surprise_z": 0.1}
        for i, loss in enumerate(losses.tolist())
    ]
    folder.states("d2").append(rows)
    del rows
    asked = _seconds(lambda: status(home))
    return {
        "seconds": _seconds(lambda: write_report(home)),
        "status_seconds": asked,
        "report_MB": (home / "report.html").stat().st_size / 1e6,
    }


def family(members: int, home: Path) -> Point:
    """Train, plan, ask after and report a family of the smallest members, two steps each."""
    roster = ";".join(f"m{i}:num_hidden_layers=1,hidden_size=8" for i in range(members))
    texts = home / "text.txt"
    texts.write_text("\n".join(f"line {i}: {WORDS[i % 12]} {i * i}" for i in range(4000)))
    flags = {
        "family.members": roster, "family.vocab_size": 300, "data.source": str(texts),
        "data.sequence_length": 16, "data.heldout_tokens": 64, "train.batch_size": 2,
        "train.iterations": (2, 2), "train.steps_per_iteration": 1, "train.device": "cpu",
    }  # fmt: skip
    host, out = Host.installed(), home / "run"
    plan = plan_run(resolve(flags, {}, None), host)
    planned = min(_seconds(lambda: _planned_anew(flags, host)) for _ in range(3))
    run = _seconds(lambda: execute(plan, host, out, home / "cache", watcher=Nobody()))
    return {
        "seconds": run,
        "plan_seconds": planned,
        "status_seconds": _seconds(lambda: status(out)),
        "report_seconds": _seconds(lambda: write_report(out)),
    }


def _planned_anew(flags: dict[str, Any], host: Host) -> None:
    """Plan a family as a process does that has planned none."""
    models._counts.cache_clear()  # noqa: SLF001 -- what the process remembers of shapes
    plan_run(resolve(flags, {}, None), host)


def growth(depth: int, home: Path) -> Point:
    """Grow a checkpoint of ten layers at one width, in place of training it there."""
    sizes = {"hidden_size": 256}
    shape = {"vocab_size": 1024, "context": 128, "aspect": 1.6, "head_dim": 32, "sizes": sizes}
    small, large = (embedded_config(d, **shape) for d in (10, max(depth, 11)))
    build(small, seed=0).save_pretrained(home / "d10")
    facts: dict[str, Any] = {}

    def grow() -> None:
        made = Growth(home / "d10", large, Host.installed(), Choice("progressive"), home / "grown")
        facts.update(grow_checkpoint(made))

    seconds = []
    for _ in range(3):
        seconds.append(_seconds(grow))
        shutil.rmtree(home / "grown")
    return {"seconds": min(seconds), "parameters": facts["parameters"][1]}


MEASURES: dict[str, Callable[[int, Path], Point]] = {
    f.__name__: f for f in (text, checkpoint, history, family, growth)
}


def measure(kind: str, sizes: Iterable[int]) -> dict[str, Any]:
    """Return what each size costs, and how each time grows with it."""
    points: list[Point] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as home:
            points.append({"size": float(size), **MEASURES[kind](size, Path(home))})
        print(kind, {k: round(v, 3) for k, v in points[-1].items()}, flush=True)
    exponents = {key: exponent(points, key) for key in points[0] if key.endswith("seconds")}
    return {"kind": kind, "unit": UNITS[kind], "points": points, "exponents": exponents}


def exponent(points: list[Point], key: str) -> float | None:
    """Return the exponent with which a cost grows between the two largest sizes."""
    if len(points) < 2:
        return None
    small, large = points[-2:]
    return math.log(large[key] / small[key]) / math.log(large["size"] / small["size"])


def worse(found: Iterable[dict[str, Any]]) -> list[str]:
    """Name what grows worse than in proportion, and than what it is held against."""
    named = []
    for kind in found:
        exponents = kind["exponents"]
        for key in exponents.keys() - FLOORS.values():
            floor = max(exponents.get(FLOORS.get(key)) or 1.0, 1.0)
            if exponents[key] is not None and exponents[key] > floor + PROPORTIONAL - 1:
                named.append(f"{kind['kind']}: {key}, exponent {exponents[key]:.2f}")
    return sorted(named)


def _plainly(value: float, _: int) -> str:
    """Spell a tick of a logarithmic axis; only those that begin with 1, 2 or 5 have room."""
    text = f"{value:.0e}"
    return f"{value:,g}" if text[0] in "125" else ""


def draw(kinds: Iterable[dict[str, Any]], path: Path) -> None:
    """Plot every time against size, each kind from its smallest size, with a line in proportion."""
    import matplotlib as mpl  # noqa: PLC0415 -- slow to import, and not needed to measure

    mpl.use("svg")
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: PLC0415

    shown = list(kinds)
    figure = Figure(figsize=(9, 2.6 * math.ceil(len(shown) / 3)), layout="constrained")
    for place, kind in enumerate(shown, start=1):
        axes = figure.add_subplot(math.ceil(len(shown) / 3), 3, place)
        sizes = [p["size"] for p in kind["points"]]
        for key in kind["exponents"]:
            times = [p[key] for p in kind["points"]]
            axes.loglog(sizes, times, "o-", markersize=3, label=NAMES.get(key, key))
        first = kind["points"][0]["seconds"]
        even = [first * size / sizes[0] for size in sizes]
        axes.loglog(sizes, even, ":", color="grey", label="in proportion")
        # Whole decades may be far apart, or none lie within: the sizes themselves are the ticks.
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(FuncFormatter(_plainly))
        axes.set_title(kind["kind"], fontsize=9)
        axes.set_xlabel(kind["unit"], fontsize=8)
        axes.set_ylabel("seconds", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})


def _seconds(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return what a call takes: of the processor, whoever else uses it, or by ``clock``."""
    begin = clock()
    call()
    return clock() - begin


def main() -> None:
    """Measure every kind and say what grows worse than in proportion."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", default=",".join(MEASURES), help="names, commas between")
    parser.add_argument("--sizes", type=numbers, help="of the one kind, in place of its own")
    parser.add_argument("--full", action="store_true", help="to the largest sizes")
    parser.add_argument("--json", type=Path, help="write the figures here; other kinds there stay")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        print(json.dumps(prepare_alone(options.prepare, options.cache)))
        return
    ranges = {**DEFAULT, **(FULL if options.full else {})}
    kinds = chosen("kind", options.kinds, MEASURES)
    if options.sizes:
        ranges |= dict.fromkeys(kinds, tuple(options.sizes))
    found = [measure(kind, ranges[kind]) for kind in kinds]
    for line in worse(found):
        print(f"worse than in proportion: {line}")
    if options.json:
        kept = json.loads(options.json.read_text())["kinds"] if options.json.exists() else []
        kept = [k for k in kept if k["kind"] not in kinds]
        environment = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        whole = sorted([*kept, *found], key=lambda k: list(MEASURES).index(k["kind"]))
        report = {"environment": environment, "kinds": whole, "worse": worse(whole)}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        draw(whole, options.json.with_suffix(".svg"))


if __name__ == "__main__":
    run(main)
