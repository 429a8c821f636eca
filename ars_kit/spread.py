"""Several seeds as one figure: mean, standard deviation, and an interval where there can be one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at 0.975 for 1, 2, ... 30 degrees of freedom (any table; Fisher & Yates 1938)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds.

    Attributes:
        n: seeds it was measured with.
        sd: sample standard deviation; None with one seed.
        low: lower end of the 95 % interval of the mean (Student's t); None with one seed.
        high: its upper end.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Return the spread of what was measured; None where nothing was."""
        found = [v for v in values if v is not None]
        if not found:
            return None
        n, mean = len(found), statistics.fmean(found)
        if n == 1:
            return cls(1, mean)
        sd = statistics.stdev(found)
        # Beyond the table the last entry is a little too wide, which is the safe side.
        half = T975[min(n - 1, len(T975)) - 1] * sd / math.sqrt(n)
        return cls(n, mean, sd, mean - half, mean + half)

    def shown(self, form: str = ".4f") -> str:
        """Return ``mean ± sd``, or the mean alone with one seed."""
        mean = format(self.mean, form)
        return mean if self.sd is None else f"{mean} ± {format(self.sd, form)}"
