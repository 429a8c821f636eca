"""The Entropy Guard's detector on sequences whose truth is known: what it finds, what it imagines.

A sequence is 5 + pattern + noise, noise of unit variance, pattern of variance SNR (1 unless said
otherwise), random phase:

- ``sine``: a sinusoid (of period 2: +1, -1);
- ``square``: high for the first half of the period, low for the rest;
- ``random``: normal values, drawn for each sequence, that repeat; the loss of data read in a cycle.

The constants of the detector were chosen on other seeds. A window is one evaluation, 64 losses; a
run is 2000 steps, evaluated every 8.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from ending import run
from torch import Tensor

from ars_kit_plugins.gating import EntropyGuard
from ars_kit_plugins.periodicity import WINDOW

PERIODS = (2, 3, 4, 5, 6, 7, 8)
RUN = 2000
CHUNK = 1000
Maker = Callable[[torch.Generator, int, int], Tensor]


def noise(rng: torch.Generator, n: int, steps: int) -> Tensor:
    """Return white noise, (n, steps)."""
    return torch.randn(n, steps, generator=rng)


def pattern(kind: str, period: int, rng: torch.Generator, n: int, steps: int) -> Tensor:
    """Return a periodic pattern of unit variance and random phase, (n, steps)."""
    t = torch.arange(steps)
    if kind == "sine" and period > 2:
        phase = torch.rand(n, 1, generator=rng)
        return 2**0.5 * torch.cos(2 * torch.pi * (t / period + phase))
    if kind == "random":
        shape = torch.randn(n, period, generator=rng)
    else:
        shape = torch.where(torch.arange(period) < (period + 1) // 2, 1.0, -1.0).expand(n, period)
    shape = shape - shape.mean(1, keepdim=True)
    shape = shape / shape.square().mean(1, keepdim=True).sqrt()
    return shape.gather(1, (t + torch.randint(period, (n, 1), generator=rng)) % period)


def red(phi: float) -> Maker:
    """Return stationary AR(1) noise of unit variance."""

    def make(rng: torch.Generator, n: int, steps: int) -> Tensor:
        white = noise(rng, n, steps)
        values = [white[:, 0]]
        for i in range(1, steps):
            values.append(phi * values[-1] + (1 - phi**2) ** 0.5 * white[:, i])
        return 5 + torch.stack(values, 1)

    return make


def descent(scale: float, spread: float) -> Maker:
    """Return 5 exp(-t / scale) plus noise of standard deviation ``spread``."""
    return lambda rng, n, steps: (
        2 + 5 * torch.exp(-torch.arange(steps) / scale) + spread * noise(rng, n, steps)
    )


def power_law(rng: torch.Generator, n: int, steps: int) -> Tensor:
    """Return 4 (1 + t)^-0.15 plus noise of 0.05: what a language model's losses look like."""
    return 4 * (1 + torch.arange(steps)) ** -0.15 + 0.05 * noise(rng, n, steps)


def shifted(height: float) -> Maker:
    """Return white noise whose level changes once, anywhere."""

    def make(rng: torch.Generator, n: int, steps: int) -> Tensor:
        at = torch.randint(8, steps - 8, (n, 1), generator=rng)
        return 15 + noise(rng, n, steps) + height * (torch.arange(steps) >= at)

    return make


def spiky(rng: torch.Generator, n: int, steps: int) -> Tensor:
    """Return white noise with 5 % of the losses ten standard deviations up."""
    return 5 + noise(rng, n, steps) + 10 * (torch.rand(n, steps, generator=rng) < 0.05)


CALM: dict[str, Maker] = {
    "white noise": lambda rng, n, steps: 5 + noise(rng, n, steps),
    "AR(1) 0.5": red(0.5),
    "AR(1) 0.8": red(0.8),
    "AR(1) 0.95": red(0.95),
    "exponential descent, fast": descent(100, 0.05),
    "exponential descent, slow": descent(1000, 0.3),
    "power-law descent": power_law,
    "shift +3 sd": shifted(3),
    "shift -3 sd": shifted(-3),
    "5 % spikes": spiky,
}
RISING: dict[str, Maker] = {
    f"rises {slope} sd a step": lambda rng, n, steps, slope=slope: (
        15 + noise(rng, n, steps) + slope * (torch.arange(steps) - RUN // 2).clamp(min=0)
    )
    for slope in (0.02, 0.05, 0.2)
}


def chunks(total: int) -> Iterator[int]:
    """Split a count into chunks that fit in memory."""
    for first in range(0, total, CHUNK):
        yield min(CHUNK, total - first)


def alarms(gate: EntropyGuard, losses: Tensor) -> Tensor:
    """Return every evaluation of whole sequences, (n, evaluations), as the gate makes them."""
    windows = losses.unfold(1, WINDOW, gate.EVERY)
    never = torch.full((), torch.inf)
    middle = gate.detect(windows, never).middle
    best = torch.cat([never.expand(len(losses), 1), middle.cummin(1).values[:, :-1]], 1)
    found = gate.detect(windows, best)
    lasting = torch.nn.functional.pad(found.rises, (gate.RISES - 1, 0)).unfold(1, gate.RISES, 1)
    return (found.evidence > 1) & ~found.progress | lasting.all(-1)


def share(gate: EntropyGuard, make: Maker, rng: torch.Generator, windows: int) -> float:
    """Return the share of single windows that raise an alarm."""
    hits = sum(int(alarms(gate, make(rng, n, WINDOW)).sum()) for n in chunks(windows))
    return hits / windows


def over_runs(gate: EntropyGuard, make: Maker, rng: torch.Generator, runs: int) -> dict[str, float]:
    """Return the share of runs with any alarm, of evaluations with one, and the mean Ψ."""
    found = torch.cat([alarms(gate, make(rng, n, RUN)) for n in [10] * (runs // 10)])
    psi = torch.ones(len(found))
    total = torch.zeros(len(found))
    for alarm in found.unbind(1):
        psi = torch.where(alarm, (0.7 * psi).clamp(min=gate.floor), (psi * 1.02**8).clamp(max=1))
        total += psi
    return {
        "runs": float(found.any(1).float().mean()),
        "evaluations": float(found.float().mean()),
        "mean_psi": float((total / found.shape[1]).mean()),
    }


def measure(windows: int, runs: int, seed: int) -> dict[str, object]:
    """Measure everything; JSON-ready."""
    gate, rng = EntropyGuard(), torch.Generator().manual_seed(seed)
    found = {
        kind: {
            p: share(
                gate,
                lambda r, n, s, k=kind, p=p: 5 + pattern(k, p, r, n, s) + noise(r, n, s),
                rng,
                windows,
            )
            for p in PERIODS
        }
        for kind in ("sine", "square", "random")
    }
    cyclic = {
        # A pattern of period 8, four times the noise, while the loss falls by so many standard
        # deviations (of pattern plus noise) in half a window.
        fall: share(
            gate,
            lambda r, n, s, f=fall: (
                50 + 2 * pattern("random", 8, r, n, s) + noise(r, n, s)
                - f * 5**0.5 * torch.arange(s) / (WINDOW / 2)
            ),
            rng,
            windows,
        )
        for fall in (0.0, 0.25, 0.5, 1.0, 2.0)
    }  # fmt: skip
    return {
        "windows": windows,
        "runs": runs,
        "seed": seed,
        "detection_at_snr_1": found,
        "false_alarms_per_window": {k: share(gate, m, rng, windows) for k, m in CALM.items()},
        "false_alarms_per_run": {k: over_runs(gate, m, rng, runs) for k, m in CALM.items()},
        "rise_alarms_per_run": {k: over_runs(gate, m, rng, runs) for k, m in RISING.items()},
        "cyclic_data_alarm_by_fall": cyclic,
    }


def markdown(result: dict[str, object]) -> str:
    """Return the tables of ``result``."""
    found: dict[str, dict[int, float]] = result["detection_at_snr_1"]  # type: ignore[assignment]
    calm: dict[str, float] = result["false_alarms_per_window"]  # type: ignore[assignment]
    runs: dict[str, dict[str, float]] = result["false_alarms_per_run"]  # type: ignore[assignment]
    rises: dict[str, dict[str, float]] = result["rise_alarms_per_run"]  # type: ignore[assignment]
    cyclic: dict[float, float] = result["cyclic_data_alarm_by_fall"]  # type: ignore[assignment]
    head = (
        f"Seed {result['seed']}; {result['windows']} windows a cell, {result['runs']} runs of "
        f"{RUN} steps."
    )
    lines = [
        head,
        "",
        "| detected at SNR 1, period | " + " | ".join(map(str, PERIODS)) + " |",
        "|---|" + "---|" * len(PERIODS),
        *(
            f"| {kind} | " + " | ".join(f"{100 * row[p]:.1f} %" for p in PERIODS) + " |"
            for kind, row in found.items()
        ),
        "",
        "| false alarms on | of windows | of a run's evaluations | runs with any | mean Ψ |",
        "|---|---|---|---|---|",
        *(
            f"| {k} | {100 * v:.2f} % | {100 * runs[k]['evaluations']:.2f} % "
            f"| {100 * runs[k]['runs']:.0f} % | {runs[k]['mean_psi']:.4f} |"
            for k, v in calm.items()
        ),
        "",
        "| half the run | of a run's evaluations | runs with any | mean Ψ |",
        "|---|---|---|---|",
        *(
            f"| {k} | {100 * v['evaluations']:.1f} % | {100 * v['runs']:.0f} % "
            f"| {v['mean_psi']:.3f} |"
            for k, v in rises.items()
        ),
        "",
        "| cyclic data (period 8, SNR 4): fall per half-window, sd | alarms |",
        "|---|---|",
        *(f"| {k} | {100 * v:.2f} % |" for k, v in cyclic.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detector.json"))
    args = parser.parse_args()
    result = measure(args.windows, args.runs, args.seed)
    print(markdown(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
