"""The tables that reports and comparisons show; a dash was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ars_kit.comparison import Comparison, Group, Reached
from ars_kit.display import duration
from ars_kit.page import Table
from ars_kit.reach import Spent
from ars_kit.records import RunRecord
from ars_kit.scenarios import PLAN_HOURS, PLAN_MEMBERS, PLAN_PRICE, Scenario
from ars_kit.spread import Spread

QUALITY: Sequence[tuple[str, str, str]] = (
    ("heldout_loss", "held-out loss", "{:.4f}"),
    ("bits_per_byte", "bits per byte", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("bleu", "BLEU", "{:.2f}"),
    ("chrf", "chrF", "{:.2f}"),
    ("decode_tokens_per_second", "decode tokens/s", "{:,.0f}"),
)
"""Field of metrics.json, heading, form; a column stands there where any member has the figure."""


def figure(value: Any, form: str = "{:.4f}") -> str:
    """Return a figure, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def dollars(value: float | None) -> str:
    """Return an amount with as many digits as say something."""
    return "-" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.5f}"


def quality_table(comparison: Comparison, metric: str) -> Table:
    """Return one figure of every member in every group, and what the groups cost."""
    groups = comparison.groups
    heads = [g.name + (f" (seeds {_seeds(g)})" if len(g.runs) > 1 else "") for g in groups]
    rows = [
        [name, *(_spread(g.spread(metric, name)) for g in groups)] for name in comparison.members
    ]
    rows += [
        ["FLOPs", *(_spread(g.spread("total_flops"), ".3g") for g in groups)],
        ["training time, s", *(_spread(g.spread("training_time"), ".1f") for g in groups)],
        ["cost, $", *(_spread(g.spread("cost"), ".5f") for g in groups)],
    ]
    several = any(len(g.runs) > 1 for g in groups)
    what = f"{metric} of each member, and what each run cost"
    return Table(f"{what}; mean ± sd over seeds" if several else what, ["", *heads], rows)


def _seeds(group: Group) -> str:
    return ", ".join(map(str, group.seeds))


def _spread(spread: Spread | None, form: str = ".4f") -> str:
    return "-" if spread is None else spread.shown(form)


def reached_table(comparison: Comparison) -> Table:
    """Return what the family spent until it was as good as each member of each control."""
    headings = [
        "control", "member", "its loss", "its FLOPs", "family: FLOPs (saved)", "time (saved)",
        "cost, $", "member alone: FLOPs (saved)", "family's loss", "control: FLOPs",
    ]  # fmt: skip
    several = len({r.seed for r in comparison.reached}) > 1
    rows = [_reached(r, several=several) for r in comparison.reached]
    return Table(
        "What the family spent, on the path to the member, to reach the control's held-out loss "
        "(the sample of the held-out curve); at the right, what the control spent to reach the "
        "family's",
        headings,
        rows,
        names=2,
    )


def _reached(row: Reached, *, several: bool) -> list[str]:
    name = f"{row.group}, seed {row.seed}" if several else row.group
    if row.control is None:
        return [name, f"{row.member}: {row.why or '-'}", *["-"] * 8]
    found, same = row.reached, row.against == row.member
    member = row.member if same else f"{row.member} (against {row.against})"
    return [
        name,
        member,
        figure(row.target),
        figure(row.control.flops, "{:.3g}"),
        _flops(found, member=row.against) + _share(row.saved()),
        "-" if found is None else duration(found.seconds) + _share(row.saved("seconds")),
        dollars(found.cost if found else None),
        _flops(row.own, member=row.member) + _share(row.saved(own=True)) if same else "-",
        figure(row.loss),
        _flops(row.control_reached, member=row.member),
    ]


def _flops(spent: Spent | None, *, member: str) -> str:
    if spent is None:
        return "not reached"
    where = "" if spent.member == member else f" (in {spent.member})"
    return f"{spent.flops:.3g}{where}"


def _share(value: float | None) -> str:
    return "" if value is None else f" ({round(100 * value)} %)"


def cost_table(found: Sequence[Scenario]) -> Table:
    """Return the plan's scenarios: as planned, and as measured here."""
    rows = [
        [
            s.name,
            f"{s.hours:.0f} h",
            f"{s.planned:.2f}",
            "not measured here" if s.seconds is None else duration(s.seconds.mean),
            "-" if s.measured is None else dollars(s.measured.mean),
            s.run or "-",
        ]
        for s in found
    ]
    fresh, heir = PLAN_HOURS
    return Table(
        f"The plan's scenarios. As planned, no measurement: {PLAN_MEMBERS} members, {fresh:.0f} h "
        f"for each from fresh weights, {heir:.0f} h for each that inherits, {PLAN_PRICE} $ an "
        "hour; the plan gives ARS no hours of its own. As measured: training time here, at the "
        "run's price",
        ["scenario", "planned time", "planned $", "measured time", "measured $", "measured on"],
        rows,
    )


def family_table(run: RunRecord) -> Table:
    """Return the family: size, cost, damping and training loss of each member."""
    headings = [
        "member", "parent", "state", "parameters", "tokens", "training loss", "converged at",
        "damping", "skipped", "seconds", "tokens/s", "FLOPs", "cost, $",
    ]  # fmt: skip
    rows = []
    for m in run.members:
        f = m.metrics
        rows.append(
            [
                m.name,
                m.parent or "-",
                m.state if m.state != "training" else f"training, {m.steps} steps",
                figure(f.get("parameters"), "{:,}"),
                figure(f.get("tokens"), "{:,}"),
                figure(f.get("final_loss")),
                figure(f.get("convergence_iterations"), "{}"),
                figure(f.get("ars_damping_avg"), "{:.3f}"),
                figure(f.get("skipped_steps"), "{}"),
                figure(f.get("training_time"), "{:.1f}"),
                figure(f.get("tokens_per_second"), "{:,.0f}"),
                figure(f.get("total_flops"), "{:.3g}"),
                dollars(f.get("cost")),
            ]
        )
    return Table("Each member, and what its training cost", headings, rows, names=3)


def judged_table(run: RunRecord) -> Table:
    """Return every figure of quality that any member has, with intervals where there are any."""
    there = [q for q in QUALITY if any(m.metrics.get(q[0]) is not None for m in run.members)]
    rows = []
    for m in run.finished:
        cells = []
        for key, _, form in there:
            low, high = interval(m.metrics, key) or (None, None)
            between = "" if low is None else f" ({form.format(low)} to {form.format(high)})"
            cells.append(figure(m.metrics.get(key), form) + between)
        rows.append([m.name, *cells])
    ends = " (95 % interval)" if any("(" in cell for row in rows for cell in row) else ""
    return Table(f"Quality on held-out text{ends}", ["member", *(q[1] for q in there)], rows)


def interval(metrics: Any, key: str) -> tuple[float, float] | None:
    """Return the interval that an evaluator gave for a figure, or None."""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return None if low is None or high is None else (low, high)


def parts_of(metrics: Any) -> str:
    """Return what the interval of bits per byte was drawn from: few documents are cut."""
    note = (metrics.get("notes") or {}).get("perplexity", "")
    return "passages" if " passages of " in note else "documents"


def gates_table(run: RunRecord) -> Table:
    """Return each gate's mean factor for each member; 1 is undamped."""
    gates = list(dict.fromkeys(g for m in run.finished for g in m.metrics["gates"]))
    rows = [
        [
            m.name,
            figure(m.metrics["ars_damping_avg"], "{:.3f}"),
            *(figure(m.metrics["gates"].get(g), "{:.3f}") for g in gates),
            str(m.metrics["skipped_steps"]),
            str(len(m.metrics["rollbacks"])),
        ]
        for m in run.finished
    ]
    heads = ["member", "damping", *gates, "skipped steps", "times gone back"]
    return Table("Mean damping over the steps that were taken, and each gate's share", heads, rows)


def planned_table(run: RunRecord) -> Table:
    """Return the time and cost that were estimated before the run, beside what they were."""
    planned = {m["name"]: m for m in (run.plan or {}).get("members", [])}
    now, rows = run.settings.run.price_per_hour, []
    for m in run.members:
        foreseen = planned.get(m.name, {}).get("seconds")
        took, price = m.metrics.get("training_time"), m.metrics.get("price_per_hour", now)
        ratio = took / foreseen if foreseen and took is not None else None
        rows.append(
            [
                m.name,
                "-" if foreseen is None else duration(foreseen),
                "-" if took is None else duration(took),
                figure(ratio, "{:.2f}"),
                dollars(None if foreseen is None else foreseen / 3600 * price),
                dollars(m.metrics.get("cost")),
            ]
        )
    heads = ["member", "estimated time", "time", "ratio", "estimated $", "cost, $"]
    prices = dict.fromkeys(m.metrics.get("price_per_hour", now) for m in run.members)
    at = ", then ".join(map(str, prices))  # a run may go on at another price
    return Table(f"Estimated before the start, and measured; {at} $ an hour", heads, rows)


def curve_table(run: RunRecord) -> Table:
    """Return where each member's held-out curve began and ended."""
    rows = [
        [
            m.name,
            str(len(m.curve)),
            figure(m.curve[0]["loss"]),
            figure(m.last_heldout),
            f"{m.curve[-1]['judged_tokens']:,}",
            f"{sum(row['judging_seconds'] for row in m.curve):.1f}",
            f"{sum(row['judging_flops'] for row in m.curve):.3g}",
        ]
        for m in run.members
        if m.curve
    ]
    heads = ["member", "points", "first", "last", "judged tokens", "seconds", "FLOPs"]
    return Table(
        "The held-out curves; the time and FLOPs of judging are no part of training", heads, rows
    )
