"""Shared by all tests: small texts, a quiet and offline environment."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import QUIET, call_forked, call_started

from ars_kit.spec import StepSignal
from ars_kit.store import RunFolder

if TYPE_CHECKING:
    from ars_kit.host import Host

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.update(QUIET)
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ("serving_fixtures",)

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "is",
    "für",
    "größer",
    "Straße",
    "naïve",
    "loss",
    "gate",
    "grows",
)

LONG = (
    "test_strategy_runs.py", "test_package.py", "test_run.py", "test_exporting.py",
    "test_strategy_rules.py", "test_memory.py", "test_ranks.py", "test_speed_benchmarks.py",
    "test_plugin_failures.py", "test_recovery.py", "test_lora.py", "test_controls.py",
    "test_stability_benchmark.py", "test_benchmarks.py", "test_sharded_births.py",
    "test_serving_load.py", "test_report.py", "test_docs.py", "test_replay.py",
)  # fmt: skip
"""The files that take longest: they go first, or the last of them would run beside nothing."""

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@functools.cache
def installed() -> Host:
    """Return the installed plugins, to read; to find them takes a look at each distribution."""
    from ars_kit.host import Host  # after the environment is set

    return Host.installed()


def make_text(documents: int, seed: int = 0) -> list[str]:
    """Return documents whose sentences are numbered, so that each is unlike any other."""
    return [
        "\n".join(
            f"{seed}-{d}-{s}: "
            + " ".join(WORDS[(d * 7 + s * 3 + w) % len(WORDS)] for w in range(9))
            for s in range(40)
        )
        for d in range(documents)
    ]


def signal_of(step: int, loss: float, alignment: float = float("nan")) -> StepSignal:
    """Return what a gate would see of an undamped step."""
    import torch  # after the environment is set

    one, no = torch.ones(()), torch.zeros((), dtype=torch.bool)
    turn = torch.tensor(alignment)
    return StepSignal(
        step, torch.tensor(loss), 0.1, no, one, one, one, lambda: torch.ones(2), lambda: turn
    )


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i, text in enumerate(make_text(60)):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arskit(cache: Path, tmp_path: Path) -> Cli:
    """Call the command line in a process forked from one that has imported what it needs."""
    return _command(call_forked, cache, tmp_path)


@pytest.fixture
def arskit_started(cache: Path, tmp_path: Path) -> Cli:
    """Call the command line in a process started for it, as a shell does."""
    return _command(call_started, cache, tmp_path)


def _command(how: Cli, cache: Path, folder: Path) -> Cli:
    own = {"ARSKIT_CACHE": str(cache), "COLUMNS": "200"}

    def call(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return how(args, folder=folder, environment={**os.environ, **own, **extra})

    return call


@pytest.fixture
def tiny(text_folder: Path) -> list[str]:
    """Options of a family that trains in seconds."""
    return [
        "--members", "d2..d4", "--iterations", "6,4", "--data", str(text_folder),
        "--sequence-length", "32", "--batch-size", "4",
        "--set", "family.vocab_size=300", "--set", "run.save_every=5",
        "--set", "family.aspect=4", "--set", "data.heldout_tokens=512",
    ]  # fmt: skip


class Quiet:
    """Follows a family and says nothing."""

    def born(self, *_: Any) -> None: ...

    def steps(self, *_: Any) -> None: ...

    def went_back(self, *_: Any) -> None: ...

    def judged(self, *_: Any) -> None: ...

    def aside(self, *_: Any) -> None: ...

    def finished(self, *_: Any) -> None: ...


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is reported in this process have no plots: they take as long as a small member."""
    from ars_kit import charts

    for plot in ("lines", "bars", "dots"):
        monkeypatch.setattr(charts, plot, lambda *_, **__: "<svg></svg>")


@pytest.fixture(scope="session")
def controlled(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_folder: Path) -> Path:
    """A family of three and all of its controls, trained in this process; not to be changed."""
    from ars_kit.controls import plan_controls, with_curve
    from ars_kit.host import Host
    from ars_kit.plan import plan_run
    from ars_kit.reporting import write_report
    from ars_kit.resolving import resolve
    from ars_kit.runs import execute, train_control
    from ars_kit.trainee import Stop

    out, host = tmp_path_factory.mktemp("controlled") / "run", Host.installed()
    flags = {
        "family.members": "d2..d4", "family.vocab_size": 300, "family.aspect": 4.0,
        "train.iterations": (4, 2), "train.batch_size": 4, "data.source": str(text_folder),
        "data.sequence_length": 32, "data.heldout_tokens": 512,
        "run.controls": "scratch,no-growth,one-long-run,no-ars",
    }  # fmt: skip
    plan = with_curve(plan_run(resolve(flags, {}), host))
    metrics, _ = execute(plan, host, out, cache, watcher=Quiet())
    for control in plan_controls(plan, host, metrics):
        train_control(control, host, out, cache, watcher=Quiet(), stop=Stop())
    write_report(out)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with nothing in it."""
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers, untrained, with its tokenizer."""
    from served import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
