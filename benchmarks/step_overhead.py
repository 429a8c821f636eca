"""What the training loop costs over a bare PyTorch loop, paired in one process.

Four loops train copies of one model on the same batches, in turns step by step, each in a thread of
its own; on one thread the clock is the process's own time, which neighbours do not stretch:

- ``bare``: forward, backward, fused AdamW, learning rate set by hand, loss read every tenth step;
- ``bare+clip``: the same with ``clip_grad_norm_(1.0)``, as most loops have it;
- ``adamw``: ``arskit run --optimizer adamw`` (accelerate, batches, guard, history, meter);
- ``ars``: ``arskit run --optimizer ars``, every gate of it.

Two copies of a model differ by where their memory lies, which is more than what ARS costs. So a
fifth, ``ars, gates left out``, takes turns with ``ars`` on one model, one base optimizer and one
thread: of each two steps one asks the gates and the other lets the base step as it is. Where that
is less than two steps differ by, ``--parts`` puts a clock around what the gates do.

The ratio of each round's times to the bare loop's is what counts, and for the gates that to the
loop without them; absolute times of a shared machine do not. ``bare`` and ``adamw`` must end with
bitwise the same weights, or it is void.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import chosen, run
from loops import alone, bare_loop, clock_of, our_job, our_loop, timed
from step_parts import breakdown

from ars_kit.heap import keep_freed_memory
from ars_kit.host import Host
from ars_kit.measure import Meter
from ars_kit.models import weights_of
from ars_kit.plan import RunPlan, plan_run
from ars_kit.resolving import resolve
from ars_kit.store import RunFolder
from ars_kit.tokens import Batches
from ars_kit.trainee import Trainee
from ars_kit.undamped import Undamped

BAR, CLIP = 1.03, 1.0
OURS, LEFT_OUT = "ars", "ars, gates left out"
SIZES: dict[str, dict[str, Any]] = {
    "embedded d18": {},
    "wide d18": {"family.aspect": 0.8, "family.head_dim": 64},
    # Few tokens a step: what is paid for each parameter then weighs most.
    "50M d14": {
        "family.members": "d14",
        "family.aspect": 4.571,
        "family.head_dim": 64,
        "data.sequence_length": 64,
        "train.batch_size": 4,
    },
    # As many tokens a step as arskit run takes unless told otherwise.
    "50M d14 whole batch": {
        "family.members": "d14",
        "family.aspect": 4.571,
        "family.head_dim": 64,
    },
}
DEFAULT = ("embedded d18", "wide d18", "50M d14")
"""In all loops the last of the sizes takes an hour."""


def compare(
    size: str, *, rounds: int, block: int, threads: int, gates_alone: bool = False
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return each loop's seconds per step, round by round, and what was run."""
    plan, batches = _planned(size, (rounds + 1) * block)
    steps, member = plan.members[0].steps, plan.members[0]
    if plan.device == "cpu":
        keep_freed_memory()  # as arskit run does
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        job, thread = _job(plan, OURS, batches, folder), ThreadPoolExecutor(max_workers=1)
        left_out = our_loop(_without_gates(job, folder), stack, compiling=False)
        loops = {
            OURS: alone(our_loop(job, stack, compiling=False), thread),
            LEFT_OUT: alone(left_out, thread),
        }
        if not gates_alone:
            bare = bare_loop(plan, batches, steps)
            ours = our_loop(_job(plan, "adamw", batches, folder), stack, compiling=False)
            clipping = bare_loop(plan, batches, steps, clip=CLIP)
            loops |= {"bare": alone(bare), "bare+clip": alone(clipping), "adamw": alone(ours)}
        seconds = timed(loops, rounds, block, clock_of(plan.device, threads))
        if not gates_alone:
            _require_same(bare.model, ours.model)
    facts = {
        "size": size,
        "parameters": member.parameters,
        "tokens_per_step": plan.settings.train.batch_size * plan.settings.data.sequence_length,
        "steps": rounds * block,
    }
    return seconds, facts


def parts_of(size: str, *, block: int) -> dict[str, float]:
    """Return the share of each part in the time of arskit's steps, by the wall's clock."""
    plan, batches = _planned(size, 2 * block)
    if plan.device == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        job = _job(plan, OURS, batches, Path(scratch))
        breakdown(job, 0, block)  # warms up
        return breakdown(job, block, block)


def _planned(size: str, steps: int) -> tuple[RunPlan, Batches]:
    flags = {"family.members": "d18", "train.steps_per_iteration": 1, **SIZES[size]}
    settings = resolve({**flags, "train.iterations": (steps, steps)}, {}, None)
    plan = plan_run(settings, Host.installed())
    batches = Batches(
        np.random.default_rng(0).integers(0, 1024, 2_000_000, dtype=np.uint16),
        sequence_length=plan.settings.data.sequence_length,
        batch_size=plan.settings.train.batch_size,
        seed=0,
    )
    return plan, batches


def _job(plan: RunPlan, optimizer: str, batches: Batches, folder: Path) -> Trainee:
    """Return what ``arskit run --optimizer`` trains with."""
    settings = resolve({**_flags(plan), "optimizer.name": optimizer}, {}, None)
    return our_job(plan_run(settings, Host.installed()), batches, RunFolder(folder / optimizer))


def _without_gates(job: Trainee, folder: Path) -> Trainee:
    """Return the same model and base optimizer, with nothing around the base."""
    other = copy.copy(job)
    other.optimizer = Undamped(job.optimizer.base, {})
    other.folder, other.meter = RunFolder(folder / "left out"), Meter()
    return other


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, dict[str, float]]:
    """Return each loop's median ratio to one of them, with the quartiles of the rounds."""
    found = {}
    for name, times in seconds.items():
        pairs = [t / b for t, b in zip(times, seconds[to], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        found[name] = {"ratio": middle, "q1": low, "q3": high, "ms": 1e3 * statistics.median(times)}
    return found


def _flags(plan: RunPlan) -> dict[str, Any]:
    settings = plan.settings
    return {k: v for k, v in settings.flat().items() if settings.origins.get(k) == "flag"}


def _require_same(one: Any, other: Any) -> None:
    for (name, mine), theirs in zip(
        weights_of(one).items(), weights_of(other).values(), strict=True
    ):
        if not torch.equal(mine, theirs):
            raise SystemExit(f"the two loops did not do the same work: {name} differs")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=5, help="steps of each loop in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", default=",".join(DEFAULT), help="names with commas between")
    parser.add_argument(
        "--gates-alone", action="store_true", help="measure nothing but what the gates cost"
    )
    parser.add_argument(
        "--parts", action="store_true", help="measure where a step's time goes, and nothing else"
    )
    parser.add_argument("--json", type=Path, help="keep the figures here, by size")
    options = parser.parse_args()
    how = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    rows: dict[str, dict[str, Any]] = {}
    print("| model | loop | ms per step | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- |")
    with _threads(options.threads):
        for size in chosen("size", options.sizes, SIZES):
            if options.parts:
                parts = parts_of(size, block=options.block)
                rows[size] = {"parts": parts}
                print(f"| {size} | gates | {parts['gates']:.2%} of a step | - | - |", flush=True)
                continue
            seconds, facts = compare(
                size,
                rounds=options.rounds,
                block=options.block,
                threads=options.threads,
                gates_alone=options.gates_alone,
            )
            gates = ratios({k: seconds[k] for k in (OURS, LEFT_OUT)}, LEFT_OUT)[OURS]
            loops = {k: v for k, v in seconds.items() if k != LEFT_OUT}
            found = {} if options.gates_alone else ratios(loops, "bare")
            rows[size] = {**facts, **how, "loops": found, "gates": gates}
            for name, r in {**found, "ars, against itself without gates": gates}.items():
                print(
                    f"| {size}, {facts['parameters']:,} | {name} | {r['ms']:.1f} "
                    f"| {r['ratio']:.3f} | {r['q1']:.3f} .. {r['q3']:.3f} |",
                    flush=True,
                )
    if options.json:
        _write(options.json, rows)


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Put figures in the place of those of the same sizes; the rest of a file stays."""
    before = json.loads(path.read_text("utf-8"))["sizes"] if path.exists() else []
    kept = {row["size"]: row for row in before}
    kept |= {size: {**kept.get(size, {"size": size}), **row} for size, row in rows.items()}
    sizes = [kept[size] for size in SIZES if size in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bar": BAR, "sizes": sizes}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
