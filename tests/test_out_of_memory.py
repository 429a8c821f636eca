"""A device that runs out of memory in the middle of a run: the batch is read in smaller parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quiet

from ars_kit import backward, memory
from ars_kit.errors import ArsKitError
from ars_kit.fitting import fitted_plan
from ars_kit.history import read_history
from ars_kit.host import Host
from ars_kit.plan import plan_run
from ars_kit.resolving import resolve
from ars_kit.runs import execute
from ars_kit.spec import StepSignal
from ars_kit_plugins.distillation import TaughtLoss
from ars_kit_plugins.gating import SurpriseGate

WHOLE = memory.whole_loss


class KilledError(BaseException):
    """Stands for SIGKILL."""


class Device:
    """Has room for so many sequences at a time, from some micro-batch on; may die at one."""

    def __init__(self, room: int, *, since: int = 0, dies: int | None = None) -> None:
        self.room, self.since, self.dies, self.asked = room, since, dies, 0

    def loss(self, wrapped: Any, window: Any, *positions: Any) -> Any:
        self.asked += 1
        if self.dies == self.asked:
            raise KilledError
        found = WHOLE(wrapped, window, *positions)
        if self.asked > self.since and len(window) > self.room:
            raise torch.OutOfMemoryError
        return found


class Listening(Quiet):
    """Hears what is done otherwise than it was asked for."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def aside(self, *line: Any) -> None:
        self.lines += line


class Runs:
    """Runs a small family on a device in a folder of its own."""

    def __init__(self, folder: Path, cache: Path, texts: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.texts, self.patch = folder, cache, texts, patch

    def __call__(
        self, name: str, device: Device, *, strategy: str = "progressive", **train: Any
    ) -> tuple[Any, Path, list[str]]:
        self.patch.setattr(memory, "whole_loss", device.loss)
        flags = {
            "family.members": "d2,d3", "family.vocab_size": 300, "family.aspect": 4.0,
            "train.iterations": (3, 2), "train.batch_size": 8, "data.source": str(self.texts),
            "data.sequence_length": 16, "data.heldout_tokens": 256, "run.save_every": 2,
            "family.strategy": strategy,
            **{f"train.{key}": value for key, value in train.items()},
        }  # fmt: skip
        host, watcher = Host.installed(), Listening()
        plan = fitted_plan(plan_run(resolve(flags, {}), host), host, self.folder / name)
        metrics, _ = execute(plan, host, self.folder / name, self.cache, watcher=watcher)
        lines = [line for line in watcher.lines if "ran out of memory" in line]
        return metrics, self.folder / name, lines


@pytest.fixture
def run(tmp_path: Path, cache: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, cache, text_folder, monkeypatch)


def losses(out: Path, member: str) -> list[float]:
    return [row["loss"] for row in read_history(out / member / "history.jsonl")]


def test_the_run_is_that_of_the_finer_division(run: Runs) -> None:
    metrics, out, lines = run("halved", Device(2))
    asked, whole, _ = run("asked", Device(8), accumulation=4)
    assert [m["accumulation"] for m in metrics] == [4, 4]
    for member in ("d2", "d3"):
        assert losses(out, member) == losses(whole, member)
    assert [m["heldout_loss"] for m in metrics] == [m["heldout_loss"] for m in asked]
    assert [m["loss_flops"] for m in metrics] == [m["loss_flops"] for m in asked]
    # 8 sequences, 4, 2; an heir, which is no smaller, does not try again.
    assert lines == [
        "d2: cpu ran out of memory at step 0; goes on with --accumulation 2, 4 sequences at a time",
        "d2: cpu ran out of memory at step 0; goes on with --accumulation 4, 2 sequences at a time",
    ]


def test_in_the_middle_of_a_step_nothing_of_it_is_left(run: Runs) -> None:
    """The second of two micro-batches does not fit: the gradients of the first must go."""
    metrics, out, lines = run("halved", Device(2, since=7), accumulation=2)
    _, whole, _ = run("whole", Device(8), accumulation=2)
    assert metrics[0]["accumulation"] == 4
    assert "at step 3" in lines[0]
    assert losses(out, "d2") == pytest.approx(losses(whole, "d2"), rel=1e-6)
    assert metrics[0]["tokens"] == 9 * 8 * 16


def test_a_run_that_was_killed_goes_on_with_it(run: Runs) -> None:
    with pytest.raises(KilledError):
        run("killed", Device(2, dies=2 + 4 * 5))
    metrics, out, lines = run("killed", Device(8))
    _, whole, _ = run("asked", Device(8), accumulation=4)
    assert not lines
    assert [m["accumulation"] for m in metrics] == [4, 4]
    assert losses(out, "d2") == losses(whole, "d2")


def test_a_loss_of_a_strategy_s_own_that_does_not_fit_is_read_in_smaller_parts_too(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TaughtLoss.__call__

    def loss(self: TaughtLoss, lesson: Any) -> Any:
        if len(lesson.inputs) > 4:
            raise torch.OutOfMemoryError
        return whole(self, lesson)

    monkeypatch.setattr(TaughtLoss, "__call__", loss)
    metrics, _, lines = run("taught", Device(8), strategy="distill")
    assert [m["accumulation"] for m in metrics] == [1, 2]
    assert lines == [
        "d3: cpu ran out of memory at step 0; goes on with --accumulation 2, 4 sequences at a time"
    ]


def test_one_sequence_that_does_not_fit_ends_the_run(run: Runs) -> None:
    with pytest.raises(ArsKitError, match="ran out of memory at step 0 of d2: lower"):
        run("none", Device(0))


def test_a_gate_that_the_device_has_no_room_for_is_not_to_blame(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = SurpriseGate.__call__

    def gate(self: SurpriseGate, signal: StepSignal) -> Any:
        if signal.step == 4:
            raise torch.OutOfMemoryError
        return asked(self, signal)

    with monkeypatch.context() as full:
        full.setattr(SurpriseGate, "__call__", gate)
        with pytest.raises(ArsKitError, match="ran out of memory at step 4 of d2: lower") as told:
            run("full", Device(8))
    assert "plugin" not in str(told.value)
    _, out, _ = run("full", Device(8))
    _, whole, _ = run("whole", Device(8))
    assert losses(out, "d3") == losses(whole, "d3")


@pytest.mark.parametrize(("batch", "parts"), [(9, 3), (7, 7)])
def test_a_batch_that_is_odd_is_divided_as_it_can_be(run: Runs, batch: int, parts: int) -> None:
    metrics, _, _ = run("odd", Device(batch - 1), batch_size=batch)
    assert metrics[0]["accumulation"] == parts


class Full:
    """Has no room for a parameter's step, the third of a batch larger than it has room for."""

    def __init__(self, device: Device, patch: pytest.MonkeyPatch, *, step: int) -> None:
        self.device, self.step, self.asked, self.stepped = device, step, 0, 0
        self.alone = backward.step_alone
        patch.setattr(backward, "step_alone", self)
        patch.setattr(memory.ChunkedLoss, "agrees", lambda _: False)  # the loss is the device's

    def __call__(self, *args: Any) -> None:
        if self.asked != self.device.asked:
            self.asked, self.stepped = self.device.asked, 0
        self.stepped += 1
        if self.asked == self.step + 1 and self.stepped == 3:
            raise torch.OutOfMemoryError
        self.alone(*args)


BROKEN = (
    "ran out of memory in the middle of step 3, when some parameters had been stepped; goes on "
    "from the state after step 2"
)
TINY: dict[str, Any] = {"memory": "tiny"}


def test_parameters_that_were_stepped_are_those_of_the_newest_state_again(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(8)
    Full(device, monkeypatch, step=3)
    metrics, out, lines = run("broken", device, strategy="trunk", **TINY)
    assert lines == [f"d2: cpu {BROKEN} with --accumulation 2, 4 sequences at a time"]
    assert [m["accumulation"] for m in metrics] == [2, 2]
    # As if step 2 had not fitted: then nothing was stepped, and it is begun anew by itself.
    begun, whole, _ = run("begun", Device(4, since=2), strategy="trunk", **TINY)
    for member in ("d2", "d3"):
        assert losses(out, member) == losses(whole, member)
        assert weights(out, member) == weights(whole, member)
    assert metrics[0]["tokens"] == 10 * 8 * 16  # what was undone was trained on, too
    assert metrics[0]["flops"] == pytest.approx(begun[0]["flops"] * 10 / 9)
    # The heir left after 7 of 9 steps, one of which was taken twice.
    assert metrics[1]["lineage_tokens"] - metrics[1]["tokens"] == 8 * 8 * 16
    before = metrics[1]["lineage_flops"] - metrics[1]["total_flops"]
    assert before == pytest.approx(begun[0]["flops"] * 8 / 9)


@pytest.mark.slow
def test_the_first_step_can_be_begun_anew_from_the_birth(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(8)
    Full(device, monkeypatch, step=0)
    _, out, lines = run("broken", device, **TINY)
    assert "goes on from the state after step 0" in lines[0]
    _, asked, _ = run("asked", Device(8), accumulation=2, **TINY)
    assert losses(out, "d2") == losses(asked, "d2")
    assert weights(out, "d2") == weights(asked, "d2")


@pytest.mark.slow
def test_a_run_killed_after_it_has_gone_back_does_not_go_back_again(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(8, dies=6)  # in the first step of two micro-batches
    Full(device, monkeypatch, step=3)
    with pytest.raises(KilledError):
        run("killed", device, **TINY)
    _, out, lines = run("killed", Device(8), **TINY)
    assert not lines
    _, whole, _ = run("begun", Device(4, since=2), **TINY)
    assert losses(out, "d2") == losses(whole, "d2")
    assert weights(out, "d3") == weights(whole, "d3")


@pytest.mark.slow
def test_a_run_under_tiny_that_was_killed_ends_with_the_same_bits(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.ChunkedLoss, "agrees", lambda _: False)
    with pytest.raises(KilledError):
        run("killed", Device(8, dies=7), **TINY)
    _, out, _ = run("killed", Device(8), **TINY)
    _, whole, _ = run("whole", Device(8), **TINY)
    for member in ("d2", "d3"):
        assert losses(out, member) == losses(whole, member)
        assert weights(out, member) == weights(whole, member)


def test_one_sequence_that_does_not_fit_ends_a_run_under_tiny(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.ChunkedLoss, "agrees", lambda _: False)
    with pytest.raises(ArsKitError, match="lower --batch-size or --sequence-length; the state"):
        run("none", Device(0, since=5), **TINY)


def weights(out: Path, member: str) -> bytes:
    return (out / member / "model.safetensors").read_bytes()
