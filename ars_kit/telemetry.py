"""What damped steps record of themselves: on the device, read by the host when somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ars_kit.errors import ConfigError, PluginError
from ars_kit.factors import Factors

KEPT_ROWS = 4096
"""Rows kept on the device when nobody drains them."""

TAKEN = frozenset(
    {"step", "loss", "gradient", "step_size", "skipped", "damping", "dropped", "went_back"}
)
"""What rows call other things by, so that no gate can have these names."""


class Telemetry:
    """A row for each step since the last reading, and sums over all steps.

    Args:
        gates: their names, in the order they are asked; looked at again each time.

    Raises:
        ConfigError: a gate has the name of something else in a row, whose place it would take.
    """

    def __init__(self, gates: Collection[str]) -> None:
        if taken := sorted(TAKEN.intersection(gates)):
            raise ConfigError(
                f"no damping gate can be called {taken[0]!r}: that is something else in the record "
                "of a step"
            )
        self.gates = gates
        self.totals: Tensor | None = None
        self._rows: deque[tuple[int, Tensor]] = deque(maxlen=KEPT_ROWS)
        self._labels: tuple[str, ...] = ()

    def expect(self, step: int, explained: tuple[str, ...]) -> None:
        """Say what the next row will explain; asked before the step is taken.

        Raises:
            PluginError: the gates explained other things in the rows before.
        """
        if self._labels != explained and self._rows:
            raise PluginError(
                f"damping gates explained {sorted(explained)} at step {step} but "
                f"{sorted(self._labels)} before; the names must stay the same"
            )
        self._labels = explained

    def note(self, step: int, loss: Tensor, total: Factors) -> None:
        """Record one step."""
        explained = total.explained
        skip = total.skip.float()
        head = [loss, total.gradient, total.step, skip, *total.factors]
        row = torch.stack([*head, *explained.values(), *total.broken])
        self._rows.append((step, row))
        # A skipped step damps nothing; it is counted on its own.
        n = len(total.factors)
        damping = torch.where(total.skip, 0.0, total.gradient * total.step)
        per_gate = torch.where(total.skip, 0.0, row[4 : 4 + n])
        counts = torch.stack([torch.ones_like(loss), skip, damping])
        new = torch.cat([counts, per_gate, row[row.numel() - n :]])
        self.totals = new if self.totals is None else self.totals + new

    def note_undamped(self, step: int, loss: Tensor) -> None:
        """Record one step that there was no gate to ask about."""
        self.note(step, loss, Factors(torch.ones_like(loss), 0))

    def drain(self) -> list[dict[str, Any]]:
        """Return and forget the rows; synchronises once."""
        if not self._rows:
            return []
        steps, rows = zip(*self._rows, strict=True)
        self._rows.clear()
        names = ("loss", "gradient", "step_size", "skipped", *self.gates, *self._labels)
        found = []
        for step, row in zip(steps, torch.stack(rows).tolist(), strict=True):
            named: dict[str, Any] = {"step": step, **dict(zip(names, row, strict=False))}
            named["skipped"] = bool(named["skipped"])
            found.append(named)
        return found

    def summary(self) -> dict[str, Any]:
        """Return steps, skipped steps, mean damping and each gate's mean factor; synchronises."""
        names = list(self.gates)
        if self.totals is None:
            return {"steps": 0, "skipped": 0, "damping": None, "gates": dict.fromkeys(names)}
        steps, skipped, damping, *rest = self.totals.tolist()
        taken = steps - skipped
        return {
            "steps": int(steps),
            "skipped": int(skipped),
            "damping": damping / taken if taken else None,
            "gates": {n: v / taken if taken else None for n, v in zip(names, rest, strict=False)},
        }

    def broken(self) -> dict[str, tuple[int, int | None]]:
        """Return in how many steps each gate's factor was no factor, if any; synchronises.

        Beside the count stands the first such step, where its row is still there.
        """
        if self.totals is None:
            return {}
        n = len(self.gates)
        counts = self.totals[3 + n :].tolist()
        return {
            name: (int(count), next((step for step, row in self._rows if row[i - n]), None))
            for i, (name, count) in enumerate(zip(self.gates, counts, strict=True))
            if count
        }
