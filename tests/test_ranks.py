"""Two processes (gloo, CPU) train a family as one does: DDP, FSDP2, a stop, a death, a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import rendezvous, run_two

from ars_kit.errors import ArsKitError, ConfigError, Preempted
from ars_kit.sharding import is_sharded

STOPPED, LOST, MOVED = "fsdp", "lost", "moved"
ADAPTED = ("--depth", "depth", "--trainable", "lora:r=2", "--document-mask")
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def train(out: Path, texts: str, *more: str) -> None:
    from ars_kit.cli import cli

    options = [
        "run", "--members", "d2,d3", "--iterations", "6,4", "--data", texts,
        "--sequence-length", "32", "--batch-size", "4", "--device", "cpu",
        "--set", "family.vocab_size=300", "--set", "family.aspect=4", "--set", "run.log_every=2",
        "--set", "run.save_every=4", "--heldout-every", "5", "--out", str(out), *more,
    ]  # fmt: skip
    cli.main(options, standalone_mode=False)


@contextmanager
def struck(number: int, member: str, step: int) -> Iterator[None]:
    """Send this process a signal in the middle of a step."""
    from ars_kit import train as loop

    plain = loop.train_step

    def step_of(job: Any, wrapped: Any, at: int) -> None:
        if (job.plan.name, at) == (member, step):
            (job.folder.path.parent / f"{job.folder.path.name}-sharded").write_text(
                str(is_sharded(job.model))
            )
            os.kill(os.getpid(), number)
        plain(job, wrapped, at)

    loop.train_step = step_of
    try:
        yield
    finally:
        loop.train_step = plain


def rank_main(rank: int, home: Path, texts: str) -> None:
    from accelerate.state import AcceleratorState

    train(home / "ddp", texts)
    train(home / "ddp-adapted", texts, *ADAPTED)

    AcceleratorState._reset_state()
    os.environ.update(FSDP)
    try:
        with struck(signal.SIGTERM, "d3", 4) if rank else struck(0, "d3", 4):
            train(home / STOPPED, texts)
    except Preempted as error:
        (home / f"stopped{rank}").write_text(str(error))
    if rank == 0:
        shutil.copytree(home / STOPPED, home / MOVED)
    train(home / STOPPED, texts)

    AcceleratorState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    with pytest.raises(ConfigError, match="batch_size 3 cannot be split"):
        train(home / "odd", texts, "--batch-size", "3")
    try:
        with struck(signal.SIGKILL, "d3", 6) if rank else struck(0, "d3", 6):
            train(home / LOST, texts)
    except ArsKitError as error:
        (home / "lost-words").write_text(str(error))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, cache: Path) -> Path:
    """Run folders: ``one`` of one process, the rest of two, ``lost`` and ``moved`` ended by one."""
    home, texts = tmp_path_factory.mktemp("ranks"), str(text_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARSKIT_CACHE", str(cache))
        train(home / "one", texts)
        train(home / "one-adapted", texts, *ADAPTED)
        ends = (0, -signal.SIGKILL)
        run_two(__file__, home, texts, environment=rendezvous(), ends=ends)
        for left in (LOST, MOVED):
            assert not (home / left / "d3").exists()
        parts = sorted((home / MOVED / ".arskit" / "state" / "d3").glob("step-*/*.safetensors"))
        (home / "parts").write_text(json.dumps([[p.name, p.stat().st_size] for p in parts]))
        for left in (LOST, MOVED):
            train(home / left, texts)
    return home


def rows(run: Path, member: str, record: str = "history") -> list[dict[str, Any]]:
    lines = (run / member / f"{record}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("how", ["ddp", STOPPED, LOST, MOVED])
@pytest.mark.parametrize("member", ["d2", "d3"])
def test_two_processes_follow_the_losses_of_one(trained: Path, how: str, member: str) -> None:
    """Also where they were stopped and went on, and where one was left to go on alone."""
    for record in ("history", "heldout"):
        one, two = (rows(trained / run, member, record) for run in ("one", how))
        assert [r["step"] for r in one] == [r["step"] for r in two]
        assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=2e-3)
    one, two = (rows(trained / run, member) for run in ("one", how))
    assert [r["gradient"] for r in two] == pytest.approx([r["gradient"] for r in one], abs=1e-2)


def test_two_processes_train_adapters_on_documents_apart_as_one_does(trained: Path) -> None:
    from ars_kit.outcome import read_metrics
    from ars_kit.store import RunFolder

    runs = [trained / f"{how}-adapted" for how in ("one", "ddp")]
    for member in ("d2", "d3"):
        one, two = ([r["loss"] for r in rows(run, member)] for run in runs)
        assert two == pytest.approx(one, abs=2e-3)
        one, two = ([r["gradient"] for r in rows(run, member)] for run in runs)
        assert two == pytest.approx(one, abs=1e-2)
    heirs = [read_metrics(RunFolder(run), "d3") for run in runs]
    assert heirs[0]["heldout_loss"] == pytest.approx(heirs[1]["heldout_loss"], abs=2e-3)
    assert heirs[0]["trainable_parameters"] < heirs[0]["parameters"]


@pytest.mark.parametrize("how", ["ddp", STOPPED, LOST, MOVED])
def test_what_they_leave_is_a_member_like_any_other(trained: Path, how: str) -> None:
    from ars_kit.models import load_member, weights_of
    from ars_kit.store import verify

    assert verify(trained / how) == (["d2", "d3"], [])
    one, two = (weights_of(load_member(trained / run / "d3")) for run in ("one", how))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-2, rtol=0)


def test_weights_are_sharded_where_the_launcher_asks_for_it(trained: Path) -> None:
    assert (trained / f"{STOPPED}-sharded").read_text() == "True"
    assert (trained / f"{LOST}-sharded").read_text() == "False"


def test_each_process_writes_its_part_of_a_state(trained: Path) -> None:
    (first, size), (second, other) = json.loads((trained / "parts").read_text())
    assert (first[:12], second[:12]) == ("shard-00001-", "shard-00002-")
    assert 0.4 < size / (size + other) < 0.6


def test_they_stop_together_and_say_so(trained: Path) -> None:
    first, second = ((trained / f"stopped{rank}").read_text() for rank in range(2))
    assert first == second
    assert "stopped d3 after step 6 of 12, state saved" in first


def test_who_is_left_alone_ends_with_words(trained: Path) -> None:
    words = (trained / "lost-words").read_text()
    assert words.startswith("process 0 of 2 has lost another")
    assert "start them all again to go on" in words


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
