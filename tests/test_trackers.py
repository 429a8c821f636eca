"""Trackers: what they are told, when one fails, and that nothing leaves the machine unasked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import Quiet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ars_kit.errors import ConfigError, PluginError, Preempted
from ars_kit.host import Host, Plugin
from ars_kit.outcome import frozen_settings
from ars_kit.plan import RunPlan, plan_run
from ars_kit.records import read_run
from ars_kit.resolving import resolve
from ars_kit.runs import execute
from ars_kit.schema import Choice, parse_choice
from ars_kit.spec import Offer, TrackedRun, hookimpl
from ars_kit.tracking import name_of, told

RUN = TrackedRun("run", Path("home"), {"train.lr": 0.1, "family.base": "none"}, 0)


class Book:
    """Writes down what it is told."""

    pages: list[Any]

    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        Book.pages = []

    def _note(self, what: str, *rest: Any) -> None:
        if self.fails == what:
            raise OSError("no ink")
        Book.pages.append((what, *rest))

    def start(self, run: TrackedRun) -> None:
        self._note("start", run)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._note("log", dict(values), step)

    def finish(self) -> None:
        self._note("finish")


@pytest.fixture(scope="module")
def host() -> Host:
    host = Host.installed()
    offers = hookimpl(lambda: [Offer("book", "a book", Book)])
    host.register(SimpleNamespace(arskit_trackers=offers), Plugin("book", "arskit-book", "1"))
    assert not host.quarantined
    return host


def plan_of(controlled: Path, host: Host, *trackers: str, members: str = "d2,d3") -> RunPlan:
    settings = frozen_settings(controlled)
    chosen = tuple(map(parse_choice, trackers))
    run = replace(settings.run, trackers=chosen, controls=(), heldout_every=4, log_every=3)
    family = replace(settings.family, members=members)
    return plan_run(replace(settings, run=run, family=family), host)


def test_a_tracker_is_told_what_the_history_says(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "followed"
    execute(plan_of(controlled, host, "book"), host, out, cache, watcher=Quiet())
    (what, run), *logs, last = Book.pages
    assert (what, last) == ("start", ("finish",))
    assert (run.name, run.first_step) == ("followed", 0)
    assert run.folder == out / "trackers" / "book"
    assert run.settings["train.batch_size"] == 4
    steps = [(values, step) for _, values, step in logs if "train/loss" in values]
    d2, d3 = read_run(out).members
    assert [step for _, step in steps] == list(range(12 + 6))
    for (values, _), row in zip(steps, [*d2.history, *d3.history], strict=True):
        assert values["train/loss"] == row["loss"]
        assert values["train/damping"] == row["gradient"] * row["step_size"]
        assert values["train/skipped"] == 0
        assert values["train/surprise"] == row["surprise"]
    curve = [(values["heldout/loss"], step) for _, values, step in logs if "heldout/loss" in values]
    assert curve == [(r["loss"], r["step"] + at) for at, m in ((0, d2), (12, d3)) for r in m.curve]
    figures = [values for _, values, _ in logs if "member/bits_per_byte" in values]
    assert [f["member/bits_per_byte"] for f in figures] == [
        m.metrics["bits_per_byte"] for m in (d2, d3)
    ]
    # A finished run has nothing to tell.
    Book.pages = []
    execute(plan_of(controlled, host, "book"), host, out, cache, watcher=Quiet())
    assert Book.pages == []


class Complaining(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def aside(self, *lines: Any) -> None:
        self.lines += lines


def test_one_that_fails_later_is_put_aside_and_the_run_goes_on(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    plan, watcher = plan_of(controlled, host, "book:fails=log", members="d2"), Complaining()
    metrics, _ = execute(plan, host, tmp_path / "run", cache, watcher=watcher)
    assert [m["model_id"] for m in metrics] == ["d2"]
    (line,) = watcher.lines
    assert line.startswith(
        "tracker 'book' of plugin 'book' (arskit-book 1) failed while it was told"
    )
    assert "no ink" in line
    assert line.endswith("the run goes on without it")


def test_one_that_cannot_begin_stops_the_run_before_it_trains(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    plan = plan_of(controlled, host, "book:fails=start", members="d2")
    with pytest.raises(PluginError, match=r"failed when it was started.*no ink"):
        execute(plan, host, tmp_path / "run", cache, watcher=Quiet())
    assert read_run(tmp_path / "run").members[0].state == "waiting"


def scalars(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


class Cut(Quiet):
    """Asks the run to stop at the first steps that are read."""

    def __init__(self) -> None:
        self.cut = False

    def steps(self, *_: Any) -> None:
        import signal

        if not self.cut:
            self.cut = True
            signal.raise_signal(signal.SIGTERM)


def test_tensorboard_shows_a_run_that_was_interrupted_once(
    controlled: Path, host: Host, cache: Path, tmp_path: Path
) -> None:
    plan, out = plan_of(controlled, host, "tensorboard", members="d2"), tmp_path / "run"
    with pytest.raises(Preempted):
        execute(plan, host, out, cache, watcher=Cut())
    execute(plan, host, out, cache, watcher=Quiet())
    home = out / "trackers" / "tensorboard" / "run"
    assert list(home.glob("events.out.tfevents.*"))
    found = scalars(home)
    (member,) = read_run(out).members
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in member.history]
    assert {"train/damping", "train/guard", "heldout/loss"} <= {*found.Tags()["scalars"]}
    (judged,) = found.Scalars("member/bits_per_byte")
    assert judged.value == pytest.approx(member.metrics["bits_per_byte"], rel=1e-6)


def test_a_package_that_is_not_installed_is_named(host: Host, monkeypatch: Any) -> None:
    monkeypatch.setattr("ars_kit_plugins.tracking.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs wandb: pip install 'ars-kit\[wandb\]'"):
        host.make("trackers", Choice("wandb"))


class Recorder(ModuleType):
    """Stands for a package of somebody else's: writes down every call, and answers with itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in {"config", "utils", "validation"}:
            return self
        if name.startswith("MAX_"):
            return 100

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return [] if name == "search_experiments" else self

        return call

    def called(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return next((args, kwargs) for n, args, kwargs in self.calls if n == name)


def follow(host: Host, monkeypatch: Any, choice: str) -> Recorder:
    """Let a tracker follow a run over accelerate's own class and a package that records."""
    Accelerator(cpu=True)  # in a run there is one
    name = choice.partition(":")[0]
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr("ars_kit_plugins.tracking.find_spec", lambda _: package)
    tracker = host.make("trackers", parse_choice(choice))
    tracker.start(RUN)
    tracker.log({"train/loss": 2.0}, 7)
    tracker.finish()
    return package


def test_wandb_stays_offline_unless_told_otherwise(host: Host, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    package = follow(host, monkeypatch, "wandb")
    _, said = package.called("init")
    assert said == {
        "project": "arskit", "name": "run", "dir": "home", "mode": "offline", "entity": None,
    }  # fmt: skip
    assert package.called("update")[0] == (dict(RUN.settings),)
    assert package.called("log") == (({"train/loss": 2.0},), {"step": 7})
    assert package.called("finish")
    online = follow(host, monkeypatch, "wandb:mode=online,entity=us,project=mine")
    assert online.called("init")[1].items() >= {"mode": "online", "entity": "us"}.items()


def test_mlflow_writes_to_the_run_folder_unless_told_otherwise(
    host: Host, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    package = follow(host, monkeypatch, "mlflow")
    ((uri,), _) = package.called("set_tracking_uri")
    assert uri == f"sqlite:///{Path('home').resolve()}/mlflow.db"
    assert package.called("log_metrics") == (({"train/loss": 2.0},), {"step": 7})
    assert package.called("end_run")
    there = follow(host, monkeypatch, "mlflow:uri=http://here:5000")
    assert there.called("set_tracking_uri")[0] == ("http://here:5000",)


def test_trackio_is_local_unless_a_space_is_named(host: Host, monkeypatch: Any) -> None:
    assert follow(host, monkeypatch, "trackio").called("init")[1]["space_id"] is None
    package = follow(host, monkeypatch, "trackio:space=us/runs")
    assert package.called("init")[1] == {
        "project": "arskit", "name": "run", "space_id": "us/runs",
    }  # fmt: skip


def test_a_tracker_that_nobody_offers_is_refused_before_anything(host: Host) -> None:
    with pytest.raises(PluginError, match=r"no tracker named 'tensorbord'.*did you mean"):
        plan_run(resolve({"run.trackers": "tensorbord"}, {}), host)


def test_names_and_settings_are_what_a_tracker_can_keep() -> None:
    assert name_of(Path("/a/run")) == "run"
    assert name_of(Path("/a/run/controls/scratch")) == "run-scratch"
    found = told(resolve({}, {}))
    assert found["family.base"] == "none"
    assert found["train.iterations"] == "100,50"
    assert found["optimizer.name"] == "ars"
    assert all(isinstance(v, bool | int | float | str) for v in found.values())
