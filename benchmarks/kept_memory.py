"""What it is worth that a process which trains on the CPU keeps the memory that a step frees.

    python benchmarks/kept_memory.py --json benchmarks/results/kept_memory.json

Processes train the same model on the same batches, one that keeps its memory and one that does not
in turns, each by its own time. Without a process of its own each would find the other's memory.
The table of ``docs/speed.md`` is made from the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import chosen, run
from loops import bare_loop
from throughput import plan_of

from ars_kit.heap import keep_freed_memory
from ars_kit.models import count_parameters
from ars_kit.tokens import Batches

STEPS = {"embedded d14": 24, "20M d14": 8}
"""Timed steps of a process, by size; a quarter as many come before them."""


def train(size: str, *, keeping: bool) -> dict[str, float]:
    """Train in this process; return seconds and pages asked for a step, and the peak in MB."""
    if keeping and not keep_freed_memory():
        raise SystemExit("this process cannot keep its memory: another C library, or settings")
    steps = STEPS[size]
    before = steps // 4
    with tempfile.TemporaryDirectory() as home:
        plan = plan_of(size, before + steps, {"train.device": "cpu"}, Path(home))
    settings = plan.settings
    stream = np.random.default_rng(0).integers(0, 1000, 2_000_000, dtype=np.uint16)
    length, batch = settings.data.sequence_length, settings.train.batch_size
    batches = Batches(stream, sequence_length=length, batch_size=batch, seed=0)
    loop = bare_loop(plan, batches, before + steps)
    loop.block(0, before)
    pages, begin = _pages(), time.process_time()
    loop.block(before, steps)
    return {
        "seconds": (time.process_time() - begin) / steps,
        "pages": (_pages() - pages) / steps,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "parameters": count_parameters(plan.members[0].config),
        "tokens": length * batch,
    }


def _pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def compare(size: str, rounds: int) -> dict[str, Any]:
    """Return what one size came to."""
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for number in range(rounds):
        for keeping in (False, True) if number % 2 else (True, False):
            command = [sys.executable, __file__, "--alone", size]
            done = subprocess.run(  # noqa: S603 -- this very file
                command + ["--keeping"] * keeping, stdout=subprocess.PIPE, text=True, check=True
            )
            found[keeping].append(json.loads(done.stdout))
    pairs = zip(found[True], found[False], strict=True)
    low, middle, high = statistics.quantiles([k["seconds"] / p["seconds"] for k, p in pairs], n=4)

    def median(keeping: bool, figure: str) -> float:
        return statistics.median(row[figure] for row in found[keeping])

    return {
        "size": size,
        "parameters": int(found[True][0]["parameters"]),
        "tokens": int(found[True][0]["tokens"]),
        "rounds": rounds,
        "ratio": middle,
        "q1": low,
        "q3": high,
        **{
            name: [median(False, name), median(True, name)]
            for name in ("seconds", "pages", "peak_mb")
        },
    }


def main() -> None:
    """Measure the sizes and print what they came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="of a process of each kind")
    parser.add_argument("--sizes", default=",".join(STEPS), help="names, commas between")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--keeping", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        print(json.dumps(train(options.alone, keeping=options.keeping)))
        return
    sizes = []
    for size in chosen("size", options.sizes, STEPS):
        sizes.append(compare(size, options.rounds))
        print(sizes[-1], flush=True)
    environment = {"machine": platform.machine(), "threads": 1, "torch": torch.__version__}
    environment["libc"] = " ".join(platform.libc_ver())
    if options.json:
        report = {"environment": environment, "sizes": sizes}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
