"""Controls and held-out curves: what is trained, on what budget, and what they leave untouched."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quiet
from safetensors.torch import load_file

from ars_kit.choosing import select
from ars_kit.comparison import compare
from ars_kit.controls import plan_controls, with_curve
from ars_kit.curve import sample
from ars_kit.errors import ConfigError, Preempted
from ars_kit.history import read_history
from ars_kit.host import Host
from ars_kit.kinship import lineage_facts
from ars_kit.outcome import frozen_settings, newer_than_best, status
from ars_kit.plan import RunPlan, estimate, plan_run
from ars_kit.records import RunRecord, read_run
from ars_kit.reporting import build, write_report
from ars_kit.resolving import resolve
from ars_kit.rules import Aim, Rule
from ars_kit.runs import execute, train_control
from ars_kit.settings import Settings
from ars_kit.store import BEST, RunFolder, verify
from ars_kit.trainee import Stop


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.installed()


@pytest.fixture(scope="module")
def run(controlled: Path) -> RunRecord:
    return read_run(controlled)


def plan_of(host: Host, **flags: Any) -> RunPlan:
    return plan_run(resolve({k.replace("__", "."): v for k, v in flags.items()}, {}), host)


def test_every_control_is_an_ordinary_run_folder(controlled: Path, run: RunRecord) -> None:
    assert [c.label for c in run.controls] == ["scratch", "no-growth", "one-long-run", "no-ars"]
    members = {c.label: [m.name for m in c.members] for c in run.controls}
    family = ["d2", "d3", "d4"]
    assert members == {
        "scratch": family, "no-growth": ["d2"], "one-long-run": ["d4"], "no-ars": family,
    }  # fmt: skip
    for control in run.controls:
        names, problems = verify(control.path)
        assert (names, problems) == (members[control.label], [])
        assert [row["state"] for row in status(control.path)] == ["done"] * len(names)
        assert control.data == run.data
        assert control.settings.family.seed == run.settings.family.seed
        assert control.settings.run.controls == ()
    # The family's own folder knows nothing of them but their place.
    assert verify(controlled) == (family, [])
    assert [row["model_id"] for row in status(controlled)][:3] == family


def test_budgets_are_flops_and_recorded(run: RunRecord) -> None:
    by_name = {c.label: c for c in run.controls}
    spent = {m.name: m.metrics for m in run.members}
    path = spent["d4"]["lineage_flops"]
    whole = sum(m["total_flops"] for m in spent.values())
    for name, budget in (("no-growth", path), ("one-long-run", whole)):
        record = by_name[name].control
        assert record is not None
        (only,) = by_name[name].finished
        assert record["budget_flops"] == budget
        assert record["steps"] == only.metrics["steps"] == round(budget / record["flops_per_step"])
        assert only.metrics["total_flops"] == pytest.approx(record["planned_flops"])
        # Right to half a step.
        assert abs(only.metrics["total_flops"] - budget) <= record["flops_per_step"] / 2
    assert all(m.metrics["steps"] == 12 for m in by_name["scratch"].members)
    assert all(m.metrics["parent_model"] is None for m in by_name["scratch"].members)
    assert {m.metrics["optimizer"] for m in by_name["no-ars"].members} == {"adamw"}
    assert [m.metrics["steps"] for m in by_name["no-ars"].members] == [12, 6, 6]


def test_a_control_reads_the_same_text_in_the_same_order(run: RunRecord) -> None:
    """The first member from scratch is the family's own first, to the last bit."""
    scratch = next(c for c in run.controls if c.label == "scratch")
    ours, theirs = (load_file(r.path / "d2" / "model.safetensors") for r in (run, scratch))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_largest_alone_is_damped_as_the_largest_in_its_family(host: Host) -> None:
    plan = plan_of(host, run__controls="one-long-run,no-growth", family__members="d2..d4")
    long_run, no_growth = plan_controls(plan, host)
    assert long_run.plan.settings.optimizer.entropy_threshold == (0.4, 0.4)
    assert no_growth.plan.settings.optimizer.entropy_threshold == (0.5, 0.5)
    # Before the family is trained its plan stands in for what it will have spent.
    assert long_run.budget == sum(m.flops for m in plan.members)


def test_a_control_that_would_show_nothing_is_refused(host: Host) -> None:
    own = "a:num_hidden_layers=2; b:num_hidden_layers=3,data=stdlib"
    own = own.replace("2;", "2,data=other;")
    for flags, reason in (
        ({"family__strategy": "scratch", "run__controls": "scratch"}, "start from scratch"),
        ({"optimizer__name": "adamw", "run__controls": "no-ars"}, "adamw is no wrapper"),
        ({"family__members": "d3", "run__controls": "no-growth"}, "one member, d3"),
        ({"family__members": own, "run__controls": "one-long-run"}, "texts that the members have"),
    ):
        plan = plan_of(host, **flags)
        with pytest.raises(ConfigError, match=reason):
            plan_controls(plan, host)
    with pytest.raises(ConfigError, match="did you mean 'scratch'"):
        resolve({"run.controls": "scrach"}, {})
    with pytest.raises(ConfigError, match="'scratch' is named twice"):
        resolve({"run.controls": "scratch,scratch"}, {})


def test_a_shape_of_its_own_stays_what_it_is(host: Host) -> None:
    small, big = "num_hidden_layers=2,hidden_size=16", "num_hidden_layers=3,hidden_size=24"
    roster = f"small:{small}; big:{big},tokens=9000"
    plan = plan_of(host, family__members=roster, run__controls="one-long-run")
    (control,) = plan_controls(plan, host)
    (member,) = control.plan.members
    assert (member.name, member.parameters) == ("big", plan.members[1].parameters)
    assert member.flops == pytest.approx(control.budget, abs=member.flops / member.steps / 2)


def test_curves_are_drawn_for_controls_and_when_asked(host: Host) -> None:
    assert plan_of(host).settings.run.heldout_every is None
    assert with_curve(plan_of(host)).settings.run.heldout_every is None
    assert with_curve(plan_of(host, run__controls="scratch")).settings.run.heldout_every == 10
    asked = plan_of(host, run__controls="scratch", run__heldout_every=7)
    assert with_curve(asked).settings.run.heldout_every == 7


def test_a_curve_has_a_point_at_birth_at_the_end_and_between(run: RunRecord) -> None:
    for member in run.members:
        steps = member.metrics["steps"]
        assert [row["step"] for row in member.curve] == list(range(steps + 1))
        assert member.curve[0]["flops"] == 0
        assert member.curve[-1]["flops"] == pytest.approx(member.metrics["flops"])
        assert member.curve[-1]["seconds"] <= member.metrics["training_time"]
        # What judging cost is known, and is no part of training.
        summed = member.metrics["heldout_curve"]
        assert summed["seconds"] == pytest.approx(sum(r["judging_seconds"] for r in member.curve))
        assert summed["seconds"] > 0
        assert summed["flops"] == sum(r["judging_flops"] for r in member.curve)
    d2, d3 = run.members[:2]
    # An heir is born with its parent's loss.
    assert d3.curve[0]["loss"] == pytest.approx(d2.curve[-1]["loss"], abs=1e-4)


def test_a_point_is_the_mean_loss_of_its_windows(run: RunRecord) -> None:
    """The sample is all of so short a text, so the last point is the held-out loss."""
    for member in run.members:
        assert member.last_heldout == pytest.approx(member.metrics["heldout_loss"], abs=2e-2)


def test_the_sample_lies_evenly_and_is_cut_to_whole_windows() -> None:
    class Corpus:
        heldout = torch.arange(100_000).numpy()

    windows = sample(Corpus(), 128, None)  # type: ignore[arg-type]
    assert windows.shape == (64, 129)
    starts = windows[:, 0]
    assert starts[0] == 0
    assert 100_000 - 256 < starts[-1] + 128 <= 100_000
    gaps = starts[1:] - starts[:-1]
    assert gaps.max() - gaps.min() <= 128
    short = type("Short", (), {"heldout": torch.arange(20).numpy()})()
    assert sample(short, 128, None).shape == (1, 20)


class Cutting(Quiet):
    """Asks the run to stop when the first steps of a member are read."""

    def __init__(self, member: str) -> None:
        self.member = member

    def steps(self, member: str, *_: Any) -> None:
        if member == self.member:
            self.member = ""  # a second one would end the process at once
            signal.raise_signal(signal.SIGTERM)


def test_an_interrupted_curve_goes_on_as_if_nothing_had_been(
    controlled: Path, run: RunRecord, host: Host, cache: Path, tmp_path: Path
) -> None:
    bare = without_controls(frozen_settings(controlled))
    settings = replace(bare, run=replace(bare.run, log_every=4, heldout_every=3))
    plan = plan_run(settings, host)
    out = tmp_path / "cut"
    for member in ("d2", "d3"):
        with pytest.raises(Preempted):
            execute(plan, host, out, cache, watcher=Cutting(member))
    assert read_run(out).member("d3").state == "training"  # type: ignore[union-attr]
    execute(plan, host, out, cache, watcher=Quiet())
    for member in run.members:
        ours = {row["step"]: row["loss"] for row in member.curve}
        theirs = read_history(out / member.name / "heldout.jsonl")
        assert [(r["step"], r["loss"]) for r in theirs] == [
            (step, ours[step]) for step in ours if step % 3 == 0
        ]
        weights = [load_file(o / member.name / "model.safetensors") for o in (controlled, out)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class CuttingLate(Quiet):
    """Asks the run to stop when it has nothing left to train."""

    def finished(self, metrics: Mapping[str, Any]) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_at_the_end_of_a_family_stops_its_controls(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    settings = frozen_settings(controlled)
    settings = replace(settings, run=replace(settings.run, controls=("no-ars",)))
    settings = replace(settings, family=replace(settings.family, members="d2"))
    (control,) = plan_controls(plan_run(settings, host), host)
    plan = plan_run(without_controls(settings), host)
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    with stop.listening():
        execute(plan, host, tmp_path, cache, watcher=CuttingLate(), stop=stop)
        with pytest.raises(Preempted, match=r"stopped d2 after step 1 of 12, state saved"):
            train_control(control, host, tmp_path, cache, watcher=Quiet(), stop=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    train_control(control, host, tmp_path, cache, watcher=Quiet(), stop=Stop())
    assert verify(tmp_path / "controls" / "no-ars") == (["d2"], [])


def test_a_text_that_changes_while_the_family_trains_is_no_controls(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    settings = frozen_settings(controlled)
    text = tmp_path / "text"
    shutil.copytree(settings.data.source, text)
    settings = replace(
        settings,
        data=replace(settings.data, source=str(text)),
        run=replace(settings.run, controls=("no-ars",)),
        family=replace(settings.family, members="d2"),
    )
    (control,) = plan_controls(plan_run(settings, host), host)
    plan, out = plan_run(without_controls(settings), host), tmp_path / "out"
    execute(plan, host, out, cache, watcher=Quiet())
    first = min(text.iterdir())
    first.write_text(first.read_text(encoding="utf-8") + "More of it.\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"has changed since this run began in .*out; put it back"
    ):
        train_control(control, host, out, cache, watcher=Quiet(), stop=Stop())
    assert not RunFolder(out / "controls" / "no-ars").members()


def test_a_curve_changes_no_weight(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    bare = without_controls(frozen_settings(controlled))
    settings = replace(
        bare,
        run=replace(bare.run, heldout_every=None),
        family=replace(bare.family, members="d2"),
    )
    execute(plan_run(settings, host), host, tmp_path / "plain", cache, watcher=Quiet())
    plain = read_run(tmp_path / "plain").members[0]
    assert (plain.curve, plain.metrics["heldout_curve"]) == ((), None)
    ours = load_file(controlled / "d2" / "model.safetensors")
    theirs = load_file(tmp_path / "plain" / "d2" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_controls(settings: Settings) -> Settings:
    return replace(settings, run=replace(settings.run, controls=()))


def test_starting_anew_takes_the_controls_along_unless_one_is_trained(
    controlled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(controlled, out)
    folder = RunFolder(out)
    with (
        RunFolder(out / "controls" / "scratch").lock(),
        pytest.raises(ConfigError, match="controls/scratch"),
    ):
        folder.start_anew()
    assert (out / "d4").exists()
    folder.start_anew()
    assert {p.name for p in out.iterdir()} == {".arskit"}


class Hearing(Quiet):
    """Remembers what is done otherwise than it was asked for."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def aside(self, line: str) -> None:
        self.told.append(line)


def test_a_curve_that_was_begun_late_or_broken_off_is_no_curve(
    host: Host, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """Its last point is not that of the member; run.heldout_every may change under way."""
    flags: dict[str, Any] = {
        "family__members": "d2..d3", "family__vocab_size": 300, "family__aspect": 4.0,
        "train__iterations": (4, 2), "train__batch_size": 4, "data__source": str(text_folder),
        "data__sequence_length": 32, "data__heldout_tokens": 512, "run__log_every": 4,
    }  # fmt: skip
    drawn = plan_of(host, **flags, run__heldout_every=1)
    flat, watcher = plan_of(host, **flags), Hearing()
    asked = plan_of(host, **flags, run__heldout_every=1, run__controls="scratch")
    for plan, member in ((drawn, "d2"), (flat, "d3")):
        with pytest.raises(Preempted):
            execute(plan, host, tmp_path, cache, watcher=Cutting(member))
    execute(asked, host, tmp_path, cache, watcher=watcher)
    assert watcher.told[0].startswith("d2: finished without a held-out curve, so controls are")
    run = read_run(tmp_path)
    assert [m.curve for m in run.members] == [(), ()]
    assert [p.partition(":")[0] for p in run.problems if "from birth to end" in p] == ["d2", "d3"]


def test_a_member_that_is_born_again_without_its_parents_moments_is_said_to_be(
    controlled: Path, cache: Path, host: Host, tmp_path: Path
) -> None:
    """Its parent's state went when it was finished, so it cannot be what it was."""
    mine, watcher = tmp_path / "run", Hearing()
    shutil.copytree(controlled, mine)
    shutil.rmtree(mine / "d4")
    execute(plan_run(frozen_settings(mine), host), host, mine, cache, watcher=watcher)
    assert watcher.told[-1:] == [
        (
            "d4: the training state of d3 is gone, so its moments begin at zero; it will not be to "
            "the bit what it would have been"
        )
    ]
    assert read_run(mine).members[-1].metrics["birth"]["optimizer_state"] == "fresh"


def test_a_choice_outlives_a_run_that_trains_nothing(
    controlled: Path, cache: Path, host: Host, tmp_path: Path
) -> None:
    mine = tmp_path / "run"
    shutil.copytree(controlled, mine)
    chosen = select(mine, Rule((Aim("parameters"),)), cache)
    assert chosen["member"] == "d2"
    execute(plan_run(frozen_settings(mine), host), host, mine, cache, watcher=Quiet())
    assert json.loads((mine / BEST).read_text(encoding="utf-8"))["member"] == "d2"


def test_a_run_that_was_killed_before_it_chose_does_so_when_it_goes_on(
    controlled: Path, cache: Path, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "run"
    shutil.copytree(controlled, mine)
    shutil.rmtree(mine / "d4")
    plan = plan_run(frozen_settings(mine), host)
    assert select(mine, Rule((Aim("parameters"),)), cache)["member"] == "d2"
    assert newer_than_best(mine) == []

    def killed(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("ars_kit.runs._record", killed)
        with pytest.raises(ZeroDivisionError):
            execute(plan, host, mine, cache, watcher=Quiet())
    assert newer_than_best(mine) == ["d4"]
    write_report(mine)
    assert "Finished since that choice: d4." in (mine / "report.md").read_text(encoding="utf-8")
    execute(plan, host, mine, cache, watcher=Quiet())
    record = json.loads((mine / BEST).read_text(encoding="utf-8"))
    assert record["metric"] == "bits_per_byte"
    assert [*record["among"]] == ["d2", "d3", "d4"]
    assert "Finished since" not in (mine / "report.md").read_text(encoding="utf-8")


def test_no_member_can_be_called_controls() -> None:
    with pytest.raises(ConfigError, match="none of best, controls, trackers"):
        resolve({"family.members": "controls:num_hidden_layers=2"}, {})


def test_every_figure_is_traced_to_what_it_came_from(controlled: Path, run: RunRecord) -> None:
    facts = {m["member"]: m for m in lineage_facts(run)["members"]}
    for member in run.members:
        found = facts[member.name]
        hashes = ("manifest", "config_hash", "source_hash", "data_hash", "tokenizer_hash")
        assert all(len(found[key]) == 64 for key in hashes)
        assert found["versions"]["ars-kit"]
        parent = facts.get(found["parent"] or "")
        assert found["parent_manifest"] == (parent and parent["manifest"])
        assert member.metrics["parent_manifest"] == found["parent_manifest"]
        kept = resolve({}, {}, controlled / member.name / "run.toml")
        assert kept.flat() == run.settings.flat()


def test_the_comparison_is_complete_and_json_ready(controlled: Path) -> None:
    found = compare([controlled])
    assert [g.name for g in found.groups] == [
        "family", "scratch", "no-growth", "one-long-run", "no-ars",
    ]  # fmt: skip
    assert len(found.reached) == 3 + 1 + 1 + 3
    assert not [row for row in found.reached if row.why]
    json.dumps(found.facts(), allow_nan=False)
    (first,) = [r for r in found.reached if (r.group, r.member) == ("scratch", "d2")]
    assert first.saved() == 0  # it is the very same model


def test_in_a_chain_of_one_shape_the_last_is_the_largest(
    controlled: Path, host: Host, cache: Path, text_folder: Path, tmp_path: Path
) -> None:
    """The path to it is the whole chain, so the control of one member gets all that was spent."""
    plan = plan_of(
        host, family__base=str(controlled / "d2"), family__members="d1..d3",
        train__iterations="3,2", train__batch_size=4, data__sequence_length=32,
        data__source=str(text_folder), data__heldout_tokens=512, run__controls="no-growth,no-ars",
    )  # fmt: skip
    plan = with_curve(plan)
    metrics, _ = execute(plan, host, tmp_path, cache, watcher=Quiet())
    controls = plan_controls(plan, host, metrics)
    alone = controls[0]
    assert alone.budget == metrics[-1]["lineage_flops"] == sum(m["total_flops"] for m in metrics)
    assert [(m.name, m.steps) for m in alone.plan.members] == [("d1", 3 + 2 + 2)]
    for control in controls:
        train_control(control, host, tmp_path, cache, watcher=Quiet(), stop=Stop())
    (row,) = [r for r in compare([tmp_path]).reached if r.group == "no-growth"]
    assert (row.member, row.against) == ("d1", "d3")
    # And the plot follows the control's own chain to its end.
    told = build(read_run(tmp_path)).sections[2].blocks[0].alt  # type: ignore[union-attr]
    ends = dict(re.findall(r"(\S+) ends at (\S+?)[;.]\s", told + " "))
    last = read_run(tmp_path / "controls" / "no-ars").member("d3")
    assert last is not None
    assert last.last_heldout is not None
    assert ends["no-ars"] == f"{last.last_heldout:.3f}"


def test_a_control_that_a_base_teaches_pays_for_its_teacher(controlled: Path, host: Host) -> None:
    plan = plan_of(
        host, family__base=str(controlled / "d2"), family__members="d1..d3",
        family__strategy="distill", data__sequence_length=32, run__controls="one-long-run",
    )  # fmt: skip
    (control,) = plan_controls(plan, host)
    (member,) = control.plan.members
    assert member.teacher_flops > 0
    assert control.record()["flops_per_step"] == member.planned_flops / member.steps
    assert member.planned_flops == pytest.approx(
        control.budget, abs=member.planned_flops / member.steps / 2
    )


def test_a_member_that_is_taught_is_estimated_by_its_own_trial(
    controlled: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of members of one shape two trials differ by noise alone, which nothing may multiply."""
    times = iter((1.0, 0.5))
    monkeypatch.setattr("ars_kit.plan.probe_training", lambda *_, **__: next(times))
    plan = plan_of(
        host, family__base=str(controlled / "d2"), family__members="d1,d2",
        family__strategy="distill", data__sequence_length=32,
    )  # fmt: skip
    for member in estimate(plan).members:
        assert member.seconds == pytest.approx(member.steps * member.planned_flops / member.flops)
