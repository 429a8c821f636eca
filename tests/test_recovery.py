"""Long instability: how it is told; and going back from it ends the same, however interrupted."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import Cli
from rich.console import Console
from test_ranks import FSDP

from ars_kit import durable, states
from ars_kit.damping import DampedOptimizer
from ars_kit.display import Display
from ars_kit.errors import DivergedError, Preempted
from ars_kit.history import read_history
from ars_kit.instability import Instability, Watch
from ars_kit.recovery import Recovery
from ars_kit.resolving import resolve
from ars_kit.settings import differences
from ars_kit.store import RunFolder
from ars_kit.teaching import Teaching
from ars_kit.train import train_member, train_step
from ars_kit.trainee import Stop, Trainee
from ars_kit_plugins.gating import Guard

# --- the watch -------------------------------------------------------------------------------


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (level + 0.1 * noise).tolist()


def rows(losses: list[Any], first: int = 0) -> list[dict[str, Any]]:
    return [{"step": first + i, "loss": loss} for i, loss in enumerate(losses)]


def test_a_rise_that_lasts_is_found_and_dated() -> None:
    found = Watch(steps=64).look(rows(noisy(3, 200) + noisy(5, 200, 1)))
    assert found is not None
    # The median turns when half its window has; that must then last for 64 steps.
    assert 200 + 15 + 64 <= found.noticed < 200 + 32 + 64
    assert 200 - 32 <= found.since <= 200
    assert found.best == pytest.approx(3, abs=0.1)
    assert found.median == pytest.approx(5, abs=0.1)
    assert found.sigma == pytest.approx(0.1, abs=0.05)
    assert f"since step {found.since} or later" in str(found)


def test_what_passes_is_not_found() -> None:
    spikes = noisy(3, 400)
    for at in range(50, 400, 40):
        spikes[at : at + 8] = [50.0] * 8
    calm = {
        "descent": [5 * math.exp(-i / 100) + v for i, v in enumerate(noisy(0, 400))],
        "noise": noisy(3, 400),
        "constant": [2.0] * 400,
        "spikes": spikes,
        "a rise of a few sigmas": noisy(3, 200) + noisy(3.3, 200),
        "a rise that heals": noisy(3, 200) + noisy(6, 50) + noisy(3, 150),
        "rises that heal": noisy(3, 100) + 3 * (noisy(6, 50) + noisy(3, 50)),
        "a small rise of constants": [2.0] * 100 + [2.1] * 200,
        "nothing finite": [math.nan] * 400,
        "no loss": [None] * 400,
    }
    for name, losses in calm.items():
        assert Watch().look(rows(losses)) is None, name


def test_sigma_has_a_floor() -> None:
    for level, sigma in ((1.0, 0.02), (5.0, 0.05)):
        found = Watch().look(rows([level] * 100 + [level + 6.1 * sigma] * 200))
        assert found is not None
        assert found.sigma == pytest.approx(sigma)
        assert Watch().look(rows([level] * 100 + [level + 5.9 * sigma] * 200)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_losses_that_are_not_finite_count_as_high(bad: float | None) -> None:
    found = Watch().look(rows(noisy(3, 100) + [bad] * 200))
    assert found is not None
    assert found.median == math.inf


def test_it_does_not_matter_when_somebody_looks() -> None:
    losses = rows(noisy(3, 150) + noisy(6, 250, 1))
    whole = Watch().look(losses)
    for size in (1, 7, 64):
        watch, found = Watch(), None
        for first in range(0, len(losses), size):
            copy = Watch()
            copy.load_state_dict(json.loads(json.dumps(watch.state_dict())))
            watch = copy
            found = found or watch.look(losses[first : first + size])
        assert found == whole


def test_it_is_found_again_if_it_goes_on() -> None:
    losses, watch, found = rows(noisy(3, 100) + noisy(6, 300)), Watch(steps=64), []
    for row in losses:
        found += [f for f in [watch.look([row])] if f]
    assert len(found) >= 3
    assert found[1].noticed - found[0].noticed == 64 + 8


@pytest.mark.parametrize("bad", [{"limit": 0.0}, {"limit": math.nan}, {"steps": -1}])
def test_settings_without_a_meaning_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Watch(**bad)


# --- going back ------------------------------------------------------------------------------

VOCABULARY, LENGTH, BATCH, STEPS = 16, 8, 2, 120
BAD = 70
"""The batch after which the weights are of no use any more."""


class Bigrams(torch.nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


class Places:
    """Batches by their place; remembers which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def batch(self, step: int, micro: int, micro_batches: int) -> Any:
        self.read.append(step)
        rng = np.random.default_rng(step)
        first = rng.integers(VOCABULARY, size=(BATCH, 1))
        return (first + 3 * np.arange(LENGTH + 1)) % VOCABULARY


class Fragile(torch.optim.SGD):
    """Is thrown off by certain batches, for long."""

    def __init__(self, params: Any, places: Places, bad: Callable[[int], bool]) -> None:
        super().__init__(params, lr=0.5)
        self.places, self.bad = places, bad

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.bad(self.places.read[-1]):
            rng = torch.Generator().manual_seed(self.places.read[-1])
            (table,) = self.param_groups[0]["params"]
            with torch.no_grad():
                table.copy_(20 * torch.randn(table.shape, generator=rng))


class Quiet:
    """Looks on, and may be told to kill or to ask for an end at a step of the training."""

    def __init__(self, at: int | None = None, stop: Stop | None = None) -> None:
        self.at, self.stop, self.events = at, stop, []

    def steps(self, member: str, done: int, rows: Any, meter: Any) -> None:
        pass

    def went_back(self, member: str, event: Any) -> None:
        self.events.append(event)


class KilledError(BaseException):
    """Stands for SIGKILL."""


def settings(**train: Any) -> Any:
    flags = {
        "train.batch_size": BATCH, "data.sequence_length": LENGTH, "run.save_every": 16,
        "run.log_every": 10, "train.schedule": "constant", "train.on_instability": "rollback",
        "train.instability_steps": 8,
    }  # fmt: skip
    changed = {f"train.{k}" if "__" not in k else k.replace("__", "."): v for k, v in train.items()}
    return resolve({**flags, **changed}, {}, None)


def job_in(
    out: Path, chosen: Any, *, bad: Callable[[int], bool] = lambda place: place == BAD
) -> Trainee:
    folder = RunFolder(out)
    folder.create()
    model, places, stop = Bigrams(), Places(), Stop()
    optimizer = DampedOptimizer(
        Fragile(model.parameters(), places, bad), {"guard": Guard()}, reduce=None
    )
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    plan: Any = SimpleNamespace(name="d1", steps=STEPS, start=0)
    made: Any = Trainee(
        plan=plan, settings=chosen, model=model, optimizer=optimizer, batches=places,
        accelerator=Accelerator(cpu=True), folder=folder, watcher=Quiet(), stop=stop,
        warmup=5, recovery=Recovery.of(chosen.train),
    )  # type: ignore[arg-type]  # fmt: skip
    return made


def history(out: Path) -> list[dict[str, Any]]:
    return read_history(out / ".arskit" / "state" / "d1" / "history.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainee, Path]:
    out = tmp_path_factory.mktemp("undisturbed")
    job = job_in(out, settings())
    train_member(job)
    return job, out


def test_the_run_goes_back_and_leaves_the_batches_out(undisturbed: tuple[Trainee, Path]) -> None:
    job, out = undisturbed
    (event,) = job.recovery.events
    assert job.watcher.events == [event]  # type: ignore[attr-defined]
    # The newest state with a whole calm window behind it; the bad batch lies behind that.
    assert event["back_to"] == 48
    assert event["since"] <= BAD < event["noticed"]
    assert event["batches"] == event["noticed"] + 1 - 48
    read: Any = job.batches
    past = event["noticed"] + 1
    assert read.read == [*range(past), *range(past, STEPS + event["batches"])]
    found = history(out)
    assert [row["step"] for row in found] == list(range(STEPS))
    assert [row["step"] for row in found if "went_back" in row] == [48]
    assert found[48]["went_back"] == [event]
    assert found[-1]["loss"] < 1
    # What was undone has cost its tokens all the same.
    assert job.meter.tokens > STEPS * BATCH * LENGTH
    assert job.optimizer.summary()["steps"] == STEPS


def test_where_most_losses_are_not_finite_the_event_is_json_all_the_same() -> None:
    recovery = Recovery.of(settings().train)
    recovery.look(rows(noisy(3, 100) + [math.nan] * 200))
    assert recovery.found is not None
    event = recovery.undo(recovery.found, 48)
    assert event["median"] is None
    json.dumps(recovery.events, allow_nan=False)
    console = Console(file=io.StringIO(), width=200)
    plan: Any = SimpleNamespace(members=[])
    Display(plan, console).went_back("d1", event)
    assert "(median loss -, best 2." in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_a_strategy_does_after_a_step_is_counted_for_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path, settings())
    square = torch.ones(4, 4)
    job.teaching = Teaching(on_step=lambda *_: square @ square)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    train_step(job, job.model, 0)
    assert job.meter.loss_flops == 3 * 2 * 4**3


def test_a_run_that_looks_on_is_left_to_itself(tmp_path: Path) -> None:
    job = job_in(tmp_path, settings(on_instability="ignore"))
    train_member(job)
    assert job.recovery.events == []
    assert history(tmp_path)[-1]["loss"] > 5
    assert job.folder.states("d1").steps() == [STEPS]


def test_a_warm_up_longer_than_the_training_hides_no_more_than_its_half(tmp_path: Path) -> None:
    job = job_in(tmp_path, settings(on_instability="stop"), bad=lambda place: place == 115)
    job.plan.steps, job.warmup = 160, 1000  # type: ignore[misc]
    with pytest.raises(DivergedError, match="d1 is unstable"):
        train_member(job)


def test_it_stops_with_the_state_from_before(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="the state after step 48, from before, is kept"):
        train_member(job_in(tmp_path, settings(on_instability="stop")))
    step, tree = RunFolder(tmp_path).states("d1").load() or (0, {})
    assert step == 48
    calm = job_in(tmp_path / "calm", settings(), bad=lambda place: False)
    calm.plan.steps = 48  # type: ignore[misc]
    train_member(calm)
    assert torch.equal(tree["weights"]["table"], calm.model.table.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("then", ["rollback", "ignore"])
def test_a_run_that_stopped_goes_on_by_another_rule(
    tmp_path: Path, undisturbed: tuple[Trainee, Path], then: str
) -> None:
    with pytest.raises(DivergedError):
        train_member(job_in(tmp_path, settings(on_instability="stop")))
    job = job_in(tmp_path, settings(on_instability=then))
    train_member(job)
    same = torch.equal(job.model.table, undisturbed[0].model.table)
    assert same == (then == "rollback")


def test_what_follows_it_everywhere_is_given_up(tmp_path: Path) -> None:
    job = job_in(tmp_path, settings(max_rollbacks=2), bad=lambda place: place in (70, 130, 190))
    with pytest.raises(DivergedError, match="has gone back 2 times"):
        train_member(job)
    assert len(job.recovery.events) == 2
    again = job_in(tmp_path, settings(max_rollbacks=2), bad=lambda place: place in (70, 130, 190))
    with pytest.raises(DivergedError, match="has gone back 2 times"):
        train_member(again)


def test_before_the_first_good_state_it_goes_back_to_the_birth(tmp_path: Path) -> None:
    job = job_in(tmp_path, settings(), bad=lambda place: place == 41)
    train_member(job)
    (event,) = job.recovery.events
    assert event["back_to"] == 0
    assert history(tmp_path)[-1]["loss"] < 1


def assert_ends_as(undisturbed: tuple[Trainee, Path], job: Trainee, out: Path) -> None:
    whole, there = undisturbed
    assert torch.equal(whole.model.table, job.model.table)
    assert job.recovery.events == whole.recovery.events
    assert history(out) == history(there)


@pytest.mark.parametrize("at", [3, 49, 71, 79, 81, 96, 97, 120, 150])
def test_killed_while_it_trains_it_ends_the_same(
    undisturbed: tuple[Trainee, Path], tmp_path: Path, at: int
) -> None:
    job = job_in(tmp_path, settings())
    step, taken = job.optimizer.base.step, []

    def dying(closure: Any = None) -> Any:
        taken.append(1)
        if len(taken) == at:
            raise KilledError
        return step(closure)

    job.optimizer.base.step = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        train_member(job)
    job = job_in(tmp_path, settings())
    train_member(job)
    assert_ends_as(undisturbed, job, tmp_path)


class Moments:
    """Counts the moments before and after each commit and each removal; may kill at one."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.at, self.names = at, []
        patch.setattr(states, "commit_directory", self.watched(durable.commit_directory))
        patch.setattr(states, "discard", self.watched(durable.discard))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **kwargs: Any) -> None:
            self.pass_by(f"{function.__name__} {path.name}")
            function(path, *args, **kwargs)
            self.pass_by(f"{function.__name__} {path.name}")

        return call

    def pass_by(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            raise KilledError


def test_killed_while_it_writes_it_ends_the_same(
    undisturbed: tuple[Trainee, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each moment of going back, and at every ninth of the others."""
    with monkeypatch.context() as patch:
        whole = Moments(patch)
        train_member(job_in(tmp_path / "whole", settings()))
    names = whole.names
    begin = names.index("discard step-00000080")
    end = len(names) - 1 - names[::-1].index("discard step-00000048")
    assert "commit_directory step-00000048.1" in names[begin:end]
    for at in [*range(0, begin, 9), *range(begin, end + 1), *range(end + 1, len(names), 9)]:
        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Moments(patch, at)
            with pytest.raises(KilledError):
                train_member(job_in(out, settings()))
        job = job_in(out, settings())
        train_member(job)
        assert_ends_as(undisturbed, job, out)


@pytest.mark.parametrize("at", [7, 48, 60, 75, 81, 90, 95, 96, 130])
def test_asked_to_stop_it_ends_the_same(
    undisturbed: tuple[Trainee, Path], tmp_path: Path, at: int
) -> None:
    job = job_in(tmp_path, settings())
    step, taken = job.optimizer.base.step, []

    def noting(closure: Any = None) -> Any:
        taken.append(1)
        if len(taken) == at:
            job.stop.signal = 15
        return step(closure)

    job.optimizer.base.step = noting  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        train_member(job)
    job = job_in(tmp_path, settings())
    train_member(job)
    assert_ends_as(undisturbed, job, tmp_path)


def twice_bad(place: int) -> bool:
    return place in (70, 130)


@pytest.mark.parametrize("asked", [None, 98, 104])
def test_it_goes_back_twice_and_to_a_later_state(tmp_path: Path, asked: int | None) -> None:
    """A state that a signal asked for, just after the first time, is none to go back to."""
    job = job_in(tmp_path, settings(), bad=twice_bad)
    step, taken = job.optimizer.base.step, []

    def noting(closure: Any = None) -> Any:
        taken.append(1)
        if len(taken) == asked:
            job.stop.signal = 15
        return step(closure)

    job.optimizer.base.step = noting  # type: ignore[method-assign]
    if asked is not None:
        with pytest.raises(Preempted):
            train_member(job)
        job = job_in(tmp_path, settings(), bad=twice_bad)
    train_member(job)
    assert [event["back_to"] for event in job.recovery.events] == [48, 64]
    assert job.recovery.passed_over == sum(event["batches"] for event in job.recovery.events)
    read: Any = job.batches
    assert read.read[-1] == STEPS - 1 + job.recovery.passed_over
    assert history(tmp_path)[-1]["loss"] < 2


def test_how_often_somebody_looks_changes_nothing(
    undisturbed: tuple[Trainee, Path], tmp_path: Path
) -> None:
    job = job_in(tmp_path, settings(run__log_every=1))
    train_member(job)
    assert_ends_as(undisturbed, job, tmp_path)


def test_a_run_that_begins_to_watch_late_goes_back_to_where_it_began(tmp_path: Path) -> None:
    job = job_in(tmp_path, settings(on_instability="ignore"))
    step = job.optimizer.base.step

    def noting(closure: Any = None) -> Any:
        if job.batches.read[-1] == 49:  # type: ignore[attr-defined]
            job.stop.signal = 15
        return step(closure)

    job.optimizer.base.step = noting  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        train_member(job)
    job = job_in(tmp_path, settings(), bad=lambda place: place == 78)
    train_member(job)
    (event,) = job.recovery.events
    assert event["back_to"] == 50
    assert history(tmp_path)[-1]["loss"] < 1


def test_where_it_goes_back_to_may_not_change_under_way() -> None:
    calm, other = settings(on_instability="stop"), settings(on_instability="stop")
    assert differences(calm, settings(on_instability="stop", run__save_every=7)) == []
    assert differences(calm, settings(max_rollbacks=9, instability_limit=3.0)) == []
    assert differences(settings(), settings(run__log_every=7)) == []
    assert differences(settings(), settings(run__save_every=7)) == ["run.save_every: 16 -> 7"]
    assert differences(other, settings(run__save_every=7)) == ["run.save_every: 16 -> 7"]


# --- the command line ------------------------------------------------------------------------

WILD = [
    "--members", "d2", "--iterations", "80,4", "--lr", "0.2", "--set", "train.lr_vectors=0.2",
    "--set", "train.instability_limit=1e-6", "--set", "train.instability_steps=1",
    "--set", "train.warmup_steps=5", "--schedule", "constant", "--set", "run.save_every=20",
]  # fmt: skip
"""A learning rate that lets the loss fluctuate, and a limit that calls it unstable."""


@pytest.mark.parametrize("remedy", ["stop", "rollback"])
def test_a_run_says_how_it_ended_and_how_to_go_on(
    tiny: list[str], arskit: Cli, tmp_path: Path, remedy: str
) -> None:
    options = [*tiny, *WILD, "--set", "train.max_rollbacks=2"]
    done = arskit("run", *options, "--set", f"train.on_instability={remedy}")
    assert done.returncode == 6, done.stderr
    assert "d2 is unstable: the median loss stands at" in done.stderr
    assert "Traceback" not in done.stderr
    went_back = done.stderr.count("unstable since step")
    assert went_back == (2 if remedy == "rollback" else 0)
    assert not (tmp_path / "checkpoints" / "d2").exists()
    done = arskit("run", *options, "--set", "train.on_instability=ignore", "--json")
    assert done.returncode == 0, done.stderr
    (metrics,) = json.loads(done.stdout)["members"]
    assert len(metrics["rollbacks"]) == went_back


@pytest.mark.slow
def test_two_processes_go_back_together(tiny: list[str], cache: Path, tmp_path: Path) -> None:
    """Sharded; what they have kept in parts, two that hold the whole go on with."""
    out = tmp_path / "run"
    for remedy, ending in (("rollback", 1), ("ignore", 0)):
        launcher = FSDP if ending else {}
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
             f"--master_port={free_port()}", "-m", "ars_kit", "run", *tiny, *WILD,
             "--set", "train.max_rollbacks=1", "--set", f"train.on_instability={remedy}",
             "--device", "cpu", "--out", str(out)],
            env={**os.environ, **launcher, "ARSKIT_CACHE": str(cache)},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        parts = list((out / ".arskit" / "state").glob("*/step-*/shard-*"))
        assert bool(parts) == bool(launcher), done.stderr[-3000:]
        assert bool(done.returncode) == bool(ending), done.stderr[-3000:]
        if ending:
            assert done.stderr.count("unstable since step") == 1
            assert "d2 is unstable" in done.stderr
    metrics = json.loads((out / "d2" / "metrics.json").read_text())
    assert len(metrics["rollbacks"]) == 1
    assert metrics["processes"] == 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_finding_reads_as_a_clause() -> None:
    found = Instability(since=8, noticed=127, median=5.5, best=3.25, sigma=0.125)
    assert str(found) == (
        "the median loss stands at 5.500 up to step 127, more than it should above its best, 3.250 "
        "(sigma 0.125), since step 8 or later"
    )
