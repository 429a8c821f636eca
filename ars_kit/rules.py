"""By what a member is chosen: a figure or several by weight, and conditions; in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ars_kit.errors import ConfigError

DEFAULT_METRIC = "bits_per_byte"
_BETTER_HIGH = re.compile(
    r"bleu|chrf|.*tokens_per_second.*|.*_(acc|acc_norm|acc_bytes|exact_match|f1|mcc|bleu|chrf)"
)
_NUMBER = r"[-+]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_LIMIT = re.compile(rf"\s*(\w[\w.-]*)\s*(<=|>=)\s*({_NUMBER})\s*")
_WEIGHTED = re.compile(rf"\s*(\w[\w.-]*)\s*:\s*({_NUMBER})\s*")

PAIRED = frozenset({"bits_per_byte", "heldout_loss", "perplexity"})
"""Figures that are kept document by document."""
_NOTED = (
    ("perplexity", re.compile("|".join(PAIRED))),
    ("bleu", re.compile("bleu|chrf")),
    ("speed", re.compile("(prefill|decode)_tokens_per_second.*|time_to_first_token.*")),
)
"""The note that says how a figure was measured."""
_TASK_NOTE = re.compile(r"(own_)?[^:]+:(.+)")
"""``EVALUATOR:TASK``: how the figures were measured whose names begin with ``TASK_``."""

Prefer = Literal["lowest", "highest"]


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure that decides, alone or with others.

    Attributes:
        figure: its name in ``metrics.json``.
        prefer: which end of it wins; None: as is known of the figure, and the lowest otherwise.
        weight: above 0; only its ratio to the other aims' counts.
    """

    figure: str = DEFAULT_METRIC
    prefer: Prefer | None = None
    weight: float = 1.0

    @property
    def end(self) -> Prefer:
        """The end of the figure that wins."""
        return self.prefer or ("highest" if _BETTER_HIGH.fullmatch(self.figure) else "lowest")

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.end} {self.figure}"


@dataclass(frozen=True, slots=True)
class Limit:
    """A condition on a figure.

    Attributes:
        figure: its name in ``metrics.json``.
        most: whether the bound is the largest that is allowed, else it is the smallest.
        bound: in the figure's unit.
    """

    figure: str
    most: bool
    bound: float

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.figure} {'at most' if self.most else 'at least'} {self.bound:,g}"

    def holds(self, value: float) -> bool:
        """Whether a member with this figure may be chosen."""
        return value <= self.bound if self.most else value >= self.bound


@dataclass(frozen=True, slots=True)
class Rule:
    """How a member is chosen.

    Attributes:
        aims: what decides; several by their weights.
        limits: what every member that may be chosen has to meet.
    """

    aims: tuple[Aim, ...] = (Aim(),)
    limits: tuple[Limit, ...] = ()

    @property
    def metric(self) -> str:
        """What is compared: the figure, or ``score`` where several are weighed."""
        return self.aims[0].figure if len(self.aims) == 1 else "score"

    @property
    def figures(self) -> tuple[str, ...]:
        """All figures that it looks at."""
        aims, limits = (a.figure for a in self.aims), (x.figure for x in self.limits)
        return tuple(dict.fromkeys((*aims, *limits)))

    def __str__(self) -> str:
        """Say it in words."""
        where = " of those with " + " and ".join(map(str, self.limits)) if self.limits else ""
        if len(self.aims) == 1:
            return f"{self.aims[0]}{where}"
        total = sum(a.weight for a in self.aims)
        shares = " and ".join(f"{a} ({100 * a.weight / total:.3g} %)" for a in self.aims)
        return f"highest score by {shares}{where}"

    def values(self, family: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return what each member is compared by.

        Several figures are weighed by a weighted product (Bridgman, "Dimensional Analysis", 1922):
        each figure's ratio to the best of it, from 0 to 1, to the power of its share of the
        weights. A unit changes no ranking, nor does a member that is added or taken away.

        Args:
            family: members that have every figure.

        Raises:
            ConfigError: a figure that is to be weighed is below 0, or not finite.
        """
        if len(self.aims) == 1:
            return [float(m[self.metric]) for m in family]
        total = sum(a.weight for a in self.aims)
        scores = [1.0] * len(family)
        for aim in self.aims:
            for i, ratio in enumerate(_ratios(aim, family)):
                scores[i] *= ratio ** (aim.weight / total)
        return scores

    def ranked(self, family: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
        """Return members and :meth:`values`, the best first; the earlier of two equals wins."""
        highest = len(self.aims) > 1 or self.aims[0].end == "highest"
        pairs = zip(family, self.values(family), strict=True)
        return sorted(pairs, key=lambda pair: -pair[1] if highest else pair[1])


def _ratios(aim: Aim, family: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return how near each member comes to the best of a figure, from 0 to 1."""
    values = [float(m[aim.figure]) for m in family]
    for member, value in zip(family, values, strict=True):
        if value < 0 or not math.isfinite(value):
            raise ConfigError(
                f"{aim.figure} of {member['model_id']} is {value:g}; "
                "only figures of 0 and above can be weighed"
            )
    best = max(values) if aim.end == "highest" else min(values)
    pairs = [(v, best) if aim.end == "highest" else (best, v) for v in values]
    return [1.0 if low == high else low / high for low, high in pairs]


def task_note(figure: str, notes: Mapping[str, str]) -> str | None:
    """Return the name of the note on the task that a figure is of, None where it is of none.

    Args:
        figure: its name in ``metrics.json``.
        notes: of the same member.
    """
    begins = {n: f"{m[1] or ''}{m[2]}_" for n in notes if (m := _TASK_NOTE.fullmatch(n))}
    fitting = [note for note, begin in begins.items() if figure.startswith(begin)]
    return max(fitting, key=lambda note: len(begins[note]), default=None)


def unalike(members: Iterable[tuple[str, Mapping[str, Any]]], figure: str) -> str | None:
    """Say how a figure was measured where that was not the same for all; None where it was.

    A run may go on under other evaluators, and what was judged since may have been judged
    otherwise; such figures say nothing about each other.

    Args:
        members: names and figures, with their ``notes``.
        figure: its name in ``metrics.json``.
    """
    key = next((name for name, figures in _NOTED if figures.fullmatch(figure)), None)
    ways: dict[str, list[str]] = {}
    for name, metrics in members:
        notes = metrics.get("notes") or {}
        how = notes.get(key or task_note(figure, notes))
        if how is not None and metrics.get(figure) is not None:
            ways.setdefault(how, []).append(name)
    if len(ways) < 2:
        return None
    told = "; ".join(f"{', '.join(names)}: {how}" for how, names in ways.items())
    return f"{figure} was not measured alike, so it does not compare ({told})"


def parse_aims(text: str, prefer: Prefer | None = None) -> tuple[Aim, ...]:
    """Read ``FIGURE``, or ``FIGURE:WEIGHT,FIGURE:WEIGHT``.

    Args:
        text: as given.
        prefer: which end wins; goes with one figure only.

    Raises:
        ConfigError: it is neither, a weight is not above 0, or a figure stands there twice.
    """
    if "," not in text and ":" not in text:
        return (Aim(text.strip(), prefer),)
    aims = []
    for part in text.split(","):
        match = _WEIGHTED.fullmatch(part)
        if match is None or not 0 < float(match[2]) < math.inf:
            raise ConfigError(
                f"cannot read {part!r} in the metric {text!r}; write FIGURE, or "
                "FIGURE:WEIGHT,FIGURE:WEIGHT with weights above 0"
            )
        aims.append(Aim(match[1], prefer, float(match[2])))
    twice = {a.figure for a in aims if sum(a.figure == b.figure for b in aims) > 1}
    if twice:
        raise ConfigError(f"the metric {text!r} names {min(twice)} twice; give it one weight")
    if prefer and len(aims) > 1:
        raise ConfigError("--prefer goes with one figure; of several, the better end is known")
    return tuple(aims)


def parse_limit(text: str) -> Limit:
    """Read ``FIGURE<=NUMBER`` or ``FIGURE>=NUMBER``.

    Raises:
        ConfigError: it is neither.
    """
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"cannot read the condition {text!r}; write FIGURE<=NUMBER or FIGURE>=NUMBER"
        )
    return Limit(match[1], match[2] == "<=", float(match[3]))
