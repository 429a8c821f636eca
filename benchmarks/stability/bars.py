"""The bars that ARS has to clear, each met or not with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stability.figures import Figure, Table
from stability.methods import ORACLE

PEERS = (
    "adamw", "clip", "zclip", "adagc", "stable-spam", "stableadamw", "skipstep", "agc",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bar:
    """One claim.

    Attributes:
        met: None where it was not measured here.
    """

    claim: str
    met: bool | None
    figures: str


def bars(table: Table, provocations: Sequence[str]) -> list[Bar]:
    """Judge every bar that this benchmark can judge.

    Args:
        table: the scores.
        provocations: all that were run, ``clean`` among them or not.
    """
    provoked = [p for p in provocations if p != "clean"]
    found = [_damage_bar(table, peer) for peer in ("clip", "zclip", "skipstep")]
    found.append(_nonfinite_bar(table))
    found += [
        _wins_bar(table, provoked, ("clip", "zclip"), 7),
        _wins_bar(table, provoked, ("stable-spam",), 6),
        _best_peer_bar(table, provoked),
        _clean_bar(table),
        _oscillation_bar(table),
    ]
    return found


def _damage_bar(table: Table, peer: str) -> Bar:
    claim = f"corrupt-10: damage at most 0.4 times that of {peer}"
    known = ("ars", peer, *((ORACLE,) if table.of("corrupt-10", ORACLE) else ()))
    table = table.shared(*((p, m) for p in ("clean", "corrupt-10") for m in known))
    mine, theirs = (table.damage("corrupt-10", m) for m in ("ars", peer))
    if mine.mean is None or theirs.mean is None:
        return Bar(claim, None, "not measured")
    told = table.damage("corrupt-10", ORACLE)
    oracle = f"; told which batches are random: {shown(told)}" if told.mean is not None else ""
    if theirs.mean <= 0:
        return Bar(claim, mine.mean <= 0, f"{shown(mine)} against {shown(theirs)}{oracle}")
    met = not mine.dead and mine.mean <= 0.4 * theirs.mean
    ratio = mine.mean / theirs.mean
    return Bar(claim, met, f"{shown(mine)} against {shown(theirs)}: {ratio:.3f} times{oracle}")


def _nonfinite_bar(table: Table) -> Bar:
    claim = "nonfinite: no dead run, damage at most 0.01"
    mine = table.damage("nonfinite", "ars")
    if not mine.n:
        return Bar(claim, None, "not measured")
    met = not mine.dead and mine.mean is not None and mine.mean <= 0.01
    return Bar(claim, met, shown(mine))


def _wins_bar(table: Table, provoked: Sequence[str], peers: Sequence[str], needed: int) -> Bar:
    claim = f"better than {' and '.join(peers)} in at least {needed} of 10 provocations"
    answers = {p: [table.better(p, "ars", peer) for peer in peers] for p in provoked}
    if len(answers) < 10 or any(a is None for row in answers.values() for a in row):
        return Bar(claim, None, "not all measured")
    won = [p for p, row in answers.items() if all(row)]
    clear = [p for p in won if all(_clearly(table, p, peer) for peer in peers)]
    lost = [p for p in answers if p not in won]
    figures = f"{len(won)} of {len(answers)}, {len(clear)} of them beyond the 95 % interval"
    return Bar(claim, len(won) >= needed, figures + (f"; not: {', '.join(lost)}" if lost else ""))


def _clearly(table: Table, provocation: str, peer: str) -> bool:
    difference = table.against(provocation, "ars", peer)
    return difference.mean is None or difference.dead > 0 or difference.clear


def _best_peer_bar(table: Table, provoked: Sequence[str]) -> Bar:
    claim = "in no provocation worse than the best peer by more than 1 %"
    worse: list[tuple[float, str]] = []
    if not provoked:
        return Bar(claim, None, "not all measured")
    for p in provoked:
        paired = table.shared(*((p, m) for m in (*PEERS, "ars")))
        peer = paired.best(p, list(PEERS))
        if not paired.of(p, "ars") or peer is None:
            return Bar(claim, None, "not all measured")
        mine, theirs = paired.score(p, "ars"), paired.score(p, peer).mean
        if mine.dead or mine.mean is None or theirs is None:
            worse.append((float("inf"), f"{p}: dead {mine.dead}/{mine.n}"))
        else:
            excess = mine.mean / theirs - 1
            worse.append((excess, f"{p}: {100 * excess:+.2f} % against {peer}"))
    over = [text for excess, text in sorted(worse, reverse=True) if excess > 0.01]
    figures = "; ".join(over) or "at worst " + max(worse)[1]
    return Bar(claim, not over, figures)


def _clean_bar(table: Table) -> Bar:
    claim = "clean: not worse than clip by more than 0.3 %"
    table = table.shared(("clean", "ars"), ("clean", "clip"))
    difference, base = table.against("clean", "ars", "clip"), table.score("clean", "clip")
    if difference.mean is None or base.mean is None:
        return Bar(claim, None, "not measured")
    share = difference.mean / base.mean
    return Bar(claim, share <= 0.003, f"{shown(difference)}, that is {100 * share:+.2f} %")


def _oscillation_bar(table: Table) -> Bar:
    claim = "oscillation: final loss with Ψ at least 25 % lower than without"
    table = table.shared(*(("oscillation", m) for m in ("ars", "ars-without-entropy")))
    mine, without = (table.score("oscillation", m).mean for m in ("ars", "ars-without-entropy"))
    if mine is None or without is None:
        return Bar(claim, None, "not measured")
    figures = f"{mine:.4f} against {without:.4f}: {100 * (mine / without - 1):+.1f} %"
    return Bar(claim, mine <= 0.75 * without, figures)


def shown(f: Figure, dead: str | None = None) -> str:
    """Return a signed mean with its interval and its dead, in other words where given."""
    if dead is None:
        dead = f"dead {f.dead}/{f.n}" if f.dead else ""
    if f.mean is None:
        return dead or "-"
    half = "" if f.half is None else f" ± {f.half:.4f}"
    mean = round(f.mean, 4) + 0.0  # without a minus before zero
    return f"{mean:+.4f}{half}" + (f" ({dead})" if dead else "")
