"""What it took to reach a loss, on curves that are written down here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ars_kit.comparison import Comparison, compare_runs
from ars_kit.errors import ConfigError
from ars_kit.page import Text
from ars_kit.reach import Spent, family_points, first_at, points
from ars_kit.records import MemberRecord, RunRecord
from ars_kit.reporting import _damping
from ars_kit.resolving import resolve
from ars_kit.scenarios import scenarios
from ars_kit.sections import planned_table
from ars_kit.spread import Spread
from ars_kit.summary import summary
from ars_kit.verdicts import checks


def member(
    name: str, losses: list[float | None], *, parent: str | None = None, **figures: Any
) -> MemberRecord:
    """Return a member that spends 10 FLOPs and 2 s between two points."""
    steps = len(losses) - 1
    before = figures.pop("before", 0.0)
    curve = tuple(
        {"step": i, "loss": loss, "flops": 10.0 * i, "seconds": 2.0 * i, "judged_tokens": 64,
         "judging_seconds": 1.0, "judging_flops": 5.0}
        for i, loss in enumerate(losses)
    )  # fmt: skip
    metrics = {
        "model_id": name, "parent_model": parent, "parameters": 100 * int(name[1:]),
        "steps": steps, "tokens": steps, "flops": 10.0 * steps, "setup_flops": 0.0,
        "total_flops": 10.0 * steps, "lineage_flops": before + 10.0 * steps,
        "training_time": 2.0 * steps, "cost": 2.0 * steps, "device": "cpu", "gates": {},
        "heldout_loss": losses[-1], "bits_per_byte": losses[-1], "final_loss": losses[-1],
        "convergence_iterations": steps, "ars_damping_avg": 1.0, "skipped_steps": 0,
        "rollbacks": [], "vram_usage_peak": None, **figures,
    }  # fmt: skip
    return MemberRecord(name, "done", metrics, curve=curve, parent=parent)


BUDGETS = {"no-growth": 1.0, "one-long-run": 1.0, "scratch": None, "no-ars": None}


def run(
    label: str, *members: MemberRecord, controls: tuple[RunRecord, ...] = (), **flags: Any
) -> RunRecord:
    settings = resolve({"run.price_per_hour": 3600.0, **flags}, {})
    control = {"control": label, "budget_flops": BUDGETS[label]} if label in BUDGETS else None
    data = {"data": "a", "tokenizer": "b"}
    return RunRecord(Path(label), label, settings, members, control, controls, data)


CHAIN = (
    member("d1", [4.0, 3.0, 2.0]),
    member("d2", [2.0, 2.4, 1.0], parent="d1", before=20.0),
)


def test_the_path_counts_what_the_ancestors_cost() -> None:
    line = points(run("family", *CHAIN), "d2", ancestors=True)
    assert [(p.member, p.loss, p.flops, p.cost) for p in line] == [
        ("d1", 4.0, 0.0, 0.0), ("d1", 3.0, 10.0, 2.0), ("d1", 2.0, 20.0, 4.0),
        ("d2", 2.0, 20.0, 4.0), ("d2", 2.4, 30.0, 6.0), ("d2", 1.0, 40.0, 8.0),
    ]  # fmt: skip
    alone = points(run("family", *CHAIN), "d2", ancestors=False)
    assert [p.flops for p in alone] == [0.0, 10.0, 20.0]
    assert [p.flops for p in family_points(run("family", *CHAIN))][-1] == 40.0


def test_a_loss_is_reached_between_two_points() -> None:
    line = points(run("family", *CHAIN), "d2", ancestors=True)
    assert first_at(line, 3.5) == Spent("d1", 3.5, 5.0, 1.0, 1.0)
    assert first_at(line, 2.0) == Spent("d1", 2.0, 20.0, 4.0, 4.0)
    found = first_at(line, 1.7)
    assert found is not None
    assert (found.member, found.flops) == ("d2", pytest.approx(35.0))
    assert first_at(line, 0.9) is None


def test_nothing_is_interpolated_across_a_birth() -> None:
    jump = (member("d1", [4.0, 3.0]), member("d2", [2.0, 1.0], parent="d1", before=10.0))
    found = first_at(points(run("family", *jump), "d2", ancestors=True), 2.5)
    assert found == Spent("d2", 2.0, 10.0, 2.0, 2.0)


def test_a_branch_costs_what_it_continued() -> None:
    # d2 left d1 after half of it.
    branch = (member("d1", [4.0, 3.0, 2.0]), member("d2", [3.0, 1.0], parent="d1", before=10.0))
    line = points(run("family", *branch), "d2", ancestors=True)
    assert [(p.member, p.flops, p.seconds) for p in line] == [
        ("d1", 0.0, 0.0), ("d1", 10.0, 2.0), ("d2", 10.0, 2.0), ("d2", 20.0, 4.0),
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_is_no_point() -> None:
    holes = member("d1", [4.0, None, 2.0])
    assert [p.flops for p in points(run("family", holes), "d1", ancestors=True)] == [0.0, 20.0]


def family_with(control: RunRecord, *members: MemberRecord) -> Comparison:
    return compare_runs([run("family", *(members or CHAIN), controls=(control,))])


def test_savings_are_what_was_not_spent_until_the_controls_loss() -> None:
    scratch = run(
        "scratch", member("d2", [4.0, 3.0, 2.0, 1.5, 1.4]), **{"family.strategy": "scratch"}
    )
    (row,) = family_with(scratch).reached
    assert (row.target, row.control and row.control.flops) == (1.4, 40.0)
    # Between 2.4 at 30 and 1.0 at 40.
    assert row.reached is not None
    assert row.reached.flops == pytest.approx(30 + 10 * (2.4 - 1.4) / 1.4)
    assert row.saved() == pytest.approx(1 - row.reached.flops / 40)
    assert row.saved(own=True) == pytest.approx(1 - (row.reached.flops - 20) / 40)
    assert row.saved("seconds") == pytest.approx(row.saved("cost"))
    assert row.control_reached is None  # it never came down to 1.0


def test_alone_is_compared_with_alone() -> None:
    """A control whose members inherit too: their ancestors are no cheaper than the family's."""
    same = run("no-ars", *CHAIN, **{"optimizer.name": "adamw"})
    row = family_with(same).reached[-1]
    assert (row.member, row.saved(), row.saved(own=True)) == ("d2", 0.0, 0.0)


def test_what_was_not_reached_is_said_and_not_numbered() -> None:
    control = run("no-growth", member("d1", [4.0, 1.0, 0.5]))
    comparison = family_with(control)
    (row,) = comparison.reached
    assert (row.member, row.against) == ("d1", "d2")  # against the path to the largest
    assert (row.reached, row.own, row.saved()) == (None, None, None)
    assert row.control_reached == Spent("d1", 1.0, 10.0, 2.0, 2.0)
    assert comparison.saved("no-growth", "d1") is None
    said = " ".join(summary(comparison.family.runs[0], comparison))
    assert "did not reach the held-out loss of d1 of control no-growth" in said
    assert "one seed (0), so there is no interval" in said


def test_without_a_curve_nothing_is_claimed() -> None:
    bare = MemberRecord("d2", "done", member("d2", [4.0, 1.0]).metrics)
    comparison = family_with(run("scratch", bare))
    (row,) = comparison.reached
    assert row.why == "no held-out curve was drawn"
    assert row.facts()["saved"] == {"flops": None, "seconds": None, "cost": None}
    told = summary(comparison.family.runs[0], comparison)[1]
    assert told == (
        "Nothing is said of what inheritance or damping saved: no held-out curve was drawn."
    )


def test_several_seeds_have_a_spread_and_an_interval() -> None:
    runs = []
    for seed, last in ((0, 1.0), (1, 1.1), (2, 0.9)):
        flags = {"family.seed": seed}
        chain = (member("d1", [4.0, 2.0]), member("d2", [2.0, last], parent="d1", before=10.0))
        control = run("scratch", member("d2", [4.0, 2.0, 1.5]), **flags)
        runs.append(run(f"seed{seed}", *chain, controls=(control,), **flags))
    comparison = compare_runs(runs)
    assert [(g.name, g.seeds) for g in comparison.groups] == [
        ("family", [0, 1, 2]), ("scratch", [0, 1, 2]),
    ]  # fmt: skip
    assert comparison.notes == ()
    spread = comparison.family.spread("heldout_loss", "d2")
    assert spread is not None
    assert (spread.n, spread.mean, spread.sd) == (3, pytest.approx(1.0), pytest.approx(0.1))
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (spread.low, spread.high) == (pytest.approx(1 - half), pytest.approx(1 + half))
    assert [r.seed for r in comparison.reached] == [0, 1, 2]
    assert "95 % interval" in summary(runs[0], comparison)[2]


def test_runs_that_do_otherwise_are_groups_named_by_what_they_do() -> None:
    other = run("faster", *CHAIN, **{"train.lr": 0.5})
    groups = compare_runs([run("family", *CHAIN), other]).groups
    assert [g.name for g in groups] == ["family", "train.lr: 0.012 -> 0.5"]


def test_runs_with_another_remedy_are_no_seeds_of_each_other() -> None:
    """Whether to go back is a treatment, though a run may decide on it under way."""
    back = run("back", *CHAIN, **{"train.on_instability": "rollback"})
    names = [g.name for g in compare_runs([run("left", *CHAIN), back]).groups]
    assert names == ["family", 'train.on_instability: "ignore" -> "rollback"']


def test_a_seed_counts_once() -> None:
    ours = run("family", *CHAIN)
    with pytest.raises(ConfigError, match="copy has the settings of family, its seed 0 too"):
        compare_runs([ours, run("copy", *CHAIN)])
    assert compare_runs([ours, run("next", *CHAIN, **{"family.seed": 1})]).family.seeds == [0, 1]
    other = [run(name, *CHAIN, **{"train.lr": 0.5}) for name in ("one", "two")]
    with pytest.raises(ConfigError, match="two has the settings of one"):
        compare_runs([ours, *other])


def test_nothing_is_claimed_over_an_ancestor_whose_cost_is_not_known() -> None:
    damaged = MemberRecord("d1", "done", curve=CHAIN[0].curve)
    scratch = run("scratch", member("d2", [4.0, 2.0, 1.5]), **{"family.strategy": "scratch"})
    (row,) = family_with(scratch, damaged, CHAIN[1]).reached
    assert (row.reached, row.saved(), row.control) == (None, None, None)
    assert row.why == "an ancestor's figures are damaged, so what it spent is not known"
    shown = list(family_points(run("family", damaged, CHAIN[1])))
    assert {p.member for p in shown} == {"d1"}  # where d2 would begin is not known


def test_what_was_spent_is_counted_in_the_order_of_birth() -> None:
    """Under ``prune`` the last of the members is the first to be trained."""
    large, small = member("d2", [4.0, 3.0]), member("d1", [3.5, 2.5], parent="d2", before=10.0)
    waiting = MemberRecord("d0", "waiting")
    pruned = replace(run("family", waiting, small, large), born=("d2", "d1"))
    found = [(p.member, p.flops) for p in family_points(pruned)]
    assert found == [("d2", 0.0), ("d2", 10.0), ("d1", 10.0), ("d1", 20.0)]


def test_other_text_is_refused_and_another_tokenizer_said() -> None:
    def other(**changes: Any) -> RunRecord:
        found = run("other", *CHAIN, **changes.pop("flags", {}))
        return RunRecord(found.path, "other", found.settings, found.members, data=changes)

    ours = run("family", *CHAIN)
    with pytest.raises(ConfigError, match="other was trained on other text than family"):
        compare_runs([ours, other(data="z", tokenizer="b")])
    judged = other(data="a", tokenizer="b", flags={"data.heldout_fraction": 0.2})
    with pytest.raises(ConfigError, match=r"judged on other text .*fraction: 0.2, not 0.1"):
        compare_runs([ours, judged])
    found = compare_runs([ours, other(data="a", tokenizer="z", flags={"train.lr": 0.5})])
    assert any("another tokenizer" in note for note in found.notes)
    assert {row.why for row in found.reached} == {"another tokenizer"}


def test_a_members_text_that_changed_between_two_runs_is_refused() -> None:
    def with_texts(label: str, seed: int, **others: str) -> RunRecord:
        found = run(label, *CHAIN, **{"family.seed": seed})
        return replace(found, data={**found.data, "others": others})

    first = with_texts("one", 0, letters="a")
    assert compare_runs(
        [first, with_texts("two", 1, letters="a"), run("three", *CHAIN, **{"family.seed": 2})]
    )
    with pytest.raises(ConfigError, match=r"of two were trained .*: 'letters' had changed"):
        compare_runs([first, with_texts("two", 1, letters="b")])


def test_nothing_is_reached_in_another_context() -> None:
    other = run("other", *CHAIN, **{"data.sequence_length": 64})
    found = compare_runs([run("family", *CHAIN), other])
    assert {row.why for row in found.reached} == {"another context"}


def test_money_is_counted_at_the_price_that_was_paid_and_two_are_said_not_to_compare() -> None:
    later = member("d2", [2.0, 2.4, 1.0], parent="d1", before=20.0, price_per_hour=7200.0)
    dear = run("family", replace(CHAIN[0], metrics={**CHAIN[0].metrics, "price_per_hour": 3600.0}),
               later)  # fmt: skip
    assert [p.cost for p in points(dear, "d2", ancestors=True)] == [0.0, 2.0, 4.0, 4.0, 8.0, 12.0]
    assert [p.cost for p in family_points(dear)][-1] == 12.0
    notes = compare_runs([dear, run("other", *CHAIN, **{"family.seed": 1})]).notes
    assert "family ran at several prices: cost is not comparable" in notes
    assert "other ran at another price than family: cost is not comparable" in notes


def test_what_was_judged_in_different_ways_is_said() -> None:
    whole, strides = {"perplexity": "windows of 32"}, {"perplexity": "stride 8"}
    one = run("one", member("d1", [4.0, 3.0], notes=whole))
    two = run("two", member("d1", [4.0, 2.9], notes=strides), **{"family.seed": 1})
    told = [note for note in compare_runs([one, two]).notes if "alike" in note]
    assert told == [
        (
            "heldout_loss was not measured alike, so it does not compare (one/d1: windows of 32; "
            "two/d1: stride 8)"
        )
    ]
    assert not [note for note in compare_runs([one]).notes if "alike" in note]


def test_the_plans_scenarios_stand_beside_what_was_measured() -> None:
    scratch = run("scratch", *CHAIN, **{"family.strategy": "scratch"})
    found = {s.name: s for s in scenarios(family_with(scratch))}
    assert [round(s.planned, 2) for s in found.values()] == [7.92, 4.40, 4.40]
    assert found["from scratch"].facts()["measured_cost"] == 8.0
    assert found["progressive"].measured is None  # no run without ARS is there
    assert found["progressive + ARS"].facts()["measured_seconds"] == 8.0


def test_a_saving_of_next_to_nothing_is_no_minus_zero() -> None:
    def seeds(losses: tuple[float, float]) -> Comparison:
        made = []
        for seed, loss in enumerate(losses):
            flags = {"family.seed": seed}
            scratch = run("scratch", member("d1", [4.0, 2.0]), **flags)
            made.append(run("family", member("d1", [4.0, loss]), controls=(scratch,), **flags))
        return compare_runs(made)

    found = seeds((1.999, 1.999))
    told = summary(found.family.runs[0], found)
    assert "-0%" not in " ".join(told)
    assert "with 0% fewer FLOPs" in told[1]
    assert told[2] == "Over 2 seeds the 95 % interval of that saving is 0% to 0%."


def test_one_seed_has_no_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([None]) is None
    one = Spread.of([2.0, None])
    assert one == Spread(1, 2.0)
    assert one.shown() == "2.0000"
    assert Spread(2, 1.0, 0.25).shown(".2f") == "1.00 ± 0.25"


def test_the_checklist_says_what_holds() -> None:
    chain = {1: None, 2: "d1", 3: "d2"}
    better = [member(f"d{i}", [4.0, 4.0 - i], parent=parent) for i, parent in chain.items()]
    found = {c.metric: c for c in checks(run("family", *better))}
    assert found["training loss"].verdict == "holds"
    assert found["training loss"].found == "d1 3.000, d3 1.000; better in 2 of 2 steps"
    assert found["time"].verdict == "holds"
    assert found["convergence"].verdict == "does not hold"
    assert found["VRAM"].verdict == "not measured here"
    assert found["damping"].verdict == "not measured here"  # there is no history
    assert found["quality"].verdict == "holds"


def test_time_that_grows_is_not_equal() -> None:
    heirs = [member("d1", [4.0, 3.0]), member("d2", [3.0, 2.0], parent="d1", training_time=2.0),
             member("d3", [2.0, 1.0], parent="d2", training_time=2.3)]  # fmt: skip
    (time,) = [c for c in checks(run("family", *heirs)) if c.metric == "time"]
    assert time.verdict == "does not hold"
    assert "largest is 1.15 times the smallest" in time.found


def test_no_figure_is_rounded_to_what_its_verdict_denies() -> None:
    heirs = [member("d1", [4.0, 3.0004]), member("d2", [3.0, 2.0], parent="d1", training_time=2.0),
             member("d3", [2.0, 3.0001], parent="d2", training_time=2.208)]  # fmt: skip
    found = {c.metric: c for c in checks(run("family", *heirs))}
    assert (found["time"].verdict, found["quality"].verdict) == ("does not hold", "does not hold")
    assert "largest is 1.104 times the smallest" in found["time"].found
    assert found["quality"].found.startswith("d1 3.0004 bits/byte, d3 3.0001 bits/byte")


def test_losses_on_different_texts_or_judged_otherwise_are_no_trend() -> None:
    notes = {"perplexity": "windows of 32"}, {"perplexity": "stride 8"}
    chain = [member("d1", [4.0, 3.0], data_hash="a", notes=notes[0]),
             member("d2", [3.0, 2.0], parent="d1", data_hash="b", notes=notes[1])]  # fmt: skip
    found = {c.metric: c.verdict for c in checks(run("family", *chain))}
    for metric in ("training loss", "convergence", "quality"):
        assert found[metric] == "not measured here"
    best, *_ = summary(run("family", *chain), compare_runs([run("family", *chain)]))
    assert best.startswith("Of 2 members none can be called best on held-out text: bits_per_byte")


def test_an_interval_says_what_it_was_drawn_from() -> None:
    bounds = {"bits_per_byte_low": 2.9, "bits_per_byte_high": 3.1}
    for note, parts in (("9 documents", "documents"), ("30 passages of 1 document", "passages")):
        one = member("d1", [4.0, 3.0], notes={"perplexity": f"interval over {note}"}, **bounds)
        best, *_ = summary(run("family", one), compare_runs([run("family", one)]))
        assert f"(95 % interval over {parts} 2.9000 to 3.1000)" in best


def test_what_a_base_bore_is_no_heir_of_the_family() -> None:
    heirs = member("d2", [3.0, 2.0], parent="d1"), member("d3", [2.0, 1.0], parent="d2")
    chain = member("d1", [4.0, 3.5, 3.0], parent="path/to/base"), *heirs
    (time,) = [c for c in checks(run("family", *chain)) if c.metric == "time"]
    assert time.verdict == "holds"


def test_the_time_of_heirs_with_tokens_of_their_own_is_not_compared() -> None:
    heirs = [member("d1", [4.0, 3.0]), member("d2", [3.0, 2.0], parent="d1"),
             member("d3", [2.0, 1.5, 1.0], parent="d2")]  # fmt: skip
    (time,) = [c for c in checks(run("family", *heirs)) if c.metric == "time"]
    assert (time.verdict, time.found) == ("not measured here", "-")


def test_an_estimate_stands_at_the_price_that_was_paid() -> None:
    """A run that went on elsewhere has two prices."""
    heirs = member("d1", [4.0, 3.0], price_per_hour=1.0), member("d2", [3.0, 2.0], parent="d1")
    plan = {"members": [{"name": "d1", "seconds": 3600.0}, {"name": "d2", "seconds": 3600.0}]}
    table = planned_table(replace(run("family", *heirs), plan=plan))
    assert table.caption == "Estimated before the start, and measured; 1.0, then 3600.0 $ an hour"
    assert [row[4] for row in table.rows] == ["1.00", "3600.00"]


def test_a_gate_that_only_amplifies_has_acted() -> None:
    rows = tuple(
        {"step": i, "loss": 1.0, "gradient": 1.0, "step_size": 1.0, "skipped": False,
         "guard": 1.0, "norm-memory": 9.0}
        for i in range(3)
    )  # fmt: skip
    gates = {"guard": 1.0, "norm-memory": 9.0}
    trained = replace(member("d1", [4.0, 3.0], gates=gates), history=rows)
    said = [block.text for block in _damping(run("family", trained)) if isinstance(block, Text)]
    assert said == ["Gates that changed no step that was taken: guard."]
